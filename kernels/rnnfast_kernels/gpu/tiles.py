"""What the forward and the backward kernel share: the rows of a step, tiles of tensors, and the matrix product.

Dimensions: T steps, B batch rows, H hidden units, G gates, D directions. A program holds a tile of BLOCK_B batch rows
by BLOCK_N hidden units of one direction.

Rows `b` are counted from the tile's first, b0. A span is where the tile's rows are in a tensor: the index of the first,
and how many there are, of which a tile takes BLOCK_B at most. So most of an address is one number for all threads, and
the rest is the same in every step.

The contracted index k of the recurrent product runs over all H units, in CHUNKS chunks of SPLIT * BLOCK_K. With
SPLIT = 1 a chunk is a matrix; otherwise it is a batch of SPLIT matrices whose products are added at the end: each warp
then has its own part of k, which shortens the chain of dependent products.
"""

import triton
import triton.language as tl
from triton import knobs
from triton.language.target_info import is_cuda

from rnnfast_kernels.gpu import TRITON

# The interpreter multiplies the bit patterns of bfloat16 tiles; in float32 their product is the same, exactly.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)

# On NVIDIA an operand passes through shared memory. Rows of one part of k must be adjacent there, or the threads of a
# warp have bank conflicts. Triton orders the dimensions as in the load's layout; since 3.7, dimensions of which a
# thread holds several elements come first. So `max_contiguous` declares the parts contiguous, which puts them before
# the rows. They are not, but the width of an access depends on k alone, which is contiguous over more entries.
PARTS_FIRST = tl.constexpr(TRITON >= (3, 7) and not knobs.runtime.interpret)


@triton.jit
def place(D, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, MEMBERS: tl.constexpr):
    """What is this program's of a fused loop: its group, direction, first batch row, rows and hidden units."""
    group = tl.program_id(0) // MEMBERS
    n = tl.program_id(0) % MEMBERS * BLOCK_N + tl.arange(0, BLOCK_N)
    return group, group % D, group // D * BLOCK_B, tl.arange(0, BLOCK_B), n


@triton.jit
def all_rows(d, b0, B):
    """The span of a tile in a tensor [D, B, ...] that has no steps."""
    return (d * B + b0).to(tl.int64), B - b0


@triton.jit
def rows_of_step(p, k, reverse, T, B, b0):
    """The span of the k-th step to run, which is step T-1-k in reverse; no rows past the last."""
    t = tl.where(reverse, T - 1 - k, k).to(tl.int64)
    inside = (t >= 0) & (t < T)
    if p.rows is None:
        first = t * B
        count = tl.where(inside, B, 0)
    else:
        first = tl.load(p.first + t, mask=inside, other=0)
        count = tl.load(p.rows + t, mask=inside, other=0).to(tl.int32)
    return first + b0, count - b0


@triton.jit
def resets_of_step(p, k, reverse, b0, b, count, T, B):
    """Which of the rows that run at the k-th step enter it with a state of zero."""  # [BLOCK_B, 1]
    t = tl.where(reverse, T - 1 - k, k).to(tl.int64)
    return tl.load(p.resets + t * B + b0 + b, mask=b < count, other=0)[:, None] != 0


