"""Hostile bytes: every reader answers or says a sentence that is safe to show, within bounds."""

import json
import os
import random

import pytest

import unwrite
from benchmarks.fuzz import mutated, readers, run_one
from unwrite.errors import UnwriteError
from unwrite.forgetting import read_examples
from unwrite.ledger import Ledger, _hash, _line
from unwrite.tasks import read_tasks
from unwrite.tensorfile import LARGEST_HEADER, TensorFile


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return readers(tmp_path_factory.mktemp("readers"))


NAMES = (
    *("edits", "edit pairs", "tasks", "examples", "prompts", "matrix", "ledger", "delta"),
    *("safetensors", "config", "plan of a comparison", "requirements"),
)


def test_these_are_all_readers(known):
    assert set(known) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_right_is_read(known, name):
    reader, seeds = known[name]
    accepted = [run_one(reader, seed) for seed in seeds]
    assert any(accepted)


@pytest.mark.parametrize("name", NAMES)
def test_every_mutation_is_an_answer_or_a_sentence(known, name):
    reader, seeds = known[name]
    draw = random.Random(0)
    refused = sum(not run_one(reader, mutated(draw.choice(seeds), draw)) for _ in range(300))
    assert refused > 30, "the mutations hardly hurt"


def test_what_a_reader_must_not_do_is_found():
    def bug(_):
        raise KeyError("x")

    def escapes(_):
        raise UnwriteError("\x1b[2Jgone")

    with pytest.raises(KeyError):
        run_one(bug, b"")
    with pytest.raises(AssertionError, match="acts on terminals"):
        run_one(escapes, b"")


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "' + b"a" * 3_000_000,
        b"[" * 1_000_000,
        b'{"a":' * 300_000,
        b'{"prompt": ' + b"9" * 100_000 + b"}",
        b"\n" * 1_000_000,
        b"\xff" * 1_000_000,
        b'{"prompt": "a", "new": "b", "prompt": "c"}',
        '{"prompt": "\u202eabc", "new": "\x1b[2J"}'.encode(),
    ],
    ids=["line", "lists", "objects", "number", "lines", "bytes", "twice", "signs"],
)
@pytest.mark.parametrize(
    "read", [unwrite.read_edits, read_tasks, read_examples], ids=["edits", "tasks", "examples"]
)
def test_giant_and_odd_files_are_answered(tmp_path, read, content):
    file = tmp_path / "input"
    file.write_bytes(content)
    run_one(read, file)


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    file = tmp_path / "a.safetensors"
    with file.open("wb") as opened:  # sparse: takes no room on the disk
        opened.write((LARGEST_HEADER + 1).to_bytes(8, "little"))
        opened.truncate(LARGEST_HEADER + 1000)
    with pytest.raises(UnwriteError, match="not a safetensors file"):
        TensorFile(file)
    for claimed in (2**63, 2**64 - 1, 10_000):
        file.write_bytes(claimed.to_bytes(8, "little") + b"{}")
        with pytest.raises(UnwriteError, match="not a safetensors file"):
            TensorFile(file)


# ---- homes of strangers --------------------------------------------------------------------------


def resealed(home, change):
    """Change the entries of a ledger and make the hash chain anew, as a stranger could."""
    path = home / "ledger.jsonl"
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    change(entries)
    previous = "0" * 64
    for number, entry in enumerate(entries):
        entry |= {"n": number, "previous": previous}
        entry["sha256"] = previous = _hash(entry)
    path.write_text("".join(_line(entry) + "\n" for entry in entries), "utf-8")


def set_id(entries):
    entries[1]["id"] = "../../../etc"


def set_file(entries):
    entries[1]["files"]["../../../../etc/passwd"] = "0" * 64


def drop_method(entries):
    del entries[1]["method"]


def text_for_number(entries):
    entries[1]["perplexity"]["after"] = "\x1b[2J"


def no_number(entries):
    entries[1]["scores"]["after"]["reliability"]["token"] = [1]


