"""Page faults of repeated large allocations, with and without keep_freed_memory."""

import resource
import sys

import torch

from llama.accel.cpu import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def work():
    for _ in range(3):
        torch.ones(2**24)  # 64 MiB


work()
before = faults()
work()
print(faults() - before)
