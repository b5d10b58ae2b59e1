"""Methods side by side on the same facts, from the same state, with the same questions.

    run/
      plan.json                 every cell with all settings; written first
      base.json                 what the model is, tensor by tensor
      starts/…                  one for each edit set and size: records, planted delta, observations
      cells/…                   one for each method, edit set, size and seed
      table.md, .csv, .json     rewritten after every cell
      report.html               the same on a page, with what every method said; rewritten, too

A finished cell is never computed again, and an unfinished one leaves nothing that is used, so a run
that was killed and started again gives the same numbers as one that was not.

Memory: that of the most demanding method.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unwrite import ability, grid, methods, protection, robustness, tables
from unwrite import base as bases
from unwrite import cell as cells
from unwrite.base import Base
from unwrite.bench import Bench
from unwrite.delta import SCRATCH, Delta
from unwrite.edits import Edit, Edits, read_edits
from unwrite.errors import BadEdits, BadSetting, ProcessFailed, UnwriteError
from unwrite.executors import Executor
from unwrite.files import (
    only_writer,
    read_json,
    sha256_bytes,
    speaking_of_disk,
    user_path,
    write_json,
)
from unwrite.grid import Cell, EditSet, Mode, Plan, Protocol
from unwrite.home import is_home
from unwrite.model import Model
from unwrite.pretrained import Source, resolve
from unwrite.progress import Reporter, Silent
from unwrite.reference import NAMES, RandomDelta, RandomMask, references
from unwrite.run_report import RunReport
from unwrite.scratch import remove_temporaries, sweep_temporary
from unwrite.start import NAME as START
from unwrite.start import Start, check_plantable, planting

CELLS, STARTS, DONORS = "cells", "starts", "donors"
# What a killed process may leave of a run that has no plan yet.
_OWN = (".lock", bases.NAME, f".{bases.NAME}.", f".{grid.NAME}.")


@dataclass(frozen=True)
class Comparison:
    """What a run holds. ``rows``: the result of every finished cell, as in ``compare --json``;
    ``failed``: cell and sentence of those whose method could not do it; ``table``: all figures,
    aggregated over seeds (``means``), as in ``table.json``."""

    folder: Path
    rows: list[dict[str, Any]]
    failed: list[dict[str, Any]]
    table: dict[str, Any]

    def markdown(self) -> str:
        """``table.md``."""
        return (self.folder / "table.md").read_text("utf-8")

    def summaries(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, columns and rows of a short table for each edit set and size."""
        return tables.summaries(self.table["means"])


def compare(
    base: str | Path,
    edits: grid.Source | Mapping[str, grid.Source] | Sequence[grid.Source],
    methods: Mapping[str, Any] | Sequence[Any],
    out: str | Path,
    *,
    seeds: Sequence[int] = (0,),
    sizes: Sequence[int | None] = (None,),
    offset: int = 0,
    plant: bool = False,
    plant_lr: float = 1e-4,
    only_known: bool = False,
    references: Sequence[str] = NAMES,
    exact: bool = True,
    mode: Mode = "batch",
    chunk: int | None = None,
    neighbour_metrics: bool = False,
    robust: Sequence[str] = (),
    lm_eval: Sequence[str] = (),
    trust_remote_code: bool = False,
    device: str | None = None,
    executor: Executor | None = None,
    progress: Reporter | None = None,
) -> Comparison:
    """Run every method on every edit set, size and seed, and write the tables into ``out``.

    ``edits``: one or several paths (or ``"atlas"``, or lists of ``Edit``), by label if a mapping.
    ``methods``: methods, or text ``NAME:KEY=VALUE:...``, by label if a mapping. ``seeds`` set the
    randomness of training, in every place of a method that has a ``seed``; which records are used
    never depends on them: always the first ``size`` after ``offset`` (None: all). ``plant``: start
    from the base fine-tuned on the old answers for three epochs at ``plant_lr``; ``only_known``:
    use, of those records, the facts that the base answers with ``old``. ``references``: rows in
    brackets beside the methods (see ``unwrite.reference``). ``exact=False``: no free generation,
    exact scores are null. ``mode``: all edits in one update (``"batch"``), ``chunk`` by ``chunk``
    (``"sequential"``), or each alone (``"single"``). ``neighbour_metrics``: also the scores of
    ROME and EasyEdit, under their names (see ``unwrite.neighbour_metrics``). ``robust``: score each
    state again after what may happen to it: ``save-reload``, ``bf16``, ``int8``, ``int4``,
    ``chat``, ``relearn:STEPS`` (see ``unwrite.robustness``; not with single edits). ``lm_eval``:
    tasks of lm-evaluation-harness to run before and after; ``"unwrite"`` for the two that are
    bundled (needs the extra ``lm-eval``; not with single edits). ``executor``: where cells are
    computed (default: here, one after the other); the results are the same wherever that is.

    What ``out`` has already is not computed again; more methods, seeds, sizes and edit sets may be
    added to it. A method that fails in a cell is noted there, the others go on, and the next call
    tries it again.

    Raises ``BadSetting`` and ``BadEdits`` before anything is written, ``HomeBusy`` if another
    process works on ``out``, the first failure if every cell failed, and in the end the first error
    that is a bug of a method.
    """
    progress = progress or Silent()
    chosen = grid.named_methods(methods)
    seeds, sizes = grid.check_numbers(seeds, sizes)
    protocol = _protocol(plant, plant_lr, only_known, offset, mode, chunk, exact)
    protocol = replace(
        protocol,
        neighbour_metrics=bool(neighbour_metrics),
        robust=robustness.checked(robust),
        lm_eval=ability.checked(lm_eval),
    )
    if mode == "single" and (protocol.robust or protocol.lm_eval):
        raise BadSetting(
            "Robustness and lm-eval are about one state, and single edits make a state each. Use "
            "the mode batch or sequential, or leave them out."
        )
    chosen = _with_references(references, chosen, mode)
    sets = grid.edit_sets(edits, offset)
    if plant:
        for one in sets:
            check_plantable(one.edits, one.label)
    folder = user_path(out)
    with speaking_of_disk(f"compare in {folder}"):
        if is_home(base):
            raise BadSetting(f"{base} is a model home, not a model. Export it, then use that.")
        fresh = not grid.is_run(folder)
        if fresh:
            _check_free(folder)
        source = resolve(base, trust_remote_code=trust_remote_code, on_progress=progress.say)
        described = _described(folder, source, trust_remote_code)
        facts = {"name": described.name, "fingerprint": described.fingerprint}
        plan = Plan.of(facts, protocol, chosen, sets, seeds, sizes)
        run = _Run(folder, described, source, plan, chosen, sets, progress)
        run.trust_remote_code, run.device, run.executor = trust_remote_code, device, executor
        if fresh:
            run.check()  # bad edits leave nothing
        folder.mkdir(parents=True, exist_ok=True)
        with only_writer(folder):
            if fresh and not grid.is_run(folder):
                _check_free(folder)
            run.write_plan()
            run.go()
        return run.comparison()


def sweep(
    base: str | Path,
    edits: grid.Source | Mapping[str, grid.Source] | Sequence[grid.Source],
    method: str,
    over: Mapping[str, Sequence[str]],
    out: str | Path,
    *,
    settings: Mapping[str, str] | None = None,
    **options: Any,
) -> Comparison:
    """``compare`` over all combinations of a method's settings: trade-off curves.

    ``over``: values by field, as text (nested fields are dotted); ``settings``: those that all have
    in common; ``options``: those of ``compare``. Rows that no other row beats in reliability,
    generality and locality at once have ``front`` set (see ``tables``).
    """
    return compare(base, edits, combinations(method, over, settings or {}), out, **options)


def combinations(
    method: str, over: Mapping[str, Sequence[str]], settings: Mapping[str, str]
) -> dict[str, Any]:
    """One method for each combination of values, labelled by them."""
    from itertools import product

    if not over or any(isinstance(values, str) or not values for values in over.values()):
        raise BadSetting("There is nothing to sweep: name at least one field with its values.")
    if both := [key for key in over if key in settings]:
        raise BadSetting(f"{both[0]} is both fixed and swept. Leave out one of the two.")
    found = {}
    for values in product(*over.values()):
        own = dict(zip(over, values, strict=True))
        label = " ".join(f"{key}={value}" for key, value in own.items())
        found[f"{method} {label}"] = methods.build(method, {**settings, **own})
    return found


