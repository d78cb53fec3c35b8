"""What vectors this machine has, and what register tile suits them."""

import functools
from dataclasses import dataclass

ITEM_BYTES = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class Target:
    """One dtype on one processor.

    lanes: elements of a vector register. accumulators: registers that a tile of the product may fill with sums; the
    rest hold the panel's vectors and the broadcast.
    """

    dtype: str
    lanes: int
    accumulators: int

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.dtype]

    @property
    def vector(self) -> int:
        """Bytes of a vector."""
        return self.lanes * self.item

    def rows(self, vectors: int) -> int:
        """Rows of a register tile that is `vectors` wide."""
        return max(1, self.accumulators // vectors)

    def padded(self, count: int) -> int:
        """Elements of a row of `count`, rounded up to whole vectors."""
        return -(-count // self.lanes) * self.lanes


def vector_bytes_and_registers(triple: str, features: set[str]) -> tuple[int, int]:
    """Size and number of the vector registers that these LLVM features promise; 0 bytes where there are none."""
    if "+avx512f" in features:
        return 64, 32
    if "+avx" in features:
        return 32, 16
    if triple.startswith("x86_64"):
        return 16, 16
    if triple.startswith(("aarch64", "arm64")):
        return 16, 32
    return 0, 16


@functools.cache
def target(dtype: str) -> Target:
    """Describe the processor that Numba compiles for: the host, unless NUMBA_CPU_NAME and _FEATURES name another."""
    from numba.core.registry import cpu_target

    triple, _, features = cpu_target.target_context.codegen().magic_tuple()
    size, registers = vector_bytes_and_registers(triple, set(features.split(",")))
    return Target(dtype, max(1, size // ITEM_BYTES[dtype]), 24 if registers == 32 else 12)
