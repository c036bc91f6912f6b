"""The benchmark runs and its cost formulas are right; speed itself isn't tested."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, ROOT, run
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import cost
from benchmarks.shapes import SHAPES, checkpoint_of, random_weights
from llama import Llama, ModelArgs, Transformer
from llama.cache import Prefill


@pytest.mark.parametrize("params", [PARAMS, SHAPES["1B"].params], ids=["small", "1B"])
def test_bytes_and_operations_match_the_model(params: dict[str, Any]) -> None:
    args = ModelArgs(**params)
    with torch.device("meta"):
        model = Transformer(args)
    norms = (2 * args.n_layers + 1) * args.dim
    embedding = model.tok_embeddings.weight.numel()
    read = sum(p.numel() for p in model.parameters()) - norms - embedding
    assert cost.weight_bytes(args, 1, 2) == 2 * read
    assert cost.weight_bytes(args, 8, 2) == 2 * read / 8
    kv = 2 * args.n_layers * args.kv_heads * args.head_dim * 2
    assert cost.cache_bytes(args, 1, 2) == kv
    assert cost.step_bytes(args, 1, 2, 3, 100) == 2 * read + 300 * kv
    scores = 2 * args.n_layers * args.n_heads * args.head_dim * 100
    assert cost.step_flops(args, 1, 3, 100) == 6 * (read + scores)
    # prefill: matmuls as torch counts them, and attention
    length, device = 50, torch.device("meta")
    with FlopCounterMode(display=False) as counter:
        batch = Prefill([0], [0], [length], device, logits_for=[0])
        tokens = torch.zeros(length, dtype=torch.int64, device=device)
        model(tokens, batch)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    scores = 2 * args.dim * ((args.n_layers - 1) * length**2 + 2 * length)
    assert cost.prefill_flops(args, 1, length) == products + scores
    assert cost.sent_bytes(args, 1, 2, 9) == 0


def test_the_documented_table_of_expected_speeds_is_computed() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "\n".join(cost.table()) in text


def test_a_random_checkpoint_loads_and_is_reused(tmp_path: Path) -> None:
    folder = checkpoint_of("tiny", tmp_path)
    llm = Llama.build(str(folder), device="cpu")
    assert len(llm.generate([[1, 2, 3]], 4, temperature=0)[0][0]) <= 4
    before = (folder / "consolidated.00.pth").stat().st_mtime_ns
    assert checkpoint_of("tiny", tmp_path) == folder
    assert (folder / "consolidated.00.pth").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="expected one of tiny, 1B"):
        checkpoint_of("2B", tmp_path)


def test_a_rank_of_eight_has_an_eighth_of_the_matrices() -> None:
    shape = SHAPES["70B-rank-of-8"]
    small = shape.params | {"dim": 1024, "n_layers": 1}
    weights = random_weights(type(shape)(small, 8))
    assert weights["output.weight"].shape == (128256 // 8, 1024)
    assert weights["layers.0.attention.wo.weight"].shape == (1024, 128)
    assert weights["norm.weight"].shape == (1024,)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    """A few figures of the smallest shape, and both peers; every line is JSON."""
    command: list[str | Path] = [sys.executable, "benchmarks/run.py", "--shape", "tiny"]
    command += ["--device", "cpu", "--repeats", "1", "--models", tmp_path, "--results", tmp_path]
    command += ["--vs", "reference,hf", "--figures", "load,ragged,overhead"]
    expected = {"load", "load: peak RSS", "ragged", "overhead, 16 layers"}
    for engine in ("reference", "hf"):
        expected |= {f"{case}: times faster than {engine}" for case in ("ragged", "prefill 512")}
    result = run(*command, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (lines,) = tmp_path.glob("*.jsonl")
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert records[0]["figure"] == "configuration"
    assert any("flash" in name for name in records[0]["paths"]["prefill"])
    assert expected <= {record["figure"] for record in records}
    assert all(record["low"] <= record["median"] <= record["high"] for record in records[1:])


def test_misspelt_choices_are_named() -> None:
    result = run(sys.executable, "benchmarks/run.py", "--vs", "lama", cwd=ROOT)
    assert result.returncode != 0
    assert "--vs has lama" in result.stderr
