"""Numba kernels: a whole recurrent layer, input product included, for one direction and a slice of the batch.

target       the processor, its vectors, and the size of the register tile
vector       a Numba type for one vector register, and its arithmetic
memory       loads and stores at raw addresses
waiting      how threads wait for one another
activations  sigmoid, tanh, relu over vectors
tile         the register-tiled product, as LLVM IR
products     packing of panels, products of rows with panels
loops        the two time loops, over any cell
gradients    the products that follow the backward loop
tasks        the one entry point, and what it can be asked to do
build        from equations to LLVM IR
compiled     machine code, kept on disk and loaded without Numba
job          the record that carries a kernel's arguments
plan         how a layer is cut into jobs; plan_forward, plan_backward: the recipes of the two passes
recipe       a call laid out once and run many times
schedule     how the phases of a call run, as LLVM IR
pool         the threads that share a phase
pages        large pages for large memory
operands     rows of a layer in its own dtype
halves       conversion of half precision
second       loops of second derivatives; plan_second: their recipes
"""
