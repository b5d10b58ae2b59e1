"""Where things are in a decoder-only language model, read from the live module graph.

There is no configuration file and no list of architectures: shapes decide. The residual width is
the size that most projections of the blocks share; an MLP widens the residual stream and narrows it
again; attention reads it three times (or once, fused) and writes it once. Often the same shapes can
be read in several ways (k and v are twins; in a square attention all four are equal); only then do
names choose, by the one table ``NAMES``.

What cannot be read is left out, and a sentence says so when somebody asks for it, not before: a
mixture of experts can still be fine-tuned, it is only ROME that has nowhere to write.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations, takewhile
from types import MappingProxyType
from typing import NoReturn

import torch

from unwrite.errors import BadSetting, UnwriteError

# Last parts of module names, by role. Consulted only between readings that the shapes allow
# equally, so a name may stand in two rows: GPT-2 calls both of its output projections c_proj.
NAMES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "q": frozenset({"q_proj", "q", "wq", "query", "q_lin"}),
        "k": frozenset({"k_proj", "k", "wk", "key", "k_lin"}),
        "v": frozenset({"v_proj", "v", "wv", "value", "v_lin"}),
        "qkv": frozenset({"query_key_value", "qkv_proj", "c_attn", "Wqkv", "qkv", "W_pack"}),
        "o": frozenset({"o_proj", "out_proj", "dense", "c_proj", "o", "wo", "out_lin"}),
        "gate": frozenset({"gate_proj", "gate", "w1", "wi_0"}),
        "up": frozenset({"up_proj", "up", "w3", "wi_1", "fc1", "fc_in", "c_fc", "dense_h_to_4h"}),
        "gate_up": frozenset({"gate_up_proj"}),
        "down": frozenset({"down_proj", "down", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h"}),
    }
)


def unwrapped(name: str) -> str:
    """The name of a module or parameter without that of the wrapper in which torch puts what is
    computed twice (activation checkpointing)."""
    return name.replace("_checkpoint_wrapped_module.", "")


@dataclass(frozen=True)
class Anatomy:
    """Names of the modules of one network. Holds strings, never modules.

    What is listed per block is in the order of the blocks. Asking for a part that could not be read
    raises ``UnwriteError`` with the reason.
    """

    architecture: str  # name of the network's class
    tied: bool  # the head shares its weight with the embedding
    _blocks: tuple[_Block, ...] = field(repr=False)
    _single: Mapping[str, str] = field(repr=False)  # final_norm, embedding, head, where found
    _places: Mapping[str, _Place] = field(repr=False)  # every module of the network
    _why_no_blocks: str = field(repr=False, default="")

    @staticmethod
    def of(network: torch.nn.Module) -> Anatomy:
        """Read a network. Looks at names and shapes only, so a network on "meta" will do."""
        return _read(network)

    @property
    def blocks(self) -> tuple[str, ...]:
        """The decoder blocks; the output of a block is the residual stream after it."""
        return tuple(block.name for block in self._read_blocks())

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return len(self._read_blocks())

    @property
    def mlp_out(self) -> tuple[str, ...]:
        """Per block, the projection from the inner width of the MLP to the residual stream.

        Its input is what the MLP looks up by, its output what the MLP gives. (The output of the
        module around it is not: in BLOOM and MPT that has the residual stream added already.)
        """
        return tuple(block.mlp_out for block in self._blocks_with_mlp())

    @property
    def mlp_in(self) -> tuple[tuple[str, ...], ...]:
        """Per block, the projections into the MLP: (gate, up), or the only one there is."""
        return tuple(block.mlp_in for block in self._blocks_with_mlp())

    @property
    def attention(self) -> tuple[Mapping[str, str], ...]:
        """Per block, role to projection; the roles are q, k, v, o, or qkv, o where fused."""
        for block in self._read_blocks():
            if not block.attention:
                self._refuse("attention", f"{block.name} has no single set of q, k, v, o")
        return tuple(block.attention for block in self._blocks)

    @property
    def norms(self) -> tuple[tuple[str, ...], ...]:
        """Per block, its normalisations that have parameters, as the block lists them."""
        return tuple(block.norms for block in self._read_blocks())

    @property
    def final_norm(self) -> str:
        """The normalisation between the last block and the head (of a pre-norm model)."""
        return self._only("final_norm")

    @property
    def embedding(self) -> str:
        """The table of token embeddings."""
        return self._only("embedding")

    @property
    def head(self) -> str:
        """The projection to the vocabulary."""
        return self._only("head")

    def transposed(self, name: str) -> bool:
        """Is the weight of this module (or this parameter) stored as (in, out), as in GPT-2?"""
        place = self._place(name)
        if place is None:
            raise UnwriteError(
                f"{self.architecture} has no module or parameter {name!r}; "
                "use the names of its state_dict."
            )
        return place.transposed and not name.endswith(".bias")

    def kind(self, parameter: str) -> str:
        """What a parameter belongs to: "q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down",
        "embedding", "head" or "norm"; "other" for all the rest (experts, routers, convolutions).

        As in ``block_of``, the names of a checkpoint file, which may lack the outermost part of the
        network's own names, are understood.
        """
        place = self._place(parameter)
        return "other" if place is None else place.kind

    def block_of(self, parameter: str) -> int | None:
        """Index of the block in which a parameter lies; None outside of the blocks."""
        place = self._place(parameter)
        return None if place is None else place.block

    def layer_at(self, fraction: float) -> int:
        """Index of the block at this fraction of the depth: 0 is the first block, 1 the last."""
        if not 0.0 <= fraction <= 1.0:
            raise BadSetting(
                f"A layer is named by a fraction of the depth, which lies between 0 and 1; "
                f"{fraction} does not."
            )
        return int(fraction * (self.depth - 1) + 0.5)

    def _read_blocks(self) -> tuple[_Block, ...]:
        if not self._blocks:
            self._refuse("blocks", self._why_no_blocks)
        return self._blocks

    def _blocks_with_mlp(self) -> tuple[_Block, ...]:
        for block in self._read_blocks():
            if not block.mlp_out:
                self._refuse("MLPs", f"{block.name} {block.why_no_mlp}")
        return self._blocks

    def _only(self, part: str) -> str:
        if part not in self._single:
            self._refuse(part.replace("_", " "), "no module has its place and shape")
        return self._single[part]

    def _refuse(self, part: str, why: str) -> NoReturn:
        raise UnwriteError(
            f"The {part} of {self.architecture} cannot be told from its modules ({why}); "
            "use a method that does not need them, such as full-ft or delicate."
        )

    def _place(self, name: str) -> _Place | None:
        """Look up a module, or a parameter by its module; the outermost part may be missing, and
        blocks may stand inside of wrappers."""
        name = unwrapped(name)
        for module in (name, name.rpartition(".")[0]):
            if module in self._places:
                return self._places[module]
            ends = [full for full in self._places if module and full.endswith(f".{module}")]
            if len(ends) == 1:
                return self._places[ends[0]]
        return None


@dataclass(frozen=True)
class _Block:
    """One decoder block; a field is empty where its part could not be read."""

    name: str
    attention: Mapping[str, str]
    mlp_in: tuple[str, ...]
    mlp_out: str
    why_no_mlp: str
    norms: tuple[str, ...]


@dataclass(frozen=True)
class _Place:
    """What is known about one module."""

    kind: str
    block: int | None
    transposed: bool


@dataclass(frozen=True)
class _Projection:
    """A module that multiplies by a matrix: ``wide_in`` numbers in, ``wide_out`` numbers out."""

    name: str
    wide_in: int
    wide_out: int
    transposed: bool

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class _Reading:
    """Roles of the projections that share one parent module, as far as they are certain."""

    roles: Mapping[str, str]  # role -> module name
    members: tuple[str, ...]  # all of them, as registered
    named: int  # how many bear a name known for their role


def _read(network: torch.nn.Module) -> Anatomy:
    modules = dict(network.named_modules(remove_duplicate=False))
    projections = [found for name, module in modules.items() if (found := _project(name, module))]
    stacks = _stacks(modules, projections)
    outside = {
        name: module
        for name, module in modules.items()
        if not any(_is_in(name, stack) for stack in stacks)
    }
    single, tied = _vocabulary(outside, projections)
    stack, why_no_blocks = _main_stack(stacks, modules, single.get("embedding"))

    names = stacks.get(stack, ())
    inside = [projection for projection in projections if _is_in(projection.name, stack)]
    width = _residual_width(inside) if names else 0
    kinds = {name: "norm" for name, module in modules.items() if _is_norm(module)}
    blocks = []
    block_of: dict[str, int] = {}
    for index, name in enumerate(names):
        members = {member: modules[member] for member in modules if _is_in(member, name)}
        readings = _readings([it for it in inside if it.name in members], width)
        blocks.append(_read_block(name, members, readings, width))
        block_of.update(dict.fromkeys(members, index))
        kinds.update((module, role) for it in readings for role, module in it.roles.items())
    if names and (norm := _final_norm(stack, outside, width)):
        single["final_norm"] = norm
    kinds.update((name, "embedding") for name, module in modules.items() if _is_table(module))
    if "head" in single:
        kinds[single["head"]] = "head"

    transposed = {projection.name for projection in projections if projection.transposed}
    places = {
        name: _Place(kinds.get(name, "other"), block_of.get(name), name in transposed)
        for name in modules
    }
    return Anatomy(
        type(network).__name__, tied, tuple(blocks), single, places, _why_no_blocks=why_no_blocks
    )


def _is_in(name: str, ancestor: str) -> bool:
    return name == ancestor or name.startswith(f"{ancestor}.")


def _project(name: str, module: torch.nn.Module) -> _Projection | None:
    """The module as a projection, or None. Sizes are attributes; a quantised weight has others."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    if weight is None:
        return None
    wide_in, wide_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(wide_in, int) and isinstance(wide_out, int):
        return _Projection(name, wide_in, wide_out, transposed=False)
    wide_out = getattr(module, "nf", None)  # transformers' Conv1D: a Linear with (in, out) weight
    if isinstance(wide_out, int) and weight.ndim == 2 and weight.shape[1] == wide_out:
        return _Projection(name, weight.shape[0], wide_out, transposed=True)
    return None


