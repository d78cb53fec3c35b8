"""LLVM IR by Numba: vectors, loads and stores, number formats, activations, the matrix tile, waiting.

Nothing here knows a layer; what it emits is bound by name in `loops`.
"""