Outcome = tuple[Cell, Exception | None]


class _Run:
    """One call of ``compare``: what it asks for, and the model once it is needed."""

    trust_remote_code = False
    device: str | None = None
    executor: Executor | None = None

    def __init__(
        self,
        folder: Path,
        base: Base,
        source: Source,
        asked: Plan,
        chosen: Mapping[str, Any],
        sets: Sequence[EditSet],
        progress: Reporter,
    ) -> None:
        self.folder, self.base, self.source = folder, base, source
        self.asked, self.plan = asked, asked
        self.chosen, self.progress = chosen, progress
        self.sets = {one.label: one for one in sets}
        self.tables, self.report = tables.Tables(folder), RunReport(folder)
        self._bench: Bench | None = None
        self._known: dict[str, list[bool]] = {}
        self._perplexities: dict[str, float] = {}
        self._folders: dict[tuple[str, int | None], Path] = {}
        self._starts: dict[Path, Start] = {}

    @property
    def bench(self) -> Bench:
        """The model, loaded when first asked for: a finished run needs none."""
        if self._bench is None:
            self.progress.say(f"Loading {self.base.name}")
            model = Model.load(
                self.source,
                trust_remote_code=self.trust_remote_code,
                device=self.device,
                progress=self.progress,
            )
            self._bench = Bench(model, self.base, self.asked.protocol)
            self._bench.trust_remote_code = self.trust_remote_code
        return self._bench

    def check(self) -> None:
        """What only the model can tell: whether it reads the edits, and knows any; and whether
        the tasks of lm-eval are there."""
        if self.asked.protocol.lm_eval:
            ability.check_tasks(self.asked.protocol.lm_eval)
        for label, size in dict.fromkeys(cell.place for cell in self.asked.cells):
            edits = self._chosen_edits(label, size)
            try:
                self.bench.check_readable(edits)
            except BadEdits as error:
                raise BadEdits(f"{label}: {error}") from None

    def write_plan(self) -> None:
        """Write the plan, or add to the one that is there."""
        if grid.is_run(self.folder):
            known = Plan.read(self.folder)
            self.plan = known.extended(self.asked, self.folder)
            if self.plan.cells == known.cells:
                return
        else:
            self.base.write(self.folder)
        self.plan.write(self.folder)

    def go(self) -> None:
        """Compute what this call asks for and is not there yet. Only under the lock."""
        remove_temporaries(self.folder)
        sweep_temporary(SCRATCH)
        todo = [cell for cell in self.asked.cells if not self._is_finished(cell)]
        self.progress.say(
            f"{len(self.asked.cells)} cells, {len(self.asked.cells) - len(todo)} of them finished."
        )
        if todo and self.asked.protocol.lm_eval:
            ability.check_tasks(())
        self._drop_donors(todo)
        self._write_tables()
        failures: list[UnwriteError] = []
        bugs: list[Exception] = []
        finished = self._elsewhere(todo) if self.executor is not None else self._here(todo)
        with self.progress.stage("comparing", len(todo)) as advance:
            for cell, error in finished:
                if isinstance(error, UnwriteError):
                    failures.append(error)
                elif error is not None:
                    bugs.append(error)
                if error is not None:
                    self._note_failure(cell, error)
                self._write_tables()
                advance(1, cell.method)
        if bugs:
            raise bugs[0]
        if failures and len(failures) == len(self.asked.cells):
            raise failures[0]

    def _here(self, todo: Sequence[Cell]) -> Iterator[Outcome]:
        """Compute cells one after the other in this process."""
        for number, cell in enumerate(todo):
            later = todo[number + 1 :]
            error = self.compute(cell, later)
            self._drop_donors(later)
            yield cell, error

    def _elsewhere(self, todo: Sequence[Cell]) -> Iterator[Outcome]:
        """Have cells computed by workers: their starts first, and those that look at the results of
        others last."""
        assert self.executor is not None
        make = WorkerMaker.of(self)
        places = {self._start_folder(cell): cell for cell in reversed(todo)}
        starts = [one for folder, one in places.items() if Start.open(folder) is None]
        by_name = {cell.name: cell for cell in todo}
        late = [cell for cell in todo if self._looks_at_others(cell)]
        early = [cell for cell in todo if cell not in late]
        for kind, jobs in (("start", starts), ("cell", early), ("cell", late)):
            work = self.executor.work(make, [(kind, one.name) for one in jobs])
            with contextlib.closing(work):
                for (_, name), error in work:
                    if kind == "cell":
                        yield by_name[name], error
                    elif error is not None:
                        raise error

    def _looks_at_others(self, cell: Cell) -> bool:
        return isinstance(self.chosen[cell.method], (RandomDelta, RandomMask))

    def compute(self, cell: Cell, later: Sequence[Cell] = ()) -> Exception | None:
        """Compute one cell; the error that its method failed with, if it did. Raises what is not
        the method's fault, because the next cell would fare no better."""
        start = self._start(cell)
        method, _ = methods.replaced(self.chosen[cell.method], "seed", cell.seed or 0)
        try:
            with _seeded(cell.seed or 0, self.bench.model.device):
                learn = self._learner(cell, method, later)
                place = self.folder / CELLS / cell.name
                cells.compute(place, cell, method, learn, start, self.bench)
        except (OSError, ProcessFailed):
            raise
        except Exception as error:  # noqa: BLE001 -- a night's grid must not end with it
            self.bench.distrust()
            return error
        return None

    def _write_tables(self) -> None:
        self.tables.write(self.plan)
        self.report.write()

    def comparison(self) -> Comparison:
        """What the run holds now."""
        rows, failed = [], []
        for cell in self.plan.cells:
            place = self.folder / CELLS / cell.name
            if self._is_finished(cell):
                rows.append(read_json(place / cells.RESULT))
            elif (place / cells.FAILED).is_file():
                failed.append(read_json(place / cells.FAILED))
        return Comparison(self.folder, rows, failed, read_json(self.folder / "table.json"))

    def _is_finished(self, cell: Cell) -> bool:
        return (self.folder / CELLS / cell.name / cells.RESULT).is_file()

    def _note_failure(self, cell: Cell, error: Exception) -> None:
        expected = isinstance(error, UnwriteError)
        sentence = str(error) if expected else f"{type(error).__name__}: {error}"
        place = self.folder / CELLS / cell.name
        self.progress.say(f"{cell.method} on {cell.edits} failed: {sentence}")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        keys = ("method", "edits", "size", "seed")
        facts = {key: getattr(cell, key) for key in keys}
        write_json(place / cells.FAILED, {**facts, "id": cell.name, "error": sentence})

    # ---- starts ------------------------------------------------------------------------------

    def _start(self, cell: Cell) -> Start:
        label, size = cell.place
        folder, planted = self._start_folder(cell), self.asked.protocol.planting
        if folder not in self._starts:
            start = Start.open(folder)
            if start is None:
                self.progress.say(f"Preparing the start on {label}")
                recipe = planting(planted["lr"]) if planted is not None else None
                edits = self._chosen_edits(label, size)
                start = Start.make(folder, edits, self.bench, recipe, self._measured())
            self._starts[folder] = start
        return self._starts[folder]

    def _start_folder(self, cell: Cell) -> Path:
        label, size = cell.place
        if cell.place not in self._folders:
            records = self.sets[label].hash_of(size)
            content = repr((self.base.fingerprint, self.asked.protocol, records))
            name = f"{grid.slug(label)}-n{size or 'all'}-{sha256_bytes(content.encode())[:8]}"
            self._folders[cell.place] = self.folder / STARTS / name
        return self._folders[cell.place]

    def _measured(self) -> dict[str, float]:
        """Perplexities of starting states, by fingerprint."""
        for file in sorted(self.folder.glob(f"{STARTS}/*/{START}")):
            facts = read_json(file)
            self._perplexities[facts["fingerprint"]] = facts["perplexity"]
        return self._perplexities

    def _chosen_edits(self, label: str, size: int | None) -> Edits:
        """The records of a place; of these the known ones, if the protocol asks for them."""
        edits = self.sets[label].first(size)
        if self.asked.protocol.start != "known":
            return edits
        if label not in self._known:
            # Asked once for the largest size: the others are its beginnings.
            sizes = [cell.size for cell in self.asked.cells if cell.edits == label]
            largest = None if None in sizes else max(size for size in sizes if size)
            asked = self.sets[label].first(largest)
            self.bench.become(())
            self._known[label] = self.bench.model.knows(asked)
        return read_edits(edits, known_to=_Told(self._known[label], edits))

    # ---- methods -----------------------------------------------------------------------------

    def _learner(self, cell: Cell, method: Any, later: Sequence[Cell]) -> cells.Learn:
        """How this cell gets its delta; reference rows look at what other cells found out."""
        if isinstance(method, RandomDelta):
            facts = cells.tensor_facts(self._other(cell, method.like))
            return lambda edits, earlier: method.made(facts)
        if isinstance(method, RandomMask):
            core = read_json(self._other(cell, method.like) / cells.RESULT)["delta"]
            return lambda edits, earlier: method.made(
                self._values(cell, method, edits), core["changed"]
            )

        def learn(edits: Sequence[Edit], earlier: Sequence[Edit]) -> Delta:
            keeping = protection.keeping(method, earlier, edits)
            delta: Delta = keeping.delta(self.bench.model, edits)
            donor = self._donor(cell, cell.settings)
            if donor in self._wanted(later) and not (donor / "delta.json").is_file():
                return delta.save(donor)
            return delta

        return learn

    def _other(self, cell: Cell, method: Any) -> Path:
        """The folder of the finished cell of ``method`` on the same records with the same seed."""
        settings = grid.settings(method)
        for other in self.plan.cells:
            if other.place == cell.place and other.settings == settings:
                if self._is_finished(other):
                    return self.folder / CELLS / other.name
                raise UnwriteError(
                    f"{cell.method} needs the result of {other.method}, which failed or is not "
                    "finished. Run this again once it is."
                )
        raise UnwriteError(f"{cell.method} has no row of {settings['name']} to look at.")

    def _values(self, cell: Cell, method: RandomMask, edits: Sequence[Edit]) -> Delta:
        """The full change that a random mask is cut out of: trained once for all masks."""
        donor = self._donor(cell, grid.settings(method.values))
        if not (donor / "delta.json").is_file():
            return method.values.delta(self.bench.model, edits).save(donor)
        return Delta.open(donor)

    def _donor(self, cell: Cell, settings: Mapping[str, Any]) -> Path:
        content = repr((self._start_folder(cell).name, sorted(settings.items())))
        digest = sha256_bytes(content.encode())[:8]
        return self.folder / DONORS / f"{settings['name']}-{digest}"

    def _wanted(self, todo: Sequence[Cell]) -> set[Path]:
        """Changes that cells still to come are made of."""
        found = set()
        for cell in todo:
            method, _ = methods.replaced(self.chosen[cell.method], "seed", cell.seed or 0)
            if isinstance(method, RandomMask):
                found.add(self._donor(cell, grid.settings(method.values)))
        return found

    def _drop_donors(self, todo: Sequence[Cell]) -> None:
        present = list((self.folder / DONORS).glob("*"))
        if not present:
            return
        wanted = self._wanted(todo)
        for donor in present:
            if donor not in wanted:
                shutil.rmtree(donor)
        with contextlib.suppress(OSError):
            (self.folder / DONORS).rmdir()


