"""The machine that runs compiled kernels, on code by hand: threads part and meet, copies are under way, warps act."""

from random import Random

import numpy as np
import pytest
from ptx.banks import turns
from ptx.code import parse
from ptx.machine import Machine
from ptx.memory import Fault
from ptx.operations import Unknown, operation

HEAD = """
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid 64
{
	.reg .pred 	%p<4>;
	.reg .b16 	%rs<4>;
	.reg .b32 	%r<16>;
	.reg .b64 	%rd<4>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r1, [kernel_param_1];
	mov.u32 	%r2, %tid.x;
	mul.wide.u32 	%rd2, %r2, 4;
	add.s64 	%rd3, %rd1, %rd2;
	mov.b32 	%r10, 0;
"""
TAIL = """
	st.global.b32 [ %rd3 + 0 ], { %r10 };
	ret;
}
	.file	1 "/kernels/forward.py"
"""


def run(body, number=0):
    """Run code on 64 threads, each with a word of its own at %rd3; what they leave in %r10 comes back."""
    words = np.arange(64, dtype=np.uint32)
    code = parse(HEAD + body + TAIL)
    Machine(code, (1,), 64, 1024, [words.ctypes.data, number], {"p": (words.ctypes.data, 256, 4)}).run(Random(0))
    return words


def test_threads_part_and_meet():
    """Each adds one as often as its number says; meanwhile the others wait, and all add 100 together."""
    words = run(
        """
	setp.eq.s32 %p1, %r2, 0;
	@%p1 bra $L__BB0_2;
$L__BB0_1:
	add.s32 %r10, %r10, 1;
	setp.lt.u32 %p2, %r10, %r2;
	@%p2 bra $L__BB0_1;
$L__BB0_2:
	bar.sync 0;
	add.s32 %r10, %r10, %r1;
    """,
        100,
    )
    assert words.tolist() == [100 + n for n in range(64)]


def test_threads_that_end_are_not_waited_for():
    words = run("""
	setp.lt.s32 %p1, %r2, 3;
	@%p1 ret;
	bar.sync 0;
    """)
    assert words.tolist() == [0, 1, 2] + [0] * 61


# Shared memory: 16 bytes for each thread; an own place %r3, and that of the thread 32 further on %r4.
PLACES = """
	shl.b32 %r3, %r2, 4;
	xor.b32 %r4, %r3, 512;
"""
COPY = (
    PLACES
    + """
	and.b64 %rd2, %rd2, -16;
	add.s64 %rd2, %rd1, %rd2;
	cp.async.cg.shared.global [ %r3 + 0 ], [ %rd2 + 0 ], 0x10, 0x10;
	cp.async.commit_group ;
"""
)
WAIT = "cp.async.wait_group 0x0;\n"
BARRIER = "bar.sync 0;\n"
READ = "ld.shared.b32 %r10, [%r3+4];\n"
READ_OTHER = "ld.shared.b32 %r10, [%r4+4];\n"


def test_a_copy_that_is_waited_for_has_arrived():
    copied = [n // 4 * 4 + 1 for n in range(64)]
    assert run(COPY + WAIT + READ + BARRIER).tolist() == copied
    assert run(COPY + WAIT + BARRIER + READ_OTHER).tolist() == copied[32:] + copied[:32]


@pytest.mark.parametrize("body", [
    COPY + READ,
    COPY + BARRIER + READ,
    COPY.replace("cp.async.commit_group ;", "") + WAIT + READ,
    COPY + "cp.async.wait_group 0x1;\n" + READ,
    COPY + WAIT + READ_OTHER,
    PLACES + READ_OTHER + COPY + WAIT,
], ids=["at once", "behind a barrier", "not committed", "one left", "other thread's", "read before"])  # fmt: skip
def test_a_copy_that_may_be_under_way_is_a_race(body):
    with pytest.raises(Fault, match=r"data race at byte \d+ of shared memory: a (load|store) by block 0"):
        run(body)


def test_threads_of_a_warp_race_too():
    exchange = PLACES + "xor.b32 %r4, %r3, 16;\nst.shared.b32 [%r3+4], %r2;\n"
    assert run(exchange + BARRIER + READ_OTHER).tolist() == [n ^ 1 for n in range(64)]
    with pytest.raises(Fault, match=r"block 0, thread 0 is not ordered behind a store by block 0, thread 1$"):
        run(exchange + READ_OTHER)


def test_one_place_takes_one_value():
    with pytest.raises(Fault, match="threads of one instruction store different values"):
        run("st.shared.b32 [global_smem+4], %r2;")


def test_several_words_at_once_are_aligned():
    with pytest.raises(Fault, match=r"^forward\.py:7: 8 bytes at byte 4 of p are not aligned"):
        run(".loc 1 7 3\n ld.global.v2.b32 { %r10, %r11 }, [ %rd3 + 0 ];")


def test_whole_warps_are_needed():
    matrix = "{guard} ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r10}}, [%r3];\nmov.b32 %r10, 0;\n"
    first = PLACES + "setp.lt.s32 %p1, %r2, {};\n"
    run(first.format(32) + matrix.format(guard="@%p1"))
    with pytest.raises(Fault, match="in a part of one"):
        run(first.format(31) + matrix.format(guard="@%p1"))


@pytest.mark.parametrize(("width", "stride", "expected"), [
    (4, 4, (1, 1)), (4, 8, (2, 1)), (4, 128, (32, 1)), (4, 0, (1, 1)), (16, 16, (4, 4)), (16, 32, (8, 4)),
    (16, 128, (32, 4)), (2, 2, (1, 1)), (8, 8, (2, 2)), (16, 144, (4, 4)),
])  # fmt: skip
def test_turns_of_a_warp(width, stride, expected):
    assert turns(np.arange(32), np.arange(32) * stride, width) == expected


def test_turns_are_those_of_all_warps():
    assert turns(np.arange(48), np.arange(48) * 8, 4) == (3, 2)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_upper_halves_of_products(kind):
    high = operation(("mul", "hi", kind)).function
    dtype = np.dtype({"u": "u", "s": "i"}[kind[0]] + kind[1:].replace("16", "2").replace("32", "4"))
    most, least = np.iinfo(dtype).max, np.iinfo(dtype).min
    values = np.array([most, least, 3, most // 3], dtype)
    expected = [int(a) * int(b) >> 8 * dtype.itemsize for a, b in zip(values, values[::-1], strict=True)]
    assert high(values, values[::-1]).tolist() == expected


def test_what_is_not_known_is_said():
    with pytest.raises(Unknown, match=r"tanh\.approx\.f32"):
        run("tanh.approx.f32 %r10, %r10;")
