"""Hugging Face's tokenizer files: read with their library, written by convert."""

import base64
import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_models.llama3
import numpy as np
import pytest
import tokenizers
import torch
from conftest import DEMO, PARAMS, SHARED, random_weights, write_checkpoint
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from test_convert import cli
from test_tokenizer import MULTILINGUAL
from transformers import AutoTokenizer

from llama import ChatFormat, Llama, Tokenizer
from llama.chat import Llama2ChatFormat
from llama.chat_template import (
    LLAMA3_TEMPLATE,
    NoChatFormat,
    TemplateChatFormat,
    chat_format,
)
from llama.detokenizer import Detokenizer
from llama.tokenizer import AnyTokenizer
from llama.vocab.huggingface import HuggingFaceTokenizer
from llama.vocab.sentencepiece import SentencePieceTokenizer
from llama.vocab.tokenizer_json import tokenizer_json

LLAMA3 = Path(llama_models.llama3.__file__).parent / "tokenizer.model"
LLAMA2 = SHARED / "llama2-tokenizer" / "tokenizer.model"
STORIES = SHARED / "stories260K" / "native" / "tokenizer.model"
TEXTS = [
    "Once upon a time",
    "  two  spaces \n\n\tand 12345",
    "né 漢字 👩‍👩‍👧 <|eot_id|></s>[INST]",
    "",
]
DIALOGS: list[Any] = [
    [{"role": "user", "content": " What is 2 + 2?\n"}],
    [
        {"role": "system", "content": "Answer in capital letters."},
        {"role": "user", "content": "Who are you? "},
        {"role": "assistant", "content": " A MODEL."},
        {"role": "user", "content": "née Ω"},
    ],
]


def opened(path: Path, **options: Any) -> Any:
    if not path.is_file():
        pytest.skip(f"needs {path}")
    return Tokenizer(str(path), **options)


def added(token_id: int, name: str, *, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, "special": special, **flags}


def write(folder: Path, content: Any, **config: Any) -> AnyTokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer: AnyTokenizer = Tokenizer(str(folder / "tokenizer.json"))
    return tokenizer


@pytest.fixture(scope="module")
def demo_json() -> dict[str, Any]:
    return tokenizer_json(Tokenizer(str(DEMO / "tokenizer.model")))


# --- Reading ------------------------------------------------------------------------------------


