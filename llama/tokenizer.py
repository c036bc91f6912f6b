"""Text to token ids and back: ``Tokenizer`` opens every kind of vocabulary.

The chat formats (chat.py) are re-exported here, as in the published package.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal

import tiktoken

from llama.chat import ChatFormat, Dialog, Message, Role
from llama.vocab.file import (
    check_text,
    is_sentencepiece,
    is_tokenizer_json,
    known_ids,
    read_vocabulary,
)
from llama.vocab.huggingface import HuggingFaceTokenizer
from llama.vocab.sentencepiece import SentencePieceTokenizer
from llama.vocab.tiktoken_file import SPLIT_PATTERN, parse_tiktoken

__all__ = ["AnyTokenizer", "ChatFormat", "Dialog", "Message", "Role", "Tokenizer"]

N_SPECIAL_TOKENS = 256
# Offsets from the end of the BPE vocabulary; the ids in between are reserved.
_LLAMA3_NAMES = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
_LLAMA31_NAMES = {
    **_LLAMA3_NAMES,
    4: "<|finetune_right_pad_id|>",
    8: "<|eom_id|>",
    10: "<|python_tag|>",
}

# tiktoken's regular expression engine overflows its stack on very long pieces. The published
# tokenizer splits text at these two lengths, so the ids depend on them.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000  # consecutive whitespace characters, or consecutive others
_RUNS = re.compile(rf"(?:\s{{1,{_MAX_RUN}}}|\S{{1,{_MAX_RUN}}})")


def special_tokens(n_base: int, llama31: bool = False) -> dict[str, int]:
    """Names and ids of the 256 special tokens that follow ``n_base`` BPE tokens.

    Llama 3 and 3.1 share the ids; 3.1 names three that were reserved, and renumbers the remaining
    reserved names.
    """
    names = _LLAMA31_NAMES if llama31 else _LLAMA3_NAMES
    reserved = iter(range(N_SPECIAL_TOKENS))
    return {
        names.get(i) or f"<|reserved_special_token_{next(reserved)}|>": n_base + i
        for i in range(N_SPECIAL_TOKENS)
    }


class Tokenizer:
    """Llama 3's BPE tokenizer.

    ``Tokenizer(path)`` opens every kind of vocabulary, detected by content: for SentencePiece's
    (Llama 2) it returns a SentencePieceTokenizer, for Hugging Face's tokenizer.json a
    HuggingFaceTokenizer.

    Args:
        llama31: name the special tokens as Llama 3.1 and later do. The other kinds contain their
            own names.

    Attributes:
        model: the underlying ``tiktoken.Encoding``.
        n_words: vocabulary size, special tokens included.
        n_padding: rows of the weights beyond ``n_words``, which decode to nothing.
        bos_id, eos_id: ids of ``<|begin_of_text|>`` and ``<|end_of_text|>``.
        pad_id: -1; padding isn't used.
        stop_tokens: ids that end a generation: end of text, end of turn and, with ``llama31``, end
            of message.
        special_tokens: ids of all special tokens by name.
        control_ids: ids that text must never encode to.
        drops_first_space: False: ids decode to exactly their bytes.
        chat_template: None; Meta's files have none.

    Raises:
        FileNotFoundError: the file doesn't exist.
        ImportError: the vocabulary needs a package that isn't installed; the message names it.
        ValueError: the file is damaged, or not a vocabulary.
    """

    drops_first_space = False
    chat_template: str | None = None

    def __new__(cls, model_path: str = "", *, llama31: bool = False) -> Any:
        if cls is not Tokenizer or not model_path:  # copy and pickle give no path
            return super().__new__(cls)
        start = read_vocabulary(model_path, 16)
        if is_sentencepiece(start):
            return SentencePieceTokenizer(model_path)
        if is_tokenizer_json(start):
            return HuggingFaceTokenizer(model_path)
        return super().__new__(cls)

    def __init__(self, model_path: str, *, llama31: bool = False) -> None:
        ranks = parse_tiktoken(read_vocabulary(model_path), model_path)
        self.special_tokens = special_tokens(len(ranks), llama31)
        self.model = tiktoken.Encoding(
            name=model_path,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.n_words: int = self.model.n_vocab
        self.n_padding = 0
        self.control_ids = set(self.special_tokens.values())
        self.bos_id: int = self.special_tokens["<|begin_of_text|>"]
        self.eos_id: int = self.special_tokens["<|end_of_text|>"]
        self.pad_id: int = -1
        self.stop_tokens: set[int] = {self.eos_id, self.special_tokens["<|eot_id|>"]}
        if llama31:
            self.stop_tokens.add(self.special_tokens["<|eom_id|>"])

    def encode(
        self,
        s: str,
        bos: bool,
        eos: bool,
        *,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Encode a text, optionally with ``bos_id`` before and ``eos_id`` after it.

        Args:
            allowed_special: special tokens whose names in ``s`` become their ids. By default all
                names are plain text.
            disallowed_special: special tokens whose names in ``s`` are an error.

        Raises:
            TypeError: ``s`` is not a string.
            ValueError: ``s`` contains a disallowed name, or a lone surrogate.
        """
        check_text(s)
        ids = [self.bos_id] if bos else []
        for piece in _bounded_pieces(s):
            ids += self.model.encode(
                piece, allowed_special=allowed_special, disallowed_special=disallowed_special
            )
        return [*ids, self.eos_id] if eos else ids

    def decode(self, t: Sequence[int] | int) -> str:
        """Decode ids to text; invalid UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.decode_bytes(t).decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int] | int) -> bytes:
        """Bytes of the ids: a character may span several of them."""
        return self.model.decode_bytes(known_ids(t, self.n_words, self.n_padding))


AnyTokenizer = Tokenizer | SentencePieceTokenizer | HuggingFaceTokenizer


def _bounded_pieces(s: str) -> Iterator[str]:
    """Split ``s`` so that no piece is too long for tiktoken (see ``_MAX_CHARS``)."""
    for start in range(0, len(s), _MAX_CHARS):
        chunk = s[start : start + _MAX_CHARS]
        piece_start, previous = 0, None
        for run in _RUNS.finditer(chunk):
            is_space = run[0][0].isspace()
            if is_space is previous:  # the same run continues past the limit: split here
                yield chunk[piece_start : run.start()]
                piece_start = run.start()
            previous = is_space
        yield chunk[piece_start:]
