"""The verbs of the library: ``open`` a home, ``load`` a model, ``evaluate`` either, ``compare``
methods and ``sweep`` the settings of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unwrite.comparison import compare as compare
from unwrite.comparison import sweep as sweep
from unwrite.edits import Edit
from unwrite.home import Home, evaluate_model, is_home
from unwrite.model import Model
from unwrite.progress import Reporter
from unwrite.scores import Scores


def open(
    folder: str | Path,
    base: str | Path | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Reporter | None = None,
) -> Home:
    """Open the model home in ``folder``; with ``base``, make it if it is not there yet.

    ``base`` is a Hugging Face folder, a built-in name (``smollm2-135m``) or a hub id. Raises
    ``HomeError`` or ``ModelUnavailable`` with a sentence that says what to do.
    """
    return Home.open(folder, base, trust_remote_code=trust_remote_code, progress=progress)


def load(
    name: str | Path,
    *,
    trust_remote_code: bool = False,
    device: str | None = None,
    progress: Reporter | None = None,
) -> Model:
    """Load a model in fp32 without a home, for arithmetic and experiments.

    ``device``: where it goes (default: the GPU if there is one). Holds one copy of the model.
    """
    return Model.load(name, trust_remote_code=trust_remote_code, device=device, progress=progress)


def evaluate(
    target: str | Path | Home | Model,
    edits: str | Path | Sequence[Edit],
    *,
    progress: Reporter | None = None,
) -> tuple[Scores, Scores]:
    """Scores before and now, changing nothing.

    Of a home: its base and its current state. Of a model or model name: the model twice, so that
    locality is 1 by definition.
    """
    if isinstance(target, Home):
        return target.evaluate(edits)
    if not isinstance(target, Model):
        if is_home(target):
            return Home.open(target, progress=progress).evaluate(edits)
        target = Model.load(target, progress=progress)
    scores = evaluate_model(target, edits)
    return scores, scores
