"""Which examples of a new task to look at, so that the rest can be forecast best.

D-optimal design (Fedorov 1972): the observations that shrink the determinant of the uncertainty of
the task's point most, chosen one by one. They are chosen before anything is known of the task.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from unwrite.errors import BadSetting
from unwrite.forgetting.factorization import FittedFactorization


def d_optimal(
    fitted: FittedFactorization, count: int, allowed: Sequence[int] | None = None
) -> npt.NDArray[np.intp]:
    """Positions of the ``count`` examples worth observing, the most telling first.

    ``allowed``: choose among these positions only. Every choice adds the example with the largest
    variance in units of its own noise, which is the largest growth of the determinant. Takes
    count x examples x rank^2 operations.

    Raises ``BadSetting`` when there are fewer examples than asked for.
    """
    candidates = np.arange(len(fitted.space.centre)) if allowed is None else np.asarray(allowed)
    if not 0 <= count <= len(candidates):
        raise BadSetting(f"{count} examples cannot be chosen from {len(candidates)}.")
    scaled = fitted.space.basis[candidates] / fitted.space.weights[candidates, None]
    triangle = np.eye(scaled.shape[1]) * np.sqrt(fitted.ridge)  # square root of the precision
    free = np.ones(len(candidates), dtype=bool)
    chosen = []
    for _ in range(count):
        root = np.linalg.solve(triangle.T, scaled.T)  # its squares are never negative
        gains = np.where(free, np.einsum("kj,kj->j", root, root), -1.0)
        best = int(gains.argmax())
        chosen.append(best)
        free[best] = False
        # By QR, because squaring loses half of the digits, and exact data need them.
        triangle = np.linalg.qr(np.vstack([triangle, scaled[best]]), mode="r")
    return candidates[np.array(chosen, dtype=np.intp)]
