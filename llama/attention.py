"""Causal attention over the KV cache with PyTorch's scaled_dot_product_attention (SDPA)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.cache import Batch, Decode, KVCache, Prefill


def attention(q: Tensor, cache: KVCache, batch: Batch) -> Tensor:
    """Causal attention within each sequence. q: [T, H, D] -> [T, H, D]."""
    if isinstance(batch, Decode):
        return decode_attention(q, cache, batch)
    return prefill_attention(q, cache, batch)


def decode_attention(q: Tensor, cache: KVCache, batch: Decode) -> Tensor:
    n_rows, length = q.shape[0], batch.max_seqlen_k
    k, v = (kv[:n_rows, :, :length].to(q.dtype) for kv in (cache.k, cache.v))  # [B, K, L, D]
    # Fold the H / K query heads per key head into query positions: with enable_gqa and a mask, SDPA
    # may fall back to its math kernel.
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H / K, D]
    y = F.scaled_dot_product_attention(_dense(grouped), k, v, attn_mask=batch.mask(q.dtype))
    return y.flatten(1, 2)


def prefill_attention(q: Tensor, cache: KVCache, batch: Prefill) -> Tensor:
    outputs = []
    sequences = zip(batch.slot_ids, batch.start_pos, q.split(list(batch.seqlens)), strict=True)
    for slot, start, x in sequences:
        n_tokens, end = len(x), start + len(x)
        k, v = (kv[slot, :, None, :end].to(q.dtype) for kv in (cache.k, cache.v))  # [K, 1, L, D]
        grouped = x.transpose(0, 1).unflatten(0, (len(k), -1))  # [K, H / K, S, D]
        k, v = (kv.expand(-1, grouped.shape[1], -1, -1) for kv in (k, v))
        mask = None
        if start and n_tokens > 1:  # is_causal would align its mask top-left
            mask = torch.ones(n_tokens, end, dtype=torch.bool, device=q.device).tril(start)
        grouped = _dense(grouped)
        y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, is_causal=start == 0)
        outputs.append(y.flatten(0, 1).transpose(0, 1))  # [S, H, D]
    return torch.cat(outputs)


def _dense(q: Tensor) -> Tensor:
    """Queries as the kernel needs them: MPS has misread permuted ones (pytorch#181133)."""
    return q.contiguous() if q.device.type == "mps" else q
