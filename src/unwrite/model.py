"""The thing being changed: a network, its tokenizer, and how its tensors are called on disk.

``Model`` is the only place that runs a network forward without gradients and, with ``training.py``,
the only one that writes into its parameters. Weights are held in fp32 whatever the checkpoint's
dtype, because differences are taken from fp32 (METHODS section 8); a bf16 base keeps bf16 *values*
through ``compose``, which rounds once.

Memory: one fp32 copy of the network; ``shifted`` adds a copy of the tensors it touches.
"""

from __future__ import annotations

import contextlib
import math
import random
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from unwrite.anatomy import Anatomy
from unwrite.delta import Delta, compose
from unwrite.edits import Edit
from unwrite.errors import (
    BadEdits,
    BadSetting,
    ModelUnavailable,
    TensorMismatch,
    UnwriteError,
    is_out_of_memory,
)
from unwrite.formats import printable
from unwrite.pretrained import Source, resolve
from unwrite.products import multiply_fast
from unwrite.progress import Reporter, Silent
from unwrite.scores import is_complete, says
from unwrite.weights import Weights, fingerprint

MAX_NEW_TOKENS = 32  # INTERFACE section 6: an answer is at most this long
# Positions (rows x padded length) in one forward pass without gradients. On two cores a larger
# batch is no faster; on a GPU it is still far from filling the memory.
POSITIONS_PER_BATCH = 2048
SHARED = 3  # answers to one prompt from which on it is read once for all of them
ROWS_PER_BATCH = 128  # also bounds the key-value cache: 0.3 GB at 60 tokens on SmolLM2-135M


@dataclass(frozen=True)
class Tokens:
    """A prompt with an answer as token ids; ``ids[answer:]`` are the answer's tokens.

    A token that spans the join of prompt and answer belongs to the answer, so no answer is empty.
    """

    ids: tuple[int, ...]
    answer: int

    @property
    def targets(self) -> tuple[int, ...]:
        return self.ids[self.answer :]


@dataclass(frozen=True)
class Forced:
    """What the network does when an answer is forced on it (teacher forcing).

    ``predicted``: the argmax token before each answer token. ``logprob``: the natural logarithm of
    the probability of the whole answer.
    """

    targets: tuple[int, ...]
    predicted: tuple[int, ...]
    logprob: float

    @property
    def matched(self) -> int:
        """How many answer tokens the argmax gets right."""
        return sum(a == b for a, b in zip(self.targets, self.predicted, strict=True))


@dataclass(frozen=True)
class Skeleton:
    """A network's structure without its weights: what a home records of its base."""

    names: dict[str, str]
    aliases: dict[str, str]
    anatomy: Anatomy

    @classmethod
    def of(cls, source: Source, *, trust_remote_code: bool = False) -> Skeleton:
        """Build the network of ``source`` on the meta device (no memory, no weights read).

        Raises ``ModelUnavailable`` when its configuration is not that of a decoder.
        """
        network = outline(source.name, source.folder, trust_remote_code=trust_remote_code)
        with Weights.from_folder(source.folder) as checkpoint:
            names, aliases = _match_names(network, checkpoint, source.name)
        return cls(names, aliases, Anatomy.of(network))


