"""Log-likelihoods by lm-evaluation-harness.

    python run_lm_eval.py MODEL_FOLDER ROWS_PER_BATCH

An order has ``requests``, a list of (context, continuation); the answer has their ``logprobs`` and
the ``seconds``.
"""

import contextlib
import json
import sys
import time

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load the model, then answer until standard input ends."""
    folder, rows = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with contextlib.redirect_stdout(sys.stderr):
        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=int(rows), device="cpu")
    for line in sys.stdin:
        pairs = json.loads(line)["requests"]
        started = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            requests = [
                Instance("loglikelihood", {}, tuple(pair), number)
                for number, pair in enumerate(pairs)
            ]
            found = asked.loglikelihood(requests, disable_tqdm=True)
        seconds = time.perf_counter() - started
        logprobs = [float(logprob) for logprob, _ in found]
        print(json.dumps({"seconds": seconds, "logprobs": logprobs}), flush=True)


if __name__ == "__main__":
    main()
