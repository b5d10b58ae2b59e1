"""The study of ``auto``: resumable, right in its arithmetic, and it tells of probes it protects."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import unwrite
from benchmarks import (
    auto_ingredients,
    auto_sequence,
    auto_study,
    auto_tables,
    auto_time,
    method_defaults,
    subject_guesses,
)
from benchmarks.planted_study import rows_of
from unwrite import Edit, FullFT
from unwrite.edits import Probe, write_edits
from unwrite.methods.auto import Auto
from unwrite.neighbours import bundled_subjects
from unwrite.training import learned, new_pairs


@pytest.fixture
def options(tmp_path, monkeypatch, worlds):
    monkeypatch.setattr(auto_study, "RUNS", tmp_path / "runs.jsonl")
    monkeypatch.setattr(auto_study, "drawn", lambda *_: list(worlds().edits[:3]))
    monkeypatch.setattr(method_defaults, "PLANTING", FullFT(epochs=1, until="epochs", lr=1e-4))
    variants = {
        "full-ft": {"method": "full-ft", "epochs": "2"},
        "auto": {"method": "auto", "write": "false", "own_prompts": "0", "epochs": "2"},
    }
    monkeypatch.setattr(auto_study, "VARIANTS", variants)
    monkeypatch.setattr(auto_study, "NAMES", tuple(variants))
    return Namespace(base="smollm2-135m", split="development", facts=9, only=None, exact=True)


def test_finished_runs_are_not_repeated(options, worlds):
    model = unwrite.load(worlds().folder)
    options.only = "full-ft"
    auto_study.run_missing(model, "counterfact", 0, options)
    (first,) = auto_study.lines(auto_study.RUNS)
    options.only = None
    auto_study.run_missing(model, "counterfact", 0, options)
    auto_study.run_missing(model, "counterfact", 0, options)
    runs = list(auto_study.lines(auto_study.RUNS))
    assert runs[0] == first
    assert first["facts"] == 3  # as many as there are
    assert [run["variant"] for run in runs] == ["full-ft", "auto"]
    (table,) = auto_study.summary(runs)
    assert [row["variant"] for row in table["rows"]] == ["full-ft", "auto"]
    lines = auto_tables.lines([table], "development")
    assert len(lines) == 2 + 2
    assert auto_tables.lines([table], "test") == ["*Not measured yet.*"]
    assert auto_tables.lines([table], "development", "gemma-3-270m") == ["*Not measured yet.*"]
    assert [run["exact"].keys() == run["token"].keys() for run in runs] == [True, True]
    exact = auto_tables.exact_lines([table | {"split": "test"}])
    assert exact[2].startswith("| 3 CounterFact, planted | full-ft | 1 | ")
    assert auto_tables.exact_lines([table]) == ["*Not measured yet.*"]


def test_a_row_is_the_mean_over_seeds_with_its_spread():
    def run(seed, low):
        token = dict.fromkeys(("reliability", "generality", "old_recall"), 1.0) | {"locality": low}
        rest = {"perplexity_ratio": 1.0, "seconds": 2.0, "protected_probes": 1}
        return {"seed": seed, "token": token, **rest}

    row = auto_study.row("auto", [run(0, 1.0), run(1, 0.5)])
    assert (row["locality"], row["seeds"], row["protected_probes"]) == (0.75, 2, 2)
    assert (row["lowest"], row["highest"]) == (pytest.approx(0.75), 1.0)
    assert row["harmonic_mean"] == pytest.approx(0.875)
    assert json.loads(json.dumps(row)) == row


def test_methods_are_held_against_auto_on_the_same_draws():
    def run(variant, seed, share):
        token = dict.fromkeys(auto_study.ROLES, share)
        rest = {"perplexity_ratio": 1.0, "protected_probes": 0}
        draw = {"base": "smollm2-135m", "split": "test", "kind": "atlas", "facts": 50}
        return draw | {"variant": variant, "seed": seed, "token": token, **rest}

    runs = [run("auto", seed, share) for seed, share in enumerate((0.9, 0.5, 0.7))]
    runs += [run("memit", 0, 0.8), run("memit", 1, 0.6), run("auto, firmly", 2, 0.6)]
    (table,) = auto_study.summary(runs)
    told = {one["variant"]: auto_tables.beside_auto(one) for one in table["rows"]}
    assert told == {"auto": "", "memit": "+0.0 (-10.0 to +10.0)", "auto, firmly": "-10.0"}
    (alone,) = auto_study.summary(runs[3:])
    assert {auto_tables.beside_auto(one) for one in alone["rows"]} == {""}
    tables = auto_study.summary([*runs, *(one | {"kind": "zsre"} for one in runs)])
    assert [one["rows"] for one in tables] == [table["rows"]] * 2


def test_times_are_held_against_those_of_the_same_draw():
    runs = [
        {"kind": "atlas", "seed": 0, "seconds": {"full-ft": 1.0, "auto": 2.0}},
        {"kind": "atlas", "seed": 1, "seconds": {"full-ft": 2.0, "auto": 8.0}},
        {"kind": "zsre", "seed": 0, "seconds": {"full-ft": 4.0, "auto": 4.0}},
    ]
    rows = auto_time.summary(runs)
    assert [(one["kind"], one["draws"]) for one in rows] == [("atlas", 2), ("zsre", 1)]
    assert rows[0]["over_plain"] == {"median": 3.0, "min": 2.0, "max": 4.0}
    shown = auto_tables.time_lines({"rows": rows})
    assert shown[2:] == [
        "| 50 atlas, known to the model | 2 | x 3.0 (2.0 to 4.0) |",
        "| 100 zsRE, planted | 1 | x 1.0 (1.0 to 1.0) |",
    ]
    assert auto_tables.time_lines(None) == ["*Not measured yet.*"]


def test_probes_that_are_protected_are_counted():
    edit = Edit("The home of Ada Blau is", "Rome", subject="Ada Blau")
    every = [f"The home of {subject} is" for subject in bundled_subjects()]
    method = Auto()
    assert auto_study.overlap(method, [edit], every) == method.parts[0].neighbours
    assert auto_study.overlap(method, [edit], ["The home of Ada Blau is"]) == 0
    assert auto_study.overlap(FullFT(neighbours=9), [edit], every) == 0
    judged = replace(edit, bystanders=(Probe(every[0]),))
    assert auto_study.overlap(method, [judged], every) == method.parts[0].neighbours


def test_other_questions_put_a_subject_into_the_prompts_of_unlike_edits():
    edits = [
        Edit("The home of Ada is", "Rome", old="Oslo", subject="Ada"),
        Edit("Bram was born in", "Oslo", old="Bonn", subject="Bram"),  # shares an answer with Ada
        Edit("Cleo plays the", "harp", old="drum", subject="Cleo"),
        Edit("Dirk, Dirk is a", "cook", old="smith", subject="Dirk"),  # stands twice
        Edit("It is", "cold", old="warm"),
    ]
    assert sorted(auto_study.other_questions(edits)) == [
        ("Ada plays the", "Rome"),
        ("Bram plays the", "Oslo"),
        ("Cleo was born in", "harp"),
        ("Dirk plays the", "cook"),
        ("Dirk was born in", "cook"),
        ("The home of Cleo is", "harp"),
        ("The home of Dirk is", "cook"),
    ]


def test_spill_is_the_share_of_other_questions_that_get_the_new_answer(worlds):
    model = unwrite.load(worlds().folder)
    prompts = ["the job of ada", "the home of bram", "the job of cleo"]
    said = model.generate(prompts, 1)
    assert auto_study.spill(model, list(zip(prompts, said, strict=True))) == 1.0
    other = ["cat" if one != "cat" else "rain" for one in said[:1]]
    asked = list(zip(prompts, [*other, *said[1:]], strict=True))
    assert auto_study.spill(model, asked) == pytest.approx(2 / 3)


def test_a_sequence_tells_what_is_left_of_earlier_updates(tmp_path, monkeypatch, worlds):
    world = worlds()
    monkeypatch.setitem(
        auto_sequence.ASKED, "development", {"full-ft": "full-ft:epochs=40:lr=1e-3"}
    )
    monkeypatch.setattr(auto_sequence, "DATA", {"counterfact": ("edits.jsonl", 0)})
    write_edits(tmp_path / "edits.jsonl", world.edits[:4])
    options = Namespace(
        data=tmp_path,
        work=tmp_path / "work",
        base=str(world.folder),
        only=None,
        split="development",
        updates=2,
        edits=2,
        seeds=1,
    )
    auto_sequence.run(options)
    (row,) = auto_sequence.summary(rows_of(options.work, ["full-ft"]))
    (whole,) = rows_of(options.work, ["full-ft"])
    first, second = whole["steps"]
    assert (row["updates"], row["seeds"]) == (2, 1)
    news = [step["new"]["reliability"]["token"] for step in (first, second)]
    assert row["learned"] == pytest.approx(sum(news) / 2)
    assert row["retained"] == second["reliability_by_chunk"][0]["token"]
    assert row["perplexity_ratio"] == second["perplexity"] / whole["perplexity"]["before"]
    assert auto_tables.sequence_lines([row])[2].startswith("| full-ft | 2 | ")


def test_subjects_that_are_not_told_are_guessed_or_not_known(worlds):
    model, edits = unwrite.load(worlds().folder), worlds().edits[:3]
    guessing = auto_ingredients.WithoutSubjects(trained_auto())
    untold = [replace(edit, subject=None) for edit in edits]
    assert same(guessing.delta(model, edits), trained_auto().delta(model, untold))
    assert auto_ingredients.INGREDIENTS["auto, subjects guessed"].of.guess_subjects
    assert not auto_ingredients.INGREDIENTS["auto, subjects unknown"].of.guess_subjects


def test_guesses_are_judged_by_the_subject_of_the_record():
    edits = [
        Edit("The capital of France is", "Lyon", subject="France"),
        Edit("Who wrote The Lord of Peaks?", "Ann", subject="Lord of Peaks"),
        Edit("Isoetes sinensis's status is", "safe", subject="Isoetes sinensis"),
        Edit("In Spain, Rome is", "far", subject="Rome"),
        Edit("The home of Ben is", "far"),
    ]
    found = subject_guesses.counted(edits)
    assert found == {"prompts": 4, "guessed": 3, "right": 1, "ends_there": 2}
    rows = [{"split": "test", "kind": "atlas"} | found]
    assert auto_tables.subject_lines({"rows": rows})[2:] == ["| atlas | 4 | 75.0 | 33.3 | 66.7 |"]


def trained_auto(**settings):
    return Auto(write=False, own_prompts=0, neighbours=0, epochs=2, **settings)


def test_nothing_forgotten_first_is_auto_alone(worlds):
    model, edits = unwrite.load(worlds().folder), worlds().edits[:3]
    alone = trained_auto().delta(model, edits)
    before = auto_ingredients.ForgetFirst(strength=0.0, then=trained_auto())
    after = auto_ingredients.ForgetFirst(strength=0.3, then=trained_auto())
    assert same(before.delta(model, edits), alone)
    assert not same(after.delta(model, edits), alone)


def test_what_is_in_conflict_is_a_part_of_what_auto_changes(worlds):
    model, edits = unwrite.load(worlds().folder), worlds().edits[:3]
    whole = trained_auto().delta(model, edits)
    part = auto_ingredients.InConflict(of=trained_auto()).delta(model, edits)
    kept = 0
    for name in part:
        values = part[name].dense()
        inside = values != 0
        kept += int(inside.sum())
        assert torch.equal(values[inside], whole[name].dense()[inside])
    assert 0 < kept < sum(one.size for one in whole.facts().values())


def test_a_mean_over_one_seed_is_that_seed(worlds):
    model, edits = unwrite.load(worlds().folder), worlds().edits[:3]
    one = trained_auto(seed=0).delta(model, edits)
    mean = auto_ingredients.MeanOfSeeds(seeds=1, of=trained_auto())
    assert same(mean.delta(model, edits), one)
    other = trained_auto(seed=1000).delta(model, edits)
    both = auto_ingredients.MeanOfSeeds(seeds=2, of=trained_auto()).delta(model, edits)
    for name in both:
        expected = (one[name].dense() + other[name].dense()) / 2
        torch.testing.assert_close(both[name].dense(), expected)


def test_a_mean_of_writings_is_trained_where_answers_are_wrong(worlds, monkeypatch):
    model, edits = unwrite.load(worlds().folder), worlds().edits[:3]
    asked = []

    def written(self, model, edits):
        asked.append((self.seeds, self.of.epochs, self.of.stop))
        return FullFT(lr=1e-3, epochs=60).delta(model, edits[:1])

    monkeypatch.setattr(auto_ingredients.MeanOfSeeds, "delta", written)
    method = Auto(lr=1e-3, neighbours=0, stop=0.2)
    first = written(auto_ingredients.MeanOfSeeds(), model, edits)
    with model.shifted(first):
        assert not all(learned(model, new_pairs(edits)))
    delta = auto_ingredients.MeanOfWritings(2, method).delta(model, edits)
    assert asked[-1] == (2, 0, 0.2)
    with model.shifted(delta):
        assert all(learned(model, new_pairs(edits)))


def same(one, other):
    return set(one) == set(other) and all(
        torch.equal(one[name].dense(), other[name].dense()) for name in one
    )
