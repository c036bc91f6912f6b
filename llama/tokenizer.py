"""Text to token ids and back (Llama 3, tiktoken), and the Llama 3 chat format.

Two rules hold throughout: text that comes from a user is always encoded as plain text, and the
ids of special tokens are put in by structure only. A user who types ``<|eot_id|>`` gets the ids of
those ten characters and cannot end the turn.
"""

import base64
import binascii
import re
from collections.abc import Collection, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, TypedDict, get_args

import blobfile
import tiktoken

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    role: Role
    content: str


Dialog = Sequence[Message]

# How Llama 3 cuts text before byte-pair merging: contractions, words with at most one leading
# character that is neither letter, digit nor newline, groups of up to three digits, punctuation,
# newlines, other whitespace.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)

N_SPECIAL_TOKENS = 256
# Offsets from the end of the byte-pair vocabulary; the ids between them are reserved.
_NAMED_SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}

# tiktoken's regular expression engine overflows its stack on very long pieces. The published
# tokenizer cuts text at these two lengths, so the cuts are part of what the ids are.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000  # characters in a row that are all whitespace, or all not
_RUNS = re.compile(rf"(?:\s{{1,{_MAX_RUN}}}|\S{{1,{_MAX_RUN}}})")


def special_tokens(n_base: int) -> dict[str, int]:
    """Names and ids of the 256 special tokens that follow ``n_base`` byte-pair tokens."""
    reserved = iter(range(N_SPECIAL_TOKENS))
    return {
        _NAMED_SPECIAL_TOKENS.get(i) or f"<|reserved_special_token_{next(reserved)}|>": n_base + i
        for i in range(N_SPECIAL_TOKENS)
    }


def read_bpe_ranks(path: str) -> dict[bytes, int]:
    """Read a tiktoken vocabulary: one ``base64(token bytes) rank`` per line, ranks 0, 1, 2, ...

    The file is read here and not by ``tiktoken.load``, which caches by the path as it was written:
    a relative ``tokenizer.model`` could come back as another model's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a tiktoken vocabulary; the message names the line.
    """
    try:
        with blobfile.BlobFile(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"no tokenizer at {path!r}: give tokenizer_path, the tokenizer.model file that was "
            "downloaded with the weights"
        ) from error
    if b"<unk>" in data[:16]:
        raise ValueError(
            f"{path!r} is a SentencePiece vocabulary (Llama 2), expected a tiktoken vocabulary "
            "(Llama 3): give the tokenizer.model that belongs to the weights"
        )
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token_base64, rank_text = line.split()
            token, rank = base64.b64decode(token_base64, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path!r} is damaged: line {number} is {line[:60]!r}, expected a base64 token, a "
                "space and its rank; download the file again"
            ) from None
        if rank != len(ranks) or token in ranks:
            problem = "repeats a token" if token in ranks else f"has rank {rank}"
            raise ValueError(
                f"{path!r} is damaged: line {number} {problem}, expected a new token with rank "
                f"{len(ranks)}; download the file again"
            )
        ranks[token] = rank
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path!r} is no byte-level vocabulary: {len(missing)} of the 256 single bytes are "
            f"missing (the first is {missing[0]:#04x}); download the file again"
        )
    return ranks


