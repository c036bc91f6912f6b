"""Tensor parallelism and replicas under real torchrun (gloo): same results as one process."""

import json
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from conftest import DEMO, PARAMS, PROGRAMS, ROOT, random_weights, run, torchrun, write_checkpoint
from reference import relative_error
from torch import Tensor

from llama.distributed import collectives, groups

WORKER = ROOT / "tests" / "worker.py"


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of a single process without torchrun."""
    out = tmp_path_factory.mktemp("alone")
    result = run(sys.executable, WORKER, folder, out, "float32")
    assert result.returncode == 0, result.stderr
    return dict(json.loads((out / "rank0.json").read_text()))


@pytest.mark.parametrize(
    "n_ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 8))]
)
def test_ranks_match_one_process(
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

    # before build every rank prints, after it only the first
    words = re.sub(r"Loaded in \d+\.\d\d seconds", "loaded", result.stdout)
    counts = {word: words.count(word) for word in ("started", "loaded", "built", "done")}
    assert counts == {"started": n_ranks, "loaded": 2, "built": 1, "done": 1}
    assert re.sub("started|loaded|built|done", "", words).strip() == ""


@pytest.mark.slow
def test_two_ranks_in_bfloat16(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    result = torchrun(2, WORKER, folder, tmp_path, "bfloat16")
    assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert ranks[0] == ranks[1]


@pytest.mark.slow
def test_the_demo_on_two_ranks_answers_correctly(tmp_path: Path) -> None:
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


# --- Any shards on any ranks --------------------------------------------------------------------


def matrix(
    tmp_path: Path, n_ranks: int, prompts: list[str], n_tokens: int, folders: list[Path]
) -> list[dict[str, Any]]:
    """Results for each folder on ``n_ranks`` ranks, in the order of ``folders``."""
    script, out = PROGRAMS / "layouts.py", tmp_path / "matrix.json"
    arguments: list[str | Path] = [script, out, json.dumps(prompts), str(n_tokens), *folders]
    result = run(sys.executable, *arguments) if n_ranks == 1 else torchrun(n_ranks, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("one more") == len(folders)
    return list(json.loads(out.read_text()).values())


@pytest.fixture(scope="module")
def layouts(stories: Path) -> list[Path]:
    names = "native mp2-llama2style mp4-llama2style mp2-llama3style hf hf-tied".split()
    return [stories / name for name in names]


@pytest.fixture(scope="module")
def story_tokens(layouts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results for the unsharded checkpoint in one process."""
    return matrix(tmp_path_factory.mktemp("one"), 1, STORY_PROMPTS, 30, layouts[:1])[0]


STORY_PROMPTS = ["", "Once upon a time", "The dog ran to the", "Lily and Ben", "One day"]


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_every_layout_on_any_ranks(
    tmp_path: Path, layouts: list[Path], story_tokens: dict[str, Any], n_ranks: int
) -> None:
    """A real model in six layouts. (Its FFN, 172 wide, can't be split over 8 ranks.)"""
    results = matrix(tmp_path, n_ranks, STORY_PROMPTS, 30, layouts)
    start = "Once upon a time, there was a little girl named Lily."
    for layout, found in zip(layouts, results, strict=True):
        assert found == story_tokens, layout.name
    assert story_tokens["texts"][0].startswith(start)
    assert story_tokens["texts"][1].startswith(start)


@pytest.fixture(scope="module")
def demo_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo model as it is, in Hugging Face's layout, and in 8 shards."""
    out = tmp_path_factory.mktemp("demos")
    for name, option in (("hf", "--format=hf"), ("mp8", "--mp=8")):
        result = run(sys.executable, "-m", "llama", "convert", DEMO, out / name, option)
        assert result.returncode == 0, result.stderr
    return [DEMO, out / "hf", out / "mp8"]


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_the_demo_answers_the_same_from_every_layout(
    tmp_path: Path, demo_folders: list[Path], n_ranks: int
) -> None:
    questions = ["What is 23 + 45?", "What is the capital of France?", "Spell the word garden."]
    results = matrix(tmp_path, n_ranks, questions, 8, demo_folders)
    for found in results:
        assert found["answers"] == [
            "23 + 45 = 68.",
            "The capital of France is Paris.",
            "g-a-r-d-e-n",
        ]
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
def test_more_ranks_than_kv_heads(tmp_path: Path) -> None:
    """One KV head, 4 ranks: each holds a copy, and the logits match those of one process."""
    params = PARAMS | {"n_kv_heads": 1}
    folder = write_checkpoint(tmp_path / "one", params, random_weights(params))
    out = {n: tmp_path / str(n) for n in (1, 4)}
    for n, path in out.items():
        path.mkdir()
        command = (WORKER, folder, path, "float32")
        result = run(sys.executable, *command) if n == 1 else torchrun(n, *command)
        assert result.returncode == 0, result.stderr
    alone, many = (json.loads((path / "rank0.json").read_text()) for path in out.values())
    assert many["tokens"] == alone["tokens"]
    assert relative_error(torch.tensor(many["logits"]), torch.tensor(alone["logits"])) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_rank_only_takes_memory_for_its_shard(
    tmp_path: Path, folder: Path, wide: Path, n_ranks: int, dtype: str
) -> None:
    script = PROGRAMS / "rank_memory.py"
    result = torchrun(n_ranks, script, wide, folder, dtype, tmp_path)
    assert result.returncode == 0, result.stderr
    for rank in range(n_ranks):
        ratio, n_bytes = map(float, (tmp_path / str(rank)).read_text().split())
        print(f"{dtype}, rank {rank} of {n_ranks}: {ratio:.3f} x {n_bytes / 1e9:.2f} GB")
        assert n_bytes > 0.5e9 / n_ranks
        assert ratio <= 1.2


