"""The folder of one maintained model: where an update is a transaction.

    home/
      base.json                what the home was made from: files, tensors, fingerprint
      ledger.jsonl             what was done since (append-only, hash-chained)
      updates/u-1a2b3c4d/      one update: edits, observations before and after, scores, delta

The state of the model is never stored and never subtracted from: it is recomposed as
``round_once(base + sum of live deltas)``, so undoing an update gives the very bits that were there
before it. An update counts from the moment its line is in the ledger. Until then its folder holds
a file ``partial``, and the next command that writes removes it.

Memory: what the method says it needs; composing holds a few tensors.
"""

from __future__ import annotations

import contextlib
import math
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from unwrite import base as bases
from unwrite import methods, record
from unwrite import scores as scoring
from unwrite.base import Base
from unwrite.delta import Delta
from unwrite.edits import Edit, read_edits, with_ids
from unwrite.errors import (
    BadEdits,
    BadSetting,
    DamagedFile,
    HomeError,
    RequirementNotMet,
    TrainingFailed,
    UnwriteError,
)
from unwrite.export import export_state
from unwrite.files import (
    only_writer,
    read_json,
    read_jsonl,
    sha256_file,
    speaking_of_disk,
    sync_folder,
)
from unwrite.ledger import Entry, Ledger
from unwrite.model import Model
from unwrite.observe import Question, observe, perplexity, questions, settle
from unwrite.pretrained import Source, resolve
from unwrite.progress import Reporter, Silent
from unwrite.record import Undone, Update
from unwrite.requirements import Requirement, parse
from unwrite.scores import Row, Score, Scores

LEDGER, UPDATES, PARTIAL = "ledger.jsonl", "updates", "partial"
_ID = re.compile(r"u-[0-9a-f]{8}")
_OWN = (".lock", bases.NAME, f".{bases.NAME}.", f".{LEDGER}.")  # of a home that is being made


