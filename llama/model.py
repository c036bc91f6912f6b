"""Llama as mathematics: one page from token ids to logits.

Touvron et al., "LLaMA" (2023), section 2.2, and "The Llama 3 Herd of Models" (2024), section 3.2.
Everything else in this package is about getting text in, weights in, and tokens out.

Shapes: B rows (sequences), S tokens of each, T tokens in all; H query heads and K key/value heads
of this rank, D their size; L positions in the cache that are looked at; V vocabulary.
"""

import dataclasses
import functools
import itertools
import math
import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    computing,
    current_groups,
)

# Llama 3.1's scaling of RoPE; only its factor differs between models.
ORIGINAL_CONTEXT = 8192
LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR = 1.0, 4.0


@dataclasses.dataclass
class ModelArgs:
    """Shape of a model, by the names of params.json, and the size of its key/value cache.

    Raises:
        ValueError: a field has an impossible value; the message names the field.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None  # None: as many as n_heads
    vocab_size: int = -1  # -1: as many as the tokenizer has
    multiple_of: int = 256  # the width of the feed-forward layer is rounded up to a multiple
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000
    max_batch_size: int = 32
    max_seq_len: int = 2048
    use_scaled_rope: bool = False
    rope_scaling_factor: float = 8.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            if field.name == "use_scaled_rope":
                valid, expected = isinstance(value, bool), "true or false"
            elif field.type in (int, int | None):
                limit = 2**12 if field.name == "n_layers" else 2**24
                valid = type(value) is int and 0 < value < limit
                expected = f"a positive integer below {limit}"
                if field.name == "vocab_size":
                    valid, expected = valid or value == -1, f"{expected}, or -1"
            else:
                valid = type(value) in (int, float) and 0 < value < 1e12
                expected = "a positive number below 1e12"
            if not valid:
                raise ValueError(f"{field.name} is {value!r:.40}, expected {expected}")
        if self.dim % (2 * self.n_heads):
            raise ValueError(
                f"dim is {self.dim} and n_heads {self.n_heads}, expected dim to be a multiple of "
                "2 * n_heads: each head is dim / n_heads wide, and RoPE turns pairs of its numbers"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_kv_heads is {self.n_kv_heads}, expected a divisor of n_heads ({self.n_heads})"
            )
        if self.ffn_hidden_dim >= 2**24:
            raise ValueError(
                f"ffn_dim_multiplier is {self.ffn_dim_multiplier}, which makes the feed-forward "
                f"layer {self.ffn_hidden_dim} wide, expected less than {2**24}"
            )

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_hidden_dim(self) -> int:
        """Two thirds of 4 dim (SwiGLU has three matrices, not two), scaled and rounded up."""
        hidden = int((self.ffn_dim_multiplier or 1.0) * int(2 * (4 * self.dim) / 3))
        return -(-hidden // self.multiple_of) * self.multiple_of

    @property
    def rank_counts(self) -> list[int]:
        """Numbers of ranks the model can be split over: those that divide its query heads, its
        feed-forward width and its vocabulary, and divide or repeat its key/value heads."""

        def splits(n: int) -> bool:
            widths = (self.n_heads, self.ffn_hidden_dim, self.vocab_size)
            kv_heads = max(n, self.kv_heads) % min(n, self.kv_heads)
            return kv_heads == 0 and not any(width % n for width in widths)

        return [n for n in range(1, min(self.n_heads, 1024) + 1) if splits(n)]

    def kv_heads_of(self, n_ranks: int) -> int:
        """Key/value heads that each of ``n_ranks`` holds: with more ranks than heads one, the head
        that its query heads share."""
        return max(1, self.kv_heads // n_ranks)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def precompute_freqs_cis(
    dim: int, end: int, theta: float = 10000.0, scaling_factor: float | None = None
) -> Tensor:
    """RoPE's rotations e^(i m f_j) of positions m < ``end``, f_j = theta^(-2j / dim).

    Su et al., "RoFormer" (2021), section 3.2.2. ``scaling_factor`` is Llama 3.1's stretching of
    the low frequencies (see ``_scale_frequencies``). Computed on the CPU in float32, so that every
    device has the same angles.

    Returns:
        complex64 [end, dim / 2].
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    frequencies = 1.0 / theta**exponents  # [dim / 2]
    if scaling_factor is not None:
        frequencies = _scale_frequencies(frequencies, scaling_factor)
    positions = torch.arange(end, dtype=torch.float32, device="cpu")
    angles = torch.outer(positions, frequencies)  # [end, dim / 2]
    return torch.polar(torch.ones_like(angles), angles)