@dataclass(frozen=True)
class WorkerMaker:
    """What a worker of an executor needs to compute cells of a run: sent to it once."""

    folder: Path
    base: Base
    source: Source
    asked: Plan
    plan: Plan
    chosen: Mapping[str, Any]
    sets: Sequence[EditSet]
    trust_remote_code: bool
    device: str | None

    @classmethod
    def of(cls, run: _Run) -> WorkerMaker:
        """For a run whose plan is written."""
        return cls(
            run.folder.resolve(),
            run.base,
            run.source,
            run.asked,
            run.plan,
            run.chosen,
            list(run.sets.values()),
            run.trust_remote_code,
            run.device,
        )

    def __call__(self) -> Callable[[tuple[str, str]], Exception | None]:
        """A worker: it takes ``("start" or "cell", name of the cell)``."""
        run = _Worker(
            self.folder, self.base, self.source, self.asked, self.chosen, self.sets, Silent()
        )
        run.plan, run.device = self.plan, self.device
        run.trust_remote_code = self.trust_remote_code
        return run.do


class _Worker(_Run):
    """Computes cells for a run that another process leads. It writes into their folders only."""

    def do(self, job: tuple[str, str]) -> Exception | None:
        """Make the start that a cell needs, or compute the cell."""
        kind, name = job
        cell = next(one for one in self.asked.cells if one.name == name)
        if kind == "start":
            self._start(cell)
            return None
        return self.compute(cell)

    def _values(self, cell: Cell, method: RandomMask, edits: Sequence[Edit]) -> Delta:
        """Trained anew: workers do not wait for each other."""
        values: Delta = method.values.delta(self.bench.model, edits)
        return values


