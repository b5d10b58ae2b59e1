"""The suite of speed measurements: complete, honest about what it left out, and right in small."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gradients import some_pairs
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import adapter_merge, fisher, floors, growth, measure, run, undo
from unwrite.forgetting.fisher import fisher_diagonal
from unwrite.model import Model
from unwrite.training import row_losses


@pytest.fixture
def started(monkeypatch):
    """What the suite would start; a measurement in ``fail`` ends with an error."""
    found = SimpleNamespace(commands=[], fail=set())

    def start(command, **_how):
        found.commands.append(command)
        return SimpleNamespace(returncode=int(command[2].removeprefix("benchmarks.") in found.fail))

    monkeypatch.setattr(run.subprocess, "run", start)
    return found


@pytest.mark.parametrize("name", run.SUITE)
def test_every_measurement_is_a_module_that_says_what_it_does(name):
    module = importlib.import_module(f"benchmarks.{name}")
    assert callable(module.main)
    assert f"python -m benchmarks.{name}" in module.__doc__
    for one in run.SUITE[name].arguments:
        if one.startswith("--"):
            assert f'"{one}"' in Path(module.__file__).read_text("utf-8")


def test_without_the_data_what_needs_it_is_left_out_and_that_is_no_success(started, capsys):
    chosen = {name: run.SUITE[name] for name in ("training", "startup")}
    assert run.measured(chosen, None) == 1
    assert [command[2] for command in started.commands] == [
        "benchmarks.startup",
        "benchmarks.tables",
    ]
    assert "Left out, for want of --data: training." in capsys.readouterr().err


def test_one_that_fails_is_said_and_the_others_go_on(started, tmp_path, capsys):
    (tmp_path / run.COUNTERFACT).touch()
    started.fail = {"training"}
    chosen = {name: run.SUITE[name] for name in ("training", "startup")}
    assert run.measured(chosen, tmp_path) == 1
    assert str(tmp_path / run.COUNTERFACT) in started.commands[0]
    assert [command[2] for command in started.commands[1:]] == [
        "benchmarks.startup",
        "benchmarks.tables",
    ]
    assert "Failed: training." in capsys.readouterr().err
    started.fail = set()
    assert run.measured(chosen, tmp_path) == 0


def test_names_that_are_not_there_are_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", "flying"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2 and "flying" in capsys.readouterr().err


def test_the_list_says_what_each_needs(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", "--list"])
    run.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(run.SUITE)
    assert any(line.startswith("training: ") and run.COUNTERFACT in line for line in lines)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_operations_of_a_step_are_those_that_torch_counts(worlds, kind):
    """Those of attention and of the first layer's inputs, which need no gradient, come out."""
    world = worlds(kind)
    model = Model.load(world.folder)
    sequences = [model.tokens(one.prompt, one.new) for one in world.edits[:1]]
    model.network.eval()
    with FlopCounterMode(display=False) as counter:
        row_losses(model.network, sequences, model.device).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "mm" in str(op) and "bmm" not in str(op))
    assert floors.training_operations(model, sequences) == pytest.approx(products, rel=0.02)


def test_rates_are_of_this_machine(monkeypatch):
    monkeypatch.setattr(floors, "SIDE", 256)
    monkeypatch.setattr(floors, "FLOATS", 1 << 18)
    assert 1e8 < floors.multiplications() < 1e14
    assert 1e8 < floors.multiplications(torch.bfloat16) < 1e15
    assert 1e7 < floors.copying() < 1e13
    monkeypatch.setattr(floors, "HASHED", 1 << 18)
    assert 1e7 < floors.adding_squares() < 1e13
    assert 1e7 < floors.summing_products() < 1e13
    assert 1e7 < floors.hashing() < 1e13


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_matrices_are_all_weights_but_norms_biases_and_tables_of_tokens(worlds, kind):
    model = Model.load(worlds(kind).folder)
    tables = ("embed", "lm_head", "wte")
    counted = sum(
        tensor.numel()
        for name, tensor in model.weights.items()
        if tensor.ndim == 2 and not any(table in name for table in tables)
    )
    assert floors.matrix_elements(model) == counted > 0


@pytest.mark.parametrize("kind", undo.KINDS)
def test_undoing_is_measured_on_homes_that_stay_whole(worlds, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(undo, "UNDONE", 1)
    world = worlds()
    found = undo.measured(world.folder, world.edits[:2], kind, tmp_path, repeats=2)
    assert all(len(times) == 2 for times in found["seconds"].values())
    nothing_left = {"floor", "hashing"} if kind == "one layer" else set()
    assert {name for name, times in found["seconds"].items() if min(times) == 0} == nothing_left
    assert (found["undo_over_floor"] is None) == bool(nothing_left)
    assert found["tensors_touched"] == (
        1 if kind.startswith("one") else len(Model.load(world.folder).names)
    )


def test_a_curve_is_fitted_and_its_points_are_told(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))

    def make(size):
        return lambda: [next(clock) for _ in range(size - 1)]

    found = growth.curve((1, 2, 4), make, repeats=2)
    assert found["seconds"] == {1: [1.0, 1.0], 2: [2.0, 2.0], 4: [4.0, 4.0]}
    assert found["exponent"] == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_an_adapter_merged_by_both_is_the_same_model(worlds, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["adapter_merge", "--base", str(worlds().folder), "--repeats", "1"]
    )
    adapter_merge.main()
    result = json.loads((tmp_path / "adapter_merge.json").read_text("utf-8"))
    assert result["largest_difference"] < 1e-6
    assert set(result["seconds"]) == {"peft", "unwrite", "copy"}


@pytest.mark.parametrize("loss", [fisher.our_loss, fisher.transformers_loss])
def test_what_the_fisher_diagonal_is_timed_against_computes_the_same(worlds, loss):
    world = worlds()
    model = Model.load(world.folder)
    pairs = some_pairs(world)
    expected = fisher.one_by_one(model, pairs, loss)
    found = fisher_diagonal(model, pairs)
    for name, change in found.items():
        scale = float(expected[name].abs().max())
        assert torch.allclose(change.dense(), expected[name], rtol=1e-4, atol=1e-5 * scale), name
