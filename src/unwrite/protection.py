"""Protected prompts: what an update would do to them, which of them need protection, and the truth.

What counts is the answer that the model gives before: its first tokens, up to the number that
training can hold fast. By how much the model prefers it to anything else is its *margin*
(``measure_margins``); the answer changes exactly when an update takes off more than that.

1. The update is *probed*: trained with a tenth of its epochs and no protection.
2. A few prompts are observed on the probe, D-optimally chosen where past updates say which tell
   most, else evenly spread over the margins. Their losses are grown to the length of the whole
   update.
3. The rest is forecast by a completion model of the home's own forgetting matrix (past updates x
   prompts) or, while that is too small, by the mean of what was observed.
4. Prompts with a chance of ``ENDANGERED`` or more to change are protected while training; the
   others are not.

After the update every prompt is measured. What was not protected is a new row of the matrix, which
is read from the records of the updates: it needs no file of its own, and undoing keeps it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from unwrite.edits import Edit
from unwrite.errors import BadSetting, TrainingFailed
from unwrite.forgetting.completion import Prediction, probability_above
from unwrite.forgetting.design import d_optimal
from unwrite.forgetting.examples import UpstreamExample
from unwrite.forgetting.factorization import Factorization
from unwrite.forgetting.matrix import Array, ForgettingMatrix
from unwrite.forgetting.measurement import measure_margins
from unwrite.kept import ANSWER_TOKENS_KEPT
from unwrite.methods import fields_named, parts_of, replaced, settings_of
from unwrite.model import Model
from unwrite.prompts import Protected
from unwrite.training import share_left

PROBE = 0.1  # of the epochs of the planned update
OBSERVED = 30  # prompts that are measured on the probe (METHODS 5.4)
PAST = 3  # updates that observed half of the prompts or more: enough for a completion model
ENDANGERED = 0.1  # chance to change from which on a prompt is protected
NAMED = 20  # of the endangered, in a sentence for people at most
UNSURE = 0.5  # relative error of a growth of which nothing is known
COMPLETION, SIMPLE = "factorization", "mean of the observed"


@dataclass(frozen=True, eq=False)
class Watched:
    """Prompts with the answers that the model gives now, and by how much it prefers them.

    ``examples`` and ``margins`` (examples,) leave out the prompts in ``unknown``: those whose
    answer is empty, or is not given again when it is read token by token.
    """

    prompts: tuple[Protected, ...]
    examples: tuple[UpstreamExample, ...]
    margins: Array
    unknown: tuple[Protected, ...]

    @classmethod
    def of(cls, model: Model, protect: Sequence[Protected]) -> Watched:
        """Ask the model. Raises ``BadEdits`` for a prompt that it cannot read."""
        said = model.generate([one.prompt for one in protect], ANSWER_TOKENS_KEPT)
        answered = [
            (one, UpstreamExample(f"{one.prompt} → {text.strip()}", one.prompt, text))
            for one, text in zip(protect, said, strict=True)
            if text.strip()
        ]
        margins = measure_margins(model, [example for _, example in answered])
        sure = [at for at, margin in enumerate(margins) if margin > 0]
        kept = tuple(answered[at][0] for at in sure)
        firm = set(kept)
        unknown = tuple(one for one in protect if one not in firm)
        return cls(kept, tuple(answered[at][1] for at in sure), margins[sure], unknown)

    def losses(self, model: Model, at: Sequence[int] | None = None) -> Array:
        """What the margins have lost in the model as it is now, (examples,); NaN elsewhere than
        ``at``. Raises ``TrainingFailed`` where the model gives no number."""
        positions = list(range(len(self.examples)) if at is None else at)
        row = np.full(len(self.examples), np.nan)
        now = measure_margins(model, [self.examples[position] for position in positions])
        if np.isnan(now).any():
            raise TrainingFailed(
                "The weights no longer give numbers on the protected prompts; nothing was kept. "
                "Use a smaller lr."
            )
        row[positions] = self.margins[positions] - now
        return row


class Growth(NamedTuple):
    """From losses on a probe to those in the end: ``times`` as much, give or take ``std`` for all
    prompts together and ``scatter`` (loss of margin) for each by itself; None if unknown."""

    times: float
    std: float
    scatter: float | None


@dataclass(frozen=True, eq=False)
class History:
    """What past updates did to prompts that they did not protect. ``matrix``: updates x prompts,
    loss of margin; ``growths``: by method, times and scatter of every update."""

    matrix: ForgettingMatrix
    growths: Mapping[str, Sequence[tuple[float, float]]]

    @classmethod
    def of(
        cls,
        updates: Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]],
        provenance: Mapping[str, Any] | None = None,
    ) -> History:
        """From (id, details with the ``method``, record as of ``Outlook.as_json``), oldest first.
        What was protected counts as unobserved: how it would have fared is not known."""
        rows: dict[str, dict[str, float]] = {}
        details: dict[str, Mapping[str, Any]] = {}
        examples: dict[str, dict[str, Any]] = {}
        growths: dict[str, list[tuple[float, float]]] = {}
        for update, facts, record in updates:
            free = [one for one in record["prompts"] if not one["protected"]]
            rows[update] = {one["example"]: one["lost"] for one in free}
            details[update] = facts
            for one in record["prompts"]:
                examples[one["example"]] = {"prompt": one["prompt"], "answer": one["answer"]}
            growth = _growth_met(free)
            if growth is not None:
                growths.setdefault(str(facts["method"]), []).append(growth)
        values = [[row.get(name, np.nan) for name in examples] for row in rows.values()]
        matrix = ForgettingMatrix(
            np.array(values).reshape(len(rows), len(examples)),
            tuple(rows),
            tuple(examples),
            {"quantity": "margin", **(provenance or {})},
            details,
            examples,
        )
        return cls(matrix, growths)

    def about(self, watched: Watched) -> ForgettingMatrix | None:
        """The past of these very prompts and answers; None unless ``PAST`` updates observed half of
        them or more."""
        at = {name: position for position, name in enumerate(self.matrix.examples)}
        columns = [at.get(one.name) for one in watched.examples]
        values = np.full((len(self.matrix.tasks), len(columns)), np.nan)
        for column, position in enumerate(columns):
            if position is not None:
                values[:, column] = self.matrix.values[:, position]
        if not columns:
            return None
        rows = np.flatnonzero((~np.isnan(values)).mean(axis=1) >= 0.5)
        if len(rows) < PAST:
            return None
        tasks = tuple(self.matrix.tasks[row] for row in rows)
        return ForgettingMatrix(values[rows], tasks, tuple(map(str, range(len(columns)))))

    def growth(self, method: Any) -> Growth:
        """How much more the whole update will take than the probe: as past updates by this method
        had it, or in proportion to the epochs."""
        met = np.array(self.growths.get(str(settings_of(method)["name"]), ())).reshape(-1, 2)
        if not len(met) or not met[:, 0].mean() > 0:
            ratio = _length(method) / _length(probe_of(method))
            return Growth(ratio, UNSURE * ratio, None)
        mean = float(met[:, 0].mean())
        spread = float(met[:, 0].std(ddof=1)) if len(met) >= PAST else UNSURE * mean
        return Growth(mean, spread, float(np.sqrt((met[:, 1] ** 2).mean())))


@dataclass(frozen=True, eq=False)
class Outlook:
    """What the planned update would do to ``watched`` without protection.

    ``seen``: (examples,) losses observed on the probe, NaN where nobody looked. ``growth``: how
    they were carried on to the end. ``prediction``: the losses of the whole update. ``by``: the
    model it was made by; ``past``: how many past updates that model knows.
    ``meant``: how many prompts were left out, because the update is to change their answers.
    """

    watched: Watched
    seen: Array
    growth: Growth
    prediction: Prediction
    by: str
    past: int
    meant: int = 0

    @cached_property
    def chances(self) -> Array:
        """Chance of each prompt to be answered otherwise, (examples,)."""
        return probability_above(self.prediction.values - self.watched.margins, self.prediction.std)

    @cached_property
    def _order(self) -> list[int]:
        """Positions, the most endangered first; ties in the order given."""
        return [int(at) for at in np.argsort(-self.chances, kind="stable")]

    @property
    def endangered(self) -> tuple[str, ...]:
        """The prompts to protect, most endangered first, and those of which nothing is known. None
        of them is held out."""
        known = [self.watched.prompts[at] for at in self._order if self.chances[at] >= ENDANGERED]
        return tuple(one.prompt for one in (*known, *self.watched.unknown) if not one.held_out)

    def count(self, at: Sequence[int] | None = None) -> tuple[float, float]:
        """How many of the prompts ``at`` (default: all) would change, and the standard deviation
        of that."""
        chosen = list(range(len(self.watched.examples)) if at is None else at)
        if not chosen:
            return 0.0, 0.0
        over = Prediction(
            (self.prediction.values - self.watched.margins)[chosen],
            self.prediction.noise[chosen],
            self.prediction.shared[chosen],
        )
        return over.count_above(0.0)

    def sentences(self, named: int = NAMED) -> list[str]:
        """The forecast for people."""
        total, unknown = len(self.watched.examples), len(self.watched.unknown)
        said = []
        if total:
            expected, unsure = self.count()
            worst = [at for at in self._order if self.chances[at] >= ENDANGERED][:named]
            names = ", ".join(f'"{self.watched.prompts[at].prompt}"' for at in worst)
            said.append(
                f"Of your {total} protected prompts about {expected:.0f} +- {unsure:.0f} would "
                f"change; {f'the most endangered are {names}' if worst else 'none stands out'}."
            )
            said.append(self._reason())
        if unknown:
            said.append(
                f"Nothing can be forecast of {unknown} protected prompt{'s' * (unknown != 1)}, "
                "because the model gives no firm answer there; what it says is protected as it is."
            )
        if self.meant:
            said.append(
                f"{self.meant} of the prompts to protect belong to the edits "
                "themselves and were left out."
            )
        return said

    def as_json(self, lost: Array | None = None) -> dict[str, Any]:
        """The forecast in full; with ``lost`` (examples,), what the protected update took off each
        margin, the truth beside it."""
        expected, unsure = self.count()
        chosen = set(self.endangered)
        watched, prediction = self.watched, self.prediction
        names = [one.prompt for one in watched.prompts]
        rows = [
            {
                "example": watched.examples[at].name,
                "prompt": names[at],
                "answer": watched.examples[at].answer,
                "margin": float(watched.margins[at]),
                "observed": None if np.isnan(self.seen[at]) else float(self.seen[at]),
                "expected": float(prediction.values[at]),
                "std": float(prediction.std[at]),
                "chance": float(self.chances[at]),
                "held_out": watched.prompts[at].held_out,
                "protected": names[at] in chosen,
                **({} if lost is None else _outcome(lost[at], watched.margins[at])),
            }
            for at in self._order
        ]
        found: dict[str, Any] = {
            "forecast": {
                "expected": expected,
                "std": unsure,
                "by": self.by,
                "past_updates": self.past,
                "observed": int((~np.isnan(self.seen)).sum()),
                "growth": self.growth._asdict(),
                "sentences": self.sentences(),
            },
            "protected": list(self.endangered),
            "unknown": [one.prompt for one in watched.unknown],
            "prompts": rows,
        }
        if lost is not None:
            free = [at for at, name in enumerate(names) if name not in chosen]
            changed = {row["prompt"] for row in rows if row["changed"]}
            expected, unsure = self.count(free)
            truth: dict[str, Any] = {
                "protected": sum(row["protected"] for row in rows),
                "protected_changed": len(changed & chosen),
                "unprotected": len(free),
                "unprotected_changed": len(changed - chosen),
                "unprotected_expected": expected,
                "unprotected_std": unsure,
            }
            found["truth"] = {**truth, "sentence": _truth_told(truth)}
        return found

    def _reason(self) -> str:
        seen = int((~np.isnan(self.seen)).sum())
        begin = f"This is forecast from {seen} of them, observed on a short probe of the update"
        if self.by == COMPLETION:
            return f"{begin}, and from what {self.past} past updates did to all."
        return (
            f"{begin}. The home's past says too little of these prompts (it takes {PAST} updates "
            "that watched half of them), so all are taken to fare like those observed: read it as "
            "an order of magnitude."
        )


def look_ahead(
    model: Model,
    edits: Sequence[Edit],
    method: Any,
    protect: Sequence[Protected],
    history: History | None = None,
) -> Outlook:
    """Probe the update and forecast what it would do to the prompts. The model stays as it is.

    Costs a tenth of the training and ``OBSERVED`` measurements on top of one answer to each prompt.
    Raises what the method raises, and ``BadSetting`` for a method that cannot protect.
    """
    check_protects(method)
    history = history or History.of([])
    meant = {prompt for edit in edits for prompt in (edit.prompt, *edit.paraphrases)}
    watched = Watched.of(model, [one for one in protect if one.prompt not in meant])
    past = history.about(watched)
    at = worth_observing(watched, past)
    seen = np.full(len(watched.examples), np.nan)
    if at:
        with model.shifted(probe_of(method).delta(model, edits)):
            seen = watched.losses(model, at)
    found = forecast(watched, seen, history.growth(method), past)
    return dataclasses.replace(found, meant=sum(one.prompt in meant for one in protect))


def worth_observing(watched: Watched, past: ForgettingMatrix | None) -> list[int]:
    """Positions of the prompts to observe on a probe: D-optimal by the past, else evenly spread
    over the margins, from small to large."""
    count = min(OBSERVED, len(watched.examples))
    if past is not None:
        return [int(at) for at in d_optimal(Factorization().fit(past), count)]
    order = np.argsort(watched.margins, kind="stable")
    places = np.linspace(0, max(len(order) - 1, 0), count).round().astype(int)
    return [int(order[place]) for place in places]


def forecast(
    watched: Watched,
    seen: Array,
    growth: Growth,
    past: ForgettingMatrix | None = None,
) -> Outlook:
    """The losses of all prompts from those ``seen`` on the probe, (examples,), NaN where nobody
    looked, and from the past (updates x these prompts), where there is enough of it."""
    grown = growth.times * seen
    told = _mean_of_observed(grown) if past is None else Factorization().fit(past).predict(grown)
    # What was observed is not forecast, and a growth that is off is off for all prompts.
    values = np.where(np.isnan(grown), told.values, grown)
    noise = told.noise
    if growth.scatter is not None:
        noise = np.where(np.isnan(grown), noise, growth.scatter)
    shared = np.hstack([told.shared, (growth.std / growth.times * values)[:, None]])
    return Outlook(
        watched,
        seen,
        growth,
        Prediction(values, noise, shared),
        SIMPLE if past is None else COMPLETION,
        0 if past is None else len(past.tasks),
    )


def protecting(method: Any, prompts: Sequence[str]) -> Any:
    """The method with ``prompts`` protected wherever it trains, beside those that it protects
    already; the very method where there are none."""
    if not prompts:
        return method
    already = [one for protected in fields_named(method, "protect") for one in protected]
    return replaced(method, "protect", tuple(dict.fromkeys((*already, *prompts))))[0]


def keeping(method: Any, earlier: Iterable[Edit], edits: Sequence[Edit]) -> Any:
    """A method that has ``keep_earlier``, with the prompts of ``earlier`` edits protected but for
    those that ``edits`` change anew; any other method as it is, without a look at ``earlier``."""
    if not getattr(method, "keep_earlier", False):
        return method
    anew = {prompt for edit in edits for prompt in (edit.prompt, *edit.paraphrases)}
    return protecting(method, [edit.prompt for edit in earlier if edit.prompt not in anew])


def check_protects(method: Any) -> None:
    """Refuse (``BadSetting``) a method without a field ``protect``."""
    if not fields_named(method, "protect"):
        raise BadSetting(f"The method {settings_of(method)['name']} takes no 'protect'.")


def probe_of(method: Any) -> Any:
    """The method in short: ``PROBE`` of its epochs (at least one), one round, no protection. A
    method that has a ``probe`` of its own says what it is."""
    if hasattr(method, "probe"):
        return method.probe()
    short: dict[str, Any] = {}
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if field.name == "epochs":
            short["epochs"] = max(1, math.ceil(PROBE * value))
        elif field.name in ("until", "rounds", "protect"):
            short[field.name] = {"until": "epochs", "rounds": 1, "protect": ()}[field.name]
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            short[field.name] = probe_of(value)
    return dataclasses.replace(method, **short)


def _mean_of_observed(grown: Array) -> Prediction:
    """Every prompt loses what the observed ones lost on average, give or take their spread."""
    known = grown[~np.isnan(grown)]
    size = len(grown)
    if not len(known):
        return Prediction(np.zeros(size), np.zeros(size), np.zeros((size, 1)))
    spread = float(known.std(ddof=1)) if len(known) > 1 else UNSURE * abs(float(known[0]))
    unsure = np.where(np.isnan(grown), spread / math.sqrt(len(known)), 0.0)
    return Prediction(np.full(size, known.mean()), np.full(size, spread), unsure[:, None])


def _growth_met(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Least-squares ratio of final to probed losses, through the origin, and the root mean square
    of what it leaves over; None without any."""
    pairs = [(one["observed"], one["lost"]) for one in rows if one["observed"] is not None]
    probed, final = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    square = float((probed**2).sum())
    if not square > 0:
        return None
    times = float((probed * final).sum()) / square
    return times, float(np.sqrt(((final - times * probed) ** 2).mean()))


