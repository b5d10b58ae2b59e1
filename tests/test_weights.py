"""Tensor files and ``Weights``: read what others write, write what others read, refuse the rest."""

from __future__ import annotations

import errno
import json
import os
import struct
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_changes import same_bits, shapes, tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unwrite.errors import DamagedFile, ModelUnavailable, TensorMismatch, UnwriteError
from unwrite.tensorfile import (
    CODES,
    TensorFile,
    TensorFileWriter,
    header_room,
    one_ahead,
    tensor_bytes,
    tensor_sha256,
)
from unwrite.weights import (
    Weights,
    check_same_tensors,
    fingerprint,
    fingerprint_of,
    save_weights,
    tensor_hashes,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@pytest.fixture(params=[(1 << 22, 1 << 24), (1, 1 << 24), (1, 1)], ids=["small", "large", "mapped"])
def sizes(request):
    """Run with all tensors treated as small ones, as large ones, as ones that are mapped."""
    large, mapped = request.param
    with patch("unwrite.tensorfile.LARGE", large), patch("unwrite.tensorfile.MAPPED", mapped):
        yield


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(5, 7, generator=generator)
    made = {f"block.{dtype}": (values * 3).to(dtype) for dtype in DTYPES}
    return made | {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3), "é 日": values[0]}


def write(path, tensors, metadata=None):
    """Write tensors in an order that keeps them aligned; return their hashes."""
    room = header_room(tensors, metadata)
    with TensorFileWriter(path, room, metadata=metadata) as file:
        for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
            file.add(name, tensors[name])
    return file.hashes


def sharded(folder, parts):
    """A sharded checkpoint made by the reference library."""
    folder.mkdir()
    shards = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


# ---- one file ----------------------------------------------------------------------------------


def test_the_reference_library_reads_what_we_write(tmp_path, sizes):
    made = some_tensors()
    hashes = write(tmp_path / "a.safetensors", made, {"format": "pt"})
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(made)
        for name, tensor in made.items():
            assert same_bits(file.get_tensor(name), tensor)
            assert hashes[name] == tensor_sha256(tensor)


def test_we_read_what_the_reference_library_writes(tmp_path, sizes):
    made = some_tensors()
    save_file(made, tmp_path / "a.safetensors", metadata={"format": "pt"})
    weights = Weights.from_file(tmp_path / "a.safetensors")
    assert weights.metadata == {"format": "pt"}
    assert set(weights) == set(made)
    for name, tensor in made.items():
        assert same_bits(weights[name], tensor)
        assert weights.shape(name) == tuple(tensor.shape) and weights.dtype(name) == tensor.dtype
    weights.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(shapes, st.sampled_from(list(CODES.values()))), max_size=6))
def test_any_mixture_of_dtypes_survives(tmp_path_factory, kinds):
    path = tmp_path_factory.mktemp("mixture") / "a.safetensors"
    made = {str(n): torch.ones(shape).to(dtype) for n, (shape, dtype) in enumerate(kinds)}
    write(path, made)
    file = TensorFile(path)
    assert all(same_bits(file.read(name), made[name]) for name in made)
    with safe_open(path, framework="pt") as reference:
        assert all(same_bits(reference.get_tensor(name), made[name]) for name in made)


@settings(max_examples=25, deadline=None)
@given(shapes.flatmap(tensors), st.sampled_from(DTYPES))
def test_bytes_are_those_of_the_tensor(values, dtype):
    tensor = values.to(dtype)
    assert bytes(tensor_bytes(tensor)) == bytes(
        tensor.contiguous().view(-1).view(torch.uint8).tolist()
    )


def test_what_is_read_belongs_to_the_reader(tmp_path, sizes):
    save_file({"x": torch.ones(64, 64)}, tmp_path / "a.safetensors")
    weights = Weights.from_file(tmp_path / "a.safetensors")
    weights["x"].zero_()
    assert weights["x"].equal(torch.ones(64, 64))


def test_tensors_that_cannot_be_mapped_are_copied(tmp_path):
    save_file({"x": torch.ones(64, 64)}, tmp_path / "a.safetensors")
    weights = Weights.from_file(tmp_path / "a.safetensors")
    full = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    with (
        patch("unwrite.tensorfile.MAPPED", 1),
        patch("unwrite.tensorfile.mmap.mmap", side_effect=full) as tried,
    ):
        assert weights["x"].equal(torch.ones(64, 64))
    tried.assert_called_once()