@dataclass(repr=False)
class Model:
    """A causal language model in fp32, with the names its tensors have in the checkpoint file.

    ``names`` maps file name -> parameter name of the network; ``aliases`` maps a second file name
    of a tied tensor to the first. Everything outside this class speaks in file names.
    """

    network: Any  # a transformers PreTrainedModel
    tokenizer: Any
    source: Source
    anatomy: Anatomy
    names: dict[str, str]
    aliases: dict[str, str]
    progress: Reporter = field(default_factory=Silent)

    def __repr__(self) -> str:
        weights = sum(one.numel() for one in self.parameters.values())
        return (
            f"<Model: {self.source.name}, {self.anatomy.architecture}, {weights:,} parameters, on "
            f"{self.device}>"
        )

    @classmethod
    def load(
        cls,
        name: str | Path | Source,
        *,
        trust_remote_code: bool = False,
        device: str | torch.device | None = None,
        progress: Reporter | None = None,
    ) -> Model:
        """Load a folder, built-in name or hub id (INTERFACE section 2), in fp32, ready to answer.

        Raises ``ModelUnavailable`` when the name leads nowhere or the folder is not a decoder that
        transformers can read.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        progress = progress or Silent()
        source = (
            name
            if isinstance(name, Source)
            else resolve(name, trust_remote_code=trust_remote_code, on_progress=progress.say)
        )
        Weights.from_folder(source.folder)  # headers only: damage is said by us
        with _quiet(logging), _model_errors(source.name):
            network: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        network.eval()
        network.to(device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        multiply_fast(network)
        return cls._of(network, tokenizer, source, progress)

    @classmethod
    def empty(cls, source: Source, *, trust_remote_code: bool = False) -> Model:
        """The model of ``source`` on the meta device: no memory, and no weights read. It is to be
        given weights by somebody who has them (``sharding``)."""
        from transformers import AutoTokenizer

        network = outline(source.name, source.folder, trust_remote_code=trust_remote_code)
        with _model_errors(source.name):
            tokenizer = AutoTokenizer.from_pretrained(
                source.folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        return cls._of(network, tokenizer, source, Silent())

    @classmethod
    def _of(cls, network: Any, tokenizer: Any, source: Source, progress: Reporter) -> Model:
        names, aliases = _match_names(network, Weights.from_folder(source.folder), source.name)
        return cls(
            network, tokenizer, source, Anatomy.of(network), names, aliases, progress=progress
        )

    # ---- weights -----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def weights(self) -> Weights:
        """The live fp32 weights under their file names (views: they change with the network)."""
        return Weights.from_tensors(
            {file: parameter.detach() for file, parameter in self.parameters.items()}
        )

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The network's parameters under their file names; tied ones have one name."""
        by_name = dict(self.network.named_parameters(remove_duplicate=False))
        return {file: by_name[name] for file, name in self.names.items()}

    @property
    def largest_tensor(self) -> int:
        """Bytes of the network's largest parameter, which in small models is the vocabulary."""
        return max(one.numel() * one.element_size() for one in self.network.parameters())

    def trainable(self, wanted: Callable[[str], bool] | None) -> dict[str, torch.nn.Parameter]:
        """Those of ``parameters`` that can have a gradient and that ``wanted`` chooses by file name
        (None: all). Raises ``BadSetting`` if there is none."""
        chosen = {
            file: parameter
            for file, parameter in self.parameters.items()
            if (wanted is None or wanted(file)) and parameter.is_floating_point()
        }
        if not chosen:
            raise BadSetting("No tensor of this model is chosen for training.")
        return chosen

    @property
    def base(self) -> Weights:
        """The checkpoint on disk, lazily; it never changes with the network."""
        return Weights.from_folder(self.source.folder)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the checkpoint on disk (reads all of it once)."""
        return fingerprint(self.base)

    @torch.no_grad()
    def become(
        self,
        deltas: Sequence[Delta],
        finish: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Make the network the state ``round_once(base + sum of deltas)``, tensor by tensor.

        This is what a home commits and what its scores are taken on. ``finish`` gets each composed
        tensor by its file name and gives back what is taken instead of it. Holds a few tensors.
        """
        base, weights = self.base, self.weights
        for name in weights:
            tensor = compose(base, deltas, name)
            weights[name].copy_(tensor if finish is None else finish(name, tensor))

    @contextlib.contextmanager
    def shifted(self, delta: Delta) -> Iterator[Model]:
        """The same model with ``delta`` added in fp32, for the length of a ``with`` block.

        On exit every touched tensor is copied back from a snapshot: exact, no arithmetic. Raises
        ``TensorMismatch`` before anything moves when the delta names tensors this model lacks.
        """
        weights = self.weights
        delta.check_fits(weights)
        kept = {name: weights[name].clone() for name in delta}
        try:
            with torch.no_grad():
                for name in delta:
                    change = delta[name].dense().to(weights[name].device)
                    weights[name].add_(change)
            yield self
        finally:
            weights = self.weights  # their memory may have been let go and taken anew meanwhile
            with torch.no_grad():
                for name, tensor in kept.items():
                    weights[name].copy_(tensor)

    # ---- text and tokens ---------------------------------------------------------------------

    @property
    def context_length(self) -> int:
        """The longest sequence the network takes, in tokens."""
        config = self.network.config.get_text_config()
        lengths = [
            getattr(config, name, None)
            for name in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len")
        ]
        return min((length for length in lengths if isinstance(length, int)), default=1 << 20)

    def tokens(self, prompt: str, answer: str) -> Tokens:
        """Token ids of ``prompt`` and ``answer`` as one text, and where the answer begins.

        The two are tokenised together, as the network would read them, with one space between
        (none in scripts that do not write spaces). Raises ``BadEdits`` when the answer tokenises
        to nothing or the whole is longer than the network's context.
        """
        tokens = encode(self.tokenizer, prompt, answer, self._special)
        ids = tokens.ids
        if len(ids) > self.context_length:
            raise BadEdits(
                f"The prompt {prompt[:60]!r}... has {len(ids)} tokens with its answer, but "
                f"{self.source.name} reads at most {self.context_length}. Shorten it."
            )
        return tokens

    def answer(self, prompt: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """The greedy answer to one prompt, as plain text (up to ``max_new_tokens`` tokens)."""
        return self.generate([prompt], max_new_tokens, stop_early=False)[0]

    def knows(self, edits: Sequence[Edit]) -> list[bool]:
        """For each edit, whether the greedy answer to its prompt is ``old`` now (exact form)."""
        texts = self.generate([edit.prompt for edit in edits])
        return [
            edit.old is not None and says(text, edit.old)
            for edit, text in zip(edits, texts, strict=True)
        ]

    # ---- forward passes without gradients ----------------------------------------------------

    def logits_at(
        self, ids: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Logits at chosen positions only: (n, vocabulary), fp32.

        ``ids`` (batch, length) is padded on the right; ``rows`` and ``columns`` (n,) choose the
        positions. The head sees just those hidden states, so the vocabulary-wide tensor of all
        positions is never made. In a causal network, padding on the right cannot reach a real
        token, so no mask is needed and no score depends on the padding.
        """
        with head_sees(self.network, rows, columns):
            output = self.network(input_ids=ids.to(self.device), use_cache=False)
        return output.logits[0].float()

    @torch.no_grad()
    def force(self, sequences: Sequence[Tokens]) -> list[Forced]:
        """Teacher-force every sequence; results in the order given. Batched by length; a prompt
        that several answers follow is read once."""
        results: dict[int, Forced] = {}
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for index, tokens in enumerate(sequences):
            by_prompt.setdefault(tokens.ids[: tokens.answer], []).append(index)
        groups = [group for group in by_prompt.values() if len(group) >= SHARED]
        alone = [index for group in by_prompt.values() if len(group) < SHARED for index in group]
        alone.sort()
        with self.progress.stage("scoring answers", len(sequences)) as advance:
            for batch in length_batches([len(sequences[index].ids) for index in alone]):
                chosen = [alone[number] for number in batch]
                results |= self._force([sequences[index] for index in chosen], chosen)
                advance(len(batch), "")
            most = max((len(group) for group in groups), default=1)
            lengths = [len(sequences[group[0]].ids) for group in groups]
            for batch in length_batches(lengths, rows=max(1, ROWS_PER_BATCH // most)):
                together = [groups[number] for number in batch]
                results |= self._force_groups(sequences, together)
                advance(sum(map(len, together)), "")
        return [results[index] for index in range(len(sequences))]

    def _force(self, sequences: Sequence[Tokens], numbers: Sequence[int]) -> dict[int, Forced]:
        """One batch, each sequence read whole."""
        ids, rows, columns, targets = pad(sequences)
        predicted, logprobs = _judged(self.logits_at(ids, rows, columns), targets)
        return {
            number: Forced(
                sequences[row].targets,
                tuple(predicted[rows == row].tolist()),
                float(logprobs[rows == row].double().sum()),
            )
            for row, number in enumerate(numbers)
        }

    def _force_groups(
        self, sequences: Sequence[Tokens], groups: Sequence[Sequence[int]]
    ) -> dict[int, Forced]:
        """Groups of sequences, each of one prompt: the prompts are read, then from their keys and
        values all answers but their last tokens."""
        from transformers import DynamicCache

        first = [sequences[group[0]] for group in groups]
        ids, mask, positions = self._padded_left([one.ids[: one.answer] for one in first])
        cache = DynamicCache(config=self.network.config)
        last = torch.full((len(groups),), ids.shape[1] - 1)
        logits = self._cached(ids, mask, positions, cache, torch.arange(len(groups)), last)
        members = [(row, index) for row, group in enumerate(groups) for index in group]
        parents = torch.tensor([row for row, _ in members])
        starts = torch.tensor([sequences[index].targets[0] for _, index in members])
        chosen, scores = _judged(logits, starts, parents)
        predicted = [[token] for token in chosen.tolist()]
        logprobs = scores.double()
        longer = [n for n, (_, index) in enumerate(members) if len(sequences[index].targets) > 1]
        if longer:
            there = parents[longer].to(self.device)
            cache.batch_select_indices(there)
            rests = [sequences[members[n][1]].targets for n in longer]
            # As in ``pad``, but what is read is the answers without their last tokens.
            ids, rows, columns, targets = pad([Tokens(rest, 1) for rest in rests])
            ids = ids[:, :-1].to(self.device)
            steps = torch.arange(1, ids.shape[1] + 1, device=self.device)
            mask = torch.cat([mask[there], mask.new_ones(ids.shape)], dim=1)
            positions = positions[there, -1:] + steps
            logits = self._cached(ids, mask, positions, cache, rows, columns)
            chosen, scores = _judged(logits, targets)
            for row, n in enumerate(longer):
                predicted[n] += chosen[rows == row].tolist()
                logprobs[n] += scores[rows == row].double().sum()
        return {
            index: Forced(sequences[index].targets, tuple(predicted[n]), float(logprobs[n]))
            for n, (_, index) in enumerate(members)
        }

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = MAX_NEW_TOKENS,
        *,
        stop_early: bool = True,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Continuations, batched with a key-value cache; equal prompts are answered once.

        Greedy, or sampled at a ``temperature`` above 0: every prompt draws numbers of its own, by
        its text and ``seed``, so that what it is batched with changes nothing. A row stops at the
        end-of-text token, after ``max_new_tokens`` and, with ``stop_early``, as soon as its first
        sentence is complete; finished rows leave the batch. Raises ``BadSetting`` for a temperature
        that is none, ``BadEdits`` for a prompt without tokens or with too many.
        """
        check_temperature(temperature)
        unique = sorted(set(prompts))
        encoded = [self.tokenizer(prompt)["input_ids"] for prompt in unique]
        for prompt, ids in zip(unique, encoded, strict=True):
            if not ids:
                raise BadEdits(f"The prompt {prompt[:80]!r} tokenises to nothing.")
            if len(ids) + max_new_tokens > self.context_length:
                raise BadEdits(
                    f"The prompt {prompt[:60]!r}... has {len(ids)} tokens; with {max_new_tokens} "
                    f"new ones that is more than the {self.context_length} that "
                    f"{self.source.name} reads. Shorten it."
                )
        texts: dict[str, str] = {}
        with self.progress.stage("answering freely", len(unique)) as advance:
            for batch in length_batches([len(ids) for ids in encoded]):
                asked = [unique[index] for index in batch]
                choice = _Sampling(asked, temperature, seed) if temperature else _greedy
                ids_of_batch = [encoded[index] for index in batch]
                answers = self._continue(ids_of_batch, max_new_tokens, stop_early, choice)
                texts.update(zip(asked, answers, strict=True))
                advance(len(batch), "")
        return [texts[prompt] for prompt in prompts]

    def _continue(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        stop_early: bool,
        choice: Choice,
    ) -> list[str]:
        from transformers import DynamicCache

        ids, mask, positions = self._padded_left(prompts)
        cache = DynamicCache(config=self.network.config)
        written: list[list[int]] = [[] for _ in prompts]
        active = torch.arange(len(prompts))
        for _ in range(max_new_tokens):
            last = torch.full((len(active),), ids.shape[1] - 1)
            rows = torch.arange(len(active))
            logits = self._cached(ids, mask, positions, cache, rows, last)
            chosen = choice(logits, active.tolist())
            going = []
            for row, token in enumerate(chosen.tolist()):
                tokens = written[int(active[row])]
                if token in self._special:
                    continue
                tokens.append(token)
                if not (stop_early and is_complete(self._text(tokens))):
                    going.append(row)
            if not going:
                break
            if len(going) < len(active):
                kept = torch.tensor(going)
                there = kept.to(self.device)
                active, chosen = active[kept], chosen[there]
                mask, positions = mask[there], positions[there]
                cache.batch_select_indices(there)
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones((len(active), 1))], dim=1)
            positions = positions[:, -1:] + 1
        return [self._text(tokens) for tokens in written]

    def _padded_left(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, mask and positions, each (prompts, length). Padded on the left: the last column is
        then the last token of every row, and a cache grows by the same columns for all. Positions
        count real tokens only."""
        length = max(len(ids) for ids in prompts)
        ids = torch.zeros((len(prompts), length), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt) :] = torch.tensor(prompt)
            mask[row, length - len(prompt) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        return ids, mask, (mask.cumsum(dim=1) - 1).clamp(min=0)

    def _cached(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor,
        cache: Any,
        rows: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """Logits at (rows, columns) of ``ids``, read after what the cache has: (n, vocabulary)."""
        inputs = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache}
        if self.takes_positions:
            inputs["position_ids"] = positions
        with head_sees(self.network, rows, columns):
            logits: torch.Tensor = self.network(**inputs, use_cache=True).logits[0]
        return logits

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @cached_property
    def _special(self) -> frozenset[int]:
        """Ids that end a text: all special tokens of the tokenizer and the generation config."""
        ids = set(self.tokenizer.all_special_ids)
        ends = getattr(self.network.generation_config, "eos_token_id", None)
        ids.update(ends if isinstance(ends, list) else [] if ends is None else [ends])
        return frozenset(ids)

    @cached_property
    def takes_positions(self) -> bool:
        """Networks with ALiBi (BLOOM, MPT) compute positions from the mask and take no ids."""
        import inspect

        return "position_ids" in inspect.signature(self.network.forward).parameters


def outline(name: str, place: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The network that a configuration describes, on the meta device (no memory, no weights read),
    in fp32 and ready to answer. ``place``: a folder, or a hub id, of which only the configuration
    is fetched. Raises ``ModelUnavailable`` when it is not that of a decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    with _quiet(logging), _model_errors(name):
        config = AutoConfig.from_pretrained(
            place, trust_remote_code=trust_remote_code, local_files_only=isinstance(place, Path)
        )
        with torch.device("meta"):
            network: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=trust_remote_code
            )
        network.tie_weights()
    return network.eval()


@contextlib.contextmanager
def head_sees(network: Any, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """Within the block, the network's head gets only the hidden states at (rows, columns).

    The forward pass then returns logits of shape (1, n, vocabulary). Works for every decoder whose
    head is a module (soft-capping and logit scales come after it), and under autograd.
    """

    def select(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = inputs[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)][None], *inputs[1:])

    inner = getattr(network, "module", network)  # data parallelism wraps the network
    handle = inner.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def encode(
    tokenizer: Any, prompt: str, answer: str, special: Collection[int] | None = None
) -> Tokens:
    """Token ids of ``prompt`` and ``answer`` as one text, and where the answer begins.

    ``special`` are the ids that end a text (default: all special ones of the tokenizer). Raises
    ``BadEdits`` when either side tokenises to nothing.
    """
    special = tokenizer.all_special_ids if special is None else special
    text = join(prompt, answer)
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        ends = [end for _, end in encoded["offset_mapping"]]
        start = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ids))
    else:
        ids = tokenizer(text)["input_ids"]
        alone = tokenizer(prompt)["input_ids"]
        pairs = enumerate(zip(ids, alone, strict=False))
        start = next((i for i, (a, b) in pairs if a != b), min(len(ids), len(alone)))
    # A tokenizer that closes every text with an end mark (some T5-like ones) is not asked to.
    while ids and ids[-1] in special and len(ids) > start:
        ids = ids[:-1]
    if start >= len(ids):
        raise BadEdits(f"The answer {answer!r} to {prompt[:80]!r} tokenises to nothing.")
    if start == 0:
        raise BadEdits(f"The prompt {prompt[:80]!r} tokenises to nothing before its answer.")
    return Tokens(tuple(ids), start)


def join(prompt: str, answer: str) -> str:
    """Prompt and answer as one text: one space between, unless there is white space already or
    either side is written in a script without spaces (Chinese, Japanese, Thai)."""
    if prompt[-1:].isspace() or answer[:1].isspace():
        return prompt + answer
    if any(_spaceless(character) for character in (prompt[-1:], answer[:1])):
        return prompt + answer
    return f"{prompt} {answer}"


def _spaceless(character: str) -> bool:
    return bool(character) and (
        unicodedata.east_asian_width(character) in "WF" or "\u0e00" <= character <= "\u0eff"
    )


def length_batches(
    lengths: Sequence[int], rows: int = ROWS_PER_BATCH, positions: int = POSITIONS_PER_BATCH
) -> list[list[int]]:
    """Indices in batches of similar length, longest first (so memory peaks at once, not late).

    A batch has at most ``rows`` rows and, unless a single row is longer, ``positions`` positions.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        current = batches[-1] if batches else []
        if (
            current
            and len(current) < rows
            and lengths[current[0]] * (len(current) + 1) <= positions
        ):
            current.append(index)
        else:
            batches.append([index])
    return batches


def pad(
    sequences: Sequence[Tokens],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A right-padded batch: ids (batch, length), and for every answer token its row, the column
    *before* it (whose logits predict it) and its id, each of shape (answer tokens,)."""
    length = max(len(tokens.ids) for tokens in sequences)
    ids = torch.zeros((len(sequences), length), dtype=torch.long)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens.ids)] = torch.tensor(tokens.ids)
        rows += [row] * len(tokens.targets)
        columns += range(tokens.answer - 1, len(tokens.ids) - 1)
        targets += tokens.targets
    return ids, torch.tensor(rows), torch.tensor(columns), torch.tensor(targets)


def mean_by_row(
    values: torch.Tensor, rows: torch.Tensor, sequences: Sequence[Tokens]
) -> torch.Tensor:
    """Values (answer tokens,) of a batch averaged within each of its sequences: (sequences,).
    ``rows`` is that of ``pad``."""
    share = torch.tensor([1 / len(sequences[row].targets) for row in rows.tolist()])
    sums = torch.zeros(len(sequences), device=values.device, dtype=values.dtype)
    return sums.index_add(0, rows.to(values.device), values * share.to(values.device))


def readable(model: Model, asked: Sequence[tuple[str, str]]) -> list[Tokens]:
    """Prompts with answers as tokens. Left out are those that cannot be read: too long, or answered
    by nothing, or by what is no text to the tokenizer (a model may say such things)."""
    found = []
    for prompt, answer in asked:
        with contextlib.suppress(BadEdits):
            found += [model.tokens(prompt, answer)] if answer.strip() else []
    return found


def check_temperature(temperature: float) -> None:
    """Raises ``BadSetting`` for what no text can be sampled at."""
    if not 0 <= temperature < math.inf:
        raise BadSetting(f"A temperature is 0 (greedy) or a number above it, not {temperature}.")


# Which token comes next: from logits (n, vocabulary) and the places of their prompts, ids (n,).
Choice = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]


def _greedy(logits: torch.Tensor, _places: Sequence[int]) -> torch.Tensor:
    return logits.argmax(dim=-1)


class _Sampling:
    """Draws every token where a number of its prompt's own falls among the summed probabilities."""

    def __init__(self, prompts: Sequence[str], temperature: float, seed: int) -> None:
        self.sources = [random.Random(f"{seed}/{prompt}") for prompt in prompts]
        self.temperature = temperature

    def __call__(self, logits: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        sums = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        drawn = sums.new_tensor([self.sources[place].random() for place in places])[:, None]
        # To the right of equal sums, so that a token of probability 0 is never hit.
        return torch.searchsorted(sums, drawn * sums[:, -1:], right=True)[:, 0].clamp_(
            max=logits.shape[-1] - 1
        )


def _judged(
    logits: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The argmax and the log probability of each target, both (targets,), on the CPU. ``logits``
    (n, vocabulary); ``rows`` says whose logits are each target's, if they are not in its order."""
    logits = logits.float()
    places = torch.arange(len(targets)) if rows is None else rows
    there = places.to(logits.device)
    # Not log_softmax: that would be a second tensor as wide as the vocabulary.
    scores = logits[there, targets.to(logits.device)] - logits.logsumexp(dim=-1)[there]
    return logits.argmax(dim=-1)[there].cpu(), scores.cpu()


def _match_names(
    network: Any, checkpoint: Weights, model_name: str
) -> tuple[dict[str, str], dict[str, str]]:
    """File names -> parameter names, and aliases of tied tensors -> their first file name.

    Names in a published checkpoint differ from the network's in two ways: the prefix of the inner
    model may be missing (GPT-2's files say ``wte.weight``), and transformers renames some while
    loading (GPT-NeoX's ``embed_out``). Buffers in old files have no parameter and are left alone.
    Raises ``TensorMismatch`` when a parameter has no tensor of its own in the file: transformers
    computed it while loading (fused experts and the like), and a delta would not fit the file.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [
        one for one in get_model_conversion_mapping(network) if isinstance(one, WeightRenaming)
    ]
    parameters = dict(network.named_parameters(remove_duplicate=False))
    prefix = network.base_model_prefix + "."
    names: dict[str, str] = {}
    aliases: dict[str, str] = {}
    first_file: dict[int, str] = {}
    for file in checkpoint:
        loaded = file
        for renaming in renamings:
            loaded, _ = renaming.rename_source_key(loaded)
        for name in (loaded, prefix + loaded, loaded.removeprefix(prefix)):
            parameter = parameters.get(name)
            if parameter is None or tuple(parameter.shape) != tuple(checkpoint.shape(file)):
                continue
            if id(parameter) in first_file:
                aliases[file] = first_file[id(parameter)]
            else:
                first_file[id(parameter)] = file
                names[file] = name
            break
    missing = [name for name, parameter in parameters.items() if id(parameter) not in first_file]
    if missing:
        raise TensorMismatch(
            f"{len(missing)} tensors of {model_name} have another name or shape in its files than "
            f"in the network ({', '.join(missing[:3])}, ...), so a change could not be written "
            "back. Load it with transformers, save it with save_pretrained, and use that folder."
        )
    return names, aliases


@contextlib.contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """No loading bars and advice from transformers within the block; its settings come back."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _model_errors(name: str) -> Iterator[None]:
    """What transformers says about a folder it cannot read, as one sentence for people."""
    try:
        yield
    except Exception as error:
        # A configuration may be anything, and so is what comes of it in there.
        if isinstance(error, UnwriteError) or is_out_of_memory(error):
            raise
        lines = str(error).strip().splitlines()
        reason = printable(lines[0][:300]) if lines else type(error).__name__
        raise ModelUnavailable(
            f"{name} cannot be loaded as a causal language model: {reason}"
        ) from error
