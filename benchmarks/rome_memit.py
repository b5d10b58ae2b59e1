"""ROME and MEMIT on facts that SmolLM2-135M knows: speed against the published procedure, effect.

    python -m benchmarks.rome_memit --facts FILE [--only speed,effect,moments,defaults]

FILE is ROME's "known facts" (JSONL: subject, attribute, prompt, relation_id). Each is edited
towards the attribute of another fact of its relation. Facts that the model answers right now, in
the bare prompt, are used: those at even places are the development split, on which the defaults
were chosen (``defaults``), those at odd places the test split, on which everything else is
measured. The bystanders of an edit are known facts of its relation from the other split, so none is
edited.

``speed``: our procedures against the straightforward one, which follows the papers step by step:
one fact at a time, every prompt in full through all layers in each step, logits of all positions;
with the same optimiser, contexts, steps, stopping rule and closed form. The slow way has its second
moments in memory, ours reads and factorises them. It takes minutes a fact, so it gets a sample.
It multiplies as torch does by itself, as a peer would; in ``same-products`` it multiplies as ours.
``moments``: one pass for five layers against one plain forward pass over the same texts.
``effect``: reliability and locality on the test split, beside those of full fine-tuning.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import committed, in_turns, ratio, torchs_products, write
from unwrite import load
from unwrite.activations import layer_of, oriented, weight_name
from unwrite.delta import Delta
from unwrite.edits import Edit, Probe
from unwrite.errors import BadEdits, TrainingFailed
from unwrite.methods.alpha_edit import AlphaEdit
from unwrite.methods.full_ft import FullFT
from unwrite.methods.loc_ft import LocFT
from unwrite.methods.memit import MEMIT
from unwrite.methods.rome import ROME
from unwrite.model import Model, length_batches
from unwrite.moments import Statistics, add_up, second_moments
from unwrite.observe import observe, questions, settle
from unwrite.scores import as_json, score
from unwrite.training import neutral_contexts
from unwrite.values import Search

BYSTANDERS = 3
SHOWN = ("reliability", "locality")


def main() -> None:
    """Run the parts asked for and write one result; parts not run keep their last one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=Path, required=True, help="ROME's known facts, JSONL")
    parser.add_argument("--only", default="speed,moments,effect")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memit-facts", type=int, default=100, help="of one batch, timed")
    parser.add_argument("--slow-facts", type=int, default=5, help="a turn, for the slow way")
    parser.add_argument("--rome-facts", type=int, default=3, help="a turn, for both ways")
    parser.add_argument("--test-facts", type=int, default=100)
    parser.add_argument("--development-facts", type=int, default=24)
    parser.add_argument("--corpus-tokens", type=int, default=100_000)
    options = parser.parse_args()

    model = load("smollm2-135m")
    development, test = known_facts(model, options.facts)
    parts: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(model, test, options, torchs_products),
        "rome-speed": lambda: rome_speed(model, test, options),
        "same-products": lambda: speed(model, test, options, contextlib.nullcontext),
        "moments": lambda: moments(model, options),
        "effect": lambda: effect(model, test[: options.test_facts]),
        "defaults": lambda: defaults(model, development[: options.development_facts]),
    }
    measured = {name: parts[name]() for name in options.only.split(",")}
    try:  # read last: other parts may have been measured meanwhile
        before = committed("rome_memit")
    except FileNotFoundError:
        before = {}
    result = {name: measured.get(name, before.get(name)) for name in parts}
    known = {"development": len(development), "test": len(test)}
    write("rome_memit", {"known": known, **{k: v for k, v in result.items() if v is not None}})


# ---- the facts -----------------------------------------------------------------------------------


