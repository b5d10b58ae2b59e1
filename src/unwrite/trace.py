"""Causal trace: in which layer, and at which token, the network recalls a fact (Meng et al. 2022).

The subject's embeddings are disturbed by noise, so that the answer is lost; then, one at a time,
what the network computed undisturbed is put back, and the *indirect effect* is how much of the
answer's probability comes back with it: either the whole hidden state after a layer, or the outputs
of the MLPs in a window of layers around it. The answer is what the network itself says next, so
nothing needs to be known about the fact.

For each layer everything below is known from the two runs before, so only the layers above are run.
Results are kept in the cache by fingerprint of the base, edits and settings, and are always those
of the base, also when the model at hand has been changed since.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from unwrite.activations import (
    Site,
    hidden_of,
    in_rows,
    mentions,
    skipping,
    subject_tokens,
    watching,
    with_hidden,
)
from unwrite.edits import Edit
from unwrite.errors import BadSetting, DamagedFile
from unwrite.files import read_json, sha256_bytes, write_json
from unwrite.model import Model, head_sees
from unwrite.moments import at_base
from unwrite.pretrained import cache_folder

ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
LAST_SUBJECT = 2
KINDS = ("hidden state", "MLP")
NOISE = 3.0  # times the standard deviation of the embeddings, as in the paper
SAMPLES = 5  # of noise, for every fact
WINDOW = 0.2  # share of the layers whose MLPs are put back together
FACTS_FOR_A_LAYER = 10  # that `strongest_layer` looks at
FORMAT = 1


@dataclass(frozen=True)
class Trace:
    """Mean indirect effects (differences of probability) of some facts.

    ``effects[kind][role][layer]``: kinds and roles in the order of ``KINDS`` and ``ROLES``; None
    where no fact has such a token. ``clean`` and ``disturbed``: mean probability of the answer.
    """

    model: str
    facts: int
    clean: float
    disturbed: float
    effects: list[list[list[float] | None]]

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return next(len(row) for rows in self.effects for row in rows if row is not None)

    @property
    def strongest(self) -> int:
        """The layer whose MLPs restore most at the subject's last token."""
        row = self.effects[KINDS.index("MLP")][LAST_SUBJECT]
        assert row is not None
        return max(range(len(row)), key=lambda layer: row[layer])

    def as_json(self) -> dict[str, Any]:
        """Everything, with the names of kinds and roles."""
        return asdict(self) | {"kinds": KINDS, "roles": ROLES, "strongest": self.strongest}


def strongest_layer(model: Model, edits: Sequence[Edit]) -> int:
    """The layer to edit, by a trace of the MLPs at the last subject token of the first few edits.

    Raises ``BadEdits`` as ``activations.mentions`` does.
    """
    found = trace(model, edits[:FACTS_FOR_A_LAYER], only_last_subject=True)
    model.progress.say(
        f"The causal trace of {found.facts} facts is strongest at layer {found.strongest}."
    )
    return found.strongest