def with_all_merges(content: dict[str, Any], n_base: int) -> dict[str, Any]:
    """As published: a merge for every way to split a token in two, by the ids of the parts."""
    ranks = content["model"]["vocab"]
    merges = []
    for token in ranks:
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        merges += sorted(known, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    assert len(ranks) == n_base
    model = content["model"] | {"merges": [f"{a} {b}" for a, b in merges]}
    return content | {"model": model}


@pytest.mark.parametrize(
    ("path", "as_published"),
    [
        (DEMO / "tokenizer.model", True),
        (DEMO / "tokenizer.model", False),
        pytest.param(LLAMA3, True, marks=pytest.mark.slow),
        pytest.param(LLAMA3, False, marks=pytest.mark.slow),
        (LLAMA2, False),
        (STORIES, False),
    ],
)
def test_ids_texts_and_pieces_equal_the_original_vocabulary(
    path: Path, as_published: bool, tmp_path: Path
) -> None:
    original = opened(path, llama31=True)
    content = tokenizer_json(original)
    if as_published:
        content = with_all_merges(content, min(original.special_tokens.values()))
    read: Any = write(tmp_path, content)
    assert type(read) is HuggingFaceTokenizer
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "stop_tokens", "drops_first_space"):
        assert getattr(read, name) == getattr(original, name), name
    assert read.special_tokens == original.special_tokens
    for i in range(0, read.n_words, 1 + read.n_words // 5000):
        if not (path in (LLAMA2, STORIES) and i == 0):  # <unk> has a text in sentencepiece only
            assert read.decode_bytes([i]) == original.decode_bytes([i]), i

    @settings(max_examples=300, deadline=None, derandomize=True, database=None)
    @given(MULTILINGUAL)
    def check(text: str) -> None:
        ids = original.encode(text, bos=True, eos=True)
        assert read.encode(text, True, True) == ids
        assert read.decode(ids) == original.decode(ids)

    check()


def test_words_that_no_merge_makes(tmp_path: Path) -> None:
    """tiktoken looks up whole words first; by merges, "zqx" stays z q x."""
    data = (DEMO / "tokenizer.model").read_bytes()
    words = (b"qz", b"zqx", b"qzqx")
    lines = [b"%s %d\n" % (base64.b64encode(word), 768 + i) for i, word in enumerate(words)]
    (tmp_path / "tokenizer.model").write_bytes(data + b"".join(lines))
    original = opened(tmp_path / "tokenizer.model")
    read = write(tmp_path / "hf", tokenizer_json(original))
    for text in ("zqx", "qzqx", "azqx", "qzqxa", "qzqx qzqx", "zqxzqx"):
        assert read.encode(text, False, False) == original.encode(text, False, False)
    assert read.encode("zqx", False, False) == [769]


def test_streaming_equals_decoding(tmp_path: Path) -> None:
    original = opened(LLAMA2)
    read = write(tmp_path, tokenizer_json(original))
    ids = read.encode(" Hello \U0001f44b w\xf6rld\n", bos=False, eos=False)
    for starts_text in (False, True):
        pieces = []
        for tokenizer in (original, read):
            decoder = Detokenizer(tokenizer, starts_text=starts_text)
            pieces.append([decoder.add(i) for i in ids])
        assert pieces[0] == pieces[1]


def test_tokens_that_a_fine_tune_added(tmp_path: Path, demo_json: dict[str, Any]) -> None:
    """Behind the special tokens, renamed, ordinary, and control tokens that aren't marked so."""
    content = copy.deepcopy(demo_json)
    named = {token["content"]: token for token in content["added_tokens"]}
    named["<|reserved_special_token_7|>"]["content"] = "<|im_start|>"
    content["added_tokens"] += [
        added(1024, "<|im_end|>", special=False),
        added(1025, "elephantine", special=False),
        added(1026, "<pad>"),
        added(1027, "<|tool|>", special=False),
    ]
    read = write(tmp_path, content, eos_token={"content": "<|im_end|>"}, bos_token=None)
    assert read.n_words == 1028
    assert (read.bos_id, read.eos_id) == (768, 1024)
    assert read.stop_tokens == {769, 777, 1024}
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    text = "an elephantine <|im_end|> <|im_start|><pad><|tool|>"
    plain = read.encode(text, bos=False, eos=True)
    assert 1025 in plain
    assert {1024, 1026, 1027} <= read.control_ids
    assert not read.control_ids & set(plain[:-1])
    assert plain[-1] == 1024
    ids = read.encode(text, bos=False, eos=False, allowed_special="all")
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert {1024, 1025, 1026, 1027} < set(ids)
    some = read.encode(text, bos=False, eos=False, allowed_special={"<pad>"})
    assert read.control_ids & set(some) == {1026}
    assert read.decode(ids) == read.decode(plain[:-1]) == read.decode(some) == text
    with pytest.raises(ValueError, match="holds the special token"):
        read.encode(text, False, False, disallowed_special="all")


@pytest.mark.parametrize(
    ("config", "post_processor", "expected"),
    [
        ({}, "written", [768]),
        ({}, None, [768]),  # an early conversion of Llama 3; its own name is enough
        ({"add_bos_token": False}, "written", []),
        ({"bos_token": "<|eot_id|>"}, "written", []),  # as SmolLM's: not added by the file
        ({"bos_token": "<|eot_id|>", "add_bos_token": True}, None, [777]),
    ],
)
def test_the_begin_token_is_added_as_the_folder_does(
    tmp_path: Path,
    demo_json: dict[str, Any],
    config: dict[str, Any],
    post_processor: str | None,
    expected: list[int],
) -> None:
    content = dict(demo_json)
    if post_processor is None:
        content["post_processor"] = None
    read = write(tmp_path, content, **config)
    assert read.encode("", bos=True, eos=False) == expected


def test_ids_of_config_json_stand_in_for_missing_names(
    tmp_path: Path, demo_json: dict[str, Any]
) -> None:
    for config, ids in (
        ({"bos_token_id": 770, "eos_token_id": [777, 769]}, (770, 777)),
        ({"bos_token_id": -1, "eos_token_id": 99999}, (768, 769)),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        read = write(tmp_path, demo_json)
        assert (read.bos_id, read.eos_id) == ids
    named = write(tmp_path, demo_json, eos_token="<|eot_id|>")  # noqa: S106
    assert named.eos_id == 777


def test_sentencepiece_folders_with_added_tokens(tmp_path: Path) -> None:
    original = opened(STORIES)
    shutil.copy(STORIES, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 512, "<|im_end|>": 514, "</s>": 2}')
    read: Any = Tokenizer(str(tmp_path / "tokenizer.model"))
    assert isinstance(read, SentencePieceTokenizer)
    assert read.n_words == 515
    text = "Once <pad> upon<|im_end|>"
    assert read.encode(text, True, False) == original.encode(text, bos=True, eos=False)
    ids = read.encode(text, False, False, allowed_special="all")
    assert [i for i in ids if i >= 512] == [512, 514]
    assert read.decode(ids) == "Once upon"
    assert read.decode([513]) == ""
    (tmp_path / "added_tokens.json").write_text('{"<pad>": "512"}')
    with pytest.raises(ValueError, match=r"added_tokens\.json' isn't an object of names and ids"):
        Tokenizer(str(tmp_path / "tokenizer.model"))


def test_the_interface_of_llama2s_package() -> None:
    """Tokenizer(model_path), encode(s, bos, eos) by position, decode of one id, sp_model."""
    tokenizer: Any = opened(STORIES)
    ids = tokenizer.encode("Once upon", True, False)
    assert ids[0] == tokenizer.bos_id
    assert [tokenizer.decode(i) for i in ids[1:]] == [
        tokenizer.sp_model.decode([i]) for i in ids[1:]
    ]
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(ids) == "Once upon"
    assert tokenizer.decode(np.int64(ids[1])) == tokenizer.decode(ids[1])
    llama3 = Tokenizer(str(DEMO / "tokenizer.model"))
    assert llama3.decode(llama3.encode("a", False, False)[0]) == "a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("model"), "isn't a tokenizer.json"),
        (lambda c: c["model"].update(type="Unknown"), "isn't a tokenizer.json"),
        (lambda c: c["model"].update(vocab=[]), "isn't a tokenizer.json"),
        (lambda c: c["model"]["merges"].append(["~", "~"]), "isn't a tokenizer.json"),
        (lambda c: c.update(added_tokens=["x"]), "isn't a tokenizer.json"),
        (lambda c: c.update(decoder=None), "has the decoder {}, expected a byte-level one"),
        (lambda c: c.update(decoder={"type": "WordPiece", "prefix": "#", "cleanup": True}), "Word"),
    ],
)
def test_refused_files(
    tmp_path: Path,
    demo_json: dict[str, Any],
    change: Callable[[dict[str, Any]], object],
    message: str,
) -> None:
    content = copy.deepcopy(demo_json)
    write(tmp_path, content)
    change(content)
    with pytest.raises(ValueError, match=message) as error:
        write(tmp_path, content)
    assert str(tmp_path / "tokenizer.json") in str(error.value)


