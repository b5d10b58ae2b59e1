"""Write the tables of README, docs/performance.md and docs/results.md from the committed results.

    python -m benchmarks.tables

Every figure in those tables comes from a JSON file in ``benchmarks/results``; a test holds the
pages to them.
"""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import auto_tables, paper_blocks
from benchmarks.measure import committed, measured
from benchmarks.method_defaults import harmonic
from benchmarks.paper_blocks import row
from benchmarks.planted_study import ROLES
from benchmarks.scale_tables import blocks

ROOT = Path(__file__).parent.parent
README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
RESULTS = ROOT / "docs" / "results.md"
SCALE = ROOT / "docs" / "scale.md"
TRUST = ROOT / "docs" / "trust.md"


MISSING = ["*Not measured yet.*"]
TITLES = {"rmse": "RMSE", "f1": "F1", "pr_auc": "PR-AUC", "lift": "lift at 5 %"}


def main() -> None:
    """Rewrite all pages in place."""
    for path, content in pages().items():
        path.write_text(content, "utf-8")


def pages() -> dict[Path, str]:
    """The pages with their tables as they should be."""
    head = ["| what | measured | goal |", "| --- | --- | --- |"]
    tables = {
        README: {"speed": [*head, *rows()]},
        PERFORMANCE: {
            "speed": [
                *head,
                *rows(),
                *floor_rows(),
                *delicate_rows(),
                *undo_rows(),
                *batch_rows(),
                *growth_rows(),
                *locate_rows(),
                *product_rows(),
                *peer_rows(),
                *forgetting_rows(),
                *callback_rows(),
            ]
        },
        RESULTS: {
            "development": development(),
            "locate": locate(),
            "choices": choices(),
            "study": study(),
            "forecasts": forecasts("forgetting_prediction"),
            "forecasts of updates": forecasts("forgetting_updates"),
            "replay": replay(),
            "sequence": sequence(),
            "protection": protection(),
            "stop": stop(),
            "graceful": graceful(),
            "graceful parts": graceful_parts(),
            **paper_blocks.blocks(),
            **auto_tables.blocks(),
        },
        SCALE: blocks(),
        TRUST: {"campaigns": campaigns()},
    }
    return {path: _filled(path.read_text("utf-8"), blocks) for path, blocks in tables.items()}


def _filled(text: str, blocks: dict[str, list[str]]) -> str:
    """The page with what stands between the marks of every block put anew."""
    for name, lines in blocks.items():
        begin, end = f"<!-- measured, {name}: begin -->", f"<!-- measured, {name}: end -->"
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = "\n".join([before + begin, *lines, end + after])
    return text


def development() -> list[str]:
    """The grids on the development splits, best setting of a method first."""
    found = [
        row(
            "method",
            "settings",
            "runs",
            "reliability",
            "generality",
            "locality",
            "harmonic mean",
            "minus full-ft",
            "old recall",
            "perplexity",
            "time",
        ),
        row(*["---"] * 11),
    ]
    grids = committed("method_defaults")["development"]
    for name, settings in grids.items():
        for one in settings:
            chosen = ", ".join(f"{key}={value}" for key, value in one["settings"].items())
            scores = [
                f"{100 * one[key]:.0f}"
                for key in ("reliability", "generality", "locality", "harmonic_mean", "old_recall")
            ]
            scores.insert(-1, gap(one["minus_full_ft"], one["lowest"], one["highest"]))
            times = (f"x {one['perplexity_ratio']:.2f}", f"x {one['times_full_ft']:.1f}")
            found.append(row(name, chosen, str(one["runs"]), *scores, *times))
    return found


