"""The noun of the project: an `Edit`, one change of knowledge, and files of them.

`read_edits` accepts every format that `unwrite.formats` recognises, the bundled facts, or edits
made in Python; what it returns is complete: every edit has an id, no two ask the same question.
Bad input raises `BadEdits` with the file, the line, the field and the remedy, and trains nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, overload

from unwrite import hub
from unwrite.errors import BadEdits, DamagedFile
from unwrite.files import write_jsonl
from unwrite.formats import (
    NATIVE,
    NothingToChange,
    Record,
    check_text,
    file_name,
    format_of,
    kind,
    nearest,
    printable,
    read_alpaca,
    read_bytes,
    read_records,
    same_text,
    shown,
    spaced,
)

BUNDLED = "atlas"
MEMORY = "the list of edits"  # the source of edits that were made in Python


@dataclass(frozen=True)
class Probe:
    """A question that shows what an update did, and its answer where there is a known one."""

    prompt: str
    answer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", check_text(self.prompt, "prompt"))
        if self.answer is not None:
            object.__setattr__(self, "answer", check_text(self.answer, "answer"))


ProbeLike = Probe | str | Sequence[str | None] | Mapping[str, str | None]


@dataclass(frozen=True, init=False)
class Edit:
    """One change of knowledge: asked ``prompt``, the model shall answer ``new``.

    ``old`` is what it answers now. ``subject`` is what the fact is about, as it stands in the
    prompt (only ROME and MEMIT need it). ``paraphrases`` ask the same in other words;
    ``bystanders`` must not move; ``portability`` probes follow from the new fact, each with the
    answer expected after the update. ``question`` is the prompt as a question.

    Probes may be given as `Probe`, text, (prompt, answer) or {"prompt": ..., "answer": ...}.
    Raises `BadEdits` for a field that is empty or of the wrong type, and `NothingToChange` (a
    `BadEdits`) when ``old`` and ``new`` differ in nothing but case and white space.
    """

    prompt: str
    new: str
    old: str | None
    subject: str | None
    paraphrases: tuple[str, ...]
    bystanders: tuple[Probe, ...]
    portability: tuple[Probe, ...]
    id: str | None
    source: str | None
    relation: str | None
    question: str | None

    def __init__(
        self,
        prompt: str,
        new: str,
        old: str | None = None,
        subject: str | None = None,
        paraphrases: Iterable[str] = (),
        bystanders: Iterable[ProbeLike] = (),
        portability: Iterable[ProbeLike] = (),
        id: str | int | None = None,
        source: str | None = None,
        relation: str | None = None,
        question: str | None = None,
    ) -> None:
        if isinstance(id, int) and not isinstance(id, bool) and abs(id) < 10**18:
            id = str(id)  # files of other people count their records
        optional = {
            "old": old,
            "subject": subject,
            "id": id,
            "source": source,
            "relation": relation,
            "question": question,
        }
        values: dict[str, Any] = {
            "prompt": check_text(prompt, "prompt"),
            "new": check_text(new, "new"),
            "paraphrases": tuple(
                check_text(text, f"paraphrases[{number}]")
                for number, text in enumerate(_items(paraphrases, "paraphrases"))
            ),
            "bystanders": _probes(bystanders, "bystanders"),
            "portability": _probes(portability, "portability"),
        }
        for name, value in optional.items():
            values[name] = None if value is None else check_text(value, name)
        for number, probe in enumerate(values["portability"]):
            if probe.answer is None:
                raise BadEdits(
                    f"`portability[{number}]` has no `answer`: write the answer that is expected "
                    "after the update."
                )
        if old is not None and same_text(old, new):
            raise NothingToChange(
                f"`old` and `new` are both {shown(new)}, there is nothing to change: "
                "correct one of them or remove the record."
            )
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen from here on

    def asserting_old(self) -> Edit:
        """The edit that teaches the old answer: what a forgetting run is trained on.

        Its ``old`` and its ``portability`` are empty, since both speak of the change itself.
        Raises `BadEdits` if there is no old answer.
        """
        if self.old is None:
            raise BadEdits(
                f"The edit {shown(self.prompt)} has no `old` answer, so there is nothing to "
                "forget: write one, or let the model answer first."
            )
        return replace(self, new=self.old, old=None, portability=())

    def as_dict(self) -> dict[str, Any]:
        """The edit as one object of a native JSONL file; empty fields are left out."""
        row: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in ("bystanders", "portability"):
                value = [
                    {"prompt": p.prompt} | ({} if p.answer is None else {"answer": p.answer})
                    for p in value
                ]
            elif name == "paraphrases":
                value = list(value)
            if value is not None and value != []:
                row[name] = value
        return row


def _items(value: Iterable[Any], field: str) -> tuple[Any, ...]:
    """A list as a tuple. A lone text is refused: it would be taken letter by letter."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise BadEdits(f"`{field}` is {kind(value)} where a list is needed: put it in [ ].")
    return tuple(value)