@triton.jit
def load_gates(pointer, span, b, n, d, D, COUNT: tl.constexpr, H: tl.constexpr):
    """COUNT tiles [BLOCK_B, BLOCK_N] of a tensor [R, D, COUNT, H], at one step's rows."""
    first, count = span
    p_tile = pointer + (first * D + d) * (COUNT * H)
    offsets = b[:, None] * (D * COUNT * H) + n[None, :]
    mask = (b < count)[:, None] & (n < H)[None, :]
    tiles = ()
    for g in tl.static_range(COUNT):
        tiles = tiles + (tl.load(p_tile + g * H + offsets, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_gates(
    pointer, tiles, span, b, n, d, D, COUNT: tl.constexpr, START: tl.constexpr, H: tl.constexpr,
    LAST: tl.constexpr = 1 << 20,
):  # fmt: skip
    """Write tiles START, START + 1, ..., with LAST none from there on, to [R, D, COUNT, H] at one step's rows."""
    first, count = span
    p_tile = pointer + (first * D + d) * (COUNT * H)
    offsets = b[:, None] * (D * COUNT * H) + n[None, :]
    mask = (b < count)[:, None] & (n < H)[None, :]
    for g in tl.static_range(COUNT if START + COUNT < LAST else LAST - START):
        tl.store(p_tile + g * H + offsets, tiles[START + g].to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_bias(pointer, d, n, COUNT: tl.constexpr, H: tl.constexpr, DTYPE: tl.constexpr):
    """COUNT rows [1, BLOCK_N] of a tensor [D, COUNT * H], zeros for None."""
    rows = ()
    for g in tl.static_range(COUNT):
        if pointer is None:
            rows = rows + (tl.where(n < H, 0.0, 0.0).to(DTYPE)[None, :],)
        else:
            row = tl.load(pointer + (d * COUNT + g) * H + n, mask=n < H, other=0.0)
            rows = rows + (row.to(DTYPE)[None, :],)
    return rows


@triton.jit
def load_states(pointers, span, b, n, d, D, COUNT: tl.constexpr, H: tl.constexpr, start=0):
    """One tile [BLOCK_B, BLOCK_N] per tensor [R, D, H], at one step's rows; zeros before row `start` and for None."""
    first, count = span
    offsets = b[:, None] * (D * H) + n[None, :]
    mask = ((b >= start) & (b < count))[:, None] & (n < H)[None, :]
    tiles = ()
    for s in tl.static_range(COUNT):
        if pointers[s] is None:
            tiles = tiles + (tl.where(mask, 0.0, 0.0),)
        else:
            tiles = tiles + (tl.load(pointers[s] + (first * D + d) * H + offsets, mask=mask, other=0.0),)
    return tiles


@triton.jit
def store_states(pointers, tiles, span, b, n, d, D, COUNT: tl.constexpr, H: tl.constexpr, start=0):
    """Write one tile per tensor [R, D, H], at one step's rows from row `start` on; nothing where a tensor is None."""
    first, count = span
    offsets = b[:, None] * (D * H) + n[None, :]
    mask = ((b >= start) & (b < count))[:, None] & (n < H)[None, :]
    for s in tl.static_range(COUNT):
        if pointers[s] is not None:
            tl.store(pointers[s] + (first * D + d) * H + offsets, tiles[s].to(pointers[s].dtype.element_ty), mask=mask)


@triton.jit
def widen(tiles, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """Convert to the compute type. Apart from the load, because it waits for what is loaded."""
    wide = ()
    for s in tl.static_range(COUNT):
        wide = wide + (tiles[s].to(DTYPE),)
    return wide


@triton.jit
def select(mask, chosen, others, COUNT: tl.constexpr):
    """Entry by entry `chosen` where the mask holds, and `others` elsewhere."""
    tiles = ()
    for s in tl.static_range(COUNT):
        tiles = tiles + (tl.where(mask, chosen[s], others[s]),)
    return tiles


@triton.jit
def add(tiles, others, COUNT: tl.constexpr):
    """Entry by entry the sum."""
    sums = ()
    for s in tl.static_range(COUNT):
        sums = sums + (tiles[s] + others[s],)
    return sums


@triton.jit
def clear(mask, tiles, COUNT: tl.constexpr):
    """Zero where the mask holds, whatever stood there, NaN included."""
    cleared = ()
    for s in tl.static_range(COUNT):
        cleared = cleared + (tl.where(mask, 0.0, tiles[s]),)
    return cleared


@triton.jit
def chunk_index(j, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The values of k in chunk j: [BLOCK_K], or [SPLIT, BLOCK_K]."""
    k = j * SPLIT * BLOCK_K + tl.arange(0, BLOCK_K)
    if SPLIT > 1:
        k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + k[None, :]
    return k


@triton.jit
def load_weights(pointer, n, count, GATES: tl.constexpr, CHUNKS: tl.constexpr, H: tl.constexpr, ROW: tl.constexpr,
                 K_LAST: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """Every chunk of every gate's recurrent weights, as right operands of products: [(SPLIT,) BLOCK_K, BLOCK_N].

    They come in rows of ROW entries: of a unit's k if K_LAST, or of all units of a k. There are `count` values of k.
    """
    n = tl.expand_dims(n, 0)
    if SPLIT > 1:
        n = tl.expand_dims(n, 0)
    weights = ()
    for g in tl.static_range(GATES):
        p_gate = pointer + g * H * ROW
        chunks = ()
        for j in tl.static_range(CHUNKS):
            k = tl.expand_dims(chunk_index(j, SPLIT, BLOCK_K), -1)
            if K_LAST:
                at = n * ROW + k
                if SPLIT > 1 and PARTS_FIRST and is_cuda():
                    at = tl.max_contiguous(at, [2, BLOCK_K, 1])
                chunks = chunks + (tl.load(p_gate + at, mask=(k < count) & (n < H), other=0.0),)
            else:
                chunks = chunks + (tl.load(p_gate + k * ROW + n, mask=(k < count) & (n < ROW), other=0.0),)
        weights = weights + (chunks,)
    return weights


@triton.jit
def exchange_tile(p, group, n, BLOCK_B: tl.constexpr, WIDTH: tl.constexpr, MEMBERS: tl.constexpr):
    """A group's tile [BLOCK_B, WIDTH] in the first exchange buffer, the way to the second, and this program's part."""
    tile = p.exchange + group.to(tl.int64) * (BLOCK_B * WIDTH)
    slot = (tl.num_programs(0) // MEMBERS).to(tl.int64) * (BLOCK_B * WIDTH)
    return tile, slot, tl.arange(0, BLOCK_B)[:, None] * WIDTH + n[None, :]


@triton.jit
def load_operands(pointer, rows, CHUNKS: tl.constexpr, BLOCK_B: tl.constexpr, ROW: tl.constexpr, SPLIT: tl.constexpr,
                  BLOCK_K: tl.constexpr):  # fmt: skip
    """Every chunk of an exchanged tile, as left operands of products: [(SPLIT,) BLOCK_B, BLOCK_K], all on their way at
    once, so that their latency is paid once.

    The tile has rows of ROW entries, of which the first `rows` are read; what others hold is undefined, and comes out
    in the same rows of the product. Past the first-level cache, which is not coherent between processors.
    """
    b = tl.arange(0, BLOCK_B)[:, None]
    if SPLIT > 1:
        b = tl.expand_dims(b, 0)
    chunks = ()
    for j in tl.static_range(CHUNKS):
        k = tl.expand_dims(chunk_index(j, SPLIT, BLOCK_K), -2)
        at = b * ROW + k
        if SPLIT > 1 and PARTS_FIRST and is_cuda():
            at = tl.max_contiguous(at, [2, 1, BLOCK_K])
        chunks = chunks + (tl.load(pointer + at, mask=b < rows, cache_modifier=".cg"),)
    return chunks


@triton.jit
def zero_product(BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    if SPLIT > 1:
        return tl.zeros([SPLIT, BLOCK_B, BLOCK_N], tl.float32)
    else:
        return tl.zeros([BLOCK_B, BLOCK_N], tl.float32)


@triton.jit
def add_product(a, w, product, PRECISION: tl.constexpr):
    """product + a @ w, accumulated in float32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(a, w, product, input_precision=PRECISION)


@triton.jit
def add_parts(parts, SPLIT: tl.constexpr):
    """The sum over the first dimension of [SPLIT, M, N], whose parts different warps hold: [M, N].

    Halved by `tl.split`, which wants both halves in one thread: the warps exchange their parts once, where the
    compiler's own sum takes several barriers.
    """
    M: tl.constexpr = parts.shape[1]
    N: tl.constexpr = parts.shape[2]
    parts = tl.permute(parts, (1, 2, 0))
    for _ in tl.static_range(5):
        if parts.shape[2] > 1:
            first, second = tl.split(tl.reshape(parts, (M, N, parts.shape[2] // 2, 2)))
            parts = first + second
    return tl.reshape(parts, (M, N))


@triton.jit
def finish_products(products, COUNT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    """Add the parts of k that different warps have summed: COUNT tiles [BLOCK_B, BLOCK_N], four in one exchange."""
    if SPLIT == 1:
        return products
    elif COUNT == 1:
        return (add_parts(products[0], SPLIT),)
    else:
        finished = ()
        last: tl.constexpr = COUNT - 1
        for g in tl.static_range(0, COUNT, 4):
            # Absent ones of the four are the last one again.
            low = tl.join(products[g], products[g + 1 if g + 1 < last else last])
            high = tl.join(products[g + 2 if g + 2 < last else last], products[g + 3 if g + 3 < last else last])
            parts = tl.reshape(tl.join(low, high), (SPLIT, BLOCK_B, BLOCK_N * 4))
            even, odd = tl.split(tl.reshape(add_parts(parts, SPLIT), (BLOCK_B, BLOCK_N, 2, 2)))
            finished = finished + tl.split(even) + tl.split(odd)
        return finished