def study() -> list[str]:
    """The planted test records: means over the seeds that all methods of a table were run with,
    token form, and the harmonic mean beside that of full-ft with the same seed; nothing before they
    were run."""
    if (result := measured("planted_study")) is None:
        return []
    found = []
    for title, entries in result["tables"].items():
        head = ("method", "seeds", "reliability", "generality", "locality", "harmonic mean")
        more = ("minus full-ft", "old recall", "perplexity")
        found += ["", f"**{title}**", "", row(*head, *more)]
        found.append(row(*["---"] * 9))
        names = dict.fromkeys(one["method"] for one in entries)
        by_method = {name: [one for one in entries if one["method"] == name] for name in names}
        every = set.intersection(
            *({one["seed"] for one in runs} for name, runs in by_method.items() if name[0] != "[")
        )
        plain = {one["seed"]: _mean_of_three(one) for one in by_method.get("full-ft", [])}
        for method, runs in by_method.items():
            same = [one for one in runs if method[0] == "[" or one["seed"] in every]
            scores = {role: mean(one[role]["token"] for one in same) for role in ROLES}
            means = {one["seed"]: _mean_of_three(one) for one in same}
            gaps = [means[seed] - plain[seed] for seed in means if seed in plain]
            compared = gaps and method != "full-ft"
            found.append(
                row(
                    method,
                    str(len(same)),
                    *(f"{100 * scores[role]:.1f}" for role in ROLES[:3]),
                    f"{100 * mean(means.values()):.1f}",
                    gap(mean(gaps), min(gaps), max(gaps)) if compared else "",
                    f"{100 * scores['old_recall']:.1f}",
                    f"x {mean(one['perplexity_ratio'] for one in same):.2f}",
                )
            )
    title = "### Planted records, in both regimes"
    where = "`python -m benchmarks.planted_study --data DATA --work WORK`, result in "
    return ["", title, *found, "", f"{where}`benchmarks/results/planted_study.json`.", ""]


def _mean_of_three(entry: dict[str, Any]) -> float:
    """The harmonic mean of a row's reliability, generality and locality."""
    return harmonic({role: entry[role]["token"] for role in ROLES})