def _is_table(module: torch.nn.Module) -> bool:
    return isinstance(getattr(module, "num_embeddings", None), int) and hasattr(module, "weight")


def _is_norm(module: torch.nn.Module) -> bool:
    """A module without children whose parameters are all vectors scales, and maybe shifts."""
    parameters = list(module.parameters(recurse=False))
    is_leaf = next(module.children(), None) is None
    return is_leaf and bool(parameters) and all(it.ndim == 1 for it in parameters)


def _stacks(
    modules: Mapping[str, torch.nn.Module], projections: Sequence[_Projection]
) -> dict[str, tuple[str, ...]]:
    """Outermost lists whose every element holds two projections or more: list -> its blocks."""
    stacks: dict[str, tuple[str, ...]] = {}
    for name, module in modules.items():  # a module comes before what lies in it
        is_list = isinstance(module, torch.nn.ModuleList) and len(module) > 0
        if not is_list or any(_is_in(name, stack) for stack in stacks):
            continue
        blocks = [f"{name}.{child}" for child, _ in module.named_children()]
        held = Counter(
            f"{name}.{it.name[len(name) + 1 :].partition('.')[0]}"
            for it in projections
            if _is_in(it.name, name)
        )
        if all(held[block] >= 2 for block in blocks):
            stacks[name] = tuple(blocks)
    return stacks


