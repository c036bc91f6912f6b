"""FlashAttention, and decoding steps as CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor

from llama.cache import Batch, Decode, KVCache
from llama.hooks import is_unmodified
from llama.model import Transformer

DecodeFunction = Callable[[Tensor, Decode], Tensor]
# Takes a function; returns one that replays it, and the tensor that holds the result.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]


def flash_attention(q: Tensor, cache: KVCache, batch: Batch) -> Tensor:
    """``attention`` in one call of FlashAttention's varlen kernel (Dao, 2023), for prefill and
    decode: it supports ragged lengths and grouped queries, splits long sequences over the device,
    and reads the lengths there, so that a CUDA graph can capture it."""
    # the cache as one sequence of max_batch_size * max_seq_len tokens [., K, D]
    k, v = (x.transpose(1, 2).flatten(0, 1) for x in (cache.k, cache.v))
    cu_seqlens_q, cu_seqlens_k = batch.cu_seqlens(cache.k.shape[2])
    return _flash_kernel(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        batch.max_seqlen_q,
        batch.max_seqlen_k,
        seqused_k=batch.seqlens_k,
    )


def _flash_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_k: Tensor,
) -> Tensor:
    # torch.nn.attention.varlen.varlen_attn has seqused_k from torch 2.12 on; it calls this
    # operator, available since torch 2.4. The causal mask is aligned bottom-right.
    outputs = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        0.0,
        True,
        False,
        seqused_k=seqused_k,
    )
    return outputs[0]


class GraphedStep:
    """``Transformer.decode``, captured once for each of a few sizes and then replayed.

    The batch is padded to a power of two, and the padding rows are computed and dropped. The length
    is padded too, unless attention reads the lengths on the device.
    """

    def __init__(
        self, model: Transformer, decode: DecodeFunction, *, any_length: bool, capture: Capture
    ) -> None:
        self._model, self._decode, self._capture = model, decode, capture
        self._any_length = any_length
        self._captured: dict[
            tuple[int, int], tuple[Tensor, Tensor, Tensor, Callable[[], object], Tensor]
        ] = {}
        self._cache: list[Tensor] = []

    def __call__(self, tokens: Tensor, batch: Decode) -> Tensor:
        if not is_unmodified(self._model):  # a graph would replay without the hooks
            return self._decode(tokens, batch)
        args = self._model.params
        n = len(tokens)
        n_rows = _round_up(n, args.max_batch_size)
        length = args.max_seq_len
        if not self._any_length:
            length = _round_up(batch.max_seqlen_k, args.max_seq_len, 256)
        cache = [layer.k for layer in self._model.cache]
        if [*map(id, cache)] != [*map(id, self._cache)]:  # the graphs hold the old addresses
            self._captured.clear()
            self._cache = cache
        is_new = (n_rows, length) not in self._captured
        if is_new:  # padding rows write to the last position, which idle slots never use
            all_tokens = tokens.new_zeros(n_rows)
            all_positions = batch.positions.new_full((n_rows,), args.max_seq_len - 1)
            all_seqlens = batch.seqlens_k.new_ones(n_rows)
        else:
            all_tokens, all_positions, all_seqlens, replay, logits = self._captured[n_rows, length]
        all_tokens[:n] = tokens
        all_positions[:n], all_positions[n:] = batch.positions, args.max_seq_len - 1
        all_seqlens[:n], all_seqlens[n:] = batch.seqlens_k, 1
        if is_new:  # capturing runs the step, so its inputs must already be set

            def step() -> Tensor:
                padded = Decode(
                    all_positions, length, ragged=not self._any_length, seqlens_k=all_seqlens
                )
                return self._decode(all_tokens, padded)

            replay, logits = self._capture(step)
            self._captured[n_rows, length] = all_tokens, all_positions, all_seqlens, replay, logits
        replay()
        return logits[:n]


def _round_up(n: int, limit: int, least: int = 1) -> int:
    """Round up to a power of two, at least ``least`` and at most ``limit``."""
    return min(max(least, 1 << (n - 1).bit_length()), limit)


def cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Capture a function as a CUDA graph, including NCCL collectives."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # warm up: libraries and compilers initialize before the capture
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog thread may call CUDA during the capture
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = run()
    return graph.replay, output
