"""Llama from token ids to logits.

Touvron et al., "LLaMA" (2023), section 2.2, and "The Llama 3 Herd of Models" (2024), section 3.2.

Shapes: B sequences of S tokens, T tokens in total; H query and K key/value heads on this rank, of
size D; L cache positions attended to; V vocabulary size.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.attention import attention
from llama.cache import Batch, CacheLock, Decode, KVCache, Prefill, next_tokens
from llama.compat import Mask, PublishedAttention, caches_of
from llama.compat import repeat_kv as repeat_kv
from llama.compat import reshape_for_broadcast as reshape_for_broadcast
from llama.config import ModelArgs, RopeScaling
from llama.distributed.collectives import fail_fast
from llama.distributed.groups import current_groups
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.hooks import is_unmodified


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def precompute_freqs_cis(
    dim: int, end: int, theta: float = 10000.0, use_scaled: bool | RopeScaling = False
) -> Tensor:
    """RoPE rotations e^(i m f_j) for positions m < ``end``, with f_j = theta^(-2j / dim).

    Su et al., "RoFormer" (2021), section 3.2.2. Computed on the CPU in float32, so that the angles
    are the same on every device.

    Args:
        use_scaled: multiply wavelengths longer than the original context by a factor; those shorter
            than a quarter of it stay. True: with Llama 3.1's values.

    Returns:
        complex64 [end, dim / 2].
    """
    if theta <= 0 or not isinstance(use_scaled, bool | RopeScaling):
        raise ValueError(f"theta is {theta}, expected > 0; use_scaled {use_scaled}, expected bool")
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    frequencies = 1.0 / theta**exponents  # [dim / 2]
    if use_scaled:
        factor, low, high, context = RopeScaling() if isinstance(use_scaled, bool) else use_scaled
        n_periods = context * frequencies / (2 * math.pi)
        kept = ((n_periods - low) / (high - low)).clamp(0, 1)  # interpolated in between
        frequencies = kept * frequencies + (1 - kept) * frequencies / factor
    angles = torch.outer(torch.arange(end, device="cpu").float(), frequencies)  # [end, dim / 2]
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate each pair (x_2j, x_2j+1) of every head by its position's angle, in float32.

    Args:
        x: [..., S, H, D].
        freqs_cis: complex64 [S, D / 2], rows of ``precompute_freqs_cis``.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [..., S, H, D / 2]
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).to(x.dtype)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """``rotate`` of queries and keys."""
    return rotate(xq, freqs_cis), rotate(xk, freqs_cis)


def project(layer: "Attention", x: Tensor, freqs_cis: Tensor, batch: Batch) -> Tensor:
    """Rotated queries [T, H, D]; keys and values are stored."""
    layer.update_cache(x, freqs_cis, batch)
    q = layer.wq(x).view(-1, layer.n_local_heads, layer.head_dim)
    return layer.rotate(q, freqs_cis)


class Attention(PublishedAttention):
    """Grouped-query attention (Ainslie et al., 2023)."""

    # accel may replace these with equivalent implementations
    project: Callable[["Attention", Tensor, Tensor, Batch], Tensor] = staticmethod(project)
    rotate: Callable[[Tensor, Tensor], Tensor] = staticmethod(rotate)
    attend: Callable[[Tensor, KVCache, Batch], Tensor] = staticmethod(attention)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        tp_size = current_groups().size
        self.head_dim, self.n_local_heads = args.head_dim, args.n_heads // tp_size
        self.n_local_kv_heads = args.n_local_kv_heads(tp_size)
        self.cache = KVCache(args, tp_size)
        q_dim = args.n_heads * self.head_dim
        kv_dim = self.n_local_kv_heads * tp_size * self.head_dim
        self.wq = ColumnParallelLinear(args.dim, q_dim)
        self.wk = ColumnParallelLinear(args.dim, kv_dim)
        self.wv = ColumnParallelLinear(args.dim, kv_dim)
        self.wo = RowParallelLinear(q_dim, args.dim)

    def forward(self, x: Tensor, start_pos: int | Batch, freqs_cis: Tensor, mask: Mask) -> Tensor:
        """x: [T, dim] or [B, S, dim], in order. The other arguments: see ``as_pass``."""
        batch, freqs_cis, attend = self.as_pass(x, start_pos, freqs_cis, mask)
        q = self.project(self, x, freqs_cis, batch)
        y = attend(q, self.cache, batch)  # [T, H, D]
        return self.wo(y.reshape(*x.shape[:-1], -1))

    def update_cache(self, x: Tensor, freqs_cis: Tensor, batch: Batch) -> None:
        k = self.wk(x).view(-1, self.n_local_kv_heads, self.head_dim)  # [T, K, D]
        v = self.wv(x).view(-1, self.n_local_kv_heads, self.head_dim)  # [T, K, D]
        self.cache.update(self.rotate(k, freqs_cis), v, batch)


def swiglu(
    x: Tensor, w1: ColumnParallelLinear, w2: RowParallelLinear, w3: ColumnParallelLinear
) -> Tensor:
    """w2(silu(w1(x)) * w3(x)) (Shazeer, 2020)."""
    # in place: on a CPU, allocation costs more than the arithmetic
    return w2(F.silu(w1(x), inplace=True).mul_(w3(x)))


class FeedForward(nn.Module):
    compute: Callable[..., Tensor] = staticmethod(swiglu)  # as in Attention

    def __init__(
        self, dim: int, hidden_dim: int, multiple_of: int, ffn_dim_multiplier: float | None
    ) -> None:
        super().__init__()
        width = ModelArgs.ffn_width(hidden_dim, multiple_of, ffn_dim_multiplier)
        self.w1 = ColumnParallelLinear(dim, width)
        self.w2 = RowParallelLinear(width, dim)
        self.w3 = ColumnParallelLinear(dim, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.w1, self.w2, self.w3)


class TransformerBlock(nn.Module):
    def __init__(self, layer_id: int, args: ModelArgs) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.dim, self.n_heads, self.head_dim = args.dim, args.n_heads, args.head_dim
        self.attention = Attention(args)
        width = args.multiple_of, args.ffn_dim_multiplier
        self.feed_forward = FeedForward(args.dim, 4 * args.dim, *width)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor, start_pos: int | Batch, freqs_cis: Tensor, mask: Mask) -> Tensor:
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The model, or this rank's shard of it.

    Parameters are allocated on the default device but not initialized. The KV cache is allocated
    in the first pass and isn't part of the ``state_dict``.

    Raises:
        ValueError: ``args`` has no vocab_size, or can't be split over the ranks.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        args.resolve()
        self.params, self.vocab_size, self.n_layers = args, args.vocab_size, args.n_layers
        self.groups = current_groups()
        args.check_tp_size(self.groups.size)
        self.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, args) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size, gather_output=True)
        # a plain attribute, not a buffer: model.to(torch.bfloat16) must not round the angles
        self.freqs_cis = precompute_freqs_cis(
            args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling
        )
        self.lock = CacheLock()

    @property
    def dtype(self) -> torch.dtype:  # of activations
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.norm.weight.device

    cache = property(caches_of)

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int | Batch) -> Tensor:
        """Float32 logits over the full vocabulary, on every rank.

        Args:
            tokens: int64 [B, S], the next tokens of the first B slots, following those cached by
                earlier calls. Blocks see [B, S, dim].
            start_pos: position of the first one; or the batch of packed ``tokens`` [T], for callers
                that hold ``lock`` (blocks then see [T, dim]).

        Returns:
            [B, S, V]; for a Decode [B, V], for a Prefill [T, V], or [n, V] with ``logits_for``.

        Raises:
            ValueError: the tokens don't fit into the cache.
        """
        if isinstance(start_pos, Decode):
            return self.decode(tokens, start_pos)
        if isinstance(start_pos, Prefill):
            return self.logits(self.hidden(tokens, start_pos))
        n_rows, n_tokens = tokens.shape
        self.params.check_fits(n_rows, n_tokens, start_pos)
        ctx = self.groups.collective_call("Transformer.forward", tokens=tokens, start_pos=start_pos)
        with self.lock, ctx, fail_fast():
            caches_of(self)  # refuses a block that is two layers
            batch = next_tokens(n_rows, n_tokens, start_pos, tokens.device)
            return self.logits(self.hidden(tokens, batch))

    def decode(self, tokens: Tensor, batch: Decode) -> Tensor:
        """Float32 logits [B, V] after one more token [B] per sequence. accel may replace this."""
        return self.logits(self.hidden(tokens, batch))

    def hidden(self, tokens: Tensor, batch: Batch) -> Tensor:
        """Final hidden states [..., dim] of ``tokens``, or of those that ``logits_for`` selects."""
        h = self.tok_embeddings(tokens)  # [..., dim]
        if self.freqs_cis.device != h.device:
            self.freqs_cis = self.freqs_cis.to(h.device)
        # [T, D / 2], indexed as pairs of floats: some devices can't index complex tensors
        freqs_cis = torch.view_as_complex(torch.view_as_real(self.freqs_cis)[batch.positions])
        *blocks, last = cast(list[TransformerBlock], self.layers)
        for layer in blocks:
            h = layer(h, batch, freqs_cis, None)
        is_plain = type(last) is TransformerBlock and type(last.attention) is Attention
        if batch.logits_for is None or not (is_plain and is_unmodified(last)):
            return batch.select(self.norm(last(h, batch, freqs_cis, None)))
        # the other tokens' keys and values are still needed, but not their outputs
        last.attention.update_cache(last.attention_norm(h), freqs_cis, batch)
        if not batch.logits_for:
            return h[:0]
        h, freqs_cis = batch.select(h), batch.select(freqs_cis)
        return self.norm(last(h, batch.of_last_tokens(), freqs_cis, None))

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [..., V] of final hidden states [..., dim]."""
        return self.output(hidden).float()

    def __getstate__(self) -> dict[str, object]:
        """Copies decode unaccelerated: a compiled or captured step is bound to the original."""
        return {key: value for key, value in vars(self).items() if key != "decode"}
