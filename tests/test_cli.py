"""The command line: what goes where, which exit codes, and a sentence for every mistake."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Processes
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app
from unwrite.console import harmless
from unwrite.scores import ROLES

LEARN = ("--set", "lr=1e-3", "--set", "epochs=60")  # until learned: a few epochs
SCORE_FIELDS = {"token", "exact", "n", "token_low", "token_high", "exact_low", "exact_high"}


def real(*words, **environment):
    """A real process of the command; standard input is closed and no output is a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "unwrite", *(str(word) for word in words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=600,
        check=False,
    )


def run(*words, code=0):
    """The command in this process; checks the exit code and that no bug showed."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    assert "\x1b" not in result.stderr + result.stdout
    return result


def run_json(*words, code=0):
    """The one object on standard output."""
    result = run(*words, "--json", code=code)
    assert result.stdout.isascii()
    return json.loads(result.stdout)


def refused(*words, code=2):
    """The sentence with which a command was refused; with ``--json`` it is an object as well."""
    result = run(*words, code=code)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Loading ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    assert result.stdout == ""
    assert run_json(*words, code=code) == {"error": lines[0].removeprefix("Error: ")}
    return lines[0]


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Speeds are not measured again for every test."""
    from unwrite import plan

    monkeypatch.setattr(plan, "_speeds", lambda: (1e10, 1e10))


@pytest.fixture(scope="module")
def shared(worlds, tmp_path_factory):
    """A home with two updates, and a file with all edits; read-only."""
    folder = tmp_path_factory.mktemp("cli")
    edits = folder / "edits.jsonl"
    unwrite.write_edits(edits, worlds().edits)
    run("init", folder / "home", "--base", worlds().folder)
    for offset in (0, 10):
        run("update", folder / "home", edits, "--limit", 3, "--offset", offset, *LEARN)
    return folder