class Tokenizer:
    """Byte-pair tokenizer of Llama 3.

    Attributes:
        model: the underlying ``tiktoken.Encoding``.
        n_words: vocabulary size, special tokens included.
        bos_id, eos_id: ids of ``<|begin_of_text|>`` and ``<|end_of_text|>``.
        pad_id: -1, an id that no text has.
        stop_tokens: ids that end a generation: end of text and end of turn.
        special_tokens: name to id of every special token.
    """

    def __init__(self, model_path: str) -> None:
        ranks = read_bpe_ranks(model_path)
        self.special_tokens = special_tokens(len(ranks))
        self.model = tiktoken.Encoding(
            name=model_path,
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.n_words: int = self.model.n_vocab
        self.bos_id: int = self.special_tokens["<|begin_of_text|>"]
        self.eos_id: int = self.special_tokens["<|end_of_text|>"]
        self.pad_id: int = -1
        self.stop_tokens: set[int] = {self.eos_id, self.special_tokens["<|eot_id|>"]}

    def encode(
        self,
        s: str,
        *,
        bos: bool,
        eos: bool,
        allowed_special: Literal["all"] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal["all"] | Collection[str] = (),
    ) -> list[int]:
        """Ids of a text, with ``bos_id`` before and ``eos_id`` behind it where asked for.

        Args:
            allowed_special: special tokens whose names in ``s`` become their ids. With the default
                every name is plain text.
            disallowed_special: special tokens whose names in ``s`` are an error.

        Raises:
            TypeError: ``s`` is not a string.
            ValueError: ``s`` holds a disallowed name, or half of a surrogate pair.
        """
        if not isinstance(s, str):
            raise TypeError(f"encode takes a str, got {type(s).__name__}: {s!r:.60}")
        try:
            s.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode: character {error.start} is {s[error.start]!r}, "
                "half of a surrogate pair; decode the input as UTF-8 with errors='replace'"
            ) from None
        ids = [self.bos_id] if bos else []
        for piece in _bounded_pieces(s):
            ids += self.model.encode(
                piece, allowed_special=allowed_special, disallowed_special=disallowed_special
            )
        return [*ids, self.eos_id] if eos else ids

    def decode(self, t: Sequence[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        return self.decode_bytes(t).decode("utf-8", errors="replace")

    def decode_bytes(self, t: Sequence[int]) -> bytes:
        """Bytes of the ids: a character may be spread over several of them."""
        for token in t:
            if not 0 <= token < self.n_words:
                raise ValueError(
                    f"token id {token} is outside the vocabulary (0 to {self.n_words - 1})"
                )
        return self.model.decode_bytes(list(t))


def _bounded_pieces(s: str) -> Iterator[str]:
    """Cut ``s`` so that no piece is too long for tiktoken (see ``_MAX_CHARS``)."""
    for start in range(0, len(s), _MAX_CHARS):
        chunk = s[start : start + _MAX_CHARS]
        piece_start, previous = 0, None
        for run in _RUNS.finditer(chunk):
            is_space = run[0][0].isspace()
            if is_space is previous:  # the same run goes on past the limit: cut here
                yield chunk[piece_start : run.start()]
                piece_start = run.start()
            previous = is_space
        yield chunk[piece_start:]


class ChatFormat:
    """The Llama 3 chat format.

    A message is ``<|start_header_id|>role<|end_header_id|>``, two newlines, the content without
    surrounding whitespace, ``<|eot_id|>``. A prompt is ``<|begin_of_text|>``, the messages, and the
    header of the assistant's answer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode_header(self, message: Message) -> list[int]:
        """Ids of the header that opens ``message``.

        Raises:
            ValueError: the message is not a role that is known and a text, or holds more than that.
        """
        _check_message(message)
        return self._header(message["role"])

    def encode_message(self, message: Message) -> list[int]:
        """Ids of a whole message, its ``<|eot_id|>`` included."""
        return [
            *self.encode_header(message),
            *self.tokenizer.encode(message["content"].strip(), bos=False, eos=False),
            self.tokenizer.special_tokens["<|eot_id|>"],
        ]

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of a dialog, ready for the assistant's next message to be generated.

        Raises:
            ValueError: the dialog is empty, or one of its messages is not valid.
        """
        if not dialog:
            raise ValueError("the dialog is empty, expected at least one message")
        ids = [self.tokenizer.bos_id]
        for message in dialog:
            ids += self.encode_message(message)
        return ids + self._header("assistant")

    def _header(self, role: str) -> list[int]:
        special = self.tokenizer.special_tokens
        return [
            special["<|start_header_id|>"],
            *self.tokenizer.encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *self.tokenizer.encode("\n\n", bos=False, eos=False),
        ]


def _check_message(message: Message) -> None:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        raise ValueError(f"a message is {message!r:.200}, expected a dict of 'role' and 'content'")
    roles = get_args(Role)
    if message["role"] not in roles:
        raise ValueError(
            f"a message has the role {message['role']!r}, expected one of {', '.join(roles)}"
        )
    if not isinstance(message["content"], str):
        raise ValueError(
            f"the content of a {message['role']} message is a {type(message['content']).__name__}, "
            "expected a str"
        )
