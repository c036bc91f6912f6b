"""The C kernels: against float64, by instruction set, and under sanitizers."""

import copy
import functools
import json
import pickle
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEMO, PROGRAMS, ROOT, run
from reference import relative_error
from torch import Tensor

from llama import Llama, accel
from llama import quantize as plain
from llama.accel import kernels, warn_missing_kernels
from llama.accel.features import cpu_features
from llama.attention import attention
from llama.cache import Decode, KVCache
from llama.config import ModelArgs

CSRC = ROOT / "llama" / "accel" / "csrc"
FLAGS = json.loads((CSRC / "flags.json").read_text())
# those of this processor; neon's are also run under an emulator
SETS = [name for name, needed in kernels.INSTRUCTION_SETS.items() if needed <= cpu_features()]
pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))
HALF = [torch.bfloat16, torch.float16]
PROMPTS = [[1, 5, 9, 30, 7], [400]]
SHAPES = [(16, 32), (41, 172), (64, 7), (1, 1), (33, 300)]


@pytest.fixture(params=SETS, autouse=True)
def instructions(request: pytest.FixtureRequest, use_processor: Callable[[str], None]) -> str:
    """Every test runs with each instruction set that this processor has."""
    use_processor(request.param)
    return str(request.param)


def rounds_x(instructions: str, dtype: torch.dtype) -> bool:
    return instructions == "avx512bf16" and dtype == torch.bfloat16


# --- Linear layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_half_products(instructions: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight = torch.randn(n, k).to(dtype)
    for n_rows in (0, 1, 2, 3, 5, 6, 7, 13, 40):
        x = torch.randn(n_rows, k)
        y = kernels.linear(x, weight)
        assert (y.shape, y.dtype) == ((n_rows, n), torch.float32)
        exact = x.bfloat16() if rounds_x(instructions, dtype) else x
        wanted = exact.double() @ weight.double().T
        torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5 * k**0.5)
        for i in range(n_rows):  # bit for bit
            assert torch.equal(kernels.linear(x[i : i + 1], weight)[0], y[i])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_zero", [False, True])
def test_quantized_products(bits: Any, scales: torch.dtype, has_zero: bool) -> None:
    for n, k in SHAPES:
        weight = kernels.quantize(torch.randn(n, k), bits)
        weight = weight._replace(scale=weight.scale.to(scales))
        if has_zero:
            zero = torch.randint(0, 2**bits, weight.scale.shape, dtype=torch.uint8)
            weight = weight._replace(zero=zero)
        linear, exact = kernels.TiledLinear.of(weight), weight.dequantize(torch.float64)
        assert torch.equal(linear.dequantize(), weight.dequantize())
        for n_rows in (0, 1, 2, 3, 5, 9, 40):
            x = torch.randn(n_rows, k)
            y = linear(x)
            rounded = rounded_to_8_bits(x)
            wanted = rounded.double() @ exact.T
            size = rounded.double().abs() @ exact.abs().T
            assert ((y - wanted).abs() <= 1e-5 * size).all()
            for i in range(n_rows):
                assert torch.equal(linear(x[i : i + 1])[0], y[i])


def rounded_to_8_bits(x: Tensor) -> Tensor:
    """Activations as the kernels round them, in groups of 32."""
    k = x.shape[-1]
    groups = F.pad(x, (0, -k % 32)).unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, 127 / largest, 0)
    return ((groups * inverse).round() * (largest / 127)).flatten(-2)[..., :k]


