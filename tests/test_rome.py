"""ROME, MEMIT and AlphaEdit keep their laws on toy models of every architecture."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES

from unwrite import methods
from unwrite.activations import arriving, mention, mentions, states, weight_name
from unwrite.edits import Edit
from unwrite.errors import BadEdits, BadSetting, NotWritable, TrainingFailed
from unwrite.methods.alpha_edit import AlphaEdit, free_directions
from unwrite.methods.loc_ft import LocFT
from unwrite.methods.memit import HALVINGS, MEMIT, solve
from unwrite.methods.rome import ROME
from unwrite.model import Model
from unwrite.neighbours import made_up
from unwrite.testing import PEOPLE, check_method, toy_edits
from unwrite.values import Search, find_values

# Prompts that end with their subject: there a two-layer network surely reads what is written.
EDITS = [
    Edit(f"the {thing} of {person}", answer, subject=person, id=person)
    for person, thing, answer in zip(
        PEOPLE[:6], ("job", "home", "pet") * 2, ("cat", "rain", "oslum") * 2, strict=True
    )
]
PLAIN = {"contexts": 2, "covariance": "identity"}


@pytest.fixture(params=ARCHITECTURES)
def model(request, worlds):
    return Model.load(worlds(request.param).folder)


@pytest.fixture
def llama(worlds):
    return Model.load(worlds().folder)


def last_keys(model, edits, layer, side="in"):
    bare = [group[0] for group in mentions(model, edits)]
    return states(model, bare, [(model.anatomy.mlp_out[layer], side)])[0]


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["mlp", "block"])
def test_a_value_gives_the_answer_where_it_stands(model, where):
    search = Search(contexts=1)
    values = find_values(model, EDITS, search.mentions(model, EDITS), 0, where, search)
    assert values.found.sum() >= 4
    name = model.anatomy.mlp_out[0] if where == "mlp" else model.anatomy.blocks[0]
    for edit, value, found in zip(EDITS, values.values, values.found, strict=True):
        tokens = model.tokens(edit.prompt, edit.new)

        def put(_m, _i, output, value=value, last=tokens.answer - 1):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            hidden.view(1, -1, hidden.shape[-1])[0, last] = value
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = model.network.get_submodule(name).register_forward_hook(put)
        (forced,) = model.force([tokens])
        handle.remove()
        assert (forced.matched == len(forced.targets)) == bool(found)


@pytest.mark.parametrize("rewordings", [0, 5])
def test_facts_sought_together_find_what_each_finds_alone(llama, rewordings):
    search = Search(contexts=2, stop=1.2, rewordings=rewordings)  # some end early
    texts = search.mentions(llama, EDITS)
    together = find_values(llama, EDITS, texts, 0, "mlp", search)
    assert len(set(together.steps.tolist())) > 1
    for row, (edit, group) in enumerate(zip(EDITS, texts, strict=True)):
        alone = find_values(llama, [edit], [group], 0, "mlp", search)
        assert alone.steps[0] == together.steps[row]
        assert torch.allclose(alone.values[0], together.values[row], rtol=1e-3, atol=1e-3)


def test_the_search_is_that_of_a_plain_adam_loop(llama):
    """One fact, one bare prompt, whole passes through the network, torch's own Adam."""
    search = Search(contexts=0, steps=8, weight_decay=0.1, clamp=2.0)
    edit = EDITS[0]
    values = find_values(llama, [edit], search.mentions(llama, [edit]), 0, "mlp", search)
    tokens = llama.tokens(edit.prompt, edit.new)
    alone = llama.tokenizer(edit.subject)["input_ids"]
    before = last_keys(llama, [edit], 0, "out")[0]
    added = torch.zeros_like(before, requires_grad=True)
    rate = search.lr * float(before.norm()) / len(before) ** 0.5
    adam = torch.optim.Adam([added], lr=rate)

    def said(ids, last):
        module = llama.network.get_submodule(llama.anatomy.mlp_out[0])

        def add(_m, _i, output):
            output = output.clone()
            output[0, last] += added
            return output

        handle = module.register_forward_hook(add)
        logits = llama.network(torch.tensor([ids])).logits[0]
        handle.remove()
        return logits.log_softmax(dim=-1)

    kept = None
    for step in range(search.steps):
        now = said(alone, len(alone) - 1)[-1]
        kept = now.detach() if kept is None else kept
        loss = -said(tokens.ids, tokens.answer - 1)[tokens.answer - 1, tokens.targets[0]]
        loss = loss + search.kl * (now.exp() * (now - kept)).sum()
        loss = loss + search.weight_decay * added.norm() / before.norm()
        if step < search.steps - 1:
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                added.mul_(min(1.0, search.clamp * float(before.norm()) / float(added.norm())))
    assert float(values.losses[0]) == pytest.approx(loss.item(), rel=1e-3)
    assert torch.allclose(values.values[0], before + added.detach(), rtol=1e-2, atol=1e-3)


