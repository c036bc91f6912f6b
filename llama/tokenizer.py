"""Text to token ids and back: Llama 3's tokenizer, and ``load_tokenizer`` for either family.

The chat formats (chat.py) are re-exported here, as in the published package.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

import tiktoken

from llama.chat import ChatFormat, Dialog, Message, Role
from llama.vocab.file import check_ids, check_text, is_sentencepiece, read_vocabulary
from llama.vocab.huggingface import parse_tokenizer_json
from llama.vocab.sentencepiece import SentencePieceTokenizer
from llama.vocab.tiktoken_file import SPLIT_PATTERN, parse_tiktoken

__all__ = ["ChatFormat", "Dialog", "Message", "Role", "Tokenizer", "load_tokenizer"]

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


def _check_added_tokens(
    added: Mapping[str, int], special: Mapping[str, int], names: Collection[str], path: str
) -> None:
    """Check that added tokens are in the range of special tokens, and ``names`` at their ids."""
    first, last = min(special.values()), max(special.values())
    for name, token_id in added.items():
        if type(token_id) is not int or not first <= token_id <= last:
            raise ValueError(
                f"{path!r} gives the added token {name!r:.80} the id {token_id!r}, expected one of "
                f"{first} to {last}, Llama 3's {N_SPECIAL_TOKENS} special tokens"
            )
    for name in names:
        if added.get(name) != special[name]:
            found = f"gives {name} the id {added[name]}" if name in added else f"has no {name}"
            raise ValueError(
                f"{path!r} {found}, expected id {special[name]}: give the tokenizer that belongs "
                "to the weights (Llama 3 and 3.1 name different tokens)"
            )


class Tokenizer:
    """Llama 3's BPE tokenizer, from a tiktoken vocabulary or Hugging Face's tokenizer.json.

    Args:
        llama31: name the special tokens as Llama 3.1 and later do.

    Attributes:
        model: the underlying ``tiktoken.Encoding``.
        n_words: vocabulary size, special tokens included.
        bos_id, eos_id: ids of ``<|begin_of_text|>`` and ``<|end_of_text|>``.
        pad_id: -1; padding isn't used.
        stop_tokens: ids that end a generation: end of text, end of turn and, with ``llama31``, end
            of message.
        special_tokens: ids of all special tokens by name. A tokenizer.json's names for reserved
            ones are ignored.
        control_ids: ids that text must never encode to.
        drops_first_space: False: ids decode to exactly their bytes.

    Raises:
        FileNotFoundError: the file doesn't exist.
        ValueError: the file is damaged, or not a vocabulary of this kind.
    """

    drops_first_space = False

    def __init__(self, model_path: str, *, llama31: bool = False) -> None:
        data = read_vocabulary(model_path)
        if is_sentencepiece(data):
            raise ValueError(
                f"{model_path!r} "
                "is a SentencePiece vocabulary (Llama 2), expected a tiktoken vocabulary "
                "(Llama 3): open it with llama.tokenizer.load_tokenizer or Llama.build, which take "
                "either, or give the tokenizer.model that belongs to the weights"
            )
        if data.lstrip()[:1] == b"{":
            ranks, added = parse_tokenizer_json(data, model_path)
            self.special_tokens = special_tokens(len(ranks), llama31)
            names = _LLAMA31_NAMES if llama31 else _LLAMA3_NAMES
            needed = [name for name in names.values() if name != "<|finetune_right_pad_id|>"]
            _check_added_tokens(added, self.special_tokens, needed, model_path)
        else:
            ranks = parse_tiktoken(data, model_path)
            self.special_tokens = special_tokens(len(ranks), llama31)
        self.model = tiktoken.Encoding(
            name=model_path,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.n_words: int = self.model.n_vocab
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
        *,
        bos: bool,
        eos: bool,
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

    def decode(self, t: Sequence[int]) -> str:
        """Decode ids to text; invalid UTF-8 becomes U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.decode_bytes(t).decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Bytes of the ids: a character may span several of them."""
        check_ids(t, self.n_words)
        return self.model.decode_bytes(list(t))


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


def load_tokenizer(path: str, *, llama31: bool = False) -> Tokenizer | SentencePieceTokenizer:
    """Load the tokenizer of a vocabulary file, detecting its type by content.

    Args:
        llama31: name the special tokens of a Llama 3 vocabulary as Llama 3.1 does; SentencePiece
            files contain their own names.

    Raises:
        FileNotFoundError, ImportError, ValueError: as the tokenizers do.
    """
    if is_sentencepiece(read_vocabulary(path, 16)):
        return SentencePieceTokenizer(path)
    return Tokenizer(path, llama31=llama31)
