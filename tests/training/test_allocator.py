"""Freed memory stays in the process: tensors of a step cost no page faults in the next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from guerdon.training.allocator import keep_freed_memory
torch.set_num_threads(1)
done = keep_freed_memory()
def step(): return [torch.zeros(2_000_000) for _ in range(20)] and None
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): step()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def found(**environment: str) -> tuple[bool, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_PRE"))}
    line = subprocess.run(
        [sys.executable, "-c", CODE], env={**clean, **environment}, capture_output=True, text=True, check=True
    ).stdout
    done, faults = line.split()
    return done == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library allocates memory in its own way")
def test_the_memory_of_a_step_serves_the_next():
    done, faults = found()
    assert done
    # 5 steps of 160 MB are 195,000 pages
    assert faults < 2_000


def test_a_choice_of_the_environment_stands():
    assert found(MALLOC_TRIM_THRESHOLD_="131072")[0] is False
