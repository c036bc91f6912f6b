"""llama.cpp as a peer: the files it gets hold our models, and it is called rightly."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, ROOT, SHARED, run

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from benchmarks import cost, llamacpp, quality  # noqa: E402
from benchmarks.gguf_files import write_gguf  # noqa: E402
from benchmarks.shapes import checkpoint_of  # noqa: E402
from llama import Llama, ModelArgs  # noqa: E402
from llama.quantize import quantize  # noqa: E402

STORIES = SHARED / "stories260K" / "native"
TOKENS = [1, *torch.randint(5, 500, (120,), generator=torch.manual_seed(1)).tolist()]


@pytest.fixture(params=["demo", "stories260K", "scaled RoPE"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "scaled RoPE":
        return checkpoint_of("tiny", tmp_path)
    if request.param == "stories260K" and not STORIES.exists():
        pytest.skip("needs ../shared/models/stories260K")
    return DEMO if request.param == "demo" else STORIES


def theirs(file: Path, n_rows: int = 1) -> llamacpp.Model:
    return llamacpp.Model(file, n_rows, 256, 1, max_outputs=256, float32_attention=True)


def forward(model: llamacpp.Model, tokens: list[int]) -> torch.Tensor:
    n = len(tokens)
    logits = model.forward(tokens, list(range(n)), [0] * n, [True] * n)
    return torch.from_numpy(logits.copy())


def types(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("pad", [False, True])
def test_a_gguf_file_in_float32_has_our_logits(folder: Path, tmp_path: Path, pad: bool) -> None:
    write_gguf(folder, tmp_path / "F32.gguf", "F32", pad=pad)
    logits = forward(theirs(tmp_path / "F32.gguf"), TOKENS)
    llm = Llama.build(str(folder), max_seq_len=256, device="cpu", dtype="float32")
    torch.testing.assert_close(logits, llm.model(torch.tensor([TOKENS]), 0)[0], atol=1e-3, rtol=0)


def test_rows_of_a_step_are_sequences(tmp_path: Path) -> None:
    """Prompts of unequal length in one call, then a token for each: as one after the other."""
    write_gguf(DEMO, tmp_path / "F32.gguf", "F32")
    model, prompts = theirs(tmp_path / "F32.gguf", n_rows=2), [TOKENS[:50], TOKENS[:9]]
    alone = []
    for prompt in prompts:
        model.clear()
        alone.append(forward(model, [*prompt, 7])[-2:])
    model.clear()
    positions, rows = [*range(50), *range(9)], [0] * 50 + [1] * 9
    is_last = [i == len(prompts[row]) - 1 for i, row in zip(positions, rows, strict=True)]
    first = model.forward(sum(prompts, []), positions, rows, is_last).copy()  # noqa: RUF017
    second = model.forward([7, 7], [50, 9], [0, 1], [True, True])
    for row in (0, 1):
        together = torch.stack((torch.from_numpy(first)[row], torch.from_numpy(second)[row]))
        torch.testing.assert_close(together, alone[row], atol=1e-3, rtol=0)


def test_types_are_those_of_llama_quantize(tmp_path: Path) -> None:
    """Norms stay in float32. In Q4_0 the output layer has more bits: Q6_K, if its width allows."""
    for name in ("BF16", "Q8_0", "Q4_0"):
        write_gguf(DEMO, tmp_path / "model.gguf", name)
        found = types(tmp_path / "model.gguf")
        assert found.pop("output.weight") == ("Q8_0" if name == "Q4_0" else name)
        for tensor, kind in found.items():
            assert kind == ("F32" if "norm" in tensor else name), tensor
    write_gguf(DEMO, tmp_path / "model.gguf", "Q4_0", override={"token_embd": "BF16"})
    assert types(tmp_path / "model.gguf")["token_embd.weight"] == "BF16"


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/models/stories260K")
def test_a_width_that_blocks_dont_divide_becomes_float16_or_is_padded(tmp_path: Path) -> None:
    write_gguf(STORIES, tmp_path / "model.gguf", "Q4_0")
    assert types(tmp_path / "model.gguf")["blk.0.ffn_down.weight"] == "F16"
    write_gguf(STORIES, tmp_path / "padded.gguf", "Q4_0", pad=True)
    assert types(tmp_path / "padded.gguf")["blk.0.ffn_down.weight"] == "Q4_0"


def test_quantized_numbers_are_those_of_the_format(tmp_path: Path) -> None:
    """As PyPI's gguf dequantizes them; the file is smaller in turn."""
    weights = torch.load(DEMO / "consolidated.00.pth", weights_only=True)
    weight = weights["layers.0.feed_forward.w2.weight"].float()
    errors = []
    for name in ("BF16", "Q8_0", "Q4_0"):
        write_gguf(DEMO, tmp_path / "model.gguf", name)
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        tensor = tensors["blk.0.ffn_down.weight"]
        stored = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        errors.append(float((stored - weight).norm() / weight.norm()))
    assert errors[0] == 0
    assert 0 < errors[1] < 0.01 < errors[2] < 0.12


