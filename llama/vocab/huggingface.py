"""Hugging Face's tokenizer.json, read with their library, and the files next to it."""

import json
import re
import threading
from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from llama.files import LARGEST_INDEX, check_values, expanded, read_bounded, read_json, summary
from llama.vocab.file import (
    SPACE,
    check_size,
    check_special,
    check_text,
    encode_with_special,
    known_ids,
    read_vocabulary,
)

_BOS_NAMES = (
    "<|begin_of_text|>",
    "<s>",
)  # Llama's own, always added
_EOS_NAMES = ("<|end_of_text|>", "</s>")
_STOP_NAMES = (*_EOS_NAMES, "<|eot_id|>", "<|eom_id|>")
# Often added as ordinary tokens, but chat templates use them as control tokens.
_LOOKS_LIKE_CONTROL = re.compile(r"<[|\uff5c].*[|\uff5c]>", re.DOTALL)
_LOCK = threading.Lock()  # encode_special_tokens is a switch of the whole model
_NO_DEFAULT = "{{ raise_exception('it has several templates, expected one named default') }}"


class TokenizerConfig(NamedTuple):
    """Settings of a tokenizer, from the files next to its vocabulary.

    Attributes:
        bos, eos: names of the tokens that begin and end a text.
        bos_id, eos_id: their ids in config.json.
        adds_bos: whether texts begin with ``bos``; None if not given.
        added: ids of the tokens in added_tokens.json, by name.
        names: names of special tokens, by ``bos_token``, ``pad_token`` and the like.
        legacy: SentencePiece adds a space to the text after each control token too.
        is_llama: the class is LlamaTokenizer, where ``legacy`` overrides tokenizer.json.
        chat_template: a jinja template.
    """

    bos: str | None
    eos: str | None
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool | None
    added: dict[str, int]
    names: dict[str, str]
    legacy: bool
    is_llama: bool
    chat_template: str | None


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """Read tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja
    and config.json, if they are there.

    Raises:
        ValueError: one can't be read.
    """
    folder = expanded(folder)

    def read(name: str) -> dict[str, Any]:
        path = folder / name
        return read_json(path, LARGEST_INDEX) if path.is_file() else {}

    config = read("special_tokens_map.json") | read("tokenizer_config.json")
    added = read("added_tokens.json")
    if not all(type(i) is int and 0 <= i < 2**24 for i in added.values()):
        raise ValueError(
            f"{str(folder / 'added_tokens.json')!r} isn't an object of names and ids: download it "
            "again"
        )
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in template}
        template = named.get("default", _NO_DEFAULT)
    source = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file():
        source = folder / "chat_template.jinja"
        template = read_bounded(source, LARGEST_INDEX).decode(errors="replace")
    if not isinstance(template, str | None) or "\ufffd" in (template or ""):
        raise ValueError(
            f"{str(source)!r} has the chat template {template!r:.60}, expected a jinja template in "
            "UTF-8"
        )
    adds_bos = config.get("add_bos_token")
    model_config = read("config.json")
    return TokenizerConfig(
        _name(config.get("bos_token")),
        _name(config.get("eos_token")),
        _id(model_config.get("bos_token_id")),
        _id(model_config.get("eos_token_id")),
        adds_bos if isinstance(adds_bos, bool) else None,
        added,
        {key: name for key in config if key.endswith("_token") and (name := _name(config[key]))},
        # a folder without the file is Meta's, whose formats are made of separate texts
        config.get("legacy") is True or not (folder / "tokenizer_config.json").is_file(),
        config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"),
        template,
    )


def _name(token: Any) -> str | None:
    """A token's name, which may be written as an object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _id(value: Any) -> int | None:
    """An id, or the first of several."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if type(value) is int and value >= 0 else None


