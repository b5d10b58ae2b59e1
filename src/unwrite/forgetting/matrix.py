"""The forgetting matrix: how much every upstream example suffers from every task learned.

    values[t, j] = log perplexity of example j after learning task t - the same before

so positive numbers are forgetting, and NaN is what nobody has observed (METHODS 5.1; arXiv
2406.14026, section 2). Rows are tasks, columns are examples. In the binary form an entry is 1 where
an answer that was right before is wrong afterwards, and 0 where it stayed right.

On disk a matrix is a folder. ``matrix.npz`` is complete in itself and written last, in one piece;
``tasks.jsonl`` and ``examples.jsonl`` say for people and programs what stands behind the labels.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unwrite.errors import BadSetting, DamagedFile
from unwrite.files import read_jsonl, speaking_of_disk, user_path, write_atomically, write_jsonl

Array = npt.NDArray[np.float64]
Details = Mapping[str, Mapping[str, Any]]
NAME, TASKS, EXAMPLES = "matrix.npz", "tasks.jsonl", "examples.jsonl"
BUNDLED = "bundled"  # the name of the matrix that comes with the package
LARGEST = 1 << 34  # bytes unpacked; a matrix of a thousand million entries takes half of it


@dataclass(frozen=True, eq=False)
class ForgettingMatrix:
    """Tasks x examples, with labels on both axes and where the numbers come from.

    ``values``: float64 (tasks, examples), NaN = unobserved; an infinite value is refused.
    ``task_details``, ``example_details``: JSON objects by label (an example's prompt and answer,
    say). ``provenance``: a JSON object on the whole. Memory: 8 bytes an entry.

    Raises ``BadSetting`` when the shapes do not fit or a label occurs twice.
    """

    values: Array
    tasks: tuple[str, ...]
    examples: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    task_details: Details = field(default_factory=dict)
    example_details: Details = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        tasks, examples = tuple(self.tasks), tuple(self.examples)
        if values.shape != (len(tasks), len(examples)):
            raise BadSetting(
                f"A forgetting matrix of {len(tasks)} tasks and {len(examples)} examples needs "
                f"values of that shape, not {values.shape}."
            )
        for kind, labels in (("task", tasks), ("example", examples)):
            if len(set(labels)) < len(labels):
                twice = next(label for label in labels if labels.count(label) > 1)
                raise BadSetting(f"The {kind} {twice!r} is in the forgetting matrix twice.")
        if np.isinf(values).any():
            raise BadSetting("A forgetting matrix holds finite numbers, or NaN for the unobserved.")
        values.flags.writeable = False
        for name, value in (("values", values), ("tasks", tasks), ("examples", examples)):
            object.__setattr__(self, name, value)  # the dataclass is frozen from here on

    @classmethod
    def empty(
        cls,
        examples: Sequence[str],
        provenance: Mapping[str, Any] | None = None,
        example_details: Details | None = None,
    ) -> ForgettingMatrix:
        """A matrix of no tasks yet."""
        return cls(
            np.empty((0, len(examples))),
            (),
            tuple(examples),
            provenance or {},
            example_details=example_details or {},
        )

    @property
    def observed(self) -> npt.NDArray[np.bool_]:
        """Which entries have been measured: (tasks, examples)."""
        return ~np.isnan(self.values)

    def append(
        self, task: str, values: npt.ArrayLike, details: Mapping[str, Any] | None = None
    ) -> ForgettingMatrix:
        """The matrix with one more task; ``values`` (examples,) may hold NaN."""
        row = np.asarray(values, dtype=np.float64)
        if row.shape != (len(self.examples),):
            raise BadSetting(
                f"The task {task!r} brings {row.size} numbers for {len(self.examples)} examples."
            )
        return replace(
            self,
            values=np.vstack([self.values, row]),
            tasks=(*self.tasks, task),
            task_details={**self.task_details, task: dict(details or {})},
        )

    def select(
        self,
        tasks: Sequence[int] | npt.NDArray[np.intp] | None = None,
        examples: Sequence[int] | npt.NDArray[np.intp] | None = None,
    ) -> ForgettingMatrix:
        """The part with these tasks and examples (positions), in the order given."""
        rows = range(len(self.tasks)) if tasks is None else tasks
        columns = range(len(self.examples)) if examples is None else examples
        kept_tasks = tuple(self.tasks[row] for row in rows)
        kept_examples = tuple(self.examples[column] for column in columns)
        return replace(
            self,
            values=self.values[np.ix_(list(rows), list(columns))],
            tasks=kept_tasks,
            examples=kept_examples,
            task_details=_kept(self.task_details, kept_tasks),
            example_details=_kept(self.example_details, kept_examples),
        )

    # ---- how simple is it? -------------------------------------------------------------------

    def rank_profile(self, largest: int = 9) -> dict[str, Any]:
        """How much of the matrix simple models explain: R^2 against its overall mean.

        ``rank``: a list for the truncated SVD of the raw values, ranks 1 to ``largest`` (METHODS
        5.3); ``additive``: task mean + example mean - mean; ``task_mean``; ``example_mean``. Taken
        on the tasks observed at all and the examples observed in each of them, whose numbers are
        ``tasks`` and ``examples``. R^2 is None where all values are equal.

        Raises ``BadSetting`` when no example was observed in every task.
        """
        rows = self.observed.any(axis=1)
        values = self.values[rows]
        values = values[:, ~np.isnan(values).any(axis=0)]
        if not values.size:
            raise BadSetting(
                "No example was observed in every task, so the matrix has no rank profile. "
                "Collect the missing entries, or select the tasks that share examples."
            )
        task_mean = values.mean(axis=1, keepdims=True)
        example_mean = values.mean(axis=0, keepdims=True)
        spread = float(((values - values.mean()) ** 2).mean())

        def explained(fitted: Array) -> float | None:
            return 1 - float(((values - fitted) ** 2).mean()) / spread if spread else None

        left, sizes, right = np.linalg.svd(values, full_matrices=False)
        return {
            "tasks": values.shape[0],
            "examples": values.shape[1],
            "rank": [
                explained((left[:, :rank] * sizes[:rank]) @ right[:rank])
                for rank in range(1, min(largest, len(sizes)) + 1)
            ],
            "additive": explained(task_mean + example_mean - values.mean()),
            "task_mean": explained(np.broadcast_to(task_mean, values.shape)),
            "example_mean": explained(np.broadcast_to(example_mean, values.shape)),
        }

    # ---- on disk -----------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write the matrix into ``folder`` (made if need be); readers see the old one or the new.

        Values that are exact in single precision are stored so, others in double: nothing is lost.
        """
        path = user_path(folder)
        with speaking_of_disk(f"write the forgetting matrix {path}"):
            path.mkdir(parents=True, exist_ok=True)
            # Details first: those of a task that is not in the matrix yet do no harm.
            write_jsonl(path / TASKS, _rows("task", self.tasks, self.task_details))
            write_jsonl(path / EXAMPLES, _rows("example", self.examples, self.example_details))
            write_atomically(path / NAME, self._packed())
        return path

    @classmethod
    def load(cls, folder: str | Path) -> ForgettingMatrix:
        """Read a matrix written by ``save``, or the ``bundled`` one: SmolLM2-135M, 63 tasks of
        bundled text. Raises ``BadSetting`` where there is none, and ``DamagedFile`` naming what is
        not as it was written."""
        path = place_of(folder)
        if not (path / NAME).is_file():
            raise BadSetting(
                f"{path} holds no forgetting matrix. Make one with: unwrite forgetting collect."
            )
        values, tasks, examples, provenance = _unpacked(path / NAME)
        return cls(
            values,
            tuple(tasks),
            tuple(examples),
            provenance,
            _read_details(path / TASKS, "task", tasks),
            _read_details(path / EXAMPLES, "example", examples),
        )

    def _packed(self) -> bytes:
        with np.errstate(over="ignore"):  # what overflows is not exact, and is kept in double
            single = self.values.astype(np.float32)
        exact = np.array_equal(single.astype(np.float64), self.values, equal_nan=True)
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            values=single if exact else self.values,
            tasks=np.array(json.dumps(self.tasks)),
            examples=np.array(json.dumps(self.examples)),
            provenance=np.array(json.dumps(dict(self.provenance), allow_nan=False)),
        )
        return buffer.getvalue()


