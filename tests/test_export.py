"""A state written out of its home: adapters that answer like the home, and no litter."""

import json
import os
import signal
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from architectures import ARCHITECTURES
from processes import Processes
from safetensors.torch import load_file

import unwrite
from unwrite.change import Change, Dense, LowRank, mask
from unwrite.delta import Delta
from unwrite.errors import HomeError
from unwrite.files import sha256_file

PROJECTIONS = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
SCALE = 0.7  # not a power of two: folding it into a factor rounds


@dataclass(frozen=True)
class Factors:
    """Random changes of low rank on all matrices of some kinds; on those of the first kind, of
    another rank."""

    kinds: tuple[str, ...] = PROJECTIONS
    rank: int = 2
    first_rank: int = 2
    seed: int = 0

    def delta(self, model, edits):
        random = torch.Generator().manual_seed(self.seed)
        changes: dict[str, Change] = {}
        for file, name in model.names.items():
            kind = model.anatomy.kind(name)
            if kind in self.kinds and model.weights[file].ndim == 2:
                rank = self.first_rank if kind == self.kinds[0] else self.rank
                rows, columns = model.weights.shape(file)
                b = 0.1 * torch.randn((rows, rank), generator=random)
                a = torch.randn((rank, columns), generator=random)
                changes[file] = LowRank(b, a, SCALE)
        return Delta.from_changes(changes)


@dataclass(frozen=True)
class Nudge:
    """One tensor moves a little, in a given encoding."""

    kind: str = "down"
    encoding: str = "dense"

    def delta(self, model, edits):
        file = next(f for f, name in model.names.items() if model.anatomy.kind(name) == self.kind)
        step = torch.full(model.weights.shape(file), 0.01)
        change = Dense(step) if self.encoding == "dense" else mask(step, step > 0)
        return Delta.from_changes({file: change})


@pytest.fixture
def made(worlds, tmp_path):
    """Makes a home of a toy world with an update by each of the given methods."""

    def make(*methods, architecture="llama"):
        world = worlds(architecture)
        home = unwrite.open(tmp_path / "home", base=world.folder)
        for number, method in enumerate(methods):
            home.update(world.edits[number : number + 1], method)
        return home

    return make


