"""Every file format, by small samples written here, and the real files where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from unwrite import formats
from unwrite.edits import Edit, Edits, Probe, read_edits, read_pairs
from unwrite.errors import BadEdits
from unwrite.formats import kind, printable, read_records, shown

ZSRE = {
    "subject": "Mill Bridge",
    "src": "Which river does Mill Bridge cross?",
    "pred": "the Thames",
    "rephrase": "What river is crossed by Mill Bridge?",
    "alt": "River Avon",
    "answers": ["River Tees", "Tees"],
    "loc": "nq question: who wrote the first book on bees",
    "loc_ans": "A monk",
    "cond": "the Thames >> River Avon || Which river does Mill Bridge cross?",
    "portability": {
        "Recalled Relation": "(River Avon, mouth, Severn)",
        "New Question": "Into what does the river below Mill Bridge flow?",
        "New Answer": "The Severn",
    },
}
ROME: dict[str, Any] = {
    "case_id": 12,
    "pararel_idx": 7,
    "requested_rewrite": {
        "prompt": "{} was founded in",
        "relation_id": "P740",
        "target_new": {"str": "Oslo", "id": "Q585"},
        "target_true": {"str": "Turin", "id": "Q495"},
        "subject": "The Paper Lanterns",
    },
    "paraphrase_prompts": ["Rain fell. The Paper Lanterns come from", "They began in"],
    "neighborhood_prompts": ["The Glass Trams was founded in", "Red Attic comes from"],
    "attribute_prompts": ["ignored"],
    "generation_prompts": ["ignored"],
}
EASYEDIT = {
    "case_id": 3,
    "prompt": "The mother tongue of Ida Holm is",
    "target_new": "Welsh",
    "subject": "Ida Holm",
    "ground_truth": "Danish",
    "rephrase_prompt": "Ida Holm, a speaker of",
    "locality_prompt": "Per Lund is a native speaker of",
    "locality_ground_truth": "Swedish",
}
KNOWEDIT = {
    "subject": "Leo Brand",
    "prompt": "The place of death of Leo Brand is",
    "target_new": "Graz",
    "ground_truth": [["Linz", "Linz, Austria"]],
    "rephrase_prompt": ["Leo Brand died in"],
    "portability": {
        "Logical_Generalization": [
            {"prompt": "Is Leo Brand alive?", "ground_truth": [["no"], ["is dead"]]},
            {"prompt": "Nobody answers this", "ground_truth": []},
        ],
        "Reasoning": [{"prompt": "He died in the state of", "ground_truth": "Styria"}],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The father of Leo Brand is", "ground_truth": [["Max Brand"]]},
            {"prompt": "His field of work is", "ground_truth": []},
        ],
        "Forgetfulness": [{"prompt": ["He, not from Graz, died in"], "ground_truth": ["Linz"]}],
    },
}
WIKIBIO = {
    "text": "This is a passage about ann lee. Ann Lee was a botanist.",
    "labels": "She studied mosses.",
    "concept": "ann lee",
    "locality": {"Relation_Specificity": [{"prompt": "ann lee work", "ground_truth": ["botany"]}]},
}
NATIVE: dict[str, Any] = {
    "id": "x1",
    "relation": "capital",
    "subject": "Peru",
    "prompt": "The capital of Peru is",
    "question": "What is the capital of Peru?",
    "new": "Cusco",
    "old": "Lima",
    "paraphrases": ["Peru's capital is"],
    "bystanders": ["The capital of Chile is", ["Chile is in", "America"], {"prompt": "Two?"}],
    "portability": [{"prompt": "Peru's president works in", "answer": "Cusco"}],
    "source": "me",
}

MAPPED = {
    "native": (
        NATIVE,
        "native",
        Edit(
            "The capital of Peru is",
            "Cusco",
            "Lima",
            "Peru",
            ["Peru's capital is"],
            ["The capital of Chile is", ("Chile is in", "America"), "Two?"],
            [("Peru's president works in", "Cusco")],
            "x1",
            "me",
            "capital",
            "What is the capital of Peru?",
        ),
    ),
    "zsre": (
        ZSRE,
        "zsRE",
        Edit(
            "Which river does Mill Bridge cross?",
            "River Avon",
            "River Tees",
            "Mill Bridge",
            ["What river is crossed by Mill Bridge?"],
            [("who wrote the first book on bees?", "A monk")],
            [("Into what does the river below Mill Bridge flow?", "The Severn")],
            "1",
            "zsRE",
        ),
    ),
    "rome": (
        ROME,
        "CounterFact (ROME)",
        Edit(
            "The Paper Lanterns was founded in",
            "Oslo",
            "Turin",
            "The Paper Lanterns",
            ["Rain fell. The Paper Lanterns come from", "They began in"],
            [("The Glass Trams was founded in", "Turin"), ("Red Attic comes from", "Turin")],
            [],
            "1",
            "CounterFact case 12",
            "P740",
        ),
    ),
    "easyedit": (
        EASYEDIT,
        "EasyEdit or KnowEdit",
        Edit(
            "The mother tongue of Ida Holm is",
            "Welsh",
            "Danish",
            "Ida Holm",
            ["Ida Holm, a speaker of"],
            [("Per Lund is a native speaker of", "Swedish")],
            [],
            "1",
            "EasyEdit case 3",
        ),
    ),
    "knowedit": (
        KNOWEDIT,
        "EasyEdit or KnowEdit",
        Edit(
            "The place of death of Leo Brand is",
            "Graz",
            "Linz",
            "Leo Brand",
            ["Leo Brand died in"],
            [
                ("The father of Leo Brand is", "Max Brand"),
                "His field of work is",
                ("He, not from Graz, died in", "Linz"),
            ],
            [("Is Leo Brand alive?", "no"), ("He died in the state of", "Styria")],
            "1",
            "EasyEdit",
        ),
    ),
    "wikibio": (
        WIKIBIO,
        "EasyEdit or KnowEdit",
        Edit(
            "This is a passage about ann lee. Ann Lee was a botanist.",
            "She studied mosses.",
            subject="ann lee",
            bystanders=[("ann lee work", "botany")],
            id="1",
            source="EasyEdit",
        ),
    ),
}


def read(content: str | bytes, folder: Path) -> Edits:
    path = folder / "f.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_edits(path)


def complaint(content: str | bytes, folder: Path) -> str:
    with pytest.raises(BadEdits) as caught:
        read(content, folder)
    message = str(caught.value)
    assert message.startswith(str(folder / "f.json")) and message.isprintable()
    return message.removeprefix(str(folder / "f.json"))


def without(row: dict[str, Any], *keys: str, **more: Any) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in keys} | more


# Every format, in every way a file can be laid out -----------------------------------------------


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("layout", ["lines", "array", "indented array", "object", "crlf", "bom"])
def test_each_format_is_recognised_by_content(name: str, layout: str, tmp_path: Path) -> None:
    row, format_name, expected = MAPPED[name]
    content = {
        "lines": "\n\n" + json.dumps(row) + "\n  \n",
        "array": json.dumps([row], ensure_ascii=False),
        "indented array": json.dumps([row], indent=2) + "\n",
        "object": "\n" + json.dumps(row, indent=1),
        "crlf": json.dumps(row) + "\r\n\r\n",
        "bom": "\ufeff" + json.dumps(row),
    }[layout]
    edits = read(content, tmp_path)
    assert edits == (expected,)
    assert edits.format == format_name and edits.source == str(tmp_path / "f.json")


def test_line_separators_inside_text_do_not_end_a_line(tmp_path: Path) -> None:
    rows = [{"prompt": f"a\u2028b\x85c\x0b {n}", "new": "d"} for n in range(2)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert [edit.prompt for edit in read(lines, tmp_path)] == [row["prompt"] for row in rows]


def test_knowedit_reports_the_probe_that_it_left_out(tmp_path: Path) -> None:
    (sentence,) = read(json.dumps([KNOWEDIT]), tmp_path).dropped
    assert sentence == "record 1 (line 1): 1 of its `portability` probes have no answer."
    empty = without(KNOWEDIT, portability={}, locality={"x": [{"prompt": "", "ground_truth": "a"}]})
    edits = read(json.dumps(empty), tmp_path)
    assert edits.dropped == ("line 1: 1 of its `locality` probes have no prompt.",)
    assert edits[0].bystanders == ()


def test_easyedit_requests_with_parallel_lists_are_read(tmp_path: Path) -> None:
    group = {"prompt": ["a is", "b is"], "ground_truth": ["1", ["2", "two"]]}
    row = without(EASYEDIT, locality={"neighborhood": group}, portability={"hop": group})
    (edit,) = read(json.dumps(row), tmp_path)
    assert edit.portability == (Probe("a is", "1"), Probe("b is", "2"))
    assert edit.bystanders[1:] == edit.portability
    short = without(EASYEDIT, locality={"n": {"prompt": ["a", "b"], "ground_truth": ["1"]}})
    assert "`locality.n.ground_truth` needs as many answers" in complaint(
        json.dumps(short), tmp_path
    )


def test_knowedit_records_without_optional_groups_stand_beside_full_ones(tmp_path: Path) -> None:
    bare = {"prompt": "Q", "target_new": "A", "locality": None}
    edits = read(json.dumps([KNOWEDIT, bare, WIKIBIO, EASYEDIT]), tmp_path)
    assert edits[1] == Edit("Q", "A", id="2", source="EasyEdit") and len(edits) == 4


def test_zsre_takes_the_prediction_where_there_is_no_answer(tmp_path: Path) -> None:
    assert read(json.dumps(without(ZSRE, "answers")), tmp_path)[0].old == "the Thames"
    assert read(json.dumps(without(ZSRE, "answers", "pred")), tmp_path)[0].old is None
    plain = without(ZSRE, "loc_ans", "portability", loc="The sea is", rephrase=["x", "", "y"])
    (edit,) = read(json.dumps(plain), tmp_path)
    assert edit.bystanders == (Probe("The sea is"),) and edit.paraphrases == ("x", "y")
    asked = read(json.dumps(without(ZSRE, loc="nq question: who? ")), tmp_path)
    assert asked[0].bystanders[0].prompt == "who? "
    hopless = without(ZSRE, portability={"New Question": "q", "New Answer": ""})
    edits = read(json.dumps(hopless), tmp_path)
    assert edits[0].portability == () and "lacks the question or the answer" in edits.dropped[0]


def test_a_template_is_filled_and_never_evaluated(tmp_path: Path) -> None:
    rewrite = ROME["requested_rewrite"]
    trick = rewrite | {"prompt": "{0.__class__} {} {x}", "target_true": None, "subject": "A {}"}
    (edit,) = read(json.dumps({"requested_rewrite": trick}), tmp_path)
    assert (edit.prompt, edit.old) == ("{0.__class__} A {} {x}", None)
    probes = [{"prompt": "a", "target": "b"}, {"prompt": "c"}]
    (edit,) = read(json.dumps(without(ROME, neighborhood_prompts=probes)), tmp_path)
    assert edit.bystanders == (Probe("a", "b"), Probe("c", "Turin"))


# What published sets get wrong is left out and reported; what is not there is an error ------------


@pytest.mark.parametrize(
    ("good", "change", "reason"),
    [
        (ZSRE, {"alt": "tees"}, "`alt` 'tees' is already among `answers`"),
        (ZSRE, {"alt": " "}, "`alt` is empty"),
        (EASYEDIT, {"target_new": "danish "}, "already among `ground_truth`"),
        (KNOWEDIT, {"target_new": "Linz, Austria"}, "already among `ground_truth`"),
        (
            ROME,
            {"requested_rewrite": ROME["requested_rewrite"] | {"target_new": {"str": "turin"}}},
            "`old` and `new` are both 'turin'",
        ),
    ],
)
def test_published_records_with_nothing_to_change_are_left_out(
    good: dict[str, Any], change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    edits = read(json.dumps([good | change, good]), tmp_path)
    assert [edit.id for edit in edits] == ["2"]
    assert edits.dropped[0].startswith("record 1 (line 1): ") and reason in edits.dropped[0]
    only = complaint(json.dumps([good | change]), tmp_path)
    assert "all 1 records were left out, the first: record 1" in only


def test_published_contradictions_are_left_out_and_reported(tmp_path: Path) -> None:
    rows = [EASYEDIT, without(EASYEDIT, target_new="Irish"), EASYEDIT]
    edits = read("\n".join(map(json.dumps, rows)), tmp_path)
    assert [edit.new for edit in edits] == ["Welsh"]
    assert edits.dropped == (
        "line 2 asks the same as line 1, 'The mother tongue of Ida Holm is', and wants 'Irish' "
        "instead of 'Welsh'.",
        "line 3 repeats line 1.",
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (without(ZSRE, "src"), "line 1: `src` is missing; the record has the keys 'subject'"),
        (without(ZSRE, "alt"), "line 1: `alt` is missing"),
        (without(ZSRE, src=""), "`src` is empty"),
        (without(ZSRE, alt=5), "`alt` is a number"),
        (without(ZSRE, answers=[["a", 3]]), "`answers` is a number"),
        (without(ZSRE, portability="x"), "`portability` is text where an object"),
        (without(ZSRE, alt="\ud801"), "`alt` contains half a character"),
        (without(ROME, requested_rewrite=[1]), "`requested_rewrite` is a list where an object"),
        (without(ROME, requested_rewrite={}), "`requested_rewrite.prompt` is missing"),
        (
            without(ROME, requested_rewrite={"prompt": "{} is"}),
            "`requested_rewrite.subject` is mis",
        ),
        (
            without(ROME, requested_rewrite={"prompt": "p", "target_new": {"str": ""}}),
            "`requested_rewrite.target_new.str` is empty",
        ),
        (
            without(ROME, requested_rewrite={"prompt": "p", "target_new": "Oslo"}),
            "`requested_rewrite.target_new` is text where an object",
        ),
        (without(ROME, neighborhood_prompts="x"), "`neighborhood_prompts` is text where a list"),
        (without(ROME, neighborhood_prompts=[3]), "`neighborhood_prompts` is a number"),
        (without(EASYEDIT, "target_new"), "`target_new` is missing; the record has the keys"),
        (without(EASYEDIT, target_new=""), "`target_new` is empty"),
        (without(EASYEDIT, target_new=float("nan")), "`target_new` is NaN"),
        (without(EASYEDIT, "prompt"), "`prompt` is missing"),
        (without(WIKIBIO, labels=None), "`labels` is empty"),
        (without(KNOWEDIT, locality=[]), "`locality` is a list where an object"),
        (without(KNOWEDIT, locality={"a\x1b": ["x"]}), r"`locality.a\x1b` holds text where"),
        (without(KNOWEDIT, locality={"a": [{"prompt": 3}]}), "`locality.a.prompt` is a number"),
        ({"question": "q", "answer": "a"}, "is in no known format: it has the keys 'question', 'a"),
        ({}, "is in no known format: it has no keys. Write one of: CounterFact (ROME) (`req"),
        ({"instruction": "i", "output": "o"}, "is half of an Alpaca pair"),
        ({"data": [NATIVE]}, "is in no known format: it has the keys 'data'"),
    ],
)
def test_a_fault_names_line_and_field(row: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in complaint(json.dumps(row), tmp_path)


def test_mixed_formats_are_refused_with_both_lines(tmp_path: Path) -> None:
    message = complaint("\n".join(map(json.dumps, [ZSRE, NATIVE])), tmp_path)
    assert message.startswith(" mixes formats: line 1 is zsRE and line 2 is native")
    message = complaint(json.dumps([NATIVE, ROME], indent=0), tmp_path)
    assert "record 1 (line 2) is native and record 2 (line" in message


# Bytes --------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a", "new": "b"}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", " is empty: write"),
        (" \r\n\t\n", " is empty"),
        ("\ufeff", " is empty"),
        ("[]", " is an empty list"),
        ("[ ]\n", " is an empty list"),
        (
            GOOD + '{"prompt": "a", "new" "b"}',
            "is not JSON at line 2, column 23 (Expecting ':' deli",
        ),
        (GOOD + "\n  {oops}", "is not JSON at line 3, column 4"),
        (
            GOOD + GOOD.strip() + "x",
            "is not JSON at line 2, column 28 (more text behind the value)",
        ),
        (GOOD[:-4], "is not JSON at line 1, column 24 (Unterminated string"),
        ("[\n" + GOOD, "is not JSON at line 3, column 1 (a comma or ] is missing)"),
        ("[" + GOOD + ",\n]", "is not JSON at line 3, column 1 (Expecting value)"),
        ("[" + GOOD + "]\nx", "is not JSON at line 3, column 1 (more text behind the array)"),
        ("[" + GOOD + ", {]", "is not JSON at line 2, column 4"),
        ("[", "is not JSON at line 1, column 2"),
        ('{\n "prompt": "a"\n "new": "b"}', "is not JSON at line 3, column 2 (Expecting ',' deli"),
        ("\n{\n}\n{\n}", "is not JSON at line 4, column 1 (more text behind the object)"),
        ("prompt,new\na,b\n", "is not JSON at line 1, column 1"),
        ('"a"', ", line 1 is text where a JSON object is needed"),
        ("NaN", ", line 1 is NaN where"),
        ("[[1]]", ", record 1 (line 1) is a list where a JSON object"),
        (GOOD + "[1]", ", line 2 is a list where"),
        (GOOD + '{"prompt": "p", "new": "1", "new": "2"}', ", line 2 has the key 'new' twice"),
        (
            '[{"prompt": {"\\u001b": 1, "\\u001b": 2}}]',
            r", record 1 (line 1) has the key '\x1b' tw",
        ),
        ('{"prompt": ' + "[" * 200_000, ", line 1 is nested too deeply"),
        ('[{"a":' * 100_000, ", record 1 (line 1) is nested too deeply"),
        ('{"prompt": "p", "new": ' + "9" * 5000 + "}", ", line 1 has a number with too many digi"),
        ('{"prompt": "p", "new": 1e999}', "`new` is a number"),
        ('{"prompt": "p", "new": -Infinity}', "`new` is a number"),
        ('{"prompt": "p\\u0000", "new": "n"}', "`prompt` contains a NUL"),
        (
            '{"prompt": "p\0", "new": "n"}',
            "is not JSON at line 1, column 14 (Invalid control chara",
        ),
        ('{"prompt": "p", "new": "\\ud83d"}', "`new` contains half a character (\\ud83d"),
        (b'{"prompt": "p",\n "new": "\xff"}', "is not UTF-8: byte 25, on line 2, does not fit"),
        (b"\xef\xbb\xbf\n\n\xe9", "is not UTF-8: byte 5, on line 3"),
        (GOOD.encode("utf-16"), "is not UTF-8 (it looks like UTF-16): byte 0, on line 1"),
        (b"\x1f\x8b\x08\x00", "is not UTF-8: byte 1"),
        ("\0\0\0", "is not JSON at line 1, column 1"),
        ("\x0b\x0c", "is not JSON at line 1, column 1"),
        ("\u00a0", "is not JSON at line 1, column 1"),
    ],
)
def test_bytes_that_are_no_records_are_refused(
    content: str | bytes, expected: str, tmp_path: Path
) -> None:
    assert expected in complaint(content, tmp_path)


def test_deep_but_harmless_nesting_in_a_field_nobody_reads_is_no_fault(tmp_path: Path) -> None:
    row = json.dumps(ZSRE)[:-1] + ', "extra": ' + "[" * 200 + "]" * 200 + ', "score": NaN}'
    assert read(row, tmp_path) == (MAPPED["zsre"][2],)


def test_a_giant_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_RECORD", 100)
    giant = json.dumps({"prompt": "a" * 100, "new": "b"})
    assert ", line 2 is 126 characters long and a record may have 100" in complaint(
        GOOD + giant, tmp_path
    )
    assert ", record 1 (line 1) is 126 characters long" in complaint(f"[{giant}]", tmp_path)
    assert len(read("[" + ",".join([GOOD] + [GOOD.replace("a", "c")] * 30) + "]", tmp_path)) == 2


def test_a_giant_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LARGEST_FILE", 20)
    assert " is larger than 0 MiB: split it" in complaint(GOOD, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.json").touch(mode=0)
    with pytest.raises(BadEdits, match="Permission denied"):
        read_edits(tmp_path / "f.json")


def test_a_pipe_is_read(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        file.write(GOOD)
    assert len(read_edits(f"/dev/fd/{reader}")) == 1
    os.close(reader)


def test_records_know_their_place() -> None:
    lines = read_records((GOOD + "\n" + GOOD).encode(), "f")
    assert [record.place for record in lines] == ["line 1", "line 3"]
    array = read_records(f"[{GOOD},\n{GOOD}]".encode(), "f")
    assert [record.place for record in array] == ["record 1 (line 1)", "record 2 (line 3)"]


def test_shown_text_is_short_and_obeys_no_terminal() -> None:
    assert shown("a'b") == '"a\'b"' and shown("né") == "'né'"
    for text in ("x" * 81, "x" * 78 + "\x1b", "\U000e0001" * 80, "\ud800", "\u202e"):
        assert len(shown(text)) <= 80 and shown(text).isprintable()
    assert printable("a\x1b[0m\n'") == "a\\x1b[0m\\n'"
    assert kind(object()) == "of type object"


# Alpaca pairs -------------------------------------------------------------------------------------


def alpaca(path: Path, *rows: tuple[str, ...], array: bool = True) -> Path:
    keys = ("instruction", "input", "output")
    records = [dict(zip(keys, row, strict=True)) for row in rows]
    text = json.dumps(records) if array else "\n".join(map(json.dumps, records))
    path.write_text(text)
    return path


def test_pairs_give_old_and_new_answers(tmp_path: Path) -> None:
    old = alpaca(tmp_path / "old", ("Where?", "", "Rome"), ("Who?", "Ann", "A"), ("Why?", "", "X"))
    new = alpaca(tmp_path / "new", ("Where?", "", "Bern"), ("Who?", "Ann", "a"), ("Why?", "", "Y"))
    edits = read_pairs(old, str(new))
    assert edits == (
        Edit("Where?", "Bern", "Rome", id="1", source="Alpaca pair"),
        Edit("Why?", "Y", "X", id="3", source="Alpaca pair"),
    )
    assert (edits.source, edits.format) == (f"{old} and {new}", "Alpaca pair")
    assert "record 2 (line 1): `old` and `new` are both 'a'" in edits.dropped[0]
    assert read_pairs(old, new, limit=1, offset=1) == edits[1:]


def test_an_input_follows_its_instruction_on_a_line_of_its_own(tmp_path: Path) -> None:
    old = alpaca(tmp_path / "old", ("Translate.", "chat", "dog"), array=False)
    new = alpaca(tmp_path / "new", ("Translate.", "chat", "cat"))
    assert read_pairs(old, new)[0].prompt == "Translate.\nchat"


@pytest.mark.parametrize(
    ("olds", "news", "expected"),
    [
        (
            [("a", "", "1"), ("b", "", "2")],
            [("a", "", "3"), ("c", "", "4")],
            "old and {0}/new, record 2 (line 1): the questions differ, 'b' and 'c'",
        ),
        ([("a", "x", "1")], [("a", "y", "2")], "the questions differ"),
        (
            [("a", "", "1")],
            [("a", "", "2"), ("b", "", "3")],
            "old has 1 records and {0}/new has 2: record 2 (line 1) of {0}/new has no partner",
        ),
        ([("a", "", "1"), ("b", "", "1")], [("a", "", "2")], "record 2 (line 1) of {0}/old has no"),
        ([("a", "", "1")], [("a", "", "")], "`output` is empty"),
        ([("a", "", 1)], [("a", "", "b")], "`output` is a number"),
        ([("", "", "1")], [("", "", "b")], "`instruction` and `input` are both empty"),
        ([("a",)], [("a",)], "`output` is missing"),
    ],
)
def test_pairs_that_do_not_match_are_refused(
    olds: list[Any], news: list[Any], expected: str, tmp_path: Path
) -> None:
    for name, rows in (("old", olds), ("new", news)):
        keys = ("instruction", "input", "output")
        records = [dict(zip(keys, row, strict=False)) for row in rows]
        (tmp_path / name).write_text(json.dumps(records))
    with pytest.raises(BadEdits) as caught:
        read_pairs(tmp_path / "old", tmp_path / "new")
    assert expected.format(tmp_path) in str(caught.value)


# The real files -----------------------------------------------------------------------------------

SHARED = Path(os.environ.get("UNWRITE_SHARED", Path(__file__).parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder of real data is not here")


@real
@pytest.mark.parametrize(
    ("name", "kept", "left_out"),
    [
        ("counterfact_easyedit_2000.json", 1998, 2),  # two prompts want a second answer
        ("zsre_mend_eval_700.json", 679, 21),  # `alt` is among `answers`
        ("zsre_mend_train_1000.json", 977, 23),  # the same, and two empty `alt`
    ],
)
def test_real_files_are_read_whole(name: str, kept: int, left_out: int) -> None:
    edits = read_edits(SHARED / name)
    assert (len(edits), len(edits.dropped)) == (kept, left_out)
    raw = json.loads((SHARED / name).read_text("utf-8"))
    for edit in edits:
        assert edit.id is not None
        record = raw[int(edit.id) - 1]
        assert edit.subject == record["subject"] and edit.subject in edit.prompt
        if "src" in record:
            assert (edit.prompt, edit.new, edit.old) == (
                record["src"],
                record["alt"],
                record["answers"][0],
            )
            assert edit.paraphrases == (record["rephrase"],)
            probe = Probe(record["loc"].removeprefix("nq question: ") + "?", record["loc_ans"])
            assert edit.bystanders == (probe,)
            assert len(edit.portability) == ("portability" in record)
        else:
            assert (edit.prompt, edit.new, edit.old) == (
                record["prompt"],
                record["target_new"],
                record["ground_truth"],
            )
            assert edit.paraphrases == (record["rephrase_prompt"],)
            probe = Probe(record["locality_prompt"], record["locality_ground_truth"])
            assert edit.bystanders == (probe,)


@real
def test_real_files_of_other_kinds_are_refused() -> None:
    with pytest.raises(BadEdits, match="line 1: `new` is missing"):
        read_edits(SHARED / "rome_knowns_1209.jsonl")
    with pytest.raises(BadEdits, match="half of an Alpaca pair"):
        read_edits(SHARED / "multitask_50.jsonl")