# --- Replicas and nodes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undivided(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of a single process."""
    out = tmp_path_factory.mktemp("undivided")
    result = run(sys.executable, PROGRAMS / "replicas.py", folder, out, "1")
    assert result.returncode == 0, result.stderr
    return dict(json.loads((out / "0").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(("n_ranks", "size"), [(2, 1), (4, 2), (4, 1)])
def test_prompts_are_distributed_over_replicas(
    tmp_path: Path, folder: Path, undivided: dict[str, Any], n_ranks: int, size: int
) -> None:
    script = PROGRAMS / "replicas.py"
    result = torchrun(n_ranks, script, folder, tmp_path, str(size))
    assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(n_ranks)]
    for found in ranks:
        for key in ("greedy", "streamed", "error"):
            assert found[key] == undivided[key]
        assert found["scored"][0] == undivided["scored"][0]
        for row, scores in zip(found["scored"][1], undivided["scored"][1], strict=True):
            assert row == pytest.approx(scores, abs=1e-4)
        for (row, places), (scores, wanted) in zip(found["pairs"], undivided["pairs"], strict=True):
            assert (row, places) == (pytest.approx(scores, abs=1e-4), wanted)
        for values, wanted in zip(found["inspected"], undivided["inspected"], strict=True):
            torch.testing.assert_close(
                torch.tensor(values), torch.tensor(wanted), atol=1e-4, rtol=1e-4
            )
        assert found["equal"] == found["again"] == ranks[0]["equal"]
        # replicas don't share random draws
        assert len({tuple(row) for row in found["equal"]}) == 4
    assert sum(found["n_scored"] for found in ranks) == size * undivided["n_scored"]
    assert undivided["rows"] == [2]
    # two prompts: one row on each of the first two replicas, none on the others
    n_rows = [sum(found["rows"]) for found in ranks]
    assert n_rows == [1] * (2 * size) + [0] * (n_ranks - 2 * size)


@pytest.mark.slow
def test_a_failing_replica_is_an_error_on_every_rank(tmp_path: Path, folder: Path) -> None:
    result = torchrun(2, PROGRAMS / "replica_fails.py", folder, tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "rank 1 failed (FloatingPointError: " in (tmp_path / "0").read_text()
    assert "FloatingPointError" in (tmp_path / "1").read_text()


@pytest.mark.slow
def test_two_nodes(tmp_path: Path, weights: dict[str, Tensor], alone: dict[str, Any]) -> None:
    """Two launchers with one rendezvous endpoint, as on two machines."""
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{probe.getsockname()[1]}"
    options = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d"]
    options += ["--rdzv_endpoint", endpoint, "--rdzv_id", "two", "--local_addr", "127.0.0.1"]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(run, *command, WORKER, folder, tmp_path, "float32") for _ in range(2)]
        results = [node.result() for node in nodes]
    for result in results:
        assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0] == ranks[1]
    assert ranks[0]["tokens"] == alone["tokens"]
    assert sorted(result.stdout.count("Loaded in") for result in results) == [0, 2]


@pytest.mark.slow
def test_an_invalid_model_parallel_size_is_refused(folder: Path) -> None:
    path = PROGRAMS / "build.py"
    result = torchrun(2, path, folder, '{"model_parallel_size": 3}')
    assert result.returncode != 0
    assert "model_parallel_size is 3, but 2 process(es) are running" in result.stderr
    assert f"torchrun --nproc_per_node 3 {path}" in result.stderr


