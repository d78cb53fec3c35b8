"""Numba kernels: a whole recurrent layer, input product included, for one direction and a slice of the batch.

target       what vectors the machine has, and the size of the register tile
vector       a Numba type for one vector register
activations  sigmoid, tanh, relu over vectors
tile         the register-tiled product, as LLVM IR
job          the record that carries a kernel's arguments
products     packing, row products, weight gradients
loops        the two time loops, over any cell
build        compile all of it for a cell and a dtype, with a disk cache
pool         threads that run kernels side by side
"""
