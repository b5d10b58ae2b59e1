"""Does it help to forget? Plain against graceful fine-tuning over pairs of tasks.

    python -m benchmarks.graceful_study --stage develop
    python -m benchmarks.graceful_study --data ../shared/data

``develop`` runs a grid of strengths and intervals on development tasks; ``report`` takes the best
of them (mean difference of the loss on test examples to the plain run) and compares, on other
tasks: the most, the least and the least surely confident answers (top, bottom, random), and the
three schedules (periodic, ahead, random), for every task to forget and all of them together
(mixed), with the same number of learning steps in the same order. Of every run the test examples of
the task and of what it forgot are asked. Finished runs are kept beside the result and not repeated;
``--summary`` only writes the result, from the seeds of which every run is there. With ``--data``
some of the tasks to forget are public ones (see the provenance of the data).
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measure
from unwrite.delta import Delta
from unwrite.finetuning import Course, answers, closed, learn_task
from unwrite.forgetting import (
    GracefulForgetting,
    fisher_diagonal,
    forgetting_confidence,
    select,
    self_generate,
)
from unwrite.model import Model
from unwrite.observe import perplexity
from unwrite.tasks import Task, read_task, read_tasks
from unwrite.training import Pair

# Tasks on which parameters are chosen, and others on which results are reported.
LEARN = {
    "develop": ("past_tense", "number_words"),
    "report": ("plurals", "dates", "categories", "multiplication", "odd_one_out"),
}
FORGET = {
    "develop": ("nature", "sentiment"),
    "report": ("geography", "true_or_false", "word_problems"),
}
# Public tasks to forget besides, with ``--data``: file and name of the task there.
PUBLIC = (
    ("multitask_50.jsonl", "ii_antonyms"),
    ("p3_t0_tasks_x50.jsonl", "commonsense_qa_answer_given_question_without_options"),
)
MIXED = "mixed"
STRENGTHS = (0.05, 0.2, 0.5)
INTERVALS = (2, 4)  # learning steps between unlearning steps
RESAMPLES = 2000
NAMES = {"develop": "graceful_develop", "report": "graceful_study"}
SETTINGS = ("epochs", "share", "fisher", "limit")  # of the runs


@dataclass(frozen=True)
class Variant:
    """One way to forget; ``plain`` has strength 0."""

    name: str
    strength: float
    every: int
    select: Any = "top"
    schedule: Any = "periodic"


@dataclass(frozen=True)
class Chosen:
    """What is chosen on the development tasks."""

    strength: float
    every: int


def variants(chosen: Chosen | None) -> list[Variant]:
    """The graceful variants: the grid of development, or those that are reported."""
    if chosen is None:
        return [
            Variant(f"strength {one}, every {steps}", one, steps)
            for one in STRENGTHS
            for steps in INTERVALS
        ]
    of = (chosen.strength, chosen.every)
    return [
        Variant("top, periodic", *of),
        Variant("bottom, periodic", *of, select="bottom"),
        Variant("random, periodic", *of, select="random"),
        Variant("top, ahead", *of, schedule="ahead"),
        Variant("top, at random", *of, schedule="random"),
    ]


class Study:
    """One learning task at one seed: the plain run, and what all variants share."""

    def __init__(
        self, model: Model, task: Task, let_go: Sequence[Task], seed: int, options: Any
    ) -> None:
        self.model, self.task, self.let_go, self.options = model, task, let_go, options
        self.course = Course(epochs=options.epochs, seed=seed)
        self.plain: Delta | None = None

    def missing(self, chosen: Chosen | None, done: set[str]) -> Iterator[dict[str, Any]]:
        """Every run that is not among ``done``, one row each."""
        if (key := self._key("plain", "")) not in done:
            yield {"key": key, **self._run("plain", "", None)}
        for forget in [*(task.name for task in self.let_go), MIXED]:
            for variant in variants(chosen):
                if (key := self._key(variant.name, forget)) not in done:
                    yield {"key": key, **self._run(variant.name, forget, variant)}

    def _key(self, variant: str, forget: str) -> str:
        return f"{self.task.name}/{self.course.seed}/{forget}/{variant}"

    def _run(self, name: str, forget: str, variant: Variant | None) -> dict[str, Any]:
        started = time.perf_counter()
        callback = None
        if variant is None:
            delta = self._plain_run()
        else:
            callback = self._callback(forget, variant)
            delta = self._learn([callback])
        trained = time.perf_counter()
        forgotten = [task for task in self.let_go if forget in ("", task.name, MIXED)]
        tests = [row for task in (self.task, *forgotten) for row in task.test]
        with self.model.shifted(delta):
            rows = answers(self.model, tests)
            losses = test_losses(self.model, self.task)
            text = perplexity(self.model)
        return {
            "learn": self.task.name,
            "forget": forget,
            "variant": name,
            "seed": self.course.seed,
            "settings": None if variant is None else asdict(variant),
            "right": told(rows),
            "loss": losses,
            "perplexity": text,
            "unlearning_steps": 0 if callback is None else callback.done,
            "skipped": sum(row["skipped"] for row in callback.history) if callback else 0,
            "train_seconds": trained - started,
            "measure_seconds": time.perf_counter() - trained,
        }

    def _learn(self, callbacks: Sequence[Any]) -> Delta:
        with tempfile.TemporaryDirectory() as scratch:
            return learn_task(self.model, self.task.train, self.course, Path(scratch), callbacks)

    def _plain_run(self) -> Delta:
        if self.plain is None:
            self.plain = self._learn([])
            self._rank()
        return self.plain

    def _rank(self) -> None:
        """The confidence of the model's own answers on all tasks to be forgotten."""
        assert self.plain is not None
        own = [
            (task.name, pair)
            for task in self.let_go
            for pair in self_generate(self.model, task.train)
        ]
        rows = list(self.task.train)
        random.Random(self.course.seed).shuffle(rows)
        data = [Pair(one.prompt, one.answer) for one in rows[: self.options.fisher]]
        with self.model.shifted(self.plain):
            fisher = fisher_diagonal(self.model, data)
        pairs = [pair for _, pair in own]
        found = forgetting_confidence(self.model, pairs, self.plain, fisher)
        self.own = own
        self.confidence = [float(one) for one in found.values]

    def _callback(self, forget: str, variant: Variant) -> GracefulForgetting:
        self._plain_run()
        indices = [i for i, (task, _) in enumerate(self.own) if forget in (task, MIXED)]
        values = [self.confidence[index] for index in indices]
        count = max(1, round(self.options.share * len(self.task.train)))
        chosen = [indices[i] for i in select(values, variant.select, count, self.course.seed)]
        return GracefulForgetting(
            [self.own[index][1] for index in chosen],
            confidence=[self.confidence[index] for index in chosen],
            every=variant.every,
            strength=variant.strength,
            schedule=variant.schedule,
            tokenizer=self.model.tokenizer,
            seed=self.course.seed,
        )