def test_integer_products_are_the_same_on_every_processor(
    instructions: str, use_processor: Callable[[str], None]
) -> None:
    if instructions == SETS[0]:
        pytest.skip("compared with this one")
    x, results = torch.randn(5, 172), []
    w = torch.randn(41, 172)
    for name in (instructions, "avx2"):
        use_processor(name)
        weights = [kernels.quantize(w, bits) for bits in (8, 4)]
        results.append([kernels.TiledLinear.of(weight)(x) for weight in weights])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantize_equals_the_plain_one_up_to_ties(bits: Any) -> None:
    for dtype in (*HALF, torch.float32):
        weight = torch.randn(64, 172).to(dtype)
        weight[3] = 0
        weight[5, 40:70] = 0
        ours, theirs = kernels.quantize(weight, bits), plain.quantize(weight, bits)
        errors = [(w.dequantize() - weight.float()).square().sum() for w in (ours, theirs)]
        torch.testing.assert_close(*errors, rtol=1e-2, atol=0)
        if bits == 4:  # in 8 bits, more scales are nearly as good
            assert (ours.scale != theirs.scale).float().mean() < 0.05
        assert not ours.dequantize()[3].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_spoil_their_row_only(value: float) -> None:
    x, w = torch.randn(4, 64), torch.randn(32, 64)
    x[2, 5] = value
    forms = [kernels.TiledLinear.of(kernels.quantize(w, bits)) for bits in (8, 4)]
    for y in (*(linear(x) for linear in forms), kernels.linear(x, w.bfloat16())):
        finite = y.isfinite()
        assert finite[[0, 1, 3]].all()
        assert not finite[2].any()


def test_any_layout_of_the_operands() -> None:
    w, x = torch.randn(65, 129).bfloat16(), torch.randn(3, 130)
    odd = w.flatten()[1 : 1 + 32 * 128].view(32, 128)  # 2-byte aligned
    for weight in (odd, w[:, 1:], w.t()):
        rows = x[:, : weight.shape[1]]
        for view in (rows, rows.t().contiguous().t(), rows.expand(2, -1, -1)):
            wanted = view.double() @ weight.double().T
            assert relative_error(kernels.linear(view, weight), wanted) < 2**-7
    with pytest.raises(RuntimeError, match="shapes"):
        kernels.linear(x, w)
    with pytest.raises(RuntimeError, match="shapes"):
        kernels.TiledLinear.of(kernels.quantize(w, 4))(x)


def test_copies_of_quantized_layers() -> None:
    x, linear = torch.randn(3, 64), kernels.TiledLinear.of(kernels.quantize(torch.randn(32, 64), 4))
    for other in (copy.deepcopy(linear), pickle.loads(pickle.dumps(linear))):
        assert torch.equal(other(x), linear(x))


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_that_are_not_finite_tiny_or_huge(bits: Any) -> None:
    weight = torch.randn(8, 96)
    weight[0, 40], weight[1, 5] = float("nan"), float("inf")
    weight[2] *= 1e-35
    weight[3] *= 1e-25
    weight[4] *= 1e30
    for quantize in (kernels.quantize, plain.quantize):
        got = quantize(weight, bits).dequantize()
        is_finite = torch.ones(8, 96, dtype=torch.bool)
        is_finite[0, 32:64] = is_finite[1, :32] = False
        assert torch.equal(got.isfinite(), is_finite)
        assert not got[2].any()
        for row in (3, 4, 5):
            assert relative_error(got[row], weight[row]) < 1.5 * 2.0**-bits


def test_tiny_and_huge_activations() -> None:
    w = torch.randn(32, 64)
    tiled = kernels.TiledLinear.of(kernels.quantize(w, 8))
    for linear in (tiled, lambda x: kernels.linear(x, w.half())):
        for scale in (1e-25, 1e25):
            x = scale * torch.randn(3, 64)
            assert relative_error(linear(x) / scale, (x / scale) @ w.T) < 0.02
        assert linear(torch.full((1, 64), 1e-40)).abs().max() < 1e-36


