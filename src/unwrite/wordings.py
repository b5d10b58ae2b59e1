"""Other wordings of a prompt, made from the prompt alone: some of its words are left out.

What is taught in one wording hangs on that wording. Who asks otherwise keeps the subject and a word
or two of the relation; a prompt that has lost half of the words beside its subject asks as little.
Nothing that an edit is scored on is read here, and no model is asked.
"""

from __future__ import annotations

import random
import re

from unwrite.activations import subject_end

LEFT_OUT = 0.5  # share of the words beside the subject


def thinned(prompt: str, subject: str, count: int, seed: int) -> tuple[str, ...]:
    """``count`` copies of a prompt in which every word beside the subject is left out with
    probability ``LEFT_OUT``; some may be equal to each other, or to the prompt.

    A word is what stands between blanks. What is joined to the subject without one stays ("'s"),
    and where nothing would follow the subject any more, all that followed it stays: the prompt has
    to go on to its answer. Drawn by ``seed`` and the prompt, so in any company of prompts the same.
    Raises ``BadEdits`` as ``activations.subject_end``.
    """
    end = subject_end(prompt, subject)
    start = end - len(subject.strip())
    lead = re.findall(r"\S+\s*", prompt[:start])
    rest = re.findall(r"\s*\S+", prompt[end:])
    head = lead.pop() if lead and not lead[-1][-1].isspace() else ""
    tail = rest.pop(0) if rest and not rest[0][0].isspace() else ""
    core = head + prompt[start:end] + tail
    draw = random.Random(f"{seed} {prompt}")

    def some(words: list[str]) -> str:
        return "".join(word for word in words if draw.random() >= LEFT_OUT)

    return tuple(f"{some(lead)}{core}{some(rest) or ''.join(rest)}" for _ in range(count))