def _probes(values: Iterable[ProbeLike], field: str) -> tuple[Probe, ...]:
    probes = []
    for number, value in enumerate(_items(values, field)):
        try:
            probes.append(_probe(value))
        except BadEdits as error:
            raise BadEdits(f"In `{field}[{number}]`: {error}") from None
    return tuple(probes)


def _probe(value: object) -> Probe:
    if isinstance(value, Probe):
        return value
    if isinstance(value, str):
        return Probe(value)
    if isinstance(value, Mapping):
        unknown = [key for key in value if key not in ("prompt", "answer")]
        if unknown or "prompt" not in value:
            found = ", ".join(shown(str(key)) for key in list(value)[:5]) or "nothing"
            raise BadEdits(f"a probe has `prompt` and, if known, `answer`; this one has {found}.")
        return Probe(**value)
    if isinstance(value, (list, tuple)) and len(value) in (1, 2):
        return Probe(*value)
    raise BadEdits(
        f'a probe is text, [prompt, answer] or {{"prompt": ...}}; this is {kind(value)}.'
    )


class Edits(tuple[Edit, ...]):
    """Edits that were read, in file order; a tuple that knows where they come from.

    ``source`` is what was read and ``format`` how it was written. ``dropped`` has a sentence for
    every record or probe that was left out on the way. ``asked`` is how many edits were considered
    for `known_to` (None where no model was asked). Slices keep all four.
    """

    source: str
    format: str
    dropped: tuple[str, ...]
    asked: int | None

    def __new__(
        cls,
        edits: Iterable[Edit] = (),
        source: str = MEMORY,
        format: str = "native",
        dropped: Iterable[str] = (),
        asked: int | None = None,
    ) -> Edits:
        self = super().__new__(cls, edits)
        self.source, self.format, self.dropped, self.asked = source, format, tuple(dropped), asked
        return self

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> Edit: ...
    @overload
    def __getitem__(self, index: slice, /) -> Edits: ...
    def __getitem__(self, index: SupportsIndex | slice, /) -> Edit | Edits:
        if isinstance(index, slice):
            return self._with(super().__getitem__(index))
        return super().__getitem__(index)

    def _with(self, edits: Iterable[Edit], asked: int | None = None) -> Edits:
        asked = self.asked if asked is None else asked
        return Edits(edits, self.source, self.format, self.dropped, asked)

    def __repr__(self) -> str:
        left_out = f", {len(self.dropped)} left out" if self.dropped else ""
        return f"<{len(self)} edits from {self.source} ({self.format}){left_out}>"


Report = Callable[[str], object]


class KnowsFacts(Protocol):
    """Anything that can say which edits it answers with ``old`` now (a model)."""

    def knows(self, edits: Sequence[Edit], /) -> Sequence[bool]:
        """One truth value for each edit, in order. Every edit has an ``old``."""
        ...


