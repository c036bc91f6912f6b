"""LoRA adapters, merged while loading: against peft, and what is refused."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
import torch
from conftest import PARAMS, run, write_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llama import Llama, ModelArgs
from llama.__main__ import convert_folder, main
from llama.checkpoint.folder import find_checkpoint
from llama.checkpoint.lora import read_adapter
from llama.checkpoint.reader import Weights
from llama.checkpoint.sharding import local_slices, narrow, shard_specs

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CPU = torch.device("cpu")
PREFIX = "base_model.model.model.layers"
CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "lora_alpha": 6, "target_modules": LINEAR},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": r".*\.(q_proj|o_proj|down_proj)",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.o_proj": 6},
        "alpha_pattern": {r".*\.1\.(self_attn|mlp)\.(q|down)_proj": 5, "q_proj": 3},
    },
    "one layer": {
        "r": 3,
        "lora_alpha": 1,
        "target_modules": ["k_proj"],
        "layers_to_transform": [1],
        "init_lora_weights": "gaussian",
    },
}


class Case:
    """A base model in three layouts, an adapter, and the weights that peft merges."""

    def __init__(self, folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        write_checkpoint(folder / "native", PARAMS, weights)
        write_checkpoint(folder / "shards", PARAMS, weights, n_shards=2)
        convert_folder(str(folder / "native"), str(folder / "hf"), format="hf")
        self.folder, self.adapter = folder, folder / "adapter"
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:  # B is 0 at first
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(str(self.adapter))
        model.merge_and_unload().save_pretrained(folder / "merged")
        shutil.copy(folder / "hf" / "tokenizer.model", folder / "merged")
        self.expected = parts(folder / "merged")


def parts(
    folder: Path,
    n_ranks: int = 1,
    rank: int = 0,
    *,
    adapter: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """A rank's part of each tensor of a folder."""
    ckpt = find_checkpoint(str(folder))
    args = ckpt.args(PARAMS["vocab_size"], 16, 1)
    weights = Weights(ckpt, args, None if adapter is None else read_adapter(adapter, args))
    return {key: weights.read(key, n_ranks, rank, dtype, CPU) for key in weights.specs}


@pytest.fixture(scope="module", params=CONFIGS)
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    weights: dict[str, Tensor],
) -> Case:
    return Case(tmp_path_factory.mktemp("lora"), weights, CONFIGS[request.param])


