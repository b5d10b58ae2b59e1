"""The folder of one maintained model: where an update is a transaction.

    home/
      base.json                what the home was made from: files, tensors, fingerprint
      ledger.jsonl             what was done since (append-only, hash-chained)
      updates/u-1a2b3c4d/      one update: edits, observations before and after, scores, delta
      tensors.json             hashes of the present state's tensors, a shortcut (see ``present``)

The state of the model is never stored and never subtracted from: it is recomposed as
``round_once(base + sum of live deltas)``, so undoing an update gives the very bits that were there
before it. An update counts from the moment its line is in the ledger. Until then its folder holds
a file ``partial``, and the next command that writes removes it.

Memory: what the method says it needs; composing holds a few tensors.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from unwrite import base as bases
from unwrite import compaction, methods, present, protection, record, scratch, where
from unwrite import scores as scoring
from unwrite.base import Base
from unwrite.compaction import Compacted
from unwrite.delta import SCRATCH, Delta
from unwrite.edits import Edit, read_edits, with_ids
from unwrite.errors import (
    BadEdits,
    BadSetting,
    DamagedFile,
    HomeError,
    RequirementNotMet,
    TrainingFailed,
    UnwriteError,
    UpdateDiscarded,
)
from unwrite.export import export_state
from unwrite.files import (
    check_all_inside,
    check_inside,
    only_writer,
    read_json,
    read_jsonl,
    sha256_file,
    speaking_of_disk,
    sync_folder,
    user_path,
)
from unwrite.forgetting.matrix import ForgettingMatrix
from unwrite.ledger import Entry, Ledger
from unwrite.measuring import Clock
from unwrite.model import Model
from unwrite.observe import Question, observe, perplexity, questions, settle
from unwrite.pretrained import Source, resolve
from unwrite.progress import Bytes, Reporter, Silent
from unwrite.prompts import Protected, once_each
from unwrite.protection import History, Outlook
from unwrite.record import Undone, Update
from unwrite.reproduction import Replayed, differences, environment_changes
from unwrite.requirements import Requirement, parse
from unwrite.scores import Row, Score, Scores
from unwrite.weights import fingerprint_of

LEDGER, UPDATES, PARTIAL = "ledger.jsonl", "updates", "partial"
REPORT = "report.html"
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
        self._compared: defaultdict[str, set[str]] = defaultdict(set)  # of updates: sound tensors
        self._sound_sums: set[str] = set()  # stored by ``compact`` and found undamaged
        self._candidate: Update | None = None  # measured, and waiting for ``confirm``

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
        path = user_path(folder)
        progress = progress or Silent()
        if is_home(path):
            home = cls(path, Base.read(path), progress, trust_remote_code)
            # A relative path means another folder in another place; other names mean one model.
            if base is not None and (str(base) != home.base.name or home.base.kind == "folder"):
                given = resolve(base, on_progress=progress.say).folder.resolve()
                if given != Path(home.base.folder).resolve():
                    raise HomeError(
                        f"{path} is a home of {home.base.name!r} and cannot change its base to "
                        f"{str(base)!r}. Make another home for that model."
                    )
            return home
        if base is None:
            with speaking_of_disk(f"open {path}"):
                missing = "" if path.exists() else " (it does not exist)"
            raise HomeError(
                f"{path} is not a model home{missing}. "
                f"Make one with: unwrite init {path} --base MODEL"
            )
        if is_home(base):
            raise HomeError(f"{base} is a model home, not a model. Export it, then use that.")
        source = resolve(base, trust_remote_code=trust_remote_code, on_progress=progress.say)
        return cls._make(path, source, progress, trust_remote_code)

    @classmethod
    def _make(cls, path: Path, source: Source, progress: Reporter, trust_remote_code: bool) -> Home:
        with speaking_of_disk(f"make a home in {path}"):
            _check_free(path)
            base = Base.describe(source, trust_remote_code=trust_remote_code)
            path.mkdir(parents=True, exist_ok=True)
            with only_writer(path):
                _check_free(path)
                _remove_temporaries(path)
                written = base.write(path)
                first = record.init_entry(base.name, base.fingerprint, written)
                Ledger.create(path / LEDGER, first)
        return cls(path, base, progress, trust_remote_code)

    # ---- state -------------------------------------------------------------------------------

    @property
    def ledger(self) -> Ledger:
        """The history, read and checked anew (another process may have added to it)."""
        ledger = Ledger.open(self.folder / LEDGER)
        for entry in ledger.entries:
            record.check_entry(entry, ledger.path)
        file = self.folder / bases.NAME
        if not file.is_file() or sha256_file(file) != ledger.entries[0]["base"]["sha256"]:
            raise DamagedFile(
                f"{file} is damaged: it is not the base that {LEDGER} begins with. "
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
        return self._model_with(self._live(at))

    def _live(self, at: str | None) -> list[str]:
        if self._candidate is not None and at == self._candidate.id:
            return [*self.ledger.live(), at]
        return self.ledger.live(at)

    def model_before(self, update: str) -> Model:
        """The model as it was right before an update (the object that ``model`` returns)."""
        return self._model_with([one for one in self.ledger.live(update) if one != update])

    def _model_with(self, live: Sequence[str]) -> Model:
        live = list(live)
        if self._model is None:
            self.progress.say(f"Loading {self.base.name}")
            self._model = Model.load(
                self.source, trust_remote_code=self._trust_remote_code, progress=self.progress
            )
            self._held = []
        if self._held != live:
            self._held = None
            self._model.become(self._parts(live))
            self._held = live
        return self._model

    def deltas(self, live: Sequence[str], ledger: Ledger | None = None) -> list[Delta]:
        """The deltas of updates, opened, each checked to belong to this base.

        A tensor that is read for the first time is compared with the hash it was saved with.
        ``ledger``: where it was just read. Raises ``DamagedFile``: nothing is answered, measured or
        committed on damaged weights.
        """
        opened, ledger = [], ledger or self.ledger
        for update in live:
            if self._candidate is not None and update == self._candidate.id:
                opened.append(self._candidate.delta)
                continue
            folder = self._file(ledger.entry(update), "delta/delta.json").parent
            check_all_inside(self.folder, folder)
            delta = Delta.open(folder, compared=self._compared[update])
            delta.check_base(self.base.fingerprint, self.base.name)
            opened.append(delta)
        return opened

    def _parts(self, live: Sequence[str], ledger: Ledger | None = None) -> list[Delta]:
        """What adds up to a state: the deltas of its updates, or the stored sum of the first of
        them (see ``compact``) and the deltas of the others."""
        ledger = ledger or self.ledger
        total = compaction.stored(self.folder, self.base)
        count = 0 if total is None else compaction.covered(total, ledger, live)
        if total is None or not count:
            return self.deltas(live, ledger)
        if (name := _sum_up_to(live[count - 1])) not in self._sound_sums:
            compaction.check(total, self.folder)
            self._sound_sums.add(name)
        return [total, *self.deltas(live[count:], ledger)]

    # ---- update ------------------------------------------------------------------------------

    def update(
        self,
        edits: str | Path | Sequence[Edit],
        method: Any = None,
        *,
        require: Mapping[str, float] | Sequence[str] = (),
        protect: Sequence[str | Protected] = (),
        why: str = "",
        seed: int | None = None,
        command: str = "",
        confirm: Callable[[Update], bool] | None = None,
    ) -> Update:
        """Train, verify, then commit or leave everything as it was.

        ``method``: ``Auto()`` by default. ``require``: bounds on the scores after
        (``{"locality": 0.9}`` or ``["locality>=0.9"]``); if one is missed, ``RequirementNotMet`` is
        raised with the measured ``update`` on it and nothing is kept. ``protect``: prompts whose
        answers must survive; ``forecast`` says which are endangered, and those are protected while
        training. ``command``: how this was called, for the record. ``confirm``: called
        with the measured update (``committed`` false, its files in its folder) when only the line
        in the ledger is missing; unless it returns true, ``UpdateDiscarded`` is raised and nothing
        is kept. Inside it, ``model``, ``ask`` and ``before_and_after`` know the update by its id.

        Scores are taken on the recomposed weights that the home will give out, never on those in
        the trainer's memory. Raises ``HomeBusy`` at once if another process is updating.
        """
        chosen = _edits(edits)
        requirements = parse(require)
        method, watched = _prepared(method, seed, protect)
        record.check_text(why, "why")
        asked = questions(chosen)
        _check_measurable(requirements, {probe.role for probe in asked})
        with speaking_of_disk(f"update {self.folder}"), only_writer(self.folder):
            self._sweep()
            return self._update(chosen, method, requirements, asked, watched, why, command, confirm)

    def _update(
        self,
        edits: Sequence[Edit],
        method: Any,
        requirements: Sequence[Requirement],
        asked: Sequence[Question],
        watched: Sequence[Protected],
        why: str,
        command: str,
        confirm: Callable[[Update], bool] | None,
    ) -> Update:
        ledger = self.ledger
        live = ledger.live()
        model = self.model()
        _check_readable(model, edits, asked)
        clock = Clock()
        with clock.of("observe"):
            probes = settle(model, asked)
            before = observe(model, probes)
            perplexity_before = perplexity(model)
        with clock.of("train"):
            outlook = None
            if watched:
                outlook = protection.look_ahead(model, edits, method, watched, self._past())
                method = protection.protecting(method, outlook.endangered)
            method = protection.keeping(method, self._taught(live), edits)
            delta = method.delta(model, edits)
        notes = record.notes_of(delta)
        settings = methods.settings_of(method)
        name = record.identity(ledger, settings, edits)
        folder = self.folder / UPDATES / name
        if folder.exists():
            raise HomeError(
                f"{folder} is there already, but not in the ledger: the ledger lost its last "
                "lines. Put back the whole ledger, or move that folder away."
            )
        try:
            folder.mkdir(parents=True)
            (folder / PARTIAL).touch()
            sync_folder(folder)
            with clock.of("arithmetic"):
                provenance = {
                    "base": self.base.fingerprint,
                    "base_name": self.base.name,
                    "method": settings["name"],
                }
                stored = delta.save(folder / "delta", provenance=provenance)
                del delta  # the model-sized change is on disk now
                stored.check_fits(model.weights)
                self._held = None
                deltas = [*self._parts(live), stored]
                model.become(deltas)
                self._held = [*live, name]
                tensors = self._tensors(deltas, stored, ledger)
                located = self.base.where(stored)
            with clock.of("observe"):
                after = observe(model, probes)
                perplexity_after = perplexity(model)
                lost = None if outlook is None else outlook.watched.losses(model)
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
                fingerprint=fingerprint_of(tensors),
                folder=folder,
                notes=notes,
                protection=None if outlook is None else outlook.as_json(lost),
            )
            _check_met(update, requirements)
            files = record.write_files(folder, edits, before, after, update, located, command)
            sync_folder(folder)
            sync_folder(folder.parent)
            if confirm is not None:
                self._check_confirmed(update, confirm)
            with _uninterrupted():
                ledger.append(record.apply_entry(update, why, files))
                (folder / PARTIAL).unlink()
                present.keep(self.folder, tensors)
        except BaseException:
            self._held = None
            if Ledger.open(ledger.path).head == ledger.head:  # not committed: leave nothing behind
                with contextlib.suppress(OSError):
                    _remove(folder)
                    folder.parent.rmdir()  # if it is empty, it was made for this update
            raise
        self._compared[name] |= set(stored)
        return update

    def forecast(
        self,
        edits: str | Path | Sequence[Edit],
        method: Any = None,
        *,
        protect: Sequence[str | Protected],
        seed: int | None = None,
    ) -> Outlook:
        """What an update would do to the prompts in ``protect`` without protection, forecast from a
        short probe (see the module ``protection``); the home is not changed.

        Raises like ``update``, as far as that comes before training.
        """
        chosen = _edits(edits)
        method, watched = _prepared(method, seed, protect)
        model = self.model()
        _check_readable(model, chosen, ())
        return protection.look_ahead(model, chosen, method, watched, self._past())

    def forgetting(self) -> ForgettingMatrix:
        """What updates took off the margins of prompts that they watched but did not protect: a
        row for every update with ``protect``, undone or not. Read from their records."""
        return self._past().matrix

    def _taught(self, live: Sequence[str]) -> Iterator[Edit]:
        """The edits of live updates."""
        for update in live:
            yield from read_edits(self._file(self.ledger.applied[update], "edits.jsonl"))

    def _past(self) -> History:
        def records() -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
            for update, entry in self.ledger.applied.items():
                if record.PROTECTION in entry["files"]:
                    facts = {"method": entry["method"]["name"], "edits": entry["edits"]}
                    yield update, facts, read_json(self._file(entry, record.PROTECTION))

        known = {"base": self.base.fingerprint, "base_name": self.base.name}
        return History.of(records(), known)

    def _check_confirmed(self, update: Update, confirm: Callable[[Update], bool]) -> None:
        self._candidate = replace(update, committed=False)
        try:
            if not confirm(self._candidate):
                raise UpdateDiscarded("The update was discarded; the home is as it was before.")
        finally:
            self._candidate = None

    def redo(
        self,
        update: str,
        *,
        why: str = "",
        command: str = "",
        confirm: Callable[[Update], bool] | None = None,
    ) -> Update:
        """Apply the stored change of an undone update once more: the very same change of weights,
        as a new update on the present state, measured anew. Nothing is trained.

        Undone and redone with nothing in between, the state has its bits back. Raises ``HomeError``
        for an unknown id or an update that is live.
        """
        ledger = self.ledger
        entry = ledger.entry(update)
        if update in ledger.live():
            raise HomeError(f"The update {update} is live: there is nothing to redo.")
        edits = read_edits(self._file(entry, "edits.jsonl"))
        again = _Redo(update, self.deltas([update])[0])
        return self.update(edits, again, why=why, command=command, confirm=confirm)

    def replay_update(self, update: str) -> Replayed:
        """Do an update of the ledger once more, on the state before it and in scratch, and compare.

        Method and settings are those of the ledger, edits those of the update's folder. Nothing of
        the home is changed. Memory and time: those of the update's training. Raises ``HomeError``
        for an unknown id, ``DamagedFile`` when the edits are not as they were written, and
        ``BadSetting`` when the method is not there any more; and what the method raises.
        """
        ledger = self.ledger
        entry = ledger.entry(update)
        edits = read_edits(self._file(entry, "edits.jsonl"))
        then = read_json(self._file(entry, "environment.json"))
        method = self._method_of(entry)
        before = self.deltas([one for one in ledger.live(update) if one != update])
        (recorded,) = self.deltas([update])
        model = self.model_before(update)
        clock = Clock()
        with speaking_of_disk("keep the second result"):
            with clock.of("train"):
                again = method.delta(model, edits).stored()
            differ, largest = differences(recorded, again)
            found = self.base.fingerprint_with(self.source.folder, [*before, again])
        return Replayed(
            id=update,
            tensors=len({*recorded, *again}),
            differ=differ,
            largest=largest,
            fingerprint={"recorded": entry["fingerprint"], "found": found},
            environment=environment_changes(then, record.environment("")),
            seconds=clock.seconds["train"],
        )

    def _method_of(self, entry: Entry) -> Any:
        """The method of an update, from the settings in the ledger."""
        if entry["method"]["name"] == _Redo.name:
            of = entry["method"]["of"]
            return _Redo(of, self.deltas([of])[0])
        try:
            return methods.restored(entry["method"])
        except BadSetting as error:
            raise BadSetting(
                f"{entry['id']} cannot be done once more: {error} Install what it was made with."
            ) from None

    def _sweep(self) -> Ledger:
        """Finish or remove what a killed process left behind; the ledger that says what that is.
        Only under the write lock."""
        _remove_temporaries(self.folder)
        self._sweep_scratch()
        ledger = self.ledger
        committed = ledger.applied
        for folder in (self.folder / UPDATES).glob("*"):
            if folder.name in committed:
                (folder / PARTIAL).unlink(missing_ok=True)
            elif _is_leftover(folder):
                _remove(folder)
        return ledger

    def _sweep_scratch(self) -> None:
        """Remove what killed exports, reports and trainings left behind; needs no lock."""
        scratch.sweep_noted(self.folder)
        scratch.sweep_files(self.folder, REPORT)
        scratch.sweep_beside(self.folder / compaction.NAME)
        scratch.sweep_temporary(SCRATCH)

    # ---- undo --------------------------------------------------------------------------------

    def undo(self, update: str, *, why: str = "", recheck: bool = True) -> Undone:
        """Revert one update, exactly: the state becomes, bit for bit, what the others alone give.

        With ``recheck``, later updates that are still live answer their own edits once more:
        they were trained on top of the one that is gone. That comes before the commit, so an error
        or an interruption leaves everything as it was. Raises ``HomeError`` for an unknown id or
        one that is undone already.
        """
        record.check_text(why, "why")
        with speaking_of_disk(f"undo in {self.folder}"), only_writer(self.folder):
            ledger = self._sweep()
            ledger.entry(update)
            live = ledger.live()
            if update not in live:
                raise HomeError(f"The update {update} is undone already.")
            left = [one for one in live if one != update]
            parts = self._parts(left, ledger)
            tensors = self._tensors(parts, self._touched(update, ledger), ledger)
            fingerprint = fingerprint_of(tensors)
            later = left[live.index(update) :] if recheck else []
            checked = {one: self._reliability(ledger.entry(one), left) for one in later}
            with _uninterrupted():
                ledger.append(record.revert_entry(update, why, fingerprint))
                present.keep(self.folder, tensors)
        return Undone(update, fingerprint, tuple(left), checked)

    def fingerprint(self, live: Sequence[str]) -> str:
        """Fingerprint of a state, recomposed from disk; reads the base where deltas touch it."""
        return self.base.fingerprint_with(self.source.folder, self._parts(live), self.progress)

    def _tensors(
        self, parts: Sequence[Delta], touched: Container[str], ledger: Ledger
    ) -> dict[str, str]:
        """Hash of every tensor of the state ``parts``, which differs from the present one in the
        ``touched`` tensors only: the others are not read."""
        now = present.hashes(self.folder, self.base, ledger.fingerprint)
        known = {
            name: one for name, one in now.items() if self.base.changed_as(name) not in touched
        }
        return self.base.tensors_with(self.source.folder, parts, self.progress, known)

    def _touched(self, update: str, ledger: Ledger) -> Container[str]:
        """The tensors that an update changes: all, as far as is known, where its files are damaged,
        for it can be undone all the same."""
        try:
            return self.deltas([update], ledger)[0]
        except DamagedFile:
            return self.base.tensors

    def _reliability(self, entry: Entry, live: Sequence[str]) -> Score:
        """How the state with ``live`` updates answers the edits of one of them."""
        edits = read_edits(self._file(entry, "edits.jsonl"))
        probes = [one for one in questions(edits) if one.role == "reliability"]
        rows = observe(self._model_with(live), probes)
        return scoring.score(rows, rows)["reliability"]

    def compact(self) -> Compacted:
        """Store what the base and the live updates add up to, so that the state is composed from
        one sum instead of one change after another: bit for bit the same, in time that does not
        grow with the number of updates. History and updates stay as they are (see the module
        ``compaction``)."""
        with speaking_of_disk(f"compact {self.folder}"), only_writer(self.folder):
            ledger = self._sweep()
            deltas = self.deltas(ledger.live(), ledger)
            source = self.source.folder
            return compaction.compact(self.folder, self.base, source, ledger, deltas, self.progress)

    # ---- reading -----------------------------------------------------------------------------

    def ask(self, prompt: str, *, max_new_tokens: int = 32, at: str | None = None) -> str:
        """The greedy answer of the current state, or of the state right after update ``at``
        (``"base"``: before all updates)."""
        _check_prompt(prompt)
        return self.model(at).answer(prompt, max_new_tokens)

    def before_and_after(
        self, prompt: str, update: str, *, max_new_tokens: int = 32
    ) -> tuple[str, str]:
        """The greedy answers of the states right before and right after an update."""
        _check_prompt(prompt)
        live = self._live(update)
        if update not in live:
            raise HomeError(f"{update!r} is not the id of an update.")
        before = self._model_with(live[:-1]).answer(prompt, max_new_tokens)
        return before, self._model_with(live).answer(prompt, max_new_tokens)

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
        """One update: its ledger entry, whether it is live, the ``notes`` of its method, its
        environment, where its change lives, and with ``protect`` the forecast and the truth of
        protected prompts (``protection``).

        ``where`` and ``parts`` are those of where.json: rows by block and kind (see the module
        ``where``) of the update's own delta and of those that its method made on the way. ``kinds``
        are the same added up over the blocks, by name of the delta, and ``reading`` is the most
        important of it in one sentence. Reads no tensors.
        """
        ledger = self.ledger
        entry = ledger.entry(update)
        located = self._where(entry)
        return {
            **entry,
            "live": update in ledger.live(),
            "notes": read_json(self._file(entry, "scores.json")).get("notes", {}),
            "environment": read_json(self._file(entry, "environment.json")),
            **(
                {"protection": read_json(self._file(entry, record.PROTECTION))}
                if record.PROTECTION in entry["files"]
                else {}
            ),
            **located,
            "kinds": {name: where.by_kind(rows) for name, rows in where.named(located).items()},
            "reading": where.reading(located["where"], where.own_name(located)),
        }

    def _where(self, entry: Entry) -> dict[str, Any]:
        if "where.json" in entry["files"]:
            return dict(read_json(self._file(entry, "where.json")))
        return where.of_description(
            read_json(self._file(entry, "delta/delta.json")), self.base.places
        )

    def diff(self, update: str, other: str | None = None) -> list[dict[str, Any]]:
        """What the model said, prompt by prompt.

        Rows ``{edit, role, prompt, target, before, after}``. With one id: before and after that
        update, from its stored observations. With two: in the state right after ``update`` and
        right after ``other``, asked now, on the probes of both.
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
        entry = self.ledger.entry(update)
        before, after = (self._file(entry, name) for name in ("before.jsonl", "after.jsonl"))
        return read_jsonl(before), read_jsonl(after)

    # ---- verify and export -------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Check everything; one sentence per problem, an empty list when all is well.

        The hash chain of the ledger, the hashes of every update's files and tensors, the files of
        the base, and the fingerprint of the recomposed state against the recorded one.
        """
        # Seen before the ledger is read: a folder that is complete by now has its line by then,
        # whatever another process is committing.
        folders = [
            one for one in sorted((self.folder / UPDATES).glob("*")) if not _is_leftover(one)
        ]
        try:
            ledger = self.ledger
            source = self.source
        except UnwriteError as error:
            return [str(error)]
        applied = ledger.applied
        problems: list[str] = []
        size = self.base.bytes + sum(entry["delta"]["bytes"] for entry in applied.values())
        with self.progress.stage("verifying", Bytes(size)) as advance:
            problems += self.base.problems(source.folder, advance)
            for update, entry in applied.items():
                problems += self._problems_of(entry)
                advance(entry["delta"]["bytes"], update)
            for folder in folders:
                if folder.name not in applied:
                    problems.append(
                        f"{folder} is not in the ledger: the ledger lost its last lines, or the "
                        "folder was put there by hand."
                    )
        if not problems:
            problems += self._problems_of_state(ledger, source)
        return problems

    def _problems_of_state(self, ledger: Ledger, source: Source) -> list[str]:
        """Of the state, composed from all of its deltas; and of the sum that ``compact`` stored."""
        recorded, live = ledger.fingerprint, ledger.live()
        if self.base.fingerprint_with(source.folder, self.deltas(live), self.progress) != recorded:
            return ["The recomposed state is not the one recorded in the ledger."]
        try:
            total = compaction.stored(self.folder, self.base)
            if total is None:
                return []
            compaction.check(total, self.folder)
            if count := compaction.covered(total, ledger, live):
                self._sound_sums.add(_sum_up_to(live[count - 1]))
                if self.fingerprint(live) != recorded:
                    raise compaction.damaged(self.folder, "It is not what the updates add up to.")
        except UnwriteError as error:
            return [str(error)]
        return []

    def _problems_of(self, entry: Entry) -> list[str]:
        problems = []
        for name in entry["files"]:
            try:
                self._file(entry, name)
            except UnwriteError as error:
                problems.append(str(error))
        if not problems:
            try:
                folder = self._update_folder(entry["id"]) / "delta"
                check_all_inside(self.folder, folder)
                delta = Delta.open(folder)
                delta.verify()
                self._compared[entry["id"]] |= set(delta)
            except UnwriteError as error:
                problems.append(str(error))
        return problems

    def export(self, folder: str | Path, as_: str = "model") -> Path:
        """Write the current state as an ordinary Hugging Face folder (``"model"``), or all live
        changes as one ``"delta"`` or one LoRA ``"adapter"`` for peft. Streams by tensor (an adapter
        is held whole); the folder appears whole or not at all.

        Raises ``HomeError`` when the folder exists and is not empty, or for ``"adapter"`` when a
        live change is not of low rank, or not of the weight of a projection.
        """
        with contextlib.suppress(OSError):  # a home that can only be read can be exported too
            self._sweep_scratch()
        ledger = self.ledger
        live = ledger.live()
        return export_state(
            user_path(folder),
            as_,
            self.base,
            self.source,
            ledger.entries,
            live,
            self._parts(live) if as_ == "model" else self.deltas(live),
            self.progress,
            trust_remote_code=self._trust_remote_code,
            home=self.folder,
        )

    def _file(self, entry: Entry, name: str) -> Path:
        """A file of an update, compared with its hash in the ledger. Raises ``DamagedFile``, also
        for a link that leads out of the home."""
        file = self._update_folder(entry["id"]) / name
        check_inside(self.folder, file)
        if not file.is_file():
            raise DamagedFile(f"{file} is missing. Put it back from a copy of the home.")
        if sha256_file(file) != entry["files"].get(name):
            raise DamagedFile(
                f"{file} is damaged: it is not as it was written. Put it back from a copy of the "
                "home."
            )
        return file

    def _update_folder(self, update: str) -> Path:
        if not _ID.fullmatch(update):
            raise DamagedFile(f"The ledger names an update {update!r}, which is not an id.")
        return self.folder / UPDATES / update


def _sum_up_to(update: str) -> str:
    """What the stored sum is called among what was found sound."""
    return f"{compaction.NAME} {update}"


def is_home(folder: str | Path) -> bool:
    """Whether ``folder`` is a model home (its ledger is what is written last)."""
    try:
        return (user_path(folder) / LEDGER).is_file()
    except OSError:  # too long for a name, or closed to us
        return False


def evaluate_model(model: Model, edits: str | Path | Sequence[Edit]) -> Scores:
    """Scores of a model as it is (locality is 1 by definition: nothing changed)."""
    asked = questions(_edits(edits))
    _check_readable(model, (), asked)
    rows = observe(model, settle(model, asked))
    return scoring.score(rows, rows)


def _edits(edits: str | Path | Sequence[Edit]) -> tuple[Edit, ...]:
    return with_ids(read_edits(edits))


def _prepared(
    method: Any, seed: int | None, protect: Sequence[str | Protected]
) -> tuple[Any, tuple[Protected, ...]]:
    """The method with the seed in every place that takes one; the prompts to watch, each once."""
    method = method if method is not None else methods.build(methods.DEFAULT, {})
    if not hasattr(method, "delta") or not is_dataclass(method) or isinstance(method, type):
        raise BadSetting(
            f"{method!r} is not a method: give an instance of a frozen dataclass with "
            "delta(model, edits), such as FullFT()."
        )
    if isinstance(protect, str):
        raise BadSetting("protect is one text where a list of prompts is needed: put it in [ ].")
    watched = once_each(protect)
    if watched:
        protection.check_protects(method)
        for one in watched:
            _check_prompt(one.prompt)
    if seed is not None:
        method, places = methods.replaced(method, "seed", seed)
        if places == 0:
            taken_by = methods.settings_of(method)["name"]
            raise BadSetting(f"The method {taken_by} takes no 'seed'.")
    settings = methods.settings_of(method)
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError):
        raise BadSetting(
            f"The settings of the method cannot be kept in the ledger: {settings}. Fields are "
            "finite numbers, texts, truth values, lists of these, or methods."
        ) from None
    return method, watched


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise BadEdits("The prompt is empty; ask something.")
    record.check_text(prompt, "the prompt")


def _check_free(path: Path) -> None:
    """Refuse (``HomeError``) to make a home where something else is."""
    if path.exists() and not path.is_dir():
        raise HomeError(f"{path} is a file; a home is a folder.")
    # A half-made home has base.json (or its temporary) but no ledger: that is begun again.
    inside = sorted(item.name for item in path.iterdir()) if path.exists() else []
    if foreign := [name for name in inside if not name.startswith(_OWN)]:
        raise HomeError(
            f"{path} has other files in it ({foreign[0]}, ...); a home is made in an empty or new "
            "folder."
        )


def _remove_temporaries(home: Path) -> None:
    """Remove what atomic writes of a killed process left. Only under the write lock."""
    for name in (bases.NAME, LEDGER, present.NAME):
        for stray in home.glob(f".{name}.*"):
            stray.unlink()


def _is_leftover(folder: Path) -> bool:
    """Whether a killed process left this folder half-made or half-removed (see ``_remove``). A link
    is nobody's left-over: what it leads to is not ours to remove."""
    if folder.is_symlink():
        return False
    try:
        names = {item.name for item in folder.iterdir()}
    except FileNotFoundError:  # it is being removed
        return True
    except NotADirectoryError:
        return False
    return not names or PARTIAL in names


