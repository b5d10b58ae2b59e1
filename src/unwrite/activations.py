"""Where a text mentions its subject, and what the network computes there.

ROME, MEMIT and their kin read and write at one place: the last token of the subject. ``mentions``
finds it by character span, so it is right for every tokenizer (leading spaces, a begin-of-text
token, byte-level or sentencepiece tokens); ``states`` reads the network there; ``Tail`` runs the
network again and again from there on, with everything before and below computed once.

Nothing here knows a layer by name: hooks are set where ``Anatomy`` says.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache

from unwrite.change import LowRank
from unwrite.edits import Edit, check_subjects
from unwrite.errors import BadEdits, BadSetting
from unwrite.model import Model, head_sees, length_batches

FAULTS_SHOWN = 20
# Kinds of layers whose past is fully told by keys and values, so that it can be computed once.
ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
AS_GIVEN = 0.05  # relative error up to which a response is a multiple of what was given (bf16)

Side = Literal["in", "out"]
Site = tuple[str, Side]  # a module by name, and whether its input or its output is meant


# ---- where the subject is ------------------------------------------------------------------------


@dataclass(frozen=True)
class Mention:
    """A text as token ids that mentions a subject: ``ids[last]`` is the subject's last token, and
    ``ids[answer:]`` are the tokens of the answer (none where the text ends with the subject)."""

    ids: tuple[int, ...]
    last: int
    answer: int

    @property
    def read(self) -> int:
        """How many tokens the network has to read: nothing follows the answer's last token."""
        return len(self.ids) - bool(self.targets)

    @property
    def targets(self) -> tuple[int, ...]:
        """Token ids of the answer."""
        return self.ids[self.answer :]


def subject_end(prompt: str, subject: str) -> int:
    """Index of the character after the subject in the prompt.

    An occurrence that is a word of its own goes before one inside a longer word ("Iran" before
    "Iranian"). Raises ``BadEdits`` if there is none, or more than one of the better kind.
    """
    subject = subject.strip()
    spots = [found.span() for found in re.finditer(re.escape(subject), prompt)]
    words = [
        (start, end)
        for start, end in spots
        if not prompt[start - 1 : start].isalnum() and not prompt[end : end + 1].isalnum()
    ]
    found = words or spots
    if not found or not subject:
        raise BadEdits(f"The subject {subject!r} does not stand in the prompt {prompt[:80]!r}.")
    if len(found) > 1:
        raise BadEdits(
            f"The subject {subject!r} stands {len(found)} times in the prompt {prompt[:80]!r}, and "
            "only one place can be edited; reword the prompt."
        )
    return found[0][1]


def subject_tokens(model: Model, edit: Edit) -> tuple[int, int]:
    """First and last token of the subject in the bare prompt. Raises as ``mention`` does."""
    found = mention(model, edit)
    start = subject_end(edit.prompt, edit.subject or "") - len((edit.subject or "").strip())
    return _token_at(model, edit.prompt, found.ids, start + 1), found.last


def mention(model: Model, edit: Edit, context: str = "") -> Mention:
    """The edit's prompt with its new answer as tokens, behind ``context`` and a space if given.

    Raises ``BadEdits`` when the subject is missing, stands twice, or shares its last token with the
    answer.
    """
    end = subject_end(edit.prompt, edit.subject or "")
    lead = f"{context} " if context else ""
    tokens = model.tokens(lead + edit.prompt, edit.new)
    last = _token_at(model, lead + edit.prompt, tokens.ids, len(lead) + end)
    if last >= tokens.answer:
        raise BadEdits(
            f"The last token of the subject {edit.subject!r} reaches across the end of the prompt "
            f"{edit.prompt[:80]!r} into the answer {edit.new!r}; end the prompt with another word."
        )
    return Mention(tokens.ids, last, tokens.answer)


def mentions(
    model: Model, edits: Sequence[Edit], contexts: Sequence[str] = ()
) -> list[list[Mention]]:
    """For each edit its mentions: the bare prompt first, then one behind each of ``contexts``.

    Raises one ``BadEdits`` that lists every edit in which no single place can be found.
    """
    if not edits:
        raise BadEdits("There is nothing to edit: the list of edits is empty.")
    check_subjects(edits)
    found: list[list[Mention]] = []
    faults: list[str] = []
    for position, edit in enumerate(edits, start=1):
        try:
            found.append([mention(model, edit, context) for context in ("", *contexts)])
        except BadEdits as fault:
            faults.append(f"edit {edit.id or position}: {fault}")
    if faults:
        more = f" And {len(faults) - FAULTS_SHOWN} more." if len(faults) > FAULTS_SHOWN else ""
        raise BadEdits(
            f"{len(faults)} of {len(edits)} edits have no single subject to edit at. "
            f"{' '.join(faults[:FAULTS_SHOWN])}{more}"
        )
    return found


