"""The same on a CUDA device: parity, generation, and NCCL with one rank."""

import json
from pathlib import Path

import pytest
import torch
from conftest import PARAMS, ROOT, new_model, random_weights, torchrun
from reference import logits, relative_error
from torch import Tensor

from llama import Llama, memory
from llama.model import Places, Span

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = list(range(40, 70))


def on_device(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits on the device, and the oracle's."""
    weights = {key: w.to(dtype) for key, w in random_weights(PARAMS, seed=1).items()}
    model = new_model(PARAMS, weights, max_batch_size=2, max_seq_len=32).to("cuda")
    return model(torch.tensor([TOKENS], device="cuda"), 0)[0].cpu(), logits(weights, PARAMS, TOKENS)


def test_float32_logits_match_the_oracle() -> None:
    got, expected = on_device(torch.float32)
    assert relative_error(got, expected) < 1e-5


def test_bfloat16_logits_are_close() -> None:
    got, expected = on_device(torch.bfloat16)
    assert relative_error(got, expected) < 0.1


def test_greedy_tokens_equal_the_cpus(folder: Path) -> None:
    prompts = [[7, 20, 300], [9], [500, 2, 600, 13, 14, 15]]
    results = []
    for device in ("cpu", "cuda"):
        llm = Llama.build(str(folder), max_seq_len=64, dtype="float32", device=device)
        tokens, logprobs = llm.generate(prompts, 20, temperature=0, logprobs=True, echo=True)
        results.append(tokens)
        assert logprobs is not None
    assert results[0] == results[1]


def test_sampling_is_reproducible(folder: Path) -> None:
    llm = Llama.build(str(folder), max_seq_len=64, device="cuda")
    first = llm.generate([[1, 2]] * 3, 20, temperature=1.0, seed=3)
    assert llm.generate([[1, 2]] * 3, 20, temperature=1.0, seed=3) == first


def test_one_rank_under_torchrun(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\nfrom llama import Llama\n"
        "llm = Llama.build(sys.argv[1], max_seq_len=64, dtype='float32')\n"
        "print(json.dumps([str(llm.model.output.weight.device), "
        "llm.generate([[7, 20]], 8, temperature=0)[0]]))\n"
    )
    result = torchrun(1, script, folder, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": "0"})
    assert result.returncode == 0, result.stderr
    device, tokens = json.loads(result.stdout.splitlines()[-1])
    assert device == "cuda:0"
    llm = Llama.build(str(folder), max_seq_len=64, dtype="float32", device="cpu")
    assert tokens == llm.generate([[7, 20]], 8, temperature=0)[0]


def test_huggingface_files_load_on_the_device(stories: Path) -> None:
    results = []
    for layout, device in (("native", "cpu"), ("hf-tied", "cuda")):
        llm = Llama.build(str(stories / layout), dtype="float32", device=device)
        results.append(llm.generate([[1], [1, 403]], 30, temperature=0)[0])
    assert results[0] == results[1]
    assert llm.model.output.weight.data_ptr() == llm.model.tok_embeddings.weight.data_ptr()


def test_a_pass_stays_in_its_plan() -> None:
    params = PARAMS | {"dim": 1024, "vocab_size": 1024}
    weights = {key: w.bfloat16() for key, w in random_weights(params).items()}
    model = new_model(params, weights, max_batch_size=4, max_seq_len=2048).to("cuda")
    plan = memory.plan(model.params, 1, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    tokens = torch.randint(0, 1024, (4 * 2048,), device="cuda")
    model.hidden(tokens, Places.of_spans([Span(0, 2048)] * 4, tokens.device))
    assert torch.cuda.max_memory_allocated() <= plan.total


def test_too_large_a_cache_is_refused(folder: Path) -> None:
    with pytest.raises(MemoryError, match=r"cuda:?0? has \d+\.\d\d GiB free"):
        Llama.build(str(folder), max_seq_len=8192, max_batch_size=10**7, device="cuda")
