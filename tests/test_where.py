"""Where a change lives: sums that are right however they are divided, and true of real weights."""

import json
import math
import shutil
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_changes import changes
from safetensors.torch import load_file, save_file

import unwrite
from unwrite import where
from unwrite.base import Base
from unwrite.change import Dense, LowRank, mask
from unwrite.delta import Delta
from unwrite.errors import DamagedFile
from unwrite.files import sha256_file, write_json
from unwrite.ledger import Ledger

MEASURES = ("share", "mean", "relative", "selected")

facts = st.builds(
    lambda size, share, mean, spread: {
        "size": size,
        "changed": int(share * size),
        "mean": mean,
        "squared_norm": size * mean * mean * spread,
    },
    st.integers(1, 10**9),
    st.floats(0, 1),
    st.floats(1e-8, 1e3),
    st.floats(1, 100),
)
kinds = st.sampled_from([*where.KINDS, "other", "a kind of its own"])
blocks = st.one_of(st.none(), st.integers(0, 3))
models = st.lists(st.tuples(blocks, kinds, st.one_of(st.none(), facts)), min_size=1, max_size=12)


def split(model):
    """Tensors and places of (block, kind, facts or None where nothing changes)."""
    places = {
        str(n): {"block": block, "kind": kind, "size": (one or {"size": 7})["size"]}
        | {"squared_norm": 1.0 + n}
        for n, (block, kind, one) in enumerate(model)
    }
    return {str(n): one for n, (_, _, one) in enumerate(model) if one}, places


def same_rows(one, two):
    assert [row["kind"] for row in one] == [row["kind"] for row in two]
    for a, b in zip(one, two, strict=True):
        for key in (*MEASURES, "size", "changed", "squared_norm", "weights"):
            assert a[key] == (None if b[key] is None else pytest.approx(b[key])), key


# ---- sums ----------------------------------------------------------------------------------------


@given(models)
def test_shares_sum_to_one_and_nothing_is_lost(model):
    tensors, places = split(model)
    rows = where.rows(tensors, places)
    assert len({(row["block"], row["kind"]) for row in rows}) == len(rows)
    if tensors:
        assert math.fsum(row["share"] for row in rows) == pytest.approx(1)
    else:
        assert all(row["share"] == row["mean"] == row["selected"] == 0 for row in rows)
    assert sum(row["size"] for row in rows) == sum(place["size"] for place in places.values())
    assert sum(row["changed"] for row in rows) == sum(one["changed"] for one in tensors.values())
    assert all(0 <= row["selected"] <= 1 for row in rows)


@given(models)
def test_adding_up_over_the_blocks_is_the_same_as_having_one_block(model):
    tensors, places = split(model)
    flat = {name: {**place, "block": None} for name, place in places.items()}
    same_rows(where.by_kind(where.rows(tensors, places)), where.rows(tensors, flat))


@given(models, st.floats(1e-3, 1e3))
def test_a_stronger_change_moves_farther_in_the_same_places(model, strength):
    tensors, places = split(model)
    scaled = {
        name: {
            **one,
            "mean": one["mean"] * strength,
            "squared_norm": one["squared_norm"] * strength**2,
        }
        for name, one in tensors.items()
    }
    for before, after in zip(where.rows(tensors, places), where.rows(scaled, places), strict=True):
        assert after["share"] == pytest.approx(before["share"])
        assert after["selected"] == before["selected"]
        assert after["mean"] == pytest.approx(before["mean"] * strength)
        assert after["relative"] == pytest.approx(before["relative"] * strength)


@given(models)
def test_what_was_not_measured_is_unknown_and_never_guessed(model):
    tensors, places = split(model)
    early = {name: {"block": p["block"], "kind": p["kind"]} for name, p in places.items()}
    bare = {name: {k: v for k, v in one.items() if k != "mean"} for name, one in tensors.items()}
    known = where.rows(tensors, early)
    assert all(row["relative"] is None and row["weights"] is None for row in known)
    assert [row["share"] for row in known] == [r["share"] for r in where.rows(tensors, places)]
    for row in where.rows(bare, places):
        at = {
            n for n, p in places.items() if (p["block"], p["kind"]) == (row["block"], row["kind"])
        }
        assert (row["mean"] is None) == bool(at & set(bare))
    for row in where.by_kind(known):
        assert row["relative"] is None


