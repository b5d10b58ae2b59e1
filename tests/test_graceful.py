"""Graceful forgetting inside a plain Trainer: limits, laws of the ascent, schedules, resuming."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unwrite.errors import BadSetting, BadTask, DamagedFile
from unwrite.forgetting import GracefulForgetting, self_generate
from unwrite.model import Model
from unwrite.tasks import Example
from unwrite.training import Pair, row_losses


def pairs_of(world, relation, new=False):
    return [
        Pair(edit.prompt, edit.new if new else edit.old)
        for edit in world.edits
        if edit.relation == relation
    ]


def task_rows(model, pairs):
    """A data set for any Trainer: ids and labels, prompts masked."""
    rows = []
    for pair in pairs:
        tokens = model.tokens(pair.prompt, pair.answer)
        labels = [-100] * tokens.answer + list(tokens.targets)
        rows.append({"input_ids": list(tokens.ids), "labels": labels})
    return rows


def train(world, folder, callback=None, *, lora=False, resume=None, dropout=0.0, **options):
    """A plain transformers.Trainer on one relation of the toy world; the network after it."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = Model.load(world.folder)
    network = model.network
    if dropout:
        network.config.attention_dropout = dropout
        for module in network.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        network = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 12,
        "learning_rate": 1e-3,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "seed": 1,
    } | options
    trainer = Trainer(
        model=network,
        args=TrainingArguments(str(folder), **settings),
        train_dataset=task_rows(model, pairs_of(world, "job", new=True)),
        data_collator=DataCollatorForSeq2Seq(model.tokenizer),
        processing_class=model.tokenizer,
        callbacks=[callback] if callback else [],
    )
    trainer.train(resume_from_checkpoint=resume)
    return network


def weights(network):
    return {name: one.detach().clone() for name, one in network.named_parameters()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


# ---- limits: it is plain training ----------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"strength": 0.0},
        {"examples": []},
        {"confident_above": math.inf},
        {"every": 100},
    ],
    ids=["strength 0", "nothing to forget", "never confident", "never due"],
)
def test_with_nothing_to_do_training_is_bitwise_plain(worlds, tmp_path, how):
    world = worlds()
    pets = pairs_of(world, "pet")
    settings = {"examples": pets, "confidence": [1.0] * len(pets), "every": 2} | how
    examples = settings.pop("examples")
    settings["confidence"] = settings["confidence"][: len(examples)]
    plain = weights(train(world, tmp_path / "plain", dropout=0.3))
    callback = GracefulForgetting(examples, **settings)
    assert same(weights(train(world, tmp_path / "graceful", callback, dropout=0.3)), plain)
    assert callback.history == []


def test_forgetting_draws_no_random_numbers_of_the_trainer(worlds, tmp_path):
    """With an ascent too small to change a weight, dropout masks and data order are the same."""
    world = worlds()
    plain = weights(train(world, tmp_path / "plain", dropout=0.3))
    callback = GracefulForgetting(
        pairs_of(world, "pet"), strength=1e-30, every=2, optimizer="sgd", schedule="random"
    )
    assert same(weights(train(world, tmp_path / "graceful", callback, dropout=0.3)), plain)
    assert len(callback.history) == 6 * 8


# ---- the ascent ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_ascent_raises_the_loss_of_its_examples_and_is_logged(worlds, tmp_path, optimizer):
    world = worlds()
    pets = pairs_of(world, "pet")
    callback = GracefulForgetting(
        pets,
        confidence=range(len(pets)),
        every=2,
        strength=10.0 if optimizer == "adamw" else 1000.0,
        batch_size=4,
        optimizer=optimizer,
        loss_cap=100.0,
        log=tmp_path / "log.jsonl",
    )
    train(world, tmp_path / "run", callback, learning_rate=1e-4)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == callback.history and len(rows) == 6 * 4
    assert [row["step"] for row in rows[::4]] == [2, 4, 6, 8, 10, 12]
    for start in range(0, len(rows), 4):
        batch = rows[start : start + 4]
        assert sum(r["loss_after"] for r in batch) > sum(r["loss_before"] for r in batch)
    assert {row["example"] for row in rows} == set(range(len(pets)))
    assert all(row["confidence"] == row["example"] and not row["skipped"] for row in rows)
    assert all(row["prompt"] == pets[row["example"]].prompt for row in rows)


