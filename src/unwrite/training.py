"""Fine-tuning on question-answer pairs: one loop, and its result as a ``Delta``.

``fine_tune`` is what every training method stands on. It differs from a general trainer in what it
leaves out: batches are made of sequences of similar length, so there is next to no padding; the
vocabulary-wide logits are computed at answer positions only; the optimiser is fused. The numbers
are those of a plain ``transformers.Trainer`` run with the same batches (a test holds it to that).

The loss is the mean over the *examples* of a batch of the mean over their answer tokens, so that
old and new answers of different length weigh the same (METHODS, decisions). Batches are formed by
the length of the prompts, so that runs on old and on new answers meet the same prompts in the same
order: only then can their changes be compared weight by weight.

Memory on top of the model: gradients and two AdamW moments (12 bytes a trained weight; other
optimisers keep less, see ``optimizers``) and a snapshot of the trained tensors (4 bytes).
``fine_tune_adapters`` trains low-rank adapters instead, and needs next to nothing on top of the
model.

Several processes (``processes``) divide each batch among them and make one step together: losses
and changes are those of one process up to the order of additions. Under FSDP2 (``sharding``)
weights, gradients and moments are divided, too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any, Literal

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from unwrite import halves, optimizers, processes
from unwrite.adapters import AdapterShape, Banks, adapted
from unwrite.allocator import freed_memory_goes_back, freed_memory_is_kept
from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadEdits, BadSetting, TrainingFailed, is_out_of_memory
from unwrite.kept import KeptAnswers
from unwrite.model import Model, Tokens, head_sees, length_batches, mean_by_row, pad
from unwrite.neighbours import neighbours
from unwrite.optimizers import OptimizerName
from unwrite.own_text import own_prompts
from unwrite.progress import AtMost, Measured
from unwrite.sharding import difference, divided

# Of epochs, what ``skip_right`` is likely to have left after most was taught: the steps of one or
# two epochs of all rows (development draws of ``benchmarks.auto_study``).
LEFT_TO_TRAIN = 0.05


@dataclass(frozen=True)
class Pair:
    """One row to train on: answer ``prompt`` with ``answer``; a negative weight unlearns it.
    ``subject``: whom or what the prompt is about, as it stands there."""

    prompt: str
    answer: str
    weight: float = 1.0
    subject: str | None = None


@dataclass(frozen=True)
class Recipe:
    """How to train: what all training methods have in common.

    ``epochs`` passes over the pairs, or at most so many with ``until="learned"``: then training
    stops after the first epoch in which every answer token is the network's argmax, those of
    protected prompts among them. ``contexts``: how many of the bundled neutral sentences may stand
    before a prompt (each row is bare in every other epoch; 0 for none). ``protect``: prompts on
    which the KL divergence from the state before is penalised with ``protect_weight``, on the
    network's own answers. ``neighbours``: so many made-up prompts an edit are protected in the same
    way (see the module ``neighbours``), and so are ``own_prompts`` prompts that the network writes
    itself (``own_text``). ``precision="bf16"`` multiplies matrices in bf16 with fp32 master weights
    (on a processor by ``halves``, else by autocast). ``accumulate``: a step is made on so many
    batches of ``batch_size`` rows, read one after the other: the step is that of one batch with all
    of these rows, the memory that of one with a few. ``optimizer``: see ``optimizers``.
    ``in_backward``: each tensor is stepped as soon as its gradient is there, so that only the
    largest gradient needs memory; ``max_grad_norm`` then bounds every tensor's gradient by itself.
    ``skip_right``: an epoch goes through those rows only whose answer is not right when it begins,
    and through those of ``protect`` whose answer moved, until there are none: what is learned
    already shall move nothing else. What is made up to be protected is drawn beside them, but not
    waited for.
    """

    epochs: int = 20
    lr: float = 3e-5
    batch_size: int = 8
    until: Literal["learned", "epochs"] = "learned"
    max_grad_norm: float = 1.0
    contexts: int = 0
    protect: tuple[str, ...] = ()
    protect_weight: float = 2.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    accumulate: int = field(default=1, metadata={"later": True})
    optimizer: OptimizerName = field(default="adamw", metadata={"later": True})
    neighbours: int = field(default=0, metadata={"later": True})
    in_backward: bool = field(default=False, metadata={"later": True})
    own_prompts: int = field(default=0, metadata={"later": True})
    skip_right: bool = field(default=False, metadata={"later": True})

    def __post_init__(self) -> None:
        positive = {
            "epochs": self.epochs,
            "lr": self.lr,
            "batch_size": self.batch_size,
            "accumulate": self.accumulate,
        }
        for name, value in positive.items():
            if not value > 0:
                raise BadSetting(f"{name} must be greater than 0, not {value}.")
        if (
            not self.max_grad_norm > 0
            or not self.protect_weight >= 0
            or self.contexts < 0
            or self.neighbours < 0
            or self.own_prompts < 0
        ):
            raise BadSetting(
                "max_grad_norm must be positive; protect_weight, contexts, neighbours and "
                "own_prompts at least 0."
            )
        if self.in_backward and self.accumulate > 1:
            raise BadSetting(
                "in_backward steps within every backward pass, so nothing can be accumulated: use "
                "one of the two."
            )
        if self.skip_right and self.until != "learned":
            raise BadSetting(
                "skip_right leaves out what is learned, so it needs until='learned' and not "
                f"{self.until!r}."
            )
        if self.optimizer not in optimizers.NAMES:
            raise BadSetting(
                f"There is no optimizer {self.optimizer!r}. Optimizers: "
                f"{', '.join(optimizers.NAMES)}."
            )

    @property
    def rows_per_step(self) -> int:
        """Rows on which an optimiser step is made."""
        return self.batch_size * self.accumulate


@dataclass(frozen=True)
class Step:
    """What an after-step hook may look at: the optimiser step just taken (from 1) and its loss."""

    number: int
    epoch: int
    loss: float


BeforeTraining = Callable[[Mapping[str, torch.nn.Parameter]], None]
AfterStep = Callable[[Mapping[str, torch.nn.Parameter], Step], None]
LossForm = Literal["answer", "prompt-last"]


@dataclass(frozen=True)
class Trained:
    """A delta and how it came about. ``losses``: one per optimiser step, before that step."""

    delta: Delta
    losses: tuple[float, ...]
    epochs: int
    learned: bool
    seconds: float


def share_left(part: Any, parts: Sequence[Any]) -> float:
    """Of the epochs of a part of a method, what is likely to be left to train: little for one that
    leaves out what is right (``skip_right``), beside one of ``parts`` that does not."""
    others = any(not getattr(one, "skip_right", False) for one in parts)
    return LEFT_TO_TRAIN if others and getattr(part, "skip_right", False) else 1.0


def new_pairs(edits: Sequence[Edit | Pair]) -> list[Pair]:
    """The pairs that teach the new answers; what is a pair already stays as it is."""
    return [
        one if isinstance(one, Pair) else Pair(one.prompt, one.new, subject=one.subject)
        for one in edits
    ]


def fine_tune(
    model: Model,
    pairs: Sequence[Pair],
    recipe: Recipe,
    *,
    trainable: Callable[[str], bool] | None = None,
    before_training: BeforeTraining | None = None,
    after_step: AfterStep | None = None,
    start: Delta | None = None,
    loss: LossForm = "answer",
) -> Trained:
    """Fine-tune ``model`` on ``pairs`` and return the change; the model itself is left as it was.

    ``trainable`` chooses tensors by file name (default: all). ``start`` is added to the weights
    first; the result is the change from there. ``before_training`` is then called with the trained
    parameters by file name, and ``after_step`` after every optimiser step; the latter may change
    them in place. ``loss="prompt-last"`` scores all answer tokens at the last position of the
    prompt (FT-L, METHODS 6.2).

    The same seed, pairs and machine give the same bits. The model's tensors are copied back from a
    snapshot however this ends, so it is bitwise unchanged even after an error or Ctrl-C.

    Raises ``BadEdits`` (nothing to train on, a prompt too long, an empty answer) before training,
    ``TrainingFailed`` when the loss is no longer a number or memory runs out.
    """
    rows = _rows(model, pairs)
    _check_processes(recipe)
    start = start or Delta.nothing()
    start.check_fits(model.weights)
    started = time.perf_counter()
    names = tuple(model.trainable(trainable))
    orders = {
        "pairs": tuple(pairs),
        "recipe": recipe,
        "names": names,
        "before_training": before_training,
        "after_step": after_step,
        "loss": loss,
    }
    with (
        processes.called_in(model, _fine_tune_along, **orders),
        contextlib.ExitStack() as clean_up,
    ):
        guard = _guard(model, recipe, pairs)
        clean_up.callback(model.network.requires_grad_, True)
        _freeze_others(model, names)
        # A sharded copy is trained in place of this network.
        touched = set(start) if processes.shards() else {*names, *start}
        before = _snapshot(model, touched)
        clean_up.callback(_restore, model, before)
        clean_up.enter_context(_memory_errors(recipe))
        with torch.no_grad():
            for name in start:
                model.weights[name].add_(start[name].dense().to(model.device))
        learner, device, origin = model, model.device, model.weights
        if processes.shards():
            learner, device, origin = clean_up.enter_context(divided(model, names))
        parameters = {name: learner.parameters[name] for name in names}
        if before_training is not None:
            before_training(_of_this_process(parameters))
        course = _Course(rows, parameters)
        run = _Run(learner, device, recipe, [course], guard, after_step=after_step, loss=loss)
        run.train()
        if processes.shards():
            del run.optimizer  # its memory, before whole tensors come together
            delta = difference(learner, origin, names)
        else:
            delta = _change_of(run, course, before, start)
        return run.result(course, delta, time.perf_counter() - started)


def _fine_tune_along(
    model: Model, pairs: Sequence[Pair], recipe: Recipe, names: Sequence[str], **hooks: Any
) -> None:
    """``fine_tune`` in a process that follows; the weights come from the first one."""
    fine_tune(model, pairs, recipe, trainable=set(names).__contains__, **hooks)


def _change_of(
    run: _Run, course: _Course, before: Mapping[str, torch.Tensor], start: Delta
) -> Delta:
    """What the trained weights are away from where they started."""
    changes: dict[str, Dense] = {}
    state = run.optimizer.state
    for name, parameter in course.parameters.items():
        # The optimiser's memory is done with, so the difference goes there: no new memory.
        room = state[parameter].get("exp_avg")
        room = torch.empty_like(before[name]) if room is None else room
        origin = before[name]
        if name in start:
            origin = origin + start[name].dense().to(origin.device)
        changes[name] = Dense(torch.sub(parameter.detach(), origin, out=room).cpu())
    return Delta.from_changes(changes)


def fine_tune_adapters(
    model: Model,
    courses: Mapping[str, Sequence[Pair]],
    recipe: Recipe,
    shape: AdapterShape,
    *,
    start: Delta | None = None,
) -> dict[str, Trained]:
    """Train low-rank adapters over the frozen model, one bank a course, and return their deltas.

    Several courses (over the same prompts) run side by side: the frozen weights are read once for
    all of them, every bank starts from the same random factors, meets the same batches in the same
    order and makes the same number of steps. With ``until="learned"`` the last course decides.
    ``start`` is added to the weights first, as in ``fine_tune``.

    The deltas are ``LowRank``, read out of the factors and never through adapter arithmetic. The
    model is bitwise unchanged however this ends. Raises as ``fine_tune`` does, and ``BadSetting``
    when the model has none of the targets.
    """
    started = time.perf_counter()
    rows = {name: _rows(model, pairs) for name, pairs in courses.items()}
    _check_processes(recipe)
    orders = {"courses": dict(courses), "recipe": recipe, "shape": shape}
    with (
        processes.called_in(model, fine_tune_adapters, **orders),
        contextlib.ExitStack() as clean_up,
    ):
        guard = _guard(model, recipe, next(iter(courses.values())))
        if start is not None and len(start):
            clean_up.enter_context(model.shifted(start))
        clean_up.enter_context(_memory_errors(recipe))
        learner, device = model, model.device
        if processes.shards():  # the frozen model; the adapters are whole in every process
            learner, device, _ = clean_up.enter_context(divided(model, ()))
        carried = adapted(learner, list(courses), shape, recipe.seed, device)
        banks = clean_up.enter_context(carried)
        taught = {name: _Course(rows[name], banks.parameters[name], name) for name in courses}
        run = _Run(learner, device, recipe, list(taught.values()), guard, banks=banks)
        run.train()
        seconds = time.perf_counter() - started
        return {
            name: run.result(course, banks.delta(name), seconds) for name, course in taught.items()
        }


def learned(model: Model, pairs: Sequence[Pair]) -> list[bool]:
    """For each pair, whether every token of its answer is the network's argmax now."""
    forced = model.force([model.tokens(pair.prompt, pair.answer) for pair in pairs])
    return [one.matched == len(one.targets) for one in forced]


