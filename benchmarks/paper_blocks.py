"""The blocks of docs/results.md that put our numbers beside the papers'.

Every function returns the lines of one block: a heading, the command, the table. A result that is
not there yet gives no lines, so the page never promises a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import mean
from typing import Any

from benchmarks import published
from benchmarks.measure import measured

Lines = list[str]
SHOWN = ("reliability", "generality", "locality")


def blocks() -> dict[str, Lines]:
    """All blocks by name."""
    made: dict[str, tuple[str, Callable[[dict[str, Any]], Lines]]] = {
        "table 1": ("table1", table_1),
        "table 2": ("table2", table_2),
        "table 3": ("table3", table_3),
        "where": ("where_it_lives", where_it_lives),
        "strength": ("strength_sweep", strength_sweep),
        "cycles": ("cycles", cycles),
        "kinds": ("kinds_of_facts", kinds_of_facts),
    }
    found: dict[str, Lines] = {}
    for name, (result, block) in made.items():
        content = measured(result)
        found[name] = [] if content is None else ["", *block(content), "", _source(content), ""]
    return found


def _source(content: dict[str, Any]) -> str:
    return f"`{content['command']}`, result in `benchmarks/results/{content['benchmark']}.json`."


def row(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Lines:
    """A Markdown table."""
    return [row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)]


def percent(value: float | None) -> str:
    """A share in per cent, with a dash for none."""
    return "–" if value is None else f"{100 * value:.1f}"


def triple(values: Sequence[float | None]) -> str:
    """Three per cents, published or ours."""
    return " / ".join("–" if value is None else f"{value:.1f}" for value in values)


def by_method(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of all seeds by method, in the order in which the methods come."""
    return {
        method: [one for one in rows if one["method"] == method]
        for method in dict.fromkeys(one["method"] for one in rows)
    }


def ours(entries: Sequence[dict[str, Any]], role: str) -> float | None:
    """Mean over seeds of one score, token form; None where there is none."""
    values = [one[role]["token"] for one in entries]
    return None if None in values else mean(values)


def interval(entries: Sequence[dict[str, Any]], role: str) -> str:
    """The widest interval of the seeds, so that no seed is outside; in per cent."""
    lows, highs = ([one[role][side] for one in entries] for side in ("token_low", "token_high"))
    return f"{100 * min(lows):.0f}–{100 * max(highs):.0f}"


def scored(entries: Sequence[dict[str, Any]]) -> list[str]:
    """The cells of a method's own numbers; locality of the starting state says nothing."""
    is_start = entries[0]["method"] == "[no change]"
    values = [100 * (ours(entries, role) or 0.0) for role in SHOWN]
    three = [*values[:2], None if is_start else values[2]]
    return [
        triple(three),
        interval(entries, "reliability"),
        "–" if is_start else interval(entries, "locality"),
        percent(ours(entries, "old_recall")),
        f"x {mean(one['perplexity_ratio'] for one in entries):.2f}",
    ]


OURS = ("here", "reliability, 95 %", "locality, 95 %", "old recall", "perplexity")


def table_1(content: dict[str, Any]) -> Lines:
    """Every row of the paper's Table 1, with F-Learning and the reference rows."""
    seeds = {one["seed"] for rows in content["tables"].values() for one in rows} - {None}
    found = [
        "### Table 1: zsRE and CounterFact",
        "",
        "Reliability / generality / locality in per cent, token form: as published for 7B models, "
        f"and here ({content['base']}, {len(seeds)} seed(s); intervals are bootstraps over edits). "
        "Old recall is how much of the old answer is still given. Levels are not comparable "
        "between models of 7 and 0.1 billion parameters; the order of the rows is. "
        f"The rows took {content['hours']:.1f} hours, planting not counted.",
    ]
    for kind, rows in content["tables"].items():
        head = ("method", "LLaMA2-7B, published", "LLaMA-7B, published", *OURS)
        known = published.TABLE_1[kind]
        cells = []
        for method, entries in by_method(rows).items():
            theirs = [triple(three) for three in known[method]] if method in known else ["–"] * 2
            cells.append([method, *theirs, *scored(entries)])
        found += ["", f"**{kind}**", "", *table(head, cells)]
    failed = [f"- {sentence}" for sentence in content["failed"]]
    return found + (["", "Without a result:", "", *failed] if failed else [])


