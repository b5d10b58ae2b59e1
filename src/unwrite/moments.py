"""Second moments of what MLPs look up by: C = E[k k'] over the tokens of a corpus.

ROME, MEMIT and AlphaEdit weigh by C what a change does to everything else (METHODS 6.3 step 3).
Elsewhere that takes hours: one pass per layer over 100,000 articles. Here it is one pass for all
layers, left after the last of them, over ten tokens for every dimension of a key; the rest is
shrinkage (Ledoit and Wolf 2004), which says by itself how far so many tokens can be trusted.

Keys are read as the MLP's output projection sees them. Sums are kept in float64. Results lie in the
cache by fingerprint of the base, corpus and number of tokens; an interrupted pass goes on where it
was. They always belong to the base, also when the model at hand has been changed since, so that the
same call gives the same bits whatever was computed before.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock

from unwrite.activations import Site, in_rows, leaving_after, watching
from unwrite.edits import read_edits
from unwrite.errors import BadSetting, DamagedFile
from unwrite.files import read_jsonl, sha256_bytes, sha256_file, user_path, write_jsonl
from unwrite.model import Model, length_batches
from unwrite.own_text import sampled
from unwrite.pretrained import cache_folder
from unwrite.training import neutral_contexts

OWN = "own"  # the corpus that the model writes itself
HUB = "hub:"
TOKENS_PER_DIMENSION = 10  # fewer is called a small corpus; about what FastMEMIT finds sufficient
LONGEST_TEXT = 256  # tokens; longer texts are cut into pieces
LONGEST_OWN_TEXT = 128
ROWS_WRITTEN = 64  # texts that are sampled together
TOKENS_PER_WINDOW = 16_384  # read, sorted by length, added up and noted down together
MEMORY_FOR_SUMS = 4 << 30  # bytes; more layers than fit take a further pass
WORST_CONDITION = 1e12
FORMAT = 1


@dataclass(frozen=True)
class Statistics:
    """Fields of methods that weigh by second moments.

    ``covariance``: "corpus" (second moments over a corpus) or "identity" (all directions alike, no
    corpus at all, as FastEdit). ``corpus``: "own" (text that the model writes itself, sampled with
    ``seed``), the path of a text file, or "hub:NAME" (a data set with a column "text"; needs the
    package datasets). ``tokens``: how many to read; None for ten per dimension of a key.
    ``shrinkage``: share of the identity mixed in, between 0 and 1; None for the estimate of Ledoit
    and Wolf.
    """

    covariance: Literal["corpus", "identity"] = "corpus"
    corpus: str = OWN
    tokens: int | None = None
    shrinkage: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise BadSetting(f"tokens must be at least 1, not {self.tokens}.")
        if self.shrinkage is not None and not 0 <= self.shrinkage <= 1:
            raise BadSetting(f"shrinkage must lie between 0 and 1; {self.shrinkage} does not.")
        if self.covariance not in ("corpus", "identity"):
            raise BadSetting(f"covariance must be corpus or identity, not {self.covariance!r}.")


@dataclass(frozen=True)
class Moment:
    """Second moment of the keys of one layer: ``matrix`` = mean of k k', float64 (width, width) on
    the CPU, over ``tokens`` keys. ``fourth``: mean of |k|^4."""

    matrix: torch.Tensor
    tokens: int
    fourth: float

    @property
    def shrinkage(self) -> float:
        """Share of the identity that minimises the expected squared error (Ledoit and Wolf 2004,
        for a known mean of zero and independent tokens)."""
        width = self.matrix.shape[0]
        square = float((self.matrix**2).sum())
        level = float(self.matrix.trace()) / width
        distance = square - width * level**2
        error = (self.fourth - square) / self.tokens
        return min(1.0, max(0.0, error / distance)) if distance > 0 else 1.0

    def shrunk(self, share: float) -> torch.Tensor:
        """(1 - share) C + share * (trace C / width) * identity, float64."""
        level = float(self.matrix.trace()) / self.matrix.shape[0]
        mixed = self.matrix * (1 - share)
        mixed.diagonal().add_(share * level)
        return mixed


class Metric:
    """A covariance ready to be divided by; None for the identity (times ``level``)."""

    def __init__(self, covariance: torch.Tensor | None, what: str, level: float = 1.0) -> None:
        """Factorise, float64. Raises ``BadSetting``, naming ``what``, for a matrix that is singular
        or nearly so."""
        self.level = level
        self.factor: torch.Tensor | None = None
        if covariance is None:
            return
        factor, failed = torch.linalg.cholesky_ex(covariance.double())
        # The squared ratio of the pivots is never more than the condition number, and close to it.
        pivots = factor.diagonal()
        worst = math.inf if failed else float((pivots.max() / pivots.min()) ** 2)
        if not worst < WORST_CONDITION:
            raise BadSetting(
                f"The covariance of {what} is singular or nearly so (condition above "
                f"{WORST_CONDITION:.0e}): its corpus does not reach every direction; give a larger "
                "corpus, leave shrinkage at none, or set covariance=identity."
            )
        self.factor = factor

    def divide(self, keys: torch.Tensor) -> torch.Tensor:
        """C^-1 k for every row k: float64, the shape of ``keys`` (keys, width)."""
        keys = keys.double()
        if self.factor is None:
            return keys / self.level
        return torch.cholesky_solve(keys.T, self.factor).T


def metrics(
    model: Model,
    layers: Sequence[int],
    keys: Callable[[], Sequence[torch.Tensor]],
    statistics: Statistics,
    besides: Sequence[torch.Tensor] | None = None,
) -> tuple[list[Metric], dict[str, Any]]:
    """One metric a layer and a record of what they are made of, as JSON.

    ``keys`` (asked for by the identity only; per layer (facts, width)) give it its scale, that of a
    covariance whose directions are all alike, so that a weight beside it means the same.
    ``besides``: float64 (width, width) a layer, to be added to the covariance: keys that count for
    more than they do in a corpus.
    """
    if statistics.covariance == "identity":
        scales = [max(float((one.double() ** 2).mean()), 1e-30) for one in keys()]
        if besides is None:
            return [Metric(None, "", scale) for scale in scales], {"covariance": "identity"}
        covariances = [
            scale * torch.eye(len(more), dtype=torch.float64)
            for scale, more in zip(scales, besides, strict=True)
        ]
        record: dict[str, Any] = {"covariance": "identity"}
    else:
        moments, record = second_moments(model, layers, statistics)
        shares = [_share(one, statistics) for one in moments]
        covariances = [one.shrunk(share) for one, share in zip(moments, shares, strict=True)]
        record |= {"shrinkage": [round(share, 6) for share in shares]}
    more = besides or [torch.zeros((), dtype=torch.float64) for _ in layers]
    found = [
        Metric(one + extra, f"layer {layer}")
        for layer, one, extra in zip(layers, covariances, more, strict=True)
    ]
    return found, record


def second_moments(
    model: Model, layers: Sequence[int], statistics: Statistics
) -> tuple[list[Moment], dict[str, Any]]:
    """The second moment of every layer's keys, from the cache or from one pass over the corpus.

    The record says which corpus, how many tokens, and in a sentence whether that is few. Memory:
    8 bytes x width squared a layer, at most ``MEMORY_FOR_SUMS`` at a time besides the results.
    Raises ``BadSetting`` for a corpus that cannot be read.
    """
    width = _width(model, layers[0])
    wanted = statistics.tokens or TOKENS_PER_DIMENSION * width
    corpus = _Corpus(model, statistics, wanted)
    folder = cache_folder() / "moments" / model.fingerprint[:16] / corpus.key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        missing = [layer for layer in layers if _load(folder / _name(layer)) is None]
        at_a_time = max(1, MEMORY_FOR_SUMS // (8 * width**2))
        for start in range(0, len(missing), at_a_time):
            with at_base(model):
                _measure(model, missing[start : start + at_a_time], corpus, folder)
    moments = [moment for layer in layers if (moment := _load(folder / _name(layer))) is not None]
    tokens = moments[0].tokens
    record: dict[str, Any] = {
        "covariance": "corpus",
        "corpus": corpus.title,
        "tokens": tokens,
        "width": width,
    }
    if tokens < TOKENS_PER_DIMENSION * width:
        record["sentence"] = (
            f"The corpus has {tokens} tokens for keys of {width} dimensions, "
            f"{tokens / width:.1f} each where {TOKENS_PER_DIMENSION} are advised; shrinkage makes "
            "up for it."
        )
        model.progress.say(record["sentence"])
    return moments, record


@contextlib.contextmanager
def at_base(model: Model) -> Iterator[None]:
    """Within the block the model is its base, whatever state it was in; then exactly as before.

    Memory: a copy of the tensors that differ.
    """
    live = model.weights
    kept: dict[str, torch.Tensor] = {}
    base = model.base
    for name in live:
        original = base[name].to(live[name].device, torch.float32)
        if not torch.equal(original, live[name]):
            kept[name] = live[name].clone()
            live[name].copy_(original)
    try:
        yield
    finally:
        for name, tensor in kept.items():
            live[name].copy_(tensor)


# ---- the pass over the corpus --------------------------------------------------------------------


@dataclass
class _Sums:
    """What is added up in a pass: per layer the sum of k k' and of |k|^4; tokens and texts read."""

    second: list[torch.Tensor]
    fourth: torch.Tensor
    tokens: int = 0
    texts: int = 0


