"""Quantized folders: compressed-tensors' and AWQ's, read, written and refused; and weights that are
quantized while loading."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from conftest import DEMO, PARAMS, new_model, random_weights, write_checkpoint
from reference import relative_error
from safetensors.torch import load_file, save_file
from test_convert import cli
from test_huggingface import CONFIG
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llama import Llama, ModelArgs, accel, memory
from llama.__main__ import convert_folder
from llama.accel.kernels import quantize
from llama.checkpoint import huggingface, quantized, reader
from llama.checkpoint.folder import find_checkpoint
from llama.checkpoint.quantization_config import Scheme, parse_quantization
from llama.checkpoint.reader import Weights
from llama.checkpoint.sharding import (
    ShardSpec,
    local_slices,
    narrow,
    quantized_bits,
    shard_specs,
)
from llama.quantize import Bits, QuantizedWeight

CPU = torch.device("cpu")
ARGS = ModelArgs(**PARAMS)
SPECS = shard_specs(ARGS)
LINEAR = [key for key, spec in SPECS.items() if len(spec.sizes) == 2 and "tok_" not in key]
LAYER = "model.layers.0.mlp.down_proj"
TOKENS = torch.arange(5, 1000, 40)[None]


def load(
    folder: Path,
    n_ranks: int = 1,
    rank: int = 0,
    dtype: torch.dtype = torch.float32,
    **arguments: Any,
) -> dict[str, Any]:
    ckpt = find_checkpoint(str(folder))
    args = ckpt.args(ckpt.params["vocab_size"], 64, 1)
    return reader.load(
        ckpt, args, n_ranks, rank, dtype=dtype, device=CPU, progress=False, **arguments
    )


def floats(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {
        key: t.dequantize() if isinstance(t, QuantizedWeight) else t for key, t in tensors.items()
    }


def logits(tensors: dict[str, Any], params: dict[str, Any] = PARAMS) -> Tensor:
    return new_model(params, floats(tensors)).forward(TOKENS, 0)


def transformers_logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(TOKENS).logits


def native_rows(key: str, weight: Tensor) -> Tensor:
    """The rows of wq and wk in pairs instead of halves."""
    if not key.endswith(("wq.weight", "wk.weight")):
        return weight
    heads = weight.view(-1, 2, ARGS.head_dim // 2, weight.shape[1])
    return torch.stack([heads[:, 0], heads[:, 1]], dim=2).view(weight.shape)


def change(folder: Path, **fields: Any) -> None:
    """Change fields of the quantization_config."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= fields
    path.write_text(json.dumps(config))


