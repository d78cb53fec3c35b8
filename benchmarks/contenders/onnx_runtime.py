"""ONNX Runtime, forward: its RNN, LSTM and GRU operators, one node per layer.

Best setting: all graph optimisations, as many intra-op threads as torch has, sequential execution, and inputs and
outputs bound once to fixed buffers, so that a run neither copies nor allocates. Its threads may spin during a run, as
is its default, and stop when the run ends, or they would spin into the next contender's time.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.cases import GATES, Case
from benchmarks.contenders import Call
from benchmarks.workload import Workload

OPSET, IR_VERSION = 17, 9
# The operators' gate order in terms of torch's: ONNX has i o f g and z r n, torch i f g o and r z n.
GATE_ORDER = {"rnn": (0,), "lstm": (0, 3, 1, 2), "gru": (1, 0, 2)}


def unsupported(case: Case) -> str | None:
    if case.mode in ("training", "penalty"):
        return "inference only"
    if case.form not in ("dense", "permuted"):
        return f"the suite does not ask it for {case.form}"
    if case.cell not in GATE_ORDER or case.weights == "bfloat16":
        return f"has no {case.cell}" if case.cell not in GATE_ORDER else "has no bfloat16 weights"
    if case.weights == "int8" and case.cell != "lstm":
        return "quantises the weights of an LSTM alone"
    if case.proj or case.dtype != "float32":
        return "its operators take float32 without a projection"
    return None


def prepare(work: Workload) -> Call:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    graph = model(work)
    if work.case.weights == "int8":
        graph = quantised(graph)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, tensor in feeds(work).items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy().astype(np.float32)))
    outputs = [output.name for output in session.get_outputs()]
    targets = [
        onnxruntime.OrtValue.ortvalue_from_shape_and_type(output.shape, np.float32) for output in session.get_outputs()
    ]
    for name, target in zip(outputs, targets, strict=True):
        binding.bind_ortvalue_output(name, target)

    def run() -> None:
        session.run_with_iobinding(binding)

    def read(_: None) -> dict[str, torch.Tensor]:
        found = {name: torch.from_numpy(target.numpy()).double() for name, target in zip(outputs, targets, strict=True)}
        stacked = {}
        for state in ("h", "c")[: len(work.hx)]:
            layers = [value for name, value in found.items() if name.startswith(f"{state}_")]
            stacked[state] = torch.cat(layers)  # [layers*D, B, H]
        return {"output": found["output"], **stacked}

    return Call(run, read)


def quantised(graph):
    """The graph with int8 weights, by ONNX Runtime's own tool, which writes files."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        logging.disable()  # it advises a step that no single layer needs
        quantize_dynamic(graph, path, op_types_to_quantize=["LSTM"], weight_type=QuantType.QInt8)
        logging.disable(logging.NOTSET)
        return onnx.load(path)


def feeds(work: Workload) -> dict[str, torch.Tensor]:
    """The model's inputs by name: x, and in mode `step` each layer's initial states."""
    given = {"x": work.x}
    if work.case.mode == "step":
        for state, value in zip("hc", work.hx, strict=False):
            for layer, part in enumerate(value.split(work.case.directions)):
                given[f"{state}0_{layer}"] = part
    return given


def model(work: Workload):
    """The layers as an ONNX graph; between two layers the directions, a dimension of their own, join the width."""
    case = work.case
    nodes, constants = [], [numpy_helper.from_array(np.array([0, 0, -1], np.int64), "flat")]
    width = case.directions * case.H
    results = [value_info("output", (case.T, case.B, width))]
    states = ("h", "c")[: len(work.hx)]
    below = "x"
    for layer in range(case.layers):
        tensors = layer_constants(work, layer)
        constants += tensors
        starts = [f"{state}0_{layer}" if case.mode == "step" else "" for state in states]
        nodes.append(
            helper.make_node(
                case.cell.upper(),
                [below, *(tensor.name for tensor in tensors), *([""] * (4 - len(tensors))), *starts],
                [f"y_{layer}", *(f"{state}_{layer}" for state in states)],
                hidden_size=case.H,
                direction="bidirectional" if case.bidirectional else "forward",
                **({"linear_before_reset": 1} if case.cell == "gru" else {}),
            )
        )
        above = "output" if layer == case.layers - 1 else f"x_{layer + 1}"
        nodes.append(helper.make_node("Transpose", [f"y_{layer}"], [f"rows_{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"rows_{layer}", "flat"], [above]))
        results += [value_info(f"{state}_{layer}", (case.directions, case.B, case.H)) for state in states]
        below = above
    inputs = [value_info(name, tuple(tensor.shape)) for name, tensor in feeds(work).items()]
    graph = helper.make_graph(nodes, "layers", inputs, results, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def value_info(name: str, shape: tuple[int, ...]):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def layer_constants(work: Workload, layer: int) -> list:
    """W [D, G*H, I], R [D, G*H, H] and, with biases, B [D, 2*G*H] of one layer, in ONNX's gate order."""
    case = work.case
    suffixes = [f"l{layer}", f"l{layer}_reverse"][: case.directions]

    def reorder(name: str) -> torch.Tensor:
        gates = work.weights[name].chunk(GATES[case.cell])
        return torch.cat([gates[gate] for gate in GATE_ORDER[case.cell]])

    parts = {
        "W": torch.stack([reorder(f"weight_ih_{suffix}") for suffix in suffixes]),
        "R": torch.stack([reorder(f"weight_hh_{suffix}") for suffix in suffixes]),
    }
    if case.bias:
        parts["B"] = torch.stack(
            [torch.cat([reorder(f"bias_ih_{suffix}"), reorder(f"bias_hh_{suffix}")]) for suffix in suffixes]
        )
    return [numpy_helper.from_array(part.numpy().astype(np.float32), f"{name}_{layer}") for name, part in parts.items()]