def test_what_is_forgotten_has_a_higher_loss_in_the_end(worlds, tmp_path):
    world = worlds()
    pets = pairs_of(world, "pet")

    def loss(network):
        model = Model.load(world.folder)
        with torch.no_grad():
            sequences = [model.tokens(pair.prompt, pair.answer) for pair in pets]
            return float(row_losses(network.eval(), sequences, model.device).mean())

    plain = loss(train(world, tmp_path / "plain"))
    callback = GracefulForgetting(pets, every=2, strength=1.0)
    assert loss(train(world, tmp_path / "graceful", callback)) > plain + 0.1


def test_capped_examples_are_skipped_and_logged(worlds, tmp_path):
    world = worlds()
    pets = pairs_of(world, "pet")
    plain = weights(train(world, tmp_path / "plain"))
    callback = GracefulForgetting(pets, every=2, strength=1.0, loss_cap=1e-6)
    assert same(weights(train(world, tmp_path / "capped", callback)), plain)
    assert callback.history and all(row["skipped"] for row in callback.history)
    assert all(row["loss_before"] == row["loss_after"] for row in callback.history)
    some = GracefulForgetting(pets, every=1, strength=3.0, loss_cap=1.0)
    train(world, tmp_path / "some", some)
    for row in some.history:
        assert row["skipped"] == (row["loss_before"] >= 1.0)
    assert {row["skipped"] for row in some.history} == {True, False}


def test_only_confident_examples_are_forgotten(worlds, tmp_path):
    world = worlds()
    pets = pairs_of(world, "pet")
    callback = GracefulForgetting(
        pets, confidence=range(len(pets)), confident_above=7.0, every=3, strength=0.5
    )
    train(world, tmp_path, callback)
    assert {row["example"] for row in callback.history} == {7, 8, 9}


# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["periodic", "ahead", "random"])
def test_all_schedules_make_as_many_steps(worlds, tmp_path, schedule):
    world = worlds()
    callback = GracefulForgetting(
        pairs_of(world, "pet"), every=3, schedule=schedule, strength=0.1, batch_size=2, seed=5
    )
    train(world, tmp_path, callback)
    steps = [row["step"] for row in callback.history[::2]]
    assert len(steps) == 4
    if schedule == "ahead":
        assert steps == [0, 0, 0, 0]
    elif schedule == "periodic":
        assert steps == [3, 6, 9, 12]
    else:
        assert steps == sorted(set(steps)) and steps != [3, 6, 9, 12]


def test_every_example_has_its_turn_before_any_has_two(worlds):
    callback = GracefulForgetting(pairs_of(worlds(), "pet"), batch_size=4)
    drawn = [index for number in range(5) for index in callback._batch(number)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    few = GracefulForgetting(pairs_of(worlds(), "pet")[:3], batch_size=8)
    assert sorted(few._batch(0)) == [0, 1, 2]


# ---- where it works ------------------------------------------------------------------------------


def test_gradient_accumulation_counts_optimiser_steps(worlds, tmp_path):
    world = worlds()
    options = {"every": 2, "strength": 0.5, "batch_size": 4}
    whole = GracefulForgetting(pairs_of(world, "pet"), **options)
    one = train(world, tmp_path / "a", whole, max_steps=4, per_device_train_batch_size=4)
    parts = GracefulForgetting(pairs_of(world, "pet"), **options)
    other = train(
        world,
        tmp_path / "b",
        parts,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert [row["step"] for row in parts.history] == [row["step"] for row in whole.history]
    for name, tensor in one.named_parameters():
        assert torch.allclose(tensor, dict(other.named_parameters())[name], atol=2e-3), name


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
def test_bf16_and_adapters(worlds, tmp_path):
    world = worlds()
    before = weights(Model.load(world.folder).network)
    callback = GracefulForgetting(pairs_of(world, "pet"), every=2, strength=1.0)
    network = train(world, tmp_path, callback, lora=True, bf16=True)
    rows = callback.history
    assert sum(row["loss_after"] - row["loss_before"] for row in rows) > 0
    frozen = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): one
        for name, one in weights(network).items()
        if "lora_" not in name
    }
    assert same(frozen, before)