def change_weights(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    groups = json.loads(path.read_text())["quantization_config"]["config_groups"]
    groups["group_0"]["weights"] |= fields
    change(folder, config_groups=groups)


# --- compressed-tensors -------------------------------------------------------------------------


def write_compressed(folder: Path, dtype: torch.dtype, ignore: list[str], **scheme: Any) -> Path:
    """A folder written by compressed-tensors and transformers."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, initializer_range=0.1)).to(dtype)
    arguments: dict[str, Any] = {"targets": ["Linear"], "weights": {"type": "int"} | scheme}
    config = QuantizationConfig(
        config_groups={"group_0": arguments}, ignore=ignore, quantization_status="frozen"
    )
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            size = scheme.get("group_size") or module.weight.shape[1]
            groups = module.weight.unflatten(1, (-1, size))
            of_weights = module.quantization_scheme.weights
            scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), of_weights)
            module.weight_scale.data = scale.to(dtype)
            module.weight_zero_point.data = zero.to(torch.int8)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    shutil.copy(DEMO / "tokenizer.model", folder)
    return folder


def decompressed(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder by native key in native order, by compressed-tensors in float32."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for key in SPECS:
        layer = huggingface.huggingface_key(key).removesuffix("weight")
        parts = {k.removeprefix(layer): t for k, t in tensors.items() if k.startswith(layer)}
        if "weight_scale" in parts:
            parts["weight_scale"] = parts["weight_scale"].float()
            parts = compressor.decompress(parts, scheme)
        found[key] = native_rows(key, parts["weight"].float())
    return found


STRATEGIES: dict[str, dict[str, Any]] = {
    "32": {"strategy": "group", "group_size": 32},
    "128": {"strategy": "group", "group_size": 128},
    "rows": {"strategy": "channel"},
}
SCHEMES: dict[str, dict[str, Any]] = {
    f"int{bits} {name} {'symmetric' if symmetric else 'with zeros'}": {
        "num_bits": bits,
        "symmetric": symmetric,
        **strategy,
    }
    for bits in (4, 8)
    for symmetric in (True, False)
    for name, strategy in STRATEGIES.items()
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_compressed_folder_holds_what_its_library_reads(
    tmp_path: Path, scheme: dict[str, Any], dtype: torch.dtype
) -> None:
    """On every rank, bit for bit, with the file's groups split by the cut."""
    write_compressed(tmp_path, dtype, ["lm_head"], **scheme)
    expected = decompressed(tmp_path)
    for n_ranks in (1, 2, 4):
        for rank in range(n_ranks):
            tensors = load(tmp_path, n_ranks, rank)
            kinds = {key: isinstance(tensor, QuantizedWeight) for key, tensor in tensors.items()}
            assert kinds == {key: key in LINEAR and key != "output.weight" for key in SPECS}
            for key, tensor in floats(tensors).items():
                part = narrow(expected[key], local_slices(SPECS[key], n_ranks, rank))
                assert torch.equal(tensor, part), key


@pytest.mark.parametrize("name", ["int4 32 symmetric", "int4 128 symmetric", "int8 rows symmetric"])
def test_logits_of_a_compressed_folder_equal_those_of_transformers(
    tmp_path: Path, name: str
) -> None:
    write_compressed(tmp_path, torch.bfloat16, [], **SCHEMES[name])
    assert relative_error(logits(load(tmp_path)), transformers_logits(tmp_path)) < 1e-5


def test_tensors_that_need_no_conversion_stay_mapped(tmp_path: Path) -> None:
    write_compressed(tmp_path, torch.bfloat16, [], **SCHEMES["int4 32 symmetric"])
    ckpt = find_checkpoint(str(tmp_path))
    weights = Weights(ckpt, ckpt.args(1024, 64, 1))
    for rank in range(2):
        for key in ("layers.1.attention.wv.weight", "output.weight"):
            weight = weights.read_quantized(key, 2, rank, CPU)
            tensors = weights.quantized[key].tensors
            pairs = ((weight.packed, "weight_packed"), (weight.scale, "weight_scale"))
            for part, name in pairs:
                stored = tensors[name].untyped_storage()
                assert part.untyped_storage().data_ptr() == stored.data_ptr()


NAMES = [huggingface.huggingface_key(key).removesuffix(".weight") for key in LINEAR]
GROUPS: dict[str, tuple[dict[str, int], list[str]]] = {
    "the class": ({"Linear": 4}, []),
    "ignored by name": ({"Linear": 4}, ["lm_head", "model.layers.1.mlp.up_proj"]),
    "ignored by expressions": ({"Linear": 4}, [r"re:.*\.0\..*", "re:lm_head$", "re:mlp"]),
    "everything ignored": ({"Linear": 4}, ["Linear"]),
    "the end of a name": ({"Linear": 4, "up_proj": 8}, ["mlp.down_proj", "proj"]),
    "an expression before the class": ({"Linear": 4, "re:.*down_proj": 8}, []),
    "a name before an expression": ({"re:.*proj": 4, "model.layers.0.mlp.up_proj": 8}, []),
    "the first expression": ({"re:.*up_proj": 8, "re:.*(up|down)_proj": 4}, []),
    "part of a name": ({"re:up_proj": 8, "re:.*q_": 4}, []),
}


@pytest.mark.parametrize(("targets", "ignore"), GROUPS.values(), ids=GROUPS)
def test_targets_are_matched_as_in_compressed_tensors(
    tmp_path: Path, targets: dict[str, int], ignore: list[str]
) -> None:
    weights = {"type": "int", "strategy": "group", "group_size": 32}
    groups = {
        f"group_{i}": {"targets": [target], "weights": weights | {"num_bits": bits}}
        for i, (target, bits) in enumerate(targets.items())
    }
    found = {"config_groups": groups, "ignore": ignore, "format": "pack-quantized"}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    config = QuantizationConfig.model_validate(found | {"quantization_status": "frozen"})
    apply_quantization_config(model, config, show_progress=False)
    expected = {}
    for name in NAMES:
        scheme = getattr(model.get_submodule(name), "quantization_scheme", None)
        expected[name] = None if scheme is None else scheme.weights.num_bits
    ours = parse_quantization(found | {"quant_method": "compressed-tensors"}, tmp_path, 2)
    assert ours is not None
    schemes = {name: ours.scheme(name) for name in NAMES}
    assert {name: scheme and scheme.bits for name, scheme in schemes.items()} == expected


# --- AWQ ----------------------------------------------------------------------------------------


def awq_words(values: Tensor) -> Tensor:
    """AWQ's int32 words of integers [rows, columns], one integer at a time.

    Word i holds columns 8 i to 8 i + 7, from the lowest bits on: 0, 2, 4, 6, 1, 3, 5, 7.
    """
    words = torch.empty(values.shape[0], values.shape[1] // 8, dtype=torch.int32)
    rows = values.tolist()
    for row in range(len(rows)):
        for i in range(words.shape[1]):
            word = 0
            for position, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                word |= rows[row][8 * i + column] << (4 * position)
            words[row, i] = word if word < 2**31 else word - 2**32
    return words


def write_awq(folder: Path, group: int, ignore: list[str]) -> dict[str, Tensor]:
    """An AWQ folder; returns the weights by native key in native order, in float64."""
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, {}
    for key, weight in random_weights(PARAMS).items():
        name = huggingface.huggingface_key(key)
        if key not in LINEAR or key == "output.weight" or any(part in name for part in ignore):
            tensors[name] = weight.half()
            expected[key] = native_rows(key, tensors[name].double())
            continue
        n, k = weight.shape
        integers = torch.randint(16, (n, k), generator=generator)
        size = k if group == -1 else group
        zeros = torch.randint(16, (n, k // size), generator=generator)
        scales = (torch.rand(n, k // size, generator=generator) * 0.02).half()
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.qweight"] = awq_words(integers.T)
        tensors[f"{layer}.qzeros"] = awq_words(zeros.T)
        tensors[f"{layer}.scales"] = scales.T.contiguous()
        every = (x.double().repeat_interleave(size, 1) for x in (zeros, scales))
        zero, scale = every
        expected[key] = native_rows(key, (integers - zero) * scale)
    save_file(tensors, folder / "model.safetensors")
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ignore or None,
    }
    config = CONFIG | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(DEMO / "tokenizer.model", folder)
    return expected


@pytest.mark.parametrize("chunk", [quantized._CHUNK_BYTES, 2048])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_an_awq_folder_holds_what_its_format_defines(
    tmp_path: Path, group: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "_CHUNK_BYTES", chunk)
    expected = write_awq(tmp_path, group, ["layers.1.mlp"])
    for n_ranks in (1, 2, 4):
        for rank in range(n_ranks):
            tensors = load(tmp_path, n_ranks, rank)
            assert sum(isinstance(t, QuantizedWeight) for t in tensors.values()) == 11
            for key, tensor in floats(tensors).items():
                part = narrow(expected[key], local_slices(SPECS[key], n_ranks, rank))
                # an integer of 4 bits times 11 bits is exact in float32
                assert torch.equal(tensor.double(), part), key


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("kind", ["symmetric", "compressed", "awq"])
def test_a_quantized_folder_is_built_as_it_is(
    kind: str, accelerate: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With the kernels, which round activations to 8 bits, and without them, exactly."""
    if kind == "symmetric":
        folder = write_compressed(tmp_path, torch.float16, [], **SCHEMES["int8 32 symmetric"])
    else:
        folder = request.getfixturevalue(kind)
    sizes: dict[str, Any] = {"max_seq_len": 64, "dtype": "float32", "device": "cpu"}
    llm = Llama.build(str(folder), **sizes, accelerate=accelerate)
    limit = 0.08 if accelerate else 1e-5
    assert relative_error(llm.model.forward(TOKENS, 0), logits(load(folder))) < limit
    bits = 8 if kind == "symmetric" else 4
    layer: Any = llm.model.layers[1].get_submodule("feed_forward.w2")
    assert accel.is_quantized(layer)
    assert layer.linear.bits == bits


def test_rows_of_awq_may_start_within_a_word() -> None:
    integers = torch.randint(16, (24, 64))
    zeros, scales = torch.randint(16, (24, 2)), torch.rand(24, 2).half()
    tensors = {"qweight": awq_words(integers.T), "qzeros": awq_words(zeros.T), "scales": scales.T}
    stored = quantized._Awq("layer", Scheme(4, 32, symmetric=False), tensors)
    assert list(stored.faults(ShardSpec((24, 64), 0), "folder")) == []
    zero, scale = (x.float().repeat_interleave(32, 1) for x in (zeros, scales))
    expected = ((integers - zero) * scale)[6:21]
    assert torch.equal(stored.read(24, 64, ((6, 21), (0, 64))).dequantize(), expected)


# --- Refused ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compressed")
    return write_compressed(folder, torch.bfloat16, ["lm_head"], **SCHEMES["int4 128 with zeros"])


@pytest.fixture(scope="module")
def awq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("awq")
    write_awq(folder, 32, [])
    return folder


@pytest.fixture
def reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read or allocated until all tensors are checked."""
    for kind in (quantized._CompressedTensors, quantized._Awq, Weights):
        monkeypatch.setattr(kind, "read", lambda *_: pytest.fail("read a tensor"))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'.*unquantized model"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8"}, "quant_method 'fp8'"),
        ({"load_in_8bit": True}, "quant_method None"),
        ("int4", "quant_method None"),
        ([1], "quant_method None"),
    ],
)
def test_other_methods_are_refused_by_name(compressed: Path, found: Any, message: str) -> None:
    path = compressed / "config.json"
    with pytest.raises(ValueError, match=rf"config\.json'.*{message}"):
        parse_quantization(found, path, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "float-quantized"}, "'format' 'float-quantized'"),
        ({"format": "int-quantized"}, "'format' 'int-quantized'"),
        ({"format": "nvfp4-pack-quantized"}, "'format' 'nvfp4-pack-quantized'"),
        ({"format": "mxfp4-pack-quantized"}, "'format' 'mxfp4-pack-quantized'"),
        ({"format": "marlin-24"}, "'format' 'marlin-24'"),
        ({"format": ["pack-quantized"]}, r"'format' \['pack-quantized'\]"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "'kv_cache_scheme' {'num_bits': 8}"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "'sparsity_config'"),
        ({"transform_config": {"config_groups": {"r1": {}}}}, "'transform_config'"),
        ({"new_field": 1}, "'new_field' 1.*expected null"),
        ({"config_groups": {}}, "'config_groups' {}"),
        ({"config_groups": [1]}, r"'config_groups' \[1\]"),
        ({"config_groups": {"W4A16": ["Linear"]}}, r"\['Linear'\].*expected an object"),
        ({"ignore": "lm_head"}, "'ignore' 'lm_head'.*list of names"),
        ({"ignore": [1]}, r"'ignore' \[1\]"),
        ({"ignore": ["re:(a|b)*c"]}, "'ignore'.*simple regular expressions"),
        ({"ignore": ["re:" + ".*" * 6]}, "'ignore'.*simple regular expressions"),
        ({"ignore": ["re:("]}, "'ignore'.*simple regular expressions"),
        ({"ignore": ["a"] * 10**6}, "config.json.*bytes are too many"),
        ({"ignore": ["a"] * 150_000}, ""),
    ],
)
def test_schemes_of_compressed_tensors_are_refused_by_field(
    compressed: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    shutil.copytree(compressed, tmp_path, dirs_exist_ok=True)
    change(tmp_path, **fields)
    if not message:
        find_checkpoint(str(tmp_path)).quantized_bits(ARGS, None)
        return
    with pytest.raises(ValueError, match=message):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_bits": 2}, "'num_bits' 2.*expected 4 or 8"),
        ({"num_bits": True}, "'num_bits' True"),
        ({"num_bits": 4.0}, r"'num_bits' 4\.0"),
        ({"symmetric": 0}, "'symmetric' 0"),
        ({"num_bits": "4"}, "'num_bits' '4'"),
        ({"type": "float"}, "'type' 'float'.*expected 'int'"),
        ({"strategy": "tensor"}, "'strategy' 'tensor'.*expected 'group' or 'channel'"),
        ({"strategy": "block"}, "'strategy' 'block'"),
        ({"strategy": "tensor_group"}, "'strategy' 'tensor_group'"),
        ({"strategy": "channel"}, "'group_size' 128.*'channel'"),
        ({"group_size": 16}, "'group_size' 16.*multiple of 32"),
        ({"group_size": 0}, "'group_size' 0"),
        ({"group_size": -32}, "'group_size' -32"),
        ({"group_size": None}, "'group_size' None"),
        ({"group_size": 128.0}, r"'group_size' 128\.0"),
        ({"group_size": 2**60}, "'group_size' 1152921504606846976"),
        ({"group_size": 64}, r"weight_scale in .* has the shape .* in groups of 64"),
        ({"group_size": 256}, "q_proj in .* in groups of 256 columns, but has 128"),
        ({"num_bits": 8}, r"weight_packed in .* has the shape \(128, 16\), expected \(128, 32\)"),
        ({"symmetric": True}, "weight_zero_point', which int4 in groups of 128 doesn't need"),
        ({"symmetric": "no"}, "'symmetric' 'no'"),
        ({"dynamic": True}, "'dynamic' True"),
        ({"actorder": "group"}, "'actorder' 'group'"),
        ({"actorder": True}, "'actorder' True"),
        ({"block_structure": [128, 128]}, "'block_structure'"),
        ({"new_field": 1}, "'new_field' 1"),
    ],
)
@pytest.mark.usefixtures("reads_nothing")
def test_weights_of_other_schemes_are_refused(
    compressed: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    shutil.copytree(compressed, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("input_activations", {"num_bits": 8, "dynamic": True}, "'input_activations' {'num_bits'"),
        ("output_activations", {"num_bits": 8}, "'output_activations' {'num_bits': 8}"),
        ("weights", None, "'weights' None"),
        ("targets", None, "'targets' None"),
        ("targets", "Linear", "'targets' 'Linear'"),
        ("format", "float-quantized", "'format' 'float-quantized'.*expected 'pack-quantized'"),
        ("new_field", 1, "'new_field' 1"),
    ],
)
def test_groups_of_other_schemes_are_refused(
    compressed: Path, tmp_path: Path, field: str, value: Any, message: str
) -> None:
    shutil.copytree(compressed, tmp_path, dirs_exist_ok=True)
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    groups["config_groups"]["group_0"][field] = value
    change(tmp_path, **(groups | {"format": "mixed-precision"}))
    with pytest.raises(ValueError, match=message):
        find_checkpoint(str(tmp_path))


