"""The cells of torch, forward only, and the table of cells. What else there is to a cell is derived (`equations.cell`).

A step is called with x and u, the input part `W_ih x + b_ih` and the recurrent part `W_hh h + b_hh` of each gate in
torch's order, and the states, the output h first; it returns the new states.
"""

from collections.abc import Callable, Iterable

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


class Table(dict[str, Cell]):
    """Cells by name. Iteration goes over those of torch alone; declared ones are found by their identity."""

    def __init__(self, cells: Iterable[Cell]):
        super().__init__((cell.name, cell) for cell in cells)
        self.declared: dict[str, Cell] = {}
        # Called with the identity of a cell that is not declared yet: declares it, or raises.
        self.find: Callable[[str], object] | None = None

    def __missing__(self, name: str) -> Cell:
        if name not in self.declared and self.find is not None:
            self.find(name)
        return self.declared[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.declared


CELLS = Table(
    (
        Cell("rnn_tanh", rnn_tanh, "h", "h"),
        Cell("rnn_relu", rnn_relu, "h", "h"),
        Cell("lstm", lstm, "ifgo", "hc"),
        Cell("gru", gru, "rzn", "h"),
    )
)
