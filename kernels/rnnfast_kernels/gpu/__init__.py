"""The Triton kernels: three ways to run the time loop on a GPU, generic over the cell.

activations.py  the names a cell is bound to, and the bound cells
tiles.py        what both passes share: rows of a step, loads, stores, the matrix product
given.py        what a cell is given beside gates and states: parameters and signals
barrier.py      the barrier between the programs that share a recurrence
forward.py      the whole time loop in one kernel, resident or cooperative
backward.py     the same, in reverse
gluon_tiles.py      the product of a Gluon loop: weights in registers, warps that split k
gluon_exchange.py   how programs exchange a tile there, by a counter or by polling, and why that is enough
gluon_forward.py    the cooperative loop in Gluon, for NVIDIA
gluon_backward.py   the same, in reverse
streamed.py     one step, between two library matrix products
problem.py      what a plan is made from, and what it says
arguments.py    the tensors that a kernel is given
plan.py         which loop, which tiles: a pure function of the sizes and the device
vary.py         the best plan with some of its choices replaced, for tuning
launch.py       from a plan to a grid
aot.py          compiles all of it without a GPU and reports registers, spills and shared memory
"""

import triton

# Its major and minor version.
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))

if TRITON < (3, 5):
    raise ImportError(f"the GPU kernels need Triton 3.5 or newer, found {triton.__version__}", name=__name__)