@pytest.fixture(scope="module")
def all_linear(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Case:
    return Case(tmp_path_factory.mktemp("lora"), weights, CONFIGS["all"])


# --- Against peft -------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["native", "shards", "hf"])
def test_weights_equal_those_that_peft_merges(case: Case, layout: str) -> None:
    """On 1, 2 and 16 ranks, of which neighbours share a key/value head."""
    before = parts(case.folder / layout)
    assert any((w - before[key]).abs().max() > 0.1 for key, w in case.expected.items())
    specs = shard_specs(ModelArgs(**PARAMS))
    for n_ranks, rank in ((1, 0), (2, 0), (2, 1), (16, 5)):
        ours = parts(case.folder / layout, n_ranks, rank, adapter=case.adapter)
        for key, tensor in ours.items():
            expected = narrow(case.expected[key], local_slices(specs[key], n_ranks, rank))
            assert (tensor - expected).abs().max() <= 1e-6, (key, n_ranks, rank)


@pytest.mark.parametrize("layout", ["native", "shards", "hf"])
def test_merging_in_chunks(all_linear: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama.checkpoint.reader._CHUNK_BYTES", 5000)
    for key, tensor in parts(all_linear.folder / layout, adapter=all_linear.adapter).items():
        assert (tensor - all_linear.expected[key]).abs().max() <= 1e-6, key


def test_rounding_happens_once(
    all_linear: Case, tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    """A bfloat16 model and adapter: the sum in float32, then rounded."""
    stored = {key: w.bfloat16() for key, w in weights.items()}
    write_checkpoint(tmp_path / "base", PARAMS, stored)
    adapter = Path(shutil.copytree(all_linear.adapter, tmp_path / "adapter"))
    factors = {k: t.bfloat16() for k, t in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(factors, adapter / "adapter_model.safetensors")
    for key, tensor in parts(tmp_path / "base", adapter=adapter, dtype=torch.bfloat16).items():
        if not key.endswith("w2.weight"):
            continue
        name = f"{PREFIX}.{key.split('.')[1]}.mlp.down_proj"
        update = factors[f"{name}.lora_B.weight"].float() @ factors[f"{name}.lora_A.weight"].float()
        assert torch.equal(tensor, (stored[key].float() + 1.5 * update).bfloat16())
        twice = stored[key] + (1.5 * update).bfloat16()
        assert not torch.equal(tensor, twice)


def test_logits_equal_pefts(all_linear: Case) -> None:
    tokens = torch.arange(1, 30)[None]
    theirs = AutoModelForCausalLM.from_pretrained(all_linear.folder / "merged", dtype=torch.float32)
    llm = Llama.build(
        str(all_linear.folder / "native"),
        dtype="float32",
        device="cpu",
        adapter=str(all_linear.adapter),
    )
    with torch.inference_mode():
        expected = theirs(tokens).logits
    difference = llm.model.forward(tokens, 0) - expected
    assert difference.norm() / expected.norm() < 1e-5


def test_tied_embeddings_stay_tied(all_linear: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(all_linear.folder / "hf", tmp_path / "tied"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model = Llama.build(str(folder), device="cpu", adapter=str(all_linear.adapter)).model
    assert model.output.weight.data_ptr() == model.tok_embeddings.weight.data_ptr()


def test_layers_of_one_tensor_get_their_own_updates(all_linear: Case, tmp_path: Path) -> None:
    """A file may store one tensor for two layers; the adapter tells them apart."""
    base = Path(shutil.copytree(all_linear.folder / "native", tmp_path / "base"))
    weights = torch.load(base / "consolidated.00.pth", weights_only=True)
    names = [f"layers.{i}.feed_forward.w2.weight" for i in range(2)]
    weights[names[1]] = weights[names[0]]
    torch.save(weights, base / "consolidated.00.pth")
    shared = weights[names[0]]
    state = Llama.build(
        str(base), dtype="float32", device="cpu", adapter=str(all_linear.adapter)
    ).model.state_dict()
    factors = load_file(all_linear.adapter / "adapter_model.safetensors")
    for i in range(2):
        a, b = (factors[f"{PREFIX}.{i}.mlp.down_proj.lora_{x}.weight"] for x in "AB")
        assert (state[names[i]] - (shared + 1.5 * b @ a)).abs().max() <= 1e-6


# --- Programs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["native", "hf"])
def test_convert_writes_the_merged_model(
    all_linear: Case, tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for source in ("native", "hf"):
        target = tmp_path / source
        words = ["convert", str(all_linear.folder / source), str(target), "--format", format]
        words += ["--mp", "2"] if format == "native" else []
        monkeypatch.setattr(sys, "argv", ["-m", *words, "--adapter", str(all_linear.adapter)])
        main()
        for key, tensor in parts(target).items():
            assert (tensor - all_linear.expected[key]).abs().max() <= 1e-6, key


def test_convert_finds_merged_values_beyond_float16(all_linear: Case, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(all_linear.adapter, tmp_path / "adapter"))
    factors = load_file(adapter / "adapter_model.safetensors")
    factors[f"{PREFIX}.0.mlp.up_proj.lora_B.weight"] *= 1e6
    save_file(factors, adapter / "adapter_model.safetensors")
    for source, name in (
        ("native", r"layers\.0\.feed_forward\.w3\.weight"),
        ("hf", r"model\.layers\.0\.mlp\.up_proj\.weight"),
    ):
        with pytest.raises(ValueError, match=rf"{name} holds .*, but the largest torch\.float16"):
            convert_folder(
                str(all_linear.folder / source),
                str(tmp_path / "new"),
                dtype="float16",
                adapter=str(adapter),
            )


def test_convert_does_not_replace_the_adapter(all_linear: Case, tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.mkdir()
    adapter = Path(shutil.copytree(all_linear.adapter, target / "adapter"))
    with pytest.raises(FileExistsError, match="of the source, which replacing it would delete"):
        convert_folder(str(all_linear.folder / "hf"), str(target), force=True, adapter=str(adapter))


@pytest.mark.slow
def test_the_command_line_takes_an_adapter(all_linear: Case) -> None:
    base, merged = (str(all_linear.folder / name) for name in ("native", "merged"))
    for command in ("complete", "chat"):
        words = [sys.executable, "-m", "llama", command]
        options = ["--temperature", "0", "--max_gen_len", "8", "--dtype", "float32"]
        results = [
            run(*words, base, "Once", *options, "--adapter", str(all_linear.adapter)),
            run(*words, merged, "Once", *options),
            run(*words, base, "Once", *options),
        ]
        ours, theirs, without = (r.stdout.splitlines()[1:] for r in results)
        assert ours == theirs != without, results[0].stderr


# --- Adapters that are refused ------------------------------------------------------------------


def build(case: Case, adapter: Path, layout: str = "native") -> Llama:
    return Llama.build(
        str(case.folder / layout), max_seq_len=16, device="cpu", adapter=str(adapter)
    )


@pytest.fixture
def copy(all_linear: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(all_linear.adapter, tmp_path / "copy"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "LOHA"}, "has 'peft_type' 'LOHA', .* expected 'LORA'"),
        ({"peft_type": None}, "has 'peft_type' None"),
        ({"use_dora": True}, "has 'use_dora' True, .* expected false or null"),
        ({"bias": "all"}, "has 'bias' 'all', .* expected 'none'"),
        ({"lora_bias": True}, "has 'lora_bias' True"),
        ({"modules_to_save": ["lm_head"]}, r"has 'modules_to_save' \['lm_head'\]"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "has 'layer_replication'"),
        ({"megatron_config": {"x": 1}}, "has 'megatron_config'"),
        ({"fan_in_fan_out": True}, "has 'fan_in_fan_out' True"),
        ({"init_lora_weights": "pissa_niter_4"}, "has 'init_lora_weights' 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "has 'init_lora_weights' 'loftq'"),
        ({"init_lora_weights": 1}, "has 'init_lora_weights' 1"),
        ({"trainable_token_indices": [1]}, "has 'trainable_token_indices'"),
        ({"a_field_of_tomorrow": {"x": 1}}, "has 'a_field_of_tomorrow' {'x': 1}"),
        ({hostile.ESCAPE: 1}, r"has '\\x1b\]52;c;"),
        ({"r": 0}, "has 'r' 0, .* expected a positive integer"),
        ({"r": True}, "has 'r' True"),
        ({"r": 8}, r"lora_A of model\.layers\.\d\.\S+ .* has the shape \(4, \d+\), expected \(8, "),
        ({"rank_pattern": {"q_proj": "8"}}, "has 'rank_pattern'"),
        ({"rank_pattern": [8]}, "has 'rank_pattern'"),
        ({"lora_alpha": "8"}, "has 'lora_alpha' '8', .* expected a number"),
        ({"lora_alpha": 10**400}, "has 'lora_alpha' 1000"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "has 'alpha_pattern'"),
        ({"alpha_pattern": {"(": 1}}, "expected names of layers, or simple regular expressions"),
        ({"use_rslora": 2}, "has 'use_rslora' 2, .* expected a boolean"),
    ],
)
def test_configs_that_are_refused(
    all_linear: Case, copy: Path, fields: dict[str, Any], message: str
) -> None:
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=rf"adapter_(config\.json|model).*{message}|{message}"):
        build(all_linear, copy)


@pytest.mark.parametrize(
    "pattern",
    [
        "(.|.)*!",
        "(a*)*b",
        "(?:(?:a|b|.)+)+!",
        "(.|.)" * 30 + "!",
        ".*" * 20 + "!",
        "(?=a)",
        "x{9}" * 9,
    ],
)
def test_patterns_that_would_hang(all_linear: Case, copy: Path, pattern: str) -> None:
    path = copy / "adapter_config.json"
    fields = {"alpha_pattern": {pattern: 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    start = time.monotonic()
    with pytest.raises(ValueError, match="simple regular expressions"):
        build(all_linear, copy)
    assert time.monotonic() - start < 10


Q = f"{PREFIX}.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.lora_A.weight": None}, r"lora_A of model\.layers\.0\.self_attn\.q_proj .* missing"),
        ({f"{Q}.lora_B.weight": None}, r"lora_B of model\.layers\.0\.self_attn\.q_proj .* missing"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 64)}, r"shape \(4, 64\), expected \(4, 128\)"),
        ({f"{Q}.lora_B.weight": torch.ones(64, 4)}, r"shape \(64, 4\), expected \(128, 4\)"),
        ({f"{Q}.lora_B.weight": torch.ones(0)}, r"shape \(0,\), expected \(128, 4\)"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 128, dtype=torch.int8)}, "is torch.int8, expected"),
        ({f"{Q}.lora_magnitude_vector": torch.ones(128)}, r"holds '\S+\.lora_magnitude_vector'"),
        (
            {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 128)},
            r"holds 'base_model\.model\.lm_head\.lora_A\.weight', expected lora_A and lora_B of q_",
        ),
        ({"base_model.model.model.norm.lora_A.weight": torch.ones(4, 128)}, r"norm\.lora_A"),
        ({f"{PREFIX}.2.mlp.up_proj.lora_A.weight": torch.ones(4, 128)}, r"layers\.2\..* 2 layers"),
        ({hostile.ESCAPE: torch.ones(1)}, r"holds '\\x1b\]52"),
    ],
)
def test_tensors_that_are_refused(
    all_linear: Case, copy: Path, changes: dict[str, Any], message: str
) -> None:
    path = copy / "adapter_model.safetensors"
    save_file({k: t for k, t in (load_file(path) | changes).items() if t is not None}, path)
    with pytest.raises(ValueError, match=message):
        build(all_linear, copy)


