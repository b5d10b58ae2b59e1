"""Fine-tuning on a task: plain, or gracefully, letting go of what stands in the task's way.

    answers of the base to the tasks to be forgotten ──┐
    plain fine-tune on the task ── delta, Fisher ──────┴─► forgetting confidence ─► what to forget
    fine-tune on the task from the base again, with unlearning steps in between ─► the result

The result folder is an ordinary Hugging Face folder; its sub-folder ``run`` holds how it came
about. Every finished stage is kept there, and the same call goes on where it was interrupted.
Training goes through ``transformers.Trainer``, so that the same callbacks work in anyone's own
script.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from unwrite import optimizers, processes
from unwrite.change import Dense
from unwrite.delta import SCRATCH, Delta, compose
from unwrite.errors import BadSetting
from unwrite.files import (
    only_writer,
    read_json,
    read_jsonl,
    sha256_bytes,
    user_path,
    write_atomically,
    write_json,
    write_jsonl,
)
from unwrite.forgetting.confidence import Selection, forgetting_confidence, select
from unwrite.forgetting.fisher import EXAMPLES, fisher_diagonal
from unwrite.forgetting.graceful import GracefulForgetting, Schedule
from unwrite.forgetting.penalty import Anchor, BestEpoch
from unwrite.forgetting.self_generation import Keep, self_generate
from unwrite.model import Model, Tokens, check_temperature
from unwrite.observe import perplexity
from unwrite.optimizers import OptimizerName
from unwrite.progress import Measured
from unwrite.scratch import remove_temporaries, sweep_temporary
from unwrite.sharding import difference, divided, put_apart, shares
from unwrite.tasks import Example, Task, is_right, read_task, read_tasks
from unwrite.training import Pair, Share, row_losses
from unwrite.weights import Weights, save_weights

Method = Literal["plain", "graceful", "l2", "ewc", "early"]
METHODS: tuple[Method, ...] = ("plain", "graceful", "l2", "ewc", "early")
ALIASES: dict[str, Method] = {"lwf": "graceful"}
HELD_OUT = 0.2  # of the training split, with ``early``
ROWS_HELD_OUT = 16  # read at a time


@dataclass(frozen=True)
class Course:
    """How the task is learned; the same for all methods. See docs/paper-index.md for sources."""

    epochs: int = 3
    lr: float = 5e-5
    batch_size: int = 8
    warmup: float = 0.01  # share of the steps
    max_grad_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    save_every: int = 500  # optimiser steps between checkpoints
    seed: int = 0
    accumulate: int = 1  # batches read one after the other for one step
    optimizer: OptimizerName = "adamw"

    def __post_init__(self) -> None:
        for name in ("epochs", "lr", "batch_size", "max_grad_norm", "save_every", "accumulate"):
            if not getattr(self, name) > 0:
                raise BadSetting(f"{name} must be greater than 0, not {getattr(self, name)}.")
        if not 0 <= self.warmup < 1:
            raise BadSetting(f"warmup is a share of the steps below 1, not {self.warmup}.")
        if self.optimizer not in optimizers.NAMES:
            raise BadSetting(
                f"There is no optimizer {self.optimizer!r}. Optimizers: "
                f"{', '.join(optimizers.NAMES)}."
            )

    def as_json(self) -> dict[str, Any]:
        """The settings; those that earlier versions did not know only where they are not at their
        defaults, so that what was begun then goes on."""
        return _unlike(self, {"accumulate": 1, "optimizer": "adamw"})


@dataclass(frozen=True)
class Letting:
    """What is let go and how (METHODS 4.3, steps 1 to 3).

    ``share`` (rho): how many examples are forgotten, as a share of the task's training examples.
    ``confidence_step`` (alpha): a number, or "matched". The rest is as in ``GracefulForgetting``,
    ``self_generate`` and ``select``. ``penalty``: strength of the methods "l2" and "ewc".
    """

    select: Selection = "top"
    share: float = 0.125
    every: int = 8
    strength: float = 0.05
    schedule: Schedule = "periodic"
    keep: Keep = "all"
    temperature: float = 0.0  # of the answers that are let go; 0 is greedy
    confidence_step: float | Literal["matched"] = "matched"
    fisher_examples: int = EXAMPLES
    loss_cap: float | None = None
    penalty: float = 0.01

    def __post_init__(self) -> None:
        if not self.share > 0 or not self.fisher_examples > 0:
            raise BadSetting("share and fisher_examples must be greater than 0.")
        check_temperature(self.temperature)

    def as_json(self) -> dict[str, Any]:
        """The settings; see ``Course.as_json``."""
        return _unlike(self, {"temperature": 0.0})


@dataclass(frozen=True)
class FineTuned:
    """What ``finetune`` made: the folder, and what ``run/result.json`` says about it."""

    folder: Path
    result: dict[str, Any] = field(repr=False)


def finetune(
    base: str | Path | Model,
    task: str | Path,
    out: str | Path,
    *,
    forget: Sequence[str | Path] = (),
    method: str = "plain",
    course: Course | None = None,
    letting: Letting | None = None,
    limit: int | None = None,
    **loading: Any,
) -> FineTuned:
    """Fine-tune ``base`` on ``task`` and write the model to the folder ``out``.

    ``task`` and each of ``forget`` are as in ``read_tasks``; several tasks to forget are ranked
    together (the paper's mixed setting), and the task itself is never among them. ``limit``: at
    most so many training examples of each. ``loading`` goes to ``Model.load``.

    Accuracy on all test splits (free greedy generation) and perplexity are measured before and
    after, and for "graceful" after the plain run too, which it needs anyway. Interrupted, the same
    call goes on. Raises ``BadSetting`` when ``out`` holds something else, and what reading raises.
    Memory: the model, its gradients and two moments (16 bytes a weight), a copy of the weights, and
    for graceful forgetting two more moments (8 bytes).
    """
    course, letting = course or Course(), letting or Letting()
    chosen = _method(method)
    learn = read_task(task, limit=limit)
    _check_divided(learn)
    tasks = [one for source in forget for one in read_tasks(source, limit=limit, labelled=False)]
    let_go = [one for one in tasks if one.name != learn.name]
    if chosen in ("graceful", "ewc") and not let_go:
        raise BadSetting(f"{method} needs something else than the task itself: add --forget TASK.")
    folder = user_path(out)
    if not _is_free(folder):
        raise BadSetting(f"{folder} holds something else already. Name a new folder.")
    model = base if isinstance(base, Model) else Model.load(base, **loading)
    (folder / "run").mkdir(parents=True, exist_ok=True)
    with only_writer(folder / "run"):
        remove_temporaries(folder / "run")
        sweep_temporary(SCRATCH)
        run = _Run(model, folder / "run", learn, let_go, chosen, course, letting)
        result = run.finish(folder)
    return FineTuned(folder, result)


def _is_free(folder: Path) -> bool:
    """Whether a run can be begun or gone on with: nothing of anybody else's is there."""
    if not folder.exists() or (folder / "run" / "run.json").exists():
        return True
    begun = folder / "run"  # killed before it was written down, a run has hidden files only
    return all(
        item == begun and begun.is_dir() and all(one.name[0] == "." for one in begun.iterdir())
        for item in folder.iterdir()
    )


class _Run:
    """One fine-tune: its settings and its stages, each kept in ``folder`` when it is done."""

    def __init__(
        self,
        model: Model,
        folder: Path,
        learn: Task,
        let_go: Sequence[Task],
        method: Method,
        course: Course,
        letting: Letting,
    ) -> None:
        self.model, self.folder, self.learn, self.let_go = model, folder, learn, let_go
        self.method, self.course, self.letting = method, course, letting
        self.seconds: dict[str, float] = {}
        settings = {
            "base": model.source.name,
            "fingerprint": model.fingerprint,
            "task": {learn.name: _digest(learn)},
            "forget": {task.name: _digest(task) for task in let_go},
            "method": method,
            "course": course.as_json(),
            "letting": letting.as_json(),
        }
        path = folder / "run.json"
        if not path.exists():
            write_json(path, settings)
        elif (found := read_json(path)) != settings:
            differs = [name for name in settings if found.get(name) != settings[name]]
            raise BadSetting(
                f"{folder.parent} holds a run with other settings ({', '.join(differs)}). Repeat "
                "that call to go on with it, or name a new folder."
            )

    def finish(self, out: Path) -> dict[str, Any]:
        """Run what is not done yet; the result."""
        result_path = self.folder / "result.json"
        if result_path.exists():
            return dict(read_json(result_path))
        states: dict[str, Delta] = {"before": Delta.nothing()}
        forgotten: dict[str, Any] | None = None
        if self.method == "graceful":
            states["plain"] = self._trained("plain", self._plain)
            states["after"] = self._trained("graceful", self._graceful)
            forgotten = self._forgotten()
        else:
            states["after"] = self._trained(self.method, getattr(self, f"_{self.method}"))
        measured = {name: self._measured(name, delta) for name, delta in states.items()}
        self._write_model(out, states["after"])
        result = {
            "method": self.method,
            "task": self.learn.name,
            "forget": [task.name for task in self.let_go],
            "examples": len(self.learn.train),
            "seed": self.course.seed,
            "accuracy": _table(measured),
            "perplexity": {name: one["perplexity"] for name, one in measured.items()},
            "forgotten": forgotten,
            "seconds": self.seconds,
            "course": self.course.as_json(),
            "letting": self.letting.as_json() if self.method != "plain" else None,
        }
        write_atomically(self.folder / "report.md", report(result))
        write_json(result_path, result)
        return result

    # ---- stages ------------------------------------------------------------------------------

    def _trained(self, name: str, train: Callable[[Path], Delta]) -> Delta:
        """The change that a method makes, from its folder or by training now."""
        place = self.folder / name
        if not (place / "delta.json").exists():
            started = time.perf_counter()
            scratch = self.folder / f"{name}-training"
            delta = train(scratch)
            shutil.rmtree(place, ignore_errors=True)
            delta.save(
                place,
                provenance={"base": self.model.fingerprint, "base_name": self.model.source.name},
            )
            shutil.rmtree(scratch, ignore_errors=True)
            self.seconds[name] = time.perf_counter() - started
        return Delta.open(place)

    def _plain(self, scratch: Path) -> Delta:
        return learn_task(self.model, self.learn.train, self.course, scratch)

    def _l2(self, scratch: Path) -> Delta:
        anchor = Anchor(self.letting.penalty)
        return learn_task(self.model, self.learn.train, self.course, scratch, [anchor])

    def _ewc(self, scratch: Path) -> Delta:
        """What is to be kept is what the base says on the other tasks."""
        kept = [pair for pair, _ in self._own_answers()][: self.letting.fisher_examples]
        fisher = fisher_diagonal(self.model, kept)
        importance = {self.model.names[name]: fisher[name].dense() for name in fisher}
        anchor = Anchor(self.letting.penalty, importance)
        return learn_task(self.model, self.learn.train, self.course, scratch, [anchor])

    def _early(self, scratch: Path) -> Delta:
        rows = list(self.learn.train)
        random.Random(self.course.seed).shuffle(rows)
        count = max(1, round(HELD_OUT * len(rows)))
        if count >= len(rows):
            raise BadSetting(f"{len(rows)} examples are too few to hold some out. Give more.")
        held = [closed(self.model, example) for example in rows[:count]]
        best = BestEpoch(HeldOutLoss(held))
        return learn_task(self.model, rows[count:], self.course, scratch, [best])

    def _graceful(self, scratch: Path) -> Delta:
        pairs, confidence = self._chosen()
        callback = GracefulForgetting(
            pairs,
            confidence=confidence,
            every=self.letting.every,
            strength=self.letting.strength,
            schedule=self.letting.schedule,
            loss_cap=self.letting.loss_cap,
            batch_size=self.course.batch_size,
            tokenizer=self.model.tokenizer,
            log=self.folder / "forgotten.jsonl",
            seed=self.course.seed,
        )
        return learn_task(self.model, self.learn.train, self.course, scratch, [callback])

    def _own_answers(self) -> list[tuple[Pair, str]]:
        """What the base says to the training prompts of the tasks to be forgotten, and of which
        task that is."""
        path = self.folder / "self.jsonl"
        if not path.exists():
            rows = [
                {"task": task.name, "prompt": pair.prompt, "answer": pair.answer}
                for task in self.let_go
                for pair in self_generate(
                    self.model,
                    task.train,
                    keep=self.letting.keep,
                    temperature=self.letting.temperature,
                    seed=self.course.seed,
                )
            ]
            write_jsonl(path, rows)
        return [(Pair(row["prompt"], row["answer"]), row["task"]) for row in read_jsonl(path)]

    def _chosen(self) -> tuple[list[Pair], list[float]]:
        """The pairs to be forgotten with their confidence; all are in ``confidence.jsonl``."""
        path = self.folder / "confidence.jsonl"
        own = self._own_answers()
        if not path.exists():
            started = time.perf_counter()
            rows = self._confidence(own) if own else []
            write_jsonl(path, rows)
            self.seconds["confidence"] = time.perf_counter() - started
        rows = read_jsonl(path)
        count = round(self.letting.share * len(self.learn.train))
        values = [float(row["confidence"]) for row in rows]
        indices = select(values, self.letting.select, count, self.course.seed)
        return [own[index][0] for index in indices], [values[index] for index in indices]

    def _confidence(self, own: Sequence[tuple[Pair, str]]) -> list[dict[str, Any]]:
        plain = Delta.open(self.folder / "plain")
        rows = list(self.learn.train)
        random.Random(self.course.seed).shuffle(rows)
        data = [Pair(one.prompt, one.answer) for one in rows[: self.letting.fisher_examples]]
        with self.model.shifted(plain):  # the Laplace approximation is around the optimum
            fisher = fisher_diagonal(self.model, data)
        found = forgetting_confidence(
            self.model,
            [pair for pair, _ in own],
            plain,
            fisher,
            step=self.letting.confidence_step,
        )
        return [
            {
                "task": task,
                "prompt": pair.prompt,
                "answer": pair.answer,
                "confidence": float(found.values[index]),
                "loss": float(found.losses[index]),
                "layers": [
                    {"block": block, "kind": kind, "adds": amount}
                    for block, kind, amount in found.explain(index, self.model.anatomy)[:5]
                ],
            }
            for index, (pair, task) in enumerate(own)
        ]

    def _forgotten(self) -> dict[str, Any]:
        path = self.folder / "forgotten.jsonl"
        rows = read_jsonl(path) if path.exists() else []
        pairs, _ = self._chosen()
        return {
            "chosen": len(pairs),
            "steps": max((row["number"] for row in rows), default=0),
            "skipped": sum(row["skipped"] for row in rows),
            "loss_before": _mean([row["loss_before"] for row in rows]),
            "loss_after": _mean([row["loss_after"] for row in rows]),
        }

    def _measured(self, name: str, delta: Delta) -> dict[str, Any]:
        path = self.folder / f"measured-{name}.json"
        if not path.exists():
            started = time.perf_counter()
            tasks = [self.learn, *self.let_go]
            with self.model.shifted(delta):
                rows = answers(self.model, [row for task in tasks for row in task.test])
                write_json(path, {"perplexity": perplexity(self.model), "rows": rows})
            self.seconds[f"measuring {name}"] = time.perf_counter() - started
        return dict(read_json(path))

    def _write_model(self, out: Path, delta: Delta) -> None:
        source = self.model.source.folder
        for file in source.iterdir():
            if file.is_file() and not file.name.endswith(
                (".safetensors", ".safetensors.index.json")
            ):
                shutil.copyfile(file, out / file.name)
        for left in out.glob("*.safetensors*"):
            left.unlink()  # of an interrupted writing
        with Weights.from_folder(source) as weights:
            aliases = self.model.aliases
            save_weights(
                out, weights, lambda name: compose(weights, [delta], aliases.get(name, name))
            )


# ---- training ------------------------------------------------------------------------------------


def closed(model: Model, example: Example) -> Tokens:
    """An example as tokens, its answer closed by the end-of-text token, so that a fine-tuned model
    stops by itself."""
    tokens = model.tokens(example.prompt, example.answer)
    end = model.tokenizer.eos_token_id
    fits = len(tokens.ids) < model.context_length
    return tokens if end is None or not fits else Tokens((*tokens.ids, end), tokens.answer)


def learn_task(
    model: Model,
    examples: Sequence[Example],
    course: Course,
    scratch: Path,
    callbacks: Sequence[Any] = (),
) -> Delta:
    """Fine-tune all weights on ``examples`` with a ``transformers.Trainer`` and return the change.

    The loss is the mean over examples of the mean over their answer tokens. Checkpoints go to
    ``scratch`` and are taken up from there. The model is bitwise unchanged however this ends, and
    so is the state of all random number generators. Several processes divide each batch, and with
    FSDP2 the model as well.
    """
    orders = {
        "examples": examples,
        "course": course,
        "scratch": scratch,
        "callbacks": [_to_send(one) for one in callbacks],
    }
    with processes.called_in(model, learn_task, **orders):
        return _learned_task(model, examples, course, scratch, callbacks)


def _learned_task(
    model: Model,
    examples: Sequence[Example],
    course: Course,
    scratch: Path,
    callbacks: Sequence[Any],
) -> Delta:
    rows = [closed(model, example) for example in examples]
    steps = -(-len(rows) // (course.batch_size * course.accumulate)) * course.epochs
    shards = processes.shards()
    with _own_randomness(), contextlib.ExitStack() as clean_up:
        learner, before = model, dict[str, torch.Tensor]()
        if shards:
            learner, _, origin = clean_up.enter_context(divided(model, model.names))
            clean_up.enter_context(_fsdp_unseen())
        else:
            origin = model.weights
            before |= {name: origin[name].clone() for name in model.names}
            clean_up.callback(_restore, model, before, model.network.training)
        arguments = _arguments(
            model, course, scratch, saved=steps > course.save_every and not shards
        )
        advance = clean_up.enter_context(model.progress.stage("learning the task", steps))
        settled = [_settled(one, model, learner, before) for one in callbacks]
        trainer = _trainer(learner, arguments, rows, settled, advance, course, shards)
        checkpoints = processes.told(
            lambda: sorted(scratch.glob("checkpoint-*"), key=lambda one: int(one.name[11:]))
        )
        trainer.train(resume_from_checkpoint=str(checkpoints[-1]) if checkpoints else None)
        if shards:
            del trainer  # its optimiser's memory, before whole tensors come together
            return difference(learner, origin, list(model.names))
        trained = model.weights  # anew: with several processes the Trainer moves the parameters
        return Delta.from_changes(
            {name: Dense((trained[name] - one).cpu()) for name, one in before.items()}
        )


def _to_send(callback: Any) -> Any:
    """A callback as the other processes are to have it: what a penalty weighs by is not sent whole
    where nobody holds a whole model."""
    if isinstance(callback, Anchor) and processes.shards():
        return Anchor(callback.strength, None if callback.importance is None else {})
    return callback


def _settled(
    callback: Any, model: Model, learner: Model, before: Mapping[str, torch.Tensor]
) -> Any:
    """A callback ready for this process: a penalty pulls towards the weights before, and weighs by
    this process's shares if the model is divided. Collective there."""
    if not isinstance(callback, Anchor) or callback.start is not None:
        return callback
    weighed = callback.importance
    if learner is model:
        start = {model.names[name]: one for name, one in before.items()}
        return Anchor(callback.strength, weighed, start)
    if weighed is not None:
        files = {name: file for file, name in model.names.items()}
        weighed = shares(learner, {files[name]: one for name, one in weighed.items()})
    return Anchor(callback.strength, weighed)  # takes its start from the shards by itself


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean loss of a network on sequences that are held out, which all processes read together
    (in evaluation mode)."""

    sequences: Sequence[Tokens]

    @torch.no_grad()
    def __call__(self, network: Any, device: torch.device) -> float:
        """In every process the same number."""
        was_training = network.training
        network.eval()
        total = torch.zeros((), device=device)
        for start in range(0, len(self.sequences), ROWS_HELD_OUT):
            batch = self.sequences[start : start + ROWS_HELD_OUT]
            share = Share.of(len(batch), slice(None))
            losses = row_losses(network, [batch[row] for row in share.rows], device)
            total += losses.mean() * share.weight * len(batch)
        network.train(was_training)
        if processes.shards():
            put_apart(network)
        return float(processes.summed(total)) / processes.count() / len(self.sequences)


def _arguments(model: Model, course: Course, scratch: Path, *, saved: bool) -> Any:
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(scratch),
        num_train_epochs=course.epochs,
        per_device_train_batch_size=course.batch_size,  # divided by the loss, see TaskTrainer
        gradient_accumulation_steps=course.accumulate,
        learning_rate=course.lr,
        lr_scheduler_type="cosine",
        warmup_steps=course.warmup,
        max_grad_norm=course.max_grad_norm,
        bf16=course.precision == "bf16",
        # The Trainer would also save at the end, where there is nothing to take up any more.
        save_strategy="steps" if saved else "no",
        save_steps=course.save_every,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=processes.told(lambda: model.device.type) == "cpu",
        dataloader_pin_memory=False,
        seed=course.seed,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # never split a batch over devices behind our back
    return arguments


@contextlib.contextmanager
def _fsdp_unseen() -> Iterator[None]:
    """Within the block accelerate sees several processes and no FSDP: it would divide anew what is
    divided, and only on GPUs."""
    name = "ACCELERATE_USE_FSDP"
    asked = os.environ[name]
    os.environ[name] = "false"
    try:
        yield
    finally:
        os.environ[name] = asked


class _Divided(torch.nn.Module):
    """A network that is divided among the processes, as a Trainer may call it: one that is wrapped
    already is not wrapped in anything else, so its products in bf16 are seen to here."""

    def __init__(self, network: torch.nn.Module, bf16: bool) -> None:
        super().__init__()
        self.module, self.bf16 = network, bf16

    def forward(self, *inputs: Any, **words: Any) -> Any:
        device = next(self.module.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bf16):
            return self.module(*inputs, **words)


def _trainer(
    model: Model,
    arguments: Any,
    rows: list[Tokens],
    callbacks: Sequence[Any],
    advance: Callable[[int, str], None],
    course: Course,
    shards: bool,
) -> Any:
    from transformers import Trainer
    from transformers.trainer_callback import PrinterCallback

    class TaskTrainer(Trainer):
        """The Trainer with this project's loss: logits at answer positions only."""

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            share = Share.of(len(inputs["sequences"]), slice(None))
            mine = [inputs["sequences"][row] for row in share.rows]
            loss = row_losses(model, mine, self.args.device).mean() * share.weight
            self.latest_loss = loss.detach()
            return loss

        def get_train_dataloader(self) -> Any:
            """Every process gets the whole batch and reads its share, so that steps are those of
            one process."""
            if processes.count() == 1:
                return super().get_train_dataloader()
            from accelerate.data_loader import prepare_data_loader

            whole = torch.utils.data.DataLoader(
                self.train_dataset,  # type: ignore[arg-type]
                batch_size=course.batch_size,
                sampler=self._get_train_sampler(),
                collate_fn=self.data_collator,
            )
            return prepare_data_loader(
                whole, num_processes=1, process_index=0, use_seedable_sampler=True
            )

        def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
            if shards:
                return _Divided(model, self.args.bf16)
            return super()._wrap_model(model, training, dataloader)

        def create_optimizer(self, *given: Any) -> Any:
            if course.optimizer != "adamw":
                trained = [one for one in model.network.parameters() if one.requires_grad]
                self.optimizer = optimizers.build(course.optimizer, [trained], course.lr)
                return self.optimizer
            return super().create_optimizer(*given)

    trainer = TaskTrainer(
        model=model.network,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: {"sequences": batch},
        callbacks=list(callbacks),
    )
    trainer.add_callback(_bar(advance, trainer))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _bar(advance: Callable[[int, str], None], trainer: Any) -> Any:
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        """Tells the project's progress bar of every step, with the loss of its last batch."""

        def on_step_end(self, *_: Any, **__: Any) -> None:
            advance(1, Measured("loss", float(trainer.latest_loss)))

    return Bar()


@torch.no_grad()
def _restore(model: Model, before: Mapping[str, torch.Tensor], was_training: bool) -> None:
    weights = model.weights
    for name, one in before.items():
        weights[name].copy_(one)
    model.network.zero_grad()
    model.network.train(was_training)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Within the block, whatever seeds the global generators; afterwards they are as before."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


# ---- measuring -----------------------------------------------------------------------------------


def answers(model: Model, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """The free greedy answer to every example that has one, and whether it is right."""
    asked = [example for example in examples if example.answer]
    texts = model.generate([example.prompt for example in asked])
    return [
        {
            "task": example.task,
            "prompt": example.prompt,
            "answer": example.answer,
            "text": text,
            "right": is_right(text, example.answer),
        }
        for example, text in zip(asked, texts, strict=True)
    ]


def _table(measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Accuracy by task and state, with the number of test examples."""
    table: dict[str, dict[str, Any]] = {}
    for state, one in measured.items():
        rights: dict[str, list[bool]] = {}
        for row in one["rows"]:
            rights.setdefault(row["task"], []).append(row["right"])
        for task, values in rights.items():
            table.setdefault(task, {"n": len(values)})[state] = sum(values) / len(values)
    return table


def report(result: Mapping[str, Any]) -> str:
    """The result as a page of Markdown."""
    states = list(result["perplexity"])
    lines = [
        f"# {result['task']}: {result['method']} fine-tuning",
        "",
        f"{result['examples']} training examples, seed {result['seed']}.",
        "",
        "| accuracy in % | n | " + " | ".join(states) + " |",
        "| --- | --- |" + " --- |" * len(states),
    ]
    for task, row in result["accuracy"].items():
        cells = " | ".join(f"{100 * row[state]:.1f}" for state in states)
        lines.append(f"| {task} | {row['n']} | {cells} |")
    cells = " | ".join(f"{result['perplexity'][state]:.2f}" for state in states)
    lines.append(f"| perplexity | | {cells} |")
    if forgotten := result["forgotten"]:
        lines += [
            "",
            f"{forgotten['chosen']} of the model's own answers were let go in "
            f"{forgotten['steps']} unlearning steps; {forgotten['skipped']} times an example had "
            "reached the cap and was left alone. Every step is in `forgotten.jsonl`, every "
            "example's confidence and the layers that speak for it in `confidence.jsonl`.",
        ]
    return "\n".join(lines) + "\n"


# ---- small things --------------------------------------------------------------------------------


def _unlike(settings: Course | Letting, later: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON, but what stands in ``later`` only where it differs."""
    whole = asdict(settings)
    return {key: one for key, one in whole.items() if key not in later or one != later[key]}


def _method(name: str) -> Method:
    found = ALIASES.get(name, name)
    for method in METHODS:
        if method == found:
            return method
    raise BadSetting(f"There is no method {name!r} to fine-tune by. Methods: {', '.join(METHODS)}.")


def _check_divided(task: Task) -> None:
    if not task.train or not task.test:
        part = "training" if not task.train else "testing"
        raise BadSetting(f"The task {task.name!r} has no examples for {part}. Give more examples.")


def _digest(task: Task) -> str:
    text = repr([(one.prompt, one.answer) for one in (*task.train, *task.test)])
    return sha256_bytes(text.encode("utf-8", "surrogatepass"))[:16]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