def test_what_cant_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF and more")
    with pytest.raises(RuntimeError, match=r"can't load .*bad.gguf"):
        theirs(tmp_path / "bad.gguf")
    with pytest.raises(ValueError, match="type is 'Q5_0', expected one of F32, BF16, Q8_0, Q4_0"):
        write_gguf(DEMO, tmp_path / "model.gguf", "Q5_0")
    monkeypatch.setenv(llamacpp.LIBRARY, str(tmp_path / "libllama.so"))
    with pytest.raises(FileNotFoundError, match=r"LLAMACPP_LIBRARY is .*libllama.so"):
        llamacpp.find_library()


def test_a_quantized_step_reads_integers_and_scales() -> None:
    args = ModelArgs(**PARAMS)
    kv = args.kv_heads * args.head_dim
    shapes = [(args.dim, args.dim)] * 2 + [(kv, args.dim)] * 2
    shapes += [(args.ffn_hidden_dim, args.dim)] * 2 + [(args.dim, args.ffn_hidden_dim)]
    output = quantize(torch.zeros(args.vocab_size, args.dim), 8).nbytes
    for bits in (8, 4):
        layer = sum(quantize(torch.zeros(shape), bits).nbytes for shape in shapes)
        read = cost.weight_bytes(args, 1, 2, f"int{bits}")
        assert read == args.n_layers * layer + output
        assert cost.step_bytes(args, 1, 2, 3, 0, f"int{bits}") == read


def test_losses_are_means_over_predicted_tokens() -> None:
    """By hand: two predictions over three tokens."""
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [1.0, 1.0, 1.0]]).log()
    logits = torch.tensor([[0.25, 0.5, 0.25], [0.25, 0.5, 0.25], [1.0, 1.0, 1.0]]).log()
    loss = quality.Loss()
    loss.add([2, 0, 1], logits, reference)
    figures = loss.figures()
    assert figures["perplexity"] == pytest.approx(math.sqrt(4 * 2))
    assert figures["divergence"] == pytest.approx(0.25 * math.log(2) / 2)
    assert figures["same_token"] == 0.5


def test_quality_is_measured_for_both_libraries() -> None:
    record = quality.measure(DEMO, 4, 3)
    formats: dict[str, Any] = record["formats"]
    assert list(formats) == [
        *("bfloat16", "int8", "int4", "llama.cpp BF16", "llama.cpp Q8_0", "llama.cpp Q4_0"),
        *("llama.cpp Q8_0, our tensors", "llama.cpp Q4_0, our tensors"),
    ]
    for kind in ("stories", "dialogs"):
        for names in (("bfloat16", "int8", "int4"), [f"llama.cpp {n}" for n in quality.THEIRS]):
            losses = [formats[name][kind]["divergence"] for name in names]
            assert 0 < losses[0] < losses[1] < losses[2] < 0.01
    # norms, and in Q8_0 also the width of blocks, make up the difference
    assert formats["int4"]["bits_per_weight"] == pytest.approx(6.0, abs=0.05)
    assert formats["llama.cpp Q4_0, our tensors"]["bits_per_weight"] == pytest.approx(6.0, abs=0.05)
    assert all(figures["sums"] == 3 for figures in formats.values())
    assert len(quality.table(record).splitlines()) == 2 + len(formats)


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "gguf_type"), [("", "BF16"), ("int4", "Q4_0")])
def test_the_benchmark_compares_with_llamacpp(
    quantize: str, gguf_type: str, tmp_path: Path
) -> None:
    command: list[str | Path] = [sys.executable, "benchmarks/run.py", "--shape", "tiny"]
    command += ["--device", "cpu", "--repeats", "1", "--models", tmp_path, "--results", tmp_path]
    command += ["--vs", "llamacpp", "--figures", "load", "--dtype", "bfloat16"]
    result = run(*command, *(["--quantize", quantize] if quantize else []), cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (lines,) = tmp_path.glob("*.jsonl")
    configuration, *records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert configuration["quantize"] == (quantize or None)
    assert "AVX2" in configuration["llama.cpp"] or "NEON" in configuration["llama.cpp"]
    cases = ("decode, batch 1", "decode, batch 8", "prefill 512", "ragged")
    expected = {f"{case}: times faster than llamacpp" for case in cases}
    expected |= {"load", "load: peak RSS"} | ({"load, quantized folder"} if quantize else set())
    assert expected <= {record["figure"] for record in records}
    assert (tmp_path / f"tiny-{gguf_type}.gguf").exists()
