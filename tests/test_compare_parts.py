"""The parts of a comparison by themselves: plans, statistics, reference rows, meters."""

import contextlib
import itertools
import math
import mmap
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from comparing import SHORT, Thinned
from hypothesis import given
from hypothesis import strategies as st

import unwrite
from unwrite import grid
from unwrite.bootstrap import difference, front, interval, pooled, sums_by_edit
from unwrite.change import Dense, mask
from unwrite.delta import Delta
from unwrite.errors import BadSetting
from unwrite.grid import EditSet, Plan, Protocol
from unwrite.measuring import Meter
from unwrite.reference import (
    NAMES,
    InContext,
    RandomDelta,
    RandomMask,
    _shares,
    is_plain,
    references,
)
from unwrite.scores import ROLES, score

# ---- methods as text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label", "method"),
    [
        ("full-ft", "full-ft", unwrite.FullFT()),
        ("ft", "ft", unwrite.FullFT()),
        ("full-ft:lr=1e-3:epochs=2", "full-ft:lr=1e-3:epochs=2", unwrite.FullFT(lr=1e-3, epochs=2)),
        ("fast=full-ft:lr=1e-3", "fast", unwrite.FullFT(lr=1e-3)),
        ("a=b=full-ft", "a=b", unwrite.FullFT()),
        ("p=full-ft:protect=x y,z", "p", unwrite.FullFT(protect=("x y", "z"))),
        ("q=full-ft:protect=a=b", "q", unwrite.FullFT(protect=("a=b",))),
        ("two words=lora:targets=q,k", "two words", unwrite.LoRA(targets=("q", "k"))),
        (
            "n=f-learning:learn=lora:learn.rank=2",
            "n",
            unwrite.FLearning(learn=unwrite.LoRA(rank=2)),
        ),
    ],
)
def test_text_names_a_method(text, label, method):
    assert grid.from_text(text) == (label, method)


@pytest.mark.parametrize(
    "text", ["", ":", "full-ft:", "full-ft:lr", "full-ft:=1", "full-ft:lr=1:lr=2", "a=:lr=1", "="]
)
def test_text_that_names_no_method_is_refused(text):
    with pytest.raises(BadSetting):
        grid.from_text(text)


def test_labels_are_kept_apart():
    found = grid.named_methods(["full-ft", "full-ft:lr=1e-3", unwrite.LoRA()])
    assert list(found) == ["full-ft", "full-ft:lr=1e-3", "lora"]
    assert grid.named_methods({"x": "lora:rank=2"}) == {"x": unwrite.LoRA(rank=2)}


def test_settings_are_as_json_gives_them_back():
    import json

    for method in (unwrite.FullFT(), unwrite.LoRA(), unwrite.FLearning(), Thinned()):
        settings = grid.settings(method)
        assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    endless = grid.settings(unwrite.FLearning(max_perplexity_ratio=math.inf))
    assert endless["max_perplexity_ratio"] == "inf"


# ---- plans ---------------------------------------------------------------------------------------


@pytest.fixture
def sets(worlds):
    return grid.edit_sets({"a": worlds().edits[:4], "b": worlds().edits[10:12]}, 0)


def plan_of(sets, methods, seeds=(0,), sizes=(None,), protocol=None):
    base = {"name": "toy", "fingerprint": "f" * 64}
    return Plan.of(base, protocol or Protocol(), methods, sets, seeds, sizes)


def test_a_plan_survives_being_written(sets, tmp_path):
    plan = plan_of(sets, {"x": SHORT, "y": Thinned()}, seeds=(0, 1), sizes=(1, None))
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan
    assert grid.is_run(tmp_path)


def test_no_two_cells_have_one_folder(sets):
    methods = {"x": SHORT, "X": SHORT, "x y": SHORT, "x-y": SHORT, "x/y": SHORT, "é": SHORT}
    plan = plan_of(sets, methods, seeds=(0, 1, 2), sizes=(1, 2, None))
    names = {cell.name.lower() for cell in plan.cells}
    assert len(names) == len(plan.cells) == 6 * 3 * 3 * 2
    assert all(name == grid.slug(name) for name in names)


def test_the_seed_reaches_every_part_of_a_method(sets):
    method = unwrite.FLearning(forget=unwrite.LoRA(), learn=unwrite.FullFT())
    cells = plan_of(sets, {"x": method}, seeds=(7,)).cells
    assert cells[0].settings["forget"]["seed"] == cells[0].settings["learn"]["seed"] == 7
    assert cells[0].seed == 7