class Home:
    """One maintained model. Got by ``Home.open``; changed only by ``update`` and ``undo``."""

    def __init__(
        self, folder: Path, base: Base, progress: Reporter, trust_remote_code: bool = False
    ) -> None:
        self.folder = folder
        self.base = base
        self.progress = progress
        self._trust_remote_code = trust_remote_code
        self._model: Model | None = None
        self._held: list[str] | None = None  # the updates that the network in memory includes

    # ---- opening -----------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        folder: str | Path,
        base: str | Path | None = None,
        *,
        trust_remote_code: bool = False,
        progress: Reporter | None = None,
    ) -> Home:
        """Open a home, or make one when ``base`` names a model and the folder is empty or new.

        Raises ``HomeError`` when the folder is something else, when ``base`` differs from the
        home's own, or when the base's files changed since the home was made.
        """
        path = Path(folder).expanduser()
        progress = progress or Silent()
        if is_home(path):
            home = cls(path, Base.read(path), progress, trust_remote_code)
            if base is not None and str(base) != home.base.name:
                given = resolve(base, on_progress=progress.say).folder.resolve()
                if given != Path(home.base.folder).resolve():
                    raise HomeError(
                        f"{path} is a home of {home.base.name!r} and cannot change its base to "
                        f"{str(base)!r}. Make another home for that model."
                    )
            return home
        if base is None:
            raise HomeError(
                f"{path} is not a model home"
                + (" (it does not exist)" if not path.exists() else "")
                + f". Make one with: unwrite init {path} --base MODEL"
            )
        if is_home(base):
            raise HomeError(f"{base} is a model home, not a model. Export it, then use that.")
        source = resolve(base, trust_remote_code=trust_remote_code, on_progress=progress.say)
        return cls._make(path, source, progress, trust_remote_code)

    @classmethod
    def _make(cls, path: Path, source: Source, progress: Reporter, trust_remote_code: bool) -> Home:
        if path.exists() and not path.is_dir():
            raise HomeError(f"{path} is a file; a home is a folder.")
        with speaking_of_disk(f"make a home in {path}"):
            path.mkdir(parents=True, exist_ok=True)
            with only_writer(path):
                # A half-made home has base.json (or its temporary) but no ledger: begin again.
                foreign = [item.name for item in path.iterdir() if not item.name.startswith(_OWN)]
                if foreign:
                    raise HomeError(
                        f"{path} has other files in it ({foreign[0]}, ...); "
                        "a home is made in an empty or new folder."
                    )
                base = Base.describe(source, trust_remote_code=trust_remote_code)
                written = base.write(path)
                first = record.init_entry(base.name, base.fingerprint, written)
                Ledger.create(path / LEDGER, first)
        return cls(path, base, progress, trust_remote_code)

    # ---- state -------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The history, read and checked anew (another process may have added to it)."""
        ledger = Ledger.open(self.folder / LEDGER)
        first = ledger.entries[0].get("base")
        if not isinstance(first, dict) or first.get("fingerprint") != self.base.fingerprint:
            raise DamagedFile(
                f"{self.folder / bases.NAME} is not the base that {LEDGER} begins with. "
                "Put back both from one copy of the home."
            )
        return ledger

    @cached_property
    def source(self) -> Source:
        """Where the base is now. Raises ``HomeError`` if its files are gone or not the same."""
        return self.base.locate(self.progress)

    def model(self, at: str | None = None) -> Model:
        """The model in its current state, or as it was right after the update ``at``
        (``"base"``: before all updates).

        It is the same object every time: a later call for another state changes it.
        """
        live = self.ledger.live(at)
        if self._model is None:
            self.progress.say(f"Loading {self.base.name}")
            self._model = Model.load(
                self.source, trust_remote_code=self._trust_remote_code, progress=self.progress
            )
            self._held = []
        if self._held != live:
            self._held = None
            self._model.become(self.deltas(live))
            self._held = live
        return self._model

    def deltas(self, live: Sequence[str]) -> list[Delta]:
        """The deltas of updates, opened (not read), each checked to belong to this base."""
        opened = [Delta.open(self._update_folder(update) / "delta") for update in live]
        for delta in opened:
            delta.check_base(self.base.fingerprint, self.base.name)
        return opened

    # ---- update ------------------------------------------------------------------------------

    def update(
        self,
        edits: str | Path | Sequence[Edit],
        method: Any = None,
        *,
        require: Mapping[str, float] | Sequence[str] = (),
        protect: Sequence[str] = (),
        why: str = "",
        seed: int | None = None,
        command: str = "",
    ) -> Update:
        """Train, verify, then commit or leave everything as it was.

        ``method``: default ``FullFT()``. ``require``: bounds on the scores after
        (``{"locality": 0.9}`` or ``["locality>=0.9"]``); if one is missed, ``RequirementNotMet`` is
        raised with the measured ``update`` on it and nothing is kept. ``protect``: prompts whose
        answers must survive. ``command``: how this was called, for the record.

        Scores are taken on the recomposed weights that the home will give out, never on those in
        the trainer's memory. Raises ``HomeBusy`` at once if another process is updating.
        """
        chosen = _edits(edits)
        requirements = parse(require)
        method = _prepared(method, seed, protect)
        record.check_text(why, "why")
        asked = questions(chosen)
        _check_measurable(requirements, {probe.role for probe in asked})
        with speaking_of_disk(f"update {self.folder}"), only_writer(self.folder):
            self._sweep()
            return self._update(chosen, method, requirements, asked, why, command)

    def _update(
        self,
        edits: Sequence[Edit],
        method: Any,
        requirements: Sequence[Requirement],
        asked: Sequence[Question],
        why: str,
        command: str,
    ) -> Update:
        ledger = self.ledger
        live = ledger.live()
        model = self.model()
        _check_readable(model, edits, asked)
        clock = _Clock()
        with clock.of("observe"):
            probes = settle(model, asked)
            before = observe(model, probes)
            perplexity_before = perplexity(model)
        with clock.of("train"):
            delta = method.delta(model, edits)
        settings = methods.settings_of(method)
        name = record.identity(ledger, settings, edits)
        folder = self.folder / UPDATES / name
        folder.mkdir(parents=True)
        try:
            (folder / PARTIAL).touch()
            with clock.of("arithmetic"):
                provenance = {
                    "base": self.base.fingerprint,
                    "base_name": self.base.name,
                    "method": settings["name"],
                }
                stored = delta.save(folder / "delta", provenance=provenance)
                del delta  # the model-sized change is on disk now
                self._held = None
                deltas = [*self.deltas(live), stored]
                model.become(deltas)
                fingerprint = self.base.fingerprint_with(self.source.folder, deltas)
            with clock.of("observe"):
                after = observe(model, probes)
                perplexity_after = perplexity(model)
            if not math.isfinite(perplexity_after):
                raise TrainingFailed(
                    "The updated weights no longer give numbers on neutral text; nothing was "
                    "kept. Use a smaller lr."
                )
            update = Update(
                id=name,
                committed=True,
                method=settings,
                edits=len(edits),
                before=scoring.score(before, before),
                after=scoring.score(before, after),
                perplexity={"before": perplexity_before, "after": perplexity_after},
                seconds=clock.seconds,
                summary=stored.summary().as_json(self.base.parameters),
                fingerprint=fingerprint,
                folder=folder,
            )
            _check_met(update, requirements)
            files = record.write_files(folder, edits, before, after, update, command)
            sync_folder(folder)
            sync_folder(folder.parent)
            with _uninterrupted():
                ledger.append(record.apply_entry(update, why, files))
                self._held = [*live, name]
                (folder / PARTIAL).unlink()
        except BaseException:
            if self.ledger.head == ledger.head:  # not committed: leave nothing behind
                shutil.rmtree(folder, ignore_errors=True)
            raise
        return update

    def _sweep(self) -> None:
        """Finish or remove what a killed process left behind. Only under the write lock."""
        for name in (bases.NAME, LEDGER):
            for stray in self.folder.glob(f".{name}.*"):  # temporaries of atomic writes
                stray.unlink()
        committed = self.ledger.applied
        for marker in (self.folder / UPDATES).glob(f"*/{PARTIAL}"):
            if marker.parent.name in committed:
                marker.unlink()
            else:
                shutil.rmtree(marker.parent)

    # ---- undo --------------------------------------------------------------------------------

    def undo(self, update: str, *, why: str = "", recheck: bool = True) -> Undone:
        """Revert one update, exactly: the state becomes, bit for bit, what the others alone give.

        With ``recheck``, later updates that are still live answer their own edits once more:
        they were trained on top of the one that is gone. Raises ``HomeError`` for an unknown id or
        one that is undone already.
        """
        record.check_text(why, "why")
        with speaking_of_disk(f"undo in {self.folder}"), only_writer(self.folder):
            self._sweep()
            ledger = self.ledger
            ledger.entry(update)
            live = ledger.live()
            if update not in live:
                raise HomeError(f"The update {update} is undone already.")
            left = [one for one in live if one != update]
            fingerprint = self.fingerprint(left)
            with _uninterrupted():
                ledger.append(record.revert_entry(update, why, fingerprint))
        later = left[live.index(update) :] if recheck else []
        return Undone(
            update, fingerprint, tuple(left), {one: self._reliability_now(one) for one in later}
        )

    def fingerprint(self, live: Sequence[str]) -> str:
        """Fingerprint of a state, recomposed from disk; reads the base where deltas touch it."""
        return self.base.fingerprint_with(self.source.folder, self.deltas(live))

    def _reliability_now(self, update: str) -> Score:
        edits = read_edits(self._update_folder(update) / "edits.jsonl")
        probes = [one for one in questions(edits) if one.role == "reliability"]
        rows = observe(self.model(), probes)
        return scoring.score(rows, rows)["reliability"]

    # ---- reading -----------------------------------------------------------------------------

    def ask(self, prompt: str, *, max_new_tokens: int = 32, at: str | None = None) -> str:
        """The greedy answer of the current state, or of the state right after update ``at``
        (``"base"``: before all updates)."""
        if not prompt.strip():
            raise BadEdits("The prompt is empty; ask something.")
        record.check_text(prompt, "the prompt")
        return self.model(at).answer(prompt, max_new_tokens)

    def evaluate(self, edits: str | Path | Sequence[Edit]) -> tuple[Scores, Scores]:
        """Scores on ``edits`` of the base and of the current state; nothing is changed."""
        asked = questions(_edits(edits))
        model = self.model("base")
        _check_readable(model, (), asked)
        probes = settle(model, asked)
        before = observe(model, probes)
        after = observe(self.model(), probes) if self.ledger.live() else before
        return scoring.score(before, before), scoring.score(before, after)

    def history(self) -> list[Entry]:
        """The ledger, with for every update whether it is ``live`` now."""
        ledger = self.ledger
        live = set(ledger.live())
        return [
            {**entry, "live": entry["id"] in live} if entry["do"] == "apply" else dict(entry)
            for entry in ledger.entries
        ]

    def show(self, update: str) -> dict[str, Any]:
        """One update: its ledger entry, whether it is live, its environment, and ``where`` its
        change lives (see ``Base.where``)."""
        ledger = self.ledger
        entry = ledger.entry(update)
        folder = self._update_folder(update)
        environment = read_json(folder / "environment.json")
        return {
            **entry,
            "live": update in ledger.live(),
            "environment": environment,
            "where": self.base.where(Delta.open(folder / "delta")),
        }

    def diff(self, update: str, other: str | None = None) -> list[dict[str, Any]]:
        """What the model said, prompt by prompt.

        Rows ``{edit, role, prompt, target, before, after}``. With one id: before and after that update, from its stored observations. With two: in the
        state right after ``update`` and right after ``other``, asked now, on the probes of both.
        """
        if other is None:
            first, second = self.observations(update)
        else:
            stored = [row for one in (update, other) for row in self.observations(one)[0]]
            keys = ("edit", "role", "prompt", "target")
            probes = [
                Question(*key) for key in dict.fromkeys(tuple(r[k] for k in keys) for r in stored)
            ]
            first = observe(self.model(update), probes)
            second = observe(self.model(other), probes)
        return [
            {
                **{key: one[key] for key in ("edit", "role", "prompt", "target")},
                "before": scoring.answer_in(one["text"]),
                "after": scoring.answer_in(two["text"]),
            }
            for one, two in zip(first, second, strict=True)
        ]

    def observations(self, update: str) -> tuple[Sequence[Row], Sequence[Row]]:
        """The stored rows of an update, before and after."""
        self.ledger.entry(update)
        folder = self._update_folder(update)
        return read_jsonl(folder / "before.jsonl"), read_jsonl(folder / "after.jsonl")

    # ---- verify and export -------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Check everything; one sentence per problem, an empty list when all is well.

        The hash chain of the ledger, the hashes of every update's files and tensors, the files of
        the base, and the fingerprint of the recomposed state against the recorded one.
        """
        try:
            ledger = self.ledger
            source = self.source
        except UnwriteError as error:
            return [str(error)]
        applied = ledger.applied
        problems: list[str] = []
        with self.progress.stage("verifying", len(applied) + 2) as advance:
            if sha256_file(self.folder / bases.NAME) != ledger.entries[0]["base"]["sha256"]:
                problems.append(f"{self.folder / bases.NAME} is not as it was written.")
            problems += self.base.problems(source.folder)
            advance(1, "base")
            for update, entry in applied.items():
                problems += self._problems_of(update, entry)
                advance(1, update)
            for folder in sorted((self.folder / UPDATES).glob("*")):
                if folder.name not in applied and not (folder / PARTIAL).exists():
                    problems.append(
                        f"{folder} is not in the ledger: the ledger lost its last lines, or the "
                        "folder was put there by hand."
                    )
            if not problems:
                recorded = ledger.entries[-1].get("fingerprint", self.base.fingerprint)
                if self.fingerprint(ledger.live()) != recorded:
                    problems.append("The recomposed state is not the one recorded in the ledger.")
            advance(1, "state")
        return problems

    def _problems_of(self, update: str, entry: Entry) -> list[str]:
        problems = []
        try:
            folder = self._update_folder(update)
            for name, known in entry["files"].items():
                file = folder / name
                if not file.is_file():
                    problems.append(f"{file} is missing.")
                elif sha256_file(file) != known:
                    problems.append(f"{file} is not as it was written.")
            if not problems:
                Delta.open(folder / "delta").verify()
        except UnwriteError as error:
            problems.append(str(error))
        return problems

    def export(self, folder: str | Path, as_: str = "model") -> Path:
        """Write the current state as an ordinary Hugging Face folder (``"model"``), or all live
        changes as one ``"delta"``. Streams by tensor; the folder appears whole or not at all.

        Raises ``HomeError`` when the folder exists and is not empty, or for ``"adapter"`` when a
        live change is not of low rank.
        """
        live = self.ledger.live()
        return export_state(
            Path(folder).expanduser(),
            as_,
            self.base,
            self.source.folder,
            live,
            self.deltas(live),
            self.progress,
        )

    def _update_folder(self, update: str) -> Path:
        if not _ID.fullmatch(update):
            raise DamagedFile(f"The ledger names an update {update!r}, which is not an id.")
        return self.folder / UPDATES / update


def is_home(folder: str | Path) -> bool:
    """Whether ``folder`` is a model home (its ledger is what is written last)."""
    return (Path(folder).expanduser() / LEDGER).is_file()


def evaluate_model(model: Model, edits: str | Path | Sequence[Edit]) -> Scores:
    """Scores of a model as it is (locality is 1 by definition: nothing changed)."""
    asked = questions(_edits(edits))
    _check_readable(model, (), asked)
    rows = observe(model, settle(model, asked))
    return scoring.score(rows, rows)


def _edits(edits: str | Path | Sequence[Edit]) -> tuple[Edit, ...]:
    return with_ids(read_edits(edits))


def _prepared(method: Any, seed: int | None, protect: Sequence[str]) -> Any:
    """The method with seed and protected prompts in every place that takes them."""
    method = method if method is not None else methods.build(methods.DEFAULT, {})
    if not hasattr(method, "delta"):
        raise BadSetting(f"{method!r} is not a method: it has no delta(model, edits).")
    for name, value in (("seed", seed), ("protect", tuple(protect) or None)):
        if value is not None:
            method, places = methods.replaced(method, name, value)
            if places == 0:
                raise BadSetting(f"The method {method.name} takes no {name!r}.")
    return method


def _check_readable(model: Model, edits: Sequence[Edit], asked: Sequence[Question]) -> None:
    """Tokenise everything once, so that what the model cannot read is refused before training."""
    for edit in edits:
        model.tokens(edit.prompt, edit.new)
    for probe in asked:
        model.tokens(probe.prompt, probe.target or ".")


def _check_measurable(requirements: Sequence[Requirement], roles: set[str]) -> None:
    for requirement in requirements:
        if requirement.metric in scoring.ROLES and requirement.metric not in roles:
            raise BadSetting(
                f"{requirement} cannot be required: the edits have no probes for "
                f"{requirement.metric}. Add them to the records, or drop the requirement."
            )


def _check_met(update: Update, requirements: Sequence[Requirement]) -> None:
    ratio = update.perplexity_ratio
    missed = [one for one in requirements if not one.holds(update.after, ratio)]
    if missed:
        said = tuple(f"{one} (measured {one.value(update.after, ratio):.3f})" for one in missed)
        error = RequirementNotMet(
            f"Nothing was committed: {', '.join(said)}. The home is as it was before."
        )
        error.update = replace(update, committed=False, unmet=said)
        raise error


class _Clock:
    """Seconds by kind of work."""

    def __init__(self) -> None:
        self.seconds = {"train": 0.0, "arithmetic": 0.0, "observe": 0.0}

    @contextlib.contextmanager
    def of(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[kind] += time.perf_counter() - started


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C for the few milliseconds of a commit: it is done or not, and known which."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
