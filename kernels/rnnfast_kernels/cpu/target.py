"""What processor kernels are compiled for, what vectors it has, and what register tile suits them."""

import ctypes
import functools
import os
import sys
from dataclasses import dataclass

from llvmlite import binding

from rnnfast_kernels.cpu.formats import FORMATS, Format

ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# Rows that a product with a weight as it is takes at once. More are worth packing the weight for.
MOST_UNPACKED_ROWS = 3


@dataclass(frozen=True)
class Processor:
    """A processor in LLVM's words."""

    triple: str
    name: str
    features: str


# What RNNFAST_CPU may ask for, as processors. AVX-512 takes precedence where there is it: its registers hold four times
# as much, which outweighs the lower clock that some processors run it at. Those that add only one 512-bit vector in a
# cycle (some Skylake Xeons, which nothing tells apart) are as fast or faster with "avx2".
X86 = {
    "sse": ("x86-64", ""),
    "avx2": ("x86-64-v3", "+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2"),
}


@functools.cache
def processor() -> Processor:
    """The host, or as much of it as RNNFAST_CPU allows; or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name for Numba.

    Raises:
        ValueError: RNNFAST_CPU is none of "native", "avx512", "avx2" and "sse", or the host lacks these instructions.
    """
    triple = binding.get_process_triple()
    host = binding.get_host_cpu_features()
    asked = os.environ.get("RNNFAST_CPU") or "native"
    here = ["native"]
    if triple.startswith("x86_64"):
        here += ["avx512"] * host.get("avx512f", False) + ["avx2"] * host.get("avx2", False) + ["sse"]
    if asked not in here:
        raise ValueError(f"RNNFAST_CPU: expected one of {', '.join(map(repr, here))} on this processor, got {asked!r}")
    if asked in X86:
        return Processor(triple, *X86[asked])
    name = os.environ.get("NUMBA_CPU_NAME") or binding.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    return Processor(triple, name, host.flatten() if features is None else features)