def _remove(folder: Path) -> None:
    """Remove a partial update, the marker last: cut off anywhere, it is still known as partial."""
    for item in folder.iterdir():
        if item.is_dir():
            shutil.rmtree(item)
        elif item.name != PARTIAL:
            item.unlink()
    (folder / PARTIAL).unlink(missing_ok=True)
    folder.rmdir()


def _check_readable(model: Model, edits: Sequence[Edit], asked: Sequence[Question]) -> None:
    """Tokenise everything once, so that what the model cannot read is refused before training."""
    for edit in edits:
        model.tokens(edit.prompt, edit.new)
    for probe in asked:
        if probe.target is not None:  # the others are asked, and so read, before training
            model.tokens(probe.prompt, probe.target)


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


@dataclass(frozen=True)
class _Redo:
    """A method that gives the stored delta of an update, for ``Home.redo``."""

    name: ClassVar[str] = "redo"
    of: str
    stored: InitVar[Delta]

    def __post_init__(self, stored: Delta) -> None:
        object.__setattr__(self, "_stored", stored)  # no field: it is no setting for the ledger

    def delta(self, _model: Model, _edits: Sequence[Edit]) -> Delta:
        return self._stored  # type: ignore[attr-defined]


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM for the few milliseconds of a commit: it is done or not, and it
    is known which. They take effect at the end of the block.

    Masking signals would not do: another thread would take them, and Python would still raise the
    interruption here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in its main thread only
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, lambda n, _frame: came.append(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for missed in came:
            signal.raise_signal(missed)
