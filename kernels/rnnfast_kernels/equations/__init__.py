"""A cell is its forward equations; everything else is derived from them. No torch in here.

    step function --trace--> graph --differentiate--> residuals, gradient, tangents --emit--> Python source

`cell.Cell` puts these together. The emitted functions are plain Python over names like `sigmoid` and `where_greater`,
which `rnnfast_kernels.bind` gives a meaning: Numba vectors, Triton tiles or torch tensors.
"""