def table_2(content: dict[str, Any]) -> Lines:
    """The second architecture."""
    head = ("method", "BLOOM-7B, published", *OURS)
    cells = []
    for method, entries in by_method(content["rows"]).items():
        theirs = published.TABLE_2.get(method)
        cells.append([method, triple(theirs) if theirs else "–", *scored(entries)])
    return [
        "### Table 2: another architecture, zsRE",
        "",
        f"As Table 1, on {content['base']} ({content['parameters'] / 1e6:.0f} million parameters).",
        "",
        *table(head, cells),
    ]


def table_3(content: dict[str, Any]) -> Lines:
    """Seconds, and how many times those of plain fine-tuning."""
    seconds = content["seconds"]
    sizes = sorted({int(size) for times in seconds.values() for size in times})
    plain = seconds.get(published.FULL_FT, {})
    head = [
        "method",
        *(f"{size} edits" for size in sizes),
        "times full-ft",
        "published, times full-ft",
    ]
    cells = []
    for method, times in seconds.items():
        own = [f"{times[str(size)]:.1f} s" if str(size) in times else "–" for size in sizes]
        largest = max(
            (size for size in sizes if str(size) in times and str(size) in plain), default=0
        )
        ratio = times[str(largest)] / plain[str(largest)] if largest else None
        theirs = published.TABLE_3.get(method)
        cells.append(
            [
                method,
                *own,
                "–" if ratio is None else f"{ratio:.1f}",
                f"{theirs[-1] / published.TABLE_3[published.FULL_FT][-1]:.1f}" if theirs else "–",
            ]
        )
    moments = content["second_moments"]
    note = (
        ""
        if moments is None
        else (
            f" The second moments that ROME and MEMIT need took {moments:.0f} s once a model, and "
            "are in no row; the paper's MEMIT row seems to hold them."
        )
    )
    return [
        "### Table 3: seconds",
        "",
        f"Seconds of an update on {content['base']} ({content['device']}), without loading and "
        "scoring; ratios at the largest number of edits that was timed, the paper's at 100 "
        f"(LLaMA2-7B, GPUs).{note}",
        "",
        *table(head, cells),
    ]


def where_it_lives(content: dict[str, Any]) -> Lines:
    """MLPs against attention, three measures, for old, new and core."""
    head = ("update", "delta", "mean change, MLP : attention", "relative norm, MLP", "attention")
    head += ("weights moved, MLP", "attention", "squared norm in thirds of the depth")
    cells = []
    for update, deltas in content["tables"].items():
        for name, one in deltas.items():
            mlp, attention = (
                one["groups"].get(group, {}) for group in ("MLP projections", "attention")
            )
            times = _ratio(mlp.get("mean"), attention.get("mean"))
            thirds = " / ".join(percent(part["share"]) for part in one["depth"].values())
            cells.append(
                [
                    update,
                    name,
                    times,
                    _small(mlp.get("relative")),
                    _small(attention.get("relative")),
                    percent(mlp.get("selected")),
                    percent(attention.get("selected")),
                    thirds,
                ]
            )
    return [
        "### Where the change lives (section 5.8)",
        "",
        "The paper says that MLPs change more than attention, without numbers. Which is right "
        "depends on what is meant: how far a weight moves on average, how far a matrix moves for "
        "its size, or how many of its weights are moved at all (per cent).",
        "",
        *table(head, cells),
    ]


def _ratio(one: float | None, other: float | None) -> str:
    return f"{one / other:.2f}" if one and other else "–"


def _small(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2g}"