def test_blocks_are_in_order_and_kinds_as_the_numbers_flow():
    model = [
        (block, kind, None) for kind in ("zeta", "head", "down", "q") for block in (None, 10, 2)
    ]
    rows = where.rows(*split(model))
    assert [row["block"] for row in rows] == [2] * 4 + [10] * 4 + [None] * 4
    assert [row["kind"] for row in rows[:4]] == ["q", "down", "head", "zeta"]


# ---- the sentence --------------------------------------------------------------------------------


def told(*parts, whose="core"):
    """The sentence on tensors of (kind, squared norm, mean) with 100 weights each."""
    tensors = {
        str(n): {"size": 100, "changed": 100, "mean": mean, "squared_norm": squared}
        for n, (_, squared, mean) in enumerate(parts)
    }
    places = {str(n): {"block": 0, "kind": kind} for n, (kind, *_) in enumerate(parts)}
    return where.reading(where.rows(tensors, places), whose).replace("\u00a0", " ")


def test_the_sentence_is_computed_from_the_rows():
    assert told(("down", 50.0, 3.0), ("up", 21.0, 1.0), ("q", 22.0, 1.0), ("norm", 7.0, 9.0)) == (
        "MLP projections hold 71 % of the core's squared norm, attention 22 %, norms 7 %; "
        "on average an MLP weight moves 2.00 times as far as one of attention."
    )
    assert told(("qkv", 3.0, 1.0), whose="change") == (
        "Attention holds 100 % of the change's squared norm."
    )
    assert told(("a kind of its own", 1.0, 1.0), ("head", 1e-9, 1.0)) == (
        "Other modules hold >99.9 % of the core's squared norm, embeddings <0.1 %."
    )
    assert told(("q", 0.0, 0.0), ("down", 0.0, 0.0)) == "The core moves nothing."


@given(models)
def test_every_change_has_a_sentence(model):
    sentence = where.reading(where.rows(*split(model)), "change")
    assert sentence.endswith(".")
    assert "nan" not in sentence and "None" not in sentence


# ---- real weights --------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_mean_of_a_change_is_that_of_its_full_tensor(data):
    """In every encoding: what where.json is made of agrees with plain torch."""
    shape = data.draw(st.tuples(st.integers(0, 9), st.integers(0, 9)))
    change = data.draw(changes(shape))
    full = change.dense().double()
    expected = full.abs().mean().item() if full.numel() else 0.0
    assert change.mean_magnitude == pytest.approx(expected, rel=1e-6)


@dataclass(frozen=True)
class Mixed:
    """Another encoding for each tensor in turn, half of them untouched; parts beside it."""

    parts: bool = False

    def delta(self, model, edits):
        random = torch.Generator().manual_seed(0)
        found = {}
        for number, file in enumerate(model.weights):
            values = 0.01 * torch.randn(model.weights.shape(file), generator=random)
            if values.ndim == 2 and number % 2:
                a = torch.randn((3, values.shape[1]), generator=random)
                found[file] = LowRank(values[:, :3].contiguous(), a, 0.5)
            elif number % 4 == 0:
                found[file] = Dense(values) if number % 8 else mask(values, values > 0)
        delta = Delta.from_changes(found)
        if self.parts:
            file = next(iter(found))
            size = found[file].dense().numel()
            old = {"mean": 2.0, "squared_norm": 8.0 * size, "changed": size, "size": size}
            delta.provenance["parts"] = {"old": {file: old}, "new": {}}
        return delta


@pytest.mark.parametrize(
    "made", [("llama", "bfloat16"), ("gpt2", "float32"), ("gpt_neox", "float32")]
)
def test_an_update_is_located_as_a_count_by_hand_says(worlds, tmp_path, made):
    world = worlds(*made)
    home = unwrite.open(tmp_path / "home", base=world.folder)
    update = home.update(world.edits[:1], Mixed())
    shown = home.show(update.id)
    weights, delta = unwrite.load(world.folder).weights, update.delta
    assert set(home.base.places) == set(weights)
    total = sum(delta[name].squared_norm for name in delta)
    assert {(row["block"], row["kind"]) for row in shown["where"]} == {
        (place["block"], place["kind"]) for place in home.base.places.values()
    }
    for row in shown["where"]:
        here = [
            name
            for name, place in home.base.places.items()
            if (place["block"], place["kind"]) == (row["block"], row["kind"])
        ]
        moved = torch.cat(
            [
                (delta[n].dense() if n in delta else torch.zeros(weights.shape(n))).flatten()
                for n in here
            ]
        ).double()
        held = torch.cat([weights[name].flatten() for name in here]).double()
        assert row["size"] == moved.numel()
        assert row["changed"] == sum(delta[name].changed for name in here if name in delta)
        assert row["selected"] == row["changed"] / row["size"]
        assert row["mean"] == pytest.approx(moved.abs().mean().item(), rel=1e-6, abs=1e-12)
        assert row["share"] == pytest.approx((moved.norm() ** 2 / total).item(), rel=1e-6)
        expected = (moved.norm() / held.norm()).item()
        assert row["relative"] == (pytest.approx(expected, rel=1e-6) if held.any() else None)
    assert list(shown["kinds"]) == ["change"]
    same_rows(shown["kinds"]["change"], where.by_kind(shown["where"]))
    assert shown["parts"] == {}
    assert shown["reading"] == where.reading(shown["where"], "change")


