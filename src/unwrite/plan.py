"""What an update will need, estimated before the model is loaded: time, memory, disk.

Counts come from the configuration of the model (see ``footprint``) and the tokenised edits; speeds
are measured for a fraction of a second on this machine. Memory is told to within some ten percent
(docs/scale.md says how it was checked). Time is of the right size, not
exact: a learner that stops when the facts are learned is counted with half of its epochs, a method
of several rounds with half of its rounds.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unwrite import footprint, methods
from unwrite.adapters import ALL, FUSED, KINDS
from unwrite.anatomy import Anatomy
from unwrite.edits import Edit
from unwrite.errors import ModelUnavailable
from unwrite.files import readable_size
from unwrite.footprint import Footprint, Layout, Work
from unwrite.kept import ANSWER_TOKENS_KEPT, numbers_kept
from unwrite.methods.lora import LoRA
from unwrite.methods.memit import MEMIT
from unwrite.model import Skeleton, outline
from unwrite.observe import neutral_text, questions
from unwrite.pretrained import BUILT_IN, HUB_ID, Source, resolve
from unwrite.progress import Reporter, Silent
from unwrite.refining import KEPT_A_STEP, TEXTS_A_STEP
from unwrite.training import Recipe, share_left
from unwrite.values import Search

BYTES_OF_SEARCH = 1 << 30  # activations while values are sought, and second moments
TYPICAL_TOKENS, TYPICAL_PROBES = 16, 6  # of a prompt with its answer; of an edit
TYPICAL_ANSWER = 4  # tokens
LARGEST_PROGRAM = 1 << 30  # bytes of a process that has loaded no model
MOST_PROCESSES = 64  # that advice goes up to
GENERATION_STEPS = 10  # tokens until a first sentence is complete, on average


@dataclass(frozen=True)
class Plan:
    """An estimate for one update. Bytes and seconds; ``warnings`` say what will not fit.

    ``memory_bytes``: the peak of the process that needs most, where it computes (``parts``: what
    for); ``host_bytes``: of the host memory of its machine, all processes there together;
    ``disk_bytes``: what stays, ``scratch_bytes``: what is needed beside it for a while;
    ``traffic_bytes``: what a process sends and gets in one step. ``advice``: what else would fit.
    """

    model: str
    method: str
    parameters: int
    edits: int
    tokens_per_epoch: int
    probes: int
    memory_bytes: int
    memory_free: int
    disk_bytes: int
    disk_free: int
    train_seconds: float
    observe_seconds: float
    warnings: tuple[str, ...]
    layout: Layout = field(default_factory=Layout)
    parts: Mapping[str, int] = field(default_factory=dict)
    host_bytes: int = 0
    scratch_bytes: int = 0
    traffic_bytes: int = 0
    advice: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table for people."""
        several = self.layout.processes > 1
        largest = sorted(self.parts.items(), key=lambda item: -item[1])[:4]
        return [
            ("model", f"{self.model}, {self.parameters / 1e6:.0f} million parameters"),
            ("method", self.method),
            *([("processes", _said(self.layout))] if several else []),
            ("edits", f"{self.edits} ({self.tokens_per_epoch} tokens an epoch)"),
            ("probes", str(self.probes)),
            (
                "memory",
                f"{readable_size(self.memory_bytes)} of {readable_size(self.memory_free)} free",
            ),
            ("of it", ", ".join(f"{name} {readable_size(size)}" for name, size in largest)),
            *(
                [("host memory", f"{readable_size(self.host_bytes)} a machine")]
                if several or self.layout.device == "cuda"
                else []
            ),
            *([("traffic", f"{readable_size(self.traffic_bytes)} a step")] if several else []),
            ("disk", f"{readable_size(self.disk_bytes)} of {readable_size(self.disk_free)} free"),
            ("training", f"about {self.train_seconds:.0f} s"),
            ("observing", f"about {self.observe_seconds:.0f} s"),
        ]


