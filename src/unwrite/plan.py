"""What an update will need, estimated before the model is loaded: time, memory, disk.

Counts come from the headers of the checkpoint and the tokenised edits; speeds are measured for a
fraction of a second on this machine. The estimate is of the right size, not exact: a learner that
stops when the facts are learned is counted with half of its epochs, a method of several rounds with
half of its rounds.
"""

from __future__ import annotations

import dataclasses
import math
import platform
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from unwrite.edits import Edit
from unwrite.errors import ModelUnavailable
from unwrite.files import readable_size
from unwrite.methods.lora import LoRA
from unwrite.model import Skeleton
from unwrite.observe import neutral_text, questions
from unwrite.pretrained import Source, resolve
from unwrite.progress import Reporter, Silent
from unwrite.training import Recipe
from unwrite.values import Search
from unwrite.weights import Weights

BYTES_PER_TRAINED_WEIGHT = 20  # fp32 weight, gradient, two AdamW moments, snapshot
BYTES_PER_FROZEN_WEIGHT = 5  # fp32 weight; what adapters add is small beside it
BYTES_OF_SEARCH = 1 << 30  # activations while values are sought, and second moments
TYPICAL_TOKENS, TYPICAL_PROBES = 16, 6  # of a prompt with its answer; of an edit
GENERATION_STEPS = 10  # tokens until a first sentence is complete, on average


@dataclass(frozen=True)
class Plan:
    """An estimate for one update. Bytes and seconds; ``warnings`` say what will not fit."""

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

    def as_json(self) -> dict[str, Any]:
        """All fields by name."""
        return dataclasses.asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """The plan as a table for people."""
        return [
            ("model", f"{self.model}, {self.parameters / 1e6:.0f} million parameters"),
            ("method", self.method),
            ("edits", f"{self.edits} ({self.tokens_per_epoch} tokens an epoch)"),
            ("probes", str(self.probes)),
            (
                "memory",
                f"{readable_size(self.memory_bytes)} of {readable_size(self.memory_free)} free",
            ),
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
    trust_remote_code: bool = False,
    progress: Reporter | None = None,
) -> Plan:
    """Plan an update of ``name`` by ``method``; without ``edits``, one of a hundred typical ones.

    Reads headers and the tokenizer, never a weight. ``folder``: where the home is or will be.
    Raises ``ModelUnavailable`` for what is not a model that can be changed.
    """
    say = (progress or Silent()).say
    source = (
        name
        if isinstance(name, Source)
        else resolve(name, trust_remote_code=trust_remote_code, on_progress=say)
    )
    skeleton = Skeleton.of(source, trust_remote_code=trust_remote_code)
    with Weights.from_folder(source.folder) as weights:  # files may hold more than is trained
        parameters = sum(weights.parameters(name) for name in skeleton.names)
    tokens, probes, probe_tokens = _text_sizes(source, edits, trust_remote_code)
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
    train += _search_seconds(method, tokens, parameters, speed)
    full = any(_trains_all(one) for one, _ in recipes)
    memory = parameters * (BYTES_PER_TRAINED_WEIGHT if full else BYTES_PER_FROZEN_WEIGHT)
    memory += BYTES_OF_SEARCH if isinstance(method, Search) else 0
    disk = parameters * 4 if full else parameters // 100
    memory_free, disk_free = _memory_free(), shutil.disk_usage(_existing(folder)).free
    warnings = []
    if memory > memory_free:
        warnings.append(
            f"Training needs about {readable_size(memory)} of memory, and "
            f"{readable_size(memory_free)} are free. Use a smaller model, or a method that trains "
            "fewer weights."
        )
    if disk > disk_free:
        warnings.append(
            f"The change needs about {readable_size(disk)} of disk, and "
            f"{readable_size(disk_free)} are free. Put the home on another disk."
        )
    return Plan(
        model=source.name,
        method=str(getattr(method, "name", type(method).__name__)),
        parameters=parameters,
        edits=count,
        tokens_per_epoch=tokens,
        probes=probes,
        memory_bytes=memory,
        memory_free=memory_free,
        disk_bytes=disk,
        disk_free=disk_free,
        train_seconds=train,
        observe_seconds=reading + writing,
        warnings=tuple(warnings),
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
    source: Source, edits: Sequence[Edit] | None, trust_remote_code: bool
) -> tuple[int, int, int]:
    """Tokens in one epoch, number of probes, tokens in all probes."""
    if edits is None:
        return 100 * TYPICAL_TOKENS, 100 * TYPICAL_PROBES, 100 * TYPICAL_PROBES * TYPICAL_TOKENS
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelUnavailable(
            f"{source.name} has no tokenizer that can be read: {error}"
        ) from None

    def count(texts: list[str]) -> int:
        return sum(len(ids) for ids in tokenizer(texts)["input_ids"])

    asked = questions(edits)
    return (
        count([f"{edit.prompt} {edit.new}" for edit in edits]),
        len(asked),
        count([f"{probe.prompt} {probe.target or ''}" for probe in asked]),
    )


def _recipes(method: Any) -> Iterator[tuple[Recipe, float]]:
    """Every training run inside a method (a method may hold others as fields), and how often it is
    likely to be made."""
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


def _search_seconds(method: Any, tokens: int, parameters: int, speed: float) -> float:
    """Seeking values (ROME, MEMIT): every edit bare, in its contexts and its subject alone, forward
    and back to the value; about half of the steps are needed. Without the second moments, which are
    computed once for a model."""
    if not isinstance(method, Search):
        return 0.0
    return 4.0 * parameters * tokens * (method.contexts + 2) * method.steps / 2 / speed


def _train_seconds(
    recipe: Recipe, edits: int, tokens: int, parameters: int, speed: float, bandwidth: float
) -> float:
    epochs = recipe.epochs / (2 if recipe.until == "learned" else 1)
    steps = math.ceil(edits / recipe.batch_size)
    # Forward and backward: 6 operations a weight and token; 4 where the weight gets no gradient.
    # AdamW reads and writes 28 bytes a weight; gradients are written, measured for clipping and
    # cleared: 16 more. For adapters, both are next to nothing.
    operations, moved = (4, 0) if isinstance(recipe, LoRA) else (6, 44)
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
