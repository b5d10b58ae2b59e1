"""Laws of comparisons: same start, same questions, nothing computed twice, nothing left changed."""

import json
from dataclasses import replace

import pytest
import torch
from comparing import LEARN, SHORT, Counted, Drawn, Thinned, files, steady, unknown_old

import unwrite
from unwrite import bench as benches
from unwrite import cell as cells
from unwrite import comparison
from unwrite.base import Base
from unwrite.errors import BadEdits, BadSetting, HomeBusy, TrainingFailed
from unwrite.files import only_writer, read_json, read_jsonl
from unwrite.methods.auto import Auto
from unwrite.model import Model
from unwrite.reference import NAMES
from unwrite.scores import ROLES
from unwrite.start import Start


def compare(world, out, methods, edits=None, **options):
    options = {"references": (), **options}
    return unwrite.compare(world.folder, edits or list(world.edits[:4]), methods, out, **options)


def row_of(found, **wanted):
    (row,) = [one for one in found.rows if all(one[key] == value for key, value in wanted.items())]
    return row


def cell_file(found, row, name):
    return found.folder / "cells" / row["id"] / name


@pytest.fixture(scope="module")
def grid(worlds, tmp_path_factory):
    """A comparison with everything in it; read-only."""
    world = worlds()
    return unwrite.compare(
        world.folder,
        {"people": world.edits[:4], "more": world.edits[10:12]},
        {"short": SHORT, "thin": Thinned()},
        tmp_path_factory.mktemp("grid") / "run",
        seeds=(0, 1),
    )


# ---- what a row says -----------------------------------------------------------------------------


def test_a_row_for_every_method_edit_set_size_and_seed(grid):
    for method, seeds in (
        ("short", (0, 1)),
        ("thin", (None,)),
        ("[no change]", (None,)),
        ("[in context]", (None,)),
        ("[full-ft until learned]", (0, 1)),
        ("[random mask of thin]", (0, 1)),
        ("[random delta]", (0, 1)),
    ):
        found = [(r["edits"], r["seed"]) for r in grid.rows if r["method"] == method]
        assert sorted(found) == sorted((e, seed) for e in ("people", "more") for seed in seeds)
    assert {row["records"] for row in grid.rows if row["edits"] == "people"} == {4}
    assert grid.failed == []


def test_a_row_has_the_fields_of_an_update(grid, worlds, tmp_path):
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    update = home.update(worlds().edits[:2], SHORT).as_json()
    for row in grid.rows:
        assert set(update) - {"unmet"} <= set(row)
        assert set(update["seconds"]) == set(row["seconds"])
        assert set(update["delta"]) == set(row["delta"])
        for side in ("before", "after"):
            assert set(row["scores"][side]) == set(ROLES)


def test_cells_measure_what_a_home_would_give_out(grid, worlds, tmp_path):
    world = worlds()
    for label, method in (("short", SHORT), ("thin", Thinned())):
        home = unwrite.open(tmp_path / label, base=world.folder)
        update = home.update(world.edits[:4], method)
        row = row_of(grid, method=label, edits="people", seed=None if label == "thin" else 0)
        assert row["fingerprint"] == update.fingerprint
        assert row["scores"] == update.as_json()["scores"]
        assert row["perplexity"] == update.perplexity
        assert row["delta"] == update.summary
        for name in ("after.jsonl", "where.json"):
            assert cell_file(grid, row, name).read_text() == (update.folder / name).read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sequential_cells_are_updates_one_after_the_other(worlds, tmp_path, dtype):
    world = worlds(dtype=dtype)
    found = compare(world, tmp_path / "run", {"a": LEARN}, mode="sequential", chunk=2)
    home = unwrite.open(tmp_path / "home", base=world.folder)
    updates = [home.update(world.edits[at : at + 2], LEARN) for at in (0, 2)]
    row = row_of(found, method="a")
    assert row["fingerprint"] == updates[1].fingerprint
    first, second = row["steps"]
    assert first["earlier"] is None
    assert first["perplexity"] == updates[0].perplexity["after"]
    assert second["perplexity"] == updates[1].perplexity["after"]
    assert first["new"]["reliability"]["token"] == 1.0  # it trains until learned
    assert second["new"]["reliability"]["token"] == 1.0
    # The last row of the retention matrix is the state at the end.
    by_chunk = [one["token"] for one in second["reliability_by_chunk"]]
    assert sum(by_chunk) / 2 == row["scores"]["after"]["reliability"]["token"]
    assert second["earlier"]["reliability"]["token"] == by_chunk[0]
    assert not (cell_file(found, row, "steps")).exists()