def for_model(
    name: str | Path | Source,
    method: Any,
    edits: Sequence[Edit] | None = None,
    *,
    folder: Path = Path(),
    layout: Layout | None = None,
    memory: int | None = None,
    trust_remote_code: bool = False,
    progress: Reporter | None = None,
) -> Plan:
    """Plan an update of ``name`` by ``method``; without ``edits``, one of a hundred typical ones.

    Reads the configuration and, for edits, the tokenizer; never a weight, and of a hub id nothing
    else is fetched. ``folder``: where the home is or will be. ``layout``: how the command will be
    launched; ``memory``: bytes of the device (or, on the CPU, machine) that it is planned for
    (default: what is free on this one). Raises ``ModelUnavailable`` for what is not a model that
    can be changed.
    """
    layout = layout or Layout(device="cuda" if torch.cuda.is_available() else "cpu")
    label, place = _place(name, trust_remote_code, (progress or Silent()).say)
    network = outline(label, place, trust_remote_code=trust_remote_code)
    if isinstance(place, Path) and any(place.glob("*.safetensors")):
        # Whether the files agree with the network is known from their headers.
        Skeleton.of(Source(label, place, "folder", None), trust_remote_code=trust_remote_code)
    parameters = sum(one.numel() for one in network.parameters())
    tokens, probes, probe_tokens, longest = _text_sizes(label, place, edits, trust_remote_code)
    speed, bandwidth = _speeds()
    recipes = list(_recipes(method))
    count = 100 if edits is None else len(edits)
    train = sum(
        times * _train_seconds(one, count, tokens, parameters, speed, bandwidth)
        for one, times in recipes
    )
    # Every probe is read once with its answer and once before generating, before and after.
    reading = 2 * 2 * parameters * (2 * probe_tokens + len(neutral_text()) / 4) / speed
    writing = 2 * 2 * parameters * probes * GENERATION_STEPS / speed
    train += _search_seconds(method, count, tokens, parameters, speed)
    train /= layout.processes
    full = any(_trains_all(one) for one, _ in recipes)
    shape = _Shape(network, Anatomy.of(network), longest, probe_tokens, count)
    needs = shape.needs(method, layout)
    disk = parameters * 4 if full else parameters // 100
    # Probes wait in scratch files, and so do what comes together from shards, and the weights
    # meanwhile.
    probing = full and (len(recipes) > 1 or any(times > 1 for _, times in recipes))
    gathered = int(full) + 1 if layout.sharded else 0
    scratch = parameters * 4 * (int(probing) + gathered)
    memory_free = _memory_free() if memory is None else memory
    disk_free = shutil.disk_usage(_existing(folder)).free
    warnings: list[str] = []
    advice: tuple[str, ...] = ()
    if needs.peak > memory_free:
        advice = tuple(_advice(shape, method, layout, memory_free))
        warnings.append(
            f"Training needs about {readable_size(needs.peak)} of memory, and "
            f"{readable_size(memory_free)} are free. "
            + (" ".join(advice) or "Use a smaller model, or a method that trains fewer weights.")
        )
    if disk + scratch > disk_free:
        warnings.append(
            f"The change needs about {readable_size(disk + scratch)} of disk, and "
            f"{readable_size(disk_free)} are free. Put the home on another disk."
        )
    return Plan(
        model=label,
        method=str(getattr(method, "name", type(method).__name__)),
        parameters=parameters,
        edits=count,
        tokens_per_epoch=tokens,
        probes=probes,
        memory_bytes=needs.peak,
        memory_free=memory_free,
        disk_bytes=disk,
        disk_free=disk_free,
        train_seconds=train,
        observe_seconds=reading + writing,
        warnings=tuple(warnings),
        layout=layout,
        parts=needs.parts,
        host_bytes=needs.host,
        scratch_bytes=scratch,
        traffic_bytes=needs.traffic,
        advice=advice,
    )


