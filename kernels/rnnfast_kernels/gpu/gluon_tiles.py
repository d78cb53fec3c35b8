"""The recurrent product of a Gluon loop: weights in registers as far as they fit, the rest in shared memory.

R batch rows and U hidden units of a program, W warps. Each warp multiplies k of its own, in pieces of a power of two;
a piece is a batch of W products [R, K] x [K, U] by matrix instructions, and the warps' sums are added in shared memory.
The operand comes from global memory in words of 32 bits, 16 bytes at a time, each by the thread that multiplies it.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

# Values of k that a warp has are a multiple of this.
UNIT = gl.constexpr(16)


@gluon.constexpr_function
def pieces_of(width, R, entries):
    """A warp's `width` values of k in pieces, largest first: powers of two that take 64 registers at most.

    R rows of an operand whose registers hold `entries` values of k.
    """
    sizes = []
    while width > sum(sizes):
        sizes.append(min(2048 * entries // R, 1 << (width - sum(sizes)).bit_length() - 1))
    return tuple(sizes)


@gluon.constexpr_function
def piece_sizes(kept, width, R, entries):
    """The pieces of a warp: first those whose weights are in registers, `kept` values of k, then the others."""
    return pieces_of(kept, R, entries) + pieces_of(width - kept, R, entries)


@gluon.constexpr_function
def kept_pieces(kept, R, entries):
    return len(pieces_of(kept, R, entries))


@gluon.constexpr_function
def start_of(sizes, j):
    """A warp's values of k in front of piece j."""
    return sum(sizes[:j])


@gluon.constexpr_function
def product_layout(warps):
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def operand_layout(side, warps, itemsize):
    """The layout of an operand: a thread has 4 bytes of neighbouring k, one register of an instruction."""
    return gl.DotOperandLayout(side, product_layout(warps), 4 // itemsize)


@gluon.constexpr_function
def quads_layout(layout, R, entries):
    """`layout`, of an operand [W, R, K], with one entry for the four registers that an instruction wants of a thread.

    A register holds `entries` values of k; the four are of rows b and b + 8, at k and k + 4 * `entries`.
    """

    def cut(bases):
        return [
            [s, b if b < 8 else b // 2, k // entries if k < 4 * entries else k // (2 * entries)] for s, b, k in bases
        ]

    registers = [[s, b, k] for s, b, k in layout.reg_bases if b != 8 and k % entries == 0 and k != 4 * entries]
    others = map(cut, (layout.lane_bases, layout.warp_bases, layout.block_bases))
    shape = layout.shape
    return gl.DistributedLinearLayout(cut(registers), *others, [shape[0], R // 2, shape[2] // (2 * entries)])


@gluon.constexpr_function
def own_places_layout(layout):
    """A layout of shared memory for what threads hold in `layout`: 16 bytes of a thread, then those of the next."""
    first, rest = layout.reg_bases[:3], layout.reg_bases[3:]
    return gl.SharedLinearLayout([*first, *layout.lane_bases, *layout.warp_bases, *rest], [], 16)


@gluon.constexpr_function
def sums_layout(warps, U):
    """The layout in which a thread has the sums of all warps for its elements of a tile."""
    along = min(U, 32)
    return gl.BlockedLayout([warps, 1, 1], [1, 32 // along, along], [1, warps, 1], [2, 1, 0])


@gluon.jit
def load_piece(p_w, n0, j: gl.constexpr, H: gl.constexpr, ROW: gl.constexpr, WIDTH: gl.constexpr, SIZES: gl.constexpr,
               U: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Piece j of recurrent weights, [W, K, U], for hidden units n0, n0 + 1, ... in rows along k.

    Gates follow one another: WIDTH values of k for each, of which a row has ROW.
    """
    K: gl.constexpr = SIZES[j]
    layout: gl.constexpr = operand_layout(1, WARPS, p_w.dtype.element_ty.primitive_bitwidth // 8)
    s = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    k = gl.arange(0, K, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    n = n0 + gl.arange(0, U, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    k = WARPS * start_of(SIZES, j) + s * K + k
    gate, k = k // WIDTH, k % WIDTH
    return gl.load(p_w + (gate * H + n) * ROW + k, mask=(k < ROW) & (n < H), other=0.0)


@gluon.jit
def in_shared_memory(weights):
    """A piece of the weights in shared memory, each thread's own where no other meets it."""
    layout: gl.constexpr = own_places_layout(gl.to_linear_layout(weights.type.layout, weights.shape))
    return gl.allocate_shared_memory(weights.dtype, weights.shape, layout, weights)


@gluon.jit
def load_weights(p_w, n0, COUNT: gl.constexpr, H: gl.constexpr, ROW: gl.constexpr, WIDTH: gl.constexpr,
                 SIZES: gl.constexpr, KEPT: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr):  # fmt: skip
    """Every piece of COUNT products' weights: one for each gate, or for all gates as one. KEPT of them in registers."""
    weights = ()
    for g in gl.static_range(COUNT):
        pieces = ()
        for j in gl.static_range(len(SIZES)):
            piece = load_piece(p_w + g * H * ROW, n0, j, H, ROW, WIDTH, SIZES, U, WARPS)
            pieces = pieces + ((piece if j < KEPT else in_shared_memory(piece)),)
        weights = weights + (pieces,)
    return weights


@gluon.jit
def zero_sums(COUNT: gl.constexpr, R: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr):
    sums = ()
    for _ in gl.static_range(COUNT):
        sums = sums + (gl.zeros([WARPS, R, U], gl.float32, product_layout(WARPS)),)
    return sums


@gluon.jit
def add_products(operand, weights, sums, j: gl.constexpr, KEPT: gl.constexpr, COUNT: gl.constexpr,
                 PRECISION: gl.constexpr):  # fmt: skip
    """sums[g] + operand @ piece j of weights[g], each warp for itself."""
    layout: gl.constexpr = operand_layout(1, operand.shape[0], operand.dtype.primitive_bitwidth // 8)
    result = ()
    for g in gl.static_range(COUNT):
        piece = weights[g][j] if j < KEPT else weights[g][j].load(layout)
        result = result + (mma_v2(operand, piece, sums[g], PRECISION),)
    return result


@gluon.jit
def memory_for_sums(COUNT: gl.constexpr, R: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr):
    """Shared memory for the warps' sums: COUNT buffers, which the compiler tells apart better than parts of one."""
    memory = ()
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    for _ in gl.static_range(COUNT):
        memory = memory + (gl.allocate_shared_memory(gl.float32, [WARPS, R, U], layout),)
    return memory


@gluon.jit
def add_warps(memory, sums, COUNT: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr):
    """The sums of all warps, through shared memory: COUNT tiles [R, U]."""
    for g in gl.static_range(COUNT):
        memory[g].store(sums[g])
    tiles = ()
    for g in gl.static_range(COUNT):
        tiles = tiles + (gl.sum(memory[g].load(sums_layout(WARPS, U)), 0),)
    return tiles
