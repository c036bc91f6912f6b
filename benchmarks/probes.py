"""The machine's limits, to which every figure is compared."""

import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from llama.accel.features import cpu_features


class Machine:
    """Rates of a device, measured again at every call: shared or hot machines vary from one second
    to the next."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        on_cpu = device.type == "cpu"
        self._memory = torch.ones(probe_bytes(device) // 4, device=device)
        self._vector = torch.ones(4096, device=device)
        size = 4096 if on_cpu else 8192
        # random: a GPU draws less power on equal numbers, and multiplies them faster
        self._matrix = torch.randn(size, size, device=device, dtype=dtype)
        pinned = device.type == "cuda"
        self._host = torch.ones(64 if on_cpu else 256, 2**20, dtype=torch.uint8, pin_memory=pinned)
        self._copied = torch.empty_like(self._host, device=device)

    def bandwidth(self) -> float:
        """Bytes per second read from uncached memory: the better of a sum and a float32
        matrix-vector product, best of three each."""
        rows = self._memory.view(-1, 4096)
        readers = (lambda: self._memory.sum(), lambda: torch.mv(rows, self._vector))
        return self._memory.nbytes / min(self._best(reader) for reader in readers)

    def matrix_rate(self) -> float:
        """Floating-point operations per second of a large square product, best of three."""
        n = len(self._matrix)
        return 2 * n**3 / self._best(lambda: torch.mm(self._matrix, self._matrix))

    def host_to_device(self) -> float:
        """Bytes per second copied from pinned memory to the device (on the CPU, from memory to
        memory), best of three."""
        copy = self._best(lambda: self._copied.copy_(self._host, non_blocking=True))
        return self._host.nbytes / copy

    def _best(self, run: Callable[[], object]) -> float:
        on_cuda = self.device.type == "cuda"
        # three times, and long enough for an idle GPU to raise its clocks
        end = time.perf_counter() + (0.1 if on_cuda else 0)
        times: list[float] = []
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            if on_cuda:
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times)


def processor_and_versions() -> dict[str, Any]:
    """The part of a configuration that all benchmarks record."""
    shown = {"amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16"}
    return {
        "machine": platform.machine(),
        "features": sorted(shown & cpu_features()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def probe_bytes(device: torch.device) -> int:
    """Bytes that ``bandwidth`` reads: more than any cache, and on a GPU at most a sixteenth of its
    memory."""
    if device.type == "cpu":
        return 2**30
    if device.type == "cuda":
        total: int = torch.cuda.get_device_properties(device).total_memory
        return min(4 * 2**30, total // 16) // 2**24 * 2**24
    return 4 * 2**30