def test_a_method_that_keeps_earlier_edits_keeps_them_in_sequence_too(worlds, tmp_path):
    """The states of a home, also for ``auto``, which protects what earlier updates taught."""
    method = Auto(write=False, own_prompts=0, epochs=3, lr=1e-3)
    world = worlds()
    found = compare(world, tmp_path / "run", {"a": method}, mode="sequential", chunk=2)
    prints = []
    for keep in (True, False):
        home = unwrite.open(tmp_path / f"home {keep}", base=world.folder)
        one = replace(method, keep_earlier=keep)
        prints.append([home.update(world.edits[at : at + 2], one).fingerprint for at in (0, 2)][-1])
    assert row_of(found, method="a")["fingerprint"] == prints[0] != prints[1]


def test_single_edits_are_updates_of_the_same_start(worlds, tmp_path):
    world = worlds()
    found = compare(world, tmp_path / "run", {"a": LEARN}, mode="single")
    alone = []
    for number, edit in enumerate(world.edits[:4]):
        home = unwrite.open(tmp_path / str(number), base=world.folder)
        update = home.update([edit], LEARN)
        alone += read_jsonl(update.folder / "after.jsonl")
    row = row_of(found, method="a")
    after = read_jsonl(cell_file(found, row, "after.jsonl"))
    keys = ("edit", "role", "prompt", "target", "predicted", "text")
    assert [[one[key] for key in keys] for one in after] == [
        [r[key] for key in keys] for r in alone
    ]
    assert row["perplexity"]["worst"] >= row["perplexity"]["after"]


# ---- the same start for all ----------------------------------------------------------------------


def test_all_rows_start_from_the_same_answers(grid):
    for edits in ("people", "more"):
        rows = [row for row in grid.rows if row["edits"] == edits]
        assert len({row["start_fingerprint"] for row in rows}) == 1
        assert len({cell_file(grid, row, "before.jsonl").read_bytes() for row in rows}) == 1
        assert len({json.dumps(row["scores"]["before"]) for row in rows}) == 1


def test_no_change_changes_nothing(grid, worlds):
    for row in grid.rows:
        if row["method"] == "[no change]":
            assert row["scores"]["after"] == row["scores"]["before"]
            assert row["scores"]["after"]["locality"]["exact"] == 1.0
            assert row["delta"]["encoding"] == "nothing"
            assert row["delta"]["changed_fraction"] == row["delta"]["bytes"] == 0
            assert row["fingerprint"] == row["start_fingerprint"]
            assert row["perplexity"]["after"] == row["perplexity"]["before"]


def test_the_new_fact_stands_before_every_prompt(grid, worlds):
    (row,) = [r for r in grid.rows if r["method"] == "[in context]" and r["records"] == 4]
    before, after = (
        read_jsonl(cell_file(grid, row, f"{one}.jsonl")) for one in ("before", "after")
    )
    keys = ("edit", "role", "prompt", "target")
    assert [[one[key] for key in keys] for one in after] == [
        [r[key] for key in keys] for r in before
    ]
    model = Model.load(worlds().folder)
    for one in after:
        edit = next(edit for edit in worlds().edits if edit.id == one["edit"])
        said = model.generate([f"{edit.prompt} {edit.new}. {one['prompt']}"])
        assert said == [one["text"]]
    assert [one["text"] for one in before] != [one["text"] for one in after]


