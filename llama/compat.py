"""The published code's way to call a block, ``block(h, start_pos, freqs_cis, mask)``, and helpers.

Here a Transformer calls its blocks with a Batch (cache.py): the tokens are packed, each at its own
position, and attention is causal. ``as_pass`` turns the published arguments into these.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.cache import Batch, KVCache, next_tokens

Mask = Tensor | None
AttendFunction = Callable[[Tensor, KVCache, Batch], Tensor]


class PublishedAttention(nn.Module):
    """Arguments and attributes of the published Attention, for ours.

    Attributes:
        cache: the layer's keys and values.
    """

    attend: AttendFunction
    cache: KVCache
    head_dim: int
    n_local_heads: int
    n_local_kv_heads: int

    def as_pass(
        self, x: Tensor, start_pos: int | Batch, freqs_cis: Tensor, mask: Mask
    ) -> tuple[Batch, Tensor, AttendFunction]:
        """The batch that a block's arguments stand for, the rotations complex64 [T, D / 2] of its
        tokens, and the function that attends.

        Args:
            start_pos: the position of the first of the tokens x [B, S, dim], which are in the first
                B slots, as in ``Transformer.forward``. From a Transformer: the batch.
            freqs_cis: complex64 [S, D / 2], rows of ``Transformer.freqs_cis``. From a Transformer:
                [T, D / 2].
            mask: added to the scores [B, H, S, start_pos + S], to which it must broadcast. None is
                no mask: every token attends to all S, also to those after it. From a Transformer:
                None; attention is causal.

        Raises:
            ValueError: the tokens don't fit into the cache, or freqs_cis or mask doesn't fit them.
        """
        if isinstance(start_pos, Batch):
            if mask is not None:
                raise ValueError(
                    f"a mask came with a {type(start_pos).__name__}, expected None: attention in "
                    "Transformer.forward is causal. For another mask, call the blocks: "
                    "block(h, start_pos, freqs_cis, mask) with an int"
                )
            return start_pos, freqs_cis, self.attend
        start_pos = operator.index(start_pos)
        if x.dim() != 3:
            raise ValueError(f"x has the shape {tuple(x.shape)}, expected [B, S, dim]")
        n_rows, n_tokens, _ = x.shape
        self.cache.args.check_fits(n_rows, n_tokens, start_pos)
        if freqs_cis.shape != (n_tokens, self.head_dim // 2):
            raise ValueError(
                f"freqs_cis has the shape {tuple(freqs_cis.shape)}, expected "
                f"{(n_tokens, self.head_dim // 2)}: model.freqs_cis[start_pos : start_pos + seqlen]"
            )
        batch = next_tokens(n_rows, n_tokens, start_pos, x.device)
        # repeated as pairs of floats: some devices have few operations on complex tensors
        rows = torch.view_as_real(freqs_cis.to(x.device)).repeat(n_rows, 1, 1)
        attend = self.attend
        if not is_causal(mask, n_tokens, batch.max_seqlen_k):
            shape = (n_rows, self.n_local_heads, n_tokens, batch.max_seqlen_k)
            mask = None if mask is None else _expand(mask, shape).to(x)
            attend = functools.partial(masked_attention, n_rows=n_rows, mask=mask)
        return batch, torch.view_as_complex(rows), attend

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PublishedAttention":
        # attention.to(...): the cache is allocated again in the next pass; an accelerated
        # projection holds the old weights
        self.cache.free()
        vars(self).pop("project", None)
        return super()._apply(fn, recurse)

    @property
    def n_kv_heads(self) -> int:
        return self.cache.args.kv_heads

    @property
    def n_rep(self) -> int:
        """Query heads per key/value head."""
        return self.n_local_heads // self.n_local_kv_heads

    @property
    def cache_k(self) -> Tensor:
        """The cached keys [max_batch_size, max_seq_len, K, D]: a view, not a copy."""
        self.cache.allocate(next(self.parameters()))
        return self.cache.k.transpose(1, 2)

    @cache_k.setter
    def cache_k(self, value: Tensor) -> None:
        _overwrite("cache_k", self.cache_k, value)

    @property
    def cache_v(self) -> Tensor:
        """The cached values, as in ``cache_k``."""
        self.cache.allocate(next(self.parameters()))
        return self.cache.v.transpose(1, 2)

    @cache_v.setter
    def cache_v(self, value: Tensor) -> None:
        _overwrite("cache_v", self.cache_v, value)


def caches_of(model: nn.Module) -> list[KVCache]:
    """The caches of all layers; a user may have replaced, wrapped or removed some.

    Raises:
        ValueError: an Attention is in two layers.
    """
    caches = []
    for layer in cast(nn.ModuleList, model.layers):
        child = layer._modules.get("attention")  # faster than modules(): this runs in every step
        modules = [child] if isinstance(child, PublishedAttention) else layer.modules()
        caches += [module.cache for module in modules if isinstance(module, PublishedAttention)]
    if len(set(map(id, caches))) < len(caches):
        raise ValueError(
            "two layers of the model are the same block, expected each to have its own KV cache: "
            "put copy.deepcopy(block) into one of them"
        )
    return caches


def is_causal(mask: Tensor | None, n_tokens: int, length: int) -> bool:
    """Whether the last ``n_tokens`` of ``length`` attend to all up to themselves, and equally."""
    if mask is None:
        return n_tokens == 1
    if mask.shape[-2:] != (n_tokens, length):
        return False
    allowed = torch.ones(n_tokens, length, dtype=torch.bool, device=mask.device)
    allowed = allowed.tril(length - n_tokens)
    return bool(torch.where(allowed, mask == 0, mask == -math.inf).all())


def masked_attention(
    q: Tensor, cache: KVCache, batch: Batch, *, n_rows: int, mask: Tensor | None
) -> Tensor:
    """``attention`` in the first slots, with any mask. q: [T, H, D] -> [T, H, D]."""
    k, v = (x[:n_rows, :, : batch.max_seqlen_k].transpose(1, 2) for x in (cache.k, cache.v))
    n_rep = q.shape[1] // k.shape[2]
    k, v = (repeat_kv(x, n_rep).transpose(1, 2) for x in (k, v))  # [B, H, L, D]
    q = q.unflatten(0, (n_rows, -1)).transpose(1, 2)  # [B, H, S, D]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return y.transpose(1, 2).flatten(0, 1)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat each head of keys or values [B, L, K, D] for its ``n_rep`` query heads."""
    return x.repeat_interleave(n_rep, dim=2) if n_rep > 1 else x


