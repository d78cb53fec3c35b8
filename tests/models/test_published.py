"""Whole published models with random weights, on torch's layers and accelerated. An optional group: `make test-models`.

pip install -c constraints.txt transformers sb3-contrib "gluonts[torch]"
"""

import copy
import time

import pytest
import torch
from comparison import compare

import rnnfast

# What the packages themselves warn of is not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")


def test_encodec(backend):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.EncodecConfig(num_filters=8, hidden_size=32, codebook_dim=32, codebook_size=64)
    model = transformers.EncodecModel(config).train()
    audio = torch.randn(2, 1, 24_000)
    fast = compare(model.encoder, lambda encoder: {"embeddings": encoder(audio)}, layers=1)
    compare(model.decoder, lambda decoder: {"audio": decoder(fast(audio).detach())}, layers=1)


def test_recurrent_ppo_on_cartpole(backend):
    sb3_contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    policies, seconds = {}, {}
    for name in ("torch", "rnnfast"):
        agent = sb3_contrib.RecurrentPPO(
            "MlpLstmPolicy", "CartPole-v1", n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu",
            policy_kwargs={"lstm_hidden_size": 32},
        )  # fmt: skip
        if name == "rnnfast":
            rnnfast.accelerate(agent.policy)
            assert all(f.accelerated for f in rnnfast.survey(agent.policy))
        start = time.perf_counter()
        agent.learn(64)
        policies[name], seconds[name] = agent.policy, time.perf_counter() - start
    theirs, ours = seconds.values()
    print(f"\nRecurrentPPO: torch {theirs:.2f} s, rnnfast {ours:.2f} s, {theirs / ours:.2f}x, environment included")
    observation = torch.zeros(1, 4).numpy()
    actions = [policy.predict(observation, deterministic=True)[0] for policy in policies.values()]
    assert actions[0] == actions[1]
    theirs, ours = (dict(policy.named_parameters()) for policy in policies.values())
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=1e-4)


def test_deepar(backend):
    pytest.importorskip("gluonts", reason="gluonts is not installed")
    module = pytest.importorskip(
        "gluonts.torch.model.deepar.module", reason="gluonts is not installed with its torch part"
    )
    model = module.DeepARModel(
        freq="h", context_length=24, prediction_length=6, num_layers=2, hidden_size=25, dropout_rate=0.0,
        num_feat_dynamic_real=1, num_feat_static_real=1, num_feat_static_cat=1, cardinality=[1], num_parallel_samples=5,
        lags_seq=[1, 2, 7],
    )  # fmt: skip
    past = 24 + 7
    given = {
        "feat_static_cat": torch.zeros(4, 1, dtype=torch.long),
        "feat_static_real": torch.zeros(4, 1),
        "past_time_feat": torch.randn(4, past, 1),
        "past_target": torch.rand(4, past) + 1,
        "past_observed_values": torch.ones(4, past),
        "future_time_feat": torch.randn(4, 6, 1),
    }

    def run(model):
        future = {"future_target": torch.ones(4, 6), "future_observed_values": torch.ones(4, 6)}
        return {"loss": model.loss(**given, **future)}

    fast = compare(model, run, layers=1)
    samples = []
    for each in (model, fast):
        torch.manual_seed(1)
        with torch.no_grad():
            samples.append(copy.deepcopy(each).eval()(**given))
    torch.testing.assert_close(samples[0], samples[1], rtol=1e-3, atol=1e-4)