class HuggingFaceTokenizer:
    """The tokenizer of a Hugging Face folder, with the same interface as ``Tokenizer``.

    Added tokens that are special, or named like ``<|im_end|>``, are control tokens: text never
    encodes to them. Other added tokens are found in text, as Hugging Face does.

    Attributes:
        model: the underlying ``tokenizers.Tokenizer``.
        n_words: vocabulary size, added tokens included.
        n_padding: rows of the weights beyond ``n_words``, which decode to nothing.
        bos_id, eos_id: ids from tokenizer_config.json, else from config.json, else of Llama's own
            names; -1 if there is none.
        pad_id: -1; padding isn't used.
        stop_tokens: ids that end a generation: ``eos_id``, and Llama's ends of text, turn and
            message.
        special_tokens, control_ids: the control tokens.
        drops_first_space: whether the vocabulary adds a space before the first word of a text.
        chat_template, names: the folder's jinja template, or None; names of tokens that it uses.

    Raises:
        ImportError: the package tokenizers is not installed.
        FileNotFoundError: the file doesn't exist.
        ValueError: the file is damaged, or can't be decoded to bytes.
    """

    def __init__(self, model_path: str) -> None:
        tokenizers = import_tokenizers()
        data = read_vocabulary(model_path)
        try:
            check_values(data)
            self.model: Any = tokenizers.Tokenizer.from_str(data.decode())
        except BaseException as error:  # a damaged file can make the library panic
            if isinstance(error, KeyboardInterrupt | MemoryError):
                raise
            raise ValueError(
                f"{model_path!r} is damaged: it begins like JSON, but isn't a tokenizer.json "
                f"({summary(error)}); download the file again"
            ) from None
        self.model.no_padding()
        self.model.no_truncation()
        check_size(self.model.get_vocab_size(), model_path)
        self._is_byte_level, self.drops_first_space = _decoder_kind(self.model, model_path)
        config = read_tokenizer_config(Path(model_path).parent)
        self.chat_template, self.names = config.chat_template, config.names
        self._drops_inner_spaces = (
            config.is_llama and not config.legacy and "Prepend" in str(self.model.normalizer)
        )
        self.bos_id = self._first_id(config.bos, config.bos_id, _BOS_NAMES)
        self.eos_id = self._first_id(config.eos, config.eos_id, _EOS_NAMES)
        self.pad_id: int = -1
        self._added: dict[int, Any] = self.model.get_added_tokens_decoder()
        for i, token in self._added.items():
            if i in (self.bos_id, self.eos_id) or _LOOKS_LIKE_CONTROL.fullmatch(token.content):
                token.special = True
        self.model.add_special_tokens([t for t in self._added.values() if t.special])
        self.special_tokens = {t.content: i for i, t in self._added.items() if t.special}
        self.control_ids = set(self.special_tokens.values())
        self.stop_tokens: set[int] = {
            *(self.special_tokens[name] for name in _STOP_NAMES if name in self.special_tokens),
            *([self.eos_id] if self.eos_id >= 0 else []),
        }
        self.n_words: int = 1 + max(self.model.get_vocab().values(), default=-1)
        self.n_padding = 0
        begins = self.model.encode("").ids[:1] == [self.bos_id]
        self._adds_bos = config.adds_bos
        if self._adds_bos is None:
            self._adds_bos = begins or self.model.id_to_token(max(0, self.bos_id)) in _BOS_NAMES
        self._bytes: dict[int, bytes] = {}

    def _first_id(self, name: str | None, token_id: int | None, names: Sequence[str]) -> int:
        """The first of these that is in the vocabulary; -1 if none is."""
        ids = [] if name is None else [self.model.token_to_id(name)]
        if token_id is not None and self.model.id_to_token(token_id) is not None:
            ids.append(token_id)
        ids += map(self.model.token_to_id, names)
        return next((i for i in ids if i is not None), -1)

    def encode(
        self,
        s: str,
        bos: bool,
        eos: bool,
        *,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Encode a text, optionally with ``bos_id`` before and ``eos_id`` after it. ``bos_id`` is
        added only if the folder's tokenizer does.

        For the arguments and errors, see ``Tokenizer.encode``.
        """
        check_text(s)
        check_special(s, self.special_tokens, allowed_special, disallowed_special)
        ids = [self.bos_id] if bos and self._adds_bos and self.bos_id >= 0 else []
        if allowed_special == "all" and not self._drops_inner_spaces:
            ids += self._ids(s, special=True)
        else:
            ids += encode_with_special(
                s,
                self.special_tokens,
                allowed_special,
                partial(self._ids, special=False),
                drops_inner_spaces=self._drops_inner_spaces,
            )
        return [*ids, self.eos_id] if eos and self.eos_id >= 0 else ids

    def _ids(self, text: str, *, special: bool) -> list[int]:
        with _LOCK:
            self.model.encode_special_tokens = not special
            ids: list[int] = self.model.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, t: Sequence[int] | int) -> str:
        """Decode ids to text; invalid UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        data = self.decode_bytes(t)
        if self.drops_first_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int] | int) -> bytes:
        """Bytes of the ids: the space before the first word is kept, and a character may span
        several tokens."""
        return b"".join([self._piece(i) for i in known_ids(t, self.n_words, self.n_padding)])

    def _piece(self, token: int) -> bytes:
        if token not in self._bytes:
            self._bytes[token] = self._piece_bytes(token)
        return self._bytes[token]

    def _piece_bytes(self, token: int) -> bytes:
        piece: str = self.model.id_to_token(token) or ""
        if token in self._added:
            # as sentencepiece and tiktoken do
            is_hidden = token in self.control_ids and not self._is_byte_level
            return b"" if is_hidden else piece.encode()
        if self._is_byte_level:
            return b"".join([BYTE_OF_LETTER.get(letter, letter.encode()) for letter in piece])
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE, " ").encode()


def _decoder_kind(model: Any, path: str) -> tuple[bool, bool]:
    """Whether pieces are in the byte-level alphabet (else SentencePiece's), and whether the decoder
    drops the first space."""
    state = json.loads(model.decoder.__getstate__()) if model.decoder else {}
    steps = state.get("decoders", [state])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    if "Metaspace" in kinds:
        return False, any(step.get("prepend_scheme", "always") != "never" for step in steps)
    if {"type": "Replace", "pattern": {"String": SPACE}, "content": " "} in steps:
        return False, any(step.get("type") == "Strip" and step.get("start") for step in steps)
    raise ValueError(
        f"{path!r} has the decoder {str(state)[:80]}, expected a byte-level one (Llama 3), or "
        "SentencePiece's (Llama 2)"
    )


def import_tokenizers() -> ModuleType:
    """The package; an ImportError gives the command that installs it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "Hugging Face's tokenizer.json needs the package tokenizers: pip install tokenizers"
        ) from error
    return tokenizers


def _byte_alphabet() -> dict[str, bytes]:
    """GPT-2's byte-level alphabet: a printable byte is its own Latin-1 character, the n-th of the
    others is U+0100 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(0x100 + n): byte for n, byte in enumerate(others)}
    return {letter: bytes([byte]) for letter, byte in letters.items()}


BYTE_OF_LETTER = _byte_alphabet()
