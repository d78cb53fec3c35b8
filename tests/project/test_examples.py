"""The examples do what they say: they learn, they give what torch.nn gives, and the README's code runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rnnfast
from examples import language_model, numpy_bptt, own_cell, sequence_classifier, shapes

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Small layers gain nothing from a second thread, and wait for it where other programs run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_sequence_classifier_learns_as_with_torch(name):
    model, losses = sequence_classifier.train(getattr(rnnfast, name))
    right = sequence_classifier.accuracy(model)
    _, expected = sequence_classifier.train(getattr(torch.nn, name))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert right > 0.9


def test_shapes_are_those_of_the_notes():
    found = {name: list(tensor.shape) for name, tensor in shapes.main().items()}
    assert found == {"sequence": [4, 10, 8], "output": [4, 10, 16], "final state": [1, 4, 16]}


def test_backpropagation_through_time_in_numpy_is_exact():
    distances = numpy_bptt.compare_with_rnnfast()
    assert len(distances) == 6
    assert max(distances.values()) < 1e-12


def test_numpy_network_learns():
    losses = numpy_bptt.train(iterations=60)
    assert losses[-1] < 0.75 * losses[0]


def test_language_models_stay_together(monkeypatch):
    monkeypatch.setattr(language_model, "STEPS", 24)
    corpus = language_model.Corpus()
    layers = {"torch": torch.nn.LSTM, "rnnfast": rnnfast.LSTM}
    runs = language_model.train(layers, len(corpus.characters), corpus.batches(10))
    assert runs["rnnfast"].losses == pytest.approx(runs["torch"].losses, rel=1e-4)
    assert runs["rnnfast"].losses[-1] < runs["rnnfast"].losses[0]
    assert len(language_model.write_text(runs["rnnfast"].model, corpus, length=20)) == len("The ") + 20


def test_a_cell_of_ones_own_is_its_eager_step():
    distances = own_cell.compare()
    assert len(distances) == 8
    assert max(distances.values()) < 1e-12


@pytest.mark.long
def test_a_cell_of_ones_own_learns_as_its_loop(monkeypatch, tmp_path):
    monkeypatch.setattr(language_model, "STEPS", 24)
    monkeypatch.setattr(own_cell, "PICTURE", tmp_path / "curves.png")
    corpus = language_model.Corpus()
    layers = {own_cell.LOOP: own_cell.Loop, own_cell.OURS: own_cell.Fused}
    runs = language_model.train(layers, len(corpus.characters), corpus.batches(10))
    assert runs[own_cell.OURS].losses == pytest.approx(runs[own_cell.LOOP].losses, rel=1e-4)
    own_cell.draw(runs)
    assert own_cell.PICTURE.stat().st_size > 1000


@pytest.mark.parametrize("example", ["sequence_classifier", "shapes", "numpy_bptt", "rollout"])
def test_example_runs_by_itself(example):
    result = subprocess.run(
        [sys.executable, "-m", f"examples.{example}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout
    assert not result.stderr


README = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(README)))
def test_code_in_the_readme_runs(number):
    # As a file, since an error in a cell's step names its line.
    exec(compile(README[number], "README.md", "exec"), {"__name__": "readme"})


def test_the_readme_shows_code():
    assert len(README) >= 5
