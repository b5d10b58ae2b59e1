"""Anatomy: every architecture is read from shapes, checked by running the network, never by a list.

All networks are tiny, made from a configuration in memory and filled with random numbers.
"""

from __future__ import annotations

import functools
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from unwrite.anatomy import Anatomy
from unwrite.errors import BadSetting, UnwriteError

DEPTH, WIDTH, INNER, VOCABULARY = 3, 32, 48, 64
MODERN: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "vocab_size": VOCABULARY,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": INNER,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLASSIC: dict[str, Any] = {
    "n_embd": WIDTH,
    "n_inner": INNER,
    "n_layer": DEPTH,
    "n_head": 4,
    "n_positions": 32,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT: dict[str, Any] = {**MODERN, "ffn_dim": INNER, "word_embed_proj_dim": WIDTH}
NEO: dict[str, Any] = {
    **{key: value for key, value in MODERN.items() if key != "num_hidden_layers"},
    "num_layers": DEPTH,
    "num_heads": 4,
    "attention_types": [[["global"], DEPTH]],
}
SIZES = {"hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 4, "vocab_size": VOCABULARY}
MPT = {"d_model": WIDTH, "n_layers": DEPTH, "n_heads": 4, "max_seq_len": 32}
FALCON = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4}

# name -> (model_type, configuration)
DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", MODERN),
    "llama-tied": ("llama", {**MODERN, "tie_word_embeddings": True}),
    "llama-square": ("llama", {**MODERN, "num_key_value_heads": 4, "intermediate_size": WIDTH}),
    "llama-wide-heads": ("llama", {**MODERN, "head_dim": 16}),
    "mistral": ("mistral", MODERN),
    "qwen2": ("qwen2", MODERN),
    "qwen3": ("qwen3", MODERN),
    "gemma": ("gemma", MODERN),
    "gemma2": ("gemma2", MODERN),
    "gemma3": ("gemma3_text", MODERN),
    "stablelm": ("stablelm", MODERN),
    "phi": ("phi", MODERN),
    "phi3": ("phi3", MODERN),
    "olmo": ("olmo", MODERN),
    "olmo2": ("olmo2", MODERN),
    "starcoder2": ("starcoder2", MODERN),
    "gpt2": ("gpt2", CLASSIC),
    "gptj": ("gptj", {**CLASSIC, "rotary_dim": 4}),
    "gpt-neo": ("gpt_neo", NEO),
    "gpt-neox": ("gpt_neox", MODERN),
    "gpt-bigcode": ("gpt_bigcode", {**CLASSIC, "pad_token_id": 0}),
    "bloom": ("bloom", SIZES),
    "opt": ("opt", OPT),
    "falcon": ("falcon", {**FALCON, "ffn_hidden_size": INNER, "vocab_size": VOCABULARY}),
    "falcon-grouped": (
        "falcon",
        {
            **FALCON,
            "vocab_size": VOCABULARY,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
    ),
    "mpt": ("mpt", {**MPT, "vocab_size": VOCABULARY}),
}
FUSED = {"gpt2", "gpt-neox", "gpt-bigcode", "bloom", "falcon", "falcon-grouped", "mpt", "phi3"}
MLP_KINDS = {"gated": {"gate", "up", "down"}, "plain": {"up", "down"}, "fused": {"gate_up", "down"}}
PLAIN = FUSED - {"phi3"} | {"phi", "starcoder2", "gptj", "gpt-neo", "opt"}