@pytest.fixture
def home(shared, tmp_path):
    shutil.copytree(shared / "home", tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def edits(shared):
    return shared / "edits.jsonl"


def live(home):
    return unwrite.open(home).ledger.live()


# ---- real processes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """The server of quick processes."""
    return Processes(tmp_path_factory.mktemp("processes"))


def test_the_life_of_a_home_in_real_processes(processes, worlds, edits, tmp_path):
    home = tmp_path / "home"
    words = ("update", home, edits, "--base", worlds().folder, "--limit", 2, *LEARN)
    made = real(*words, "--why", "first", "--json")
    assert made.returncode == 0, made.stderr
    update = json.loads(made.stdout)
    assert update["committed"]
    assert "\x1b" not in made.stderr
    assert "Committed as " + update["id"] in made.stderr

    words = ("--offset", 5, "--limit", 2, "--require", "locality>1")
    missed = processes.run("update", home, edits, *words, "--json")
    assert missed.code == 3, missed.err
    assert json.loads(missed.out)["committed"] is False
    assert missed.err.splitlines()[-1].startswith("Error: Nothing was committed")

    asked = processes.run("ask", home, worlds().edits[0].prompt)
    assert (asked.code, asked.out) == (0, worlds().edits[0].new + "\n")

    undone = processes.run("undo", home, update["id"], "--json")
    assert undone.code == 0
    assert json.loads(undone.out)["at_base"] is True

    twice = processes.run("undo", home, update["id"], "--json")
    assert twice.code == 2
    assert json.loads(twice.out)["error"] in twice.err
    assert "Traceback" not in twice.err

    report = processes.run("report", home)
    assert (report.code, report.out) == (0, f"{home / 'report.html'}\n")
    assert live(home) == []


def test_shells_can_complete_the_command():
    helped = real("--help")
    assert helped.returncode == 0
    assert "--install-completion" in helped.stdout
    assert "--show-completion" in helped.stdout
    for verb in ("init", "update", "ask", "evaluate", "history", "show", "diff", "undo"):
        assert verb in helped.stdout
    script = real(_UNWRITE_COMPLETE="complete_bash", COMP_WORDS="unwrite ver", COMP_CWORD="1")
    assert "Traceback" not in script.stderr


def test_words_that_the_pipe_cannot_encode_do_no_harm(home):
    home = home.rename(home.with_name("żółw"))
    table = real("history", home, "--json", PYTHONIOENCODING="ascii")
    assert json.loads(table.stdout)["home"] == str(home)
    page = real("report", home, PYTHONIOENCODING="ascii")  # loads no torch
    assert page.stdout.strip().endswith("\\u017c\\xf3\\u0142w/report.html")


# ---- what --json promises ------------------------------------------------------------------------


def test_init_says_what_the_home_is_of(worlds, tmp_path):
    facts = run_json("init", tmp_path / "home", "--base", worlds().folder)
    assert facts["home"] == str(tmp_path / "home")
    assert facts["name"] == str(worlds().folder)
    assert facts["dtype"] == "float32"
    assert facts["parameters"] > 70_000
    assert run_json("init", tmp_path / "home", "--base", worlds().folder) == facts, "once or twice"


def test_update_gives_every_promised_field(home, edits):
    done = run_json(
        *("update", home, edits, "--limit", 5, "--offset", 20, "--method", "full-ft", *LEARN),
        *("--require", "reliability>=0.5", "--require", "perplexity_ratio<=100"),
        *("--why", "because", "--seed", 7, "--only-known"),
    )
    assert set(done) >= {
        *("id", "committed", "method", "edits", "seconds", "scores", "perplexity", "delta"),
        "fingerprint",
    }
    assert done["committed"] is True
    assert done["method"] == "full-ft"
    assert 1 <= done["edits"] <= 5
    assert done["settings"]["seed"] == 7
    assert set(done["seconds"]) == {"train", "arithmetic", "observe"}
    assert set(done["perplexity"]) == {"before", "after"}
    assert set(done["delta"]) >= {"encoding", "tensors", "changed_fraction", "bytes"}
    for when in ("before", "after"):
        assert set(done["scores"][when]) == set(ROLES)
        for role, score in done["scores"][when].items():
            assert set(score) == SCORE_FIELDS
            for form in ("token", "exact"):
                if role == "portability":
                    assert score[form] is None
                else:
                    assert 0 <= score[f"{form}_low"] <= score[form] <= score[f"{form}_high"] <= 1
    assert live(home)[-1] == done["id"]
    entry = run_json("history", home)["entries"][-1]
    assert (entry["id"], entry["why"], entry["live"]) == (done["id"], "because", True)
    environment = run_json("show", home, done["id"])["environment"]
    assert environment["command"]


def test_a_budget_is_that_of_the_default_auto(home, edits):
    plan = run_json("update", home, edits, "--dry-run", "--budget", "fast", "--limit", 3)
    longer = run_json("update", home, edits, "--dry-run", "--budget", "thorough", "--limit", 3)
    plain = run_json("update", home, edits, "--dry-run", "--limit", 3)
    assert plan["method"] == longer["method"] == plain["method"] == "auto"
    assert plan["train_seconds"] < longer["train_seconds"]
    assert "auto.budget must be 'fast' or" in refused("update", home, edits, "--budget", "endless")
    words = ("update", home, edits, "--budget", "fast", "--method", "full-ft")
    assert "no field 'budget'" in refused(*words)


def test_auto_says_what_it_chose_and_show_says_it_again(home, edits, tmp_path, monkeypatch):
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    words = ("update", home, edits, "--budget", "fast", "--limit", 3, "--set", "lr=1e-3")
    done = run_json(*words)
    assert done["committed"]
    shown = run_json("show", home, done["id"])
    assert "3 edits" in " ".join(shown["notes"]["sentences"])
    assert shown["notes"]["budget"] == "fast"
    assert "Checked without the records' own probes" in run("show", home, done["id"]).stderr


def test_a_dry_run_changes_nothing(home, edits, tmp_path, snapshot, worlds):
    before = snapshot(home)
    plan = run_json("update", home, edits, "--dry-run", "--limit", 3)
    assert (plan["dry_run"], plan["committed"], plan["edits"]) == (True, False, 3)
    assert plan["memory_bytes"] > 0
    assert snapshot(home) == before
    new = tmp_path / "new"
    assert run_json("update", new, edits, "--dry-run", "--base", worlds().folder)["edits"] == 30
    assert not new.exists()
    assert "add --base" in refused("update", new, edits, "--dry-run")


def test_a_missed_requirement_prints_what_was_measured(home, edits, snapshot):
    before = snapshot(home)
    words = ("update", home, edits, "--offset", 20, "--limit", 3, "--require", "locality.exact>1")
    measured = run_json(*words, code=3)
    assert measured["committed"] is False
    assert len(measured["unmet"]) == 1
    assert "Measured, not committed" in run(*words, code=3).stderr
    assert snapshot(home) == before


def test_ask_now_and_before(home, worlds):
    edit = worlds().edits[0]
    first, second = live(home)
    assert run("ask", home, edit.prompt, "--at", first).stdout == edit.new + "\n"
    assert run("ask", home, edit.prompt, "--at", "base").stdout == edit.old + "\n"
    later = worlds().edits[10]
    assert run_json("ask", home, later.prompt)["answer"].strip() == later.new
    assert run_json("ask", home, later.prompt, "--at", second) == {
        "prompt": later.prompt,
        "answer": later.new,
        "at": second,
    }


def test_an_empty_answer_is_said_to_be_one(home, monkeypatch):
    monkeypatch.setattr("unwrite.home.Home.ask", lambda *_, **__: " \n")
    told = run("ask", home, "ada works as a")
    assert told.stdout == "\n"
    assert "The model says nothing" in told.stderr


def test_evaluate_a_home_or_a_model(home, edits, worlds, snapshot):
    before = snapshot(home)
    scores = run_json("evaluate", home, edits, "--limit", 3)["scores"]
    now = unwrite.open(home).evaluate(worlds().edits[:3])[1]
    assert scores["before"]["reliability"]["exact"] == 0.0
    assert scores["after"]["reliability"]["exact"] == now["reliability"].exact
    model = run_json("evaluate", worlds().folder, edits, "--limit", 3)
    assert model["scores"]["before"] == model["scores"]["after"] == scores["before"]
    assert snapshot(home) == before


def test_history_show_and_diff_agree_with_the_library(home, worlds):
    opened = unwrite.open(home)
    first, second = live(home)
    assert run_json("history", home)["entries"] == opened.history()
    assert run_json("show", home, first) == opened.show(first)
    assert run_json("diff", home, first)["rows"] == opened.diff(first)
    assert run_json("diff", home, first, second)["rows"] == opened.diff(first, second)
    assert first in run("history", home).stderr
    assert "Where the change lives" in run("show", home, first).stderr
    text = run("diff", home, first).stderr
    assert worlds().edits[0].prompt in text
    assert worlds().edits[0].new in text


@pytest.fixture
def method(monkeypatch):
    """A method that the command knows by the name ``talking``, as an entry point would make it."""
    from dataclasses import dataclass
    from typing import ClassVar

    import torch

    from unwrite import methods
    from unwrite.change import LowRank
    from unwrite.delta import Delta

    @dataclass(frozen=True)
    class Talking:
        """Moves one projection a little, and says so."""

        name: ClassVar[str] = "talking"
        paper: ClassVar[str] = "none"
        advice: ClassVar[str] = "tests"

        def delta(self, model, edits):
            file = "model.layers.1.mlp.down_proj.weight"
            rows, columns = model.weights.shape(file)
            change = LowRank(torch.full((rows, 1), 0.01), torch.ones(1, columns))
            size = rows * columns
            old = {"mean": 0.02, "squared_norm": 4e-4 * size, "changed": size, "size": size}
            said = {"sentences": ["Rounds: 3.", EVIL], "rounds": 3}
            parts = {"old": {file: old}, "new": {}}
            return Delta.from_changes({file: change}, {"notes": said, "parts": parts})

    build = methods.build
    monkeypatch.setattr(
        methods,
        "build",
        lambda name, settings: Talking() if name == "talking" else build(name, settings),
    )


def test_update_and_show_tell_what_the_method_says(home, edits, method):
    words = ("update", home, edits, "--limit", 1, "--method", "talking")
    missed = run(*words, "--require", "perplexity_ratio<0.01", code=3)
    assert "Rounds: 3.\n" in missed.stderr
    done = run(*words)
    assert "Rounds: 3.\n" in done.stderr
    update = live(home)[-1]
    facts = run_json("show", home, update)
    assert facts["notes"]["rounds"] == 3
    shown = run("show", home, update).stderr
    assert "Rounds: 3.\n" in shown
    assert not set(shown + done.stderr + missed.stderr) & set("\x1b\x07\x9b\u202e\u2066")


def test_show_compares_the_deltas_of_a_method_by_kind(home, edits, method):
    run("update", home, edits, "--limit", 1, "--method", "talking")
    update = live(home)[-1]
    shown = run("show", home, update).stderr
    assert "MLP projections hold 100\u00a0% of the core's squared norm." in shown
    lines = [line.split() for line in shown.splitlines()]
    # Two blocks have a down projection each, and one of them moves by 0.01 (in "old" by 0.02).
    first = next(n for n, line in enumerate(lines) if line[:2] == ["down", "old"])
    old, new, core = lines[first][1:], lines[first + 1], lines[first + 2]
    norms = [row["relative"] for row in run_json("show", home, update)["kinds"]["core"]]
    (norm,) = [one for one in norms if one]
    assert core == ["core", "100.0", "5.0e-03", f"{100 * norm:.2g}", "50.0"]
    assert old == ["old", "100.0", "1.0e-02", f"{200 * norm:.2g}", "50.0"]
    assert new == ["new", "0.0", "0.0e+00", "0", "0.0"]
    assert ["1", "100.00"] in lines, "the grid of blocks and kinds"
    whole = run("show", home, live(home)[0]).stderr
    table = whole[whole.index("Where the change lives") :].splitlines()
    kinds = [line.split()[0] for line in table if " change  " in line]
    assert kinds == ["embedding", "q", "k", "v", "o", "gate", "up", "down", "norm"]
    assert max(map(len, table)) < 80, "fits any terminal"


def test_an_adapter_is_exported_where_the_changes_are_of_low_rank(home, edits, method, tmp_path):
    for update in live(home):
        run("undo", home, update, "--no-recheck")
    run("update", home, edits, "--limit", 1, "--method", "talking")
    done = run_json("export", home, tmp_path / "adapter", "--as", "adapter")
    assert done == {"folder": str(tmp_path / "adapter"), "as": "adapter"}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text("utf-8"))
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj"]


