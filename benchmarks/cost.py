"""Bytes and operations of a step: the formulas of docs/performance.md.

    python benchmarks/cost.py

prints the table of expected speeds there.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from llama import ModelArgs
from llama.checkpoint.sharding import quantized_bits, quantized_bytes, shard_specs
from llama.quantize import parse_quantize


def linear_parameters(args: ModelArgs) -> int:
    """Weights that every token is multiplied with, except for the output layer."""
    kv = args.kv_heads * args.head_dim
    layer = 2 * args.dim * (args.dim + kv) + 3 * args.dim * args.ffn_hidden_dim
    return args.n_layers * layer


def weight_bytes(args: ModelArgs, n_ranks: int, size: int, quantize: str | None = None) -> float:
    """Bytes of weights that one rank reads in a step, at ``size`` bytes each unless they are
    quantized (one row of the embedding is negligible)."""
    if quantize is not None:
        specs = shard_specs(args)
        bits = quantized_bits(specs, parse_quantize(quantize))
        return sum(quantized_bytes(specs[key], n_ranks, n) for key, n in bits.items())
    return size * (linear_parameters(args) + args.vocab_size * args.dim) / n_ranks


def cache_bytes(args: ModelArgs, n_ranks: int, size: int) -> int:
    """Bytes of KV cache per position on one rank."""
    return 2 * args.n_layers * args.n_local_kv_heads(n_ranks) * args.head_dim * size


def step_bytes(
    args: ModelArgs, n_ranks: int, size: int, batch: int, context: int, quantize: str | None = None
) -> float:
    """Bytes that one rank reads to decode a token for each of ``batch`` rows."""
    weights = weight_bytes(args, n_ranks, size, quantize)
    return weights + batch * context * cache_bytes(args, n_ranks, size)


def step_flops(args: ModelArgs, n_ranks: int, batch: int, context: int) -> float:
    """A multiplication and an addition per weight, and per element of the keys and values that each
    query head attends to."""
    weights = linear_parameters(args) + args.vocab_size * args.dim
    attention = 2 * args.n_layers * args.dim * context
    return 2 * batch * (weights + attention) / n_ranks


def prefill_flops(args: ModelArgs, n_ranks: int, length: int) -> float:
    """The same for a prompt: causal attention, logits of the last token only, and in the last layer
    only keys and values of the other tokens."""
    layer = linear_parameters(args) // args.n_layers
    kv = 2 * args.dim * args.kv_heads * args.head_dim
    others = args.n_layers - 1
    weights = (others * layer + kv) * length + layer + args.vocab_size * args.dim
    attention = others * args.dim * length**2 + 2 * args.dim * length
    return 2 * (weights + attention) / n_ranks


def sent_bytes(args: ModelArgs, n_ranks: int, size: int, n_tokens: int) -> float:
    """Bytes that one rank sends: two all-reduces per layer and one after the embedding, each of
    2 (N - 1) / N times its size in a ring."""
    size_of_one = n_tokens * args.dim * size
    return (2 * args.n_layers + 1) * size_of_one * 2 * (n_ranks - 1) / n_ranks


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Achievable rates, which are below those in data sheets.

    Attributes:
        bandwidth: bytes per second from memory.
        rate: bfloat16 operations per second of large products.
        link: bytes per second that one device sends to the others.
        latency: seconds of the smallest all-reduce.
    """

    bandwidth: float
    rate: float
    link: float
    latency: float


# 3.35 TB/s and 989 TFLOP/s in the data sheet
H100_NODE = Hardware(bandwidth=3.0e12, rate=6.5e14, link=3.5e11, latency=1.2e-5)
H100_TWO_NODES = Hardware(bandwidth=3.0e12, rate=6.5e14, link=4.5e10, latency=3.5e-5)


def _communication(args: ModelArgs, n_ranks: int, n_tokens: int, hardware: Hardware) -> float:
    if n_ranks == 1:
        return 0.0
    sent = sent_bytes(args, n_ranks, 2, n_tokens)
    return sent / hardware.link + (2 * args.n_layers + 1) * hardware.latency


def step_seconds(
    args: ModelArgs, n_ranks: int, batch: int, context: int, hardware: Hardware
) -> float:
    """The slower of reading and computing, plus communication; in bfloat16."""
    read = step_bytes(args, n_ranks, 2, batch, context) / hardware.bandwidth
    computed = step_flops(args, n_ranks, batch, context) / hardware.rate
    return max(read, computed) + _communication(args, n_ranks, batch, hardware)


def prefill_seconds(args: ModelArgs, n_ranks: int, length: int, hardware: Hardware) -> float:
    computed = prefill_flops(args, n_ranks, length) / hardware.rate
    return computed + _communication(args, n_ranks, length, hardware)


SHAPE_405B: dict[str, Any] = {
    "dim": 16384,
    "n_layers": 126,
    "n_heads": 128,
    "n_kv_heads": 8,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.2,
    "vocab_size": 128256,
}


def table() -> list[str]:
    """The expected speeds as rows of a Markdown table."""
    from benchmarks.shapes import SHAPES

    shapes = {
        "8B": ModelArgs(**SHAPES["8B"].params),
        "70B": ModelArgs(**SHAPES["70B-rank-of-8"].params),
        "405B": ModelArgs(**SHAPE_405B),
    }
    rows = [
        "| Model | GPUs | weights per GPU | batch 1 | batch 32 | batch 128 | prefill of 8192 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, args in shapes.items():
        for n_ranks in (1, 8, 16):
            weights = (
                weight_bytes(args, n_ranks, 2) + 2 * args.vocab_size * args.dim / n_ranks
            ) / 1e9
            cells = [f"{weights:.0f} GB"]
            if weights > 76:
                cells += ["does not fit"] + ["-"] * 3
            else:
                hardware = H100_TWO_NODES if n_ranks > 8 else H100_NODE
                for batch in (1, 32, 128):
                    rate = batch / step_seconds(args, n_ranks, batch, 1024, hardware)
                    cells.append(f"{rate:.0f} tokens/s")
                rate = 8192 / prefill_seconds(args, n_ranks, 8192, hardware)
                cells.append(f"{rate:.0f} tokens/s")
            rows.append(f"| {name} | {n_ranks} | {' | '.join(cells)} |")
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