def _vocabulary(
    outside: Mapping[str, torch.nn.Module], projections: Sequence[_Projection]
) -> tuple[dict[str, str], bool]:
    """Token embedding and head, as far as they are there, and whether they share their weight.

    The head is the projection onto as many numbers as a table has rows; a table of positions has
    no such counterpart.
    """
    tables = {name: module for name, module in outside.items() if _is_table(module)}
    pairs = [
        (
            outside[projection.name].weight is table.weight,
            table.embedding_dim == projection.wide_in,
            name,
            projection.name,
        )
        for name, table in tables.items()
        for projection in projections
        if projection.name in outside and projection.wide_out == table.num_embeddings
    ]
    if pairs:
        tied, _, embedding, head = max(pairs, key=lambda pair: pair[:2])
        return {"embedding": embedding, "head": head}, tied
    return ({"embedding": next(iter(tables))} if tables else {}), False


def _main_stack(
    stacks: Mapping[str, tuple[str, ...]],
    modules: Mapping[str, torch.nn.Module],
    embedding: str | None,
) -> tuple[str, str]:
    """The one list of blocks that reads the token embedding, and why there is none ("" if so).

    With a vision tower beside the language model, the language model's list is the one that shares
    more of its path with the embedding. An encoder and a decoder are equally near to it.
    """
    if not stacks:
        return "", "it has no list of blocks"
    weight = modules[embedding].weight if embedding is not None else None
    aliases = [
        name.split(".")
        for name, module in modules.items()
        if _is_table(module) and module.weight is weight
    ]
    nearness = {
        stack: max((_shared(stack.split("."), alias) for alias in aliases), default=0)
        for stack in stacks
    }
    nearest = [stack for stack in stacks if nearness[stack] == max(nearness.values())]
    if len(nearest) > 1:
        return "", f"it has several lists of blocks, {' and '.join(nearest)}, not one decoder"
    return nearest[0], ""