def reshape_for_broadcast(freqs_cis: Tensor, x: Tensor) -> Tensor:
    """View freqs_cis [S, D / 2] so that it broadcasts to x [B, S, ..., D / 2]."""
    if x.dim() < 2 or freqs_cis.shape != (x.shape[1], x.shape[-1]):
        raise ValueError(
            f"freqs_cis has the shape {tuple(freqs_cis.shape)} and x {tuple(x.shape)}, expected "
            "the second and the last size of x"
        )
    return freqs_cis.view(1, x.shape[1], *[1] * (x.dim() - 3), x.shape[-1])


def _expand(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Refuse what the published addition would: broadcasting to fewer scores, and booleans, which
    it would add as 0 and 1."""
    if not mask.is_floating_point():
        raise ValueError(
            f"mask has the dtype {mask.dtype}, expected floats to add to the scores: 0 where a "
            "token attends, -inf where it doesn't"
        )
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask has the shape {tuple(mask.shape)}, which doesn't broadcast to {shape}: rows, "
            "heads, tokens, and start_pos + tokens"
        ) from None


def _overwrite(name: str, content: Tensor, value: Tensor) -> None:
    if value.shape != content.shape:
        raise ValueError(
            f"{name} is set to the shape {tuple(value.shape)}, expected {tuple(content.shape)}: "
            "build the model with another max_batch_size or max_seq_len"
        )
    if value.data_ptr() != content.data_ptr():
        content.copy_(value)
