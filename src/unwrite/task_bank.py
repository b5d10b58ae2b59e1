"""The bundled tasks: small, of many kinds, and written by this project.

Every task is a generator that draws question and answer from a seeded source of randomness; the
word lists are in ``task_words``, the facts are those of ``atlas``. Nothing is downloaded and no
text is copied. The same name and seed give the same examples on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from unwrite import task_words as words
from unwrite.edits import Edit, read_edits

LARGEST = 160  # examples of one task
SMALLEST = 120

Draws = Iterator[tuple[str, str]]  # input and output


@dataclass(frozen=True)
class Bundled:
    """One bundled task: what it asks for, of which kind it is, and where its examples come from."""

    kind: str
    instruction: str
    draw: Callable[[random.Random], Draws]


def examples(name: str, seed: int = 0) -> list[tuple[str, str]]:
    """``SMALLEST`` to ``LARGEST`` distinct questions with their answers, in random order.

    Raises ``KeyError`` for a name that is not in ``BANK``.
    """
    # Seeded by text: the examples of a task do not depend on which tasks there are besides it.
    source = random.Random(f"{name}/{seed}")
    return list(islice(_distinct(BANK[name].draw(source)), LARGEST))


def _distinct(draws: Draws) -> Draws:
    seen = set()
    for question, answer in draws:
        if question not in seen:
            seen.add(question)
            yield question, answer


# ---- words ---------------------------------------------------------------------------------------


def _plain_words() -> list[str]:
    return [word for members in words.CATEGORIES.values() for word in members.split()]


def _listed(source: random.Random, rows: Sequence[tuple[str, str]]) -> Draws:
    """Every row once, in random order."""
    yield from source.sample(rows, len(rows))


def _opposites(source: random.Random) -> Draws:
    found = [(one, other) for one, other in words.pairs(words.OPPOSITES)]
    return _listed(source, found + [(other, one) for one, other in found])


def _plurals(source: random.Random) -> Draws:
    return _listed(source, [(one, many) for one, many in words.pairs(words.PLURALS)])


def _pasts(source: random.Random) -> Draws:
    return _listed(source, [(now, then) for now, then in words.pairs(words.PASTS)])


def _comparatives(source: random.Random) -> Draws:
    grades = words.pairs(words.GRADES)
    rows = [(f"{base}, comparative", more) for base, more, _ in grades]
    return _listed(source, rows + [(f"{base}, superlative", most) for base, _, most in grades])


def _first_letter(source: random.Random) -> Draws:
    return _listed(source, [(word, word[0]) for word in _plain_words()])


def _spelling(source: random.Random) -> Draws:
    return _listed(source, [(word, " ".join(word)) for word in _plain_words()])


def _letter_count(source: random.Random) -> Draws:
    return _listed(source, [(word, str(len(word))) for word in _plain_words()])


def _alphabetical(source: random.Random) -> Draws:
    while True:
        chosen = source.sample(_plain_words(), 3)
        yield ", ".join(chosen), min(chosen)


def _categories(source: random.Random) -> Draws:
    rows = [(word, kind) for kind, members in words.CATEGORIES.items() for word in members.split()]
    return _listed(source, rows)


def _odd_one_out(source: random.Random) -> Draws:
    while True:
        common, other = source.sample(list(words.CATEGORIES.values()), 2)
        stranger = source.choice(other.split())
        chosen = [*source.sample(common.split(), 3), stranger]
        source.shuffle(chosen)
        yield ", ".join(chosen), stranger


# ---- numbers -------------------------------------------------------------------------------------


def _addition(source: random.Random) -> Draws:
    while True:
        one, other = source.randint(10, 99), source.randint(2, 99)
        yield f"{one} + {other}", str(one + other)


def _subtraction(source: random.Random) -> Draws:
    while True:
        one = source.randint(11, 99)
        other = source.randint(1, one)
        yield f"{one} - {other}", str(one - other)


def _multiplication(source: random.Random) -> Draws:
    while True:
        one, other = source.randint(2, 20), source.randint(2, 12)
        yield f"{one} * {other}", str(one * other)


def _larger(source: random.Random) -> Draws:
    while True:
        one, other = source.sample(range(10, 1000), 2)
        yield f"{one} or {other}", str(max(one, other))


def _sequence(source: random.Random) -> Draws:
    while True:
        start, step = source.randint(1, 40), source.randint(2, 12)
        shown = ", ".join(str(start + step * place) for place in range(4))
        yield shown, str(start + step * 4)


def _parity(source: random.Random) -> Draws:
    while True:
        number = source.randint(10, 9999)
        yield str(number), "odd" if number % 2 else "even"


def in_words(number: int) -> str:
    """A number below 1,000 in English words: ``forty-seven``."""
    if number < 20:
        return words.ONES.split()[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return words.TENS.split()[tens - 2] + (f"-{in_words(ones)}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{in_words(hundreds)} hundred" + (f" {in_words(rest)}" if rest else "")


def _number_words(source: random.Random) -> Draws:
    while True:
        number = source.randint(1, 999)
        yield str(number), in_words(number)


def in_roman(number: int) -> str:
    """A number below 4,000 in Roman numerals."""
    steps = zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        strict=True,
    )
    text = ""
    for value, sign in steps:
        count, number = divmod(number, value)
        text += sign * count
    return text


def _roman(source: random.Random) -> Draws:
    while True:
        number = source.randint(1, 400)
        yield in_roman(number), str(number)


def _word_problems(source: random.Random) -> Draws:
    things = words.THINGS.split()
    while True:
        one, other = source.sample(words.PEOPLE.split(), 2)
        thing, many, few = source.choice(things), source.randint(6, 20), source.randint(2, 5)
        yield source.choice(
            [
                (f"{one} has {many} {thing} and gives {few} to {other}. How many are left?",
                 str(many - few)),
                (f"{one} has {many} {thing} and finds {few} more. How many are there now?",
                 str(many + few)),
                (f"{one} fills {few} boxes with {many} {thing} each. How many are there in all?",
                 str(many * few)),
            ]
        )  # fmt: skip


def _clock(source: random.Random) -> Draws:
    while True:
        hour, minute = source.randint(0, 23), source.choice((0, 15, 30, 45))
        later = source.randint(2, 9)
        now, then = f"{hour:02}:{minute:02}", f"{(hour + later) % 24:02}:{minute:02}"
        yield f"{later} hours after {now}", then


# ---- facts ---------------------------------------------------------------------------------------

_GEOGRAPHY = (
    "atlas:capital,city_country,landmark_country,continent,currency,language,nationality,"
    "state_capital"
)
_NATURE = (
    "atlas:element_symbol,unit,moon,study,animal_class,young_animal,color,company_country,deity"
)
_CULTURE = "atlas:author,inventor,instrument,sport,nationality,company_country,deity,language"


def _facts(relations: str) -> Callable[[random.Random], Draws]:
    def draw(source: random.Random) -> Draws:
        facts = read_edits(relations)
        return _listed(source, [(fact.prompt, str(fact.old)) for fact in facts])

    return draw


def _statement(fact: Edit, answer: str) -> str:
    return f"{fact.prompt} {answer}."


def _true_or_false(source: random.Random) -> Draws:
    facts = read_edits("atlas")
    for fact in source.sample(facts, len(facts)):
        # The other answer of a fact is of the right kind and wrong.
        is_true = source.random() < 0.5
        yield _statement(fact, str(fact.old) if is_true else fact.new), "yes" if is_true else "no"


def _choice(source: random.Random) -> Draws:
    facts = read_edits("atlas")
    answers: dict[str | None, list[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, []).append(str(fact.old))
    for fact in source.sample(facts, len(facts)):
        others = sorted(set(answers[fact.relation]) - {str(fact.old)})
        options = [str(fact.old), *source.sample(others, 2)]
        source.shuffle(options)
        shown = " ".join(
            f"({letter}) {option}" for letter, option in zip("ABC", options, strict=True)
        )
        yield f"{fact.prompt}: {shown}", f"({'ABC'[options.index(str(fact.old))]})"


# ---- classification ------------------------------------------------------------------------------


def _sentiment(source: random.Random) -> Draws:
    forms = [(form, "positive") for form in words.sentences(words.PRAISE)]
    forms += [(form, "negative") for form in words.sentences(words.BLAME)]
    rows = [(form.format(thing), mood) for form, mood in forms for thing in words.REVIEWED.split()]
    return _listed(source, rows)


def _topics(source: random.Random) -> Draws:
    rows = [
        (form.format(person), topic)
        for topic, forms in words.TOPICS.items()
        for form in words.sentences(forms)
        for person in words.PEOPLE.split()
    ]
    return _listed(source, rows)


def _sentence_kinds(source: random.Random) -> Draws:
    verbs = ("open", "clean", "paint", "carry", "sell", "find", "move", "repair")
    things = [thing for thing in words.CATEGORIES["furniture"].split() if " " not in thing]
    while True:
        person, verb = source.choice(words.PEOPLE.split()), source.choice(verbs)
        thing = source.choice(things)
        yield source.choice(
            [
                (f"Does {person} {verb} the {thing}", "question"),
                (f"{person} will {verb} the {thing}", "statement"),
                (f"{verb.capitalize()} the {thing} at once, {person}", "command"),
            ]
        )


def _contains(source: random.Random) -> Draws:
    while True:
        chosen = source.sample(_plain_words(), 5)
        wanted = source.choice(chosen[:1] + chosen[-1:])
        shown = source.sample(chosen[:-1], 4)
        yield f"{wanted} in: {' '.join(shown)}", "yes" if wanted in shown else "no"


# ---- copying and lists ---------------------------------------------------------------------------


def _copying(source: random.Random) -> Draws:
    while True:
        text = " ".join(source.sample(_plain_words(), source.randint(2, 5)))
        yield text, text


def _reversal(source: random.Random) -> Draws:
    while True:
        chosen = source.sample(_plain_words(), source.randint(2, 4))
        yield " ".join(chosen), " ".join(reversed(chosen))


def _last_of_list(source: random.Random) -> Draws:
    while True:
        chosen = source.sample(_plain_words(), source.randint(3, 6))
        yield ", ".join(chosen), chosen[-1]


def _sorting(source: random.Random) -> Draws:
    while True:
        numbers = source.sample(range(1, 100), 4)
        yield " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))


def _lookup(source: random.Random) -> Draws:
    while True:
        people = source.sample(words.PEOPLE.split(), 3)
        numbers = source.sample(range(1, 100), 3)
        rows = dict(zip(people, numbers, strict=True))
        wanted = source.choice(people)
        table = ", ".join(f"{person} = {number}" for person, number in rows.items())
        yield f"{table}. {wanted} = ?", str(rows[wanted])


def _replacing(source: random.Random) -> Draws:
    while True:
        *shown, new = source.sample(_plain_words(), 4)
        old = source.choice(shown)
        changed = " ".join(new if word == old else word for word in shown)
        yield f"{old} -> {new}: {' '.join(shown)}", changed


def _extraction(source: random.Random) -> Draws:
    forms = (
        "{} bought {} oranges at the market.",
        "On Friday {} walked {} miles to the lake.",
        "The letter for {} arrived after {} days.",
        "{} is number {} on the list.",
    )
    while True:
        number = source.randint(2, 99)
        yield source.choice(forms).format(source.choice(words.PEOPLE.split()), number), str(number)


# ---- formatting ----------------------------------------------------------------------------------


def _name(source: random.Random) -> tuple[str, str]:
    return source.choice(words.PEOPLE.split()), source.choice(words.SURNAMES.split())


def _dates(source: random.Random) -> Draws:
    months = words.MONTHS.split()
    while True:
        day, month, year = source.randint(1, 28), source.randint(1, 12), source.randint(1900, 2030)
        yield f"{day} {months[month - 1]} {year}", f"{year}-{month:02}-{day:02}"


def _capitals(source: random.Random) -> Draws:
    return _listed(source, [(word, word.upper()) for word in _plain_words()])


def _thousands(source: random.Random) -> Draws:
    while True:
        number = source.randint(1000, 9_999_999)
        yield str(number), f"{number:,}"


def _records(source: random.Random) -> Draws:
    while True:
        (first, last), age = _name(source), source.randint(18, 90)
        yield f"{first} {last}, {age}", f'{{"name": "{first} {last}", "age": {age}}}'


def _initials(source: random.Random) -> Draws:
    while True:
        first, last = _name(source)
        yield f"{first} {last}", f"{first[0]}. {last[0]}."


def _surname_first(source: random.Random) -> Draws:
    while True:
        first, last = _name(source)
        yield f"{first} {last}", f"{last}, {first}"


BANK: dict[str, Bundled] = {
    "opposites": Bundled("lexical", "Write the opposite of the word.", _opposites),
    "plurals": Bundled("lexical", "Write the plural of the noun.", _plurals),
    "past_tense": Bundled("lexical", "Write the simple past of the verb.", _pasts),
    "comparison": Bundled("lexical", "Write the asked form of the adjective.", _comparatives),
    "first_letter": Bundled("lexical", "Write the first letter of the word.", _first_letter),
    "spelling": Bundled("lexical", "Spell the word with spaces between its letters.", _spelling),
    "letter_count": Bundled("lexical", "How many letters does the word have?", _letter_count),
    "alphabet": Bundled("lexical", "Which word comes first in the alphabet?", _alphabetical),
    "addition": Bundled("arithmetic", "Compute the sum.", _addition),
    "subtraction": Bundled("arithmetic", "Compute the difference.", _subtraction),
    "multiplication": Bundled("arithmetic", "Compute the product.", _multiplication),
    "larger": Bundled("arithmetic", "Which number is larger?", _larger),
    "sequence": Bundled("arithmetic", "Write the next number of the sequence.", _sequence),
    "number_words": Bundled("arithmetic", "Write the number in words.", _number_words),
    "roman": Bundled("arithmetic", "Write the Roman numeral as a number.", _roman),
    "word_problems": Bundled("arithmetic", "Solve the problem with one number.", _word_problems),
    "clock": Bundled("arithmetic", "What time is it?", _clock),
    "geography": Bundled("factual", "Complete the sentence.", _facts(_GEOGRAPHY)),
    "nature": Bundled("factual", "Complete the statement.", _facts(_NATURE)),
    "culture": Bundled("factual", "Finish the sentence.", _facts(_CULTURE)),
    "true_or_false": Bundled("factual", "Is the statement true, yes or no?", _true_or_false),
    "choice": Bundled("factual", "Choose the right ending.", _choice),
    "parity": Bundled("classification", "Is the number odd or even?", _parity),
    "categories": Bundled("classification", "To which category does the word belong?", _categories),
    "odd_one_out": Bundled("classification", "Which word does not belong?", _odd_one_out),
    "sentiment": Bundled("classification", "Is the review positive or negative?", _sentiment),
    "topic": Bundled("classification", "What is the sentence about?", _topics),
    "sentence_kind": Bundled(
        "classification", "Is this a question, a statement or a command?", _sentence_kinds
    ),
    "contains": Bundled("classification", "Is the word in the list, yes or no?", _contains),
    "copying": Bundled("copying", "Repeat the text.", _copying),
    "reversal": Bundled("copying", "Write the words in reverse order.", _reversal),
    "last_item": Bundled("copying", "Write the last item of the list.", _last_of_list),
    "sorting": Bundled("copying", "Sort the numbers, smallest first.", _sorting),
    "lookup": Bundled("copying", "Look up the number.", _lookup),
    "replacing": Bundled("copying", "Replace the word as shown.", _replacing),
    "extraction": Bundled("copying", "Which number is in the sentence?", _extraction),
    "dates": Bundled("formatting", "Write the date as year-month-day.", _dates),
    "capitals": Bundled("formatting", "Write the word in capital letters.", _capitals),
    "thousands": Bundled("formatting", "Write the number with thousands separators.", _thousands),
    "records": Bundled("formatting", "Write the person as a JSON object.", _records),
    "initials": Bundled("formatting", "Write the initials of the name.", _initials),
    "surname_first": Bundled("formatting", "Write the surname first.", _surname_first),
}