def read_edits(
    source: str | os.PathLike[str] | Iterable[Edit],
    limit: int | None = None,
    offset: int = 0,
    known_to: KnowsFacts | None = None,
    on_dropped: Report | None = None,
) -> Edits:
    """Read and check edits: a file in any known format, the bundled facts, or edits from Python.

    ``source`` is a path (of a file, or of a folder that ``datasets`` saved), ``"atlas"`` or
    ``"atlas:capital,currency"`` for the facts that come with the package, a data set on the hub
    such as ``"hub:azhx/counterfact:train"`` (see `unwrite.hub`), or any iterable of `Edit`. The
    bare word ``"atlas"`` always means the bundled facts; a file of that name is reached as
    ``"./atlas"`` or as a ``Path``.

    The whole source is checked, whatever is selected. Native records must be right. In published
    sets, whose faults are not the reader's to mend, a record is left out and reported (in
    ``.dropped``, and to ``on_dropped`` as it happens) when its new answer is its old one, and when
    an earlier record asks the same and wants another answer. Exact repetitions are left out and
    reported everywhere. Ids that are missing are the positions of the records in the source
    ("1", "2", ...), so they do not depend on ``limit`` and ``offset``, which then select:
    ``read_edits(s, k, n) == read_edits(s)[n : n + k]``. ``known_to`` keeps, of those selected,
    the edits that it knows (``.asked`` says of how many), so a split never depends on the model.

    Raises `BadEdits`, also when nothing is left.
    """
    _check_whole_number(limit, "limit", at_least=1)
    _check_whole_number(offset, "offset", at_least=0)
    if isinstance(source, str) and source.partition(":")[0] == BUNDLED:
        edits = _read_bundled(source, on_dropped)
    elif isinstance(source, str) and hub.is_hub(source):
        edits = _read_hub(source, on_dropped)
    elif isinstance(source, (str, os.PathLike)):
        edits = _read_path(_path(source), on_dropped)
    else:
        edits = _read_memory(source, on_dropped)
    return _select(edits, limit, offset, known_to)


def read_pairs(
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    limit: int | None = None,
    offset: int = 0,
    known_to: KnowsFacts | None = None,
    on_dropped: Report | None = None,
) -> Edits:
    """Read two Alpaca files, old and new knowledge, with the same questions in the same order.

    Each record has ``instruction``, ``input`` (may be empty; set behind the instruction on a line
    of its own) and ``output``. Everything else is as in `read_edits`.
    """
    _check_whole_number(limit, "limit", at_least=1)
    _check_whole_number(offset, "offset", at_least=0)
    paths = _path(old), _path(new)
    names = tuple(file_name(path) for path in paths)
    olds, news = (read_records(read_bytes(p), n) for p, n in zip(paths, names, strict=True))

    def pairs() -> Iterator[_Found]:
        for before, after in zip(olds, news, strict=False):
            same = before.place == after.place
            place = before.place if same else f"{before.place} and {after.place}"
            yield place, partial(read_alpaca, before.values, after.values)
        if len(olds) != len(news):
            longer = int(len(olds) < len(news))
            alone = (olds, news)[longer][min(len(olds), len(news))]
            raise BadEdits(
                f"{names[0]} has {len(olds)} records and {names[1]} has {len(news)}: "
                f"{alone.place} of {names[longer]} has no partner; "
                "both files need the same questions in the same order."
            )

    name = f"{names[0]} and {names[1]}"
    edits = _collect(pairs(), name, "Alpaca pair", False, on_dropped)
    return _select(edits, limit, offset, known_to)


def write_edits(path: str | os.PathLike[str], edits: Iterable[Edit]) -> None:
    """Write a native JSONL file, atomically; `read_edits` gives back the same edits.

    Missing ids are written as positions. Raises `BadEdits` if there are no edits, if two have the
    same id or ask the same question (the file could not be read again), or if the file cannot be
    written.
    """
    path = _path(path)
    named = with_ids(edits)
    if repeated := _read_memory(tuple(named), None).dropped:
        raise BadEdits(f"These edits cannot be written: {repeated[0]} Remove the repetition.")
    try:
        write_jsonl(path, [edit.as_dict() for edit in named])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a valid path"
        raise BadEdits(
            f"{file_name(path)} cannot be written ({reason}): check the folder."
        ) from None


