"""Records of other people's edit files: bytes in, the fields of an `Edit` out.

Two steps, both without any knowledge of models: `read_records` turns bytes into JSON objects that
know their place in the file, and a `Format` turns one such object into the keyword arguments of
`Edit`. A format is recognised by the keys of its records, never by a file name. Everything that
came from outside is shown through `shown`, so no message can carry a terminal escape.
"""

from __future__ import annotations

import json
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unwrite.errors import BadEdits

MIB = 1 << 20
LARGEST_RECORD = MIB  # characters; a fact with its probes takes about a thousand
LARGEST_FILE = 512 * MIB  # bytes; the whole file is held while it is read

Object = dict[str, Any]


class NothingToChange(BadEdits):
    """The record is well formed, but its new answer is the old one, or is not there."""


# Text from outside --------------------------------------------------------------------------------


def printable(text: str) -> str:
    """``text`` with every control character, escape and lone surrogate spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """``text`` in quotes, safe to print, at most 80 characters."""
    quoted = repr(text[:80])
    return quoted if len(quoted) <= 80 and len(text) <= 80 else quoted[:78] + "…" + quoted[0]


def file_name(path: Path) -> str:
    """What messages call a file: its path, safe to print."""
    return printable(str(path)[:500])  # whoever passes the content of a file sees where it begins


def kind(value: object) -> str:
    """What a JSON value is, for a message (never its content)."""
    if isinstance(value, float) and value != value:
        return "NaN"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    names |= {list: "a list", tuple: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), f"of type {printable(type(value).__name__)}")


def hidden(character: str) -> bool:
    """Whether a character acts or hides instead of being shown: control and direction-changing
    ones, lone surrogates, private use."""
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co")


def blank(text: str) -> bool:
    """Whether nothing of ``text`` can be seen (spaces, control and zero-width characters)."""
    return all(c.isspace() or unicodedata.category(c) in ("Zs", "Cc", "Cf") for c in text)


def spaced(text: str) -> str:
    """``text`` with its accents composed and its runs of white space made one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def same_text(one: str, other: str) -> bool:
    """Whether two answers differ in nothing but case, white space and the coding of accents."""
    return spaced(one).casefold() == spaced(other).casefold()