class _Told:
    """Answers, for the first of some edits, which are known; found out before."""

    def __init__(self, known: Sequence[bool], edits: Sequence[Edit]) -> None:
        self._known = dict(zip((edit.id for edit in edits), known, strict=False))

    def knows(self, edits: Sequence[Edit], /) -> list[bool]:
        return [self._known[edit.id] for edit in edits]


def _protocol(
    plant: bool,
    plant_lr: float,
    only_known: bool,
    offset: int,
    mode: Mode,
    chunk: int | None,
    exact: bool,
) -> Protocol:
    """The protocol, checked. Raises ``BadSetting``."""
    if plant and only_known:
        raise BadSetting(
            "plant and only_known are two protocols: facts are taught to the model first, or only "
            "those are used that it knows by itself. Choose one, and compare twice."
        )
    if mode not in grid.MODES:
        raise BadSetting(f"mode must be {', '.join(grid.MODES[:-1])} or {grid.MODES[-1]}.")
    if (mode == "sequential") != (chunk is not None):
        raise BadSetting("The mode sequential, and only that, needs chunk: edits in one step.")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise BadSetting(f"chunk is a whole number from 1 on, not {chunk!r}.")
    return Protocol(
        start="planted" if plant else "known" if only_known else "as is",
        planting=grid.settings(planting(plant_lr)) if plant else None,
        offset=offset,
        mode=mode,
        chunk=chunk,
        exact=exact,
    )


