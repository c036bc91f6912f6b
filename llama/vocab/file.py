"""Read vocabulary files with a size limit, and validate texts and ids."""

import operator
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

import blobfile

from llama.files import check_regular, seems

_LARGEST = 2**25  # bytes; Llama 3's tokenizer.json has 17 million
LARGEST_VOCABULARY = 2**20  # tokens
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # in SentencePiece's pieces


def read_vocabulary(path: str, size: int = -1) -> bytes:
    """The first ``size`` bytes of a vocabulary file, by default all of them. ``~`` is the home
    folder.

    ``tiktoken.load`` isn't used because it caches by path string: a relative ``tokenizer.model``
    could return another model's file.

    Raises:
        FileNotFoundError: the file doesn't exist.
        ValueError: it is a failed download, or too large.
    """
    path = os.path.expanduser(path)
    try:
        if os.path.exists(path) and not os.path.isdir(path):
            check_regular(path)
        # blobfile is for cloud paths; it takes the drive in C:\tokenizer.model for one
        with (blobfile.BlobFile if "://" in path else open)(path, "rb") as file:
            data = bytes(file.read(min(size % 2**63, _LARGEST + 1)))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"no tokenizer at {path!r}: give tokenizer_path, the tokenizer.model file that was "
            "downloaded with the weights"
        ) from error
    if len(data) > _LARGEST:
        raise ValueError(f"{path!r} has more than {_LARGEST:,} bytes, too many for a vocabulary")
    if mistake := seems(data[:512]):
        raise ValueError(f"{path!r} isn't a vocabulary: {mistake}")
    return data


def is_sentencepiece(data: bytes) -> bool:
    """Whether this is a SentencePiece vocabulary, judging by its first piece."""
    return b"<unk>" in data[:16]


def is_tokenizer_json(data: bytes) -> bool:
    """Whether this is Hugging Face's tokenizer.json, judging by its first character."""
    return data.lstrip()[:1] == b"{"


def check_size(n_tokens: int, path: str) -> None:
    """Raise ValueError for more tokens than any Llama has, before they exhaust memory."""
    if n_tokens > LARGEST_VOCABULARY:
        raise ValueError(f"{path!r} has more than {LARGEST_VOCABULARY:,} tokens")


def check_single_bytes(ranks: Mapping[bytes, int], path: str) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path!r} isn't a byte-level vocabulary: {len(missing)} of the 256 single bytes are "
            f"missing (the first is {missing[0]:#04x}); download the file again"
        )


def check_text(s: str) -> None:
    """Raise TypeError or ValueError unless ``s`` is a string that can be encoded."""
    if not isinstance(s, str):
        raise TypeError(f"encode takes a str, got {type(s).__name__}: {s!r:.60}")
    try:
        s.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: character {error.start} is {s[error.start]!r}, "
            "half of a surrogate pair; decode the input as UTF-8 with errors='replace'"
        ) from None


def known_ids(t: Sequence[int] | int, n_words: int, n_padding: int) -> list[int]:
    """The ids, or the only one, without those that only pad the weights.

    Raises:
        ValueError: an id is outside a vocabulary of ``n_words`` and its padding.
    """
    try:
        ids = [operator.index(t)]  # type: ignore[arg-type]
    except TypeError:
        ids = [operator.index(token) for token in t]  # type: ignore[union-attr]
    for token in ids:
        if not 0 <= token < n_words + n_padding:
            raise ValueError(f"token id {token} is outside the vocabulary (0 to {n_words - 1})")
    return [token for token in ids if token < n_words] if n_padding else ids


def check_special(
    s: str,
    special: Collection[str],
    allowed: Literal["all"] | AbstractSet[str],
    disallowed: Literal["all"] | Collection[str],
) -> None:
    """Raise ValueError if ``s`` holds the name of a disallowed special token."""
    if allowed == "all":
        allowed = set(special)
    names = set(special) - allowed if disallowed == "all" else disallowed
    if found := [name for name in names if name in s]:
        raise ValueError(
            f"the text holds the special token {found[0]!r}: remove it, give it in "
            "allowed_special, or leave disallowed_special out to encode it as text"
        )


def encode_with_special(
    s: str,
    special: Mapping[str, int],
    allowed: Literal["all"] | AbstractSet[str],
    encode: Callable[[str], list[int]],
    *,
    drops_inner_spaces: bool,
) -> list[int]:
    """Encode a text in which names of allowed special tokens become their ids.

    Args:
        encode: encodes the texts between them.
        drops_inner_spaces: after a special token, drop the space that ``encode`` adds to a text.
    """
    names = special.keys() if allowed == "all" else special.keys() & allowed
    ids: list[int] = []
    for i, piece in enumerate(_split_special(s, names)):
        if piece in names:
            ids.append(special[piece])
        elif i and drops_inner_spaces:  # after a byte, which never merges
            ids += encode("\n" + piece)[len(encode("\n")) :]
        else:
            ids += encode(piece)
    return ids


def _split_special(s: str, names: Collection[str]) -> list[str]:
    """Split a text into the special tokens in it and the texts between them."""
    if not names:
        return [s]
    longest_first = sorted(names, key=len, reverse=True)
    return [p for p in re.split(f"({'|'.join(map(re.escape, longest_first))})", s) if p]
