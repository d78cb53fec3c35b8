"""What only a device can show: programs that really run at once, captured graphs, other streams, very long input."""

import pytest
import torch
from closeness import assert_close
from layers import as_tuple

import rnnfast

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from rnnfast_kernels.gpu import plan

from rnnfast.backends import gpu_launch, gpu_products

CELLS = {"rnn": rnnfast.RNN, "lstm": rnnfast.LSTM, "gru": rnnfast.GRU}
cells = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture(autouse=True)
def triton():
    with rnnfast.use_backend("triton"), torch.device("cuda"):
        yield


def loop_of(layer, rows: int, backward: bool = False) -> plan.Plan:
    """The plan of a layer's first pass."""
    weight = layer.weight_hh_l0
    cell = {"RNN_TANH": "rnn_tanh"}.get(layer.mode, layer.mode.lower())
    dtype = str(weight.dtype).removeprefix("torch.")
    device = gpu_launch.device_properties(weight.device)
    return plan.choose(plan.Problem(cell, layer.hidden_size, rows, 1, dtype, "ieee", backward, device))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_barriers_hold_for_thousands_of_launches_beside_another_stream(backward):
    """Every launch gives the same bits, at the largest grid that is on the device at once."""
    layer = rnnfast.LSTM(8, 1024, dtype=torch.bfloat16)
    x = torch.randn(6, 16, 8, dtype=torch.bfloat16, requires_grad=backward)
    chosen = loop_of(layer, 16, backward)
    assert chosen.loop == "cooperative"
    assert chosen.programs > 0.9 * torch.cuda.get_device_properties(0).multi_processor_count
    other, busy = torch.cuda.Stream(), torch.randn(2048, 2048)
    with torch.set_grad_enabled(backward):
        output = layer(x)[0]
        coming = torch.randn_like(output)

        def launch():
            return torch.autograd.grad(output, x, coming, retain_graph=True)[0] if backward else layer(x)[0]

        expected = launch()
        wrong = torch.zeros((), dtype=torch.int64)
        for n in range(2000):
            if n % 20 == 0:
                with torch.cuda.stream(other):
                    busy @ busy
            wrong += (launch() != expected).any()
    assert wrong.item() == 0


@cells
def test_a_captured_graph_reads_new_input(cell):
    layer = CELLS[cell](16, 256, 2, dtype=torch.bfloat16)
    x = torch.randn(20, 8, 16, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = layer(x)[0]
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, layer(x)[0])


# Inductor imports what torch has deprecated.
@cells
def test_reduced_overhead_captures_the_layer_and_trains(cell):
    layer = CELLS[cell](16, 256, 2)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # the third call is the first to replay
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(20, 8, 16)
        results = []
        for each in (layer, compiled):
            layer.zero_grad(set_to_none=True)
            output = each(x)[0]
            output.square().sum().backward()
            results.append((output.detach().clone(), [p.grad.clone() for p in layer.parameters()]))
        torch.testing.assert_close(results[1], results[0])
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@cells
def test_a_layer_runs_on_the_current_stream(cell):
    layer, x = CELLS[cell](16, 256), torch.randn(50, 8, 16)
    expected = layer(x)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = layer(x * 1.0)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, expected)


@cells
def test_more_steps_than_a_grid_has_rows(cell):
    """T beyond 65,535, where cuDNN gives up, forward and backward, against two calls that share the state."""
    layer = CELLS[cell](2, 32)
    x = torch.randn(70_000, 2, 2, requires_grad=True)
    output, final = layer(x)
    first, state = layer(x[:40_000])
    second, last = layer(x[40_000:], state)
    assert_close("output", torch.cat((first, second)), output, 1e-5)
    for a, b in zip(as_tuple(last), as_tuple(final), strict=True):
        assert_close("final", a, b, 1e-5)
    expected = torch.autograd.grad(torch.cat((first, second)).square().sum(), x)[0]
    assert_close("gradient", expected, torch.autograd.grad(output.square().sum(), x)[0], 1e-4)


def test_more_elements_than_32_bits_address():
    """The gates of all steps are more than 2**31 elements; the last steps are those of a call of their own."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("needs 40 GB")
    layer = rnnfast.LSTM(1, 128, dtype=torch.bfloat16)
    x = torch.randn(70_000, 64, 1, dtype=torch.bfloat16)
    assert x.shape[0] * x.shape[1] * 4 * 128 > 2**31
    with torch.no_grad():
        output, _ = layer(x)
        tail = layer(x[-500:])[0]  # what came 300 steps before is forgotten
    assert_close("last steps", tail[300:], output[-200:], 2e-2)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_two_grids_as_large_as_the_device_on_two_streams(backward):
    """Each waits for programs of its own only, beside a third stream that is busy: the same bits as alone."""
    layers = [rnnfast.LSTM(8, 1024, dtype=torch.bfloat16) for _ in range(2)]
    x = torch.randn(32, 16, 8, dtype=torch.bfloat16, requires_grad=backward)
    assert loop_of(layers[0], 16, backward).loop == "cooperative"
    busy, streams = torch.randn(2048, 2048), [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    with torch.set_grad_enabled(backward):
        outputs = []  # each on the stream on which backward then runs
        for layer, stream in zip(layers, streams, strict=False):
            with torch.cuda.stream(stream):
                outputs.append(layer(x)[0])
        torch.cuda.synchronize()
        coming = torch.randn_like(outputs[0])

        def launch(n):
            if not backward:
                return layers[n](x)[0]
            return torch.autograd.grad(outputs[n], x, coming, retain_graph=True)[0]

        expected, wrong = [launch(n) for n in range(2)], torch.zeros(2, dtype=torch.int64)
        torch.cuda.synchronize()
        for _ in range(200):
            for n in range(2):
                with torch.cuda.stream(streams[n]):
                    wrong[n] += (launch(n) != expected[n]).any()
            with torch.cuda.stream(streams[2]):
                busy @ busy
        torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]


def captured(run):
    """A graph of one run, and what it returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@cells
