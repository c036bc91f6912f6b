"""Each fast path is actually taken and matches the plain implementation."""

import copy
import functools
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import (
    DEMO,
    PARAMS,
    PROCESSORS,
    PROGRAMS,
    new_model,
    random_weights,
    run,
    torchrun,
)
from cuda_standin import OnCpu
from reference import relative_error
from torch import Tensor, nn

from llama import Llama, Transformer, accel
from llama.accel import cpu, cuda, features, kernels, projection
from llama.accel.compile import compiled_decode, rotate_real
from llama.accel.projection import JointProjection, join_projections
from llama.attention import attention
from llama.cache import Decode, Prefill
from llama.distributed.layers import ColumnParallelLinear, RowParallelLinear
from llama.model import (
    Attention,
    FeedForward,
    precompute_freqs_cis,
    rotate,
    swiglu,
)

PROMPTS = [[1, 2, 3, 4, 5], [9], [7, 20, 300, 11]]


def attentions(model: Transformer) -> list[Attention]:
    return [layer for layer in model.modules() if isinstance(layer, Attention)]


def linears(model: Transformer) -> list[Any]:
    kinds = ColumnParallelLinear | RowParallelLinear
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


# --- Linear layers on the CPU -------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 2, 5, 128, 129])
def test_weight_lhs_equals_linear(n_rows: int) -> None:
    """Products accumulate in float32 and are rounded to bfloat16 once: half an ulp of error."""
    x, weight = torch.randn(n_rows, 256).bfloat16(), torch.randn(96, 256).bfloat16()
    exact = x.double() @ weight.double().T
    y = cpu.weight_lhs_matmul(x, weight)
    assert (y.shape, y.dtype, y.is_contiguous()) == ((n_rows, 96), torch.bfloat16, True)
    assert ((y - exact).abs() <= 2**-8 * exact.abs() + 1e-4).all()


def test_weight_lhs_takes_any_shape() -> None:
    x, weight = torch.randn(2, 3, 64), torch.randn(32, 64)
    torch.testing.assert_close(cpu.weight_lhs_matmul(x, weight), nn.functional.linear(x, weight))


def test_onednn_compiles_for_few_row_counts() -> None:
    """oneDNN caches a kernel per row count, so these are rounded up; all rows are computed."""
    met = set()

    def double(rows: Tensor) -> Tensor:
        met.add(len(rows))
        return 2 * rows

    for n_rows in range(1, 1100):
        x = torch.randn(n_rows, 3)
        y = cpu._in_chunks(x, double)
        assert torch.equal(y, 2 * x)
        assert y.is_contiguous()
    assert len(met) == 27
    assert max(met) == 256


def test_no_rows() -> None:
    """A chunk of a long prompt needs no logits."""
    x, weight = torch.zeros(0, 64).bfloat16(), torch.zeros(32, 64).bfloat16()
    assert cpu.linear(x, weight).shape == cpu.weight_lhs_matmul(x, weight).shape == (0, 32)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_a_long_prompt_in_bfloat16(processor: str, use_processor: Callable[[str], None]) -> None:
    use_processor(processor)
    sizes: dict[str, Any] = {"max_seq_len": 128, "device": "cpu", "dtype": "bfloat16"}
    llm = Llama.build(str(DEMO), max_prefill_tokens=16, **sizes)
    whole = Llama.build(str(DEMO), **sizes)
    prompt = list(range(5, 105))
    tokens, _ = llm.generate([prompt], max_gen_len=4, temperature=0)
    assert tokens == whole.generate([prompt], max_gen_len=4, temperature=0)[0]