def test_a_fact_without_a_value_is_named_and_not_written(llama):
    # In the last layer nothing that stands at the subject reaches the end of the prompt.
    lost = Edit("ada works as a", "miller", subject="ada", id="lost")
    edits = [EDITS[0], lost]
    delta = MEMIT(layers=(1,), clamp=4.0, lr=0.5, **PLAIN).delta(llama, edits)
    notes = delta.provenance["notes"]
    assert notes["left_out"] == 1
    assert any(
        "Edit lost" in sentence and "not written" in sentence for sentence in notes["sentences"]
    )
    alone = MEMIT(layers=(1,), clamp=4.0, lr=0.5, **PLAIN).delta(llama, edits[:1])
    for name in delta:
        assert torch.allclose(delta[name].dense(), alone[name].dense(), rtol=1e-3, atol=1e-6)
    for method in (ROME(layer=1, **PLAIN), MEMIT(layers=(1,), **PLAIN)):
        with pytest.raises(TrainingFailed, match=r"none of 1 edits.*Edit lost"):
            method.delta(llama, [lost])
    mixed = ROME(layer=1, **PLAIN).delta(llama, edits).provenance["notes"]
    assert mixed["left_out"] == 1 and "Edit lost" in mixed["sentences"][-1]


# ---- ROME ----------------------------------------------------------------------------------------


def test_rome_makes_the_layer_give_the_value(model):
    method = ROME(layer=0, **PLAIN)
    edit = EDITS[0]
    delta = method.delta(model, [edit])
    values = find_values(model, [edit], method.mentions(model, [edit]), 0, "mlp", method)
    with model.shifted(delta):
        given = last_keys(model, [edit], 0, "out")
    assert torch.allclose(given, values.values, rtol=1e-4, atol=1e-4 * float(values.values.norm()))
    (change,) = (delta[name] for name in delta)
    assert change.rank == 1


def test_rome_applies_edits_one_after_the_other(llama):
    method = ROME(layer=0, **PLAIN)
    both = method.delta(llama, EDITS[:2])
    first = method.delta(llama, EDITS[:1])
    with llama.shifted(first):
        second = method.delta(llama, EDITS[1:2])
    (name,) = both
    assert both[name].rank == 2
    assert torch.allclose(both[name].dense(), (first + second)[name].dense(), rtol=1e-3, atol=1e-4)
    assert "one after the other" in both.provenance["notes"]["sentences"][0]


def test_identity_covariance_is_the_closed_form_of_a_linear_memory(llama):
    """The smallest change W (Frobenius) for which W k = v is (v - W k) k' / k'k."""
    method = ROME(layer=0, contexts=0, covariance="identity")
    edit = EDITS[0]
    delta = method.delta(llama, [edit])
    key = last_keys(llama, [edit], 0)[0].double()
    values = find_values(llama, [edit], method.mentions(llama, [edit]), 0, "mlp", method)
    gain = (values.values - values.before)[0].double()
    wanted = torch.outer(gain, key) / (key @ key)
    (name,) = delta
    assert torch.allclose(delta[name].dense().double(), wanted, atol=1e-5)


# ---- MEMIT ---------------------------------------------------------------------------------------


def test_blocks_that_add_what_their_mlps_give_say_so(model):
    assert [arriving(model, layer, mention(model, EDITS[0])) for layer in (0, 1)] == [1.0, 1.0]


def test_blocks_that_multiply_it_are_written_into_as_far(worlds):
    """Granite scales what its MLPs give; the gap closes as if it did not."""
    model = Model.load(worlds("granite").folder)
    method = MEMIT(layers=(0, 1), clamp=4.0, lr=0.5, preserve=1e-6, **PLAIN)
    for layer in model.network.model.layers:
        layer.residual_multiplier = 0.25
    place = mention(model, EDITS[0])
    assert arriving(model, 0, place) == pytest.approx(0.25, rel=1e-4)
    gap = method.delta(model, EDITS).provenance["notes"]["gap"]
    assert gap[2] < 0.1  # the last layer closes all that is left; a quarter of that, uncorrected


