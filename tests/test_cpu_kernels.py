"""The Numba kernels through the backend's contract, against float64 torch.nn: values, states and every gradient."""

import concurrent.futures
import contextlib
import dataclasses
import os
import platform
import subprocess
import sys
import textwrap

import pytest
import torch
from rnnfast_kernels.cells import CELLS
from rnnfast_kernels.cpu import pool

from rnnfast import reference
from rnnfast.backends import Layer, Needs, Weights, cpu, cpu_jobs

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 6e-3, torch.float16: 8e-4}
ALL = Needs(x=True, hx=True, weights=True)


def make_module(cell: str, inputs: int, hidden: int, **options) -> torch.nn.RNNBase:
    """A float64 torch layer of the kind that a cell belongs to."""
    if cell.startswith("rnn"):
        return torch.nn.RNN(inputs, hidden, nonlinearity=cell[4:], **options).double()
    return {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[cell](inputs, hidden, **options).double()


def module_weights(module: torch.nn.RNNBase) -> tuple[Weights, ...]:
    """The module's parameters as a backend receives them."""

    def named(suffix: str) -> Weights:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return Weights(*(getattr(module, f"{name}_l0{suffix}", None) for name in names))

    return tuple(named(suffix) for suffix in ("", "_reverse")[: 1 + module.bidirectional])


class Case:
    """One layer with its data, its float64 oracle and the gradients that flow into its results."""

    def __init__(
        self, cell, steps, batch, inputs, hidden, *, lengths=None, layout="dense", dtype=torch.float32, **options
    ):
        torch.manual_seed(0)
        self.cell, self.layout, self.dtype, self.lengths = cell, layout, dtype, lengths
        self.module = make_module(cell, inputs, hidden, **options)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.copy_(parameter.to(dtype))
        directions = 1 + self.module.bidirectional
        width = self.module.proj_size or hidden
        widths = (width, hidden)[: len(CELLS[cell].states)]
        self.x = torch.randn(steps, batch, inputs, dtype=torch.float64).to(dtype).double()
        self.hx = tuple(torch.randn(directions, batch, w, dtype=torch.float64).to(dtype).double() for w in widths)
        self.sizes = None
        if lengths is not None:
            self.sizes = (torch.tensor(lengths)[None] > torch.arange(steps)[:, None]).sum(1)
        self.dy = torch.randn(steps, batch, directions, width, dtype=torch.float64).to(dtype).double()
        self.dfinals = tuple(torch.randn_like(initial).to(dtype).double() for initial in self.hx)

    def live(self, tensor):
        """Select the valid rows, packed."""
        return torch.cat([tensor[t, : int(size)] for t, size in enumerate(self.sizes)])

    def expected(self) -> dict[str, torch.Tensor]:
        """Results and gradients of torch.nn in float64."""
        x = self.x.clone().requires_grad_()
        hx = tuple(initial.clone().requires_grad_() for initial in self.hx)
        inner = x
        if self.lengths is not None:
            inner = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(self.lengths))
        output, finals = self.module(inner, hx if len(hx) > 1 else hx[0])
        if self.lengths is not None:
            output = torch.nn.utils.rnn.pad_packed_sequence(output, total_length=x.shape[0])[0]
        finals = finals if isinstance(finals, tuple) else (finals,)
        loss = (output * self.dy.flatten(2)).sum() + sum(
            (a * b).sum() for a, b in zip(finals, self.dfinals, strict=True)
        )
        loss.backward()
        found = {"output": output.view_as(self.dy), "dx": x.grad}
        for n, (final, initial) in enumerate(zip(finals, hx, strict=True)):
            found |= {f"final{n}": final, f"dhx{n}": initial.grad}
        for d, weights in enumerate(module_weights(self.module)):
            found |= {f"d{name}{d}": w.grad for name, w in weights._asdict().items() if w is not None}
        return {name: tensor.detach() for name, tensor in found.items()}

    def layer(self, **changes) -> Layer:
        x, sizes = self.x, self.sizes
        if self.layout == "packed":
            x = self.live(x)
        if self.layout == "padded":
            x = x.clone()
            for t, size in enumerate(sizes):
                x[t, size:] = float("nan")
        weights = tuple(
            Weights(*(w if w is None else w.detach().to(self.dtype) for w in each))
            for each in module_weights(self.module)
        )
        reverse = (False, True)[: len(weights)]
        hx = tuple(initial.to(self.dtype) for initial in self.hx)
        return Layer(self.cell, x.to(self.dtype), hx, weights, reverse, sizes, **changes)

    def run(self, layer: Layer | None = None) -> dict[str, torch.Tensor]:
        """Results and gradients of the backend."""
        layer = layer or self.layer()
        states, finals, saved = cpu.forward(layer, save=True, all_states=False)
        dy = self.live(self.dy) if self.layout == "packed" else self.dy
        dstates = (dy.to(self.dtype),) + (None,) * (len(states) - 1)
        dfinals = tuple(d.to(self.dtype) for d in self.dfinals)
        dx, dhx, dweights = cpu.backward(layer, states, saved, dstates, dfinals, ALL)
        found = {"output": states[0], "dx": dx}
        for n, (final, initial) in enumerate(zip(finals, dhx, strict=True)):
            found |= {f"final{n}": final, f"dhx{n}": initial}
        for d, weights in enumerate(dweights):
            found |= {f"d{name}{d}": w for name, w in weights._asdict().items() if w is not None}
        return found

    def check(self, found: dict[str, torch.Tensor] | None = None) -> None:
        expected = self.expected()
        found = found or self.run()
        if self.layout == "packed":
            expected |= {name: self.live(expected[name]) for name in ("output", "dx")}
        assert found.keys() == expected.keys()
        errors = {name: relative(found[name], expected[name]) for name in expected}
        worst = {name: error for name, error in errors.items() if not error <= TOLERANCE[self.dtype]}
        assert not worst, worst


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    norm = expected.norm()
    return float((found.double() - expected).norm() / (norm if norm > 0 else 1))


