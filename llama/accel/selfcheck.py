"""Checks of accelerated forms on the device that they run on, and the ranks' agreement on them.

They find kernels that fail or give wrong numbers on small shapes; tests/test_gpu.py covers more.
"""

import dataclasses
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from llama.attention import attention
from llama.cache import Batch, Decode, KVCache, Prefill
from llama.config import ModelArgs
from llama.distributed.collectives import all_gather_json, fail_fast
from llama.files import summary

_LARGEST_ERROR = 2e-2  # relative: a few roundings to bfloat16
_UNUSED = 1000.0  # content of unused positions: finite, so that masked scores stay finite


def difference(got: Tensor, expected: Tensor) -> str | None:
    """How far ``got`` is from ``expected``, if that is more than rounding."""
    if not torch.equal(got.isfinite(), expected.isfinite()):
        return "some of its numbers aren't finite"
    got, expected = (x.float().nan_to_num(0.0, 0.0, 0.0) for x in (got, expected))
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return f"its relative error is {error:.2g}" if error > _LARGEST_ERROR else None


def check_attention(
    attend: Callable[[Tensor, KVCache, Batch], Tensor],
    args: ModelArgs,
    n_ranks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Compare ``attend`` with SDPA in float32, for this model's heads.

    Returns:
        Why it can't be used, or None.
    """
    args = dataclasses.replace(args, max_batch_size=4, max_seq_len=96)
    generator = torch.Generator().manual_seed(0)

    def random(n_tokens: int, n_heads: int) -> Tensor:
        x = torch.randn(n_tokens, n_heads, args.head_dim, generator=generator)
        return x.to(device=device, dtype=dtype)

    # slots out of order, prompts shorter and longer than a tile of the kernel
    slots, prompts, chunks = [2, 0, 1], [5, 1, 70], [4, 3, 1]
    ends = [sum(pair) for pair in zip(prompts, chunks, strict=True)]
    lengths = [ends[slots.index(slot)] for slot in range(3)]
    try:
        with torch.inference_mode():
            passes: dict[str, Batch] = {
                "prompts": Prefill(slots, [0, 0, 0], prompts, device),
                "later chunks of prompts": Prefill(slots, prompts, chunks, device),
                "a decoding step": Decode(
                    torch.tensor(lengths, device=device), args.max_seq_len, ragged=True
                ),
            }
            cache, exact = KVCache(args, n_ranks), KVCache(args, n_ranks)
            n_kv_heads = args.n_local_kv_heads(n_ranks)
            cache.allocate(random(1, n_kv_heads))
            cache.k.fill_(_UNUSED)
            cache.v.fill_(_UNUSED)
            for name, batch in passes.items():
                n_tokens = len(batch.positions)
                cache.update(random(n_tokens, n_kv_heads), random(n_tokens, n_kv_heads), batch)
                q = random(n_tokens, args.n_heads // n_ranks)
                exact.k, exact.v = cache.k.float(), cache.v.float()
                expected = attention(q.float(), exact, batch)
                if found := difference(attend(q, cache, batch), expected):
                    return f"for {name} {found}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a kernel raises, SDPA still works
        return summary(error)
    return None


def agree(reason: str | None, group: dist.ProcessGroup | None) -> str | None:
    """The reason of the first rank of ``group`` that has one: a form runs on all ranks or none,
    since their collectives must match."""
    with fail_fast():
        reasons = all_gather_json(reason, group)
    for rank, theirs in enumerate(reasons):
        if theirs is not None:
            return f"rank {rank}: {theirs}" if len(set(reasons)) > 1 else theirs
    return None


def warn(message: str, group: dist.ProcessGroup | None) -> None:
    """Warn on the first rank of ``group``."""
    if group is None or dist.get_rank(group) == 0:
        warnings.warn(message, stacklevel=2)
