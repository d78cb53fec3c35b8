"""About 150 wrong constructors and calls of each class: the type of the error and its words are torch's."""

import numpy as np
import pytest
import torch
from torch import nn, zeros
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch_releases import needs

import rnnfast

AS_TODAY = needs(torch.__version__ >= "2.13", "checks less, or says it otherwise")
LAYERS, CELLS = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
X, H, XC, HC = zeros(2, 3, 4), zeros(1, 3, 5), zeros(3, 4), zeros(3, 5)
ROWS = pack_padded_sequence(X, [2, 2, 1])

MADE = {
    "num_layers=0": {"num_layers": 0}, "num_layers=-1": {"num_layers": -1}, "num_layers=1.5": {"num_layers": 1.5},
    "num_layers='2'": {"num_layers": "2"}, "num_layers=None": {"num_layers": None}, "dropout=2": {"dropout": 2},
    "dropout=True": {"dropout": True}, "dropout='a'": {"dropout": "a"}, "dropout=None": {"dropout": None},
    "bias=1": {"bias": 1}, "batch_first=1": {"batch_first": 1}, "proj_size=-1": {"proj_size": -1},
    "proj_size=9": {"proj_size": 9}, "proj_size=5": {"proj_size": 5}, "proj_size='1'": {"proj_size": "1"},
    "proj_size=1.5": {"proj_size": 1.5}, "dtype=int64": {"dtype": torch.int64}, "device": {"device": "nowhere"},
    "dtype='float32'": {"dtype": "float32"}, "input_size=0": {"input_size": 0}, "hidden_size=0": {"hidden_size": 0},
    "input_size=-1": {"input_size": -1}, "hidden_size=-1": {"hidden_size": -1}, "input_size='4'": {"input_size": "4"},
    "hidden_size='5'": {"hidden_size": "5"}, "hidden_size=5.0": {"hidden_size": 5.0},
    "input_size=None": {"input_size": None}, "hidden_size=None": {"hidden_size": None},
}  # fmt: skip
INPUTS = {
    "None": None, "list": [1.0], "array": np.zeros((2, 3, 4), np.float32), "int": 3, "str": "a", "tuple": (X,),
    "1-D": zeros(4), "0-D": zeros(()), "4-D": zeros(1, 2, 3, 4), "width": zeros(2, 3, 7), "no width": zeros(2, 3, 0),
    "float64": X.double(), "int64": X.long(), "bool": X.bool(), "complex": X + 0j, "meta": X.to("meta"),
    "unbatched width": zeros(2, 7), "packed width": pack_padded_sequence(zeros(2, 3, 7), [2, 2, 1]),
    "packed float64": ROWS.double(), "packed 3-D": PackedSequence(zeros(5, 1, 4), torch.tensor([3, 2])),
}  # fmt: skip
# Of layers; for cells the states have no first dimension.
STATES = {
    "2-D": zeros(1, 5), "1-D": zeros(5), "0-D": zeros(()), "4-D": zeros(1, 1, 3, 5), "batch": zeros(1, 2, 5),
    "width": zeros(1, 3, 6), "rows": zeros(2, 3, 5), "int64": H.long(), "float64": H.double(), "meta": H.to("meta"),
    "list of 1": [H], "tuple of 1": (H,), "tuple of 2": (H, H), "list of 2": [H, H], "tuple of 3": (H, H, H),
    "empty": (), "None, None": (None, None), "tensor, None": (H, None), "int": 0, "str": "ab", "False": False,
    "array": np.zeros((1, 3, 5)), "dict": {"h": 1}, "ints": (1, 2), "tensor, int": (H, 1), "2-D pair": (H[0], H[0]),
    "batch of h": (zeros(1, 2, 5), H), "batch of c": (H, zeros(1, 2, 5)), "width of c": (H, zeros(1, 3, 6)),
    "float64 pair": (H.double(), H.double()), "one float64": (H, H.double()), "meta pair": (H.to("meta"),) * 2,
}  # fmt: skip
WITH = {"": X, "packed": ROWS, "unbatched": zeros(2, 4)}
WEIGHTS = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")