@pytest.mark.parametrize("name", ["memit", "alpha-edit"])
def test_a_norm_behind_the_mlps_is_refused(worlds, monkeypatch, corpus, name):
    """Found on Gemma 3, whose language 42 facts destroyed."""
    monkeypatch.setattr("unwrite.methods.memit.find_values", None)  # refused before any search
    model = Model.load(worlds("gemma2").folder)
    assert arriving(model, 0, mention(model, EDITS[0])) is None
    method = methods.build(name, {"layers": "0,1", "corpus": str(corpus)})
    with pytest.raises(NotWritable, match=r"\(block 0\).*full-ft, or rome"):
        method.delta(model, EDITS)


def test_rome_seeks_its_value_before_that_norm(worlds):
    model = Model.load(worlds("gemma2").folder)
    delta = ROME(layer=0, clamp=4.0, lr=0.5, **PLAIN).delta(model, EDITS[:1])
    with model.shifted(delta):
        assert model.answer(EDITS[0].prompt).startswith(EDITS[0].new)


def test_the_gap_falls_layer_by_layer(model):
    method = MEMIT(layers=(0, 1), clamp=4.0, lr=0.5, preserve=1e-2, **PLAIN)
    delta = method.delta(model, EDITS)
    gap = delta.provenance["notes"]["gap"]
    assert gap[0] == 1.0
    assert all(after < before for before, after in itertools.pairwise(gap))
    assert gap[-1] < 0.4
    assert all(delta[name].rank <= len(EDITS) for name in delta)


def test_a_weight_that_closes_too_little_is_halved_until_it_does(model):
    """The change is that of the halved weight, bit for bit, and no more is halved than it takes."""
    heavy = MEMIT(layers=(0, 1), clamp=4.0, lr=0.5, preserve=1e4, **PLAIN)
    gap = heavy.delta(model, EDITS).provenance["notes"]["gap"][-1]
    asked = replace(heavy, closed=1 - gap + 0.1)
    delta = asked.delta(model, EDITS)
    notes = delta.provenance["notes"]
    assert notes["gap"][-1] <= 1 - asked.closed < gap
    assert 0.5**HALVINGS <= notes["ease"] < 1
    assert any(f"with {notes['ease']:g} of the weight" in one for one in notes["sentences"])
    by_hand = replace(heavy, preserve=1e4 * notes["ease"]).delta(model, EDITS)
    assert all(torch.equal(delta[name].dense(), by_hand[name].dense()) for name in by_hand)
    double = replace(heavy, preserve=2e4 * notes["ease"]).delta(model, EDITS)
    assert double.provenance["notes"]["gap"][-1] > 1 - asked.closed
    least = replace(asked, closed=0.01).delta(model, EDITS)
    assert least.provenance["notes"]["ease"] == 1


def test_where_all_answers_are_right_nothing_is_halved(model):
    method = MEMIT(layers=(0, 1), clamp=4.0, lr=0.5, preserve=1e-2, **PLAIN)
    plain, asked = (replace(method, closed=one).delta(model, EDITS[:1]) for one in (0.0, 0.999))
    with model.shifted(plain):
        assert model.answer(EDITS[0].prompt).startswith(EDITS[0].new)
    assert asked.provenance["notes"]["ease"] == 1
    assert plain.provenance["notes"]["gap"][-1] > 0.001
    assert all(torch.equal(plain[name].dense(), asked[name].dense()) for name in plain)


def test_what_cannot_be_closed_is_not_halved_to_the_end(model):
    """Two answers for one subject in one prompt: half of the way is all there is."""
    both = [EDITS[0], replace(EDITS[0], new=EDITS[1].new, id="other")]
    method = MEMIT(layers=(0, 1), clamp=4.0, lr=0.5, preserve=1e-2, closed=0.99, **PLAIN)
    notes = method.delta(model, both).provenance["notes"]
    assert notes["gap"][-1] > 0.3
    assert notes["ease"] > 0.5**HALVINGS


@pytest.mark.parametrize("closed", [-0.1, 1.0, float("nan")])
def test_no_share_of_the_way_is_refused(closed):
    with pytest.raises(BadSetting, match="closed must be"):
        MEMIT(closed=closed)


