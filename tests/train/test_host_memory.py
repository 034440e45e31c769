"""Freed blocks stay in the process: a second tensor of the same size faults in no new pages."""

import subprocess
import sys

PROGRAM = """
import resource, sys
from hydra_dist.train.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
import torch
for _ in range(30):  # the heap settles after a few
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 * 2**20).fill_(1.0)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def test_memory_is_used_again():
    faults = {}
    for mode in ("keep", "default"):
        run = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
        faults[mode] = int(run.stdout)
    assert faults["keep"] < 100 < faults["default"]
