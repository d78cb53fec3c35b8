"""Frozen layers on the CPU against torch's quantize_dynamic and ONNX Runtime: errors and times of the same calls.

    python -m benchmarks.frozen --out frozen.json [--plot frozen.png] [--threads 1 2] [--cells lstm gru] [--shapes 1x1]

Every engine has the same weights and input. The error of an int8 engine is relative to a float32 layer of torch, as a
relative L2 norm over the output. Engines alternate in one process; a time is the median of the rounds. Peers that are
not installed are left out, with a word.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import nn

import rnnfast

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
SHAPES = ((1, 1), (50, 1), (50, 16), (200, 32))
HIDDEN = (64, 128, 256, 512, 640, 1024)
QUICK_SHAPES, QUICK_HIDDEN = ((1, 1), (50, 1), (50, 16)), (64, 256, 512)
FORMATS = ("float32", "bfloat16", "int8")
# torch's gates in the order of ONNX: i o f c of an LSTM, z r h of a GRU.
ONNX_ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}
COLOURS = {
    "rnnfast float32": "#e69f00", "rnnfast bfloat16": "#009e73", "rnnfast int8": "#d55e00", "torch float32": "#999999",
    "torch int8": "#000000", "ort float32": "#56b4e9", "ort int8": "#0072b2",
}  # fmt: skip
# Seconds that a measurement is repeated for within one round.
ROUND_SECONDS = 2e-3


def engines(cell: str, layer: nn.Module, x: torch.Tensor, threads: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return what runs the layer over x, by name; torch's float32 first."""
    frozen = {name: rnnfast.freeze(copy.deepcopy(layer), name) for name in FORMATS}
    ours = rnnfast.accelerate(copy.deepcopy(layer))
    found: dict[str, Callable[[], torch.Tensor]] = {"torch float32": lambda: layer(x)[0]}
    found["rnnfast"] = lambda: ours(x)[0]
    for name, module in frozen.items():
        found[f"rnnfast {name}"] = lambda module=module: module(x)[0]
    if cell != "rnn":
        found["torch int8"] = torch_int8(layer, x)
    return found | onnx_engines(cell, layer, x, threads)


