"""The bit-flip campaign in short: ``verify`` notices a changed byte, or it is proven harmless."""

import pytest

import unwrite
from benchmarks.bit_flips import HARMLESS, everything, flipped, flips, make, summary


@pytest.fixture(scope="module")
def home_and_base(tmp_path_factory):
    return make(tmp_path_factory.mktemp("flips"))


def test_every_changed_byte_is_noticed_or_harmless(home_and_base, snapshot):
    home, base = home_and_base
    before = snapshot(home.parent)
    count = 3 * len(everything(home, base))
    found = list(flips(home, base, count, seed=0))
    assert [one for one in found if one.found not in ("noticed", *HARMLESS)] == []
    assert summary(found)["noticed"] > 0.85 * count
    assert snapshot(home.parent) == before
    assert unwrite.open(home).verify() == []


def test_a_space_behind_a_header_may_be_a_tab_and_nothing_else(home_and_base):
    home, base = home_and_base
    shard = next(home.glob("updates/*/delta/*.safetensors"))
    whole = shard.read_bytes()
    last = 8 + int.from_bytes(whole[:8], "little") - 1
    assert whole[last] == 0x20
    assert flipped(home, base, shard, last, 0x20 ^ 0x09).found == "padding"
    assert flipped(home, base, shard, last, 0x20 ^ 0x41).found == "noticed"


def test_hashes_that_are_changed_are_not_used(home_and_base):
    home, base = home_and_base
    file = home / "tensors.json"
    for offset in range(0, file.stat().st_size, 97):
        assert flipped(home, base, file, offset, 1 << (offset % 8)).found == "hashes"


def test_every_byte_of_a_header_counts(home_and_base):
    """Of the part that means something, not one bit can change without being noticed."""
    home, base = home_and_base
    shard = next(home.glob("updates/*/delta/*.safetensors"))
    whole = shard.read_bytes()
    end = whole.index(b"  ", 8)
    for offset in range(0, end, 7):
        found = flipped(home, base, shard, offset, 1 << (offset % 8))
        assert found.found == "noticed", found
