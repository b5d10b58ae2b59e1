"""Fine-tuning on question-answer pairs: one loop, and its result as a ``Delta``.

``fine_tune`` is what every training method stands on. It differs from a general trainer in what it
leaves out: batches are made of sequences of similar length, so there is next to no padding; the
vocabulary-wide logits are computed at answer positions only; the optimiser is fused. The numbers
are those of a plain ``transformers.Trainer`` run with the same batches (a test holds it to that).

The loss is the mean over the *examples* of a batch of the mean over their answer tokens, so that
old and new answers of different length weigh the same (METHODS, decisions).

Memory on top of the model: gradients and two AdamW moments (12 bytes a trained weight) and a
snapshot of the trained tensors (4 bytes), which becomes the delta.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, Literal

import torch

from unwrite.allocator import freed_memory_is_kept
from unwrite.change import Dense
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadEdits, BadSetting, TrainingFailed
from unwrite.model import Model, Tokens, head_sees, length_batches, pad

ANSWER_TOKENS_PROTECTED = 8  # of the model's own answer to a protected prompt


@dataclass(frozen=True)
class Pair:
    """One row to train on: answer ``prompt`` with ``answer``; a negative weight unlearns it."""

    prompt: str
    answer: str
    weight: float = 1.0


@dataclass(frozen=True)
class Recipe:
    """How to train: what all training methods have in common.

    ``epochs`` passes over the pairs, or at most so many with ``until="learned"``: then training
    stops after the first epoch in which every answer token is the network's argmax. ``contexts``:
    how many of the bundled neutral sentences may stand before a prompt (each row is bare in every
    other epoch; 0 for none). ``protect``: prompts on which the KL divergence from the state before
    is penalised with ``protect_weight``, on the network's own answers. ``precision="bf16"``
    multiplies matrices in bf16 with fp32 master weights.
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

    def __post_init__(self) -> None:
        positive = {"epochs": self.epochs, "lr": self.lr, "batch_size": self.batch_size}
        for name, value in positive.items():
            if not value > 0:
                raise BadSetting(f"{name} must be greater than 0, not {value}.")
        if not self.max_grad_norm > 0 or not self.protect_weight >= 0 or self.contexts < 0:
            raise BadSetting("max_grad_norm must be positive, protect_weight and contexts >= 0.")


@dataclass(frozen=True)
class Step:
    """What an after-step hook may look at: the optimiser step just taken (from 1) and its loss."""

    number: int
    epoch: int
    loss: float


AfterStep = Callable[[Mapping[str, torch.nn.Parameter], Step], None]


@dataclass(frozen=True)
class Trained:
    """A delta and how it came about. ``losses``: one per optimiser step, before that step."""

    delta: Delta
    losses: tuple[float, ...]
    epochs: int
    learned: bool
    seconds: float


def new_pairs(edits: Sequence[Edit]) -> list[Pair]:
    """The pairs that teach the new answers."""
    return [Pair(edit.prompt, edit.new) for edit in edits]


def fine_tune(
    model: Model,
    pairs: Sequence[Pair],
    recipe: Recipe,
    *,
    trainable: Callable[[str], bool] | None = None,
    after_step: AfterStep | None = None,
) -> Trained:
    """Fine-tune ``model`` on ``pairs`` and return the change; the model itself is left as it was.

    ``trainable`` chooses tensors by file name (default: all). ``after_step`` is called after every
    optimiser step with the trained parameters by file name and may change them in place.

    The same seed, pairs and machine give the same bits. The model's tensors are copied back from a
    snapshot however this ends, so it is bitwise unchanged even after an error or Ctrl-C.

    Raises ``BadEdits`` (nothing to train on, a prompt too long, an empty answer) before training,
    ``TrainingFailed`` when the loss is no longer a number or memory runs out.
    """
    if not pairs:
        raise BadEdits("There is nothing to train on: the list of pairs is empty.")
    rows = [(pair, model.tokens(pair.prompt, pair.answer)) for pair in pairs]
    guard = _Protection.of(model, recipe)
    parameters = _parameters(model, trainable)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    started = time.perf_counter()
    delta: dict[str, Dense] = {}
    try:
        run = _Run(model, recipe, parameters, after_step, guard)
        learned = run.train(rows)
        for name, parameter in parameters.items():
            # The optimiser's memory is done with, so the difference goes there: no new memory.
            room = run.optimizer.state[parameter].get("exp_avg")
            room = torch.empty_like(before[name]) if room is None else room
            delta[name] = Dense(torch.sub(parameter.detach(), before[name], out=room).cpu())
    except torch.OutOfMemoryError as error:
        raise TrainingFailed(
            "The memory of the device ran out while training; nothing was kept. "
            f"Use a smaller batch_size (now {recipe.batch_size}) or a method that trains fewer "
            "weights."
        ) from error
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)
                parameters[name].grad = None
        model.network.requires_grad_(True)
    return Trained(
        Delta.from_changes(delta),
        tuple(run.losses),
        run.epoch,
        learned,
        time.perf_counter() - started,
    )


