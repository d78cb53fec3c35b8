"""What processor kernels are compiled for, what vectors it has, and what register tile suits them."""

import functools
import os
from dataclasses import dataclass

from llvmlite import binding

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# Rows that a product with a weight as it is takes at once. More are worth packing the weight for.
MOST_RAW_ROWS = 3


@dataclass(frozen=True)
class Processor:
    """A processor in LLVM's words."""

    triple: str
    name: str
    features: str


@functools.cache
def processor() -> Processor:
    """The host, unless NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name another, as they do for Numba."""
    name = os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = binding.get_host_cpu_features().flatten()
    return Processor(binding.get_process_triple(), name, features)


@dataclass(frozen=True)
class Target:
    """One way to compute on one processor.

    given: dtype of a layer's tensors. dtype: of registers, and of what kernels keep for themselves. lanes: elements of
    a vector register. accumulators: registers that a tile of the product may fill with sums; the rest hold the panel's
    vectors and the broadcast. terms: of a sum that one instruction adds; if two, they are products of bfloat16 numbers.
    """

    given: str
    dtype: str
    lanes: int
    accumulators: int
    terms: int = 1

    @property
    def item(self) -> int:
        """Bytes of an element that kernels keep for themselves."""
        return ITEM_BYTES[self.dtype]

    @property
    def given_item(self) -> int:
        """Bytes of an element of the layer's tensors."""
        return ITEM_BYTES[self.given]

    @property
    def vector(self) -> int:
        """Bytes of a vector."""
        return self.lanes * self.item

    def padded(self, count: int) -> int:
        """Elements of a row of `count`, rounded up to whole vectors."""
        return -(-count // self.lanes) * self.lanes

    def lines(self, depth: int) -> int:
        """Vectors that hold `depth` terms of every lane's sum."""
        return -(-depth // self.terms)

    def rows(self, gates: int) -> int:
        """Rows of the tallest register tile, for panels of so many gates."""
        return max(1, self.accumulators // (gates * widest_panel(gates)))

    def widths(self, gates: int) -> tuple[int, ...]:
        """Vectors of a panel of so many gates, which is the narrower the fewer units are left."""
        return tuple(gates * blocks for blocks in (1, 2, 4) if blocks <= widest_panel(gates))


def widest_panel(gates: int) -> int:
    """Blocks of the widest panel: about four vectors."""
    return {1: 4, 2: 2}.get(gates, 1)


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
def has_bfloat16_products() -> bool:
    """Whether one instruction multiplies two pairs of bfloat16 numbers in every lane and adds them in float32."""
    return {"+avx512f", "+avx512bf16"} <= set(processor().features.split(","))


@functools.cache
def has_float16() -> bool:
    """Whether instructions convert float16 to float32 and back."""
    host = processor()
    return not host.triple.startswith("x86_64") or bool({"+f16c", "+avx512f"} & set(host.features.split(",")))


@functools.cache
def target(given: str) -> Target:
    """Describe how the processor computes layers of a dtype: half precision in float32."""
    host = processor()
    dtype = given if given == "float64" else "float32"
    terms = 2 if given == "bfloat16" and has_bfloat16_products() else 1
    size, registers = vector_bytes_and_registers(host.triple, set(host.features.split(",")))
    return Target(given, dtype, max(1, size // ITEM_BYTES[dtype]), 24 if registers == 32 else 12, terms)