def machine() -> dict[str, Any]:
    """Versions, device, threads and free memory of this machine."""
    names = ("unwrite", "torch", "transformers", "accelerate", "safetensors")
    return {
        **{name: metadata.version(name) for name in names},
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "memory free": readable_size(_memory_free()),
        "disk free here": readable_size(shutil.disk_usage(Path()).free),
    }


def _text_sizes(
    label: str, place: str | Path, edits: Sequence[Edit] | None, trust_remote_code: bool
) -> tuple[int, int, int, tuple[int, int]]:
    """Tokens in one epoch, number of probes, tokens in all probes; tokens of the longest row to
    learn, and of its answer."""
    if edits is None:
        typical = 100 * TYPICAL_PROBES
        longest = (2 * TYPICAL_TOKENS, TYPICAL_ANSWER)
        return 100 * TYPICAL_TOKENS, typical, typical * TYPICAL_TOKENS, longest
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            place, trust_remote_code=trust_remote_code, local_files_only=isinstance(place, Path)
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelUnavailable(f"{label} has no tokenizer that can be read: {error}") from None

    def count(texts: list[str]) -> int:
        return sum(len(ids) for ids in tokenizer(texts)["input_ids"])

    asked = questions(edits)
    return (
        count([f"{edit.prompt} {edit.new}" for edit in edits]),
        len(asked),
        count([f"{probe.prompt} {probe.target or ''}" for probe in asked]),
        (
            max(count([f"{edit.prompt} {edit.new}"]) for edit in edits),
            max(count([edit.new]) for edit in edits),
        ),
    )


def _place(name: str | Path | Source, trust_remote_code: bool, say: Any) -> tuple[str, str | Path]:
    """What a model is called, and where its configuration is: a folder, or a hub id."""
    if isinstance(name, Source):
        return name.name, name.folder
    text, path = str(name), Path(name).expanduser()
    weightless = (path / "config.json").is_file() and not any(path.glob("*.safetensors"))
    if weightless and not any(path.glob("*.bin")):
        return text, path
    could_be_hub = isinstance(name, str) and text not in BUILT_IN and HUB_ID.fullmatch(text)
    if could_be_hub and not path.exists():
        return text, text
    return text, resolve(name, trust_remote_code=trust_remote_code, on_progress=say).folder