def test_undo_says_what_later_updates_still_do(home):
    first, second = live(home)
    done = run("undo", home, first, "--why", "wrong")
    assert f"base + {second}" in done.stderr
    assert f"{second} was trained on top of it" in done.stderr
    result = run_json("undo", home, second)
    assert result["at_base"] is True
    assert (result["live"], result["later"]) == ([], {})


def test_verify_and_export(home, tmp_path):
    assert run_json("verify", home) == {"home": str(home), "ok": True, "problems": []}
    assert "is sound" in run("verify", home).stderr
    assert run("export", home, tmp_path / "model").stdout == f"{tmp_path / 'model'}\n"
    assert (tmp_path / "model" / "config.json").is_file()
    as_delta = run_json("export", home, tmp_path / "delta", "--as", "delta")
    assert as_delta == {"folder": str(tmp_path / "delta"), "as": "delta"}
    (home / "updates" / live(home)[0] / "after.jsonl").write_text("{}\n")
    found = run_json("verify", home, code=2)
    assert found["ok"] is False
    assert len(found["problems"]) == 1
    assert "after.jsonl" in run("verify", home, code=2).stderr


def test_methods_are_described(tmp_path):
    described = {method["name"]: method for method in run_json("methods")["methods"]}
    assert described["full-ft"]["fields"]["lr"] == {"type": "float", "default": unwrite.FullFT().lr}
    for method in described.values():
        assert set(method) >= {"name", "aliases", "fields", "paper"}
        assert all(set(field) == {"type", "default"} for field in method["fields"].values())
    assert "full-ft" in run("methods").stderr


