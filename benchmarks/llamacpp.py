"""llama.cpp's C interface, through ctypes.

The library is the one inside PyPI's ``xllamacpp``, or the ``libllama.so`` that the environment
variable LLAMACPP_LIBRARY names. The structures below are those of llama.h from build 11000 on; that
they fit is checked by the default values that the library writes into them.
"""

import ctypes
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LIBRARY = "LLAMACPP_LIBRARY"


class _ContextParams(ctypes.Structure):
    """The first fields, and room for the others, which keep their defaults: a structure of this
    size is passed in memory, and the library reads as much of it as it knows."""

    _fields_ = (
        ("n_ctx", ctypes.c_uint32),
        ("n_batch", ctypes.c_uint32),
        ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32),
        ("n_rs_seq", ctypes.c_uint32),
        ("n_outputs_max", ctypes.c_uint32),
        ("n_outputs_max_per_seq", ctypes.c_uint32),
        ("n_threads", ctypes.c_int32),
        ("n_threads_batch", ctypes.c_int32),
        ("ctx_type", ctypes.c_int),
        ("rope_scaling_type", ctypes.c_int),
        ("pooling_type", ctypes.c_int),
        ("attention_type", ctypes.c_int),
        ("flash_attn_type", ctypes.c_int),
        ("rope_and_yarn", ctypes.c_uint32 * 8),
        ("callback", ctypes.c_void_p * 2),
        ("type_k", ctypes.c_int),
        ("type_v", ctypes.c_int),
        ("others", ctypes.c_uint64 * 64),
    )