def known_facts(model: Model, path: Path) -> tuple[list[Edit], list[Edit]]:
    """The facts the model knows as edits with bystanders: development and test split."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    unique = list({row["prompt"]: row for row in rows}.values())
    attributes: dict[str, list[str]] = defaultdict(list)
    for row in unique:
        if row["attribute"] not in attributes[row["relation_id"]]:
            attributes[row["relation_id"]].append(row["attribute"])
    edits = [
        Edit(
            row["prompt"],
            others[(others.index(row["attribute"]) + 1) % len(others)],
            old=row["attribute"],
            subject=row["subject"],
            id=str(row["known_id"]),
            relation=row["relation_id"],
        )
        for row in unique
        if len(others := attributes[row["relation_id"]]) > 1
    ]
    known = [edit for edit, knows in zip(edits, model.knows(edits), strict=True) if knows]
    halves = known[0::2], known[1::2]
    split = []
    for mine, theirs in (halves, halves[::-1]):
        by_relation: dict[str | None, list[Edit]] = defaultdict(list)
        for edit in theirs:
            by_relation[edit.relation].append(edit)
        chosen = []
        for edit in mine:
            others = by_relation[edit.relation]
            near = random.Random(edit.prompt).sample(others, min(BYSTANDERS, len(others)))
            probes = [Probe(one.prompt, one.old) for one in near]
            chosen.append(
                Edit(
                    edit.prompt,
                    edit.new,
                    edit.old,
                    edit.subject,
                    (),
                    probes,
                    (),
                    edit.id,
                    relation=edit.relation,
                )
            )
        # Facts of one relation lie together in the file; a sample has to have all of them.
        random.Random(0).shuffle(chosen)
        split.append(chosen)
    return split[0], split[1]


# ---- effect --------------------------------------------------------------------------------------


def effect(model: Model, edits: Sequence[Edit]) -> dict[str, Any]:
    """Scores on the test split: ROME one edit at a time and reset, the others in one batch."""
    batch = {
        "memit": MEMIT(),
        "alpha-edit": AlphaEdit(),
        "loc-ft": LocFT(),
        "full-ft": FullFT(),
    }
    found: dict[str, Any] = {"rome, singly and reset": singly(model, edits, ROME())}
    for name, method in batch.items():
        found[f"{name}, {len(edits)} at once"] = at_once(model, edits, method)
    found["full-ft, singly and reset"] = singly(model, edits[:20], FullFT())
    return found


def at_once(model: Model, edits: Sequence[Edit], method: Any) -> dict[str, Any]:
    """Scores of all edits with one delta."""
    probes = settle(model, questions(edits))
    before = observe(model, probes)
    started = time.perf_counter()
    delta = method.delta(model, edits)
    seconds = time.perf_counter() - started
    with model.shifted(delta):
        after = observe(model, probes)
    return summary(before, after) | {
        "seconds": round(seconds, 1),
        "notes": delta.provenance.get("notes", {}).get("sentences", []),
    }


def singly(model: Model, edits: Sequence[Edit], method: Any) -> dict[str, Any]:
    """Every edit by itself on the unchanged model; a refused edit counts as not made."""
    before, after, refused = [], [], 0
    seconds = 0.0
    for edit in edits:
        probes = settle(model, questions([edit]))
        rows = observe(model, probes)
        started = time.perf_counter()
        try:
            delta = method.delta(model, [edit])
        except (TrainingFailed, BadEdits):
            delta, refused = Delta.nothing(), refused + 1
        seconds += time.perf_counter() - started
        before += rows
        with model.shifted(delta):
            after += observe(model, probes)
    return summary(before, after) | {"seconds": round(seconds, 1), "refused": refused}


def summary(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Token and exact form of what is shown, and the number of probes."""
    scores = as_json(score(before, after))
    return {name: {form: scores[name][form] for form in ("token", "exact", "n")} for name in SHOWN}


def quickly(model: Model, edits: Sequence[Edit], delta: Delta) -> dict[str, float]:
    """Token form of reliability and locality, without free generation."""
    asked = [model.tokens(edit.prompt, edit.new) for edit in edits]
    near = [model.tokens(one.prompt, str(one.answer)) for edit in edits for one in edit.bystanders]
    before = model.force(near)
    with model.shifted(delta):
        right, after = model.force(asked), model.force(near)
    same = [
        statistics.mean(a == b for a, b in zip(one.predicted, two.predicted, strict=True))
        for one, two in zip(before, after, strict=True)
    ]
    return {
        "reliability": statistics.mean(one.matched / len(one.targets) for one in right),
        "locality": statistics.mean(same) if same else 1.0,
    }


# ---- defaults ------------------------------------------------------------------------------------


