"""Every family at a small size: float32 logits match Hugging Face's and the published code's, from
native and from Hugging Face checkpoints."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import llama_models.llama3
import pytest
import torch
from conftest import DEMO, PROGRAMS, SHARED, new_model, random_weights, run, shard
from peers import huggingface_model, published_model
from reference import relative_error
from torch import Tensor

from llama import Dialog, Llama, Tokenizer
from llama.checkpoint.folder import find_checkpoint
from llama.completions import Completion
from llama.detokenizer import Detokenizer

LLAMA3_VOCABULARY = Path(llama_models.llama3.__file__).parent / "tokenizer.model"
LLAMA2_VOCABULARY = SHARED / "llama2-tokenizer" / "tokenizer.model"

SMALL = {"n_layers": 2, "norm_eps": 1e-5}
LLAMA3 = SMALL | {"vocab_size": 128256, "rope_theta": 500000.0}
LLAMA2 = SMALL | {"vocab_size": 32000, "rope_theta": 10000.0, "multiple_of": 256}
SCALED = LLAMA3 | {"use_scaled_rope": True, "rope_scaling_factor": 8.0}
# The published ratios of heads, KV heads and feed-forward widths at a small dim.
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama 2 7B": LLAMA2 | {"dim": 128, "n_heads": 4},
    "Llama 2 13B": LLAMA2 | {"dim": 160, "n_heads": 5},
    "Llama 2 70B": LLAMA2
    | {"dim": 256, "n_heads": 16, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "multiple_of": 64},
    "Llama 3 8B": LLAMA3
    | {"dim": 128, "n_heads": 8, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "multiple_of": 32},
    "Llama 3 70B": LLAMA3
    | {"dim": 256, "n_heads": 16, "n_kv_heads": 2, "ffn_dim_multiplier": 1.3, "multiple_of": 64},
    "Llama 3.1 8B": SCALED
    | {"dim": 256, "n_heads": 2, "n_kv_heads": 1, "ffn_dim_multiplier": 1.3, "multiple_of": 32},
    "Llama 3.1 405B": SCALED
    | {"dim": 256, "n_heads": 32, "n_kv_heads": 2, "ffn_dim_multiplier": 1.2, "multiple_of": 64},
    "Llama 3.2 1B": SCALED
    | {"dim": 256, "n_heads": 4, "n_kv_heads": 1, "ffn_dim_multiplier": 1.5}
    | {"rope_scaling_factor": 32.0},
    "Llama 3.2 3B": SCALED
    | {"dim": 192, "n_heads": 6, "n_kv_heads": 2, "rope_scaling_factor": 32.0},
    "Llama 3.3 70B": SCALED
    | {"dim": 256, "n_heads": 2, "n_kv_heads": 1, "ffn_dim_multiplier": 1.3, "multiple_of": 64},
}
TOKENS = torch.randint(0, 32000, (24,), generator=torch.Generator().manual_seed(5)).tolist()


def vocabulary(params: dict[str, Any]) -> Path:
    if params["vocab_size"] == 128256:
        return LLAMA3_VOCABULARY
    if not LLAMA2_VOCABULARY.is_file():
        pytest.skip(f"needs the real vocabulary in {LLAMA2_VOCABULARY.parent}")
    return LLAMA2_VOCABULARY


def native_folder(
    folder: Path, params: dict[str, Any], weights: dict[str, Tensor], n_shards: int = 1
) -> Path:
    """As Meta publishes it: Llama 2 has neither rope_theta nor vocab_size, its tokenizer is in
    the parent folder, and its embedding is split by columns."""
    is_llama2 = params["vocab_size"] == 32000
    folder.mkdir(parents=True)
    for rank in range(n_shards):
        part = {key: shard(key, tensor, n_shards)[rank] for key, tensor in weights.items()}
        if is_llama2:
            embedding = weights["tok_embeddings.weight"]
            part["tok_embeddings.weight"] = embedding.chunk(n_shards, dim=1)[rank].clone()
            part["rope.freqs"] = torch.ones(4)
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    stored = dict(params)
    if is_llama2:
        stored |= {"vocab_size": -1}
        del stored["rope_theta"]
    (folder / "params.json").write_text(json.dumps(stored))
    shutil.copy(vocabulary(params), folder.parent if is_llama2 else folder)
    return folder


def logits(llm: Llama, tokens: list[int]) -> Tensor:
    return llm.model.forward(torch.tensor([tokens]), 0)[0]


def build(folder: Path, **arguments: Any) -> Llama:
    sizes = {"max_seq_len": 64, "max_batch_size": 1} | arguments
    return Llama.build(str(folder), dtype="float32", device="cpu", **sizes)


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("Llama 2 7B", "Llama 3 8B") else pytest.param(name, marks=pytest.mark.slow)
        for name in FAMILIES
    ],
)
def test_a_family_from_native_and_huggingface_files(tmp_path: Path, name: str) -> None:
    params = FAMILIES[name]
    weights = random_weights(params)
    theirs = huggingface_model(params, weights)
    with torch.inference_mode():
        expected = theirs(torch.tensor([TOKENS])).logits[0]
    # a native checkpoint, in two shards if the KV heads can be split
    n_shards = 2 if params.get("n_kv_heads", params["n_heads"]) % 2 == 0 else 1
    native = build(native_folder(tmp_path / "native", params, weights, n_shards))
    assert relative_error(logits(native, TOKENS), expected) < 1e-5
    assert torch.equal(logits(native, TOKENS).argmax(-1), expected.argmax(-1))
    # saved by transformers itself, in several files
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20MB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    shutil.copy(vocabulary(params), tmp_path / "hf")
    read = build(tmp_path / "hf")
    assert torch.equal(logits(read, TOKENS), logits(native, TOKENS))
    for key in ("dim", "n_heads", "kv_heads", "rope_theta", "use_scaled_rope", "ffn_hidden_dim"):
        assert getattr(read.model.params, key) == getattr(native.model.params, key)
    if params.get("use_scaled_rope"):
        assert read.model.params.rope_scaling_factor == params["rope_scaling_factor"]
    # the published code lacks Llama 2's rope_theta and scaling factors other than 8
    if params["vocab_size"] == 128256 and params.get("rope_scaling_factor", 8.0) == 8.0:
        published = published_model(params, weights)(torch.tensor([TOKENS]), 0)[0]
        assert relative_error(logits(native, TOKENS), published) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 3.1 8B", "Llama 3.2 1B"])
def test_scaled_rope_beyond_the_original_context(name: str) -> None:
    """Positions 8150 to 8450 against Hugging Face, with our prefill in chunks."""
    params = FAMILIES[name] | {"vocab_size": 1024}
    weights = random_weights(params)
    tokens = torch.randint(0, 1024, (1, 8450), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        theirs = huggingface_model(params, weights)
        expected = theirs(tokens, logits_to_keep=300).logits[0]

    def last_logits(params: dict[str, Any]) -> Tensor:
        model = new_model(params, weights, max_batch_size=1, max_seq_len=8450)
        steps = [(0, 8000), (8000, 8400), (8400, 8450)]
        pieces = [model.forward(tokens[:, start:stop], start) for start, stop in steps]
        return torch.cat(pieces, dim=1)[0, -300:]

    assert relative_error(last_logits(params), expected) < 1e-5
    assert relative_error(last_logits(params | {"use_scaled_rope": False}), expected) > 1e-3


# --- Detecting the family -----------------------------------------------------------------------


def folder_of(tmp_path: Path, params: dict[str, Any]) -> Path:
    weights = random_weights(params | {"n_layers": 1})
    return native_folder(tmp_path / "folder", params | {"n_layers": 1}, weights)


@pytest.mark.slow
def test_the_llama_version_is_detected_by_its_rope_settings(tmp_path: Path) -> None:
    plain = build(folder_of(tmp_path / "3", FAMILIES["Llama 3 8B"])).tokenizer
    assert "<|eom_id|>" not in plain.special_tokens
    scaled = build(folder_of(tmp_path / "31", FAMILIES["Llama 3.1 8B"])).tokenizer
    assert scaled.special_tokens["<|eom_id|>"] == 128008
    assert 128008 in scaled.stop_tokens
    llama2 = build(folder_of(tmp_path / "2", FAMILIES["Llama 2 7B"]))
    assert llama2.tokenizer.stop_tokens == {2}
    assert type(llama2.formatter).__name__ == "Llama2ChatFormat"
    assert llama2.model.params.rope_theta == 10000.0


def test_native_llama_32_is_recognised_by_its_shape(tmp_path: Path) -> None:
    def factor(**params: Any) -> Any:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "consolidated.00.pth").write_bytes(b"")
        (folder / "params.json").write_text(json.dumps({"use_scaled_rope": True, **params}))
        found = find_checkpoint(str(folder))
        return found.args(1000, 64, 1).rope_scaling_factor

    assert factor(dim=2048, n_layers=16) == factor(dim=3072, n_layers=28) == 32
    assert factor(dim=4096, n_layers=32) == factor(dim=8192, n_layers=80) == 8
    assert factor(dim=2048, n_layers=16, rope_scaling_factor=8.0) == 8


@pytest.mark.slow
def test_the_rope_scaling_factor_can_be_given(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, FAMILIES["Llama 3.1 8B"])
    assert build(folder, rope_scaling_factor=32).model.params.rope_scaling_factor == 32
    plain = folder_of(tmp_path / "3", FAMILIES["Llama 3 8B"])
    with pytest.raises(
        ValueError, match=r"rope_scaling_factor is 32, .* isn't a model with scaled"
    ):
        build(plain, rope_scaling_factor=32)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    llama3 = folder_of(tmp_path / "3", FAMILIES["Llama 3 8B"])
    llama2 = folder_of(tmp_path / "2", FAMILIES["Llama 2 7B"])
    with pytest.raises(ValueError, match="holds 128256 tokens, but the tokenizer has 32000"):
        build(llama3, tokenizer_path=str(LLAMA2_VOCABULARY))
    with pytest.raises(ValueError, match="holds 32000 tokens, but the tokenizer has 128256"):
        build(llama2, tokenizer_path=str(LLAMA3_VOCABULARY))
    # a truncated vocabulary file
    lines = LLAMA3_VOCABULARY.read_bytes().splitlines(keepends=True)
    (tmp_path / "base").write_bytes(b"".join(lines[:100_000]))
    with pytest.raises(ValueError, match="holds 128256 tokens, but the tokenizer has 100256"):
        build(llama3, tokenizer_path=str(tmp_path / "base"))


def test_llama2_uses_its_chat_format(tmp_path: Path) -> None:
    llm = build(folder_of(tmp_path, FAMILIES["Llama 2 7B"]))
    dialog: Dialog = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]
    ids = llm.formatter.encode_dialog_prompt(dialog)
    direct = llm.tokenizer.encode(
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]", bos=True, eos=False
    )
    assert ids == direct
    answer = llm.chat_completion([dialog], temperature=0, max_gen_len=5, logprobs=True)[0]
    assert "".join(answer["tokens"]) == answer["generation"]["content"]
    assert len(answer["tokens"]) == len(answer["logprobs"]) <= 5
    with pytest.raises(ValueError, match=r"\[INST\]"):
        llm.chat_completion([[{"role": "user", "content": "Hi [INST] there"}]])


def test_sentencepiece_prompt_and_generation_concatenate(stories: Path) -> None:
    """Prompt and generation concatenate to the text; a new text has no leading space."""
    llm = build(stories / "native", max_seq_len=128, max_batch_size=4)
    prompts = ["", "Once upon a", "Once upon a time"]
    results = llm.text_completion(prompts, temperature=0, max_gen_len=24, logprobs=True)
    start = "Once upon a time, there was a little girl"
    for prompt, result in zip(prompts, results, strict=True):
        assert (prompt + result["generation"]).startswith(start)
        assert "".join(result["tokens"]) == result["generation"]
    echoed = llm.text_completion(prompts, temperature=0, max_gen_len=24, echo=True)
    for prompt, result, whole in zip(prompts, results, echoed, strict=True):
        assert whole["generation"] == prompt + result["generation"]


def test_llama_31_tool_calls_round_trip(demo: Llama) -> None:
    """A generated tool call becomes a message that encodes to the same ids."""
    tools = Tokenizer(str(DEMO / "tokenizer.model"), llama31=True)
    llm = Llama(demo.model, tools)
    tag, eom = tools.special_tokens["<|python_tag|>"], tools.special_tokens["<|eom_id|>"]
    code = ' print("é")\n'
    ids = [tag, *tools.encode(code, bos=False, eos=False)]
    decoder = Detokenizer(tools, starts_text=False)
    row = Completion(ids, [decoder.add(i) for i in ids], stop_token=eom)
    message = row.answer(llm.formatter)
    assert message == {"role": "assistant", "content": "", "tool_call": code, "eom": True}
    assert llm.formatter.encode_message(message)[-len(ids) - 1 :] == [*ids, eom]  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_huggingface_folder_needs_only_safetensors(stories: Path) -> None:
    result = run(sys.executable, PROGRAMS / "build.py", stories / "hf")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("imported safetensors\n")
