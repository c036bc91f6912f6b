"""On a CUDA device: parity, generation, fast paths, and NCCL with one rank."""

import gc
import json
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARAMS, PROGRAMS, new_model, random_weights, torchrun, write_checkpoint
from reference import logits, relative_error
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama import Llama, ModelArgs, Tokenizer, accel, memory
from llama.accel.cuda import GraphedStep, flash_attention, why_not_flash
from llama.accel.projection import join_projections
from llama.accel.selfcheck import check_attention
from llama.attention import attention
from llama.cache import Decode, Prefill
from llama.model import Attention
from llama.sampling import SamplingParams, sample, sample_top_p

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


def test_greedy_tokens_match_the_cpu(folder: Path) -> None:
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


def test_one_rank_under_torchrun(folder: Path) -> None:
    result = torchrun(1, PROGRAMS / "one_cuda_rank.py", folder, env={"CUDA_VISIBLE_DEVICES": "0"})
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


def test_generation_stays_within_the_planned_memory(tokenizer: Tokenizer) -> None:
    params = PARAMS | {"dim": 1024, "vocab_size": 1024}
    weights = {key: w.bfloat16() for key, w in random_weights(params).items()}
    model = new_model(params, weights, max_batch_size=4, max_seq_len=2048).to("cuda")
    plan = memory.plan(model.params, 1, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    Llama(model, tokenizer).generate([[i + 1] * 2040 for i in range(4)], 4, temperature=0)
    assert torch.cuda.max_memory_allocated() <= plan.total


PROMPTS = [[7, 20, 300], [9], [500, 2, 600, 13, 14, 15]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graphs_match_plain_steps(
    folder: Path, dtype: str, compile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 logits differ between kernels in the last bits, so tokens may diverge."""
    llm = Llama.build(
        str(folder), max_seq_len=64, max_batch_size=4, dtype=dtype, device="cuda", compile=compile
    )
    graphed_decode: Any = llm.model.decode
    assert isinstance(graphed_decode, GraphedStep)
    assert llm.ways.decode == ("compiled, CUDA graph" if compile else "CUDA graph")
    for n in (3, 1, 2, 3):
        graphed = llm.generate(PROMPTS[:n], 30, temperature=0, logprobs=True)
        with monkeypatch.context() as patch:
            patch.delattr(llm.model, "decode")
            plain = llm.generate(PROMPTS[:n], 30, temperature=0, logprobs=True)
        if dtype == "float32":
            assert graphed[0] == plain[0]
        assert graphed[1] is not None
        assert plain[1] is not None
        for ours, theirs in zip(graphed[1], plain[1], strict=True):
            assert abs(ours[0] - theirs[0]) < (1e-4 if dtype == "float32" else 0.1)
    assert len(graphed_decode._captured) == 3
    assert llm.ways.decode == ("compiled, CUDA graph" if compile else "CUDA graph")


def needs_flash(dtype: torch.dtype = torch.bfloat16) -> None:
    if reason := why_not_flash(128, dtype, torch.device("cuda", 0)):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 8])
def test_flash_attention_passes_its_self_check(
    dtype: torch.dtype, head_dim: int, n_kv_heads: int
) -> None:
    needs_flash(dtype)
    args = ModelArgs(dim=8 * head_dim, n_heads=8, n_kv_heads=n_kv_heads, vocab_size=1024)
    assert check_attention(flash_attention, args, 1, dtype, torch.device("cuda", 0)) is None


def test_flash_attention_matches_attention() -> None:
    needs_flash()
    params = PARAMS | {"dim": 1024}
    weights = {key: w.bfloat16() for key, w in random_weights(params).items()}
    prompts = Prefill([0, 1, 2], [0, 0, 0], [300, 1, 77], torch.device("cuda"))
    after = torch.tensor([300, 1, 77], device="cuda")
    results = []
    for attend in (attention, flash_attention):
        model = new_model(params, weights, max_batch_size=4, max_seq_len=512).to("cuda")
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.attend = attend
        with torch.inference_mode():
            prefill = model.hidden(torch.arange(378, device="cuda"), prompts)
            step = model.hidden(after, Decode(after, 301, ragged=True))
            # a piece at start > 0, longer and shorter than a tile
            pieces = Prefill([0, 1, 2], [301, 2, 78], [5, 130, 1], torch.device("cuda"))
            chunks = model.hidden(torch.arange(136, device="cuda"), pieces)
        results.append(torch.cat((prefill, step, chunks)).double().cpu())
    assert relative_error(results[1], results[0]) < 0.05


def test_joint_projections_match_plain_ones() -> None:
    """In one kernel each, float32 numbers are rounded to bfloat16 once."""
    results = []
    for joins in (False, True):
        weights = {key: w.bfloat16() for key, w in random_weights(PARAMS).items()}
        model = new_model(PARAMS, weights, max_batch_size=4, max_seq_len=64).to("cuda")
        if joins:
            join_projections(model)
        results.append(model(torch.arange(40, device="cuda")[None], 0))
    assert relative_error(results[1].double().cpu(), results[0].double().cpu()) < 0.02


def test_a_step_waits_for_the_device_once(folder: Path) -> None:
    """torch's own detector; tests/test_steps.py counts on fake tensors."""
    llm = Llama.build(str(folder), max_seq_len=64, device="cuda", dtype="bfloat16")
    params = [SamplingParams(temperature=t, top_logprobs=2) for t in (0, 0.7)]
    for row, each in enumerate(params):
        llm.engine.add([llm.engine.request([7, 20, 300], each, row)])
    for _ in range(3):
        llm.engine.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            llm.engine.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        llm.engine.cancel_all()
    assert [str(w.message) for w in caught if "synchroniz" in str(w.message)][1:] == []


def test_attention_runs_in_the_flash_kernel(folder: Path) -> None:
    needs_flash()
    llm = Llama.build(str(folder), max_seq_len=64, device="cuda", dtype="bfloat16")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        llm.generate(PROMPTS, 3, temperature=0)
    kernels = {event.key for event in profile.key_averages()}
    assert any("flash" in kernel for kernel in kernels), kernels
    assert not any("softmax_warp" in kernel for kernel in kernels), kernels


def test_a_head_dim_that_flash_attention_lacks(tmp_path: Path) -> None:
    params = PARAMS | {"dim": 192}  # of 16 heads
    folder = write_checkpoint(tmp_path / "12", params, random_weights(params))
    llm = Llama.build(str(folder), max_seq_len=64, device="cuda", dtype="bfloat16")
    assert llm.ways.attention == "SDPA"
    assert "head_dim is 12" in llm.ways.reasons["attention"]
    assert all(len(row) == 20 for row in llm.generate(PROMPTS, 20, temperature=0)[0])


def on_cpu(folder: Path) -> list[list[int]]:
    llm = Llama.build(str(folder), max_seq_len=64, dtype="float32", device="cpu")
    return llm.generate(PROMPTS, 20, temperature=0)[0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_device_that_isnt_the_current_one(folder: Path, in_thread: bool) -> None:
    results = []

    def use() -> None:
        llm = Llama.build(str(folder), max_seq_len=64, dtype="float32", device="cuda:1")
        results.append(llm.generate(PROMPTS, 20, temperature=0)[0])
        assert (llm.ways.decode, torch.cuda.current_device()) == ("CUDA graph", 0)

    if in_thread:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    else:
        use()
    assert results == [on_cpu(folder)]


def test_two_models_of_which_one_is_deleted(folder: Path) -> None:
    expected = on_cpu(folder)
    first, second = (
        Llama.build(str(folder), max_seq_len=64, dtype="float32", device="cuda") for _ in range(2)
    )
    for llm in (first, second):
        assert llm.generate(PROMPTS, 20, temperature=0)[0] == expected
    del first, llm
    gc.collect()
    torch.cuda.empty_cache()
    unused = torch.full((2**26,), torch.nan, device="cuda")  # takes the memory that was freed
    assert second.generate(PROMPTS, 20, temperature=0)[0] == expected
    assert second.ways.decode == "CUDA graph"
    del unused


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_a_failed_capture_is_left_behind(folder: Path, error: Exception | None) -> None:
    llm = Llama.build(str(folder), max_seq_len=64, dtype="float32", device="cuda")
    is_failing = True

    def attend(q: Tensor, *rest: Any) -> Tensor:
        if is_failing and torch.cuda.is_current_stream_capturing():
            if error is not None:
                raise error
            q.sum().item()  # synchronizes, which a capture can't
        return attention(q, *rest)

    for layer in llm.model.modules():
        if isinstance(layer, Attention):
            layer.attend = attend
    stream = torch.cuda.current_stream()
    if error is None:
        with pytest.warns(UserWarning, match="capturing a decoding step as a CUDA graph failed"):
            tokens = llm.generate(PROMPTS, 20, temperature=0)[0]
        assert llm.ways.decode == "eager"
    else:
        with pytest.raises(torch.OutOfMemoryError, match="The plan was"):
            llm.generate(PROMPTS, 20, temperature=0)
        is_failing = False
        tokens = llm.generate(PROMPTS, 20, temperature=0)[0]
        assert llm.ways.decode == "CUDA graph"
    assert torch.cuda.current_stream() == stream
    assert tokens == on_cpu(folder)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_ranks_with_a_global_model_end(folder: Path) -> None:
    devices = {"CUDA_VISIBLE_DEVICES": "0,1"}
    result = torchrun(2, PROGRAMS / "global_llm.py", folder, timeout=120, env=devices)
    assert result.returncode == 0, result.stderr
    decode, tokens = json.loads(result.stdout.splitlines()[-1])
    assert decode == "CUDA graph"
    llm = Llama.build(str(folder), max_seq_len=64, dtype="float32", device="cpu")
    assert tokens == llm.generate([[7, 20], [9]], 8, temperature=0)[0]


def test_float32_doesnt_use_the_math_kernel() -> None:
    model = new_model(PARAMS, random_weights(PARAMS), max_batch_size=1, max_seq_len=64).to("cuda")
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(backends):  # raises if neither supports it
        model.forward(torch.arange(40, device="cuda")[None], 0)
        model.forward(torch.tensor([[5]], device="cuda"), 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoding_step_doesnt_synchronize(dtype: torch.dtype) -> None:
    weights = {key: w.to(dtype) for key, w in random_weights(PARAMS).items()}
    model = new_model(PARAMS, weights, max_batch_size=2, max_seq_len=64).to("cuda")
    accel.accelerate(model)
    model.forward(torch.arange(20, device="cuda").view(2, 10), 0)
    tokens, positions = torch.tensor([[3, 4], [10, 10]], device="cuda")
    generator = torch.Generator("cuda")
    with torch.inference_mode():
        model(tokens, Decode(positions, 11, ragged=False))  # captures the graph
        torch.cuda.set_sync_debug_mode("error")
        try:
            sample(model(tokens, Decode(positions, 11, ragged=False)), 0.6, 0.9, generator)
            model.hidden(tokens, Decode(positions, 11, ragged=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_sampling_matches_multinomial() -> None:
    probs = torch.softmax(4 * torch.randn(3, 128256, device="cuda"), dim=-1)
    ranked, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    nucleus = ranked.masked_fill(torch.cumsum(ranked, dim=-1) - ranked > 0.9, 0.0)
    nucleus /= nucleus.sum(dim=-1, keepdim=True)
    for seed in range(50):
        expected = torch.multinomial(
            nucleus, 1, generator=torch.Generator("cuda").manual_seed(seed)
        )
        drawn = sample_top_p(probs, 0.9, generator=torch.Generator("cuda").manual_seed(seed))
        assert torch.equal(drawn, ids.gather(-1, expected))


def test_too_large_a_cache_is_refused(folder: Path) -> None:
    with pytest.raises(MemoryError, match=r"cuda:?0? has \d+\.\d\d GiB free"):
        Llama.build(str(folder), max_seq_len=8192, max_batch_size=10**7, device="cuda")