def defaults(model: Model, edits: Sequence[Edit]) -> list[dict[str, Any]]:
    """What the defaults were chosen among, on the development split, token form."""
    rows = []
    batch: list[Any] = [MEMIT(preserve=weight) for weight in (15_000.0, 4000.0, 2000.0, 1000.0)]
    batch += [AlphaEdit(slack=slack) for slack in (0.4, 0.2, 0.1, 0.05)]
    batch += [AlphaEdit(ridge=0.1)]
    batch += [LocFT(layer=layer) for layer in (0.2, 0.5, 0.7)]
    for method in batch:
        rows.append({"method": str(method)} | quickly(model, edits, method.delta(model, edits)))
        print(rows[-1], flush=True)
    for layer in (3, 5, 8, 11):
        method = ROME(layer=layer)
        scores = []
        for edit in edits[: len(edits) // 2]:
            try:
                scores.append(quickly(model, [edit], method.delta(model, [edit])))
            except TrainingFailed:
                scores.append(quickly(model, [edit], Delta.nothing()))
        means = {name: statistics.mean(one[name] for one in scores) for name in scores[0]}
        rows.append({"method": str(method)} | means)
        print(rows[-1], flush=True)
    return rows


# ---- speed ---------------------------------------------------------------------------------------


def speed(
    model: Model,
    test: Sequence[Edit],
    options: argparse.Namespace,
    products: Callable[[Any], contextlib.AbstractContextManager[Any]],
) -> dict[str, Any]:
    """Ours and the straightforward procedure, which multiplies within ``products``, in turns."""

    def straightforward(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with products(model.network):
                return work()

        return run

    memit, rome = MEMIT(), ROME()
    edits = test[: options.memit_facts]
    sample, single = edits[: options.slow_facts], edits[: options.rome_facts]
    layers = [layer_of(model, layer) for layer in memit.layers if layer != "trace"]
    site = layer_of(model, rome.layer if rome.layer != "trace" else 0.17)
    matrices = covariances(model, [*layers, site], memit)
    inverse = torch.linalg.inv(matrices[site])
    stored = torch.randn(len(edits), model.network.config.hidden_size)

    # The same values and scores first: only then does the time mean anything.
    plain = torch.stack([plain_value(model, one, layers[-1], "block", memit) for one in sample])
    slow = plain_spread(model, sample, plain, layers, matrices, memit)
    result: dict[str, Any] = {
        "facts": {"memit": len(edits), "slow sample": len(sample), "rome": len(single)},
        "scores on the slow sample": {
            "memit": quickly(model, sample, memit.delta(model, sample)),
            "memit, straightforward": quickly(model, sample, slow),
        },
        "scores of single edits": {
            "rome": [quickly(model, [one], rome.delta(model, [one])) for one in single],
            "rome, straightforward": [
                quickly(model, [one], plain_rome(model, one, site, inverse, rome)) for one in single
            ],
        },
    }
    seconds = in_turns(
        {
            "memit": lambda: memit.delta(model, edits),
            "memit_straightforward_values": straightforward(
                lambda: [plain_value(model, one, layers[-1], "block", memit) for one in sample]
            ),
            "memit_straightforward_layers": straightforward(
                lambda: plain_spread(model, edits, stored, layers, matrices, memit)
            ),
            "rome": lambda: [rome.delta(model, [one]) for one in single],
            "rome_straightforward": straightforward(
                lambda: [plain_rome(model, one, site, inverse, rome) for one in single]
            ),
        },
        options.repeats,
    )
    scale = len(edits) / len(sample)
    whole = [
        scale * values + rest
        for values, rest in zip(
            seconds["memit_straightforward_values"],
            seconds["memit_straightforward_layers"],
            strict=True,
        )
    ]
    return result | {
        "seconds": seconds,
        "straightforward_over_memit": ratio(whole, seconds["memit"]),
        "straightforward_over_rome": ratio(seconds["rome_straightforward"], seconds["rome"]),
    }


def rome_speed(model: Model, test: Sequence[Edit], options: argparse.Namespace) -> dict[str, Any]:
    """ROME alone, as in ``speed``, in more turns: its ratio lies near its bar."""
    rome, single = ROME(), test[: options.rome_facts]
    site = layer_of(model, rome.layer if rome.layer != "trace" else 0.17)
    inverse = torch.linalg.inv(covariances(model, [site], rome)[site])

    def straightforward() -> None:
        with torchs_products(model.network):
            for one in single:
                plain_rome(model, one, site, inverse, rome)

    def ours() -> None:
        for one in single:
            rome.delta(model, [one])

    ours()
    seconds = in_turns({"rome": ours, "straightforward": straightforward}, 2 * options.repeats + 1)
    return {
        "facts": len(single),
        "seconds": seconds,
        "straightforward_over_rome": ratio(seconds["straightforward"], seconds["rome"]),
    }


def covariances(
    model: Model, layers: Sequence[int], statistics: Statistics
) -> dict[int, torch.Tensor]:
    """The covariance of each layer as our methods use it, float64."""
    found, _ = second_moments(model, sorted(set(layers)), statistics)
    return {
        layer: moment.shrunk(moment.shrinkage)
        for layer, moment in zip(sorted(set(layers)), found, strict=True)
    }


def plain_texts(model: Model, edit: Edit, contexts: int) -> list[tuple[list[int], int, int]]:
    """The prompt bare and behind contexts, and the bare subject: ids, subject, answer."""
    texts = []
    for lead in ("", *(f"{one} " for one in neutral_contexts(contexts))):
        tokens = model.tokens(lead + edit.prompt, edit.new)
        upto = len(lead) + edit.prompt.index(str(edit.subject)) + len(str(edit.subject))
        offsets = model.tokenizer(lead + edit.prompt, return_offsets_mapping=True)
        spans = enumerate(offsets["offset_mapping"])
        last = max(i for i, (start, end) in spans if start < upto <= end)
        texts.append((list(tokens.ids), last, tokens.answer))
    alone = model.tokenizer(f"{edit.subject} is a", return_offsets_mapping=True)
    spans = enumerate(alone["offset_mapping"])
    last = max(i for i, (start, end) in spans if start < len(str(edit.subject)) <= end)
    texts.append((list(alone["input_ids"]), last, len(alone["input_ids"])))
    return texts


def plain_value(model: Model, edit: Edit, layer: int, where: str, search: Search) -> torch.Tensor:
    """One value by the published loop: whole texts, all layers and all logits in every step."""
    texts = plain_texts(model, edit, search.contexts)
    length = max(len(ids) for ids, _, _ in texts)
    ids = torch.zeros((len(texts), length), dtype=torch.long)
    for row, (one, _, _) in enumerate(texts):
        ids[row, : len(one)] = torch.tensor(one)
    lasts = torch.tensor([last for _, last, _ in texts])
    rows = torch.arange(len(texts))
    names = model.anatomy.mlp_out if where == "mlp" else model.anatomy.blocks
    module = model.network.get_submodule(names[layer])
    for parameter in model.network.parameters():
        parameter.requires_grad_(False)
    added: torch.Tensor | None = None
    before: torch.Tensor | None = None

    def add(_m: Any, _i: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal added, before
        if before is None or added is None:
            before = output[0, lasts[0]].detach().clone()
            added = torch.zeros_like(before, requires_grad=True)
        output = output.clone()
        output[rows, lasts] += added
        return output

    handle = module.register_forward_hook(add)
    adam: torch.optim.Adam | None = None
    kept: torch.Tensor | None = None
    for step in range(search.steps):
        logprobs = model.network(input_ids=ids).logits.log_softmax(dim=-1)
        assert added is not None and before is not None
        reach = float(before.norm())
        if adam is None:
            adam = torch.optim.Adam([added], lr=search.lr * reach / len(before) ** 0.5)
        said = logprobs[-1, lasts[-1]]
        kept = said.detach() if kept is None else kept
        parts = [
            -logprobs[row, range(answer - 1, len(one) - 1), one[answer:]].mean()
            for row, (one, _, answer) in enumerate(texts[:-1])
        ]
        loss = torch.stack(parts).mean() + search.kl * (said.exp() * (said - kept)).sum()
        loss = loss + search.weight_decay * added.norm() / reach
        if loss.item() < search.stop or step == search.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            added.mul_(min(1.0, search.clamp * reach / max(float(added.norm()), 1e-30)))
    handle.remove()
    for parameter in model.network.parameters():
        parameter.requires_grad_(True)
    assert added is not None and before is not None
    return before + added.detach()


@torch.no_grad()
def plain_keys(
    model: Model, edits: Sequence[Edit], layer: int, contexts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By whole passes, batched over the texts of one fact: keys (facts, texts, width), outputs of
    the MLP and of the block above at the bare subject."""
    keys, values, outputs = [], [], []
    seen: dict[str, torch.Tensor] = {}
    out = model.network.get_submodule(model.anatomy.mlp_out[layer])
    block = model.network.get_submodule(model.anatomy.blocks[layer])
    handles = [
        out.register_forward_hook(lambda _m, i, o: seen.update(key=i[0], value=o)),
        block.register_forward_hook(lambda _m, _i, o: seen.update(output=o)),
    ]
    for edit in edits:
        texts = plain_texts(model, edit, contexts)[:-1]
        ids = torch.zeros((len(texts), max(len(one) for one, _, _ in texts)), dtype=torch.long)
        for row, (one, _, _) in enumerate(texts):
            ids[row, : len(one)] = torch.tensor(one)
        lasts = torch.tensor([last for _, last, _ in texts])
        model.network(input_ids=ids)
        keys.append(seen["key"][torch.arange(len(texts)), lasts].double())
        values.append(seen["value"][0, lasts[0]].double())
        outputs.append(seen["output"][0, lasts[0]].double())
    for handle in handles:
        handle.remove()
    return torch.stack(keys), torch.stack(values), torch.stack(outputs)


def plain_rome(model: Model, edit: Edit, layer: int, inverse: torch.Tensor, rome: ROME) -> Delta:
    """ROME by the published steps, the inverse covariance given."""
    target = plain_value(model, edit, layer, "mlp", rome).double()
    keys, values, _ = plain_keys(model, [edit], layer, rome.contexts)
    read = inverse @ keys[0].mean(dim=0)
    module = model.anatomy.mlp_out[layer]
    columns = (target - values[0])[:, None]
    change = oriented(model, module, columns, (read / (read @ keys[0, 0]))[None])
    return Delta.from_changes({weight_name(model, module): change})


def plain_spread(
    model: Model,
    edits: Sequence[Edit],
    values: torch.Tensor,
    layers: Sequence[int],
    matrices: dict[int, torch.Tensor],
    memit: MEMIT,
) -> Delta:
    """MEMIT's second half by the published steps: width x width solves in float64."""
    total = Delta.nothing()
    for number, layer in enumerate(layers):
        with model.shifted(total):
            keys, _, _ = plain_keys(model, edits, layer, memit.contexts)
            _, _, now = plain_keys(model, edits, layers[-1], 0)
        mean = (keys[:, 0] + keys[:, 1:].mean(dim=1)) / 2
        system = memit.preserve * matrices[layer] + mean.T @ mean
        rows = torch.linalg.solve(system, mean.T).T
        share = (values.double() - now) / (len(layers) - number)
        module = model.anatomy.mlp_out[layer]
        change = oriented(model, module, share.T, rows)
        total = total + Delta.from_changes({weight_name(model, module): change})
    return total


# ---- second moments ------------------------------------------------------------------------------


def moments(model: Model, options: argparse.Namespace) -> dict[str, Any]:
    """One pass for five layers against one plain pass, in turns.

    The plain pass has no head at all, so it is the fastest that could be meant. The last five
    layers are timed as well, where leaving early saves nothing.
    """
    random_ids = torch.Generator().manual_seed(0)
    count = options.corpus_tokens // 256
    size = model.network.config.vocab_size
    texts = torch.randint(size, (count, 256), generator=random_ids).tolist()
    depth = model.anatomy.depth
    default = [layer_of(model, layer) for layer in MEMIT().layers if layer != "trace"]
    width = model.network.config.intermediate_size

    def ours(layers: list[int]) -> None:
        second = [torch.zeros((width, width), dtype=torch.float64) for _ in layers]
        add_up(model, layers, texts, second, torch.zeros(len(layers), dtype=torch.float64))

    @torch.no_grad()
    def plainly() -> None:
        for batch in length_batches([len(text) for text in texts]):
            ids = torch.tensor([texts[index] for index in batch])
            model.network.base_model(input_ids=ids, use_cache=False)

    last = list(range(depth - 5, depth))
    seconds = in_turns(
        {
            "plain": plainly,
            "default_layers": lambda: ours(default),
            "last_five": lambda: ours(last),
        },
        options.repeats,
    )
    return {
        "tokens": count * 256,
        "layers": {"default_layers": default, "last_five": last},
        "seconds": seconds,
        "default_layers_over_plain": ratio(seconds["default_layers"], seconds["plain"]),
        "last_five_over_plain": ratio(seconds["last_five"], seconds["plain"]),
    }


if __name__ == "__main__":
    main()
