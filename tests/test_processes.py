"""Several processes train one model: as one process does, and only the first one writes.

Real processes over gloo, two of them, forked from a server that has imported everything.
"""

import json
import signal
import socket

import pytest
import torch
from comparing import steady
from processes import Processes

import unwrite
from unwrite import processes as crew
from unwrite.delta import Delta

LEARN = ("--method", "full-ft", "--set", "lr=1e-3", "--set", "epochs=3", "--set", "until=epochs")
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


class Pair:
    """Two processes of one command, as a launcher starts them."""

    def __init__(self, processes, *words, environment=(), first=(), second=()):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            **dict(environment),
        }
        self.both = [
            processes.start(
                *words,
                environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                **dict(special),
            )
            for rank, special in enumerate((first, second))
        ]
        self.first, self.second = self.both

    def wait(self):
        return [one.wait(120) for one in self.both]


@pytest.fixture
def processes(tmp_path):
    folder = tmp_path / "processes"
    folder.mkdir()
    return Processes(folder)


@pytest.fixture(scope="module")
def edits(worlds, tmp_path_factory):
    file = tmp_path_factory.mktemp("edits") / "people.jsonl"
    unwrite.write_edits(file, worlds().edits[:9])
    return file


@pytest.fixture(scope="module")
def homes(worlds, tmp_path_factory):
    """A function that makes a new home, and says what an update in one process changes."""
    root = tmp_path_factory.mktemp("homes")
    count = iter(range(1000))

    def made():
        return unwrite.open(root / str(next(count)), base=worlds().folder)

    return made


def update(home, edits, *method):
    return ("update", home.folder, edits, *method, "--json")


def the_delta(home):
    (one,) = home.ledger.live()
    return Delta.open(home.folder / "updates" / one / "delta")


def nearly(one, other, tolerance=1e-3):
    """Two changes as a whole: AdamW turns rounding noise of single elements into full steps."""
    assert set(one) == set(other)
    length = sum(float(one[n].dense().square().sum()) for n in one)
    return length > 0 and apart(one, other) < tolerance * length


def apart(one, other):
    """The square of the distance of two changes."""
    return sum(float((one[n].dense() - other[n].dense()).square().sum()) for n in one)


METHODS = {
    "full": (*LEARN, "--set", "batch_size=4"),
    "skipping": ("--method", "full-ft", *("--set", "lr=1e-3"), "--set", "skip_right=true"),
    "accumulated": (*LEARN, "--set", "batch_size=2", "--set", "accumulate=2"),
    "sgd": (
        *("--method", "full-ft", "--set", "epochs=2", "--set", "until=epochs"),
        *("--set", "optimizer=sgd", "--set", "lr=0.1", "--set", "batch_size=5"),
    ),
    "lora": ("--method", "lora", "--set", "epochs=3", "--set", "batch_size=4"),
    "ft-c": ("--method", "ft-c", "--set", "epochs=3", "--set", "layer=0.5"),
    "delicate": (
        *("--method", "delicate", "--set", "rounds=2", "--set", "tuner.lr=1e-3"),
        *("--set", "tuner.epochs=2", "--set", "tuner.until=epochs"),
    ),
    "delicate-lora": ("--method", "delicate", "--set", "rounds=1", "--set", "tuner=lora"),
    "f-learning": ("--method", "f-learning", "--set", "learn.lr=1e-3"),
    "f-learning-lora": (
        *("--method", "f-learning", "--set", "forget=lora", "--set", "learn=lora"),
        *("--set", "learn.batch_size=2", "--set", "learn.accumulate=2"),
    ),
}


@pytest.mark.parametrize(
    "name", ["full", "skipping", "accumulated", "sgd", "lora", "delicate-lora", "f-learning"]
)
def test_two_processes_change_what_one_changes(homes, edits, processes, name):
    assert_as_alone(homes, edits, processes, METHODS[name], {})


@pytest.mark.parametrize(
    "name",
    ["full", "accumulated", "ft-c", "delicate", "lora", "delicate-lora", "f-learning-lora"],
)
def test_sharded_processes_change_what_one_changes(homes, edits, processes, name):
    assert_as_alone(homes, edits, processes, METHODS[name], SHARDED)


