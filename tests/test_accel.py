"""The choice of accelerated forms, their self-checks, and what happens when a kernel is wrong.

CUDA's streams, graphs and kernels are stand-ins that run on the CPU.
"""

import contextlib
import copy
import functools
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from conftest import DEMO, PARAMS, PROGRAMS, new_model, torchrun
from cuda_standin import FakeCuda
from test_fast import PROMPTS, attentions, documented_kernel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llama import Llama, ModelArgs, accel
from llama import __main__ as main
from llama.accel import compile as compiling
from llama.accel import cuda, selfcheck
from llama.attention import attention
from llama.cache import Decode
from llama.distributed import collectives, groups

CUDA = torch.device("cuda", 0)
PLAIN = ("F.linear", "SDPA", "eager")


def build(folder: Path, **options: Any) -> Llama:
    return Llama.build(
        str(folder), max_seq_len=64, max_batch_size=4, dtype="float32", device="cpu", **options
    )


# --- The conditions of flash attention ------------------------------------------------------------


@pytest.fixture
def h100(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    return monkeypatch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_flash_attention_is_chosen_where_it_runs(
    head_dim: int, dtype: torch.dtype, h100: pytest.MonkeyPatch
) -> None:
    assert cuda.why_not_flash(head_dim, dtype, CUDA) is None
    h100.delattr(torch.backends.cuda, "is_flash_attention_available")
    assert cuda.why_not_flash(head_dim, dtype, CUDA) is None


@pytest.mark.parametrize(
    ("head_dim", "dtype", "device", "reason"),
    [
        (12, torch.bfloat16, "cuda:0", "head_dim is 12, FlashAttention needs a multiple of 8"),
        (264, torch.bfloat16, "cuda:0", "head_dim is 264"),
        (128, torch.float32, "cuda:0", "doesn't support float32"),
        (128, torch.bfloat16, "cpu", "needs a CUDA device"),
        (128, torch.bfloat16, "mps", "needs a CUDA device"),
    ],
)
@pytest.mark.usefixtures("h100")
def test_flash_attention_is_not_chosen_for(
    head_dim: int, dtype: torch.dtype, device: str, reason: str
) -> None:
    found = cuda.why_not_flash(head_dim, dtype, torch.device(device))
    assert found is not None
    assert reason in found


def test_flash_attention_is_not_chosen_on_rocm_turing_and_windows(h100: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        return str(cuda.why_not_flash(128, torch.bfloat16, CUDA))

    with h100.context() as patch:
        patch.setattr(torch.version, "hip", "7.1.25424")
        assert "ROCm" in reason()
    with h100.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
        assert "compute capability 7.5" in reason()
    with h100.context() as patch:
        patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
        assert "built without FlashAttention" in reason()


# --- The self-check of flash attention ------------------------------------------------------------


def ignores_lengths(*args: Any, seqused_k: Tensor) -> Tensor:
    return documented_kernel(*args, seqused_k=torch.full_like(seqused_k, args[6]))


def top_left(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *_: int, seqused_k: Tensor
) -> Tensor:
    """Each row's first query sees its first key only."""
    outputs = []
    for row in range(len(seqused_k)):
        n_tokens = int(starts_q[row + 1] - starts_q[row])
        for i in range(n_tokens):
            one = torch.tensor([0, 1], dtype=torch.int32)
            seen = torch.tensor([i + 1], dtype=torch.int32)
            query = q[int(starts_q[row]) + i][None]
            start = starts_k[row : row + 1]
            outputs.append(documented_kernel(query, k, v, one, start, 1, i + 1, seqused_k=seen))
    return torch.cat(outputs)


def raises(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


def gives_nan(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return q * torch.nan


def a_little_wrong(*args: Any, **kwargs: Any) -> Tensor:
    return documented_kernel(*args, **kwargs) * 1.03


@pytest.fixture
def flash_here(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """FlashAttention counts as possible on the CPU."""
    monkeypatch.setattr(accel, "why_not_flash", lambda *_: None)
    monkeypatch.setattr(cuda, "_flash_kernel", documented_kernel)
    return monkeypatch


@pytest.mark.usefixtures("flash_here")
def test_a_right_kernel_passes_and_is_used(folder: Path, llm: Llama) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flash = build(folder)
    assert {layer.attend for layer in attentions(flash.model)} == {cuda.flash_attention}
    assert (flash.ways.attention, flash.ways.reasons.get("attention")) == ("FlashAttention", None)
    assert flash.generate(PROMPTS, 10, temperature=0) == llm.generate(PROMPTS, 10, temperature=0)


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (ignores_lengths, "for prompts its relative error is"),
        (top_left, "for later chunks of prompts its relative error is"),
        (a_little_wrong, "for prompts its relative error is 0.03"),
        (gives_nan, "for prompts some of its numbers aren't finite"),
        (raises, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_wrong_kernel_is_noticed(
    kernel: Callable[..., Tensor],
    reason: str,
    folder: Path,
    llm: Llama,
    flash_here: pytest.MonkeyPatch,
) -> None:
    flash_here.setattr(cuda, "_flash_kernel", kernel)
    with pytest.warns(UserWarning, match="failed its self-check") as caught:
        plain = build(folder)
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert plain.ways.attention == "SDPA"
    assert reason in plain.ways.reasons["attention"]
    assert plain.generate(PROMPTS, 10, temperature=0) == llm.generate(PROMPTS, 10, temperature=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "n_ranks"), [(16, 8, 1), (4, 4, 1), (16, 2, 8)])
@pytest.mark.usefixtures("flash_here")
def test_rounding_passes_the_check(
    dtype: torch.dtype, n_heads: int, n_kv_heads: int, n_ranks: int
) -> None:
    args = ModelArgs(dim=64 * n_heads, n_heads=n_heads, n_kv_heads=n_kv_heads, vocab_size=1024)
    found = selfcheck.check_attention(
        cuda.flash_attention, args, n_ranks, dtype, torch.device("cpu")
    )
    assert found is None


def test_running_out_of_memory_is_not_a_wrong_kernel() -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    args = ModelArgs(**PARAMS)
    with pytest.raises(torch.OutOfMemoryError):
        selfcheck.check_attention(full, args, 1, torch.float32, torch.device("cpu"))


# --- CUDA graphs ----------------------------------------------------------------------------------


def graphed(llm: Llama, index: int = 0) -> Llama:
    """The same weights, decoding as on CUDA device ``index``."""
    model = copy.deepcopy(llm.model)
    vars(model)["ways"] = chosen = accel.Ways()
    capture = cuda.CudaCapture(torch.device("cuda", index))
    model.decode = cuda.GraphedStep(  # type: ignore[method-assign]
        model, model.decode, any_length=False, capture=capture, ways=chosen
    )
    return Llama(model, llm.tokenizer)


def generated(llm: Llama, fake: FakeCuda) -> tuple[list[list[int]], Any]:
    with fake:
        return llm.generate(PROMPTS, 10, temperature=0)


@pytest.fixture
def expected(llm: Llama) -> tuple[list[list[int]], Any]:
    return llm.generate(PROMPTS, 10, temperature=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("in_thread", [False, True])
def test_graphs_run_on_the_models_device(
    index: int, in_thread: bool, llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which isn't the current one, as in a second thread, where device 0 is."""
    fake = FakeCuda(monkeypatch, home=index)
    ours = graphed(llm, index)
    results = []

    def use() -> None:
        results.append(generated(ours, fake))
        assert fake.is_as_found()

    if in_thread:
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
    else:
        use()
    assert results == [expected]
    assert len(fake.graphs) == 1
    assert fake.n_replays == 9  # one for each decoding step: the check's replay is the first step
    assert ours.ways.decode == "CUDA graph"


def test_a_graph_of_another_device_is_noticed(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Should the step run elsewhere than its weights are, torch only warns."""
    fake = FakeCuda(monkeypatch, home=1)
    ours = graphed(llm, 0)
    with pytest.warns(UserWarning, match="The CUDA Graph is empty") as caught:
        assert generated(ours, fake) == expected
    assert len(caught) == 1
    assert fake.n_replays == 0
    assert fake.is_as_found()
    assert ours.ways.decode == "eager"
    assert "The CUDA Graph is empty" in ours.ways.reasons["decode"]


def test_an_empty_graph_is_noticed_without_torchs_warning(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)
    fake.is_broken = True
    ours = graphed(llm)
    with pytest.warns(UserWarning, match="some of its numbers aren't finite") as caught:
        assert [generated(ours, fake) for _ in range(2)] == [expected] * 2
    assert len(caught) == 1
    assert fake.n_replays == 1
    assert fake.graphs == []


def test_a_wrong_replay_is_noticed(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)

    def replay(graph: Any) -> None:
        for function, args, kwargs, _ in graph.operations:
            function(*args, **kwargs)
        graph.operations[-1][-1].fill_(7.0)

    monkeypatch.setattr("cuda_standin.Graph.replay", replay)
    with pytest.warns(UserWarning, match="its relative error is") as caught:
        assert generated(graphed(llm), fake) == expected
    assert len(caught) == 1


@pytest.mark.parametrize("replaced", ["weight", "module", "assigned"])
def test_graphs_are_captured_again_if_weights_are_replaced(
    llm: Llama, monkeypatch: pytest.MonkeyPatch, replaced: str
) -> None:
    """They hold the old addresses."""
    ours = graphed(llm)
    fake = FakeCuda(monkeypatch)
    before = generated(ours, fake)
    layer: Any = ours.model.layers[0]
    ffn = layer.feed_forward
    new = nn.Parameter(ffn.w2.weight * -3, requires_grad=False)
    if replaced == "weight":
        ffn.w2.weight = new
    elif replaced == "module":
        layer.feed_forward = copy.deepcopy(ffn)
        layer.feed_forward.w2.weight = new
    else:
        state = ours.model.state_dict() | {"layers.0.feed_forward.w2.weight": new}
        ours.model.load_state_dict(state, assign=True)
    after, n_replays = generated(ours, fake), fake.n_replays
    assert n_replays > 0
    del vars(ours.model)["decode"]
    assert after == generated(ours, fake) != before


def test_a_failed_capture_is_left_behind(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)
    fake.error = RuntimeError("operation not permitted when stream is capturing")
    ours = graphed(llm)
    with pytest.warns(UserWarning, match="operation not permitted when stream") as caught:
        assert [generated(ours, fake) for _ in range(2)] == [expected] * 2
    assert len(caught) == 1
    assert "previous error" not in str(caught[0].message)
    assert fake.is_as_found()
    assert ours.ways.decode == "eager"
    assert "operation not permitted" in ours.ways.reasons["decode"]


def test_the_captures_error_is_reported_from_within_an_except_block(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)
    fake.error = RuntimeError("operation not permitted when stream is capturing")
    try:
        raise KeyError("the caller's own")
    except KeyError:
        with pytest.warns(UserWarning, match="operation not permitted when stream"):
            assert generated(graphed(llm), fake) == expected


def test_running_out_of_memory_in_a_capture_names_the_plan(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)
    fake.error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")
    ours = graphed(llm)
    with pytest.raises(torch.OutOfMemoryError, match=r"(?s)Tried to allocate.*The plan was"):
        generated(ours, fake)
    assert fake.is_as_found()
    fake.error = None
    assert generated(ours, fake) == expected  # the next call captures
    assert fake.n_replays > 0


@pytest.mark.filterwarnings("error")
def test_a_model_may_be_deleted_while_another_decodes(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has its stream, whose workspace isn't part of a graph's memory (pytorch#193402)."""
    fake = FakeCuda(monkeypatch)
    first, second = graphed(llm), graphed(llm)
    assert generated(first, fake) == generated(second, fake) == expected
    streams = [graph.stream for graph in fake.graphs]
    assert streams[0] is not streams[1]
    assert [fake.workspaces[stream] for stream in streams] == [None, None]
    step: Any = first.model.decode
    step._capture.reset()
    assert len(fake.graphs) == 1
    n_replays = fake.n_replays
    assert generated(second, fake) == expected
    assert fake.n_replays > n_replays


@pytest.mark.filterwarnings("error")
def test_a_reallocated_cache_drops_all_graphs_of_the_model(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)
    ours = graphed(llm)
    generated(ours, fake)
    with fake:
        ours.generate(PROMPTS[:1], 10, temperature=0)
    assert len(fake.graphs) == 2
    ours.model.to(torch.float64).to(torch.float32)
    for layer in ours.model.cache:
        layer.free()
    assert generated(ours, fake) == expected
    assert len(fake.graphs) == 1


def test_logits_that_are_not_finite_are_not_blamed_on_the_graph(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)
    ours = graphed(llm)
    ours.generate([], 1)
    with fake:
        stream = ours.stream(PROMPTS[:1], 10, temperature=0)
        next(stream)
        ours.model.output.weight[5] = torch.nan
        with pytest.raises(FloatingPointError):
            next(stream)
    assert ours.ways.decode == "CUDA graph"


def test_graphs_are_reset_before_the_groups_are_destroyed(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL would wait for them, and a model in a global variable outlives the groups."""
    fake = FakeCuda(monkeypatch)
    ours = graphed(llm)
    assert generated(ours, fake) == expected
    n_graphs = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: n_graphs.append(len(fake.graphs)))
    assert len(fake.graphs) == 1
    with monkeypatch.context() as patch:
        patch.setattr(collectives, "watchdog", type("", (), {"has_reported": True}))
        groups._leave()  # a rank is gone: nothing here may wait for it
    assert (n_graphs, len(fake.graphs)) == ([], 1)
    groups._leave()
    assert n_graphs == [0]
    monkeypatch.undo()


# --- Several ranks --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "attention", "decode"),
    [
        ("right", "FlashAttention", "CUDA graph"),
        ("wrong kernel", "SDPA", "CUDA graph"),
        ("failed capture", "FlashAttention", "eager"),
        ("wrong replay", "FlashAttention", "eager"),
    ],
)
def test_ranks_agree(case: str, attention: str, decode: str, folder: Path, llm: Llama) -> None:
    """Rank 1 alone finds the fault."""
    result = torchrun(2, PROGRAMS / "accelerated_ranks.py", folder, case, timeout=120)
    assert result.returncode == 0, result.stderr
    shown = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [ways["rank"] for ways in sorted(shown, key=lambda ways: ways["rank"])] == [0, 1]
    tokens = llm.generate(PROMPTS, 10, temperature=0)[0]
    for ways in shown:
        assert (ways["attention"], ways["decode"]) == (attention, decode)
        assert ways["tokens"] == tokens
        assert ways["was_reset"]  # before the process group was destroyed
    warned = [line for line in result.stderr.splitlines() if "UserWarning" in line]
    assert len(warned) == (case != "right"), result.stderr
    assert all("rank 1: " in line for line in warned)


# --- Turning it off -------------------------------------------------------------------------------


def test_everything_can_be_turned_off(
    folder: Path, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "why_not_flash", lambda *_: None)
    monkeypatch.setattr(accel, "choose_linear", pytest.fail)
    monkeypatch.setattr(accel, "keep_freed_memory", pytest.fail)
    plain = build(folder, accelerate=False)
    assert (plain.ways.linear, plain.ways.attention, plain.ways.decode) == PLAIN
    assert set(plain.ways.reasons.values()) == {"accelerate is False"}
    assert plain.generate(PROMPTS, 10, temperature=0) == expected
    monkeypatch.setenv("LLAMA_ACCELERATE", "0")
    plain = build(folder, compile=True)
    assert (plain.ways.linear, plain.ways.attention, plain.ways.decode) == PLAIN
    assert set(plain.ways.reasons.values()) == {"LLAMA_ACCELERATE is 0"}
    assert {layer.attend for layer in attentions(plain.model)} == {attention}
    assert "decode" not in vars(plain.model)


def test_wrong_requests_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="compile is True, but accelerate is False"):
        build(folder, compile=True, accelerate=False)
    monkeypatch.setenv("LLAMA_ACCELERATE", "off")
    with pytest.raises(ValueError, match="LLAMA_ACCELERATE is 'off', expected 0 or 1"):
        build(folder)
    monkeypatch.setenv("LLAMA_ACCELERATE", "1")
    assert build(folder, accelerate=False).ways.reasons["decode"] == "accelerate is False"


def test_the_ways_of_a_cpu(folder: Path, use_processor: Callable[[str], None]) -> None:
    ours = build(folder)
    assert str(ours.ways) == (
        "linear layers: F.linear (the dtype is float32, not 16 bits); "
        "attention: SDPA (FlashAttention needs a CUDA device); decoding step: eager"
    )
    for processor, linear in (("AMX", "weight on the left"), ("other", "F.linear")):
        use_processor(processor)
        ways = accel.choose(ours.model.params, 1, torch.bfloat16, torch.device("cpu"))[0]
        assert ways.linear == linear
    assert "lacks avx512bf16 or avx512 or avx2 or neon" in ways.reasons["linear"]


def test_copies_do_not_inherit_graphs(
    llm: Llama, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)
    ours = graphed(llm)
    assert generated(ours, fake) == expected
    assert accel.ways(ours.model).decode == "CUDA graph"
    assert accel.ways(copy.deepcopy(ours.model)).decode == "eager"


@pytest.mark.parametrize("value", ["", "0"])
def test_info_shows_what_would_run(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLAMA_ACCELERATE", value)
    monkeypatch.setattr(main, "resolve_device", lambda _: torch.device("cpu"))
    main.info(str(DEMO))
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("kernels:"))
    assert ("LLAMA_ACCELERATE is 0" in line) is (value == "0")
    assert "attention: SDPA" in line


# --- torch.compile --------------------------------------------------------------------------------


@pytest.fixture
def n_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """The number of compilations. Graphs are traced and run as they are: no compiler is needed."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.parametrize(
    ("mode", "device"),
    [
        (contextlib.nullcontext, "meta"),
        pytest.param(
            FakeTensorMode,
            "cuda:0",
            marks=pytest.mark.skipif(
                not torch.backends.cuda.is_built(), reason="indexing needs torch's CUDA build"
            ),
        ),
    ],
)
def test_a_step_with_flash_attention_compiles(
    mode: Callable[[], contextlib.AbstractContextManager[object]],
    device: str,
    weights: dict[str, Tensor],
    n_compiled: Callable[[], int],
) -> None:
    """On Python below 3.12 too, where functools.cached_property takes a lock, which torch.compile
    can't trace. Nothing is computed; the kernel's own shape function runs."""
    with mode(), torch.inference_mode():
        empty = {
            key: torch.empty(w.shape, dtype=torch.bfloat16, device=device)
            for key, w in weights.items()
        }
        model = new_model(PARAMS, empty, max_batch_size=4, max_seq_len=64)
        for layer in attentions(model):
            layer.attend = cuda.flash_attention
        decode = compiling.compiled_decode(model)
        model(torch.zeros(4, 5, dtype=torch.int64, device=device), 0)  # allocates the cache
        for n in (1, 4, 2):
            positions = torch.zeros(n, dtype=torch.int64, device=device)
            for length in (10, 64):
                logits = decode(positions, Decode(positions, length, ragged=False))
            assert (logits.shape, logits.device) == ((n, 1024), torch.device(device))
    assert n_compiled() == 2


@pytest.mark.parametrize(
    "sizes",
    [(4, 2, 3, 4), *(pytest.param(s, marks=pytest.mark.slow) for s in [(2, 4, 3), (3, 2, 4)])],
)
def test_batches_as_large_as_the_cache_do_not_compile_again(
    sizes: tuple[int, ...], weights: dict[str, Tensor], n_compiled: Callable[[], int]
) -> None:
    model = new_model(PARAMS, weights, max_batch_size=4, max_seq_len=64)
    decode = compiling.compiled_decode(model)
    with torch.inference_mode():
        model(torch.arange(40).view(4, 10), 0)
        for n in sizes:
            for length in (n, 8, 11):  # equal to the batch, to the number of heads, neither
                batch = Decode(torch.full((n,), length - 1), length, ragged=True)
                got = decode(torch.arange(n), batch)
                torch.testing.assert_close(got, model.decode(torch.arange(n), batch))
    assert n_compiled() == 1