@pytest.mark.parametrize(
    "shape", [(0, 64), (1, 64), (2, 64), (7, 64), (256, 64), (601, 64), (3, 2, 64)]
)
def test_swiglu_weight_lhs_equals_swiglu(shape: tuple[int, ...]) -> None:
    """In float32, where only the sums are rounded; includes inputs split into chunks of rows."""
    x = torch.randn(shape)
    w1, w3 = ColumnParallelLinear(64, 96), ColumnParallelLinear(64, 96)
    w2 = RowParallelLinear(96, 64)
    for layer in (w1, w2, w3):
        layer.weight.copy_(torch.randn(layer.weight.shape) / 8)
    y = cpu.swiglu_weight_lhs(x, w1, w2, w3)
    assert y.is_contiguous()
    torch.testing.assert_close(y, swiglu(x, w1, w2, w3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_linear_layers_are_chosen_by_cpu_features(
    processor: str, dtype: torch.dtype, use_processor: Callable[[str], None]
) -> None:
    """Checks the choice for each kind of CPU, and the logits' accuracy on this one."""
    use_processor(processor)
    device, params = torch.device("cpu"), PARAMS | {"dim": 1024, "n_layers": 1, "vocab_size": 2048}
    weights = random_weights(params)
    exact = new_model(params, weights, max_batch_size=4)
    model = new_model(params, {k: w.to(dtype) for k, w in weights.items()}, max_batch_size=4)
    accel.accelerate(model)
    has_kernels = processor in kernels.INSTRUCTION_SETS and dtype != torch.float32
    is_amx = processor == "AMX" and dtype == torch.bfloat16
    chosen = {layer.linear for layer in linears(model)}
    ways = accel.ways(model)
    if has_kernels:
        assert chosen == {kernels.linear}
        assert (ways.linear, ways.activations) == (f"C kernels, {processor}", "float32")
        assert model.dtype == cpu.activation_dtype(device, dtype) == torch.float32
    else:
        assert (kernels.linear in chosen, ways.activations) == (False, None)
        assert (cpu._weight_lhs_linear in chosen, ways.linear == "weight on the left") == (
            is_amx,
            is_amx,
        )
        assert model.dtype == cpu.activation_dtype(device, dtype) == dtype
    ffn = {layer.compute.__name__ for layer in model.modules() if isinstance(layer, FeedForward)}
    assert ffn == {"swiglu_weight_lhs" if is_amx else "swiglu"}
    rounding = {torch.float32: 1e-6, torch.float16: 2**-9, torch.bfloat16: 2**-6}[dtype]
    for prompt in PROMPTS:
        logits = exact.forward(torch.tensor([prompt]), 0)[0, -1:]
        assert relative_error(model.forward(torch.tensor([prompt]), 0)[0, -1:], logits) < rounding
    cached = torch.float16 if has_kernels else dtype
    assert {layer.cache.k.dtype for layer in attentions(model)} == {cached}


def test_cpu_features_respect_onednn_max_cpu_isa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    everything = features.cpu_features()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
    assert features.cpu_features() == {f for f in everything if not f.startswith("amx")}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert not {"amx_bf16", "avx512_bf16"} & features.cpu_features()
    for limit in ("avx512_core_amx", "default", "", "a word that oneDNN does not know"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert features.cpu_features() == everything


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept() -> None:
    """Three 64 MiB tensors reuse freed memory; otherwise they would fault in 49,152 pages."""
    counts = {}
    for case in ("kept", "given back"):
        result = run(sys.executable, PROGRAMS / "freed_memory.py", case)
        assert result.returncode == 0, result.stderr
        counts[case] = int(result.stdout)
    assert counts["kept"] < 100
    assert counts["given back"] > 10 * 100


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_huge_pages_are_requested() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no transparent huge pages")
    result = run(sys.executable, PROGRAMS / "huge_pages.py", DEMO)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "True"


# --- CUDA attention, with an emulated kernel ------------------------------------------------------


def documented_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    seqused_k: Tensor,
) -> Tensor:
    """The flash kernel's semantics for packed rows, per its documentation: causal, aligned to
    the last token, over the first ``seqused_k`` keys of each row."""
    assert starts_q.dtype == starts_k.dtype == seqused_k.dtype == torch.int32
    shared = q.shape[1] // k.shape[1]
    outputs = []
    for row, used in enumerate(seqused_k.tolist()):
        rows = q[starts_q[row] : starts_q[row + 1]].double()  # [S, H, D]
        assert len(rows) <= longest_q
        assert used <= longest_k
        keys, values = (
            x[starts_k[row] : starts_k[row] + used].double().repeat_interleave(shared, 1)
            for x in (k, v)
        )
        scores = torch.einsum("shd,lhd->hsl", rows, keys) / q.shape[-1] ** 0.5
        allowed = torch.ones(len(rows), used, dtype=torch.bool).tril(used - len(rows))
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hsl,lhd->shd", weights, values))
    return torch.cat(outputs).to(q.dtype)


@pytest.mark.parametrize("case", ["prompts", "prompts' ends", "chunks", "step"])
def test_flash_attention_equals_attention_with_the_documented_kernel(
    case: str, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_flash_kernel", documented_kernel)
    device = torch.device("cpu")
    results = []
    for attend in (attention, cuda.flash_attention):
        model = new_model(PARAMS, weights, max_batch_size=4, max_seq_len=16)
        for layer in attentions(model):
            layer.attend = attend
        wanted = [0, 1, 2] if case == "prompts' ends" else None
        slots = [0, 1, 2] if case == "step" else [3, 0, 2]
        prompts = Prefill(slots, [0, 0, 0], [3, 1, 6], device, wanted)
        hidden = model.hidden(torch.arange(10), prompts)
        if case == "chunks":
            chunks = Prefill(slots, [3, 1, 6], [2, 4, 1], device)
            hidden = model.hidden(torch.arange(50, 57), chunks)
        if case == "step":
            positions = torch.tensor([3, 1, 6])
            hidden = model.hidden(positions, Decode(positions, 7, ragged=True))
        results.append(hidden)
    assert relative_error(results[1], results[0]) < 1e-5


# --- Joint projections ----------------------------------------------------------------------------


def joined(weights: dict[str, Tensor]) -> Transformer:
    model = new_model(PARAMS, weights, max_batch_size=4, max_seq_len=16)
    join_projections(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_projections_equal_the_plain_ones(
    dtype: torch.dtype, weights: dict[str, Tensor]
) -> None:
    halved = {key: weight.to(dtype) for key, weight in weights.items()}
    plain = new_model(PARAMS, halved, max_batch_size=4, max_seq_len=16)
    fast = joined(halved)
    prompts = Prefill([3, 0, 2], [0, 0, 0], [3, 1, 6], torch.device("cpu"), [0, 1, 2])
    positions = torch.tensor([3, 1, 6])
    for tokens, batch in (
        (torch.arange(10), prompts),
        (positions, Decode(positions, 7, ragged=True)),
    ):
        error = relative_error(fast.hidden(tokens, batch), plain.hidden(tokens, batch))
        assert error < (1e-5 if dtype == torch.float32 else 0.02)
    for key, weight in plain.state_dict().items():
        assert torch.equal(fast.state_dict()[key], weight)


class Doubled(ColumnParallelLinear):
    def forward(self, input_: Tensor) -> Tensor:
        return 2 * super().forward(input_)


@pytest.mark.parametrize(
    "change", ["in place", "replaced", "loaded", "hook", "copy", "to", "module"]
)
def test_joint_projections_give_way_to_changes(change: str, weights: dict[str, Tensor]) -> None:
    """Keys are doubled, in some way; all must give what the plain model gives."""
    own = {key: weight.clone() for key, weight in weights.items()}
    expected = new_model(PARAMS, own, max_batch_size=4, max_seq_len=16)
    changed = joined(weights)
    if change == "copy":
        changed = copy.deepcopy(changed)
    if change == "to":
        changed = changed.to(torch.float64).to(torch.float32)
    for model in (expected, changed):
        wk = attentions(model)[1].wk
        if change == "hook":
            wk.register_forward_hook(lambda _module, _input, output: 2 * output)
        elif change == "replaced" and model is changed:
            wk.weight = nn.Parameter(2 * wk.weight, requires_grad=False)
        elif change == "loaded" and model is changed:
            wk.load_state_dict({"weight": 2 * wk.weight}, assign=True)
        elif change == "module" and model is changed:
            attentions(model)[1].wk = other = copy.copy(wk)  # with the same weight
            other.__class__ = Doubled
        else:
            wk.weight.mul_(2)
    tokens = torch.arange(12)[None]
    assert relative_error(changed(tokens, 0), expected(tokens, 0)) < 1e-5


def test_layers_may_be_called_with_other_rotations(weights: dict[str, Tensor]) -> None:
    """As a model without positions in some layers would."""
    results = []
    for model in (new_model(PARAMS, weights, max_batch_size=4, max_seq_len=16), joined(weights)):
        model.layers[1].register_forward_pre_hook(
            lambda _block, args: (args[0], args[1], torch.ones_like(args[2]), args[3])
        )
        results.append(model(torch.arange(12)[None], 0))
    assert relative_error(results[1], results[0]) < 1e-5


def test_a_wrong_rotation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    where = torch.bfloat16, torch.device("cpu")
    assert projection.check_rotation(16, *where) is None
    right = projection._rotate
    monkeypatch.setattr(projection, "_rotate", lambda x, first, second: right(x, second, first))
    assert "relative error" in str(projection.check_rotation(16, *where))
    monkeypatch.delattr(projection, "_rotation")
    assert "_rotation" in str(projection.check_rotation(16, *where))


def test_joint_projections_hold_no_second_copy(weights: dict[str, Tensor]) -> None:
    for attention_layer in attentions(joined(weights)):
        assert isinstance(attention_layer.project, JointProjection)
        joint = attention_layer.project.weight.untyped_storage().data_ptr()
        for part in (attention_layer.wq, attention_layer.wk, attention_layer.wv):
            assert part.weight.untyped_storage().data_ptr() == joint


# --- Static shapes for CUDA graphs ----------------------------------------------------------------


@pytest.mark.parametrize("any_length", [True, False])
def test_static_steps_give_the_same_tokens(
    any_length: bool, folder: Path, llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {n: llm.generate(PROMPTS[:n], 40, temperature=0, logprobs=True) for n in (1, 2, 3)}
    static = Llama.build(
        str(folder), max_seq_len=64, max_batch_size=4, dtype="float32", device="cpu"
    )
    model = static.model
    if any_length:
        monkeypatch.setattr(cuda, "_flash_kernel", documented_kernel)
        for layer in attentions(model):
            layer.attend = cuda.flash_attention
    capture = OnCpu()
    model.decode = cuda.GraphedStep(  # type: ignore[method-assign]
        model, model.decode, any_length=any_length, capture=capture
    )
    for n in (3, 1, 2, 3):
        tokens, logprobs = static.generate(PROMPTS[:n], 40, temperature=0, logprobs=True)
        assert tokens == expected[n][0]
        for ours, theirs in zip(logprobs or [], expected[n][1] or [], strict=True):
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=1e-4, rtol=0)
    assert capture.n_captures == 3  # for 4, 1 and 2 rows, with a single length bucket
    model.to(torch.float32)  # reallocates the KV cache
    assert static.generate(PROMPTS, 40, temperature=0)[0] == expected[3][0]
    assert capture.n_captures == 4


@pytest.mark.parametrize(
    ("n", "limit", "least", "expected"),
    [
        (1, 8, 1, 1),
        (3, 8, 1, 4),
        (4, 8, 1, 4),
        (5, 6, 1, 6),
        (9, 4096, 256, 256),
        (257, 300, 256, 300),
    ],
)
def test_sizes_are_rounded_up(n: int, limit: int, least: int, expected: int) -> None:
    assert cuda._round_up(n, limit, least) == expected


# --- torch.compile --------------------------------------------------------------------------------


def test_real_rotation_equals_the_complex_one() -> None:
    x, freqs_cis = torch.randn(5, 4, 16), precompute_freqs_cis(16, 5)
    torch.testing.assert_close(rotate_real(x, freqs_cis), rotate(x, freqs_cis))


@pytest.fixture
def compiler() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@torch.library.custom_op("tests::flash", mutates_args=())
def flash_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    longest_q: int,
    longest_k: int,
    seqused_k: Tensor,
) -> Tensor:
    return documented_kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, seqused_k=seqused_k)


@flash_operator.register_fake
def _(q: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def test_a_step_with_cudas_forms_is_traced_as_one_graph(
    weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flash attention and joint projections, without a compiler. Before Python 3.12,
    cached_property would break the graph."""
    monkeypatch.setattr(
        cuda,
        "_flash_kernel",
        lambda *args, seqused_k: flash_operator(*args, seqused_k),
    )
    torch._dynamo.reset()
    backend = torch._dynamo.testing.CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain = new_model(PARAMS, weights, max_batch_size=4, max_seq_len=16)
    model = joined(weights)
    for layer in attentions(model):
        layer.attend = cuda.flash_attention
    decode = compiled_decode(model)
    prompts = Prefill([0, 1, 2], [0, 0, 0], [3, 1, 6], torch.device("cpu"))
    with torch.inference_mode():
        plain(torch.arange(10), prompts)
        model(torch.arange(10), prompts)
        for positions in (torch.tensor([3, 1, 6]), torch.tensor([6])):
            batch = [Decode(positions, 7, ragged=len(positions) > 1) for _ in range(2)]
            expected = plain.decode(positions, batch[0])
            assert relative_error(decode(positions, batch[1]), expected) < 1e-5
    assert backend.frame_count == 2  # one row, several


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_compiled_steps_give_the_same_tokens_and_compile_twice(folder: Path, llm: Llama) -> None:
    """Once for one row and once for several, whatever the lengths and batch sizes."""
    compiled = Llama.build(
        str(folder), max_seq_len=64, max_batch_size=4, dtype="float32", device="cpu", compile=True
    )
    counters = torch._dynamo.utils.counters
    for n in (1, 2):  # warm-up
        compiled.generate(PROMPTS[:n], 3, temperature=0)
    assert counters["stats"]["unique_graphs"] == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS[1:], [[5] * 30] * 4, [[8] * 20]):
            expected = llm.generate(prompts, 20, temperature=0)
            assert compiled.generate(prompts, 20, temperature=0) == expected
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_two_compiled_ranks_give_the_same_tokens(folder: Path) -> None:
    script = PROGRAMS / "compiled_rank.py"
    result = torchrun(2, script, folder)
    assert result.returncode == 0, result.stderr
    plain, compiled = json.loads(result.stdout.splitlines()[-1])
    assert compiled == plain
