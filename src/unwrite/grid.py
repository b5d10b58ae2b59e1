"""What a comparison consists of, written down before anything runs.

A *cell* is one method on the first records of one edit set with one seed. The plan lists all
cells with every setting, so that an interrupted run goes on where it was, and a second call with
other settings cannot mix its numbers into the table of the first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from unwrite import methods
from unwrite.edits import Edit, Edits, read_edits, with_ids
from unwrite.errors import BadEdits, BadSetting, DamagedFile
from unwrite.files import read_json, sha256_bytes, write_json

FORMAT = 1
NAME = "plan.json"

Mode = Literal["batch", "sequential", "single"]
MODES: tuple[Mode, ...] = ("batch", "sequential", "single")
Source = str | Path | Sequence[Edit]


@dataclass(frozen=True)
class Protocol:
    """What all cells of a run have in common.

    ``start``: the model ``"as is"``; as is, and only the facts it is ``"known"`` to answer with
    ``old``; or ``"planted"``, fine-tuned on the old answers first (``planting``: the settings).
    ``exact``: whether answers are also generated freely. ``chunk``: edits in one step of the mode
    ``sequential``. ``neighbour_metrics``: whether the scores of other toolkits are taken too.
    ``robust``: what each state is checked against (``unwrite.robustness``).
    ``lm_eval``: tasks of lm-evaluation-harness (``unwrite.ability``).
    """

    start: Literal["as is", "known", "planted"] = "as is"
    planting: dict[str, Any] | None = None
    offset: int = 0
    mode: Mode = "batch"
    chunk: int | None = None
    exact: bool = True
    # What is measured on request. Not asked for, it is not written down: so that a run of an
    # earlier version, which did not know of it, goes on under the same names.
    neighbour_metrics: bool = field(default=False, repr=False)
    robust: tuple[str, ...] = field(default=(), repr=False)
    lm_eval: tuple[str, ...] = field(default=(), repr=False)

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON gives them back, without what was not asked for."""
        asked = {one.name: getattr(self, one.name) for one in fields(self) if not one.repr}
        given = _plain(asdict(self))
        return {key: value for key, value in given.items() if asked.get(key, True)}

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Protocol:
        """The reverse of ``as_json``. Raises ``TypeError`` for unknown settings."""
        lists = {name: tuple(given.get(name, ())) for name in ("robust", "lm_eval")}
        return cls(**{**given, **lists})


@dataclass(frozen=True)
class EditSet:
    """Records of one source, from the offset on, and the label they go by."""

    label: str
    source: str
    edits: Edits

    def first(self, size: int | None) -> Edits:
        """The first ``size`` records (all, if there are fewer)."""
        return self.edits[:size]

    def hash_of(self, size: int | None) -> str:
        """SHA-256 of the contents of the first ``size`` records."""
        return _hash([edit.as_dict() for edit in self.first(size)])


@dataclass(frozen=True)
class Cell:
    """One row of the table to be. ``settings`` are those of the method, its seed included;
    ``seed`` is None for a method that takes none. ``name`` is that of its folder."""

    name: str
    method: str
    settings: dict[str, Any]
    edits: str
    size: int | None
    seed: int | None

    @property
    def place(self) -> tuple[str, int | None]:
        """Which records: cells of one place start from the same state."""
        return self.edits, self.size


