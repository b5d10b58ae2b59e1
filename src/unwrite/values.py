"""What the network should compute at a subject for the new answer to follow: its *value*.

ROME looks for the output of one MLP, MEMIT for the output of a whole block; the search is the same
(METHODS 6.3 step 5 and 6.4 step 1; Meng et al. 2022, eq. 4; Meng et al. 2023, eq. 16). For every
fact a vector is added at the subject's last token and moved by Adam until the new answer is likely
in several contexts, while what the network says right after the bare subject stays (KL).

All facts are sought at once. That changes no result: they share the passes through the network and
nothing else; each has its own loss, its own steps and its own end. What does not change from step
to step (the blocks below, the tokens before the subject) is computed once, see
``activations.Tail``; vocabulary-wide logits are made only where an answer token is predicted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from unwrite.activations import (
    Mention,
    Tail,
    hidden_of,
    in_rows,
    leaving_after,
    mention,
    mentions,
    subject_alone,
    with_hidden,
)
from unwrite.allocator import freed_memory_is_kept
from unwrite.edits import Edit
from unwrite.errors import BadSetting, TrainingFailed
from unwrite.model import Model
from unwrite.training import neutral_contexts
from unwrite.wordings import thinned

# Rows x length that one step holds activations of: about 0.9 GB on SmolLM2-135M.
POSITIONS_PER_STEP = 768
REWORDINGS_AT_ONCE = 3  # that one evaluation of the loss looks at; the next looks at others
FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.999, 1e-8  # Adam's own defaults


@dataclass(frozen=True)
class Search:
    """How values are sought: the fields that ROME, MEMIT and AlphaEdit have in common.

    ``steps``: at most so many evaluations of the loss, each but the last followed by a step of Adam
    with rate ``lr``. A fact ends early when its loss is below ``stop``. ``clamp``: the added vector
    is at most so many times as long as what stood there. ``kl``: weight of the KL divergence right
    after the bare subject. ``weight_decay``: weight of the length of the added vector.
    ``contexts``: how many neutral sentences stand before the prompt in further copies of it, beside
    the bare one. ``rewordings``: how many copies with words left out (see ``wordings``) the answer
    shall follow from as well, every other one behind a neutral sentence; each evaluation of the
    loss looks at a few of them in turn, and a fact ends early when all have passed. 0 is the
    papers'.

    Lengths are relative to what stood there: ``lr`` is in units of its root mean square, and the
    decay is of |added| / |before|. The papers' absolute numbers had to be chosen anew for every
    model; these mean the same in all.
    """

    steps: int = 20
    lr: float = 0.5
    clamp: float = 4.0
    kl: float = 0.0625
    weight_decay: float = 0.005
    stop: float = 0.1
    contexts: int = 3
    rewordings: int = field(default=0, metadata={"later": True})

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "clamp"):
            if not getattr(self, name) > 0:
                raise BadSetting(f"{name} must be greater than 0, not {getattr(self, name)}.")
        for name in ("kl", "weight_decay", "stop", "contexts", "rewordings"):
            if not getattr(self, name) >= 0:
                raise BadSetting(f"{name} must not be negative, but is {getattr(self, name)}.")

    @property
    def texts_at_once(self) -> int:
        """Texts of a fact that one evaluation of the loss reads: the bare one, those in contexts,
        some rewordings, and the subject alone."""
        return self.contexts + 2 + min(self.rewordings, REWORDINGS_AT_ONCE)

    def mentions(self, model: Model, edits: Sequence[Edit], seed: int = 0) -> list[list[Mention]]:
        """Every edit's prompt bare, in the contexts and in its rewordings (drawn by ``seed``); see
        ``activations.mentions``."""
        sentences = neutral_contexts(self.contexts + self.rewordings // 2)
        found = mentions(model, edits, sentences[: self.contexts])
        before = [""] * self.rewordings
        before[1::2] = sentences[self.contexts :]
        for edit, group in zip(edits, found, strict=True):
            texts = thinned(edit.prompt, edit.subject or "", self.rewordings, seed)
            group += [
                mention(model, Edit(text, edit.new, subject=edit.subject), sentence)
                for text, sentence in zip(texts, before, strict=True)
            ]
        return found


@dataclass(frozen=True)
class Values:
    """What was found, one row a fact. ``before`` is what stood there in the bare prompt.

    ``found``: whether the bare prompt is answered with the new answer, token for token by argmax,
    when the value stands there.
    """

    values: torch.Tensor  # fp32 (facts, width), on the CPU
    before: torch.Tensor  # fp32 (facts, width), on the CPU
    losses: torch.Tensor  # fp32 (facts,): the last that was computed
    steps: torch.Tensor  # int64 (facts,): evaluations of the loss
    found: torch.Tensor  # bool (facts,)

    def __getitem__(self, facts: torch.Tensor) -> Values:
        """Some facts: ``facts`` is a mask or indices."""
        return Values(*(getattr(self, name)[facts] for name in self.__dataclass_fields__))


def find_values(
    model: Model,
    edits: Sequence[Edit],
    texts: Sequence[Sequence[Mention]],
    layer: int,
    where: Literal["mlp", "block"],
    search: Search,
) -> Values:
    """Seek the value of every edit at the output of the MLP or of the block ``layer``.

    ``texts`` are the edits' mentions, the bare one first. The model's weights are only read.
    Memory: activations of ``POSITIONS_PER_STEP`` positions in the blocks from ``layer`` on.
    Raises ``TrainingFailed`` when a loss is no longer a number.
    """
    longest = [max(one.read - one.last for one in group) for group in texts]
    parts: list[tuple[list[int], Values]] = []
    with (
        model.progress.stage("seeking values", len(edits)) as advance,
        frozen(model),
        freed_memory_is_kept(model.largest_tensor),
    ):
        for chunk in _chunks(longest, search.texts_at_once):
            hunt = _Hunt(
                model, [edits[i] for i in chunk], [texts[i] for i in chunk], layer, where, search
            )
            parts.append((chunk, hunt.run()))
            advance(len(chunk), "")
    order = torch.tensor([index for chunk, _ in parts for index in chunk]).argsort()
    joined = (
        torch.cat([getattr(values, name) for _, values in parts])
        for name in Values.__dataclass_fields__
    )
    return Values(*(tensor[order] for tensor in joined))


def _chunks(longest: Sequence[int], rows_per_fact: int) -> Iterator[list[int]]:
    """Facts of similar length, as many at a time as the positions of one step allow."""
    chunk: list[int] = []
    for index in sorted(range(len(longest)), key=lambda i: (longest[i], i)):
        if chunk and (len(chunk) + 1) * rows_per_fact * longest[index] > POSITIONS_PER_STEP:
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Within the block no parameter asks for a gradient: only the values do."""
    asking = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class _Look:
    """Texts of some facts that one evaluation of the loss looks at.

    The tail has a row for every text, a fact's bare one first, and for the subject alone where
    it needs one: a subject that begins its prompt is alone in the bare text already.
    """

    def __init__(
        self,
        model: Model,
        edits: Sequence[Edit],
        texts: Sequence[Sequence[Mention]],
        first_block: int,
    ) -> None:
        self.texts_per_fact = len(texts[0])
        rows: list[Mention] = []
        self.fact_of: list[int] = []  # by row of the tail: place among the active facts
        self.bare: list[int] = []  # by active fact: row of the bare text
        self.alone: list[int] = []  # by active fact: row where nothing stands before the subject
        for fact, (edit, group) in enumerate(zip(edits, texts, strict=True)):
            alone = subject_alone(model, edit)
            begins = group[0].ids[: group[0].last + 1] == alone.ids
            self.bare.append(len(rows))
            rows += group
            self.alone.append(self.bare[-1] if begins else len(rows))
            rows += () if begins else (alone,)
            self.fact_of += [fact] * (len(rows) - len(self.fact_of))
        self.tail = Tail(model, rows, first_block)

    def go_on_with(self, facts: Sequence[int]) -> None:
        """Keep only these of the active facts."""
        place = {old: new for new, old in enumerate(facts)}
        rows = [row for row, fact in enumerate(self.fact_of) if fact in place]
        moved = {old: new for new, old in enumerate(rows)}
        self.tail.keep(rows)
        self.fact_of = [place[self.fact_of[row]] for row in rows]
        self.bare = [moved[self.bare[at]] for at in facts]
        self.alone = [moved[self.alone[at]] for at in facts]


