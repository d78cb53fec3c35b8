"""The race detector on small kernels, in the interpreter with TRITON_INTERPRET=1: what it reports, and what not."""

import re
from typing import NamedTuple

import pytest
import torch
from conftest import INTERPRETED

if not INTERPRETED:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import race_detector
import triton
import triton.language as tl
from concurrent_interpreter import concurrent
from triton.runtime.errors import InterpreterError


def races(kernel, programs, *args, seeds=6):
    """What the detector says of each order."""
    said = []
    for seed in range(seeds):
        for arg in args:
            if isinstance(arg, torch.Tensor):
                arg.zero_()
        try:
            with concurrent(seed):
                kernel[(programs,)](*args)
            said.append(None)
        except InterpreterError as error:
            said.append(re.search("data race at .* by program .* by program [^']*", str(error))[0])
    return said


@pytest.fixture
def tensor(device):
    """Make a tensor of so many elements."""
    return lambda count, dtype=torch.int32: torch.zeros(count, dtype=dtype, device=device)


@triton.jit
def send(data, flag, got, SEND: tl.constexpr, RECEIVE: tl.constexpr, SCOPE: tl.constexpr):
    if tl.program_id(0) == 0:
        tl.store(data, 7)
        tl.atomic_xchg(flag, 1, sem=SEND, scope=SCOPE)
    else:
        while tl.atomic_add(flag, 0, sem=RECEIVE, scope="gpu") == 0:
            pass
        tl.store(got, tl.load(data))


@pytest.mark.parametrize(("orders", "ordered"), [
    (("release", "acquire", "gpu"), True),
    (("acq_rel", "acq_rel", "sys"), True),
    (("relaxed", "acquire", "gpu"), False),
    (("acquire", "acquire", "gpu"), False),
    (("release", "relaxed", "gpu"), False),
    (("release", "release", "gpu"), False),
])  # fmt: skip
def test_a_message(orders, ordered, tensor):
    data, flag, got = tensor(1), tensor(1), tensor(1)
    race = "data race at byte 0 of data: a load by program (1, 0, 0) is not ordered behind a store by program (0, 0, 0)"
    assert set(races(send, 2, data, flag, got, *orders)) == {None if ordered else race}
    assert not ordered or got.item() == 7


def test_an_atomic_operation_of_a_smaller_scope(tensor):
    """Which of the two comes first depends on the order."""
    for said in races(send, 2, tensor(1), tensor(1), tensor(1), "release", "acquire", "cta"):
        assert said.startswith("data race at byte 0 of flag: ")


@triton.jit
def send_early(data, flag, got):
    if tl.program_id(0) == 0:
        tl.atomic_xchg(flag, 1, sem="release", scope="gpu")
        tl.store(data, 7)
    else:
        while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
            pass
        tl.store(got, tl.load(data))


def test_a_store_behind_the_release(tensor):
    """Whatever value the other program reads."""
    said = races(send_early, 2, tensor(1), tensor(1), tensor(1), seeds=10)
    assert {text.split(" by ")[0] for text in said} == {
        f"data race at byte 0 of data: a {k}" for k in ("load", "store")
    }


@triton.jit
def relay(data, flag, got, RELAY: tl.constexpr, READ: tl.constexpr):
    """Program 0 hands a flag to program 1, which hands it to program 2. Both write before."""
    n = tl.program_id(0)
    while tl.atomic_add(flag, 0, sem="acquire" if n == 2 or RELAY == "acq_rel" else "relaxed") != n:
        pass
    if n < 2:
        tl.store(data + n, 7)
        tl.atomic_add(flag, 1, sem="release" if n == 0 or RELAY == "acq_rel" else "relaxed")
    else:
        tl.store(got, tl.load(data + READ))


def test_what_came_before_what_was_acquired(tensor):
    assert not any(races(relay, 3, tensor(2), tensor(1), tensor(1), "acq_rel", 0))
    assert not any(races(relay, 3, tensor(2), tensor(1), tensor(1), "acq_rel", 1))