Row = tuple[Pair, Tokens]


@dataclass
class _Course:
    """Rows to learn and the parameters that learn them. Twins are two courses in one run."""

    rows: list[Row]
    parameters: Mapping[str, torch.nn.Parameter]
    bank: str | None = None
    losses: list[float] = field(default_factory=list)


class _Run:
    """One training run: the state that the loop needs, and the loop."""

    def __init__(
        self,
        model: Model,
        device: torch.device,
        recipe: Recipe,
        courses: Sequence[_Course],
        guard: KeptAnswers | None,
        *,
        after_step: AfterStep | None = None,
        loss: LossForm = "answer",
        banks: Banks | None = None,
    ) -> None:
        self.model, self.device, self.recipe = model, device, recipe
        self.courses, self.guard = courses, guard
        self.after_step, self.loss, self.banks = after_step, loss, banks
        groups = [course.parameters.values() for course in courses]
        pays = _copies_pay(recipe, device, model.network)
        self.halves = halves.Halves(model.network) if pays else None
        self.optimizer: torch.optim.Optimizer | optimizers.InBackward | halves.Optimizer
        if self.halves is not None:
            self.optimizer = halves.Optimizer(
                self.halves, recipe.optimizer, groups, recipe.lr, recipe.max_grad_norm
            )
        elif recipe.in_backward:
            self.optimizer = optimizers.InBackward(
                recipe.optimizer, groups, recipe.lr, recipe.max_grad_norm
            )
        else:
            self.optimizer = optimizers.build(recipe.optimizer, groups, recipe.lr)
        self.rank, self.processes = processes.rank(), processes.count()
        self.frugal = recipe.in_backward or processes.shards()
        self.in_step: Callable[[bool], contextlib.AbstractContextManager[Any]]
        self.network, self.in_step = _data_parallel(model.network, groups)
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.epoch = 0
        self.learned = False
        self.left = list(range(len(courses[0].rows)))
        self.moved: list[int] = []

    def result(self, course: _Course, delta: Delta, seconds: float) -> Trained:
        """What the run gave for one course."""
        return Trained(delta, tuple(course.losses), self.epoch, self.learned, seconds)

    def train(self) -> None:
        """Run the epochs; ``learned`` tells whether every answer of the last course was right at
        the end (asked only if it matters)."""
        recipe, rows = self.recipe, self.courses[0].rows
        # Dropout stays off (the network is in eval mode): runs on old and on new answers are
        # compared weight by weight, and different masks would be noise in that comparison.
        self.model.network.eval()
        total = recipe.epochs * math.ceil(len(rows) / recipe.rows_per_step)
        if recipe.until == "learned":
            total = AtMost(total)
        with (
            self.model.progress.stage("training", total) as advance,
            contextlib.nullcontext() if processes.shards() else _sparse_embedding(self.model),
            # Where memory is short, what is freed must not stay: a heap that keeps it has holes.
            freed_memory_goes_back()
            if self.frugal
            else freed_memory_is_kept(self.model.largest_tensor),
            self._stepping(),
        ):
            self.learned = recipe.skip_right and self._done(self.courses[-1])
            while self.epoch < recipe.epochs and not self.learned:
                rows_of_courses = self._with_contexts()
                for batch in self._batches():
                    loss = self._step(
                        [[rows[index] for index in batch] for rows in rows_of_courses]
                    )
                    advance(1, Measured("loss", loss))
                self.epoch += 1
                self.learned = recipe.until == "learned" and self._done(self.courses[-1])

    def _step(self, batches: Sequence[Sequence[Row]]) -> float:
        """One optimiser step on one batch a course; returns the loss of the last course.

        A batch is read in parts of ``batch_size`` rows, and each part by all processes together.
        """
        size, guarded = self.recipe.batch_size, self._drawn()
        parts = math.ceil(max(len(batches[0]), len(guarded)) / size)
        sums = torch.zeros(len(self.courses), dtype=torch.float64)
        for part in range(parts):
            cut = slice(part * size, (part + 1) * size)
            rows = Share.of(len(batches[0]), cut)
            asked = Share.of(len(guarded), cut)
            with self.in_step(part + 1 == parts):
                with self._multiplying():
                    losses = self._losses(batches, rows, [guarded[i] for i in asked.rows], asked)
                sums += torch.tensor([loss.item() for loss in losses], dtype=torch.float64)
                # The banks of twins share no parameter, so that the gradients of a sum are each
                # one's own.
                torch.stack(losses).sum().backward()
        # Processes average their gradients, so each has multiplied its own by their number.
        values = (processes.summed(sums) / self.processes).tolist()
        step = len(self.courses[0].losses) + 1
        for value in values:
            if not math.isfinite(value):
                raise TrainingFailed(
                    f"The loss became {value} at step {step}; nothing was kept. "
                    f"Use a smaller lr (now {self.recipe.lr})."
                )
        for course, value in zip(self.courses, values, strict=True):
            course.losses.append(value)
        self._move()
        if self.after_step is not None:
            with torch.no_grad():
                for course in self.courses:
                    here = _of_this_process(course.parameters)
                    self.after_step(here, Step(step, self.epoch, values[-1]))
                if self.halves is not None:
                    self.halves.follow(course.parameters.values())
        return float(values[-1])

    def _move(self) -> None:
        """The optimiser's step, unless the backward pass was it."""
        if isinstance(self.optimizer, optimizers.InBackward):
            return
        if isinstance(self.optimizer, halves.Optimizer):
            self.optimizer.step()
            return
        for course in self.courses:
            trained = list(course.parameters.values())
            torch.nn.utils.clip_grad_norm_(trained, self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _stepping(self) -> contextlib.AbstractContextManager[None]:
        if isinstance(self.optimizer, optimizers.InBackward):
            return self.optimizer.attached()
        return contextlib.nullcontext()

    def _multiplying(self) -> contextlib.AbstractContextManager[Any]:
        if self.halves is not None:
            return self.halves.multiplying()
        bf16 = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16)

    def _drawn(self) -> list[int]:
        """Protected sequences for one step: what moved first, each once an epoch, then any."""
        if self.guard is None:
            return []
        count = self.recipe.rows_per_step
        first, self.moved = self.moved[:count], self.moved[count:]
        others = self.guard.draw(self.random, count)
        return [*first, *(one for one in others if one not in first)][:count]

    def _losses(
        self,
        batches: Sequence[Sequence[Row]],
        rows: Share,
        guarded: list[int],
        asked: Share,
    ) -> list[torch.Tensor]:
        """The loss of each course on this process's share of a part, from one forward pass (and
        one more for what is protected)."""
        losses = [torch.zeros((), device=self.device) for _ in batches]
        if rows.rows:
            mine = [[batch[index] for index in rows.rows] for batch in batches]
            sequences = [tokens for batch in mine for _, tokens in batch]
            sizes = [len(rows.rows)] * len(batches)
            with self._read_by(sizes):
                per_row = row_losses(self.network, sequences, self.device, self.loss)
            losses = []
            for batch, part in zip(mine, per_row.split(sizes), strict=True):
                weights = torch.tensor([pair.weight for pair, _ in batch], device=part.device)
                losses.append((part * weights).mean() * rows.weight)
        if not guarded or self.guard is None:
            return losses
        with self._read_by([len(guarded)] * len(batches)):
            divergences = self.guard.divergences(self.network, guarded * len(batches), self.device)
        return [
            loss + self.recipe.protect_weight * part.mean() * asked.weight
            for loss, part in zip(losses, divergences.split(len(guarded)), strict=True)
        ]

    def _read_by(self, sizes: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Within the block, so many rows of a batch pass through each course's bank."""
        if self.banks is None:
            return contextlib.nullcontext()
        names = [str(course.bank) for course in self.courses[-len(sizes) :]]
        return self.banks.reading(list(zip(names, sizes, strict=True)))

    def _with_contexts(self) -> list[Sequence[Row]]:
        """The rows of this epoch, by course: in every other epoch each behind a neutral sentence,
        the same one in all courses."""
        if self.recipe.contexts == 0 or self.epoch % 2 == 0:
            return [course.rows for course in self.courses]
        sentences = neutral_contexts(self.recipe.contexts)
        count = len(self.courses[0].rows)
        picks = torch.randint(len(sentences), (count,), generator=self.random).tolist()
        return [
            _rows(
                self.model,
                [
                    replace(pair, prompt=f"{sentences[pick]} {pair.prompt}")
                    for (pair, _), pick in zip(course.rows, picks, strict=True)
                ],
            )
            for course in self.courses
        ]

    def _batches(self) -> Iterator[list[int]]:
        """Row numbers in batches of similar length: rows whose prompts are equally long change
        places, and so do the batches. Answers have no say, so that twins are batched alike."""
        rows, size = self.courses[0].rows, self.recipe.rows_per_step
        by_length = sorted(self._shuffled(self.left), key=lambda index: len(rows[index][0].prompt))
        batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
        yield from self._shuffled(batches)
        while self.moved:  # more protected answers moved than there are steps for rows
            yield []

    def _done(self, course: _Course) -> bool:
        """Whether every answer to learn, and every protected one that is waited for, is the argmax
        now. With ``skip_right``, what is not is what the next epoch goes through."""
        taught = [number for number, (pair, _) in enumerate(course.rows) if pair.weight > 0]
        found = self._wrong([course.rows[number][1] for number in taught])
        moved = self._moved()
        if not self.recipe.skip_right:
            return next(itertools.chain(found, moved), None) is None
        wrong = {taught[place] for place in found}
        self.left = [
            number
            for number, (pair, _) in enumerate(course.rows)
            if number in wrong or pair.weight <= 0
        ]
        self.moved = self._shuffled(list(moved))
        return not (wrong or self.moved)

    def _moved(self) -> Iterator[int]:
        """Numbers of the protected answers that are no longer the argmax; with ``skip_right``, of
        those to ``protect`` only."""
        if self.guard is None:
            return
        named = set(self.recipe.protect if self.recipe.skip_right else self.guard.prompts)
        waited = [number for number, prompt in enumerate(self.guard.prompts) if prompt in named]
        for place in self._wrong([self.guard.sequences[number] for number in waited]):
            yield waited[place]

    def _shuffled(self, things: Sequence[Any]) -> list[Any]:
        order = torch.randperm(len(things), generator=self.random).tolist()
        return [things[number] for number in order]

    @torch.no_grad()
    def _wrong(self, wanted: Sequence[Tokens]) -> Iterator[int]:
        """Numbers of the answers that are not the argmax (in the last course), as they are found: a
        few batches are read at a time, and none after the last that is asked for."""
        batches = length_batches([len(tokens.ids) for tokens in wanted], rows=16)
        for first in range(0, len(batches), self.processes):
            # As many forward passes in every process: under FSDP they need each other.
            group = batches[first : first + self.processes]
            batch = group[min(self.rank, len(group) - 1)]
            ids, at_rows, columns, targets = pad([wanted[index] for index in batch])
            with self._read_by([len(batch)]), head_sees(self.model.network, at_rows, columns):
                output = self.model.network(input_ids=ids.to(self.device), use_cache=False)
            said = output.logits[0].float().argmax(dim=-1).cpu()
            wrong = torch.zeros(len(wanted))
            wrong[[batch[row] for row in at_rows[said != targets].tolist()]] = 1.0
            yield from processes.summed(wrong).nonzero().flatten().tolist()


@dataclass(frozen=True)
class Share:
    """What one process reads of a part of a batch: the numbers of the rows, and the factor of their
    mean in the loss of the whole batch, which is the mean over the processes. A process whose share
    is empty reads a row that counts for nothing, because the others wait for its gradients."""

    rows: list[int]
    weight: float

    @classmethod
    def of(cls, total: int, cut: slice) -> Share:
        part = range(total)[cut]
        mine = list(part[processes.rank() :: processes.count()])
        weight = len(mine) / total * processes.count() if total else 0.0
        return cls(mine or list(part[:1]), weight)


def _copies_pay(recipe: Recipe, device: torch.device, network: Any) -> bool:
    """Whether products in bf16 are made with copies of the weights (``halves``): on a processor,
    where a step is one backward pass of one process; else by autocast."""
    return (
        recipe.precision == "bf16"
        and device.type == "cpu"
        and recipe.accumulate == 1
        and not recipe.in_backward
        and processes.count() == 1
        and halves.Halves.suit(network)
    )


def _check_processes(recipe: Recipe) -> None:
    if recipe.in_backward and processes.count() > 1:
        raise BadSetting(
            "in_backward works in one process only: several have to bring their gradients together "
            "before a step. Launch one, or leave it out."
        )


def _data_parallel(
    network: Any, trained: Sequence[Iterable[torch.nn.Parameter]]
) -> tuple[Any, Callable[[bool], contextlib.AbstractContextManager[Any]]]:
    """The network as it is to be called in training, and a context for each part of a step, told
    whether it is the last: gradients are averaged over the processes once a step."""
    if processes.shards():  # FSDP2 averages what it shards, and nothing else
        whole = [one for group in trained for one in group if not isinstance(one, DTensor)]
        return network, lambda last: _averaging(whole if last else [])
    if processes.count() == 1:
        return network, lambda _last: contextlib.nullcontext()
    from torch.nn.parallel import DistributedDataParallel

    # It would send all weights as one tensor, and so hold them twice.
    processes.same([*network.parameters(), *network.buffers()])
    wrapped = DistributedDataParallel(network, gradient_as_bucket_view=True, init_sync=False)
    return wrapped, lambda last: contextlib.nullcontext() if last else wrapped.no_sync()


@contextlib.contextmanager
def _averaging(whole: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """After the block, the gradients of parameters that every process has are the mean over the
    processes; they travel as one tensor."""
    yield
    gradients = [one.grad for one in whole if one.grad is not None]
    if gradients:
        together = processes.summed(parameters_to_vector(gradients)) / processes.count()
        vector_to_parameters(together, gradients)


def _of_this_process(
    parameters: Mapping[str, torch.nn.Parameter],
) -> Mapping[str, torch.nn.Parameter]:
    """The parameters as a hook may change them: under FSDP, the shards of this process."""
    if not processes.shards():
        return parameters
    with torch.no_grad():
        return {name: one.to_local() for name, one in parameters.items()}  # type: ignore[attr-defined]


def _rows(model: Model, pairs: Sequence[Pair]) -> list[Row]:
    if not pairs:
        raise BadEdits("There is nothing to train on: the list of pairs is empty.")
    return [(pair, model.tokens(pair.prompt, pair.answer)) for pair in pairs]


def _snapshot(model: Model, names: Iterable[str]) -> dict[str, torch.Tensor]:
    weights = model.weights
    return {name: weights[name].clone() for name in names}


@torch.no_grad()
def _restore(model: Model, before: Mapping[str, torch.Tensor]) -> None:
    weights = model.weights
    for name, tensor in before.items():
        weights[name].copy_(tensor)
    model.network.zero_grad()


@contextlib.contextmanager
def _memory_errors(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingFailed(
            "The memory of the device ran out while training; nothing was kept. "
            f"Use a smaller batch_size (now {recipe.batch_size}) or a method that trains fewer "
            "weights."
        ) from error


@contextlib.contextmanager
def _sparse_embedding(model: Model) -> Iterator[None]:
    """Within the block, a tied embedding gives a sparse gradient, which autograd adds in place to
    the head's dense one: the same sum without a second tensor of vocabulary x width per step.

    An embedding that is not tied keeps its dense gradient, because the optimiser wants one.
    """
    embedding = model.network.get_input_embeddings()
    head = model.network.get_output_embeddings()
    tied = isinstance(embedding, torch.nn.Embedding) and embedding.weight is head.weight
    if not tied or not embedding.weight.requires_grad or embedding.sparse:
        yield
        return
    embedding.sparse = True
    try:
        yield
    finally:
        embedding.sparse = False


def row_losses(
    network: Any,
    sequences: Sequence[Tokens],
    device: torch.device,
    form: LossForm = "answer",
) -> torch.Tensor:
    """The mean cross-entropy of each sequence's answer tokens, fp32 of shape (sequences,).

    Inside: ids (sequences, length); logits (answer tokens, vocabulary) in fp32.
    """
    ids, rows, columns, targets = pad(sequences)
    if form == "prompt-last":
        columns = torch.tensor([tokens.answer - 1 for tokens in sequences])[rows]
    with head_sees(network, rows, columns):
        logits = network(input_ids=ids.to(device), use_cache=False).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
    return mean_by_row(losses, rows, sequences)


def neutral_contexts(count: int) -> list[str]:
    """The first ``count`` bundled neutral sentences. Raises ``BadSetting`` beyond what there is."""
    text = resources.files("unwrite.data").joinpath("contexts.txt").read_text("utf-8")
    sentences = [line for line in text.splitlines() if line]
    if count > len(sentences):
        raise BadSetting(
            f"There are {len(sentences)} neutral sentences, and {count} are asked for; use fewer "
            "contexts or rewordings."
        )
    return sentences[:count]


def _guard(model: Model, recipe: Recipe, pairs: Sequence[Pair]) -> KeptAnswers | None:
    """What is to be kept, as the model of the first process says it now."""
    asked = recipe.protect or recipe.neighbours or recipe.own_prompts
    if not asked or recipe.protect_weight == 0:
        return None
    return processes.told(lambda: KeptAnswers.of(model, _to_keep(model, recipe, pairs)))


def _to_keep(model: Model, recipe: Recipe, pairs: Sequence[Pair]) -> list[str]:
    """The prompts whose answers are to stay: given, made up, and the model's own."""
    asked = [(pair.prompt, pair.subject) for pair in pairs]
    guessed = neighbours(asked, recipe.neighbours, recipe.seed)
    taught = {prompt for prompt, _ in asked}
    own = (one for one in own_prompts(model, recipe.own_prompts, recipe.seed) if one not in taught)
    return list(dict.fromkeys((*recipe.protect, *guessed, *own)))


def _freeze_others(model: Model, names: Iterable[str]) -> None:
    """Only the named tensors have gradients until ``fine_tune`` ends."""
    model.network.requires_grad_(False)
    parameters = model.parameters
    for name in names:
        parameters[name].requires_grad_(True)