def _length(method: Any, share: float = 1.0) -> float:
    """Epochs that a method is likely to train in all: half of them where it may stop early, and of
    its own the ``share`` that is likely to be left. A writing counts as one."""
    parts = parts_of(method)
    own = 0.0 if parts else float(getattr(method, "epochs", 0))
    if getattr(method, "until", "epochs") == "learned":
        own /= 2
    own *= share
    inner = [*parts, *(getattr(method, field.name) for field in dataclasses.fields(method))]
    nested = [one for one in inner if dataclasses.is_dataclass(one) and not isinstance(one, type)]
    rounds = getattr(method, "rounds", 1)
    total = own + sum(_length(one, share_left(one, parts)) for one in nested)
    return max(1.0, rounds / 2) * max(total, 1.0)


def _outcome(lost: float, margin: float) -> dict[str, Any]:
    return {"lost": float(lost), "changed": bool(lost > margin)}


def _truth_told(truth: Mapping[str, Any]) -> str:
    changed = f"{truth['protected_changed']} of them changed"
    if not truth["unprotected"]:
        return f"All {truth['protected']} prompts were protected, and {changed}."
    return (
        f"{truth['protected']} prompts were protected, and {changed}; "
        f"of the {truth['unprotected']} others {truth['unprotected_changed']} changed "
        f"(forecast: {truth['unprotected_expected']:.1f} +- {truth['unprotected_std']:.1f})."
    )
