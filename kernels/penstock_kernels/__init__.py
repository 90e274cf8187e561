"""Numeric kernels of Penstock: one meaning (`reference`), run by Numba (`cpu`) and Triton (`gpu`)."""
