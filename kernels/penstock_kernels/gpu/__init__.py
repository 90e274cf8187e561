"""Kernels by Triton, one op a file; on CuPy arrays from cubins, on numpy arrays in Triton's interpreter."""
