"""The oracle: a plain float64 Llama, no KV cache and no batching. Imports nothing from llama.

RoPE angles are float32, as in every published implementation: near position 8192 they differ from
the exact values by 5e-4, and the models were trained with the float32 ones.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def logits(
    weights: Mapping[str, Tensor], params: Mapping[str, Any], tokens: Sequence[int], start: int = 0
) -> Tensor:
    """float64 [S, V] logits of one sequence at positions ``start`` on, with an empty context before
    it. ``weights`` are unsharded, with native names."""
    w = {key: tensor.double() for key, tensor in weights.items()}
    n_heads = params["n_heads"]
    n_kv_heads = params.get("n_kv_heads") or n_heads
    head_dim = params["dim"] // n_heads
    n_tokens = len(tokens)
    angle = angles(params, start, n_tokens)
    x = torch.stack([w["tok_embeddings.weight"][token] for token in tokens])
    for i in range(params["n_layers"]):
        layer = f"layers.{i}."
        h = normed(x, w[layer + "attention_norm.weight"], params["norm_eps"])
        q = rotated((h @ w[layer + "attention.wq.weight"].T).view(n_tokens, n_heads, -1), angle)
        k = rotated((h @ w[layer + "attention.wk.weight"].T).view(n_tokens, n_kv_heads, -1), angle)
        v = (h @ w[layer + "attention.wv.weight"].T).view(n_tokens, n_kv_heads, -1)
        mixed = torch.zeros(n_tokens, n_heads, head_dim, dtype=torch.float64)
        for head in range(n_heads):
            shared = head // (n_heads // n_kv_heads)
            for t in range(n_tokens):
                scores = (k[: t + 1, shared] @ q[t, head]) / math.sqrt(head_dim)
                mixed[t, head] = torch.softmax(scores, dim=0) @ v[: t + 1, shared]
        x = x + mixed.flatten(1) @ w[layer + "attention.wo.weight"].T
        h = normed(x, w[layer + "ffn_norm.weight"], params["norm_eps"])
        gate = h @ w[layer + "feed_forward.w1.weight"].T
        up = h @ w[layer + "feed_forward.w3.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ w[layer + "feed_forward.w2.weight"].T
    return normed(x, w["norm.weight"], params["norm_eps"]) @ w["output.weight"].T


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + eps) * weight


def angles(params: Mapping[str, Any], start: int, n_tokens: int) -> Tensor:
    """float32 RoPE angles of positions ``start`` on, as float64 [S, D / 2]."""
    head_dim = params["dim"] // params["n_heads"]
    frequencies = []
    for j in range(0, head_dim, 2):
        exponent = torch.tensor(j, dtype=torch.float32) / head_dim
        frequency = 1.0 / (params["rope_theta"] ** exponent)
        if params.get("use_scaled_rope"):
            wave = 2 * math.pi / frequency
            factor = params.get("rope_scaling_factor", 8.0)
            if wave > 8192:
                frequency = frequency / factor
            elif wave > 8192 / 4:
                smooth = (8192 / wave - 1) / (4 - 1)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        frequencies.append(frequency)
    positions = torch.arange(start, start + n_tokens).float()
    return (positions[:, None] * torch.stack(frequencies)).double()


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    """[S, H, D] with the pair (x_2j, x_2j+1) rotated by angle j."""
    out = torch.empty_like(x)
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def relative_error(a: Tensor, b: Tensor) -> float:
    """max |a - b| / max |b|."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
