"""The ledger: a fold over lines, and every kind of damage noticed."""

import errno
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unwrite import files
from unwrite.errors import DamagedFile, HomeError
from unwrite.ledger import START, Ledger


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def filled(path, *entries):
    ledger = Ledger.create(path, {"do": "init"})
    for entry in entries:
        ledger = ledger.append(entry)
    return ledger


def apply(name):
    return {"do": "apply", "id": name}


def revert(name):
    return {"do": "revert", "of": name}


def test_the_state_is_a_fold(path):
    ledger = filled(path, apply("a"), apply("b"), revert("a"), apply("c"))
    assert ledger.live() == ["b", "c"]
    assert ledger.live(at="b") == ["a", "b"]
    assert ledger.live(at="base") == []
    assert list(ledger.applied) == ["a", "b", "c"]


def test_what_is_written_is_read(path):
    ledger = filled(path, apply("a"), {"do": "apply", "id": "ü", "why": "line\nbreak \u2028 ✓"})
    assert Ledger.open(path) == ledger


def test_every_line_names_the_one_before(path):
    entries = filled(path, apply("a"), apply("b")).entries
    assert entries[0]["previous"] == START
    assert [entry["previous"] for entry in entries[1:]] == [
        entry["sha256"] for entry in entries[:-1]
    ]


def test_an_unknown_update_is_answered_with_the_known_ones(path):
    with pytest.raises(HomeError, match="Updates: a, b"):
        filled(path, apply("a"), apply("b")).live(at="z")


def test_a_ledger_is_begun_once(path):
    filled(path)
    with pytest.raises(HomeError, match="begun only once"):
        Ledger.create(path, {"do": "init"})


def test_a_missing_ledger_means_no_home(path):
    with pytest.raises(HomeError, match="not a model home"):
        Ledger.open(path)


def test_a_removed_line_shows(path):
    filled(path, apply("a"), apply("b"))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    with pytest.raises(DamagedFile, match=r"line 2 .* does not follow"):
        Ledger.open(path)


def test_an_edited_line_shows_even_with_its_own_hash_made_anew(path):
    filled(path, apply("a"), apply("b"))
    lines = path.read_text().splitlines()
    from unwrite.ledger import _hash, _line

    forged = json.loads(lines[1]) | {"id": "evil"}
    forged["sha256"] = _hash(forged)
    path.write_text("\n".join([lines[0], _line(forged), lines[2]]) + "\n")
    with pytest.raises(DamagedFile, match="line 3"):
        Ledger.open(path)


@settings(max_examples=300)
@given(st.data())
def test_every_flipped_byte_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "ledger.jsonl"
    filled(path, apply("a"), revert("a"), apply("b"))
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    with pytest.raises(DamagedFile):
        Ledger.open(path)


@given(st.binary(max_size=200))
def test_any_file_is_a_ledger_or_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("noise") / "ledger.jsonl"
    path.write_bytes(content)
    with pytest.raises(DamagedFile):
        Ledger.open(path)


@pytest.mark.parametrize(
    ("entries", "number", "says"),
    [
        ([{"do": "apply", "id": "u-1"}], 1, "none of init"),
        ([{"do": "init"}, {"do": "init"}], 2, "none of init"),
        ([{"do": "init"}, {"do": "erase", "of": "u-1"}], 2, "none of init"),
        ([{"do": "init"}, {"do": "apply"}], 2, "names no update"),
        ([{"do": "init"}, {"do": "revert", "of": 3}], 2, "names no update"),
        ([{"do": "init"}, apply("u-1"), apply("u-1")], 3, "for the second time"),
        ([{"do": "init"}, apply("u-1"), revert("u-2")], 3, "not live"),
        ([{"do": "init"}, apply("u-1"), revert("u-1"), revert("u-1")], 4, "not live"),
        ([{"do": "init"}, apply("u-1"), revert("u-1"), apply("u-1")], 4, "for the second time"),
    ],
)
def test_whole_lines_that_make_no_history_are_refused(path, entries, number, says):
    """Whoever wrote them knew how to make their hashes."""
    ledger = Ledger(path, ())
    for entry in entries:
        ledger = ledger.append(entry)
    with pytest.raises(DamagedFile, match=rf"line {number} is damaged: .*{says}") as caught:
        Ledger.open(path)
    assert str(caught.value).startswith(f"{path}, line {number} is damaged: it ")
    assert str(caught.value).endswith("; put back the ledger from a copy of the home.")