def test_a_resumed_run_is_the_uninterrupted_one(worlds, tmp_path):
    world = worlds()
    options = {"every": 2, "strength": 1.0, "batch_size": 3}

    def callback(name):
        return GracefulForgetting(pairs_of(world, "pet"), log=tmp_path / name, **options)

    saved = {"save_strategy": "steps", "save_steps": 5}
    whole = callback("whole.jsonl")
    expected = weights(train(world, tmp_path / "run", whole, **saved))
    checkpoint = tmp_path / "run" / "checkpoint-5"
    resumed = callback("whole.jsonl")  # its log goes beyond the checkpoint
    found = weights(train(world, tmp_path / "run", resumed, resume=str(checkpoint), **saved))
    assert same(found, expected)
    assert resumed.history == whole.history
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert rows == whole.history
    (checkpoint / "graceful.safetensors").unlink()
    with pytest.raises(DamagedFile, match="cannot go on"):
        train(world, tmp_path / "run", callback("x.jsonl"), resume=str(checkpoint), **saved)


def test_sharded_training_is_refused_with_the_reason(worlds, tmp_path):
    callback = GracefulForgetting(pairs_of(worlds(), "pet"))
    model = Model.load(worlds().folder)

    class Arguments:
        deepspeed = "zero.json"
        fsdp = ""
        learning_rate = 1.0

    with pytest.raises(BadSetting, match="DeepSpeed: its engine owns backward"):
        callback.on_train_begin(Arguments(), None, None, model=model.network)
    Arguments.deepspeed, Arguments.fsdp = None, "full_shard"
    with pytest.raises(BadSetting, match="cannot run under FSDP1"):
        callback.on_train_begin(Arguments(), None, None, model=model.network)


def test_settings_that_cannot_work_are_refused(worlds):
    pets = pairs_of(worlds(), "pet")
    for settings, reason in [
        ({"every": 0}, "at least 1"),
        ({"strength": -1}, "negative"),
        ({"schedule": "often"}, "periodic, ahead or random"),
        ({"confidence": [1.0]}, "one number for every example"),
        ({"confident_above": 1.0}, "needs the confidence"),
        ({"loss_cap": 0.0}, "greater than 0"),
        ({"optimizer": "adam"}, "adamw or sgd"),
    ]:
        with pytest.raises(BadSetting, match=reason):
            GracefulForgetting(pets, **settings)


def test_two_processes_forget_alike_and_as_one_does(worlds, tmp_path):
    """DDP over gloo: both processes end with the same weights, close to those of one process."""
    import socket

    world = worlds()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("graceful_process.py")
    import os

    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(world.folder), str(tmp_path / f"out{rank}")],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=200)
        assert process.returncode == 0, output
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / f"out{rank}" / "end.safetensors") for rank in range(2))
    assert same(first, second)
    callback = GracefulForgetting(pairs_of(world, "pet"), every=2, strength=1.0, batch_size=3)
    alone = weights(
        train(world, tmp_path / "one", callback, max_steps=4, per_device_train_batch_size=4)
    )
    told = json.loads((tmp_path / "out0" / "history.json").read_text())
    assert [row["example"] for row in told] == [row["example"] for row in callback.history]
    for one, other in zip(told, callback.history, strict=True):
        assert one["loss_before"] == pytest.approx(other["loss_before"], rel=0.05, abs=0.01)
    for name in first:
        assert torch.allclose(first[name], alone[name], atol=5e-3), name