def torch_int8(layer: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return torch's dynamically quantised layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {type(layer)})
    return lambda: quantised(x)[0]


def onnx_engines(cell: str, layer: nn.Module, x: torch.Tensor, threads: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return ONNX Runtime's layers, float32 and, for an LSTM, int8; none where it is not installed."""
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError:
        return {}
    import tempfile
    from pathlib import Path

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        onnx.save(onnx_model(cell, layer, x), path)
        files = {"ort float32": path}
        if cell == "lstm":
            files["ort int8"] = path.with_name("int8.onnx")
            quantize_dynamic(path, files["ort int8"], op_types_to_quantize=["LSTM"], weight_type=QuantType.QInt8)
        for name, file in files.items():
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            found[name] = run_session(session, x)
    return found


def run_session(session, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return a call of a session."""
    given = {"x": x.numpy()}

    def run() -> torch.Tensor:
        return torch.from_numpy(session.run(["y"], given)[0])[:, 0]

    return run


def onnx_model(cell: str, layer: nn.Module, x: torch.Tensor):
    """Build a graph of one LSTM, GRU or RNN with the layer's weights."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    steps, batch, inputs = x.shape
    hidden = layer.hidden_size

    def reordered(tensor: torch.Tensor) -> torch.Tensor:
        gates = tensor.detach().reshape(-1, hidden, *tensor.shape[1:])
        return gates[list(ONNX_ORDER[cell])].reshape(tensor.shape)

    w, r = reordered(layer.weight_ih_l0)[None], reordered(layer.weight_hh_l0)[None]
    b = torch.cat([reordered(layer.bias_ih_l0), reordered(layer.bias_hh_l0)])[None]
    constants = [
        numpy_helper.from_array(each.contiguous().numpy(), name) for each, name in ((w, "w"), (r, "r"), (b, "b"))
    ]
    extra = {"linear_before_reset": 1} if cell == "gru" else {}
    node = helper.make_node(cell.upper(), ["x", "w", "r", "b"], ["y"], hidden_size=hidden, **extra)
    graph = helper.make_graph(
        [node],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [steps, batch, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [steps, 1, batch, hidden])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def repetitions(run: Callable) -> int:
    """Return how many calls a round takes."""
    run()
    start = time.perf_counter()
    run()
    return max(1, min(200, int(ROUND_SECONDS / (time.perf_counter() - start))))


def measure(found: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, list[float]]:
    """Return each engine's seconds a call, round by round; engines alternate."""
    counts = {name: repetitions(run) for name, run in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for n in range(rounds + 1):
        for name, run in found.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                run()
            if n:
                times[name].append((time.perf_counter() - start) / counts[name])
    return times


def one_case(cell: str, steps: int, batch: int, hidden: int, threads: int, rounds: int) -> dict:
    """Check and measure one case."""
    torch.set_num_threads(threads)
    torch.manual_seed(hidden)
    layer, x = CELLS[cell](hidden, hidden).eval(), torch.randn(steps, batch, hidden)
    found = engines(cell, layer, x, threads)
    reference = found["torch float32"]()
    errors = {name: ((run() - reference).norm() / reference.norm()).item() for name, run in found.items()}
    for name, error in errors.items():
        if error > (0.05 if name.endswith(("int8", "bfloat16")) else 1e-5):
            raise RuntimeError(f"{name}: relative error {error:.2g} in {cell} {steps}x{batch}x{hidden}")
    times = measure(found, rounds)
    row = {"cell": cell, "steps": steps, "batch": batch, "hidden": hidden, "threads": threads, "errors": errors}
    row["median"] = {name: statistics.median(each) for name, each in times.items()}
    row["fastest"] = {name: min(each) for name, each in times.items()}
    return row


def summary(rows: list[dict]) -> dict[str, dict[str, float]]:
    """Return, for pairs of engines and each cell, geometric mean and least of the ratios of their medians."""
    pairs = [
        ("ort int8", "rnnfast int8"), ("torch int8", "rnnfast int8"), ("torch float32", "rnnfast int8"),
        ("rnnfast", "rnnfast int8"), ("ort float32", "rnnfast float32"), ("rnnfast", "rnnfast float32"),
        ("rnnfast", "rnnfast bfloat16"),
    ]  # fmt: skip
    told = {}
    for peer, ours in pairs:
        for cell in CELLS:
            medians = [row["median"] for row in rows if row["cell"] == cell]
            ratios = [each[peer] / each[ours] for each in medians if peer in each and ours in each]
            if ratios:
                told[f"{cell}: {peer} / {ours}"] = {
                    "geometric mean": statistics.geometric_mean(ratios), "least": min(ratios), "cases": len(ratios)
                }  # fmt: skip
    return told


def plot(report: dict, path: str) -> None:
    """Draw, from a file of results, each engine's speed in multiples of our layer that is not frozen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["rows"]
    groups = sorted({(row["cell"], row["threads"]) for row in rows})
    figure, axes = pyplot.subplots(len(groups), 1, figsize=(12, 3.2 * len(groups)), squeeze=False, layout="constrained")
    for axis, (cell, threads) in zip(axes[:, 0], groups, strict=True):
        cases = [row for row in rows if (row["cell"], row["threads"]) == (cell, threads)]
        for name in cases[0]["median"]:
            if name != "rnnfast":
                speeds = [row["median"]["rnnfast"] / row["median"][name] for row in cases]
                axis.plot(speeds, marker="o", linewidth=1, label=name, color=COLOURS.get(name))
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(cases)), [f"{row['steps']}x{row['batch']}x{row['hidden']}" for row in cases])
        axis.tick_params(axis="x", rotation=60)
        axis.set(yscale="log", ylabel="speed / rnnfast", title=f"{cell.upper()}, T x B x H, threads: {threads}")
        axis.legend(fontsize=7, ncols=4)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure and write a file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--plot", help="a picture of the results, .png or .svg")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--shapes", nargs="+", help="T x B, for example 1x1 50x16")
    asked = parser.parse_args()
    shapes, sizes = (QUICK_SHAPES, QUICK_HIDDEN) if asked.quick else (SHAPES, HIDDEN)
    if asked.shapes:
        shapes = tuple((int(steps), int(batch)) for steps, batch in (each.split("x") for each in asked.shapes))
    try:
        import onnxruntime

        version = onnxruntime.__version__
    except ImportError:
        version = "not installed, left out"
    print(f"ONNX Runtime: {version}")
    rows = []
    with torch.no_grad():
        for threads in asked.threads:
            for cell in asked.cells:
                for steps, batch in shapes:
                    for hidden in sizes:
                        row = one_case(cell, steps, batch, hidden, threads, asked.rounds)
                        rows.append(row)
                        told = "  ".join(f"{name} {1e3 * t:.3f}" for name, t in row["median"].items())
                        wrong = "  ".join(f"{n} {e:.2%}" for n, e in row["errors"].items() if e > 1e-4)
                        print(
                            f"{cell} {steps}x{batch}x{hidden} threads {threads}: ms {told}; errors {wrong}", flush=True
                        )
    report = {"torch": torch.__version__, "onnxruntime": version, "rows": rows, "summary": summary(rows)}
    with open(asked.out, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    if asked.plot:
        plot(report, asked.plot)
    for name, each in report["summary"].items():
        print(f"{name}: geometric mean {each['geometric mean']:.2f}, least {each['least']:.2f}, {each['cases']} cases")


if __name__ == "__main__":
    main()
