"""The report of a home: complete, harmless, self-contained, and the same for the same folder.

Homes are written by hand here (``make_home``), so neither torch nor a model is needed, and the page
is read with ``html.parser``, as a browser would find its tags.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pages import (
    HOSTILE,
    KINDS,
    Page,
    assert_self_contained,
    facts,
    probe,
    row,
    shares,
    tags_of,
)

from unwrite import heatmap, knowledge, plots, where
from unwrite import home_report as reporting
from unwrite.errors import BadSetting, DamagedFile, HomeError
from unwrite.files import sha256_file, write_json, write_jsonl
from unwrite.heatmap import heat_map, whereabouts
from unwrite.home_report import render, write_report
from unwrite.knowledge import Answer, answers
from unwrite.ledger import Ledger
from unwrite.page import plain, two_digits
from unwrite.scores import ROLES, as_json, score
from unwrite.where import located, percent

SIGNED = {"at": "2026-11-21T09:40:24Z", "by": "ada", "unwrite": "0.1.0"}


# Homes written by hand ----------------------------------------------------------------------------


def make_home(
    folder: Path,
    updates: Sequence[tuple[list[Any], list[Any]]] = (),
    undone: Sequence[int] = (),
    why: str = "",
    leave_out: Sequence[str] = (),
    command: str = "unwrite update HOME EDITS",
    tensors: Mapping[str, Any] | None = None,
    places: Mapping[str, Any] | None = None,
    parts: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """A home with one update for each pair of observations; those at the indices ``undone`` are
    undone at the end. ``leave_out`` names files and ledger fields that are not recorded."""
    folder.mkdir(parents=True)
    standard_tensors, standard_places = shares()
    base = {
        "name": "toy",
        "dtype": "float32",
        "parameters": 1234567,
        "fingerprint": "b" * 64,
        "places": places or standard_places,
    }
    write_json(folder / "base.json", base)
    begun = {key: base[key] for key in ("name", "fingerprint")}
    begun["sha256"] = sha256_file(folder / "base.json")
    ledger = Ledger.create(folder / "ledger.jsonl", {"do": "init", **SIGNED, "base": begun})
    names = [f"u-{index:08x}" for index in range(len(updates))]
    for number, (name, (before, after)) in enumerate(zip(names, updates, strict=True)):
        place = folder / "updates" / name
        (place / "delta").mkdir(parents=True)
        table = {"before": as_json(score(before, before)), "after": as_json(score(before, after))}
        asked = sum(one["role"] == "reliability" for one in after)
        entry = {
            "do": "apply",
            "id": name,
            **SIGNED,
            "why": why,
            "method": {"name": "full-ft", "epochs": 20, "tuner": {"name": "lora", "rank": 8}},
            "edits": asked,
            "scores": table,
            "perplexity": {"before": 22.06 + 0.37 * number, "after": 22.43 + 0.37 * number},
            "delta": {"encoding": "dense", "tensors": 2, "changed_fraction": 0.05, "bytes": 5120},
            "fingerprint": "f" * 64,
        }
        seconds = {"train": 1.0, "arithmetic": 0.25, "observe": 2.0}
        environment = {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "command": command}
        result = {**entry, "seconds": seconds, "notes": {"sentences": list(notes), "rounds": 3}}
        write_json(place / "scores.json", result)
        write_jsonl(place / "before.jsonl", before)
        write_jsonl(place / "after.jsonl", after)
        write_json(place / "environment.json", environment)
        changed = tensors or standard_tensors
        write_json(place / "delta/delta.json", {"tensors": changed})
        measured = {name: {**facts, "mean": 0.25} for name, facts in changed.items()}
        regions = located(measured, parts or {}, places or standard_places)
        write_json(place / "where.json", regions)
        for missing in leave_out:
            if entry.pop(missing, None) is None:
                (place / missing).unlink()
        files = [path for path in place.rglob("*") if path.is_file()]
        entry["files"] = {str(path.relative_to(place)): sha256_file(path) for path in files}
        ledger = ledger.append(entry)
    for index in undone:
        line = {"do": "revert", "of": names[index], **SIGNED, "why": "no", "fingerprint": "b" * 64}
        ledger = ledger.append(line)
    return folder


def page_of(home: Path) -> Page:
    return Page(render(home))


# The story ----------------------------------------------------------------------------------------


def test_verdict_of_an_update(tmp_path):
    page = page_of(make_home(tmp_path / "home", [facts(12, wrong=1, moved=3)]))
    assert page.verdict.replace("\u00a0", " ") == (
        "1 update, 1 live: 12 facts were to change; 11 of 12 are answered with the new answer "
        "(token 96 %), 75 % of bystanders answer as before; perplexity 22.1 → 22.4."
    )


@pytest.mark.parametrize(
    ("updates", "undone", "begins", "says_too"),
    [
        (0, [], "No updates yet: the model is its base", ""),
        (1, [0], "1 update, none live: the model is its base again, bit for bit.", ""),
        (2, [0, 1], "2 updates, none live", ""),
        (2, [], "2 updates, 2 live: 2 facts were", "u-00000000 has not been asked again"),
        (2, [0], "2 updates, 1 live: 1 fact was", "perplexity of the present state has not been"),
        (3, [0], "3 updates, 2 live: 2 facts were", "u-00000001, u-00000002 have not been asked"),
    ],
)
def test_verdict_says_what_is_live_and_what_was_not_measured(
    tmp_path, updates, undone, begins, says_too
):
    page = page_of(make_home(tmp_path / "home", [facts(1)] * updates, undone=undone))
    assert page.verdict.startswith(begins)
    assert says_too in page.text
    assert page.text.count("undone") >= len(undone)


def test_perplexity_is_that_of_the_present_state_or_none(tmp_path):
    """Undoing the last update gives back a state that was measured; undoing the first does not."""
    last = page_of(make_home(tmp_path / "last", [facts(1)] * 2, undone=[1]))
    first = page_of(make_home(tmp_path / "first", [facts(1)] * 2, undone=[0]))
    assert "perplexity 22.1 → 22.4" in last.verdict
    assert "perplexity" not in first.verdict


def test_every_section_is_there(tmp_path):
    home = make_home(tmp_path / "home", [facts(3), facts(2)], undone=[0], why="because of <tests>")
    page = page_of(home)
    for heading in (
        "because of <tests>",
        "u-00000001 · full-ft · 2 facts · 2026-11-21 09:40 UTC · by ada",
        "tuner lora",
        "tuner.rank 8",
        "5\u00a0% of all weights, in 2 tensors; 5.1 kB (dense)",
        "Scores",
        "Knowledge diff",
        "Where the change lives",
        "Environment",
        "unwrite update HOME EDITS",
        "Ledger",
        "u-00000000 undone",
        "What the numbers mean",
    ):
        assert heading in page.text
    assert page.text.index("u-00000001 ·") < page.text.index("u-00000000 ·"), "newest first"
    assert [d["id"] for d in page.all("details")] == ["u-00000001", "u-00000000"]
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {str(a["href"]).removeprefix("#") for a in page.all("a")} <= ids


def test_numbers_are_those_of_scores_json(tmp_path):
    """Every share and bound in the score table, in full precision, in the order of the columns."""
    home = make_home(tmp_path / "home", [facts(12, wrong=2, moved=5)])
    stored = json.loads((home / "updates/u-00000000/scores.json").read_text("utf-8"))
    text = render(home)
    for role in ROLES:
        line = re.search(rf'<tr data-score="{role}">.*?</tr>', text, re.S)
        assert line is not None
        found = [float(value) for value in re.findall(r'<data value="([^"]+)"', line[0])]
        expected = [
            stored["scores"][when][role][form + bound]
            for form in ("token", "exact")
            for when in ("before", "after")
            for bound in ("", "_low", "_high")
        ]
        assert found == [value for value in expected if value is not None]
        assert f"<td>{stored['scores']['after'][role]['n']}</td>" in line[0]
    perplexity = stored["perplexity"]
    assert f'<data value="{perplexity["before"]}">22.1</data>' in text
    assert f'<data value="{perplexity["after"]}">22.4</data>' in text


def test_without_probes_a_score_is_a_dash(tmp_path):
    text = render(make_home(tmp_path / "home", [facts(2)]))
    line = re.search(r'<tr data-score="portability">.*?</tr>', text, re.S)
    assert line is not None and "data value" not in line[0] and line[0].count("–") == 4


@pytest.mark.parametrize(
    "missing",
    [
        ["scores.json"],
        ["before.jsonl", "after.jsonl"],
        ["environment.json"],
        ["delta/delta.json"],
        ["where.json"],
        ["where.json", "delta/delta.json"],
        ["perplexity", "delta", "why"],
        ["scores", "scores.json"],
        [
            *("scores.json", "before.jsonl", "after.jsonl", "environment.json", "where.json"),
            "delta/delta.json",
        ],
    ],
)
def test_what_was_not_recorded_is_left_out(tmp_path, missing):
    page = page_of(make_home(tmp_path / "home", [facts(2)], leave_out=missing))
    assert "1 update, 1 live" in page.verdict
    assert "None" not in page.text


# The knowledge diff -------------------------------------------------------------------------------


def test_failures_come_first_then_what_moved(tmp_path):
    before, after = facts(6, wrong=2, moved=1)
    after[0]["text"] = "Elsewhere"
    page = page_of(make_home(tmp_path / "home", [(before, after)]))
    rows = [cells for cells in page.rows if len(cells) == 7]
    verdicts = [cells[0] for cells in rows]
    assert verdicts[0] == "Verdict"
    assert verdicts[1:7] == ["✗ wrong", *["✗ still old"] * 4, "✗ moved"]
    assert verdicts[7:] == ["✓ right"] * 7 + ["✓ same"] * 5
    first = "The capital of country 0 is"
    assert rows[1][1:] == ["question", first, "Oldtown 0", "Elsewhere", "Newtown 0", "2/2"]
    assert rows[6][1:] == ["bystander", "A pear is a 0", "fruit", "tree", "as before", "1/2"]


def test_a_bystander_of_several_edits_is_one_row():
    before = [row(f"e{n}", "locality", "A pear is a", "fruit", "fruit", True) for n in range(3)]
    found = answers(before, before)
    assert found == [Answer("same", "locality", "A pear is a", *["fruit"] * 3, 2, 2)] * 3
    (group,) = knowledge.grouped(found, 10_000)
    assert group.answers == [(found[0], 3)]
    assert (group.total, group.left_out) == (3, 0)


def test_an_old_answer_that_opens_another_question_is_not_still_old():
    """Portability is asked of something else: saying the old answer there is just wrong."""
    rows = [
        row("e", "portability", "People in its capital speak", "Irish", "French", False),
        row("e", "old_recall", "Spoken there is", "French", "Irish", False),
    ]
    assert [answer.verdict for answer in answers(rows, rows)] == ["wrong"]


def test_observations_of_different_questions_are_refused():
    before, after = facts(2)
    with pytest.raises(DamagedFile, match="different questions"):
        answers(before[:-1], after)


def test_long_diffs_are_cut_and_say_so(tmp_path):
    page = page_of(make_home(tmp_path / "home", [facts(400, wrong=3, moved=2)]))  # 1,200 rows
    marks = [cells[0] for cells in page.rows if len(cells) == 7][1:]
    assert len(marks) == knowledge.ROWS
    assert marks[:8] == ["✗ still old"] * 6 + ["✗ moved"] * 2
    assert "800 more are left out here" in page.text


def test_the_worst_home_stays_below_three_megabytes(tmp_path):
    before, after = facts(40, wrong=20, moved=40)
    for number, one in enumerate(after):
        one["text"] = f"{number}" + '"' * knowledge.ANSWER
    _, places = shares(blocks=126)
    home = make_home(
        tmp_path / "home",
        [facts(1)] * 4 + [(before, after)] * reporting.DETAILED,
        why="'" * 3000,
        command="&" * 10_000,
        places=places,
        tensors={name: {"squared_norm": 1.0, "changed": 4, "size": 4} for name in places},
        parts={part: {name: probe(name)[name] for name in places} for part in ("old", "new")},
        notes=["&" * 1000] * 50,
    )
    page = render(home)
    assert 1_500_000 < len(page.encode("utf-8")) < 3_000_000
    assert "4 older updates are told in the ledger below only" in page


def test_the_budget_of_bytes_holds_for_any_text():
    answer = Answer("wrong", "reliability", '"' * 300, '"' * 200, '"' * 200, '"' * 200, 0, 1)
    many = [answer, *(Answer(**{**asdict(answer), "tokens": n}) for n in range(2, 300))]
    (group,) = knowledge.grouped(many, 100_000)
    assert len(group.answers) == 100_000 // (350 + 5 * 900)
    assert group.left_out == len(many) - len(group.answers)


# Harmless -----------------------------------------------------------------------------------------


def hostile_home(folder: Path, text: str) -> Path:
    before, after = facts(2, wrong=1)
    for seen in (before, after):
        seen[0] |= {"prompt": text, "target": f"{text}!"}
    for one in after:
        if one["role"] == "locality":
            one["text"] = text
    parts = {text: {"embed": {"mean": 0.5, "squared_norm": 1.0, "changed": 4, "size": 4}}}
    updates = [(before, after)]
    return make_home(folder, updates, why=text, command=text, parts=parts, notes=[text])


def test_hostile_text_appears_as_text(tmp_path):
    text = HOSTILE.replace("\ud800", "")  # a lone surrogate cannot be written to a UTF-8 file
    page = page_of(hostile_home(tmp_path / "home", text))
    harmless = page_of(hostile_home(tmp_path / "harmless", "wordy"))
    assert tags_of(page) == tags_of(harmless), "no tag was opened by an answer"
    assert page.raw == harmless.raw
    assert page.text.count("<script>alert(1)</script>\"'&[U+202E][U+0000][U+001B][31m<img") >= 5
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page.text)


@pytest.fixture(scope="module")
def harmless_tags(tmp_path_factory) -> list[str]:
    return tags_of(page_of(hostile_home(tmp_path_factory.mktemp("home") / "home", "wordy")))


@settings(max_examples=15, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_no_text_changes_the_structure(tmp_path_factory, harmless_tags, text):
    folder = tmp_path_factory.mktemp("home")
    if not knowledge.answer_in(text):
        text = "x" + text
    page = page_of(hostile_home(folder / "home", text))
    assert tags_of(page) == harmless_tags
    assert plain(text) in page.text


@given(st.text(max_size=60), st.integers(1, 80))
def test_plain_hides_nothing_and_keeps_its_length(text, limit):
    shown = plain(text, limit)
    assert len(shown) <= limit
    assert all(
        c.isprintable()
        or c in "\u200c\u200d\u00ad\u00a0\u3000"
        or c.isspace()
        or unicodedata.category(c) in ("Cn", "Zs")
        for c in shown
    )
    assert not re.search("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]", shown)
    shown.encode("utf-8")
    if text.isprintable() and len(text) <= limit:
        assert shown == text
    assert shown.endswith("…") or len(text) <= limit


def test_long_answers_end_with_an_ellipsis(tmp_path):
    before, after = facts(1, wrong=1)
    for one in after:
        one["text"] = "W" * 10_000
    text = render(make_home(tmp_path / "home", [(before, after)]))
    assert "W" * 199 + "…" in text
    assert "W" * 200 not in text


def test_nothing_is_requested_and_nothing_foreign_runs(tmp_path):
    text = render(make_home(tmp_path / "home", [facts(3, wrong=1)], why=HOSTILE[:-1]))
    assert_self_contained(text)


# Where the change lives ---------------------------------------------------------------------------


def test_heat_map_shares():
    heat = heat_map(where.rows(*shares()))
    assert heat is not None
    assert heat.kinds == ["embedding", *KINDS]
    assert [label for label, _, _ in heat.rows] == ["0", "1", "2", "outside"]
    assert [total for _, _, total in heat.rows] == [0.0, 0.75, 0.0, 0.25]
    assert heat.rows[1][1][heat.kinds.index("down")] == (0.75, heatmap.SHADES)
    assert heat.rows[1][1][0] is None, "no embedding inside a block"
    assert heat.rows[0][1][1] == (0.0, 0), "a tensor that did not change"
    assert heat.summary == (
        "Mostly in down 75\u00a0%, embedding 25\u00a0%. "
        "The largest part, 75\u00a0%, lies in block 1."
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0, 1e30), min_size=1, max_size=25))
@example([1.6110409254560096e16, 1.1123598755449173e29, 3.176453085984883e29])
def test_heat_map_is_a_division_of_one(norms):
    _, places = shares()
    names = [*places, "unknown"]
    tensors = {
        names[n]: {"squared_norm": norm, "changed": 1, "size": 1} for n, norm in enumerate(norms)
    }
    heat = heat_map(where.rows(tensors, places))
    if heat is None:
        assert sum(norms) == 0
        return
    cells = [cell for _, row_cells, _ in heat.rows for cell in row_cells if cell]
    assert sum(share for share, _ in cells) == pytest.approx(1)
    assert sum(heat.totals) == pytest.approx(1)
    assert {shade for _, shade in cells} <= set(range(heatmap.SHADES + 1))
    assert all(shade > 0 for share, shade in cells if share > 0)
    assert all(share == 0 for share, shade in cells if shade == 0)


def test_nothing_changed_has_no_heat_map():
    assert heat_map(where.rows({}, shares()[1])) is None
    assert whereabouts(located({}, {}, shares()[1])) is None
    still = {"embed": {"squared_norm": 0.0, "changed": 0, "size": 4}}
    assert heat_map(where.rows(still, {})) is None


def test_every_delta_has_its_measures_and_its_map(tmp_path):
    parts = {"old": probe("layers.0.q"), "new": probe("layers.2.up")}
    text = render(make_home(tmp_path / "home", [facts(2)], parts=parts))
    page = Page(text)
    assert "MLP projections hold 75\u00a0% of the core's squared norm, embeddings" in page.text
    kinds = {cells[0]: cells[1:] for cells in page.rows if len(cells) == 13}
    assert list(kinds) == ["embedding", *KINDS]
    empty = ["0\u00a0%", "0\u00a0%", "0\u00a0%"]
    # 12 weights, of which 4 move by 0.5 in "new"; the norm of the base's weights is sqrt(300).
    assert kinds["up"] == [
        *("0\u00a0%", "100\u00a0%", "0\u00a0%"),
        *("0", "1.7e-1", "0"),
        *("0\u00a0%", "5.8\u00a0%", "0\u00a0%"),
        *("0\u00a0%", "33\u00a0%", "0\u00a0%"),
    ]
    assert kinds["down"][0:3] == ["0\u00a0%", "0\u00a0%", "75\u00a0%"]
    assert kinds["norm"] == [*empty, "0", "0", "0", *empty, *empty]
    radios = [one for one in page.all("input") if one.get("type") == "radio"]
    assert len(radios) == 3
    assert ["checked" in one for one in radios] == [True, False, False]
    captions = [f"squared norm of the {name} of u-00000000" for name in ("core", "old", "new")]
    assert [caption in page.text for caption in captions] == [True] * 3
    places = [page.text.index(caption) for caption in captions]
    assert places == sorted(places), "the committed one first"


def test_of_many_deltas_the_first_two_are_shown(tmp_path):
    parts = {f"part {n}": probe("embed") for n in range(5)}
    page = page_of(make_home(tmp_path / "home", [facts(2)], parts=parts))
    maps = [name for name in (*parts, "core") if f"norm of the {name} of u-00000000" in page.text]
    assert maps == ["part 0", "part 1", "core"]
    assert "3 more deltas of this method" in page.text


def test_a_single_delta_needs_no_choice(tmp_path):
    page = page_of(make_home(tmp_path / "home", [facts(2)]))
    assert "of the change's squared norm" in page.text
    assert not [one for one in page.all("input") if one.get("type") == "radio"]
    assert not page.all("fieldset")
    assert {cells[0] for cells in page.rows if len(cells) == 5} == {"kind", "embedding", *KINDS}


def test_without_means_the_rest_is_told(tmp_path):
    """An update of an early version has no where.json."""
    page = page_of(make_home(tmp_path / "home", [facts(2)], leave_out=["where.json"]))
    kinds = {cells[0]: cells[1:] for cells in page.rows if len(cells) == 5}
    assert kinds["down"] == ["75\u00a0%", "–", "5\u00a0%", "33\u00a0%"]


def test_notes_of_a_method_are_shown_and_cut(tmp_path):
    said = ["It fell back twice.", "W" * 1000, *(f"Round {n}." for n in range(30))]
    text = render(make_home(tmp_path / "home", [facts(2)], notes=said))
    assert "<p>It fell back twice.</p>" in text
    assert "W" * (reporting.NOTE - 1) + "…" in text
    assert "W" * reporting.NOTE not in text
    assert "12 more: <code>unwrite show HOME u-00000000</code>" in text


# A reader that changes nothing --------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_home_gives_the_same_bytes(tmp_path):
    home = make_home(tmp_path / "home", [facts(3, wrong=1), facts(2)], undone=[0])
    before = contents(home)
    assert write_report(home) == home / "report.html"
    first = (home / "report.html").read_bytes()
    assert contents(home) == before | {str(home / "report.html"): first}
    write_report(home, None)
    other = write_report(home, tmp_path / "elsewhere.html")
    assert other == tmp_path / "elsewhere.html"
    assert first == (home / "report.html").read_bytes() == other.read_bytes()


def test_reading_needs_no_torch():
    code = "import sys, unwrite.home_report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty folder", "no base"])
def test_only_a_home_has_a_report(tmp_path, there):
    home = tmp_path / "home"
    if there == "a file":
        home.write_text("x")
    if there == "an empty folder":
        home.mkdir()
    if there == "no base":
        make_home(home)
        (home / "base.json").unlink()
    with pytest.raises(HomeError, match="not a model home"):
        write_report(home)


@pytest.mark.parametrize(
    "name",
    [
        *("before.jsonl", "after.jsonl", "scores.json", "where.json", "environment.json"),
        "delta/delta.json",
    ],
)
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_numbers_that_were_edited_are_not_shown(tmp_path, name, damage):
    home = make_home(tmp_path / "home", [facts(2)])
    path = home / "updates/u-00000000" / name
    text = path.read_text("utf-8")
    path.unlink()
    if damage == "changed":
        path.write_text(text.replace("1", "2"), "utf-8")
    with pytest.raises(DamagedFile, match=re.escape(name)):
        write_report(home)
    assert not (home / "report.html").exists()


def test_a_changed_base_is_not_described(tmp_path):
    home = make_home(tmp_path / "home", [facts(2)])
    path = home / "base.json"
    path.write_text(path.read_text("utf-8").replace("1234567", "7654321"), "utf-8")
    with pytest.raises(DamagedFile, match=r"base\.json"):
        write_report(home)


def test_an_id_leads_nowhere_else(tmp_path):
    home = make_home(tmp_path / "home")
    ledger = Ledger.open(home / "ledger.jsonl")
    ledger.append({"do": "apply", "id": "../../secret", **SIGNED, "method": {}, "edits": 1})
    with pytest.raises(DamagedFile, match="not an id"):
        write_report(home)


@pytest.mark.parametrize("out", ["", "missing/report.html", "home/ledger.jsonl", "home/updates"])
def test_a_report_overwrites_nothing_of_a_home(tmp_path, out):
    home = make_home(tmp_path / "home", [facts(1)])
    before = contents(tmp_path)
    with pytest.raises(BadSetting, match="The report cannot be"):
        write_report(home, tmp_path / out)
    assert contents(tmp_path) == before


# Readable -----------------------------------------------------------------------------------------


@given(st.floats(0, 1))
def test_percent_rounds_neither_up_to_all_nor_down_to_nothing(share):
    text = percent(share)
    assert (text == "100\u00a0%") == (share == 1)
    assert (text == "0\u00a0%") == (share == 0)
    if text[0] not in "<>":
        assert abs(float(text.removesuffix("\u00a0%")) - 100 * share) <= 0.5


@given(st.floats(0, 1))
def test_two_digits_are_those_of_the_share(share):
    text = two_digits(share)
    assert "e" not in text
    if text[0] not in "<>":
        assert float(text.removesuffix("\u00a0%")) == pytest.approx(100 * share, rel=0.05)


def luminance(colour: Sequence[float]) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_is_enough_in_every_scheme():
    """WCAG AA, 4.5 to 1, for text on the page, on the quiet ground and on every shade of heat."""
    source = (
        Path(reporting.__file__).with_name("templates").joinpath("style.css").read_text("utf-8")
    )
    schemes = re.findall(r":root \{([^}]*)\}", source)
    ramp = re.findall(r"var\(--accent\) (\d+)%, var\(--paper\)\); color: var\(--([\w-]+)\)", source)
    assert len(schemes) == 3, "light, dark, print"
    assert len(ramp) == heatmap.SHADES
    for scheme in schemes:
        names = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6}|var\(--[\w-]+\));", scheme))

        def colour(name: str, names: dict[str, str] = names) -> list[float]:
            value = names[name]
            if value.startswith("var"):
                return colour(value[6:-1])
            return [int(value[i : i + 2], 16) for i in (1, 3, 5)]

        def mixed(part: int, colour: Any = colour) -> list[float]:
            pairs = zip(colour("accent"), colour("paper"), strict=True)
            return [(part * a + (100 - part) * b) / 100 for a, b in pairs]

        grounds = [(t, colour(g)) for t in ("ink", "muted", "accent") for g in ("paper", "wash")]
        grounds += [(text, mixed(int(part))) for part, text in ramp]
        grounds += [("paper", colour("ink"))]
        grounds += [(f"hue{n}", colour("paper")) for n in range(plots.HUES)]
        for text, ground in grounds:
            light, dark = sorted((luminance(colour(text)), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, text, ground)
