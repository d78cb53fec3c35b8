"""`rnnfast.Recurrent`: what the kernels compute against the plain loop, the options of a layer, derivatives, checks."""

import copy
import io
import pickle

import pytest
import torch
from closeness import assert_all_close, assert_close, relative_error
from conftest import backends_under_test
from recurrent_layers import F64, everything, make
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import rnnfast

pytestmark = pytest.mark.skipif(backends_under_test() != ["numba"], reason="these are kernels of the CPU")


@rnnfast.cell(gates="a")
def elman(x, u):
    """A cell of torch's form."""
    return torch.tanh(x.a + u.a)


def run(backend, layer, x, hx, signals, **options):
    """Results and gradients, by name."""
    with rnnfast.use_backend(backend):
        output, finals, *states = layer(x, hx, signals=signals, **options)
    found = {"output": output, **{f"final {n}": f for n, f in zip(everything.states, finals, strict=True)}}
    found |= {f"states {n}": s for n, s in enumerate(states[0] if states else ())}
    loss = sum((each * torch.arange(each.numel(), **F64).view_as(each).cos()).sum() for each in found.values())
    leaves = {"x": x, **hx, **signals, **dict(layer.named_parameters())}
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}


CASES = {
    "one direction": {},
    "two directions and layers": {"directions": 2, "layers": 2},
    "one row, shared units": {"steps": 9, "batch": 1, "hidden": 150, "shapes": ((9, 1, 150), (1,))},
    "a signal for every unit": {"shapes": ((19,), (4, 1))},
    "one step": {"steps": 1, "shapes": ((), (1, 4, 19))},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_compute_what_the_plain_loop_does(name):
    case = make(**CASES[name])
    assert_all_close(run("reference", *case, all_states=True), run("numba", *case, all_states=True), 1e-12)


@pytest.mark.parametrize("directions", [1, 2])
def test_lengths_and_resets(directions):
    case = make(directions=directions)
    options = {"lengths": torch.tensor([3, 0, 5, 2])} | ({"resets": torch.rand(5, 4) < 0.4} if directions == 1 else {})
    assert_all_close(run("reference", *case, **options), run("numba", *case, **options), 1e-12)


def test_padding_reaches_nothing():
    layer, x, hx, signals = make()
    lengths = torch.tensor([3, 0, 5, 2])
    expected = run("numba", layer, x, hx, signals, lengths=lengths)
    spoiled = x.detach().clone()
    for row, length in enumerate(lengths):
        spoiled[length:, row] = float("nan")
    got = run("numba", layer, spoiled.requires_grad_(), hx, signals, lengths=lengths)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_packed_is_padded_with_lengths():
    layer, x, hx, signals = make(directions=2)
    lengths = torch.tensor([3, 1, 5, 2])
    output, finals = layer(x, hx, signals=signals, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    for backend in ("numba", "reference"):
        with rnnfast.use_backend(backend):
            got, got_finals = layer(packed, hx, signals=signals)
        assert_all_close(
            dict(enumerate((output, *finals))), dict(enumerate((pad_packed_sequence(got)[0], *got_finals))), 1e-12
        )
        grads = torch.autograd.grad(got.data.sum(), [x, *signals.values()], retain_graph=True)
        expected = torch.autograd.grad(output.sum(), [x, *signals.values()], retain_graph=True)
        assert_all_close(dict(enumerate(expected)), dict(enumerate(grads)), 1e-12)


def test_threads_and_batch_mates_change_no_bit():
    case = make(steps=20, batch=40, hidden=70, shapes=((20, 40, 1), (1, 1, 70)))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run("numba", *case))
    finally:
        torch.set_num_threads(before)
    gradients = [name for name in found[0] if name not in ("ds", "dr")]
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:] for name in gradients)
    layer, x, hx, signals = case
    some = layer(x[:, :7], {n: h[:, :7] for n, h in hx.items()}, signals={"s": signals["s"][:, :7], "r": signals["r"]})
    assert torch.equal(some[0], found[0]["output"][:, :7])


def test_layouts_of_the_input():
    layer, x, hx, signals = make()
    expected, finals = layer(x, hx, signals=signals)
    layer.batch_first = True
    got, _ = layer(x.transpose(0, 1), hx, signals={n: s.transpose(0, 1) for n, s in signals.items()})
    assert torch.equal(got.transpose(0, 1), expected)
    one = {n: h[:, 0] for n, h in hx.items()}
    got, final = layer(x[:, 0], one, signals={"s": signals["s"][:, 0], "r": signals["r"][:, 0]})
    assert torch.equal(got, expected[:, 0])
    assert all(torch.equal(a, b[:, 0]) for a, b in zip(final, finals, strict=True))


def test_any_subset_of_initial_states():
    layer, x, hx, signals = make()
    zero = torch.zeros_like(hx["m"])
    expected = layer(x, (hx["m"], zero, zero), signals=signals)
    for given in ({"m": hx["m"]}, (hx["m"], None, None)):
        assert torch.equal(layer(x, given, signals=signals)[0], expected[0])
    with pytest.raises(ValueError, match="expected some of m, h, n, got k"):
        layer(x, {"k": zero}, signals=signals)
    with pytest.raises(RuntimeError, match=r"expected 3 states \(m, h, n\), got 1"):
        layer(x, (zero,), signals=signals)
    with pytest.raises(RuntimeError, match=r"state m of size \[1, 4, 19\], got \[1, 4, 18\]"):
        layer(x, {"m": zero[..., :18]}, signals=signals)