class _Hunt:
    """The search for some facts at once. The bare text and those in contexts are in every look;
    rewordings are shared out among the looks, which take turns."""

    def __init__(
        self,
        model: Model,
        edits: Sequence[Edit],
        texts: Sequence[Sequence[Mention]],
        layer: int,
        where: Literal["mlp", "block"],
        search: Search,
    ) -> None:
        self.model, self.search, self.layer = model, search, layer
        anatomy = model.anatomy
        at_mlp = where == "mlp"
        name = anatomy.mlp_out[layer] if at_mlp else anatomy.blocks[layer]
        self.module = model.network.get_submodule(name)
        always = search.contexts + 1
        # An output of a block enters the next one; that of an MLP is still to be added in its own.
        self.looks = [
            _Look(
                model,
                edits,
                [[*group[:always], *group[first : first + REWORDINGS_AT_ONCE]] for group in texts],
                layer if at_mlp else layer + 1,
            )
            for first in range(always, max(always + 1, len(texts[0])), REWORDINGS_AT_ONCE)
        ]
        self.look = self.looks[0]  # the present one
        self.active = list(range(len(edits)))  # facts still sought
        self.added: torch.Tensor | None = None  # (active, width): what is added at the subject

    def run(self) -> Values:
        """Seek all values; see ``find_values``."""
        search, count = self.search, len(self.active)
        losses, steps = torch.zeros(count), torch.zeros(count, dtype=torch.long)
        found = torch.zeros(count, dtype=torch.bool)
        before = self._before()
        added = torch.zeros_like(before)
        first, second = torch.zeros_like(before), torch.zeros_like(before)
        length = before.norm(dim=1, keepdim=True).clamp(min=1e-30)
        rate = search.lr * length / before.shape[1] ** 0.5
        kept: torch.Tensor | None = None
        passed = torch.zeros(count, dtype=torch.long)  # looks in a row with a loss below ``stop``
        for step in range(1, search.steps + 1):
            self.look = self.looks[(step - 1) % len(self.looks)]
            moving = added[self.active].requires_grad_()
            loss, right, said = self._loss(moving, length[self.active, 0], kept)
            kept = said if kept is None else kept
            now = loss.detach().cpu()
            if not bool(now.isfinite().all()):
                raise TrainingFailed(
                    f"The search for values gave a loss that is no number at step {step}; nothing "
                    f"was changed. Use a smaller lr (now {search.lr})."
                )
            losses[self.active], steps[self.active], found[self.active] = now, step, right
            passed[self.active] = torch.where(now < search.stop, passed[self.active] + 1, 0)
            done = passed[self.active] >= len(self.looks)
            going = [row for row, ended in enumerate(done.tolist()) if not ended]
            if step == search.steps or not going:
                break
            (slope,) = torch.autograd.grad(loss.sum(), moving)
            rows = torch.tensor(going, device=before.device)
            chosen = torch.tensor(self.active, device=before.device)[rows]
            slope = slope[rows]
            first[chosen] = FIRST_DECAY * first[chosen] + (1 - FIRST_DECAY) * slope
            second[chosen] = SECOND_DECAY * second[chosen] + (1 - SECOND_DECAY) * slope**2
            mean = first[chosen] / (1 - FIRST_DECAY**step)
            spread = (second[chosen] / (1 - SECOND_DECAY**step)).sqrt() + EPSILON
            moved = added[chosen] - rate[chosen] * mean / spread
            limit = search.clamp * length[chosen]
            added[chosen] = moved * (
                limit / moved.norm(dim=1, keepdim=True).clamp(min=1e-30)
            ).clamp(max=1.0)
            if len(going) < len(self.active):
                kept = kept[rows]
                self.active = [self.active[at] for at in going]
                for look in self.looks:
                    look.go_on_with(going)
        return Values((before + added).cpu(), before.cpu(), losses, steps, found)

    def _loss(
        self, added: torch.Tensor, length: torch.Tensor, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss of every active fact, whether its bare answer is right, and the log-probabilities
        right after the bare subject: (active,), (active,) bool, (active, vocabulary)."""
        search, look, tail = self.search, self.look, self.look.tail
        device, active = added.device, len(self.active)
        asked = [
            (row, tail.columns[row] + place.answer - 1 - place.last + offset, target)
            for row, place in enumerate(tail.places)
            for offset, target in enumerate(place.targets)
        ]
        rows = torch.tensor([row for row, _, _ in asked] + look.alone)
        columns = torch.tensor(
            [column for _, column, _ in asked] + [tail.columns[row] for row in look.alone]
        )
        targets = torch.tensor([target for _, _, target in asked], device=device)
        self.added = added
        with self._adding():
            logits = tail.logits(rows, columns)
        answers, said = logits[: len(asked)], logits[len(asked) :].log_softmax(dim=-1)

        # A fact's loss is the mean over its texts of the mean over the answer's tokens.
        share = torch.tensor(
            [1 / (len(tail.places[row].targets) * look.texts_per_fact) for row, _, _ in asked],
            device=device,
        )
        fact = torch.tensor([look.fact_of[row] for row, _, _ in asked], device=device)
        nll = torch.nn.functional.cross_entropy(answers, targets, reduction="none")
        loss = added.new_zeros(active).index_add(0, fact, nll * share)
        if kept is not None:  # in the first step nothing is added, and nothing has diverged
            loss = loss + search.kl * (said.exp() * (said - kept)).sum(dim=-1)
        loss = loss + search.weight_decay * added.norm(dim=1) / length

        is_bare = set(look.bare)
        bare = torch.tensor([row in is_bare for row, _, _ in asked], device=device)
        wrong = (answers.detach().argmax(dim=-1) != targets) & bare
        right = added.new_zeros(active).index_add(0, fact, wrong.to(added.dtype)) == 0
        return loss, right.cpu(), said.detach()

    def _before(self) -> torch.Tensor:
        """What stands there now at the subject in the bare prompts: (facts, width)."""
        seen: list[torch.Tensor] = []
        handle = self.module.register_forward_hook(
            lambda _m, _i, output: seen.append(self._at_subjects(hidden_of(output)))
        )
        nowhere = torch.zeros(1, dtype=torch.long)
        try:
            with torch.no_grad(), leaving_after(self.model, self.layer):
                self.look.tail.logits(nowhere, nowhere)
        finally:
            handle.remove()
        return seen[0][self.look.bare].clone()

    def _at_subjects(self, hidden: torch.Tensor) -> torch.Tensor:
        tail = self.look.tail
        hidden = in_rows(hidden, len(tail.places))
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return hidden[rows, torch.tensor(tail.columns, device=hidden.device)]

    @contextlib.contextmanager
    def _adding(self) -> Iterator[None]:
        """Within the block, the module's output has ``added`` at the subject's last token."""

        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            assert self.added is not None
            tail = self.look.tail
            hidden = in_rows(hidden_of(output), len(tail.places)).clone()
            rows = torch.arange(hidden.shape[0], device=hidden.device)
            columns = torch.tensor(tail.columns, device=hidden.device)
            hidden[rows, columns] += self.added[self.look.fact_of]
            return with_hidden(output, hidden)

        handle = self.module.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()


def unfound(edits: Sequence[Edit], values: Values, first: int = 1) -> list[str]:
    """A sentence for each edit without a value; those without an id are counted from ``first``.

    A value that does not make the network answer right where it stands would only do damage, so
    such an edit is not written.
    """
    return [
        f"Edit {edit.id or number} ({edit.prompt[:60]!r} -> {edit.new!r}) was not written: after "
        f"{int(steps)} steps no value was found that gives the new answer (loss {float(loss):.2f})."
        for number, (edit, found, steps, loss) in enumerate(
            zip(edits, values.found, values.steps, values.losses, strict=True), start=first
        )
        if not found
    ]


def say_left_out(model: Model, edits: Sequence[Edit], left_out: Sequence[str]) -> None:
    """Tell people which edits are not written. Raises ``TrainingFailed`` when none would be."""
    if len(left_out) == len(edits):
        raise TrainingFailed(
            f"Nothing was changed, because none of {len(edits)} edits can be written. "
            f"{left_out[0]} Use more steps, a larger clamp, or a lower layer."
        )
    for sentence in left_out:
        model.progress.say(sentence)


def notes(
    record: dict[str, Any], left_out: Sequence[str], how: str, layers: Sequence[int], edits: int
) -> dict[str, Any]:
    """What people should know about a change: sentences, and the figures they are made of."""
    sentences = [
        f"{edits - len(left_out)} of {edits} edits were written into "
        f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}, {how}."
    ]
    if record["covariance"] == "corpus":
        shares = ", ".join(f"{100 * share:.2g} %" for share in record["shrinkage"])
        sentences.append(
            f"Second moments are those of {record['tokens']} tokens of {record['corpus']}, "
            f"with a shrinkage of {shares}."
        )
    sentences += [record["sentence"]] if "sentence" in record else []
    sentences += left_out
    return {"sentences": sentences, "layers": list(layers), "left_out": len(left_out), **record}