# Refused by both with errors of one type, by torch in the words of an operator below its own checks.
OWN_WORDS = {
    *((name, f"hx {state}") for name in ("RNN", "GRU") for state in ("int64", "float64")),
    *((name, f"{form} hx {state}") for name in LAYERS for form in ("packed", "unbatched") for state in STATES),
    ("LSTM", "hx float64 pair"), ("LSTM", "hx one float64"), ("LSTM", "packed width"), ("LSTM", "packed 3-D"),
    *((name, what) for name in CELLS for what in ("float64", "hx float64", "hx int64", "hx meta")),
    ("LSTMCell", "hx float64 pair"), ("LSTMCell", "hx meta pair"),
}  # fmt: skip
# Refused here, while torch runs them or refuses them with an error of another type.
OTHERS = {
    ("LSTMCell", "hx one float64"),  # torch's step mixes the dtypes
    ("LSTM", "packed float64"),  # of ours a ValueError, as where the input is not packed
    ("LSTM", "packed hx 2-D pair"),  # torch: IndexError
    ("LSTM", "unbatched hx rows"),  # one tensor in place of a pair
    ("RNN", "packed, no weight_ih_l0"),
    ("GRU", "packed, no weight_ih_l0"),  # torch: 'NoneType' has no attribute
}


def outcome(call) -> tuple[str, str]:
    """Return the type and the message of what a call raises."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def difference(name: str, what: str, call) -> list[str]:
    """Compare a wrong call of torch's class with that of ours."""
    theirs, ours = outcome(lambda: call(getattr(nn, name))), outcome(lambda: call(getattr(rnnfast, name)))
    if (name, what) in OTHERS:
        agree = ours[0] != theirs[0]
    else:
        agree = ours[0] == theirs[0] if (name, what) in OWN_WORDS else ours == theirs
    return [] if agree else [f"{name}, {what}: torch {theirs}, ours {ours}"]


def compare(name: str, calls: dict):
    """Compare wrong calls of torch's class with those of ours."""
    found = [each for what, call in calls.items() for each in difference(name, what, call)]
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize("name", LAYERS)
def test_constructors(name):
    sizes = {"input_size": 4, "hidden_size": 5}
    compare(name, {what: lambda kind, given=sizes | options: kind(**given) for what, options in MADE.items()})


@pytest.mark.parametrize("nonlinearity", ["sigmoid", None, ["tanh"]], ids=str)
def test_nonlinearity(nonlinearity):
    compare("RNN", {"nonlinearity": lambda kind: kind(4, 5, nonlinearity=nonlinearity)})
    compare("RNNCell", {"nonlinearity": lambda kind: kind(4, 5, nonlinearity=nonlinearity)(XC)})


@AS_TODAY
@pytest.mark.parametrize("name", LAYERS)
def test_inputs_of_layers(name):
    compare(name, {what: lambda kind, x=x: kind(4, 5)(x) for what, x in INPUTS.items()})


@pytest.mark.parametrize("form", WITH)
@pytest.mark.parametrize("name", LAYERS)
def test_states_of_layers(name, form):
    calls = {f"{form} hx {what}".strip(): lambda kind, hx=hx: kind(4, 5)(WITH[form], hx) for what, hx in STATES.items()}
    compare(name, calls)


@pytest.mark.parametrize("backend", ["auto", "numba"])
@pytest.mark.parametrize("name", CELLS)
def test_inputs_and_states_of_cells(name, backend):
    refused = ("int64", "bool", "complex", "meta") if backend == "numba" else ()
    inputs = {w: x for w, x in INPUTS.items() if not isinstance(x, PackedSequence) and w not in refused}
    calls = {what: lambda kind, x=x: kind(4, 5)(drop(x)) for what, x in inputs.items()}
    calls |= {f"hx {what}": lambda kind, hx=hx: kind(4, 5)(XC, drop(hx)) for what, hx in STATES.items()}
    with rnnfast.use_backend(backend):
        compare(name, calls)


def drop(given):
    """Take the first dimension off tensors of three."""
    if isinstance(given, tuple | list):
        return type(given)(map(drop, given))
    return given[0] if isinstance(given, torch.Tensor) and given.dim() == 3 else given


def without(module, name: str):
    """Take a weight away."""
    setattr(module, name, None)
    return module