def _unpacked(path: Path) -> tuple[Array, list[str], list[str], dict[str, Any]]:
    """What ``_packed`` packed. The check sums are compared before anything is made of the data,
    and no more is unpacked than a matrix could be. Raises ``DamagedFile``."""
    damaged = DamagedFile(f"{path} is damaged: it is not a forgetting matrix. Put back a copy.")
    data = path.read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as packed:
            if sum(part.file_size for part in packed.infolist()) > LARGEST:
                raise damaged
            if packed.testzip() is not None:
                raise damaged
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            values, provenance = file["values"], json.loads(str(file["provenance"]))
            tasks, examples = json.loads(str(file["tasks"])), json.loads(str(file["examples"]))
    except DamagedFile:
        raise
    except Exception:  # noqa: BLE001 -- zipfile, zlib and numpy have many ways to say it
        raise damaged from None
    if (
        not (_are_labels(tasks) and _are_labels(examples))
        or not isinstance(provenance, dict)
        or not isinstance(values, np.ndarray)
        or values.dtype not in (np.float32, np.float64)
        or values.shape != (len(tasks), len(examples))
        or np.isinf(values).any()
    ):
        raise damaged
    return values, tasks, examples, provenance


def _are_labels(value: Any) -> bool:
    """Whether it is a list of texts, each of them once."""
    texts = isinstance(value, list) and all(isinstance(one, str) for one in value)
    return texts and len(set(value)) == len(value)


def is_bundled(folder: str | Path) -> bool:
    """Whether the matrix that comes with the package is meant: it is read, and never written."""
    return str(folder) == BUNDLED and not Path(folder).exists()


def place_of(folder: str | Path) -> Path:
    """The folder of a matrix, which may be the ``bundled`` one."""
    if is_bundled(folder):
        return Path(__file__).parent.parent / "data" / "forgetting"
    return user_path(folder)


def is_matrix(folder: str | Path) -> bool:
    """Whether ``folder`` holds a forgetting matrix."""
    return (user_path(folder) / NAME).is_file()


def _kept(details: Details, labels: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    return {label: details[label] for label in labels if label in details}


def _rows(kind: str, labels: Sequence[str], details: Details) -> list[dict[str, Any]]:
    return [{kind: label, **details.get(label, {})} for label in labels]


def _read_details(path: Path, kind: str, labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    rows = read_jsonl(path)
    known = set(labels)
    found = {
        row.pop(kind): row
        for row in rows
        if isinstance(row, dict) and isinstance(row.get(kind), str) and row[kind] in known
    }
    missing = [label for label in labels if label not in found]
    if missing:
        raise DamagedFile(
            f"{path} is damaged: it has no line on the {kind} {missing[0]!r}. Put back a copy."
        )
    return {label: found[label] for label in labels}
