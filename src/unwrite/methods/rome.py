"""ROME: write one fact as one key-value pair into one MLP (Meng et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from unwrite.activations import Mention, layer_of, oriented, states, weight_name
from unwrite.change import LowRank
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import TrainingFailed
from unwrite.model import Model
from unwrite.moments import Metric, Statistics, metrics
from unwrite.trace import strongest_layer
from unwrite.values import Search, Values, find_values, notes, say_left_out, unfound


@dataclass(frozen=True)
class ROME(Search, Statistics):
    """Rank-One Model Editing, one edit after the other (METHODS 6.3).

    The MLP of one layer is taken for a memory: its output projection W answers the key of the
    subject with a value. ROME finds the value v* for which the new answer follows, and writes it
    with the smallest change, measured by the second moment C of all keys (eq. 2 of the paper):

        W + (v* - W k) (C^-1 k)' / ((C^-1 k)' k)

    so that W k = v* afterwards. Edits are applied one after the other: each is sought in the model
    that holds those before it, so time grows with their number and later edits may wear down
    earlier ones; MEMIT writes many at once. The delta has rank one an edit.

    ``layer``: index of the block, a fraction of the depth, or "trace" (the layer that a causal
    trace of these edits finds strongest).
    """

    layer: int | float | Literal["trace"] = 0.17

    name: ClassVar[str] = "rome"
    paper: ClassVar[str] = (
        "Meng et al. 2022, Locating and Editing Factual Associations (2202.05262)"
    )
    advice: ClassVar[str] = "one fact with a clear subject, and next to nothing else may move"

    def __post_init__(self) -> None:
        Search.__post_init__(self)
        Statistics.__post_init__(self)

    def delta(self, model: Model, edits: Sequence[Edit]) -> Delta:
        """One rank-one change an edit, summed. Raises ``BadEdits`` for edits without one clear
        subject, ``TrainingFailed`` when no value is found for any."""
        texts = self.mentions(model, edits, self.seed)
        layer = (
            strongest_layer(model, edits) if self.layer == "trace" else layer_of(model, self.layer)
        )
        module = model.anatomy.mlp_out[layer]
        bare = [group[0] for group in texts]
        (metric,), record = metrics(
            model, [layer], lambda: states(model, bare, [(module, "in")]), self
        )
        total = Delta.nothing()
        left_out: list[str] = []
        for number, (edit, group) in enumerate(zip(edits, texts, strict=True), start=1):
            with model.shifted(total):
                values = find_values(model, [edit], [group], layer, "mlp", self)
                if missing := unfound([edit], values, number):
                    left_out += missing
                    continue
                change = self._write(model, edit, group, values, layer, metric)
            total = (total + Delta.from_changes(change)).in_memory()
        say_left_out(model, edits, left_out)
        about = notes(record, left_out, "one after the other", [layer], len(edits))
        return Delta.from_changes({name: total[name] for name in total}, {"notes": about})

    def _write(
        self,
        model: Model,
        edit: Edit,
        group: Sequence[Mention],
        values: Values,
        layer: int,
        metric: Metric,
    ) -> dict[str, LowRank]:
        """The rank-one change that writes one edit into the model as it is now."""
        module = model.anatomy.mlp_out[layer]
        (keys,) = states(model, group, [(module, "in")])
        key, read = keys[:1].double(), metric.divide(keys.double().mean(dim=0, keepdim=True))
        gain = (values.values - values.before).double()
        along = float((read * key).sum())
        # The mean key of the contexts must not be nearly at right angles to that of the prompt.
        if abs(along) < 1e-6 * float(read.norm() * key.norm()):
            raise TrainingFailed(
                f"The subject {edit.subject!r} is read so differently in its contexts that it "
                "cannot be written by one key; use contexts=0 or another layer."
            )
        return {
            weight_name(model, module): oriented(model, module, gain.T, read / along),
        }
