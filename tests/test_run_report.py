"""The report of a comparison: complete, honest, harmless, self-contained, small.

Most runs are written by hand here (``make_run``): their cells hold the observations of invented
models, and the tables are made of them as in any run, so no model is needed.
"""

import html
import itertools
import json
import re
import shlex
import shutil
from dataclasses import asdict
from xml.etree import ElementTree

import pytest
from comparing import LEARN, Counted, files
from hypothesis import given, settings
from hypothesis import strategies as st
from pages import HOSTILE, Page, assert_self_contained, facts, probe, shares, tags_of
from typer.testing import CliRunner

import unwrite
from unwrite import knowledge, plots
from unwrite import run_report as reporting
from unwrite.cli import app
from unwrite.errors import BadSetting, DamagedFile
from unwrite.files import read_json, read_jsonl, sha256_bytes, write_json, write_jsonl
from unwrite.grid import Cell, Plan, Protocol
from unwrite.plots import Curve, Point, curves, scatter
from unwrite.run_report import RunReport, command, judge, write_report
from unwrite.scores import ROLES, as_json, score
from unwrite.tables import Tables
from unwrite.where import located

PLAIN = {"name": "full-ft", **asdict(unwrite.FullFT())}
MACHINE = {"python": "3.11.7", "packages": {"torch": "2.13.0"}, "command": "compare"}


def settings_of(name):
    return json.loads(json.dumps(PLAIN if name == "full-ft" else {"name": "other", "step": 1}))


def make_run(folder, found, edits="cities", seeds=(0,), notes=(), steps=None, blocks=3):
    """A run with a cell for each method and seed. ``found``: by method, the pairs of observations
    by seed, as of ``facts``; ``steps``: by method, of a sequential run."""
    folder.mkdir(parents=True)
    base = {"name": "toy", "kind": "folder", "folder": "toy", "dtype": "float32"}
    base |= {"parameters": 77312, "fingerprint": "b" * 64, "revision": None}
    write_json(folder / "base.json", base)
    tensors, places = shares(blocks)
    methods = {name: settings_of(name) for name in found}
    mode = Protocol(mode="sequential", chunk=1) if steps else Protocol()
    sets = {edits: {"source": edits, "records": 9, "sha256": "c" * 64}}
    cells = []
    for seed in seeds:
        for name, observed in found.items():
            digest = sha256_bytes(f"{name} {seed}".encode())[:8]
            cell = Cell(f"cell-{digest}", name, methods[name], edits, None, seed)
            before, after = observed[seed % len(observed)]
            place = folder / "cells" / cell.name
            place.mkdir(parents=True)
            write_json(place / "cell.json", {"cell": asdict(cell), "environment": MACHINE})
            write_jsonl(place / "before.jsonl", before)
            write_jsonl(place / "after.jsonl", after)
            measured = {one: {**fact, "mean": 0.25} for one, fact in tensors.items()}
            parts = {"old": probe("layers.0.q"), "new": probe("layers.2.up")}
            write_json(place / "where.json", located(measured, parts, places))
            table = {
                "before": as_json(score(before, before)),
                "after": as_json(score(before, after)),
            }
            result = {
                **{
                    key: getattr(cell, key)
                    for key in ("method", "settings", "edits", "size", "seed")
                },
                "id": cell.name,
                "records": sum(one["role"] == "reliability" for one in after),
                "start": mode.start,
                "mode": mode.mode,
                "seconds": {"train": 1.0, "arithmetic": 0.25, "observe": 2.0},
                "scores": table,
                "perplexity": {"before": 20.0, "after": 21.0 + seed},
                "delta": {"encoding": "dense", "bytes": 5120, "changed_fraction": 0.05},
                "memory": {"host": 4e8, "device": None},
                "start_fingerprint": "b" * 64,
                "fingerprint": "f" * 64,
                "notes": {"sentences": list(notes)},
                "steps": steps and steps.get(name),
            }
            write_json(place / "result.json", result)
            cells.append(cell)
    plan = Plan({"name": "toy", "fingerprint": "b" * 64}, mode, methods, sets, cells)
    plan.write(folder)
    Tables(folder).write(plan)
    return folder


