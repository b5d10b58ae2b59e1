"""One of two processes of a DDP run with graceful forgetting; started by ``test_graceful``."""

import json
import sys
from pathlib import Path

from safetensors.torch import save_file
from test_graceful import pairs_of, train, weights

from unwrite.forgetting import GracefulForgetting
from unwrite.testing import World, toy_edits


def main(folder: Path, out: Path) -> None:
    world = World(folder, toy_edits())
    callback = GracefulForgetting(pairs_of(world, "pet"), every=2, strength=1.0, batch_size=3)
    network = train(world, out, callback, max_steps=4, ddp_backend="gloo")
    out.mkdir(exist_ok=True, parents=True)
    save_file(weights(network), out / "end.safetensors")
    (out / "history.json").write_text(json.dumps(callback.history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