def test_non_contiguous_and_trainable_tensors_are_written(tmp_path):
    tensor = torch.arange(6.0).view(2, 3).requires_grad_()
    write(tmp_path / "a.safetensors", {"x": tensor.T})
    assert load_file(tmp_path / "a.safetensors")["x"].equal(tensor.detach().T)


def test_an_error_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), TensorFileWriter(tmp_path / "a.safetensors", 500) as file:
        file.add("x", torch.ones(3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path):
    write(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    with pytest.raises(RuntimeError), TensorFileWriter(tmp_path / "a.safetensors", 500) as file:
        file.add("x", torch.zeros(3))
        raise RuntimeError
    assert load_file(tmp_path / "a.safetensors")["x"].equal(torch.ones(3))


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_full_disk_is_said_in_a_sentence_and_leaves_nothing(tmp_path, call):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        patch(f"unwrite.tensorfile.os.{call}", side_effect=full),
        patch("unwrite.tensorfile.FLUSH_FROM", 1),
        pytest.raises(UnwriteError, match=r"No space left .* nothing of it was kept"),
    ):
        write(tmp_path / "a.safetensors", {"x": torch.ones(3), "y": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_misuse_of_the_writer_is_a_bug(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="again"), TensorFileWriter(path, 500) as file:
        file.add("x", torch.ones(1))
        file.add("x", torch.ones(1))
    with pytest.raises(ValueError, match="aligned"), TensorFileWriter(path, 500) as file:
        file.add("x", torch.ones(3, dtype=torch.uint8))
        file.add("y", torch.ones(1))
    with pytest.raises(ValueError, match="more than 8 bytes"), TensorFileWriter(path, 8) as file:
        file.add("x", torch.ones(1))


def test_room_for_the_header_is_always_enough(tmp_path):
    names = ["", "é" * 40, '"\\\n', "日本", "x" * 200]
    write(
        tmp_path / "a.safetensors", {name: torch.ones([1] * 10) for name in names}, {"ü": '"' * 9}
    )
    assert set(load_file(tmp_path / "a.safetensors")) == set(names)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_damaged_file_is_refused_and_nothing_worse(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({"x": torch.ones(3, 4), "y": torch.ones(5, dtype=torch.int8)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 18))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)
    try:
        file = TensorFile(path)
    except (DamagedFile, ModelUnavailable):
        return
    for name in file.specs:
        file.read(name)


def header_of(entries, size):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 9) + b"{}",
        struct.pack("<Q", 2) + b"\xff\xfe",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
        header_of({"__metadata__": 3}, 0),
        header_of({"x": 3}, 0),
        header_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, 4),
        header_of({"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4),
        header_of({"x": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, 4),
        header_of({"x": {"dtype": "F32", "shape": [0, 1 << 70], "data_offsets": [0, 0]}}, 0),
        header_of({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, 4),
        header_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, 8),
        header_of({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 5),
        header_of({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, 4),
        header_of({"x": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4),
        header_of({"\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, 4),
        header_of(
            {
                "x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "y": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            4,
        ),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(DamagedFile, match=r"a\.safetensors is damaged: .*Fetch or copy it again\."):
        TensorFile(tmp_path / "a.safetensors")


def test_unknown_number_formats_missing_files_and_folders_are_refused(tmp_path):
    entry = {"x": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}
    (tmp_path / "a.safetensors").write_bytes(header_of(entry, 4))
    with pytest.raises(ModelUnavailable, match="number format 'F4'"):
        TensorFile(tmp_path / "a.safetensors")
    with pytest.raises(DamagedFile, match="cannot be opened"):
        TensorFile(tmp_path / "b.safetensors")
    with pytest.raises(DamagedFile, match="it is not a file"):
        TensorFile(tmp_path)


def test_a_file_that_shrinks_while_open_is_an_error_not_a_crash(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    weights = Weights.from_file(path)
    os.truncate(path, 600)
    with pytest.raises(DamagedFile, match="cut off before 'x' could be read"):
        weights["x"]


# ---- folders -----------------------------------------------------------------------------------


def test_shards_are_one_mapping_and_nothing_is_read_ahead(tmp_path):
    first, second = {"b": torch.ones(2, 3), "a": torch.zeros(4)}, {"c": torch.ones(5).bfloat16()}
    folder = sharded(tmp_path / "model", [first, second])
    with (
        Weights.from_folder(folder) as weights,
        patch.object(TensorFile, "read", side_effect=AssertionError),
    ):
        assert set(weights) == {"a", "b", "c"} and "c" in weights and "d" not in weights
        assert weights.shape("b") == (2, 3) and weights.dtype("c") == torch.bfloat16
        assert weights.shard("c") == "model-00002-of-00002.safetensors"
        assert weights.parameters() == 15 and weights.parameters("b") == 6
        assert weights.bytes() == 50 and weights.bytes("c") == 10
        assert "3 tensors, 15 parameters" in repr(weights)
    with pytest.raises(ValueError, match="closed"):
        weights["a"]
    assert Weights.from_folder(folder)["c"].equal(second["c"])
    with pytest.raises(KeyError):
        Weights.from_folder(folder)["d"]


def test_one_file_folders_open_too(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert Weights.from_folder(str(tmp_path))["x"].equal(torch.ones(2))


def test_folders_without_a_checkpoint_say_what_to_do(tmp_path):
    with pytest.raises(ModelUnavailable, match="is not a folder"):
        Weights.from_folder(tmp_path / "nowhere")
    with pytest.raises(ModelUnavailable, match="Name a folder in Hugging Face layout"):
        Weights.from_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnavailable, match=r"pickle .* safe_serialization=True"):
        Weights.from_folder(tmp_path)


def without_shard(folder, index):
    (folder / index["weight_map"]["a"]).unlink()


def cut_off(folder, index):
    os.truncate(folder / index["weight_map"]["a"], 90)


def not_safetensors(folder, index):
    (folder / index["weight_map"]["a"]).write_text("version https://git-lfs")


def extra_name(folder, index):
    index["weight_map"]["z"] = index["weight_map"]["a"]


def lost_name(folder, index):
    del index["weight_map"]["a"]


def moved_name(folder, index):
    index["weight_map"]["a"] = index["weight_map"]["c"]


def no_map(folder, index):
    index.clear()


def empty_map(folder, index):
    index["weight_map"].clear()


def list_map(folder, index):
    index["weight_map"] = ["a"]


@pytest.mark.parametrize(
    "damage",
    [
        without_shard,
        cut_off,
        not_safetensors,
        extra_name,
        lost_name,
        moved_name,
        no_map,
        empty_map,
        list_map,
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, damage):
    folder = sharded(
        tmp_path / "model", [{"a": torch.ones(9), "b": torch.ones(1)}, {"c": torch.ones(5)}]
    )
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    damage(folder, index)
    path.write_text(json.dumps(index))
    with pytest.raises(DamagedFile, match="again"):
        Weights.from_folder(folder)


@pytest.mark.parametrize(
    "shard",
    ["../a.safetensors", "/etc/a.safetensors", "a\\b.safetensors", "a.bin", 3, ".a.safetensors"],
)
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, shard):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": shard}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedFile, match="a source you trust"):
        Weights.from_folder(tmp_path / "model")


# ---- tensors in memory -------------------------------------------------------------------------


def test_tied_tensors_are_there_once():
    embedding = torch.nn.Parameter(torch.ones(4, 2))
    state = {"embed": embedding, "norm": torch.ones(2), "head": embedding, "none": torch.empty(0)}
    weights = Weights.from_tensors(state | {"also none": torch.empty(0)})
    assert list(weights) == ["embed", "norm", "none", "also none"]
    assert weights.tied == {"head": "embed"}
    assert weights["embed"].data_ptr() == embedding.data_ptr()
    assert not weights["embed"].requires_grad
    assert weights.shard("embed") == "" and weights.parameters() == 10


def test_equal_tensors_and_views_are_not_tied():
    whole = torch.ones(4)
    weights = Weights.from_tensors({"a": whole, "b": torch.ones(4), "c": whole[:2]})
    assert list(weights) == ["a", "b", "c"]


# ---- fingerprints ------------------------------------------------------------------------------


def test_a_fingerprint_is_of_contents_not_of_files(tmp_path):
    made = {name: tensor for name, tensor in some_tensors().items() if name}
    names = list(made)
    halves = [{name: made[name] for name in part} for part in (names[:4], names[4:])]
    there = Weights.from_folder(sharded(tmp_path / "model", halves))
    memory = Weights.from_tensors(dict(reversed(made.items())))
    assert fingerprint(there) == fingerprint(memory) == fingerprint_of(tensor_hashes(there))


@pytest.mark.parametrize(
    "other",
    [
        {"x": torch.tensor([1.0, -0.0])},
        {"x": torch.tensor([[1.0, 0.0]])},
        {"x": torch.tensor([1.0, 0.0]).bfloat16()},
        {"x": torch.tensor([1.0, 0.0]).view(torch.int32)},
        {"y": torch.tensor([1.0, 0.0])},
        {"x": torch.tensor([1.0, 0.0]), "y": torch.empty(0)},
        {},
    ],
)
def test_any_difference_changes_the_fingerprint(other):
    same = {"x": torch.tensor([1.0, 0.0])}
    assert fingerprint(Weights.from_tensors(same)) == fingerprint(Weights.from_tensors(same))
    assert fingerprint(Weights.from_tensors(same)) != fingerprint(Weights.from_tensors(other))


def test_hashing_reports_progress():
    seen = []
    weights = Weights.from_tensors({"a": torch.ones(2), "b": torch.ones(3)})
    tensor_hashes(weights, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


# ---- the same tensors --------------------------------------------------------------------------


def refusal(before, after):
    with pytest.raises(TensorMismatch) as refused:
        check_same_tensors(Weights.from_tensors(before), Weights.from_tensors(after))
    return str(refused.value)


def test_weights_that_differ_in_kind_are_refused_with_a_sentence():
    base = {"a": torch.ones(3, 2), "b": torch.ones(2)}
    check_same_tensors(Weights.from_tensors(base), Weights.from_tensors(dict(base)))
    assert "only before has 'b'" in refusal(base, {"a": base["a"]})
    assert "only after has 'b'" in refusal({"a": base["a"]}, base)
    assert "did the vocabulary grow? Resize embeddings first" in refusal(
        base, base | {"a": torch.ones(4, 2)}
    )
    assert "1 tensor differs in shape" in refusal(base, base | {"a": torch.ones(3, 4)})
    assert "Save both in torch.float32" in refusal(base, base | {"a": base["a"].bfloat16()})


# ---- writing folders ---------------------------------------------------------------------------


def test_a_checkpoint_is_written_in_the_layout_of_its_source(tmp_path, sizes):
    made = some_tensors()
    names = list(made)
    halves = [{name: made[name] for name in part} for part in (names[:4], names[4:])]
    source = Weights.from_folder(sharded(tmp_path / "model", halves))
    seen = []
    hashes = save_weights(
        tmp_path / "copy", source, on_progress=lambda done, total: seen.append(done)
    )
    copy = Weights.from_folder(tmp_path / "copy")
    assert {name: copy.shard(name) for name in copy} == {n: source.shard(n) for n in source}
    assert all(same_bits(copy[name], made[name]) for name in made)
    assert hashes == tensor_hashes(source) and copy.metadata == {"format": "pt"}
    assert seen == list(range(1, len(made) + 1))
    index = json.loads((tmp_path / "copy" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == source.bytes()


def test_tensors_can_come_from_elsewhere_than_the_layout(tmp_path):
    layout = Weights.from_tensors({"a": torch.ones(2), "b": torch.ones(3)})
    save_weights(tmp_path, layout, lambda name: layout[name] * 2)
    assert Weights.from_folder(tmp_path)["b"].equal(torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="'a' was read in another dtype"):
        save_weights(tmp_path / "new", layout, lambda name: layout[name].bfloat16())
    assert list((tmp_path / "new").iterdir()) == []


def test_old_weights_are_never_mixed_with_new_ones(tmp_path):
    weights = Weights.from_tensors({"a": torch.ones(2)})
    save_weights(tmp_path, weights)
    with pytest.raises(UnwriteError, match="already holds weights"):
        save_weights(tmp_path, weights)
    with pytest.raises(ModelUnavailable, match="no tensors"):
        save_weights(tmp_path / "none", Weights.from_tensors({}))


def test_reading_ahead_keeps_order_and_raises_where_it_is_due():
    assert list(one_ahead([], str)) == []
    assert list(one_ahead("abc", str.upper)) == [("a", "A"), ("b", "B"), ("c", "C")]
    results = one_ahead("ab", lambda name: {"a": 1}[name])
    assert next(results) == ("a", 1)
    with pytest.raises(KeyError):
        next(results)
