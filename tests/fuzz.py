"""Feed the library damaged files, guided by the coverage of its own code (atheris, libFuzzer).

    pip install atheris
    PYTHONPATH=. python tests/fuzz.py TARGET CORPUS [libFuzzer's options, -max_total_time=600 say]

TARGET is the file to fuzz: pth, bin, safetensors, params.json, config.json, index, tiktoken,
sentencepiece, tokenizer.json, checklist.chk, or dialog for the content of a message. The inputs of
hostile.py are the seeds. Every input must either load and generate or raise one of the library's
errors, within 10 seconds and 1 GiB; anything else stops the run, and libFuzzer writes the input to
crash-... .
"""

import contextlib
import functools
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

try:
    import atheris

    instrumented: Any = atheris.instrument_imports(include=["llama"])
except ImportError:  # test_hostile.py imports this module too
    instrumented = contextlib.nullcontext()
with instrumented:
    from conftest import random_weights

    from llama import Llama, ModelArgs, RankError
    from llama.chat import Llama2ChatFormat
    from llama.checkpoint import huggingface, verify
    from llama.checkpoint.folder import find_checkpoint
    from llama.vocab.sentencepiece import SentencePieceTokenizer

PARAMS: dict[str, Any] = {
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "vocab_size": 512,
    "multiple_of": 16,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
# The library's own errors, which always have a message.
EXPECTED = (ValueError, FileNotFoundError, MemoryError)
# Subclasses of ValueError that the library should never let through.
UNEXPECTED = (UnicodeError, json.JSONDecodeError, RankError)


def native_folder(folder: Path) -> None:
    """A native checkpoint of a few KiB, whose vocabulary is the 256 bytes."""
    torch.save(random_weights(PARAMS), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS))
    (folder / "tokenizer.model").write_bytes(vocabulary())


def vocabulary() -> bytes:
    import base64

    lines = (base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    return b"".join(lines)


def huggingface_folder(folder: Path) -> None:
    """The same in Hugging Face's layout, in one file."""
    weights = random_weights(PARAMS)
    tensors = {huggingface.huggingface_key(key): w for key, w in weights.items()}
    args = ModelArgs(**PARAMS)
    config = huggingface.write_config(args, 8192, torch.float32)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(vocabulary())


def indexed_folder(folder: Path) -> None:
    """The same with an index, which is read only without a model.safetensors."""
    huggingface_folder(folder)
    name = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / huggingface.INDEX).write_text(json.dumps(index))


def bin_folder(folder: Path) -> None:
    """The same in a pickle, as published before safetensors."""
    huggingface_folder(folder)
    path = folder / "model.safetensors"
    torch.save(load_file(path), folder / "pytorch_model.bin")
    path.unlink()


def sentencepiece_folder(folder: Path) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "né à Lyon, 1998"] * 20),
        model_writer=model,
        vocab_size=290,
        byte_fallback=True,
        model_type="bpe",
        minloglevel=2,
    )
    params = PARAMS | {"vocab_size": 290}
    torch.save(random_weights(params), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def tokenizer_json_folder(folder: Path) -> None:
    huggingface_folder(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))


def tokenizer_json() -> dict[str, Any]:
    """Of a vocabulary of the 256 single bytes."""
    from llama.tokenizer import special_tokens
    from llama.vocab.huggingface import BYTE_OF_LETTER
    from llama.vocab.tiktoken_file import SPLIT_PATTERN

    letters = {byte[0]: letter for letter, byte in BYTE_OF_LETTER.items()}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated"}
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut = [{**split, "invert": False}, {**bytelevel, "use_regex": False}]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": name, "special": True, **flags}
        for name, i in special_tokens(256).items()
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cut},
        "post_processor": None,
        "decoder": {**bytelevel, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {letters[i]: i for i in range(256)},
            "merges": [],
        },
    }


def checklist_folder(folder: Path) -> None:
    native_folder(folder)
    sums = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    (folder / "checklist.chk").write_text(text)


def dialog_folder(folder: Path) -> None:
    sentencepiece_folder(folder)
    (folder / "content").write_text("a b")


def build(folder: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        llm = Llama.build(str(folder), max_seq_len=16, max_batch_size=1, device="cpu")
    llm.text_completion(["a b"], temperature=0, max_gen_len=2)


def verify_folder(folder: Path) -> None:
    found = find_checkpoint(str(folder))
    args = found.args(512, 16, 1)
    for fault in verify.verify(found, args, folder / "tokenizer.model", progress=False):
        assert fault


def ask(folder: Path) -> None:
    """A message's content must be refused or leave the prompt's structure intact."""
    content = (folder / "content").read_bytes().decode(errors="replace")
    tokenizer = tokenizer_of(str(folder / "tokenizer.model"))
    ids = Llama2ChatFormat(tokenizer).encode_dialog_prompt([{"role": "user", "content": content}])
    text = tokenizer.decode(ids)
    assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.eos_id not in ids
    assert [text.count(tag) for tag in ("[INST]", "[/INST]", "<<SYS>>")] == [1, 1, 0]


tokenizer_of = functools.lru_cache(SentencePieceTokenizer)


class Target(NamedTuple):
    """How to make a folder, the file in it to fuzz, and how to use the folder."""

    make: Callable[[Path], None]
    name: str
    use: Callable[[Path], None] = build


TARGETS: dict[str, Target] = {
    "pth": Target(native_folder, "consolidated.00.pth"),
    "bin": Target(bin_folder, "pytorch_model.bin"),
    "params.json": Target(native_folder, "params.json"),
    "tiktoken": Target(native_folder, "tokenizer.model"),
    "sentencepiece": Target(sentencepiece_folder, "tokenizer.model"),
    "safetensors": Target(huggingface_folder, "model.safetensors"),
    "config.json": Target(huggingface_folder, "config.json"),
    "index": Target(indexed_folder, huggingface.INDEX),
    "tokenizer.json": Target(tokenizer_json_folder, "tokenizer.json"),
    "checklist.chk": Target(checklist_folder, "checklist.chk", verify_folder),
    "dialog": Target(dialog_folder, "content", ask),
}


def outcome(folder: Path, use: Callable[[Path], None]) -> str:
    """Use a folder: "accepted", or the type of one of the library's errors."""
    try:
        use(folder)
    except UNEXPECTED:
        raise
    except FloatingPointError:  # non-finite logits
        return "FloatingPointError"
    except EXPECTED as error:
        return type(error).__name__ if str(error) else "an error without a message"
    return "accepted"


def main() -> None:
    import hostile

    target, corpus, *options = sys.argv[1:]
    make, name, use = TARGETS[target]
    folder = Path(tempfile.mkdtemp())
    make(folder)
    Path(corpus).mkdir(exist_ok=True)
    size = (folder / name).stat().st_size
    for i, seed in enumerate(hostile.seeds(target, folder)):
        (Path(corpus) / f"seed-{i}").write_bytes(seed)
    assert outcome(folder, use) == "accepted"
    counts: dict[str, int] = {}

    def one_input(data: bytes) -> None:
        (folder / name).write_bytes(data)
        result = outcome(folder, use)
        if " " in result:
            raise AssertionError(result)
        counts[result] = counts.get(result, 0) + 1
        if sum(counts.values()) % 1000 == 0:
            print(target, sum(counts.values()), counts, flush=True)

    largest = str(max(4096, 2 * size))
    limits = ["-timeout=10", "-rss_limit_mb=1536", f"-max_len={largest}"]  # torch takes 0.5 GiB
    atheris.Setup([sys.argv[0], corpus, *limits, *options], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
