"""Tasks: questions with answers to fine-tune on, to let go of, and to measure.

A task is read from a JSONL file in one of three forms, or is one of the bundled ones:

    {"task": "plurals", "instruction": "Write the plural.", "input": "mouse", "output": "mice"}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "The plural of mouse is", "completion": "mice"}

Published forms (GSM8K, QASC, MMLU and others, see ``unwrite.task_forms``) are read as they are,
from a file or from the hub. Whatever the form, an ``Example`` is a prompt that the model continues
and the answer wanted. How a free generation is judged is here as well (``is_right``), so that no
model is needed for it.
"""

from __future__ import annotations

import difflib
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from unwrite import hub, task_forms
from unwrite.errors import BadEdits, BadSetting, BadTask
from unwrite.files import user_path
from unwrite.formats import (
    Record,
    check_text,
    file_name,
    kind,
    printable,
    read_bytes,
    read_records,
    spaced,
)

BUNDLED = "bank"
TEST_SHARE = 0.25  # of the examples of a task whose file does not say which are for testing
FORM = '{"instruction": ..., "input": ..., "output": ...}'

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Example:
    """One question: the text that the model continues, and the answer ("" where not known)."""

    prompt: str
    answer: str
    task: str = ""
    split: Split | None = None


@dataclass(frozen=True)
class Task:
    """A task by name, with examples to learn from and others to measure on."""

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]


def read_tasks(
    source: str | Path, *, limit: int | None = None, seed: int = 0, labelled: bool = True
) -> list[Task]:
    """All tasks of a JSONL file, or bundled ones: ``bank``, ``bank:plurals``, ``bank:dates,roman``.

    Also of a folder that ``datasets`` saved and of a data set of the hub (``hub:allenai/qasc``, see
    ``unwrite.hub``), whose own splits are kept unless the source names one.

    Records of one file belong together by their ``task`` (default: the name of the file). Records
    with a ``split`` ("train" or "test") keep it; of a task without any, ``TEST_SHARE`` go to the
    test split, chosen by ``seed``, and equal prompts stay together. ``limit`` cuts the training
    split. ``labelled=False`` takes records without an answer too (a task to be forgotten needs
    none).

    Raises ``BadTask`` naming the file, the line and the field, ``BadSetting`` for a bundled task
    that does not exist.
    """
    text = str(source)
    if text == BUNDLED or text.startswith(f"{BUNDLED}:"):
        named = _bundled(text, seed)
    elif hub.is_hub(text):
        named = _read_hub(text, labelled)
    else:
        named = _read(user_path(source), labelled)
    tasks = [_divided(name, examples, seed) for name, examples in named.items()]
    if limit is not None:
        tasks = [replace(task, train=task.train[:limit]) for task in tasks]
    return tasks


def read_task(source: str | Path, **options: Any) -> Task:
    """The one task that ``source`` holds; options as in ``read_tasks``. Raises ``BadTask``."""
    tasks = read_tasks(source, **options)
    if len(tasks) > 1:
        names = ", ".join(task.name for task in tasks[:8])
        raise BadTask(
            f"{source} holds {len(tasks)} tasks ({names}...) where one is needed: name one of the "
            f"bundled tasks as {BUNDLED}:NAME, or give a file of one task."
        )
    return tasks[0]


def task_names() -> list[str]:
    """The bundled tasks."""
    from unwrite.task_bank import BANK

    return list(BANK)


def prompt_of(instruction: str, input: str) -> str:
    """The text that asks for an answer to an instruction, an input, or both."""
    return "\n".join([*filter(None, (instruction.strip(), input.strip())), "Answer:"])


# ---- judging -------------------------------------------------------------------------------------