def test_a_method_without_a_seed_has_one_cell(sets):
    cells = plan_of(sets, {"x": Thinned()}, seeds=(3, 4, 5)).cells
    assert [cell.seed for cell in cells] == [None, None]  # one on each edit set


def test_a_cell_depends_on_all_that_its_result_depends_on(sets, worlds):
    def name(one=sets, methods=None, **how):
        return plan_of(one, methods or {"x": SHORT}, **how).cells[0].name

    other = grid.edit_sets({"a": worlds().edits[1:4]}, 0)
    names = [
        name(),
        name(other),
        name(methods={"x": unwrite.FullFT(lr=1e-3)}),
        name(seeds=(1,)),
        name(sizes=(2,)),
        name(protocol=Protocol(exact=False)),
        name(protocol=Protocol(mode="single")),
        name(protocol=Protocol(start="planted", planting=grid.settings(SHORT))),
    ]
    assert len(set(names)) == len(names)
    assert name() == name()


def test_a_plan_grows_without_moving_what_is_there(sets, tmp_path):
    first = plan_of(sets[:1], {"x": SHORT})
    second = plan_of(sets, {"y": Thinned(), "x": SHORT}, seeds=(0, 1))
    both = first.extended(second, tmp_path)
    assert both.cells[: len(first.cells)] == first.cells
    assert {cell.name for cell in both.cells} == {cell.name for cell in second.cells}
    assert list(both.methods) == ["x", "y"]
    assert both.extended(second, tmp_path) == both.extended(first, tmp_path) == both


def test_edit_sets_are_labelled_by_their_files(worlds, tmp_path):
    for place in ("one/set.jsonl", "two/set.jsonl", "other.jsonl"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        unwrite.write_edits(tmp_path / place, worlds().edits[:2])
    sources = [tmp_path / "other.jsonl", "atlas:capital"]
    assert [one.label for one in grid.edit_sets(sources, 0)] == ["other", "atlas:capital"]
    twins = [tmp_path / "one/set.jsonl", tmp_path / "two/set.jsonl"]
    assert [one.label for one in grid.edit_sets(twins, 0)] == [str(one) for one in twins]
    with pytest.raises(unwrite.UnwriteError, match="twice"):
        grid.edit_sets([twins[0], twins[0]], 0)


def test_records_are_the_first_after_the_offset(worlds):
    (one,) = grid.edit_sets(list(worlds().edits[:6]), 2)
    assert one.first(3) == tuple(worlds().edits[2:5])
    assert len(one.first(100)) == 4
    assert EditSet("x", "", one.edits).hash_of(4) == one.hash_of(None) != one.hash_of(3)


# ---- statistics ----------------------------------------------------------------------------------


def rows_of(shares, role="reliability"):
    """Observations: for each edit a list of how many of its ten answer tokens match."""
    return [
        {
            "edit": f"e{number}",
            "role": role,
            "prompt": f"{number} {index}",
            "target": "x",
            "target_tokens": 10,
            "matched_tokens": matched,
            "predicted": [0] * 10,
            "text": "x" if matched > 5 else "y",
        }
        for number, probes in enumerate(shares)
        for index, matched in enumerate(probes)
    ]


probes = st.lists(st.integers(0, 10), min_size=1, max_size=3)
tables = st.lists(probes, min_size=1, max_size=12)


@given(tables)
def test_one_seed_gives_the_scores_of_its_cell(shares):
    rows = rows_of(shares)
    expected = score(rows, rows)["reliability"]
    found = interval(pooled([sums_by_edit(rows, rows)["reliability"]]))
    assert found == pytest.approx(vars(expected), abs=1e-12)


@given(tables)
def test_the_same_seed_twice_is_no_new_evidence(shares):
    rows = rows_of(shares)
    sums = sums_by_edit(rows, rows)["reliability"]
    assert interval(pooled([sums, sums])) == pytest.approx(interval(sums), abs=1e-12)


@given(tables)
def test_nothing_differs_from_itself(shares):
    rows = rows_of(shares)
    sums = sums_by_edit(rows, rows)["reliability"]
    found = difference(sums, sums)
    assert found["n"] == len(shares)
    assert all(value == 0 for key, value in found.items() if key != "n")


def test_differences_are_the_differences_of_means_and_turn_with_the_sides():
    one, two = (
        sums_by_edit(rows, rows)["reliability"]
        for rows in (rows_of([[3], [7, 1], [9]]), rows_of([[5], [2, 2], [10]]))
    )
    there, back = difference(one, two), difference(two, one)
    assert there["token"] == pytest.approx(0.5 - 0.475)
    assert there["token"] == -back["token"]
    assert there["token_low"] == pytest.approx(-back["token_high"])
    assert there["token_low"] <= there["token"] <= there["token_high"]


def test_pairing_finds_a_small_difference_among_large_ones():
    base = np.random.default_rng(0).integers(0, 9, 60)
    one, two = (
        sums_by_edit(rows, rows)["reliability"]
        for rows in (rows_of([[int(x) + 1] for x in base]), rows_of([[int(x)] for x in base]))
    )
    assert difference(one, two)["token_low"] > 0.09  # each edit is better by a tenth
    assert interval(one)["token_low"] < interval(two)["token_high"]  # unpaired, one cannot tell


def test_roles_without_probes_have_no_numbers():
    rows = rows_of([[1]])
    found = {role: interval(sums) for role, sums in sums_by_edit(rows, rows).items()}
    assert set(found) == set(ROLES)
    assert found["portability"] == interval({}) != found["reliability"]
    assert found["portability"]["n"] == 0
    assert found["portability"]["token"] is None
    assert difference({}, {})["token"] is None


def test_rows_without_text_have_no_exact_scores():
    rows = [{**row, "text": None} for row in rows_of([[3], [4]])]
    found = interval(sums_by_edit(rows, rows)["reliability"])
    assert found["token"] == pytest.approx(0.35)
    assert found["exact"] is found["exact_low"] is found["exact_high"] is None


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=2), st.tuples(*[st.integers(0, 3)] * 3), max_size=8
    )
)
def test_the_front_is_what_nothing_beats(points):
    found = front(points)
    for name, mine in points.items():
        beaten = any(
            all(a >= b for a, b in zip(other, mine, strict=True))
            and any(a > b for a, b in zip(other, mine, strict=True))
            for other in points.values()
        )
        assert (name in found) == (not beaten)
    assert bool(found) == bool(points)