# ---- the model's own answers ---------------------------------------------------------------------


def test_self_generation(worlds, tmp_path, monkeypatch):
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path))
    world = worlds()
    model = Model.load(world.folder)
    pets = [edit for edit in world.edits if edit.relation == "pet"]
    prompts = [edit.prompt for edit in pets]
    found = self_generate(model, [*prompts, prompts[0]])
    assert [pair.prompt for pair in found] == prompts
    assert [pair.answer.split()[0] for pair in found] == [edit.old for edit in pets]
    # From the cache: no generation at all, and only for these weights.
    monkeypatch.setattr(Model, "generate", lambda *_, **__: pytest.fail("generated again"))
    assert self_generate(model, prompts) == found
    name = next(iter(model.weights))
    with torch.no_grad():
        model.weights[name].add_(1.0)
    with pytest.raises(pytest.fail.Exception, match="generated again"):
        self_generate(model, prompts)


def test_sampled_answers_hang_on_prompt_and_seed_alone(worlds, tmp_path, monkeypatch):
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path))
    model = Model.load(worlds().folder)
    prompts = [edit.prompt for edit in worlds().edits]
    warm = {"temperature": 2.0, "max_new_tokens": 6}
    found = self_generate(model, prompts, seed=1, **warm)
    assert found == self_generate(model, prompts, seed=1, cached=False, **warm)
    assert found != self_generate(model, prompts, seed=2, **warm)
    assert found != self_generate(model, prompts, max_new_tokens=6)
    alone = [self_generate(model, [one], seed=1, cached=False, **warm) for one in prompts[::-1]]
    assert {pair for pairs in alone for pair in pairs} == set(found)
    # The colder, the nearer to the greedy answer.
    cold = self_generate(model, prompts, temperature=1e-4, max_new_tokens=6)
    assert cold == self_generate(model, prompts, max_new_tokens=6)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(BadSetting, match="temperature"):
            self_generate(model, prompts, temperature=wrong)


def test_samples_fall_as_often_as_they_are_likely(worlds):
    """The likeliest first token, over many seeds, against the softmax at that temperature."""
    model = Model.load(worlds().folder)
    prompt = worlds().edits[0].prompt
    drawn = [
        model.generate([prompt], 1, temperature=1.5, seed=seed)[0].strip() for seed in range(400)
    ]
    ids = torch.tensor([model.tokenizer(prompt)["input_ids"]])
    logits = model.logits_at(ids, torch.tensor([0]), torch.tensor([ids.shape[1] - 1]))[0]
    shares = (logits.detach().double() / 1.5).softmax(dim=-1)
    likeliest = int(shares.argmax())
    share = float(shares[likeliest])
    seen = drawn.count(model.tokenizer.decode([likeliest]).strip()) / len(drawn)
    assert 0.02 < share < 0.98, "the toy model must leave something to chance"
    assert abs(seen - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5


def test_only_wrong_answers_are_kept_if_so_wished(worlds):
    world = worlds()
    model = Model.load(world.folder)
    pets = [edit for edit in world.edits if edit.relation == "pet"]
    said = {one.prompt: one.answer for one in self_generate(model, [e.prompt for e in pets])}
    examples = [
        Example(edit.prompt, said[edit.prompt] if number % 2 else "nothing")
        for number, edit in enumerate(pets)
    ]
    wrong = self_generate(model, examples, keep="wrong", cached=False)
    assert [pair.prompt for pair in wrong] == [edit.prompt for edit in pets[::2]]
    with pytest.raises(BadTask, match="no answer to be compared"):
        self_generate(model, [pets[0].prompt], keep="wrong", cached=False)
