"""A GPU without hardware: compiled kernels run from their PTX, instruction by instruction, with every access checked.

code: text to instructions. operations: arithmetic. memory: bounds, alignment, data races. block: the state of a block
of threads. banks: what accesses to shared memory cost.
instructions and matrices: what reads and writes memory, and what a warp does together. machine: decoding,
the ways of threads, the order of blocks.
"""