def gap(value: float, low: float, high: float) -> str:
    """A difference in points, and the range that goes with it."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * one for one in (value, low, high)))


def locate() -> list[str]:
    """ROME, MEMIT and their kin on known facts: both forms and the number of probes."""
    found = [row("method", "reliability", "n", "locality", "n"), row(*["---"] * 5)]
    for name, one in committed("rome_memit")["effect"].items():
        cells = []
        for role in ("reliability", "locality"):
            score = one[role]
            cells += [f"{100 * score['token']:.1f} / {100 * score['exact']:.1f}", str(score["n"])]
        found.append(row(name, *cells))
    return found


def choices() -> list[str]:
    """What the defaults of ROME, MEMIT and their kin were chosen among, token form in per cent."""
    found = [row("method", "differs in", "reliability", "locality"), row(*["---"] * 4)]
    grid = committed("rome_memit")["defaults"]
    by_name: dict[str, list[tuple[dict[str, str], dict[str, Any]]]] = {}
    for one in grid:
        name, _, fields = one["method"].rstrip(")").partition("(")
        parts = re.findall(r"(\w+)=((?:\([^)]*\)|[^,(])+)", fields)
        by_name.setdefault(name, []).append((dict(parts), one))
    for name, runs in by_name.items():
        told = [key for key in runs[0][0] if len({fields.get(key) for fields, _ in runs}) > 1]
        for fields, one in runs:
            settings = ", ".join(f"{key}={fields[key]}" for key in told)
            scores = [f"{100 * one[role]:.0f}" for role in ("reliability", "locality")]
            found.append(row(name, settings, *scores))
    return found


def stop() -> list[str]:
    """Training with protected prompts, waiting for them and not; means over the draws of facts."""
    result = measured("protected_stop")
    if result is None:
        return MISSING
    shown = ("reliability", "generality", "locality", "harmonic_mean", "protected")
    found = [row("way", "epochs", *shown, "perplexity"), row(*["---"] * 8)]
    for way in dict.fromkeys(one["way"] for one in result["runs"]):
        runs = [one for one in result["runs"] if one["way"] == way]
        shares = [f"{100 * mean(one[name] for one in runs):.0f}" for name in shown]
        epochs = ", ".join(str(one["epochs"]) for one in runs)
        found.append(row(way, epochs, *shares, f"x {mean(r['perplexity'] for r in runs):.2f}"))
    return found


def forecasts(name: str) -> list[str]:
    """Forecasts of what new tasks destroy, in and out of domain, the best in domain first; below
    them, how much of the matrix simple models explain."""
    result = measured(name)
    if result is None:
        return MISSING
    splits = [name for name in ("in_domain", "out_of_domain") if name in result]
    tables = [result[name] for name in splits]
    head = [f"{metric}, {name.replace('_', ' ')}" for name in splits for metric in TITLES.values()]
    found = [row("model", *head), row(*["---"] * (1 + len(head)))]
    for name in sorted(tables[0], key=lambda one: tables[0][one]["rmse"]["mean"]):
        cells = [number(table[name][metric]) for table in tables for metric in TITLES]
        found.append(row(name, *cells))
    return [*found, "", *profiles({"": result["rank_profile"]})]


def profiles(found: dict[str, dict[str, Any]]) -> list[str]:
    """R2 of simple models, one row a matrix."""
    means = {"task mean": "task_mean", "example mean": "example_mean", "additive": "additive"}
    ranks = min(5, *(len(one["rank"]) for one in found.values()))
    head = ("R²", *means, *(f"rank {n}" for n in range(1, ranks + 1)))
    lines = [row(*head), row(*["---"] * len(head))]
    for label, one in found.items():
        values = [*(one[key] for key in means.values()), *one["rank"][:ranks]]
        lines.append(row(label, *("-" if r2 is None else f"{r2:.3f}" for r2 in values)))
    return lines


def replay() -> list[str]:
    """What is lost of held-out examples with different replays, and each against random."""
    result = measured("forgetting_replay")
    if result is None:
        return MISSING
    head = ("replayed", "tasks", "increase of log perplexity, held out", "minus random", "p")
    found = [row(*head), row(*["---"] * len(head))]
    for name, one in result["arms"].items():
        known = one["p"] is not None
        rivals = [f"{one['minus_random']:+.4f}", f"{one['p']:.3f}"] if known else ["", ""]
        found.append(row(name, str(one["tasks"]), f"{one['mean']:+.4f}", *rivals))
    return found


def sequence() -> list[str]:
    """Tasks one after another: forecasts from the rows before, and from a matrix of tasks learned
    apart if there was one; the rank profiles of both."""
    result = measured("forgetting_sequence")
    if result is None:
        return MISSING
    sources = {"from_before": "those before it", "from_apart": "tasks learned apart"}
    found = [row("model", "forecast from", *TITLES.values()), row(*["---"] * (2 + len(TITLES)))]
    for key, source in sources.items():
        for name, scores in result.get(key, {}).items():
            cells = (number({"mean": scores[metric]}) for metric in TITLES)
            found.append(row(name, source, *cells))
    both = {"one after another": result["rank_profile"]}
    if "rank_profile_apart" in result:
        both["apart, the same tasks and examples"] = result["rank_profile_apart"]
    return [*found, "", *profiles(both)]


def protection() -> list[str]:
    """Forecast and truth of protected prompts, update by update, then what protection did."""
    result = measured("protection")
    if result is None:
        return MISSING
    head = ("update", "prompts", "forecast by", "would change", "changed", "average precision")
    found = [row(*head, "by margin alone", "by chance"), row(*["---"] * (2 + len(head)))]
    for place, one in enumerate(result["updates"], start=1):
        changed = sum(one["changed"]["none"].values())
        found.append(
            row(
                str(place),
                str(one["prompts"]),
                one["by"],
                f"{one['expected']:.0f} ± {one['std']:.0f}",
                str(changed),
                number({"mean": one["average_precision"]}),
                number({"mean": one["average_precision_by_margin"]}),
                f"{changed / one['prompts']:.3f}",
            )
        )
    head = ("protected", *(f"{part} that changed" for part in ("held-out prompts", "others")))
    found += ["", row(*head), row(*["---"] * 3)]
    for arm, changed in result["changed"].items():
        cells = (f"{changed[part]} of {result['asked'][part]}" for part in ("held_out", "others"))
        found.append(row(arm, *cells))
    return found


def graceful() -> list[str]:
    """Graceful against plain fine-tuning: parameters on development tasks, results on others."""
    found = []
    for name, title in (("graceful_develop", "development"), ("graceful_study", "report")):
        if (result := measured(name)) is None:
            continue
        for variant, learned in result["learned"].items():
            both = (learned, result["forgotten"][variant])
            cells = [gap(one["difference"], one["low"], one["high"]) for one in both]
            ratio = f"x {result['perplexity_ratio'][variant]:.3f}"
            loss = nats(result["loss"][variant])
            found.append(row(title, variant, str(learned["runs"]), cells[0], loss, cells[1], ratio))
    head = ("tasks", "variant", "runs", "learned task", "its loss", "to forget", "perplexity")
    return [row(*head), row(*["---"] * len(head)), *found] if found else MISSING


def graceful_parts() -> list[str]:
    """The report of graceful forgetting by what was learned and by what was to be forgotten."""
    if (result := measured("graceful_study")) is None:
        return MISSING
    found = []
    for part, title in (("by_learned", "learned"), ("by_forgotten", "to forget")):
        for task, right in result[part].items():
            points = gap(right["difference"], right["low"], right["high"])
            loss = nats(result[f"loss_{part}"][task])
            found.append(row(title, task, str(right["runs"]), points, loss))
    head = ("part", "task", "runs", "learned task", "its loss")
    return [row(*head), row(*["---"] * len(head)), *found]


def nats(found: dict[str, float]) -> str:
    """A difference of losses with its interval."""
    return "{difference:+.3f} ({low:+.3f} to {high:+.3f})".format(**found)


def number(score: dict[str, float | None]) -> str:
    """A mean, with its standard deviation if there is one."""
    mean, std = score["mean"], score.get("std")
    return "-" if mean is None else f"{mean:.3f}" + (f" ± {std:.3f}" if std else "")


def rows() -> list[str]:
    """One row a result."""
    training, observation = committed("training"), committed("observation")
    startup, arithmetic = committed("startup"), committed("delta_arithmetic")
    defaults = committed("full_ft_defaults")
    seconds = startup["seconds_median"]
    ratios = training["trainer_over_unwrite"]
    loss = training["loss_after"]
    faster = observation["one_at_a_time_over_batched"]
    test = defaults["test"][0]
    return [
        row(
            f"fine-tuning {training['edits']} edits against transformers' Trainer, same epochs and "
            f"batch size (answer loss after: {loss['unwrite']:.2f} against {loss['trainer']:.2f})",
            f"{ratios['median']:.2f}x faster ({ratios['min']:.2f}-{ratios['max']:.2f})",
            "2x",
        ),
        row(
            f"observing {observation['probes']} probes against one prompt at a time "
            f"({observation['rows_that_differ']} rows differ)",
            f"{faster['median']:.1f}x faster ({faster['min']:.1f}-{faster['max']:.1f})",
            "5x",
        ),
        *arithmetic_rows(arithmetic),
        row(
            f"`import unwrite`; `unwrite --help` (a bare interpreter: {seconds['python']:.2f} s)",
            f"{seconds['import_unwrite']:.2f} s; {seconds['unwrite_help']:.2f} s",
            "0.3 s; 0.5 s",
        ),
        row(
            "starting torch and ending, as Python does, against ending as `unwrite` does",
            spread(startup["torch_over_torch_as_the_command_line_ends"], 2),
            "-",
        ),
        row(
            f"{test['facts']} known atlas facts (test split) by the defaults, one seed: "
            "reliability / generality / locality, token form",
            " / ".join(f"{100 * test['token'][name]:.1f}" for name in test["token"]) + " %",
            "reliability 95 %",
        ),
    ]


def campaigns() -> list[str]:
    """What was done to homes, readers and processes, and what was lost."""
    head = row("what was done", "tried", "what came of it", "lost")
    rows = (killed(), flipped(), fuzzed(), soaked(), loaded(), covered(), mutated())
    return [head, row(*["---"] * 4), *rows]


def killed() -> str:
    """The crash campaign."""
    found = committed("crash_campaign")
    left = sum(one["left_scratch_that_was_swept"] for one in found["commands"].values())
    return row(
        f"real commands killed ({', '.join(found['commands'])}), before steps on disk and at "
        f"moments, {found['at_random']} of them drawn at random",
        f"{found['kills']:,} kills",
        "before or after to the bit, or gone on with to the same end; the next command works, and "
        f"sweeps the scratch that {left} of them left",
        str(found["lost"]),
    )


def flipped() -> str:
    """The bit-flip campaign."""
    found = committed("bit_flips")
    return row(
        "one byte of a home or its base changed, its dates put back, then `verify`",
        f"{found['flips']:,} bytes",
        f"{found['noticed']:,} noticed; {sum(found['harmless'].values())} proven harmless (the "
        "page of the report, hashes kept as a shortcut, white space behind a header)",
        str(found["missed"] + found["crashed"]),
    )


def fuzzed() -> str:
    """The fuzzing of all readers."""
    found = committed("fuzz")
    counts = [one["executions"] for one in found["readers"].values()]
    return row(
        f"hostile bytes to {len(counts)} readers, guided by the branches they reach",
        f"{found['executions']:,} inputs, {min(counts):,} to {max(counts):,} a reader",
        "an answer or one safe sentence",
        str(sum(one["open_findings"] for one in found["readers"].values())),
    )


def soaked() -> str:
    """Random operations beside a reference in memory."""
    found = committed("soak")
    return row(
        f"{found['minutes'] / 60:.1f} hours of random operations of {len(found['by_kind'])} kinds "
        "on homes, beside plain tensors in memory",
        f"{found['operations']:,} operations on {found['homes']:,} homes",
        f"after each the same state, bit for bit; {found['divergences']} divergences",
        str(found["divergences"]),
    )


def loaded() -> str:
    """One home with a long history."""
    found = committed("load")
    verbs = ", ".join(f"{verb} {power:.2f}" for verb, power in found["growth"].items())
    return row(
        f"a home of {found['updates']:,} updates, {found['undone']:,} of them undone; then all",
        f"{found['points'][-1]['lines']:,} ledger lines",
        f"the base's bits at the end; processor time grows by the power (1 is linear): {verbs}",
        str(len(found["problems"]) + (not found["all_undone_is_the_base"])),
    )


def covered() -> str:
    """The branches that tests take."""
    modules = committed("branch_coverage")["modules"]
    shares = {name: one["branches_taken"] / one["branches"] for name, one in modules.items()}
    least = min(shares, key=lambda name: shares[name])
    total, taken = (
        sum(one[key] for one in modules.values()) for key in ("branches", "branches_taken")
    )
    return row(
        f"branches of {len(modules)} modules taken by their tests: {', '.join(modules)}",
        f"{total:,} branches",
        f"{100 * taken / total:.1f} % taken; least in {least}, {100 * shares[least]:.1f} %",
        "-",
    )


def mutated() -> str:
    """The faults that were put into the source."""
    found = committed("mutation")["files"]
    counts = [one["outcomes"] for one in found.values()]
    noticed = sum(one.get("killed", 0) + one.get("timeout", 0) for one in counts)
    total = sum(one["mutants"] for one in found.values())
    return row(
        f"single faults put into the source of {', '.join(found)}, then its tests",
        f"{total:,} faults",
        f"{noticed:,} noticed; {total - noticed} not, explained below",
        "-",
    )


def spread(ratio: dict[str, float], digits: int = 1) -> str:
    """A ratio with the least and the largest of its turns."""
    median, least, most = (f"{ratio[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median}x ({least}-{most})"


def locate_rows() -> list[str]:
    """ROME and MEMIT against the published procedure, step by step."""
    found = committed("rome_memit")
    kinds = {
        "speed": "whose products are torch's, as a peer's are",
        "same-products": "both with torch's products",
    }
    lines = []
    for part, how in kinds.items():
        one = found.get(part)
        if one is None:
            continue
        facts = one["facts"]
        lines += [
            row(
                f"{facts['memit']} MEMIT edits at once against the published procedure, {how} "
                f"(values of {facts['slow sample']} facts timed and scaled)",
                spread(one["straightforward_over_memit"]),
                "5x",
            ),
            row(
                f"ROME, an edit, against the published procedure, {how}",
                spread(one["straightforward_over_rome"]),
                "3x",
            ),
        ]
    alone = found.get("rome-speed")
    if alone is not None:
        lines.append(
            row(
                "ROME, an edit, against the published procedure, as above, measured alone in "
                f"{len(alone['seconds']['rome'])} turns",
                spread(alone["straightforward_over_rome"], 2),
                "3x",
            )
        )
    moments = found.get("moments")
    if moments is not None:
        lines.append(
            row(
                f"second moments of five layers from {moments['tokens']:,} tokens against one "
                "forward pass without a head (the first layers; the last ones)",
                f"{spread(moments['default_layers_over_plain'], 2)}; "
                f"{spread(moments['last_five_over_plain'], 2)}",
                "1.3x",
            )
        )
    return lines


def product_rows() -> list[str]:
    """What oneDNN's products bring."""
    found = measured("products")
    if found is None:
        return []
    alone = ", ".join(
        f"{rows} rows {one['ratio']['median']:.1f}x" for rows, one in found["alone"].items()
    )
    return [
        row(
            "linear layers by oneDNN instead of MKL on this processor: an epoch of full "
            f"fine-tuning; observing {found['probes']} probes "
            f"({found['predictions_that_differ']} predictions differ); "
            "a layer alone, forward and backward",
            f"{spread(found['train_ratio'], 2)}; {spread(found['observe_ratio'], 2)}; {alone}",
            "-",
        )
    ]


