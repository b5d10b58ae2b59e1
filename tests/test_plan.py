"""The plan: numbers of the right size, from headers alone."""

import json
import struct

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file

import unwrite
from unwrite import footprint, plan
from unwrite import model as model_module
from unwrite.anatomy import Anatomy
from unwrite.errors import BadSetting, ModelUnavailable
from unwrite.footprint import Layout, Work
from unwrite.methods import build
from unwrite.observe import questions

KEPT = ("weights", "snapshot", "gradients", "moments")


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Speeds are not measured again for every test; and two plans can be compared, though the
    process that makes them grows and shrinks in between."""
    monkeypatch.setattr(plan, "_speeds", lambda: (1e10, 1e10))
    monkeypatch.setattr(plan, "_own_memory", lambda: 500_000_000)


def test_the_machine_is_measured(monkeypatch):
    monkeypatch.undo()
    operations, bandwidth = plan._speeds()
    assert 1e8 < operations < 1e16
    assert 1e7 < bandwidth < 1e14
    assert 1e7 < plan._own_memory() < 1e12


@pytest.fixture
def parameters(worlds):
    """What the llama toy network really has."""
    network = unwrite.load(worlds().folder).network
    return sum(parameter.numel() for parameter in network.parameters())


def kept(needs):
    """Bytes of weights and of what is kept for each of them."""
    return sum(needs.parts.get(part, 0) for part in KEPT)


def test_the_numbers_have_the_right_size(worlds, parameters, tmp_path):
    world = worlds()
    needs = plan.for_model(world.folder, unwrite.FullFT(), world.edits[:5], folder=tmp_path / "new")
    assert needs.parameters == parameters
    assert kept(needs) == 20 * parameters
    assert needs.memory_bytes == sum(needs.parts.values()) > kept(needs)
    assert needs.disk_bytes == 4 * parameters
    assert needs.edits == 5
    assert needs.probes == len(questions(world.edits[:5]))
    words = sum(len(f"{edit.prompt} {edit.new}".split()) for edit in world.edits[:5])
    assert needs.tokens_per_epoch == words, "the toy tokenizer has a token a word"
    assert 0 < needs.train_seconds < 60
    assert 0 < needs.observe_seconds < 60
    assert needs.disk_free > 0
    assert needs.memory_free > 0
    assert needs.warnings == ()


def test_the_disk_estimate_is_what_an_update_takes(worlds, tmp_path):
    world = worlds()
    home = unwrite.open(tmp_path / "home", base=world.folder)
    needs = plan.for_model(home.source, unwrite.FullFT(), world.edits[:2])
    update = home.update(world.edits[:2], unwrite.FullFT(epochs=1, until="epochs"))
    assert update.summary["bytes"] == needs.disk_bytes


def test_more_edits_and_epochs_cost_more(worlds):
    world = worlds()

    def tokens_and_probes(count):
        needs = plan.for_model(world.folder, unwrite.FullFT(), world.edits[:count])
        return needs.tokens_per_epoch, needs.probes

    few, many = tokens_and_probes(2), tokens_and_probes(20)
    assert many[0] > 8 * few[0]
    assert many[1] > 5 * few[1]
    seconds = [
        plan._train_seconds(unwrite.FullFT(epochs=epochs, until="epochs"), 8, 100, 1000, 1e9, 1e9)
        for epochs in (1, 10)
    ]
    assert seconds[1] == pytest.approx(10 * seconds[0])


def test_a_tensor_that_is_stored_twice_counts_once(world, parameters):
    path = world.folder / "model.safetensors"
    content = load_file(path)
    twice = content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()}
    save_file(twice, path, metadata={"format": "pt"})
    assert plan.for_model(world.folder, unwrite.FullFT()).parameters == parameters


def test_no_weight_is_read(world, parameters):
    """The file ends after its header: whoever read a tensor would fail."""
    path = world.folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    with path.open("r+b") as file:
        file.truncate(8 + length)
        file.truncate(len(content))  # a hole: zeros that were never written
    needs = plan.for_model(world.folder, unwrite.FullFT())
    assert needs.parameters == parameters
    assert needs.edits == 100
    assert path.stat().st_blocks * 512 < len(content) // 2, "it is still a hole"


def test_a_model_that_does_not_fit_is_told_before_anything_is_loaded(world, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "_memory_free", lambda: 1000)
    needs = plan.for_model(world.folder, unwrite.FullFT(), folder=tmp_path)
    (warning,) = needs.warnings
    assert "Training needs about" in warning
    assert "1.0 kB are free" in warning
    usage = plan.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda _: usage)
    assert len(plan.for_model(world.folder, unwrite.FullFT()).warnings) == 2


def test_a_plan_is_plain_data(worlds):
    needs = plan.for_model(worlds().folder, unwrite.FullFT())
    assert json.loads(json.dumps(needs.as_json()))["parameters"] == needs.parameters
    assert {name for name, _ in needs.rows()} >= {"model", "memory", "disk", "training"}
    assert needs.method == "full-ft"


def test_what_cannot_be_changed_is_refused(world):
    config = world.folder / "config.json"
    content = json.loads(config.read_text("utf-8"))
    config.write_text(json.dumps(content | {"model_type": "no-such-thing"}))
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        plan.for_model(world.folder, unwrite.FullFT())


def test_a_model_without_a_tokenizer_is_refused(world):
    for file in world.folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelUnavailable):
        plan.for_model(world.folder, unwrite.FullFT(), world.edits)


def test_the_machine_is_described():
    facts = plan.machine()
    assert facts["torch"] == torch.__version__.partition("+")[0] or facts["torch"]
    assert set(facts) >= {"unwrite", "python", "transformers", "device", "threads", "memory free"}
    json.dumps(facts)


def test_every_training_run_of_a_method_is_counted(worlds, parameters):
    folder, edits = worlds().folder, worlds().edits[:4]

    def seconds(method):
        return plan.for_model(folder, method, edits).train_seconds

    full = unwrite.FullFT(epochs=2, until="epochs")
    both = unwrite.FLearning(forget=full, learn=full)
    assert seconds(both) == pytest.approx(2 * seconds(full))
    # Two probes a round, and half of the rounds.
    assert seconds(unwrite.Delicate(rounds=6, tuner=full)) == pytest.approx(6 * seconds(full))
    assert seconds(unwrite.LoRA(epochs=2, until="epochs")) < seconds(full)


def test_adapters_need_little_memory_and_disk(worlds, parameters):
    needs = plan.for_model(worlds().folder, unwrite.LoRA(), worlds().edits[:4])
    assert kept(needs) < 10 * parameters
    assert needs.disk_bytes < parameters
    mixed = unwrite.FLearning(forget=unwrite.LoRA())
    assert kept(plan.for_model(worlds().folder, mixed)) == 20 * parameters


def test_seeking_values_counts_edits_steps_and_contexts(worlds):
    folder, edits = worlds().folder, worlds().edits[:4]

    def seconds(**settings):
        return plan.for_model(folder, unwrite.MEMIT(**settings), edits).train_seconds

    few = seconds(steps=10, contexts=0)
    assert few > 0
    assert seconds(steps=20, contexts=0) == pytest.approx(2 * few)
    assert seconds(steps=10, contexts=2) == pytest.approx(2 * few)
    refined = seconds(steps=10, contexts=0, refine=100)
    assert seconds(steps=10, contexts=0, refine=200) - few == pytest.approx(2 * (refined - few))
    assert refined > few


def test_what_is_kept_while_refining_needs_memory(worlds):
    folder, edits = worlds().folder, worlds().edits[:4]
    assert "protected answers" not in plan.for_model(folder, unwrite.MEMIT(), edits).parts

    def kept_answers(own_prompts):
        refining = unwrite.MEMIT(refine=1, neighbours=2, own_prompts=own_prompts)
        return plan.for_model(folder, refining, edits).parts["protected answers"]

    assert kept_answers(100) > kept_answers(50) > 0


def test_one_trained_layer_needs_no_more_memory_than_adapters(worlds, parameters):
    folder = worlds().folder
    for method in (unwrite.ConstrainedFT(layer=0.5), build("loc-ft", {})):
        assert kept(plan.for_model(folder, method)) < 8 * parameters
    assert kept(plan.for_model(folder, unwrite.ConstrainedFT())) == 20 * parameters


# ---- from the configuration alone ----------------------------------------------------------------


@pytest.fixture
def weightless(world):
    """A folder with everything but weights."""
    for file in world.folder.glob("*.safetensors"):
        file.unlink()
    return world


def test_a_plan_needs_no_weights(worlds, weightless):
    whole = plan.for_model(worlds().folder, unwrite.FullFT(), weightless.edits[:5])
    bare = plan.for_model(weightless.folder, unwrite.FullFT(), weightless.edits[:5])
    assert (bare.parameters, bare.tokens_per_epoch) == (whole.parameters, whole.tokens_per_epoch)
    assert {name: bare.parts[name] for name in KEPT} == {name: whole.parts[name] for name in KEPT}
    assert bare.parts["activations"] == whole.parts["activations"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_are_what_autograd_saves(worlds, architecture):
    """Counted on shapes, and on a real network with numbers."""
    model = unwrite.load(worlds(architecture).folder)
    network = model_module.outline("it", worlds(architecture).folder)
    work = Work(set(dict(network.named_parameters())), rows=3, tokens=7, answer_tokens=1)
    planned = footprint.training(network, Anatomy.of(network), work, Layout()).parts["activations"]
    own = {one.untyped_storage().data_ptr() for one in model.network.parameters()}
    held = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    ids = torch.zeros((3, 7), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.network.base_model(input_ids=ids, use_cache=False)[0]
    real = sum(size for size, _ in held.values())
    assert hidden.requires_grad
    assert planned == pytest.approx(real, rel=0.15)


def test_processes_that_shard_need_less_each(worlds, parameters):
    def needs(**layout):
        return plan.for_model(
            worlds().folder, unwrite.FullFT(), layout=Layout(device="cuda", **layout), memory=10**12
        )

    alone, whole = needs(), needs(processes=4)
    assert kept(whole) == kept(alone), "each has a whole model"
    assert whole.traffic_bytes == 2 * 3 * 4 * parameters // 4
    shared = needs(processes=4, sharded=True)
    assert shared.parts["gradients"] == pytest.approx(parameters, rel=1e-3)
    assert shared.parts["moments"] == pytest.approx(2 * parameters, rel=1e-3)
    assert "snapshot" not in shared.parts
    assert "weights" not in shared.parts, "the first process's own copy waits on disk"
    assert shared.scratch_bytes - whole.scratch_bytes == 2 * 4 * parameters
    asked = shared.parts["asking"] + trains(shared)
    assert asked >= 4 * parameters, "but questions are asked of a whole model"
    offloaded = needs(processes=4, sharded=True, offloaded=True)
    assert trains(offloaded) < trains(shared)
    assert offloaded.host_bytes > shared.host_bytes
    recomputed = needs(processes=4, sharded=True, recomputed=True)
    assert recomputed.parts["activations"] < shared.parts["activations"]
    # A machine holds what all of its processes hold.
    assert needs(processes=4).host_bytes > 3 * alone.host_bytes


def test_adapters_are_whole_in_every_process_that_shares_their_model(worlds, parameters):
    def needs(**layout):
        return plan.for_model(
            worlds().folder, unwrite.LoRA(), layout=Layout(device="cuda", **layout), memory=10**12
        )

    whole, shared = needs(processes=4), needs(processes=4, sharded=True)
    for part in ("gradients", "moments"):
        assert shared.parts[part] == whole.parts[part] > 0
    assert shared.parts["gathered gradients"] == 0, "what is frozen has none"
    assert shared.parts["shards"] == parameters
    # Weights are gathered for either pass; the factors' gradients are averaged as without shards.
    gathered = 2 * 3 * 4 * parameters // 4
    assert shared.traffic_bytes == pytest.approx(gathered + whole.traffic_bytes, abs=1)
    assert shared.scratch_bytes == 4 * parameters, "its own copy waits, nothing large comes back"
    offloaded = needs(processes=4, sharded=True, offloaded=True)
    assert trains(offloaded) == trains(shared) - shared.parts["shards"]


def test_what_would_fit_is_said_and_fits(tmp_path):
    """For a memory that is a little too small for full fine-tuning on one GPU."""
    llama(tmp_path, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6)
    folder, method, here = tmp_path, unwrite.FullFT(), Layout(device="cuda")
    most = plan.for_model(folder, method, layout=here, memory=10**12).memory_bytes
    needs = plan.for_model(folder, method, layout=here, memory=int(0.8 * most))
    assert len(needs.advice) >= 2
    assert all(sentence in needs.warnings[0] for sentence in needs.advice)
    said = " ".join(needs.advice)
    for word, changed, layout in [
        ("batch_size=1", unwrite.FullFT(batch_size=1), here),
        ("optimizer=adafactor (", unwrite.FullFT(optimizer="adafactor"), here),
        ("lora", unwrite.LoRA(), here),
    ]:
        fits = plan.for_model(folder, changed, layout=layout, memory=10**12).memory_bytes
        assert (word in said) == (fits <= 0.8 * most)
    assert plan.for_model(folder, method, layout=here, memory=10**12).advice == ()


def test_where_even_adafactor_does_not_fit_its_gradients_need_not_be_kept(tmp_path):
    llama(tmp_path, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6)
    frugal = unwrite.FullFT(optimizer="adafactor")
    least = unwrite.FullFT(optimizer="adafactor", in_backward=True)
    much, little = (
        plan.for_model(tmp_path, one, layout=Layout(device="cuda"), memory=10**12)
        for one in (frugal, least)
    )
    largest = max(one.numel() * 4 for one in plan.outline("", tmp_path).parameters())
    assert little.parts["gradients"] == largest < much.parts["gradients"]
    memory = (much.memory_bytes + little.memory_bytes) // 2
    advice = plan.for_model(
        tmp_path, unwrite.FullFT(), layout=Layout(device="cuda"), memory=memory
    ).advice
    assert any("adafactor and in_backward=true" in sentence for sentence in advice)
    accumulated = plan.for_model(
        tmp_path, unwrite.FullFT(accumulate=2), layout=Layout(device="cuda"), memory=memory
    ).advice
    assert any("and accumulate=1" in sentence for sentence in accumulated), "it is no error"


def test_layouts_that_make_no_sense_are_refused():
    for settings, reason in [
        ({"processes": 0}, "at least 1"),
        ({"device": "tpu"}, "cpu or cuda"),
        ({"offloaded": True, "processes": 2}, "belong to sharding"),
        ({"sharded": True}, "nothing to shard"),
    ]:
        with pytest.raises(BadSetting, match=reason):
            Layout(**settings)


def test_large_models_are_planned_from_a_page_of_json(tmp_path):
    """Llama-2 7B from its published sizes: 6.74 billion parameters, full fine-tuning 108 GB of
    weights, gradients and moments; nothing is allocated."""
    llama(tmp_path)
    one = Layout(device="cuda")
    needs = plan.for_model(tmp_path, unwrite.FullFT(), layout=one, memory=80 * 10**9)
    assert needs.parameters == 6_738_415_616
    states = kept(needs) - needs.parts["snapshot"]
    assert states == 16 * needs.parameters
    assert any("GPUs with FSDP" in sentence for sentence in needs.advice)
    assert any("lora fits" in sentence for sentence in needs.advice)


def llama(folder, **sizes):
    """A configuration, by default that of Llama-2 7B."""
    from transformers import LlamaConfig

    whole = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32} | sizes
    heads = whole["hidden_size"] // 128
    LlamaConfig(
        vocab_size=32000, num_attention_heads=heads, tie_word_embeddings=False, **whole
    ).save_pretrained(folder)


def trains(needs):
    """Bytes while training, whatever asking questions takes."""
    return sum(size for name, size in needs.parts.items() if name != "asking")
