"""The gradient of every single example, out of one batched backward pass.

A backward pass over a batch gives the sum of its examples' gradients; squares and weighted norms
need them apart. In a linear layer the gradient of example b is an outer product summed over
positions, ``G_b^T A_b`` with inputs ``A`` (batch, positions, in) and gradients ``G`` of the outputs
(batch, positions, out). Both pass by anyway, so hooks take them, autograd never computes a weight's
gradient, and that of an example exists only block by block, in the processor's cache.

Understood are linear layers (transformers' transposed ``Conv1D`` too), embeddings, and every other
module that maps one tensor row by row (norms: by ``vmap``). A tensor that is used in several places
(a tied embedding) gets the sum over its uses before anything is squared. What a network computes in
any other way is given to autograd, one example at a time: right for every network, slower.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unwrite.errors import BadSetting
from unwrite.model import Model, Tokens, head_sees, length_batches, pad

POSITIONS_PER_BATCH = 1024  # positions (rows x length): bounds what a batch holds
BLOCK = 1 << 18  # numbers of per-example gradients at once: 1 MB, which stays in the cache


@dataclass
class _Outer:
    """The use of a matrix (p, q) as a product: gradient of example b is ``left_b^T right_b``."""

    left: torch.Tensor  # (batch, positions, p)
    right: torch.Tensor  # (batch, positions, q)


@dataclass
class _Lookup:
    """The use of a matrix (p, q) as a table: row ``ids`` of the gradient receives ``values``."""

    ids: torch.Tensor  # (batch, positions)
    values: torch.Tensor  # (batch, positions, q)


@dataclass
class Gradients:
    """The gradients of one tensor for the examples of a batch, in the form in which they came.

    ``dense`` holds what was computed in full, (batch, *shape); the rest is kept in factors.
    """

    shape: tuple[int, ...]
    size: int  # examples
    outer: list[_Outer] = field(default_factory=list)
    lookups: list[_Lookup] = field(default_factory=list)
    dense: torch.Tensor | None = None

    def joined(self, other: Gradients) -> Gradients:
        """The sum of two uses of the same tensor by the same examples."""
        both = [one.dense for one in (self, other) if one.dense is not None]
        return Gradients(
            self.shape,
            self.size,
            self.outer + other.outer,
            self.lookups + other.lookups,
            sum(both[1:], both[0]) if both else None,
        )

    def blocks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """All gradients, some rows of the tensor at a time: the rows, and (batch, rows x rest).

        What is given may be changed by the taker; it is computed anew for the next rows.
        """
        height, width = self.shape[0], math.prod(self.shape[1:])
        step = max(1, BLOCK // (self.size * width))
        outer = [(one.left.transpose(1, 2), one.right) for one in self.outer]
        lookups = [_by_row(one) for one in self.lookups]
        dense = None if self.dense is None else self.dense.reshape(self.size, height, width)
        origin = next(
            iter([*(o.left for o in self.outer), *(t.values for t in self.lookups)]), dense
        )
        for start in range(0, height, step):
            rows = slice(start, min(start + step, height))
            count = rows.stop - rows.start
            block: torch.Tensor | None = None
            for left, right in outer:
                here = torch.bmm(left[:, rows], right)
                block = here if block is None else block.add_(here)
            if dense is not None:
                block = dense[:, rows].clone() if block is None else block.add_(dense[:, rows])
            if block is None:
                assert origin is not None
                block = origin.new_zeros((self.size, count, width))
            for ids, examples, values in lookups:
                first, last = torch.searchsorted(ids, ids.new_tensor([start, rows.stop])).tolist()
                place = (examples[first:last], ids[first:last] - start)
                block.index_put_(place, values[first:last], accumulate=True)
            yield rows, block.view(self.size, count * width)

    def touched(self) -> torch.Tensor | None:
        """Rows of the tensor outside of which all gradients are zero; ``None`` for all rows."""
        if self.outer or self.dense is not None:
            return None
        return torch.cat([one.ids.flatten() for one in self.lookups]).unique()

    def compact(self) -> tuple[torch.Tensor | None, Gradients]:
        """The same gradients restricted to the rows ``touched``, with those rows' numbers."""
        kept = self.touched()
        if kept is None:
            return None, self
        moved = [_Lookup(torch.searchsorted(kept, one.ids), one.values) for one in self.lookups]
        return kept, Gradients((len(kept), *self.shape[1:]), self.size, lookups=moved)

    def add_squares_to(self, total: torch.Tensor) -> None:
        """Add the sum over the examples of the squared gradient to ``total`` (the tensor's shape,
        fp32, contiguous)."""
        kept, own = self.compact()
        flat = total.view(total.shape[0], -1)
        for rows, block in own.blocks():
            if kept is None:
                part = flat[rows].view(-1)
                for one in block:
                    part.addcmul_(one, one)
            else:
                squares = block.square_().sum(dim=0).view(rows.stop - rows.start, -1)
                flat.index_add_(0, kept[rows], squares)

    def products(
        self, linear: torch.Tensor, quadratic: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For every example ``<linear, g>``, ``<quadratic, g^2>`` and ``<g, g>``: (batch,) each.

        Both weights have the tensor's shape. Blocks are summed in fp32, their sums in fp64.
        """
        kept, own = self.compact()
        weights = [one.reshape(self.shape[0], -1) for one in (linear, quadratic)]
        sums = torch.zeros((3, self.size), dtype=torch.float64, device=linear.device)
        for rows, block in own.blocks():
            first, second = (
                one[rows if kept is None else kept[rows]].reshape(-1) for one in weights
            )
            sums[0] += block @ first
            block.square_()
            sums[1] += block @ second
            sums[2] += block.sum(dim=1)
        return sums[0], sums[1], sums[2]

    def first_products(self, linear: torch.Tensor) -> torch.Tensor:
        """``<linear, g>`` for every example, (batch,) in fp64, without forming any gradient.

        A product with a matrix costs what the forward pass of its layer costs.
        """
        sums = torch.zeros(self.size, dtype=torch.float64, device=linear.device)
        for use in self.outer:
            moved = use.right @ linear.t()
            sums += (moved * use.left).sum(dim=(1, 2))
        for table in self.lookups:
            sums += (linear[table.ids] * table.values).sum(dim=(1, 2))
        if self.dense is not None:
            sums += self.dense.reshape(self.size, -1) @ linear.reshape(-1)
        return sums


def _by_row(one: _Lookup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The lookups of a table sorted by its rows: ids, examples (n,) and values (n, width)."""
    batch, positions = one.ids.shape
    examples = torch.arange(batch, device=one.ids.device).repeat_interleave(positions)
    ids, order = one.ids.flatten().sort(stable=True)
    return ids, examples[order], one.values.flatten(0, 1)[order]


# Called for every tensor of every batch with its file name, its gradients, and the batch's indices.
Visit = Callable[[str, Gradients, Sequence[int]], None]


def visit_gradients(
    model: Model,
    sequences: Sequence[Tokens],
    visit: Visit,
    *,
    tensors: Callable[[str], bool] | None = None,
    batch_size: int = 16,
    title: str = "gradients of examples",
) -> list[float]:
    """Give ``visit`` the per-example gradients of every tensor; return the examples' losses.

    The loss of an example is the mean over its answer tokens of their negative log-likelihood.
    ``tensors`` chooses tensors by file name (default: all). The model is left as it was, without
    gradients. Holds the activations of one batch and the gradients with respect to them, but the
    parameters' gradients never. Raises ``BadSetting`` if no tensor is chosen.
    """
    parameters = dict(model.network.named_parameters(remove_duplicate=False))
    chosen = {
        file: parameters[name]
        for file, name in model.names.items()
        if (tensors is None or tensors(file)) and parameters[name].is_floating_point()
    }
    if not chosen:
        raise BadSetting("No tensor of this model is chosen.")
    losses = [0.0] * len(sequences)
    with _Watch(model, chosen, visit) as watch, model.progress.stage(title, len(sequences)) as told:
        lengths = [len(tokens.ids) for tokens in sequences]
        waiting = length_batches(lengths, rows=batch_size, positions=POSITIONS_PER_BATCH)
        while waiting:
            batch = waiting.pop(0)
            if len(batch) > 1 and watch.one_by_one:
                waiting[:0] = [[index] for index in batch]
                continue
            try:
                found = watch.run([sequences[index] for index in batch], batch)
            except _NotByExample:
                watch.one_by_one = True
                waiting[:0] = [[index] for index in batch]
                continue
            for index, loss in zip(batch, found, strict=True):
                losses[index] = loss
            told(len(batch), "")
    return losses


class _NotByExample(Exception):
    """A module does not keep the examples of a batch apart, so batches of one are needed."""


class _Watch:
    """Hooks on a network's modules that gather the per-example gradients of its tensors."""

    def __init__(self, model: Model, chosen: dict[str, torch.nn.Parameter], visit: Visit) -> None:
        self.model, self.visit = model, visit
        self.files = {id(parameter): file for file, parameter in chosen.items()}
        self.head = model.network.get_output_embeddings()
        self.size = 0
        self.batch: Sequence[int] = ()
        self.answers = torch.empty(0)  # the example of every row that the head sees
        self.expected: dict[str, int] = {}  # uses of a tensor in this forward pass
        self.arrived: dict[str, int] = {}
        self.gathered: dict[str, Gradients] = {}
        self.reading = False  # a module is being run again to differentiate it
        self.strange: dict[str, torch.nn.Parameter] = {}  # left to autograd
        for module in model.network.modules():
            if _reader(module) is None:
                self.strange |= {file: chosen[file] for file in self._own(module).values()}
        self.one_by_one = bool(self.strange)

    def _own(self, module: torch.nn.Module) -> dict[str, str]:
        """The chosen tensors of one module: parameter name -> file name."""
        return {
            name: self.files[id(parameter)]
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in self.files
        }

    def __enter__(self) -> _Watch:
        network = self.model.network
        asked = {parameter: parameter.requires_grad for parameter in network.parameters()}
        was_training = network.training
        self.clean_up = contextlib.ExitStack()

        def restore() -> None:
            for parameter, value in asked.items():
                parameter.requires_grad_(value)
                parameter.grad = None
            network.train(was_training)

        self.clean_up.callback(restore)
        network.eval()
        network.requires_grad_(False)
        for module in network.modules():
            # With frozen parameters the graph begins where the embeddings come out.
            if isinstance(module, torch.nn.Embedding):
                self.clean_up.callback(module.register_forward_hook(_begin_graph).remove)
            if self._own(module):
                self.clean_up.callback(module.register_forward_hook(self._forward).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.clean_up.close()

    def run(self, sequences: Sequence[Tokens], batch: Sequence[int]) -> list[float]:
        """Forward and backward over one batch, visiting every tensor once; the losses."""
        self.size, self.batch = len(sequences), batch
        for table in (self.expected, self.arrived, self.gathered):
            table.clear()
        for parameter in self.strange.values():
            parameter.requires_grad_(True)
        device = self.model.device
        ids, rows, columns, targets = pad(sequences)
        self.answers = rows
        inputs = {"input_ids": ids.to(device)}
        if self.model.takes_positions:
            # One row of positions an example: a table of positions must keep examples apart too.
            positions = torch.arange(ids.shape[1], device=device)
            inputs["position_ids"] = positions.repeat(len(sequences), 1)
        shares = torch.tensor([1 / len(sequences[row].targets) for row in rows.tolist()])
        with torch.enable_grad():
            with head_sees(self.model.network, rows, columns):
                logits = self.model.network(**inputs, use_cache=False).logits[0].float()
            each = torch.nn.functional.cross_entropy(
                logits, targets.to(logits.device), reduction="none"
            ) * shares.to(logits.device)
            each.sum().backward()
        for file, parameter in self.strange.items():
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad, None
                self._visit(file, Gradients(tuple(gradient.shape), 1, dense=gradient[None]))
        for file in list(self.gathered):  # some use of it has no part in the loss
            self._visit(file, self.gathered.pop(file))
        sums = torch.zeros(len(sequences), device=each.device)
        return [float(one) for one in sums.index_add(0, rows.to(each.device), each.detach())]

    def _forward(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        own = {name: file for name, file in self._own(module).items() if file not in self.strange}
        if self.reading or not own:
            return
        if len(inputs) != 1 or not isinstance(output, torch.Tensor):
            self.strange |= {file: _parameter(module, name) for name, file in own.items()}
            raise _NotByExample
        if not output.requires_grad:
            return
        is_head = module is self.head
        if self.size > 1 and not is_head and output.shape[0] != self.size:
            raise _NotByExample
        taken = inputs[0].detach()
        for file in own.values():
            self.expected[file] = self.expected.get(file, 0) + 1

        def backward(gradient: torch.Tensor) -> None:
            pair = (taken, gradient)
            if is_head:
                pair = (self._apart(taken), self._apart(gradient))
            elif self.size == 1:
                pair = (taken.reshape(1, *taken.shape), gradient.reshape(1, *gradient.shape))
            self._read(module, own, *pair)

        output.register_hook(backward)

    @torch.no_grad()
    def _read(
        self, module: torch.nn.Module, own: dict[str, str], taken: torch.Tensor, given: torch.Tensor
    ) -> None:
        reader = _reader(module)
        assert reader is not None
        self.reading = True
        try:
            found = reader(module, taken, given)
        finally:
            self.reading = False
        for name, file in own.items():
            so_far, use = self.gathered.get(file), found[name]
            self.gathered[file] = use if so_far is None else so_far.joined(use)
            self.arrived[file] = self.arrived.get(file, 0) + 1
            if self.arrived[file] == self.expected[file]:
                self._visit(file, self.gathered.pop(file))

    @torch.no_grad()
    def _visit(self, file: str, found: Gradients) -> None:
        self.visit(file, found, self.batch)

    def _apart(self, values: torch.Tensor) -> torch.Tensor:
        """What the head saw, (1, answer tokens, width), by example: (batch, most tokens, width)."""
        counts = torch.bincount(self.answers, minlength=self.size).tolist()
        result = values.new_zeros((self.size, max(counts), values.shape[-1]))
        for example, part in enumerate(values[0].split(counts)):
            result[example, : len(part)] = part
        return result


Reader = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor], dict[str, Gradients]]


def _reader(module: torch.nn.Module) -> Reader | None:
    """How the gradients of a module's own tensors follow from its input and its output's gradient,
    both with the examples first; ``None`` where that is not known."""
    from transformers.pytorch_utils import Conv1D

    own = dict(module.named_parameters(recurse=False))
    if not own:
        return _read_nothing
    forward = type(module).forward
    if forward is torch.nn.Linear.forward:
        return _read_linear
    if forward is Conv1D.forward:
        return _read_transposed
    if forward is torch.nn.Embedding.forward:
        return _read_table
    if all(parameter.dim() == 1 for parameter in own.values()):
        return _read_rerun
    return None


def _read_nothing(
    _module: torch.nn.Module, _taken: torch.Tensor, _given: torch.Tensor
) -> dict[str, Gradients]:
    return {}


def _read_linear(
    module: torch.nn.Module, taken: torch.Tensor, given: torch.Tensor
) -> dict[str, Gradients]:
    right, left = _flat(taken), _flat(given)
    weight = Gradients((left.shape[2], right.shape[2]), len(left), outer=[_Outer(left, right)])
    bias = Gradients((left.shape[2],), len(left), dense=left.sum(dim=1))
    return {"weight": weight, "bias": bias}


def _read_transposed(
    module: torch.nn.Module, taken: torch.Tensor, given: torch.Tensor
) -> dict[str, Gradients]:
    left, right = _flat(taken), _flat(given)
    weight = Gradients((left.shape[2], right.shape[2]), len(left), outer=[_Outer(left, right)])
    bias = Gradients((right.shape[2],), len(left), dense=right.sum(dim=1))
    return {"weight": weight, "bias": bias}


def _read_table(
    module: torch.nn.Module, taken: torch.Tensor, given: torch.Tensor
) -> dict[str, Gradients]:
    table: Any = module
    ids, values = taken.reshape(len(taken), -1), _flat(given)
    if table.padding_idx is not None:  # torch gives this row no gradient
        values = values * (ids != table.padding_idx)[..., None]
    shape = tuple(table.weight.shape)
    return {"weight": Gradients(shape, len(ids), lookups=[_Lookup(ids, values)])}


def _read_rerun(
    module: torch.nn.Module, taken: torch.Tensor, given: torch.Tensor
) -> dict[str, Gradients]:
    own = {name: one.detach() for name, one in module.named_parameters(recurse=False)}

    def gradient(one: torch.Tensor, of_output: torch.Tensor) -> dict[str, torch.Tensor]:
        def run(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return torch.func.functional_call(module, values, (one,))

        back: Any = torch.func.vjp(run, own)[1]
        found: dict[str, torch.Tensor] = back(of_output)[0]
        return found

    found = torch.func.vmap(gradient)(taken, given)
    return {
        name: Gradients(tuple(own[name].shape), len(taken), dense=one)
        for name, one in found.items()
    }


def _flat(values: torch.Tensor) -> torch.Tensor:
    """(batch, positions, width), whatever lies between the first and the last dimension."""
    return values.reshape(len(values), -1, values.shape[-1])


def _parameter(module: torch.nn.Module, name: str) -> torch.nn.Parameter:
    return dict(module.named_parameters(recurse=False))[name]


def _begin_graph(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
    if not output.requires_grad:
        output.requires_grad_(True)