def test_wrong_signals():
    layer, x, hx, signals = make()
    with pytest.raises(ValueError, match="everything expects s, r, got s"):
        layer(x, hx, signals={"s": signals["s"]})
    with pytest.raises(ValueError, match="everything expects s, r, got s, r, t"):
        layer(x, hx, signals={**signals, "t": signals["s"]})
    with pytest.raises(
        ValueError, match=r"expected s to be broadcastable to \[5, 4, 19\], \[T, B, H\], got \[4, 5, 1\]"
    ):
        layer(x, hx, signals={**signals, "s": torch.zeros(4, 5, 1)})
    with pytest.raises(TypeError, match="expected a tensor for s, got float"):
        layer(x, hx, signals={**signals, "s": 1.0})
    assert layer(x, hx, signals={**signals, "s": torch.ones(4, 1, dtype=torch.bool)})[0].dtype == torch.float64


def test_gradients_and_second_derivatives():
    layer, x, hx, signals = make(steps=3, batch=2, inputs=2, hidden=3, shapes=((3, 1, 1), (2, 3)))
    names = [name for name, _ in layer.named_parameters()]

    def function(*leaves):
        weights = dict(zip(names, leaves[6:], strict=True))
        given = dict(zip(everything.states, leaves[1:4], strict=True))
        of = {"signals": {"s": leaves[4], "r": leaves[5]}}
        output, finals = torch.func.functional_call(layer, weights, (leaves[0], given), of)
        return (output, *finals)

    leaves = (x, *hx.values(), *signals.values(), *layer.parameters())
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch's forward mode
def test_transforms_take_the_plain_loop():
    layer, x, hx, signals = make(steps=3)
    hx, signals = ({n: t.detach() for n, t in each.items()} for each in (hx, {n: s[:3] for n, s in signals.items()}))

    def loss(x):
        return layer(x, hx, signals=signals)[0].square().sum()

    inputs = torch.stack((x.detach(), x.detach() + 1))
    mapped = torch.func.vmap(loss)(inputs)
    assert_all_close({"loss": torch.stack([loss(each) for each in inputs])}, {"loss": mapped}, 1e-12)
    with rnnfast.use_backend("numba"), pytest.raises(RuntimeError, match="no kernels for forward mode"):
        torch.func.vmap(loss)(inputs)
    _, change = torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))
    (grad,) = torch.autograd.grad(loss(x), x)
    assert_all_close({"change": grad.sum()}, {"change": change}, 1e-12)


def test_recompute_and_the_state_of_a_module():
    layer, x, hx, signals = make(layers=2, dropout=0.5)
    layer.eval()
    expected = run("numba", layer, x, hx, signals)
    layer.recompute = True
    got = run("numba", layer, x, hx, signals)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x, hx, signals=signals)[0], expected["output"])
    assert list(layer.state_dict())[:6] == [
        f"{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "p", "q")
    ]
    assert [tuple(p.shape) for p in layer.parameters()][:6] == [(57, 3), (38, 19), (57,), (38,), (19,), (19,)]
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    assert "everything, 3, 19, num_layers=2, dropout=0.5" in repr(layer)


def test_initial_values_of_parameters():
    layer = rnnfast.Recurrent(everything, 3, 4, initial={"p": 0.5, "q": torch.nn.init.zeros_})
    assert (layer.p_l0 == 0.5).all()
    assert (layer.q_l0 == 0).all()
    with pytest.raises(ValueError, match="weight is not a parameter of the cell"):
        rnnfast.Recurrent(everything, 3, 4, initial={"weight": 0.5})
    with pytest.raises(TypeError, match=r"expected a cell declared by .*, got function"):
        rnnfast.Recurrent(lambda x: x, 3, 4)


def test_a_layer_reads_its_input():
    idle = rnnfast.cell(gates="", signals="s")(lambda state, s: state[0] * s.s)
    with pytest.raises(ValueError, match="has no gates"):
        rnnfast.Recurrent(idle, 3, 4)


def test_backends_by_name():
    layer, x, hx, signals = make()
    for name, lacks in (("torch", "torch.nn lacks the cell"), ("triton", "cannot run this")):
        with rnnfast.use_backend(name), pytest.raises(RuntimeError, match=lacks):
            layer(x, hx, signals=signals)