def test_a_random_mask_keeps_as_many_weights(grid):
    for row in grid.rows:
        if row["method"] == "[random mask of thin]":
            like = row_of(grid, method="thin", edits=row["edits"])
            assert row["delta"]["changed"] == like["delta"]["changed"] > 0
            assert row["delta"]["encoding"] == "masked"
            facts = cells.tensor_facts(cell_file(grid, row, "x").parent)
            assert facts != cells.tensor_facts(cell_file(grid, like, "x").parent)


def test_a_random_delta_is_as_large_tensor_by_tensor(grid):
    for row in grid.rows:
        if row["method"] == "[random delta]":
            like = row_of(
                grid,
                method="[full-ft until learned]",
                **{key: row[key] for key in ("edits", "seed")},
            )
            mine, theirs = (
                cells.tensor_facts(cell_file(grid, one, "x").parent) for one in (row, like)
            )
            assert set(mine) == {name for name, one in theirs.items() if one.squared_norm}
            for name, one in mine.items():
                assert one.squared_norm == pytest.approx(theirs[name].squared_norm, rel=1e-5)
            assert row["fingerprint"] != like["fingerprint"]


def test_the_order_of_methods_does_not_matter(worlds, tmp_path):
    methods = {"learn": LEARN, "thin": Thinned(), "drawn": Drawn()}
    one = compare(worlds(), tmp_path / "one", methods)
    two = compare(worlds(), tmp_path / "two", dict(reversed(methods.items())))
    for label in methods:
        first, second = row_of(one, method=label), row_of(two, method=label)
        for key in ("id", "scores", "perplexity", "delta", "fingerprint"):
            assert first[key] == second[key], label


def test_a_planted_model_knows_its_old_answers(worlds, tmp_path):
    world = worlds()
    edits = unknown_old(world.edits[:4])
    found = unwrite.compare(
        world.folder,
        edits,
        {"learn": LEARN},
        tmp_path,
        plant=True,
        plant_lr=3e-3,
        references=("no-change",),
    )
    (start,) = (Start.open(folder) for folder in (tmp_path / "starts").iterdir())
    recall = start.facts["planting"]["old_recall"]
    assert recall["base"]["token"] == recall["base"]["exact"] == 0.0
    assert recall["planted"]["token"] > 0.5
    unchanged, learned = row_of(found, method="[no change]"), row_of(found, method="learn")
    base = Base.read(tmp_path)
    assert unchanged["start_fingerprint"] == learned["start_fingerprint"] == start.fingerprint
    assert start.fingerprint != base.fingerprint
    assert unchanged["scores"]["after"]["locality"]["token"] == 1.0
    assert unchanged["scores"]["after"]["old_recall"] == recall["planted"]
    assert learned["scores"]["after"]["reliability"]["token"] == 1.0
    # It stands on the planted weights: exactly what a home with both updates holds.
    home = unwrite.open(tmp_path / "home", base=world.folder)
    old = [edit.asserting_old() for edit in edits]
    home.update(old, unwrite.FullFT(epochs=3, until="epochs", lr=3e-3))
    assert home.fingerprint(home.ledger.live()) == start.fingerprint
    assert home.update(edits, LEARN).fingerprint == learned["fingerprint"]
    assert "after planting" in found.markdown()


def test_only_known_facts_are_used(worlds, tmp_path):
    world = worlds()
    mixed = [*world.edits[:3], *unknown_old(world.edits[3:5]), *world.edits[5:8]]
    found = compare(world, tmp_path, {"short": SHORT}, mixed, only_known=True, sizes=(4, None))
    small, large = (row_of(found, size=size) for size in (4, None))
    assert (small["records"], large["records"]) == (3, 6)
    assert large["scores"]["before"]["old_recall"]["exact"] == 1.0
    assert "knows 6 of the 8 facts" in found.markdown()