def peer_rows() -> list[str]:
    """Other tools, each in an environment of its own, on the same work in turns."""
    lines = []
    if (found := measured("editing_peers")) is not None:
        scores = {
            name: " / ".join(f"{100 * one[key]:.0f}" for key in ("reliability", "locality"))
            for name, one in found["scores"].items()
        }
        ratios = "; ".join(
            f"{name.removeprefix('unwrite, ').replace('unwrite', 'as it is')} "
            f"{spread(one)}, {scores[name]} %"
            for name, one in found["fastedit_over"].items()
        )
        lines.append(
            row(
                f"ROME, {found['edits']} single edits, against FastEdit ({found['peer']}: "
                f"{scores['fastedit']} % reliability / locality; 21 contexts, no second moments)",
                ratios,
                "3x",
            )
        )
    if (found := measured("scoring_peers")) is not None:
        kinds = ("distinct", "shared")
        apart = max(found[kind]["largest_difference"] for kind in kinds)
        lines.append(
            row(
                f"log-likelihoods of {found['distinct']['requests']} answers against "
                f"lm-evaluation-harness ({found['peer']}; largest difference {apart:.0e}): a "
                "prompt each; six answers to a prompt",
                "; ".join(spread(found[kind]["lm_eval_over_unwrite"], 2) for kind in kinds),
                "1.4x; 2.5x",
            )
        )
    if (found := measured("training_peers")) is not None:
        after = {name: median(one) for name, one in found["loss_after"].items()}
        lines.append(
            row(
                f"fine-tuning {found['edits']} edits against TRL's SFTTrainer ({found['peer']}), "
                f"same tokens, epochs and batch size (answer loss after: {after['unwrite']:.2f} "
                f"against {after['trl']:.2f})",
                spread(found["trl_over_unwrite"], 2),
                "2x",
            )
        )
    if (found := measured("adapter_merge")) is not None:
        lines.append(
            row(
                f"merging a LoRA adapter of rank {found['rank']} into files against peft "
                f"(largest difference {found['largest_difference']:.0e}); against copying",
                f"{spread(found['peft_over_unwrite'], 2)} faster; "
                f"{spread(found['unwrite_over_copy'], 1)}",
                "-",
            )
        )
    if (found := measured("merging_peers")) is not None:
        peaks = found["peak_gb"]
        lines.append(
            row(
                "base + A - 0.3 B on fp32 checkpoints of SmolLM2-135M against mergekit "
                f"({found['peer']}), whole processes; peak memory",
                f"{spread(found['mergekit_over_unwrite'], 2)}; {peaks['unwrite']:.2f} GB against "
                f"{peaks['mergekit']:.2f} GB",
                "3x; a quarter",
            )
        )
    return lines


