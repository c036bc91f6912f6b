"""Write a vocabulary as Hugging Face's tokenizer.json and tokenizer_config.json."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from llama.vocab.file import SPACE
from llama.vocab.huggingface import BYTE_OF_LETTER
from llama.vocab.tiktoken_file import SPLIT_PATTERN

_LETTER_OF_BYTE = {byte[0]: letter for letter, byte in BYTE_OF_LETTER.items()}
# sentencepiece_model.proto: types of pieces, and of the model
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_BPE = 2


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a ``Tokenizer`` or ``SentencePieceTokenizer``.

    Raises:
        ValueError: a SentencePiece vocabulary isn't byte-pair encoding.
    """
    is_sentencepiece = hasattr(tokenizer, "sp_model")
    parts = _of_sentencepiece(tokenizer) if is_sentencepiece else _of_tiktoken(tokenizer)
    bos = next(name for name, i in tokenizer.special_tokens.items() if i == tokenizer.bos_id)
    first: dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 0}}
    second: dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 1}}
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        **parts,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, a],
            "pair": [first, a, second, b],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
    }


def tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    """A tokenizer_config.json, without a chat template."""
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {
        # uses tokenizer.json as it is, which LlamaTokenizer doesn't
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: names[i] for key, i in ids.items() if i in names},
    }


def _added(name: str, i: int, *, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **flags, "special": special}


def _model(vocab: dict[str, int], merges: list[list[str]], **options: Any) -> dict[str, Any]:
    unused = dict.fromkeys(("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    return {"type": "BPE", **unused, **options, "vocab": vocab, "merges": merges}


# --- tiktoken -----------------------------------------------------------------------------------


def _of_tiktoken(tokenizer: Any) -> dict[str, Any]:
    """tiktoken merges the pair whose union has the lowest rank, Hugging Face the pair listed first.
    Merges within a token's bytes don't depend on its context, so that tiktoken forms a token from
    exactly one pair: the last merge when its own bytes are encoded. One merge per token, in the
    order of the ranks, yields the same ids. A token that no merge produces can only match a whole
    word, which tiktoken looks up first, as Hugging Face does with ``ignore_merges``."""
    n_base = min(tokenizer.special_tokens.values())
    tokens = [tokenizer.model.decode_single_token_bytes(i) for i in range(n_base)]
    ranks = {token: i for i, token in enumerate(tokens)}
    pairs = [_last_merge(token, ranks) for token in tokens if len(token) > 1]
    split = {"pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "added_tokens": [
            _added(name, i, special=True) for name, i in tokenizer.special_tokens.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Split", **split}, {**byte_level, "use_regex": False}],
        },
        "decoder": {**byte_level, "use_regex": True},
        "model": _model(
            {_letters(token): i for token, i in ranks.items()},
            [[_letters(left), _letters(right)] for left, right in filter(None, pairs)],
            unk_token=None,
            fuse_unk=False,
            byte_fallback=False,
            ignore_merges=True,
        ),
    }


def _letters(token: bytes) -> str:
    return "".join([_LETTER_OF_BYTE[byte] for byte in token])


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


# --- SentencePiece ------------------------------------------------------------------------------


def _of_sentencepiece(tokenizer: Any) -> dict[str, Any]:
    """Every pair of pieces whose union is a piece merges, the highest score first."""
    pieces, model_type, rules = _read_model(tokenizer.model.serialized_model_proto())
    if model_type != _BPE:
        raise ValueError(
            f"the vocabulary has the model type {model_type}, expected byte-pair encoding "
            f"({_BPE}): tokenizer.json can't be written; give --format native"
        )
    vocab = {piece: i for i, (piece, _, _) in enumerate(pieces)}
    normal = {piece: score for piece, score, kind in pieces if kind == _NORMAL}
    ranked = sorted(normal, key=lambda piece: (-normal[piece], vocab[piece]))
    merges = [
        [piece[:i], piece[i:]]
        for piece in ranked
        for i in range(1, len(piece))
        if piece[:i] in normal and piece[i:] in normal
    ]
    kinds = (_UNKNOWN, _CONTROL, _USER_DEFINED)
    added = [
        _added(piece, i, special=kind != _USER_DEFINED)
        for i, (piece, _, kind) in enumerate(pieces)
        if kind in kinds
    ]
    new = {name: i for name, i in tokenizer.special_tokens.items() if i >= len(pieces)}
    unknown = next(piece for piece, _, kind in pieces if kind == _UNKNOWN)
    # numbers: fields of NormalizerSpec
    normalizers: list[dict[str, Any]] = []
    if charsmap := rules.get(2):
        raise ValueError(
            f"the vocabulary normalizes text by {len(charsmap)} bytes of rules, expected none: "
            "tokenizer.json can't be written; give --format native"
        )
    if rules.get(4, 1):  # remove_extra_whitespaces
        for pattern, content in ((r"\A +| +\z", ""), (" {2,}", " ")):
            replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
            normalizers.append(replace)
    if rules.get(3, 1):  # add_dummy_prefix
        normalizers.append({"type": "Prepend", "prepend": SPACE})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    return {
        "added_tokens": [*added, *(_added(name, i, special=True) for name, i in new.items())],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _model(
            vocab,
            merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=False,
        ),
    }


def _read_model(
    data: bytes,
) -> tuple[Sequence[tuple[str, float, int]], int, Mapping[int, Any]]:
    """Pieces (text, score, type), model type and normalizer of sentencepiece_model.proto."""
    pieces = []
    model_type, rules = 1, {}
    for number, value in _fields(data):
        if number == 1:
            found = dict(_fields(value))
            score = struct.unpack("<f", found.get(2, bytes(4)))[0]
            pieces.append((found.get(1, b"").decode(), score, found.get(3, _NORMAL)))
        elif number == 2:
            model_type = dict(_fields(value)).get(3, 1)
        elif number == 3:
            rules = dict(_fields(value))
    return pieces, model_type, rules


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message that sentencepiece has accepted: number and value."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        yield number, data[at : at + size]
        at += size
