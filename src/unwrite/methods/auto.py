"""Auto: what the comparison has shown to work, put together and checked on the edits alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadEdits, BadSetting, NotWritable, TrainingFailed
from unwrite.formats import shown
from unwrite.methods.full_ft import FullFT
from unwrite.methods.memit import MEMIT
from unwrite.model import Model
from unwrite.self_check import SelfCheck
from unwrite.subjects import guessed_subject
from unwrite.training import Trained, new_pairs

EPOCHS = 40  # of training at most: each goes through what is still wrong only
REFINED_ON = 30  # rewordings of every prompt
EVERY_ROW = 12  # epochs of every row at first, where nothing was written
OWN_BESIDE_PROTECTED = 100  # prompts of the model's own at least, where answers are to be protected


class _Budget(NamedTuple):
    """What an update may cost: rewordings that a value is sought for and steps of that search,
    made-up neighbours of every edit, prompts of the model's own, and steps in which what is written
    is refined."""

    rewordings: int
    steps: int
    neighbours: int
    own_prompts: int
    refine: int


BUDGETS = {
    "fast": _Budget(rewordings=12, steps=20, neighbours=2, own_prompts=0, refine=0),
    "balanced": _Budget(rewordings=12, steps=20, neighbours=4, own_prompts=200, refine=100),
    "thorough": _Budget(rewordings=30, steps=40, neighbours=8, own_prompts=400, refine=100),
}


@dataclass(frozen=True)
class Auto:
    """Write at subjects, train under protection, and check without the records' own probes.

    1. Edits whose subject stands once in the prompt are written at that subject into the MLPs of
       some layers (``MEMIT``), for the prompt and for what is left of it when words are missing
       (``rewordings``), while made-up neighbours stay. That carries over to other wordings as
       training does not. What is written is then refined as it stands together (``refine`` steps,
       not with the budget ``fast``).
    2. Where a new answer is not right by then, or one to ``protect`` no longer what it was, all
       weights are trained (``FullFT``) from there until they are, on those alone (``skip_right``),
       with the model's answers *before the update* to ``protect``, to made-up neighbours and to
       prompts of its own held fast. What is right already would only move bystanders
       (``train="always"`` trains all of it all the same, until made-up neighbours hold, too). Where
       nothing could be written, because no edit has a subject or the network adds up otherwise
       (Gemma 2 and 3), every row is trained first, for up to ``EVERY_ROW`` epochs.
    3. A delta is linear: of the strengths 0.5 to 1 the least is taken at which every new answer
       still holds that holds at 1, bare and behind neutral sentences that nothing was taught
       behind.

    ``stop`` is the loss at which a value is firm enough (``Search``): the smaller, the more
    wordings follow, and the more often the new answer also comes up where something else is asked
    about the subject. ``closed``: the share of the way to the values that is written at least,
    unless all answers are right before (``MEMIT``). ``budget`` decides how much of each is done
    (``BUDGETS``); ``rewordings``, ``neighbours`` (of every edit, to be kept), ``own_prompts`` and
    ``refine`` go before it where they are given. Where there is something to ``protect``, as after
    earlier updates of a home, training is likely, and without prompts of the model's own perplexity
    would rise with every update: then there are ``OWN_BESIDE_PROTECTED`` at least. ``epochs``: of
    training at most (by default ``EPOCHS``, with 0 nothing is trained). ``write=False`` leaves out
    the first step. Step 3 is made with ``least=True`` only: what it gains in neighbours it costs in
    wordings (docs/results.md). Paraphrases and bystanders are never read: the notes say what the
    check found on prompts made from the edits alone.

    Edits without a subject get the one that their prompt suggests (``subjects.guessed_subject``),
    unless ``guess_subjects=False``. In a home, ``keep_earlier`` protects what live updates taught,
    too.

    Memory, where something is trained: that of full fine-tuning, a copy of the head, and 4 bytes x
    width for each of the up to eight answer tokens of every protected prompt (see ``kept``). What
    is written is of low rank, and so is the delta where nothing is trained.
    """

    budget: Literal["fast", "balanced", "thorough"] = "fast"
    protect: tuple[str, ...] = ()
    write: bool = True
    preserve: float = 4000.0
    neighbours: int | None = None
    own_prompts: int | None = None
    epochs: int | None = None
    lr: float = 3e-5
    protect_weight: float = 10.0
    least: bool = False
    keep_earlier: bool = True
    batch_size: int = 8
    seed: int = 0
    rewordings: int | None = field(default=None, metadata={"later": True})
    stop: float = field(default=0.5, metadata={"later": True})
    closed: float = field(default=0.65, metadata={"later": True})
    train: Literal["needed", "always"] = field(default="needed", metadata={"later": True})
    guess_subjects: bool = field(default=True, metadata={"later": True})
    refine: int | None = field(default=None, metadata={"later": True})

    name: ClassVar[str] = "auto"
    paper: ClassVar[str] = "ours; MEMIT (2210.07229), then fine-tuning under a KL penalty"
    advice: ClassVar[str] = "one command: facts that stick, and neighbours that stay"

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise BadSetting(f"budget must be one of {', '.join(BUDGETS)}, not {self.budget!r}.")
        if self.train not in ("needed", "always"):
            raise BadSetting(f"train must be needed or always, not {self.train!r}.")
        if not self.write and self.epochs == 0:
            raise BadSetting("With write=False and epochs=0 nothing would be done.")
        self.parts  # noqa: B018 -- refuses what they refuse

    @property
    def parts(self) -> tuple[MEMIT | FullFT, ...]:
        """The methods that do the work, in their order, as the budget has them."""
        every = (self._writer, *self._courses(written=self.write))
        return tuple(one for one in every if one is not None)

    @property
    def _amounts(self) -> _Budget:
        given = {
            name: value
            for name in ("rewordings", "neighbours", "own_prompts", "refine")
            if (value := getattr(self, name)) is not None
        }
        amounts = BUDGETS[self.budget]
        if self.protect:
            least = max(amounts.own_prompts, OWN_BESIDE_PROTECTED)
            amounts = amounts._replace(own_prompts=least)
        return amounts._replace(**given)

    @property
    def _refined_on(self) -> int:
        return REFINED_ON if self._amounts.refine else 0

    @property
    def _writer(self) -> MEMIT | None:
        if not self.write:
            return None
        return MEMIT(
            contexts=0,  # every other rewording stands behind a neutral sentence
            rewordings=self._amounts.rewordings,
            steps=self._amounts.steps,
            stop=self.stop,
            preserve=self.preserve,
            closed=self.closed,
            neighbours=self._amounts.neighbours,
            refine=self._amounts.refine,
            refine_rewordings=self._refined_on,
            own_prompts=self._amounts.own_prompts if self._amounts.refine else 0,
            seed=self.seed,
        )

    def _courses(self, *, written: bool) -> tuple[FullFT, ...]:
        """What is trained, in its order, after something was ``written`` or nothing was."""
        most = EPOCHS if self.epochs is None else self.epochs
        every_row = 0 if written else min(most, EVERY_ROW)
        if self.train == "always":
            every_row = most
        courses = ((every_row, False), (most - every_row, True))
        return tuple(self._course(epochs, skip_right) for epochs, skip_right in courses if epochs)

    def _course(self, epochs: int, skip_right: bool) -> FullFT:
        return FullFT(
            epochs=epochs,
            lr=self.lr,
            batch_size=self.batch_size,
            protect=self.protect,
            protect_weight=self.protect_weight,
            neighbours=self._amounts.neighbours,
            own_prompts=self._amounts.own_prompts,
            skip_right=skip_right,
            seed=self.seed,
        )

    def _check(self, model: Model, edits: Sequence[Edit]) -> SelfCheck:
        return SelfCheck.of(
            model,
            edits,
            taught_behind=max(self._amounts.rewordings, self._refined_on) // 2,
            neighbours_kept=self._amounts.neighbours,
            protect=self.protect,
            seed=self.seed,
        )

    def probe(self) -> FullFT:
        """The update in short, for the forecast of ``protect``: one epoch, nothing protected."""
        return FullFT(
            epochs=1, until="epochs", lr=self.lr, batch_size=self.batch_size, seed=self.seed
        )

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        """Raises what fine-tuning raises, and ``TrainingFailed`` where nothing can be written and
        nothing is to be trained. The notes say what was chosen, why, and what it did."""
        guessed: list[str] = []
        if self.guess_subjects:
            edits, guessed = _with_subjects(edits)
        check = self._check(model, edits)
        total, said = _written(model, edits, self._writer, self.protect)
        notes: dict[str, Any] = {"budget": self.budget, **self._amounts._asdict()}
        if self.train == "needed" and len(total) and check.nothing_wants(model, edits, total):
            said.append("Every new answer is right as it was written, so nothing was trained.")
            notes |= {"epochs_trained": 0, "learned": True}
        elif courses := self._courses(written=len(total) > 0):
            notes["epochs_trained"] = 0
            for course in courses:
                trained = course.train(model, new_pairs(edits), start=total)
                total = (total + trained.delta).in_memory()
                said.append(_told(trained, course))
                notes["epochs_trained"] += trained.epochs
                notes["learned"] = trained.learned
                if trained.learned:
                    break
        elif not len(total):
            raise TrainingFailed(f"{said[0]} With epochs=0 nothing is trained: leave that out.")
        strength = check.least_strength(model, total) if self.least else 1.0
        if strength < 1:
            total = (strength * total).in_memory()
            said.append(f"{100 * strength:.0f} % of that suffices, and is what was kept.")
        found = check.found(model, total)
        total.provenance["notes"] = {
            "sentences": [*guessed, *said, found.sentence()],
            "strength": strength,
            "check": found._asdict(),
            **notes,
        }
        return total


def _with_subjects(edits: Sequence[Edit]) -> tuple[list[Edit], list[str]]:
    """The edits, each without a subject with the one that its prompt suggests, if it does; and a
    sentence about those."""
    guesses = {
        number: Edit(edit.prompt, edit.new, edit.old, subject, id=edit.id)
        for number, edit in enumerate(edits)
        if edit.subject is None and (subject := guessed_subject(edit.prompt))
    }
    if not guesses:
        return list(edits), []
    first = next(iter(guesses.values()))
    return [guesses.get(number, edit) for number, edit in enumerate(edits)], [
        f"{len(guesses)} of {len(edits)} edits came without a subject; it was guessed from the "
        f"prompt, like {shown(str(first.subject))} in {shown(first.prompt)}."
    ]


def _written(
    model: Model, edits: Sequence[Edit], writer: MEMIT | None, protect: Sequence[str]
) -> tuple[Delta, list[str]]:
    """What can be written at subjects, and sentences about it."""
    if writer is None:
        return Delta.nothing(), []
    writable = [edit for edit in edits if _has_a_place(model, edit, writer)]
    left = len(edits) - len(writable)
    rest = f"{left} of {len(edits)} edits have no single subject in their prompt to be written at."
    if not writable:
        return Delta.nothing(), [rest]
    try:
        written = writer.delta(model, writable, protect).in_memory()
    except (TrainingFailed, NotWritable) as error:  # not one can be written: they are trained
        return Delta.nothing(), [str(error), rest] if left else [str(error)]
    sentences = written.provenance["notes"]["sentences"]
    return written, [*sentences, rest] if left else sentences


def _has_a_place(model: Model, edit: Edit, writer: MEMIT) -> bool:
    """Whether a single token of the prompt ends the subject, before the answer begins, and the
    prompt can be read behind every sentence."""
    try:
        writer.mentions(model, [edit], writer.seed)
    except BadEdits:
        return False
    return True


def _told(trained: Trained, tuner: FullFT) -> str:
    if not trained.epochs:
        return "That was enough: every new answer is right and every one to protect as before."
    until = "until" if trained.learned else "not until"
    return (
        f"Trained for {trained.epochs} of at most {tuner.epochs} epochs at a learning rate of "
        f"{tuner.lr:g}, {until} every new answer was right and every protected one as before."
    )
