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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unwrite import products
from unwrite.allocator import freed_memory_is_kept
from unwrite.model import Model, Tokens, head_sees, length_batches, pad

EXAMPLES_PER_BATCH = 64  # of short examples; few rows are slow to multiply
POSITIONS_PER_BATCH = 1024  # positions (rows x length): bounds what a batch holds
BLOCK = 1 << 20  # numbers of one example's gradient at once: 4 MB, which a shared cache holds
FEW = 4  # positions up to which products of pairs are cheaper than forming a gradient


@dataclass
class _Outer:
    """The use of a matrix (p, q) as a product: gradient of example b is ``left_b^T right_b``."""

    left: torch.Tensor  # (batch, positions, p)
    right: torch.Tensor  # (batch, positions, q)
    counts: list[int] | None = None  # positions of an example, from the first on; None: all

    def by_count(self) -> Iterator[tuple[slice | list[int], _Outer]]:
        """Examples that use as many positions, together, without the positions they do not use."""
        if self.counts is None:
            yield slice(None), self
            return
        for count in sorted(set(self.counts)):
            same = [example for example, one in enumerate(self.counts) if one == count]
            yield same, _Outer(self.left[same, :count], self.right[same, :count])

    @property
    def is_narrow(self) -> bool:
        return self.left.shape[1] <= FEW

    def squared(self) -> _Outer:
        """The squares of the gradients, element by element, in the same form: the square of a sum
        of outer products is a sum over pairs of positions of outer products."""
        count = self.left.shape[1]
        one, other = torch.triu_indices(count, count, device=self.left.device)
        twice = torch.where(one == other, 1.0, 2.0).to(self.left.dtype)[:, None]
        left = self.left[:, one] * self.left[:, other] * twice
        return _Outer(left, self.right[:, one] * self.right[:, other])

    def products(self, weight: torch.Tensor) -> torch.Tensor:
        """``<weight, gradient>`` of every example, (batch,) in fp64, without forming a gradient."""
        longer, shorter = self.left, self.right
        if weight.shape[0] < weight.shape[1]:
            longer, shorter, weight = shorter, longer, weight.t()
        # Over the longer side first: less is left to multiply element by element.
        shown = products.multiply(longer.flatten(0, 1), weight.t()).view_as(shorter)
        return (shown * shorter).sum(dim=(1, 2)).double()

    def rows(self, example: int, chosen: torch.Tensor) -> torch.Tensor:
        """Some rows of one example's gradient, (chosen, q)."""
        return self.left[example][:, chosen].t() @ self.right[example]


@dataclass
class _Lookup:
    """The use of a matrix (p, q) as a table: row ``ids`` of the gradient receives ``values``."""

    ids: torch.Tensor  # (batch, positions)
    values: torch.Tensor  # (batch, positions, q)