def trace(
    model: Model,
    edits: Sequence[Edit],
    *,
    only_last_subject: bool = False,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Trace:
    """Trace every edit's prompt (``new`` plays no part) and average over the edits.

    ``only_last_subject`` traces the MLPs at that token alone, which is what choosing a layer needs
    and is many times faster. Memory: hidden states and MLP outputs of one prompt in all layers,
    1 + ``samples`` times. Raises ``BadEdits`` for edits without one clear subject.
    """
    if samples < 1:
        raise BadSetting(f"samples must be at least 1, not {samples}.")
    mentions(model, edits)  # one error for all that cannot be traced
    asked = [[edit.prompt, edit.subject] for edit in edits]
    settings = [FORMAT, only_last_subject, samples, seed, NOISE, WINDOW]
    key = sha256_bytes(json.dumps([asked, settings]).encode())[:16]
    path = cache_folder() / "trace" / model.fingerprint[:16] / f"{key}.json"
    with contextlib.suppress(DamagedFile):  # not there, or broken: made now
        kept = read_json(path)
        return Trace(**{name: kept[name] for name in Trace.__dataclass_fields__})
    facts = []
    with at_base(model), model.progress.stage("tracing", len(edits)) as advance:
        for number, edit in enumerate(edits):
            random = torch.Generator().manual_seed(seed * 1_000_003 + number)
            facts.append(_Fact(model, edit, samples, random).trace(only_last_subject))
            advance(1, "")
    found = _mean(model.source.name, facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found.as_json())
    return found


@dataclass(frozen=True)
class _Traced:
    """One fact: probability of its answer, and per kind (layers, tokens) of indirect effects; a
    token that was not traced has NaN."""

    clean: float
    disturbed: float
    effects: list[torch.Tensor]
    roles: list[int]  # per token


class _Fact:
    """One prompt, run once with its subject intact (row 0) and ``samples`` times disturbed."""

    @torch.no_grad()
    def __init__(self, model: Model, edit: Edit, samples: int, random: torch.Generator) -> None:
        self.model, self.samples = model, samples
        self.ids = torch.tensor(model.tokenizer(edit.prompt)["input_ids"])
        self.first, self.last = subject_tokens(model, edit)
        table = model.network.get_submodule(model.anatomy.embedding).weight.detach()
        shape = (samples, self.last - self.first + 1, table.shape[1])
        noise = NOISE * float(table.float().std()) * torch.randn(shape, generator=random)
        self.noise = torch.cat([torch.zeros((1, *shape[1:])), noise]).to(model.device)
        depth = model.anatomy.depth
        self.in_tuple = False
        self.after: list[torch.Tensor] = [torch.empty(0)] * depth  # (1 + samples, tokens, width)
        self.mlp: list[torch.Tensor] = [torch.empty(0)] * depth
        sites: list[Site] = [
            (name, "out") for name in (*model.anatomy.blocks, *model.anatomy.mlp_out)
        ]

        def keep(number: int, hidden: torch.Tensor) -> None:
            where = self.after if number < depth else self.mlp
            where[number % depth] = in_rows(hidden, 1 + samples)

        block = model.network.get_submodule(model.anatomy.blocks[0])
        handle = block.register_forward_hook(self._note_tuple)
        try:
            with watching(model, sites, keep), self._noise(self.noise):
                logits = self._run(1 + samples)
        finally:
            handle.remove()
        self.answer = int(logits[0].argmax())
        chances = logits.softmax(dim=-1)[:, self.answer]
        self.clean, self.disturbed = float(chances[0]), float(chances[1:].mean())

    @torch.no_grad()
    def trace(self, only_last_subject: bool) -> _Traced:
        """Put back every token in every layer, both ways."""
        tokens, depth = len(self.ids), self.model.anatomy.depth
        places = [self.last] if only_last_subject else list(range(tokens))
        effects = [torch.full((depth, tokens), torch.nan) for _ in KINDS]
        half = int(WINDOW * depth) // 2
        for layer in range(depth):
            window = range(max(0, layer - half), min(depth, layer + half + 1))
            effects[1][layer, places] = self._put_back(places, window[0], window)
            if not only_last_subject:
                effects[0][layer, places] = self._put_back(places, layer + 1, range(0))
        roles = [self._role(token, tokens) for token in range(tokens)]
        return _Traced(self.clean, self.disturbed, effects, roles)

    def _put_back(self, places: Sequence[int], first: int, mlps: Sequence[int]) -> torch.Tensor:
        """Indirect effect of each place, (places,): the hidden state below block ``first`` is put
        back there or, if ``mlps`` are named, the outputs of those."""
        count, samples = len(places), self.samples
        rows = torch.arange(count * samples)
        columns = torch.tensor(places).repeat_interleave(samples)
        hidden = None
        if first > 0:
            hidden = self.after[first - 1][1:].repeat(count, 1, 1)
            if not mlps:
                hidden[rows, columns] = self.after[first - 1][0, columns]
        handles = []
        for layer in mlps:
            clean = self.mlp[layer][0, columns]

            def restore(_m: Any, _i: Any, output: Any, clean: torch.Tensor = clean) -> Any:
                changed = in_rows(hidden_of(output), len(rows)).clone()
                changed[rows, columns] = clean
                return with_hidden(output, changed)

            module = self.model.network.get_submodule(self.model.anatomy.mlp_out[layer])
            handles.append(module.register_forward_hook(restore))
        try:
            with (
                skipping(self.model, first, hidden, self.in_tuple),
                self._noise(self.noise[1:].repeat(count, 1, 1)),
            ):
                logits = self._run(count * samples)
        finally:
            for handle in handles:
                handle.remove()
        chances = logits.softmax(dim=-1)[:, self.answer].view(count, samples)
        return (chances.mean(dim=1) - self.disturbed).cpu()

    def _run(self, rows: int) -> torch.Tensor:
        """Logits after the prompt: (rows, vocabulary), fp32."""
        ids = self.ids.repeat(rows, 1).to(self.model.device)
        last = torch.full((rows,), len(self.ids) - 1)
        with head_sees(self.model.network, torch.arange(rows), last):
            return self.model.network(input_ids=ids, use_cache=False).logits[0].float()

    def _note_tuple(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.in_tuple = isinstance(output, tuple)

    @contextlib.contextmanager
    def _noise(self, noise: torch.Tensor) -> Iterator[None]:
        """Within the block, the subject's embeddings are disturbed, row by row."""

        def disturb(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.clone()
            output[:, self.first : self.last + 1] += noise
            return output

        module = self.model.network.get_submodule(self.model.anatomy.embedding)
        handle = module.register_forward_hook(disturb)
        try:
            yield
        finally:
            handle.remove()

    def _role(self, token: int, tokens: int) -> int:
        """Index in ``ROLES``; tokens before the subject cannot be disturbed and count as further.

        A token with two roles (a subject of one token) has the later of them in the subject, the
        last of the prompt otherwise.
        """
        if token == self.last:
            return LAST_SUBJECT
        if token == self.first:
            return 0
        if self.first < token < self.last:
            return 1
        if token == tokens - 1:
            return 5
        return 3 if token == self.last + 1 else 4


def _mean(model: str, facts: Sequence[_Traced]) -> Trace:
    effects: list[list[list[float] | None]] = []
    for kind in range(len(KINDS)):
        rows: list[list[float] | None] = []
        for role in range(len(ROLES)):
            columns = [
                fact.effects[kind][:, token]
                for fact in facts
                for token, its in enumerate(fact.roles)
                if its == role and not bool(fact.effects[kind][:, token].isnan().any())
            ]
            rows.append(torch.stack(columns).mean(dim=0).tolist() if columns else None)
        effects.append(rows)
    count = len(facts)
    clean = sum(fact.clean for fact in facts) / count
    disturbed = sum(fact.disturbed for fact in facts) / count
    return Trace(model, count, clean, disturbed, effects)


# ---- the familiar picture ------------------------------------------------------------------------

SHADES = " ░▒▓█"


def lines(found: Trace) -> list[str]:
    """The picture for a terminal: a row a role, a character a layer, darker for more effect."""
    shown = []
    for kind, rows in zip(KINDS, found.effects, strict=True):
        most = max((max(row) for row in rows if row is not None), default=0.0)
        shown.append(f"Put back: {kind} (darkest: {most:+.3f}); layers 0 to {found.layers - 1}")
        for role, row in zip(ROLES, rows, strict=True):
            if row is not None:
                cells = "".join(
                    SHADES[round(_depth(value, most) * (len(SHADES) - 1))] for value in row
                )
                shown.append(f"{role:>22} |{cells}|")
    return shown


def _depth(value: float, most: float) -> float:
    """Share of the strongest effect, 0 to 1."""
    return min(1.0, max(0.0, value / most)) if most > 0 else 0.0
