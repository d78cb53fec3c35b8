"""Compiled recurrent kernels: Triton in `gpu`, Numba in `cpu`, both built from the equations in `cells`.

Nothing here imports torch; importing this package imports neither Triton nor Numba.
"""
