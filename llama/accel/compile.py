"""Decoding steps compiled with torch.compile."""

import warnings

import torch
from torch import Tensor

from llama.accel.cuda import DecodeFunction
from llama.accel.projection import rotate_real
from llama.cache import Decode
from llama.hooks import is_unmodified
from llama.model import Attention, Transformer


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
