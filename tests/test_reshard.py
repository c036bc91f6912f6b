"""Resharding from any number of shards to any number of ranks, as pure functions."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama import ModelArgs
from llama.checkpoint.sharding import (
    ShardSpec,
    copies,
    local_slices,
    n_bytes,
    narrow,
    shard_specs,
)

COUNTS = [1, 2, 4, 8, 16]


def shape(kv_heads: int = 4, **changes: Any) -> ModelArgs:
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 16, "vocab_size": 48, "multiple_of": 16}
    return ModelArgs(n_kv_heads=kv_heads, **(sizes | changes))


def numbered(sizes: tuple[int, ...]) -> Tensor:
    return torch.arange(math.prod(sizes)).reshape(sizes)


def split(cut: ShardSpec, tensor: Tensor, n: int) -> list[Tensor]:
    return [narrow(tensor, local_slices(cut, n, rank)).clone() for rank in range(n)]


def moved(source: ShardSpec, shards: list[Tensor], target: ShardSpec, n_ranks: int) -> list[Tensor]:
    """Each rank's tensor; checks that every element is written exactly once."""
    results = []
    for rank in range(n_ranks):
        result = torch.full([b - a for a, b in local_slices(target, n_ranks, rank)], -1)
        for read in copies(source, len(shards), target, n_ranks, rank):
            where = narrow(result, read.target)
            assert (where == -1).all()
            where.copy_(narrow(shards[read.shard], read.source))
        assert (result != -1).all()
        results.append(result)
    return results


@st.composite
def shapes(draw: st.DrawFn) -> ModelArgs:
    """Shapes that can be split over 16 ranks, except that they have 1 to 32 KV heads."""
    kv_heads = draw(st.sampled_from([1, 2, 4, 8, 16, 32]))
    n_heads = max(16, kv_heads) * draw(st.integers(1, 3))
    n_heads -= n_heads % kv_heads
    return shape(
        kv_heads,
        dim=n_heads * 2 * draw(st.integers(1, 4)),
        n_heads=n_heads,
        vocab_size=16 * draw(st.integers(1, 6)),
        multiple_of=16 * draw(st.integers(1, 5)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes(), st.sampled_from(COUNTS), st.sampled_from(COUNTS), st.booleans())
def test_any_shards_on_any_ranks(args: ModelArgs, m: int, n: int, embedding_columns: bool) -> None:
    """M -> N equals M -> 1 -> N, and M -> 1 restores the tensor, for every kind of tensor."""
    for key, cut in shard_specs(args).items():
        full = numbered(cut.sizes)
        stored = cut
        if embedding_columns and key == "tok_embeddings.weight":
            stored = cut._replace(axis=1)
            if cut.sizes[1] % m:
                continue
        shards = split(stored, full, m)
        (whole,) = moved(stored, shards, cut, 1)
        assert torch.equal(whole, full)
        direct = moved(stored, shards, cut, n)
        for got, expected in zip(direct, split(cut, full, n), strict=True):
            assert torch.equal(got, expected)


def test_neighbouring_ranks_share_a_replicated_kv_head() -> None:
    """Query head q uses KV head q // 4: ranks 0 to 3 hold the first, not ranks 0, 4, 8, 12."""
    args = shape(kv_heads=4)
    cut = shard_specs(args)["layers.0.attention.wk.weight"]
    held = [local_slices(cut, 16, rank)[0][0] // args.head_dim for rank in range(16)]
    assert held == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_a_rank_reads_only_its_own_shard_if_the_counts_match() -> None:
    for key, cut in shard_specs(shape()).items():
        for rank in range(8):
            found = copies(cut, 8, cut, 8, rank)
            assert [read.shard for read in found] == [rank], key


def test_shard_specs_match_the_state_dict() -> None:
    """``shard_specs`` has the keys and shapes of ``Transformer``."""
    from llama import Transformer

    args = shape()
    with torch.device("meta"):
        model = Transformer(args)
    assert {key: t.shape for key, t in model.state_dict().items()} == {
        key: torch.Size(cut.sizes) for key, cut in shard_specs(args).items()
    }


@pytest.mark.parametrize(
    ("kv_heads", "expected"),
    [(4, [1, 2, 4, 8, 16]), (16, [1, 2, 4, 8, 16]), (1, [1, 2, 4, 8, 16])],
)
def test_valid_tp_sizes(kv_heads: int, expected: list[int]) -> None:
    assert shape(kv_heads).valid_tp_sizes == expected


def test_kv_heads_are_never_split() -> None:
    """Three KV heads can't be split over two or four ranks."""
    args = shape(kv_heads=3, dim=96, n_heads=12, multiple_of=48)
    assert args.ffn_hidden_dim == 288
    assert args.valid_tp_sizes == [1, 3, 6, 12]


def test_valid_tp_sizes_of_published_shapes() -> None:
    llama2_13b = ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=32000)
    assert llama2_13b.valid_tp_sizes == [1, 2, 4, 8]  # its FFN can't be split over 5 ranks
    llama3_70b = ModelArgs(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, vocab_size=128256,
        multiple_of=4096, ffn_dim_multiplier=1.3,
    )  # fmt: skip
    assert llama3_70b.valid_tp_sizes == [1, 2, 4, 8, 16, 32, 64]
    assert n_bytes(shard_specs(llama3_70b)["output.weight"], 8, torch.bfloat16) == (
        128256 * 8192 * 2 // 8
    )
