"""Laws of ``Delta``: arithmetic is lazy and exact, saving keeps every bit, undo is exact."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_changes import changes, same_bits, same_change, shapes, strengths, tensors
from safetensors.torch import load_file, save_file

from unwrite.change import Dense, LowRank, Masked, mask
from unwrite.delta import SCRATCH, Delta, Prefix, compose
from unwrite.errors import BadSetting, DamagedFile, TensorMismatch, UnwriteError
from unwrite.tensorfile import tensor_sha256
from unwrite.weights import Weights, fingerprint, save_weights

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
law = settings(max_examples=40, deadline=None)


@st.composite
def states(draw, dtype=None, most_deltas=3):
    """Base weights, and deltas in all encodings that touch some of their tensors."""
    dtype = dtype or draw(st.sampled_from(FLOATS))
    base = {f"t{n}": draw(tensors(shape, dtype)) for n, shape in enumerate(draw(st.lists(shapes)))}
    deltas = []
    for _ in range(draw(st.integers(0, most_deltas))):
        names = draw(st.lists(st.sampled_from(sorted(base)), unique=True)) if base else []
        changed = {name: draw(changes(tuple(base[name].shape))) for name in names}
        deltas.append(Delta.from_changes(changed))
    return Weights.from_tensors(base), deltas


any_delta = states(torch.float32).filter(lambda state: state[1]).map(lambda state: state[1][0])


def state_of(base, deltas):
    return {name: compose(base, deltas, name) for name in base}


def same_states(one, two):
    return one.keys() == two.keys() and all(same_bits(one[name], two[name]) for name in one)


def same_deltas(one, two):
    return list(one) == list(two) and all(same_change(one[name], two[name]) for name in one)


def every_encoding() -> Delta:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(6, 4, generator=generator)
    return Delta.from_changes(
        {
            "dense": Dense(values),
            "low": LowRank(values[:, :2].contiguous(), values[:2].contiguous(), 0.1),
            "masked": mask(values, values > 0.5),
            "none": mask(values, values > 99),
            "scalar": Dense(torch.tensor(0.25)),
            "empty": Dense(torch.empty(0, 3)),
        }
    )


# ---- laziness ----------------------------------------------------------------------------------


def counted(delta):
    """The same delta, and the list of names that were read from it."""
    seen = []

    def read(name):
        seen.append(name)
        return delta[name]

    return Delta(delta, read), seen


def test_arithmetic_reads_nothing_until_asked_and_then_one_tensor():
    one, seen_one = counted(every_encoding())
    two, seen_two = counted(every_encoding())
    made = -(one - 0.5 * two) + Delta.nothing()
    assert set(made) == set(one) and len(made) == 6 and "dense" in made and "x" not in made
    assert repr(made) and made.base is None
    assert seen_one == seen_two == []
    assert made["dense"].dense().equal(-0.5 * every_encoding()["dense"].dense())
    assert seen_one == seen_two == ["dense"]
    assert made["dense"] is not made["dense"]  # nothing was kept


def test_between_reads_nothing_until_asked():
    class Watched(dict):
        def __getitem__(self, name):
            raise AssertionError(f"{name} was read")

    weights = Weights.from_tensors({"x": torch.ones(3)})
    unread = Weights(weights.specs, Watched().__getitem__)
    assert list(Delta.between(unread, unread)) == ["x"]


def test_absence_means_unchanged_and_errors_are_not_absence():
    delta = Delta(["x"], {}.__getitem__)
    assert delta.get("y") is None
    with pytest.raises(KeyError):
        delta.get("x")
    with pytest.raises(KeyError, match=r"^'y'$"):
        delta["y"]


def test_peak_memory_does_not_grow_with_the_model(tmp_path):
    """Difference, sum, saving and composing: four times the tensors, the same peak."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system does not have")
    program = """
import sys
from pathlib import Path
import torch
from unwrite.delta import Delta, compose
from unwrite.tensorfile import TensorSpec
from unwrite.weights import Weights, save_weights

def peak_after(folder, count):
    tensor, other = torch.rand(2, 1024, 1024)
    files = [f"{n % 2}.safetensors" for n in range(count)]
    specs = {str(n): TensorSpec(tensor.dtype, tensor.shape, files[n]) for n in range(count)}
    save_weights(folder / "a", Weights(specs, lambda name: tensor))
    save_weights(folder / "b", Weights(specs, lambda name: other))
    a, b = Weights.from_folder(folder / "a"), Weights.from_folder(folder / "b")
    delta = Delta.between(a, b).save(folder / "d")
    delta = (delta - 0.5 * delta).stored()
    save_weights(folder / "c", a, lambda name: compose(a, [delta], name))
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / tensor.nbytes

folder = Path(sys.argv[1])
small = peak_after(folder / "small", 4)
print(peak_after(folder / "large", 16) - small)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 4  # tensors of 4 MB; the larger model has 12 more


# ---- between -----------------------------------------------------------------------------------


@law
@given(states(torch.float32), st.data())
def test_between_gives_back_what_was_added_when_the_sum_is_exact(state, data):
    base, _ = state
    steps = {  # small whole numbers, so that nothing is rounded
        name: torch.round(data.draw(tensors(base.shape(name)))).clamp(-99, 99) for name in base
    }
    before = Weights.from_tensors({name: torch.round(base[name]) for name in base})
    after = Weights.from_tensors({name: before[name] + steps[name] for name in base})
    delta = Delta.between(before, after)
    assert all(delta[name].dense().equal(steps[name]) for name in base)
    assert all(delta[name].encoding == "dense" for name in base)


@law
@given(states())
def test_no_difference_is_zero(state):
    base, _ = state
    delta = Delta.between(base, base)
    assert all(delta[name].changed == 0 and delta[name].squared_norm == 0 for name in base)


def test_between_refuses_what_it_cannot_do():
    ones, ints = torch.ones(2), torch.tensor([1, 2])
    with pytest.raises(TensorMismatch, match="did the vocabulary grow"):
        Delta.between(
            Weights.from_tensors({"x": torch.ones(2, 2)}),
            Weights.from_tensors({"x": torch.ones(3, 2)}),
        )
    with pytest.raises(TensorMismatch, match="differs in dtype"):
        Delta.between(
            Weights.from_tensors({"x": ones}), Weights.from_tensors({"x": ones.bfloat16()})
        )
    for kind in (torch.float64, torch.float8_e4m3fn):
        weights = Weights.from_tensors({"x": ones.to(kind)})
        with pytest.raises(TensorMismatch, match="Use a checkpoint in fp32, bf16 or fp16"):
            Delta.between(weights, weights)
    before = Weights.from_tensors({"x": ones, "positions": ints})
    assert list(Delta.between(before, before)) == ["x"]
    with pytest.raises(TensorMismatch) as refused:
        Delta.between(before, Weights.from_tensors({"x": ones, "positions": ints + 1}))
    assert str(refused.value) == (
        "The tensor 'positions' (torch.int64) differs between before and after, and only "
        "floating-point tensors can be changed. Give a checkpoint in which it is the same."
    )


def test_where_a_delta_came_from_stays_with_it():
    weights, about = Weights.from_tensors({"x": torch.ones(2)}), {"base": "1" * 64}
    delta = Delta.between(weights, weights, about)
    assert delta.provenance == delta.in_memory().provenance == about


# ---- arithmetic --------------------------------------------------------------------------------


@law
@given(any_delta, strengths)
def test_signs_and_scales(delta, strength):
    opposite = -delta
    assert same_deltas(-opposite, delta)
    scaled = strength * delta
    for name in delta:
        assert same_change(scaled[name], delta[name].scaled(strength))
        assert same_change((delta * strength)[name], scaled[name])


@law
@given(states(torch.float32, most_deltas=2).filter(lambda state: len(state[1]) == 2))
def test_a_sum_has_the_names_of_both_and_commutes(state):
    one, two = state[1]
    total, reverse = one + two, two + one
    assert set(total) == set(one) | set(two) == set(reverse)
    for name in total:
        if name in one and name in two:
            assert same_change(total[name], one[name] + two[name])
        else:
            assert same_change(total[name], one[name] if name in one else two[name])
        assert torch.allclose(total[name].dense(), reverse[name].dense(), atol=1e-4)
        assert same_change((one - two)[name], (one + -two)[name])
    assert same_deltas(one + Delta.nothing(), one)
    assert same_deltas(one.in_memory(), one)


def test_deltas_of_different_bases_cannot_be_added():
    one = Delta.from_changes({}, {"base": "1" * 64, "base_name": "gpt2", "seed": 1, "method": "ft"})
    two = Delta.from_changes({}, {"base": "1" * 64, "base_name": "gpt2", "seed": 2, "method": "ft"})
    same = {"base": "1" * 64, "base_name": "gpt2", "method": "ft"}
    assert (one + two).provenance == (one - 0.5 * two).provenance == same
    assert (one + Delta.nothing()).base == (Delta.nothing() + one).base == one.base
    assert (-one).provenance == one.provenance
    without = Delta.from_changes({}, {"seed": 1, "method": "ft"})
    assert (one + without).provenance == (without + one).provenance == one.provenance
    renamed = Delta.from_changes({}, {"base": "1" * 64, "base_name": "gpt2-copy"})
    assert (one + renamed).provenance == {"base": "1" * 64}
    nameless = Delta.from_changes({}, {"base": "3" * 64})
    with pytest.raises(TensorMismatch, match=r"made for a model \(fingerprint 3333…\), the other"):
        nameless + one
    other = Delta.from_changes({}, {"base": "2" * 64})
    with pytest.raises(TensorMismatch, match=r"made for 'gpt2' \(fingerprint 1111…\), the other"):
        one + other
    with pytest.raises(BadSetting, match="cannot be scaled by nan"):
        one * float("nan")
    with pytest.raises(TypeError):
        one + 1


# ---- states ------------------------------------------------------------------------------------


@law
@given(states())
def test_undo_is_exact_in_any_order(state):
    base, deltas = state
    untouched = {name: base[name].clone() for name in base}
    for size in range(len(deltas) + 1):
        for live in combinations(deltas, size):
            composed = state_of(base, live)
            for name in base:  # the state is what it would be had the others never existed
                total = untouched[name].float()
                named = [delta for delta in live if name in delta]
                for delta in named:
                    total = total + delta[name].dense()
                wanted = total.to(base.dtype(name)) if named else untouched[name]
                assert same_bits(composed[name], wanted)
    assert same_states(state_of(base, []), untouched)
    assert same_states({name: base[name] for name in base}, untouched)


@law
@given(states())
def test_a_state_does_not_depend_on_the_encoding(state):
    base, deltas = state
    plain = [Delta.from_changes({n: Dense(delta[n].dense()) for n in delta}) for delta in deltas]
    assert same_states(state_of(base, deltas), state_of(base, plain))


def test_a_scaled_difference_is_made_in_one_tensor_with_the_bits_of_two():
    draw = torch.Generator().manual_seed(1)
    sides = [Weights.from_tensors({"x": torch.randn(999, generator=draw)}) for _ in range(2)]
    delta = Delta.between(*sides, {"by": "hand"})
    twice = delta.in_memory()["x"].scaled(-0.3).scaled(0.7).dense()
    with patch("unwrite.change._scaled", side_effect=AssertionError("a second tensor")):
        scaled = 0.7 * (-0.3 * delta)
        assert scaled["x"].dense().equal(twice)
        assert (-delta)["x"].dense().equal(-delta["x"].dense())
    assert scaled.provenance == {"by": "hand"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_difference_is_composed_without_being_held_and_to_the_same_bits(dtype):
    draw = torch.Generator().manual_seed(1)
    base, *others = (
        Weights.from_tensors({"x": torch.randn(70_001, generator=draw).to(dtype)}) for _ in range(3)
    )
    parts = [Delta.between(base, others[0]), -0.3 * Delta.between(base, others[1])]
    held = [part.in_memory() for part in parts]
    with patch("unwrite.delta._difference", side_effect=AssertionError("held")):
        found = compose(base, parts, "x")
    assert same_bits(found, compose(base, held, "x"))


def test_a_difference_of_other_shapes_is_not_composed():
    base, other = (Weights.from_tensors({"x": torch.ones(size)}) for size in (6, 3))
    with pytest.raises(TensorMismatch, match=r"changes 'x' in shape \(3,\)"):
        compose(base, [Delta.between(other, other)], "x")


@pytest.mark.parametrize("step", [1e-5, 3e-5, 1e-4, 3e-4, 1e-3])
def test_realised_differences_of_bf16_weights_are_exact_both_ways(step):
    """The table of DESIGN, appendix A: subtracting what was intended is not exact."""
    generator = torch.Generator().manual_seed(7)
    before = (torch.randn(400_000, generator=generator) * 0.02).bfloat16()
    intended = torch.randn(400_000, generator=generator) * step
    base = Weights.from_tensors({"x": before})
    wished = Delta.from_changes({"x": Dense(intended)})
    after = compose(base, [wished], "x")
    realised = Delta.between(base, Weights.from_tensors({"x": after}))
    assert compose(base, [realised], "x").equal(after)
    trained = Weights.from_tensors({"x": after})
    assert compose(trained, [-realised], "x").equal(before)
    assert not compose(trained, [-wished], "x").equal(before)
    assert compose(base, [], "x").equal(before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_states_from_disk_are_those_from_memory(tmp_path, dtype):
    generator = torch.Generator().manual_seed(2)
    made = {f"t{n}": torch.randn(33, 17, generator=generator).to(dtype) for n in range(5)}
    other = {name: tensor * 1.01 for name, tensor in made.items()}
    memory = Weights.from_tensors(made)
    save_weights(tmp_path / "base", memory)
    save_weights(tmp_path / "other", Weights.from_tensors(other))
    disk = Weights.from_folder(tmp_path / "base")
    with patch("unwrite.tensorfile.LARGE", 1), patch("unwrite.tensorfile.MAPPED", 1):
        here = Delta.between(memory, Weights.from_tensors(other))
        there = Delta.between(disk, Weights.from_folder(tmp_path / "other")).save(tmp_path / "d")
        assert same_deltas(here, there)
        assert same_states(
            state_of(memory, [here, -0.3 * here]), state_of(disk, [there, -0.3 * there])
        )
        save_weights(tmp_path / "new", disk, lambda name: compose(disk, [there, -there], name))
    new = Weights.from_folder(tmp_path / "new")
    assert fingerprint(new) != "" and all(same_bits(new[n], made[n]) for n in made)


def test_compose_touches_only_what_is_named_and_never_the_base():
    base = Weights.from_tensors({"x": torch.ones(2), "y": torch.ones(2), "n": torch.tensor([3])})
    delta = Delta.from_changes({"x": Dense(torch.ones(2))})
    assert compose(base, [delta], "x").equal(torch.full((2,), 2.0))
    assert base["x"].equal(torch.ones(2))
    assert compose(base, [delta], "y") is base["y"] and compose(base, [delta], "n") is base["n"]


def test_compose_refuses_wrong_shapes_and_kinds():
    delta = Delta.from_changes({"x": Dense(torch.ones(2))})
    three = Weights.from_tensors({"x": torch.ones(3)})
    for one in (delta, Prefix.from_changes({"x": Dense(torch.ones(2))})):
        with pytest.raises(TensorMismatch) as refused:
            compose(three, [one], "x")
        assert str(refused.value) == (
            f"A delta changes 'x' in shape (2,), and in {three.source} it has shape (3,). Use the "
            "model that the delta was made for."
        )
    for kind in (torch.int64, torch.float64):
        with pytest.raises(TensorMismatch, match="fp32, bf16 or fp16"):
            compose(Weights.from_tensors({"x": torch.ones(2).to(kind)}), [delta], "x")


# ---- saving ------------------------------------------------------------------------------------


@law
@given(any_delta, st.sampled_from([1, 100, 10**9]))
def test_what_is_saved_is_what_is_opened(tmp_path_factory, delta, shard_bytes):
    folder = tmp_path_factory.mktemp("delta") / "saved"
    saved = delta.save(folder, shard_bytes=shard_bytes, provenance={"base": "f" * 64})
    assert same_deltas(saved, delta) and saved.base == "f" * 64
    assert saved.facts() == delta.facts()
    assert saved.summary() == delta.summary()
    saved.verify()
    with pytest.raises(UnwriteError, match="already holds a delta"):
        delta.save(folder)


def test_a_saved_delta_is_plain_files(tmp_path):
    delta, seen = every_encoding(), []
    delta.save(
        tmp_path / "d",
        provenance={"base": "ab", "why": "ünïcode"},
        shard_bytes=200,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(n, 6) for n in range(1, 7)]
    about = json.loads((tmp_path / "d" / "delta.json").read_text("utf-8"))
    assert about["provenance"] == {"base": "ab", "why": "ünïcode"}
    assert about["totals"]["tensors"] == 6 and about["totals"]["encoding"] == "mixed"
    files = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert files[-1] == "delta.json" and files[0] == "00001.safetensors" and len(files) > 2
    low = about["tensors"]["low"]
    assert low["encoding"] == "low-rank" and low["scale"] == 0.1 and low["shape"] == [6, 4]
    assert load_file(tmp_path / "d" / low["file"])["low.b"].shape == (6, 2)


def test_names_that_meet_in_a_file_are_kept_apart(tmp_path):
    low = LowRank(torch.ones(2, 1), torch.ones(1, 2))
    delta = Delta.from_changes({"x": low, "x.a": Dense(torch.zeros(3)), "x.b": low})
    assert same_deltas(delta.save(tmp_path / "d"), delta)


def test_nothing_can_be_saved_too(tmp_path):
    saved = Delta.nothing().save(tmp_path / "d")
    assert len(saved) == 0 and str(saved.summary()) == "nothing changes"
    assert saved.summary().changed_fraction == 0.0


def test_summaries_speak(tmp_path):
    values = torch.arange(1000.0).view(100, 10)
    delta = Delta.from_changes(
        {"a": mask(values, values >= 950), "b": mask(values / 9, values >= 950)}
    )
    summary = delta.summary()
    assert (summary.encoding, summary.tensors, summary.parameters) == ("masked", 2, 2000)
    assert summary.changed == 100 and summary.changed_fraction == 0.05
    assert summary.heaviest == "a"
    assert str(summary).startswith("masked, 2 tensors, 5 % of weights, 656 bytes, norm ")
    assert delta.summary(parameters=10_000).changed_fraction == 0.01
    assert summary.as_json(10_000)["changed_fraction"] == 0.01
    assert json.loads(json.dumps(summary.as_json())) == summary.as_json()
    assert summary.as_json()["parameters"] == 2000
    alone = Delta.from_changes({"a": Dense(torch.zeros(400, 500))}).summary()
    assert str(alone).startswith("dense, 1 tensor, 0 % of weights, 800 kB, norm 0, heaviest: a")
    assert Delta.nothing().summary().heaviest == ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_saved(tmp_path, bad):
    delta = Delta.from_changes({"fine": Dense(torch.ones(2)), "bad": Dense(torch.tensor([1, bad]))})
    with pytest.raises(UnwriteError, match="'bad' is not a finite number"):
        delta.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_save_that_fails_leaves_nothing_of_its_own(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")

    def read(name):
        if name == "c":
            raise RuntimeError
        return Dense(torch.ones(9))

    with pytest.raises(RuntimeError):
        Delta("abc", read).save(tmp_path, shard_bytes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(TypeError):
        Delta.nothing().save(tmp_path / "d", provenance={"when": object()})
    assert not (tmp_path / "d").exists()


def test_what_a_killed_save_left_is_replaced(tmp_path):
    (tmp_path / "00001.safetensors").write_bytes(b"half")
    (tmp_path / "00007.safetensors").write_bytes(b"half")
    with pytest.raises(DamagedFile, match="never finished"):
        Delta.open(tmp_path)
    saved = every_encoding().save(tmp_path)
    saved.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00001.safetensors", "delta.json"]


def test_what_is_saved_is_flushed_to_disk_and_scratch_files_are_not(tmp_path):
    delta = Delta.from_changes({"x": Dense(torch.ones(3, 4))})
    flushed = []
    with patch("unwrite.tensorfile.os.fsync", side_effect=flushed.append):
        stored = delta.stored()
        in_scratch = len(flushed)
        saved = delta.save(tmp_path / "d")
    # Descriptions and folders are flushed in both cases, the tensors only of what is to last.
    assert len(flushed) - in_scratch == in_scratch + 1
    assert stored["x"].dense().equal(saved["x"].dense())
    stored.verify()


def test_stored_lets_go_of_its_sources_and_of_its_files():
    source = every_encoding()
    stored = (0.5 * source).stored()
    folder = stored._saved.folder
    assert folder.name.startswith(f".{SCRATCH}."), "by which sweeping finds it"
    view = stored + stored
    assert folder.is_dir() and same_deltas(stored, 0.5 * source)
    del stored
    assert torch.allclose(view["dense"].dense(), source["dense"].dense())
    del view
    assert not folder.exists()
    with (
        patch("unwrite.delta.save_changes", side_effect=RuntimeError),
        patch("unwrite.scratch.tempfile.mkdtemp", return_value=str(folder)),
        pytest.raises(RuntimeError),
    ):
        source.stored()
    assert not folder.exists()


# ---- damage ------------------------------------------------------------------------------------


def no_description(about, folder):
    (folder / "delta.json").unlink()


def not_json(about, folder):
    (folder / "delta.json").write_text("{")


def deep_json(about, folder):
    (folder / "delta.json").write_text("[" * 200_000)


def other_format(about, folder):
    about["format"] = "lora"


def newer_version(about, folder):
    about["version"] = 2


def no_tensors(about, folder):
    del about["tensors"]


def no_provenance(about, folder):
    about["provenance"] = None


def missing_file(about, folder):
    (folder / "00001.safetensors").unlink()


def cut_file(about, folder):
    content = (folder / "00001.safetensors").read_bytes()
    (folder / "00001.safetensors").write_bytes(content[:-1])


def escaping_file(about, folder):
    about["tensors"]["dense"]["file"] = "../00001.safetensors"


def unseen_file(about, folder):
    """Found by fuzzing: its name stood in a message, where it acts on terminals."""
    about["tensors"]["dense"]["file"] = "00\x7f001.safetensors"


def listed_too_few(about, folder):
    del about["tensors"]["low"]


def listed_too_many(about, folder):
    about["tensors"]["other"] = about["tensors"]["dense"]


def change_entry(name, **fields):
    def damage(about, folder):
        about["tensors"][name] |= fields

    damage.__name__ = f"{name} {fields}"
    return damage


@pytest.mark.parametrize(
    "damage",
    [
        no_description,
        not_json,
        deep_json,
        other_format,
        newer_version,
        no_tensors,
        no_provenance,
        missing_file,
        cut_file,
        escaping_file,
        unseen_file,
        listed_too_few,
        listed_too_many,
        change_entry("dense", encoding="masked"),
        change_entry("dense", encoding=["dense"]),
        change_entry("dense", encoding="sparse"),
        change_entry("dense", shape=[4, 6]),
        change_entry("dense", shape=[6, -4]),
        change_entry("dense", shape=24),
        change_entry("dense", bytes=1),
        change_entry("dense", changed=1.5),
        change_entry("dense", squared_norm=float("nan")),
        change_entry("dense", squared_norm="1"),
        change_entry("dense", sha256={}),
        change_entry("dense", sha256={"": 3}),
        change_entry("dense", sha256=None),
        change_entry("low", scale=None),
        change_entry("low", scale=float("inf")),
        change_entry("masked", shape=[999, 4]),
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_damaged_delta_is_not_opened(tmp_path, damage):
    every_encoding().save(tmp_path)
    path = tmp_path / "delta.json"
    about = json.loads(path.read_text())
    path.unlink()
    damage_first = damage in (no_description, not_json, deep_json)
    path.write_text(json.dumps(about))
    damage(about, tmp_path)
    if not damage_first:
        path.write_text(json.dumps(about))
    with pytest.raises(DamagedFile):
        Delta.open(tmp_path)


def test_verify_names_the_tensor_that_changed(tmp_path):
    every_encoding().save(tmp_path)
    path = tmp_path / "00001.safetensors"
    content = bytearray(path.read_bytes())
    value = every_encoding()["masked"].values[-1:].numpy().tobytes()
    content[content.rindex(value)] ^= 1
    path.write_bytes(content)
    delta = Delta.open(tmp_path)
    with pytest.raises(DamagedFile, match="'masked' is not what was saved"):
        delta.verify()
    with pytest.raises(ValueError, match=r"^only a delta that was saved can be verified$"):
        every_encoding().verify()


def test_what_is_read_is_compared_once(tmp_path, monkeypatch):
    every_encoding().save(tmp_path)
    names, compared, hashed = list(every_encoding()), set(), []
    monkeypatch.setattr(
        "unwrite.deltafile.tensor_sha256", lambda one: hashed.append(one) or tensor_sha256(one)
    )
    for _ in range(2):
        delta = Delta.open(tmp_path, compared=compared)
        assert all(delta[name].dense().equal(every_encoding()[name].dense()) for name in names)
        assert compared == set(names)
    assert len(hashed) == sum(len(every_encoding()[name].tensors()) for name in names)

    path = tmp_path / "00001.safetensors"
    content = bytearray(path.read_bytes())
    value = every_encoding()["masked"].values[-1:].numpy().tobytes()
    content[content.rindex(value)] ^= 1
    path.write_bytes(content)
    sound = set()
    delta = Delta.open(tmp_path, compared=sound)
    for name in names:
        if name == "masked":
            with pytest.raises(DamagedFile, match="'masked' is not what was saved"):
                delta[name]
        else:
            assert delta[name].dense().equal(every_encoding()[name].dense())
    assert sound == set(names) - {"masked"}


def test_a_mask_that_contradicts_its_values_is_found_when_read(tmp_path):
    values = torch.ones(64)
    saved = Delta.from_changes({"x": mask(values, values > 0)}).save(tmp_path / "d")
    bits = torch.full((8,), 255, dtype=torch.uint8)
    bits[0] = 254
    save_file({"x.bits": bits, "x.values": values}, tmp_path / "d" / "00001.safetensors")
    assert isinstance(saved["x"], Masked)  # an open delta keeps the file that it opened
    with pytest.raises(DamagedFile, match="'x': 63 bits are set for 64 values"):
        Delta.open(tmp_path / "d")["x"]


# ---- the right base ----------------------------------------------------------------------------


def test_a_delta_only_fits_its_base():
    delta = Delta.from_changes({}, {"base": "3fa1" + "0" * 60, "base_name": "llama"})
    delta.check_base("3fa1" + "0" * 60, "llama-chat")
    with pytest.raises(TensorMismatch) as refused:
        delta.check_base("77" * 32, "llama-chat")
    assert str(refused.value) == (
        "This delta was made for 'llama' (fingerprint 3fa1…), but the model is 'llama-chat' "
        "(fingerprint 7777…). Deltas only fit the base they were computed from."
    )
    with pytest.raises(TensorMismatch, match="does not record the base"):
        Delta.nothing().check_base("77" * 32, "llama")


def test_a_delta_only_fits_tensors_that_are_there(tmp_path):
    shared = torch.ones(6, 4)
    weights = Weights.from_tensors(
        {"dense": shared, "head": shared, "count": torch.tensor([1]), "low": torch.ones(4, 4)}
    )
    Delta.from_changes({"dense": Dense(torch.zeros(6, 4))}).check_fits(weights)
    with pytest.raises(TensorMismatch) as refused:
        Delta("abcd", lambda name: Dense(shared)).check_fits(weights)
    assert str(refused.value).endswith(
        " does not have: 'a', 'b', 'c' and 1 more. Use the model that the delta was made for."
    )
    with pytest.raises(TensorMismatch, match="'head' is the same tensor as 'dense' there"):
        Delta(["head"], lambda name: Dense(shared)).check_fits(weights)
    with pytest.raises(
        TensorMismatch,
        match=r"'count' .*, which fp32 arithmetic cannot change exactly\. "
        r"Use a checkpoint in fp32, bf16 or fp16\.$",
    ):
        Delta(["count"], lambda name: Dense(shared)).check_fits(weights)
    saved = Delta.from_changes({"low": every_encoding()["low"]}).save(tmp_path / "d")
    with pytest.raises(TensorMismatch, match=r"changes 'low' in shape \(6, 4\)") as refused:
        saved.check_fits(weights)
    assert str(refused.value).endswith("(4, 4). Use the model that the delta was made for.")
