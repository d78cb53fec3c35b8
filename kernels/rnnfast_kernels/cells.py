"""The cells of torch, forward only, and the table of cells. What else there is to a cell is derived (`equations.cell`).

A step is called with x and u, the input part `W_ih x + b_ih` and the recurrent part `W_hh h + b_hh` of each gate in
torch's order, and the states, the output h first; it returns the new states.
"""

from rnnfast_kernels.equations.cell import Cell


def rnn_tanh(x, u):
    """Elman (1990): h' = tanh(x + u)."""
    return (x[0] + u[0]).tanh()


def rnn_relu(x, u):
    """Elman's network with a rectifier, Le, Jaitly and Hinton (2015): h' = max(x + u, 0)."""
    return (x[0] + u[0]).relu()


def lstm(x, u, state):
    """Hochreiter and Schmidhuber (1997) with the forget gate of Gers et al. (2000)."""
    i = (x.i + u.i).sigmoid()
    f = (x.f + u.f).sigmoid()
    g = (x.g + u.g).tanh()
    o = (x.o + u.o).sigmoid()
    c = f * state[1] + i * g
    return o * c.tanh(), c


def gru(x, u, state):
    """Cho et al. (2014), the reset gate after the product as in cuDNN and torch."""
    r = (x.r + u.r).sigmoid()
    z = (x.z + u.z).sigmoid()
    n = (x.n + r * u.n).tanh()
    return n + z * (state[0] - n)


# Cells by name: those of torch, and declared ones by their identity (`rnnfast.declare`).
CELLS = {
    cell.name: cell
    for cell in (
        Cell("rnn_tanh", rnn_tanh, "h", "h"),
        Cell("rnn_relu", rnn_relu, "h", "h"),
        Cell("lstm", lstm, "ifgo", "hc"),
        Cell("gru", gru, "rzn", "h"),
    )
}
TORCH_CELLS = tuple(CELLS)