def build(model_type: str, settings_: dict[str, Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **settings_)
        network = AutoModelForCausalLM.from_config(config).eval()
        for parameter in network.parameters():  # biases start at zero and would test nothing
            torch.nn.init.normal_(parameter, std=0.2)
    return network


@functools.cache
def network_of(name: str) -> Any:
    return build(*DENSE[name])


def trace(network: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every module in one forward pass, in the order in which they return."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str, inputs: tuple[Any, ...], outputs: Any) -> None:
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        if inputs and isinstance(inputs[0], torch.Tensor) and isinstance(first, torch.Tensor):
            seen[name] = (inputs[0].clone(), first.clone())  # Falcon adds in place afterwards

    handles = [
        module.register_forward_hook(
            lambda _, inputs, outputs, name=name: hook(name, inputs, outputs)
        )
        for name, module in network.named_modules()
    ]
    try:
        with torch.no_grad():
            network(input_ids=torch.arange(3, 8)[None], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@functools.cache
def trace_of(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return trace(network_of(name))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small only lose by being spread over threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


every_architecture = pytest.mark.parametrize("name", DENSE)


@every_architecture
def test_every_block_is_found_and_called_in_order(name: str) -> None:
    anatomy = Anatomy.of(network_of(name))
    assert anatomy.depth == len(anatomy.blocks) == len(set(anatomy.blocks)) == DEPTH
    seen = trace_of(name)
    assert tuple(it for it in seen if it in anatomy.blocks) == anatomy.blocks
    for entered, left in (seen[block] for block in anatomy.blocks):
        assert entered.shape[-1] == left.shape[-1] == WIDTH
    for before, after in zip(anatomy.blocks, anatomy.blocks[1:], strict=False):
        torch.testing.assert_close(seen[before][1], seen[after][0])  # the residual stream


@every_architecture
def test_mlp_out_maps_the_inner_width_to_the_residual_width(name: str) -> None:
    network = network_of(name)
    anatomy = Anatomy.of(network)
    seen = trace_of(name)
    for block, down, into in zip(anatomy.blocks, anatomy.mlp_out, anatomy.mlp_in, strict=True):
        assert down.startswith(f"{block}.")
        module = network.get_submodule(down)
        keys, values = (tensor.reshape(-1, tensor.shape[-1]) for tensor in seen[down])
        weight = module.weight if anatomy.transposed(down) else module.weight.T
        expected = keys @ weight + (0 if module.bias is None else module.bias)
        torch.testing.assert_close(values, expected)
        assert weight.shape == (keys.shape[-1], WIDTH)
        for projection in into:
            assert seen[projection][0].shape[-1] == WIDTH
            assert seen[projection][1].shape[-1] in (keys.shape[-1], 2 * keys.shape[-1])


@every_architecture
def test_mlp_kinds(name: str) -> None:
    anatomy = Anatomy.of(network_of(name))
    kinds = {anatomy.kind(f"{it}.weight") for it in (*anatomy.mlp_in[0], anatomy.mlp_out[0])}
    shape = "fused" if name == "phi3" else "plain" if name in PLAIN else "gated"
    assert kinds == MLP_KINDS[shape]
    if shape == "gated":
        assert [anatomy.kind(f"{it}.weight") for it in anatomy.mlp_in[0]] == ["gate", "up"]


@every_architecture
def test_attention_roles(name: str) -> None:
    anatomy = Anatomy.of(network_of(name))
    for block, roles in zip(anatomy.blocks, anatomy.attention, strict=True):
        assert set(roles) == ({"qkv", "o"} if name in FUSED else {"q", "k", "v", "o"})
        assert all(module.startswith(f"{block}.") for module in roles.values())
        assert len(set(roles.values())) == len(roles)
    seen = trace_of(name)
    for roles in anatomy.attention:
        assert all(seen[roles[role]][0].shape[-1] == WIDTH for role in roles if role != "o")
        assert seen[roles["o"]][1].shape[-1] == WIDTH


@pytest.mark.parametrize("name", sorted(set(DENSE) - FUSED))
def test_v_is_the_one_that_carries_values(name: str) -> None:
    """With v silent nothing reaches o, whatever q and k are; with q or k silent something does."""
    network = build(*DENSE[name])
    roles = Anatomy.of(network).attention[0]
    for role in ("q", "k", "v"):
        module = network.get_submodule(roles[role])
        kept = {key: value.clone() for key, value in module.state_dict().items()}
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        entering_o, _ = trace(network)[roles["o"]]
        assert bool(entering_o.any()) == (role != "v")
        module.load_state_dict(kept)


@every_architecture
def test_every_parameter_has_a_kind_and_a_block(name: str) -> None:
    network = network_of(name)
    anatomy = Anatomy.of(network)
    named = [anatomy.embedding, anatomy.head, anatomy.final_norm]
    assert all(network.get_submodule(module) is not None for module in named)
    for parameter, _ in network.named_parameters():
        kind, block = anatomy.kind(parameter), anatomy.block_of(parameter)
        assert kind != "other", parameter
        holders = [at for at, it in enumerate(anatomy.blocks) if parameter.startswith(f"{it}.")]
        assert [block] == (holders or [None])


@every_architecture
def test_only_gpt2_stores_weights_transposed(name: str) -> None:
    network = network_of(name)
    anatomy = Anatomy.of(network)
    transposed = {it for it, _ in network.named_parameters() if anatomy.transposed(it)}
    if name == "gpt2":
        kinds = ("qkv", "o", "up", "down")
        matrices = {it for it, value in network.named_parameters() if value.ndim == 2}
        assert transposed == {it for it in matrices if anatomy.kind(it) in kinds}
    else:
        assert not transposed
    assert anatomy.transposed(anatomy.mlp_out[0]) == (name == "gpt2")


@every_architecture
def test_the_two_ends_of_the_network(name: str) -> None:
    network = network_of(name)
    anatomy = Anatomy.of(network)
    assert network.get_submodule(anatomy.embedding) is network.get_input_embeddings()
    assert network.get_submodule(anatomy.head) is network.get_output_embeddings()
    shared = network.get_input_embeddings().weight is network.get_output_embeddings().weight
    assert anatomy.tied == shared
    seen = trace_of(name)
    last, norm = anatomy.blocks[-1], anatomy.final_norm
    torch.testing.assert_close(seen[norm][0], seen[last][1])
    torch.testing.assert_close(seen[anatomy.head][0], seen[norm][1])


def test_tied_is_read_from_the_weights() -> None:
    assert Anatomy.of(network_of("llama-tied")).tied
    assert not Anatomy.of(network_of("llama")).tied


@every_architecture
def test_norms_lie_in_their_block(name: str) -> None:
    anatomy = Anatomy.of(network_of(name))
    for block, norms in zip(anatomy.blocks, anatomy.norms, strict=True):
        assert all(norm.startswith(f"{block}.") for norm in norms)
        assert bool(norms) == (name != "olmo")  # OLMo's norms have no parameters
    per_block = {len(norms) for norms in anatomy.norms}
    assert len(per_block) == 1


@every_architecture
def test_shapes_are_enough(name: str) -> None:
    """A network without numbers is read the same, so reading costs no memory."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(DENSE[name][0], **DENSE[name][1])
        )
    assert Anatomy.of(empty) == Anatomy.of(network_of(name))


def test_an_anatomy_is_a_value() -> None:
    anatomy = Anatomy.of(network_of("gemma3"))
    assert pickle.loads(pickle.dumps(anatomy)) == anatomy
    with pytest.raises(AttributeError):
        anatomy.tied = False  # type: ignore[misc]
    assert len(repr(anatomy)) < 200


@pytest.mark.parametrize(
    ("parameter", "kind", "block"),
    [
        ("h.1.attn.c_attn.weight", "qkv", 1),
        ("h.2.mlp.c_proj.bias", "down", 2),
        ("wte.weight", "embedding", None),
        ("ln_f.weight", "norm", None),
        ("transformer.h.0.mlp.c_fc.weight", "up", 0),
        ("no.such.weight", "other", None),
        ("weight", "other", None),
        ("", "other", None),
    ],
)
def test_names_of_checkpoint_files_are_understood(
    parameter: str, kind: str, block: int | None
) -> None:
    """The GPT-2 files on the hub lack the "transformer." that the live network has."""
    anatomy = Anatomy.of(network_of("gpt2"))
    assert (anatomy.kind(parameter), anatomy.block_of(parameter)) == (kind, block)


def test_transposed_refuses_an_unknown_name() -> None:
    with pytest.raises(UnwriteError, match=r"no module or parameter 'h\.9\.x'"):
        Anatomy.of(network_of("gpt2")).transposed("h.9.x")


# --- shapes decide, names only between equals ----------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self, attention: dict[str, tuple[int, int]], mlp: dict[str, tuple[int, int]]):
        super().__init__()
        self.one, self.two = torch.nn.Module(), torch.nn.Module()
        for part, sizes in ((self.one, attention), (self.two, mlp)):
            for name, (wide_in, wide_out) in sizes.items():
                part.add_module(name, torch.nn.Linear(wide_in, wide_out, bias=False))


class Decoder(torch.nn.Module):
    def __init__(self, width: int, *blocks: Block):
        super().__init__()
        self.table = torch.nn.Embedding(101, width)
        self.stack = torch.nn.ModuleList(blocks)
        self.predict = torch.nn.Linear(width, 101, bias=False)


def decoder(width: int, attention: dict[str, tuple[int, int]], mlp: dict[str, Any]) -> Decoder:
    with torch.device("meta"):
        return Decoder(width, *(Block(attention, mlp) for _ in range(2)))


@given(
    head=st.integers(1, 12),
    keys=st.integers(1, 4),
    groups=st.integers(1, 4),
    width=st.integers(2, 64),
    inner=st.integers(2, 200),
    fused=st.booleans(),
    gate=st.sampled_from(["gated", "plain", "fused"]),
)
@settings(max_examples=150, deadline=None)
def test_known_names_make_every_set_of_shapes_readable(
    head: int, keys: int, groups: int, width: int, inner: int, fused: bool, gate: str
) -> None:
    queries, key = head * keys * groups, head * keys
    separate = {"q": queries, "k": key, "v": key}
    into = {"qkv": queries + 2 * key} if fused else separate
    attention = {name: (width, size) for name, size in into.items()} | {"o": (queries, width)}
    halves: dict[str, dict[str, tuple[int, int]]] = {
        "gated": {"gate": (width, inner), "up": (width, inner)},
        "plain": {"up": (width, inner)},
        "fused": {"gate_up_proj": (width, 2 * inner)},
    }
    network = decoder(width, attention, halves[gate] | {"down": (inner, width)})
    anatomy = Anatomy.of(network)
    # The width of the stream shows by being shared; it must not drown among other sizes.
    assert anatomy.mlp_out == ("stack.0.two.down", "stack.1.two.down")
    assert anatomy.mlp_in[0] == tuple(f"stack.0.two.{name}" for name in halves[gate])
    assert anatomy.attention[1] == {role: f"stack.1.one.{role}" for role in attention}
    assert (anatomy.embedding, anatomy.head, anatomy.tied) == ("table", "predict", False)


def test_unknown_names_leave_what_shapes_can_tell() -> None:
    anatomy = Anatomy.of(
        decoder(
            32,
            {"x1": (32, 64), "x2": (32, 16), "x3": (32, 16), "x4": (64, 32)},
            {"y1": (32, 48), "y2": (48, 32), "y3": (32, 48)},
        )
    )
    assert anatomy.mlp_out[0] == "stack.0.two.y2"
    assert anatomy.mlp_in[0] == ("stack.0.two.y1", "stack.0.two.y3")
    roles = {name: anatomy.kind(f"stack.0.one.{name}.weight") for name in ("x1", "x2", "x3", "x4")}
    assert roles == {"x1": "q", "x2": "other", "x3": "other", "x4": "o"}  # k and v are twins
    with pytest.raises(UnwriteError, match=r"attention of Decoder .*stack\.0"):
        _ = anatomy.attention


def test_the_gate_comes_first_wherever_it_is_registered() -> None:
    mlp = {"up": (32, 48), "down": (48, 32), "gate": (32, 48)}
    anatomy = Anatomy.of(decoder(32, {"qkv": (32, 96), "o": (32, 32)}, mlp))
    assert anatomy.mlp_in[0] == ("stack.0.two.gate", "stack.0.two.up")


@pytest.mark.parametrize(
    "attention",
    [
        {"qkv": (32, 72), "o": (32, 32)},  # 20 for k and v, which does not divide 32
        {"qkv": (32, 97), "o": (32, 32)},  # k and v of different width
        {"q": (32, 32), "k": (32, 20), "v": (32, 20), "o": (32, 32)},
        {"q": (32, 32), "k": (32, 16), "v": (32, 8), "o": (32, 32)},
        {"q": (32, 32), "k": (32, 32), "v": (16, 32), "o": (32, 32)},  # v reads something else
        {"q": (32, 96), "k": (32, 32), "v": (32, 32), "o": (32, 32)},
    ],
)
def test_good_names_do_not_make_up_for_wrong_shapes(attention: dict[str, tuple[int, int]]) -> None:
    anatomy = Anatomy.of(decoder(32, attention, {"up": (32, 128), "down": (128, 32)}))
    assert len(anatomy.mlp_out) == 2
    with pytest.raises(UnwriteError, match="attention"):
        _ = anatomy.attention


@pytest.mark.parametrize(
    "mlp",
    [
        {"gate_up_proj": (32, 64), "down_proj": (48, 32)},
        {"gate": (32, 48), "up": (32, 40), "down": (48, 32)},
        {"up": (32, 48), "down": (40, 32)},
    ],
)
def test_an_mlp_whose_shapes_do_not_meet_is_refused(mlp: dict[str, tuple[int, int]]) -> None:
    network = decoder(32, dict.fromkeys("qkvo", (32, 32)), mlp)
    with pytest.raises(UnwriteError, match="widening and narrowing"):
        _ = Anatomy.of(network).mlp_out


def test_a_tied_table_is_preferred_to_one_that_only_has_as_many_rows() -> None:
    network = decoder(32, {"qkv": (32, 96), "o": (32, 32)}, {"up": (32, 9), "down": (9, 32)})
    positions, tokens = torch.nn.Embedding(101, 32), network.table
    network.table, network.tokens = positions, tokens
    network.predict.weight = tokens.weight
    anatomy = Anatomy.of(network)
    assert (anatomy.embedding, anatomy.head, anatomy.tied) == ("tokens", "predict", True)


def test_a_list_of_single_projections_is_not_a_list_of_blocks() -> None:
    network = decoder(32, {"qkv": (32, 96), "o": (32, 32)}, {"up": (32, 9), "down": (9, 32)})
    network.add_module("beside", torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(5)))
    assert Anatomy.of(network).blocks == ("stack.0", "stack.1")


# --- what cannot be read is said when it is asked for --------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "experts"),
    [("mixtral", {"num_local_experts": 4}), ("qwen2_moe", {"num_experts": 4})],
)
def test_a_mixture_of_experts_has_everything_but_an_mlp(
    model_type: str, experts: dict[str, int]
) -> None:
    """Qwen2-MoE has a shared expert too, which alone would pass for the MLP of its block."""
    network = build(model_type, {**MODERN, **experts})
    anatomy = Anatomy.of(network)
    assert anatomy.depth == DEPTH
    assert set(anatomy.attention[0]) == {"q", "k", "v", "o"}
    for part in ("mlp_in", "mlp_out"):
        with pytest.raises(UnwriteError, match=r"ForCausalLM .*mixture of experts.*full-ft"):
            getattr(anatomy, part)
    others = {it for it, _ in network.named_parameters() if anatomy.kind(it) == "other"}
    shared = {it for it, _ in network.named_parameters() if ".shared_expert." in it}
    assert others == {it for it, _ in network.named_parameters() if ".mlp." in it} - shared
    assert {anatomy.block_of(it) for it in others} == set(range(DEPTH))


def test_experts_as_a_list_are_a_mixture_too() -> None:
    network = decoder(32, {"qkv": (32, 96), "o": (32, 32)}, {})
    expert = {"gate": (32, 48), "up": (32, 48), "down": (48, 32)}
    for block in network.stack:
        block.two.add_module("experts", torch.nn.ModuleList(Block(expert, expert) for _ in "abc"))
    with pytest.raises(UnwriteError, match="mixture of experts"):
        _ = Anatomy.of(network).mlp_out


def test_an_encoder_and_a_decoder_are_not_one_decoder() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    network = T5ForConditionalGeneration(config)
    anatomy = Anatomy.of(network)
    assert (anatomy.embedding, anatomy.head) == ("shared", "lm_head")
    for part in ("blocks", "depth", "mlp_out", "attention", "norms"):
        with pytest.raises(UnwriteError, match=r"encoder\.block and decoder\.block"):
            getattr(anatomy, part)
    with pytest.raises(UnwriteError, match="blocks"):
        anatomy.layer_at(0.5)


def test_the_language_model_is_found_beside_a_vision_tower() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=MODERN, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        anatomy = Anatomy.of(Gemma3ForConditionalGeneration(config))
    assert anatomy.depth == DEPTH
    assert all("language_model" in block for block in anatomy.blocks)
    assert "language_model" in anatomy.final_norm


def test_a_hybrid_has_mlps_where_not_every_block_has_attention() -> None:
    network = build("qwen3_5_text", {**MODERN, "num_hidden_layers": 4})
    anatomy = Anatomy.of(network)
    assert len(anatomy.mlp_out) == 4
    with pytest.raises(UnwriteError, match="attention of Qwen3_5"):
        _ = anatomy.attention
    kinds = {it: anatomy.kind(it) for it, _ in network.named_parameters() if ".self_attn." in it}
    assert set(kinds.values()) == {"q", "k", "v", "o", "norm"}  # its q carries a gate beside


@pytest.mark.parametrize("model_type", ["mamba", "rwkv"])
def test_a_recurrent_model_has_neither(model_type: str) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}
    anatomy = Anatomy.of(build(model_type, config))
    assert anatomy.depth == 2
    with pytest.raises(UnwriteError, match="attention"):
        _ = anatomy.attention
    with pytest.raises(UnwriteError, match="widening and narrowing"):
        _ = anatomy.mlp_out


def test_a_projected_embedding_is_listed_as_other() -> None:
    """OPT-350m: the table is narrower than the stream, and there is no norm at the end."""
    network = build("opt", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False})
    anatomy = Anatomy.of(network)
    others = {it for it, _ in network.named_parameters() if anatomy.kind(it) == "other"}
    assert others == {"model.decoder.project_in.weight", "model.decoder.project_out.weight"}
    assert anatomy.embedding == "model.decoder.embed_tokens"
    with pytest.raises(UnwriteError, match="final norm of OPTForCausalLM"):
        _ = anatomy.final_norm


def test_a_network_without_head() -> None:
    anatomy = Anatomy.of(network_of("gpt2").transformer)
    assert anatomy.blocks == ("h.0", "h.1", "h.2")
    assert anatomy.embedding == "wte"
    assert not anatomy.tied
    with pytest.raises(UnwriteError, match="head of GPT2Model"):
        _ = anatomy.head


def test_no_blocks_at_all() -> None:
    anatomy = Anatomy.of(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3)))
    for part in ("blocks", "embedding", "head", "final_norm"):
        with pytest.raises(UnwriteError, match="Sequential"):
            getattr(anatomy, part)


# --- layers as fractions of the depth ------------------------------------------------------------


@given(fraction=st.floats(0, 1))
def test_a_fraction_of_the_depth_is_a_layer(fraction: float) -> None:
    anatomy = Anatomy.of(network_of("llama"))
    layer = anatomy.layer_at(fraction)
    assert abs(layer - fraction * (DEPTH - 1)) <= 0.5
    assert 0 <= layer < DEPTH


def test_the_ends_of_the_depth() -> None:
    anatomy = Anatomy.of(network_of("llama"))
    assert (anatomy.layer_at(0), anatomy.layer_at(0.5), anatomy.layer_at(1)) == (0, 1, DEPTH - 1)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, 17, math.nan, math.inf])
def test_what_is_not_a_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(BadSetting, match="between 0 and 1"):
        Anatomy.of(network_of("llama")).layer_at(fraction)