@dataclass(frozen=True)
class _Needs:
    """Bytes of one process where it computes, by what for; of a machine's host memory; a step's
    traffic."""

    parts: Mapping[str, int]
    host: int
    traffic: int

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class _Shape:
    """A network without numbers; the longest row to learn: its tokens, and its answer's; the tokens
    of all that is asked; how many edits there are."""

    network: Any
    anatomy: Anatomy
    longest: tuple[int, int]
    asked: int
    edits: int

    def needs(self, method: Any, layout: Layout) -> _Needs:
        """The most that any training run inside the method needs, or asking questions does."""
        found = [self._of(one, layout) for one, _ in _recipes(method)]
        where = "device" if layout.device == "cuda" else "host"
        weights = footprint.FP32 * sum(one.numel() for one in self.network.parameters())
        if isinstance(method, Search) or not found:
            search = {"weights": weights, "search": BYTES_OF_SEARCH}
            if isinstance(method, MEMIT) and method.refine:
                search["protected answers"] = self._protected(method)
            found.append(Footprint(search, dict.fromkeys(search, where), 0))
        most = max(found, key=lambda one: one.total(where))
        parts = {name: size for name, size in most.parts.items() if most.where[name] == where}
        # Questions are asked before and after, when nothing of the training is there.
        asking = weights + footprint.observing(self.network, self.asked)
        parts["asking"] = max(0, asking - sum(parts.values()))
        program = min(_own_memory(), LARGEST_PROGRAM)
        host = program + max(one.total("host") for one in found)
        if where == "host":
            parts["program"] = program
        # The first process alone asks questions.
        together = layout.neighbours * host + (parts["asking"] if where == "host" else 0)
        return _Needs(parts, together, max(one.traffic for one in found))

    def _of(self, recipe: Recipe, layout: Layout) -> Footprint:
        adapters = isinstance(recipe, LoRA)
        work = Work(
            trained=None if adapters else self._trained(recipe),
            rows=recipe.batch_size,
            tokens=self.longest[0],
            answer_tokens=self.longest[1],
            optimizer=recipe.optimizer,
            adapter_weights=self._adapters(recipe) if isinstance(recipe, LoRA) else 0,
            in_backward=recipe.in_backward,
        )
        found = footprint.training(self.network, self.anatomy, work, layout)
        if kept := self._protected(recipe):
            found.parts["protected answers"] = kept
            found.where["protected answers"] = "host"
        return found

    def _protected(self, recipe: Recipe | MEMIT) -> int:
        """Bytes of what is kept of the answers to protected prompts, at their longest."""
        prompts = recipe.neighbours * self.edits + recipe.own_prompts
        prompts += len(recipe.protect) if isinstance(recipe, Recipe) else 0
        vocabulary, width = self.network.get_output_embeddings().weight.shape
        positions = int(prompts) * ANSWER_TOKENS_KEPT
        return footprint.FP32 * numbers_kept(positions, vocabulary, width)

    def _trained(self, recipe: Recipe) -> set[str]:
        names = {name for name, _ in self.network.named_parameters()}
        layer: Any = getattr(recipe, "layer", "all")
        if layer == "all":
            return names
        at = layer if isinstance(layer, int) else self.anatomy.layer_at(layer)
        return names & {f"{self.anatomy.mlp_out[at]}.weight"}

    def _adapters(self, recipe: LoRA) -> int:
        """Numbers in the factors of adapters on all matrices of the wanted kinds."""
        wanted = {FUSED.get(kind, kind) for kind in recipe.targets} | set(recipe.targets)
        if ALL in recipe.targets:
            wanted = {*KINDS, *FUSED.values()}
        return sum(
            recipe.rank * sum(one.shape)
            for name, one in self.network.named_parameters()
            if one.ndim == 2 and self.anatomy.kind(name) in wanted
        )


def _advice(shape: _Shape, method: Any, layout: Layout, free: int) -> Iterator[str]:
    """What would fit instead, the smallest change of each kind first."""

    def fits(changed: Any, other: Layout) -> int:
        peak = shape.needs(changed, other).peak
        return peak if peak <= free else 0

    small, places = methods.replaced(method, "batch_size", 1)
    if places and (peak := fits(small, layout)):
        yield (
            f"It fits with batch_size=1 ({readable_size(peak)}); accumulate=8 makes steps on as "
            "many rows as before."
        )
    frugal, places = methods.replaced(method, "optimizer", "adafactor")
    if places and (peak := fits(frugal, layout)):
        yield f"It fits with optimizer=adafactor ({readable_size(peak)}; it wants another lr)."
    elif places and layout.processes == 1 and (peak := fits(_least(frugal), layout)):
        yield (
            f"It fits with optimizer=adafactor and in_backward=true ({readable_size(peak)}; it "
            "wants another lr, and accumulate=1)."
        )
    if places and layout.device == "cuda":
        processes = 2
        while processes <= MOST_PROCESSES:
            sharding = footprint.with_layout(layout, processes=processes, sharded=True)
            if processes > layout.processes and (peak := fits(method, sharding)):
                yield f"It fits on {processes} GPUs with FSDP ({readable_size(peak)} each)."
                break
            processes *= 2
    if not isinstance(method, LoRA):
        adapters = LoRA()
        if peak := fits(adapters, layout):
            yield f"The method lora fits ({readable_size(peak)})."


def _least(method: Any) -> Any:
    """The method with steps within the backward pass, in which nothing can be accumulated."""
    return methods.replaced(methods.replaced(method, "accumulate", 1)[0], "in_backward", True)[0]


