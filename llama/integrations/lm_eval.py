"""lm-evaluation-harness on this library: ``python -m llama eval``.

The harness builds the requests and computes the metrics. Here they are encoded, scored
(``Llama.score``) and continued (``Llama.generate``) as its own ``hf`` model does.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from llama.chat_template import TemplateChatFormat
from llama.generation import Llama

_MAX_GEN_TOKENS = 256  # the harness's default
_PAIRS = 256  # scored together, between two updates of the progress bar
_NEUTRAL = {"num_beams": 1, "top_k": 0, "repetition_penalty": 1}  # options that change nothing
TEMPLATES = ("meta", "folder")


class LlamaLM(TemplateLM):
    """A harness model.

    The harness sees one process, so that every rank builds the same requests; replicas divide them
    in ``score`` and ``generate``.

    Args:
        template: of dialogs: "meta" for the model family's format, "folder" for the folder's
            chat template, which may add a date (Llama 3.1).

    Raises:
        ValueError: the folder has no chat template.
    """

    backend = "causal"

    def __init__(self, llm: Llama, template: str = "meta", *, progress: bool = True) -> None:
        super().__init__()
        self.llm, self._progress = llm, progress
        self._formatter: Any = llm.formatter
        if template not in TEMPLATES:
            raise ValueError(f"template is {template!r}, expected one of {', '.join(TEMPLATES)}")
        if template == "folder":
            text = llm.tokenizer.chat_template
            if text is None:
                raise ValueError("the folder has no chat template: use template 'meta'")
            self._formatter = TemplateChatFormat(llm.tokenizer, text)
        self._template = template
        self._names = {i: name for name, i in llm.tokenizer.special_tokens.items()}

    @property
    def eot_token_id(self) -> int:
        return int(self.llm.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        return int(self.llm.tokenizer.bos_id)

    @property
    def max_length(self) -> int:
        return self.llm.model.params.max_seq_len

    @property
    def max_gen_toks(self) -> int:
        return _MAX_GEN_TOKENS

    @property
    def tokenizer_name(self) -> str:
        return f"llama-{self._template}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name that the harness records; ``apply_chat_template`` has the format."""
        return self._template if chat_template else None

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Ids after a begin-of-text token, unless the text has one or it isn't wanted. Names of
        special tokens become their ids, as with transformers: texts of dialogs have them."""
        tokenizer: Any = self.llm.tokenizer
        ids: list[int] = tokenizer.encode(string, bos=False, eos=False, allowed_special="all")
        is_wanted = add_special_tokens is not False and ids[:1] != [tokenizer.bos_id]
        return [tokenizer.bos_id, *ids] if is_wanted else ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a dialog, which ``tok_encode`` encodes to the format's ids."""
        ids = self._formatter.encode_dialog_prompt(
            chat_history, continue_final_message=not add_generation_prompt
        )
        text = ""
        run: list[int] = []
        for token in ids:
            if token in self._names:
                text += self.llm.tokenizer.decode(run) + self._names[token]
                run = []
            else:
                run.append(token)
        return text + self.llm.tokenizer.decode(run)

    # --- Requests -------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Encodes the requests, for ``_loglikelihood_tokens``."""
        return super().loglikelihood(requests, disable_tqdm or not self._progress)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: object,
    ) -> list[tuple[float, bool]]:
        """Contexts that are too long lose their start, as in the harness's own models."""
        pairs = []
        for i, (_texts, context, continuation) in enumerate(requests):
            room = self.max_length + 1 - len(continuation)
            if room < 1:
                raise ValueError(
                    f"continuation {i} has {len(continuation)} tokens, but max_seq_len is "
                    f"{self.max_length}"
                )
            pairs.append((context[-room:], continuation))
        order = sorted(range(len(pairs)), key=lambda i: pairs[i])  # so that neighbours share most
        results: list[Any] = [None] * len(pairs)
        for some in self._chunks(order, "log-likelihoods", disable_tqdm):
            for i, score in zip(some, self.llm.score([pairs[i] for i in some]), strict=True):
                results[i] = score.total, score.is_greedy
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        texts = [text for (text,) in (request.args for request in requests)]
        totals = []
        every = list(range(len(texts)))
        for [i] in self._chunks(every, "rolling log-likelihoods", disable_tqdm, 1):
            text = texts[i]
            [score] = self.llm.score_rolling([self.tok_encode(text)])
            totals.append(score.total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score.total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        arguments = [request.args for request in requests]
        groups: dict[str, list[int]] = defaultdict(list)
        for i, (_context, options) in enumerate(arguments):
            groups[json.dumps(options, sort_keys=True)].append(i)
        results: list[str] = [""] * len(arguments)
        for indices in groups.values():
            options = self._options(arguments[indices[0]][1])
            room = self.max_length - options["max_gen_len"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks is {options['max_gen_len']}, but max_seq_len is "
                    f"{self.max_length}: lower it with --gen_kwargs, or raise max_seq_len"
                )
            size = 8 * self.llm.model.params.max_batch_size
            indices.sort(key=lambda i: arguments[i][0])  # equal beginnings are computed once
            for some in self._chunks(indices, "generations", disable_tqdm, size):
                prompts = [self.tok_encode(arguments[i][0])[-room:] for i in some]
                rows, _ = self.llm.generate(prompts, **options)
                for i, row in zip(some, rows, strict=True):
                    text = self.llm.tokenizer.decode(row)
                    results[i] = postprocess_generated_text(text, options["stop"], None)
                    self.cache_hook.add_partial("generate_until", arguments[i], results[i])
        return results

    def _options(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of ``Llama.generate``.

        Raises:
            ValueError: one has no counterpart.
        """
        options = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stop = [text for text in options.pop("until", []) if text]
        does_sample = options.pop("do_sample", False)
        temperature = float(options.pop("temperature", 1.0)) if does_sample else 0.0
        found = {
            "max_gen_len": options.pop("max_gen_toks"),
            "temperature": temperature,
            "top_p": float(options.pop("top_p", 1.0)),
            "stop": stop,
        }
        options.pop("temperature", None)
        options = {name: x for name, x in options.items() if x != _NEUTRAL.get(name)}
        if options:
            raise ValueError(
                f"generation_kwargs has {', '.join(sorted(options))}, expected until, "
                "max_gen_toks, do_sample, temperature and top_p"
            )
        return found

    def _chunks(
        self, indices: list[int], what: str, disable: bool, size: int = _PAIRS
    ) -> Iterator[list[int]]:
        """Parts of ``indices``, with a progress bar."""
        hidden = disable or not self._progress
        with tqdm(total=len(indices), desc=what, disable=hidden) as bar:
            for start in range(0, len(indices), size):
                some = indices[start : start + size]
                yield some
                bar.update(len(some))