def check_text(value: object, field: str, may_be_blank: bool = False) -> str:
    """``value`` itself when it is text that a tokenizer and a file can hold; else `BadEdits`."""
    if not isinstance(value, str):
        raise BadEdits(f"`{field}` is {kind(value)} where text is needed: write it in quotes.")
    if "\0" in value:
        raise BadEdits(f"`{field}` contains a NUL character (U+0000): remove it.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = value[error.start].encode("ascii", "backslashreplace").decode("ascii")
        raise BadEdits(
            f"`{field}` contains half a character ({half}, a surrogate without its partner): "
            "write the whole character."
        ) from None
    if not may_be_blank and blank(value):
        raise BadEdits(f"`{field}` is empty: write some text there.")
    return str(value)


# Bytes to JSON objects ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One JSON object and where it stands: ``line 3``, or ``record 3 (line 17)`` in an array."""

    place: str
    values: Object


def read_bytes(path: Path, what: str = "edits") -> bytes:
    """The content of a file or pipe. Raises `BadEdits` if there is none or it is too large.

    ``what`` is what messages say the file should hold.
    """
    name = file_name(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise BadEdits(f"{name} is a folder where a file of {what} is needed: name the file.")
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise BadEdits(f"{name} is a device where a file of {what} is needed: name a file.")
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)  # bounded, because a pipe does not tell its size
    except FileNotFoundError:
        bundled = "facts, `atlas`" if what == "edits" else "tasks, `bank:NAME`"
        raise BadEdits(
            f"There is no file {name}: check the path, or use the bundled {bundled}."
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or "it is not a valid path"
        raise BadEdits(f"{name} cannot be read ({reason}): check the path.") from None
    if len(data) > LARGEST_FILE:
        raise BadEdits(f"{name} is larger than {LARGEST_FILE // MIB} MiB: split it.")
    return data


def read_records(data: bytes, name: str, form: str = '{"prompt": ..., "new": ...}') -> list[Record]:
    """Every record of a JSON Lines file, a JSON array of objects, or a file of one JSON object.

    ``name`` is what messages call the file, ``form`` what they show as a record. A byte order mark,
    CRLF line ends and empty lines are accepted. Raises `BadEdits` with the line (and column, where
    there is one) for everything else.
    Holds the text and all records.
    """
    text = _decode(data, name)
    start = _skip_space(text, 0)
    if start == len(text):
        raise BadEdits(f"{name} is empty: write one JSON object a line, {form}.")
    read = _array if text[start] == "[" else _lines
    records = []
    for place, value in read(text, start, name):
        if not isinstance(value, dict):
            raise BadEdits(
                f"{name}, {place} is {kind(value)} where a JSON object is needed: write {form}."
            )
        records.append(Record(place, value))
    if not records:
        raise BadEdits(f"{name} is an empty list: put at least one record in it.")
    return records


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # "utf-8-sig" counts from behind the mark; people count from the start of the file.
        offset = error.start + 3 * data.startswith(b"\xef\xbb\xbf")
        line = data.count(b"\n", 0, offset) + 1
        guess = " (it looks like UTF-16)" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise BadEdits(
            f"{name} is not UTF-8{guess}: byte {offset}, on line {line}, does not fit; "
            "save the file as UTF-8."
        ) from None


_SPACE = re.compile(r"[ \t\r\n]*")  # what JSON calls white space, and nothing else


def _skip_space(text: str, start: int) -> int:
    match = _SPACE.match(text, start)
    return match.end() if match else start


class _RepeatedKey(Exception):
    """A JSON object names one key twice; JSON readers silently keep the last."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> Object:
    values: Object = {}
    for key, value in pairs:
        if key in values:
            raise _RepeatedKey(key)
        values[key] = value
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)


def _not_json(name: str, line: int, column: int, reason: str) -> BadEdits:
    return BadEdits(
        f"{name} is not JSON at line {line}, column {column} ({reason}): "
        "write one JSON object a line, or one array of objects."
    )


def _parse(text: str, start: int, name: str, place: str) -> tuple[Any, int]:
    """The JSON value at ``start`` of ``text`` and the position behind it.

    Raises `BadEdits` for all that is wrong inside a value, and lets ``JSONDecodeError`` through:
    only the caller knows which line of the file it means.
    """
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except _RepeatedKey as error:
        reason = f"has the key {shown(str(error))} twice in one object: keep one of them."
    except RecursionError:
        reason = "is nested too deeply: a record is an object of texts and short lists."
    except ValueError:  # Python refuses to read integers of thousands of digits
        reason = "has a number with too many digits: write it as text, in quotes."
    else:
        if end - start <= LARGEST_RECORD:
            return value, end
        reason = (
            f"is {end - start:,} characters long and a record may have {LARGEST_RECORD:,}: "
            "split it (is a line break missing?)."
        )
    raise BadEdits(f"{name}, {place} {reason}")


def _lines(text: str, start: int, name: str) -> Iterator[tuple[str, Any]]:
    """One JSON value a line. A file that is one object over many lines is one record."""
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() also splits at U+2028
        begin = _skip_space(line, 0)
        if begin == len(line):
            continue
        if len(line) - begin > LARGEST_RECORD:  # before parsing, which takes ten times the memory
            raise BadEdits(
                f"{name}, line {number} is {len(line):,} characters long and a record may have "
                f"{LARGEST_RECORD:,}: split it (is a line break missing?)."
            )
        try:
            value, end = _parse(line, begin, name, f"line {number}")
            if (rest := _skip_space(line, end)) < len(line):
                raise json.JSONDecodeError("more text behind the value", line, rest)
        except json.JSONDecodeError as error:
            is_first = text.count("\n", 0, start) + 1 == number
            if is_first and line.rstrip().endswith(("{", "[", ",", ":")):  # it goes on
                yield "record 1", _one_object(text, start, name)
                return
            raise _not_json(name, number, error.colno, error.msg) from None
        yield f"line {number}", value


def _one_object(text: str, start: int, name: str) -> Any:
    """The one JSON value that ``text`` is, over as many lines as it takes."""
    try:
        value, end = _parse(text, start, name, "record 1")
        if (rest := _skip_space(text, end)) < len(text):
            raise json.JSONDecodeError("more text behind the object", text, rest)
    except json.JSONDecodeError as error:
        raise _not_json(name, error.lineno, error.colno, error.msg) from None
    return value


def _array(text: str, start: int, name: str) -> Iterator[tuple[str, Any]]:
    """The elements of one JSON array, one by one, so that each knows its line."""
    number, line, counted = 0, 1, 0
    try:
        position = _skip_space(text, start + 1)
        while number or text[position : position + 1] != "]":
            number += 1
            line += text.count("\n", counted, position)
            counted = position
            place = f"record {number} (line {line})"
            value, end = _parse(text, position, name, place)
            yield place, value
            position = _skip_space(text, end)
            if text[position : position + 1] == "]":
                break
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("a comma or ] is missing", text, position)
            position = _skip_space(text, position + 1)
        rest = _skip_space(text, position + 1)
        if rest < len(text):
            raise json.JSONDecodeError("more text behind the array", text, rest)
    except json.JSONDecodeError as error:
        raise _not_json(name, error.lineno, error.colno, error.msg) from None


# Records to the fields of an Edit -----------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """One way to write an edit: how to recognise it and how to read it.

    ``fields`` returns the keyword arguments of `Edit` and a sentence for each probe that it had to
    leave out. It raises `BadEdits` naming the field, or `NothingToChange`.
    """

    name: str
    needs: str
    recognises: Callable[[Object], bool]
    fields: Callable[[Object], tuple[Object, list[str]]]


def format_of(record: Record, name: str) -> Format:
    """The format of one record, by its keys. Raises `BadEdits` with the keys and the formats."""
    for known in FORMATS:
        if known.recognises(record.values):
            return known
    keys = _keys(record.values)
    if {"instruction", "output"} <= record.values.keys():
        raise BadEdits(
            f"{name}, {record.place} is half of an Alpaca pair ({keys}): read the file with the "
            "old answers and the one with the new together, with `read_pairs(old, new)`."
        )
    accepted = "; ".join(f"{known.name} ({known.needs})" for known in FORMATS)
    raise BadEdits(
        f"{name}, {record.place} is in no known format: it has {keys}. Write one of: {accepted}."
    )


def _keys(values: Object) -> str:
    keys = [shown(key) for key in list(values)[:12]] + ["…"] * (len(values) > 12)
    return "the keys " + ", ".join(keys) if keys else "no keys"


def read_alpaca(old: Object, new: Object) -> tuple[Object, list[str]]:
    """The fields of an `Edit` from two Alpaca records (K_old, K_new) with the same question."""
    prompts = [
        "\n".join(part for key in ("instruction", "input") for part in _texts(record, key)[:1])
        for record in (old, new)
    ]
    if prompts[0] != prompts[1]:
        raise BadEdits(
            f"the questions differ, {shown(prompts[0])} and {shown(prompts[1])}: "
            "both files need the same `instruction` and `input` in the same order."
        )
    if not prompts[0]:
        raise BadEdits("`instruction` and `input` are both empty or missing: write the question.")
    return {
        "prompt": prompts[0],
        "old": _text(old, "output"),
        "new": _text(new, "output"),
        "source": "Alpaca pair",
    }, []


def _text(values: Object, key: str, inside: str = "", may_be_blank: bool = False) -> str:
    """The text under ``key``, which has to be there."""
    if key not in values:
        raise BadEdits(f"`{inside}{key}` is missing; the record has {_keys(values)}.")
    return check_text(values[key], inside + key, may_be_blank)


def _texts(values: Object, key: str, inside: str = "") -> list[str]:
    """Every text under ``key`` that is not blank: one text, or lists of texts, however nested.

    The public sets write one answer as ``"a"``, ``["a"]`` or ``[["a", "alias"], ["b"]]``, and
    leave a field out, null or empty when they have nothing for it.
    """
    found: list[str] = []
    waiting = [values.get(key)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(reversed(value))
        elif value is not None:
            text = check_text(value, inside + key, may_be_blank=True)
            if not blank(text):
                found.append(text)
    return found


def _first(values: Object, key: str, inside: str = "") -> str | None:
    return next(iter(_texts(values, key, inside)), None)


def _object(values: Object, key: str, inside: str = "") -> Object:
    """The object under ``key``; empty when it is missing or null."""
    value = values.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise BadEdits(f"`{inside}{key}` is {kind(value)} where an object is needed.")
    return value


def _relation(values: Object) -> str | None:
    """The Wikidata relation; anything that is not text is somebody's own annotation."""
    relation = values.get("relation_id")
    return check_text(relation, "relation_id") if isinstance(relation, str) and relation else None


def _case(values: Object, name: str) -> str:
    case = values.get("case_id")
    return f"{name} case {case}" if isinstance(case, int) and abs(case) < 10**12 else name


# Native


NATIVE_FIELDS = (
    "prompt",
    "new",
    "old",
    "subject",
    "paraphrases",
    "bystanders",
    "portability",
    "id",
    "source",
    "relation",
    "question",
)


def _native(values: Object) -> tuple[Object, list[str]]:
    unknown = next((key for key in values if key not in NATIVE_FIELDS), None)
    meant = nearest(unknown, NATIVE_FIELDS) if unknown is not None else ""
    if unknown is not None and (meant or {"prompt", "new"} <= values.keys()):
        raise BadEdits(
            f"{shown(unknown)} is not a field of an edit{meant}: "
            f"the fields are {', '.join(NATIVE_FIELDS)}."
        )
    for key in ("prompt", "new"):
        _text(values, key)
    return {key: value for key, value in values.items() if value is not None}, []


def nearest(word: str, words: Sequence[str]) -> str:
    """``" (did you mean 'X'?)"`` for the most similar of ``words``, or an empty text."""
    import difflib  # only when something is wrong

    similar = difflib.get_close_matches(word[:80].lower(), words, n=1)
    return f" (did you mean {similar[0]!r}?)" if similar else ""


# zsRE


NATURAL_QUESTIONS = "nq question: "  # the mark that MEND put before questions of that set


def _zsre(values: Object) -> tuple[Object, list[str]]:
    new = _text(values, "alt", may_be_blank=True)
    if blank(new):
        raise NothingToChange("`alt` is empty, there is no new answer.")
    answers = _texts(values, "answers") or _texts(values, "pred")
    _check_is_new(new, answers, "alt", "answers")
    bystanders = []
    if loc := _first(values, "loc"):
        question = loc.removeprefix(NATURAL_QUESTIONS)
        asked = question != loc and not question.rstrip().endswith("?")
        bystanders.append((question + "?" * asked, _first(values, "loc_ans")))
    portability, left_out = [], []
    if hops := _object(values, "portability"):
        hop = _first(hops, "New Question", "portability.")
        answer = _first(hops, "New Answer", "portability.")
        if hop is not None and answer is not None:
            portability.append((hop, answer))
        else:
            left_out.append("its `portability` lacks the question or the answer")
    return {
        "prompt": _text(values, "src"),
        "new": new,
        "old": next(iter(answers), None),
        "subject": _first(values, "subject"),
        "paraphrases": _texts(values, "rephrase"),
        "bystanders": bystanders,
        "portability": portability,
        "source": _case(values, "zsRE"),
    }, left_out


def _check_is_new(new: str, answers: list[str], key: str, among: str) -> None:
    if any(same_text(new, answer) for answer in answers):
        raise NothingToChange(
            f"`{key}` {shown(new)} is already among `{among}`, there is nothing to change."
        )


# CounterFact as ROME and MEMIT publish it


def _rome(values: Object) -> tuple[Object, list[str]]:
    at = "requested_rewrite."
    rewrite = _object(values, "requested_rewrite")
    subject = _first(rewrite, "subject", at)
    template = _text(rewrite, "prompt", at)
    if "{}" in template and subject is None:
        raise BadEdits(f"`{at}prompt` has a place for the subject, and `{at}subject` is missing.")
    old = _first(_object(rewrite, "target_true", at), "str", at + "target_true.")
    bystanders = []
    for item in _list(values, "neighborhood_prompts"):
        if isinstance(item, dict):  # some releases write {"prompt": ..., "target": ...}
            prompt = _text(item, "prompt", "neighborhood_prompts.")
            bystanders.append((prompt, _first(item, "target", "neighborhood_prompts.") or old))
        else:
            bystanders.append((check_text(item, "neighborhood_prompts"), old))
    return {
        # replace, not format: a template is data, and str.format would evaluate "{0.x}" in it
        "prompt": template.replace("{}", subject or ""),
        "new": _text(_object(rewrite, "target_new", at), "str", at + "target_new."),
        "old": old,
        "subject": subject,
        "paraphrases": _texts(values, "paraphrase_prompts"),
        "bystanders": bystanders,
        "relation": _relation(rewrite),
        "source": _case(values, "CounterFact"),
    }, []


def _list(values: Object, key: str) -> list[Any]:
    value = values.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise BadEdits(f"`{key}` is {kind(value)} where a list is needed.")
    return value


# CounterFact as EasyEdit publishes it, and KnowEdit


_EASYEDIT_KEYS = {"target_new", "labels", "ground_truth"}


def _easyedit(values: Object) -> tuple[Object, list[str]]:
    target = "labels" if "labels" in values else "target_new"
    new = _first(values, target)
    if new is None:
        state = "empty" if target in values else f"missing; the record has {_keys(values)}"
        raise BadEdits(f"`{target}` is {state}: write the new answer there.")
    answers = _texts(values, "ground_truth")
    _check_is_new(new, answers, target, "ground_truth")
    bystanders, left_out = _groups(values, "locality")
    if flat := _first(values, "locality_prompt"):
        bystanders.insert(0, (flat, _first(values, "locality_ground_truth")))
    portability, more_left_out = _groups(values, "portability")
    if flat := _first(values, "portability_prompt"):
        portability.insert(0, (flat, _first(values, "portability_ground_truth")))
    answered = [(prompt, answer) for prompt, answer in portability if answer is not None]
    if len(answered) < len(portability):
        count = len(portability) - len(answered)
        more_left_out.append(f"{count} of its `portability` probes have no answer")
    return {
        "prompt": _text(values, "text" if "text" in values else "prompt"),
        "new": new,
        "old": next(iter(answers), None),
        "subject": _first(values, "subject") or _first(values, "concept"),
        "paraphrases": _texts(values, "rephrase_prompt") + _texts(values, "rephrase"),
        "bystanders": bystanders,
        "portability": answered,
        "relation": _relation(values),
        "source": _case(values, "EasyEdit"),
    }, left_out + more_left_out


def _groups(values: Object, key: str) -> tuple[list[tuple[str, str | None]], list[str]]:
    """The probes of KnowEdit's ``{"Reasoning": [{"prompt": ..., "ground_truth": ...}], ...}``.

    All groups are kept, in order. EasyEdit's request form, ``{"prompt": [...], "ground_truth":
    [...]}`` with parallel lists in place of the list of objects, reads the same. Of several
    accepted answers the first is taken. Also returns a sentence on probes without a prompt.
    """
    probes: list[tuple[str, str | None]] = []
    empty = 0
    for group, entries in _object(values, key).items():
        at = f"{key}.{printable(group[:40])}."
        for entry in entries if isinstance(entries, list) else [entries]:
            if not isinstance(entry, dict):
                raise BadEdits(
                    f"`{at[:-1]}` holds {kind(entry)} where objects with `prompt` and "
                    "`ground_truth` are needed."
                )
            prompts, answers = entry.get("prompt"), entry.get("ground_truth")
            if not isinstance(prompts, list):
                prompts, answers = [prompts], [answers]
            elif len(prompts) == 1:
                answers = [answers]
            elif not isinstance(answers, list) or len(answers) != len(prompts):
                raise BadEdits(f"`{at}ground_truth` needs as many answers as there are prompts.")
            for prompt, answer in zip(prompts, answers, strict=True):
                pair = {"prompt": prompt, "ground_truth": answer}
                if (text := _first(pair, "prompt", at)) is None:
                    empty += 1
                else:
                    probes.append((text, _first(pair, "ground_truth", at)))
    return probes, [f"{empty} of its `{key}` probes have no prompt"] * bool(empty)


FORMATS = (
    Format(
        "CounterFact (ROME)",
        "`requested_rewrite`",
        lambda values: "requested_rewrite" in values,
        _rome,
    ),
    Format(
        "zsRE",
        "`src`, `alt`",
        lambda values: "prompt" not in values and bool({"src", "alt"} & values.keys()),
        _zsre,
    ),
    Format(
        "EasyEdit or KnowEdit",
        "`prompt` or `text`, `target_new` or `labels`",
        lambda values: "new" not in values and bool(_EASYEDIT_KEYS & values.keys()),
        _easyedit,
    ),
    Format(
        "native", "`prompt`, `new`", lambda values: bool({"prompt", "new"} & values.keys()), _native
    ),
)
NATIVE = FORMATS[-1]