def test_doctor_with_and_without_a_model(worlds):
    alone = run_json("doctor")
    assert alone["plan"] is None
    assert alone["machine"]["torch"]
    planned = run_json("doctor", worlds().folder, "--method", "full-ft")
    assert planned["plan"]["parameters"] == unwrite.load(worlds().folder).weights.parameters()
    assert "This machine" in run("doctor").stderr


def test_report_writes_where_it_is_told(home, tmp_path):
    page = tmp_path / "page.html"
    assert run("report", home, "--out", page).stdout == f"{page}\n"
    assert page.read_text("utf-8").startswith("<!")
    assert run_json("report", home) == {"report": str(home / "report.html")}


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--method", "full-tf"), "did you mean 'full-ft'"),
        (("--set", "epoch=3"), "did you mean 'epochs'"),
        (("-m", "full-ft", "--set", "colour=red"), "Fields: epochs, lr, batch_size"),
        (("-m", "full-ft", "--set", "epochs=many"), "full-ft.epochs must be int, not 'many'"),
        (("-m", "full-ft", "--set", "epochs=0"), "greater than 0"),
        (("-m", "full-ft", "--set", "until=never"), "'learned' or 'epochs'"),
        (
            ("--set", "until=epochs"),
            "No --method was named, so it is auto; 'unwrite methods' lists",
        ),
        (("--set", "epochs=many"), "auto.epochs must be int or none, not 'many'. (No --method was"),
        (("--set", "lr=0"), "greater than 0"),
        (("--set", "lr=inf"), "ledger"),
        (("--set", "epochs"), "KEY=VALUE"),
        (("--set", "lr=1", "--set", "lr=2"), "given twice"),
        (("--set", "lr.x=1"), "no fields of its own"),
        (("--require", "locality"), "cannot be read"),
        (("--require", "portability>=0.1"), "no probes for portability"),
        (("--protect", "no-such-file"), "no-such-file"),
        (("--offset", "31"), "offset 31 is beyond the end"),
    ],
)
def test_a_mistake_in_an_update_is_one_sentence(home, edits, snapshot, words, expected):
    before = snapshot(home)
    assert expected in refused("update", home, edits, *words)
    assert snapshot(home) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "edits.jsonl"),
        (b"", "empty"),
        (b"\xff\xfe\x00", "UTF-8|UTF-16|not"),
        (b"{\n", "line 2"),
        (b'{"prompt": "ada works as a"}\n', "new"),
        (b'{"prompt": "ada works as a", "new": "baker", "old": "baker"}\n', "nothing to change"),
        (b'{"prompt": "ada works as a", "new": "\\ud800"}\n', "line 1|Unicode|characters"),
    ],
)
def test_a_mistake_in_the_edits_is_one_sentence_and_makes_no_home(
    worlds, tmp_path, content, expected
):
    import re

    bad = tmp_path / "edits.jsonl"
    if content is not None:
        bad.write_bytes(content)
    said = refused("update", tmp_path / "home", bad, "--base", worlds().folder)
    assert re.search(expected, said), said
    assert not (tmp_path / "home").exists()


