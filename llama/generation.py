"""Llama: the public API. Each call is a loop over the engine."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llama import accel
from llama.build import build_model
from llama.chat import B_INST, B_SYS, E_INST, E_SYS
from llama.chat_template import AnyChatFormat, chat_format
from llama.completions import (
    ChatPrediction,
    Completion,
    CompletionPrediction,
    complete,
    repeat,
    run,
)
from llama.dialog import Dialog, Message, Role, check_dialogs
from llama.engine import MAX_PREFILL_TOKENS, Engine
from llama.hooks import hidden_states
from llama.inspection import inspect
from llama.model import Transformer
from llama.request import Request, TokenEvent
from llama.sampling import SamplingParams, new_generator, sample, sample_top_p
from llama.score import score, score_rolling
from llama.tokenizer import AnyTokenizer

__all__ = ["ChatPrediction", "CompletionPrediction", "Llama", "TokenEvent", "sample_top_p"]
__all__ += ["B_INST", "B_SYS", "E_INST", "E_SYS", "Message", "Role"]


class Llama:
    """A model with its tokenizer.

    Attributes:
        model: the Transformer, or this rank's shard of it.
        tokenizer, formatter: the tokenizer and its chat format.
        engine: runs the requests of all calls.
        ways: the kernels in use, and the reason where a faster one is off.
    """

    @classmethod
    def build(
        cls,
        ckpt_dir: str,
        tokenizer_path: str | None = None,
        max_seq_len: int | None = 512,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quiet_ranks: bool = True,
        rope_scaling_factor: float | None = None,
        compile: bool = False,
        accelerate: bool = True,
        rank_timeout: float = 60.0,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        prefix_caching: bool = True,
        adapter: str | None = None,
        quantize: str | None = None,
    ) -> "Llama":
        """Load a folder in Meta's or Hugging Face's layout: any text-only Llama model, 2 to 3.3.

        Under torchrun each rank loads its part; the number of ranks needn't match that of shards.

        Args:
            ckpt_dir: the folder, or the id owner/name of a model on the Hugging Face hub.
            tokenizer_path: tokenizer file; default: in ``ckpt_dir`` or its parent (Llama 2).
            max_seq_len: maximum tokens of prompt plus generation; None: 2048, or a shorter context.
            max_batch_size: maximum number of sequences in a batch; further prompts wait for a slot.
            model_parallel_size: ranks per copy of the weights (default: all); copies share prompts.
            seed: seed of the sampling generator.
            device: "cuda" (under torchrun LOCAL_RANK's), "mps" or "cpu"; default: first available.
            dtype: a torch dtype or its name; default: bfloat16 if the device or the C kernels for
                CPUs support it, else float16 on CUDA, else float32.
            quiet_ranks: redirect stdout of all ranks but the first to os.devnull: one prints.
            rope_scaling_factor: overrides the checkpoint's, for Llama 3.1 and later.
            compile: torch.compile the decoding step: a minute for one sequence, again for several.
            accelerate: False (or LLAMA_ACCELERATE=0 in the environment) runs plain kernels only.
            rank_timeout: under torchrun, seconds without a heartbeat after which a rank counts as
                lost and all exit; at least 2, math.inf for none. A busy or waiting rank sends some.
            max_prefill_tokens: limit per prefill pass, and of its memory; more are split in chunks.
            prefix_caching: reuse cached keys and values of a prefix shared with an earlier prompt,
                such as a dialog's last turns. Logits agree up to rounding, not bit for bit.
            adapter: the folder of a LoRA adapter that peft saved for this model. It is merged into
                the weights while they are loaded: in float32, and rounded once to ``dtype``.
            quantize: "int8" or "int4": quantize the linear layers; default: as stored.

        Raises:
            FileNotFoundError: a file or the folder is missing.
            ImportError: the files need a package that isn't installed; the message names it.
            OSError: a download failed; the message has the remedy. PermissionError: it is gated.
            MemoryError: the model doesn't fit; the message lists sizes that would.
            ValueError: a file is damaged or doesn't match the others, or an argument is invalid;
                the message has the value found and the remedy.
            RankError: another rank has failed or is gone.
        """
        model, tokenizer = build_model(
            ckpt_dir,
            tokenizer_path,
            max_seq_len,
            max_batch_size,
            model_parallel_size,
            device=device,
            dtype=dtype,
            quiet_ranks=quiet_ranks,
            rope_scaling_factor=rope_scaling_factor,
            compile=compile,
            accelerate=accelerate,
            rank_timeout=rank_timeout,
            max_prefill_tokens=max_prefill_tokens,
            adapter=adapter,
            quantize=quantize,
        )
        return cls(
            model,
            tokenizer,
            seed=seed,
            max_prefill_tokens=max_prefill_tokens,
            prefix_caching=prefix_caching,
        )

    def __init__(
        self,
        model: Transformer,
        tokenizer: AnyTokenizer,
        *,
        seed: int = 1,
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        prefix_caching: bool = True,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.ways = accel.ways(model)
        self.formatter: AnyChatFormat = chat_format(tokenizer)
        self.engine = Engine(
            model,
            tokenizer,
            self.formatter,
            lambda *arguments: self.sample(*arguments),
            max_prefill_tokens=max_prefill_tokens,
            prefix_caching=prefix_caching,
        )
        self._generator = new_generator(seed, model.device)

    score, score_rolling, inspect = score, score_rolling, inspect

    def sample(
        self, logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None
    ) -> Tensor:
        """The next token of each row of ``logits`` [B, V]; int64 [B]. Override or reassign it to
        use another sampler."""
        return sample(logits, temperature, top_p, generator)

    def stream(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None = None,
        temperature: float = 0.6,
        top_p: float = 0.9,
        *,
        logprobs: bool = True,
        echo: bool = False,
        seed: int | None = None,
        truncate: bool = False,
        stop: Sequence[str | int] = (),
        top_logprobs: int = 0,
    ) -> Iterator[list[TokenEvent]]:
        """Generate step by step: each step yields the new token of every decoding sequence.

        A sequence ends with a stop token (which is included) or stop string, after ``max_gen_len``
        tokens, or at ``max_seq_len``; one with no room to generate yields no events. Prompts beyond
        ``max_batch_size`` join as others finish. Only one stream can run at a time: the next call
        cancels it. Calls from several threads are serialized. Under torchrun every rank gets the
        same events and must consume all of them; with several replicas, each does all of the work
        (the other calls divide it).

        Args:
            max_gen_len: defaults to ``max_seq_len - 1``; 0 generates nothing.
            temperature, top_p, stop, logprobs, top_logprobs: see ``SamplingParams``.
            echo: first yield a step with the prompts' own tokens.
            seed: seeds a new generator; default: the one seeded by ``build``. With more prompts
                than ``max_batch_size``, each gets its own generator, seeded from this one.
            truncate: drop the start of a prompt that is longer than ``max_seq_len``, except for the
                begin-of-text token, so that ``max_gen_len`` tokens fit, or half of ``max_seq_len``
                if that is less. By default, such a prompt is an error.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument is out of range; the message gives the limit and the value.
            RuntimeError: while iterating, if another generation has taken over the cache.
            RankError: while iterating, if another rank has failed or is gone.
        """
        params = SamplingParams(max_gen_len, temperature, top_p, stop, logprobs, top_logprobs, echo)
        requests = self._requests(prompt_tokens, params, truncate)
        steps = run(self.engine, "Llama.stream", requests, params, self._generator_for(seed))
        return ([event for _, event in events] for events in steps)

    def generate(
        self,
        prompt_tokens: list[list[int]],
        max_gen_len: int,
        temperature: float = 0.6,
        top_p: float = 0.9,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
        truncate: bool = False,
        stop: Sequence[str | int] = (),
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Generated ids for every prompt and, with ``logprobs``, the log-probability of each.

        Stop tokens are omitted; with ``echo`` the prompt comes first. For arguments and errors, see
        ``stream``.
        """
        params = SamplingParams(max_gen_len, temperature, top_p, stop, logprobs, echo=echo)
        rows = self._complete(prompt_tokens, params, seed, truncate)
        return [row.tokens for row in rows], [row.logprobs for row in rows] if logprobs else None

    def text_completion(
        self,
        prompts: list[str],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
        *,
        seed: int | None = None,
        truncate: bool = False,
        stop: Sequence[str | int] = (),
        top_logprobs: int = 0,
        n: int = 1,
    ) -> list[CompletionPrediction]:
        """Continue each text ``n`` times; the predictions for a prompt are adjacent.

        With ``logprobs`` or ``top_logprobs`` a prediction also has the text of each token; joined,
        these are the generation. For arguments and errors, see ``stream``.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a str, expected a list of them: write [prompt]")
        params = SamplingParams(max_gen_len, temperature, top_p, stop, logprobs, top_logprobs, echo)
        tokens = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        rows = self._generated(repeat(tokens, n), params, seed, truncate)
        return [row.prediction("".join(row.pieces), params) for row in rows]

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | None = None,
        stop: Sequence[str | int] = (),
        top_logprobs: int = 0,
        n: int = 1,
        continue_final_message: bool = False,
    ) -> list[ChatPrediction]:
        """Answer each dialog with the assistant's next message, ``n`` times.

        Args:
            continue_final_message: the dialogs end with an assistant message; generate its
                continuation (without the existing text).

        For other arguments and errors, see ``stream`` and ``ChatFormat``.
        """
        check_dialogs(dialogs)
        params = SamplingParams(max_gen_len, temperature, top_p, stop, logprobs, top_logprobs)
        tokens = [
            self.formatter.encode_dialog_prompt(
                dialog, continue_final_message=continue_final_message
            )
            for dialog in dialogs
        ]
        rows = self._generated(repeat(tokens, n), params, seed)
        return [row.prediction(row.answer(self.formatter), params) for row in rows]

    def hidden_states(self, tokens: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Hidden states [B, S, dim] of prompts ``tokens`` int64 [B, S] of equal length.

        Args:
            layers: 0 for the embedding, i for the output of the i-th layer; the last one, n_layers,
                is after the final norm (numbered like Hugging Face's ``output_hidden_states``).
                Default: all of them.

        Raises:
            ValueError: a layer is out of range, or the tokens don't fit into the cache.
        """
        return hidden_states(self.model, tokens, layers)

    def _complete(
        self,
        prompt_tokens: list[list[int]],
        params: SamplingParams,
        seed: int | None,
        truncate: bool,
    ) -> list[Completion]:
        requests = self._requests(prompt_tokens, params, truncate)
        return complete(self.engine, requests, params, self._generator_for(seed))

    def _generated(
        self,
        prompt_tokens: list[list[int]],
        params: SamplingParams,
        seed: int | None,
        truncate: bool = False,
    ) -> list[Completion]:
        """``_complete``, or the result of an overridden ``generate``."""
        if type(self).generate is Llama.generate and "generate" not in vars(self):
            return self._complete(prompt_tokens, params, seed, truncate)
        if params.top_logprobs:
            raise ValueError(
                f"top_logprobs is {params.top_logprobs}, expected 0: generate is overridden and "
                "returns none"
            )
        options: Any = {"seed": seed, "truncate": truncate or None, "stop": params.stop or None}
        limit = params.max_gen_len
        tokens, logprobs = self.generate(
            prompt_tokens,
            self.model.params.max_seq_len - 1 if limit is None else limit,
            params.temperature,
            params.top_p,
            params.logprobs,
            params.echo,
            **{name: value for name, value in options.items() if value is not None},
        )
        completions = []
        for i, request in enumerate(self._requests(prompt_tokens, params, truncate)):
            scores = logprobs[i] if logprobs else []
            completions.append(Completion.of_tokens(tokens[i], scores, request))
        return completions

    def _requests(
        self, prompt_tokens: Sequence[Sequence[int]], params: SamplingParams, truncate: bool
    ) -> list[Request]:
        return [
            self.engine.request(tokens, params, row, truncate=truncate)
            for row, tokens in enumerate(prompt_tokens)
        ]

    def _generator_for(self, seed: int | None) -> torch.Generator:
        return self._generator if seed is None else new_generator(seed, self.model.device)
