"""The classifier of `sequence_classifier` in NumPy alone, with exact backpropagation through time.

Forward, for one sequence x_1 .. x_T with label y:

    h_t = tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)     h_0 = 0
    p   = sigmoid(W_out h_T + b_out)
    L   = -(y log p + (1 - y) log(1 - p))

Backward: the sigmoid and the logarithm cancel to dL/dlogit = p - y, and a_t, the argument of tanh, receives

    da_t     = (1 - h_t^2) dh_t
    dh_{t-1} = W_hh^T da_t

so that the gradients of the shared weights are sums over *all* steps, not the last one's share alone.
Run it to check those gradients against rnnfast's, and to train by plain gradient descent.
"""

import numpy as np
import torch

from examples import options
from examples.sequence_classifier import HIDDEN, SequenceClassifier, make_data
from rnnfast import RNN

Arrays = dict[str, np.ndarray]


def forward(p: Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities, [B, 1], and every state from h_0 to h_T, [T + 1, B, H], for x of [B, T, I]."""
    batch, steps, _ = x.shape
    states = np.zeros((steps + 1, batch, HIDDEN))
    for t in range(steps):
        a = x[:, t] @ p["w_ih"].T + p["b_ih"] + states[t] @ p["w_hh"].T + p["b_hh"]  # [B, H]
        states[t + 1] = np.tanh(a)
    logits = states[-1] @ p["w_out"].T + p["b_out"]
    return 1 / (1 + np.exp(-logits)), states


def loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Binary cross-entropy, averaged over the batch."""
    return float(-np.mean(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities)))


def backward(p: Arrays, x: np.ndarray, labels: np.ndarray) -> Arrays:
    """Return the gradient of the loss by every parameter, through all time steps."""
    probabilities, states = forward(p, x)
    dlogits = (probabilities - labels) / len(labels)  # [B, 1]
    gradients = {name: np.zeros_like(value) for name, value in p.items()}
    gradients["w_out"] = dlogits.T @ states[-1]
    gradients["b_out"] = dlogits.sum(axis=0)
    dh = dlogits @ p["w_out"]  # [B, H]
    for t in reversed(range(x.shape[1])):
        da = (1 - states[t + 1] ** 2) * dh
        gradients["w_ih"] += da.T @ x[:, t]
        gradients["w_hh"] += da.T @ states[t]
        gradients["b_ih"] += da.sum(axis=0)
        gradients["b_hh"] += da.sum(axis=0)
        dh = da @ p["w_hh"]
    return gradients


# Where each parameter here is found in the module.
NAMES = {
    "w_ih": "recurrent.weight_ih_l0",
    "w_hh": "recurrent.weight_hh_l0",
    "b_ih": "recurrent.bias_ih_l0",
    "b_hh": "recurrent.bias_hh_l0",
    "w_out": "linear.weight",
    "b_out": "linear.bias",
}


def compare_with_rnnfast(seed: int = 0) -> dict[str, float]:
    """Return the relative L2 distance between the two gradients of every parameter, in float64."""
    torch.manual_seed(seed)
    model = SequenceClassifier(RNN).double()
    sequences, labels = (tensor.double() for tensor in make_data(32))
    torch.nn.functional.binary_cross_entropy(model(sequences), labels).backward()

    modules = dict(model.named_parameters())
    p = {name: modules[path].detach().numpy() for name, path in NAMES.items()}
    ours = backward(p, sequences.numpy(), labels.numpy())
    theirs = {name: modules[path].grad.numpy() for name, path in NAMES.items()}
    return {name: float(np.linalg.norm(ours[name] - theirs[name]) / np.linalg.norm(ours[name])) for name in NAMES}


def train(iterations: int = 200, rate: float = 0.1, seed: int = 0) -> list[float]:
    """Train by gradient descent on one batch of 200 sequences; return the loss of every iteration."""
    torch.manual_seed(seed)
    x, labels = (tensor.double().numpy() for tensor in make_data(200))
    model = dict(SequenceClassifier(RNN).double().named_parameters())
    p = {name: model[path].detach().numpy().copy() for name, path in NAMES.items()}
    losses = []
    for _ in range(iterations):
        losses.append(loss(forward(p, x)[0], labels))
        for name, gradient in backward(p, x, labels).items():
            p[name] -= rate * gradient
    return losses


if __name__ == "__main__":
    asked = options("examples.numpy_bptt", __doc__, iterations=(200, "iterations of gradient descent"))
    for name, distance in compare_with_rnnfast().items():
        print(f"gradient of {name:5s}  relative distance to rnnfast's {distance:.1e}")
    losses = train(asked.iterations)
    print(f"loss before training {losses[0]:.4f}, after {len(losses)} iterations {losses[-1]:.4f}")
