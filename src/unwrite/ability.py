"""General ability before and after: lm-evaluation-harness on the model that is in memory.

Two tasks come with Unwrite and need no network: ``unwrite-atlas``, the bundled facts as questions
with four answers (those that the update changes on purpose are left out), and ``unwrite-neutral``,
the bundled prose. Any other name is one of the harness's own tasks, or the path of a task file.

The harness is the extra ``lm-eval``. It is asked on the weights as they are; it makes no copy.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from unwrite.edits import Edit, read_edits
from unwrite.errors import BadSetting, UnwriteError
from unwrite.model import Model
from unwrite.observe import neutral_text

ATLAS, NEUTRAL = "unwrite-atlas", "unwrite-neutral"
BUNDLED = (ATLAS, NEUTRAL)
CHOICES = 4
BATCH = 16
# Draws for the standard errors that the harness has no formula for; its own default, 100,000, takes
# minutes and a process for every core.
RESAMPLES = 1000
FEW_SHOT_SEED = 1234  # the harness's own default: which examples stand before a question

Found = dict[str, dict[str, dict[str, float | None]]]  # task -> metric -> value and stderr


def checked(names: Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, each once; ``unwrite`` stands for all that are bundled. ``BadSetting`` for
    what is no list of names."""
    if isinstance(names, str) or not all(isinstance(name, str) and name.strip() for name in names):
        raise BadSetting("The tasks of lm-eval are a list of names: put them in [ ].")
    given = [name.strip() for name in names]
    return tuple(
        dict.fromkeys(one for name in given for one in (BUNDLED if name == "unwrite" else (name,)))
    )


def check_tasks(names: Sequence[str]) -> None:
    """Load every task once, so that what is missing is said before anything runs. Raises
    ``BadSetting`` without the extra, ``UnwriteError`` for a task that cannot be loaded."""
    if find_spec("lm_eval") is None:
        raise BadSetting(
            "lm-eval is not installed. Install it with: pip install 'unwrite[lm-eval]', or leave "
            "out the tasks of lm-eval."
        )
    with _quiet():
        _tasks(names, ())


def measure(model: Model, names: Sequence[str], edits: Sequence[Edit]) -> Found:
    """``{task: {metric: {value, stderr}}}`` of the network as it is now.

    ``edits``: what the update changes; the bundled facts leave these prompts out. A metric is named
    as the harness names it, with its filter unless that is ``none``; ``stderr`` is null where the
    harness gives none. Raises ``UnwriteError`` as ``check_tasks``.
    """
    check_tasks(())
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        asked = HFLM(
            pretrained=model.network,
            tokenizer=copy.deepcopy(model.tokenizer),  # it gives it a padding token
            batch_size=BATCH,
        )
        # Not simple_evaluate: that seeds everybody's random numbers, and has the system and pip
        # describe the machine, which takes longer than the bundled tasks.
        found = evaluate(
            lm=asked,
            task_dict=_tasks(names, edits),
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    return {task: _metrics(values) for task, values in found["results"].items()}


def version() -> str:
    """Of the harness that is installed."""
    from importlib.metadata import version as of

    return of("lm_eval")


def atlas_questions(edits: Sequence[Edit] = ()) -> list[dict[str, Any]]:
    """The bundled facts as ``{prompt, choices, gold}``: the true answer and the three that come
    next in the same relation, in alphabetical order (so that its place tells nothing)."""
    changed = {text for edit in edits for text in (edit.prompt, *edit.paraphrases)}
    facts = read_edits("atlas")
    answers: dict[str, list[str]] = {}
    for fact in facts:
        known = answers.setdefault(str(fact.relation), [])
        if fact.old is not None and fact.old not in known:
            known.append(fact.old)
    found = []
    for fact in facts:
        others = answers[str(fact.relation)]
        if fact.old is None or fact.prompt in changed or len(others) < CHOICES:
            continue
        place = others.index(fact.old)
        choices = sorted((others[place:] + others[:place])[:CHOICES])
        found.append({"prompt": fact.prompt, "choices": choices, "gold": choices.index(fact.old)})
    return found


def _tasks(names: Sequence[str], edits: Sequence[Edit]) -> dict[str, Any]:
    """All tasks in the form in which the harness loads them: ``{tasks, groups, group_map}``."""
    others = [name for name in names if name not in BUNDLED]
    loaded = _of_the_harness(others) if others else {"tasks": {}, "groups": {}, "group_map": {}}
    bundled = {ATLAS: lambda: _atlas(edits), NEUTRAL: _neutral}
    loaded["tasks"] |= {name: make() for name, make in bundled.items() if name in names}
    return loaded


def _of_the_harness(names: list[str]) -> dict[str, Any]:
    """Its own tasks, with the defaults that its command line gives them."""
    from lm_eval.tasks import TaskManager

    try:
        loaded: dict[str, Any] = TaskManager().load(names)
    except Exception as error:  # noqa: BLE001 -- of its loaders, of the hub, of the network
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnwriteError(
            f"lm-eval cannot load {', '.join(names)}: {lines[0][:300]}. Correct the name, or "
            f"use tasks that need no network: {', '.join(BUNDLED)}."
        ) from None
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


def _atlas(edits: Sequence[Edit]) -> Any:
    return _task(
        atlas_questions(edits),
        task=ATLAS,
        output_type="multiple_choice",
        doc_to_text="{{prompt}}",
        doc_to_choice="{{choices}}",
        doc_to_target="gold",
        metric_list=[_metric("acc", "mean", True), _metric("acc_norm", "mean", True)],
    )


def _neutral() -> Any:
    paragraphs = [text.strip() for text in neutral_text().split("\n\n") if text.strip()]
    return _task(
        [{"text": text} for text in paragraphs],
        task=NEUTRAL,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[
            _metric("word_perplexity", "weighted_perplexity", False),
            _metric("bits_per_byte", "bits_per_byte", False),
        ],
    )


def _metric(name: str, aggregation: str, higher: bool) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher}


def _task(rows: list[dict[str, Any]], **config: Any) -> Any:
    """A task of the harness on rows in memory: nothing is fetched, nothing is cached."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = {"test": Dataset.from_list(rows)}
    return ConfigurableTask(
        config={
            "custom_dataset": lambda **_: data,
            "test_split": "test",
            "num_fewshot": 0,
            "metadata": {"version": 1},
            **config,
        }
    )


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """The harness's ``metric,filter`` and ``metric_stderr,filter`` put together."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in values.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{kept}")
        name = metric if kept == "none" else key
        found[name] = {"value": _number(value), "stderr": _number(error)}
    return found


def _number(value: Any) -> float | None:
    """A finite number, or null: a model that broke down has perplexities that are none."""
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if known else None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints: standard output is for our own JSON, and its advice for its own users."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