def with_ids(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """The edits, those without an id named by their position ("1", "2", ...).

    Raises `BadEdits` if two edits have the same id. `Edits` stay `Edits`.
    """
    named = tuple(
        edit if edit.id is not None else replace(edit, id=str(position))
        for position, edit in enumerate(_only_edits(edits), start=1)
    )
    _check_ids((f"edit {position}", edit) for position, edit in enumerate(named, start=1))
    return edits._with(named) if isinstance(edits, Edits) else named


def check_subjects(edits: Sequence[Edit]) -> None:
    """Raise `BadEdits`, naming the edits, unless each has a subject that stands in its prompt."""
    faults = []
    for position, edit in enumerate(edits, start=1):
        name = f"edit {printable(edit.id or str(position))[:80]}"
        if edit.subject is None:
            faults.append(f"{name} has no subject")
        elif edit.subject not in edit.prompt:
            faults.append(f"{name} has {shown(edit.subject)}, not in {shown(edit.prompt)}")
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise BadEdits(
            f"This method needs a `subject` that stands, letter by letter, in the prompt, and "
            f"{len(faults)} of {len(edits)} edits lack it: {'; '.join(faults[:20])}{more}. "
            "Write the subjects, or use auto, which guesses most and trains the others."
        )


# From the sources to `Edits` ----------------------------------------------------------------------

# One thing that was found: its place, and how to get the fields of an Edit from it, together with
# a sentence for each probe that had to be left out.
_Found = tuple[str, Callable[[], tuple[dict[str, Any], list[str]]]]


def _read_bundled(source: str, on_dropped: Report | None) -> Edits:
    """``atlas`` or ``atlas:relation,relation``."""
    from importlib.resources import files

    try:
        data = files("unwrite").joinpath("data", f"{BUNDLED}.jsonl").read_bytes()
    except OSError:
        raise DamagedFile(
            f"The bundled facts, {BUNDLED}, are missing from this installation of unwrite: "
            "install it again."
        ) from None
    edits = _read_records(read_records(data, BUNDLED), BUNDLED, on_dropped)
    _, colon, wanted = source.partition(":")
    if not colon:
        return edits
    relations = list(dict.fromkeys(edit.relation for edit in edits if edit.relation))
    chosen = [word.strip() for word in wanted.split(",")]
    for word in chosen:
        if word not in relations:
            raise BadEdits(
                f"{BUNDLED} has no relation {shown(word)}{nearest(word, relations)}: "
                f"its relations are {', '.join(relations)}."
            )
    name = f"{BUNDLED}:{','.join(chosen)}"
    return Edits((e for e in edits if e.relation in chosen), name, edits.format, edits.dropped)


def _read_path(path: Path, on_dropped: Report | None) -> Edits:
    """A file, or a folder with a data set that `datasets` saved."""
    name = file_name(path)
    if hub.is_saved(path):
        return _read_records(hub.only(hub.saved(path), name, f"{name}/"), name, on_dropped)
    return _read_records(read_records(read_bytes(path), name), name, on_dropped)


def _read_hub(text: str, on_dropped: Report | None) -> Edits:
    source, name = hub.parse(text), printable(text)
    if source.task is not None:
        raise BadEdits(f"{name} names a task, and edits have none: leave out #{source.task}.")
    if source.file is not None:
        records = read_records(read_bytes(hub.downloaded(source)), name)
    else:
        records = hub.only(hub.splits(text, source), name, f"{name}:")
    return _read_records(records, name, on_dropped)


def _read_records(records: Sequence[Record], name: str, on_dropped: Report | None) -> Edits:
    """All records of one source, which have to be in one format."""
    style = format_of(records[0], name)

    def found() -> Iterator[_Found]:
        for record in records:
            if (other := format_of(record, name)) is not style:
                raise BadEdits(
                    f"{name} mixes formats: {records[0].place} is {style.name} and "
                    f"{record.place} is {other.name}; write one file for each."
                )
            yield record.place, partial(style.fields, record.values)

    return _collect(found(), name, style.name, style is NATIVE, on_dropped)


def _read_memory(source: Iterable[Edit], on_dropped: Report | None) -> Edits:
    given = _only_edits(source)
    found = ((f"edit {n}", partial(_as_given, edit)) for n, edit in enumerate(given, start=1))
    if not isinstance(source, Edits):
        return _collect(found, MEMORY, NATIVE.name, True, on_dropped)
    edits = _collect(found, source.source, source.format, True, on_dropped)
    return Edits(edits, edits.source, edits.format, source.dropped + edits.dropped, source.asked)


def _as_given(edit: Edit) -> tuple[dict[str, Any], list[str]]:
    return dict(vars(edit)), []


def _collect(
    found: Iterable[_Found], name: str, format: str, strict: bool, on_dropped: Report | None
) -> Edits:
    """Build the edits, tell them apart, and keep account of what is left out.

    ``strict`` is for sources that their owner can mend: nothing but repetition is left out.
    """
    kept: dict[str, tuple[str, Edit]] = {}  # the question -> where it was asked first, and the edit
    dropped: list[str] = []
    count = 0

    def leave_out(sentence: str) -> None:
        dropped.append(sentence)
        if on_dropped is not None:
            on_dropped(sentence)

    for place, fields in found:
        count += 1
        try:
            values, notes = fields()
            if values.get("id") is None:
                values["id"] = str(count)
            edit = Edit(**values)
        except NothingToChange as reason:
            if strict:
                raise BadEdits(f"{name}, {place}: {reason}") from None
            leave_out(f"{place}: {reason}")
            continue
        except BadEdits as reason:
            raise BadEdits(f"{name}, {place}: {reason}") from None
        first, earlier = kept.setdefault(spaced(edit.prompt), (place, edit))
        if earlier is edit:
            for note in notes:
                leave_out(f"{place}: {note}.")
        elif same_text(earlier.new, edit.new):
            leave_out(f"{place} repeats {first}.")
        elif strict:
            raise BadEdits(
                f"{name}, {place} and {first} ask the same, {shown(edit.prompt)}, and want "
                f"different answers, {shown(edit.new)} and {shown(earlier.new)}: keep one."
            )
        else:
            leave_out(
                f"{place} asks the same as {first}, {shown(edit.prompt)}, and wants "
                f"{shown(edit.new)} instead of {shown(earlier.new)}."
            )
    if not kept:
        why = (
            f"all {count} records were left out, the first: {dropped[0]}"
            if count
            else "it is empty"
        )
        raise BadEdits(f"{name} has no edit to make ({why}): write at least one.")
    _check_ids(kept.values(), name)
    return Edits((edit for _, edit in kept.values()), name, format, dropped)


def _select(edits: Edits, limit: int | None, offset: int, known_to: KnowsFacts | None) -> Edits:
    if offset >= len(edits):
        raise BadEdits(
            f"The offset {offset} is beyond the end of {edits.source}, which has {len(edits)} "
            "edits: choose a smaller one."
        )
    chosen = edits[offset : None if limit is None else offset + limit]
    if known_to is None:
        return chosen
    with_old = [edit for edit in chosen if edit.old is not None]
    answers = known_to.knows(with_old) if with_old else []
    known = [edit for edit, knows in zip(with_old, answers, strict=True) if knows]
    if not known:
        raise BadEdits(
            f"Of the {len(chosen)} edits asked from {edits.source} the model knows none (it gives "
            f"the `old` answer to none; {len(chosen) - len(with_old)} have no `old`): "
            "choose other facts, teach it the old answers first, or do not ask for known ones."
        )
    return chosen._with(known, asked=len(chosen))


def _path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)) or path == "":
        given = "empty" if path == "" else kind(path)
        raise BadEdits(f"The path of a file of edits is {given}: name the file.")
    return Path(path)


