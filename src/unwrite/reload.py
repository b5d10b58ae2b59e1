"""A saved state, loaded by a fresh process and asked there: what its user will meet.

The parent writes questions to the child's standard input and reads rows from its standard output,
so that nothing lies on disk but the model. While the child runs, there are two copies of the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unwrite.errors import UnwriteError
from unwrite.model import Model
from unwrite.observe import Question, observe, perplexity
from unwrite.weights import Weights, fingerprint


def ask_saved(
    folder: Path,
    probes: Sequence[Question],
    *,
    free: bool,
    device: str,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """``{rows, perplexity, fingerprint}`` of the Hugging Face folder, from a process of its own.

    ``rows``: those of ``observe(model, probes, free=free)``. Raises ``UnwriteError`` with the
    child's last line if it fails.
    """
    asked = {
        "folder": str(folder),
        "probes": [asdict(probe) for probe in probes],
        "free": free,
        "device": device,
        "trust_remote_code": trust_remote_code,
    }
    # The child finds this very package, wherever it is imported from.
    package = str(Path(__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "unwrite.reload"],
        input=json.dumps(asked),
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise UnwriteError(f"A fresh process could not use the saved state: {lines[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """What the child gives back."""
    folder = Path(asked["folder"])
    model = Model.load(folder, device=asked["device"], trust_remote_code=asked["trust_remote_code"])
    with Weights.from_folder(folder) as weights:
        saved = fingerprint(weights)
    probes = [Question(**probe) for probe in asked["probes"]]
    return {
        "rows": observe(model, probes, free=asked["free"]),
        "perplexity": perplexity(model),
        "fingerprint": saved,
    }


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(answer(json.load(sys.stdin))) + "\n")
