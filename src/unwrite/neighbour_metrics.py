"""The scores that neighbouring toolkits print, under their own names, from stored rows.

They are not ours: ROME's success rates compare two probabilities and never look at what the model
says; EasyEdit's accuracies force the answer token by token. They stand beside our scores so that a
table can be laid beside a published one. Pure functions of observation rows, no model, no torch.

Sources: ``experiments/summarize.py`` and ``experiments/py/eval_utils_counterfact.py`` of ROME (Meng
et al. 2022); ``easyeditor/evaluate/evaluate_utils.py`` of EasyEdit (METHODS 6.5).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unwrite.scores import Row, token_share

ROME = ("ES", "PS", "NS", "S")
EASYEDIT = ("rewrite_acc", "rephrase_acc", "locality_acc")
# Roles of the answers that ROME forces besides: the old one on a paraphrase, the new one on a
# bystander. Their rows are stored apart from the others (``rivals``).
OLD_ON_PARAPHRASE, NEW_ON_BYSTANDER = "generality_old", "locality_new"

EXPLAINED = (
    "Named as their toolkits name them, in %, each the mean over records of the mean within a "
    "record. ROME: ES, the new answer is more probable than the old one (probability per token) on "
    "the prompt; PS, the same on paraphrases; NS, on bystanders their own answer is more probable "
    "than the new one; S, harmonic mean of the three. EasyEdit: share of the forced answer's "
    "tokens that are the first choice on the prompt (rewrite_acc) and on paraphrases "
    "(rephrase_acc), and that are the same first choice as before on bystanders (locality_acc)."
)

Values = dict[str, float | None]


def metrics(
    before: Sequence[Row], after: Sequence[Row], rivals: Sequence[Row]
) -> dict[str, dict[str, Any]]:
    """``{"rome": {ES, PS, NS, S, records}, "easyedit": {rewrite_acc, ...}}``, all in [0, 1].

    ``before`` and ``after``: rows of ``observe`` for the same probes; ``rivals``: those of the
    state of ``after`` for ``observe.rivals``. Null where the records have no such probes.
    """
    return {"rome": rome(after, rivals), "easyedit": easyedit(before, after)}


def rome(rows: Sequence[Row], rivals: Sequence[Row]) -> Values:
    """ES, PS, NS and their harmonic mean S of one state.

    As in ROME's code, probabilities are per token (the mean log-probability of the answer's
    tokens), so that a longer answer is not the less probable one. A bystander's own answer is the
    known one, for CounterFact ``target_true`` as there; where none is known, what the model said
    before. ROME has no bystander whose answer is the new one; here such ones do not count.
    """
    asked: dict[tuple[str, str, str], list[Row]] = defaultdict(list)
    for row in (*rows, *rivals):
        asked[str(row["edit"]), str(row["role"]), str(row["prompt"])].append(row)

    def wins(role: str, rival_role: str) -> float | None:
        """Over records, the mean of how often the answer of ``role`` is the likelier one."""
        won: dict[str, list[float]] = defaultdict(list)
        for (edit, its_role, prompt), ours in asked.items():
            if its_role != role:
                continue
            for rival in asked.get((edit, rival_role, prompt), ()):
                won[edit] += [
                    float(_per_token(row) > _per_token(rival))
                    for row in ours
                    if row["target"] != rival["target"]
                ]
        return _mean_over_records(won)

    found = {
        "ES": wins("reliability", "old_recall"),
        "PS": wins("generality", OLD_ON_PARAPHRASE),
        "NS": wins("locality", NEW_ON_BYSTANDER),
    }
    return {**found, "S": harmonic_mean(found.values())}


def easyedit(before: Sequence[Row], after: Sequence[Row]) -> Values:
    """Rewrite and rephrase accuracy, and agreement on bystanders with the state before."""
    earlier = {_key(row): row["predicted"] for row in before}

    def shares(role: str, rows: Iterable[Row]) -> float | None:
        found: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row["role"] != role:
                continue
            if role == "locality":
                pairs = list(zip(earlier[_key(row)], row["predicted"], strict=True))
                found[str(row["edit"])].append(sum(a == b for a, b in pairs) / len(pairs))
            else:
                found[str(row["edit"])].append(token_share(row))
        return _mean_over_records(found)

    roles = ("reliability", "generality", "locality")
    return {name: shares(role, after) for name, role in zip(EASYEDIT, roles, strict=True)}


def harmonic_mean(values: Iterable[float | None]) -> float | None:
    """Of numbers from 0 on: 0 if any is 0, null if any is null."""
    known = list(values)
    numbers = [value for value in known if value is not None]
    return statistics.harmonic_mean(numbers) if len(numbers) == len(known) else None


def mean(found: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The mean of several seeds, metric by metric; S is the mean of the S of each."""
    return {
        toolkit: {name: _mean([one[toolkit][name] for one in found]) for name in names}
        for toolkit, names in (("rome", ROME), ("easyedit", EASYEDIT))
    }


def _per_token(row: Row) -> float:
    return float(row["logprob"]) / float(row["target_tokens"])


def _mean_over_records(values: Mapping[str, Sequence[float]]) -> float | None:
    return _mean([sum(own) / len(own) for _, own in sorted(values.items()) if own])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _key(row: Row) -> tuple[str, str, str, str]:
    return (str(row["edit"]), str(row["role"]), str(row["prompt"]), str(row["target"]))