def arithmetic_rows(arithmetic: dict[str, Any]) -> list[str]:
    """Bandwidth and peak memory of delta arithmetic, one row a dtype."""
    found = []
    for dtype in ("fp32", "bf16"):
        one = arithmetic[dtype]
        shares = ", ".join(
            f"{stage} {100 * one['stages'][stage]['share_of_copy']:.0f} %"
            for stage in ("between", "combine", "compose")
        )
        peak = max(one["peak_memory"].values())
        found.append(
            row(
                f"delta arithmetic on a sharded checkpoint of {one['checkpoint_gb']:.1f} GB, "
                f"{dtype}: bandwidth as a share of plain copying; peak memory",
                f"{shares}; {peak:.2f} GB",
                "50 %; 1 GB",
            )
        )
    return found


def floor_rows() -> list[str]:
    """Training in bf16, and against what its products take at least."""
    found = committed("training")
    if "unwrite_over_floor" not in found:
        return []
    rates = {kind: median(one) / 1e9 for kind, one in found["operations_a_second"].items()}
    return [
        row(
            "the same with bf16 products over fp32 weights (answer loss after: "
            f"{found['loss_after']['unwrite, bf16']:.2f})",
            f"{spread(found['trainer_over_unwrite_bf16'], 2)} faster",
            "3.5x",
        ),
        row(
            f"the same against its floor, {found['operations'] / 1e12:.1f} T operations at the "
            f"measured rate of large products ({rates['fp32']:.0f} G a second in fp32, "
            f"{rates['bf16']:.0f} G in bf16): fp32; bf16",
            f"{spread(found['unwrite_over_floor'], 2)}; "
            f"{spread(found['unwrite_bf16_over_floor'], 2)}",
            "1.5x",
        ),
        row(
            "the same against the floor with the optimiser: besides, "
            f"{found['bytes_of_the_optimizer'] / 1e9:.0f} GB that AdamW moves, at the measured "
            f"rate of copying ({median(found['bytes_a_second']) / 1e9:.0f} GB a second): fp32; "
            "bf16; the Trainer",
            f"{spread(found['unwrite_over_floor_with_optimizer'], 2)}; "
            f"{spread(found['unwrite_bf16_over_floor_with_optimizer'], 2)}; "
            f"{spread(found['trainer_over_floor_with_optimizer'], 2)}",
            "-",
        ),
    ]