def page_of(folder):
    return Page(RunReport(folder).render())


def spaced(text):
    return " ".join(text.replace("\u00a0", " ").split())


@pytest.fixture(scope="module")
def computed(worlds, tmp_path_factory):
    """A real comparison: two methods and one that fails, two sets, all references."""
    folder = tmp_path_factory.mktemp("computed")
    world = worlds()
    unwrite.write_edits(folder / "people.jsonl", world.edits[:4])
    unwrite.write_edits(folder / "more.jsonl", world.edits[10:12])
    unwrite.compare(
        world.folder,
        [folder / "people.jsonl", folder / "more.jsonl"],
        {"learn": LEARN, "<i>few</i>": unwrite.FullFT(epochs=2), "broken": Counted("training")},
        folder / "run",
    )
    return folder / "run"


# Complete -----------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_in_the_page(computed):
    """Every cell with every score, and every mean with every bound, in full precision."""
    table = read_json(computed / "table.json")
    text = (computed / "report.html").read_text("utf-8")
    lines = dict(re.findall(r'<tr data-cell="([^"]+)">(.*?)</tr>', text, re.S))
    assert list(lines) == [row["id"] for row in table["rows"]]
    for row in table["rows"]:
        line = lines[row["id"]]
        assert f"<bdi>{html.escape(row['method'])}</bdi>" in line
        values = [float(value) for value in re.findall(r'<data value="([^"]+)"', line)]
        scores = [row["scores"]["after"][role][form] for role in ROLES for form in reporting.FORMS]
        assert values == [*(one for one in scores if one is not None), row["perplexity"]["after"]]
    for form in reporting.FORMS:
        boards = re.findall(rf'<tr data-form="{form}".*?</tr>', text, re.S)
        told = [sorted(map(float, re.findall(r'<data value="([^"]+)"', line))) for line in boards]
        expected = [
            sorted(
                entry["scores"]["after"][role][form + bound]
                for role in ROLES
                for bound in ("", "_low", "_high")
                if entry["scores"]["after"][role]["n"]
            )
            for entry in table["means"]
        ]
        assert sorted(told) == sorted(expected)


def test_every_section_is_there(computed):
    page = page_of(computed)
    text = spaced(page.text)
    for heading in (
        "Over 2 edit sets and sizes, on the Pareto front:",
        "people, 4 edits",
        "more, 2 edits",
        "Token form",
        "Exact form",
        "Reference rows",
        "What is paid for what",
        "Against [full-ft until learned]",
        "Costs",
        "Knowledge diff",
        "Where the change lives",
        "2 of 14 cells failed; see below.",
        "The loss became nan.",
        "Every cell",
        "How it was run",
        "Environment",
        "What the numbers mean",
        "95 % interval",
    ):
        assert heading in text, heading
    assert not page.verdict.startswith("Nothing")
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(a["href"]).removeprefix("#") for a in page.all("a")} <= set(ids)
    assert "None" not in page.text


def test_every_mark_says_what_it_is(computed):
    """Each plot has a title to hover for each method, and a description for who cannot see it."""
    text = (computed / "report.html").read_text("utf-8")
    table = read_json(computed / "table.json")
    titles = [html.unescape(one) for one in re.findall(r"<title>([^<]*)</title></circle>", text)]
    assert len(titles) == 3 * 2 * len(table["means"])
    for entry in table["means"]:
        assert sum(one.startswith(f"{entry['method']}: reliability") for one in titles) >= 6
    assert all(one["aria-label"] for one in page_of(computed).all("svg") if "role" in one)


def test_the_page_is_that_of_the_finished_run_however_it_is_made(computed, tmp_path):
    written = (computed / "report.html").read_bytes()
    before = files(computed)
    assert write_report(computed, tmp_path / "page.html").read_bytes() == written
    assert files(computed) == before