def test_a_cell_of_torchs_form_is_torchs_layer():
    torch.manual_seed(0)
    theirs = torch.nn.RNN(3, 5, num_layers=2, bidirectional=True, **F64)
    ours = rnnfast.Recurrent(elman, 3, 5, num_layers=2, bidirectional=True, **F64)
    ours.load_state_dict(theirs.state_dict())
    sequences = [torch.randn(n, 3, **F64) for n in (4, 2, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    hx = torch.randn(4, 3, 5, **F64)
    for given in (packed, torch.randn(4, 3, 3, **F64)):
        expected, got = theirs(given, hx), ours(given, hx)
        flat = [each[0].data if isinstance(given, type(packed)) else each[0] for each in (expected, got)]
        assert_all_close({"y": flat[0], "h": expected[1]}, {"y": flat[1], "h": got[1]}, 1e-12)


@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, id="float32", marks=pytest.mark.long), pytest.param(torch.bfloat16, id="bfloat16")],
)
def test_errs_no_more_than_the_plain_loop(dtype):
    """Against float64: no more than three times the error of the eager step, and in half precision less."""
    layer, x, hx, signals = make(directions=2)

    def losses(layer, x, hx, signals):
        output, finals = layer(x, hx, signals=signals)
        loss = sum((each.double() * torch.arange(each.numel()).view_as(each).cos()).sum() for each in (output, *finals))
        leaves = [x, *hx.values(), *signals.values(), *layer.parameters()]
        return dict(enumerate((output, *torch.autograd.grad(loss, leaves))))

    def cast(tensor):
        return tensor.detach().to(dtype).requires_grad_()

    small = copy.deepcopy(layer).to(dtype)
    given = cast(x), {n: cast(h) for n, h in hx.items()}, {n: cast(s) for n, s in signals.items()}
    with torch.no_grad():
        for ours, theirs in zip(layer.parameters(), small.parameters(), strict=True):
            ours.copy_(theirs)
    wide = tuple(
        {n: t.detach().double().requires_grad_() for n, t in each.items()}
        if isinstance(each, dict)
        else each.detach().double().requires_grad_()
        for each in given
    )
    exact, found = losses(layer, *wide), losses(small, *given)
    with rnnfast.use_backend("reference"):
        eager = losses(small, *given)
    for name, value in exact.items():
        assert relative_error(value, found[name]) <= 3 * relative_error(value, eager[name]) + 1e-7, name


def test_autocast_computes_in_its_dtype():
    layer, x, hx, signals = (each.float() if not isinstance(each, dict) else each for each in make())
    with torch.autocast("cpu", torch.bfloat16):
        output, finals = layer(x, {n: h.float() for n, h in hx.items()}, signals=signals)
    assert {t.dtype for t in (output, *finals)} == {torch.bfloat16}


def test_gradients_to_be_differentiated_are_those_that_are_not():
    """Inputs that depend on one another, that are one tensor, and that have hooks."""
    cell = rnnfast.cells.peephole_lstm
    layer, tied = rnnfast.Recurrent(cell, 4, 4, **F64), rnnfast.Recurrent(cell, 4, 4, 2, **F64)
    tied.weight_hh_l1 = tied.weight_hh_l0
    x, h = torch.randn(5, 2, 4, **F64, requires_grad=True), torch.randn(1, 2, 4, **F64, requires_grad=True)

    def chunks():
        _, state = layer(x)
        return layer(x, state)[0], layer.weight_hh_l0

    cases = {
        "chunks": chunks,
        "state of x": lambda: (layer(x, (x[:1] * 2, x[1:2]))[0], x),
        "one state": lambda: (layer(x, (h, h))[0], h),
        "tied": lambda: (tied(x)[0], tied.weight_hh_l0),
    }
    for name, make_case in cases.items():
        found = []
        for create_graph in (False, True):
            output, leaf = make_case()
            found.append(torch.autograd.grad(output.sin().sum(), leaf, create_graph=create_graph)[0])
        assert_close(name, found[0], found[1], 1e-12)
        output, leaf = make_case()
        (gradient,) = torch.autograd.grad(output.sin().sum(), leaf, create_graph=True)
        with rnnfast.use_backend("reference"):
            output, leaf = make_case()
            (expected,) = torch.autograd.grad(output.sin().sum(), leaf, create_graph=True)
        others = [layer.weight_ih_l0 if name != "tied" else tied.weight_ih_l1, layer.p_i_l0 if name != "tied" else x]
        pairs = [torch.autograd.grad(each.square().sum(), others) for each in (expected, gradient)]
        for a, b in zip(*pairs, strict=True):
            assert_close(f"{name}, second", a, b, 1e-11)
    layer.weight_hh_l0.register_hook(lambda g: 2 * g)
    once, twice = (
        torch.autograd.grad(layer(x)[0].sum(), layer.weight_hh_l0, create_graph=create)[0] for create in (False, True)
    )
    assert_close("hook", once, twice, 1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"signals": [torch.zeros(1)]}, "signals: expected a mapping of tensors by name, got list"),
        ({"signals": {"attention": torch.zeros(1, dtype=torch.complex64)}}, "signals: expected real numbers"),
        ({"hx": 5}, "hx: expected tensors of h, got int"),
        ({"hx": {"h": 0.0}}, "hx: expected a tensor for h, got float"),
    ],
)
def test_things_that_are_no_tensors(options, says):
    layer, x = rnnfast.Recurrent(rnnfast.cells.augru, 3, 4), torch.randn(5, 2, 3)
    with pytest.raises(TypeError, match=says):
        layer(x, **{"signals": {"attention": torch.zeros(1)}, **options})
