"""How the programs of a group exchange a tile after each step of a Gluon loop: words of 32 bits in global memory.

A word holds two neighbouring entries of half precision or one of float32. Two ways, told apart by one constexpr:

Counter (POLLED = False): two slots, one for even and one for odd steps. A program publishes its words, arrives at the
group's counter (release, behind a barrier) and waits for it (acquire, in front of one) before it reads the tile.

Polled (POLLED = True): four slots and no counter. A reader loads its words again until none of them is POISON, a bit
pattern that no result has (results that could be it, NaN, are made another NaN). In step k, which reads slot k and then
publishes to slot k + 1, a program also poisons its words of slot k - 1, then issues one fence. All slots are poison at
launch but for what nobody publishes, which is 0. What follows is why that is enough, in PTX's memory model.

All accesses to the slots are ld.relaxed.gpu and st.relaxed.gpu of aligned words, vectors being several such accesses.
So any two of them that conflict are of the same word and morally strong: there is no data race. Each word has one
thread, its owner, that publishes and poisons it, and coherence keeps the owner's stores to it in program order.

1. Nobody loses a value by being poisoned too early. The owner poisons slot k - 1 behind the block barrier of step k,
   in front of which its block's threads have read all of slot k. The words of slot k of program Q were published behind
   Q's barrier of step k - 1, in front of which every thread of Q had left its loop over slot k - 1; their values depend
   on what was read there. So each reader of the poisoned words has its value, and poisons no value that is awaited.
2. Nobody takes an old value for a new one. Thread r reads word x of slot k in step k, next in step k + 4, and must not
   find the old value there. The owner a of x poisons it in step k + 1, issues a fence F, and in step k + 2 publishes
   word y, at the place of x in slot k + 3. r has the same places in every slot, so it is r that reads y, in step k + 3,
   and issues a fence G behind it, in front of its loads of step k + 4. F, the store of y, the load of y and G are a
   release pattern and an acquire pattern: F synchronizes with G. The poison happens before r's loads of step k + 4,
   which can return only it or what a stores behind it: the value of step k + 4.
3. A loop over poison ends: the owner's store of step k + 3 depends on steps before it alone, and becomes visible.

The fence follows the publication, so that no value waits for it. Without fence or poison, 2 fails. With three slots y
would be x itself, and nothing that r has read would order the poison in front of its load.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rnnfast_kernels.gpu.barrier import arrive, wait
from rnnfast_kernels.gpu.gluon_tiles import operand_layout, quads_layout, start_of

POISON = gl.constexpr(0xFFFFFFFF)


@gluon.constexpr_function
def read_text(count, polled):
    """PTX that loads four words from each of `count` addresses, all on their way at once; again while one is POISON."""
    loads, words = [], []
    for n in range(count):
        targets = [f"${w * count + n}" for w in range(4)]
        loads.append(f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(targets)}}}, [${4 * count + n}];")
        words += targets
    if not polled:
        return "\n".join(loads)
    # Four chains, as each maximum waits for the one before.
    largest = [f"mov.b32 m{n}, {words[n]};" for n in range(4)]
    largest += [f"max.u32 m{n % 4}, m{n % 4}, {words[n]};" for n in range(4, len(words))]
    largest += [f"max.u32 m0, m0, m{n};" for n in range(1, 4)]
    registers = ".reg .pred p;\n.reg .b32 m0, m1, m2, m3;"
    again = [f"setp.eq.u32 p, m0, {POISON.value:#x};", "@p bra again_${:uid};"]
    return "\n".join(["{", registers, "again_${:uid}:", *loads, *largest, *again, "}"])


@gluon.constexpr_function
def constraints(results, words, addresses):
    """Constraints of inline PTX. Results that wait for addresses alone are written while some of these are still to be
    read, so they have registers of their own."""
    return ",".join(["=r" if words else "=&r"] * results + ["r"] * words + ["l"] * addresses)


@gluon.constexpr_function
def publish_text(count, owners, every, polled):
    """PTX that stores `count` words by the threads that own them: every `every`-th of the first `owners`."""
    lines = [".reg .pred p, q;", ".reg .b32 thread, lane;", "mov.u32 thread, %tid.x;"]
    lines += [f"setp.lt.u32 p, thread, {owners};", f"and.b32 lane, thread, {every - 1};"]
    lines += ["setp.eq.u32 q, lane, 0;", "and.pred p, p, q;"]
    for n in range(count):
        word, place, poisoned = f"${count + n}", f"${2 * count + n}", f"${3 * count + n}"
        lines.append(f"@p st.relaxed.gpu.global.b32 [{place}], {word};")
        if polled:
            lines.append(f"@p st.relaxed.gpu.global.b32 [{poisoned}], {POISON.value:#x};")
    lines += [f"mov.b32 ${n}, ${count + n};" for n in range(count)]
    return "\n".join(["{", *lines, "}"])


@gluon.constexpr_function
def fence_text(count):
    return "\n".join(["fence.acq_rel.gpu;", *(f"mov.b32 ${n}, ${count + n};" for n in range(count))])


@gluon.constexpr_function
def words_of_thread(R, U, warps):
    return max(1, R * U // (32 * warps))


@gluon.constexpr_function
def owners_of(R, U, warps):
    return min(R * U, 32 * warps)


@gluon.jit
def to_words(tile, DTYPE: gl.constexpr):
    """A tile [R, U] of float32 as words of its entries in DTYPE, [R, U / entries of a word]; none is POISON."""
    R: gl.constexpr = tile.shape[0]
    U: gl.constexpr = tile.shape[1]
    if DTYPE.primitive_bitwidth == 32:
        bits = tile.to(gl.uint32, bitcast=True)
        return gl.where(bits == 0xFFFFFFFF, 0x7FFFFFFF, bits).to(gl.int32, bitcast=True)
    else:
        halves = gl.minimum(tile.to(DTYPE).to(gl.uint16, bitcast=True).to(gl.int32), 0xFFFE)
        pairs = gl.reshape(halves, [R, U // 2, 2])
        odd = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, pairs.type.layout)))[None, None, :]
        return gl.sum(pairs << (16 * odd), 2)


@gluon.jit
def half(word, HIGH: gl.constexpr, DTYPE: gl.constexpr):
    """The first or the second entry of a word of two."""
    if HIGH:
        word = word >> 16
    return word.to(gl.int16).to(DTYPE, bitcast=True)


@gluon.jit
def pair(word, DTYPE: gl.constexpr):
    return gl.join(half(word, False, DTYPE), half(word, True, DTYPE))


@gluon.jit
def place_of(b, word, WORDS: gl.constexpr):
    """Where a word of a tile [R, WORDS] is: a thread reads words w and w + 4 of rows b and b + 8, all side by side."""
    return (b // 16 * 8 + b % 8) * (2 * WORDS) + word // 8 * 16 + word % 4 * 4 + word // 4 % 2 * 2 + b // 8 % 2


@gluon.jit
def read_piece(p_slot, j: gl.constexpr, DTYPE: gl.constexpr, R: gl.constexpr, WORDS: gl.constexpr, SIZES: gl.constexpr,
               WARPS: gl.constexpr, POLLED: gl.constexpr):  # fmt: skip
    """Piece j of an exchanged tile [R, WORDS] as the left operand of a product, [W, R, K]."""
    EACH: gl.constexpr = 32 // DTYPE.primitive_bitwidth
    K: gl.constexpr = SIZES[j]
    QUADS: gl.constexpr = K // (2 * EACH)
    COUNT: gl.constexpr = R * QUADS // 64
    layout: gl.constexpr = operand_layout(0, WARPS, 4 // EACH)
    quads: gl.constexpr = quads_layout(gl.to_linear_layout(layout, [WARPS, R, K]), R, EACH)
    s = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, quads)))[:, None, None]
    b = gl.arange(0, R // 2, gl.SliceLayout(0, gl.SliceLayout(2, quads)))[None, :, None]
    c = gl.arange(0, QUADS, gl.SliceLayout(0, gl.SliceLayout(1, quads)))[None, None, :]
    first = (WARPS * start_of(SIZES, j) + s * K) // (2 * EACH)
    w0, w1, w2, w3 = gl.inline_asm_elementwise(
        read_text(COUNT, POLLED), constraints(4 * COUNT, 0, COUNT), [p_slot + b * (2 * WORDS) + (first + c) * 4],
        (gl.int32, gl.int32, gl.int32, gl.int32), False, COUNT,
    )  # fmt: skip
    # Dimensions behind those of the quads: entry of a word, first or second word, upper or lower row.
    if EACH == 1:
        entries = gl.join(gl.join(w0, w2), gl.join(w1, w3)).to(gl.float32, bitcast=True)
        entries = gl.reshape(entries, [WARPS, R // 16, 8, QUADS // 4, 4, 2, 2])
        entries = gl.permute(entries, [0, 1, 6, 2, 3, 5, 4])
    else:
        upper = gl.join(pair(w0, DTYPE), pair(w2, DTYPE))
        lower = gl.join(pair(w1, DTYPE), pair(w3, DTYPE))
        entries = gl.reshape(gl.join(upper, lower), [WARPS, R // 16, 8, QUADS // 4, 4, 2, 2, 2])
        entries = gl.permute(entries, [0, 1, 7, 2, 3, 6, 4, 5])
    return gl.convert_layout(gl.reshape(entries, [WARPS, R, K]), layout, assert_trivial=True)


@gluon.jit
def publish(p_tile, k, slot, offsets, words, R: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr,
            POLLED: gl.constexpr):  # fmt: skip
    """Publish this program's words to slot k of a tile, whose slots are `slot` words apart; slot k - 2 is free."""
    COUNT: gl.constexpr = words_of_thread(R, U, WARPS)
    EVERY: gl.constexpr = U // words.shape[1]
    place = p_tile + k % (4 if POLLED else 2) * slot + offsets
    poisoned = p_tile + (k + 2) % 4 * slot + offsets if POLLED else place
    gl.inline_asm_elementwise(
        publish_text(COUNT, owners_of(R, U, WARPS), EVERY, POLLED), constraints(COUNT, COUNT, 2 * COUNT),
        [words, place, poisoned], gl.int32, False, COUNT,
    )  # fmt: skip