def _only_edits(source: object) -> Iterator[Edit]:
    """The edits of any iterable; `BadEdits` for anything else in it, or no iterable at all."""
    if isinstance(source, Edit):
        raise BadEdits("One edit was given where several are expected: put it in a list.")
    if not isinstance(source, Iterable):
        raise BadEdits(f"Edits are given as a path or a list of Edit; this is {kind(source)}.")
    for position, edit in enumerate(source, start=1):
        if not isinstance(edit, Edit):
            raise BadEdits(f"Item {position} of the edits is {kind(edit)}: make an Edit of it.")
        yield edit


def _check_ids(placed: Iterable[tuple[str, Edit]], name: str = "") -> None:
    seen: dict[str | None, str] = {}
    for place, edit in placed:
        first = seen.setdefault(edit.id, place)
        if first is not place:
            where = f"{name}, " if name else ""
            raise BadEdits(
                f"{where}{place} and {first} have the same id, {shown(str(edit.id))} (a record "
                "without one gets its position): give each its own, or none an id."
            )


def _check_whole_number(value: object, name: str, at_least: int) -> None:
    if value is None and name == "limit":
        return
    if isinstance(value, bool) or not isinstance(value, int):
        given = kind(value)
    elif at_least <= value < 10**18:  # beyond that it is no count, and too long for a message
        return
    else:
        given = str(value) if abs(value) < 10**18 else "too large"
    raise BadEdits(f"`{name}` is {given}: give a whole number, {at_least} or more.")
