"""Records of data sets that others published: on the hub, or saved by the package ``datasets``.

What a source is called:

    hub:azhx/counterfact:train                              a data set and one of its splits
    hub:openai/gsm8k:main:train                             configuration and split
    hub:zjunlp/KnowEdit/benchmark/ZsRE/ZsRE-test-all.json   one file of its repository
    hub:openlifescienceai/medmcqa#Dental                    of a set of tasks, one task
    hub:azhx/counterfact@9e6a1c2:train                      as it was at a commit, tag or branch

Data sets are read by ``datasets`` (the extra ``hub``), single files without it. Nothing but data is
read: code that a data set brings along is never run.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unwrite.errors import BadEdits
from unwrite.formats import Record, file_name, printable

HUB = "hub:"
FORM = (
    "hub:OWNER/NAME, hub:OWNER/NAME:SPLIT, hub:OWNER/NAME:CONFIGURATION:SPLIT or "
    "hub:OWNER/NAME/FILE"
)
_SOURCE = re.compile(
    r"hub:(?P<name>[\w.-]+(?:/[\w.-]+)?)"
    r"(?:/(?P<file>[^@:#]+))?"
    r"(?:@(?P<revision>[\w./-]+))?"
    r"(?::(?P<configuration>[^:#\[\]]+)(?=:))?"
    r"(?::(?P<split>[^:#\[\]]+(?:\[[^\]]*\])?))?"
    r"(?:#(?P<task>.+))?"
)
_SAVED = ("state.json", "dataset_dict.json")  # what ``save_to_disk`` leaves in a folder

Splits = dict[str, list[Record]]


@dataclass(frozen=True)
class Source:
    """What a text that begins with ``hub:`` names; None is what it leaves open."""

    name: str
    file: str | None = None
    revision: str | None = None
    configuration: str | None = None
    split: str | None = None
    task: str | None = None


def is_hub(source: object) -> bool:
    """Whether this names a data set of the hub."""
    return isinstance(source, str) and source.startswith(HUB)


def parse(text: str) -> Source:
    """The parts of a name. Raises ``BadEdits`` with the forms that there are."""
    match = _SOURCE.fullmatch(text)
    if match is None or (match["file"] and match["split"]):
        raise BadEdits(f"{printable(text[:200])} names no data set: write {FORM}.")
    return Source(**match.groupdict())


def downloaded(source: Source) -> Path:
    """The one file that ``source`` names, from the hub or its cache. Raises ``BadEdits``."""
    from huggingface_hub import errors, hf_hub_download

    assert source.file is not None
    try:
        path = hf_hub_download(
            source.name, source.file, repo_type="dataset", revision=source.revision
        )
    except (OSError, ValueError, errors.HFValidationError) as error:
        raise BadEdits(
            f"{HUB}{source.name}/{source.file} cannot be read ({_reason(error)}): check the names "
            "and the connection, or download the file and give its path."
        ) from None
    return Path(path)


def splits(text: str, source: Source) -> Splits:
    """The records of a data set by split: of the one that ``source`` names, or of all.

    Fields that are null are left out: ``datasets`` gives every record every field. ``text`` is what
    messages call the source. Holds all records. Raises ``BadEdits``.
    """
    datasets = _package(text)
    try:
        found = datasets.load_dataset(
            source.name, source.configuration, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise BadEdits(
            f"{printable(text)} cannot be read ({_reason(error)}): check the name, the "
            "configuration, the split and the connection, or save the records as JSON Lines."
        ) from None
    return _by_split(found, source.split or "all")


def is_saved(path: Path) -> bool:
    """Whether a folder holds a data set that ``datasets`` saved."""
    try:
        return path.is_dir() and any((path / name).is_file() for name in _SAVED)
    except (OSError, ValueError):  # no path at all: whoever reads it says so
        return False


def saved(path: Path) -> Splits:
    """The records of a saved data set by split. Raises ``BadEdits``."""
    datasets = _package(file_name(path))
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError) as error:
        raise BadEdits(
            f"{file_name(path)} is a damaged data set ({_reason(error)}): save it again."
        ) from None
    return _by_split(found, "all")


def only(found: Splits, name: str, how: str) -> list[Record]:
    """The records of a source that has to have one split, and something in it. Raises ``BadEdits``;
    ``how`` is what stands before the name of a split."""
    if len(found) > 1:
        raise BadEdits(
            f"{name} has the splits {', '.join(found)}: name one, as {how}{next(iter(found))}."
        )
    (records,) = found.values()
    if not records:
        raise BadEdits(f"{name} has no records: name another split.")
    return records


def _package(name: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise BadEdits(
            f"{printable(name)} is read by the package datasets, which is not installed: "
            "pip install 'unwrite[hub]'"
        ) from None


def _by_split(found: Any, alone: str) -> Splits:
    named = found if isinstance(found, Mapping) else {alone: found}
    return {
        str(split): [
            Record(f"row {number} of {split}", _without_nulls(row))
            for number, row in enumerate(rows, start=1)
        ]
        for split, rows in named.items()
    }


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = ((key, _without_nulls(one)) for key, one in value.items() if one is not None)
        return dict(kept)
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        return [_without_nulls(one) for one in value]
    return value


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return printable(lines[0][:300]).rstrip(".")