@pytest.mark.parametrize("call", [0, 3])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_weight_that_is_none(name, weight, call):
    """In the first call and once the call is prepared."""

    def run(kind):
        layer = kind(4, 5)
        for _ in range(call):
            layer(X)
        without(layer, weight)(X)

    compare(name, {"no weight": run, f"packed, no {weight}": lambda kind: without(kind(4, 5), weight)(ROWS)})


@pytest.mark.parametrize("backend", ["auto", "numba"])
@pytest.mark.parametrize("weight", ["weight_ih", "weight_hh"])
@pytest.mark.parametrize("name", CELLS)
def test_a_weight_of_a_cell_that_is_none(name, weight, backend):
    with rnnfast.use_backend(backend):
        compare(name, {f"{x.dim()}-D": lambda kind, x=x: without(kind(4, 5), weight)(x) for x in (XC, XC[0])})


def test_what_torch_has_no_class_for():
    layer = rnnfast.LSTM(4, 5)
    for missing in range(4):
        weights: list = [*layer.parameters()]
        weights[missing] = None
        message = f"expected Tensor as element {missing} in argument 2, but got NoneType"
        with pytest.raises(TypeError, match=message):
            rnnfast.functional.lstm(X, weights)
        with pytest.raises(TypeError, match=message):
            rnnfast.Stream(without(rnnfast.LSTM(4, 5), WEIGHTS[missing]))
    for name in WEIGHTS[1:]:
        with pytest.raises(TypeError, match="but got NoneType"):
            without(rnnfast.Recurrent(rnnfast.cells.janet, 4, 5), name)(X)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="num_layers must be greater than zero"):
            rnnfast.functional.gru(X, [*rnnfast.GRU(4, 5).parameters()], num_layers=wrong)
    with pytest.raises(TypeError, match="num_layers should be of type int"):
        rnnfast.functional.gru(X, [*rnnfast.GRU(4, 5).parameters()], num_layers=1.5)
    with pytest.raises(TypeError, match="expected a list of tensors, got NoneType"):
        rnnfast.functional.gru(X, None)
    with pytest.raises(TypeError, match="expected a list of tensors, got OrderedDict"):
        rnnfast.functional.gru(X, rnnfast.GRU(4, 5).state_dict())


@AS_TODAY
def test_constructor_of_a_declared_layer():
    refused_later = ("num_layers=1.5", "num_layers='2'", "num_layers=None")
    for what, options in MADE.items():
        if "proj_size" not in what and what not in refused_later:
            options = {"input_size": 4, "hidden_size": 5, **options}
            theirs = outcome(lambda options=options: nn.GRU(**options))
            assert outcome(lambda options=options: rnnfast.Recurrent(rnnfast.cells.janet, **options)) == theirs, what
    with pytest.raises(TypeError, match=r"num_layers should be of type int, got: float"):
        rnnfast.Recurrent(rnnfast.cells.janet, 4, 5, num_layers=1.5)


@pytest.mark.parametrize("batch", [0, -1, "a", None, 1.5], ids=str)
def test_the_batch_of_a_stream(batch):
    with pytest.raises(ValueError, match="expected batch to be a positive integer"):
        rnnfast.Stream(rnnfast.GRU(4, 5), batch)


def test_state_and_rows_of_a_stream():
    stream = rnnfast.Stream(rnnfast.GRU(4, 5), 2)
    for wrong in (3, None, "ab", {"h": 1}):
        with pytest.raises(TypeError, match="expected a state of type Tensor"):
            stream.state = wrong
    for wrong in (3, torch.zeros(2)):
        with pytest.raises(TypeError, match="expected rows to be a bool tensor"):
            stream.reset(wrong)
    with pytest.raises(ValueError, match=r"expected rows of shape \[2\], got \[3\]"):
        stream.reset(torch.zeros(3, dtype=torch.bool))


def test_what_is_no_module_or_no_tensor():
    with pytest.raises(TypeError, match=r"warmup: expected a torch\.nn\.Module, got int"):
        rnnfast.warmup(3)
    with pytest.raises(TypeError, match="explain: expected a tensor or a PackedSequence, got int"):
        rnnfast.explain(rnnfast.GRU(4, 5), 3)