def test_options_without_effect_on_the_format_are_read(compressed: Path, tmp_path: Path) -> None:
    """Calibration's order of columns, and fields that older versions write."""
    shutil.copytree(compressed, tmp_path, dirs_exist_ok=True)
    change_weights(tmp_path, actorder="weight", observer="mse", observer_kwargs={"norm": 2})
    change(tmp_path, sparsity_config={"format": "dense", "ignore": ["lm_head"]}, ignore=None)
    change(tmp_path, format="mixed-precision")  # the group has its own
    changed = load(tmp_path)
    for key, tensor in floats(load(compressed)).items():
        assert torch.equal(floats(changed)[key], tensor)


def test_versions_of_awq_may_be_in_capitals(awq: Path, tmp_path: Path) -> None:
    shutil.copytree(awq, tmp_path, dirs_exist_ok=True)
    change(tmp_path, version="GEMM", backend="autoawq")
    assert load(tmp_path).keys() == SPECS.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 8}, "'bits' 8.*expected 4"),
        ({"version": "gemv"}, "'version' 'gemv'.*expected 'gemm'"),
        ({"version": "marlin"}, "'version' 'marlin'"),
        ({"version": 1}, "'version' 1"),
        ({"zero_point": False}, "'zero_point' False"),
        ({"backend": "llm-awq"}, "'backend' 'llm-awq'"),
        ({"group_size": 8}, "'group_size' 8"),
        ({"group_size": 64}, r"qzeros in .* has the shape \(4, 16\), expected \(2, 16\)"),
        ({"desc_act": True}, "'desc_act' True"),
        ({"lm_head": True}, "'lm_head' True"),
    ],
)
@pytest.mark.usefixtures("reads_nothing")
def test_other_forms_of_awq_are_refused(
    awq: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    shutil.copytree(awq, tmp_path, dirs_exist_ok=True)
    change(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


Tensors = dict[str, Tensor]
PACKED, SCALE = f"{LAYER}.weight_packed", f"{LAYER}.weight_scale"
ZERO, SHAPE = f"{LAYER}.weight_zero_point", f"{LAYER}.weight_shape"
FAULTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "packed of another shape": (
        lambda t: t.update({PACKED: t[PACKED][:, :-1].contiguous()}),
        rf"{PACKED} in .* has the shape \(128, 47\), expected \(128, 48\)",
    ),
    "packed with too many rows": (
        lambda t: t.update({PACKED: t[PACKED].repeat(2, 1)}),
        rf"{PACKED} in .* has the shape \(256, 48\)",
    ),
    "packed in one dimension": (
        lambda t: t.update({PACKED: t[PACKED].flatten()}),
        rf"{PACKED} in .* has the shape \(6144,\)",
    ),
    "packed as bytes": (
        lambda t: t.update({PACKED: t[PACKED].view(torch.uint8)}),
        rf"{PACKED} in .* is torch.uint8, expected torch.int32",
    ),
    "scales of another shape": (
        lambda t: t.update({SCALE: t[SCALE][:, :1].contiguous()}),
        rf"{SCALE} in .* has the shape \(128, 1\), expected \(128, 3\)",
    ),
    "scales per row": (
        lambda t: t.update({SCALE: t[SCALE][:, 0].contiguous()}),
        rf"{SCALE} in .* has the shape \(128,\)",
    ),
    "scales that are integers": (
        lambda t: t.update({SCALE: t[SCALE].to(torch.int8)}),
        rf"{SCALE} in .* is torch.int8, expected torch.bfloat16 or",
    ),
    "scales in float8": (
        lambda t: t.update({SCALE: t[SCALE].to(torch.float8_e4m3fn)}),
        rf"{SCALE} in .* is torch.float8_e4m3fn",
    ),
    "zeros that aren't packed": (
        lambda t: t.update({ZERO: torch.zeros(128, 3, dtype=torch.int8)}),
        rf"{ZERO} in .* is torch.int8, expected torch.int32",
    ),
    "zeros packed along the rows": (
        lambda t: t.update({ZERO: t[ZERO].repeat(8, 1)}),
        rf"{ZERO} in .* has the shape \(128, 3\), expected \(16, 3\)",
    ),
    "another shape": (
        lambda t: t.update({SHAPE: torch.tensor([128, 383])}),
        rf"{SHAPE} in .* is \[128, 383\], expected \[128, 384\]",
    ),
    "a shape of three sizes": (
        lambda t: t.update({SHAPE: torch.tensor([1, 128, 384])}),
        rf"{SHAPE} in .* has the shape \(3,\)",
    ),
    "a shape of floats": (
        lambda t: t.update({SHAPE: torch.tensor([128.0, 384.0])}),
        rf"{SHAPE} in .* is torch.float32",
    ),
    "no scales": (lambda t: t.pop(SCALE), rf"lacks '{SCALE}' of a quantized layer"),
    "no packed": (lambda t: t.pop(PACKED), rf"lacks '{PACKED}'"),
    "no zeros": (lambda t: t.pop(ZERO), rf"lacks '{ZERO}'"),
    "no shape": (lambda t: t.pop(SHAPE), rf"lacks '{SHAPE}'"),
    "nothing of a layer": (
        lambda t: [t.pop(key) for key in (PACKED, SCALE, ZERO, SHAPE)],
        rf"lacks '{LAYER}\.weight'",
    ),
    "a plain weight too": (
        lambda t: t.update({f"{LAYER}.weight": torch.zeros(128, 384)}),
        rf"unknown key\(s\) '{LAYER}\.weight_packed', '{LAYER}\.weight_scale'",
    ),
    "the order of columns": (
        lambda t: t.update({f"{LAYER}.weight_g_idx": torch.zeros(384, dtype=torch.int32)}),
        rf"unknown key\(s\) '{LAYER}\.weight_g_idx'",
    ),
    "scales of activations": (
        lambda t: t.update({f"{LAYER}.input_scale": torch.ones(1)}),
        rf"unknown key\(s\) '{LAYER}\.input_scale'",
    ),
    "a quantized embedding": (
        lambda t: t.update(
            {"model.embed_tokens.weight_packed": t.pop("model.embed_tokens.weight").int()}
        ),
        r"lacks 'model.embed_tokens.weight'.*unknown key\(s\) 'model.embed_tokens.weight_packed'",
    ),
    "an ignored layer that is quantized": (
        lambda t: t.update({"lm_head.weight_packed": t.pop("lm_head.weight").int()}),
        r"lacks 'lm_head.weight'.*unknown key\(s\) 'lm_head.weight_packed'",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), FAULTS.values(), ids=FAULTS)
@pytest.mark.usefixtures("reads_nothing")
def test_faults_of_tensors_are_named(
    compressed: Path, tmp_path: Path, break_it: Callable[[Tensors], Any], message: str
) -> None:
    shutil.copytree(compressed, tmp_path, dirs_exist_ok=True)
    tensors = load_file(compressed / "model.safetensors")
    break_it(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(tmp_path)
    for command in ("info", "verify"):
        assert LAYER in cli(command, tmp_path, code=1) or "weight_packed" in message


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
@pytest.mark.usefixtures("reads_nothing")
def test_faults_of_awq_tensors_are_named(awq: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(awq, tmp_path, dirs_exist_ok=True)
    name = f"{LAYER}.{part}"
    for tensor, message in (
        (None, f"lacks '{name}' of a quantized layer"),
        (lambda t: t[:-1].contiguous(), rf"{name} in .* has the shape"),
        (lambda t: t.T.contiguous(), rf"{name} in .* has the shape"),
        (lambda t: t.to(torch.float64), rf"{name} in .* is torch.float64, expected"),
    ):
        tensors = load_file(awq / "model.safetensors")
        old = tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor(old)
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["compressed", "awq"])
def test_scales_that_are_not_finite_are_named(
    kind: str, value: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    name = SCALE if kind == "compressed" else f"{LAYER}.scales"
    tensors[name][-1, -1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} holds scales that aren't finite"):
        load(tmp_path)
    output = cli("verify", tmp_path, code=1)
    assert output.count(f"{name} in {str(tmp_path)!r} has 1 values that aren't finite") == 1


@pytest.mark.usefixtures("reads_nothing")
def test_ranks_that_would_split_a_group_are_refused(compressed: Path) -> None:
    with pytest.raises(ValueError, match=r"8 ranks would split groups of 32 .*\(possible: 1, 2, 4"):
        load(compressed, 8, 0)
    assert "runs on:     1, 2, 4 ranks\n" in cli("info", compressed)


def test_a_quantized_folder_takes_no_other_bits_and_no_adapter(
    compressed: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"is quantized \(int4 .*but quantize is 'int8'"):
        load(compressed, quantize=8)
    with pytest.raises(ValueError, match=r"adapter can't be merged .*quantize='int4'"):
        load(compressed, adapter=str(tmp_path))
    message = cli("info", compressed, "--quantize", "int8", code=1)
    assert "but quantize is 'int8'" in message
    message = cli("convert", compressed, tmp_path / "new", "--format", "hf", code=1)
    assert "is quantized (int4 in groups of 128 (compressed-tensors))" in message
    assert not (tmp_path / "new").exists()


def test_other_layers_of_a_quantized_folder_are_quantized_on_request(compressed: Path) -> None:
    plain, asked = load(compressed), load(compressed, quantize=4)
    assert isinstance(plain["output.weight"], Tensor)
    assert asked["output.weight"].bits == 8
    for key in LINEAR:
        assert key == "output.weight" or plain[key].bits == asked[key].bits == 4
    assert torch.equal(asked["output.weight"].packed, quantize(plain["output.weight"], 8).packed)


# --- Quantized while loading --------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as 1, 4 and 8 shards, and in Hugging Face's layout."""
    folder, weights = tmp_path_factory.mktemp("plain"), random_weights(PARAMS)
    for n_shards in (1, 4, 8):
        write_checkpoint(folder / str(n_shards), PARAMS, weights, n_shards)
    convert_folder(str(folder / "1"), str(folder / "hf"), format="hf")
    return folder


def assert_same(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.bits, a.shape, a.zero) == (b.bits, b.shape, b.zero)
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.scale, b.scale)


@pytest.mark.parametrize("layout", ["1", "4", "8", "hf"])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_are_quantized_after_the_cut(
    plain: Path, layout: str, bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any shards, in chunks; wo's columns of 8 shards are parts of groups."""
    monkeypatch.setattr(reader, "_QUANTIZE_BYTES", 128 * 4 * 24)
    weights = random_weights(PARAMS)
    for n_ranks in (1, 2, 8):
        for rank in range(n_ranks):
            loaded = load(plain / layout, n_ranks, rank, dtype=torch.bfloat16, quantize=bits)
            for key, tensor in loaded.items():
                part = narrow(weights[key], local_slices(SPECS[key], n_ranks, rank))
                if key in LINEAR:
                    n_bits: Bits = 8 if key == "output.weight" else bits
                    assert_same(tensor, quantize(part, n_bits))
                else:
                    assert torch.equal(tensor, part.bfloat16())


def write_tied(plain: Path, folder: Path) -> Path:
    """The weights with the embedding as the output layer."""
    shutil.copytree(plain / "hf", folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


def test_a_tied_embedding_stays_as_it_is(plain: Path, tmp_path: Path) -> None:
    loaded = load(write_tied(plain, tmp_path), quantize=4)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(loaded["tok_embeddings.weight"], embedding)
    assert_same(loaded["output.weight"], quantize(embedding, 8))


def test_a_quantized_folder_with_a_tied_embedding(tmp_path: Path) -> None:
    """Its output layer isn't quantized, whether it is ignored or not."""
    write_compressed(tmp_path, torch.bfloat16, ["lm_head"], **SCHEMES["int4 32 symmetric"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for ignore in (["lm_head"], []):
        change(tmp_path, ignore=ignore)
        loaded = load(tmp_path, dtype=torch.bfloat16)
        assert loaded["output.weight"] is loaded["tok_embeddings.weight"]
        ckpt = find_checkpoint(str(tmp_path))
        assert "output.weight" not in ckpt.quantized_bits(ARGS, None)


@pytest.mark.parametrize("layout", ["1", "8"])
def test_an_adapter_is_merged_before_quantizing(plain: Path, tmp_path: Path, layout: str) -> None:
    a, b = torch.randn(4, 128), torch.randn(128, 4)
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    loaded = load(plain / layout, quantize=8, adapter=str(tmp_path))
    key = "layers.0.attention.wo.weight"
    assert_same(loaded[key], quantize(random_weights(PARAMS)[key] + 2 * b @ a, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_quantized(tmp_path: Path, value: float) -> None:
    weights = random_weights(PARAMS)
    weights["layers.1.feed_forward.w3.weight"][77, 5] = value
    write_checkpoint(tmp_path, PARAMS, weights)
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w3.* aren't finite"):
        load(tmp_path, quantize=4)


# --- Written ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("source", ["float32", "bfloat16", "tied", "demo"])
def test_transformers_reads_what_convert_writes(
    plain: Path, tmp_path: Path, source: str, bits: Bits
) -> None:
    """The same weights bit for bit, and logits."""
    folder, params = plain / "1", PARAMS
    if source == "demo":
        folder, params = DEMO, json.loads((DEMO / "params.json").read_text())
    if source == "tied":
        folder = write_tied(plain, tmp_path / "tied")
    dtype = ("--dtype", "bfloat16") if source == "bfloat16" else ()
    new = tmp_path / "new"
    cli("convert", folder, new, "--format", "hf", "--quantize", f"int{bits}", *dtype)
    loaded = load(new)
    for key, tensor in load(folder, quantize=bits).items():
        if isinstance(tensor, QuantizedWeight):
            assert_same(loaded[key], tensor)
    model = AutoModelForCausalLM.from_pretrained(new, dtype=torch.float32)
    with torch.inference_mode():
        assert relative_error(logits(loaded, params), model(TOKENS).logits) < 1e-5
    theirs = dict(model.named_parameters())  # the forward pass has decompressed them
    args = ModelArgs(**params)
    for key, tensor in floats(loaded).items():
        if huggingface.is_rotated(key):
            rotated = huggingface.pairs_as_halves(tensor, args.head_dim)
            tensor = rotated.reshape(tensor.shape)
        assert torch.equal(theirs[huggingface.huggingface_key(key)], tensor), key
    assert loaded["output.weight"].bits == 8
    config = json.loads((new / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "no faults found" in cli("verify", new)
    written = "int4 in groups of 32 and int8" if bits == 4 else "int8"
    output = cli("info", new)
    assert f"stored as:   {written} in groups of 32 (compressed-tensors); " in output


def test_a_converted_folder_runs_on_ranks(plain: Path, tmp_path: Path) -> None:
    convert_folder(str(plain / "1"), str(tmp_path / "new"), format="hf", quantize="int4")
    with pytest.raises(ValueError, match="but quantize is 'int8'"):
        load(tmp_path / "new", quantize=8)
    whole = floats(load(tmp_path / "new", quantize=4))
    for rank in range(4):
        for key, tensor in floats(load(tmp_path / "new", 4, rank)).items():
            assert torch.equal(tensor, narrow(whole[key], local_slices(SPECS[key], 4, rank)))


def test_several_files_are_written_and_read(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llama.checkpoint.convert._SAFETENSORS_BYTES", 2**17)
    convert_folder(str(plain / "1"), str(tmp_path / "new"), format="hf", quantize="int4")
    files = list((tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 3
    assert relative_error(logits(load(tmp_path / "new")), transformers_logits(tmp_path / "new")) < (
        1e-5
    )
    index = json.loads((tmp_path / "new" / huggingface.INDEX).read_text())
    stored = [t for path in files for t in load_file(path).values()]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored)


def test_columns_that_are_not_whole_groups_are_refused(stories: Path, tmp_path: Path) -> None:
    arguments = ("convert", stories / "hf", tmp_path / "new", "--format", "hf")
    message = cli(*arguments, "--quantize", "int4", code=1)
    assert "layers.0.feed_forward.w2.weight has 172 columns" in message
    assert not (tmp_path / "new").exists()
    assert load(stories / "hf", quantize=4)["layers.0.feed_forward.w2.weight"].shape == (64, 172)


def test_only_huggingface_folders_are_written_quantized(plain: Path, tmp_path: Path) -> None:
    message = cli("convert", plain / "1", tmp_path / "new", "--quantize", "int4", code=1)
    assert "Meta's layout has no quantized weights: give --format hf" in message
    arguments = ("convert", plain / "1", tmp_path / "new", "--format", "hf", "--quantize", "int2")
    assert "quantize is 'int2', expected 'int8' or 'int4'" in cli(*arguments, code=1)


# --- The plan -----------------------------------------------------------------------------------


def test_the_plan_counts_the_bytes_that_are_loaded(plain: Path, tmp_path: Path) -> None:
    def n_bytes(tensors: dict[str, Any]) -> int:
        return sum({id(tensor): tensor.nbytes for tensor in tensors.values()}.values())

    for n_ranks in (1, 2, 8):
        for bits in (4, 8):
            loaded = load(plain / "1", n_ranks, 0, dtype=torch.bfloat16, quantize=bits)
            plan = memory.plan(ARGS, n_ranks, torch.bfloat16, bits=quantized_bits(SPECS, bits))
            assert plan.weights == n_bytes(loaded)
            assert f"int{bits} and bfloat16" in str(plan)
            # the output layer is a tensor of its own
            tied = memory.plan(
                ARGS, n_ranks, torch.bfloat16, tied=True, bits=quantized_bits(SPECS, bits)
            )
            assert tied.weights == plan.weights
    convert_folder(str(plain / "1"), str(tmp_path / "new"), format="hf", quantize="int4")
    assert find_checkpoint(str(tmp_path / "new")).quantized_bits(ARGS, None) == quantized_bits(
        SPECS, 4
    )
    for arguments in ((plain / "1", "--quantize", "int4"), (tmp_path / "new",)):
        assert "int4 and bfloat16)" in cli("info", *arguments)


def test_the_plan_of_a_quantized_folder_follows_its_layers(compressed: Path, awq: Path) -> None:
    """Its output layer isn't quantized."""
    for folder in (compressed, awq):
        bits = find_checkpoint(str(folder)).quantized_bits(ARGS, None)
        assert bits == dict.fromkeys((key for key in LINEAR if key != "output.weight"), 4)
    tied = memory.plan(ARGS, 1, torch.bfloat16, tied=True, bits=bits)
    untied = memory.plan(ARGS, 1, torch.bfloat16, bits=bits)
    assert untied.weights - tied.weights == 1024 * 128 * 2


def test_schemes_are_named() -> None:
    assert str(Scheme(4, 128, True)) == "int4 in groups of 128"
    assert str(Scheme(8, None, True)) == "int8 with a scale per row"