def test_unfinished_runs_have_a_page(tmp_path):
    folder = make_run(tmp_path / "run", {"full-ft": [facts(3)], "other": [facts(3, wrong=1)]})
    table = read_json(folder / "table.json")
    shutil.rmtree(folder / "cells" / table["rows"][1]["id"])
    Tables(folder).write(Plan.read(folder))
    page = page_of(folder)
    assert "1 of 2 cells are still to be computed." in page.text
    assert "full-ft is the only method" in page.verdict
    (folder / "table.json").unlink()
    page = page_of(folder)
    assert page.verdict == "Nothing is finished yet."
    assert "2 of 2 cells are still to be computed." in page.text


def test_only_a_run_has_such_a_page(tmp_path):
    with pytest.raises(BadSetting, match="not a comparison"):
        write_report(tmp_path)


def test_an_id_leads_nowhere_else(tmp_path):
    folder = make_run(tmp_path / "run", {"full-ft": [facts(2)]})
    table = read_json(folder / "table.json")
    table["rows"][0]["id"] = "../../secret"
    write_json(folder / "table.json", table)
    with pytest.raises(DamagedFile, match="not an id"):
        write_report(folder)


# The knowledge diff -------------------------------------------------------------------------------


def test_failures_come_first_with_what_was_said(tmp_path):
    found = {"full-ft": [facts(5)], "other": [facts(5, wrong=2, moved=1)]}
    page = page_of(make_run(tmp_path / "run", found))
    rows = [cells for cells in page.rows if len(cells) == 7 and cells[-1] != "Tokens"]
    assert [cells[0] for cells in rows[:15]] == ["✓ right"] * 10 + ["✓ same"] * 5
    assert [cells[0] for cells in rows[15:20]] == ["✗ still old"] * 4 + ["✗ moved"]
    first = [
        "question",
        "The capital of country 3 is",
        "Oldtown 3",
        "Oldtown 3",
        "Newtown 3",
        "1/2",
    ]
    assert rows[15][1:] == first


def test_answers_that_were_not_generated_are_judged_by_their_tokens(tmp_path):
    before, after = facts(3, wrong=1, moved=1)
    for one in (*before, *after):
        one["text"] = None
    verdicts = [answer.verdict for answer in knowledge.answers(before, after)]
    assert verdicts == ["right"] * 2 + ["wrong"] + ["right"] * 2 + ["wrong"] + [
        "moved",
        "same",
        "same",
    ]


def test_without_generation_nothing_is_said_to_be_said(worlds, tmp_path):
    world = worlds()
    unwrite.compare(world.folder, world.edits[:3], [LEARN], tmp_path / "run", exact=False)
    page = page_of(tmp_path / "run")
    assert "not generated" in page.text and "Exact form" not in page.text
    assert "None" not in page.text


# Small --------------------------------------------------------------------------------------------


def test_two_thousand_probes_of_many_methods_stay_below_three_megabytes(tmp_path):
    """500 edits make 2,000 probes; the answers are of the kind that grows when escaped."""
    before, after = facts(500, wrong=200, moved=200)
    for number, one in enumerate(after):
        one["text"] = f"{number}" + '"' * knowledge.ANSWER
    folder = make_run(tmp_path / "run", {"full-ft": [(before, after)]}, notes=["&" * 900] * 30)
    table, plan = read_json(folder / "table.json"), Plan.read(folder)
    _, places = shares(blocks=126)
    measured = {name: {**probe(name)[name], "mean": 0.1} for name in places}
    cell = folder / "cells" / table["rows"][0]["id"]
    write_json(cell / "where.json", located(measured, {"old": measured, "new": measured}, places))
    for number in range(1500):  # as many methods more, of the same cell
        label = f"{number} " + "'" * 60
        plan.methods[label] = plan.methods["full-ft"]
        table["rows"].append({**table["rows"][0], "method": label})
        table["means"].append({**table["means"][0], "method": label, "difference": None})
        failure = {"method": label, "edits": "cities", "size": None, "seed": 0, "error": "<" * 3000}
        table["failed"].append({**failure, "id": "x"})
    table["means"][0]["difference"] = None
    plan.write(folder)
    write_json(folder / "table.json", table)
    path = write_report(folder)
    assert 1_500_000 < path.stat().st_size < 3_000_000
    text = spaced(Page(path.read_text("utf-8")).text)
    for sentence in (
        f"{1501 - reporting.TOLD} more methods are shown in the table of cells only",
        f"{1501 - reporting.CELLS} more are left out here; table.csv has them all.",
        f"{reporting.TOLD - reporting.DETAILED} more are left out here; their answers are in",
        "more are left out here; all are in cells/cell-",
        "The map is left out here to keep the page small",
        f"{1501 - reporting.SETTINGS} more are in plan.json.",
        f"{1500 - reporting.FAILED} more are in table.json.",
    ):
        assert sentence in text, sentence


