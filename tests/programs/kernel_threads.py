"""Threads that a kernel starts in a thread of Python, how many OpenMP runtimes are loaded, and
whether a forked process can use it."""

import os
import threading
from pathlib import Path

import torch

from llama.accel import kernels

x, weight = torch.ones(1, 1024), torch.ones(1024, 1024).bfloat16()
torch.set_num_threads(1)
counts = []


def use() -> None:
    for _ in range(2):
        counts.append(len(list(Path("/proc/self/task").iterdir())))
        kernels.linear(x, weight)
    counts.append(len(list(Path("/proc/self/task").iterdir())))


thread = threading.Thread(target=use)
thread.start()
thread.join()
print(counts[-1] - counts[0], "threads started", flush=True)

torch.set_num_threads(2)
expected = kernels.linear(x, weight)
maps = Path("/proc/self/maps").read_text().splitlines()
names = {line.split()[-1] for line in maps if "omp" in Path(line.split()[-1]).name}
print(len(names), "OpenMP runtime", flush=True)
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)  # as in the workers of a DataLoader, and in ``CacheLock``
    os._exit(0 if torch.equal(kernels.linear(x, weight), expected) else 1)
status = os.waitpid(pid, 0)[1]
print("the child's result is", "right" if status == 0 else f"wrong: {status}")