@torch.no_grad()
def _measure(model: Model, layers: Sequence[int], corpus: _Corpus, folder: Path) -> None:
    """One pass for all ``layers``; notes down the sums after every window of texts."""
    unfinished = folder / f"unfinished-{'-'.join(map(str, layers))}.safetensors"
    sums = _resume(unfinished, len(layers))
    if sums is None:
        width = _width(model, layers[0])
        second = [torch.zeros((width, width), dtype=torch.float64) for _ in layers]
        sums = _Sums(second, torch.zeros(len(layers), dtype=torch.float64))
    texts = islice(corpus.texts(folder), sums.texts, None)
    with model.progress.stage("second moments", corpus.tokens) as advance:
        advance(sums.tokens, "")
        while sums.tokens < corpus.tokens:
            window = list(_window(texts, corpus.tokens - sums.tokens))
            if not window:
                break
            add_up(model, layers, window, sums.second, sums.fourth)
            read = sum(map(len, window))
            sums.tokens += read
            sums.texts += len(window)
            advance(read, "")
            if sums.tokens < corpus.tokens:
                _save(
                    unfinished,
                    {"fourth": sums.fourth} | {str(i): one for i, one in enumerate(sums.second)},
                    {"tokens": sums.tokens, "texts": sums.texts},
                )
    if not sums.tokens:
        raise BadSetting(f"The corpus {corpus.title} has no text in it; give another.")
    for number, layer in enumerate(layers):
        facts = {"tokens": sums.tokens, "fourth": float(sums.fourth[number]) / sums.tokens}
        matrix = sums.second[number].div_(sums.tokens)
        _save(folder / _name(layer), {"matrix": matrix}, facts)
    unfinished.unlink(missing_ok=True)