def huge_number(entries):
    entries[1]["perplexity"]["after"] = 10**400


def do_nothing(entries):
    entries[1]["do"] = "format"


def revert_the_unknown(entries):
    entries.append({"do": "revert", "of": "u-00000000", "at": "", "by": "", "why": ""})


def apply_twice(entries):
    entries.append(dict(entries[1]))


@pytest.mark.parametrize(
    "change",
    [
        set_id,
        set_file,
        drop_method,
        text_for_number,
        no_number,
        huge_number,
        do_nothing,
        revert_the_unknown,
        apply_twice,
    ],
)
def test_a_ledger_with_a_true_chain_and_false_content_is_refused(place, sentence, change):
    home = place / "home"
    (update,) = unwrite.open(home).ledger.live()
    resealed(home, change)
    for words in (
        ("history", home),
        ("show", home, update),
        ("ask", home, "ada works as a"),
        ("undo", home, update),
        ("export", home, place / "out"),
        ("replay-update", home, update),
    ):
        sentence(r"ledger\.jsonl, line \d is damaged", *words)


@pytest.mark.parametrize(
    "update", ["../../../etc", "/etc", "u-0000000g", "", "u-00000000/..", "\0"]
)
def test_an_id_that_is_a_path_leads_nowhere(place, sentence, snapshot, update):
    home = place / "home"
    before = snapshot(place)
    for verb in ("show", "diff", "undo", "replay-update"):
        sentence("no update", verb, home, update)
    sentence("no update", "ask", home, "ada works as a", "--at", update)
    assert snapshot(place) == before


def test_links_of_a_home_are_not_followed_outside(place, sentence, tmp_path):
    home = place / "home"
    (update,) = unwrite.open(home).ledger.live()
    folder = home / "updates" / update
    outside = tmp_path / "outside"
    for link in (folder / "edits.jsonl", folder / "delta" / "00001.safetensors"):
        link.rename(outside)
        link.symlink_to(outside)  # even though the content is the very same
        sentence("leads out of the home", "replay-update", home, update)
        assert any("leads out" in problem for problem in unwrite.open(home).verify())
        link.unlink()
        outside.rename(link)
    folder.rename(outside)
    folder.symlink_to(outside)
    sentence("leads out of the home", "ask", home, "ada works as a")
    sentence("leads out of the home", "report", home)
    folder.unlink()
    outside.rename(folder)
    assert unwrite.open(home).verify() == []


def test_a_link_among_the_updates_is_not_swept(place):
    """What a killed update left is removed; a link that looks like it leads to somebody's files."""
    precious = place / "precious"
    precious.mkdir()
    for name in ("partial", "thesis"):
        (precious / name).touch()
    home = unwrite.open(place / "home")
    (home.folder / "updates" / "u-12345678").symlink_to(precious)
    home.undo(home.ledger.live()[0], recheck=False)
    assert {one.name for one in precious.iterdir()} == {"partial", "thesis"}
    assert any("u-12345678 is not in the ledger" in problem for problem in home.verify())


@pytest.mark.parametrize("name", ["base.json", "ledger.jsonl", "delta/00001.safetensors"])
def test_a_pipe_in_a_home_holds_nobody_up(place, sentence, name):
    home = place / "home"
    (update,) = unwrite.open(home).ledger.live()
    file = home / "updates" / update / name if "/" in name else home / name
    file.unlink()
    os.mkfifo(file)
    sentence("not a model home|is damaged", "ask", home, "ada works as a")


def test_a_ledger_of_not_a_number_or_half_a_character_is_damaged(tmp_path):
    for line in ('{"do":NaN}', '{"do":"\\ud800"}', '{"do":Infinity}', "[" * 100_000):
        (tmp_path / "ledger.jsonl").write_text(line + "\n")
        with pytest.raises(UnwriteError, match="line 1 is damaged"):
            Ledger.open(tmp_path / "ledger.jsonl")