def _scale_frequencies(frequencies: Tensor, factor: float) -> Tensor:
    """Llama 3.1's long context: waves longer than the original context become ``factor`` times
    longer, waves shorter than a quarter of it stay, those between are interpolated in 1 / wave."""
    waves = ORIGINAL_CONTEXT * frequencies / (2 * math.pi)  # in the original context
    low, high = LOW_FREQ_FACTOR, HIGH_FREQ_FACTOR
    kept = ((waves - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: unchanged
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Turn each pair (x_2j, x_2j+1) of every head by its position's angle, in float32.

    Args:
        x: [..., S, H, D].
        freqs_cis: complex64 [S, D / 2], the rows of ``precompute_freqs_cis`` for these positions.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [..., S, H, D / 2]
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).to(x.dtype)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """``rotate`` for queries and keys at once, under the name that other code knows."""
    return rotate(xq, freqs_cis), rotate(xk, freqs_cis)


class KVCache:
    """Keys and values of one layer: two tensors [max_batch_size, K, max_seq_len, D]."""

    def __init__(self, args: ModelArgs, n_ranks: int, like: Tensor) -> None:
        n_kv_heads = args.kv_heads_of(n_ranks)
        shape = (args.max_batch_size, n_kv_heads, args.max_seq_len, args.head_dim)
        self.k = _zeros(shape, like)
        self.v = _zeros(shape, like)


def _zeros(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Zeros with the dtype and on the device of ``like``. Zeros, because a masked position still
    counts as 0 x value, and 0 x NaN is NaN. On the CPU a page takes memory once it is written to;
    torch.zeros would write to all of them. Private, so that a forked process has its own. Other
    devices have the heads of a position side by side in memory, as their kernels want them."""
    if like.device.type != "cpu":
        n_rows, n_heads, n_positions, head_dim = shape
        shape = (n_rows, n_positions, n_heads, head_dim)
        return torch.zeros(shape, dtype=like.dtype, device=like.device).transpose(1, 2)
    n_bytes = math.prod(shape) * like.element_size()
    pages = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)


class CacheLock:
    """Held while a model's cache is in use, so that calls from several threads run in turn. A copy
    of the model has a lock of its own, and so has a forked process, which lacks the other threads:
    those that may hold the lock, and OpenMP's, for which libgomp would wait for ever."""

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


class Span(NamedTuple):
    """Consecutive tokens of one row: ``length`` of them, the first at position ``start``."""

    start: int
    length: int


@dataclasses.dataclass
class Places:
    """Where the T tokens of one pass stand: the cache row and the position of each.

    Attributes:
        rows, positions: int64 [T].
        spans: the tokens as spans of rows 0, 1, ...; None if they are one token of each row.
        length: L, the positions that are looked at.
        mask: without spans: bool [B, 1, 1, L], true where a row may look; None if everywhere.
    """

    rows: Tensor
    positions: Tensor
    spans: Sequence[Span] | None
    length: int
    mask: Tensor | None = None

    @functools.cached_property
    def starts(self) -> Tensor:
        """int32 [B + 1]: where the tokens of each row begin, for kernels that take them packed."""
        if self.spans is None:
            return torch.arange(len(self.rows) + 1, dtype=torch.int32, device=self.rows.device)
        starts = itertools.accumulate((s.length for s in self.spans), initial=0)
        return torch.tensor(list(starts), dtype=torch.int32, device=self.rows.device)

    @functools.cached_property
    def used(self) -> Tensor:
        """int32 [B]: how many positions of each row are in use, for such kernels."""
        if self.spans is None:
            return (self.positions + 1).int()
        ends = [s.start + s.length for s in self.spans]
        return torch.tensor(ends, dtype=torch.int32, device=self.rows.device)

    def ends(self) -> tuple[Tensor, "Places"]:
        """Of spans: which of the T tokens are the last of their rows, int64 [B], and where they
        stand."""
        assert self.spans is not None
        last = self.starts[1:].long() - 1
        ragged = len({s.start + s.length for s in self.spans}) > 1
        return last, Places.of_step(self.positions[last], self.length, masked=ragged)

    @staticmethod
    def of_spans(spans: Sequence[Span], device: torch.device) -> "Places":
        """Prompts, or pieces of them: one span for each of the first rows."""
        rows = [torch.full((s.length,), row, device=device) for row, s in enumerate(spans)]
        positions = [torch.arange(s.start, s.start + s.length, device=device) for s in spans]
        length = max(s.start + s.length for s in spans)
        return Places(torch.cat(rows), torch.cat(positions), spans, length)

    @staticmethod
    def of_step(positions: Tensor, length: int, *, masked: bool) -> "Places":
        """One token for each of the first B rows, at ``positions`` int64 [B] below ``length``.

        Args:
            masked: not all of them are at ``length`` - 1.
        """
        rows = torch.arange(len(positions), device=positions.device)
        mask = None
        if masked:
            everywhere = torch.arange(length, device=positions.device)  # [L]
            mask = (everywhere <= positions[:, None])[:, None, None]
        return Places(rows, positions, None, length, mask)


def attention(xq: Tensor, cache: KVCache, places: Places) -> Tensor:
    """Let every token look at its row up to itself.

    Args:
        xq: queries [T, H, D].

    Returns:
        [T, H, D].
    """
    if places.spans is None:
        n_rows = len(places.rows)
        k = cache.k[:n_rows, :, : places.length]  # [B, K, L, D]
        v = cache.v[:n_rows, :, : places.length]
        return _grouped_attention(xq[:, :, None], k, v, places.mask).squeeze(2)
    outputs = []
    for row, (span, q) in enumerate(
        zip(places.spans, xq.split([s.length for s in places.spans]), strict=True)
    ):
        q = q.transpose(0, 1)  # [H, S, D]
        end = span.start + span.length
        k, v = cache.k[row, :, :end], cache.v[row, :, :end]  # [K, L, D]
        if span.start == 0:
            q = q.unflatten(0, (len(k), -1))  # [K, H / K, S, D]
            k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(0, 1)
        else:  # is_causal would let the first of S tokens look at position 0 only
            mask = torch.ones(span.length, end, dtype=torch.bool, device=q.device)
            y = _grouped_attention(q[None], k[None], v[None], mask.tril(span.start))[0]
        outputs.append(y.transpose(0, 1))  # [S, H, D]
    return torch.cat(outputs)


def _grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of q [B, H, S, D] under a mask [..., S, L], with the H / K query heads that share
    a key head written as further tokens: SDPA's enable_gqa may leave its fast kernels."""
    n_rows, n_heads, n_tokens, head_dim = q.shape
    n_kv_heads = k.shape[1]
    if mask is not None and n_tokens > 1:
        mask = mask.repeat(n_heads // n_kv_heads, 1)  # [H / K * S, L]
    q = q.reshape(n_rows, n_kv_heads, -1, head_dim)  # [B, K, H / K * S, D]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # kernels differ in its strides
    return y.reshape(n_rows, n_heads, n_tokens, head_dim)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al., 2023)."""

    # what fast.py may exchange for the same in another form
    rotate: Callable[[Tensor, Tensor], Tensor] = staticmethod(rotate)
    attend: Callable[..., Tensor] = staticmethod(attention)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        n_ranks = current_groups().size
        kv_dim = args.kv_heads_of(n_ranks) * n_ranks * args.head_dim
        self.wq = ColumnParallelLinear(args.dim, args.dim)
        self.wk = ColumnParallelLinear(args.dim, kv_dim)
        self.wv = ColumnParallelLinear(args.dim, kv_dim)
        self.wo = RowParallelLinear(args.dim, args.dim)

    def forward(self, x: Tensor, freqs_cis: Tensor, cache: KVCache, places: Places) -> Tensor:
        self.remember(x, freqs_cis, cache, places)
        xq = self.wq(x).unflatten(-1, (-1, self.head_dim))  # [T, H, D]
        y = self.attend(self.rotate(xq, freqs_cis), cache, places)  # [T, H, D]
        return self.wo(y.flatten(1))  # [T, dim]

    def remember(self, x: Tensor, freqs_cis: Tensor, cache: KVCache, places: Places) -> None:
        """Write keys and values into the cache."""
        xk = self.wk(x).unflatten(-1, (-1, self.head_dim))  # [T, K, D]
        xv = self.wv(x).unflatten(-1, (-1, self.head_dim))  # [T, K, D]
        cache.k[places.rows, :, places.positions] = self.rotate(xk, freqs_cis)
        cache.v[places.rows, :, places.positions] = xv


def swiglu(
    x: Tensor, w1: ColumnParallelLinear, w2: RowParallelLinear, w3: ColumnParallelLinear
) -> Tensor:
    """w2(silu(w1(x)) * w3(x)) (Shazeer, 2020)."""
    # in place: on a CPU new memory costs more than the arithmetic
    return w2(F.silu(w1(x), inplace=True).mul_(w3(x)))


class FeedForward(nn.Module):
    compute: Callable[..., Tensor] = staticmethod(swiglu)  # as in Attention

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = ColumnParallelLinear(args.dim, args.ffn_hidden_dim)
        self.w2 = RowParallelLinear(args.ffn_hidden_dim, args.dim)
        self.w3 = ColumnParallelLinear(args.dim, args.ffn_hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, self.w1, self.w2, self.w3)


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor, freqs_cis: Tensor, cache: KVCache, places: Places) -> Tensor:
        h = x + self.attention(self.attention_norm(x), freqs_cis, cache, places)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The model, or this rank's part of it.

    Parameters are allocated but not set, on the default device. The key/value cache is allocated
    at the first pass and then stays where it is; it is no part of the ``state_dict``.

    Raises:
        ValueError: ``args`` has no vocab_size yet, or does not divide by the number of ranks.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.params = args
        self.groups = current_groups()
        self._check_divisible()
        self.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(args) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, eps=args.norm_eps)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size, gather_output=True)
        # an attribute and no buffer: model.to(torch.bfloat16) must not round the angles
        self.freqs_cis = precompute_freqs_cis(
            args.head_dim,
            args.max_seq_len,
            args.rope_theta,
            args.rope_scaling_factor if args.use_scaled_rope else None,
        )
        self.cache: list[KVCache] | None = None
        self.cache_user: object = None  # whose content the cache holds; None: forward's
        self.lock = CacheLock()

    @torch.inference_mode()
    def forward(self, tokens: Tensor, start_pos: int) -> Tensor:
        """Logits of ``tokens`` at positions ``start_pos`` on, after what earlier calls wrote.

        Args:
            tokens: int64 [B, S].

        Returns:
            float32 [B, S, V], the full vocabulary on every rank.

        Raises:
            ValueError: the tokens do not fit into the cache.
        """
        n_rows, n_tokens = tokens.shape
        args = self.params
        if not 0 < n_rows <= args.max_batch_size or n_tokens == 0:
            raise ValueError(
                f"tokens have the shape {tuple(tokens.shape)}, expected 1 to {args.max_batch_size} "
                "(max_batch_size) rows of at least one token"
            )
        if not 0 <= start_pos <= args.max_seq_len - n_tokens:
            raise ValueError(
                f"{n_tokens} tokens at start_pos {start_pos} leave the positions 0 to "
                f"{args.max_seq_len - 1} (max_seq_len {args.max_seq_len})"
            )
        call = self.groups.one_call("Transformer.forward", tokens=tokens, start_pos=start_pos)
        with self.lock, call, computing():
            self.cache_user = None
            if n_tokens == 1:
                positions = torch.full((n_rows,), start_pos, device=tokens.device)
                return self.step(tokens[:, 0], positions, start_pos + 1, masked=False)[:, None]
            places = Places.of_spans([Span(start_pos, n_tokens)] * n_rows, tokens.device)
            return self.logits(self.hidden(tokens.flatten(), places)).view(n_rows, n_tokens, -1)

    def step(self, tokens: Tensor, positions: Tensor, length: int, *, masked: bool) -> Tensor:
        """Float32 logits [B, V] after one more token for each of the first B rows; the arguments
        are those of ``Places.of_step``."""
        return self.logits(self.hidden(tokens, Places.of_step(positions, length, masked=masked)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        self.cache = None  # model.to(...) changes device or dtype: the next pass allocates anew
        return super()._apply(fn, recurse)

    def hidden(self, tokens: Tensor, places: Places, *, ends_only: bool = False) -> Tensor:
        """Final hidden states [T, dim] of ``tokens`` int64 [T], which stand at ``places``.

        Args:
            ends_only: of spans, those of the last token of each row alone, [B, dim].
        """
        h = self.tok_embeddings(tokens)  # [T, dim]
        if self.cache is None:
            with torch.inference_mode(False):  # else no pass outside of it could write to them
                self.cache = [KVCache(self.params, self.groups.size, h) for _ in self.layers]
                self.freqs_cis = self.freqs_cis.to(h.device)
        # gathered as real numbers: not every device gathers complex ones
        turns = torch.view_as_real(self.freqs_cis)[places.positions]  # [T, D / 2, 2]
        freqs_cis = torch.view_as_complex(turns)
        last = cast(TransformerBlock, self.layers[-1])
        for layer, cache in zip(self.layers, self.cache, strict=True):
            if ends_only and layer is last:
                # of the other tokens, nothing but keys and values is looked at from here on
                last.attention.remember(last.attention_norm(h), freqs_cis, cache, places)
                ends, places = places.ends()
                h, freqs_cis = h[ends], freqs_cis[ends]
            h = layer(h, freqs_cis, cache, places)
        return self.norm(h)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits [T, V] of final hidden states [T, dim]."""
        return self.output(hidden).float()

    def _check_divisible(self) -> None:
        args, n_ranks = self.params, self.groups.size
        if args.vocab_size == -1:
            raise ValueError("vocab_size is -1, expected the tokenizer's n_words")
        if n_ranks not in args.rank_counts:
            raise ValueError(
                f"{args.n_heads} query heads, {args.kv_heads} key/value heads, a feed-forward "
                f"width of {args.ffn_hidden_dim} and a vocabulary of {args.vocab_size} do not "
                f"divide by {n_ranks} ranks, but by {', '.join(map(str, args.rank_counts))}"
            )
