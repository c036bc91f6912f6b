"""Hugging Face's tokenizer.json, read as tiktoken ranks.

A rank is both a token's id and its merge priority.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from llama.files import parse_json
from llama.vocab.file import check_single_bytes, check_size
from llama.vocab.tiktoken_file import SPLIT_PATTERN

_MOST_STEPS = 2**25  # to re-merge all tokens; Llama 3 takes 8 million


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte-level alphabet: a printable byte is its own Latin-1 character, the n-th of the
    others is U+0100 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _byte_alphabet()
_MAX_TOKEN_BYTES = 1024  # Llama 3's longest has 128


def parse_tokenizer_json(data: bytes, path: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """Parse Hugging Face's ``tokenizer.json`` into ranks, and ids of the added tokens by name.

    Only files that yield the same ids with tiktoken are accepted. Hugging Face merges the pair
    listed first, tiktoken the pair whose union has the lowest id. In both, merges within a token's
    bytes don't depend on its context, so tiktoken forms a token from exactly one pair: the last
    merge when the token's own bytes are encoded. The two agree if these pairs are listed in the
    order of the resulting ids; other pairs never occur. A token that no merge produces can only
    match a whole word: tiktoken always looks up whole words, Hugging Face only with
    ``ignore_merges``.

    Raises:
        ValueError: the file is damaged, or would yield other ids; the message gives the reason.
    """
    try:
        config = parse_json(data)
    except ValueError as error:
        raise ValueError(
            f"{path!r} is damaged: it begins like JSON, but {error}; download the file again"
        ) from None
    model = config.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise ValueError(f"{path!r} has a model of type {kind!r:.80}, expected 'BPE'")
    if model.get("byte_fallback"):
        raise ValueError(
            f"{path!r} is the tokenizer.json of a SentencePiece vocabulary (Llama 2: byte_fallback "
            "is true), expected a byte-level one (Llama 3): give SentencePiece's own file, "
            "tokenizer.model"
        )
    _check_split(config, path)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"{path!r} sets {name} to {model[name]!r:.80}, expected none")
    ranks = _parse_vocab(model.get("vocab"), path)
    check_single_bytes(ranks, path)
    _check_merges(model.get("merges"), bool(model.get("ignore_merges")), ranks, path)
    try:
        added = {token["content"]: token["id"] for token in config.get("added_tokens", [])}
    except (TypeError, KeyError):
        raise ValueError(
            f"{path!r} is damaged: added_tokens is {config['added_tokens']!r:.80}, expected a list "
            "of objects with 'content' and 'id'; download the file again"
        ) from None
    return ranks, added


def _check_split(config: Mapping[str, Any], path: str) -> None:
    """Check that the normalizer and pre_tokenizer split text like SPLIT_PATTERN."""
    if config.get("normalizer") is not None:
        raise ValueError(
            f"{path!r} has the normalizer {config['normalizer']!r:.80}, expected none (Llama 3): "
            "normalizing would change the text"
        )
    pre_tokenizer: Any = config.get("pre_tokenizer")
    try:
        split, byte_level = pre_tokenizer["pretokenizers"]
        pattern = split["pattern"]["Regex"]
        found = [
            split["type"],
            {key: split[key] for key in ("behavior", "invert")},
            byte_level["type"],
            {key: byte_level[key] for key in ("add_prefix_space", "use_regex")},
        ]
    except (TypeError, KeyError, ValueError):
        found, pattern = [pre_tokenizer], None
    expected: list[Any] = ["Split", {"behavior": "Isolated", "invert": False}]
    expected += ["ByteLevel", {"add_prefix_space": False, "use_regex": False}]
    if found != expected:
        raise ValueError(
            f"{path!r} has the pre_tokenizer {str(found)[:200]}, expected Llama 3's, {expected}"
        )
    if pattern != SPLIT_PATTERN:
        raise ValueError(f"{path!r} splits text by {pattern!r}, expected {SPLIT_PATTERN!r}")


def _bytes_of_letters(text: Any, path: str) -> bytes:
    letters = text if isinstance(text, str) else ""
    token = bytes([_BYTE_OF_LETTER[letter] for letter in letters if letter in _BYTE_OF_LETTER])
    if not 0 < len(token) == len(letters) <= _MAX_TOKEN_BYTES:
        raise ValueError(
            f"{path!r} holds the token {text!r:.80}, expected 1 to {_MAX_TOKEN_BYTES} letters of "
            "the byte-level alphabet"
        )
    return token


def _parse_vocab(vocab: Any, path: str) -> dict[bytes, int]:
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise ValueError(
            f"{path!r} is damaged: its vocab isn't an object of tokens and ids; download the file "
            "again"
        )
    check_size(len(vocab), path)
    if sum(len(text) ** 2 for text in vocab) > _MOST_STEPS:
        raise ValueError(f"{path!r} has too many long tokens for a Llama vocabulary")
    in_order = sorted(vocab.items(), key=lambda item: item[1])
    for expected, (text, token_id) in enumerate(in_order):
        if token_id != expected:
            raise ValueError(
                f"{path!r} gives the token {text!r:.80} the id {token_id}, expected {expected}: "
                f"the ids of {len(vocab)} tokens are 0 to {len(vocab) - 1}"
            )
    return {_bytes_of_letters(text, path): token_id for text, token_id in in_order}


def _check_merges(merges: Any, ignore_merges: bool, ranks: Mapping[bytes, int], path: str) -> None:
    """Check that the merges yield the same ids as tiktoken (see ``parse_tokenizer_json``)."""
    if not isinstance(merges, list):
        raise ValueError(
            f"{path!r} is damaged: its merges are {merges!r:.80}, expected a list of pairs; "
            "download the file again"
        )
    position: dict[tuple[bytes, bytes], int] = {}
    for i, merge in enumerate(merges):
        # written as "a b" by older versions, as ["a", "b"] by newer ones
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"{path!r} is damaged: merge {i} is {merge!r:.80}, expected a pair of tokens; "
                "download the file again"
            )
        position[_bytes_of_letters(pair[0], path), _bytes_of_letters(pair[1], path)] = i
    for (left, right), i in position.items():
        for token in (left, right, left + right):
            if token not in ranks:
                raise ValueError(
                    f"{path!r} is damaged: merge {i} joins {left!r} and {right!r}, but its vocab "
                    f"has no {token!r}; download the file again"
                )
    before = -1
    for token, rank in ranks.items():
        if len(token) == 1:
            continue
        made_from = _last_merge(token, ranks)
        if made_from is None:
            if ignore_merges:
                continue
            raise ValueError(
                f"{path!r} has the token {token!r} (id {rank}), which no merge makes, and does not "
                "set ignore_merges: its ids would differ from Llama 3's; give tokenizer.model, or "
                "a newer tokenizer.json"
            )
        if made_from not in position:
            raise ValueError(
                f"{path!r} lists no merge of {made_from[0]!r} and {made_from[1]!r}, which make the "
                f"token {token!r} (id {rank}); download the file again"
            )
        if position[made_from] < before:
            raise ValueError(
                f"{path!r} lists merge {position[made_from]}, which makes the token {token!r} (id "
                f"{rank}), before that of a lower id, expected merges in the order of the ids"
            )
        before = position[made_from]


def _last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last pair merged to form ``token`` from its bytes, by rank; None if merges can't."""
    none = len(ranks)
    parts = [token[i : i + 1] for i in range(len(token))]
    joined = [ranks.get(a + b, none) for a, b in pairwise(parts)]
    while len(parts) > 2:
        lowest = min(joined)
        if lowest == none:
            return None
        i = joined.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del joined[i]
        if i > 0:
            joined[i - 1] = ranks.get(parts[i - 1] + parts[i], none)
        if i < len(joined):
            joined[i] = ranks.get(parts[i] + parts[i + 1], none)
    return parts[0], parts[1]
