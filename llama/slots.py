"""Slots of the KV cache: the request in each, and the tokens whose keys and values it holds."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from llama.hooks import fingerprint
from llama.model import Transformer
from llama.request import Request

# Shorter common prefixes aren't worth a copy.
_MIN_SHARED_PREFIX = 8


class Slots:
    """One engine's bookkeeping of a model's KV cache.

    Attributes:
        cached: the tokens cached in each slot. The positions after them are undefined.
        occupants: the request in each slot; None if it is free.
    """

    def __init__(self, model: Transformer, *, prefix_caching: bool) -> None:
        n_slots = model.params.max_batch_size
        self._model, self._prefix_caching = model, prefix_caching
        self.cached: list[list[int]] = [[] for _ in range(n_slots)]
        self.occupants: list[Request | None] = [None] * n_slots
        self._last_used = [0] * n_slots
        self._clock = 0
        self._fingerprint: int | None = None
        self._caches, self._written = model.cache, 0

    @property
    def n_free(self) -> int:
        return self.occupants.count(None)

    def place(self, request: Request, earlier: Iterable[Request]) -> bool:
        """Give a request a free slot: the one that holds nothing but the longest cached prefix of
        its prompt, else the least recently used one with a copy of that prefix.

        Returns:
            False if one of the ``earlier`` requests is about to compute a longer common prefix.
        """
        prompt = request.prompt
        n_reusable = request.n_unscored if self._reuses else 0
        shared = [min(n_reusable, common_prefix_length(c, prompt)) for c in self.cached]
        source = max(range(len(shared)), key=lambda i: (shared[i], self.occupants[i] is None))
        n = shared[source]
        for other in earlier:
            soon = min(n_reusable, common_prefix_length(other.prompt, prompt))
            if other.slot is not None and soon >= n + _MIN_SHARED_PREFIX:
                return False
        n = n if n >= _MIN_SHARED_PREFIX else 0
        free = [slot for slot, occupant in enumerate(self.occupants) if occupant is None]
        slot = min(free, key=lambda i: self._last_used[i])
        if n and source in free and len(self.cached[source]) == n:
            slot = source  # the request extends it
        if slot != source:
            self.cached[slot] = []  # until the copy is complete: it may be interrupted
            for cache in self._caches if n else []:
                cache.copy(source, slot, n)
        self.cached[slot] = prompt[:n]
        self.occupants[slot], request.slot = request, slot
        self._clock += 1
        request.n_prefilled = request.n_reused = n
        return True

    def release(self, slot: int) -> None:
        """Free a slot. Its content is kept for reuse, unless the model has changed since."""
        request = self.occupants[slot]
        assert request is not None
        self.occupants[slot] = request.slot = None
        self._last_used[slot] = self._clock
        # never the last position: the padding rows of a captured step write to it
        self.cached[slot] = self.cached[slot][: self._model.params.max_seq_len - 1]
        if not self._reuses or fingerprint(self._model) != self._fingerprint:
            self.cached[slot] = []

    def swap(self, a: int, b: int) -> None:
        """Exchange two slots, content and occupants."""
        if a == b:
            return
        cached_a, cached_b = self.cached[a], self.cached[b]
        self.cached[a], self.cached[b] = [], []  # until it completes: it may be interrupted
        for cache in self._caches:
            cache.swap(a, b, len(cached_a), len(cached_b))
        self.cached[a], self.cached[b] = cached_b, cached_a
        used, occupants = self._last_used, self.occupants
        used[a], used[b] = used[b], used[a]
        occupants[a], occupants[b] = occupants[b], occupants[a]
        for slot in (a, b):
            if (occupant := occupants[slot]) is not None:
                occupant.slot = slot
        self.count_writes()

    def count_writes(self) -> bool:
        """Whether the cache has been written to since the last call. After the engine's own writes
        it is called too, so that the others are found: of blocks that are called directly, or
        through ``cache_k``."""
        before, self._written = self._written, sum([cache.n_writes for cache in self._caches])
        return before != self._written

    def forget(self) -> None:
        """Drop all cached prefixes."""
        self.cached = [[] for _ in self.cached]

    def forget_if_model_changed(self) -> None:
        self._caches = self._model.cache
        before, self._fingerprint = self._fingerprint, fingerprint(self._model)
        if before != self._fingerprint:
            self.forget()

    @property
    def _reuses(self) -> bool:
        return self._prefix_caching and self._fingerprint is not None


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    n = min(len(a), len(b))
    return bisect_left(range(n), True, key=lambda i: a[: i + 1] != b[: i + 1])
