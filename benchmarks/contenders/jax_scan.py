"""JAX on the CPU: `jax.lax.scan` over the steps, compiled with `jit`, gradients by `jax.vjp`.

Best setting: the input projection of all steps is one product outside the scan, as here; forward and backward are one
compiled function; the scan is unrolled eightfold, which amortises the loop's overhead without long compilation. XLA
takes as many threads as the process has cores.
"""

from typing import Any

import jax
import numpy as np
import torch
from jax import numpy as jnp

from benchmarks.cases import GATES, Case
from benchmarks.contenders import Call
from benchmarks.workload import Workload

UNROLL = 8
jax.config.update("jax_enable_x64", True)


def unsupported(case: Case) -> str | None:
    if case.mode == "penalty":
        return "the suite does not ask it for second derivatives"
    if case.cell not in STEPS or case.weights:
        return "the suite asks it for torch's cells alone"
    if case.form not in ("dense", "permuted") or case.proj:
        return "the suite asks it for dense layers without a projection"
    if case.dtype == "float16":
        return "XLA computes float16 on a CPU through conversions"
    return None


def rnn_step(gates, u, state):
    (h,) = state
    h = jnp.tanh(gates + u(h))
    return (h,)


def lstm_step(gates, u, state):
    h, c = state
    i, f, g, o = jnp.split(gates + u(h), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def gru_step(gates, u, state):
    (h,) = state
    x_r, x_z, x_n = jnp.split(gates, 3, axis=-1)
    u_r, u_z, u_n = jnp.split(u(h), 3, axis=-1)
    z = jax.nn.sigmoid(x_z + u_z)
    n = jnp.tanh(x_n + jax.nn.sigmoid(x_r + u_r) * u_n)
    return (n + z * (h - n),)


STEPS = {"rnn": rnn_step, "lstm": lstm_step, "gru": gru_step}


def layer(cell: str, weights: dict[str, Any], suffix: str, x, state, reverse: bool):
    """One direction of one layer: the outputs [T, B, H] and the final states."""
    zero = jnp.zeros(GATES[cell] * state[0].shape[-1], x.dtype)
    gates = x @ weights[f"weight_ih_{suffix}"].T + weights.get(f"bias_ih_{suffix}", zero)  # [T, B, G*H]
    w_hh, b_hh = weights[f"weight_hh_{suffix}"].T, weights.get(f"bias_hh_{suffix}", zero)

    def step(state, gates_t):
        state = STEPS[cell](gates_t, lambda h: h @ w_hh + b_hh, state)
        return state, state[0]

    final, output = jax.lax.scan(step, state, gates, reverse=reverse, unroll=UNROLL)
    return output, final


def forward(case: Case, weights: dict[str, Any], x, hx):
    finals = []
    for number in range(case.layers):
        outputs = []
        for direction in range(case.directions):
            state = tuple(value[number * case.directions + direction] for value in hx)
            suffix = f"l{number}" + ("_reverse" if direction else "")
            output, final = layer(case.cell, weights, suffix, x, state, reverse=bool(direction))
            outputs.append(output)
            finals.append(final)
        x = jnp.concatenate(outputs, axis=-1) if case.bidirectional else outputs[0]
    return x, tuple(jnp.stack(states) for states in zip(*finals, strict=True))


def prepare(work: Workload) -> Call:
    case = work.case
    dtype = jnp.dtype(case.dtype)
    cpu = jax.devices("cpu")[0]

    def array(tensor: torch.Tensor):
        return jax.device_put(jnp.asarray(tensor.numpy(), dtype=dtype), cpu)

    weights = {name: array(tensor) for name, tensor in work.weights.items()}
    x, dy = array(work.x), array(work.dy)
    hx = tuple(array(state if case.mode == "step" else torch.zeros_like(state)) for state in work.hx)

    @jax.jit
    def infer(weights, x, hx):
        return *forward(case, weights, x, hx), {}

    @jax.jit
    def train(weights, x, hx):
        output, pull, finals = jax.vjp(lambda weights, x: forward(case, weights, x, hx), weights, x, has_aux=True)
        dweights, dx = pull(dy)
        return output, finals, {"x": dx, **dweights}

    timed = train if case.mode == "training" else infer

    def read(result) -> dict[str, torch.Tensor]:
        output, finals, gradients = result
        arrays = {"output": output, **dict(zip("hc", finals, strict=False))}
        arrays |= {f"grad {name}": value for name, value in gradients.items()}
        return {name: torch.from_numpy(np.asarray(value, dtype=np.float64).copy()) for name, value in arrays.items()}

    return Call(lambda: jax.block_until_ready(timed(weights, x, hx)), read)
