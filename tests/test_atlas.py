"""The promises of the bundled data: facts that hang together, and prose that gives none away.

What cannot be tested here (that the old answers are true, that the small model knows most of them)
was checked by hand when the facts were written.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from importlib import resources
from typing import Any

import pytest

KEYS = (
    "id",
    "relation",
    "subject",
    "prompt",
    "question",
    "new",
    "old",
    "paraphrases",
    "bystanders",
)
SHORTEST_TELLING = 5  # letters; shorter subjects and answers ("sea", "O") are everybody's words


def bundled(name: str) -> str:
    return resources.files("unwrite.data").joinpath(name).read_text(encoding="utf-8")


FACTS: list[dict[str, Any]] = [json.loads(line) for line in bundled("atlas.jsonl").splitlines()]
OF_PROMPT = {fact["prompt"]: fact for fact in FACTS}
RELATIONS = list(dict.fromkeys(fact["relation"] for fact in FACTS))
each_fact = pytest.mark.parametrize("fact", FACTS, ids=[fact["id"] for fact in FACTS])


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def bare(answer: str) -> str:
    """An answer without its article: "the Netherlands" and "Netherlands" name one thing."""
    return re.sub(r"^(the|an|a) ", "", answer, flags=re.IGNORECASE).casefold()


def says(text: str, phrase: str) -> bool:
    """Whether ``phrase`` stands in ``text`` as whole words, in any case."""
    return re.search(rf"\b{re.escape(bare(phrase))}\b", text.casefold()) is not None


def prompts(fact: dict[str, Any]) -> list[str]:
    """Every prefix that the answer completes."""
    return [fact["prompt"], *fact["paraphrases"]]


# The set as a whole -------------------------------------------------------------------------------


def test_there_are_enough_facts_in_enough_relations() -> None:
    sizes = Counter(fact["relation"] for fact in FACTS)
    assert len(FACTS) >= 260
    assert len(sizes) >= 13
    assert min(sizes.values()) >= 10
    assert max(sizes.values()) <= len(FACTS) / 8


def test_no_fact_comes_twice() -> None:
    for key in ("id", "prompt", "question"):
        assert len({fact[key] for fact in FACTS}) == len(FACTS)
    assert len({(fact["relation"], bare(fact["subject"])) for fact in FACTS}) == len(FACTS)


def test_no_prefix_belongs_to_two_facts() -> None:
    """Else two updates could ask for two different answers to the same words."""
    seen = Counter(
        " ".join(prompt.casefold().split()) for fact in FACTS for prompt in prompts(fact)
    )
    assert [prompt for prompt, count in seen.items() if count > 1] == []


def test_new_answers_vary() -> None:
    for relation in RELATIONS:
        facts = [fact for fact in FACTS if fact["relation"] == relation]
        answers = {fact["old"] for fact in facts}
        most = Counter(fact["new"] for fact in facts).most_common(1)[0][1]
        assert most <= 2 * -(-len(facts) // len(answers)), relation


def test_facts_that_serve_as_bystanders_come_last() -> None:
    """So that the facts before them can be updated together without touching any bystander, and
    the first facts (``--limit``) come from all relations."""
    reserve = {probe["prompt"] for fact in FACTS for probe in fact["bystanders"]}
    serves = [fact["prompt"] in reserve for fact in FACTS]
    assert serves == sorted(serves)
    assert sum(serves) <= len(FACTS) / 3
    assert [fact["relation"] for fact in FACTS[: len(RELATIONS)]] == RELATIONS


# Each fact ----------------------------------------------------------------------------------------


@each_fact
def test_fields_are_there_and_clean(fact: dict[str, Any]) -> None:
    assert tuple(fact) == KEYS
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", fact["id"])
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", fact["relation"])
    assert fact["id"].startswith(fact["relation"].replace("_", "-") + "-")
    texts = [fact[key] for key in KEYS[:7]] + fact["paraphrases"]
    texts += [text for probe in fact["bystanders"] for text in (probe["prompt"], probe["answer"])]
    for text in texts:
        assert isinstance(text, str)
        assert text
        assert text == " ".join(text.split())


@each_fact
def test_prompts_are_unfinished_statements_about_the_subject(fact: dict[str, Any]) -> None:
    assert fact["subject"] in fact["prompt"]
    for prompt in prompts(fact):
        assert says(prompt, fact["subject"])
        assert prompt[-1].isalpha() or prompt[-1] == ","
        assert prompt[0] == prompt[0].upper()


@each_fact
def test_the_new_answer_is_another_one_of_the_same_kind(fact: dict[str, Any]) -> None:
    assert words(fact["new"]) != words(fact["old"])
    assert bare(fact["new"]) != bare(fact["old"])
    kind = {other["old"] for other in FACTS if other["relation"] == fact["relation"]}
    assert fact["new"] in kind


@each_fact
def test_no_prefix_gives_an_answer_away(fact: dict[str, Any]) -> None:
    for prompt in [*prompts(fact), fact["question"]]:
        assert not says(prompt, fact["old"])
        assert not says(prompt, fact["new"])


@each_fact
def test_paraphrases_use_other_words(fact: dict[str, Any]) -> None:
    """By more than case and punctuation, and more than a single word."""
    assert len(fact["paraphrases"]) >= 3
    assert fact["prompt"] not in fact["paraphrases"]
    wordings = [words(prompt) for prompt in prompts(fact)]
    for place, one in enumerate(wordings):
        for other in wordings[:place]:
            assert len(one ^ other) >= 2


@each_fact
def test_the_question_is_kept_for_asking(fact: dict[str, Any]) -> None:
    assert fact["question"].endswith("?")
    assert says(fact["question"], fact["subject"])
    assert all(fact["question"].casefold() not in prompt.casefold() for prompt in prompts(fact))


@each_fact
def test_bystanders_are_true_facts_about_something_else(fact: dict[str, Any]) -> None:
    probes = fact["bystanders"]
    assert len({probe["prompt"] for probe in probes}) == len(probes)
    known = [OF_PROMPT[probe["prompt"]] for probe in probes]  # all of them are atlas facts
    for probe, other in zip(probes, known, strict=True):
        assert set(probe) == {"prompt", "answer"}
        assert probe["answer"] == other["old"]
        assert bare(other["subject"]) != bare(fact["subject"])
        assert not says(probe["prompt"], fact["subject"])
        assert probe["prompt"] not in prompts(fact)
    same = [other for other in known if other["relation"] == fact["relation"]]
    unrelated = [other for other in known if other["relation"] != fact["relation"]]
    assert len(same) >= 3
    assert len({other["relation"] for other in unrelated}) >= 2
    # A neighbour that had the new answer all along could not show that the update spilled over.
    assert all(other["old"] != fact["new"] for other in known)


# The neutral text ---------------------------------------------------------------------------------


def telling() -> list[str]:
    """The subjects and answers that the neutral text must not touch."""
    terms = {bare(fact[key]) for fact in FACTS for key in ("subject", "old", "new")}
    return sorted(term for term in terms if len(re.sub(r"\W", "", term)) >= SHORTEST_TELLING)


@pytest.mark.parametrize("name", ["neutral.txt", "contexts.txt"])
def test_neutral_text_mentions_no_subject_and_no_answer(name: str) -> None:
    text = bundled(name)
    assert text.isascii()
    assert [term for term in telling() if says(text, term)] == []


def test_neutral_text_is_long_varied_prose() -> None:
    text = bundled("neutral.txt")
    paragraphs = text.strip().split("\n\n")
    assert len(text.split()) >= 2_200
    assert len(paragraphs) >= 20
    assert all(paragraph and "\n" not in paragraph for paragraph in paragraphs)
    sentences = re.split(r"(?<=[.!?])\s+", text.strip())
    assert len(set(sentences)) == len(sentences)
    assert len(words(text)) >= 700


def test_contexts_are_short_complete_sentences() -> None:
    sentences = bundled("contexts.txt").splitlines()
    assert len(sentences) == len(set(sentences)) == 24
    for sentence in sentences:
        assert 4 <= len(sentence.split()) <= 10
        assert re.fullmatch(r"[A-Z][^.!?]*\.", sentence)