# ---- reference rows ------------------------------------------------------------------------------


def test_each_masking_method_gets_its_random_mask():
    found = references(NAMES, {"a": Thinned(), "b": SHORT, "c": Thinned()}, "batch")
    assert list(found) == [
        "[no change]",
        "[in context]",
        "[random mask of a]",
        "[random mask of c]",
        "[random delta]",
        "[full-ft until learned]",
    ]
    assert found["[random mask of a]"].like == Thinned()


def test_plain_fine_tuning_is_not_run_twice():
    assert "[full-ft until learned]" not in references(NAMES, {"mine": unwrite.FullFT()}, "batch")
    seeded = references(NAMES, {"mine": unwrite.FullFT(seed=9)}, "batch")
    assert "[full-ft until learned]" not in seeded
    assert "[full-ft until learned]" in references(NAMES, {"mine": SHORT}, "batch")
    assert is_plain(grid.settings(unwrite.FullFT(seed=3)))
    assert not is_plain(grid.settings(SHORT))
    # A random delta needs it to be as large.
    assert list(references(["random-delta"], {"x": SHORT}, "batch")) == [
        "[random delta]",
        "[full-ft until learned]",
    ]
    assert references([], {"x": SHORT}, "batch") == {}


@pytest.mark.parametrize("mode", ["sequential", "single"])
def test_random_rows_belong_to_one_update(mode):
    assert list(references(NAMES, {"x": Thinned()}, mode)) == [
        "[no change]",
        "[in context]",
        "[full-ft until learned]",
    ]


@given(st.dictionaries(st.text(max_size=2), st.integers(1, 50), min_size=1, max_size=6), st.data())
def test_shares_are_whole_and_proportional(sizes, data):
    total = sum(sizes.values())
    count = data.draw(st.integers(0, total))
    found = _shares(sizes, count)
    assert sum(found.values()) == count
    for name, size in sizes.items():
        share = found.get(name, 0)
        assert share <= size
        assert abs(share - count * size / total) < 1


def a_delta():
    random = torch.Generator().manual_seed(1)
    sparse = torch.randn(30, 20, generator=random)
    sparse[:15] = 0
    return Delta.from_changes({"a": Dense(torch.randn(100, generator=random)), "b": Dense(sparse)})


