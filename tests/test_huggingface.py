"""Hugging Face checkpoints: loading and error messages."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS
from reference import relative_error
from safetensors.torch import load_file, save_file
from test_convert import cli
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Llama, ModelArgs, Tokenizer, __main__
from llama.checkpoint import huggingface, verify
from llama.checkpoint.folder import find_checkpoint
from llama.vocab.tokenizer_json import tokenizer_json

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "vocab_size": 1024,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    """The tiny checkpoint in Hugging Face's layout, with the rows of wq and wk permuted."""
    tensors = {}
    for key, tensor in weights.items():
        if key.endswith(("wq.weight", "wk.weight")):
            pairs = tensor.view(-1, 4, 2, 128)
            tensor = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).view(tensor.shape)
        tensors[huggingface.huggingface_key(key)] = tensor.contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(DEMO / "tokenizer.model", tmp_path)
    return tmp_path


def build(folder: Path, **arguments: Any) -> Llama:
    sizes: dict[str, Any] = {"max_seq_len": 64, "dtype": "float32", "device": "cpu"}
    return Llama.build(str(folder), **(sizes | arguments))


def change(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))


def test_weights_equal_the_native_ones(folder: Path, weights: dict[str, Tensor]) -> None:
    model = build(folder).model
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    assert model.params.ffn_hidden_dim == 384


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_dtypes(folder: Path, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    path = folder / "model.safetensors"
    save_file({key: t.to(dtype) for key, t in load_file(path).items()}, path)
    for key, tensor in build(folder).model.state_dict().items():
        assert torch.equal(tensor, weights[key].to(dtype).float()), key


def test_a_tied_embedding_is_in_memory_once(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lacks 'lm_head\.weight'"):
        build(folder)
    change(folder, tie_word_embeddings=True)
    for dtype in ("float32", "bfloat16"):  # mapped; converted
        model = build(folder, dtype=dtype).model
        assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()
        assert torch.equal(model.output.weight.float(), model.tok_embeddings.weight.float())


def test_inv_freq_buffers_are_ignored(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, path)
    build(folder)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(128)
    save_file(tensors, path)
    with pytest.raises(
        ValueError, match=r"unknown key\(s\) 'model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        build(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mistral"}, "of the type 'mistral', expected 'llama'"),
        ({"attention_bias": True}, "attention_bias True, which is not supported"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', .* expected 'silu'"),
        ({"sliding_window": 4096}, "sliding_window 4096"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window 4096"),
        ({"rope_interleaved": True}, "rope_interleaved True"),
        ({"head_dim": 16}, r"q_proj|wq.* \(128, 128\), expected \(256, 128\)"),
        ({"head_dim": 7}, "head_dim is 7 .*expected an even number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "linear rope_scaling without factor"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling_factor is -2"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 4.0}}, "rope_high_freq_factor is 4"),
        (
            {"rope_scaling": {"rope_type": "llama3"}},
            "llama3 rope_scaling without factor, high_freq_factor, low_freq_factor, original_max",
        ),
        ({"rope_scaling": "llama3"}, "rope_scaling 'llama3', expected a JSON object"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"intermediate_size": "384"}, "intermediate_size '384'"),
        ({"vocab_size": -1}, "vocab_size -1"),
        (
            {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_type": "default"}},
            "gives 'rope_type' two values, 'llama3' and, in rope_parameters, 'default'",
        ),
        ({"rope_parameters": {"rope_theta": 10000.0}}, r"gives 'rope_theta' two values, 500000\.0"),
        ({"hidden_size": 120}, "dim is 120 and n_heads 16"),
        ({"max_position_embeddings": -1}, "max_position_embeddings -1"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings 1"),
        ({"eos_token_id": "2"}, "eos_token_id '2', expected an id or a list"),
        ({"vocab_size": 1000}, "holds 1000 tokens, but the tokenizer has 1024"),
        ({"num_hidden_layers": 1}, r"unknown key\(s\) 'model\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"lacks 'model\.layers\.2\."),
        (
            {"intermediate_size": 400},
            r"mlp\.gate_proj\.weight .* \(384, 128\), expected \(400, 128\)",
        ),
    ],
)
def test_configs_that_are_refused(folder: Path, fields: dict[str, Any], message: str) -> None:
    change(folder, **fields)
    with pytest.raises(ValueError, match=message):
        build(folder)


def test_irrelevant_config_fields_are_accepted(folder: Path) -> None:
    change(
        folder,
        attention_bias=False,
        rope_scaling=None,
        head_dim=8,
        pretraining_tp=2,
        use_cache=False,
        torch_dtype="bfloat16",
        hidden_act="swish",
        sliding_window=4096,
        use_sliding_window=False,
        quantization_config={},
        eos_token_id=-1,
        rope_interleaved=False,
        tie_word_embeddings=None,
    )
    assert (
        build(folder).tokenizer.stop_tokens == Tokenizer(str(DEMO / "tokenizer.model")).stop_tokens
    )
    for kind in ("type", "rope_type"):
        change(folder, rope_scaling={kind: "linear", "factor": 1.0})
        assert not build(folder).model.params.use_scaled_rope


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": 16},
        {"head_dim": 4, "num_key_value_heads": 4},
        {"hidden_size": 120, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 8},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 1.0, "rope_theta": 10000.0}},
        {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 32, "factor": 3.0}},
        {"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 2.0, "high_freq_factor": 3.0}},
    ],
    ids=str,
)
def test_architecture_variants_match_transformers(tmp_path: Path, fields: dict[str, Any]) -> None:
    """As saved by transformers; the same after conversion to Meta's layout and back."""
    rope = {"rope_theta": 500000.0} | fields.get("rope_parameters", {"rope_type": "default"})
    config = LlamaConfig(**(CONFIG | fields | {"rope_parameters": rope, "rope_theta": None}))
    torch.manual_seed(1)
    theirs = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    shutil.copy(DEMO / "tokenizer.model", tmp_path / "hf")
    cli("convert", tmp_path / "hf", tmp_path / "native")
    cli("convert", tmp_path / "native", tmp_path / "back", "--format", "hf")
    tokens = torch.randint(0, 1024, (2, 48))
    with torch.inference_mode():
        expected = theirs(tokens).logits
        again = LlamaForCausalLM.from_pretrained(tmp_path / "back").eval()(tokens).logits
    assert relative_error(again, expected) < 1e-5
    for name in ("hf", "native", "back"):
        assert relative_error(build(tmp_path / name).model(tokens, 0), expected) < 1e-5