@dataclass
class Plan:
    """All cells of a run, in the order in which they are computed."""

    base: dict[str, str]  # name and fingerprint
    protocol: Protocol
    methods: dict[str, dict[str, Any]]
    edits: dict[str, dict[str, Any]]
    cells: list[Cell]

    @classmethod
    def of(
        cls,
        base: Mapping[str, str],
        protocol: Protocol,
        chosen: Mapping[str, Any],
        sets: Sequence[EditSet],
        seeds: Sequence[int],
        sizes: Sequence[int | None],
    ) -> Plan:
        """The whole grid. Seeds change slowest, so that the first full table comes soon."""
        places = [(one, size, one.hash_of(size)) for one in sets for size in sizes]
        common = [base["fingerprint"], protocol.as_json()]
        cells = []
        for number, seed in enumerate(seeds):
            for one, size, records in places:
                for label, method in chosen.items():
                    seeded, count = methods.replaced(method, "seed", seed)
                    if count == 0 and number > 0:
                        continue  # nothing in it depends on the seed
                    chosen_settings, own = settings(seeded), (seed if count else None)
                    facts = [*common, records, label, chosen_settings, one.label, size, own]
                    words = (label, one.label, f"n{size or 'all'}", f"s{own or 0}")
                    name = f"{slug('-'.join(words))}-{_hash(facts)[:8]}"
                    cells.append(Cell(name, label, chosen_settings, one.label, size, own))
        return cls(
            dict(base),
            protocol,
            {label: settings(method) for label, method in chosen.items()},
            {
                one.label: {
                    "source": one.source,
                    "records": len(one.edits),
                    "sha256": one.hash_of(None),
                }
                for one in sets
            },
            cells,
        )

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan of a run. Raises ``DamagedFile``."""
        content = read_json(folder / NAME)
        try:
            if content["format"] != FORMAT:
                raise DamagedFile(
                    f"{folder / NAME} is of format {content['format']}; this version of Unwrite "
                    f"reads {FORMAT}."
                )
            return cls(
                content["base"],
                Protocol.from_json(content["protocol"]),
                content["methods"],
                content["edits"],
                [Cell(**cell) for cell in content["cells"]],
            )
        except (LookupError, TypeError, ValueError, AttributeError):
            raise DamagedFile(f"{folder / NAME} is damaged: it is not a plan.") from None

    def write(self, folder: Path) -> None:
        """Write ``plan.json``, atomically."""
        content = {**asdict(self), "protocol": self.protocol.as_json()}
        write_json(folder / NAME, {"format": FORMAT, **content})

    def extended(self, other: Plan, folder: Path) -> Plan:
        """This plan with the cells of ``other`` added; those it has already stay where they are.

        Raises ``BadSetting`` when the two contradict each other: another base or protocol, or the
        same label for something else.
        """
        mine, theirs = (_plain(asdict(one.protocol)) for one in (self, other))
        mine["base"], theirs["base"] = self.base["fingerprint"], other.base["fingerprint"]
        for kind in ("methods", "edits"):
            for label, facts in getattr(other, kind).items():
                known = getattr(self, kind).get(label, facts)
                mine[f"{kind} {label}"] = {**known, "source": None}
                theirs[f"{kind} {label}"] = {**facts, "source": None}
        for what, value in theirs.items():
            if value != mine[what]:
                raise BadSetting(
                    f"{folder} holds another comparison: {what} is {_short(mine[what], value)} "
                    f"there, and {_short(value, mine[what])} now. Name another folder for this "
                    "one, or other labels; methods, seeds, sizes and edit sets can be added."
                )
        names = {cell.name for cell in self.cells}
        return Plan(
            self.base,
            self.protocol,
            {**self.methods, **_new(other.methods, self.methods)},
            {**self.edits, **_new(other.edits, self.edits)},
            [*self.cells, *(cell for cell in other.cells if cell.name not in names)],
        )


def is_run(folder: Path) -> bool:
    """Whether ``folder`` holds a comparison."""
    try:
        return (folder / NAME).is_file()
    except OSError:  # too long for a name, or closed to us
        return False


def named_methods(given: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Methods by label. An item is a method or text: ``NAME``, ``NAME:KEY=VALUE:...`` or
    ``LABEL=NAME:KEY=VALUE:...``; without a label, the text or the method's name is the label.

    Raises ``BadSetting`` for what is no method, and for a label that is used twice or reserved.
    """
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise BadSetting("The methods are a list, or a dictionary by label: put them in [ ].")
    if isinstance(given, Mapping):
        pairs = [
            (str(label), from_text(one)[1] if isinstance(one, str) else one)
            for label, one in given.items()
        ]
    else:
        pairs = [from_text(one) if isinstance(one, str) else (_name(one), one) for one in given]
    found: dict[str, Any] = {}
    for label, method in pairs:
        settings(method)
        if label in found:
            raise BadSetting(
                f"Two methods have the label {label!r}. Give each its own: LABEL=NAME:KEY=VALUE."
            )
        if not label.strip() or label[:1] == "[" or not label.isprintable():
            raise BadSetting(
                f"{label!r} cannot be the label of a method: it needs printable characters, and "
                "must not begin with '[', like the reference rows."
            )
        found[label] = method
    if not found:
        raise BadSetting("There is nothing to compare: name at least one method.")
    return found


