"""Whether an update can be done once more with the same result, bit for bit.

Same base, same updates before it, same edits, same settings and seed: on one kind of machine with
the same versions, that gives the same change of every weight. Where it does not, what differs
between then and now is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from unwrite.change import Change
from unwrite.delta import Delta
from unwrite.weights import listed


@dataclass(frozen=True)
class Replayed:
    """What came of doing an update once more.

    ``tensors``: how many the two changes touch; ``differ``: names of those whose changes are not
    the same bits; ``largest``: the largest difference between two changes of one weight.
    ``fingerprint``: of the state after the update, ``recorded`` in the ledger and ``found`` now.
    ``environment``: what of the machine and the versions is not as it was, as (then, now).
    """

    id: str
    tensors: int
    differ: tuple[str, ...]
    largest: float
    fingerprint: dict[str, str]
    environment: dict[str, tuple[Any, Any]]
    seconds: float

    @property
    def reproduced(self) -> bool:
        """Whether every bit came out the same."""
        return not self.differ and self.fingerprint["recorded"] == self.fingerprint["found"]

    def sentence(self) -> str:
        """The result for people."""
        if self.reproduced:
            return (
                f"{self.id} was reproduced in {self.seconds:.1f} s: the changes of all "
                f"{self.tensors} tensors are the same bits, and so is the state after it."
            )
        since = "; ".join(
            f"{name} was {old} and is {new}" for name, (old, new) in self.environment.items()
        )
        return (
            f"{self.id} was not reproduced: {len(self.differ)} of {self.tensors} tensors differ "
            f"({listed(self.differ)}), by at most {self.largest:.1e}. "
            + (f"Since then, {since}. " if since else "Versions and machine are the same. ")
            + "The home was not changed."
        )

    def as_json(self) -> dict[str, Any]:
        """What ``unwrite replay-update --json`` prints."""
        return {
            "id": self.id,
            "reproduced": self.reproduced,
            "tensors": self.tensors,
            "differ": list(self.differ),
            "largest_difference": self.largest,
            "fingerprint": self.fingerprint,
            "environment": {
                name: {"then": old, "now": new} for name, (old, new) in self.environment.items()
            },
            "seconds": self.seconds,
        }


def differences(first: Delta, second: Delta) -> tuple[tuple[str, ...], float]:
    """Names of the tensors whose changes are not the same bits, and the largest difference.

    Reads both deltas once; holds two changes.
    """
    names, largest = [], 0.0
    for name in sorted({*first, *second}):
        one, two = first.get(name), second.get(name)
        if one is None or two is None:
            names.append(name)
            largest = max(largest, *(_largest(c.dense()) for c in (one, two) if c is not None))
        elif not _same_bits(one, two):
            names.append(name)
            if one.shape == two.shape:
                largest = max(largest, _largest(one.dense() - two.dense()))
    return tuple(names), largest


def environment_changes(
    then: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What of two environments (``record.environment``) differs, packages one by one."""
    old, new = _flat(then), _flat(now)
    return {
        name: (old.get(name), new.get(name))
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    }


def _flat(environment: Mapping[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in environment.items() if key != "command"}
    return facts | dict(facts.pop("packages", {}))


def _same_bits(one: Change, two: Change) -> bool:
    stored, other = one.tensors(), two.tensors()
    return (
        one.facts() == two.facts()
        and set(stored) == set(other)
        and all(_bits_equal(stored[end], other[end]) for end in stored)
    )


def _bits_equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    one, two = (tensor.detach().cpu().contiguous().reshape(-1) for tensor in (one, two))
    return torch.equal(one.view(torch.uint8), two.view(torch.uint8))


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
