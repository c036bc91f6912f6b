"""How many OpenMP runtimes are loaded after a kernel has run, and its threads."""

from pathlib import Path

import torch

from llama.accel import kernels

torch.set_num_threads(2)
kernels.linear(torch.ones(1, 4096), torch.ones(4096, 4096).bfloat16())
maps = Path("/proc/self/maps").read_text().splitlines()
names = {line.split()[-1] for line in maps if "omp" in Path(line.split()[-1]).name}
print(len(names), len(list(Path("/proc/self/task").iterdir())))