def test_losses(model: Model, task: Task) -> list[float]:
    """Of every test example of a task, the mean loss of its answer's tokens, the end mark included:
    finer than right and wrong."""
    rows = [closed(model, example) for example in task.test if example.answer]
    return [round(-one.logprob / len(one.targets), 5) for one in model.force(rows)]


def told(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By task, a digit for every test example: was its answer right?"""
    found: dict[str, str] = defaultdict(str)
    for row in rows:
        found[row["task"]] += str(int(row["right"]))
    return dict(found)


def rights(run: Mapping[str, Any], tasks: Sequence[str]) -> dict[tuple[str, int], float]:
    """Of a run, 0 or 1 for every test example of some tasks."""
    return {(task, n): float(one) for task in tasks for n, one in enumerate(run["right"][task])}


def losses(run: Mapping[str, Any]) -> dict[tuple[str, int], float]:
    """Of a run, the loss of every test example of the task that it learned."""
    return {(run["learn"], number): one for number, one in enumerate(run["loss"])}


class Gaps:
    """What graceful runs differ in from the plain run that they are held against.

    Every run counts the same, and in it every example. Runs against one plain run share its
    accidents and ask the same examples, so the interval draws plain runs, then examples in each,
    and what is drawn brings all its differences along.
    """

    def __init__(self) -> None:
        self.runs = 0
        # By task and seed, then example: sum of the weighted differences, and of their weights.
        self.sums: dict[Any, dict[Any, np.ndarray]] = defaultdict(lambda: defaultdict(_nothing))

    def add(self, group: Any, graceful: Mapping[Any, float], plain: Mapping[Any, float]) -> None:
        """One run: a value for each of its examples, which the plain run has as well."""
        self.runs += 1
        for example, value in graceful.items():
            self.sums[group][example] += np.array([value - plain[example], 1]) / len(graceful)

    def summary(self) -> dict[str, float]:
        """Mean of graceful minus plain, with a paired 95 % bootstrap interval."""
        groups = [np.array(list(examples.values())) for examples in self.sums.values()]
        total, weight = np.concatenate(groups).sum(axis=0)
        source = np.random.default_rng(0)
        means = []
        for _ in range(RESAMPLES):
            drawn = [groups[index] for index in source.integers(0, len(groups), len(groups))]
            sums = np.sum([source.choice(one, len(one)).sum(axis=0) for one in drawn], axis=0)
            means.append(sums[0] / sums[1])
        low, high = np.percentile(means, [2.5, 97.5])
        return {
            "difference": float(total / weight),
            "low": float(low),
            "high": float(high),
            "runs": self.runs,
        }


def _nothing() -> np.ndarray:
    return np.zeros(2)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Differences to the plain runs of the same task and seed: of every variant, and of all
    variants together by what was learned and by what was to be forgotten."""
    plain = {(row["learn"], row["seed"]): row for row in rows if row["variant"] == "plain"}
    found: dict[str, dict[str, Gaps]] = defaultdict(lambda: defaultdict(Gaps))
    texts: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        group, name, learn = (row["learn"], row["seed"]), row["variant"], row["learn"]
        other = plain.get(group)
        if name == "plain" or other is None:
            continue
        let_go = [task for task in row["right"] if task != learn]
        right, loss = (rights(row, [learn]), rights(other, [learn])), (losses(row), losses(other))
        found["learned"][name].add(group, *right)
        found["loss"][name].add(group, *loss)
        found["forgotten"][name].add(group, rights(row, let_go), rights(other, let_go))
        for part, value in (("by_learned", learn), ("by_forgotten", row["forget"])):
            found[part][value].add(group, *right)
            found[f"loss_{part}"][value].add(group, *loss)
        found["by_pair"][f"{learn}, {row['forget']}, {name}"].add(group, *right)
        texts[name].append(row["perplexity"] / other["perplexity"])
    return {
        "plain_accuracy": {
            f"{learn}, seed {seed}": statistics.mean(rights(row, [learn]).values())
            for (learn, seed), row in plain.items()
        },
        "plain_loss": {
            f"{learn}, seed {seed}": statistics.mean(row["loss"])
            for (learn, seed), row in plain.items()
        },
        **{
            part: {name: gaps.summary() for name, gaps in of_part.items()}
            for part, of_part in found.items()
        },
        "perplexity_ratio": {name: statistics.mean(values) for name, values in texts.items()},
        "train_seconds": {
            kind: statistics.mean(
                [row["train_seconds"] for row in rows if (row["variant"] == "plain") == is_plain]
                or [0.0]
            )
            for kind, is_plain in (("plain, with confidence", True), ("graceful", False))
        },
    }


def of_whole_seeds(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs of the seeds that are finished: of others some tasks would weigh more."""
    counts = Counter((row["seed"], row["learn"]) for row in rows)
    learned = {learn for _, learn in counts}
    unfinished = {
        seed
        for seed, _ in counts
        if any(counts[seed, learn] < max(counts.values()) for learn in learned)
    }
    found = [row for row in rows if row["seed"] not in unfinished]
    if not found:
        raise SystemExit("No seed is finished yet; go on without --summary.")
    return found


def best_of_development() -> Chosen:
    """The settings with the lowest mean difference of loss on the development tasks."""
    runs = measure.lines(runs_of("develop"))
    if not runs:
        raise SystemExit("run --stage develop first, or give --strength and --every")
    runs = of_whole_seeds(runs)
    loss = summarise(runs)["loss"]
    best = min(loss, key=lambda name: loss[name]["difference"])
    settings = next(run["settings"] for run in runs if run["variant"] == best)
    return Chosen(settings["strength"], settings["every"])


def runs_of(stage: str) -> Path:
    """The file of the runs of a stage."""
    return measure.RESULTS / f"{NAMES[stage]}.jsonl"


def settings_of(options: Any, chosen: Chosen | None) -> dict[str, Any]:
    """What all runs of a stage have in common."""
    return {name: getattr(options, name) for name in SETTINGS} | (asdict(chosen) if chosen else {})


def main() -> None:
    """Run what is missing of a stage and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=list(LEARN), default="report")
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--data", type=Path, help="folder of the public data")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.125)
    parser.add_argument("--fisher", type=int, default=120, help="examples for the Fisher diagonal")
    parser.add_argument("--limit", type=int, help="training examples of each task")
    parser.add_argument("--tasks", type=int, help="only so many tasks of each kind")
    parser.add_argument("--strength", type=float, help="instead of the best on development")
    parser.add_argument("--every", type=int, help="with --strength")
    parser.add_argument("--summary", action="store_true", help="only write the result")
    options = parser.parse_args()
    given = [options.strength, options.every]
    if any(given) and not (all(given) and options.stage == "report"):
        parser.error("--strength and --every belong together, and to the stage report")
    chosen = None
    if options.stage == "report":
        chosen = Chosen(*given) if all(given) else best_of_development()
    if not options.summary:
        run(options, chosen)
    rows = of_whole_seeds(measure.lines(runs_of(options.stage)))
    seeds = sorted({row["seed"] for row in rows})
    counts = {"seeds": seeds, "runs": len(rows)}
    content = {"settings": settings_of(options, chosen), **counts, **summarise(rows)}
    measure.write(NAMES[options.stage], content, module="graceful_study")


def run(options: Any, chosen: Chosen | None) -> None:
    """Add every missing run to those that there are."""
    model = Model.load(options.base)
    path = runs_of(options.stage)
    there = measure.lines(path)
    settings = settings_of(options, chosen)
    if any(row["options"] != settings for row in there):
        raise SystemExit(f"The runs in {path.name} had other settings; give those, or remove it.")
    done = {row["key"] for row in there}
    let_go = [
        read_task(f"bank:{name}", limit=options.limit)
        for name in FORGET[options.stage][: options.tasks]
    ]
    if options.data is not None and options.stage == "report":
        for file, name in PUBLIC:
            found = read_tasks(options.data / file, limit=options.limit)
            let_go += [task for task in found if task.name == name]
    for seed in range(options.seeds):
        for name in LEARN[options.stage][: options.tasks]:
            task = read_task(f"bank:{name}", limit=options.limit)
            for row in Study(model, task, let_go, seed, options).missing(chosen, done):
                measure.add_line(path, row | {"options": settings})


if __name__ == "__main__":
    main()