def cut_off(lines):
    return b"\n".join(lines)


def text_of(lines):
    return b"\n".join([*lines, b""])


@pytest.mark.parametrize(
    ("harm", "number", "says"),
    [
        (cut_off, 3, "it does not end with a line break"),
        (lambda lines: b"", 1, "the ledger is empty"),
        (lambda lines: b"\n", 1, "it is not JSON"),
        (lambda lines: text_of([lines[0], lines[1][:-1], lines[2]]), 2, "it is not JSON"),
        (lambda lines: text_of([lines[0], b"[1]", lines[2]]), 2, "it is not as it was written"),
        (
            lambda lines: text_of([lines[0], lines[1].replace(b":", b": ", 1), lines[2]]),
            2,
            "it is not as it was written",
        ),
        (
            lambda lines: text_of([*lines[:2], lines[2].replace(b'"n":2', b'"n":3')]),
            3,
            "its hash does not match its content",
        ),
        (lambda lines: text_of(lines[1:]), 1, "it does not follow the line before it"),
        (lambda lines: text_of([*lines, lines[2]]), 4, "it does not follow the line before it"),
    ],
)
def test_damage_is_told_with_its_line(path, harm, number, says):
    filled(path, apply("a"), apply("b"))
    path.write_bytes(harm(path.read_bytes().splitlines()))
    with pytest.raises(DamagedFile) as caught:
        Ledger.open(path)
    assert str(caught.value) == (
        f"{path}, line {number} is damaged: {says}. Nothing was changed; put back the ledger from "
        "a copy of the home."
    )


def test_a_line_with_its_number_forged_does_not_follow(path):
    """Its hash is that of its content, and it names the line before it."""
    filled(path, apply("a"))
    from unwrite.ledger import _hash, _line

    lines = path.read_text().splitlines()
    forged = json.loads(lines[1]) | {"n": 2}
    forged["sha256"] = _hash(forged)
    path.write_text("\n".join([lines[0], _line(forged)]) + "\n")
    with pytest.raises(DamagedFile, match=r"line 2 .* does not follow"):
        Ledger.open(path)


def test_the_state_does_not_hang_on_what_was_reverted_before(path):
    """Three live, the middle one reverted, another applied, and one more reverted."""
    ledger = filled(path, apply("a"), apply("b"), apply("c"), revert("b"), apply("d"), revert("a"))
    assert Ledger.open(path).live() == ["c", "d"]
    assert Ledger.open(path) == ledger


def test_without_updates_the_answer_says_so(path):
    with pytest.raises(HomeError, match=r"Updates: none yet\.$"):
        filled(path).live(at="z")


def test_text_is_written_as_it_is_and_what_is_no_number_not_at_all(path):
    """Anyone can read the file; and it stays JSON that everybody reads."""
    ledger = filled(path, {"do": "apply", "id": "ü"})
    assert '"id":"ü"' in path.read_text("utf-8")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.append({"do": "apply", "id": "b", "score": float("nan")})
    assert path.read_bytes() == before


def test_an_update_may_have_any_name(path):
    assert filled(path, apply("None"), revert("None")).live() == []
    assert Ledger.open(path).live() == []


def failing(when, real=files.write_atomically):
    """The disk reports an error before or after the new content has its name."""

    def write(target, content):
        if when == "after":
            real(target, content)
        raise OSError(errno.EIO, "Input/output error")

    return write


def test_an_error_of_the_disk_before_the_line_is_there_is_that_error(path, monkeypatch):
    ledger = filled(path)
    before = path.read_bytes()
    monkeypatch.setattr("unwrite.ledger.write_atomically", failing("before"))
    with pytest.raises(OSError, match="Input/output"):
        ledger.append(apply("a"))
    assert path.read_bytes() == before
    path.unlink()
    with pytest.raises(OSError, match="Input/output"):
        ledger.append(apply("a"))


def test_an_error_of_the_disk_after_the_line_is_there_says_that_it_is(path, monkeypatch):
    ledger = filled(path)
    monkeypatch.setattr("unwrite.ledger.write_atomically", failing("after"))
    with pytest.raises(HomeError) as caught:
        ledger.append(apply("a"))
    assert str(caught.value) == (
        f"What was done is in {path}, but the disk reported an error afterwards (Input/output "
        "error), so a power cut may still undo it. Check the disk, then run: unwrite verify "
        f"{path.parent}"
    )
    assert Ledger.open(path).live() == ["a"]