@gluon.jit
def finish_step(counter, words, R: gl.constexpr, U: gl.constexpr, WARPS: gl.constexpr, POLLED: gl.constexpr):
    """What follows all that a program publishes for a step, the last of it `words`."""
    if POLLED:
        COUNT: gl.constexpr = words_of_thread(R, U, WARPS)
        gl.inline_asm_elementwise(fence_text(COUNT), constraints(COUNT, COUNT, 0), [words], gl.int32, False, COUNT)
    else:
        arrive(counter)


@gluon.jit
def await_step(counter, k, MEMBERS: gl.constexpr, POLLED: gl.constexpr):
    """Return when step k may be read; where it is polled, reading waits by itself."""
    if not POLLED:
        wait(counter, (k + 1) * MEMBERS)


@gluon.jit
def slot_of(p_tile, k, slot, POLLED: gl.constexpr):
    return p_tile + k % (4 if POLLED else 2) * slot


@gluon.jit
def own_places(words, n0, U: gl.constexpr, WORDS: gl.constexpr):
    """Where a program's words are in a tile of WORDS words to a row: of hidden units n0 to n0 + U."""
    EACH: gl.constexpr = U // words.shape[1]
    b = gl.arange(0, words.shape[0], gl.SliceLayout(1, words.type.layout))[:, None]
    word = gl.arange(0, words.shape[1], gl.SliceLayout(0, words.type.layout))[None, :]
    return place_of(b, n0 // EACH + word, WORDS)