@dataclass(frozen=True)
class Target:
    """One way to compute on one processor.

    io: dtype of a layer's tensors. dtype: of registers, and of what kernels keep for themselves. lanes: elements of
    a vector register. registers: how many of those there are. terms: of a sum that stand in one element of an operand;
    if two, they are bfloat16 numbers. format: of panels that are packed beforehand, None for those packed in
    the call. dot: the instruction that multiplies integers (see `int8`).
    """

    io: str
    dtype: str
    lanes: int
    registers: int
    terms: int = 1
    format: Format | None = None
    dot: str = ""

    @property
    def head(self) -> int:
        """Lines of a panel before its terms: initial values; of scaled weights those of the sums, scales and biases."""
        return 3 if self.is_scaled else 1

    @property
    def is_scaled(self) -> bool:
        """Whether weights, and the rows that are multiplied with them, are integers times a scale for each row."""
        return self.format is not None and self.format.scaled

    @property
    def operand_elements(self) -> int:
        """Elements of the left operand beside one of a panel: rows stay float32 where shorter weights are widened."""
        return 1 if self.format is None or self.is_scaled else self.terms

    @property
    def adds_128(self) -> bool:
        """Whether rows of int8 are stored with 128 added to their numbers, which the instruction takes as unsigned."""
        return self.dot in ("vpdpbusd", "amx")

    @property
    def operand_head(self) -> int:
        """Bytes before each row of the left operand, whose last four hold the scale of a row of integers."""
        return self.vector if self.is_scaled else 0

    @property
    def acc_bytes(self) -> int:
        """Bytes of an element that kernels keep for themselves."""
        return ITEM_BYTES[self.dtype]

    @property
    def io_bytes(self) -> int:
        """Bytes of an element of the layer's tensors."""
        return ITEM_BYTES[self.io]

    @property
    def vector(self) -> int:
        """Bytes of a vector."""
        return self.lanes * self.acc_bytes

    def padded(self, count: int) -> int:
        """Elements of a row of `count`, rounded up to whole vectors."""
        return -(-count // self.lanes) * self.lanes

    def lines(self, depth: int) -> int:
        """Vectors that hold `depth` terms of every lane's sum."""
        return -(-depth // self.terms)

    def strip(self, vectors: int) -> int:
        """Vectors of a panel that one register tile takes: all where they leave room for enough rows, else a few.

        A tile of R rows and V vectors loads R + V operands for R * V multiply-adds, and holds R * V sums, V vectors and
        a broadcast in registers.
        """
        return vectors if vectors <= self.registers // 5 else (self.registers + 1) // 8

    def fits(self, rows: int, vectors: int) -> bool:
        """Whether the registers hold a tile of several strips: its sums, the panel's vectors and a broadcast."""
        return vectors <= self.strip(vectors) or rows * vectors + vectors + 1 < self.registers

    def rows(self, gates: int) -> int:
        """Rows of the tallest register tile, for panels of so many gates: three quarters of the registers are sums.

        Fewer are where each vector of a panel becomes several, of weights that are widened. AMX takes 16 rows.
        """
        if self.dot == "amx":
            return 16
        sums = self.registers * 5 // 8 if self.operand_elements > 1 else self.registers * 3 // 4
        return max(1, sums // self.strip(gates * widest_panel(gates)))

    def widths(self, gates: int) -> tuple[int, ...]:
        """Vectors of a panel of so many gates, which is the narrower the fewer units are left."""
        return tuple(gates * blocks for blocks in (1, 2, 4) if blocks <= widest_panel(gates))

    @property
    def unroll(self) -> int:
        """Lines of a panel in one round of a tile's loop: with 16 registers counting would cost a quarter of a line."""
        return 4 if self.registers == 16 else 1

    def tile_bytes(self, gates: int) -> int:
        """Memory for the products of the tallest tile with panels of so many gates, or of one matrix."""
        return max(self.rows(g) * g * widest_panel(g) for g in (1, gates)) * self.vector


def widest_panel(gates: int) -> int:
    """Blocks of the widest panel: about four vectors."""
    return {1: 4, 2: 2}.get(gates, 1)


def vector_bytes_and_registers(triple: str, features: set[str]) -> tuple[int, int]:
    """Size and number of the vector registers that these LLVM features promise; 0 bytes where there are none.

    Where a multiply-add is two instructions, one register holds the product.
    """
    if "+avx512f" in features:
        return 64, 32
    if "+avx" in features:
        return 32, 16 if "+fma" in features else 15
    if triple.startswith("x86_64"):
        return 16, 15
    if triple.startswith(("aarch64", "arm64")):
        return 16, 32
    return 0, 15


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether one instruction multiplies two pairs of bfloat16 numbers in every lane and adds them in float32."""
    return {"+avx512f", "+avx512bf16"} <= set(processor().features.split(","))


@functools.cache
def has_float16() -> bool:
    """Whether instructions convert float16 to float32 and back."""
    try:
        host = processor()
    except ValueError:  # RNNFAST_CPU is wrong, which is said where kernels are looked for
        return True
    return not host.triple.startswith("x86_64") or bool({"+f16c", "+avx512f"} & set(host.features.split(",")))


def int8_products(triple: str, features: set[str], lanes: int) -> str:
    """Name the instruction that multiplies int8 numbers by fours, or "plain" where there is none."""
    if triple.startswith(("aarch64", "arm64")):
        return "sdot" if "+dotprod" in features else "plain"
    if {"+avx512f", "+avx512vnni", "+amx-int8", "+amx-tile"} <= features and may_use_amx():
        return "amx"
    if {"+avx512f", "+avx512vnni"} <= features or (lanes == 8 and "+avxvnni" in features):
        return "vpdpbusd"
    if lanes == 8 and "+avx2" in features:
        return "vpmaddubsw"
    return "vpmaddwd" if "+avx512bw" in features else "plain"


@functools.cache
def may_use_amx() -> bool:
    """Ask Linux, once, to let this process use AMX's registers, which are too large for it to save unasked."""
    try:
        call = ctypes.CDLL(None).syscall
    except (AttributeError, OSError, TypeError):
        return False
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return sys.platform == "linux" and call(158, 0x1023, 18) == 0


@functools.cache
def target(given: str, weights: str = "") -> Target:
    """Describe how the processor computes layers of a dtype: half precision in float32.

    weights: the format of weights that are packed beforehand. (Where that is the layer's dtype, panels are the same as
    those packed in the call.)
    """
    host = processor()
    features = set(host.features.split(","))
    dtype = given if given == "float64" else "float32"
    size, registers = vector_bytes_and_registers(host.triple, features)
    lanes = max(1, size // ITEM_BYTES[dtype])
    if weights not in ("", given):
        held = FORMATS[weights]
        dot = int8_products(host.triple, features, lanes) if held.scaled else ""
        return Target(given, dtype, lanes, registers, held.terms, held, dot)
    pairs = given == "bfloat16" and has_bfloat16_products()
    return Target(given, dtype, lanes, registers, 2 if pairs else 1)