@pytest.mark.parametrize(
    "asked",
    [
        {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        {"FSDP_OFFLOAD_PARAMS": "true"},
        {"FSDP_RESHARD_AFTER_FORWARD": "false"},
    ],
    ids=lambda asked: next(iter(asked)).lower(),
)
def test_what_the_launch_file_asks_of_shards_changes_no_result(homes, edits, processes, asked):
    assert_as_alone(homes, edits, processes, METHODS["full"], SHARDED | asked)


def test_adapters_over_shards_obey_the_launch_file_too(homes, edits, processes):
    """And a network that stays whole after the last look at it is gathered as it should be."""
    asked = {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_RESHARD_AFTER_FORWARD": "false"}
    for method in (METHODS["lora"], ("--method", "full-ft", "--set", "lr=1e-3")):
        assert_as_alone(homes, edits, processes, method, SHARDED | asked)


def assert_as_alone(homes, edits, processes, method, environment):
    alone, together = homes(), homes()
    expected = processes.run(*update(alone, edits, *method))
    assert expected.code == 0, expected.err
    pair = Pair(processes, *update(together, edits, *method), environment=environment)
    assert pair.wait() == [0, 0], pair.first.err + pair.second.err
    assert pair.second.out == "" and pair.second.err == "", "only the first process speaks"
    assert nearly(the_delta(alone), the_delta(together))
    found, wanted = json.loads(pair.first.out), json.loads(expected.out)
    assert found["committed"] and together.verify() == []
    for role in ("reliability", "locality"):
        assert found["scores"]["after"][role]["token"] == pytest.approx(
            wanted["scores"]["after"][role]["token"], abs=0.12
        )


def test_protected_prompts_are_shared_out_too(homes, edits, processes, worlds, tmp_path):
    prompts = tmp_path / "protect.txt"
    prompts.write_text("\n".join(edit.prompt for edit in worlds().edits[20:25]), "utf-8")
    method = (*METHODS["full"], "--protect", prompts)
    for environment in ({}, SHARDED):
        assert_as_alone(homes, edits, processes, method, environment)


def test_a_comparison_in_two_processes(worlds, edits, processes, tmp_path):
    words = ("compare", worlds().folder, "--edits", edits, "--limit", "4", "--token-only")
    words += ("--variant", "learn=full-ft:lr=1e-3:epochs=3:until=epochs", "--plant")
    words += ("--methods", "lora:epochs=2", "--references", "no-change")
    alone = processes.run(*words, "--out", tmp_path / "one")
    assert alone.code == 0, alone.err
    pair = Pair(processes, *words, "--out", tmp_path / "two")
    assert pair.wait() == [0, 0], pair.first.err + pair.second.err
    one, two = (json.loads((tmp_path / run / "table.json").read_text()) for run in ("one", "two"))
    assert [row["method"] for row in one["means"]] == [row["method"] for row in two["means"]]
    assert set(steady(tmp_path / "one")) == set(steady(tmp_path / "two"))


@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["plain", "graceful", "bf16", "l2", "ewc", "early"])
def test_a_task_is_learned_in_two_processes(worlds, processes, tmp_path, method, environment):
    facts = [(edit.prompt, edit.old) for edit in worlds().edits]
    task, other = tmp_path / "task.jsonl", tmp_path / "other.jsonl"
    for file, rows in ((task, facts[:12]), (other, facts[12:20])):
        lines = [json.dumps({"prompt": p, "completion": c}) for p, c in rows]
        file.write_text("\n".join(lines) + "\n", "utf-8")
    words = ["finetune", worlds().folder, "--task", task, "--set", "epochs=2"]
    words += ["--set", "batch_size=4", "--set", "lr=1e-3"]
    plain = list(words)
    words += {
        "plain": [],
        "bf16": ["--set", "precision=bf16"],
        "graceful": ["--method", "graceful", "--forget", other, "--set", "every=2"],
        "l2": ["--method", "l2", "--set", "penalty=10"],
        "ewc": ["--method", "ewc", "--forget", other, "--set", "penalty=1e6"],
        "early": ["--method", "early"],
    }[method]
    alone = processes.run(*words, "--out", tmp_path / "one", "--json")
    assert alone.code == 0, alone.err
    pair = Pair(processes, *words, "--out", tmp_path / "two", "--json", environment=environment)
    assert pair.wait() == [0, 0], pair.first.err + pair.second.err
    name = "plain" if method == "bf16" else method
    one, two = (Delta.open(tmp_path / run / "run" / name) for run in ("one", "two"))
    assert nearly(one, two, 2e-2)
    if method != "plain":  # and nearer to that than to what plain learning changes
        assert processes.run(*plain, "--out", tmp_path / "plain").code == 0
        other = Delta.open(tmp_path / "plain" / "run" / "plain")
        assert 2 * apart(one, two) < apart(other, two)


# ---- failing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [{}, SHARDED], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_that_fails_ends_all_and_changes_nothing(
    homes, edits, processes, snapshot, monkeypatch, environment, rank
):
    home = homes()
    before = snapshot(home.folder)
    failing = {"raise_in": "unwrite.training.row_losses"}
    special = {"first": failing} if rank == 0 else {"second": failing}
    environment = environment | {"UNWRITE_PATIENCE": "1"}
    words = update(home, edits, *METHODS["full"])
    pair = Pair(processes, *words, environment=environment, **special)
    codes = pair.wait()
    assert codes[0] != 0
    assert pair.second.err == "", "one message, from the first process"
    assert "out of luck" in pair.first.err
    if rank == 1:
        assert codes[0] == 2
        assert pair.first.err.count("Error: ") == 2 and "Error: Process 1 failed" in pair.first.err
    assert snapshot(home.folder) == before