def test_linear_scaling_extends_the_context(folder: Path) -> None:
    change(folder, max_position_embeddings=32, rope_scaling={"type": "linear", "factor": 4.0})
    build(folder, max_seq_len=128)
    with pytest.raises(ValueError, match="at most 128 tokens"):
        build(folder, max_seq_len=129)


def test_max_seq_len_is_limited_to_max_position_embeddings(folder: Path) -> None:
    change(folder, max_position_embeddings=100)
    with pytest.raises(ValueError, match=r"max_seq_len is 101, .* at most 100"):
        build(folder, max_seq_len=101)


def test_both_spellings_of_scaled_rope(folder: Path) -> None:
    for fields in (
        {"rope_scaling": LLAMA3_ROPE | {"factor": 32.0}},
        {
            "rope_parameters": LLAMA3_ROPE | {"factor": 32.0, "rope_theta": 400000.0},
            "rope_theta": None,
        },
    ):
        change(folder, **fields)
        llm = build(folder)
        assert llm.model.params.use_scaled_rope
        assert llm.model.params.rope_scaling_factor == 32
        assert "<|eom_id|>" in llm.tokenizer.special_tokens
    assert llm.model.params.rope_theta == 400000


def test_stop_tokens_come_from_the_folder(folder: Path) -> None:
    plain = build(folder).tokenizer.stop_tokens
    change(folder, eos_token_id=7)
    assert build(folder).tokenizer.stop_tokens == plain | {7}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert build(folder).tokenizer.stop_tokens == plain | {8, 9}