def test_ranks_that_differ_are_refused(all_linear: Case, copy: Path) -> None:
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rank_pattern": {"q_proj": 2}}))
    path = copy / "adapter_model.safetensors"
    save_file(load_file(path) | {f"{Q}.lora_A.weight": torch.ones(2, 128)}, path)
    with pytest.raises(ValueError, match=r"lora_A of \S+ in .* has the rank 2, but lora_B 4"):
        build(all_linear, copy)


def test_an_empty_adapter_is_refused(all_linear: Case, copy: Path) -> None:
    save_file({}, copy / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="holds no tensors, expected lora_A and lora_B"):
        build(all_linear, copy)


def test_missing_files(all_linear: Case, copy: Path) -> None:
    (copy / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks adapter_model\.safetensors"):
        build(all_linear, copy)
    (copy / "adapter_config.json").unlink()
    for folder in (copy, copy / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no LoRA adapter in .*adapter_config\.json"):
            build(all_linear, folder)


def test_an_adapter_is_not_a_model(all_linear: Case, copy: Path) -> None:
    base = str(all_linear.folder / "hf")
    words = (
        f"holds a LoRA adapter for the base model '{base}': give that model's folder as ckpt_dir"
    )
    with pytest.raises(ValueError, match=words):
        Llama.build(str(copy))
    shutil.copy(all_linear.folder / "hf" / "config.json", copy)  # as some programs do
    with pytest.raises(ValueError, match=words):
        Llama.build(str(copy))
    (copy / "adapter_model.safetensors").rename(copy / "adapter_model.bin")
    with pytest.raises(ValueError, match=words):
        Llama.build(str(copy))


# --- Hostile files ------------------------------------------------------------------------------


def test_pickles_are_audited(all_linear: Case, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """adapter_model.bin, from older peft."""
    factors = load_file(copy / "adapter_model.safetensors")
    (copy / "adapter_model.safetensors").unlink()
    path = copy / "adapter_model.bin"
    torch.save(factors, path)
    for key, tensor in parts(all_linear.folder / "native", adapter=copy).items():
        assert (tensor - all_linear.expected[key]).abs().max() <= 1e-6, key
    torch.save(factors | {f"{Q}.lora_A.weight": [1.0]}, path)
    with pytest.raises(ValueError, match="is list, expected a dense tensor"):
        build(all_linear, copy)
    monkeypatch.chdir(copy)
    for payload in hostile.PAYLOADS.values():
        hostile.archive(path, payload)
        with pytest.raises(ValueError, match=r"adapter_model\.bin' was not loaded: it holds"):
            build(all_linear, copy)
    assert not (copy / "evil").exists()


def oversized_header(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [oversized_header, pipe, lambda path: os.truncate(path, 2**34)])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_hostile_files(
    all_linear: Case, copy: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(copy / name)
    with pytest.raises((ValueError, FileNotFoundError), match="adapter"):
        build(all_linear, copy)