# Harmless -----------------------------------------------------------------------------------------


def hostile_run(folder, text):
    before, after = facts(2, wrong=1)
    for seen in (before, after):
        seen[0] |= {"prompt": text, "target": f"{text}!"}
    for one in after:
        if one["role"] == "locality":
            one["text"] = text
    run = make_run(
        folder, {f"a{text}": [(before, after)], "full-ft": [facts(2)]}, text, notes=[text]
    )
    table = read_json(run / "table.json")
    failure = {"method": text, "edits": text, "size": 1, "seed": 0, "id": "x", "error": text}
    write_json(run / "table.json", table | {"failed": [failure]})
    return run


def test_hostile_text_appears_as_text(tmp_path):
    text = HOSTILE.replace("\ud800", "")  # a lone surrogate cannot be written to a UTF-8 file
    page = page_of(hostile_run(tmp_path / "hostile", text))
    harmless = page_of(hostile_run(tmp_path / "harmless", "wordy"))
    assert tags_of(page) == tags_of(harmless), "no tag was opened by a label or an answer"
    assert page.raw == harmless.raw
    assert page.text.count("<script>alert(1)</script>\"'&[U+202E][U+0000][U+001B][31m<img") >= 9
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page.text)


def test_nothing_is_requested_and_nothing_foreign_runs(computed):
    text = (computed / "report.html").read_text("utf-8")
    assert_self_contained(text)
    assert not re.search(r"https?:", text)


# Honest -------------------------------------------------------------------------------------------


def judged(tmp_path, **found):
    folder = make_run(
        tmp_path / "run", {name.replace("_", "-"): [one] for name, one in found.items()}
    )
    return judge(read_json(folder / "table.json")["means"])


def test_the_verdict_names_who_beats_plain_fine_tuning(tmp_path):
    sentence, remarks = judged(tmp_path, full_ft=facts(40, moved=20), other=facts(40))
    assert sentence == (
        "other is on the Pareto front of reliability × generality × locality; other beats plain "
        "full-ft in locality by 25.0 points [17.5, 32.5]."
    )
    assert any("one in twenty" in remark for remark in remarks)


def test_what_chance_can_explain_is_no_win(tmp_path):
    sentence, remarks = judged(tmp_path, full_ft=facts(10, moved=1), other=facts(10))
    assert sentence.endswith("no method beats plain full-ft without a loss or beyond chance.")
    assert "With 10 edits, intervals are rough." in remarks


def test_a_gain_with_a_loss_is_a_trade(tmp_path):
    sentence, remarks = judged(tmp_path, full_ft=facts(40, moved=20), other=facts(40, wrong=20))
    assert sentence == (
        "no method is beaten by another in everything: full-ft and other are on the Pareto front "
        "of reliability × generality × locality; no method beats plain full-ft without a loss or "
        "beyond chance."
    )
    (trade,) = [remark for remark in remarks if "trades" in remark]
    assert trade.startswith(
        "other trades: better in locality by 25.0 points [17.5, 32.5], worse in"
    )
    assert "reliability by 25.0 points" in trade