def undo_rows() -> list[str]:
    """Undoing one of ten updates."""
    if (found := measured("undo")) is None:
        return []
    lines = []
    for kind, one in found["kinds"].items():
        floor = one["undo_over_floor"]  # none where nothing that is left is to be read
        lines.append(
            row(
                f"undoing one of {found['updates']} updates ({kind}: {one['tensors_touched']} "
                f"tensor{'s' * (one['tensors_touched'] > 1)} touched) against copying these "
                "tensors; hashing what is left, nothing else, and flushing the ledger, against "
                "copying" + ("; undoing against reading what is left" if floor else ""),
                f"{spread(one['undo_over_copy'], 2)}; {spread(one['checking_over_copy'], 2)}"
                + (f"; {spread(floor, 1)}" if floor else ""),
                f"{found['goal']}x",
            )
        )
    return lines


def batch_rows() -> list[str]:
    """Many edits at once."""
    if (found := measured("batch_of_edits")) is None:
        return []
    return [
        row(
            f"{found['edits']} edits at once against one by one, until learned, an edit: whole "
            "updates of a home; training alone",
            f"{spread(found['update_alone_over_together'])} cheaper; "
            f"{spread(found['alone_over_together'])}",
            f"{found['goal']}x",
        )
    ]


def growth_rows() -> list[str]:
    """How time grows."""
    if (found := measured("growth")) is None:
        return []
    slopes = "; ".join(
        f"{name} {one['exponent']:.2f} ({one['sizes'][0]:,} to {one['sizes'][-1]:,})"
        for name, one in found["curves"].items()
    )
    return [row("time grows by the power (1 is linear)", slopes, "-")]


