"""The KV cache, and the slots and positions that the tokens of a pass occupy in it.

The tokens of a pass are packed: T tokens of B sequences, one sequence after the other, as in
FlashAttention's varlen kernels, whose names (cu_seqlens, seqlens_k, max_seqlen) are used here. A
pass is a ``Prefill`` (prompts or chunks of them, lengths known on the host) or a ``Decode`` (one
token per sequence, lengths on the device, so that a CUDA graph can replay it).
"""

import math
import mmap
import os
import threading
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from llama.config import ModelArgs


class KVCache:
    """Keys and values of one layer: two tensors [max_batch_size, K, max_seq_len, D].

    The first axis indexes the slots, one sequence each. Both are empty until the first pass.

    Attributes:
        dtype: of both; None for that of the first keys.
    """

    k: Tensor
    v: Tensor
    dtype: torch.dtype | None = None

    def __init__(self, args: ModelArgs, tp_size: int) -> None:
        self.args, self._n_kv_heads = args, args.n_local_kv_heads(tp_size)
        self.free()

    def allocate(self, like: Tensor) -> None:
        """Allocate zeros on ``like``'s device, unless that was done."""
        k, args = self.k, self.args
        dtype = self.dtype or like.dtype
        if k.dtype == dtype and k.device == like.device and k.numel() > 0:
            return
        shape = (args.max_batch_size, self._n_kv_heads, args.max_seq_len, args.head_dim)
        with torch.inference_mode(False):  # inference tensors couldn't be written to later
            self.k, self.v = (_zeros(shape, dtype, like.device) for _ in range(2))

    def free(self) -> None:
        """Drop the content; the next pass allocates again."""
        with torch.inference_mode(False):
            self.k = self.v = torch.empty(0, device="cpu")

    def update(self, k: Tensor, v: Tensor, batch: "Prefill | Decode") -> None:
        """Store the keys and values [T, K, D] of a pass."""
        self.allocate(k)
        self.k[batch.slots, :, batch.positions] = k.to(self.k.dtype)
        self.v[batch.slots, :, batch.positions] = v.to(self.v.dtype)

    @property
    def n_writes(self) -> int:
        """In-place changes since the allocation."""
        return self.k._version + self.v._version

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` positions of a slot to another."""
        for x in (self.k, self.v):
            x[target, :, :length] = x[source, :, :length]

    def swap(self, a: int, b: int, length_a: int, length_b: int) -> None:
        """Exchange two slots, with ``length_a`` and ``length_b`` positions in use."""
        for x in (self.k, self.v):
            saved = x[a, :, :length_a].clone()
            x[a, :, :length_b] = x[b, :, :length_b]
            x[b, :, :length_a] = saved


class Prefill:
    """The next tokens of some sequences: ``seqlens[i]`` of them in slot ``slot_ids[i]``, from
    position ``start_pos[i]`` on.

    Args:
        logits_for: indices of the sequences whose last token's logits are wanted; None for the
            logits of all tokens.

    Attributes:
        slots, positions: int64 [T].
        seqlens_k: int32 [B], positions in use after this pass.
        rotation: freqs_cis, and what ``accel.projection`` computes from them once per pass.
    """

    def __init__(
        self,
        slot_ids: Sequence[int],
        start_pos: Sequence[int],
        seqlens: Sequence[int],
        device: torch.device,
        logits_for: Sequence[int] | None = None,
    ) -> None:
        self.slot_ids, self.start_pos, self.seqlens = slot_ids, start_pos, seqlens
        self.logits_for = logits_for
        self.ends = [start + n for start, n in zip(start_pos, seqlens, strict=True)]
        self.max_seqlen_q, self.max_seqlen_k = max(seqlens), max(self.ends)
        self.slots = on_device(slot_ids, device).repeat_interleave(
            on_device(seqlens, device), output_size=sum(seqlens)
        )
        spans = zip(start_pos, self.ends, strict=True)
        self.positions = torch.cat([torch.arange(a, b, device=device) for a, b in spans])
        self.seqlens_k = on_device(self.ends, device, torch.int32)
        self._cu_seqlens: tuple[int, Tensor, Tensor] | None = None
        self.rotation: tuple[Tensor, Tensor, Tensor] | None = None

    def cu_seqlens(self, max_seq_len: int) -> tuple[Tensor, Tensor]:
        """int32 [B + 1] each: where each sequence starts in the packed tokens, and where its keys
        start in the cache seen as one sequence. The first layer that asks computes them."""
        if self._cu_seqlens is None or self._cu_seqlens[0] != max_seq_len:
            starts = list(accumulate(self.seqlens, initial=0))
            keys = [slot * max_seq_len for slot in (*self.slot_ids, 0)]  # the last isn't read
            both = on_device([starts, keys], self.positions.device, torch.int32)
            self._cu_seqlens = max_seq_len, both[0], both[1]
        return self._cu_seqlens[1:]

    def select(self, x: Tensor) -> Tensor:
        """The rows of x [T, ...] that ``logits_for`` selects."""
        if self.logits_for is None:
            return x
        ends = list(accumulate(self.seqlens))
        index = [ends[i] - 1 for i in self.logits_for]
        return x[on_device(index, x.device, torch.int64)]

    def of_last_tokens(self) -> "Prefill":
        """A pass over only the tokens that ``logits_for`` selects."""
        rows = self.logits_for or []
        slot_ids, starts = [self.slot_ids[i] for i in rows], [self.ends[i] - 1 for i in rows]
        return Prefill(slot_ids, starts, [1] * len(rows), self.positions.device)


class Decode:
    """One token in each of the slots 0, 1, ..., B - 1.

    Args:
        positions: int64 [B], below ``max_seqlen_k``.
        ragged: the positions differ.
        seqlens_k: int32 [B], positions to attend to; default: ``positions`` + 1.

    Attributes:
        slots: int64 [B].
        rotation: freqs_cis, and what ``accel.projection`` computes from them once per pass.
    """

    max_seqlen_q = 1
    logits_for = None

    def __init__(
        self,
        positions: Tensor,
        max_seqlen_k: int,
        *,
        ragged: bool,
        seqlens_k: Tensor | None = None,
    ) -> None:
        self.positions, self.max_seqlen_k, self.ragged = positions, max_seqlen_k, ragged
        self.slots = torch.arange(len(positions), device=positions.device)
        self.seqlens_k = (positions + 1).int() if seqlens_k is None else seqlens_k
        # plain attributes: before Python 3.12, cached_property takes a lock, and torch.compile
        # can't trace that
        self._cu_seqlens: tuple[int, Tensor, Tensor] | None = None
        self._mask: Tensor | None = None
        self.rotation: tuple[Tensor, Tensor, Tensor] | None = None

    def cu_seqlens(self, max_seq_len: int) -> tuple[Tensor, Tensor]:
        """As in ``Prefill``."""
        if self._cu_seqlens is None or self._cu_seqlens[0] != max_seq_len:
            n_rows, device = len(self.positions), self.positions.device
            starts = torch.arange(n_rows + 1, dtype=torch.int32, device=device)
            self._cu_seqlens = max_seq_len, starts, starts * max_seq_len
        return self._cu_seqlens[1:]

    def mask(self, dtype: torch.dtype) -> Tensor | None:
        """[B, 1, 1, L], added to the scores: -inf after each row's length. None if the rows are
        equally long. The first layer computes it; from booleans, SDPA would in every layer."""
        if self.ragged and (self._mask is None or self._mask.dtype != dtype):
            every = torch.arange(self.max_seqlen_k, device=self.positions.device)
            unused = (every >= self.seqlens_k[:, None])[:, None, None]
            zeros = torch.zeros(unused.shape, dtype=dtype, device=unused.device)
            self._mask = zeros.masked_fill_(unused, -math.inf)
        return self._mask

    def select(self, x: Tensor) -> Tensor:
        return x

    def of_last_tokens(self) -> "Decode":
        return self


Batch = Prefill | Decode


def next_tokens(n_rows: int, n_tokens: int, start_pos: int, device: torch.device) -> Batch:
    """The pass of ``n_tokens`` from ``start_pos`` on in each of the first slots."""
    if n_tokens == 1:
        positions = torch.full((n_rows,), start_pos, device=device)
        return Decode(positions, start_pos + 1, ragged=False)
    return Prefill(range(n_rows), [start_pos] * n_rows, [n_tokens] * n_rows, device)


def on_device(
    values: Sequence[int] | Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``torch.tensor`` on a device. On CUDA it doesn't wait for the work queued there: the driver
    copies pageable memory before the call returns, so that it may be freed."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(
        device, non_blocking=device.type == "cuda"
    )


class CacheLock:
    """Held while a model's cache is in use, which serializes calls from several threads.

    A copy of the model gets its own lock. So does a forked process, because the thread that holds
    the lock doesn't exist there; nor do OpenMP's threads, for which libgomp would wait forever.
    """

    def __init__(self) -> None:
        self._lock, self._pid = threading.RLock(), os.getpid()

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._lock, self._pid = threading.RLock(), os.getpid()
            torch.set_num_threads(1)
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["CacheLock"], tuple[()]]:
        return CacheLock, ()


def _zeros(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not torch.empty: masked positions are multiplied by
    0, and 0 * NaN is NaN. On the CPU the pages are mapped but take no memory until written;
    MAP_PRIVATE gives a forked process its own copy. On CUDA the memory order is [slot, position,
    head, D], which the kernels prefer; MPS and ROCm have misread it (pytorch#181133,
    ROCm/pytorch#3230)."""
    if device.type == "mps" or (device.type == "cuda" and torch.version.hip is not None):
        return torch.zeros(shape, dtype=dtype, device=device)
    if device.type != "cpu":
        n_slots, n_heads, n_positions, head_dim = shape
        shape = (n_slots, n_positions, n_heads, head_dim)
        return torch.zeros(shape, dtype=dtype, device=device).transpose(1, 2)
    n_bytes = math.prod(shape) * dtype.itemsize
    # Windows has neither the flags nor forks
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    pages = mmap.mmap(-1, n_bytes, **flags)
    return torch.frombuffer(pages, dtype=dtype).view(shape)