def test_tokenizer_locations(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.model, original/tokenizer.model, or tokenizer.json alone, with the same ids."""
    text = "Once upon a time, né 👩‍👩‍👧 1234"
    expected = tokenizer.encode(text, bos=True, eos=True)
    (folder / "original").mkdir()
    (folder / "tokenizer.model").rename(folder / "original" / "tokenizer.model")
    assert build(folder).tokenizer.encode(text, bos=True, eos=True) == expected
    (folder / "original" / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(tokenizer)))
    assert build(folder).tokenizer.encode(text, bos=True, eos=True) == expected
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*give tokenizer_path"):
        build(folder)


def test_sharded_files_and_their_index(folder: Path, weights: dict[str, Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys = sorted(tensors)
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(keys)}
    for name in set(names.values()):
        save_file({k: t for k, t in tensors.items() if names[k] == name}, folder / name)
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": names}))
    for key, tensor in build(folder).model.state_dict().items():
        assert torch.equal(tensor, weights[key])
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks model-00002-of-00002\.safetensors"):
        build(folder)
    for bad in ('{"weight_map": {"a": "../x"}}', '{"weight_map": [1]}', "{}"):
        (folder / huggingface.INDEX).write_text(bad)
        with pytest.raises(ValueError, match="no valid weight_map"):
            build(folder)


def test_the_whole_file_comes_before_the_index_and_other_files(
    folder: Path, weights: dict[str, Tensor]
) -> None:
    """As in transformers: folders also hold a consolidated.safetensors, or a stale index."""
    other = {key: tensor * 2 for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "consolidated.safetensors")
    model = build(folder).model
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    names = {"model.norm.weight": "model-00001-of-00009.safetensors"}
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": names}))
    model = build(folder).model
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    names = dict.fromkeys(other, "consolidated.safetensors")
    (folder / huggingface.INDEX).write_text(json.dumps({"weight_map": names}))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00009.safetensors")
    model = build(folder).model
    assert torch.equal(model.norm.weight, weights["norm.weight"] * 2)


def as_pickles(folder: Path, n_files: int = 1) -> None:
    """Replace the safetensors file by pytorch_model.bin, or by several and their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if n_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    index: dict[str, str] = {}
    for i in range(n_files):
        name = f"pytorch_model-{1 + i:05d}-of-{n_files:05d}.bin"
        part = dict(list(tensors.items())[i::n_files])
        torch.save(
            part | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / name
        )
        index |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


def test_pickles_without_safetensors(folder: Path, weights: dict[str, Tensor]) -> None:
    """One file, or several with or without their index; safetensors come first."""
    as_pickles(folder)
    for key, tensor in build(folder).model.state_dict().items():
        assert torch.equal(tensor, weights[key]), key
    other = {key: tensor * 2 for key, tensor in weights.items()}
    save_file(
        {huggingface.huggingface_key(k): t for k, t in other.items()}, folder / "x.safetensors"
    )
    assert torch.equal(build(folder).model.norm.weight, weights["norm.weight"])
    (folder / "x.safetensors").rename(folder / "model.safetensors")
    (folder / "pytorch_model.bin").unlink()
    as_pickles(folder, 3)
    torch.save({"not": "weights"}, folder / "training_args.bin")
    for index in (True, False):
        norm = build(folder).model.norm.weight
        assert torch.equal(norm, other["norm.weight"])
        if index:
            (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "y.safetensors"}}')
    with pytest.raises(
        ValueError, match=r"pytorch_model\.bin\.index\.json' has no valid weight_map"
    ):
        build(folder)


def test_a_vocab_size_that_isnt_the_weights(folder: Path) -> None:
    change(folder, vocab_size=1040)
    with pytest.raises(
        ValueError, match=r"lm_head\.weight .* has 1024 rows, but config\.json gives .* 1040"
    ):
        build(folder)


def test_faults_of_pickles(folder: Path) -> None:
    as_pickles(folder)
    path = folder / "pytorch_model.bin"
    tensors = torch.load(path, weights_only=True)
    for change, message in (
        ({"lm_head.weight": None}, r"lacks 'lm_head\.weight'"),
        ({"lm_head.bias": torch.ones(1024)}, r"unknown key\(s\) 'lm_head\.bias'"),
        ({"model.norm.weight": [1.0] * 128}, r"model\.norm\.weight .* isn't a dense tensor: list"),
        ({7: torch.ones(1)}, "has the key 7, expected names of tensors"),
        ({"model.norm.weight": torch.nn.Linear(1, 1)}, "was not loaded: it holds torch.nn"),
    ):
        torch.save({k: t for k, t in (tensors | change).items() if t is not None}, path)
        with pytest.raises(ValueError, match=message):
            build(folder)