def test_forced_answers_alone_give_the_same_token_scores(worlds, tmp_path):
    both = compare(worlds(), tmp_path / "both", {"learn": LEARN}, references=("in-context",))
    one = compare(
        worlds(), tmp_path / "one", {"learn": LEARN}, references=("in-context",), exact=False
    )
    for first, second in zip(both.rows, one.rows, strict=True):
        for side in ("before", "after"):
            for role in ROLES:
                full, half = first["scores"][side][role], second["scores"][side][role]
                blank = {key: None for key in full if key.startswith("exact")}
                assert half == {**full, **blank}
    assert one.table["means"][0]["scores"]["after"]["reliability"]["exact"] is None
    assert "### Exact form" not in one.markdown()


# ---- the model afterwards ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "sequential", "single"])
def test_the_model_is_bitwise_the_start_after_a_cell(worlds, tmp_path, monkeypatch, mode):
    benches_made = []
    monkeypatch.setattr(
        comparison,
        "Bench",
        lambda *given: benches_made.append(benches.Bench(*given)) or benches_made[-1],
    )
    compare(
        worlds(), tmp_path, {"learn": LEARN}, mode=mode, chunk=2 if mode == "sequential" else None
    )
    (bench,) = benches_made
    fresh = Model.load(worlds().folder).weights
    for name, tensor in bench.model.weights.items():
        assert torch.equal(tensor, fresh[name]), name


# ---- nothing twice -------------------------------------------------------------------------------


def test_a_finished_cell_is_never_computed_again(worlds, tmp_path, monkeypatch, snapshot):
    Counted.calls.clear()
    methods = {"counted": Counted()}
    options = {"seeds": (0, 1), "references": ("no-change", "in-context")}
    compare(worlds(), tmp_path, methods, **options)
    assert Counted.calls == [4, 4]
    before = snapshot(tmp_path)
    monkeypatch.setattr(Model, "load", None)  # a finished run does not even need the model
    again = compare(worlds(), tmp_path, methods, **options)
    assert Counted.calls == [4, 4]
    assert snapshot(tmp_path) == before
    assert len(again.rows) == 4


def test_the_start_is_asked_once_for_all_cells(worlds, tmp_path, monkeypatch):
    asked = []
    real = benches.Bench.observe
    monkeypatch.setattr(
        benches.Bench, "observe", lambda self, probes: asked.append(1) or real(self, probes)
    )
    compare(worlds(), tmp_path, {"a": SHORT, "b": SHORT}, seeds=(0, 1), references=("no-change",))
    assert len(asked) == 1 + 4


def test_what_is_added_is_computed_and_nothing_else(worlds, tmp_path):
    Counted.calls.clear()
    world = worlds()
    edits = {"one": world.edits[:4]}
    compare(world, tmp_path, {"a": Counted()}, edits, sizes=(2,))
    compare(world, tmp_path, {"a": Counted()}, edits, sizes=(2,), seeds=(0, 1))
    compare(world, tmp_path, {"a": Counted()}, edits, sizes=(3,))
    compare(world, tmp_path, {"b": Counted()}, {"two": world.edits[10:11]})
    assert Counted.calls == [2, 2, 3, 1]
    found = compare(world, tmp_path, {"a": Counted()}, edits, sizes=(2,))
    assert Counted.calls == [2, 2, 3, 1]
    assert len(found.rows) == 4  # the whole run, not only what was asked now


@pytest.mark.parametrize(
    "changed",
    [
        {"methods": {"a": LEARN}},
        {"exact": False},
        {"mode": "single"},
        {"offset": 1},
        {"plant": True},
        {"only_known": True},
    ],
    ids=str,
)
def test_another_comparison_does_not_mix_with_the_first(worlds, tmp_path, snapshot, changed):
    compare(worlds(), tmp_path, {"a": SHORT}, {"people": worlds().edits[:4]})
    before = snapshot(tmp_path)
    asked = {"methods": {"a": SHORT}, "edits": {"people": worlds().edits[:4]}, **changed}
    with pytest.raises(BadSetting, match="holds another comparison"):
        compare(worlds(), tmp_path, **asked)
    with pytest.raises(BadSetting, match="edits people"):
        compare(worlds(), tmp_path, {"a": SHORT}, {"people": worlds().edits[1:4]})
    assert snapshot(tmp_path) == before