def delicate_rows() -> list[str]:
    """Cost of a round of Delicate Fine-Tuning and of its selection."""
    one, found = committed("delicate_round"), committed("selection")["select_over"]
    memory = one["peak_memory_gb"]

    def times(ratio: dict[str, float]) -> str:
        return f"{ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})"

    def widest(base: str) -> str:
        return f"{max(ratio['median'] for ratio in found[base].values()):.1f}x"

    return [
        row(
            f"one round of `delicate` on {one['edits']} edits against the `full-ft` it is made of "
            "(keeping all conflicts; keeping 5 %)",
            f"{times(one['over_full_ft'])}; {times(one['over_full_ft_top_5_percent'])}",
            "2.1x",
        ),
        row(
            "one round of `delicate` with LoRA twins against one LoRA run; training the twins "
            "against training one; the frozen network alone, rows of both against those of one",
            f"{times(one['over_lora'])}; {times(one['training_twins_over_lora'])}; "
            f"{times(one['frozen_two_over_one'])}",
            "1.5x",
        ),
        row(
            "peak memory of two rounds of `delicate`, of `full-ft`",
            f"{memory['delicate']:.1f} GB, {memory['full-ft']:.1f} GB",
            "less than three copies of the model (1.6 GB) more",
        ),
        row(
            "exact selection of the top 5, 20 or 100 % of 134 M pairs, the slowest: against "
            "loading both deltas into memory; against streaming their bytes through the cache",
            f"{widest('load')}; {widest('stream')}",
            "3x",
        ),
    ]