@pytest.mark.slow
def test_a_damaged_shard_fails_on_every_rank(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """No rank hangs in the next all-reduce waiting for the one that failed."""
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    (folder / "consolidated.01.pth").write_bytes(b"damaged")
    result = torchrun(2, PROGRAMS / "build_error.py", folder, tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "rank 1 failed (ValueError: " in (tmp_path / "0").read_text()
    assert "consolidated.01.pth' can't be read as a checkpoint" in (tmp_path / "1").read_text()
    assert "Loaded" not in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_file_missing_on_one_rank_fails_on_every_rank(
    tmp_path: Path, folder: Path, size: int
) -> None:
    """Also before the weights are read, and in another replica: no rank continues alone."""
    arguments: list[str | Path] = [folder, folder / "tokenizer.model", str(size), tmp_path]
    result = torchrun(2, PROGRAMS / "missing_file.py", *arguments, timeout=60)
    assert result.returncode == 0, result.stderr
    for missing in range(2):
        assert "rank 1 failed (FileNotFoundError: " in (tmp_path / f"{missing}.0").read_text()
        assert "'nowhere'" in (tmp_path / f"{missing}.1").read_text()


@pytest.mark.slow
def test_stdout_of_every_rank_can_be_kept(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    folder = write_checkpoint(tmp_path / "shards", PARAMS, weights, n_shards=2)
    result = torchrun(2, PROGRAMS / "build.py", folder, '{"quiet_ranks": false}')
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("after build") == 2


@pytest.mark.slow
def test_a_quiet_rank_accepts_any_text(folder: Path) -> None:
    """In an ASCII locale where PYTHONIOENCODING sets the first rank's stdout to UTF-8."""
    locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    result = torchrun(
        2, PROGRAMS / "prints_after_build.py", folder, env=locale | {"PYTHONIOENCODING": "utf-8"}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("after build \u2603") == 2


@pytest.mark.slow
def test_process_groups_made_by_the_caller(folder: Path) -> None:
    """With the caller's groups prompts aren't distributed: each replica computes all of them."""
    path = PROGRAMS / "callers_groups.py"
    result = torchrun(2, path, folder, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("finished") == 2


@pytest.mark.parametrize(("n_ranks", "size"), [(8, 1), (8, 2), (8, 4), (8, 8), (6, 3)])
def test_every_rank_splits_nccls_world_equally_often(
    monkeypatch: pytest.MonkeyPatch, n_ranks: int, size: int
) -> None:
    """Up to torch 2.14, new_group calls ncclCommSplit, a collective, on the processes that aren't
    members of a gloo group. The stand-ins take each rank's part in turn."""
    counts = []
    for rank in range(n_ranks):
        created: list[list[int]] = []

        def new_group(ranks: Any = None, created: Any = created, **_: Any) -> Any:
            created.append(list(range(n_ranks)) if ranks is None else list(ranks))
            return SimpleNamespace(size=lambda: len(created[-1]))

        with monkeypatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: True)
            patch.setattr(dist, "is_torchelastic_launched", lambda: False)
            patch.setattr(dist, "get_world_size", lambda *_: n_ranks)
            patch.setattr(dist, "get_rank", lambda *_, rank=rank: rank)
            patch.setattr(dist, "new_group", new_group)
            patch.setattr(collectives, "check_same_on_all_ranks", lambda *_: None)
            patch.setattr(groups, "_set_timeout", lambda _: None)
            patch.setattr(groups, "_default_group", object())
            patch.setattr(groups, "_tp_control", None)
            patch.setattr(collectives, "world", None)
            fake = SimpleNamespace(
                destroy_model_parallel=lambda: None,
                initialize_model_parallel=lambda _: None,
                model_parallel_is_initialized=lambda: False,
                get_model_parallel_group=lambda: None,
            )
            patch.setattr(groups, "fairscale_groups", fake)
            groups.initialize(torch.device("cuda", 0), size, 60)
        counts.append(sum(rank not in ranks for ranks in created))
        assert sum(rank in ranks for ranks in created) == 2  # all ranks, and this one's
    assert counts == [n_ranks // size - 1] * n_ranks


def test_torchs_public_way_to_set_a_timeout_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, Any]] = []
    private = dist.distributed_c10d
    monkeypatch.setattr(private, "_set_pg_timeout", lambda *args: called.append(("old", args)))
    monkeypatch.delattr(dist, "set_timeout", raising=False)
    groups._set_timeout(sentinel := cast(Any, object()))
    monkeypatch.setattr(dist, "set_timeout", lambda *a: called.append(("new", a)), raising=False)
    groups._set_timeout(sentinel)
    assert called == [("old", (groups._FOREVER, sentinel)), ("new", (groups._FOREVER, sentinel))]