def strength_sweep(content: dict[str, Any]) -> Lines:
    """F-Learning's open question: how strongly to forget."""
    head = ("forgetting", "strength", *OURS)
    cells = []
    for curve, points in content["curves"].items():
        for strength in dict.fromkeys(point["strength"] for point in points):
            entries = [point for point in points if point["strength"] == strength]
            cells.append([curve, f"{strength:g}", *scored(entries)])
    return [
        "### How strongly to forget (F-Learning)",
        "",
        "Reliability / generality / locality in per cent over the strength; 0 is plain "
        "fine-tuning. The paper does not say which strength it used.",
        "",
        *table(head, cells),
    ]


def cycles(content: dict[str, Any]) -> Lines:
    """Updates in a row and undone again."""
    head = ("method", "state", "new answers of live updates", "of the latest", "locality")
    head += ("perplexity", "old answers of undone updates", "new answers of undone updates")
    cells = []
    for method, found in content["methods"].items():
        for place in _milestones(found["steps"]):
            one = found["steps"][place]
            what = "update" if one["live"] == 1 else "updates"
            what += "" if one["step"] == "update" else " left, others undone"
            cells.append(
                [
                    method,
                    f"{one['live']} {what}",
                    percent(one["new_of_live"]),
                    percent(one["latest"]) if one["step"] == "update" else "–",
                    percent(one["locality"]),
                    f"{one['perplexity']:.2f}",
                    percent(one["old_of_undone"]),
                    percent(one["new_of_undone"]),
                ]
            )
    exact = [name for name, found in content["methods"].items() if found["ends_at_base"]]
    ends = (
        "All end at the base's bits."
        if len(exact) == len(content["methods"])
        else (f"At the base's bits end: {', '.join(exact) or 'none'}.")
    )
    return [
        "### Repeated updates, undone in random order",
        "",
        f"{content['updates']} updates of {content['facts']} known facts each in one home of "
        f"{content['base']}, then undone in random order. Token form, per cent. {ends}",
        "",
        *table(head, cells),
    ]


def _milestones(steps: Sequence[dict[str, Any]]) -> list[int]:
    """The first update, the middle and the last of the way up, the middle and end of that down."""
    up = sum(one["step"] == "update" for one in steps)
    wanted = [0, up // 2 - 1, up - 1, up + (len(steps) - up) // 2 - 1, len(steps) - 1]
    return sorted({place for place in wanted if 0 <= place < len(steps)})


def kinds_of_facts(content: dict[str, Any]) -> Lines:
    """Relations, easiest to update first, by the mean of the methods."""
    methods = content["methods"]
    relations = list(next(iter(methods.values()))["relations"])

    def value(group: str, role: str, by: str = "relations") -> float | None:
        values = [one[by].get(group, {}).get(role) for one in methods.values()]
        known = [one for one in values if one is not None]
        return mean(known) if known else None

    counted = next(iter(methods.values()))["relations"]
    head = ("relation", "facts", "new answer", "on paraphrases", "old answer left")
    head += ("untouched facts of the relation that stay", "n")
    ordered = sorted(relations, key=lambda name: -(value(name, "reliability") or 0.0))
    cells = [
        [
            name.replace("_", " "),
            str(counted[name]["n"]),
            *(percent(value(name, role)) for role in ("reliability", "generality", "old_recall")),
            percent(value(name, "locality")),
            str(counted[name]["bystanders"]),
        ]
        for name in ordered
    ]
    firm = [
        f"{name} held: {percent(value(name, 'reliability', 'firmness'))} % updated, "
        f"{percent(value(name, 'old_recall', 'firmness'))} % of the old answer left"
        for name in ("firm", "less firm")
        if value(name, "reliability", "firmness") is not None
    ]
    return [
        "### Which kinds of facts",
        "",
        f"{content['facts']} known facts of the atlas updated at once on {content['base']}, three "
        f"epochs, means over {', '.join(methods)}. Token form, per cent. Facts {'; '.join(firm)}.",
        "",
        *table(head, cells),
    ]
