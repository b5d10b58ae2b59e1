"""Graceful forgetting: let go of knowledge in small steps while a task is being learned.

A callback for any ``transformers.Trainer`` (TRL's ``SFTTrainer`` is one). Every ``every`` optimiser
steps it climbs, once, the loss of a batch of texts that the model wrote itself and that stand in
the task's way (Learning With Forgetting, arXiv 2505.19715, step 3 of METHODS 4.3):

    learning step:    theta <- opt(theta,  grad L(batch of the task))
    unlearning step:  theta <- own_opt(theta, -grad L(batch of what is to be forgotten))

The ascent is bounded: its gradient is clipped, an example whose loss has reached the cap is
skipped, and its optimiser is its own, so that the moments of the task's optimiser know nothing of
it. Dropout is off during it, and it draws no random numbers but its own: with strength 0, or with
nothing to forget, training is bitwise what it would have been.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from unwrite.errors import BadSetting, DamagedFile
from unwrite.model import Tokens, encode
from unwrite.training import Pair, row_losses

Schedule = Literal["periodic", "ahead", "random"]
STATE = "graceful.safetensors"  # in a Trainer's checkpoint: the moments of the ascent


class GracefulForgetting(TrainerCallback):
    """One bounded ascent step on some of ``examples`` every ``every`` optimiser steps.

    ``confidence``: the forgetting confidence of each example; those below ``confident_above`` are
    not forgotten. ``strength`` (the paper's forgetting rate, beta of METHODS 4.3) is the learning
    rate of the ascent as a share of the Trainer's ``learning_rate``; it does not follow the
    schedule of that rate, so that all schedules forget alike. ``schedule``: "periodic"; "ahead",
    all unlearning steps before the first learning step; "random", as many at random times.
    ``loss_cap``: an example whose mean loss per answer token is at least this is left alone
    (default: the logarithm of the vocabulary, the loss of a model that knows nothing).
    ``optimizer`` of the ascent: "adamw" (8 bytes a trained weight) or "sgd". ``log``: file to which
    every row of ``history`` is appended as JSON as soon as it is known.

    ``history`` has a row for every example of every unlearning step: ``step`` (of the Trainer),
    ``number`` (of the unlearning step, from 1), ``example`` (index in ``examples``), ``prompt``,
    ``answer``, ``confidence``, ``loss_before``, ``loss_after``, ``skipped``.

    Works with gradient accumulation, bf16, adapters (what requires a gradient is what forgets) and
    several processes, which share the batch: DDP, and FSDP2, where the moments of the ascent are
    sharded like the parameters. A resumed run needs the checkpoint that this callback wrote into.
    Refuses (``BadSetting``) DeepSpeed and FSDP1.
    """

    def __init__(
        self,
        examples: Sequence[Pair],
        *,
        confidence: Sequence[float] | None = None,
        confident_above: float = -math.inf,
        every: int = 8,
        strength: float = 0.05,
        schedule: Schedule = "periodic",
        batch_size: int = 8,
        max_grad_norm: float = 1.0,
        loss_cap: float | None = None,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        tokenizer: Any = None,
        log: Path | str | None = None,
        seed: int = 0,
    ) -> None:
        _check(
            (every >= 1 and batch_size >= 1, "every and batch_size must be at least 1"),
            (strength >= 0, "strength must not be negative (0 forgets nothing)"),
            (max_grad_norm > 0, "max_grad_norm must be greater than 0"),
            (loss_cap is None or loss_cap > 0, "loss_cap must be greater than 0"),
            (schedule in ("periodic", "ahead", "random"), "schedule is periodic, ahead or random"),
            (optimizer in ("adamw", "sgd"), "optimizer is adamw or sgd"),
            (
                confidence is None or len(confidence) == len(examples),
                "confidence needs one number for every example",
            ),
            (
                confidence is not None or confident_above == -math.inf,
                "confident_above needs the confidence of the examples",
            ),
        )
        self.examples = list(examples)
        self.confidence = None if confidence is None else [float(one) for one in confidence]
        self.chosen = [
            index
            for index in range(len(self.examples))
            if self.confidence is None or self.confidence[index] >= confident_above
        ]
        self.every, self.strength, self.schedule = every, strength, schedule
        self.batch_size, self.max_grad_norm, self.loss_cap = batch_size, max_grad_norm, loss_cap
        self.kind, self.tokenizer, self.seed = optimizer, tokenizer, seed
        self.log = None if log is None else Path(log)
        self.history: list[dict[str, Any]] = []
        self.steps: list[int] = []  # of the Trainer, after which an unlearning step comes
        self.done = 0
        self.optimizer: torch.optim.Optimizer | None = None
        self.sequences: dict[int, Tokens] = {}

    @property
    def forgets(self) -> bool:
        """Whether anything will be forgotten at all."""
        return self.strength > 0 and bool(self.chosen)

    # ---- what the Trainer calls --------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that forgetting can be right here, and plan the unlearning steps."""
        if not self.forgets:
            return
        model = kwargs["model"]
        _refuse_sharding(args, model)
        tokenizer = self.tokenizer or kwargs.get("processing_class")
        if tokenizer is None:
            raise BadSetting(
                "GracefulForgetting needs a tokenizer: give the Trainer a processing_class, or "
                "pass tokenizer=."
            )
        self.sequences = {
            index: encode(tokenizer, self.examples[index].prompt, self.examples[index].answer)
            for index in self.chosen
        }
        self.steps = self._plan(state.max_steps)
        trained = [one for one in model.parameters() if one.requires_grad]
        rate = self.strength * args.learning_rate
        self.optimizer = (
            torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, maximize=True)
            if self.kind == "adamw"
            else torch.optim.SGD(trained, lr=rate, maximize=True)
        )
        self.done = sum(step <= state.global_step for step in self.steps if state.global_step)
        self._take_up(args, state)
        if state.global_step == 0:
            self._unlearn_due(args, state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Unlearn if it is time; the Trainer has just made a step and cleared its gradients."""
        if self.forgets:
            self._unlearn_due(args, state, kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the moments of the ascent beside what the Trainer saved."""
        if self.forgets:
            moments = self._moments()  # in every process: shards come together
            if state.is_world_process_zero:
                from safetensors.torch import save_file

                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                save_file(moments, folder / STATE)

    # ---- the unlearning step -----------------------------------------------------------------

    def _plan(self, total: int) -> list[int]:
        count = total // self.every
        if self.schedule == "ahead":
            return [0] * count
        if self.schedule == "random":
            return sorted(random.Random(f"{self.seed}/when").sample(range(1, total + 1), count))
        return [self.every * number for number in range(1, count + 1)]

    def _unlearn_due(self, args: Any, state: Any, model: Any) -> None:
        while self.done < len(self.steps) and self.steps[self.done] <= state.global_step:
            self._unlearn(args, model, state.global_step, state.is_world_process_zero)

    def _batch(self, number: int) -> list[int]:
        """Examples of the unlearning step ``number`` (from 0): all of them in turn, the order drawn
        anew for every round. A function of the number alone, so that a resumed run goes on."""
        size = min(self.batch_size, len(self.chosen))
        batch = []
        for place in range(number * size, (number + 1) * size):
            turn, offset = divmod(place, len(self.chosen))
            order = random.Random(f"{self.seed}/{turn}").sample(self.chosen, len(self.chosen))
            batch.append(order[offset])
        return batch

    def _unlearn(self, args: Any, model: Any, step: int, is_first: bool) -> None:
        assert self.optimizer is not None
        batch = self._batch(self.done)
        self.done += 1
        cap = self.loss_cap or math.log(model.get_input_embeddings().weight.shape[0])
        trained = [one for group in self.optimizer.param_groups for one in group["params"]]
        was_training = model.training
        model.eval()  # no dropout: nothing here may draw from the Trainer's random numbers
        try:
            with torch.enable_grad(), _precision(args, model):
                mine, own = self._losses(model, batch)
            before = _from_all(mine, own.detach(), len(batch))
            climbing = [loss < cap for loss in before]
            if any(climbing):
                # A process without rows still takes part in adding up the gradients.
                weights = own.new_tensor([float(climbing[place]) for place in mine] or [0.0])
                share = (own * weights).sum() / sum(climbing)
                if _is_sharded(trained):
                    (share * _processes()[1]).backward()  # the mean over the processes is taken
                else:
                    share.backward()
                    _add_up(trained)
                norm = _whole(torch.nn.utils.clip_grad_norm_(trained, self.max_grad_norm))
                if torch.isfinite(norm):
                    self.optimizer.step()
                else:
                    climbing = [False] * len(batch)
            with torch.no_grad(), _precision(args, model):
                mine, own = self._losses(model, batch)
            after = _from_all(mine, own, len(batch))
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            model.train(was_training)
        rows = [
            {
                "step": step,
                "number": self.done,
                "example": index,
                "prompt": self.examples[index].prompt,
                "answer": self.examples[index].answer,
                "confidence": None if self.confidence is None else self.confidence[index],
                "loss_before": before[place],
                "loss_after": after[place],
                "skipped": not climbing[place],
            }
            for place, index in enumerate(batch)
        ]
        self.history += rows
        if self.log is not None and is_first:
            with self.log.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def _losses(self, model: Any, batch: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """The places in the batch that are this process's, and the losses of the examples there;
        of the first example where there are none, because shards need every process's pass."""
        rank, world = _processes()
        places = list(range(rank, len(batch), world))
        device = next(model.parameters()).device
        read = [self.sequences[batch[one]] for one in places or [0]]
        return places, row_losses(model, read, device)

    # ---- resuming ----------------------------------------------------------------------------

    def _take_up(self, args: Any, state: Any) -> None:
        """Continue from the checkpoint at ``state.global_step``, or begin."""
        self.history = []
        if state.global_step == 0:
            if self.log is not None and state.is_world_process_zero:
                self.log.write_text("", "utf-8")
            return
        from safetensors.torch import load_file

        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        if not path.exists():
            raise DamagedFile(
                f"{path} is missing, so the ascent cannot go on as it would have. Resume from a "
                "checkpoint that was saved with GracefulForgetting, or begin anew."
            )
        self._restore(load_file(path))
        if self.log is not None and self.log.exists():
            lines = self.log.read_text("utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            self.history = [row for row in rows if row["number"] <= self.done]
            if state.is_world_process_zero:
                kept = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.history)
                self.log.write_text("".join(kept), "utf-8")

    def _moments(self) -> dict[str, torch.Tensor]:
        assert self.optimizer is not None
        trained = [one for group in self.optimizer.param_groups for one in group["params"]]
        moments = {"done": torch.tensor(self.done)}
        for number, parameter in enumerate(trained):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor):
                    moments[f"{number}.{name}"] = _whole(value.detach()).cpu().contiguous()
        return moments

    def _restore(self, moments: dict[str, torch.Tensor]) -> None:
        assert self.optimizer is not None
        trained = [one for group in self.optimizer.param_groups for one in group["params"]]
        for key, value in moments.items():
            number, dot, name = key.partition(".")
            if dot:
                parameter = trained[int(number)]
                place = value if name == "step" else _placed_like(parameter, value)
                self.optimizer.state[parameter][name] = place


def _check(*rules: tuple[bool, str]) -> None:
    for is_kept, sentence in rules:
        if not is_kept:
            raise BadSetting(f"{sentence[0].upper()}{sentence[1:]}.")


def _refuse_sharding(args: Any, model: Any) -> None:
    """Where parameters or gradients do not lie whole on a process, a callback cannot ascend."""
    if getattr(args, "deepspeed", None):
        raise BadSetting(
            "GracefulForgetting cannot run under DeepSpeed: its engine owns backward and step, and "
            "a callback never sees it, so the ascent would miss the sharded weights. Use DDP "
            "(torchrun or accelerate launch without DeepSpeed), or a LoRA adapter on one device."
        )
    parameters = list(model.parameters())
    flat = any(type(one).__name__ == "FlatParameter" for one in parameters)
    if flat or (getattr(args, "fsdp", None) and not _is_sharded(parameters)):
        raise BadSetting(
            "GracefulForgetting cannot run under FSDP1: the ascent works on parameters, and these "
            "are flattened there. Use FSDP2 (fsdp_version: 2), DDP, or a LoRA adapter."
        )


def _is_sharded(parameters: Sequence[Any]) -> bool:
    """Whether parameters are spread over the processes, as FSDP2 does it."""
    return any(hasattr(one, "full_tensor") for one in parameters)


def _whole(tensor: Any) -> torch.Tensor:
    """A tensor whose shards, if it has any, are brought together in every process."""
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _placed_like(parameter: Any, value: torch.Tensor) -> torch.Tensor:
    """A whole tensor where the parameter is, spread like it."""
    there = value.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return there
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(there, parameter.device_mesh, parameter.placements)


def _precision(args: Any, model: Any) -> contextlib.AbstractContextManager[Any]:
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16, enabled=bool(getattr(args, "bf16", False)))


def _processes() -> tuple[int, int]:
    """Rank of this process and number of processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _from_all(places: Sequence[int], values: torch.Tensor, size: int) -> list[float]:
    """Values of a batch of ``size`` examples of which each process has computed some."""
    whole = torch.zeros(size, dtype=torch.float32, device=values.device)
    whole[list(places)] = values[: len(places)].float()
    if _processes()[1] > 1:
        torch.distributed.all_reduce(whole)
    return [float(one) for one in whole]


def _add_up(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients of all processes, so that all make the same step."""
    if _processes()[1] == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