def _with_references(names: Sequence[str], chosen: Mapping[str, Any], mode: Mode) -> dict[str, Any]:
    """Methods and reference rows, in the order in which they are computed and shown."""
    found = references(names, chosen, mode)
    late = {
        label: one for label, one in found.items() if isinstance(one, (RandomMask, RandomDelta))
    }
    early = {label: one for label, one in found.items() if label not in late}
    return {**early, **chosen, **late}


def _described(folder: Path, source: Source, trust_remote_code: bool) -> Base:
    """The base of a run; read anew unless the run knows it and its files are as they were."""
    if (folder / bases.NAME).is_file() and grid.is_run(folder):
        known = Base.read(folder)
        if Path(known.folder) == source.folder.resolve():
            known.locate(Silent())
            return known
    return Base.describe(source, trust_remote_code=trust_remote_code)


def _check_free(folder: Path) -> None:
    """Refuse (``BadSetting``) to make a run where something else is."""
    if folder.exists() and not folder.is_dir():
        raise BadSetting(f"{folder} is a file; a comparison is a folder. Name another.")
    inside = sorted(item.name for item in folder.iterdir()) if folder.exists() else []
    if foreign := [name for name in inside if not name.startswith(_OWN)]:
        raise BadSetting(
            f"{folder} has other files in it ({foreign[0]}, ...); a comparison is made in an empty "
            "or new folder."
        )


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block, torch's own generators begin at ``seed``: so a method that draws from them
    does not depend on the cells before it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
