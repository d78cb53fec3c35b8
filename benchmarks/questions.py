"""What the suite asks: each question is a list of cases and the peers worth asking.

The sizes are chosen to show trends and what people run; no code of the library is tuned for them.
"""

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from benchmarks.cases import CELLS, DECLARED, WEIGHTS, Case, operations
from benchmarks.facts import AXES

EVERY_PEER = ("torch-compile", "onnxruntime", "jax", "numpy")
FAST_PEERS = ("onnxruntime",)
# More operations than these in a forward pass take seconds, and teach nothing new of a size.
MOST_OPERATIONS = 1.2e11


@dataclass(frozen=True)
class Question:
    name: str
    title: str
    peers: tuple[str, ...]
    cases: tuple[Case, ...]


def base(device: str) -> Case:
    """The sizes from which the sweeps start."""
    if device == "cpu":
        return Case("lstm", T=100, B=16, I=128, H=128)
    return Case("lstm", T=512, B=16, I=768, H=768, dtype="bfloat16")


def dtypes(device: str) -> tuple[str, ...]:
    """What each device is asked for: tf32 is float32 with torch's TF32 switch for recurrent layers on."""
    return (
        ("float32", "bfloat16", "float16", "float64") if device == "cpu" else ("bfloat16", "float16", "tf32", "float32")
    )


def each(cases: Iterable[Case], cells=CELLS, modes=("inference", "training")) -> tuple[Case, ...]:
    """Every case for every cell and mode."""
    cases = tuple(cases)
    return tuple(replace(case, cell=cell, mode=mode) for cell in cells for mode in modes for case in cases)


def sequence_length(device: str, longest: int = 8192) -> Question:
    lengths = [length for length in (1, 4, 16, 64, 256, 1024, 4096, 8192) if length <= longest]
    cases = each(replace(base(device), T=T) for T in lengths)
    return Question("sequence-length", "Time against sequence length", EVERY_PEER, cases)


def hidden_size(device: str) -> Question:
    sizes = (16, 32, 64, 128, 256, 512, 1024) if device == "cpu" else (64, 128, 256, 512, 768, 1024, 2048)
    cases = each(replace(base(device), I=H, H=H) for H in sizes)
    return Question("hidden-size", "Time against hidden size", FAST_PEERS, cases)


def batch(device: str) -> Question:
    sizes = product((64, 128, 256, 512, 1024), (1, 4, 16, 64, 256))
    cases = (replace(base(device), I=H, H=H, B=B) for H, B in sizes)
    # Those of `hidden-size` are left out.
    cases = (case for case in cases if case.B != base(device).B and operations(case) <= MOST_OPERATIONS)
    return Question("batch", "Hidden size by batch", (), each(cases))


def one_step(device: str) -> Question:
    cases = each((replace(base(device), T=1, B=B, I=H, H=H) for H in (64, 256, 640) for B in (1, 64)), modes=("step",))
    return Question("one-step", "One step with the state handed in, the module's call included", FAST_PEERS, cases)


def stacks(device: str) -> Question:
    cases = (replace(base(device), layers=n, bidirectional=two) for n in (1, 2, 4) for two in (False, True))
    return Question("stacks", "Layers and directions", FAST_PEERS, each(cases, cells=("lstm", "gru")))


def live_fraction(device: str) -> Question:
    dense = replace(base(device), T=200, B=32)
    forms = [replace(dense, form=form, live=live) for form in ("packed", "lengths") for live in (0.25, 0.5, 0.75, 1.0)]
    cases = each((dense, *forms), cells=("lstm", "gru"))
    return Question("live-fraction", "Packed and lengths against padded, by the fraction of live rows", (), cases)


def dtype(device: str) -> Question:
    cases = each(replace(base(device), dtype=name) for name in dtypes(device))
    return Question("dtype", "Number formats", FAST_PEERS, cases)


def frozen(device: str) -> Question:
    """Weights packed once: each format beside torch.nn, and int8 beside those of the peers."""
    sizes = product(WEIGHTS, ((1, 1), (50, 1), (50, 16)), (64, 256, 1024))
    cases = (Case("lstm", T, B, H, H, weights=weights) for weights, (T, B), H in sizes)
    return Question("frozen", "Frozen layers", ("onnxruntime", "torch-int8"), each(cases, modes=("inference",)))


def cells(device: str) -> Question:
    case = Case("lstm", T=100, B=32, I=128, H=128)
    return Question("cells", "Cells that torch.nn lacks", ("torch-compile",), each([case], cells=DECLARED))


def penalty(device: str) -> Question:
    sizes = ((64, 32, 128), (200, 8, 32), (50, 64, 64), (20, 16, 256))
    cases = each((replace(base(device), T=T, B=B, I=H, H=H, dtype="float32") for T, B, H in sizes), modes=("penalty",))
    return Question("penalty", "A penalty on the norm of the input's gradient, as in WGAN-GP", (), cases)


def real_layers(device: str) -> Question:
    return Question("real-layers", "Layers that people run", FAST_PEERS, REAL_LAYERS)


def real(label: str, cell: str, sizes: tuple[int, ...], mode: str = "inference", **options: Any) -> Case:
    return Case(cell, *sizes, mode=mode, label=label, **options)