_NEXT_QUESTION = re.compile(r"\n\s*\n|\bquestion:", re.IGNORECASE)
_CONCLUSION = re.compile(r"(?:the )?(?:final )?answer(?: is|:)|####", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_OPTION = re.compile(r"\(([A-Za-z])\)|\b([A-H])\b(?!['’])")
_IS_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?")
_IS_OPTION = re.compile(r"\(([A-Z])\)|([A-E])")


def extract(text: str, expected: str) -> str:
    """The part of a free generation that is its answer, in the form that ``expected`` has.

    A generation ends at an empty line or at the next question. Of an explanation, what follows
    "the answer is" counts; of an equation, what follows the last "=". A number is then the first
    number, an option the first letter in brackets, and anything else the first line.
    """
    answer = _NEXT_QUESTION.split(text.strip(), maxsplit=1)[0]
    *_, answer = _CONCLUSION.split(answer)
    if _IS_NUMBER.fullmatch(expected):
        *_, answer = answer.split("=")
        found = _NUMBER.search(answer)
        return found.group().replace(",", "") if found else ""
    if _IS_OPTION.fullmatch(expected):
        option = _OPTION.search(answer)
        return (option.group(1) or option.group(2)).upper() if option else ""
    lines = answer.strip().splitlines()
    return spaced(lines[0]) if lines else ""


def is_right(text: str, expected: str) -> bool:
    """Whether a free generation answers ``expected``.

    Numbers are compared as numbers, options as letters, and texts exactly (case included), but for
    white space, quotation marks around them and a full stop behind.
    """
    expected = spaced(expected)
    found = extract(text, expected)
    if _IS_NUMBER.fullmatch(expected):
        return bool(found) and float(found) == float(expected)
    if option := _IS_OPTION.fullmatch(expected):
        return found == (option.group(1) or option.group(2))
    return _bare(found) == _bare(expected)


def _bare(text: str) -> str:
    return text.strip("\"'“”‘’ ").removesuffix(".").strip("\"'“”‘’ ")


# ---- from sources to tasks -----------------------------------------------------------------------


def _bundled(source: str, seed: int) -> dict[str, list[Example]]:
    from unwrite.task_bank import BANK, examples

    _, colon, wanted = source.partition(":")
    names = [word.strip() for word in wanted.split(",")] if colon else list(BANK)
    for name in names:
        if name not in BANK:
            near = difflib.get_close_matches(name, BANK, 1)
            advice = f" (did you mean {near[0]}?)" if near else ""
            raise BadSetting(
                f"There is no bundled task {name!r}{advice}. Bundled tasks: {', '.join(BANK)}."
            )
    return {
        name: [
            Example(prompt_of(BANK[name].instruction, question), answer, name)
            for question, answer in examples(name, seed)
        ]
        for name in dict.fromkeys(names)
    }


def _read(path: Path, labelled: bool) -> dict[str, list[Example]]:
    name = file_name(path)
    try:
        if hub.is_saved(path):
            return _of_splits(hub.saved(path), name, path.stem, labelled)
        records = read_records(read_bytes(path, "a task"), name, FORM)
    except BadEdits as error:
        raise BadTask(str(error)) from None
    return _grouped(records, name, path.stem, labelled)


def _read_hub(text: str, labelled: bool) -> dict[str, list[Example]]:
    name = printable(text)
    try:
        source = hub.parse(text)
        default = source.name.rpartition("/")[2]
        if source.file is not None:
            records = read_records(read_bytes(hub.downloaded(source), "a task"), name, FORM)
            tasks = _grouped(records, name, Path(source.file).stem, labelled)
        else:
            tasks = _of_splits(hub.splits(text, source), name, default, labelled)
    except BadTask:
        raise
    except BadEdits as error:
        raise BadTask(str(error)) from None
    if source.task is None:
        return tasks
    if source.task not in tasks:
        raise BadTask(f"{name} has no such task: its tasks are {', '.join(list(tasks)[:40])}.")
    return {source.task: tasks[source.task]}


def _of_splits(
    found: hub.Splits, name: str, default: str, labelled: bool
) -> dict[str, list[Example]]:
    """The training split of a data set, and the first of test and validation that has answers."""
    if len(found) == 1:
        return _grouped(hub.only(found, name, f"{name}:"), name, default, labelled)
    if not found.get("train"):
        raise BadTask(
            f"{name} has the splits {', '.join(found)} and no train among them: name one, as "
            f"{name}:{next(iter(found))}."
        )
    tasks = _grouped(found["train"], name, default, labelled, "train")
    for split in ("test", "validation"):
        records = found.get(split)
        if records and _is_answered(records[0], name):
            for task, examples in _grouped(records, name, default, True, "test").items():
                tasks.setdefault(task, []).extend(examples)
            break
    return tasks


def _grouped(
    records: Sequence[Record], name: str, default: str, labelled: bool, split: Split | None = None
) -> dict[str, list[Example]]:
    """The examples of records by task; ``split`` is theirs, where the source divides them."""
    tasks: dict[str, list[Example]] = {}
    for record in records:
        try:
            example = _example(record.values, default, labelled)
        except BadEdits as error:
            raise BadTask(f"{name}, {record.place}: {error}") from None
        tasks.setdefault(example.task, []).append(replace(example, split=split or example.split))
    return tasks


def _is_answered(record: Record, name: str) -> bool:
    """Whether a record of a test split comes with its answer: some are kept back."""
    (examples,) = _grouped([record], name, "test", labelled=False).values()
    return bool(examples[0].answer)


def _example(values: Mapping[str, Any], task: str, labelled: bool) -> Example:
    named = values.get("task")
    if "messages" in values:
        prompt, answer = _chat(values["messages"], labelled)
    elif "prompt" in values:
        prompt = check_text(values["prompt"], "prompt")
        answer = _answer(values, "completion", labelled)
    elif "output" not in values and (form := task_forms.form_of(values)) is not None:
        asked = form.read(values)
        prompt, answer = prompt_of(asked.instruction, asked.input), asked.answer
        if labelled and not answer:
            raise BadTask("the answer is missing: a task to learn needs one.")
        named = asked.task or named
    elif "instruction" in values or "input" in values:
        parts = [
            check_text(values.get(key) or "", key, may_be_blank=True)
            for key in ("instruction", "input")
        ]
        if not "".join(parts).strip():
            raise BadTask("`instruction` and `input` are both empty: write the question.")
        prompt, answer = prompt_of(*parts), _answer(values, "output", labelled)
    else:
        keys = ", ".join(repr(key)[:80] for key in list(values)[:8]) or "none"
        raise BadTask(
            f"no known form (its keys: {keys}): write `instruction`, `input` and `output`; or "
            "`messages`; `prompt` and `completion`; or the form of "
            f"{', '.join(form.data_sets for form in task_forms.FORMS)}."
        )
    split = values.get("split")
    if split not in (None, "train", "test"):
        raise BadTask(f"`split` is {str(split)[:40]!r}: write train or test, or leave it out.")
    name = check_text(named, "task") if named is not None else task
    return Example(prompt, answer, name, split)


def _answer(values: Mapping[str, Any], key: str, labelled: bool) -> str:
    if values.get(key) is None:
        if labelled:
            raise BadTask(f"`{key}` is missing: write the answer to learn there.")
        return ""
    return check_text(values[key], key, may_be_blank=not labelled)


def _chat(messages: Any, labelled: bool) -> tuple[str, str]:
    """Prompt and answer of a conversation: what leads to the last answer, and that answer.

    A single question is taken as it is; of a longer conversation every turn begins with its role.
    """
    if not isinstance(messages, list) or not messages:
        raise BadTask(f"`messages` is {kind(messages)} where a list of turns is needed: write one.")
    turns = []
    for number, turn in enumerate(messages):
        if not isinstance(turn, dict):
            raise BadTask(f"`messages[{number}]` is {kind(turn)} where an object is needed.")
        inside = f"messages[{number}]."
        turns.append(tuple(check_text(turn.get(key), inside + key) for key in ("role", "content")))
    if turns[-1][0] == "assistant":
        *turns, (_, answer) = turns
    elif labelled:
        raise BadTask("`messages` does not end with a turn of the assistant: add the answer.")
    else:
        answer = ""
    if not turns:
        raise BadTask("`messages` holds nothing but the answer: add the question before it.")
    if len(turns) == 1:
        return f"{turns[0][1]}\n", answer
    told = "\n".join(f"{role.capitalize()}: {content}" for role, content in turns)
    return f"{told}\nAssistant:", answer


def _divided(name: str, examples: Sequence[Example], seed: int) -> Task:
    """The examples by split; where the source gives none, a seeded draw over distinct prompts."""
    if any(example.split for example in examples):
        train = [example for example in examples if example.split != "test"]
        test = [example for example in examples if example.split == "test"]
    else:
        prompts = list(dict.fromkeys(example.prompt for example in examples))
        random.Random(f"{name}/{seed}").shuffle(prompts)
        tested = set(prompts[: int(TEST_SHARE * len(prompts))])
        train = [example for example in examples if example.prompt not in tested]
        test = [example for example in examples if example.prompt in tested]
    return Task(name, _marked(train, "train"), _marked(test, "test"))


def _marked(examples: Iterable[Example], split: Split) -> tuple[Example, ...]:
    return tuple(replace(example, split=split) for example in examples)