_DEFAULTS = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0}
_DEFAULTS |= {"n_outputs_max": 0, "n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4}
_DEFAULTS |= {"flash_attn_type": -1, "type_k": 1, "type_v": 1}  # automatic, float16


class _ModelParams(ctypes.Structure):
    _fields_ = (("all", ctypes.c_uint64 * 64),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_version": (ctypes.c_char_p, []),
    "llama_print_system_info": (ctypes.c_char_p, []),
    "llama_log_set": (None, [_LOG, ctypes.c_void_p]),
    "llama_model_default_params": (_ModelParams, []),
    "llama_context_default_params": (_ContextParams, []),
    "llama_model_load_from_file": (ctypes.c_void_p, [ctypes.c_char_p, _ModelParams]),
    "llama_model_get_vocab": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_model_size": (ctypes.c_uint64, [ctypes.c_void_p]),
    "llama_vocab_n_tokens": (ctypes.c_int32, [ctypes.c_void_p]),
    "llama_init_from_model": (ctypes.c_void_p, [ctypes.c_void_p, _ContextParams]),
    "llama_get_memory": (ctypes.c_void_p, [ctypes.c_void_p]),
    "llama_memory_clear": (None, [ctypes.c_void_p, ctypes.c_bool]),
    "llama_decode": (ctypes.c_int32, [ctypes.c_void_p, _Batch]),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [ctypes.c_void_p]),
    "llama_free": (None, [ctypes.c_void_p]),
    "llama_model_free": (None, [ctypes.c_void_p]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
}
_errors: list[str] = []


@_LOG
def _log(level: int, text: bytes, _: object) -> None:
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        _errors.append(text.decode(errors="replace").strip())


def find_library() -> Path | None:
    """The file of the library; None if there isn't one.

    Raises:
        FileNotFoundError: LLAMACPP_LIBRARY isn't a file.
    """
    if named := os.environ.get(LIBRARY):
        if not Path(named).is_file():
            raise FileNotFoundError(f"{LIBRARY} is {named!r}, expected a libllama.so")
        return Path(named)
    spec = importlib.util.find_spec("xllamacpp")
    places = spec.submodule_search_locations if spec else None
    return next(Path(places[0]).glob("xllamacpp*.so"), None) if places else None


@functools.cache
def library() -> Any:
    """The loaded library.

    Raises:
        FileNotFoundError: there isn't one.
        RuntimeError: it has another interface.
    """
    path = find_library()
    if path is None:
        raise FileNotFoundError(
            f"llama.cpp isn't installed: pip install xllamacpp, or name a libllama.so in {LIBRARY}"
        )
    lib = ctypes.CDLL(str(path))
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(lib, name)
        except AttributeError:
            raise RuntimeError(f"{str(path)!r} doesn't have {name}: use another version") from None
        function.restype, function.argtypes = result, arguments
    params = lib.llama_context_default_params()
    if found := {k: getattr(params, k) for k, v in _DEFAULTS.items() if getattr(params, k) != v}:
        raise RuntimeError(
            f"{str(path)!r} has other llama_context_params: by default they contain {found}, "
            f"expected {_DEFAULTS}: use another version"
        )
    lib.llama_log_set(_log, None)
    return lib


def description() -> str | None:
    """Version, and the instructions that the library was compiled for; None if there isn't one."""
    if find_library() is None:
        return None
    lib = library()
    return f"{lib.llama_version().decode()}: {lib.llama_print_system_info().decode().strip(' |')}"


def quantized(weight: NDArray[np.float32], ggml_type: int, n_bytes: int) -> NDArray[np.uint8]:
    """Rows of ``weight`` [N, K] in one of ggml's types, as llama-quantize writes them.

    Args:
        n_bytes: of the result.
    """
    data = np.empty(n_bytes, dtype=np.uint8)
    weight = np.ascontiguousarray(weight)
    written = library().ggml_quantize_chunk(
        ggml_type, weight.ctypes.data, data.ctypes.data, 0, *weight.shape, None
    )
    if written != n_bytes:
        raise RuntimeError(f"ggml wrote {written} bytes of type {ggml_type}, expected {n_bytes}")
    return data


class Model:
    """A GGUF file with a cache of ``n_rows`` sequences of at most ``max_seq_len`` tokens, in the
    default configuration: float16 cache, flash attention, repacked weights, 512 tokens per pass.

    Args:
        max_outputs: tokens of a sequence that ``forward`` gives logits of in one call.
        float32_attention: keep keys and values in float32; flash attention, which rounds them to
            float16, is off then.

    Raises:
        RuntimeError: the file can't be loaded.
    """

    def __init__(
        self,
        file: Path,
        n_rows: int,
        max_seq_len: int,
        n_threads: int,
        *,
        max_outputs: int = 1,
        float32_attention: bool = False,
    ) -> None:
        self.lib = library()
        _errors.clear()
        self.model = self.lib.llama_model_load_from_file(
            str(file).encode(), self.lib.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp can't load {str(file)!r}: {'; '.join(_errors)}")
        params = self.lib.llama_context_default_params()
        params.n_ctx = params.n_batch = n_rows * max_seq_len
        params.n_seq_max, params.n_outputs_max_per_seq = n_rows, max_outputs
        if float32_attention:
            params.type_k = params.type_v = params.flash_attn_type = 0
        params.n_threads = params.n_threads_batch = n_threads
        self.context = self.lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp has no context for {str(file)!r}: {'; '.join(_errors)}")
        self.vocab_size: int = self.lib.llama_vocab_n_tokens(
            self.lib.llama_model_get_vocab(self.model)
        )
        self.weight_bytes: int = self.lib.llama_model_size(self.model)

    def forward(
        self, tokens: list[int], positions: list[int], rows: list[int], outputs: list[bool]
    ) -> NDArray[np.float32]:
        """One llama_decode call.

        Args:
            rows: the sequence of each token.
            outputs: which tokens need logits.

        Returns:
            [sum(outputs), vocab_size] in the order of the tokens; overwritten by the next call.
        """
        n = len(tokens)
        seq_ids = (ctypes.c_int32 * n)(*rows)
        first = ctypes.addressof(seq_ids)
        arrays = (
            (ctypes.c_int32 * n)(*tokens),
            (ctypes.c_int32 * n)(*positions),
            (ctypes.c_int32 * n)(*[1] * n),
            (ctypes.c_void_p * n)(*range(first, first + 4 * n, 4)),
            (ctypes.c_int8 * n)(*outputs),
        )
        token, pos, n_seq_id, seq_id, logits = [ctypes.addressof(array) for array in arrays]
        batch = _Batch(n, token, None, pos, n_seq_id, seq_id, logits)
        status = self.lib.llama_decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode of {n} tokens returned {status}: {_errors[-1:]}")
        shape = (sum(outputs), self.vocab_size)
        return np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), shape)

    def clear(self) -> None:
        """Forget all tokens."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def close(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)