REAL_LAYERS = (
    real("Encodec, one second", "lstm", (75, 1, 512, 512), layers=2, form="permuted"),
    real("Open-Unmix", "lstm", (255, 4, 512, 512), layers=3, bidirectional=True),
    real("Open-Unmix", "lstm", (255, 4, 512, 512), "training", layers=3, bidirectional=True),
    real("PyanNet", "lstm", (589, 32, 60, 128), "training", layers=4, bidirectional=True),
    real("EasyOCR", "lstm", (200, 32, 512, 256), bidirectional=True),
    real("Tacotron2", "lstm", (150, 32, 512, 256), "training", bidirectional=True, form="packed", live=0.55),
    real("Flair", "lstm", (60, 32, 1024, 256), "training", bidirectional=True, form="packed", live=0.45),
    real("DeepAR", "lstm", (24, 64, 40, 40), "training", layers=2),
    real("DeepAR, rollout", "lstm", (1, 3200, 40, 40), "step", layers=2),
    real("RecurrentPPO", "lstm", (128, 8, 256, 256), "training", form="resets"),
    real("Dreamer, its GRU without layer norm", "gru", (64, 16, 512, 512), "training"),
    real("GRU4Rec", "gru", (50, 2048, 64, 128), "training", bias=False),
    real("AWD-LSTM, first layer", "lstm", (70, 64, 400, 1152), "training"),
    real("AWD-LSTM, last layer", "lstm", (70, 64, 1152, 400), "training"),
    real("neural-amp-modeler", "lstm", (8000, 16, 1, 24), "training"),
    real("neural-amp-modeler, one second", "lstm", (48000, 1, 1, 24)),
    real("RNN-T predictor", "lstm", (1, 1, 640, 640), "step", layers=2),
    real("neuralhydrology", "lstm", (365, 256, 32, 128), "training", form="states"),
    real("teaching notes", "rnn", (10, 32, 1, 32), "training"),
    real("teaching notes", "lstm", (10, 32, 1, 32), "training"),
)


def marks(device: str) -> Question:
    """What the GPU kernels were built to reach, the most telling first."""
    long = Case("lstm", T=1024, B=16, I=1024, H=1024, dtype="bfloat16", label="lstm-1024")
    half = replace(long, I=768, H=768, dtype="float16", label="lstm-768-half")
    cases = (
        long,
        half,
        replace(long, cell="gru", label="gru-1024"),
        replace(long, I=256, H=256, label="lstm-256"),
        replace(long, I=128, H=128, label="lstm-128"),
        replace(long, I=2048, H=2048, label="lstm-2048"),
        replace(long, B=64, label="lstm-1024-rows-64"),
        replace(long, B=1, label="lstm-1024-row"),
        replace(long, cell="gru", I=512, H=512, dtype="tf32", label="gru-512-tf32"),
        replace(long, I=512, H=512, dtype="float32", label="lstm-512-float32"),
        replace(long, I=768, H=768, bidirectional=True, label="lstm-768-both-ways"),
        replace(long, I=650, H=650, B=13, label="lstm-650-odd"),
        replace(long, form="packed", live=0.55, B=32, I=512, H=512, label="lstm-512-packed"),
        replace(long, cell="rnn", I=512, H=512, label="rnn-512"),
    )
    both = tuple(replace(case, mode=mode) for case in cases for mode in ("inference", "training"))
    return Question("marks", "What the GPU kernels should reach", (), both)


@dataclass(frozen=True)
class Limits:
    """Smallest and largest size of each dimension in a grid, and the most operations one case may cost forward."""

    T: tuple[int, int] = (1, 2000)
    B: tuple[int, int] = (1, 64)
    I: tuple[int, int] = (1, 640)  # noqa: E741
    H: tuple[int, int] = (16, 1024)
    operations: float = 20e9


def grid(count: int, seed: int, limits: Limits) -> Question:
    """`count` random sizes, uniform in the logarithm, for every cell and mode; most are multiples of nothing."""
    source = random.Random(seed)

    def draw(bounds: tuple[int, int]) -> int:
        low, high = math.log(bounds[0]), math.log(bounds[1] + 1)
        return min(bounds[1], int(math.exp(source.uniform(low, high))))

    cases: list[Case] = []
    while len(cases) < count:
        case = Case("lstm", draw(limits.T), draw(limits.B), draw(limits.I), draw(limits.H))
        if operations(case) <= limits.operations:
            cases.append(case)
    return Question("grid", f"{count} random sizes", ("onnxruntime",), each(cases))


def facts() -> Question:
    """Sizes at which the CPU kernels may be slower than torch.nn: few steps, which leave a weight little use."""
    cases = (Case("lstm", T, B, H, H) for T, B, H in product(*AXES.values()))
    return Question("facts", "Where torch.nn is faster", (), each(cases))


def one_size(sizes: tuple[int, int, int, int], dtype: str) -> Question:
    T, B, I, H = sizes  # noqa: E741
    cases = each(
        [Case("lstm", T, B, I, H, dtype=dtype)], modes=("inference", "training", *(("step",) if T == 1 else ()))
    )
    return Question("sizes", f"T={T} B={B} I={I} H={H}", EVERY_PEER, cases)


FULL = (real_layers, sequence_length, hidden_size, batch, one_step, stacks, live_fraction, dtype, penalty, cells)


def full(device: str) -> tuple[Question, ...]:
    asked = tuple(ask(device) for ask in FULL)
    return (*asked, frozen(device)) if device == "cpu" else (marks(device), *asked)


def quick(device: str) -> tuple[Question, ...]:
    lengths = sequence_length(device, longest=1024)
    first = () if device == "cpu" else (marks(device),)
    return (*first, replace(lengths, peers=FAST_PEERS), one_step(device))