def subject_alone(model: Model, edit: Edit, frame: str = "{} is a") -> Mention:
    """The subject at the head of a text of its own, ended with the subject's last token.

    ``frame`` decides how the subject is tokenised: as a word that is followed by others.
    """
    subject = (edit.subject or "").strip()
    text = frame.format(subject)
    ids = tuple(model.tokenizer(text)["input_ids"])
    last = _token_at(model, text, ids, frame.index("{}") + len(subject))
    return Mention(ids[: last + 1], last, last + 1)


def _token_at(model: Model, text: str, ids: Sequence[int], end: int) -> int:
    """Index of the token that holds the character before ``end`` of the text that ``ids`` begin
    with. Of several tokens for one character (bytes), the last."""
    if model.tokenizer.is_fast:
        offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        covering = [i for i, (first, after) in enumerate(offsets) if first < end <= after]
        if covering:
            # Only the last token may differ when an answer follows: then it begins there as well.
            return covering[-1]
    wanted = text[:end].split()
    for count in range(1, len(ids) + 1):
        shown = model.tokenizer.decode(ids[:count], skip_special_tokens=True)
        if len("".join(shown.split())) >= len("".join(wanted)):
            return count - 1
    raise BadEdits(f"No token of {text[:80]!r} holds the end of its subject.")


# ---- what the network computes there -------------------------------------------------------------


@torch.no_grad()
def states(model: Model, places: Sequence[Mention], sites: Sequence[Site]) -> list[torch.Tensor]:
    """Activations at the subject's last token: for each site fp32 (places, width), on the CPU.

    Texts are cut after the subject's last token and the network is left after the last block that
    a site lies in, so the cost is that of the blocks up to there.
    """
    found: list[torch.Tensor | None] = [None] * len(sites)
    last_block = max(model.anatomy.block_of(name) or 0 for name, _ in sites)
    for batch in length_batches([place.last + 1 for place in places]):
        chosen = [places[index] for index in batch]
        lasts = torch.tensor([place.last for place in chosen])
        ids = torch.zeros((len(chosen), int(lasts.max()) + 1), dtype=torch.long)
        for row, place in enumerate(chosen):
            ids[row, : place.last + 1] = torch.tensor(place.ids[: place.last + 1])

        def keep(
            number: int, hidden: torch.Tensor, batch: list[int] = batch, at: torch.Tensor = lasts
        ) -> None:
            picked = (
                in_rows(hidden, len(batch))[torch.arange(len(batch)), at.to(hidden.device)]
                .float()
                .cpu()
            )
            if found[number] is None:
                found[number] = picked.new_empty((len(places), picked.shape[1]))
            whole = found[number]
            assert whole is not None
            whole[batch] = picked

        with watching(model, sites, keep), leaving_after(model, last_block):
            model.network(input_ids=ids.to(model.device), use_cache=False)
    return [tensor for tensor in found if tensor is not None]


@torch.no_grad()
def arriving(model: Model, layer: int, place: Mention) -> float | None:
    """By how much the output of a block moves when that of its MLP's projection is moved by one.

    1 where blocks add it as it is, or the factor by which they multiply it (Granite). None where
    the one does not follow the other in proportion, because a norm stands between (Gemma 2 and 3,
    OPT-350m): what is written there does not arrive as it was meant. Found by moving it at a place,
    by what the block gives there and by twice as much: two passes beside that of the state as it
    is, up to the block.
    """
    still = _block_output(model, layer, place, torch.zeros(()))
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(still.shape, generator=draw)
    given *= still.norm() / given.norm()
    moved = [(_block_output(model, layer, place, n * given) - still) / n for n in (1, 2)]
    share = float(moved[0] @ given / (given @ given))
    off = max(float((one - share * given).norm() / given.norm()) for one in moved)
    if not off <= AS_GIVEN * abs(share):  # a not-a-number is off as well
        return None
    return 1.0 if abs(share - 1) <= AS_GIVEN else share


