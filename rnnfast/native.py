"""The "torch" backend: a whole stack of layers on torch's own operators."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rnnfast import _torch
from rnnfast.call import Call
from rnnfast.spec import Options


def run(call: Call) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a call on torch and return the output and the final states."""
    if call.batch_sizes is not None and call.x.dim() == 3:
        return run_padded(call, call.batch_sizes)
    options = call.options
    function = getattr(_torch.operators, options.cell)
    hx = call.hx if options.cell == "lstm" else call.hx[0]
    constants = (options.bias, options.num_layers, options.dropout, options.training, options.bidirectional)
    if call.batch_sizes is None:
        output, *finals = function(call.x, hx, list(call.weights), *constants, False)
    else:
        output, *finals = function(call.x, call.batch_sizes.cpu(), hx, list(call.weights), *constants)
    return output, tuple(finals)


def record_call(options: Options, batch: int, width: int) -> Callable:
    """Return what runs calls of one layer in one direction: a function of the input, initial states and weights."""
    function = getattr(_torch.operators, options.cell)
    zero, count = (1, batch, width), 2 if options.cell == "lstm" else 1
    constants = (options.bias, 1, 0.0, options.training, False, options.batch_first)

    def call(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]):
        hx = states or (x.new_zeros(zero),) * count
        output, *finals = function(x, hx if count == 2 else hx[0], weights, *constants)
        return output, tuple(finals) if count == 2 else finals[0]

    return call


def run_padded(call: Call, batch_sizes: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run the padded layout by packing its live rows. Rows of length zero, which torch refuses, are kept out."""
    steps, batch = call.x.shape[:2]
    live = torch.arange(batch, device=call.x.device) < batch_sizes[:, None]  # [T, B]
    running = int(batch_sizes[0]) if steps else 0
    output = call.x.new_zeros(steps, batch, call.options.directions * call.options.width(call.weights))
    if running:
        sizes = batch_sizes[batch_sizes > 0]
        hx = tuple(s[:, :running] for s in call.hx)
        data, found = run(call._replace(x=call.x[live], hx=hx, batch_sizes=sizes))
        output = output.to(data.dtype).masked_scatter(live[..., None], data)
        finals = tuple(torch.cat((f, s[:, running:]), 1) for f, s in zip(found, call.hx, strict=True))
    else:
        finals = tuple(s.clone() for s in call.hx)
    return output, finals