def test_doing_nothing_is_not_called_a_success(tmp_path):
    before, _ = facts(40)
    sentence, remarks = judged(tmp_path, full_ft=facts(40, moved=20), other=(before, before))
    assert "other is on the front for what it keeps" in " ".join(remarks)
    assert "beats" not in sentence.replace("no method beats", "")


def test_a_weak_rival_is_called_weak(tmp_path):
    before, _ = facts(40)
    sentence, remarks = judged(tmp_path, full_ft=(before, before), other=facts(40))
    assert "other beats plain full-ft" in sentence
    assert "Plain full-ft itself did not learn" in " ".join(remarks)


def test_without_plain_fine_tuning_nothing_is_claimed(tmp_path):
    sentence, _ = judged(tmp_path, one=facts(5), two=facts(5))
    assert sentence.endswith("there is no plain full-ft beside them to be compared with.")


def test_one_method_has_no_front(tmp_path):
    sentence, _ = judged(tmp_path, full_ft=facts(5))
    assert sentence == "full-ft is the only method, so there is no front to be on."


def test_means_over_seeds_say_how_far_seeds_differ(tmp_path):
    found = {"full-ft": [facts(8), facts(8, wrong=2)]}
    page = page_of(make_run(tmp_path / "run", found, seeds=(0, 1)))
    assert "± 8.8" in page.text  # the sample deviation of 100 % and 87.5 % token shares
    assert "of several seeds, the first" in page.text


# The command --------------------------------------------------------------------------------------


def test_the_command_is_that_of_the_very_plan(computed, worlds, tmp_path):
    """Words of the page, typed: another run of the same plan, cell by cell."""
    run = tmp_path / "run"
    unwrite.write_edits(tmp_path / "people.jsonl", worlds().edits[:2])
    delicate = unwrite.Delicate(top=0.2, rounds=2, tuner=unwrite.LoRA(rank=2, epochs=1))
    methods = {"learn": unwrite.FullFT(epochs=1), "a b=c": delicate, "lora:rank=2:epochs=1": None}
    methods["lora:rank=2:epochs=1"] = "lora:rank=2:epochs=1"
    unwrite.compare(
        worlds().folder,
        tmp_path / "people.jsonl",
        methods,
        run,
        seeds=(3, 1),
        sizes=(1,),
        offset=1,
        plant=True,
        plant_lr=3e-4,
        exact=False,
        references=["no-change", "random-delta"],
    )
    (words,) = re.findall(
        r"<pre><code>(unwrite compare .*?)</code>", (run / "report.html").read_text()
    )
    _, *words = shlex.split(html.unescape(words))
    assert words[-2:] == ["--out", "run"]
    before = {one: (run / one).stat().st_mtime_ns for one in files(run) if "cells/" in one}
    result = CliRunner().invoke(app, [*words[:-1], str(run)])
    assert result.exit_code == 0, result.stderr
    after = {one: (run / one).stat().st_mtime_ns for one in files(run) if "cells/" in one}
    assert after == before, "nothing was added and nothing computed again"


def test_what_no_command_can_say_is_not_called_one(worlds, tmp_path):
    unwrite.compare(
        worlds().folder, worlds().edits[:1], [unwrite.FullFT(epochs=1)], tmp_path / "run"
    )
    assert command(Plan.read(tmp_path / "run"), read_json(tmp_path / "run/base.json"), "r") is None
    assert "This plan is none that one command line can give" in page_of(tmp_path / "run").text


# Plots --------------------------------------------------------------------------------------------

share = st.floats(0, 1)
kinds = st.sampled_from(["front", "method", "reference"])
points = st.lists(
    st.tuples(st.text("abc ", min_size=1, max_size=40), kinds, share, share), min_size=1
)


SVG = {"left": plots.LEFT, "top": plots.TOP, "bottom": plots.HEIGHT - plots.BOTTOM}


def reaches(panel):
    """Where the marks are, in the order in which they were given, and their titles."""
    return [
        (float(one.get("cx")), float(one.get("cy")), one.find("title").text)
        for one in panel.iter("circle")
    ]