SIZES = [(1, 1, 1, 1), (3, 2, 7, 5), (7, 5, 3, 16), (5, 13, 33, 17), (4, 65, 1, 33), (9, 3, 65, 130), (40, 8, 16, 64)]
cells = pytest.mark.parametrize("cell", CELLS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@cells
@dtypes
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_dense(cell, dtype, sizes):
    Case(cell, *sizes, dtype=dtype).check()


@cells
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_both_directions(cell, layout, bias):
    lengths = None if layout == "dense" else [7, 7, 6, 3, 1]
    Case(cell, 7, 5, 3, 18, lengths=lengths, layout=layout, bias=bias, bidirectional=True).check()


@dtypes
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
@pytest.mark.parametrize("hidden", [5, 19, 40])
def test_projection(dtype, layout, hidden):
    lengths = None if layout == "dense" else [6, 4, 4, 1]
    Case("lstm", 6, 4, 3, hidden, lengths=lengths, layout=layout, dtype=dtype, proj_size=3, bidirectional=True).check()


@cells
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision(cell, dtype):
    Case(cell, 6, 4, 5, 20, dtype=dtype, bidirectional=True).check()


def replaced(layer: Layer, **changes) -> Layer:
    return dataclasses.replace(layer, **changes)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that differ in any bit."""
    return [name for name in a if not torch.equal(a[name], b[name])]


@cells
@pytest.mark.parametrize("all_states", [True, False])
def test_results_without_saving_are_the_same(cell, all_states):
    layer = Case(cell, 9, 5, 3, 18, bidirectional=True).layer()
    states, finals, _ = cpu.forward(layer, save=True, all_states=True)
    again, finals_again, saved = cpu.forward(layer, save=False, all_states=all_states)
    assert saved == ()
    assert torch.equal(states[0], again[0])
    assert all(torch.equal(a, b) for a, b in zip(finals, finals_again, strict=True))
    assert all(
        s.shape == a.shape if all_states else a.shape == (0,) for s, a in zip(states[1:], again[1:], strict=True)
    )


@cells
def test_resets_match_separate_sequences(cell):
    """A reset at step 3 of a row is a new sequence of that row with an initial state of zeros."""
    case = Case(cell, 7, 4, 3, 18)
    layer = case.layer()
    resets = torch.zeros(7, 4, dtype=torch.bool)
    resets[3, 1] = True
    whole = case.run(replaced(layer, resets=resets))
    case.dy = case.dy.clone()

    fresh = [initial.clone() for initial in layer.hx]
    for initial in fresh:
        initial[:, 1] = 0
    tail = replaced(layer, x=layer.x[3:], hx=tuple(fresh))
    states, _finals, saved = cpu.forward(tail, save=True, all_states=False)
    assert torch.equal(states[0][:, 1], whole["output"][3:, 1])
    dstates = (case.dy[3:].float(),) + (None,) * (len(states) - 1)
    gradients = cpu.backward(tail, states, saved, dstates, tuple(d.float() for d in case.dfinals), ALL)
    assert torch.equal(gradients.x[:, 1], whole["dx"][3:, 1])
    untouched = case.run(layer)
    assert torch.equal(whole["dx"][:, 0], untouched["dx"][:, 0])
    assert not torch.equal(whole["dhx0"][:, 1], untouched["dhx0"][:, 1])


def test_resets_keep_nan_out():
    case = Case("lstm", 5, 3, 3, 18)
    layer = case.layer()
    layer.hx[0][:, 1] = float("nan")
    resets = torch.zeros(5, 3, dtype=torch.bool)
    resets[0, 1] = True
    found = case.run(replaced(layer, resets=resets))
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert (found["dhx0"][:, 1] == 0).all()


@cells
def test_nan_stays_in_its_row(cell):
    layer = Case(cell, 6, 5, 3, 18).layer()
    clean, _, _ = cpu.forward(layer, save=False, all_states=False)
    layer.x[2, 1, 0] = float("nan")
    found, _, _ = cpu.forward(layer, save=False, all_states=False)
    others = [0, 2, 3, 4]
    assert torch.equal(found[0][:, others], clean[0][:, others])
    assert found[0][2:, 1].isnan().all()


@cells
def test_saturated_gates_stay_finite(cell):
    case = Case(cell, 6, 3, 3, 18)
    layer = case.layer()
    layer.x.mul_(1e3)
    case.x = layer.x.double()
    found = case.run(layer)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert relative(found["output"], case.expected()["output"]) < TOLERANCE[torch.float32]


@cells
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0), (0, 0)])
def test_empty(cell, steps, batch):
    found = Case(cell, steps, batch, 3, 18, bidirectional=True)
    layer = found.layer()
    results = found.run(layer)
    assert results["output"].shape == (steps, batch, 2, 18)
    assert torch.equal(results["final0"], layer.hx[0])
    assert all((tensor == 0).all() for name, tensor in results.items() if name.startswith(("dw", "db")))


@cells
@pytest.mark.parametrize("groups", [2, 5])
def test_gradients_of_groups_add_up(cell, groups):
    case = Case(cell, 6, 10, 3, 18, bidirectional=True)
    layer = case.layer()
    states, _, saved = cpu.forward(layer, save=True, all_states=False)
    dstates = (case.dy.float(),) + (None,) * (len(states) - 1)
    arguments = (layer, states, saved, dstates, (None,) * len(layer.hx), ALL)
    whole = cpu.backward(*arguments).weights
    parts = cpu.backward(*arguments, groups=groups).weights
    for one, many in zip(whole, parts, strict=True):
        for a, b in zip(one[:4], many[:4], strict=True):
            assert b.shape == (groups, *a.shape)
            assert relative(b.sum(0), a.double()) < 1e-6


@cells
@pytest.mark.parametrize("layout", ["dense", "padded", "packed"])
def test_an_ensemble_is_its_members_side_by_side(cell, layout):
    lengths = None if layout == "dense" else sorted((1 + n % 40 for n in range(33)), reverse=True)
    case = Case(cell, 40, 33, 24, 50, bidirectional=True, layout=layout, lengths=lengths)
    layer, dy = case.layer(), case.dy.float() if layout != "packed" else case.live(case.dy).float()
    members = []
    for n in (1, 2, 3):
        weights = tuple(Weights._make(w if w is None else w / n for w in each) for each in layer.weights)
        members.append(replaced(layer, x=layer.x.roll(n, -1), hx=tuple(h * n for h in layer.hx), weights=weights))
    whole = replaced(
        layer,
        x=torch.cat([m.x for m in members], -1),
        hx=tuple(torch.cat(parts) for parts in zip(*(m.hx for m in members), strict=True)),
        weights=tuple(w for m in members for w in m.weights),
        reverse=layer.reverse * 3,
    )

    def run(layer, dy):
        states, finals, saved = cpu.forward(layer, save=True, all_states=False)
        dstates = (dy, *(None for _ in states[1:]))
        return (states, finals), cpu.backward(layer, states, saved, dstates, (None,) * len(finals), ALL)

    for count in (1, 2):
        with threads(count):
            (states, finals), gradients = run(whole, torch.cat([dy] * 3, -2))
            for n, member in enumerate(members):
                (own_states, own_finals), own = run(member, dy)
                here = slice(2 * n, 2 * n + 2)
                pairs = [(s[..., here, :], o) for s, o in zip(states, own_states, strict=True)]
                pairs += [(f[here], o) for f, o in zip(finals, own_finals, strict=True)]
                pairs += [(gradients.x.chunk(3, -1)[n], own.x)]
                pairs += [(h[here], o) for h, o in zip(gradients.hx, own.hx, strict=True)]
                for one, other in zip(gradients.weights[here], own.weights, strict=True):
                    pairs += [(w, o) for w, o in zip(one, other, strict=True) if o is not None]
                assert all(torch.equal(*each) for each in pairs)
    assert relative(states[0], reference.run(whole)[0][0].double()) < TOLERANCE[torch.float32]


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cells
def test_bits_do_not_depend_on_threads_or_on_other_rows(cell):
    """Large enough that the plan uses several threads."""
    case = Case(cell, 40, 33, 64, 130, bidirectional=True)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    for count in (2, 3, 5):
        with threads(count):
            assert not same(serial, case.run(layer))
    few = replaced(layer, x=layer.x[:, 7:10], hx=tuple(initial[:, 7:10] for initial in layer.hx))
    assert torch.equal(cpu.forward(few, save=False, all_states=False).states[0], serial["output"][:, 7:10])


FEW_ROWS = {"one": (30, 1, 300, False), "both": (20, 3, 300, True), "odd": (50, 2, 213, False)}


@cells
@pytest.mark.parametrize("size", FEW_ROWS)
def test_threads_may_share_hidden_units(cell, size):
    """Too few rows to share: the threads compute parts of every step and meet."""
    steps, batch, hidden, bidirectional = FEW_ROWS[size]
    case = Case(cell, steps, batch, 30, hidden, bidirectional=bidirectional)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    for count in (2, 3, 5):
        with threads(count):
            assert (cpu_jobs.Call(layer).shape.workers > 1) == (count // len(layer.reverse) > 1)
            for _ in range(5):
                assert not same(serial, case.run(layer))


TEAMS = {"none": pool.NO_TEAM, "too small": pool.team()._replace(size=0)}


@cells
@pytest.mark.parametrize("team", TEAMS)
def test_threads_that_meet_need_a_team(monkeypatch, team, cell):
    """Without OpenMP, or with fewer of its threads than were asked for, one thread does the work of all."""
    case = Case(cell, 20, 2, 30, 300)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    monkeypatch.setattr(pool, "team", lambda: TEAMS[team])
    with threads(2):
        assert not same(serial, case.run(layer))


def test_calls_at_once_share_the_cores():
    """A call that finds the cores taken runs on its own thread, to the same bits."""
    case = Case("lstm", 20, 2, 30, 300)
    layer = case.layer()
    with threads(2):
        expected = case.run(layer)
        assert pool.borrow(pool.cores())
        try:
            assert not pool.borrow(2)
            assert not same(expected, case.run(layer))
        finally:
            pool.give_back(pool.cores())
        assert pool.lent == 0


@cells
def test_python_threads_share_rows(monkeypatch, cell):
    case = Case(cell, 40, 33, 64, 130)
    layer = case.layer()
    with threads(1):
        serial = case.run(layer)
    monkeypatch.setattr(pool, "team", lambda: pool.NO_TEAM)
    with threads(3):
        assert not same(serial, case.run(layer))


@cells
def test_a_sequence_may_be_cut_in_time(cell):
    layer = Case(cell, 30, 3, 5, 40).layer()
    whole, finals, _ = cpu.forward(layer, save=False, all_states=False)
    hx, outputs = layer.hx, []
    for start in range(0, 30, 7):
        states, hx, _ = cpu.forward(replaced(layer, x=layer.x[start : start + 7], hx=hx), save=False, all_states=False)
        outputs.append(states[0])
    assert torch.equal(torch.cat(outputs), whole[0])
    assert all(torch.equal(a, b) for a, b in zip(hx, finals, strict=True))


@cells
def test_strides_of_the_input(cell):
    case = Case(cell, 6, 5, 4, 18)
    layer = case.layer()
    expected = case.run(layer)
    batch_first = layer.x.transpose(0, 1).contiguous().transpose(0, 1)
    features_first = layer.x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for x in (batch_first, features_first):
        assert not x.is_contiguous()
        assert not same(expected, case.run(replaced(layer, x=x)))
    expanded = layer.x[:, :1].expand(6, 5, 4)
    assert not same(case.run(replaced(layer, x=expanded.contiguous())), case.run(replaced(layer, x=expanded)))


def test_many_threads_at_once():
    case = Case("lstm", 30, 16, 32, 64)
    layer = case.layer()
    expected = case.run(layer)
    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        for found in executor.map(lambda _: case.run(layer), range(64)):
            assert not same(expected, found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_forked_child_runs():
    """The child compares bytes itself: torch's own parallel operators may hang after a fork."""
    case = Case("lstm", 60, 32, 64, 64)
    layer = case.layer()
    dy = case.dy.float()

    def run() -> list[bytes]:
        states, finals, saved = cpu.forward(layer, save=True, all_states=False)
        gradients = cpu.backward(layer, states, saved, (dy, None), (None, None), ALL)
        tensors = (*states, *finals, gradients.x, *gradients.hx, *gradients.weights[0][:4])
        return [tensor.numpy().tobytes() for tensor in tensors]

    expected = run()
    child = os.fork()
    if child == 0:
        os._exit(run() != expected)
    assert os.waitpid(child, 0)[1] == 0


def test_a_limit_on_openmp_threads():
    code = """
        import torch
        from tests.test_cpu_kernels import Case
        torch.set_num_threads(2)
        Case("lstm", 20, 2, 30, 300).check()
        Case("gru", 40, 33, 64, 130).check()
    """
    done = run_python(code, OMP_THREAD_LIMIT="1")
    assert done.returncode == 0, done.stderr


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


OTHER_PROCESSORS = {
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2,+fma,+sse4.2"},
    "sse": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86 processors")
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("processor", OTHER_PROCESSORS)
def test_other_vector_lengths(processor, cell):
    code = f"""
        import torch
        from tests.test_cpu_kernels import Case
        Case("{cell}", 9, 13, 7, 21, bidirectional=True).check()
        Case("{cell}", 5, 3, 33, 34, lengths=[5, 5, 2], layout="packed").check()
    """
    done = run_python(code, **OTHER_PROCESSORS[processor])
    assert done.returncode == 0, done.stderr


def test_without_a_cache_folder(tmp_path):
    """Kernels are compiled for this process alone, with one warning."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    code = """
        import warnings
        from tests.test_cpu_kernels import Case
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Case("rnn_relu", 5, 3, 3, 18).check()
        found = [str(w.message) for w in caught if "NUMBA_CACHE_DIR" in str(w.message)]
        assert len(found) == 1, caught
    """
    done = run_python(code, NUMBA_CACHE_DIR=str(blocked))
    assert done.returncode == 0, done.stderr


def test_a_damaged_cache_file_is_compiled_again(tmp_path):
    code = """
        from tests.test_cpu_kernels import Case
        Case("rnn_relu", 5, 3, 3, 18).check()
    """
    assert run_python(code, NUMBA_CACHE_DIR=str(tmp_path)).returncode == 0
    (kept,) = (tmp_path / "rnnfast").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:1000])
    done = run_python(code, NUMBA_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert kept.read_bytes() == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
def test_saved_memory(cell, dtype):
    """What `saved_like` promises is what is saved, and an LSTM keeps at most 7 tensors of the size of its output."""
    layer = Case(cell, 4, 3, 5, 20, dtype=dtype).layer()
    states, _, saved = cpu.forward(layer, save=True, all_states=False)
    assert tuple((tuple(tensor.shape), tensor.dtype) for tensor in saved) == cpu.saved_like(layer)
    assert sum(tensor.numel() for tensor in (*states, *saved)) <= 7 * states[0].numel()


def test_kept_code_runs_without_importing_numba():
    """Once compiled, a kernel needs LLVM alone, so that a first call costs a fraction of a second."""
    cpu.warmup("lstm", torch.float32)
    code = """
        import sys
        from tests.test_cpu_kernels import Case
        from rnnfast.backends import cpu
        import torch
        assert cpu.unsupported("lstm", torch.device("cpu"), torch.float32) is None
        Case("lstm", 5, 3, 3, 18).check()
        assert "numba" not in sys.modules
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("cell", "device", "dtype", "word"),
    [
        ("lstm", "cuda", torch.float32, "cuda"),
        ("gru", "cpu", torch.int64, "int64"),
        ("peephole", "cpu", torch.float32, "peephole"),
    ],
)
def test_unsupported_cases_are_named(cell, device, dtype, word):
    assert word in cpu.unsupported(cell, torch.device(device), dtype)