@pytest.mark.parametrize("data", ["{", '{"model": ', '{"a":' * 100_000, '{"a": "\udcff"}'])
def test_files_that_arent_json(tmp_path: Path, data: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"is damaged: it begins like JSON.*download the file"):
        Tokenizer(str(path))


def test_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        Tokenizer(str(tmp_path / "tokenizer.json"))


# --- Folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1024, 1027, 1088])
def test_weights_may_have_more_rows_than_the_tokenizer_has_tokens(
    tmp_path: Path, demo_json: dict[str, Any], n_rows: int
) -> None:
    cli("convert", DEMO, tmp_path / "hf", "--format", "hf")
    folder = tmp_path / "hf"
    tensors = load_file(folder / "model.safetensors")
    for key in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        tensors[key] = torch.cat([tensors[key], tensors[key].new_zeros(n_rows - 1024, 128)])
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": n_rows}))
    sizes: dict[str, Any] = {"max_seq_len": 128, "device": "cpu", "dtype": "float32"}
    plain = Llama.build(str(DEMO), **sizes)
    grown = Llama.build(str(folder), **sizes)
    question: Any = [[{"role": "user", "content": "What is 23 + 45?"}]]
    for call in ("chat_completion", "text_completion"):
        prompts = question if call == "chat_completion" else ["What is"]
        expected = getattr(plain, call)(prompts, temperature=0, max_gen_len=20)
        assert getattr(grown, call)(prompts, temperature=0, max_gen_len=20) == expected
    if n_rows > 1024:
        assert grown.tokenizer.decode([104, n_rows - 1, 105]) == "hi"
    with pytest.raises(ValueError, match="outside the vocabulary"):
        grown.tokenizer.decode([n_rows])