def labels(panel):
    for group in panel.iter("g"):
        if group.get("class") == "label":
            yield group.find("text")


@settings(max_examples=30)
@given(points)
def test_marks_and_labels_of_a_scatter(found):
    """All inside the frame, in the order of their values; no label on a mark or another label."""
    given_points = [
        Point(label, kind, f"{n}", {"x": (a, a, a), "y": (b, b, b)})
        for n, (label, kind, a, b) in enumerate(found)
    ]
    panel = ElementTree.fromstring(scatter(given_points, "x", "y", "y against x"))
    marks = reaches(panel)
    assert [title for _, _, title in marks] == [point.title for point in given_points]
    for x, y, _ in marks:
        assert SVG["left"] <= x <= plots.WIDTH - plots.RIGHT
        assert SVG["top"] <= y <= SVG["bottom"]
    for (_, _, a, b), one in zip(found, marks, strict=True):
        for (_, _, c, d), other in zip(found, marks, strict=True):
            assert a > c or one[0] <= other[0]
            assert b > d or one[1] >= other[1]
    drawn = [(float(use.get("x")), float(use.get("y"))) for use in panel.iter("use")]
    assert drawn == [pytest.approx(mark[:2], abs=0.06) for mark in marks], "what is seen is there"
    boxes = [label_box(text) for text in labels(panel)]
    for number, box in enumerate(boxes):
        assert not any(overlap(box, other) for other in boxes[:number])
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y, _ in marks)


