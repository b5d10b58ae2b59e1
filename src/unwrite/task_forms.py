"""Published forms of tasks: which columns hold the question, the answer and the task's name.

A form is known by its keys, as the formats of edits are, so a downloaded file reads like the data
set on the hub. Options are written behind the question, and the answer is the letter in brackets;
of a worked solution (GSM8K) the result is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from unwrite.errors import BadTask
from unwrite.formats import check_text, kind

Fields = Mapping[str, Any]
LETTERS = "ABCDEFGHIJ"
RESULT = "####"  # what GSM8K writes before the result of a solution


@dataclass(frozen=True)
class Asked:
    """A record as its form tells it: ``instruction`` and ``input`` as in our own files; ``answer``
    is "" where the record has none; ``task`` names the part of the set that it belongs to."""

    instruction: str
    input: str
    answer: str
    task: str | None = None


@dataclass(frozen=True)
class Form:
    """One published form: the keys that it is known by, and how to read it."""

    data_sets: str
    needs: tuple[str, ...]
    read: Callable[[Fields], Asked]


def form_of(values: Fields) -> Form | None:
    """The form that a record is in, if it is in any. Forms of many keys are tried first."""
    return next((form for form in FORMS if all(key in values for key in form.needs)), None)


def _text(values: Fields, key: str) -> str:
    return check_text(values.get(key) or "", key, may_be_blank=True)


def _task(values: Fields, key: str) -> str | None:
    return _text(values, key) or None


def _with_options(question: str, options: Sequence[tuple[str, str]]) -> str:
    return "\n".join([question.strip(), *(f"({letter}) {text}" for letter, text in options)])


def _option(options: Iterable[tuple[str, str]], letter: str) -> str:
    """The answer in brackets; "" for none, as test splits without answers write it."""
    letter = letter.strip().upper()
    if not letter:
        return ""
    known = [one for one, _ in options]
    if letter not in known:
        raise BadTask(f"the answer {letter[:20]!r} is none of the options {', '.join(known)}.")
    return f"({letter})"


def _numbered(options: Sequence[tuple[str, str]], number: Any, key: str) -> str:
    """The answer by its place; -1 is what test splits without answers write."""
    if isinstance(number, bool) or not isinstance(number, int):
        raise BadTask(f"`{key}` is {kind(number)} where the number of an option is needed.")
    if number == -1:
        return ""
    if not 0 <= number < len(options):
        raise BadTask(f"`{key}` is {number}, and there are {len(options)} options, from 0 on.")
    return f"({options[number][0]})"


def _texts(values: Fields, *keys: str) -> list[str]:
    return [check_text(values.get(key), key) for key in keys]


def _lettered(texts: Any, key: str) -> list[tuple[str, str]]:
    if not isinstance(texts, (list, tuple)) or not 1 < len(texts) <= len(LETTERS):
        raise BadTask(f"`{key}` is no list of 2 to {len(LETTERS)} options.")
    return list(zip(LETTERS, (check_text(text, key) for text in texts), strict=False))


def _choices(values: Fields) -> Asked:
    """QASC, ARC, OpenBookQA: {"text": [...], "label": [...]} and the letter of the right one."""
    given = values["choices"]
    if not isinstance(given, Mapping) or not {"text", "label"} <= given.keys():
        raise BadTask("`choices` is no object with the lists `text` and `label`.")
    if len(given["text"]) != len(given["label"]):
        raise BadTask("`choices` has not as many texts as labels.")
    # ARC numbers some of its options: letters are what an answer is recognised by.
    labels = [check_text(str(label), "choices.label").strip() for label in given["label"]]
    options = _lettered(given["text"], "choices.text")
    letters = {label.upper(): letter for label, (letter, _) in zip(labels, options, strict=True)}
    key = _text(values, "answerKey").strip().upper()
    stem = "question_stem" if "question_stem" in values else "question"
    question = check_text(values[stem], stem)
    return Asked("", _with_options(question, options), _option(options, letters.get(key, key)))


def _multiple_choice(values: Fields) -> Asked:
    """MMLU: a list of options and the number of the right one."""
    options = _lettered(values["choices"], "choices")
    question = check_text(values["question"], "question")
    answer = _numbered(options, values["answer"], "answer")
    return Asked("", _with_options(question, options), answer, _task(values, "subject"))


def _medmcqa(values: Fields) -> Asked:
    options = _lettered(_texts(values, "opa", "opb", "opc", "opd"), "opa")
    question = check_text(values["question"], "question")
    answer = _numbered(options, values["cop"], "cop")
    return Asked("", _with_options(question, options), answer, _task(values, "subject_name"))


def _solved(values: Fields) -> Asked:
    """GSM8K: the result of the worked solution; other sets of `question` and `answer` as is."""
    question, answer = (check_text(values[key], key) for key in ("question", "answer"))
    _, solved, result = answer.rpartition(RESULT)
    return Asked("", question, result.strip().replace(",", "") if solved else answer)


def _labelled(values: Fields) -> Asked:
    return Asked("Classify the text.", _text(values, "text"), _text(values, "label_text"))


def _dolly(values: Fields) -> Asked:
    return Asked(
        _text(values, "instruction"),
        _text(values, "context"),
        _text(values, "response"),
        _task(values, "category"),
    )


def _truthful(values: Fields) -> Asked:
    answer = _text(values, "best_answer")
    return Asked("", _text(values, "question"), answer, _task(values, "category"))


def _big_bench(values: Fields) -> Asked:
    return Asked("", _text(values, "input"), _text(values, "target"))


def _prompted(values: Fields) -> Asked:
    return Asked(
        "", _text(values, "inputs_pretokenized"), _text(values, "targets_pretokenized").strip()
    )


def _sourced(values: Fields) -> Asked:
    return Asked("", _text(values, "inputs"), _text(values, "targets"), _task(values, "task"))


FORMS = (
    Form("MedMCQA", ("question", "opa", "opb", "opc", "opd", "cop"), _medmcqa),
    Form("QASC, ARC", ("question", "choices", "answerKey"), _choices),
    Form("OpenBookQA", ("question_stem", "choices", "answerKey"), _choices),
    Form("MMLU", ("question", "choices", "answer"), _multiple_choice),
    Form("TruthfulQA", ("question", "best_answer"), _truthful),
    Form("GSM8K", ("question", "answer"), _solved),
    Form("SST-5", ("text", "label_text"), _labelled),
    Form("Dolly", ("instruction", "response"), _dolly),
    Form("BIG-Bench Hard", ("input", "target"), _big_bench),
    Form("P3", ("inputs_pretokenized", "targets_pretokenized"), _prompted),
    Form("FLAN", ("inputs", "targets"), _sourced),
)
