"""What goes into a recurrent layer and what comes out: shapes, and the equation that connects them.

At each step the same weights combine the input with the state of the step before:

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

The layer returns h_t for every step, and h_T once more by itself. A model that labels every step uses the first, one
that labels the whole sequence only needs the second.
"""

import torch

from examples import options
from rnnfast import RNN

BATCH, STEPS, INPUT, HIDDEN = 4, 10, 8, 16


def main() -> dict[str, torch.Tensor]:
    layer = RNN(INPUT, HIDDEN, batch_first=True)
    sequence = torch.randn(BATCH, STEPS, INPUT)
    output, final = layer(sequence)

    h = torch.zeros(BATCH, HIDDEN)
    for t in range(STEPS):
        from_input = sequence[:, t] @ layer.weight_ih_l0.T + layer.bias_ih_l0
        from_state = h @ layer.weight_hh_l0.T + layer.bias_hh_l0
        h = torch.tanh(from_input + from_state)
        torch.testing.assert_close(output[:, t], h)
    torch.testing.assert_close(final[0], h)
    return {"sequence": sequence, "output": output, "final state": final}


if __name__ == "__main__":
    options("examples.shapes", __doc__)
    for name, tensor in main().items():
        print(f"{name:12s} {list(tensor.shape)}")