def _block_output(model: Model, layer: int, place: Mention, push: torch.Tensor) -> torch.Tensor:
    """What a block gives at a place, fp32 (width,) on the CPU, with ``push`` (width,) or () added
    to the output of its MLP's projection there."""
    seen: list[torch.Tensor] = []

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = in_rows(hidden_of(output), 1).clone()
        hidden[:, -1] += push.to(hidden)
        return with_hidden(output, hidden)

    def keep(_number: int, hidden: torch.Tensor) -> None:
        seen.append(in_rows(hidden, 1)[0, -1].float().cpu())

    ids = torch.tensor([place.ids[: place.last + 1]], device=model.device)
    projection = model.network.get_submodule(model.anatomy.mlp_out[layer])
    handle = projection.register_forward_hook(add)
    try:
        with (
            watching(model, [(model.anatomy.blocks[layer], "out")], keep),
            leaving_after(model, layer),
        ):
            model.network(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@contextlib.contextmanager
def watching(
    model: Model, sites: Sequence[Site], see: Callable[[int, torch.Tensor], None]
) -> Iterator[None]:
    """Within the block, ``see(number of the site, hidden states)`` is called in every pass."""
    handles = []
    for number, (name, side) in enumerate(sites):
        module = model.network.get_submodule(name)
        if side == "in":
            handles.append(
                module.register_forward_pre_hook(lambda _m, inputs, n=number: see(n, inputs[0]))
            )
        else:
            handles.append(
                module.register_forward_hook(
                    lambda _m, _inputs, output, n=number: see(n, hidden_of(output))
                )
            )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def leaving_after(model: Model, block: int) -> Iterator[None]:
    """Within the block, a forward pass ends after decoder block ``block``; what follows it in the
    ``with`` block is not run either, so call the network last."""

    def leave(*_: Any) -> None:
        raise _Left

    handle = model.network.get_submodule(model.anatomy.blocks[block]).register_forward_hook(leave)
    try:
        with contextlib.suppress(_Left):
            yield
    finally:
        handle.remove()


class _Left(Exception):
    """The forward pass has gone as far as it needs to."""


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a module returned: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def in_rows(hidden: torch.Tensor, rows: int) -> torch.Tensor:
    """Hidden states as (rows, length, width); OPT runs its MLPs on all positions in one row."""
    return hidden.view(rows, -1, hidden.shape[-1])


def with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    """What a module returned, with other hidden states (in whatever shape it had them)."""
    hidden = hidden.view(hidden_of(output).shape)
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextlib.contextmanager
def skipping(
    model: Model, first: int, hidden: torch.Tensor | None, in_tuple: bool
) -> Iterator[None]:
    """Within the block, the blocks below ``first`` give ``hidden`` at once (in a tuple if asked).

    Their ``forward`` is shadowed on the module, so that everything else the network looks up on
    them stays, and so that hooks on them fire as always.
    """

    def given(*_: Any, **__: Any) -> Any:
        return (hidden,) if in_tuple else hidden

    blocks = [model.network.get_submodule(name) for name in model.anatomy.blocks[:first]]
    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = given
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward", None)
            if forward is not None:
                vars(block)["forward"] = forward


class _Past(DynamicCache):
    """Keys and values of the tokens before; once ``complete``, a pass reads it and adds nothing."""

    complete = False

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *more: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.complete:
            return super().update(key_states, value_states, layer_idx, *more, **named)
        layer: Any = self.layers[layer_idx]
        return (
            torch.cat([layer.keys, key_states], dim=-2),
            torch.cat([layer.values, value_states], dim=-2),
        )


class Tail:
    """Texts from their subject's last token on, run through the blocks from ``first`` on.

    Whatever is written at the subject's last token in block ``first`` or above, the tokens before
    it and the blocks below do not notice (causality). So the tokens before are run once and their
    keys and values kept; the blocks below ``first`` are run once and their output kept. In
    ``logits`` the subject's last token is column 0 of every row.

    ``first`` may be the depth: then only the final norm and the head are run. Memory: keys and
    values of the tokens before, and rows x longest rest x width of hidden states, all fp32.
    """

    @torch.no_grad()
    def __init__(self, model: Model, places: Sequence[Mention], first: int) -> None:
        self.model, self.first = model, first
        self.places = list(places)
        starts = [place.last if _past_can_be_kept(model) else 0 for place in places]
        self.columns = [place.last - start for place, start in zip(places, starts, strict=True)]
        before = max(starts)
        after = max(place.read - start for place, start in zip(places, starts, strict=True))
        head = torch.zeros((len(places), before), dtype=torch.long)
        rest = torch.zeros((len(places), after), dtype=torch.long)
        mask = torch.zeros((len(places), before + after), dtype=torch.long)
        for row, (place, start) in enumerate(zip(places, starts, strict=True)):
            head[row, before - start :] = torch.tensor(place.ids[:start], dtype=torch.long)
            rest[row, : place.read - start] = torch.tensor(place.ids[start : place.read])
            mask[row, before - start : before + place.read - start] = 1
        device = model.device
        self.rest, self.mask = rest.to(device), mask.to(device)
        self.positions = (self.mask.cumsum(dim=1) - 1).clamp(min=0)
        self.past = self._read(head.to(device)) if before else None
        self.hidden, self._in_tuple = self._run_below()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        there = torch.tensor(list(rows), device=self.rest.device)
        self.places = [self.places[row] for row in rows]
        self.columns = [self.columns[row] for row in rows]
        self.rest, self.mask = self.rest[there], self.mask[there]
        self.positions = self.positions[there]
        if self.past is not None:
            self.past.batch_select_indices(there)
        if self.hidden is not None:
            self.hidden = self.hidden[there]

    def logits(self, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Logits at chosen rows and columns (n,): (n, vocabulary), fp32, under autograd."""
        with (
            head_sees(self.model.network, rows, columns),
            skipping(self.model, self.first, self.hidden, self._in_tuple),
        ):
            output = self.model.network(**self._inputs())
        return output.logits[0].float()

    def _inputs(self) -> dict[str, Any]:
        before = self.mask.shape[1] - self.rest.shape[1]
        inputs: dict[str, Any] = {"input_ids": self.rest, "use_cache": False}
        if self.past is not None:
            inputs |= {"past_key_values": self.past, "use_cache": True}
        if before:
            inputs["attention_mask"] = self.mask
            if _takes_positions(self.model):
                inputs["position_ids"] = self.positions[:, before:]
        return inputs

    def _read(self, head: torch.Tensor) -> _Past:
        """Run the tokens before the subject's last, padded on the left."""
        past = _Past()
        length = head.shape[1]
        inputs = {"input_ids": head, "attention_mask": self.mask[:, :length]}
        if _takes_positions(self.model):
            inputs["position_ids"] = self.positions[:, :length]
        nowhere = torch.zeros(1, dtype=torch.long)
        with head_sees(self.model.network, nowhere, nowhere):
            self.model.network(**inputs, past_key_values=past, use_cache=True)
        past.complete = True
        return past

    def _run_below(self) -> tuple[torch.Tensor | None, bool]:
        """Output of the block below ``first``, and whether blocks return it in a tuple."""
        if self.first == 0:
            return None, False
        kept: list[Any] = []
        block = self.model.network.get_submodule(self.model.anatomy.blocks[self.first - 1])
        handle = block.register_forward_hook(lambda _m, _i, output: kept.append(output))
        try:
            with leaving_after(self.model, self.first - 1):
                self.model.network(**self._inputs())
        finally:
            handle.remove()
        return hidden_of(kept[0]), isinstance(kept[0], tuple)


def _past_can_be_kept(model: Model) -> bool:
    """Do keys and values tell all of the past? Not in networks with recurrent layers."""
    kinds = getattr(model.network.config.get_text_config(), "layer_types", None)
    return kinds is None or set(kinds) <= ATTENTION_KINDS


def _takes_positions(model: Model) -> bool:
    """Networks with ALiBi (BLOOM, MPT) compute positions from the mask and take no ids."""
    return "position_ids" in inspect.signature(model.network.forward).parameters


# ---- where to write ------------------------------------------------------------------------------


def layer_of(model: Model, layer: int | float, field: str = "layer") -> int:
    """Index of the block meant: a whole number is the index itself, a fraction one of the depth.

    Raises ``BadSetting`` for a block that the model does not have.
    """
    if isinstance(layer, float):
        return model.anatomy.layer_at(layer)
    if not 0 <= layer < model.anatomy.depth:
        raise BadSetting(
            f"{field}={layer} names a block that {model.source.name} does not have: its blocks are "
            f"0 to {model.anatomy.depth - 1} (a fraction of the depth, such as 0.2, works for "
            "every model)."
        )
    return layer


def weight_name(model: Model, module: str) -> str:
    """The name in the checkpoint file of the weight of a module."""
    parameter = f"{module}.weight"
    return next(file for file, name in model.names.items() if name == parameter)


def oriented(model: Model, module: str, columns: torch.Tensor, rows: torch.Tensor) -> LowRank:
    """``columns @ rows`` as a change of a projection's weight in the orientation of its file.

    ``columns`` (out, rank) and ``rows`` (rank, in) are for a weight stored as (out, in); GPT-2
    stores (in, out). fp32. Where the rank would exceed the output's width, ``columns`` becomes the
    identity: the same product with fewer numbers.
    """
    if columns.shape[1] > columns.shape[0]:
        rows, columns = columns @ rows, torch.eye(columns.shape[0], dtype=columns.dtype)
    if model.anatomy.transposed(module):
        columns, rows = rows.T, columns.T
    return LowRank(columns.float().contiguous(), rows.float().contiguous())