def test_parts_of_a_method_are_located_beside_its_own_delta(worlds, tmp_path):
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    update = home.update(worlds().edits[:1], Mixed(parts=True))
    shown = home.show(update.id)
    assert list(shown["kinds"]) == ["old", "new", "core"]
    assert list(shown["parts"]) == ["old", "new"]
    (moved,) = [row for row in shown["parts"]["old"] if row["changed"]]
    assert moved["share"] == 1.0
    assert moved["mean"] * moved["size"] == pytest.approx(2.0 * moved["changed"])
    assert sum(row["changed"] for row in shown["parts"]["new"]) == 0
    assert [row["block"] for row in shown["parts"]["old"]] == [r["block"] for r in shown["where"]]
    assert "core's squared norm" in shown["reading"]


def test_showing_reads_no_tensors_and_trusts_no_edited_numbers(worlds, tmp_path):
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    update = home.update(worlds().edits[:1], Mixed())
    shown = home.show(update.id)
    for shard in (update.folder / "delta").glob("*.safetensors"):
        shard.unlink()
    assert home.show(update.id) == shown
    path = update.folder / "where.json"
    path.write_text(path.read_text().replace('"changed": ', '"changed": 1', 1))
    with pytest.raises(DamagedFile, match=r"where\.json is damaged"):
        home.show(update.id)
    assert any("where.json" in problem for problem in home.verify())


def test_homes_of_early_versions_are_read(worlds, tmp_path):
    """Without sizes and norms in base.json, and with updates that have no where.json."""
    new = unwrite.open(tmp_path / "new", base=worlds().folder)
    update = new.update(worlds().edits[:1], Mixed())
    known = {row["block"]: row for row in new.show(update.id)["where"] if row["kind"] == "down"}

    old = tmp_path / "old"
    shutil.copytree(new.folder, old)
    (old / "updates" / update.id / "where.json").unlink()
    content = json.loads((old / "base.json").read_text())
    for place in content["places"].values():
        del place["size"], place["squared_norm"]
    write_json(old / "base.json", content)
    (old / "ledger.jsonl").unlink()
    lines = [
        {key: value for key, value in entry.items() if key not in ("n", "previous", "sha256")}
        for entry in new.ledger.entries
    ]
    lines[0]["base"] = {**lines[0]["base"], "sha256": sha256_file(old / "base.json")}
    lines[1]["files"] = {k: v for k, v in lines[1]["files"].items() if k != "where.json"}
    ledger = Ledger.create(old / "ledger.jsonl", lines[0])
    ledger.append(lines[1])

    home = unwrite.open(old)
    assert home.verify() == []
    for row in home.show(update.id)["where"]:
        assert row["relative"] is None
        if row["kind"] == "down":
            assert row["share"] == known[row["block"]]["share"]
            assert row["mean"] is None or row["changed"] == 0
    again = home.update(worlds().edits[1:2], Mixed())
    rows = [row for row in home.show(again.id)["where"] if row["changed"]]
    assert all(row["mean"] > 0 and row["relative"] is None for row in rows)


def test_a_base_with_numbers_that_are_none_can_still_be_described(world):
    """An infinite weight has no norm, and infinity is not JSON."""
    path = world.folder / "model.safetensors"
    content = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    content[name][0, 0] = float("inf")
    save_file(content, path, metadata={"format": "pt"})
    from unwrite.pretrained import resolve

    base = Base.describe(resolve(world.folder))
    assert base.places[name]["squared_norm"] is None
    other = "model.layers.1.mlp.down_proj.weight"
    assert base.places[other]["squared_norm"] == pytest.approx(
        content[other].double().pow(2).sum().item()
    )
