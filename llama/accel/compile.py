"""Decoding steps compiled with torch.compile."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as config

from llama.accel.cuda import DecodeFunction
from llama.cache import Decode
from llama.hooks import is_unmodified
from llama.model import Attention, Transformer


def rotate_real(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """``model.rotate`` in real arithmetic: torch.compile doesn't fuse complex operations."""
    cos, sin = torch.view_as_real(freqs_cis)[:, None].unbind(-1)  # [S, 1, D / 2] each
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [..., S, H, D / 2] each
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def _for_any_size(step: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """``step`` compiled once. Sizes that are equal in the first call, as the batch and the slots of
    a full cache, may differ later: by default torch would compile again."""
    compiled = torch.compile(step, fullgraph=True, dynamic=True, **options)
    is_first = True

    def call(*arguments: object) -> Tensor:
        nonlocal is_first
        if not is_first:
            return compiled(*arguments)
        with config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            result = compiled(*arguments)
        is_first = False
        return result

    return call


def compiled_decode(model: Transformer) -> DecodeFunction:
    """``model.decode`` compiled twice, once tuned for a single row and once for larger batches,
    both for any length."""
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.rotate = rotate_real
    # only the table is complex, and it is read as pairs of real numbers
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    decode = model.decode

    def step(
        tokens: Tensor, positions: Tensor, seqlens_k: Tensor, max_seqlen_k: int, ragged: bool
    ) -> Tensor:
        return decode(tokens, Decode(positions, max_seqlen_k, ragged=ragged, seqlens_k=seqlens_k))

    mode = "max-autotune-no-cudagraphs" if model.device.type == "cuda" else "default"
    one, many = _for_any_size(step, mode=mode), _for_any_size(step)

    def compiled(tokens: Tensor, batch: Decode) -> Tensor:
        if not is_unmodified(model):
            return decode(tokens, batch)
        run, ragged = (one, batch.ragged) if len(tokens) == 1 else (many, True)
        return run(tokens, batch.positions, batch.seqlens_k, batch.max_seqlen_k, ragged)

    return compiled