@pytest.mark.parametrize("kept", [0, 1, 37, 400, 10_000])
def test_a_random_mask_moves_exactly_so_many(kept):
    values = a_delta()
    made = RandomMask(like=SHORT).made(values, kept)
    assert sum(made[name].changed for name in made) == min(kept, 400)
    for name in made:
        dense, full = made[name].dense(), values[name].dense()
        assert torch.equal(dense[dense != 0], full[dense != 0])
    again = RandomMask(like=SHORT).made(values, kept)
    other = RandomMask(like=SHORT, seed=1).made(values, kept)
    assert all(torch.equal(made[name].dense(), again[name].dense()) for name in made)
    if kept == 37:
        assert any(not torch.equal(made[name].dense(), other[name].dense()) for name in made)


def test_a_random_mask_is_fair_to_every_moved_element():
    values = a_delta()
    hits = sum(
        (RandomMask(like=SHORT, seed=s).made(values, 40)["b"].dense() != 0) for s in range(200)
    )
    assert hits[:15].sum() == 0  # what full fine-tuning does not move is not drawn
    drawn = hits[15:].float()
    assert drawn.mean() == pytest.approx(20.0, abs=1.0)
    assert drawn.max() < 45  # binomial: mean 20, deviation 4.2


def test_a_random_delta_has_the_norms_and_no_more_in_common():
    values = a_delta()
    facts = values.facts()
    made = RandomDelta().made(facts)
    for name in facts:
        ours, theirs = made[name].dense(), values[name].dense()
        assert ours.norm().item() == pytest.approx(theirs.norm().item(), rel=1e-5)
        cosine = torch.dot(ours.flatten(), theirs.flatten()) / ours.norm() / theirs.norm()
        assert abs(cosine) < 0.4
    none = Delta.from_changes({"z": Dense(torch.zeros(3))})
    assert len(RandomDelta().made(none.facts())) == 0


def test_low_rank_and_masked_changes_can_be_imitated():
    sparse = torch.zeros(10, 10)
    sparse[2, 3] = 2.0
    values = Delta.from_changes({"m": mask(sparse, sparse != 0)})
    made = RandomMask(like=SHORT).made(values, 5)
    assert torch.equal(made["m"].dense(), sparse)
    assert RandomDelta().made(values.facts())["m"].squared_norm == pytest.approx(4.0)


def test_a_fact_is_told_as_a_sentence(worlds):
    from unwrite.observe import Question

    edit = unwrite.Edit("The capital is", new="Oslo.", id="1")
    (told,) = InContext().told([edit], [Question("1", "locality", "Rome is in", "Italy")])
    assert told == Question("1", "locality", "The capital is Oslo. Rome is in", "Italy")


# ---- meters --------------------------------------------------------------------------------------


def test_a_meter_adds_up_what_it_is_told(monkeypatch):
    from unwrite import measuring

    ticks = itertools.count()
    monkeypatch.setattr(measuring, "_now", lambda: float(next(ticks)))
    meter = Meter()
    for kind in ("train", "observe", "train"):
        with meter.of(kind):
            pass
    with pytest.raises(ValueError, match="x"), meter.of("train"):
        raise ValueError("x")
    assert meter.seconds == {"train": 3.0, "arithmetic": 0.0, "observe": 1.0}


@contextlib.contextmanager
def resident(size):
    """So many bytes held, and given back to the system for certain, as no allocator promises."""
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1
        yield


def test_a_peak_is_that_of_its_own_work():
    meter = Meter()
    small = meter.memory()["host"]
    if small is None:
        pytest.skip("this system cannot count peaks anew")
    with resident(128 << 20):
        pass
    assert meter.memory()["host"] >= small + (64 << 20)
    assert Meter().memory()["host"] <= small + (64 << 20)


def test_a_system_that_cannot_count_anew_gives_no_peak(monkeypatch):
    from pathlib import Path

    def refuse(self, text):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert Meter().memory()["host"] is None


def test_a_system_that_only_pretends_to_count_anew_gives_no_peak(monkeypatch):
    from unwrite import measuring

    # As in CI's sandbox: the request is taken, and the peak stays that of the process's life.
    monkeypatch.setattr(measuring, "_host_peak", lambda: 700 << 20)
    assert Meter().memory()["host"] is None


# ---- a method of somebody else -------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """A method with a field that JSON does not know."""

    field: object = object()
    name: ClassVar[str] = "odd"

    def delta(self, model, edits):
        return Delta.nothing()


def test_a_method_that_cannot_be_written_down_is_refused():
    with pytest.raises(BadSetting, match="written down"):
        grid.named_methods([Odd()])
    with pytest.raises(BadSetting, match="frozen dataclass"):

        class Plain:
            def delta(self, model, edits):
                return Delta.nothing()

        grid.named_methods([Plain()])
