"""Copies from mapped files to a CUDA device, through two buffers in pinned memory.

The driver copies pageable memory in small pieces, and waits for each. From pinned memory it copies
at the full rate of the bus in the background, while the CPU fills the other buffer. Numbers are
converted to the target's dtype on the device.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

BUFFER_BYTES = 64 * 2**20


def needs_staging(device: torch.device) -> bool:
    return device.type == "cuda"


class Event(Protocol):
    """A ``torch.cuda.Event``, recorded in the stream of the copies."""

    def synchronize(self) -> None: ...


# Starts a copy; returns an event that is reached when the source may be overwritten.
Send = Callable[[Tensor, Tensor], Event]


def send_to_cuda(target: Tensor, source: Tensor) -> torch.cuda.Event:
    # not target.copy_(source): that converts on the CPU if target isn't contiguous
    target.copy_(source.to(target.device, non_blocking=True))
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(target.device))
    return event


class DeviceCopier:
    """Copies tensors in the order of the calls; they are complete after ``finish``."""

    def __init__(
        self,
        *,
        send: Send = send_to_cuda,
        buffer_bytes: int = BUFFER_BYTES,
        pinned: bool = True,
    ) -> None:
        self._send = send
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device="cpu", pin_memory=pinned)
            for _ in range(2)
        ]
        self._events: list[Event | None] = [None, None]
        self._next = 0

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy a tensor from the CPU, in parts that fit a buffer. ``source`` may be overwritten
        afterwards, ``target`` isn't complete yet."""
        n_bytes = source.numel() * source.element_size()
        capacity = len(self._buffers[0])
        if n_bytes <= capacity:
            if n_bytes:
                self._copy_part(target, source)
            return
        n_rows = capacity * len(source) // n_bytes
        if n_rows == 0:  # a row is larger than a buffer
            for target_row, source_row in zip(target, source, strict=True):
                self.copy(target_row, source_row)
            return
        for part, values in zip(target.split(n_rows), source.split(n_rows), strict=True):
            self._copy_part(part, values)

    def _copy_part(self, target: Tensor, source: Tensor) -> None:
        i, self._next = self._next, 1 - self._next
        if (event := self._events[i]) is not None:
            event.synchronize()
        n_bytes = source.numel() * source.element_size()
        staged = self._buffers[i][:n_bytes].view(source.dtype).view(source.shape)
        staged.copy_(source)
        self._events[i] = self._send(target, staged)

    def finish(self) -> None:
        """Wait for all copies."""
        for event in self._events:
            if event is not None:
                event.synchronize()
