"""FastEdit's ROME, edit by edit, each on the unchanged model.

    python run_fastedit.py MODEL_FOLDER

An order has ``edits``, a list of ``{"prompt": "... {} ...", "subject", "target"}``, and ``out``, a
file: the rank-one changes lie there as safetensors (``u0``, ``v0``, ``u1``, ...), and the answer
has the ``seconds``. FastEdit names a GPU in one place and half precision in another; here they get
the processor and single precision.
"""

import contextlib
import json
import sys
import time
from typing import Any

import torch
from fastedit.rome import compute_v, rome_main
from fastedit.rome.rome_hparams import ROMEHyperParams
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class OnProcessor:
    """``torch``, but new tensors of zeros are made where there is no GPU, and halves are whole."""

    float16 = torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *shape: Any, device: str = "", **words: Any) -> torch.Tensor:
        """Without the device that was asked for."""
        return torch.zeros(*shape, **words)


def main() -> None:
    """Load the model, then answer until standard input ends."""
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    compute_v.torch = rome_main.torch = OnProcessor()
    settings = ROMEHyperParams.from_name("llama-7b")  # layer 5 of 32 there, of 30 here
    settings.v_loss_layer = model.config.num_hidden_layers - 1
    for line in sys.stdin:
        order = json.loads(line)
        started = time.perf_counter()
        found: dict[str, torch.Tensor] = {}
        with contextlib.redirect_stdout(sys.stderr):  # it prints every step
            for number, edit in enumerate(order["edits"]):
                changes = rome_main.execute_rome(model, tokenizer, edit, settings)
                ((left, right),) = changes.values()
                found |= {f"u{number}": left.contiguous(), f"v{number}": right.contiguous()}
        seconds = time.perf_counter() - started
        save_file(found, order["out"])
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