def test_another_model_does_not_mix_with_the_first(worlds, tmp_path):
    compare(worlds(), tmp_path, {"a": SHORT})
    with pytest.raises(BadSetting, match="base is"):
        compare(worlds("gpt2"), tmp_path, {"a": SHORT})


def test_the_same_model_in_another_place_goes_on(world, worlds, tmp_path):
    first = compare(worlds(), tmp_path / "run", {"a": SHORT})
    both = compare(world, tmp_path / "run", {"a": SHORT, "b": SHORT})
    assert both.rows[0] == first.rows[0]
    assert both.rows[1]["fingerprint"] == first.rows[0]["fingerprint"]


def test_two_processes_do_not_work_on_one_run(worlds, tmp_path):
    compare(worlds(), tmp_path, {"a": SHORT})
    with only_writer(tmp_path), pytest.raises(HomeBusy):
        compare(worlds(), tmp_path, {"b": SHORT})


# ---- failures ------------------------------------------------------------------------------------


def test_a_method_that_fails_does_not_end_the_grid(worlds, tmp_path):
    methods = {"bad": Counted("training"), "good": SHORT}
    found = compare(worlds(), tmp_path, methods)
    assert [row["method"] for row in found.rows] == ["good"]
    (failed,) = found.failed
    assert failed["method"] == "bad"
    assert failed["error"] == "The loss became nan."
    assert "The loss became nan." in found.markdown()
    Counted.calls.clear()
    again = compare(worlds(), tmp_path, methods)
    assert Counted.calls == [4]  # it is tried again
    assert again.failed == found.failed


def test_a_bug_in_a_method_shows_once_the_others_are_done(worlds, tmp_path):
    with pytest.raises(ZeroDivisionError):
        compare(worlds(), tmp_path, {"bad": Counted("bug"), "good": SHORT})
    table = read_json(tmp_path / "table.json")
    assert [row["method"] for row in table["rows"]] == ["good"]
    assert table["failed"][0]["error"] == "ZeroDivisionError: a bug"


def test_a_grid_in_which_all_fails_says_why(worlds, tmp_path):
    with pytest.raises(TrainingFailed, match="nan"):
        compare(worlds(), tmp_path, {"bad": Counted("training")})


def test_a_reference_without_its_model_row_fails_with_a_sentence(worlds, tmp_path, monkeypatch):
    def fail(self, model, edits):
        raise TrainingFailed("No.")

    monkeypatch.setattr(unwrite.FullFT, "delta", fail)
    found = compare(worlds(), tmp_path, {"drawn": Drawn()}, references=("random-delta",))
    assert [row["method"] for row in found.rows] == ["drawn"]
    assert "needs the result of" in found.failed[1]["error"]


def test_a_collapse_ends_the_sequence_and_keeps_the_curve(worlds, tmp_path, monkeypatch):
    real, calls = unwrite.FullFT.delta, []

    def collapse(self, model, edits):
        calls.append(1)
        if len(calls) == 3:
            raise TrainingFailed("The loss became nan.")
        return real(self, model, edits)

    monkeypatch.setattr(unwrite.FullFT, "delta", collapse)
    found = compare(worlds(), tmp_path, {"a": LEARN}, mode="sequential", chunk=1)
    (row,) = found.rows
    assert [step["edits"] for step in row["steps"]] == [1, 2]
    assert row["scores"]["after"]["reliability"]["n"] == 4  # the others count as not learned
    assert any("It ended before step 3" in text for text in row["notes"]["sentences"])


