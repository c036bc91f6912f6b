"""Text to token ids and back (Llama 3, tiktoken), and the Llama 3 chat format.

Two rules hold throughout: text that comes from a user is always encoded as plain text, and the
ids of special tokens are put in by structure only. A user who types ``<|eot_id|>`` gets the ids of
those ten characters and cannot end the turn.
"""

import base64
import binascii
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Any, Literal, TypedDict, get_args

import blobfile
import tiktoken

Role = Literal["system", "user", "assistant", "ipython"]


class _RoleAndContent(TypedDict):
    role: Role
    content: str


class Message(_RoleAndContent, total=False):
    """One turn of a dialog. What a tool answered has the role ``ipython``.

    ``tool_call`` and ``eom`` belong to messages of the assistant from Llama 3.1 on: the text that
    follows ``<|python_tag|>``, and whether the message ends in ``<|eom_id|>`` (the assistant waits
    for the tool) instead of ``<|eot_id|>`` (the turn is over).
    """

    tool_call: str
    eom: bool


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
# tokenizer cuts text at these two lengths, so the cuts are part of what the ids are.
_MAX_CHARS = 400_000
_MAX_RUN = 25_000  # characters in a row that are all whitespace, or all not
_RUNS = re.compile(rf"(?:\s{{1,{_MAX_RUN}}}|\S{{1,{_MAX_RUN}}})")


def special_tokens(n_base: int, llama31: bool = False) -> dict[str, int]:
    """Names and ids of the 256 special tokens that follow ``n_base`` byte-pair tokens.

    Llama 3 and 3.1 share the ids; 3.1 gave names to three that were reserved, and numbered the
    reserved ones anew.
    """
    names = _LLAMA31_NAMES if llama31 else _LLAMA3_NAMES
    reserved = iter(range(N_SPECIAL_TOKENS))
    return {
        names.get(i) or f"<|reserved_special_token_{next(reserved)}|>": n_base + i
        for i in range(N_SPECIAL_TOKENS)
    }


def read_vocabulary(path: str, size: int = -1) -> bytes:
    """The first ``size`` bytes of a vocabulary file, by default all of them.

    The file is read here and not by ``tiktoken.load``, which caches by the path as it was written:
    a relative ``tokenizer.model`` could come back as another model's.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        with blobfile.BlobFile(path, "rb") as file:
            return bytes(file.read(size))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"no tokenizer at {path!r}: give tokenizer_path, the tokenizer.model file that was "
            "downloaded with the weights"
        ) from error


def is_sentencepiece(data: bytes) -> bool:
    """Whether a vocabulary file that begins like this is SentencePiece's (its first piece)."""
    return b"<unk>" in data[:16]


def parse_tiktoken(data: bytes, path: str) -> dict[bytes, int]:
    """Ranks of a tiktoken vocabulary: ``base64(token bytes) rank`` per line, ranks 0, 1, 2, ...

    Raises:
        ValueError: this is not a tiktoken vocabulary; the message names ``path`` and the line.
    """
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
    _check_single_bytes(ranks, path)
    return ranks


def _check_single_bytes(ranks: Mapping[bytes, int], path: str) -> None:
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(
            f"{path!r} is no byte-level vocabulary: {len(missing)} of the 256 single bytes are "
            f"missing (the first is {missing[0]:#04x}); download the file again"
        )


# --- Hugging Face's tokenizer.json --------------------------------------------------------------