def test_relaxed_updates_pass_on_what_was_released_but_add_nothing(tensor):
    assert not any(races(relay, 3, tensor(2), tensor(1), tensor(1), "relaxed", 0))
    assert all("byte 4 of data" in said for said in races(relay, 3, tensor(2), tensor(1), tensor(1), "relaxed", 1))


@triton.jit
def gather(data, count, got):
    n = tl.program_id(0)
    if n < 2:
        tl.store(data + n, 7)
        tl.atomic_add(count, 1, sem="release", scope="gpu")
    else:
        while tl.atomic_add(count, 0, sem="acquire", scope="gpu") < 2:
            pass
        tl.store(got, tl.load(data) + tl.load(data + 1))


def test_who_acquires_sees_what_all_have_released(tensor):
    assert not any(races(gather, 3, tensor(2), tensor(1), tensor(1)))


@triton.jit
def store_tiles(p, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """Of each tile of four the first COUNT elements."""
    i = tl.arange(0, 4)
    tl.store(p.data + tl.program_id(0) * STRIDE + i, i.to(p.data.dtype.element_ty), mask=i < COUNT)


class Tensors(NamedTuple):
    other: None
    data: torch.Tensor


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize(("stride", "count"), [(4, 4), (2, 2), (1, 1)])
def test_stores_side_by_side(dtype, stride, count, tensor):
    assert not any(races(store_tiles, 3, Tensors(None, tensor(12, dtype)), stride, count))


@pytest.mark.parametrize("page", [8, race_detector.PAGE])
def test_stores_that_overlap(page, tensor, monkeypatch):
    monkeypatch.setattr(race_detector, "PAGE", page)
    for said in races(store_tiles, 2, Tensors(None, tensor(12, torch.float16)), 3, 4):
        assert said.startswith("data race at byte 6 of p.data: a store by program ")


@triton.jit
def touch(data, got, KIND: tl.constexpr):
    third = data.to(tl.pointer_type(tl.int8)) + 2
    if KIND == "load":
        tl.store(got, tl.load(data))
    elif KIND == "store":
        tl.store(data, 7)
    elif KIND == "atomic":
        tl.atomic_add(data, 1, sem="acq_rel", scope="gpu")
    elif KIND == "exchange":
        tl.atomic_cas(data, 0, 1, sem="acq_rel", scope="gpu")
    elif KIND == "load of the third byte":
        tl.store(got, tl.load(third).to(tl.int32))
    elif KIND == "store of the fourth byte":
        tl.store(third + 1, 7)


@triton.jit
def touch_both(data, got, FIRST: tl.constexpr, SECOND: tl.constexpr):
    if tl.program_id(0) == 0:
        touch(data, got, FIRST)
    else:
        touch(data, got + 1, SECOND)


PAIRS = {
    ("load", "load"): None,
    ("load", "store"): 0,
    ("store", "store"): 0,
    ("atomic", "atomic"): None,
    ("atomic", "exchange"): None,
    ("atomic", "load"): 0,
    ("exchange", "store"): 0,
    ("load", "store of the fourth byte"): 3,
    ("load of the third byte", "store"): 2,
    ("load of the third byte", "store of the fourth byte"): None,
}


@pytest.mark.parametrize(("kinds", "byte"), PAIRS.items(), ids=map(" and ".join, PAIRS))
def test_two_accesses(kinds, byte, tensor):
    said = races(touch_both, 2, tensor(1), tensor(2), *kinds)
    if byte is None:
        assert not any(said)
    else:
        assert all(text.startswith(f"data race at byte {byte} of data: a") for text in said)


def test_launches_follow_one_another(tensor):
    data, got = tensor(1), tensor(2)
    with concurrent(0):
        touch_both[(2,)](data, got, "store", "nothing")
        touch_both[(2,)](data, got, "nothing", "load")
    assert got.tolist() == [0, 7]