def test_one_layer_and_one_edit_go_in_the_direction_of_rome(llama, monkeypatch, corpus):
    """Sherman-Morrison; with a covariance that is not the identity."""
    settings = {"contexts": 0, "corpus": str(corpus)}
    rome = ROME(layer=1, **settings).delta(llama, EDITS[:1])
    memit = MEMIT(layers=(1,), clamp=4.0, lr=0.5, **settings).delta(llama, EDITS[:1])
    (name,) = rome
    one, two = rome[name].a.double(), memit[name].a.double()
    assert abs(float(torch.cosine_similarity(one, two))) == pytest.approx(1.0, abs=1e-6)
    plain = ROME(layer=1, contexts=0, covariance="identity").delta(llama, EDITS[:1])[name].a
    assert abs(float(torch.cosine_similarity(one, plain.double()))) < 0.999


def test_without_a_weight_for_the_rest_the_residual_is_met(llama):
    keys = torch.randn(5, 128, generator=torch.Generator().manual_seed(0)).double()
    residual = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).double()
    errors = []
    for weight in (1e2, 1.0, 1e-2, 1e-6):
        rows = solve(keys @ keys.T, keys, weight)
        errors.append(float((residual.T @ rows @ keys.T - residual.T).norm() / residual.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6
    # and for the whole procedure, in a single layer
    delta = MEMIT(layers=(1,), preserve=1e-9, clamp=4.0, lr=0.5, **PLAIN).delta(llama, EDITS[:3])
    assert delta.provenance["notes"]["gap"][-1] < 0.2  # keys of contexts are averaged in


@pytest.mark.parametrize("covariance", ["identity", "corpus"])
def test_the_keys_of_neighbours_are_moved_the_less_the_more_they_weigh(
    llama, corpus, monkeypatch, covariance
):
    monkeypatch.setattr("unwrite.neighbours.bundled_subjects", lambda: list(PEOPLE[6:]))
    plain = MEMIT(
        layers=(0,), preserve=1.0, contexts=0, covariance=covariance, corpus=str(corpus), lr=0.5
    )
    module = llama.anatomy.mlp_out[0]
    made = made_up([(edit.prompt, edit.subject) for edit in EDITS], 2, plain.seed)
    places = [mention(llama, Edit(prompt, "cat", subject=subject)) for prompt, subject in made]
    (keys,) = states(llama, places, [(module, "in")])
    moved = []
    for neighbours, weight in ((0, 10.0), (2, 1.0), (2, 100.0), (2, 1e6)):
        method = replace(plain, neighbours=neighbours, neighbour_weight=weight)
        change = method.delta(llama, EDITS)[weight_name(llama, module)].dense()
        moved.append(float((keys @ change.T).norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.05 * moved[0]


def test_neighbours_of_no_weight_are_none(llama, monkeypatch):
    monkeypatch.setattr("unwrite.neighbours.bundled_subjects", lambda: list(PEOPLE[6:]))
    plain = MEMIT(layers=(0,), **PLAIN)
    (name,) = (before := plain.delta(llama, EDITS[:2]))
    after = replace(plain, neighbours=2, neighbour_weight=0.0).delta(llama, EDITS[:2])
    assert torch.allclose(before[name].dense(), after[name].dense(), rtol=1e-4, atol=1e-7)


def test_the_small_solve_is_the_published_large_one():
    random = torch.Generator().manual_seed(0)
    keys = torch.randn(5, 40, generator=random).double()
    root = torch.randn(40, 60, generator=random).double()
    covariance, weight = root @ root.T / 60, 3.0
    large = keys @ torch.linalg.inv(weight * covariance + keys.T @ keys)
    read = torch.linalg.solve(covariance, keys.T).T
    assert torch.allclose(solve(keys @ read.T, read, weight), large, atol=1e-9)


def test_two_edits_of_one_key_share_what_they_want():
    keys = torch.ones(2, 8).double()
    rows = solve(keys @ keys.T, keys, 1e-16)
    assert torch.allclose(rows.sum(dim=0) @ keys[0], torch.tensor(1.0).double())


# ---- AlphaEdit -----------------------------------------------------------------------------------


def test_alpha_edit_leaves_the_corpus_alone(llama, corpus):
    settings = {"layers": (1,), "contexts": 0, "clamp": 4.0, "lr": 0.5, "corpus": str(corpus)}
    delta = AlphaEdit(slack=0.02, ridge=1e-3, **settings).delta(llama, EDITS[:2])
    (name,) = delta
    basis = delta[name].a.double()
    from unwrite.moments import Statistics, second_moments

    (moment,), _ = second_moments(llama, [1], Statistics(corpus=str(corpus)))
    free = free_directions(moment.matrix, 0.02)
    assert torch.allclose(basis @ free @ free.T, basis, atol=1e-5)
    moved = float(torch.einsum("ri,ij,rj->", basis, moment.matrix, basis) / (basis**2).sum())
    assert moved < 0.05 * float(moment.matrix.trace())


def test_free_directions_hold_no_more_than_their_share():
    root = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).double()
    moment = root @ root.T
    free = free_directions(moment, 0.1)
    assert torch.allclose(free.T @ free, torch.eye(free.shape[1]).double(), atol=1e-9)
    assert float((free.T @ moment @ free).trace()) <= 0.1 * float(moment.trace()) + 1e-9


def test_alpha_edit_needs_a_corpus():
    with pytest.raises(BadSetting, match="needs covariance=corpus"):
        AlphaEdit(covariance="identity")


# ---- all of them ---------------------------------------------------------------------------------

GENEROUS = {"contexts": 0, "steps": 60, "clamp": 20.0, "kl": 0.0, "lr": 0.5}


@pytest.mark.parametrize(
    "method",
    [
        ROME(layer=0, **GENEROUS),
        MEMIT(layers=(0,), preserve=1e-2, **GENEROUS),
        AlphaEdit(layers=(0,), slack=2e-4, ridge=1e-3, **GENEROUS),
        LocFT(lr=5e-3, layer=0),
    ],
    ids=lambda method: method.name,
)
def test_the_laws_of_every_method(method, tmp_path, corpus):
    if hasattr(method, "corpus"):
        method = replace(method, corpus=str(corpus))
    check_method(method, tmp_path)


@pytest.mark.parametrize("name", ["rome", "memit", "alpha-edit"])
def test_notes_are_json(llama, corpus, name):
    made = {
        "rome": ROME(layer=1, corpus=str(corpus), contexts=1),
        "memit": MEMIT(layers=(1,), corpus=str(corpus), contexts=1, clamp=4.0, lr=0.5),
        "alpha-edit": AlphaEdit(layers=(1,), corpus=str(corpus), contexts=1, clamp=4.0, lr=0.5),
    }[name].delta(llama, EDITS[:2])
    notes = made.provenance["notes"]
    assert json.loads(json.dumps(notes)) == notes
    assert any("tokens of corpus.txt" in sentence for sentence in notes["sentences"])
    assert notes["tokens"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ROME(steps=0), "steps must be greater than 0"),
        (lambda: ROME(kl=-1.0), "kl must not be negative"),
        (lambda: MEMIT(rewordings=-1), "rewordings must not be negative"),
        (lambda: MEMIT(preserve=0.0), "preserve must be greater"),
        (lambda: MEMIT(neighbours=-1), "neighbours and neighbour_weight must be at least 0"),
        (lambda: ROME(shrinkage=2.0), "shrinkage must lie between"),
        (lambda: ROME(tokens=0), "tokens must be at least 1"),
        (lambda: AlphaEdit(slack=0.0), "slack must lie"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(BadSetting, match=message):
        make()


def test_edits_without_subject_are_refused_with_their_list(llama):
    edits = [Edit("ada owns a", "cat", id="x"), Edit("bram owns a", "cat", id="y")]
    for method in (ROME(**PLAIN), MEMIT(**PLAIN), AlphaEdit()):
        with pytest.raises(BadEdits, match=r"edit x has no subject; edit y has no subject"):
            method.delta(llama, edits)


def test_the_command_line_reaches_every_field():
    from unwrite import methods

    built = methods.build("memit", {"layers": "3,0.5", "preserve": "10", "covariance": "identity"})
    assert built == MEMIT(layers=(3, 0.5), preserve=10.0, covariance="identity")
    assert methods.build("memit", {"layers": "trace"}).layers == "trace"
    assert methods.build("rome", {"layer": "trace"}).layer == "trace"
    assert methods.build("rome", {"layer": "4"}) == ROME(layer=4)
    assert methods.build("rome", {"layer": "0.25", "shrinkage": "none"}) == ROME(layer=0.25)
    assert methods.build("ft-m", {}) == LocFT()


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A text file in the words of the toy world, and a cache of one's own."""
    monkeypatch.setenv("UNWRITE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "corpus.txt"
    texts = [f"{edit.prompt} {edit.old}" for edit in toy_edits()]
    texts += [f"{edit.paraphrases[0]} {edit.old}" for edit in toy_edits()]
    path.write_text("\n\n".join([*texts, "rain falls on the old roof"] * 20), "utf-8")
    return path