def from_text(text: str) -> tuple[str, Any]:
    """Label and method from ``[LABEL=]NAME[:KEY=VALUE]...``; values hold no colon."""
    head, *pairs = text.split(":")
    label, equals, name = head.rpartition("=")
    given: dict[str, str] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key or key in given:
            raise BadSetting(
                f"{text!r} is not a method: write [LABEL=]NAME:KEY=VALUE:KEY=VALUE, each key once."
            )
        given[key.strip()] = value
    return (label if equals else text), methods.build(name.strip(), given)


def edit_sets(
    given: Source | Mapping[str, Source] | Sequence[Source], offset: int
) -> list[EditSet]:
    """Read all edit sets, whole; one source, several, or several by label.

    A file is labelled by its name without ending. Raises ``BadEdits``.
    """
    if isinstance(given, Mapping):
        named = list(given.items())
    else:
        sources = _sources(given)
        short = [_short_label(one) for one in sources]
        named = [
            (label if short.count(label) == 1 else _long_label(one), one)
            for label, one in zip(short, sources, strict=True)
        ]
    if not named:
        raise BadEdits("There is nothing to compare on: name at least one file of edits.")
    labels = [label for label, _ in named]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise BadEdits(f"The edit set {twice[0]!r} is given twice. Give it once.")
    found = []
    for label, source in named:
        edits = with_ids(read_edits(source, offset=offset))
        assert isinstance(edits, Edits)
        found.append(EditSet(label, edits.source, edits))
    return found


def check_numbers(
    seeds: Sequence[int], sizes: Sequence[int | None]
) -> tuple[list[int], list[int | None]]:
    """Seeds and sizes without repetition. Raises ``BadSetting`` for what is none."""
    for name, values, least in (("seeds", seeds, 0), ("sizes", sizes, 1)):
        if isinstance(values, (str, int)) or not values:
            raise BadSetting(f"{name} must be a list with at least one number.")
        for value in values:
            if value is None and name == "sizes":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise BadSetting(f"{name} are whole numbers from {least} on, not {value!r}.")
    return list(dict.fromkeys(seeds)), list(dict.fromkeys(sizes))


def slug(text: str) -> str:
    """``text`` as a part of a file name that every system takes."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:80] or "x"


def settings(method: Any) -> dict[str, Any]:
    """The settings of a method or reference row as JSON gives them back. Raises ``BadSetting``."""
    if not hasattr(method, "delta") and not hasattr(method, "made"):
        raise BadSetting(
            f"{method!r} is not a method: give a name, or an instance of a frozen dataclass with "
            "delta(model, edits), such as FullFT()."
        )
    if not is_dataclass(method) or isinstance(method, type):
        raise BadSetting(f"{method!r} is not an instance of a frozen dataclass, as methods are.")
    given = methods.settings_of(method)
    try:
        return dict(_plain(given))
    except TypeError:
        raise BadSetting(
            f"The settings of a method cannot be written down: {given}. Fields are numbers, "
            "texts, truth values, lists of these, or methods."
        ) from None


def _plain(value: Any) -> Any:
    """As JSON gives it back, and so comparable with a plan that was read; ``inf`` as text."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError


def _name(method: Any) -> str:
    return str(settings(method)["name"])


def _new(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {label: facts for label, facts in given.items() if label not in known}


def _sources(given: Any) -> list[Source]:
    """One source (a path, or a list of edits) or several, as a list."""
    if isinstance(given, (str, Path, Edits)):
        return [given]
    if not isinstance(given, Sequence):
        raise BadEdits("Edits are given as a path, a list of Edit, or several of these.")
    return [given] if given and isinstance(given[0], Edit) else list(given)


def _short_label(source: Source) -> str:
    label = _long_label(source)
    return label if label.startswith("atlas") else Path(label).stem or label


def _long_label(source: Source) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    return source.source if isinstance(source, Edits) else "edits"


def _hash(value: Any) -> str:
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())


def _short(value: Any, other: Any) -> str:
    """A value for a message; of dictionaries only what differs."""
    if isinstance(value, dict) and isinstance(other, dict):
        value = {key: one for key, one in value.items() if one != other.get(key)}
    text = json.dumps(value)
    return text if len(text) <= 100 else text[:99] + "…"