def with_adapter(home, folder):
    """The base with the adapter on it, by transformers and peft alone; both must be content."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(home.base.folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)  # between those two
        return PeftModel.from_pretrained(base, folder).eval()


def logits(network, model, edits):
    with torch.no_grad():
        return torch.cat(
            [
                network(input_ids=model.tokenizer(edit.prompt, return_tensors="pt")["input_ids"])
                .logits[0, -1]
                .float()
                for edit in edits
            ]
        )


# ---- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_base_with_the_adapter_answers_as_the_home(made, worlds, tmp_path, architecture):
    """Two updates over each other, of several ranks; the adapter alone, and merged by peft."""
    edits = worlds().edits[::5]
    some = ("down", "o", "v", "qkv")
    home = made(
        Factors(first_rank=1), Factors(kinds=some, rank=3, seed=1), architecture=architecture
    )
    folder = home.export(tmp_path / "adapter", "adapter")
    model = home.model()
    expected = logits(model.network, model, edits)
    adapted = with_adapter(home, folder)
    torch.testing.assert_close(logits(adapted, model, edits), expected, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    parameters = dict(merged.named_parameters(remove_duplicate=False))
    for file, name in model.names.items():
        torch.testing.assert_close(parameters[name], model.weights[file], rtol=1e-5, atol=1e-6)
    before = logits(home.model("base").network, model, edits)
    assert not torch.allclose(before, expected, rtol=1e-2, atol=1e-2), "nothing was to be seen"


def test_a_head_of_its_own_is_adapted_under_the_networks_name(made, worlds, tmp_path):
    home = made(Factors(kinds=("head", "qkv")), architecture="gpt_neox")
    assert "embed_out.weight" in home.base.tensors, "the file has another name for it"
    folder = home.export(tmp_path / "adapter", "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert "lm_head" in config["target_modules"]
    model, edits = home.model(), worlds().edits[:3]
    torch.testing.assert_close(
        logits(with_adapter(home, folder), model, edits),
        logits(model.network, model, edits),
        rtol=1e-4,
        atol=1e-4,
    )


def test_ranks_add_up_and_are_told_where_they_differ(made, tmp_path):
    home = made(Factors(first_rank=3), Factors(kinds=("down",), rank=1, first_rank=1))
    folder = home.export(tmp_path / "adapter", "adapter")
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    ranks = {}
    for name, factor in load_file(folder / "adapter_model.safetensors").items():
        module, _, end = name.removesuffix(".weight").rpartition(".lora_")
        ranks[module] = factor.shape[0] if end == "A" else factor.shape[1]
        assert factor.dtype == torch.float32
    expected = {"q_proj": 3, "down_proj": 3}
    assert ranks == {module: expected.get(module.split(".")[-1], 2) for module in ranks}
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 2)
    assert config["task_type"] == "CAUSAL_LM"
    assert set(config["rank_pattern"].values()) == {3}
    assert len(config["rank_pattern"]) == 4
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["target_modules"] == sorted(m.removeprefix("base_model.model.") for m in ranks)
    assert config["base_model_name_or_path"] == home.base.name


def test_the_same_state_gives_the_same_adapter(made, tmp_path):
    home = made(Factors())
    one, two = (home.export(tmp_path / name, "adapter") for name in ("one", "two"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert sha256_file(one / name) == sha256_file(two / name)


def test_a_model_with_a_short_name_is_not_called_by_its_path(made, tmp_path):
    """Of a hub model the revision is told; a built-in one has none that peft could use."""
    home = made(Factors())
    here = home.source
    for kind, name, revision in (("hub", "ann/toy", "0123abc"), ("built-in", "toy", None)):
        home.__dict__["source"] = replace(here, kind=kind, name=name, revision=revision or "gguf-1")
        folder = home.export(tmp_path / kind, "adapter")
        text = (folder / "adapter_config.json").read_text()
        config = json.loads(text)
        assert config["base_model_name_or_path"] == name
        assert config["revision"] == revision
        assert str(here.folder) not in text


def test_an_update_that_was_undone_is_not_in_the_adapter(made, worlds, tmp_path):
    home = made(Factors(), Nudge())
    dense = home.ledger.live()[-1]
    with pytest.raises(HomeError, match=f"the changes of {dense} are not of low rank"):
        home.export(tmp_path / "adapter", "adapter")
    home.undo(dense, recheck=False)
    folder = home.export(tmp_path / "adapter", "adapter")
    model, edits = home.model(), worlds().edits[:2]
    expected = logits(model.network, model, edits)
    torch.testing.assert_close(
        logits(with_adapter(home, folder), model, edits), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("architecture", "methods", "reason"),
    [
        ("llama", [], "no live update changes anything"),
        ("llama", [Factors(rank=0, first_rank=0)], "no live update changes anything"),
        ("llama", [Nudge()], "not of low rank"),
        ("llama", [Nudge(encoding="masked")], "not of low rank"),
        ("llama", [Nudge(kind="norm"), Factors()], "not of low rank"),
        ("llama", [Factors(kinds=("embedding",))], "both the embedding and the head"),
        ("gpt_neox", [Factors(kinds=("embedding",))], "not the weight of a known projection"),
    ],
)
def test_what_no_adapter_can_hold_is_refused(
    made, tmp_path, snapshot, architecture, methods, reason
):
    home = made(*methods, architecture=architecture)
    before = snapshot(tmp_path)
    with pytest.raises(HomeError, match=rf"as an adapter: .*{reason}.*Use --as model"):
        home.export(tmp_path / "adapter", "adapter")
    assert snapshot(tmp_path) == before
    assert not (tmp_path / "adapter").exists()


# ---- nothing half-done ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return Processes(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_what_a_killed_export_left_is_swept_by_the_next(made, processes, tmp_path, kind):
    home = made(Factors())
    before = set(tmp_path.iterdir())
    killed = processes.run("export", home.folder, tmp_path / "out", "--as", kind, die_at=6)
    assert killed.code == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - before
    assert left.name == f".out.{killed.pid}.partial"
    home.export(tmp_path / "out", kind)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out"}


def test_only_what_dead_exports_to_the_same_place_left_is_swept(made, processes, tmp_path):
    home = made(Factors())
    busy = processes.start(
        "export", home.folder, tmp_path / "out", wait_in="unwrite.export.save_weights"
    )
    busy.arrived()
    dead = processes.run("history", home.folder).pid
    kept = [
        tmp_path / name
        for name in (
            f".out.{busy.pid}.partial",  # at work
            f".out.{os.getppid()}.partial",
            ".out.1.partial",  # always alive, and somebody else's
            f".out.{dead}.partial.bak",
            f"out.{dead}.partial",
            f".outer.{dead}.partial",
            f".out.0{dead}.partial",
            f".out.{10**12}.partial",
            ".out.0.partial",
        )
    ]
    swept = [tmp_path / f".out.{pid}.partial" for pid in (dead, os.getpid())]
    for folder in (*kept[1:], *swept):
        folder.mkdir()
        (folder / "file").touch()
    home.export(tmp_path / "out")
    assert [folder.exists() for folder in kept] == [True] * len(kept)
    assert [folder.exists() for folder in swept] == [False] * len(swept)
    assert busy.go_on() == 2, "the other was faster"
    assert "not empty" in busy.err
    assert not kept[0].exists(), "an export that ends cleans up after itself"