def forgetting_rows() -> list[str]:
    """Measuring upstream examples, forecasting a task, and the Fisher information."""
    found, speed = committed("measuring_examples"), committed("forecast_speed")
    fisher = committed("fisher")
    floor = found["floor_seconds"]["batched"]
    return [
        row(
            f"measuring {found['examples']:,} upstream examples against one at a time by "
            "transformers; one at a time by our own code; against the floor of its products",
            f"{spread(found['one_at_a_time_over_batched'])} faster; "
            f"{spread(found['one_at_a_time_by_measure_over_batched'])}; "
            f"{median(found['seconds']['batched']) / floor:.2f}x",
            "5x",
        ),
        row(
            f"a forecast for a new task ({speed['seen']} of {speed['examples']:,} examples seen, "
            f"{speed['tasks']} past tasks); the fit; against the published fit of the new task "
            "(a part timed and scaled; equal to scikit-surprise's to rounding)",
            f"{speed['forecast_milliseconds']['median']:.1f} ms; {speed['fit_seconds']:.1f} s; "
            f"{speed['published']['times_slower_than_a_forecast']:,.0f}x faster",
            "5 ms; 10 s; 1,000x",
        ),
        row(
            f"Fisher information of {fisher['examples']} examples against one backward pass each "
            "by transformers; by our own code; the same at its floor by parts; at the floor of its "
            "products",
            f"{spread(fisher['times_faster_than_one_by_one_by_transformers'])} faster; "
            f"{spread(fisher['times_faster_than_one_by_one'])}; "
            f"{spread(fisher['times_faster_at_the_floor_by_parts'])}; "
            f"{spread(fisher['times_faster_at_the_floor'])}",
            "4x",
        ),
        row(
            "forgetting confidence of as many, both terms, against forward and backward at batch "
            "size 8, an example each, by transformers; by our own code; the same at its floor by "
            "parts; against the floor of its products; the first order alone, in forward passes",
            f"{spread(fisher['confidence_over_forward_backward_by_transformers'], 2)}; "
            f"{spread(fisher['confidence_over_forward_backward'])}; "
            f"{spread(fisher['confidence_over_forward_backward_at_the_floor_by_parts'], 2)}; "
            f"{spread(fisher['confidence_over_the_floor'])}; "
            f"{spread(fisher['first_order_over_forward'])}",
            "1x; -; -; -; 3",
        ),
    ]


def callback_rows() -> list[str]:
    """What graceful forgetting costs a Trainer besides its unlearning steps, once measured."""
    if (result := measured("callback_overhead")) is None:
        return []
    found = result["excepted_over_plain"]
    return [
        row(
            "a Trainer with `GracefulForgetting`, unlearning steps excepted, against one without",
            f"{found['median']:.3f}x ({found['min']:.3f}-{found['max']:.3f})",
            "1.03x",
        )
    ]


if __name__ == "__main__":
    main()
