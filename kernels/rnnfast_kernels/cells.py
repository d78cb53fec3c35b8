"""Every cell's equations, forward and backward, and the table of cells.

A cell is pointwise mathematics over names that `bind` supplies: `sigmoid`, `tanh`, `relu`, their backwards and
`zeros_like`. Nothing here knows a compiler, a tile or a thread; the same functions become Triton tiles, Numba vectors
and torch tensors. They contain no literals: a bare `1.0` would make float32 code compute in float64 under Numba.

    forward(x, u, state)                        -> new_state, saved
    backward(dstate, saved, state, new_state)   -> dx, du, dstate_direct

x, u            one entry per gate, in torch's order: input part `W_ih x + b_ih`, recurrent part `W_hh h + b_hh`
state           one entry per state tensor, the output `h` first
saved           what backward needs beside the states
dstate          gradient of the loss by each entry of new_state
dx, du          gradient by each entry of x and u
dstate_direct   gradient by each entry of state, except the part that flows through u

The names `f_backward(dy, y)` take the gradient of a function's result and the result itself, as torch's do.
"""

from collections.abc import Callable
from dataclasses import dataclass


def rnn_tanh_forward(x, u, state):
    """Elman (1990): h' = tanh(x + u)."""
    return (tanh(x[0] + u[0]),), ()


def rnn_tanh_backward(dstate, saved, state, new_state):
    dx = (tanh_backward(dstate[0], new_state[0]),)
    return dx, dx, (zeros_like(dstate[0]),)


def rnn_relu_forward(x, u, state):
    """Elman's network with a rectifier, Le, Jaitly and Hinton (2015): h' = max(x + u, 0)."""
    return (relu(x[0] + u[0]),), ()


def rnn_relu_backward(dstate, saved, state, new_state):
    dx = (relu_backward(dstate[0], new_state[0]),)
    return dx, dx, (zeros_like(dstate[0]),)


def lstm_forward(x, u, state):
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000); gates i, f, g, o."""
    i = sigmoid(x[0] + u[0])
    f = sigmoid(x[1] + u[1])
    g = tanh(x[2] + u[2])
    o = sigmoid(x[3] + u[3])
    c = f * state[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


def lstm_backward(dstate, saved, state, new_state):
    i, f, g, o = saved
    tanh_c = tanh(new_state[1])
    dc = dstate[1] + tanh_backward(dstate[0] * o, tanh_c)
    dx = (
        sigmoid_backward(dc * g, i),
        sigmoid_backward(dc * state[1], f),
        tanh_backward(dc * i, g),
        sigmoid_backward(dstate[0] * tanh_c, o),
    )
    return dx, dx, (zeros_like(dstate[0]), dc * f)


def gru_forward(x, u, state):
    """Cho et al. (2014), the reset gate after the product as in cuDNN and torch; gates r, z, n."""
    r = sigmoid(x[0] + u[0])
    z = sigmoid(x[1] + u[1])
    n = tanh(x[2] + r * u[2])
    return (n + z * (state[0] - n),), (r, z, n, u[2])


def gru_backward(dstate, saved, state, new_state):
    r, z, n, u_n = saved
    dh = dstate[0]
    dx_n = tanh_backward(dh - dh * z, n)
    dx_r = sigmoid_backward(dx_n * u_n, r)
    dx_z = sigmoid_backward(dh * (state[0] - n), z)
    return (dx_r, dx_z, dx_n), (dx_r, dx_z, dx_n * r), (dh * z,)


@dataclass(frozen=True)
class Cell:
    """One row of the table: a cell's equations and the counts that loops and buffers need.

    gates: entries of `x` and `u`. saved: entries of `saved`. states: names of the state tensors, the output first.
    one_gradient: `du` equals `dx`, so that loops need to write only one of them.
    """

    name: str
    forward: Callable
    backward: Callable
    gates: int
    saved: int
    states: tuple[str, ...]
    one_gradient: bool

    @property
    def kept(self) -> int:
        """Entries of a buffer that holds the input part of the gates and then what is saved; 0 if nothing is."""
        return max(self.gates, self.saved) if self.saved else 0


CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", rnn_tanh_forward, rnn_tanh_backward, 1, 0, ("h",), True),
        Cell("rnn_relu", rnn_relu_forward, rnn_relu_backward, 1, 0, ("h",), True),
        Cell("lstm", lstm_forward, lstm_backward, 4, 4, ("h", "c"), True),
        Cell("gru", gru_forward, gru_backward, 3, 4, ("h",), False),
    )
}
