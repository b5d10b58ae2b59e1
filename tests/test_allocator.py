"""Freed memory is used again by a loop, and does not grow by a large block every step."""

import subprocess
import sys

import pytest


def printed(program, argument):
    """The number that a process of its own prints: settings of memory hold for a whole process."""
    command = [sys.executable, "-c", program, argument]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


LOOP = """
import sys
import torch
from benchmarks.measure import peak_memory
from unwrite.allocator import freed_memory_is_kept

megabytes, keeps = float(sys.argv[1]), []
before = peak_memory()
with freed_memory_is_kept(int(megabytes * 2**20)):
    for step in range(6):
        large = torch.ones(int(megabytes * 2**18))
        keeps.append(torch.ones(1 << 14))  # behind the large block
        del large
        keeps.append(torch.ones(1 << 14))  # into the hole that it leaves
print((peak_memory() - before) * 1e9 / 2**20 / megabytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("megabytes", ["130", "300"])
def test_a_block_too_large_for_a_heap_is_held_once(megabytes):
    assert 0.9 < printed(LOOP, megabytes) < 1.5, "so many of the large block at the peak"


FAULTS = """
import resource
import sys
import torch
from unwrite import allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        torch.ones(1 << 20)  # 4 MB, made and freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "after training":
    with allocator.freed_memory_is_kept(1 << 22):
        torch.ones(1 << 20)
else:
    allocator.blocks_stay()
faults()
print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc's heap")
@pytest.mark.parametrize("when", ["after training", "from the start"])
def test_pages_are_cleared_once_for_blocks_that_are_made_again_and_again(when):
    assert printed(FAULTS, when) < 1100, "4 MB are 1,024 pages, and were made 100 times"