@pytest.mark.parametrize("H", [64, 1024], ids=["alone", "as large as the device"])
def test_a_captured_backward_reads_new_gradients(cell, H):
    layer = CELLS[cell](16, H, dtype=torch.bfloat16)
    x, coming = torch.randn(12, 8, 16, dtype=torch.bfloat16, requires_grad=True), torch.randn(12, 8, H).bfloat16()

    def run():
        return torch.autograd.grad(layer(x)[0], (x, *layer.parameters()), coming)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph, results = captured(run)
    for _ in range(3):
        coming.copy_(torch.randn_like(coming))
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip(results, run(), strict=True):
            assert_close("gradient", expected, got)


@cells
@pytest.mark.parametrize("loop", ["of the plan", "streamed"])
def test_a_kernel_that_is_first_met_inside_a_capture(cell, loop):
    """Nothing of this width has run, so that it is compiled and loaded while the stream is captured."""
    H = {"rnn": 200, "lstm": 216, "gru": 232}[cell] + 8 * (loop == "streamed")
    layer, x = CELLS[cell](16, H, dtype=torch.bfloat16), torch.randn(6, 3, 16).bfloat16()
    CELLS[cell](16, 32, dtype=torch.bfloat16)(x)  # the libraries' own preparations
    torch.cuda.synchronize()
    with torch.no_grad(), plan.override(plan.streamed if loop == "streamed" else plan.best):
        graph, output = captured(lambda: layer(x)[0])
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        assert_close("output", layer(x)[0], output)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_products_of_a_step_come_out_in_float32(dtype):
    a, b = torch.randn(2, 16, 300).to(dtype), torch.randn(2, 40, 300).to(dtype).transpose(1, 2)
    operand = gpu_launch.operand_dtype(a)
    assert operand == (dtype if "dtype_out" in torch.ops.aten.bmm.overloads() else torch.float32)
    result = torch.full((2, 16, 40), float("nan"))
    gpu_launch.multiply(a.to(operand), b.to(operand), result)
    assert_close("product", a.double() @ b.double(), result, 1e-5)


@pytest.mark.parametrize("others", [False, True], ids=["others ieee", "others tf32"])
@pytest.mark.parametrize("own", [False, True], ids=["own ieee", "own tf32"])
def test_products_have_the_precision_of_recurrent_layers(own, others):
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = own, others
    try:
        a, b = torch.randn(256, 512), torch.randn(384, 512).t()
        for left, right in ((a, b), (a.t().contiguous().t(), b), (a.view(2, 128, 512), b.expand(2, 512, 384))):
            error = (gpu_products.multiply(left, right).double() / (left.double() @ right.double()) - 1).abs().median()
            assert 1e-5 < error < 1e-2 if own else error < 1e-5
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_a_tile_of_64_rows():
    """On Hopper its products read shared memory behind a fence of their own (wgmma): the same as in smaller tiles."""
    layer = rnnfast.LSTM(8, 1024, dtype=torch.bfloat16)
    x, coming = torch.randn(4, 128, 8).bfloat16().requires_grad_(), torch.randn(4, 128, 1024).bfloat16()
    if torch.cuda.get_device_capability() == (9, 0):
        assert (loop_of(layer, 128, True).block_b, loop_of(layer, 128, True).split) == (64, 1)

    def gradients(rows):
        output = layer(x[:, rows])[0]
        return torch.autograd.grad(output, (x, *layer.parameters()), coming[:, rows])

    parts = [gradients(slice(first, first + 32)) for first in range(0, 128, 32)]
    for whole, *each in zip(gradients(slice(128)), *parts, strict=True):
        assert_close("gradient", sum(part.double() for part in each), whole)


@cells
def test_weights_that_are_views_of_something_larger(cell):
    layer, x = CELLS[cell](16, 256, dtype=torch.bfloat16), torch.randn(20, 4, 16).bfloat16()
    expected = layer(x)[0]
    room = torch.zeros(layer.weight_hh_l0.numel() + 1, dtype=torch.bfloat16)
    room[1:] = layer.weight_hh_l0.detach().flatten()
    layer.weight_hh_l0 = torch.nn.Parameter(room[1:].view(layer.weight_hh_l0.shape))
    assert layer.weight_hh_l0.data_ptr() % 16 == 2
    assert torch.equal(layer(x)[0], expected)


def test_a_grid_beside_one_on_a_stream_of_higher_priority():
    """Last, as it may wait forever: neither may keep processors that the other one needs to be on the device at all."""
    layer, x = rnnfast.LSTM(8, 1024, dtype=torch.bfloat16), torch.randn(64, 16, 8, dtype=torch.bfloat16)
    assert loop_of(layer, 16).loop == "cooperative"
    streams = [torch.cuda.Stream(priority=priority) for priority in (0, -1)]
    with torch.no_grad():
        expected, wrong = layer(x)[0], torch.zeros(2, dtype=torch.int64)
        torch.cuda.synchronize()
        for _ in range(200):
            for n, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    wrong[n] += (layer(x)[0] != expected).any()
        torch.cuda.synchronize()
    assert wrong.tolist() == [0, 0]