@torch.no_grad()
def add_up(
    model: Model,
    layers: Sequence[int],
    texts: Sequence[Sequence[int]],
    second: Sequence[torch.Tensor],
    fourth: torch.Tensor,
) -> None:
    """Add the keys of every token of ``texts`` to the sums of k k' and of |k|^4, in place.

    ``second``: float64 (width, width) a layer; ``fourth``: float64 (layers,). Products within a
    batch are fp32, what goes into the sums is float64.
    """
    sites: list[Site] = [(model.anatomy.mlp_out[layer], "in") for layer in layers]
    for batch in length_batches([len(text) for text in texts]):
        lengths = torch.tensor([len(texts[index]) for index in batch])
        ids = torch.zeros((len(batch), int(lengths.max())), dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : len(texts[index])] = torch.tensor(texts[index])
        real = (torch.arange(ids.shape[1]) < lengths[:, None]).to(model.device)

        def add(number: int, hidden: torch.Tensor, real: torch.Tensor = real) -> None:
            keys = in_rows(hidden, len(real))[real].float()
            second[number].add_((keys.T @ keys).cpu())
            fourth[number] += (keys * keys).sum(dim=1).double().square().sum().cpu()

        with watching(model, sites, add), leaving_after(model, max(layers)):
            model.network(input_ids=ids.to(model.device), use_cache=False)


def _window(texts: Iterator[Sequence[int]], left: int) -> Iterator[Sequence[int]]:
    """The next texts, about as many tokens as are worked on together and never more than ``left``;
    the last text is cut."""
    read = 0
    while read < min(left, TOKENS_PER_WINDOW):
        text = next(texts, None)
        if text is None:
            return
        text = text[: left - read]
        read += len(text)
        yield text


def _width(model: Model, layer: int) -> int:
    """Numbers in a key."""
    name = model.anatomy.mlp_out[layer]
    shape = model.network.get_submodule(name).weight.shape
    return int(shape[0] if model.anatomy.transposed(name) else shape[1])


# ---- the corpus ----------------------------------------------------------------------------------


