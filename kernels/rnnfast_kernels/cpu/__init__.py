"""Numba kernels: a whole recurrent layer, input product included, for one direction and a slice of the batch.

target   the processor, its vectors, and the size of the register tile
job      the record of integers that carries a kernel's arguments
ir       vectors, memory, activations, number formats, the matrix tile, as LLVM IR
loops    what a job does: pack, forward, backward, tangents, gradients of weights
plan     how a layer is cut into jobs, recorded once for its sizes
runtime  compile, keep on disk, run on threads
"""
