"""What the benchmark suite measures: cases, their data, questions, and the words that select them."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import options, questions
from benchmarks.__main__ import main
from benchmarks.cases import CELLS, DECLARED, Case, declared_layer, operations, parameter_shapes, parse_sizes, traffic
from benchmarks.workload import draw

TINY = Case("lstm", T=3, B=2, I=4, H=5)


def test_a_seed_gives_the_same_numbers_and_another_seed_gives_others():
    first, again, other = (draw(TINY, "cpu", seed) for seed in (1, 1, 2))
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)


@pytest.mark.parametrize("live", [0.25, 0.5, 0.75])
def test_lengths_keep_the_live_fraction(live):
    work = draw(Case("gru", T=200, B=32, I=2, H=2, form="lengths", live=live), "cpu", seed=0)
    assert work.lengths.double().mean().item() / 200 == pytest.approx(live, abs=0.03)
    assert work.lengths.max() == 200
    assert work.lengths.min() >= 1


@pytest.mark.parametrize("case", [TINY, replace(TINY, layers=2, bidirectional=True, proj=2, bias=False)])
def test_parameters_are_those_of_torch(case):
    module = torch.nn.LSTM(
        case.I, case.H, case.layers, bias=case.bias, bidirectional=case.bidirectional, proj_size=case.proj
    )
    assert parameter_shapes(case) == {name: tuple(value.shape) for name, value in module.named_parameters()}


@pytest.mark.parametrize("cell", DECLARED)
def test_parameters_of_a_declared_cell_are_those_of_its_layer(cell):
    case = replace(TINY, cell=cell)
    work = draw(case, "cpu", seed=0)
    layer = declared_layer(case, dtype=torch.float64)
    layer.load_state_dict(work.weights)
    assert operations(case) > 0


def test_operations_and_traffic_are_counted():
    case = Case("lstm", T=10, B=2, I=3, H=5)
    assert operations(case) == 10 * 2 * 2 * 4 * 5 * (3 + 5)
    assert operations(replace(case, mode="training")) == 3 * operations(case)
    assert traffic(case) == 4 * (10 * 2 * (3 + 5) + 4 * 5 * (3 + 5 + 2))


def test_cases_have_names_of_their_own():
    for device in ("cpu", "cuda"):
        for question in (*questions.full(device), *questions.quick(device)):
            names = [case.id for case in question.cases]
            assert len(set(names)) == len(names)


def test_a_case_survives_json():
    for question in questions.full("cpu"):
        for case in question.cases:
            assert Case(**json.loads(json.dumps(case.to_json()))) == case


def test_the_grid_follows_its_seed_and_limits():
    limits = questions.Limits(T=(10, 50), B=(1, 4), I=(3, 9), H=(16, 40), operations=1e8)
    cases = questions.grid(20, 5, limits).cases
    assert cases == questions.grid(20, 5, limits).cases
    assert cases != questions.grid(20, 6, limits).cases
    assert len(cases) == 20 * len(CELLS) * 2
    for case in cases:
        assert 10 <= case.T <= 50
        assert 16 <= case.H <= 40
        assert operations(replace(case, cell="lstm", mode="inference")) <= 1e8


BAD_INPUT = [
    (["--cell", "lsmt"], "rnn, lstm, gru"),
    (["--mode", "backward"], "inference, training, penalty, step"),
    (["--peer", "cudnn"], "onnxruntime"),
    (["--backend", "cuda"], "auto, triton, numba, reference, torch"),
    (["--device", "tpu"], "cpu, cuda"),
    (["--question", "everything"], "sequence-length"),
    (["--dtype", "int8"], "float32"),
    (["--sizes", "1,2,3"], "T,B,I,H"),
    (["--sizes", "1,2,0,3"], "T,B,I,H"),
    (["--grid", "0"], "at least 1"),
    (["--grid", "3", "--limits", "T=9:1"], "T=1:2000"),
    (["--facts", "--cell", "gru"], "leave the filters out"),
    (["--threads", "100000"], "threads must be 1 to"),
    (["--cell", "rnn", "--question", "stacks"], "--list"),
    (["--compare", "nowhere.json", "nowhere.json"], "nowhere.json"),
]


@pytest.mark.parametrize(
    ("words", "said"), BAD_INPUT, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_names_the_valid_choices_in_one_line(words, said, capsys):
    assert main(words) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_an_unknown_option_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--frobnicate"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_list_shows_cases_and_contenders(capsys):
    assert main(["--list", "--question", "sequence-length", "--cell", "gru", "--mode", "training"]) == 0
    shown = capsys.readouterr().out
    assert "gru-training-T8192-B16-I128-H128" in shown
    assert "lstm" not in shown
    assert "by onnxruntime" in shown


def test_sizes_are_read():
    assert parse_sizes("100,32,64,128") == (100, 32, 64, 128)


def test_partial_runs_do_not_replace_full_results():
    full = options.parser().parse_args([])
    assert not options.is_partial(full)
    for words in (
        ["--quick"],
        ["--facts"],
        ["--cell", "rnn"],
        ["--sizes", "1,1,1,1"],
        ["--grid", "2"],
        ["--peer", "torch"],
    ):
        assert options.is_partial(options.parser().parse_args(words))