def _shared(path: Sequence[str], other: Sequence[str]) -> int:
    """How many leading parts two paths have in common."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(path, other, strict=False))
    )


def _residual_width(inside: Sequence[_Projection]) -> int:
    """The size at most ends of projections: everything in a block reads or writes the stream."""
    ends = Counter(end for it in inside for end in (it.wide_in, it.wide_out))
    return ends.most_common(1)[0][0]


def _final_norm(stack: str, outside: Mapping[str, torch.nn.Module], width: int) -> str | None:
    """The last normalisation beside the list of blocks (BLOOM has another one before them).

    OLMo's has no parameters, so that its class name has to tell.
    """
    owner = stack.rpartition(".")[0]
    found = None
    for name, module in outside.items():
        if name.rpartition(".")[0] != owner:
            continue
        sizes = {parameter.numel() for parameter in module.parameters()}
        bare = not sizes and "norm" in type(module).__name__.lower()
        if bare or (sizes == {width} and _is_norm(module)):
            found = name
    return found


def _readings(projections: Sequence[_Projection], width: int) -> list[_Reading]:
    """One reading for each group of projections with a common parent that makes sense."""
    groups: dict[str, list[_Projection]] = {}
    for projection in projections:
        groups.setdefault(projection.parent, []).append(projection)
    return [reading for group in groups.values() if (reading := _read_group(group, width))]


def _read_group(group: Sequence[_Projection], width: int) -> _Reading | None:
    """Try every assignment of roles; of those that fit, keep what the best named agree upon."""
    layouts = {
        4: (("q", "k", "v", "o"),),
        3: (("gate", "up", "down"),),
        2: (("qkv", "o"), ("gate_up", "down"), ("up", "down")),
    }
    fitting = [
        dict(zip(layout, order, strict=True))
        for layout in layouts.get(len(group), ())
        for order in permutations(group)
        if _fits(dict(zip(layout, order, strict=True)), width)
    ]
    if not fitting:
        return None
    named = [sum(it.leaf in NAMES[role] for role, it in roles.items()) for roles in fitting]
    best = [roles for roles, count in zip(fitting, named, strict=True) if count == max(named)]
    agreed = {
        role: it.name
        for role, it in best[0].items()
        if all(other.get(role) == it for other in best)
    }
    return _Reading(agreed, tuple(it.name for it in group), max(named))


def _fits(roles: Mapping[str, _Projection], width: int) -> bool:
    """Do the shapes allow these roles around a residual stream of this width?"""
    inward = [it for role, it in roles.items() if role not in ("o", "down")]
    outward = roles["o"] if "o" in roles else roles["down"]
    inner = outward.wide_in
    if outward.wide_out != width or any(it.wide_in != width for it in inward):
        return False
    match tuple(roles):
        case ("q", "k", "v", "o"):  # fewer heads for k and v; a gate beside q in Qwen3.5
            keys = roles["k"].wide_out
            is_query = roles["q"].wide_out in (inner, 2 * inner)
            return is_query and roles["v"].wide_out == keys and inner % keys == 0
        case ("qkv", "o"):
            keys, odd = divmod(roles["qkv"].wide_out - inner, 2)
            return not odd and keys > 0 and inner % keys == 0
        case ("gate_up", "down"):
            return roles["gate_up"].wide_out == 2 * inner
        case _:
            return all(it.wide_out == inner for it in inward)


def _read_block(
    name: str, members: Mapping[str, torch.nn.Module], readings: Sequence[_Reading], width: int
) -> _Block:
    attention = _best_named([it for it in readings if _is_attention(it)])
    mlps = [it for it in readings if "down" in it.roles]
    mlp = _best_named(mlps)
    has_experts = any(
        parameter.ndim == 3 and len(parameter) > 1 and width in parameter.shape[1:]
        for module in members.values()
        for parameter in module.parameters(recurse=False)
    )
    mlp_in: tuple[str, ...] = ()
    mlp_out = ""
    if mlp is not None and not has_experts:
        mlp_out = mlp.roles["down"]
        others = [member for member in mlp.members if member != mlp_out]
        mlp_in = tuple(sorted(others, key=lambda member: member != mlp.roles.get("gate")))
    is_mixture = has_experts or len(mlps) > 1
    return _Block(
        name,
        attention.roles if attention is not None else {},
        mlp_in,
        mlp_out,
        "is a mixture of experts" if is_mixture else "has no single pair of widening and narrowing",
        tuple(member for member, module in members.items() if _is_norm(module)),
    )


def _is_attention(reading: _Reading) -> bool:
    return set(reading.roles) in ({"q", "k", "v", "o"}, {"qkv", "o"})


def _best_named(readings: Sequence[_Reading]) -> _Reading | None:
    """The only reading, or the one with most known names; None when two are equally good."""
    most = max((it.named for it in readings), default=0)
    best = [it for it in readings if it.named == most]
    return best[0] if len(best) == 1 else None
