"""The intermediate results of a pass, layer by layer: ``Llama.inspect``."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llama.cache import Batch, KVCache
from llama.hooks import hidden_states
from llama.request import check_vocabulary, token_ids


@dataclasses.dataclass(frozen=True)
class Inspection:
    """The intermediate results of one pass over S tokens, on the model's device.

    Attributes:
        tokens: the S ids.
        texts: the text of each.
        hidden_states: [n_layers + 1, S, dim]: the embedding, then each layer's output; the last
            after the final norm.
        attentions: float32 [n_layers, n_heads, S, S], the weights of each query (third axis) over
            the keys.
        logits: float32 [S, vocab_size].
    """

    tokens: list[int]
    texts: list[str]
    hidden_states: Tensor
    attentions: Tensor
    logits: Tensor
    _lens: Callable[[Tensor], Tensor] = dataclasses.field(repr=False)

    def logit_lens(self) -> Tensor:
        """Float32 logits [n_layers + 1, S, vocab_size] of every hidden state, as if the layers
        after it did nothing (nostalgebraist, "interpreting GPT: the logit lens", 2020)."""
        return torch.cat([self._lens(self.hidden_states[:-1]), self.logits[None]])


@torch.no_grad()
def inspect(llm: Any, text: str | Sequence[int]) -> Inspection:
    """Hidden states, attention weights and logits of a text, or of ids, in one pass.

    Texts get a begin-of-text token. The attention weights take n_layers * n_heads * S * S floats.

    Raises:
        TypeError: it is neither a text nor a list of ids.
        ValueError: there are no tokens, or more than max_seq_len, or one is outside the vocabulary.
    """
    model, tokenizer = llm.model, llm.tokenizer
    if isinstance(text, str):
        ids = tokenizer.encode(text, bos=True, eos=False)
    else:
        ids = token_ids(text, 0)
    check_vocabulary(ids, 0, model.params.vocab_size)
    if not ids:
        raise ValueError("there are no tokens to inspect, expected at least one")
    layers = [block.attention for block in model.layers]
    attentions: list[Tensor] = []

    def recording(
        attend: Callable[[Tensor, KVCache, Batch], Tensor],
    ) -> Callable[[Tensor, KVCache, Batch], Tensor]:
        def run(q: Tensor, cache: KVCache, batch: Batch) -> Tensor:
            attentions.append(_weights(q, cache.k[0, :, : len(ids)]))
            return attend(q, cache, batch)

        return run

    with model.lock:
        before = [vars(layer).get("attend") for layer in layers]
        try:
            for layer in layers:
                layer.attend = recording(layer.attend)
            states = hidden_states(model, torch.tensor([ids], device=model.device))
        finally:
            for layer, attend in zip(layers, before, strict=True):
                if attend is None:
                    vars(layer).pop("attend", None)
                else:
                    layer.attend = attend
    # heads are split over ranks
    heads = [model.groups.all_gather_last_dim(x.permute(1, 2, 0)) for x in attentions]
    return Inspection(
        tokens=ids,
        texts=[tokenizer.decode([token]) for token in ids],
        hidden_states=torch.cat(states),
        attentions=torch.stack(heads).permute(0, 3, 1, 2),
        logits=model.logits(states[-1])[0],
        _lens=torch.no_grad()(lambda h: model.logits(model.norm(h))),
    )


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """[H, S, S] of queries [S, H, D] and keys [K, S, D]."""
    n_tokens, n_heads, head_dim = q.shape
    keys = k.float().repeat_interleave(n_heads // len(k), dim=0)  # [H, S, D]
    scores = q.float().transpose(0, 1) @ keys.transpose(1, 2) / math.sqrt(head_dim)
    future = torch.ones(n_tokens, n_tokens, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1)
