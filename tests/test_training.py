"""Fine-tuning: against transformers' own Trainer, and the laws that all methods stand on."""

import math
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite.delta import Delta
from unwrite.errors import BadEdits, BadSetting, TrainingFailed
from unwrite.kept import ANSWER_TOKENS_KEPT
from unwrite.methods.full_ft import FullFT
from unwrite.model import Model, head_sees, pad
from unwrite.testing import check_method
from unwrite.training import (
    Pair,
    Recipe,
    fine_tune,
    learned,
    new_pairs,
    row_losses,
)

FAST = {"lr": 1e-3}


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


@pytest.fixture(scope="module")
def pairs(worlds):
    return new_pairs(worlds().edits[:10])


def same(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name].dense(), other[name].dense()) for name in one)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_losses_are_those_of_transformers_trainer(worlds, architecture, tmp_path):
    """One schedule, two loops: every step's loss and the final weights agree."""
    from torch.utils.data import Dataset, Sampler
    from transformers import Trainer, TrainingArguments

    world = worlds(architecture)
    model = Model.load(world.folder)
    recipe = Recipe(epochs=3, lr=1e-3, batch_size=4, until="epochs")
    pairs = new_pairs(world.edits[:10])
    ours = fine_tune(model, pairs, recipe)
    order = recorded_order(model, pairs, recipe)
    sequences = [model.tokens(pair.prompt, pair.answer) for pair in pairs]

    class Rows(Dataset):
        def __len__(self):
            return len(sequences)

        def __getitem__(self, index):
            return sequences[index]

    class SameOrder(Sampler):
        def __len__(self):
            return sum(len(batch) for batch in order)

        def __iter__(self):
            for batch in order:
                yield from batch

    def collate(rows):
        ids, at, columns, targets = pad(rows)
        labels = torch.full_like(ids, -100)
        labels[at, columns + 1] = targets
        return {"input_ids": ids, "labels": labels}

    def mean_over_examples(outputs, labels, num_items_in_batch=None):
        logits, labels = outputs.logits[:, :-1], labels[:, 1:]
        flat = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none"
        ).view(labels.shape)
        answered = labels != -100
        return ((flat * answered).sum(1) / answered.sum(1)).mean()

    class SameBatches(Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(Rows(), batch_sampler=order, collate_fn=collate)

    network = Model.load(world.folder).network
    arguments = TrainingArguments(
        tmp_path,
        num_train_epochs=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = SameBatches(network, arguments, compute_loss_func=mean_over_examples)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(theirs) == len(ours.losses) == 9
    # The Trainer logs losses rounded to four digits.
    assert ours.losses == pytest.approx(theirs, abs=2e-3)
    # The two changes agree as a whole. Single elements need not: AdamW turns the rounding noise of
    # a gradient that is zero by symmetry (GPT-2's key biases) into steps of full size.
    parameters = dict(network.named_parameters(remove_duplicate=False))
    base, apart, moved = model.base, 0.0, 0.0
    for file, name in model.names.items():
        change = ours.delta[file].dense()
        apart += float((base[file] + change - parameters[name].data).square().sum())
        moved += float(change.square().sum())
    assert apart < 1e-4 * moved


def recorded_order(model, pairs, recipe):
    """The batches of a run, as indices of pairs, found by watching what is padded together."""
    from unittest.mock import patch

    from unwrite import training

    index = {model.tokens(pair.prompt, pair.answer): i for i, pair in enumerate(pairs)}
    seen = []

    def watching(sequences):
        seen.append([index[tokens] for tokens in sequences])
        return pad(sequences)

    with patch.object(training, "pad", watching):
        fine_tune(model, pairs, recipe)
    return seen


def test_the_model_is_bitwise_unchanged_and_the_seed_repeats_the_bits(tmp_path):
    check_method(FullFT(**FAST), tmp_path)


def test_another_seed_gives_another_delta(model, pairs):
    recipe = Recipe(epochs=1, until="epochs", batch_size=3, **FAST)
    one = fine_tune(model, pairs, recipe).delta
    other = fine_tune(model, pairs, Recipe(epochs=1, until="epochs", batch_size=3, seed=1, **FAST))
    assert not same(one, other.delta)


def test_training_stops_when_everything_is_learned(model, pairs):
    trained = fine_tune(model, pairs, Recipe(epochs=50, **FAST))
    assert trained.learned
    assert trained.epochs < 50
    with model.shifted(trained.delta):
        forced = model.force([model.tokens(pair.prompt, pair.answer) for pair in pairs])
    assert all(one.matched == len(one.targets) for one in forced)


def test_a_fixed_number_of_epochs_is_kept(model, pairs):
    trained = fine_tune(model, pairs, Recipe(epochs=2, until="epochs", batch_size=5, **FAST))
    assert trained.epochs == 2
    assert len(trained.losses) == 4
    assert not trained.learned


def test_the_loss_is_the_mean_over_examples_not_over_tokens(model):
    sequences = [model.tokens("ada works", "as a baker"), model.tokens("ada works as a", "baker")]
    each = [row_losses(model.network, [one], model.device)[0] for one in sequences]
    both = row_losses(model.network, sequences, model.device)
    torch.testing.assert_close(both, torch.stack(each))
    shorter, longer = model.force(sequences[1:])[0], model.force(sequences[:1])[0]
    assert both.tolist() == pytest.approx([-longer.logprob / 3, -shorter.logprob], rel=1e-4)


def test_the_answers_have_no_say_in_the_order(model):
    """Runs on old and on new answers meet the same prompts in the same batches."""
    prompts = ["ada works as a", "bram lives in", "cleo owns a", "dirk works as a", "edda lives in"]
    recipe = Recipe(epochs=3, batch_size=2, until="epochs", **FAST)
    short = [Pair(prompt, "cat") for prompt in prompts]
    long = [Pair(p, " ".join(["rain falls on"] * (i % 3 + 1))) for i, p in enumerate(prompts)]
    assert recorded_order(model, short, recipe) == recorded_order(model, long, recipe)


def test_a_start_is_where_training_begins_and_not_part_of_the_change(model, pairs):
    recipe = Recipe(epochs=1, until="epochs", **FAST)
    first = fine_tune(model, pairs, recipe).delta.in_memory()
    from_there = fine_tune(model, pairs, recipe, start=first).delta
    with model.shifted(first):
        assert same(from_there, fine_tune(model, pairs, recipe).delta)
    only_one = Delta.from_changes({name: first[name] for name in list(first)[:1]})
    frozen = fine_tune(model, pairs, recipe, start=first, trainable=lambda name: name in only_one)
    assert set(frozen.delta) == set(only_one)


def test_logits_at_answer_positions_are_those_of_the_whole(model):
    ids, rows, columns, _ = pad([model.tokens("ada works", "as a baker")])
    whole = model.network(input_ids=ids, use_cache=False).logits
    with head_sees(model.network, rows, columns):
        chosen = model.network(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(chosen[0], whole[rows, columns])


def test_a_negative_weight_unlearns(model, worlds):
    edits = worlds().edits[:4]
    recipe = Recipe(epochs=2, until="epochs", **FAST)
    delta = fine_tune(model, [Pair(e.prompt, e.old, -1.0) for e in edits], recipe).delta
    sequences = [model.tokens(edit.prompt, edit.old) for edit in edits]
    before = sum(one.logprob for one in model.force(sequences))
    with model.shifted(delta):
        after = sum(one.logprob for one in model.force(sequences))
    assert after < before


def test_weight_zero_learns_nothing(model, pairs):
    still = [Pair(pair.prompt, pair.answer, 0.0) for pair in pairs]
    delta = fine_tune(model, still, Recipe(epochs=1, until="epochs", **FAST)).delta
    assert all(delta[name].changed == 0 for name in delta)


def test_only_chosen_tensors_move(model, pairs):
    def wanted(name):
        return name.endswith("mlp.down_proj.weight")

    trained = fine_tune(model, pairs, Recipe(epochs=2, **FAST), trainable=wanted)
    assert sorted(trained.delta) == sorted(name for name in model.names if wanted(name))
    assert all(parameter.requires_grad for parameter in model.network.parameters())
    with pytest.raises(BadSetting, match="No tensor"):
        fine_tune(model, pairs, Recipe(), trainable=lambda name: False)


def test_the_hook_runs_after_every_step_and_may_change_weights(model, pairs):
    steps = []

    def freeze(parameters, step):
        steps.append(step)
        for name, parameter in parameters.items():
            parameter.copy_(model.base[name])

    trained = fine_tune(
        model, pairs, Recipe(epochs=2, until="epochs", batch_size=5, **FAST), after_step=freeze
    )
    assert [step.number for step in steps] == [1, 2, 3, 4]
    assert [step.loss for step in steps] == list(trained.losses)
    assert all(trained.delta[name].changed == 0 for name in trained.delta)


def test_protection_keeps_bystanders_nearer(model, worlds):
    edits = worlds().edits[:3]
    kept = tuple(probe.prompt for edit in edits for probe in edit.bystanders)
    recipe = Recipe(epochs=10, until="epochs", **FAST)
    free = fine_tune(model, new_pairs(edits), recipe).delta
    guarded = fine_tune(
        model, new_pairs(edits), Recipe(epochs=10, until="epochs", protect=kept, **FAST)
    ).delta
    probes = [model.tokens(p.prompt, p.answer) for edit in edits for p in edit.bystanders]

    def unmoved(delta):
        with model.shifted(delta):
            return sum(one.logprob for one in model.force(probes))

    assert unmoved(guarded) > unmoved(free) + 1.0


def test_training_until_learned_also_waits_for_what_is_protected(model, worlds):
    pairs = new_pairs(worlds().edits[:3])
    kept = tuple(edit.prompt for edit in worlds().edits[20:24])
    answers = model.generate(kept, ANSWER_TOKENS_KEPT)
    sequences = [model.tokens(*one) for one in zip(kept, answers, strict=True)]

    def taught_and_lost(trained):
        with model.shifted(trained.delta):
            lost = sum(one.matched < len(one.targets) for one in model.force(sequences))
            return all(learned(model, pairs)), lost

    recipe = Recipe(epochs=100, protect_weight=0.1, **FAST)
    free = fine_tune(model, pairs, recipe)
    taught, lost = taught_and_lost(free)
    assert free.learned and taught and lost > 0
    guarded = fine_tune(model, pairs, replace(recipe, protect=kept))
    assert guarded.learned and guarded.epochs < 100
    assert taught_and_lost(guarded) == (True, 0)
    sooner = replace(recipe, protect=kept, epochs=guarded.epochs - 1)
    hasty = fine_tune(model, pairs, sooner)
    taught, lost = taught_and_lost(hasty)
    assert not hasty.learned and taught and lost > 0, "it waited for them alone"


def test_what_is_right_is_left_out_of_the_next_epochs(model, worlds):
    """Six rows that the model answers already and four that it does not, in batches of two: the
    steps are those of the wrong ones, epoch after epoch fewer, and all is right in the end."""
    known = [Pair(edit.prompt, str(edit.old)) for edit in worlds().edits[10:16]]
    assert all(learned(model, known))
    pairs = [*known, *new_pairs(worlds().edits[:4])]
    recipe = Recipe(epochs=60, batch_size=2, skip_right=True, **FAST)
    trained = fine_tune(model, pairs, recipe)
    first = fine_tune(model, pairs, replace(recipe, epochs=1))
    assert len(first.losses) == 2
    assert trained.learned and len(trained.losses) < 5 * trained.epochs
    with model.shifted(trained.delta):
        assert all(learned(model, pairs))


def test_where_nothing_is_wrong_nothing_moves(model, worlds):
    known = [Pair(edit.prompt, str(edit.old)) for edit in worlds().edits[:4]]
    trained = fine_tune(model, known, Recipe(skip_right=True))
    assert (trained.epochs, trained.losses, trained.learned) == (0, (), True)
    assert all(trained.delta[name].dense().count_nonzero() == 0 for name in trained.delta)


def test_what_is_always_wrong_is_trained_as_without_leaving_out(model, pairs):
    """As long as no answer is right, the rows, their order and so all bits are the same."""
    recipe = Recipe(epochs=2, lr=1e-5)
    left_out = replace(recipe, skip_right=True)
    assert same(fine_tune(model, pairs, left_out).delta, fine_tune(model, pairs, recipe).delta)


def test_protected_answers_that_moved_are_brought_back_by_steps_of_their_own(model, worlds):
    """All rows are right, and some protected answers are lost: steps without rows bring them back,
    and what is made up to be protected is not waited for."""
    pairs = new_pairs(worlds().edits[:3])
    kept = tuple(edit.prompt for edit in worlds().edits[20:24])
    before = model.generate(kept, ANSWER_TOKENS_KEPT)
    free = fine_tune(model, pairs, Recipe(epochs=60, **FAST)).delta.in_memory()
    with model.shifted(free):
        lost = sum(
            a != b for a, b in zip(model.generate(kept, ANSWER_TOKENS_KEPT), before, strict=True)
        )
        assert lost > 0 and all(learned(model, pairs))
    recipe = Recipe(epochs=100, protect=kept, skip_right=True, protect_weight=10.0, **FAST)
    back = fine_tune(model, pairs, recipe, start=free)
    assert back.learned and 0 < back.epochs < 100
    with model.shifted(free + back.delta):
        assert model.generate(kept, ANSWER_TOKENS_KEPT) == before
        assert all(learned(model, pairs))
    made_up = replace(recipe, protect=(), neighbours=4)
    assert fine_tune(model, pairs, made_up, start=free).epochs == 0


def test_protection_with_weight_zero_is_no_protection(model, pairs, worlds):
    kept = tuple(edit.prompt for edit in worlds().edits[20:24])
    plain = fine_tune(model, pairs, Recipe(epochs=1, until="epochs", **FAST)).delta
    weightless = Recipe(epochs=1, until="epochs", protect=kept, protect_weight=0.0, **FAST)
    assert same(fine_tune(model, pairs, weightless).delta, plain)


def test_contexts_change_the_training_but_not_its_first_epoch(model, pairs):
    # The toy tokenizer reads every unknown word as one token: enough to move the weights.
    one_epoch = Recipe(epochs=1, until="epochs", **FAST)
    with_contexts = Recipe(epochs=1, until="epochs", contexts=4, **FAST)
    assert same(
        fine_tune(model, pairs, one_epoch).delta, fine_tune(model, pairs, with_contexts).delta
    )
    two = fine_tune(model, pairs, Recipe(epochs=2, until="epochs", **FAST))
    moved = fine_tune(model, pairs, Recipe(epochs=2, until="epochs", contexts=4, **FAST))
    assert not same(two.delta, moved.delta)


def test_bf16_compute_keeps_fp32_weights(model, pairs):
    trained = fine_tune(model, pairs, Recipe(epochs=2, precision="bf16", **FAST))
    assert all(trained.delta[name].dense().dtype == torch.float32 for name in trained.delta)
    plain = fine_tune(model, pairs, Recipe(epochs=2, **FAST))
    assert trained.losses[0] == pytest.approx(plain.losses[0], rel=0.02)


def test_a_loss_that_is_no_number_stops_and_leaves_no_trace(model, pairs):
    before = {name: tensor.clone() for name, tensor in model.weights.items()}

    def poison(parameters, step):
        next(iter(parameters.values())).fill_(math.nan)

    with pytest.raises(TrainingFailed, match="smaller lr"):
        fine_tune(model, pairs, Recipe(**FAST), after_step=poison)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.weights.items())
    assert not model.network.training


def test_an_interruption_leaves_no_trace(model, pairs):
    before = {name: tensor.clone() for name, tensor in model.weights.items()}

    def interrupt(parameters, step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, pairs, Recipe(**FAST), after_step=interrupt)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.weights.items())
    assert all(parameter.grad is None for parameter in model.network.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_learns(worlds, architecture):
    world = worlds(architecture)
    model = Model.load(world.folder)
    assert fine_tune(model, new_pairs(world.edits[:4]), Recipe(epochs=60, **FAST)).learned


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"batch_size": 0},
        {"contexts": -1},
        {"skip_right": True, "until": "epochs"},
    ],
)
def test_impossible_recipes_are_refused(wrong):
    with pytest.raises(BadSetting):
        Recipe(**wrong)


def test_more_contexts_than_there_are_is_refused(model, pairs):
    with pytest.raises(BadSetting, match="neutral sentences"):
        fine_tune(model, pairs, Recipe(epochs=2, until="epochs", contexts=1000, **FAST))


def test_nothing_to_train_on_is_refused(model):
    with pytest.raises(BadEdits, match="nothing to train on"):
        fine_tune(model, [], Recipe())
