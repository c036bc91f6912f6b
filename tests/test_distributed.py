"""Several ranks, as real torchrun processes with gloo: the same results as one process."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, ROOT, run, torchrun, write_checkpoint
from reference import relative_error
from torch import Tensor

from llama import Llama

WORKER = ROOT / "tests" / "worker.py"


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of one plain process."""
    out = tmp_path_factory.mktemp("alone")
    result = run(sys.executable, WORKER, folder, out, "float32")
    assert result.returncode == 0, result.stderr
    return dict(json.loads((out / "rank0.json").read_text()))


@pytest.mark.parametrize("n_ranks", [1, 2, 4, 8])
def test_ranks_give_what_one_process_gives(
    tmp_path: Path, weights: dict[str, Tensor], alone: dict[str, Any], n_ranks: int
) -> None:
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=n_ranks)
    result = torchrun(n_ranks, WORKER, folder, tmp_path, "float32")
    assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(n_ranks)]
    for other in ranks[1:]:
        assert other == ranks[0]
    assert ranks[0]["tokens"] == alone["tokens"]
    assert ranks[0]["text"] == alone["text"]
    assert ranks[0]["sampled"] == alone["sampled"]
    for row, expected in zip(ranks[0]["logprobs"], alone["logprobs"], strict=True):
        assert row == pytest.approx(expected, abs=1e-4)
    for key in ("logits", "step"):
        got, expected = torch.tensor(ranks[0][key]), torch.tensor(alone[key])
        assert got.shape == (2, 1024)
        assert relative_error(got, expected) < 1e-5

    # only the first rank prints after build; before it, every rank is on its own
    words = re.sub(r"Loaded in \d+\.\d\d seconds", "loaded", result.stdout)
    counts = {word: words.count(word) for word in ("started", "loaded", "built", "done")}
    assert counts == {"started": n_ranks, "loaded": 2, "built": 1, "done": 1}
    assert re.sub("started|loaded|built|done", "", words).strip() == ""


def test_two_ranks_in_bfloat16(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    result = torchrun(2, WORKER, folder, tmp_path, "bfloat16")
    assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert ranks[0] == ranks[1]


def test_two_shards_of_the_demo_give_right_answers(tmp_path: Path) -> None:
    params = json.loads((DEMO / "params.json").read_text())
    weights = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    folder = write_checkpoint(tmp_path / "demo2", params, weights, n_shards=2)
    prompts = ("--prompt", '["What is 23 + 45?", "What is the capital of France?"]')
    result = torchrun(
        2, ROOT / "example_chat_completion.py", "--ckpt_dir", folder, "--temperature", "0", *prompts
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("23 + 45 = 68.") == 1
    assert result.stdout.count("The capital of France is Paris.") == 1
    assert result.stdout.count("Loaded in") == 1


def test_a_wrong_number_of_ranks_says_what_to_type(tmp_path: Path, folder: Path) -> None:
    result = torchrun(2, WORKER, folder, tmp_path, "float32")
    assert result.returncode != 0
    line = f"torchrun --nproc_per_node 1 {WORKER} {folder} {tmp_path} float32"
    assert "has 1 shard(s)" in result.stderr
    assert "2 process(es) are running" in result.stderr
    assert line in result.stderr


def test_a_shard_of_another_size_is_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Llama 2's embedding, split over its width, say: named by key and shapes, not half loaded."""
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    for rank in range(2):
        path = folder / f"consolidated.{rank:02d}.pth"
        part = torch.load(path, weights_only=True)
        part["tok_embeddings.weight"] = weights["tok_embeddings.weight"].chunk(2, dim=1)[rank]
        torch.save(part, path)
    result = torchrun(2, WORKER, folder, tmp_path, "float32")
    assert result.returncode != 0
    assert "tok_embeddings.weight" in result.stderr
    assert "(1024, 64), expected (512, 128)" in result.stderr


def test_heads_must_divide(tmp_path: Path) -> None:
    script = """
import torch
from llama import ModelArgs, Transformer, parallel
parallel.initialize(torch.device("cpu"), None)
Transformer(ModelArgs(dim=64, n_layers=1, n_heads=8, n_kv_heads=1, vocab_size=64))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    result = torchrun(2, path)
    assert result.returncode != 0
    assert "n_kv_heads is 1, which does not divide by 2 ranks" in result.stderr


def test_replicas_give_the_same(tmp_path: Path, folder: Path) -> None:
    """model_parallel_size below the number of processes: several copies of the weights."""
    script = f"""
import json, os
from llama import Llama
llm = Llama.build({str(folder)!r}, model_parallel_size=1, dtype="float32", device="cpu")
result = llm.generate([[1, 2], [3]], 9, temperature=1.0)[0]
open(os.path.join({str(tmp_path)!r}, os.environ["RANK"]), "w").write(json.dumps(result))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    result = torchrun(2, path)
    assert result.returncode == 0, result.stderr
    llm = Llama.build(str(folder), dtype="float32", device="cpu")
    expected = llm.generate([[1, 2], [3]], 9, temperature=1.0)[0]
    assert [json.loads((tmp_path / rank).read_text()) for rank in "01"] == [expected] * 2


def test_a_size_that_does_not_divide_is_refused(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "from llama import Llama\n"
        f"Llama.build({str(folder)!r}, model_parallel_size=3, device='cpu')\n"
    )
    result = torchrun(2, path)
    assert result.returncode != 0
    assert "model_parallel_size is 3, but 2 process(es) are running" in result.stderr
    assert f"torchrun --nproc_per_node 3 {path}" in result.stderr


def test_a_damaged_shard_fails_on_every_rank(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """Nobody waits in the next all-reduce for a rank that will not come."""
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    (folder / "consolidated.01.pth").write_bytes(b"damaged")
    script = f"""
import os
from llama import Llama
try:
    Llama.build({str(folder)!r}, device="cpu", quiet_ranks=False)
except Exception as error:
    open(os.path.join({str(tmp_path)!r}, os.environ["RANK"]), "w").write(str(error))
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    result = torchrun(2, path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "another rank could not load its shard" in (tmp_path / "0").read_text()
    assert "consolidated.01.pth' is no readable checkpoint" in (tmp_path / "1").read_text()
    assert "Loaded" not in result.stdout


def test_stdout_of_every_rank_can_be_kept(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    script = f"""
from llama import Llama
Llama.build({str(folder)!r}, device="cpu", quiet_ranks=False)
print("after build")
"""
    path = tmp_path / "script.py"
    path.write_text(script)
    result = torchrun(2, path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("after build") == 2