def _byte_alphabet() -> dict[str, int]:
    """The letters that stand for bytes: a printable byte is its own Latin-1 letter, the n-th of
    the others is the letter U+0100 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _byte_alphabet()


def parse_tokenizer_json(data: bytes, path: str) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks, and ids by name of the added tokens, of Hugging Face's ``tokenizer.json``.

    Only a file that gives the ids which tiktoken gives is read. Hugging Face merges the pair that
    comes first in a list, tiktoken the pair whose union has the lowest id. In both, the merges
    inside the bytes of a token go the same way whatever stands around them, so that tiktoken only
    ever makes a token from one pair: the last one when the token's own bytes are merged. The two
    agree when these pairs are listed in the order of the ids they make; other pairs in the list
    are never met. A token that no merges make is found only where it is a whole word: tiktoken
    always looks whole words up, Hugging Face with ``ignore_merges``.

    Raises:
        ValueError: the file is damaged, or would give other ids; the message says why.
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
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
    _check_text_is_cut_as_ours(config, path)
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"{path!r} sets {name} to {model[name]!r:.80}, expected none")
    ranks = _parse_vocab(model.get("vocab"), path)
    _check_single_bytes(ranks, path)
    _check_merges(model.get("merges"), bool(model.get("ignore_merges")), ranks, path)
    try:
        added = {token["content"]: token["id"] for token in config.get("added_tokens", [])}
    except (TypeError, KeyError):
        raise ValueError(
            f"{path!r} is damaged: added_tokens is {config['added_tokens']!r:.80}, expected a list "
            "of objects with 'content' and 'id'; download the file again"
        ) from None
    return ranks, added


def _check_text_is_cut_as_ours(config: Mapping[str, Any], path: str) -> None:
    """Hugging Face's normalizer and pre_tokenizer must do what SPLIT_PATTERN does."""
    if config.get("normalizer") is not None:
        raise ValueError(
            f"{path!r} changes the text by a normalizer, {config['normalizer']!r:.80}, expected "
            "none (Llama 3)"
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
    if not token or len(token) != len(letters):
        raise ValueError(
            f"{path!r} holds the token {text!r:.80}, expected letters of the byte-level alphabet "
            "only"
        )
    return token


def _parse_vocab(vocab: Any, path: str) -> dict[bytes, int]:
    if not isinstance(vocab, dict) or not all(type(token_id) is int for token_id in vocab.values()):
        raise ValueError(
            f"{path!r} is damaged: its vocab is no object of tokens and ids; download the file "
            "again"
        )
    in_order = sorted(vocab.items(), key=lambda item: item[1])
    for expected, (text, token_id) in enumerate(in_order):
        if token_id != expected:
            raise ValueError(
                f"{path!r} gives the token {text!r:.80} the id {token_id}, expected {expected}: "
                f"the ids of {len(vocab)} tokens are 0 to {len(vocab) - 1}"
            )
    return {_bytes_of_letters(text, path): token_id for text, token_id in in_order}


def _check_merges(merges: Any, ignore_merges: bool, ranks: Mapping[bytes, int], path: str) -> None:
    """Whether the list of merges leads to tiktoken's ids (see ``parse_tokenizer_json``)."""
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
                f"{path!r} has the token {token!r} (id {rank}), which no merges make, and does not "
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
    """The pair that makes ``token`` when its bytes are merged by rank; None if they end apart."""
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


def _check_added_tokens(
    added: Mapping[str, int], special: Mapping[str, int], names: Collection[str], path: str
) -> None:
    """Added tokens must lie where our special tokens do, those that chat needs at the same ids."""
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


# --- Tokenizer ----------------------------------------------------------------------------------


class Tokenizer:
    """Byte-pair tokenizer of Llama 3, from a tiktoken vocabulary or Hugging Face's tokenizer.json.

    Args:
        llama31: name the special tokens as Llama 3.1 and later do.

    Attributes:
        model: the underlying ``tiktoken.Encoding``.
        n_words: vocabulary size, special tokens included.
        bos_id, eos_id: ids of ``<|begin_of_text|>`` and ``<|end_of_text|>``.
        pad_id: -1, an id that no text has.
        stop_tokens: ids that end a generation: end of text, end of turn and, with ``llama31``, end
            of message.
        special_tokens: name to id of every special token. Names that a tokenizer.json gives to
            reserved ones are not taken over.
        drops_first_space: False: the text of the ids is their bytes, from the first on.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not a vocabulary of this kind.
    """

    drops_first_space = False

    def __init__(self, model_path: str, *, llama31: bool = False) -> None:
        data = read_vocabulary(model_path)
        if is_sentencepiece(data):
            raise ValueError(
                f"{model_path!r} "
                "is a SentencePiece vocabulary (Llama 2), expected a tiktoken vocabulary "
                "(Llama 3): open it by llama.llama2.open_tokenizer or Llama.build, which take "
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
        """Ids of a text, with ``bos_id`` before and ``eos_id`` behind it where asked for.

        Args:
            allowed_special: special tokens whose names in ``s`` become their ids. With the default
                every name is plain text.
            disallowed_special: special tokens whose names in ``s`` are an error.

        Raises:
            TypeError: ``s`` is not a string.
            ValueError: ``s`` holds a disallowed name, or half of a surrogate pair.
        """
        check_text(s)
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
        check_ids(t, self.n_words)
        return self.model.decode_bytes(list(t))


def check_text(s: str) -> None:
    """Raise TypeError or ValueError for what is no text that can be encoded."""
    if not isinstance(s, str):
        raise TypeError(f"encode takes a str, got {type(s).__name__}: {s!r:.60}")
    try:
        s.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text is not valid Unicode: character {error.start} is {s[error.start]!r}, "
            "half of a surrogate pair; decode the input as UTF-8 with errors='replace'"
        ) from None


def check_ids(ids: Sequence[int], n_words: int) -> None:
    """Raise ValueError for an id that is not in a vocabulary of ``n_words``."""
    for token in ids:
        if not 0 <= token < n_words:
            raise ValueError(f"token id {token} is outside the vocabulary (0 to {n_words - 1})")


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


# --- Chat ---------------------------------------------------------------------------------------


class ChatFormat:
    """The Llama 3 chat format.

    A message is ``<|start_header_id|>role<|end_header_id|>``, two newlines, the content without
    surrounding whitespace, ``<|eot_id|>``. A prompt is ``<|begin_of_text|>``, the messages, and the
    header of the assistant's answer. With the names of Llama 3.1, a call of a tool stands behind
    the assistant's content as ``<|python_tag|>`` and its text, unchanged.

    Attributes:
        tool_call_id: id of ``<|python_tag|>``, None before Llama 3.1.
        eom_id: id of ``<|eom_id|>``, None before Llama 3.1.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tool_call_id: int | None = tokenizer.special_tokens.get("<|python_tag|>")
        self.eom_id: int | None = tokenizer.special_tokens.get("<|eom_id|>")

    def encode_header(self, message: Message) -> list[int]:
        """Ids of the header that opens ``message``.

        Raises:
            ValueError: the message is not a role that is known and a text, or holds more than this
                model knows.
        """
        self._check(message, "the message")
        return self._header(message["role"])

    def encode_message(self, message: Message) -> list[int]:
        """Ids of a whole message, its ``<|eot_id|>`` or ``<|eom_id|>`` included."""
        self._check(message, "the message")
        return self._message(message)

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Ids of a dialog, ready for the assistant's next message to be generated.

        Raises:
            ValueError: the dialog is empty, or one of its messages is not valid.
        """
        if not dialog:
            raise ValueError("the dialog is empty, expected at least one message")
        ids = [self.tokenizer.bos_id]
        for i, message in enumerate(dialog):
            self._check(message, f"message {i}")
            ids += self._message(message)
        return ids + self._header("assistant")

    def _check(self, message: Message, where: str) -> None:
        check_message(message, where, tools=self.tool_call_id is not None)

    def _message(self, message: Message) -> list[int]:
        special = self.tokenizer.special_tokens
        ids = self._header(message["role"])
        ids += self.tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        if "tool_call" in message:
            ids.append(special["<|python_tag|>"])
            ids += self.tokenizer.encode(message["tool_call"], bos=False, eos=False)
        return [*ids, special["<|eom_id|>" if message.get("eom") else "<|eot_id|>"]]

    def _header(self, role: str) -> list[int]:
        special = self.tokenizer.special_tokens
        return [
            special["<|start_header_id|>"],
            *self.tokenizer.encode(role, bos=False, eos=False),
            special["<|end_header_id|>"],
            *self.tokenizer.encode("\n\n", bos=False, eos=False),
        ]


_TOOL_KEYS = {"tool_call": str, "eom": bool}


def check_message(message: Message, where: str, *, tools: bool) -> None:
    """Raise ValueError for what is no message; ``where`` names it, as in ``message 2``.

    Args:
        tools: the model knows calls of tools and their answers (Llama 3.1 and later).
    """
    keys = set(message) if isinstance(message, dict) else set()
    if not {"role", "content"} <= keys or keys - {"role", "content", *_TOOL_KEYS}:
        more = ", and optionally 'tool_call' and 'eom'" if tools else ""
        raise ValueError(
            f"{where} is {message!r:.200}, expected a dict of 'role' and 'content'{more}"
        )
    role = message["role"]
    roles = [name for name in get_args(Role) if tools or name != "ipython"]
    if not tools and (role == "ipython" or keys & set(_TOOL_KEYS)):
        found = "the role 'ipython'" if role == "ipython" else f"{min(keys & set(_TOOL_KEYS))!r}"
        raise ValueError(
            f"{where} has {found}, which needs Llama 3.1 or later: for such a model, open the "
            "tokenizer with llama31=True"
        )
    if role not in roles:
        raise ValueError(f"{where} has the role {role!r}, expected one of {', '.join(roles)}")
    if not isinstance(message["content"], str):
        raise ValueError(
            f"the content of {where} is a {type(message['content']).__name__}, expected a str"
        )
    for key, kind in _TOOL_KEYS.items():
        if key not in keys:
            continue
        if role != "assistant":
            raise ValueError(
                f"{where} has {key!r} but the role {role!r}, expected it in messages of the "
                "assistant only"
            )
        value = dict(message)[key]
        if not isinstance(value, kind):
            raise ValueError(
                f"the {key} of {where} is a {type(value).__name__}, expected a {kind.__name__}"
            )