def test_parts_of_another_shape_are_refused() -> None:
    weight = kernels.quantize(torch.randn(20, 64), 4)
    zero = torch.zeros(20, 3, dtype=torch.uint8)
    for changes, message in (
        ({"shape": (20, 96)}, r"packed is \[20, 8\], expected \[20, 12\] for 20 x 96"),
        ({"scale": weight.scale[:19]}, r"scale is \[19, 2\], expected \[20, 2\]"),
        ({"zero": zero}, r"zero is \[20, 3\], expected \[20, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            kernels.TiledLinear.of(weight._replace(**changes))


def test_gradients_flow_by_torchs_functions() -> None:
    w = torch.randn(32, 64).bfloat16()
    quantized = kernels.quantize(w, 4)
    for linear, exact in (
        (lambda x: kernels.linear(x, w), w.float()),
        (kernels.TiledLinear.of(quantized), quantized.dequantize()),
    ):
        x = torch.randn(2, 64, requires_grad=True)
        linear(x).sum().backward()
        assert x.grad is not None
        assert relative_error(x.grad, exact.sum(0).expand(2, -1)) < 1e-6


def test_other_devices_are_left_to_torch() -> None:
    x, w = torch.ones(2, 64, device="meta"), torch.randn(32, 64, dtype=torch.bfloat16)
    assert kernels.linear(x, w.to("meta")).shape == (2, 32)


def test_copies_work_where_the_kernels_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after unpickling on another machine."""
    w, x = torch.randn(32, 64).bfloat16(), torch.randn(2, 64)
    weight = kernels.quantize(w, 4)
    pickled = pickle.dumps((kernels.TiledLinear.of(weight), kernels.linear))
    monkeypatch.setattr(kernels, "_library", lambda: "the kernels aren't built")
    kernels._choose.cache_clear()
    tiled, linear = pickle.loads(pickled)
    assert torch.equal(tiled(x), F.linear(x, weight.dequantize()))
    assert torch.equal(linear(x, w), F.linear(x, w.float()))


def test_changed_weights_take_effect() -> None:
    weight = torch.nn.Parameter(torch.ones(32, 64).bfloat16(), requires_grad=False)
    x = torch.ones(1, 64)
    assert kernels.linear(x, weight).unique().tolist() == [64]
    weight.mul_(2)
    assert kernels.linear(x, weight).unique().tolist() == [128]
    assert kernels.linear(x, weight.float()).unique().tolist() == [128]


# --- Attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize(
    ("head_dim", "n_heads", "n_kv_heads"), [(16, 4, 4), (64, 8, 2), (128, 8, 1)]
)
def test_decode_attention(dtype: torch.dtype, head_dim: int, n_heads: int, n_kv_heads: int) -> None:
    """Each row its own length; the rest of the cache isn't read."""
    args = ModelArgs(dim=head_dim * n_heads, n_heads=n_heads, n_kv_heads=n_kv_heads)
    args.max_batch_size, args.max_seq_len = 4, 50
    cache = KVCache(args, 1)
    cache.allocate(torch.empty(0, dtype=dtype))
    cache.k.normal_()
    cache.v.normal_()
    lengths = [50, 7, 1]
    batch = Decode(torch.tensor(lengths) - 1, 50, ragged=True)
    q = 3 * torch.randn(3, n_heads, head_dim)
    exact = KVCache(args, 1)
    exact.k, exact.v = cache.k.double(), cache.v.double()
    wanted = attention(q.double(), exact, batch)
    for row, length in enumerate(lengths):
        cache.k[row, :, length:] = cache.v[row, :, length:] = float("nan")
    assert kernels.can_attend(head_dim)
    assert relative_error(kernels.decode_attention(q, cache, batch), wanted) < 1e-5


@pytest.mark.parametrize("n_queries", range(1, 9))
def test_queries_that_share_keys(n_queries: int) -> None:
    """A row's result doesn't depend on the others."""
    q, cache = 3 * torch.randn(4, 2 * n_queries, 32), new_cache(2, 32)
    lengths = torch.tensor([1, 16, 17, 40])
    y = kernels.decode_attention(q, cache, Decode(lengths - 1, 40, ragged=True))
    wanted = attention(q, cache, Decode(lengths - 1, 40, ragged=True))
    assert relative_error(y, wanted) < 1e-5
    one = new_cache(2, 32)
    for i in range(4):
        one.k, one.v = cache.k[i : i + 1], cache.v[i : i + 1]
        batch = Decode(lengths[i : i + 1] - 1, 40, ragged=False)
        assert torch.equal(kernels.decode_attention(q[i : i + 1], one, batch)[0], y[i])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_queries_that_are_not_finite_spoil_their_head_only(value: float) -> None:
    q, cache = torch.randn(3, 4, 32), new_cache(2, 32)
    q[1, 2, 5] = value
    batch = Decode(torch.tensor([3, 4, 39]), 40, ragged=True)
    is_nan = kernels.decode_attention(q, cache, batch).isnan()
    assert is_nan[1, 2].all()
    assert is_nan.sum() == 32


def new_cache(n_kv_heads: int, head_dim: int) -> KVCache:
    args = ModelArgs(dim=head_dim * n_kv_heads, n_heads=n_kv_heads, n_kv_heads=n_kv_heads)
    args.max_batch_size, args.max_seq_len = 4, 40
    cache = KVCache(args, 1)
    cache.allocate(torch.empty(0))
    cache.k.normal_()
    cache.v.normal_()
    return cache


def test_lengths_beyond_the_cache_are_refused() -> None:
    q, cache = torch.randn(1, 2, 32), new_cache(2, 32)
    with pytest.raises(ValueError, match="a sequence is longer than the cache"):
        kernels.decode_attention(q, cache, Decode(torch.tensor([40]), 41, ragged=True))


def test_what_the_kernel_does_not_support_is_left_to_sdpa() -> None:
    assert not kernels.can_attend(18)
    assert not kernels.can_attend(512)
    batch = Decode(torch.tensor([3, 39, 0, 7]), 40, ragged=True)
    for case in ("head_dim", "strides", "float64", "dtypes", "gradients"):
        q, cache = torch.randn(4, 2, 18 if case == "head_dim" else 32), new_cache(2, 32)
        if case == "head_dim":
            cache = new_cache(2, 18)
        elif case == "strides":
            cache.k = cache.k.transpose(1, 2).contiguous().transpose(1, 2)
        elif case == "float64":
            cache.k, cache.v = cache.k.double(), cache.v.double()
        elif case == "dtypes":
            cache.v = cache.v.half()
        q.requires_grad_(case == "gradients")
        wanted = attention(q, cache, batch)
        y = kernels.decode_attention(q, cache, batch)
        assert torch.equal(y, wanted)
        assert y.requires_grad == (case == "gradients")


# --- In a model -----------------------------------------------------------------------------------


def build(**options: Any) -> Llama:
    llm = Llama.build(str(DEMO), max_seq_len=64, max_batch_size=4, device="cpu", **options)
    llm.tokenizer.stop_tokens = set()
    return llm


def by_forward(llm: Llama, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens, one forward pass per token."""
    tokens = [*prompt]
    logits = llm.model(torch.tensor([tokens]), 0)
    for _ in range(n):
        tokens.append(int(logits[0, -1].argmax()))
        logits = llm.model(torch.tensor([tokens[-1:]]), len(tokens) - 1)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("quantize", [None, "int4"])
@pytest.mark.parametrize("name", ["layers.1", "layers.1.attention", "layers.1.feed_forward.w1"])
def test_hooks_and_patches_take_effect(name: str, quantize: str | None) -> None:
    llm = build(dtype="bfloat16", quantize=quantize)
    plain = llm.generate(PROMPTS, 8, temperature=0)[0]
    module: Any = llm.model.get_submodule(name)
    with module.register_forward_hook(lambda _module, _inputs, y: y * 0.5 - 0.25):
        hooked = llm.generate(PROMPTS, 8, temperature=0)[0]
        assert hooked == [by_forward(llm, prompt, 8) for prompt in PROMPTS]
    assert hooked != plain
    assert llm.generate(PROMPTS, 8, temperature=0)[0] == plain
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 0.5 - 0.25
    assert llm.generate(PROMPTS, 8, temperature=0)[0] == hooked


@pytest.mark.parametrize("how", ["in place", "replaced", "replaced by float32", "strided"])
def test_changed_weights_of_a_model_take_effect(how: str) -> None:
    llm = build(dtype="bfloat16")
    plain = llm.generate(PROMPTS, 8, temperature=0)[0]
    layer: Any = llm.model.get_submodule("layers.0.feed_forward.w2")
    new = -layer.weight
    if how == "in place":
        layer.weight.copy_(new)
    elif how == "strided":
        layer.weight = torch.nn.Parameter(new.t().contiguous().t(), requires_grad=False)
    else:
        dtype = torch.float32 if how.endswith("32") else torch.bfloat16
        layer.weight = torch.nn.Parameter(new.to(dtype), requires_grad=False)
    exact = build(dtype="float32", accelerate=False)
    exact.model.load_state_dict(llm.model.state_dict())
    tokens = torch.tensor([PROMPTS[0]])
    assert relative_error(llm.model(tokens, 0), exact.model(tokens, 0)) < 2**-6
    assert llm.generate(PROMPTS, 8, temperature=0)[0] != plain


@pytest.mark.parametrize("quantize", [None, "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_model_may_change_its_dtype(dtype: torch.dtype, quantize: str | None) -> None:
    llm = build(dtype="bfloat16", quantize=quantize)
    tokens = torch.tensor([PROMPTS[0]])
    wanted = llm.model(tokens, 0)
    llm.model.to(dtype)
    assert relative_error(llm.model(tokens, 0), wanted) < 2**-6
    assert len(llm.generate(PROMPTS, 8, temperature=0)[0][1]) == 8


def test_kernels_are_traced_by_torch_compile(instructions: str) -> None:
    """In one graph, without compiling again for another row count."""
    w = torch.randn(32, 64).bfloat16()
    tiled, cache = kernels.TiledLinear.of(kernels.quantize(w, 4)), new_cache(2, 32)
    batch = Decode(torch.tensor([3, 39]), 40, ragged=True)

    def step(x: Tensor) -> Tensor:
        q = kernels.linear(x, w) + tiled(x)
        y = kernels.decode_attention(q.view(-1, 1, 32).expand(-1, 2, -1), cache, batch)
        return y.flatten(1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 64)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), step(x))


# --- The library ----------------------------------------------------------------------------------


def test_a_missing_library_is_noticed_once(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(kernels, "_library", lambda: "the kernels aren't built")
    kernels._choose.cache_clear()
    monkeypatch.setattr(accel, "_warned", set())
    monkeypatch.setattr(accel, "warn_missing_kernels", warn_missing_kernels)
    with pytest.warns(UserWarning, match="the kernels aren't built. .* dequantized in every call"):
        llm = Llama.build(str(DEMO), max_seq_len=64, device="cpu", quantize="int8")
    Llama.build(str(DEMO), max_seq_len=64, device="cpu", quantize="int8")  # warnings are errors
    assert llm.ways.linear == "int8, dequantized in every call"
    prompt = llm.formatter.encode_dialog_prompt([{"role": "user", "content": "What is 23 + 45?"}])
    tokens = llm.generate([prompt], 30, temperature=0)[0][0]
    assert llm.tokenizer.decode(tokens) == "23 + 45 = 68."


def test_the_instruction_set_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("none", None), ("avx2", "avx2")):
        if expected and expected not in SETS:
            continue
        monkeypatch.setenv("LLAMA_KERNELS", value)
        kernels._choose.cache_clear()
        assert kernels.instruction_set() in (expected, None)
    monkeypatch.setenv("LLAMA_KERNELS", "sse")
    kernels._choose.cache_clear()
    with pytest.raises(ValueError, match="LLAMA_KERNELS is 'sse', expected none or one of avx512"):
        kernels.instruction_set()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_torchs_in_every_thread_and_process(instructions: str) -> None:
    if instructions != SETS[0]:
        pytest.skip("the same code")
    result = run(sys.executable, PROGRAMS / "kernel_threads.py", env={"OMP_NUM_THREADS": "2"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "0 threads started",
        "1 OpenMP runtime",
        "the child's result is right",
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a shell script is the compiler")
@pytest.mark.parametrize("refused", ["*", "*-mavx512bf16*", ""])
def test_the_build_leaves_out_what_the_compiler_lacks(
    tmp_path: Path, refused: str, instructions: str
) -> None:
    pytest.importorskip("setuptools")
    if instructions != SETS[0] or platform.machine() != "x86_64" or shutil.which("gcc") is None:
        pytest.skip("needs gcc on x86; once")
    compiler = tmp_path / "cc"
    refusal = f'case "$*" in {refused}) exit 1;; esac\n' if refused else ""
    compiler.write_text(f'#!/bin/sh\n{refusal}exec gcc "$@"\n')
    compiler.chmod(0o755)
    folders = "--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp"
    environment = {"CC": str(compiler), "LDSHARED": f"{compiler} -shared"}
    command = sys.executable, "setup.py", "-q", "build_ext", *folders
    result = run(*command, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    built = list((tmp_path / "lib").rglob("_kernels*"))
    symbols = built[0].read_bytes() if built else b""
    names = {name for name in FLAGS["x86_64"] if f"products_{name}\0".encode() in symbols}
    wanted = {"*": set(), "": set(FLAGS["x86_64"])}
    assert names == wanted.get(refused, {"avx2", "avx512"})


# --- The checks in C ------------------------------------------------------------------------------


def check_in_c(folder: Path, compiler: str, machine: str, name: str, *emulator: str | Path) -> str:
    """Run check_kernels.c under the address sanitizer; returns its checksum."""
    for tool in (compiler, *map(str, emulator[:1])):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    flags = [*FLAGS["every file"], *FLAGS[machine][name], "-O1", "-g", "-fopenmp"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fsanitize=address,undefined"]
    flags += ["-fsanitize=float-cast-overflow", "-fno-sanitize-recover=all"]
    sources = [ROOT / "tests" / "csrc" / "check_kernels.c", CSRC / f"{name}.c"]
    program = folder / name
    result = run(
        compiler, *flags, f"-DISA={name}", *sources, "-lm", "-static-libasan", "-o", program
    )
    if "cannot find" in result.stderr and "asan" in result.stderr:
        pytest.skip("needs gcc's sanitizers")
    assert result.returncode == 0, result.stderr
    # under an emulator, leaks can't be looked for
    environment = {"OMP_NUM_THREADS": "2", "ASAN_OPTIONS": f"detect_leaks={int(not emulator)}"}
    result = run(*emulator, program, "1", "200", env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def checksum(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Of an instruction set; NEON's under an emulator."""

    @functools.cache
    def of(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        if name in SETS:
            return check_in_c(folder, "gcc", platform.machine(), name)
        compiler = "aarch64-linux-gnu-gcc"
        if shutil.which(compiler) is None:
            pytest.skip(f"needs {compiler}")
        libc = Path(run(compiler, "-print-file-name=libc.so.6").stdout.strip()).resolve()
        emulator = "qemu-aarch64", "-L", libc.parents[1]
        return check_in_c(folder, compiler, "aarch64", name, *emulator)

    return of


@pytest.mark.slow
def test_kernels_are_right_and_access_their_operands_only(
    checksum: Callable[[str], str], instructions: str
) -> None:
    assert len(checksum(instructions)) == 17


@pytest.mark.slow
def test_integers_and_their_products_are_the_same_with_neon(
    checksum: Callable[[str], str], instructions: str
) -> None:
    assert checksum(instructions) == checksum("neon")
