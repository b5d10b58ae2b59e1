"""MEMIT: write many facts at once into the MLPs of several layers (Meng et al. 2023)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from unwrite.activations import (
    Mention,
    Site,
    arriving,
    layer_of,
    mention,
    oriented,
    states,
    weight_name,
)
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import BadEdits, BadSetting, NotWritable
from unwrite.kept import KeptAnswers
from unwrite.model import Model
from unwrite.moments import Metric, Statistics, metrics
from unwrite.neighbours import made_up, neighbours
from unwrite.own_text import own_prompts
from unwrite.refining import Written, refined
from unwrite.trace import strongest_layer
from unwrite.training import learned, new_pairs
from unwrite.values import Search, find_values, notes, say_left_out, unfound

# Rows that read a layer's keys: from keys (facts, width) float64 and a factor of the weight of
# everything else to rows (facts, width) float64, so that the change is residual' @ rows. ``Reader``
# makes one for each layer.
Reader = Callable[[torch.Tensor, float], torch.Tensor]
# What becomes of a change that was written for some edits.
Refinement = Callable[[Sequence[Written], Sequence[Edit]], list[Written]]
HALVINGS = 6  # of the weight of everything else, at most
WORTH_HALVING = 1.05  # times as much of the way must be closed then


@dataclass(frozen=True)
class MEMIT(Search, Statistics):
    """Mass-Editing Memory in a Transformer: one batch of edits, spread over some layers
    (METHODS 6.4).

    For every edit the output z of the last of the ``layers`` is sought from which the new answer
    follows. Then, layer by layer, each MLP gets an equal share of what is still missing, R, by the
    change that does it with least harm to everything else (eq. 14 of the paper; K holds the keys of
    the edits, C the second moment of all keys):

        R K' (preserve C + K K')^-1

    solved as R (preserve I + K' C^-1 K)^-1 K' C^-1, edits x edits instead of width x width. The
    delta's rank is at most the number of edits.

    ``layers``: indices of blocks, fractions of the depth, or "trace" (those up to the layer that a
    causal trace of these edits finds strongest). ``preserve`` is the paper's lambda, the weight of
    everything else beside the edits.

    ``neighbours``: so many made-up neighbours of every edit (see the module ``neighbours``) are to
    stay as well: their keys N count like those of the edits, ``neighbour_weight`` times each, with
    nothing to be changed there. That adds neighbour_weight N N' to preserve C. 0 is the paper's.

    ``closed``: unless all new answers are right, at least this share of the way to the values is to
    be closed; until it is, the weight of everything else, preserve C + neighbour_weight N N', is
    halved, ``HALVINGS`` times at most and as long as that helps (two values for one subject cannot
    both be met). A weight that suits a hundred edits leaves three of them half-written. 0 is the
    paper's.

    ``refine``: so many steps in which what was written is trained as it stands together (see the
    module ``refining``), while the answers to the neighbours and to ``own_prompts`` prompts that
    the model writes itself are to stay. 0 is the paper's. That costs the same however many texts
    there are, so it may be on more rewordings than values are sought for: ``refine_rewordings``.
    """

    layers: Literal["trace"] | tuple[int | float, ...] = (0.14, 0.175, 0.21, 0.245, 0.28)
    preserve: float = 2000.0
    clamp: float = 1.5
    lr: float = 0.2
    neighbours: int = field(default=0, metadata={"later": True})
    neighbour_weight: float = field(default=10.0, metadata={"later": True})
    closed: float = field(default=0.0, metadata={"later": True})
    refine: int = field(default=0, metadata={"later": True})
    refine_rewordings: int = field(default=0, metadata={"later": True})
    own_prompts: int = field(default=0, metadata={"later": True})

    name: ClassVar[str] = "memit"
    paper: ClassVar[str] = "Meng et al. 2023, Mass-Editing Memory in a Transformer (2210.07229)"
    advice: ClassVar[str] = "tens to thousands of facts with subjects, written at once"

    def __post_init__(self) -> None:
        Search.__post_init__(self)
        Statistics.__post_init__(self)
        if not self.preserve > 0:
            raise BadSetting(f"preserve must be greater than 0, not {self.preserve}.")
        if self.neighbours < 0 or not self.neighbour_weight >= 0:
            raise BadSetting("neighbours and neighbour_weight must be at least 0.")
        if not 0 <= self.closed < 1:
            raise BadSetting(f"closed must be at least 0 and less than 1, not {self.closed}.")
        if self.refine < 0 or self.refine_rewordings < 0 or self.own_prompts < 0:
            raise BadSetting("refine, refine_rewordings and own_prompts must be at least 0.")
        if (self.own_prompts or self.refine_rewordings) and not self.refine:
            raise BadSetting(
                "own_prompts and refine_rewordings are for refining only: give refine as well."
            )

    def delta(self, model: Model, edits: Sequence[Edit], protect: Sequence[str] = ()) -> Delta:
        """One low-rank change a layer. Raises ``BadEdits`` for edits without one clear subject,
        ``TrainingFailed`` when no value is found for any, ``NotWritable`` for a network whose
        blocks do not add what their MLPs give. ``protect``: prompts whose answers shall stay as
        well while it refines."""
        texts = self.mentions(model, edits, self.seed)
        layers = layers_of(model, edits, self.layers)

        def readers(
            keys: Callable[[], Sequence[torch.Tensor]],
        ) -> tuple[list[Reader], dict[str, Any]]:
            found, record = metrics(model, layers, keys, self, self._kept(model, edits, layers))
            return [partial(self._read, metric) for metric in found], record

        refinement = self._refinement(model, edits, protect) if self.refine else None
        return spread(model, edits, texts, layers, self, readers, self.closed, refinement)

    def _refinement(
        self, model: Model, edits: Sequence[Edit], protect: Sequence[str]
    ) -> Refinement:
        asked = [(edit.prompt, edit.subject) for edit in edits]
        near = neighbours(asked, self.neighbours, self.seed)
        own = own_prompts(model, self.own_prompts, self.seed)
        taught = {edit.prompt for edit in edits}
        prompts = [one for one in dict.fromkeys((*protect, *near, *own)) if one not in taught]
        kept = KeptAnswers.of(model, prompts) if prompts else None

        every = replace(self, rewordings=max(self.rewordings, self.refine_rewordings))

        def refinement(written: Sequence[Written], edits: Sequence[Edit]) -> list[Written]:
            texts = [text for group in every.mentions(model, edits, self.seed) for text in group]
            return refined(
                model, written, texts, kept, steps=self.refine, stop=self.stop, seed=self.seed
            )

        return refinement

    def _read(self, metric: Metric, keys: torch.Tensor, ease: float) -> torch.Tensor:
        read = metric.divide(keys)
        return solve(keys @ read.T, read, self.preserve * ease)

    def _kept(
        self, model: Model, edits: Sequence[Edit], layers: Sequence[int]
    ) -> list[torch.Tensor] | None:
        """What the neighbours' keys add to C: float64 (width, width) a layer; None without any."""
        asked = [(edit.prompt, edit.subject) for edit in edits]
        places = []
        for prompt, subject in made_up(asked, self.neighbours, self.seed):
            with contextlib.suppress(BadEdits):  # a subject that ends where the answer begins
                places.append(mention(model, Edit(prompt, edits[0].new, subject=subject)))
        if not places:
            return None
        sites: list[Site] = [(model.anatomy.mlp_out[layer], "in") for layer in layers]
        keys = [rows.double() for rows in states(model, places, sites)]
        return [self.neighbour_weight / self.preserve * (rows.T @ rows).cpu() for rows in keys]


def layers_of(
    model: Model, edits: Sequence[Edit], layers: Literal["trace"] | tuple[int | float, ...]
) -> list[int]:
    """Indices of the blocks meant, ascending, each once."""
    if layers == "trace":
        last = strongest_layer(model, edits)
        count = max(1, round(model.anatomy.depth / 6))
        return list(range(max(0, last - count + 1), last + 1))
    if not layers:
        raise BadSetting("layers is empty; name at least one.")
    return sorted({layer_of(model, layer, "layers") for layer in layers})


def spread(
    model: Model,
    edits: Sequence[Edit],
    texts: Sequence[Sequence[Mention]],
    layers: Sequence[int],
    search: Search,
    readers: Callable[[Callable[[], Sequence[torch.Tensor]]], tuple[list[Reader], dict[str, Any]]],
    closed: float = 0.0,
    refinement: Refinement | None = None,
) -> Delta:
    """Seek the edits' values at the last layer and close the gap to them layer by layer, and again
    with half the weight for everything else until all answers are right or the share ``closed`` of
    the gap is; then ``refinement``, if one is given.

    Raises ``NotWritable`` for a network whose blocks do not add what their MLPs give.
    ``readers`` makes a `Reader` a layer (from the edits' keys there, if it asks for them) and a
    record for the notes. The notes hold, under ``gap``, the mean distance to the values before and
    after every layer, as a share of the first, and under ``ease`` what is left of the weight.
    """
    shares = _arriving(model, layers, texts[0][0])
    values = find_values(model, edits, texts, layers[-1], "block", search)
    left_out = unfound(edits, values)
    say_left_out(model, edits, left_out)
    chosen = values[values.found]
    kept = values.found.tolist()
    groups = [group for group, keep in zip(texts, kept, strict=True) if keep]
    taught = new_pairs([edit for edit, keep in zip(edits, kept, strict=True) if keep])
    everything = [mention for group in groups for mention in group]
    bare = [group[0] for group in groups]
    sites: list[Site] = [(model.anatomy.mlp_out[layer], "in") for layer in layers]
    top: Site = (model.anatomy.blocks[layers[-1]], "out")

    def keys_of(rows: torch.Tensor) -> torch.Tensor:
        """Mean of the bare key and the mean of those in contexts: (facts, width), float64."""
        grouped = rows.double().view(len(groups), -1, rows.shape[1])
        if grouped.shape[1] == 1:
            return grouped[:, 0]
        return (grouped[:, 0] + grouped[:, 1:].mean(dim=1)) / 2

    def written(ease: float) -> tuple[list[Written], list[float]]:
        """What is added where, and the gap before and after every layer."""
        parts: list[Written] = []
        gaps = []
        for number, (layer, solve) in enumerate(zip(layers, solvers, strict=True)):
            with model.shifted(as_delta(model, parts)):
                (rows,) = states(model, everything, [sites[number]])
                (now,) = states(model, bare, [top])
            gap = (chosen.values - now).double()
            gaps.append(float(gap.norm(dim=1).mean()))
            share = gap / (len(layers) - number) / shares[number]
            read = solve(keys_of(rows), ease)
            parts.append(Written(model.anatomy.mlp_out[layer], share.T, read))
        with model.shifted(as_delta(model, parts)):
            (now,) = states(model, bare, [top])
        gaps.append(float((chosen.values - now).norm(dim=1).mean()))
        return parts, [round(gap / gaps[0], 4) if gaps[0] else 0.0 for gap in gaps]

    def right(parts: Sequence[Written]) -> bool:
        with model.shifted(as_delta(model, parts)):
            return all(learned(model, taught))

    solvers, record = readers(lambda: [keys_of(rows) for rows in states(model, everything, sites)])
    ease, (parts, gaps) = 1.0, written(1.0)
    while gaps[-1] > 1 - closed and ease > 0.5**HALVINGS and not right(parts):
        more, further = written(ease / 2)
        if 1 - further[-1] < WORTH_HALVING * (1 - gaps[-1]):
            break
        ease, parts, gaps = ease / 2, more, further
    if refinement is not None:
        parts = refinement(parts, [edit for edit, keep in zip(edits, kept, strict=True) if keep])
    about = notes(record, left_out, "all at once", layers, len(edits))
    halved = f", with {ease:g} of the weight for everything else" if ease < 1 else ""
    about["sentences"].append(
        f"{100 * (1 - gaps[-1]):.0f} % of the way to the values sought was closed{halved}; a "
        "smaller weight for everything else closes more."
    )
    if closed:
        about["ease"] = ease
    if refinement is not None:
        about["sentences"].append("What was written was then refined as it stands together.")
    return as_delta(model, parts, {"notes": about | {"gap": gaps}})


def as_delta(
    model: Model, parts: Sequence[Written], provenance: Mapping[str, Any] | None = None
) -> Delta:
    """The low-rank changes of the weights that give what was written."""
    changes = {
        weight_name(model, one.module): oriented(model, one.module, one.added, one.read)
        for one in parts
    }
    return Delta.from_changes(changes, provenance)


def _arriving(model: Model, layers: Sequence[int], place: Mention) -> list[float]:
    """``arriving`` for every layer. Raises ``NotWritable`` where it is unknown."""
    shares = []
    for layer in layers:
        share = arriving(model, layer, place)
        if share is None:
            raise NotWritable(
                f"In this model a norm stands between an MLP and what its block gives (block "
                f"{layer}), so what is written there does not arrive as it was meant. Use a method "
                "that trains, such as full-ft, or rome, which seeks its value before the norm."
            )
        shares.append(share)
    return shares


def solve(gram: torch.Tensor, read: torch.Tensor, weight: float) -> torch.Tensor:
    """(weight I + gram)^-1 read by Cholesky, float64; gram (facts, facts) is symmetric.

    Two edits of one subject have the same key; ``weight`` keeps the system regular, and where it is
    too small for that, the least-squares answer is taken.
    """
    system = (gram + gram.T) / 2
    system.diagonal().add_(weight)
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal()
    if failed or float(pivots.min() / pivots.max()) ** 2 < 1e-13:
        return torch.linalg.pinv(system, hermitian=True, rtol=1e-12) @ read
    return torch.cholesky_solve(read, factor)