def test_a_mistake_in_a_path_or_an_id_is_one_sentence(home, edits, worlds, tmp_path):
    first = live(home)[0]
    nowhere = tmp_path / "nowhere"
    for words in (("history",), ("verify",), ("ask", "x"), ("show", first), ("undo", first)):
        assert "is not a model home (it does not exist)" in refused(words[0], nowhere, *words[1:])
    assert "is not a model home" in refused("update", nowhere, edits)
    assert "is not a model home" in refused("history", edits)
    assert "name is too long" in refused("history", "a" * 300)
    assert "name is too long" in refused("export", home, tmp_path / ("a" * 300))
    for verb in ("show", "undo", "diff"):
        assert first in refused(verb, home, "u-00000000")
        assert first in refused(verb, home, "../../etc")
    assert first in refused("ask", home, "x", "--at", "u-00000000")
    assert "empty" in refused("ask", home, " ")
    assert "empty" in refused("init", nowhere, "--base", "")
    assert "no folder" in refused("init", nowhere, "--base", tmp_path / "model")
    assert "no config.json" in refused("init", nowhere, "--base", tmp_path)
    assert "a home is a folder" in refused("init", edits, "--base", worlds().folder)
    assert "cannot change its base" in refused("init", home, "--base", worlds("gpt2").folder)
    assert "model, delta or adapter" in refused("export", home, nowhere, "--as", "gguf")
    assert "low rank" in refused("export", home, nowhere, "--as", "adapter")
    assert "not empty" in refused("export", home, home)
    assert "full-ft" in refused("doctor", "--method", "x")
    assert "no folder" in refused("doctor", tmp_path / "model")
    assert "no folder" in refused("evaluate", tmp_path / "model", edits)
    assert "not a model home" in refused("report", tmp_path)
    assert not nowhere.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("frobnicate",),
        ("ask",),
        ("ask", "home", "prompt", "--loud"),
        ("update", "home", "edits", "--limit", "0"),
        ("update", "home", "edits", "--limit", "three"),
        ("init", "home"),
    ],
)
def test_wrong_usage_ends_with_code_two_and_says_so_on_standard_error(words):
    result = run(*words, code=2)
    assert result.stdout == ""
    assert "Error" in result.stderr or "Usage" in result.stderr