def test_a_process_that_is_killed_ends_all_and_changes_nothing(homes, edits, processes, snapshot):
    home = homes()
    before = snapshot(home.folder)
    pair = Pair(
        processes,
        *update(home, edits, *METHODS["full"]),
        second={"wait_in": "unwrite.training.row_losses"},
        environment={"UNWRITE_PATIENCE": "1"},
    )
    pair.second.arrived()
    pair.second.send(signal.SIGKILL)
    assert pair.first.wait(120) == 2
    assert "lost" in pair.first.err and "Traceback" not in pair.first.err
    assert snapshot(home.folder) == before


def test_what_fails_in_all_alike_is_an_error_like_any_other(homes, edits, processes, snapshot):
    """A loss that is no number: one sentence, both end, and the home is as before."""
    home = homes()
    before = snapshot(home.folder)
    method = ("--method", "full-ft", "--set", "lr=1e30", "--set", "optimizer=sgd")
    pair = Pair(processes, *update(home, edits, *method))
    assert pair.wait() == [2, 0], pair.first.err
    assert "The loss became" in pair.first.err
    assert snapshot(home.folder) == before


def test_a_grid_goes_on_after_a_cell_that_failed_in_all_processes(
    worlds, edits, processes, tmp_path
):
    words = ("compare", worlds().folder, "--edits", edits, "--limit", "3", "--token-only")
    words += ("--variant", "wild=full-ft:lr=1e30:optimizer=sgd", "--references", "none")
    words += ("--variant", "tame=full-ft:lr=1e-3:epochs=2:until=epochs")
    pair = Pair(processes, *words, "--out", tmp_path / "run", "--json")
    assert pair.wait() == [0, 0], pair.first.err + pair.second.err
    found = json.loads(pair.first.out)
    assert [row["method"] for row in found["rows"]] == ["tame"]
    assert [row["method"] for row in found["failed"]] == ["wild"]


def test_what_cannot_train_here_is_refused_with_the_reason(homes, edits, processes):
    cases = [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, METHODS["full"], "does not train under DeepSpeed"),
        (SHARDED | {"FSDP_VERSION": "1"}, METHODS["full"], "FSDP2"),
    ]
    for environment, method, reason in cases:
        pair = Pair(processes, *update(homes(), edits, *method), environment=environment)
        assert pair.wait() == [2, 0], pair.first.err
        assert reason in " ".join(pair.first.err.split())


def test_one_process_needs_no_group():
    assert not torch.distributed.is_initialized()
    assert crew.count() == 1


# ---- graceful forgetting in somebody's own sharded training --------------------------------------


def test_graceful_forgetting_under_fsdp_forgets_as_one_process_does(worlds, processes, tmp_path):
    from safetensors.torch import load_file
    from sharded_process import learn, weights

    from unwrite.model import Model

    world = worlds()
    alone = Model.load(world.folder)
    expected = learn(alone, tmp_path / "one")
    out = tmp_path / "two"
    out.mkdir()
    special = {"script": "sharded_process"}
    pair = Pair(processes, world.folder, out, first=special, second=special)
    assert pair.wait() == [0, 0], pair.first.err + pair.second.err
    told = json.loads((out / "history.json").read_text())
    assert [row["example"] for row in told] == [row["example"] for row in expected.history]
    for one, other in zip(told, expected.history, strict=True):
        assert one["loss_before"] == pytest.approx(other["loss_before"], rel=1e-3, abs=1e-4)
        assert one["loss_after"] > one["loss_before"]
    together = load_file(out / "end.safetensors")
    for name, tensor in weights(alone).items():
        assert torch.allclose(together[name], tensor, atol=2e-4), name
    saved = [
        load_file(run / "checkpoint-4" / "graceful.safetensors") for run in (tmp_path / "one", out)
    ]
    assert saved[0].keys() == saved[1].keys()
    assert all(saved[0][key].shape == saved[1][key].shape for key in saved[0])
