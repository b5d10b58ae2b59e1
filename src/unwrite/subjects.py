"""The subject of a prompt that came without one: the only name in it, or what it is asked *of*.

What is written into a model is written at a subject (``values``). Many files of edits do not say
what theirs is, and yet most prompts have a single name, which is what they ask about: "The capital
of *France* is". A name is a run of words that begin with a capital letter or a digit, with small
words between them ("of", "von"). Where there is none, or a noun may follow it ("the *SI* unit of
time is"), it is what stands between a preposition and the verb: "the unit of *time* is". Where even
that is not clear, nothing is guessed. The rules are those of English.
"""

from __future__ import annotations

import re
from collections.abc import Iterator


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Words that stand at the head of a sentence with a capital letter and are no names.
OPENING = _words(
    """a an and answer are as at be before by can could did do does during each every for from had
    has have he her his how if in into is it its list my name of on one our please question she
    since tell that the their there these they this those to under until was were what when where
    which while who whom whose why will with within without would you your"""
)
BETWEEN = _words("a and da de del della der des di du el for la le los of the van von y &")
# What may follow the subject of a sentence, beside words with one of these endings.
VERBS = OPENING | _words(
    """became began came died fell first found grew held lay led lies lost made may met might must
    or rose sang shall should spoke stood took went won wrote"""
)
ENDINGS = ("s", "ed", "ly")
OPENED, CLOSED = "([\"'“‘«", ")].,;:?\"'”’»"
POSSESSIVE = re.compile(r"['’]s$")
OF = re.compile(
    r"\b(?:of|for|in) (?:(?:the|an?|all|most|our|my|your|its|his|her|their) )?"
    r"((?:(?!of |for |in )[\w'’-]+ ){0,3}?[\w'’-]+),? (?:is|was|are|were|can|has|had|will)\b"
)
INITIAL = re.compile(r"(?:^|[\s.])\w\.$|\b(?:Jr|Sr|St|Co|Inc|Ltd)\.$")  # keeps its full stop


def guessed_subject(prompt: str) -> str | None:
    """What a prompt seems to be about, standing there once; ``None`` where that is not clear."""
    found = list(_names(prompt))
    if len(found) > 1:
        return None
    if not found or not _is_whole(found[0], prompt):
        found = OF.findall(prompt)
    return found[0] if len(found) == 1 and prompt.count(found[0]) == 1 else None


def _is_whole(name: str, prompt: str) -> bool:
    """Whether a verb follows, and not a noun that the name may belong to."""
    rest = prompt.partition(name)[2]
    following = re.match(r" (\w+)", rest)
    if following is None or "?" in rest:  # in a question any verb may follow: "did France win"
        return True
    word = following[1].lower()
    return word in VERBS or word.endswith(ENDINGS)


def _names(prompt: str) -> Iterator[str]:
    words = list(re.finditer(r"\S+", prompt))
    texts = [word[0] for word in words]
    named = [_begins_as_a_name(text) for text in texts]
    for number, text in enumerate(texts):
        heads = number == 0 or texts[number - 1][-1] in ".?!:"
        if heads and text.lower() in OPENING:
            named[number] = False
    next_free = 0
    for first, is_name in enumerate(named):
        if is_name and first >= next_free:
            last = _last_of(first, texts, named)
            next_free = last + 1
            yield _trimmed(prompt[words[first].start() : words[last].end()])


def _begins_as_a_name(word: str) -> bool:
    letter = word.lstrip(OPENED)[:1]
    return letter.isupper() or letter.isdigit()


def _last_of(first: int, words: list[str], named: list[bool]) -> int:
    """Where a name that begins at ``first`` ends."""
    last = first
    while words[last][-1] not in ",;:?" and not POSSESSIVE.search(words[last]):
        following = last + 1
        while following < len(words) and words[following] in BETWEEN:
            following += 1
        if following == len(words) or not named[following]:
            break
        last = following
    return last


def _trimmed(name: str) -> str:
    """Without the punctuation around it."""
    name = POSSESSIVE.sub("", name.lstrip(OPENED) if name[0] not in "([" else name)
    while name[-1] in CLOSED and not INITIAL.search(name):
        if name[-1] in ")]" and any(bracket in name for bracket in "(["):
            break
        name = POSSESSIVE.sub("", name[:-1])
    return name