def test_text_that_is_no_text_is_refused(home, edits):
    assert "not valid Unicode" in refused("ask", home, "ada \udcff")
    assert "not valid Unicode" in refused("update", home, edits, "--why", "\udcff")
    assert "not a model home" in run_json("history", Path("\udcff"), code=2)["error"]


def test_a_bug_keeps_its_traceback(home, monkeypatch):
    from unwrite.home import Home

    def broken(self):
        raise AssertionError("a bug")

    monkeypatch.setattr(Home, "history", broken)
    with pytest.raises(AssertionError, match="a bug"):
        run("history", home)


# ---- foreign text --------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066\x9b31m[bold]x[/nonsense]"


def test_no_control_character_of_foreign_text_reaches_the_terminal(home, tmp_path, worlds):
    evil = tmp_path / "evil.jsonl"
    record = {"prompt": "ada works as a", "new": "miller", "source": EVIL, "id": EVIL}
    record["paraphrases"] = ["the job of ada is " + EVIL]
    evil.write_text(json.dumps(record) + "\n", "utf-8")
    done = run_json("update", home, evil, "--why", EVIL, *LEARN)
    texts = [
        run("show", home, done["id"]).stderr,
        run("history", home).stderr,
        run("diff", home, done["id"]).stderr,
        run("undo", home, done["id"], "--why", EVIL).stderr,
        run("history", home / EVIL, code=2).stderr,
        run("update", home, evil, "--method", EVIL, code=2).stderr,
        run("update", home, evil, "--set", f"{EVIL}=1", code=2).stderr,
        run("update", home, tmp_path / EVIL, code=2).stderr,
        run("ask", home, "x", "--at", EVIL, code=2).stderr,
        run("ask", home, EVIL).stderr,
    ]
    for text in texts:
        assert not set(text) & set("\x1b\x07\x9b\u202e\u2066")
    assert "[bold]x[/nonsense]" in texts[0]


def test_an_answer_is_made_harmless(home, monkeypatch):
    from unwrite.home import Home

    monkeypatch.setattr(Home, "ask", lambda self, prompt, **_: EVIL)
    assert not set(run("ask", home, "x").stdout) & set("\x1b\x07\x9b\u202e\u2066")
    result = CliRunner().invoke(app, ["ask", str(home), "x", "--json"])
    assert json.loads(result.stdout)["answer"] == EVIL
    assert not set(result.stdout) & set("\x1b\x07\x9b\u202e\u2066")


def test_a_home_in_a_folder_of_brackets(shared, tmp_path):
    place = tmp_path / "[red]x[/wrong]"
    shutil.copytree(shared / "home", place)
    assert "[red]x[/wrong]" in run("history", place).stderr.replace("\n", "")


def test_harmless_keeps_words_and_drops_controls():
    assert harmless("a\tb\nc") == "a b c"
    assert harmless("żółw ✓ 日本") == "żółw ✓ 日本"
    assert harmless(EVIL) == "]0;owned[2Jgnp.exe31m[bold]x[/nonsense]"
    assert len(harmless("x" * 1000)) == 200


# ---- a terminal ----------------------------------------------------------------------------------


def test_on_a_terminal_there_are_bars_and_they_are_cleared():
    from rich.console import Console

    from unwrite.console import Terminal

    out = Terminal()
    out.console = Console(force_terminal=True, width=80, file=(written := Written()))
    with out.stage("outer", 2) as advance, out.stage("[inner", 4) as inner:
        inner(4, "[done")
        advance(2, "")
    assert "[inner" in "".join(written.parts)


class Written:
    """A file in memory that says it is a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.parts = []

    def write(self, text):
        self.parts.append(text)

    def flush(self):
        pass

    def isatty(self):
        return True


def test_the_end_of_a_command_is_not_spent_looking_for_cycles():
    """What is registered first is called last: it sees what the command left to the collector."""
    script = (
        "import atexit, gc, sys; atexit.register(lambda: print(gc.get_freeze_count()))\n"
        "from unwrite.cli import main; sys.argv = ['unwrite', '--help']; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True
    )
    assert int(done.stdout.split()[-1]) > 1000


def test_a_pipe_that_is_closed_early_is_no_error(home):
    with contextlib.ExitStack() as stack:
        process = subprocess.Popen(
            [sys.executable, "-m", "unwrite", "history", str(home), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        stack.enter_context(process)
        process.stdout.close()
        error = process.stderr.read()
    assert "Traceback" not in error