def test_more_rows_than_padding_is_another_tokenizer(tmp_path: Path) -> None:
    params = PARAMS | {"vocab_size": 1152}
    folder = write_checkpoint(tmp_path / "a", params, random_weights(params))
    with pytest.raises(ValueError, match="holds 1152 tokens, but the tokenizer has 1024"):
        Llama.build(str(folder))


def test_tokenizer_json_comes_before_tokenizer_model(
    tmp_path: Path, folder: Path, demo_json: dict[str, Any]
) -> None:
    """Only it has the tokens that a fine-tune renamed."""
    shutil.copytree(folder, tmp_path / "a")
    content = copy.deepcopy(demo_json)
    content["added_tokens"][9]["content"] = "<|im_end|>"
    write(tmp_path / "a", content)
    llm = Llama.build(str(tmp_path / "a"), max_seq_len=16, device="cpu")
    assert llm.tokenizer.special_tokens["<|im_end|>"] == 777
    assert (tmp_path / "a" / "tokenizer.model").is_file()


# --- Writing ------------------------------------------------------------------------------------


def converted(tmp_path: Path, vocabulary: Path, llama31: bool) -> Path:
    """A small checkpoint with this vocabulary, converted to Hugging Face's layout."""
    tokenizer = opened(vocabulary, llama31=llama31)
    params = PARAMS | {"vocab_size": tokenizer.n_words, "dim": 64, "n_layers": 1, "n_heads": 8}
    if llama31:
        params["use_scaled_rope"] = True
    source = write_checkpoint(tmp_path / "source", params, random_weights(params))
    shutil.copy(vocabulary, source / "tokenizer.model")
    cli("convert", source, tmp_path / "hf", "--format", "hf", "--dtype", "bfloat16")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("vocabulary", "llama31"),
    [
        (DEMO / "tokenizer.model", False),
        (DEMO / "tokenizer.model", True),
        (STORIES, False),
        pytest.param(LLAMA2, False, marks=pytest.mark.slow),
        pytest.param(LLAMA3, False, marks=pytest.mark.slow),
        pytest.param(LLAMA3, True, marks=pytest.mark.slow),
    ],
)
def test_autotokenizer_reads_converted_folders(
    tmp_path: Path, vocabulary: Path, llama31: bool
) -> None:
    folder = converted(tmp_path, vocabulary, llama31)
    ours = opened(vocabulary, llama31=llama31)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == ours.n_words
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in TEXTS[:2]:
        assert theirs(text)["input_ids"] == ours.encode(text, bos=True, eos=False)
    for text in TEXTS:  # theirs finds the names of special tokens in text, unless told not to
        ids = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == ours.encode(text, bos=False, eos=False)
    formatter = chat_format(ours)
    for dialog in DIALOGS:
        ids = theirs.apply_chat_template(dialog, add_generation_prompt=True)["input_ids"]
        assert ids == formatter.encode_dialog_prompt(dialog)
    # read back, Meta's own format is recognized
    kind = ChatFormat if "<|eot_id|>" in ours.special_tokens else Llama2ChatFormat
    llm = Llama.build(str(folder), max_seq_len=16, device="cpu")
    assert type(llm.formatter) is kind
    for dialog in DIALOGS:
        assert llm.formatter.encode_dialog_prompt(dialog) == formatter.encode_dialog_prompt(dialog)


