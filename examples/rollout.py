"""Recurrent policies: episodes that end inside a rollout, evaluated in one call with `resets`.

A recurrent policy acts step by step in several environments at once. When an episode ends, the state starts anew. To
learn from the rollout, the policy must be run over it again under gradients: the usual way is a Python loop of single
steps that masks the state between them. `resets` does the same in one call, and in one kernel.

    python -m examples.rollout
"""

import time

import torch
from torch import Tensor, nn

import rnnfast
from examples import options

STEPS, ENVIRONMENTS, OBSERVATION, HIDDEN, ACTIONS = 128, 8, 16, 128, 4


class Policy(nn.Module):
    """An LSTM over observations, then the log-probabilities of the actions."""

    def __init__(self):
        super().__init__()
        self.memory = rnnfast.LSTM(OBSERVATION, HIDDEN)
        self.head = nn.Linear(HIDDEN, ACTIONS)

    def forward(self, observations: Tensor, state, episode_starts: Tensor):
        """Return log-probabilities [T, B, actions] and the state after the last step.

        observations: [T, B, features]. episode_starts: bool [T, B], true at the first step of an episode.
        """
        features, state = self.memory(observations, state, resets=episode_starts)
        return self.head(features).log_softmax(-1), state


def step_by_step(policy: Policy, observations: Tensor, state, episode_starts: Tensor) -> Tensor:
    """Do what `policy(...)` does by masking the state before every step, as it is done without `resets`."""
    outputs = []
    for observation, starts in zip(observations, episode_starts, strict=True):
        keep = ~starts[None, :, None]
        state = tuple(s * keep for s in state)
        features, state = policy.memory(observation[None], state)
        outputs.append(policy.head(features).log_softmax(-1))
    return torch.cat(outputs)


def make_rollout() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Return observations, episode starts and the state that the rollout began with."""
    torch.manual_seed(0)
    observations = torch.randn(STEPS, ENVIRONMENTS, OBSERVATION)
    episode_starts = torch.rand(STEPS, ENVIRONMENTS) < 0.03
    state = (torch.randn(1, ENVIRONMENTS, HIDDEN), torch.randn(1, ENVIRONMENTS, HIDDEN))
    return observations, episode_starts, state


def gradients(policy: Policy, log_probabilities: Tensor) -> list[Tensor]:
    """Return the gradients of the likelihood of always taking the first action."""
    return list(torch.autograd.grad(log_probabilities[..., 0].sum(), list(policy.parameters())))


def compare() -> dict[str, float]:
    """Evaluate one rollout both ways; return the largest differences and the seconds that each took."""
    observations, episode_starts, state = make_rollout()
    policy = Policy()
    ways = {
        "one call": lambda: policy(observations, state, episode_starts)[0],
        "step by step": lambda: step_by_step(policy, observations, state, episode_starts),
    }
    results, seconds = {}, {}
    for name, evaluate in ways.items():
        gradients(policy, evaluate())
        started = time.perf_counter()
        log_probabilities = evaluate()
        grads = gradients(policy, log_probabilities)
        seconds[name] = time.perf_counter() - started
        results[name] = [log_probabilities, *grads]
    pairs = zip(results["one call"], results["step by step"], strict=True)
    distances = [((a - b).norm() / b.norm()).item() for a, b in pairs]
    return {"log-probabilities": distances[0], "gradients": max(distances[1:]), **seconds}


def main() -> None:
    found = compare()
    print(f"{int(STEPS * ENVIRONMENTS)} steps, {STEPS} in each of {ENVIRONMENTS} environments")
    for name in ("log-probabilities", "gradients"):
        print(f"relative difference of the {name}: {found[name]:.1e}")
    for name in ("step by step", "one call"):
        print(f"evaluated and differentiated {name}: {found[name] * 1e3:.1f} ms")


if __name__ == "__main__":
    options("examples.rollout", __doc__)
    main()
