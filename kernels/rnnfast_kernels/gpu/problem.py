"""What a plan is made from and what it says: a device, one pass over one layer, and how to run it."""

from dataclasses import dataclass

from rnnfast_kernels.cells import CELLS

# Earlier versions of Triton have no Gluon, or another.
FIRST_WITH_GLUON = (3, 6)


def next_power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(n: int, d: int) -> int:
    return -(-n // d)


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device: its name (`sm_90`, `gfx942`), and shared memory for a program in bytes."""

    arch: str
    processors: int
    shared: int
    warp: int = 32

    @property
    def amd(self) -> bool:
        return self.arch.startswith("gfx")


@dataclass(frozen=True)
class Problem:
    """One pass over one layer. B rows, H hidden units, D directions; `precision` is that of `tl.dot`."""

    cell: str
    H: int
    B: int
    D: int
    dtype: str
    precision: str
    backward: bool
    device: Device

    @property
    def gates(self) -> int:
        return CELLS[self.cell].gates

    @property
    def recurrent(self) -> int:
        """The gates that have a recurrent part, and so weights."""
        return CELLS[self.cell].recurrent

    @property
    def itemsize(self) -> int:
        return {"float64": 8, "float32": 4}.get(self.dtype, 2)

    @property
    def row(self) -> int:
        """Entries of a row of weights whose beginning is aligned to 16 bytes, the widest access."""
        return cdiv(self.H * self.itemsize, 16) * 16 // self.itemsize

    @property
    def plain(self) -> bool:
        """Whether products are float32 without matrix instructions, which NVIDIA has for TF32 only."""
        return self.itemsize == 4 and self.precision == "ieee" and not self.device.amd

    @property
    def k_last(self) -> bool:
        """Whether k is the contiguous dimension of the weights, as matrix instructions read them.

        Without them, neighbouring units are contiguous. Shared memory keeps the order of global memory, which avoids
        bank conflicts.
        """
        return not self.plain


@dataclass(frozen=True)
class Plan:
    """How to run one pass.

    loop: "resident", "cooperative" or "streamed". A program computes block_b rows by block_n hidden units. Where a cell
    has no recurrent product, `members` programs of a resident loop share a tile's hidden units. Elsewhere, the product
    over all hidden units is cut into `chunks` of split * block_k, whose weights stay on the chip; in a Gluon loop those
    of the first `kept` chunks in registers. `members` programs share one recurrence; `programs` is the whole grid of a
    resident or cooperative loop. In backward they may form a grid: each multiplies one of `slices` of k with the
    weights of a whole column of programs, who then add up their parts of one another's units. A row of weights is
    `row` entries long: the k of a unit if `k_last`, or the units of a k. `shared` is what a program takes at most;
    `registers`, unless 0, is what a thread may take.
    """

    loop: str
    block_b: int
    block_n: int
    warps: int
    precision: str = "ieee"
    block_k: int = 0
    split: int = 1
    chunks: int = 0
    kept: int = 0
    members: int = 1
    slices: int = 1
    programs: int = 0
    row: int = 0
    k_last: bool = True
    shared: int = 0
    registers: int = 0
    gluon: bool = False
    polled: bool = False

    @property
    def width(self) -> int:
        """The hidden units of a slice of k, of all if there is one, rounded up to whole chunks."""
        return self.chunks * self.split * self.block_k

    @property
    def columns(self) -> int:
        """Programs of a group with the same slice of k."""
        return self.members // self.slices

    @property
    def reach(self) -> int:
        """For how many hidden units a program multiplies: its own, or those of a column of programs."""
        return self.slices * self.block_n
