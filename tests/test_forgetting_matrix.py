"""The forgetting matrix: what may be in it, how it lies on disk, what its rank profile says."""

import json
from itertools import pairwise

import numpy as np
import pytest

from unwrite.errors import BadSetting, DamagedFile
from unwrite.forgetting import ForgettingMatrix


def labels(kind, count):
    return tuple(f"{kind}-{number}" for number in range(count))


def matrix(values, **rest):
    values = np.asarray(values, dtype=float)
    return ForgettingMatrix(
        values, labels("task", values.shape[0]), labels("example", values.shape[1]), **rest
    )


@pytest.fixture
def random():
    return np.random.default_rng(0)


@pytest.mark.parametrize("exact_in_single", [True, False])
def test_saving_and_loading_loses_nothing(random, tmp_path, exact_in_single):
    values = random.normal(size=(3, 7))
    if exact_in_single:
        values = values.astype(np.float32).astype(float)
    values[1, 2] = np.nan
    saved = matrix(
        values,
        provenance={"base": "toy", "seed": 3},
        task_details={"task-0": {"pairs": 4}},
        example_details={"example-1": {"prompt": "where?", "answer": "here"}},
    )
    saved.save(tmp_path / "new" / "folder")
    loaded = ForgettingMatrix.load(tmp_path / "new" / "folder")
    np.testing.assert_array_equal(loaded.values, saved.values)
    assert (loaded.tasks, loaded.examples) == (saved.tasks, saved.examples)
    assert loaded.provenance == saved.provenance
    assert loaded.task_details["task-0"] == {"pairs": 4}
    assert loaded.example_details["example-1"] == {"prompt": "where?", "answer": "here"}


def test_the_same_matrix_gives_the_same_bytes(random, tmp_path):
    one = matrix(random.normal(size=(2, 3)))
    for name in ("a", "b"):
        one.save(tmp_path / name)
    for file in ("matrix.npz", "tasks.jsonl", "examples.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_row_being_added_when_the_machine_stops_does_no_harm(random, tmp_path):
    """tasks.jsonl is written first: a line without a row is ignored."""
    one = matrix(random.normal(size=(2, 3)))
    one.save(tmp_path)
    old = (tmp_path / "matrix.npz").read_bytes()
    one.append("third", [1.0, 2.0, np.nan]).save(tmp_path)
    (tmp_path / "matrix.npz").write_bytes(old)
    assert ForgettingMatrix.load(tmp_path).tasks == one.tasks


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty"])
def test_damage_is_named(random, tmp_path, damage):
    matrix(random.normal(size=(4, 50))).save(tmp_path)
    file = tmp_path / "matrix.npz"
    content = file.read_bytes()
    middle = len(content) // 3
    file.write_bytes(
        {
            "cut": content[:-40],
            "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            "text": b"not a matrix",
            "empty": b"",
        }[damage]
    )
    with pytest.raises(DamagedFile, match=r"matrix\.npz is damaged"):
        ForgettingMatrix.load(tmp_path)


def test_pickles_are_not_read(tmp_path):
    np.savez(
        tmp_path / "matrix.npz",
        values=np.array([[{"a": 1}]], dtype=object),
        tasks=np.array(json.dumps(["a"])),
        examples=np.array(json.dumps(["b"])),
        provenance=np.array("{}"),
    )
    with pytest.raises(DamagedFile):
        ForgettingMatrix.load(tmp_path)


def test_missing_details_are_damage(random, tmp_path):
    matrix(random.normal(size=(2, 3))).save(tmp_path)
    (tmp_path / "examples.jsonl").write_text('{"example": "example-0"}\n')
    with pytest.raises(DamagedFile, match="example-1"):
        ForgettingMatrix.load(tmp_path)


def test_where_there_is_none(tmp_path):
    with pytest.raises(BadSetting, match="holds no forgetting matrix"):
        ForgettingMatrix.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "tasks", "examples", "said"),
    [
        (np.zeros((2, 3)), ("a", "b"), ("x", "y"), "2 tasks and 2 examples"),
        (np.zeros((2, 1)), ("a", "a"), ("x",), "'a' is in the forgetting matrix twice"),
        (np.zeros((1, 2)), ("a",), ("x", "x"), "'x' is in the forgetting matrix twice"),
        (np.array([[np.inf]]), ("a",), ("x",), "finite numbers"),
    ],
)
def test_what_cannot_be_a_matrix(values, tasks, examples, said):
    with pytest.raises(BadSetting, match=said):
        ForgettingMatrix(values, tasks, examples)


def test_append_refuses_a_row_of_another_length():
    with pytest.raises(BadSetting, match="2 numbers for 3 examples"):
        ForgettingMatrix.empty(["a", "b", "c"]).append("task", [1, 2])


def test_a_matrix_does_not_change_with_the_array_it_was_made_from():
    values = np.zeros((1, 1))
    made = matrix(values)
    values[0, 0] = 1
    assert made.values[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        made.values[0, 0] = 1


def test_select_keeps_labels_values_and_details_together(random):
    one = matrix(random.normal(size=(4, 5)), task_details={"task-2": {"n": 1}})
    part = one.select(tasks=[2, 0], examples=[4, 1])
    assert part.tasks == ("task-2", "task-0")
    assert part.examples == ("example-4", "example-1")
    np.testing.assert_array_equal(part.values, one.values[[2, 0]][:, [4, 1]])
    assert part.task_details == {"task-2": {"n": 1}}


# ---- rank profile --------------------------------------------------------------------------------


def test_explained_variance_never_falls_with_rank_and_ends_at_one(random):
    profile = matrix(random.normal(size=(6, 40)) + 0.3).rank_profile(largest=6)
    ranks = profile["rank"]
    assert all(one <= other + 1e-12 for one, other in pairwise(ranks))
    assert ranks[-1] == pytest.approx(1, abs=1e-12)
    assert ranks[0] < 0.9


def test_exact_rank_is_seen(random):
    values = random.normal(size=(8, 3)) @ random.normal(size=(3, 50))
    ranks = matrix(values).rank_profile()["rank"]
    assert ranks[2] == pytest.approx(1, abs=1e-12)
    assert ranks[1] < 0.99


def test_additive_data_are_explained_by_the_additive_model(random):
    values = random.normal(size=(8, 1)) + random.normal(size=(1, 30))
    profile = matrix(values).rank_profile()
    assert profile["additive"] == pytest.approx(1, abs=1e-12)
    assert profile["task_mean"] < 0.9
    assert profile["example_mean"] < 0.9


def test_the_profile_is_taken_on_what_all_tasks_share(random):
    values = random.normal(size=(5, 9))
    values[2, 3] = np.nan
    with_blank_task = np.vstack([values, np.full(9, np.nan)])
    profile = matrix(with_blank_task).rank_profile()
    assert (profile["tasks"], profile["examples"]) == (5, 8)
    assert profile == matrix(np.delete(values, 3, axis=1)).rank_profile()


def test_equal_values_have_no_r2():
    assert matrix(np.ones((3, 4))).rank_profile()["rank"][0] is None


def test_nothing_in_common_is_said():
    with pytest.raises(BadSetting, match="no rank profile"):
        matrix([[1.0, np.nan], [np.nan, 1.0]]).rank_profile()
