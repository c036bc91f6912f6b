"""Decoding steps compiled with torch.compile."""

import warnings

import torch
from torch import Tensor

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


def compiled_decode(model: Transformer) -> DecodeFunction:
    """``model.decode`` compiled twice, once tuned for a single row and once for larger batches,
    both for any length."""
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.rotate = rotate_real
    # only the table is complex, and it is read as pairs of real numbers
    warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex")
    decode = model.decode

    def step(tokens: Tensor, positions: Tensor, max_seqlen_k: int, ragged: bool) -> Tensor:
        return decode(tokens, Decode(positions, max_seqlen_k, ragged=ragged))

    mode = "max-autotune-no-cudagraphs" if model.device.type == "cuda" else "default"
    one = torch.compile(step, fullgraph=True, dynamic=True, mode=mode)
    many = torch.compile(step, fullgraph=True, dynamic=True)

    def compiled(tokens: Tensor, batch: Decode) -> Tensor:
        if not is_unmodified(model):
            return decode(tokens, batch)
        if len(tokens) == 1:
            return one(tokens, batch.positions, batch.max_seqlen_k, batch.ragged)
        return many(tokens, batch.positions, batch.max_seqlen_k, True)

    return compiled
