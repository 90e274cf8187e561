"""Kernels by Numba, one op a file; the functions have the names that `reference` gives them."""