def test_verify_checks_the_sums_of_pickles(folder: Path) -> None:
    as_pickles(folder)
    ckpt = find_checkpoint(str(folder))
    args, vocabulary = ckpt.args(1024, 16, 1), folder / "tokenizer.model"
    assert verify.verify(ckpt, args, vocabulary, progress=False) == []
    data = bytearray((folder / "pytorch_model.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "pytorch_model.bin").write_bytes(data)
    (fault,) = verify.verify(ckpt, args, vocabulary, progress=False)
    assert "Bad CRC-32" in fault
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors["lm_head.weight"][0, 0] = float("nan")
    torch.save(tensors, folder / "pytorch_model.bin")
    (fault,) = verify.verify(ckpt, args, vocabulary, progress=False)
    assert fault.startswith("lm_head.weight in ")


@pytest.mark.parametrize("damage", ["short", "empty", "garbage", "huge header"])
def test_damaged_files(folder: Path, damage: str) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(
        {
            "short": data[:-100],
            "empty": b"",
            "garbage": b"x" * 1000,
            "huge header": (2**62).to_bytes(8, "little") + data[8:],
        }[damage]
    )
    with pytest.raises(ValueError, match="can't be read as a safetensors file"):
        build(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"lm_head\.weight .* torch\.int8, .*quantized"):
        build(folder)


def test_a_missing_package_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For reading and for writing."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    words = r"Hugging Face's files need the package safetensors: pip install safetensors"
    with pytest.raises(ImportError, match=words):
        build(folder)
    words_typed = ["-m", "convert", str(DEMO), str(tmp_path / "new"), "--format", "hf"]
    monkeypatch.setattr(sys, "argv", words_typed)
    with pytest.raises(SystemExit, match=f"error: {words}"):
        __main__.main()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("dim", "width", "params"),
    [
        (4096, 11008, {"multiple_of": 256, "ffn_dim_multiplier": None}),  # Llama 2 7B
        (5120, 13824, {"multiple_of": 256, "ffn_dim_multiplier": None}),  # 13B
        (8192, 28672, {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}),  # 70B
        (4096, 14336, {"multiple_of": 1024, "ffn_dim_multiplier": 1.3}),  # Llama 3 8B
        (16384, 53248, {"multiple_of": 4096, "ffn_dim_multiplier": 1.2}),  # 405B
        (2048, 8192, {"multiple_of": 256, "ffn_dim_multiplier": 1.5}),  # 3.2 1B
        (3072, 8192, {"multiple_of": 256, "ffn_dim_multiplier": None}),  # 3.2 3B
        (64, 172, None),
        (128, 1, None),
        (128, 999983, None),
    ],
)
def test_ffn_widths_convert_back_to_params(
    dim: int, width: int, params: dict[str, Any] | None
) -> None:
    found = huggingface._ffn_params(dim, width, (None, "nonsense"))
    if params is not None:
        assert found == params
    assert ModelArgs(dim=dim, n_heads=1, **found).ffn_hidden_dim == width


def test_names_map_both_ways(weights: dict[str, Tensor]) -> None:
    names = {huggingface.huggingface_key(key) for key in weights}
    assert len(names) == len(weights)
    assert {huggingface.native_key(name) for name in names} == set(weights)
    for strange in (
        "model.norm.bias",
        "model.layers.0.norm.weight",
        "model.layers.x.mlp.up_proj.weight",
    ):
        assert huggingface.native_key(strange) == strange
    for strange in ("norm.bias", "layers.0.norm.weight", "layers.x.ffn_norm.weight"):
        assert huggingface.huggingface_key(strange) == strange
    assert PARAMS["dim"] == CONFIG["hidden_size"]


def test_two_keys_of_one_tensor_are_refused(folder: Path, weights: dict[str, Tensor]) -> None:
    """Otherwise one of them would silently be ignored."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"norm.weight": weights["norm.weight"] * 2}, path)
    with pytest.raises(
        ValueError, match=r"holds 'norm\.weight', a name of Meta's layout, expected"
    ):
        build(folder)
    del tensors["model.norm.weight"]  # nor is a native key accepted alone
    save_file(tensors | {"norm.weight": weights["norm.weight"]}, path)
    with pytest.raises(ValueError, match=r"expected Hugging Face's, 'model\.norm\.weight'"):
        build(folder)


def test_hidden_files_are_not_weights(folder: Path) -> None:
    """macOS writes ._NAME next to NAME on non-Apple file systems."""
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7" + bytes(4092))
    assert build(folder)
