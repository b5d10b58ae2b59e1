"""ROME by FastEdit beside ours: seconds an edit, and what the edits do.

    python -m benchmarks.editing_peers --facts FILE [--edits 10 --repeats 3]

FastEdit (0.0.5, the last on PyPI) runs in a process of its own, on this torch and transformers,
with its settings for Llama. Edits are known facts of the test split (see ``rome_memit``), every one
on the unchanged model. It inverts no second moments and puts 21 sentences before each prompt; so
ours runs as it is by default, without second moments, and without them on as many contexts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.measure import in_turns, ratio, write
from benchmarks.peers import Peer, environment
from benchmarks.rome_memit import known_facts, quickly
from unwrite import load
from unwrite.activations import layer_of, weight_name
from unwrite.change import LowRank
from unwrite.delta import Delta
from unwrite.edits import Edit
from unwrite.errors import TrainingFailed
from unwrite.methods.rome import ROME
from unwrite.model import Model

PEER = "pyfastedit==0.0.5"
LAYER, CONTEXTS = 5, 21  # FastEdit's
OURS = {
    "unwrite": ROME(),
    "unwrite, identity": ROME(covariance="identity", layer=LAYER),
    "unwrite, identity, 21 contexts": ROME(covariance="identity", layer=LAYER, contexts=CONTEXTS),
}


def main() -> None:
    """Run both in turns and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, required=True, help="ROME's known facts, JSONL")
    parser.add_argument("--edits", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = load("smollm2-135m")
    _, test = known_facts(model, options.facts)
    edits = [one for one in test if not set("{}") & set(one.prompt)][: options.edits]
    python = environment("fastedit", PEER, dependencies=False)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "changes.safetensors"
        folder = str(model.source.folder)
        with Peer(python, "run_fastedit.py", Path(place) / "said.txt", [folder]) as peer:
            asked = [_request(edit) for edit in edits]

            def theirs() -> None:
                peer.ask(edits=asked, out=str(out))

            # The first round is not timed: statistics, caches and allocators are warm after it.
            found = {name: [_made(model, one, way) for one in edits] for name, way in OURS.items()}
            theirs()
            found["fastedit"] = _read(model, out, len(edits))
            work: dict[str, Any] = {
                name: lambda way=way: [_made(model, one, way) for one in edits]
                for name, way in OURS.items()
            }
            seconds = in_turns(work | {"fastedit": theirs}, options.repeats)
    write(
        "editing_peers",
        {
            "peer": PEER,
            "edits": len(edits),
            "seconds": seconds,
            "scores": {name: _scores(model, edits, deltas) for name, deltas in found.items()},
            "fastedit_over": {name: ratio(seconds["fastedit"], seconds[name]) for name in OURS},
        },
    )


def _request(edit: Edit) -> dict[str, str]:
    subject = str(edit.subject)
    prompt = edit.prompt.replace(subject, "{}", 1)
    return {"prompt": prompt, "subject": subject, "target": f" {edit.new}"}


def _read(model: Model, file: Path, count: int) -> list[Delta]:
    """FastEdit's changes as deltas of ours."""
    found = load_file(file)
    name = weight_name(model, model.anatomy.mlp_out[layer_of(model, LAYER)])
    return [
        Delta.from_changes({name: LowRank(found[f"v{n}"][:, None], found[f"u{n}"][None])})
        for n in range(count)
    ]


def _made(model: Model, edit: Edit, method: ROME) -> Delta:
    """The change for one edit; none where no value is found."""
    try:
        return method.delta(model, [edit])
    except TrainingFailed:
        return Delta.nothing()


def _scores(model: Model, edits: Sequence[Edit], deltas: Sequence[Delta]) -> dict[str, float]:
    """Means over single edits."""
    each = [quickly(model, [edit], one) for edit, one in zip(edits, deltas, strict=True)]
    return {name: statistics.mean(one[name] for one in each) for name in each[0]}


if __name__ == "__main__":
    main()