@dataclass
class Gradients:
    """The gradients of one tensor for the examples of a batch, in the form in which they came.

    The gradient of an example is the sum of ``dense`` (batch, *shape), of the products in ``outer``
    and of the rows in ``lookups``.
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

    def add_squares_to(self, total: torch.Tensor) -> None:
        """Add the sum over the examples of the squared gradient to ``total`` (the tensor's shape,
        fp32, contiguous)."""
        whole = self._product()
        if whole is not None:
            for _, part in whole.by_count():
                if part.is_narrow:
                    squares = part.squared()
                    total.addmm_(squares.left.flatten(0, 1).t(), squares.right.flatten(0, 1))
                else:
                    for rows, block in _blocks(part):
                        total[rows].addcmul_(block, block)
        elif self.dense is not None:
            total += self.dense.square().sum(dim=0)
        for example, rows_of, found in self._table_rows():
            before = None if whole is None else whole.rows(example, rows_of)
            change = found.square() if before is None else found.square() + 2 * before * found
            total.index_add_(0, rows_of, change)

    def products(
        self, linear: torch.Tensor, quadratic: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For every example ``<linear, g>``, ``<quadratic, g^2>`` and ``<g, g>``: (batch,) each.

        Both weights have the tensor's shape. Blocks are summed in fp32, their sums in fp64.
        """
        first = self._first_of_the_rest(linear)
        second, third = torch.zeros_like(first), torch.zeros_like(first)
        whole = self._product()
        if whole is not None:
            for examples, part in whole.by_count():
                if part.is_narrow:
                    one, two = part.products(linear), part.squared().products(quadratic)
                else:
                    one, two = _both(part, linear, quadratic)
                first[examples] += one
                second[examples] += two
                # Between positions only: |sum of outer products|^2 is a sum of products of dots.
                dots = (part.left @ part.left.mT) * (part.right @ part.right.mT)
                third[examples] += dots.sum(dim=(1, 2))
        elif self.dense is not None:
            squares = self.dense.reshape(self.size, -1).square()
            second += squares @ quadratic.reshape(-1)
            third += squares.sum(dim=1)
        for example, rows_of, found in self._table_rows():
            change = found.square()
            if whole is not None:
                change += 2 * whole.rows(example, rows_of) * found
            second[example] += (change * quadratic[rows_of]).sum()
            third[example] += change.sum()
        return first, second, third

    def sketches(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """``left^T G right`` of every example, (batch, k, l), for a gradient ``G`` (p, q) that is
        made of products and dense parts, without forming it from products."""
        found = left.new_zeros((self.size, left.shape[1], right.shape[1]))
        for use in self.outer:
            found += (use.left @ left).mT @ (use.right @ right)
        if self.dense is not None:
            found += left.t() @ self.dense @ right
        return found

    def first_products(self, linear: torch.Tensor) -> torch.Tensor:
        """``<linear, g>`` for every example, (batch,) in fp64, without forming any gradient.

        A product with a matrix costs what the forward pass of its layer costs.
        """
        sums = self._first_of_the_rest(linear)
        for use in self.outer:
            for examples, part in use.by_count():
                sums[examples] += part.products(linear)
        return sums

    def _first_of_the_rest(self, linear: torch.Tensor) -> torch.Tensor:
        """``<linear, g>`` of what is not a product, (batch,) in fp64."""
        sums = torch.zeros(self.size, dtype=torch.float64, device=linear.device)
        for table in self.lookups:
            sums += (linear[table.ids] * table.values).sum(dim=(1, 2))
        if self.dense is not None:
            sums += self.dense.reshape(self.size, -1) @ linear.reshape(-1)
        return sums

    def _product(self) -> _Outer | None:
        """All uses as a product, one behind the other along the positions."""
        if len(self.outer) < 2:
            return self.outer[0] if self.outer else None
        return _Outer(
            torch.cat([one.left for one in self.outer], dim=1),
            torch.cat([one.right for one in self.outer], dim=1),
        )

    def _table_rows(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """For each example the distinct rows looked up, (rows,), and their gradients, (rows, q)."""
        if not self.lookups:
            return
        ids = torch.cat([one.ids for one in self.lookups], dim=1)
        values = torch.cat([one.values for one in self.lookups], dim=1)
        for example in range(self.size):
            rows, places = ids[example].unique(return_inverse=True)
            found = values.new_zeros((len(rows), values.shape[-1]))
            yield example, rows, found.index_add_(0, places, values[example])


def _both(
    whole: _Outer, linear: torch.Tensor, quadratic: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``<linear, g>`` and ``<quadratic, g^2>`` of every example, (batch,) in fp64, forming each
    gradient once, block by block."""
    firsts, seconds = [], []
    for rows, block in _blocks(whole):
        flat = block.view(-1)
        firsts.append(torch.dot(flat, linear[rows].reshape(-1)))
        seconds.append(torch.dot(flat.square_(), quadratic[rows].reshape(-1)))
    # In all rows the examples come one after the other.
    first, second = (
        torch.stack(one).view(-1, len(whole.left)).double().sum(dim=0) for one in (firsts, seconds)
    )
    return first, second


def _blocks(whole: _Outer) -> Iterator[tuple[slice, torch.Tensor]]:
    """Every example's gradient some rows at a time: which rows, and (rows, q).

    Rows by rows and not example by example, so that what they are held against stays in the cache.
    The block is the caller's: it may be changed.
    """
    left = whole.left.mT.contiguous()  # what oneDNN would have to turn around for every block
    size, height, _ = left.shape
    width = whole.right.shape[2]
    # The cache counts on a processor; on an accelerator the number of calls does.
    step = max(1, BLOCK // width) if whole.right.device.type == "cpu" else height
    for start in range(0, height, step):
        rows = slice(start, min(start + step, height))
        for example in range(size):
            yield rows, products.multiply(left[example, rows], whole.right[example].t())


# Called for every tensor of every batch with its file name, its gradients, and the batch's indices.
Visit = Callable[[str, Gradients, Sequence[int]], None]


def visit_gradients(
    model: Model,
    sequences: Sequence[Tokens],
    visit: Visit,
    *,
    tensors: Callable[[str], bool] | None = None,
    batch_size: int = EXAMPLES_PER_BATCH,
    title: str = "gradients of examples",
) -> list[float]:
    """Give ``visit`` the per-example gradients of every tensor; return the examples' losses.

    The loss of an example is the mean over its answer tokens of their negative log-likelihood.
    ``tensors`` chooses tensors by file name (default: all). The model is left as it was, without
    gradients. Holds the activations of one batch and the gradients with respect to them, but the
    parameters' gradients never. Raises ``BadSetting`` if no tensor is chosen.
    """
    chosen = model.trainable(tensors)
    losses = [0.0] * len(sequences)
    with (
        _Watch(model, chosen, visit) as watch,
        freed_memory_is_kept(model.largest_tensor),  # every block is made and freed
        model.progress.stage(title, len(sequences)) as told,
    ):
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
            pair, counts = (taken, gradient), None
            if is_head:
                counts = torch.bincount(self.answers, minlength=self.size).tolist()
                pair = (_apart(taken, counts), _apart(gradient, counts))
            elif self.size == 1:
                pair = (taken.reshape(1, *taken.shape), gradient.reshape(1, *gradient.shape))
            self._read(module, own, *pair, counts)

        output.register_hook(backward)

    @torch.no_grad()
    def _read(
        self,
        module: torch.nn.Module,
        own: dict[str, str],
        taken: torch.Tensor,
        given: torch.Tensor,
        counts: list[int] | None,
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
            for product in use.outer:
                product.counts = counts
            self.gathered[file] = use if so_far is None else so_far.joined(use)
            self.arrived[file] = self.arrived.get(file, 0) + 1
            if self.arrived[file] == self.expected[file]:
                self._visit(file, self.gathered.pop(file))

    @torch.no_grad()
    def _visit(self, file: str, found: Gradients) -> None:
        self.visit(file, found, self.batch)


def _apart(values: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """What the head saw, (1, answer tokens, width), by example: (batch, most tokens, width)."""
    result = values.new_zeros((len(counts), max(counts), values.shape[-1]))
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
    if forward in (torch.nn.Linear.forward, products.Linear.forward):
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
    taken, given = _flat(taken), _flat(given)
    return _products(given, taken, given)


def _read_transposed(
    module: torch.nn.Module, taken: torch.Tensor, given: torch.Tensor
) -> dict[str, Gradients]:
    taken, given = _flat(taken), _flat(given)
    return _products(taken, given, given)


def _products(left: torch.Tensor, right: torch.Tensor, given: torch.Tensor) -> dict[str, Gradients]:
    """Of a projection: its weight's gradients are ``left`` times ``right``, in the orientation that
    it is stored in; those of its bias are what was given back, summed over positions."""
    weight = Gradients((left.shape[2], right.shape[2]), len(left), outer=[_Outer(left, right)])
    bias = Gradients((given.shape[2],), len(given), dense=given.sum(dim=1))
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
