"""A case is data: one recurrent layer, its sizes and how it is called. Nothing here runs anything.

Dimensions: T steps, B batch rows, I input width, H hidden units, P projection width.
"""

from dataclasses import asdict, dataclass, fields

GATES = {"rnn": 1, "lstm": 4, "gru": 3}
CELLS = tuple(GATES)
# Of `rnnfast.cells`, which torch.nn lacks: there the baseline is a loop over the steps in eager torch.
DECLARED = ("peephole_lstm", "coupled_lstm", "li_gru", "minimal_gated_unit", "indrnn", "slstm", "janet")
WEIGHTS = ("float32", "bfloat16", "int8")  # of a frozen layer
BYTES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}

MODES = {
    "inference": "forward without gradients, the initial state left out",
    "training": "forward, then the gradients of the input and of all parameters",
    "penalty": "forward, the gradient of the input, and all parameters' gradients by a penalty on its norm (WGAN-GP)",
    "step": "one step forward without gradients, the state handed in, as in streaming",
}

# Products of every weight, in terms of the forward pass. A penalty on the gradient: forward; back to x; how that
# changes; the penalty back through time, where x is not wanted; two products for each weight's gradient.
PASSES = {"training": 3, "penalty": 5.5}

FORMS = {
    "dense": "every row runs all T steps",
    "packed": "a PackedSequence, rows of different lengths",
    "lengths": "a padded tensor and the rows' lengths; zeros past a row's end",
    "resets": "the state of a row is zeroed in the middle of the sequence",
    "states": "every cell state comes out, not only the last",
    "permuted": "the input is a view of a [B, I, T] tensor",
}


@dataclass(frozen=True)
class Case:
    cell: str
    T: int
    B: int
    I: int  # noqa: E741 (the dimension's name)
    H: int
    mode: str = "inference"
    dtype: str = "float32"
    layers: int = 1
    bidirectional: bool = False
    proj: int = 0
    bias: bool = True
    form: str = "dense"
    live: float = 1.0  # fraction of the T*B steps that are not padding
    label: str = ""  # who runs this layer
    weights: str = ""  # format of the weights of a frozen layer; empty where it is not frozen

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def out(self) -> int:
        """Width of one direction's output: P, or H without a projection."""
        return self.proj or self.H

    @property
    def sizes(self) -> str:
        return f"T={self.T} B={self.B} I={self.I} H={self.H}"

    @property
    def extras(self) -> str:
        """What differs from one dense float32 layer in one direction, for people."""
        words = [
            self.dtype if self.dtype != "float32" else "",
            f"{self.weights} weights" if self.weights else "",
            f"{self.layers} layers" if self.layers > 1 else "",
            "bidirectional" if self.bidirectional else "",
            f"proj {self.proj}" if self.proj else "",
            "" if self.bias else "no bias",
            self.form if self.form != "dense" else "",
            f"{self.live:.0%} live" if self.live < 1 else "",
        ]
        return ", ".join(word for word in words if word)

    @property
    def id(self) -> str:
        words = [self.label, self.cell, self.mode, *self.sizes.replace("=", "").split(), *self.extras.split(", ")]
        return "-".join(word.replace(" ", "_") for word in words if word)

    def to_json(self) -> dict:
        """The fields that differ from the defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


def parse_sizes(text: str) -> tuple[int, int, int, int]:
    """Read `T,B,I,H`. Raises ValueError, with what was expected and what came."""
    try:
        sizes = tuple(int(word) for word in text.split(","))
    except ValueError:
        sizes = ()
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"sizes must be four whole numbers above zero, T,B,I,H, such as 100,32,64,128; got {text!r}")
    return sizes


def parameter_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape under torch's own name."""
    if case.cell in DECLARED:
        return {name: tuple(tensor.shape) for name, tensor in declared_layer(case, device="meta").named_parameters()}
    shapes = {}
    for layer in range(case.layers):
        width = case.I if layer == 0 else case.directions * case.out
        for suffix in [f"l{layer}", f"l{layer}_reverse"][: case.directions]:
            rows = GATES[case.cell] * case.H
            shapes[f"weight_ih_{suffix}"] = (rows, width)
            shapes[f"weight_hh_{suffix}"] = (rows, case.out)
            if case.bias:
                shapes[f"bias_ih_{suffix}"] = (rows,)
                shapes[f"bias_hh_{suffix}"] = (rows,)
            if case.proj:
                shapes[f"weight_hr_{suffix}"] = (case.proj, case.H)
    return shapes


def declared_layer(case: Case, **options):
    """Make the layer of a cell of `rnnfast.cells`."""
    import rnnfast

    return rnnfast.Recurrent(getattr(rnnfast.cells, case.cell), case.I, case.H, **options)


def operations(case: Case) -> float:
    """Floating-point operations of the matrix products: 2 per weight and live row, and as many times that as PASSES."""
    weights = sum(shape[0] * shape[1] for shape in parameter_shapes(case).values() if len(shape) == 2)
    return 2.0 * weights * case.T * case.B * case.live * PASSES.get(case.mode, 1)


def traffic(case: Case) -> float:
    """Bytes that must move at least: input, parameters and output once, with their gradients when training."""
    weights = sum(shape[0] * (shape[1] if len(shape) == 2 else 1) for shape in parameter_shapes(case).values())
    rows = case.T * case.B * case.live
    forward = BYTES[case.dtype] * (rows * (case.I + case.directions * case.out) + weights)
    return 2 * forward if case.mode in PASSES else forward