def _said(layout: Layout) -> str:
    how = "the model and its training sharded" if layout.sharded else "each with a whole model"
    more = [", offloaded"] * layout.offloaded + [", activations recomputed"] * layout.recomputed
    return f"{layout.processes}, {how}{''.join(more)}"


def _recipes(method: Any) -> Iterator[tuple[Recipe, float]]:
    """Every training run inside a method (a method may hold others as fields, or as ``parts`` that
    it makes up by itself), and how often it is likely to be made."""
    parts = methods.parts_of(method)
    for part in parts:
        for recipe, times in _recipes(part):
            yield recipe, times * share_left(recipe, parts)
    if isinstance(method, Recipe):
        yield method, 1.0
    elif dataclasses.is_dataclass(method):
        # Of every round of Delicate Fine-Tuning, two probes; it stops when the facts are learned.
        times = float(getattr(method, "rounds", 1.0))
        for field in dataclasses.fields(method):
            for recipe, inner in _recipes(getattr(method, field.name)):
                yield recipe, inner * max(1.0, times)


def _trains_all(recipe: Recipe) -> bool:
    """Does every weight get a gradient and the state of an optimiser? Not in adapters, and not
    where one ``layer`` is named."""
    return not isinstance(recipe, LoRA) and getattr(recipe, "layer", "all") == "all"


def _search_seconds(method: Any, edits: int, tokens: int, parameters: int, speed: float) -> float:
    """Seeking values (ROME, MEMIT): all texts of an edit that a step looks at, forward and back to
    the value; about half of the steps are needed. Refining reads a few texts a step, forward and
    back. Without the second moments, which are computed once for a model."""
    read = sum(
        tokens * search.texts_at_once * search.steps / 2
        + tokens
        / edits
        * (TEXTS_A_STEP + KEPT_A_STEP)
        * (search.refine if isinstance(search, MEMIT) else 0)
        for search in (method, *methods.parts_of(method))
        if isinstance(search, Search)
    )
    return 4.0 * parameters * read / speed


def _train_seconds(
    recipe: Recipe, edits: int, tokens: int, parameters: int, speed: float, bandwidth: float
) -> float:
    epochs = recipe.epochs / (2 if recipe.until == "learned" else 1)
    steps = math.ceil(edits / recipe.rows_per_step)
    # Forward and backward: 6 operations a weight and token; 4 where the weight gets no gradient.
    # AdamW reads and writes 28 bytes a weight; gradients are written, measured for clipping and
    # cleared: 16 more. For adapters, both are next to nothing.
    operations, moved = (4, 0) if isinstance(recipe, LoRA) else (6, 44)
    if recipe.protect or recipe.neighbours or recipe.own_prompts:
        tokens *= 2  # as many protected rows in every step
    return epochs * (
        operations * parameters * tokens / speed + steps * parameters * moved / bandwidth
    )


def _speeds() -> tuple[float, float]:
    """Measured operations and bytes a second: fp32 products of the size of a small batch, and
    copies larger than most caches."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.ones(128, 1536, device=device), torch.ones(1536, 1536, device=device)
    # Two tensors of 64 MB, copied in place: memory that is asked for anew costs more than writing.
    source, target = (torch.ones(16 * 1024 * 1024, device=device) for _ in range(2))
    operations = 2 * left.numel() * right.shape[1] / _seconds(lambda: left @ right, device)
    return operations, 2 * 4 * source.numel() / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Any, device: str) -> float:
    """The best of several short repetitions: what the machine can do when nobody disturbs it."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(3):
            work()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / 3)
    return best


def _own_memory() -> int:
    """What this process holds of the machine's memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def _memory_free() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _existing(folder: Path) -> Path:
    folder = folder.expanduser().resolve()
    while not folder.exists():
        folder = folder.parent
    return folder
