"""Relaxed accesses in the machine that runs compiled kernels: what two blocks may see of each other's words."""

from random import Random

import numpy as np
import pytest
from ptx.code import parse
from ptx.machine import Deadlock, Machine
from ptx.memory import Fault
from ptx.operations import Unknown

# Block 0 stores to two words, of which block 1 loads the second and then the first. %rd3 is where results go.
HEAD = """
.visible .entry kernel(
	.param .u64 kernel_param_0,
	.param .u64 kernel_param_1
)
{
	.reg .pred 	%p<4>;
	.reg .b32 	%r<16>;
	.reg .b64 	%rd<8>;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mov.u32 	%r1, %ctaid.x;
	mov.u32 	%r2, %tid.x;
	or.b32 	%r3, %r1, %r2;
	setp.eq.s32 	%p1, %r3, 0;
	setp.eq.s32 	%p2, %r1, 1;
	mul.wide.u32 	%rd3, %r2, 8;
	add.s64 	%rd3, %rd2, %rd3;
"""
WRITE = """
	@!%p1 bra reader;
	st.relaxed.gpu.global.b32 [%rd1], 7;
	{fence}
	st.relaxed.gpu.global.b32 [%rd1+4], 1;
reader:
	@!%p2 bra end;
"""
AWAIT = """
again:
	ld.relaxed.gpu.global.b32 %r4, [%rd1+4];
	setp.eq.s32 %p3, %r4, 0;
	@%p3 bra again;
"""
READ = """
	{fence}
	ld.relaxed.gpu.global.b32 %r5, [%rd1];
	st.global.b32 [%rd3], %r4;
	st.global.b32 [%rd3+4], %r5;
end:
	ret;
}}
	.file	1 "/kernels/forward.py"
"""
FENCE = "fence.acq_rel.gpu;"


def run(body, seed=0, threads=32):
    words, results = np.zeros(2, np.uint32), np.zeros((threads, 2), np.uint32)
    tensors = {"words": (words.ctypes.data, 8, 4), "results": (results.ctypes.data, results.nbytes, 4)}
    parameters = [words.ctypes.data, results.ctypes.data]
    Machine(parse(HEAD + body), (2,), threads, 64, parameters, tensors).run(Random(seed))
    return results


def message(writer, reader):
    return WRITE.format(fence=writer) + AWAIT + READ.format(fence=reader)


def test_fences_on_both_sides_pass_a_message():
    for seed in range(40):
        assert (run(message(FENCE, FENCE), seed) == (1, 7)).all()


@pytest.mark.parametrize(("writer", "reader"), [("", ""), (FENCE, ""), ("", FENCE)])
def test_without_them_an_old_value_may_be_read(writer, reader):
    read = np.concatenate([run(message(writer, reader), seed) for seed in range(40)])
    assert (read[:, 0] == 1).all()
    assert set(read[:, 1].tolist()) == {0, 7}


def test_no_thread_sees_a_word_go_back():
    """Two loads of one word, of which the second gives what the first gave, or what is newer."""
    twice = WRITE.format(fence="") + "ld.relaxed.gpu.global.b32 %r4, [%rd1];" + READ.format(fence="")
    read = np.concatenate([run(twice, seed) for seed in range(40)])
    assert set(map(tuple, read.tolist())) == {(0, 0), (0, 7), (7, 7)}


def test_a_poll_that_nothing_ends_is_reported():
    with pytest.raises(Deadlock, match="1 wait forever"):
        run(message(FENCE, FENCE).replace("[%rd1+4], 1", "[%rd1+4], 0"))


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ("ld.relaxed.gpu.global.b16 %r4, [%rd1];", Unknown, "b16"),
        ("ld.relaxed.cta.global.b32 %r4, [%rd1];", Unknown, "cta"),
        ("ld.relaxed.gpu.global.b32 %r4, [%rd1];\nld.global.b32 %r4, [%rd1];", Fault, "weak accesses to words"),
        ("ld.global.b32 %r4, [%rd1];\nld.relaxed.gpu.global.b32 %r4, [%rd1];", Fault, "relaxed accesses to words"),
        ("st.relaxed.gpu.global.b32 [%rd1], 1;", Fault, "threads of one instruction store to one word"),
    ],
)
def test_what_is_not_allowed(body, error, words):
    with pytest.raises(error, match=words):
        run(body + READ.format(fence=""))