class _Run:
    """One training run: the state that the loop needs, and the loop."""

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        parameters: Mapping[str, torch.nn.Parameter],
        after_step: AfterStep | None,
        guard: _Protection | None,
    ) -> None:
        from accelerate import Accelerator

        self.model, self.recipe, self.parameters = model, recipe, parameters
        self.after_step, self.guard = after_step, guard
        self.accelerator = Accelerator(cpu=model.device.type == "cpu")
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=recipe.lr, weight_decay=0.0, fused=True
        )
        self.network, self.optimizer = self.accelerator.prepare(model.network, optimizer)
        self.random = torch.Generator().manual_seed(recipe.seed)
        self.losses: list[float] = []
        self.epoch = 0

    def train(self, rows: Sequence[tuple[Pair, Tokens]]) -> bool:
        """Run the epochs; whether every answer was right at the end (asked only if it matters)."""
        recipe = self.recipe
        # Dropout stays off (the network is in eval mode): runs on old and on new answers are
        # compared weight by weight, and different masks would be noise in that comparison.
        self.model.network.eval()
        total = recipe.epochs * math.ceil(len(rows) / recipe.batch_size)
        learned = False
        with (
            self.model.progress.stage("training", total) as advance,
            _sparse_embedding(self.model, self.parameters),
            freed_memory_is_kept(),
        ):
            while self.epoch < recipe.epochs and not learned:
                epoch_rows = self._with_contexts(rows)
                for batch in self._batches(epoch_rows):
                    loss = self._step(batch)
                    advance(1, f"loss {loss:.3f}")
                self.epoch += 1
                learned = recipe.until == "learned" and self._all_right(rows)
        return learned

    def _step(self, batch: Sequence[tuple[Pair, Tokens]]) -> float:
        bf16 = self.recipe.precision == "bf16"
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = answer_loss(
                self.network,
                [tokens for _, tokens in batch],
                [pair.weight for pair, _ in batch],
                self.model.device,
            )
            if self.guard is not None:
                batch_of_guard = self.guard.draw(self.random, self.recipe.batch_size)
                loss = loss + self.recipe.protect_weight * self.guard.divergence(
                    self.network, batch_of_guard
                )
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingFailed(
                f"The loss became {value} at step {len(self.losses) + 1}; nothing was kept. "
                f"Use a smaller lr (now {self.recipe.lr})."
            )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters.values(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(value)
        if self.after_step is not None:
            with torch.no_grad():
                self.after_step(self.parameters, Step(len(self.losses), self.epoch, value))
        return value

    def _with_contexts(self, rows: Sequence[tuple[Pair, Tokens]]) -> Sequence[tuple[Pair, Tokens]]:
        """The rows of this epoch: in every other epoch each behind a neutral sentence."""
        if self.recipe.contexts == 0 or self.epoch % 2 == 0:
            return rows
        sentences = neutral_contexts(self.recipe.contexts)
        picks = torch.randint(len(sentences), (len(rows),), generator=self.random).tolist()
        moved = [
            replace(pair, prompt=f"{sentences[pick]} {pair.prompt}")
            for (pair, _), pick in zip(rows, picks, strict=True)
        ]
        return [(pair, self.model.tokens(pair.prompt, pair.answer)) for pair in moved]

    def _batches(self, rows: Sequence[tuple[Pair, Tokens]]) -> Iterator[list[tuple[Pair, Tokens]]]:
        """Batches of similar length: rows of equal length change places, and so do the batches."""
        shuffled = torch.randperm(len(rows), generator=self.random).tolist()
        by_length = sorted(shuffled, key=lambda index: len(rows[index][1].ids))
        size = self.recipe.batch_size
        batches = [by_length[start : start + size] for start in range(0, len(rows), size)]
        for number in torch.randperm(len(batches), generator=self.random).tolist():
            yield [rows[index] for index in batches[number]]

    @torch.no_grad()
    def _all_right(self, rows: Sequence[tuple[Pair, Tokens]]) -> bool:
        """Whether every answer to learn is the argmax now; ends at the first batch that is not."""
        wanted = [tokens for pair, tokens in rows if pair.weight > 0]
        for batch in length_batches([len(tokens.ids) for tokens in wanted], rows=16):
            ids, at_rows, columns, targets = pad([wanted[index] for index in batch])
            logits = self.model.logits_at(ids, at_rows, columns)
            if not torch.equal(logits.argmax(dim=-1).cpu(), targets):
                return False
        return True


@contextlib.contextmanager
def _sparse_embedding(model: Model, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
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


def answer_loss(
    network: Any,
    sequences: Sequence[Tokens],
    weights: Sequence[float],
    device: torch.device,
) -> torch.Tensor:
    """Weighted mean over the sequences of the mean cross-entropy of their answer tokens, a scalar.

    Shapes inside: ids (batch, length); logits (answer tokens, vocabulary) in fp32.
    """
    ids, rows, columns, targets = pad(sequences)
    with head_sees(network, rows, columns):
        logits = network(input_ids=ids.to(device), use_cache=False).logits[0].float()
    share = torch.tensor(
        [weights[row] / (len(sequences[row].targets) * len(sequences)) for row in rows.tolist()],
        device=logits.device,
    )
    losses = torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
    return (losses * share).sum()


def neutral_contexts(count: int) -> list[str]:
    """The first ``count`` bundled neutral sentences. Raises ``BadSetting`` beyond what there is."""
    text = resources.files("unwrite.data").joinpath("contexts.txt").read_text("utf-8")
    sentences = [line for line in text.splitlines() if line]
    if count > len(sentences):
        raise BadSetting(f"There are {len(sentences)} neutral contexts; contexts={count} is more.")
    return sentences[:count]


@dataclass
class _Protection:
    """Prompts that must go on being answered as before, with the distributions to be kept.

    The network's own greedy answer (its first tokens) is forced, and the next-token distribution at
    each of its positions is to stay: KL(before || now). Memory: 4 bytes x vocabulary a position.
    """

    model: Model
    sequences: list[Tokens]
    logprobs: list[torch.Tensor]  # per sequence: (answer tokens, vocabulary), fp32, on the CPU

    @classmethod
    def of(cls, model: Model, recipe: Recipe) -> _Protection | None:
        if not recipe.protect or recipe.protect_weight == 0:
            return None
        answers = model.generate(recipe.protect, ANSWER_TOKENS_PROTECTED)
        sequences = [
            model.tokens(prompt, answer)
            for prompt, answer in zip(recipe.protect, answers, strict=True)
            if answer.strip()  # the network ends the text at once: there is nothing to keep
        ]
        if not sequences:
            return None
        kept: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for batch in length_batches([len(tokens.ids) for tokens in sequences], rows=16):
                ids, rows, columns, _ = pad([sequences[index] for index in batch])
                logprobs = model.logits_at(ids, rows, columns).log_softmax(dim=-1).cpu()
                for row, index in enumerate(batch):
                    kept[index] = logprobs[rows == row]
        return cls(model, sequences, [kept[index] for index in range(len(sequences))])

    def draw(self, random: torch.Generator, count: int) -> list[int]:
        """``count`` protected sequences for one step, of similar length by neighbourhood."""
        picks = torch.randperm(len(self.sequences), generator=random)[:count]
        return [int(pick) for pick in picks]

    def divergence(self, network: Any, chosen: Sequence[int]) -> torch.Tensor:
        """Mean KL(before || now) over the chosen sequences and their answer positions, a scalar."""
        sequences = [self.sequences[index] for index in chosen]
        ids, rows, columns, _ = pad(sequences)
        with head_sees(network, rows, columns):
            logits = network(input_ids=ids.to(self.model.device), use_cache=False).logits[0]
        now = logits.float().log_softmax(dim=-1)
        before = torch.cat([self.logprobs[index] for index in chosen]).to(now.device)
        share = torch.tensor(
            [1 / (len(sequences[row].targets) * len(sequences)) for row in rows.tolist()],
            device=now.device,
        )
        divergence = (before.exp() * (before - now)).sum(dim=-1)
        return (divergence * share).sum()


def _parameters(
    model: Model, trainable: Callable[[str], bool] | None
) -> dict[str, torch.nn.Parameter]:
    """The parameters to train by file name; all others are frozen until ``fine_tune`` ends."""
    everything = dict(model.network.named_parameters(remove_duplicate=False))
    chosen = {
        file: everything[name]
        for file, name in model.names.items()
        if (trainable is None or trainable(file)) and everything[name].is_floating_point()
    }
    if not chosen:
        raise BadSetting("No tensor of this model is chosen for training.")
    model.network.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen
