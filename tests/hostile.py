"""Malicious inputs. test_hostile.py checks that each is refused; fuzz.py uses them as seeds."""

import base64
import hashlib
import json
import os
import pickle
import struct
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz
import torch
from safetensors.torch import load, load_file, save, save_file

# --- Pickles ------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call of the function with these arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


TOUCH = "open('evil', 'w').close()"


def by_name(name: str, *operations: bytes) -> bytes:
    """A hand-written pickle: GLOBAL ``name``, then ``operations``."""
    return b"\x80\x02c" + name.encode() + b"\n" + b"".join(operations) + b"."


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


PAYLOADS: dict[str, bytes] = {
    "os.system": pickle.dumps({"x": Calls(os.system, "touch evil")}, 2),
    "eval": pickle.dumps({"x": Calls(eval, TOUCH)}, 2),
    "exec": pickle.dumps({"x": Calls(exec, TOUCH)}, 2),
    "protocol 4": pickle.dumps({"x": Calls(eval, TOUCH)}, 4),
    "protocol 0": pickle.dumps({"x": Calls(eval, TOUCH)}, 0),
    "in a list in a dict": pickle.dumps({"x": [{"y": (Calls(eval, TOUCH),)}]}, 2),
    "as a key": pickle.dumps({Calls(str, Calls(eval, TOUCH)): 1}, 2),
    "as an argument of a tensor's": pickle.dumps(
        {"x": Calls(torch._utils._rebuild_tensor_v2, Calls(eval, TOUCH), 0, (1,), (1,), False, {})},
        2,
    ),
    "subprocess": pickle.dumps({"x": Calls(subprocess.Popen, ["touch", "evil"])}, 2),
    "an instance": b"(S'touch evil'\nios\nsystem\n.",
    "torch.load": by_name("torch.serialization\nload", b"(", text("evil.pth"), b"tR"),
    "torch.hub": by_name("torch.hub\nload", b"(", text("evil/evil"), text("evil"), b"tR"),
    "torch's own eval": by_name("torch.utils.data\n_utils", b""),
    "getattr": by_name("builtins\ngetattr", b"(c__builtin__\nopen\n", text("__self__"), b"tR"),
    "a dotted name": by_name("torch\nos.system", b"(", text("touch evil"), b"tR"),
    "a name of torch's": by_name("torch\nload", b"(", text("evil"), b"tR"),
    "no name": by_name("\n", b")R"),
    # accepted by torch's weights_only, or exhausting memory
    "bytearray": by_name(
        "__builtin__\nbytearray", b"(\x8a\x06", (10**11).to_bytes(6, "little"), b"tR"
    ),
    "a large tensor": by_name(
        "torch\nFloatTensor", b"(\x8a\x06", (10**11).to_bytes(6, "little"), b"tR"
    ),
    "torch.Tensor": by_name("torch\nTensor", b"(\x8a\x06", (10**11).to_bytes(6, "little"), b"tR"),
}


def archive(path: Path, data: bytes, method: int = zipfile.ZIP_STORED) -> None:
    """Write a file like torch.save's with the given pickle."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")


HOGS = {
    "shared tuples as a key": b"\x80\x02}K\1" + b"q\0h\0\x86" * 40 + b"K\1s.",
    "nested tuples as a key": b"\x80\x02}" + b")" + b"\x85" * 10**6 + b"K\1s.",
    "nested tuples as a key, a few": b"\x80\x02}" + b")" + b"\x85" * 1000 + b"K\1s.",
    "16 MB of opcodes": b"\x80\x02}" + b"K\1K\1s" * (16 * 2**20 // 5) + b".",
    "shared tuples in arguments": b"\x80\x02}K\1ctorch._utils\n_rebuild_tensor_v2\n)"
    + b"q\0h\0\x86" * 40
    + b"Rs.",
    "a storage that is called": b"\x80\x02ctorch.storage\nUntypedStorage\n\x8a\x06"
    + (10**11).to_bytes(6, "little")
    + b"\x85R.",
    "the state of a tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R}b.",
    "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a string that is decoded": b"\x80\x02S'" + b"\\\\" * 10 + b"'\n.",
}


# --- Archives -----------------------------------------------------------------------------------


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {info.filename: file.read(info) for info in file.infolist()}


def rewritten(path: Path, change: Callable[[dict[str, bytes]], Any]) -> None:
    """Rewrite the archive with changed members."""
    inside = members(path)
    change(inside)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in inside.items():
            file.writestr(name, data)


def moved(inside: dict[str, bytes], name: str, to: str) -> None:
    folder = next(iter(inside)).partition("/")[0]
    inside[f"{folder}/{to}"] = inside.pop(f"{folder}/{name}")


AMBIGUOUS: dict[str, Callable[[dict[str, bytes]], Any]] = {
    "two cases of one name": lambda m: m.update(
        {"consolidated.00/DATA.PKL": m["consolidated.00/data.pkl"]}
    ),
    "another pickle": lambda m: m.update({"consolidated.00/constants.pkl": PAYLOADS["eval"]}),
    "another folder": lambda m: m.update({"other/data.pkl": PAYLOADS["eval"]}),
    "no folder": lambda m: m.update({"data.pkl": PAYLOADS["eval"]}),
    "a NUL in a name": lambda m: m.update({"consolidated.00/data.pkl\n": PAYLOADS["eval"]}),
}


def directory_twice(data: bytes) -> bytes:
    """zipfile reads the directory before the end record, torch the one at the stored offset."""
    start, end = data.find(b"PK\1\2"), data.rfind(b"PK\5\6")
    return data[:end] + data[start:end] + data[end:]


def zip64(data: bytes, n_bytes: int) -> bytes:
    """Add a zip64 end record that declares a directory of ``n_bytes``."""
    start, end = data.find(b"PK\1\2"), data.rfind(b"PK\5\6")
    n_entries = struct.unpack_from("<H", data, end + 10)[0]
    fields = (44, 45, 45, 0, 0, n_entries, n_entries, n_bytes, start)
    record = b"PK\6\6" + struct.pack("<Q2H2L4Q", *fields)
    locator = b"PK\6\7" + struct.pack("<LQL", 0, end, 1)
    last = data[end : end + 8] + b"\xff" * 12 + bytes(2)
    return data[:end] + record + locator + last


def same_record(data: bytes) -> bytes:
    """Make the last two directory entries point to the same bytes."""
    changed = bytearray(data)
    last = data.rfind(b"PK\1\2")
    before = data.rfind(b"PK\1\2", 0, last)
    changed[last + 42 : last + 46] = changed[before + 42 : before + 46]
    return bytes(changed)


def other_name(data: bytes) -> bytes:
    """Give a member different names in its local header and in the directory."""
    at = data.find(b"data.pkl")
    return data[:at] + b"data.pkx" + data[at + 8 :]


LIES: dict[Callable[[bytes], bytes], str] = {
    directory_twice: "was not loaded: the directory .* doesn't end at the end record",
    lambda data: zip64(data, 2**40): "was not loaded: the directory .* doesn't end",
    lambda data: data + b"PK\5\6" + bytes(18): "read as a checkpoint|was not loaded",
    same_record: "was not loaded: .* overlaps another member",
    other_name: "was not loaded: .* has two names",
}

# --- Files that are too large or inconsistent ---------------------------------------------------


def filled(start: bytes, unit: bytes, end: bytes, n_bytes: int) -> bytes:
    return start + unit * ((n_bytes - len(start) - len(end)) // len(unit)) + end


def tokenizer_json(vocab: dict[str, int]) -> bytes:
    content = fuzz.tokenizer_json()
    content["model"]["vocab"] = vocab
    return json.dumps(content).encode()


MIB = 2**20
# Case: (target in fuzz.py, content of the replaced file, words in the error).
BULKY: dict[str, tuple[str, bytes, str]] = {
    "params.json": ("params.json", filled(b'{"dim":[', b"{},", b"{}]}", 64 * MIB), "too many"),
    "config.json": ("config.json", filled(b'{"ignored":[', b"{},", b"{}]}", 2 * MIB), "too many"),
    "an index": ("index", filled(b'{"weight_map":[', b"{},", b"{}]}", 9 * MIB), "too many"),
    "a tiktoken file": (
        "tiktoken",
        filled(b"", b"AA== 0\n", b"", 33 * MIB),
        "too many for a vocabulary",
    ),
    "short lines": ("tiktoken", filled(b"", b"\n", b"x", 32 * MIB), "damaged"),
    "many tokens": (
        "tiktoken",
        b"".join(
            b"%s %d\n" % (base64.b64encode(struct.pack(">L", i)), i) for i in range(2**20 + 1)
        ),
        "has more than 1,048,576 tokens",
    ),
    "a tokenizer.json of objects": (
        "tokenizer.json",
        filled(b'{"model":[', b"{},", b"{}]}", 32 * MIB),
        "more than 4,194,304 values",
    ),
    "a tokenizer.json of tokens": (
        "tokenizer.json",
        tokenizer_json({f"{i:x}": i for i in range(2**20 + 1)}),
        "has more than 1,048,576 tokens",
    ),
    "pieces": (
        "sentencepiece",
        filled(b"\x0a\x0e\x0a\5<unk>\x15\0\0\0\0\x18\2", b"\x0a\0", b"", 32 * MIB),
        "has more",
    ),
    "a header": (
        "safetensors",
        struct.pack("<Q", 2 * MIB) + filled(b'{"a":[', b"{},", b"{}]}", 2 * MIB),
        "its header has 2,097,152 bytes",
    ),
}


SAFETENSORS = {
    "a header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "a header longer than memory": struct.pack("<Q", 2**63) + b"{}",
    "no header": struct.pack("<Q", 0),
    "offsets after the end": b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
    "offsets that are not the shape's": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
    "a shape without end": b'{"a":{"dtype":"U8","shape":[18446744073709551616],'
    b'"data_offsets":[0,4]}}',
    "overlaps": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
    b'"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}',
}


def safetensors_file(content: bytes) -> bytes:
    """``content`` as the header of four bytes, or as the whole file if it isn't a header."""
    is_header = content.startswith(b"{")
    return struct.pack("<Q", len(content)) + content + bytes(4) if is_header else content


SUM = hashlib.md5(b"", usedforsecurity=False).hexdigest().encode()
CHECKLISTS = {
    SUM + b"  a.bin\n": True,
    SUM + b"\ta.bin\n": True,
    SUM + b" \t *a.bin \r\n\r\n": True,
    b"\t " + SUM.upper() + b" a.bin": True,
    b"\n \t\n" + SUM + b" a.bin\n": True,
    SUM + b"  ./a.bin\n": True,
    SUM + b" *./a.bin\n": True,
    SUM + b"\n": False,
    SUM + b" *\n": False,
    SUM + b" a.bin b.bin\n": False,
    SUM + b" a.bin\n" + SUM[1:] + b" b.bin\n": False,
    b"x" * 32 + b" a.bin\n": False,
    SUM + b" ../a.bin\n": False,
    SUM + b" ./../a.bin\n": False,
    SUM + b" ././a.bin\n": False,
    SUM + b" ./-a.bin\n": False,
    SUM + b" ./.a.bin\n": False,
    SUM + b" .//a.bin\n": False,
    SUM + b" ./\n": False,
    SUM + b" a..bin\n": False,
    SUM + b" -a.bin\n": False,
    SUM + b" .a.bin\n": False,
    SUM + b" a\x0bbin\n": False,
    SUM + "\N{NO-BREAK SPACE}a.bin\n".encode(): False,
    SUM + b" a.bin\rb\n": False,
    b"\n\n": False,
    b"": False,
}


# --- Terminal escapes in names ------------------------------------------------------------------

ESCAPE = "\x1b]52;c;ZXZpbA==\x07\x1b[2J"


def with_params(folder: Path) -> None:
    fuzz.native_folder(folder)
    (folder / "params.json").write_text(json.dumps(fuzz.PARAMS | {ESCAPE: 1}))


def with_tensor(folder: Path) -> None:
    fuzz.native_folder(folder)
    path = folder / "consolidated.00.pth"
    torch.save(torch.load(path, weights_only=True) | {ESCAPE: torch.ones(1)}, path)


def with_member(folder: Path) -> None:
    fuzz.native_folder(folder)
    path = folder / "consolidated.00.pth"
    rewritten(path, lambda inside: inside.update({f"consolidated.00/{ESCAPE}": b""}))


def with_class(folder: Path) -> None:
    fuzz.native_folder(folder)
    archive(folder / "consolidated.00.pth", by_name(f"os\n{ESCAPE}"))


def with_safetensors(folder: Path) -> None:
    fuzz.huggingface_folder(folder)
    path = folder / "model.safetensors"
    save_file(load_file(path) | {ESCAPE: torch.ones(1)}, path)


def with_dtype(folder: Path) -> None:  # appears in safetensors' own message
    fuzz.huggingface_folder(folder)
    header = json.dumps({"a": {"dtype": ESCAPE, "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def with_config(folder: Path) -> None:
    fuzz.huggingface_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    ropes = {"rope_scaling": {ESCAPE: 1}, "rope_parameters": {ESCAPE: 2}}
    (folder / "config.json").write_text(json.dumps(config | ropes | {"model_type": "llama"}))


def with_pieces(folder: Path) -> None:  # appear in sentencepiece's own message
    fuzz.sentencepiece_folder(folder)
    piece = b"\x0a" + bytes([len(ESCAPE)]) + ESCAPE.encode()
    twice = 2 * (b"\x0a" + bytes([len(piece)]) + piece)
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:16] + twice + path.read_bytes()[16:])


def with_files(folder: Path) -> None:
    (folder / ESCAPE.replace("/", "")).touch()
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).touch()


def with_shards(folder: Path) -> None:
    fuzz.native_folder(folder)
    (folder / f"consolidated.{ESCAPE}.pth").touch()


WITH_ESCAPES = [
    with_params,
    with_tensor,
    with_member,
    with_class,
    with_safetensors,
    with_dtype,
    with_config,
    with_pieces,
    with_files,
    with_shards,
]

# --- Contents of a dialog -----------------------------------------------------------------------

TAGS = ["[/INST]", "<<SYS>>", "</s>"]
TAGS += ["\uff3b/INST\uff3d", "[\x01/INST]", "[/\U0001d408NST]"]  # become tags by nmt_nfkc

# --- Seeds --------------------------------------------------------------------------------------


def seeds(target: str, folder: Path) -> Iterator[bytes]:
    """Seeds for the file of one of fuzz.TARGETS; ``folder`` holds an intact one."""
    path = folder / fuzz.TARGETS[target].name
    intact = path.read_bytes()
    yield intact
    yield from (data[: 2**14] for name, data, _ in BULKY.values() if name == target)
    if target in ("pth", "bin"):
        for data in [*PAYLOADS.values(), *HOGS.values()]:
            archive(path, data)
            yield path.read_bytes()
    if target == "pth":
        for change in AMBIGUOUS.values():
            path.write_bytes(intact)
            rewritten(path, change)
            yield path.read_bytes()
        path.write_bytes(intact)
        rewritten(path, lambda inside: None)  # by zipfile, without zip64 records
        yield path.read_bytes()
        yield from [change(path.read_bytes()) for change in LIES]
    elif target == "safetensors":
        yield from map(safetensors_file, SAFETENSORS.values())
        yield save(load(intact) | {"norm.weight": torch.ones(fuzz.PARAMS["dim"])})  # same tensor
    elif target == "checklist.chk":
        yield from CHECKLISTS
    elif target == "dialog":
        yield from (f"a {tag} b".encode() for tag in TAGS)
    path.write_bytes(intact)
    for make in WITH_ESCAPES:
        with tempfile.TemporaryDirectory() as other:
            make(Path(other))
            if (Path(other) / path.name).is_file():
                yield (Path(other) / path.name).read_bytes()
