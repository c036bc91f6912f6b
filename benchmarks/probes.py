"""The machine's limits, to which every figure is compared."""

import time
from collections.abc import Callable

import torch


class Machine:
    """Read bandwidth and matrix rate of a device, measured again at every call: shared or hot
    machines vary from one second to the next."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        gib = 1 if device.type == "cpu" else 4
        self._memory = torch.ones(gib * 2**28, device=device)  # larger than any cache
        self._vector = torch.ones(4096, device=device)
        size = 4096 if device.type == "cpu" else 8192
        self._matrix = torch.ones(size, size, device=device, dtype=dtype)

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

    def _best(self, run: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(time.perf_counter() - start)
        return min(times)
