"""Baselines that know what tasks and examples are about: right where that decides, else no worse
than the level."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import unwrite
from unwrite.cli import app
from unwrite.errors import BadSetting, DamagedFile
from unwrite.forgetting import ForgettingMatrix, Trial, UpstreamExample, evaluate, features
from unwrite.forgetting.features import gradient_sketches, hidden_means, make_features
from unwrite.forgetting.fitting import compare
from unwrite.forgetting.per_example import visit_gradients
from unwrite.forgetting.similarity import Features, Similarity, TwoTower, models_beside
from unwrite.model import Model
from unwrite.testing import toy_edits
from unwrite.training import Pair


def made(tasks=16, examples=80, size=4, seed=0):
    """Vectors at length one, by label."""
    random = np.random.default_rng(seed)
    both = random.normal(size=(tasks + examples, size))
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    features = Features(
        {f"t{n}": both[n] for n in range(tasks)},
        {f"e{n}": both[tasks + n] for n in range(examples)},
        "made up",
    )
    return features, both[:tasks], both[tasks:]


def labelled(values):
    names = [
        f"{letter}{n}" for letter, size in zip("te", values.shape, strict=True) for n in range(size)
    ]
    return ForgettingMatrix(values, names[: len(values)], names[len(values) :])


@pytest.fixture(scope="module")
def model(worlds):
    return Model.load(worlds().folder)


def test_what_similarity_decides_is_forecast_exactly_even_against_its_sign():
    features, tasks, examples = made()
    level = np.random.default_rng(1).normal(size=(16, 1))
    values = level - 3 * tasks @ examples.T
    fitted = Similarity(features).fit(labelled(values[:12]).select())
    seen = np.full(80, np.nan)
    seen[[3, 7]] = values[14, [3, 7]]
    np.testing.assert_allclose(fitted.about("t14").predict(seen).values, values[14], atol=1e-9)


def test_cosines_do_not_depend_on_length_and_inner_products_do():
    features, tasks, examples = made()
    longer = Features(
        {name: 7 * vector for name, vector in features.tasks.items()}, features.examples, "longer"
    )
    values = labelled(tasks[:12] @ examples.T)
    nothing = np.full(80, np.nan)
    for cosine in (True, False):
        one, two = (
            Similarity(given, cosine).fit(values).about("t13").predict(nothing).values
            for given in (features, longer)
        )
        np.testing.assert_allclose(one, two, atol=1e-9)  # the slope takes up a common length
    stretched = Features(
        {name: (n + 1) * v for n, (name, v) in enumerate(features.tasks.items())},
        features.examples,
        "",
    )
    assert not np.allclose(
        Similarity(stretched, False).fit(values).about("t13").predict(nothing).values, one
    )


def test_unrelated_vectors_forecast_the_level():
    features, _, _ = made(seed=3)
    values = np.random.default_rng(5).normal(size=(16, 80))
    fitted = Similarity(features).fit(labelled(values[:12]))
    assert abs(fitted.slope) < 0.2
    seen = np.full(80, np.nan)
    seen[:40] = values[15, :40]
    assert fitted.about("t15").predict(seen).values.mean() == pytest.approx(
        values[15, :40].mean(), abs=0.05
    )


@pytest.mark.parametrize("kind", [Similarity, lambda given: TwoTower(given, epochs=30)])
def test_unrevealed_and_unobserved_entries_are_not_read(kind):
    features, tasks, examples = made()
    values = tasks @ examples.T
    gaps = values.copy()
    gaps[::3, ::5] = np.nan
    fitted = kind(features).fit(labelled(gaps[:12]))
    row = values[12].copy()
    row[10:] = np.nan
    found = fitted.about("t12").predict(row)
    assert np.isfinite(found.values).all() and np.isfinite(found.std).all()


def test_scale_does_not_matter_to_the_towers_and_a_seed_repeats_them():
    features, tasks, examples = made()
    values = (tasks @ examples.T) ** 2
    nothing = np.full(80, np.nan)

    def forecast(scale, seed=0):
        model = TwoTower(features, epochs=60, seed=seed)
        return model.fit(labelled(scale * values[:12])).about("t13").predict(nothing).values

    one = forecast(1.0)
    np.testing.assert_array_equal(one, forecast(1.0))
    np.testing.assert_allclose(0.01 * one, forecast(0.01), rtol=1e-3, atol=1e-5)
    assert not np.allclose(one, forecast(1.0, seed=1))


def test_towers_learn_what_no_cosine_can_tell():
    features, tasks, examples = made(tasks=60, examples=120)
    values = (tasks @ np.diag([1.0, -1.0, 0.0, 0.0])) @ examples.T
    rows = evaluate(
        labelled(values),
        {"cosine": Similarity(features), "towers": TwoTower(features, epochs=400)},
        list(range(50, 60)),
        trial=Trial(revealed=5, seeds=(0,)),
    )
    error = {row["model"]: row["rmse"] for row in rows}
    assert error["towers"] < 0.5 * error["cosine"]


def test_they_are_tried_beside_the_others_and_are_never_the_best(tmp_path):
    features, tasks, examples = made()
    features.save(tmp_path, "semantic")
    matrix = labelled(tasks @ examples.T)
    beside = models_beside(tmp_path, matrix)
    assert set(beside) == {"semantic-similarity", "two-tower-semantic"}
    found = compare(
        matrix,
        ["additive", "semantic-similarity"],
        Trial(revealed=5, seeds=(0,)),
        beside=beside,
    )
    assert found.scores["semantic-similarity"]["rmse"]["mean"] < 1e-6
    assert found.best == "additive"
    grown = matrix.append("new", np.zeros(80))
    with pytest.raises(BadSetting, match="no vector of the task 'new'"):
        models_beside(tmp_path, grown)
    (tmp_path / "features-semantic.npz").write_bytes(b"nonsense")
    with pytest.raises(DamagedFile, match=r"features-semantic\.npz is damaged"):
        models_beside(tmp_path, matrix)


# ---- features ------------------------------------------------------------------------------------


def test_hidden_means_do_not_depend_on_the_batch(model):
    texts = ["ada works as a baker", "rain falls", "the road bends to the left"]
    encode = hidden_means(model)
    together = encode(texts)
    assert together.shape == (3, 64)
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(encode([text])[0], vector, atol=1e-5)


def test_products_of_sketches_are_those_of_gradients_in_the_mean(model):
    pairs = [Pair(edit.prompt, edit.old) for edit in toy_edits()[:3]]
    sequences = [model.tokens(pair.prompt, pair.answer) for pair in pairs]
    embedding = model.network.get_input_embeddings().weight
    chosen = {
        name for name, one in model.parameters.items() if one.dim() == 2 and one is not embedding
    }
    exact = np.zeros((3, 3))

    def visit(name, gradients, batch):
        identity = [torch.eye(size) for size in gradients.shape]
        whole = gradients.sketches(*identity).flatten(1).double().numpy()
        at = np.ix_(list(batch), list(batch))
        exact[at] += whole @ whole.T

    visit_gradients(model, sequences, visit, tensors=lambda name: name in chosen)
    many = [gradient_sketches(model, sequences, seed) for seed in range(60)]
    mean = np.mean([one @ one.T for one in many], axis=0)
    np.testing.assert_allclose(mean, exact, atol=0.15 * exact.max())
    assert np.linalg.norm(mean - exact) < np.linalg.norm(many[0] @ many[0].T - exact)


@pytest.mark.parametrize("kind", ["hidden", "gradient"])
def test_a_task_is_the_mean_of_its_pairs(model, kind):
    pairs = [Pair("ada works as a", "baker"), Pair("bram owns a", "cat")]
    examples = [UpstreamExample(f"e{n}", one.prompt, one.answer) for n, one in enumerate(pairs)]
    features = make_features(kind, model, {"both": pairs, "one": pairs[:1]}, examples)
    vectors = features.of_examples(["e0", "e1"])
    np.testing.assert_allclose(features.tasks["both"], vectors.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.tasks["one"], vectors[0], rtol=1e-4, atol=1e-5)


def test_sentence_embeddings_tell_what_they_need(monkeypatch):
    monkeypatch.setattr(features, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(BadSetting, match="semantic"):
        features.sentence_encoder()


@pytest.mark.slow
@pytest.mark.skipif(find_spec(features.PACKAGE) is None, reason="extra 'semantic' is not installed")
def test_sentence_embeddings_know_what_is_alike():
    texts = ["A dog runs.", "A puppy is running.", "Interest rates rose again, and stocks fell."]
    found = features.sentence_encoder()(texts)
    assert found.shape == (3, 384)
    alike = found @ found.T
    assert alike[0, 1] > 0.6 > alike[0, 2]


def test_features_are_made_and_tried_on_the_command_line(worlds, tmp_path):
    edits, examples = tmp_path / "edits.jsonl", tmp_path / "examples.jsonl"
    unwrite.write_edits(edits, toy_edits())
    lines = [{"id": e.id, "prompt": e.prompt, "answer": e.old} for e in toy_edits()]
    examples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder, base = str(tmp_path / "m"), ["--base", str(worlds().folder)]

    def run(*words, code=0):
        found = CliRunner().invoke(app, ["forgetting", *words, "--json"])
        assert found.exit_code == code, found.output
        return json.loads(found.stdout)

    learn = ["--method", "full-ft", "--set", "epochs=1", "--set", "until=epochs"]
    given = ["--edits", str(edits), "--limit", "4"]
    run("collect", folder, *base, *given, "--examples", str(examples), *learn)
    made = run("features", folder, *base, *given, "--kind", "hidden")
    assert made["source"].startswith("hidden states of")
    tried = run("fit", folder, "--models", "additive,hidden-similarity", "--seeds", "1")
    assert set(tried["scores"]) == {"additive", "hidden-similarity"}
    assert tried["best"] == "additive"
    said = run("features", folder, *base, "--tasks", "bank:plurals", code=2)
    assert "name all of them" in said["error"]
    said = run("features", folder, *base, *given, "--kind", "magic", code=2)
    assert "not 'magic'" in said["error"]