# ---- bad input: a sentence, and nothing written --------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": []}, "nothing to compare"),
        ({"methods": ["no-such"]}, "no method 'no-such'"),
        ({"methods": [SHORT, LEARN]}, "label 'full-ft'"),
        ({"methods": {"[x]": SHORT}}, "cannot be the label"),
        ({"methods": [unwrite.FullFT]}, "not"),
        ({"methods": [object()]}, "not a method"),
        ({"methods": "full-ft"}, "list"),
        ({"edits": {}}, "nothing to compare on"),
        ({"edits": "no-such-file.jsonl"}, "no-such-file"),
        ({"edits": 3}, "path"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (-1,)}, "-1"),
        ({"sizes": (0,)}, "0"),
        ({"sizes": ()}, "sizes"),
        ({"offset": 10_000}, "beyond the end"),
        ({"mode": "sequential"}, "chunk"),
        ({"mode": "sequential", "chunk": 0}, "chunk"),
        ({"chunk": 2}, "chunk"),
        ({"mode": "sideways"}, "mode"),
        ({"plant": True, "only_known": True}, "two protocols"),
        ({"plant": True, "plant_lr": 0.0}, "lr"),
        ({"references": ("no-such",)}, "no-such"),
        ({"references": "no-change"}, "list"),
        ({"base": "no/such/model"}, "no/such/model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_writes_nothing(worlds, tmp_path, given, said):
    words = {
        "base": worlds().folder,
        "edits": list(worlds().edits[:2]),
        "methods": [SHORT],
        "references": (),
        **given,
    }
    with pytest.raises(unwrite.UnwriteError) as caught:
        unwrite.compare(out=tmp_path / "run", **words)
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_edits_that_cannot_be_used_write_nothing(worlds, tmp_path):
    world, run = worlds(), tmp_path / "run"
    with pytest.raises(BadEdits, match="cannot be planted: 1 of 2"):
        compare(
            world, run, [SHORT], [world.edits[0], replace(world.edits[1], old=None)], plant=True
        )
    with pytest.raises(BadEdits, match="knows none"):
        compare(world, run, [SHORT], unknown_old(world.edits[:2]), only_known=True)
    with pytest.raises(BadEdits, match="Shorten"):
        compare(world, run, [SHORT], [unwrite.Edit("ada works as a " * 40, new="smith")])
    assert not run.exists()


def test_a_folder_with_something_else_in_it_is_left_alone(worlds, tmp_path, snapshot):
    (tmp_path / "letter.txt").write_text("dear")
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    before = snapshot(tmp_path)
    for out in (tmp_path, home.folder, tmp_path / "letter.txt"):
        with pytest.raises(BadSetting):
            compare(worlds(), out, [SHORT])
    with pytest.raises(BadSetting, match="model home"):
        unwrite.compare(home.folder, list(worlds().edits[:2]), [SHORT], tmp_path / "run")
    assert snapshot(tmp_path) == before


def test_a_damaged_plan_is_said_to_be_damaged(worlds, tmp_path):
    compare(worlds(), tmp_path, [SHORT])
    for content in ("{", "{}", '{"format": 99}', '{"format": 1, "base": {}}'):
        (tmp_path / "plan.json").write_text(content)
        with pytest.raises(unwrite.UnwriteError, match=r"plan\.json"):
            compare(worlds(), tmp_path, [SHORT])


# ---- sweeps --------------------------------------------------------------------------------------


def test_a_sweep_is_a_comparison_of_all_combinations(worlds, tmp_path):
    edits = list(worlds().edits[:4])
    found = unwrite.sweep(
        worlds().folder,
        edits,
        "full-ft",
        {"lr": ["1e-3", "1e-4"], "epochs": ["1", "30"]},
        tmp_path / "sweep",
        settings={"until": "epochs"},
        references=(),
    )
    settings = [(row["settings"]["lr"], row["settings"]["epochs"]) for row in found.rows]
    assert settings == [(1e-3, 1), (1e-3, 30), (1e-4, 1), (1e-4, 30)]
    assert {row["settings"]["until"] for row in found.rows} == {"epochs"}
    means = found.table["means"]
    assert any(one["front"] for one in means)
    best = max(means, key=lambda one: one["scores"]["after"]["reliability"]["token"])
    assert best["scores"]["after"]["reliability"]["token"] == 1.0


@pytest.mark.parametrize(
    ("over", "settings"),
    [({}, {}), ({"lr": []}, {}), ({"lr": ["1"]}, {"lr": "2"}), ({"no": ["1"]}, {})],
)
def test_a_sweep_over_nothing_is_refused(worlds, tmp_path, over, settings):
    with pytest.raises(BadSetting):
        unwrite.sweep(
            worlds().folder,
            list(worlds().edits[:2]),
            "full-ft",
            over,
            tmp_path / "x",
            settings=settings,
        )
    assert not (tmp_path / "x").exists()


# ---- tables --------------------------------------------------------------------------------------


def test_tables_can_be_made_again_from_the_folder(grid, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(grid.folder, copy)
    for name in ("table.md", "table.csv", "table.json"):
        (copy / name).unlink()
    from unwrite.grid import Plan
    from unwrite.tables import Tables

    Tables(copy).write(Plan.read(copy))
    assert steady(copy) == steady(grid.folder)
    assert files(copy) == files(grid.folder)


def test_the_run_can_be_read_without_the_package(grid):
    plan = json.loads((grid.folder / "plan.json").read_text())
    named = {cell["name"] for cell in plan["cells"]}
    assert {one.name for one in (grid.folder / "cells").iterdir()} == named
    for name in named:
        cell = json.loads((grid.folder / "cells" / name / "cell.json").read_text())
        assert cell["cell"] == next(one for one in plan["cells"] if one["name"] == name)
    assert not (grid.folder / "donors").exists()


def test_a_mean_over_seeds_is_the_mean_of_its_rows(grid):
    for mean in grid.table["means"]:
        rows = [
            row
            for row in grid.rows
            if all(row[key] == mean[key] for key in ("method", "edits", "size"))
        ]
        assert [row["seed"] for row in rows] == mean["seeds"]
        for role in ROLES:
            values = [row["scores"]["after"][role] for row in rows]
            pooled = mean["scores"]["after"][role]
            assert pooled["n"] == values[0]["n"]
            if pooled["n"]:
                token = sum(one["token"] for one in values) / len(values)
                assert pooled["token"] == pytest.approx(token, abs=1e-12)
                assert pooled["token_low"] <= token <= pooled["token_high"]
            if len(rows) == 1:
                assert pooled == pytest.approx(values[0], abs=1e-12)


def test_notes_of_a_method_are_in_the_table(grid):
    assert "- thin: A tenth." in grid.markdown()


def test_plain_fine_tuning_is_trained_once_for_all_that_is_made_of_it(
    worlds, tmp_path, monkeypatch
):
    real, trained = unwrite.FullFT.delta, []

    def counted(self, model, edits):
        trained.append(self)
        return real(self, model, edits)

    monkeypatch.setattr(unwrite.FullFT, "delta", counted)
    methods = {"one": Thinned(), "two": Thinned()}
    found = compare(worlds(), tmp_path / "a", methods, references=NAMES)
    assert len(found.rows) == 2 + 6
    assert [one for one in trained if one != SHORT] == [unwrite.FullFT()]
    assert not (tmp_path / "a" / "donors").exists()
    # Where it is no row, the masks train it themselves, and get the same.
    alone = compare(worlds(), tmp_path / "b", methods, references=("random-mask",))
    for label in ("[random mask of one]", "[random mask of two]"):
        assert (
            row_of(alone, method=label)["fingerprint"]
            == (row_of(found, method=label)["fingerprint"])
        )
    assert len([one for one in trained if one != SHORT]) == 2