class _Corpus:
    """Where the texts come from: its title for people, its key for the cache, its texts as ids."""

    def __init__(self, model: Model, statistics: Statistics, tokens: int) -> None:
        self.model, self.tokens, self.seed = model, tokens, statistics.seed
        self.source = statistics.corpus
        if self.source == OWN:
            self.title, identity = "text of its own", f"{OWN}-{LONGEST_OWN_TEXT}-{self.seed}"
        elif self.source.startswith(HUB):
            self.title, identity = self.source, self.source
        else:
            self.path = user_path(self.source)
            if not self.path.is_file():
                raise BadSetting(
                    f"corpus={self.source!r} is neither a text file, nor {OWN!r}, nor {HUB}NAME; "
                    "give the path of a text file."
                )
            self.title, identity = self.path.name, f"file-{sha256_file(self.path)}"
        self.key = sha256_bytes(f"{FORMAT} {identity} {tokens} {LONGEST_TEXT}".encode())[:16]

    def texts(self, folder: Path) -> Iterator[Sequence[int]]:
        """Token ids, text by text, in an order that is always the same. ``folder``: where text of
        the model's own is kept, so that it is written once."""
        if self.source == OWN:
            yield from self._own(folder / "texts.jsonl")
            return
        longest = min(LONGEST_TEXT, self.model.context_length)
        paragraphs = _hub(self.source) if self.source.startswith(HUB) else _paragraphs(self.path)
        for paragraph in paragraphs:
            ids = self.model.tokenizer(paragraph)["input_ids"]
            for start in range(0, len(ids), longest):
                yield ids[start : start + longest]

    def _own(self, path: Path) -> Iterator[Sequence[int]]:
        with contextlib.suppress(DamagedFile):  # missing or broken: written now
            yield from [row["ids"] for row in read_jsonl(path)]
            return
        texts = list(written_by(self.model, self.tokens, self.seed))
        write_jsonl(path, [{"ids": text} for text in texts])
        yield from texts


def _paragraphs(path: Path) -> Iterator[str]:
    """Runs of lines between empty lines, read as they are needed."""
    lines: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if line.strip():
                    lines.append(line)
                elif lines:
                    yield "".join(lines).strip()
                    lines = []
                if len(lines) >= 64:  # a file without empty lines
                    yield "".join(lines).strip()
                    lines = []
    except UnicodeDecodeError:
        raise BadSetting(f"The corpus {path.name} is not UTF-8 text; save it so.") from None
    if lines:
        yield "".join(lines).strip()


def _hub(source: str) -> Iterator[str]:
    """Texts of a data set on the hub, streamed."""
    name = source.removeprefix(HUB)
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise BadSetting(
            f"corpus={source!r} needs the package datasets; install it, or give a text file."
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for row in rows:
            yield row["text"]
    except (OSError, ValueError, KeyError) as error:
        raise BadSetting(
            f"corpus={source!r} cannot be read as a data set with a column 'text' "
            f"({str(error).splitlines()[0][:200] if str(error) else type(error).__name__}); give "
            "a text file."
        ) from None


@torch.no_grad()
def written_by(model: Model, tokens: int, seed: int) -> Iterator[Sequence[int]]:
    """Text that the model writes itself, plainly sampled: the distribution that it knows.

    It goes on from the bundled neutral sentences and from the prompts of the bundled facts (without
    their answers), each used again with other random numbers when more text is asked for. No text
    is used that scores are taken on.
    """
    openings = neutral_contexts(24) + [edit.prompt for edit in read_edits("atlas")]
    length = min(LONGEST_OWN_TEXT, model.context_length)
    written = start = 0
    with model.progress.stage("writing a corpus", tokens) as advance:
        while written < tokens:
            count = min(ROWS_WRITTEN, math.ceil((tokens - written) / length))
            chosen = [openings[i % len(openings)] for i in range(start, start + count)]
            texts = sampled(model, chosen, length, seed * 1_000_003 + start)
            yield from texts
            start += count
            written += sum(map(len, texts))
            advance(sum(map(len, texts)), "")


# ---- on disk -------------------------------------------------------------------------------------


def _name(layer: int) -> str:
    return f"layer-{layer}.safetensors"


def _share(moment: Moment, statistics: Statistics) -> float:
    return moment.shrinkage if statistics.shrinkage is None else statistics.shrinkage


def _save(path: Path, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    temporary = path.with_suffix(".writing")
    save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
    os.replace(temporary, path)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Tensors and facts of a file; None if it is not there or damaged (it is then made anew)."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            # Copies: what is read must not hang on a file that may be replaced or cut short.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, facts  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError):
        return None


def _load(path: Path) -> Moment | None:
    if (found := _read(path)) is None:
        return None
    tensors, facts = found
    return Moment(tensors["matrix"], facts["tokens"], facts["fourth"])


def _resume(path: Path, layers: int) -> _Sums | None:
    if (found := _read(path)) is None:
        return None
    tensors, facts = found
    second = [tensors[str(number)] for number in range(layers)]
    return _Sums(second, tensors["fourth"], facts["tokens"], facts["texts"])