def test_a_folders_own_tokenizer_files_are_kept(tmp_path: Path, demo_json: dict[str, Any]) -> None:
    cli("convert", DEMO, tmp_path / "hf", "--format", "hf")
    config = {"bos_token": "<|begin_of_text|>", "chat_template": "{{ messages[0].content }}"}
    write(tmp_path / "hf", demo_json, **config)
    (tmp_path / "hf" / "special_tokens_map.json").write_text("{}")
    kept = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")
    cli("convert", tmp_path / "hf", tmp_path / "native")
    cli("convert", tmp_path / "native", tmp_path / "back", "--format", "hf")
    for name in kept:
        data = (tmp_path / "hf" / name).read_bytes()
        assert (tmp_path / "native" / name).read_bytes() == data
        assert (tmp_path / "back" / name).read_bytes() == data


def test_convert_completes_the_tokenizers_files(tmp_path: Path, demo_json: dict[str, Any]) -> None:
    """A chat template, where the folder has none and the format is known; twice with --force."""
    source = tmp_path / "hf"
    cli("convert", DEMO, source, "--format", "hf")
    (source / "tokenizer_config.json").write_text('{"model_max_length": 99}')
    (source / "added_tokens.json").write_text("{}")
    for more in ((), ("--force",)):
        cli("convert", source, tmp_path / "new", "--format", "hf", *more)
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert config.pop("chat_template") == LLAMA3_TEMPLATE
    assert config == {"model_max_length": 99}
    # without Llama's headers no format is known, and none is made up
    content = copy.deepcopy(demo_json) | {"post_processor": None}
    for token in content["added_tokens"]:
        token |= {"content": f"word{token['id']}", "special": False}
    write(source, content)
    for name in ("tokenizer_config.json", "generation_config.json"):
        (source / name).unlink()
    path = source / "config.json"
    no_ids = {"eos_token_id": None, "bos_token_id": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | no_ids))
    cli("convert", source, tmp_path / "new", "--format", "hf", "--force")
    config = json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())
    assert not config.keys() & {"chat_template", "bos_token", "eos_token"}


def test_vocabularies_that_cant_be_written(tmp_path: Path) -> None:
    """sentencepiece's defaults, unigram with nmt_nfkc; byte-pair encoding with nmt_nfkc."""
    import sentencepiece

    for kind, message in (("unigram", "model type 1"), ("bpe", "normalizes text by")):
        lines = tmp_path / "lines"
        lines.write_text("\n".join(["abcdefgh ijklmnop"] * 20))
        sentencepiece.SentencePieceTrainer.train(
            input=str(lines),
            model_prefix=str(tmp_path / kind),
            vocab_size=290,
            byte_fallback=True,
            model_type=kind,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        with pytest.raises(ValueError, match=message):
            tokenizer_json(SentencePieceTokenizer(str(tmp_path / f"{kind}.model")))


def test_no_chat_format(tmp_path: Path, demo_json: dict[str, Any]) -> None:
    content = demo_json | {"added_tokens": []}
    tokenizer = write(tmp_path, content, bos_token=None)
    formatter = chat_format(tokenizer)
    assert isinstance(formatter, NoChatFormat)
    assert tokenizer.encode("a", True, True) == tokenizer.encode("a", False, False)
    with pytest.raises(ValueError, match="this model has no chat format"):
        formatter.encode_dialog_prompt(DIALOGS[0])


def test_a_template_gets_text_parts_as_text_and_other_keys_as_given(
    tmp_path: Path, demo_json: dict[str, Any]
) -> None:
    template = "{% for m in messages %}({{ m.role }} {{ m.name }}: {{ m.content }}){% endfor %}"
    formatter = chat_format(write(tmp_path, demo_json, chat_template=template))
    assert isinstance(formatter, TemplateChatFormat)
    part = {"type": "text", "text": "hi"}
    dialog: Any = [{"role": "user", "content": [part, part], "name": "Ann"}]
    dialog.append({"role": "tool", "content": "4", "name": "f"})
    ids = formatter.encode_dialog_prompt(dialog)
    assert formatter.tokenizer.decode(ids) == "(user Ann: hihi)(tool f: 4)"
    dialog[0]["content"][0] = {"type": "image_url"}
    with pytest.raises(ValueError, match="part 0 of the content of message 0 has the type 'image"):
        formatter.encode_dialog_prompt(dialog)
    with pytest.raises(ValueError, match="message 1, the last, has the role 'tool', expected"):
        formatter.encode_dialog_prompt(
            [{"role": "user", "content": "a"}, dialog[1]], continue_final_message=True
        )
