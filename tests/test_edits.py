"""The noun `Edit` and reading and writing edits: laws first, then every bad input."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unwrite import formats
from unwrite.edits import (
    Edit,
    Edits,
    Probe,
    check_subjects,
    read_edits,
    read_pairs,
    with_ids,
    write_edits,
)
from unwrite.errors import BadEdits
from unwrite.formats import NothingToChange, blank, same_text, spaced

# Any text that JSON and UTF-8 can carry and a person can see: odd spaces, line separators, bidi
# marks, emoji, astral planes. The leading letter keeps it from being blank.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12).map(
    lambda text: "a" + text
)
PROBES = st.lists(st.builds(Probe, TEXT, st.none() | TEXT), max_size=2)
ANSWERED = st.lists(st.builds(Probe, TEXT, TEXT), max_size=2)


@st.composite
def edits_of_any_kind(draw: st.DrawFn) -> Edit:
    new = draw(TEXT)
    old = draw(st.none() | TEXT.filter(lambda old: not same_text(old, new)))
    return Edit(
        prompt=draw(TEXT),
        new=new,
        old=old,
        subject=draw(st.none() | TEXT),
        paraphrases=draw(st.lists(TEXT, max_size=2)),
        bystanders=draw(PROBES),
        portability=draw(ANSWERED),
        id=draw(st.none() | TEXT.map(lambda text: "x" + text)),
        source=draw(st.none() | TEXT),
        relation=draw(st.none() | TEXT),
        question=draw(st.none() | TEXT),
    )


def distinct(edits: list[Edit]) -> tuple[Edit, ...]:
    """Edits with different questions and ids, as a file needs them."""
    by_prompt = {spaced(edit.prompt): edit for edit in edits}
    seen: set[str | None] = set()
    kept = []
    for edit in by_prompt.values():
        if edit.id is None or edit.id not in seen:
            kept.append(edit)
            seen.add(edit.id)
    return with_ids(kept)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def fact(n: int, **more: Any) -> dict[str, Any]:
    return {"prompt": f"Question {n}?", "new": f"new {n}", "old": f"old {n}"} | more


class Knower:
    """Knows the edits with the given prompts, and remembers what it was asked."""

    def __init__(self, *prompts: str) -> None:
        self.prompts = prompts
        self.asked: list[Edit] = []

    def knows(self, edits: Sequence[Edit]) -> list[bool]:
        self.asked += edits
        return [edit.prompt in self.prompts for edit in edits]


# Laws ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(edits=st.lists(edits_of_any_kind(), min_size=1, max_size=4).map(distinct))
def test_reading_what_was_written_gives_the_same_edits(
    edits: tuple[Edit, ...], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "law.jsonl"
    write_edits(path, edits)
    assert read_edits(path) == edits
    first = path.read_bytes()
    write_edits(path, read_edits(path))
    assert path.read_bytes() == first


@settings(max_examples=60, deadline=None)
@given(edit=edits_of_any_kind())
def test_an_edit_is_its_dictionary(edit: Edit) -> None:
    assert Edit(**edit.as_dict()) == edit
    assert Edit(**json.loads(json.dumps(edit.as_dict()))) == edit
    assert hash(Edit(**edit.as_dict())) == hash(edit)


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(1, 12), offset=st.integers(0, 7))
def test_limit_and_offset_are_a_slice_and_do_not_touch_ids(
    limit: int, offset: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "slice.jsonl", *map(fact, range(8)))
    everything = read_edits(path)
    part = read_edits(path, limit, offset)
    assert part == everything[offset : offset + limit]
    assert [edit.id for edit in part] == [str(n + 1) for n in range(8)][offset : offset + limit]


@settings(max_examples=30, deadline=None)
@given(known=st.sets(st.integers(0, 7), min_size=1))
def test_the_known_ones_are_a_subsequence_and_the_rest_is_counted(known: set[int]) -> None:
    everything = read_edits([Edit(**fact(n)) for n in range(8)])
    kept = read_edits(everything, known_to=Knower(*(f"Question {n}?" for n in known)))
    assert kept == tuple(everything[n] for n in sorted(known))
    assert kept.asked == 8


def test_a_list_and_its_file_read_the_same(tmp_path: Path) -> None:
    edits = [Edit(**fact(n)) for n in range(3)]
    write_edits(tmp_path / "e.jsonl", edits)
    assert read_edits(tmp_path / "e.jsonl") == read_edits(edits) == read_edits(iter(edits))


def test_reading_edits_again_changes_nothing(tmp_path: Path) -> None:
    row = {"src": "Who?", "alt": "B", "answers": ["A"]}
    path = write(tmp_path / "z.jsonl", row, {"src": "Why?", "alt": "A", "answers": ["a "]})
    once = read_edits(path)
    twice = read_edits(once)
    assert (twice, twice.source, twice.format, twice.dropped) == (
        once,
        str(path),
        "zsRE",
        once.dropped,
    )
    assert len(once.dropped) == 1


def test_importing_edits_loads_no_heavy_package() -> None:
    code = (
        "import sys, unwrite.edits; print(sorted({'torch', 'pydantic', 'numpy'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The noun -----------------------------------------------------------------------------------------


def test_probes_may_be_given_in_any_convenient_form() -> None:
    forms: list[Any] = ["a", ("a", None), ["a"], {"prompt": "a"}, Probe("a")]
    assert Edit("p", "n", bystanders=forms).bystanders == (Probe("a"),) * 5
    pairs: list[Any] = [("a", "b"), ["a", "b"], {"prompt": "a", "answer": "b"}, Probe("a", "b")]
    assert Edit("p", "n", portability=pairs).portability == (Probe("a", "b"),) * 4
    assert Edit("p", "n", paraphrases=["q", "r"]).paraphrases == ("q", "r")


def test_an_edit_is_frozen_hashable_copyable() -> None:
    edit = Edit("p", "n", bystanders=["b"], id=7)
    assert edit.id == "7"
    assert {edit: 1}[pickle.loads(pickle.dumps(edit))] == 1
    assert copy.deepcopy(edit) == edit == replace(edit)
    with pytest.raises(FrozenInstanceError):
        edit.new = "m"  # type: ignore[misc]


def test_asserting_old_teaches_the_old_answer() -> None:
    edit = Edit("p", "n", "o", "s", ["q"], ["b"], [("c", "d")], "1")
    assert edit.asserting_old() == Edit("p", "o", None, "s", ["q"], ["b"], [], "1")
    with pytest.raises(BadEdits, match="no `old` answer"):
        Edit("p", "n").asserting_old()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompt": ""}, "`prompt` is empty"),
        ({"prompt": " \n\t\u00a0\u3000"}, "`prompt` is empty"),
        ({"prompt": "\u200b\u2060\ufeff"}, "`prompt` is empty"),
        ({"new": ""}, "`new` is empty"),
        ({"new": 3}, "`new` is a number"),
        ({"new": None}, "`new` is null"),
        ({"new": True}, "`new` is true or false"),
        ({"new": float("nan")}, "`new` is NaN"),
        ({"new": 10**5000}, "`new` is a number"),
        ({"new": ["x"]}, "`new` is a list"),
        ({"new": b"x"}, "`new` is of type bytes"),
        ({"new": "a\0b"}, "NUL character"),
        ({"new": "a\ud83d"}, r"half a character \(\\ud83d"),
        ({"old": ""}, "`old` is empty"),
        ({"old": "  N\u00e9W "}, "nothing to change"),
        ({"old": "Ne\u0301w"}, "nothing to change"),
        ({"subject": 1}, "`subject` is a number"),
        ({"id": True}, "`id` is true or false"),
        ({"id": 10**5000}, "`id` is a number"),
        ({"id": ""}, "`id` is empty"),
        ({"paraphrases": "abc"}, r"`paraphrases` is text where a list is needed"),
        ({"paraphrases": [""]}, r"`paraphrases\[0\]` is empty"),
        ({"paraphrases": ["a", 2]}, r"`paraphrases\[1\]` is a number"),
        ({"paraphrases": None}, "`paraphrases` is null"),
        ({"bystanders": {"prompt": "a"}}, "`bystanders` is an object where a list"),
        ({"bystanders": [3]}, r"In `bystanders\[0\]`: a probe is"),
        ({"bystanders": [("a", "b", "c")]}, r"a probe is text"),
        ({"bystanders": ["a", {"promt": "b"}]}, r"In `bystanders\[1\]`: .* this one has 'promt'"),
        ({"bystanders": [{}]}, "this one has nothing"),
        ({"bystanders": [("a", "")]}, r"In `bystanders\[0\]`: `answer` is empty"),
        ({"bystanders": [(None, "a")]}, "`prompt` is null"),
        ({"portability": ["a"]}, r"`portability\[0\]` has no `answer`"),
    ],
)
def test_an_edit_refuses_what_cannot_be_taught(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadEdits, match=complaint):
        Edit(**{"prompt": "Who?", "new": "N\u00e9w"} | fields)


def test_old_equal_to_new_is_told_apart_from_other_faults() -> None:
    with pytest.raises(NothingToChange):
        Edit("p", "Paris", "  paris")


# Edits: a tuple that knows its origin -------------------------------------------------------------


def test_slices_copies_and_pickles_keep_the_origin() -> None:
    edits = Edits([Edit(**fact(n)) for n in range(3)], "f", "zsRE", ["x"], asked=5)
    for other in (edits[1:], pickle.loads(pickle.dumps(edits)), copy.copy(edits)):
        assert isinstance(other, Edits)
        assert (other.source, other.format, other.dropped, other.asked) == ("f", "zsRE", ("x",), 5)
    assert edits[0] == Edit(**fact(0)) and len(edits[1:]) == 2
    assert repr(edits) == "<3 edits from f (zsRE), 1 left out>"


def test_ids_are_filled_with_positions_and_kept_where_given() -> None:
    edits = with_ids([Edit("a", "n"), Edit("b", "n", id="x"), Edit("c", "n")])
    assert [edit.id for edit in edits] == ["1", "x", "3"]
    assert with_ids(edits) == edits
    assert isinstance(with_ids(Edits(edits)), Edits)


def test_equal_ids_are_refused() -> None:
    with pytest.raises(BadEdits, match="edit 2 and edit 1 have the same id, '2'"):
        with_ids([Edit("a", "n", id="2"), Edit("b", "n")])


def test_subjects_are_checked_where_a_method_needs_them() -> None:
    check_subjects([Edit("The capital of Peru is", "Cusco", subject="Peru")])
    edits = [
        Edit("a", "n", id="x"),
        Edit("The peru", "n", subject="Peru"),
        Edit("P", "n", subject="P"),
    ]
    with pytest.raises(BadEdits) as caught:
        check_subjects(edits)
    message = str(caught.value)
    assert "2 of 3 edits" in message
    assert "edit x has no subject" in message and "edit 2 has 'Peru', not in 'The peru'" in message
    with pytest.raises(BadEdits, match="and 30 more"):
        check_subjects([Edit(str(n), "n") for n in range(50)])


# Selecting what the model knows -------------------------------------------------------------------


def test_only_those_with_an_old_answer_are_asked_and_selection_comes_first() -> None:
    facts = [Edit(**fact(n)) for n in range(4)] + [Edit("Open?", "n")]
    knower = Knower("Question 2?", "Question 0?", "Open?")
    kept = read_edits(facts, offset=1, known_to=knower)
    assert [edit.prompt for edit in kept] == ["Question 2?"]
    assert [edit.prompt for edit in knower.asked] == [f"Question {n}?" for n in (1, 2, 3)]
    assert (len(kept), kept.asked) == (1, 4)


def test_nothing_known_is_an_error_that_says_so() -> None:
    with pytest.raises(BadEdits, match=r"Of the 2 edits asked .* knows none"):
        read_edits([Edit("a", "n", "o"), Edit("b", "n")], known_to=Knower())
    with pytest.raises(BadEdits, match="1 have no `old`"):
        read_edits([Edit("a", "n")], known_to=Knower("a"))


# Sources ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("", "path of a file of edits is empty"),
        ("missing.jsonl", "There is no file missing.jsonl"),
        ("a\0b", "not a valid path"),
        ("x" * 5000, "cannot be read"),
        ("\x1b[31mred", r"no file \\x1b\[31mred"),
        (3, "given as a path or a list of Edit; this is a number"),
        (None, "this is null"),
        ([], "it is empty"),
        (["facts.jsonl"], "Item 1 of the edits is text"),
        ([{"prompt": "a", "new": "b"}], "Item 1 of the edits is an object"),
        (Edit("a", "b"), "put it in a list"),
        (b"facts", "Item 1 of the edits is a number"),
    ],
)
def test_a_source_that_is_no_source_is_refused(source: Any, complaint: str) -> None:
    with pytest.raises(BadEdits, match=complaint):
        read_edits(source)


def test_a_folder_and_a_device_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadEdits, match="is a folder"):
        read_edits(tmp_path)
    with pytest.raises(BadEdits, match="is a device"):
        read_edits("/dev/zero")


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", value) for value in (0, -1, True, "3", 2.0, 10**18)]
    + [("offset", value) for value in (-1, None, "0", 10**18, -(10**18))],
)
def test_a_selection_that_is_no_selection_is_refused(name: str, value: Any) -> None:
    with pytest.raises(BadEdits, match=rf"`{name}` is .*: give a whole number"):
        read_edits([Edit("a", "b")], **{name: value})


def test_a_number_too_long_to_print_is_refused() -> None:
    for number in (10**5000, -(10**5000)):
        with pytest.raises(BadEdits, match="`offset` is too large"):
            read_edits([Edit("a", "b")], offset=number)


def test_an_offset_beyond_the_end_is_refused() -> None:
    assert len(read_edits([Edit("a", "b")], limit=10**17)) == 1
    with pytest.raises(BadEdits, match=r"offset 1 is beyond the end .*, which has 1 edits"):
        read_edits([Edit("a", "b")], offset=1)


# Faults of native files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a"}, "`new` is missing; the record has the keys 'prompt'"),
        ({"new": "a"}, "`prompt` is missing"),
        ({"prompt": "a", "nwe": "b"}, r"'nwe' is not a field of an edit \(did you mean 'new'\?\)"),
        ({"prompt": "a", "new": "b", "Old": "c"}, "did you mean 'old'"),
        ({"prompt": "a", "new": "b", "paraphrase": ["c"]}, "did you mean 'paraphrases'"),
        (
            {"prompt": "a", "new": "b", "comment": "c"},
            "'comment' is not a field of an edit: the fi",
        ),
        ({"prompt": "a", "new": "b", "\x1b[2J": 1}, r"'\\x1b\[2J' is not a field"),
        ({"prompt": "a", "new": "\x1b[31m", "old": "\x1b[31m"}, r"are both '\\x1b\[31m'"),
        ({"prompt": "a", "new": "b", "old": "B"}, "nothing to change: correct one of them"),
        ({"prompt": "a", "new": ""}, "`new` is empty"),
        ({"prompt": "a", "new": "\ud800"}, "half a character"),
        ({"prompt": "a", "new": "b", "bystanders": "c"}, "`bystanders` is text where a list"),
        ({"prompt": "a", "new": "b", "bystanders": [["c", 1]]}, r"In `bystanders\[0\]`: `answer`"),
    ],
)
def test_the_error_names_file_line_and_field(
    row: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "facts.jsonl", fact(1), row)
    with pytest.raises(BadEdits, match=complaint) as caught:
        read_edits(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_null_stands_for_a_missing_field(tmp_path: Path) -> None:
    row = {"prompt": "a", "new": "b", "old": None, "paraphrases": None, "id": None}
    assert read_edits(write(tmp_path / "f", row)) == (Edit("a", "b", id="1"),)


def test_contradicting_records_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", fact(1), fact(2), fact(1, new="other"))
    with pytest.raises(BadEdits) as caught:
        read_edits(path)
    assert "line 3 and line 1 ask the same" in str(caught.value)
    assert "'other' and 'new 1'" in str(caught.value)


def test_repeated_records_are_left_out_and_reported(tmp_path: Path) -> None:
    again = fact(1, prompt="Question  1?", new="NEW 1", id="copy")
    path = write(tmp_path / "f.jsonl", fact(1), again, fact(3))
    heard: list[str] = []
    edits = read_edits(path, on_dropped=heard.append)
    assert [edit.id for edit in edits] == ["1", "3"]
    assert list(edits.dropped) == heard == ["line 2 repeats line 1."]


def test_equal_ids_in_a_file_are_refused_with_both_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", fact(1, id=5), fact(2, id="5"))
    with pytest.raises(BadEdits, match="line 2 and line 1 have the same id, '5'"):
        read_edits(path)


def test_writing_refuses_what_could_not_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    with pytest.raises(BadEdits, match="it is empty"):
        write_edits(path, [])
    with pytest.raises(BadEdits, match="ask the same"):
        write_edits(path, [Edit("a", "b"), Edit("a", "c")])
    with pytest.raises(BadEdits, match="edit 2 repeats edit 1"):
        write_edits(path, [Edit("a", "b"), Edit("a", "b")])
    assert not list(tmp_path.iterdir())
    for impossible in (tmp_path / "no" / "f", tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(BadEdits, match="cannot be written"):
            write_edits(impossible, [Edit("a", "b")])
    assert not list(tmp_path.iterdir())


# The bundled facts --------------------------------------------------------------------------------


def test_the_bundled_facts_can_be_read_whole_and_by_relation() -> None:
    atlas = read_edits("atlas")
    relations = {edit.relation for edit in atlas}
    assert (atlas.source, atlas.format, atlas.dropped) == ("atlas", "native", ())
    assert all(edit.old and edit.subject and edit.relation and edit.id for edit in atlas)
    for relation in relations:
        assert relation
        part = read_edits(f"atlas:{relation}")
        assert part == tuple(edit for edit in atlas if edit.relation == relation)
    both = read_edits("atlas: capital , currency,capital")
    assert both == tuple(edit for edit in atlas if edit.relation in ("capital", "currency"))
    with pytest.raises(BadEdits, match=r"'captal' \(did you mean 'capital'\?\): its relations are"):
        read_edits("atlas:captal")
    with pytest.raises(BadEdits, match="atlas has no relation ''"):
        read_edits("atlas:")


def test_a_file_called_atlas_is_reached_by_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "atlas", fact(1))
    for own in ("./atlas", tmp_path / "atlas", Path("atlas")):
        assert len(read_edits(own)) == 1
    assert len(read_edits("atlas")) > 1


# Fuzz: nothing but BadEdits, and no message that a terminal would obey ---------------------------

KEYS = st.sampled_from(
    [
        *formats.NATIVE_FIELDS,
        *("src", "alt", "answers", "pred", "loc", "rephrase", "New Question"),
        *("requested_rewrite", "target_new", "target_true", "str", "neighborhood_prompts"),
        *("labels", "text", "ground_truth", "locality", "locality_prompt", "Reasoning"),
        *("instruction", "output"),
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | TEXT, inner, max_size=4),
    max_leaves=12,
)
RECORDS = st.lists(st.dictionaries(KEYS, ANYTHING, max_size=6), max_size=3)


def survives(data: bytes, folder: Path) -> None:
    path = folder / "fuzz"
    path.write_bytes(data)
    for read in (lambda: read_edits(path), lambda: read_pairs(path, path)):
        try:
            edits = read()
        except BadEdits as error:
            message = str(error)
            assert message.isprintable() and len(message) < 4000
        else:
            assert len(edits) > 0 and not any(blank(edit.new) for edit in edits)


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=40) | TEXT.map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes, tmp_path_factory: Any) -> None:
    survives(data, tmp_path_factory.getbasetemp())


@settings(max_examples=300, deadline=None)
@given(records=RECORDS, as_array=st.booleans())
def test_any_json_is_read_or_refused(
    records: list[object], as_array: bool, tmp_path_factory: Any
) -> None:
    lines = json.dumps(records) if as_array else "\n".join(map(json.dumps, records))
    survives(lines.encode(), tmp_path_factory.getbasetemp())