def label_box(text):
    width = plots.LETTER * len(text.text or "")
    shift = {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor")]
    left, middle = float(text.get("x")) - shift, float(text.get("y")) - 4
    return left, middle - plots.LINE / 2, left + width, middle + plots.LINE / 2


def overlap(one, other, slack=0.2):
    """Labels are rounded to a tenth of a pixel, so they may touch."""
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return across > slack and down > slack


@settings(max_examples=60)
@given(st.lists(st.floats(1e-3, 1e12), min_size=1, max_size=40), st.booleans())
def test_curves_stay_in_their_frame_and_their_labels_apart(values, log):
    values = values if log else [value / 1e12 for value in values]
    found = [
        Curve(str(n), [(1, value, "one"), (2, value, "two")]) for n, value in enumerate(values)
    ]
    panel = ElementTree.fromstring(curves(found, "x", "y over x", log=log))
    marks = reaches(panel)
    assert [title for _, _, title in marks] == ["one", "two"] * len(values)
    assert all(SVG["left"] <= x <= plots.WIDTH - plots.END for x, _, _ in marks)
    assert all(SVG["top"] <= y <= SVG["bottom"] for _, y, _ in marks)
    heights = sorted(float(text.get("y")) for text in labels(panel))
    room = min(plots.LINE, (SVG["bottom"] - SVG["top"]) / max(1, len(values) - 1))
    assert all(b - a >= room - 0.15 for a, b in itertools.pairwise(heights))
    ticks = [one.find("text") for one in panel.iter("g") if one.get("class") == "tick"]
    told = [tick.text for tick in ticks if tick.get("text-anchor") == "end"]
    assert 2 <= len(told) <= 6
    assert len(set(told)) == len(told)


def test_a_plot_asks_for_no_style_and_has_no_text_that_acts():
    """The page's policy forbids styles inside of elements; formulas and tags are text."""
    names = ("$x_1$", "<b>&amp;</b>", "\\frac", "😀")
    values = {"x": (0.2, 0.1, 0.3), "y": (0.4, 0.3, 0.5)}
    moved = {"x": (0.8, 0.7, 0.9), "y": (0.9, 0.3, 0.95)}
    both = [Point(name, "front", name, values) for name in names[:1]]
    both += [Point(name, "method", name, moved) for name in names[1:2]]
    for name in names:
        panel = scatter([*both, Point(name, "reference", name, values)], "x", "y", name)
        assert "style" not in panel and "color" not in panel and "#0" not in panel
        shown = ElementTree.fromstring(panel)
        assert {title.text for title in shown.iter("title")} == {*names[:2], name}
        assert not list(shown.iter("b"))
        assert names[0] in {text.text for text in shown.iter("text")}


def test_plots_of_the_same_numbers_are_the_same_bytes():
    points = [Point("one", "front", "one", {"x": (0.2, 0.1, 0.3), "y": (0.4, 0.3, 0.5)})]
    assert scatter(points, "x", "y", "a") == scatter(points, "x", "y", "a")
    ids = [set(re.findall(r'id="(\w+)"', scatter(points, "x", "y", name))) for name in "ab"]
    assert ids[0] and not ids[0] & ids[1], "two plots on a page"


def test_retention_is_drawn_and_told(tmp_path):
    def step(number, kept):
        table = {"reliability": {"token": kept, "exact": kept}, "locality": {"token": kept}}
        later = table if number > 1 else None
        new = {"new": {"reliability": {"token": 1.0}}, "earlier": later}
        return {"step": number, "edits": number, **new, "perplexity": 20.0 * number}

    steps = {"full-ft": [step(1, 1.0), step(2, 0.5), step(3, 0.25)]}
    folder = make_run(tmp_path / "run", {"full-ft": [facts(3)]}, steps=steps)
    text = RunReport(folder).render()
    page = Page(text)
    rows = [cells for cells in page.rows if cells and cells[0] == "full-ft" and len(cells) == 7]
    assert [spaced(" ".join(cells[2:])) for cells in rows] == [
        "1 100 % – – 20.0",
        "2 100 % 50 % 50 % 40.0",
        "3 100 % 25 % 25 % 60.0",
    ]
    titles = [spaced(one) for one in re.findall(r"<title>([^<]*)</title></circle>", text)]
    for title in ("full-ft, 3 edits: 25 %", "full-ft, 3 edits: 100 %", "full-ft, 2 edits: 40.0"):
        assert title in titles
    assert text.count('class="curve"') == 4


# In a browser -------------------------------------------------------------------------------------

# What a reader does, and what can be seen then; the page's own script has run before it.
READER = """
const view = document.querySelector(".view");
const rows = () => [...view.querySelectorAll("tr[data-role]")].filter((row) => row.offsetParent);
for (const one of document.querySelectorAll("details")) one.open = true;
const seen = { all: rows().length };
const search = view.querySelector("input[type=search]");
const only = view.querySelector("input[type=checkbox]");
only.click(); seen.failures = rows().length; only.click();
search.value = "country 3"; search.dispatchEvent(new Event("input")); seen.found = rows().length;
const heads = [...view.querySelectorAll("thead button")]; seen.sortable = heads.length;
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
seen.unreachable = [...document.querySelectorAll("button, input, select, summary")]
  .filter((it) => it.offsetParent && it.tabIndex < 0).length;
const panels = [...document.querySelectorAll("svg.panel")];
seen.panels = panels.filter((it) => it.clientWidth > 150).length;
return seen;
"""


@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_shows_searches_and_filters(tmp_path, page, width):
    found = {"other": [facts(5, wrong=2, moved=1)], "full-ft": [facts(5)]}
    text = RunReport(make_run(tmp_path / "run", found)).render()
    (tmp_path / "page.html").write_text(text, "utf-8")
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((tmp_path / "page.html").as_uri())
    seen = page.evaluate(f"() => {{{READER}}}")
    assert page.faults == []
    assert seen == {
        "all": 15,
        "failures": 5,
        "found": 2,
        "sortable": 7,
        "wide": 0,
        "unreachable": 0,
        "panels": 6,
    }


def test_observations_are_read_once(tmp_path, monkeypatch):
    """The page is written after every cell: what is known of the others is not read again."""
    folder = make_run(tmp_path / "run", {"full-ft": [facts(3)], "other": [facts(3)]})
    read = []
    monkeypatch.setattr(reporting, "read_jsonl", lambda path: read.append(path) or read_jsonl(path))
    report = RunReport(folder)
    first = report.render()
    assert len(read) == 4
    assert report.render() == first
    assert len(read) == 4
