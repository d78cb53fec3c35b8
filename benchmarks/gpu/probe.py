"""What a step's exchange between programs costs at least: by a counter, awaited by atomic operations or by loads, by
polling the data, and with reads of L2."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from rnnfast_kernels.gpu.barrier import arrive, wait

MEMBERS = (2, 8, 16, 32, 64, 128, 132)
READS = (2, 8, 32)  # KiB


@triton.jit
def wait_by_loads(counter, arrivals):
    """As `wait`, by loads of one thread: they do not queue for the counter as atomic operations do."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 v;
        mov.u32 v, %tid.x;
        setp.ne.u32 p, v, 0;
        @p bra out;
        again: ld.acquire.gpu.global.u32 v, [$1];
        setp.lt.s32 p, v, $2;
        @p bra again;
        out: mov.u32 $0, $2;
        }""",
        "=r,l,r", [counter + tl.arange(0, 1), tl.zeros([1], tl.int32) + arrivals], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    tl.debug_barrier()


@triton.jit(do_not_specialize=["T"])
def by_counter(counter, memory, T, MEMBERS: tl.constexpr, READ: tl.constexpr, LOADS: tl.constexpr):
    """In each of T steps: write a word, meet all others at the counter, read READ words that others wrote."""
    n = tl.program_id(0)
    x = tl.zeros([1], tl.int32)
    for k in range(T):
        slot = memory + (k % 2) * (MEMBERS + READ)
        tl.store(slot + n + tl.arange(0, 1), x + k)
        arrive(counter)
        if LOADS:
            wait_by_loads(counter, (k + 1) * MEMBERS)
        else:
            wait(counter, (k + 1) * MEMBERS)
        if READ > 0:
            x = tl.sum(tl.load(slot + tl.arange(0, READ), cache_modifier=".cg"), 0) + tl.zeros([1], tl.int32)


@triton.jit(do_not_specialize=["T"])
def by_polling(memory, T, MEMBERS: tl.constexpr, WIDE: tl.constexpr, FENCE: tl.constexpr):
    """In each of T steps: write the step's number, perhaps a fence, and read those of all until they are there."""
    all_words = memory + tl.minimum(tl.arange(0, WIDE), MEMBERS - 1)
    own = memory + tl.program_id(0) + tl.arange(0, 1).to(tl.int64)
    for k in range(T):
        tl.debug_barrier()
        tl.inline_asm_elementwise(
            "st.relaxed.gpu.global.u32 [$1], $2; mov.u32 $0, $2;",
            "=r,l,r", [own, tl.zeros([1], tl.int32) + (k + 1)], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        if FENCE:
            tl.inline_asm_elementwise(
                "fence.acq_rel.gpu; mov.u32 $0, $1;",
                "=r,r", [tl.zeros([1], tl.int32)], tl.int32, is_pure=False, pack=1,
            )  # fmt: skip
        tl.inline_asm_elementwise(
            "{ .reg .pred p; again: ld.relaxed.gpu.global.u32 $0, [$1]; setp.lt.s32 p, $0, $2; @p bra again; }",
            "=&r,l,r", [all_words, tl.zeros([WIDE], tl.int32) + (k + 1)], tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


def probe(
    device: str, elapsed: Callable[[Callable[[], object], int], list[float]], steps: tuple[int, int], members: int
) -> dict:
    """Microseconds of a step with so many programs: `elapsed` takes the milliseconds of each of some launches."""

    def slope(kernel, *arguments) -> float:
        taken = []
        for T in steps:

            def launch(T=T):
                memory = torch.zeros(2**18, dtype=torch.int32, device=device)
                tensors = (memory[:32], memory[64:]) if kernel is by_counter else (memory,)
                kernel[(members,)](*tensors, T, members, *arguments, num_warps=4, launch_cooperative_grid=True)

            launch()
            taken.append(min(elapsed(launch, 5)))
        return 1e3 * (taken[1] - taken[0]) / (steps[1] - steps[0])

    row: dict = {"members": members, "counter": slope(by_counter, 0, False)}
    row["counter, loads"] = slope(by_counter, 0, True)
    wide = triton.next_power_of_2(members)
    row["polled"] = slope(by_polling, wide, False)
    row["polled, fence"] = slope(by_polling, wide, True)
    if members in (16, 64, 128):
        row |= {f"counter, {kib} KiB read": slope(by_counter, 256 * kib, False) for kib in READS}
    return row
