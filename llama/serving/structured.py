"""Structured output: only tokens that keep the answer valid under a JSON schema.

llguidance (https://github.com/guidance-ai/llguidance) compiles the schema to a grammar and finds
the tokens that may follow.
"""

import threading
import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llama.extras import needs_extra
from llama.tokenizer import AnyTokenizer

# As json.dumps writes by default, on one line: a small model that may write any whitespace can go
# on with it until the answer's limit.
_OPTIONS = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}

_lock = threading.Lock()
# llguidance's tokenizers: building one reads the whole vocabulary
_tokenizers: weakref.WeakKeyDictionary[AnyTokenizer, Any] = weakref.WeakKeyDictionary()


def _llguidance() -> ModuleType:
    with needs_extra("structured output needs llguidance", "structured"):
        import llguidance
    return llguidance


class JsonConstraint:
    """A ``llama.request.Constraint``: the answer is one JSON value, then a stop token.

    The text has the form that ``json.dumps`` writes by default: one line, spaces after ``:`` and
    ``,`` only. Its length isn't bounded, so an answer that reaches its limit isn't complete.

    Args:
        schema: a JSON schema; None: any JSON object.

    Raises:
        ImportError: llguidance isn't installed.
        ValueError: llguidance doesn't support the schema or the tokenizer.
    """

    def __init__(self, tokenizer: AnyTokenizer, schema: dict[str, Any] | None) -> None:
        llguidance = _llguidance()
        self._tokenizer = tokenizer  # llguidance's has a weak reference
        self._stop_tokens = sorted(tokenizer.stop_tokens)
        schema = {"type": "object"} if schema is None else schema
        if not isinstance(schema, dict):
            raise ValueError(f"the JSON schema is {schema!r:.100}, expected an object")
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
        except ValueError as error:  # not JSON, such as half of a surrogate pair
            raise ValueError(f"the JSON schema isn't supported: {error}") from None
        self._matcher = llguidance.LLMatcher(_ll_tokenizer(tokenizer), grammar, log_level=0)
        if self.error:
            raise ValueError(f"the JSON schema isn't supported: {self.error}")

    def __copy__(self) -> "JsonConstraint":
        """Another constraint in the same state: compiling a schema takes up to a second."""
        other = object.__new__(JsonConstraint)
        vars(other).update(vars(self), _matcher=self._matcher.deep_copy())
        return other

    @property
    def error(self) -> str | None:
        """Why the answer can't be continued, such as a limit of llguidance; None while it can.
        After an error only stop tokens are allowed: the answer ends, incomplete."""
        # the state and the grammar follow on further lines
        return self._matcher.get_error().partition("\n")[0] or None

    def mask(self, logits: Tensor) -> None:
        """Set the logits [V] of all other tokens to -inf. V may exceed the vocabulary."""
        bias = self._matcher.compute_logit_bias()  # 0 for a token that isn't allowed
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        allowed[: len(bias)] = torch.frombuffer(bytearray(bias), dtype=torch.uint8) != 0
        allowed[self._stop_tokens] = False
        allowed[self._stop_tokens] = self._matcher.is_accepting() or not allowed.any()
        logits.masked_fill_(~allowed.to(logits.device), -torch.inf)

    def accept(self, token: int) -> None:
        """Go on after this token."""
        if token not in self._stop_tokens:
            self._matcher.consume_token(token)


class _Vocabulary:
    """A tokenizer as llguidance reads it: the bytes of each token, and a function that encodes text
    where the grammar allows only one.

    Raises:
        ValueError: there is no stop token, or a byte without a token.
    """

    bos_token_id = None

    def __init__(self, tokenizer: AnyTokenizer) -> None:
        self.tokens = [tokenizer.decode_bytes(i) for i in range(tokenizer.n_words)]
        self.special_token_ids = sorted(tokenizer.control_ids)
        self.eos_token_id = min(tokenizer.stop_tokens, default=-1)
        self._byte_ids = {token: i for i, token in enumerate(self.tokens) if len(token) == 1}
        if self.eos_token_id < 0 or len(self._byte_ids) < 256:
            raise ValueError(
                f"the vocabulary has {len(tokenizer.stop_tokens)} stop tokens and tokens for "
                f"{len(self._byte_ids)} of 256 bytes: structured output needs one and all"
            )
        self._tokenizer = weakref.proxy(tokenizer)

    def __call__(self, text: str) -> list[int]:
        tokenizer: AnyTokenizer = self._tokenizer
        ids = tokenizer.encode(f"\n{text}", bos=False, eos=False)
        # a vocabulary that begins a text with a space begins the line with it
        ids = ids[len(tokenizer.encode("\n", bos=False, eos=False)) :]
        data = text.encode()
        if tokenizer.decode_bytes(ids) == data:
            return ids
        return [self._byte_ids[data[i : i + 1]] for i in range(len(data))]


def _ll_tokenizer(tokenizer: AnyTokenizer) -> Any:
    llguidance = _llguidance()
    with _lock:
        if tokenizer not in _tokenizers:
            wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokenizer))
            _tokenizers[tokenizer] = llguidance.LLTokenizer(wrapper)
        return _tokenizers[tokenizer]
