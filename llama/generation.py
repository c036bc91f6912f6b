"""Llama: build a model from files, generate from it. Everything folds over ``Llama.stream``."""

import codecs
import contextlib
import dataclasses
import itertools
import math
import numbers
import operator
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from llama import checkpoint, fast, memory, parallel
from llama.llama2 import Llama2ChatFormat, SentencePieceTokenizer, chat_format, open_tokenizer
from llama.model import ModelArgs, Places, Span, Transformer
from llama.sampling import next_tokens, sample_top_p
from llama.tokenizer import ChatFormat, Dialog, Message, Tokenizer
from llama.watch import MIN_TIMEOUT

__all__ = [
    "ChatPrediction",
    "CompletionPrediction",
    "Llama",
    "TokenEvent",
    "sample_top_p",
]

# MKL picks its kernels for exp and log at the first call of each, and threads that make that call
# together can get one with half the digits (pytorch/pytorch#188792: some log-probabilities were off
# by 3e-5 in one of a hundred processes). A single number is a single thread's.
torch.logsumexp(torch.zeros(1, device="cpu"), dim=0)

# Float32 logits computed at once when a whole prompt is scored: 128 MiB of them.
_LOGITS_CHUNK = 2**25
# Below it, logits / temperature would overflow float32.
_MIN_TEMPERATURE = 1e-30


class CompletionPrediction(TypedDict, total=False):
    generation: str
    tokens: list[str]  # with logprobs=True
    logprobs: list[float]  # with logprobs=True


class ChatPrediction(TypedDict, total=False):
    generation: Message
    tokens: list[str]  # with logprobs=True
    logprobs: list[float]  # with logprobs=True


class TokenEvent(NamedTuple):
    """One token of one row.

    Attributes:
        row: index of the prompt.
        token: its id.
        text: what it adds to the row's text. A character that is spread over several tokens comes
            with the last of them, so a piece may be empty.
        logprob: natural logarithm of its probability under the model (before temperature and
            top_p); None if ``logprobs`` was False. 0.0 for a prompt's first token.
        finish_reason: "stop" for a stop token, "length" for the last token that was allowed, else
            None.
    """

    row: int
    token: int
    text: str
    logprob: float | None
    finish_reason: Literal["stop", "length"] | None


@dataclasses.dataclass
class _Generated:
    """What one row's events add up to; the stop token stands apart."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    pieces: list[str] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    stop_token: int | None = None

    def add(self, event: TokenEvent) -> None:
        if event.finish_reason == "stop":
            self.stop_token = event.token
            if event.text:  # bytes that were left waiting for the rest of a character
                self.pieces[-1] += event.text
            return
        self.tokens.append(event.token)
        self.pieces.append(event.text)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)


class Llama:
    """A model with its tokenizer.

    Attributes:
        model: the Transformer, or this rank's part of it.
        tokenizer, formatter: the Tokenizer and its ChatFormat.
    """

    @staticmethod
    def build(
        ckpt_dir: str,
        tokenizer_path: str | None = None,
        max_seq_len: int = 512,
        max_batch_size: int = 4,
        model_parallel_size: int | None = None,
        seed: int = 1,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        quiet_ranks: bool = True,
        rope_scaling_factor: float | None = None,
        compile: bool = False,
        rank_timeout: float = 60.0,
    ) -> "Llama":
        """Load a checkpoint folder, Meta's or Hugging Face's, of any text Llama from 2 to 3.3.

        Under torchrun each rank loads its part, however many shards there are.

        Args:
            tokenizer_path: default the tokenizer in ``ckpt_dir``, or in its parent (Llama 2).
            max_seq_len: longest prompt and generation together, in tokens.
            max_batch_size: rows that run together; more prompts run one batch after the other.
            model_parallel_size: ranks that share one copy of the weights; default all processes.
                With fewer there are several copies, and prompts are divided over them.
            seed: of the generator that sampling draws from.
            device: default "cuda" where there is one, else "mps", else "cpu". Under torchrun a
                rank's CUDA device is LOCAL_RANK's.
            dtype: a torch dtype or its name; default bfloat16 where the device computes in it, else
                float16 on CUDA, else float32.
            quiet_ranks: send the stdout of every rank but the first to the null device, so that
                scripts print once.
            rope_scaling_factor: instead of the checkpoint's own, for Llama 3.1 and later.
            compile: run the decoding step through torch.compile. It takes up to a minute at the
                first step with one row, and again with more than one.
            rank_timeout: under torchrun, seconds after which all ranks end because one has given no
                sign of life: it is stopped or hangs; at least 2. Loading, computing and waiting for
                a user give signs of life, however long they take; math.inf waits for ever.

        Raises:
            FileNotFoundError: a file or the folder is missing.
            ImportError: the files need a package that is not installed; the message names it.
            MemoryError: it will not fit; the message says what would.
            ValueError: a file is damaged or does not go with the others, or an argument is
                impossible; the message says what was found and what to do.
            RankError: another rank has failed or is gone.
        """
        start = time.time()
        torch_device = resolve_device(device)
        torch_dtype = default_dtype(torch_device) if dtype is None else dtype_of(dtype)
        if not rank_timeout >= MIN_TIMEOUT:
            raise ValueError(
                f"rank_timeout is {rank_timeout}, expected at least {MIN_TIMEOUT:g} seconds: with "
                "less, a busy machine ends healthy ranks"
            )
        parallel.initialize(torch_device, model_parallel_size, rank_timeout)
        groups = parallel.current_groups()
        n_ranks, rank = groups.size, groups.rank
        first_process = not dist.is_initialized() or dist.get_rank() == 0
        if quiet_ranks and not first_process and getattr(sys.stdout, "name", None) != os.devnull:
            # open as long as the process; whatever the first rank can print must be no error here
            sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115
        with parallel.failing_together():
            found = checkpoint.find(ckpt_dir)
            tokenizer = open_tokenizer(
                tokenizer_path or str(found.tokenizer_path), llama31=found.is_llama31
            )
            tokenizer.stop_tokens |= found.stop_tokens
            args = found.args(tokenizer.n_words, max_seq_len, max_batch_size, rope_scaling_factor)
            _check_ranks(n_ranks, args, found)
            needed = memory.plan(args, n_ranks, torch_dtype, torch_device, tied=found.tied)
            free = memory.free_bytes(torch_device, parallel.n_local_processes())
            memory.check(needed, free, torch_device)
            with torch.device("meta"):
                model = Transformer(args)
        chosen = {"dtype": torch_dtype, "device": torch_device.type, "compile": compile}
        parallel.agree("Llama.build", dataclasses.asdict(args) | chosen)
        with parallel.failing_together(), memory.explained(needed):
            tensors = checkpoint.load(
                found,
                args,
                n_ranks,
                rank,
                dtype=torch_dtype,
                device=torch_device,
                progress=first_process,
            )
            model.load_state_dict(tensors, assign=True)
            llm = Llama(model, tokenizer, seed=seed, compile=compile)
        if first_process:
            print(f"Loaded in {time.time() - start:.2f} seconds")
        return llm

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | SentencePieceTokenizer,
        *,
        seed: int = 1,
        compile: bool = False,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.formatter: ChatFormat | Llama2ChatFormat = chat_format(tokenizer)
        self._device = model.output.weight.device
        self._generator = _new_generator(seed, self._device)
        self._step = fast.accelerate(model, compile=compile)

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
    ) -> Iterator[list[TokenEvent]]:
        """Generate step by step: each step gives the new token of every row that still runs.

        A row ends with a stop token (which is given), after ``max_gen_len`` tokens, or when
        ``max_seq_len`` is reached; one that may not generate at all has no event. Prompts beyond
        ``max_batch_size`` follow when those before them have ended. The key/value cache is the
        model's, so only one stream can run at a time; the other calls wait for each other where
        several threads make them. Under torchrun every rank gets the same events and must take all
        of them; with several copies of the weights each does all of the work (the other calls
        divide it).

        Args:
            max_gen_len: default ``max_seq_len - 1``; 0 generates nothing.
            temperature: divides the logits; 0 takes the likeliest token.
            top_p: see ``sample_top_p``.
            logprobs: compute log-probabilities (of a whole prompt too, with ``echo``).
            echo: give the prompts' own tokens as a step of their own before the others.
            seed: draw from a new generator; default the one that was seeded by ``build``.
            truncate: of a prompt that is longer than ``max_seq_len``, leave out what follows the
                begin-of-text token, until the rest leaves room for ``max_gen_len`` tokens, or for
                half of ``max_seq_len`` if that is less. By default it is an error.

        Raises:
            TypeError: an argument is of another type.
            ValueError: an argument is out of its range; the message gives the limit and the value.
            RuntimeError: while iterating, if another generation has taken the cache since.
            RankError: while iterating, if another rank has failed or is gone.
        """
        prompts, max_gen_len = self._checked(
            prompt_tokens, max_gen_len, temperature, top_p, truncate
        )
        generator = self._generator
        if seed is not None:
            generator = _new_generator(seed, self._device)
        model = self.model
        output, embedding = model.output.weight, model.tok_embeddings.weight
        planned = memory.plan(
            model.params,
            model.groups.size,
            output.dtype,
            output.device,
            tied=output.data_ptr() == embedding.data_ptr(),
        )
        call = model.groups.one_call(
            "Llama.stream",
            prompt_tokens=prompts,
            max_gen_len=max_gen_len,
            temperature=float(temperature),
            top_p=float(top_p),
            logprobs=logprobs,
            echo=echo,
        )

        def steps() -> Iterator[list[TokenEvent]]:
            batch_size = model.params.max_batch_size
            with call, memory.explained(planned):
                for first in range(0, len(prompts), batch_size):
                    batch = prompts[first : first + batch_size]
                    yield from self._run(
                        batch, first, max_gen_len, temperature, top_p, logprobs, echo, generator
                    )

        return steps()

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
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Generated ids of every prompt, and with ``logprobs`` a log-probability for each.

        The stop token is left out; the prompt comes first with ``echo``. Arguments and errors are
        ``stream``'s.
        """
        rows = self._complete(
            prompt_tokens,
            max_gen_len,
            temperature,
            top_p,
            logprobs,
            echo=echo,
            seed=seed,
            truncate=truncate,
        )
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
    ) -> list[CompletionPrediction]:
        """Continue each text.

        With ``logprobs`` a prediction also holds a piece of text and a log-probability for each
        token; the pieces join to the generation. Arguments and errors are ``stream``'s.
        """
        if isinstance(prompts, str):
            raise TypeError("prompts is a str, expected a list of them: write [prompt]")
        prompt_tokens = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
        rows = self._complete(
            prompt_tokens,
            max_gen_len,
            temperature,
            top_p,
            logprobs,
            echo=echo,
            seed=seed,
            truncate=truncate,
        )
        predictions = []
        for row in rows:
            prediction = CompletionPrediction(generation="".join(row.pieces))
            if logprobs:
                prediction |= {"tokens": row.pieces, "logprobs": row.logprobs}
            predictions.append(prediction)
        return predictions

    def chat_completion(
        self,
        dialogs: list[Dialog],
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        *,
        seed: int | None = None,
    ) -> list[ChatPrediction]:
        """Answer each dialog with the assistant's next message.

        Arguments and errors are ``stream``'s and ``ChatFormat``'s.
        """
        prompt_tokens = [self.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
        rows = self._complete(prompt_tokens, max_gen_len, temperature, top_p, logprobs, seed=seed)
        predictions = []
        for row in rows:
            prediction = ChatPrediction(generation=self._answer(row))
            if logprobs:
                prediction |= {"tokens": row.pieces, "logprobs": row.logprobs}
            predictions.append(prediction)
        return predictions

    def _answer(self, row: _Generated) -> Message:
        """The assistant's message; ``row.pieces`` become the pieces of its text."""
        message = Message(role="assistant", content="".join(row.pieces))
        tool_call = self.formatter.tool_call_id
        if tool_call is not None and tool_call in row.tokens:
            at = row.tokens.index(tool_call)
            row.pieces[at] = row.pieces[at].removesuffix(self.tokenizer.decode([tool_call]))
            message["content"] = "".join(row.pieces[: at + 1])
            message["tool_call"] = "".join(row.pieces[at + 1 :])
        if row.stop_token is not None and row.stop_token == self.formatter.eom_id:
            message["eom"] = True
        return message

    def _complete(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        logprobs: bool,
        *,
        echo: bool = False,
        seed: int | None,
        truncate: bool = False,
    ) -> list[_Generated]:
        """The prompts' rows. They are divided over the copies of the weights, if there are several,
        and put together again on every rank."""
        prompts, max_gen_len = self._checked(
            prompt_tokens, max_gen_len, temperature, top_p, truncate
        )
        groups = self.model.groups
        n_replicas, replica = groups.n_replicas, groups.replica
        if n_replicas > 1:  # with one seed, equal prompts would get equal samples everywhere
            if seed is None:
                draw = torch.empty((), dtype=torch.int64, device=self._device)
                seed = int(draw.random_(generator=self._generator))
            _new_generator(seed, self._device)  # a seed out of range is an error here too
            seed = (seed + replica) % 2**64
            parallel.agree("Llama.generate", {"prompt_tokens": prompts})
        share = prompts[replica::n_replicas]
        rows = [_Generated() for _ in share]
        together = parallel.failing_together() if n_replicas > 1 else contextlib.nullcontext()
        with self.model.lock, together:
            for events in self.stream(
                share, max_gen_len, temperature, top_p, logprobs=logprobs, echo=echo, seed=seed
            ):
                for event in events:
                    rows[event.row].add(event)
        if n_replicas == 1:
            return rows
        every_row: list[_Generated] = [_Generated()] * len(prompts)
        for i, part in enumerate(groups.gather_from_replicas(list(map(dataclasses.asdict, rows)))):
            every_row[i::n_replicas] = [_Generated(**row) for row in part]
        return every_row

    @torch.inference_mode()
    def _run(
        self,
        prompts: list[list[int]],
        first: int,
        max_gen_len: int,
        temperature: float,
        top_p: float,
        logprobs: bool,
        echo: bool,
        generator: torch.Generator,
    ) -> Iterator[list[TokenEvent]]:
        """The steps of one batch; its rows count from ``first``."""
        max_seq_len = self.model.params.max_seq_len
        limits = [min(max_gen_len, max_seq_len - len(prompt)) for prompt in prompts]
        decoders = [
            _TextDecoder(self.tokenizer, starts_text=echo or self._starts_text(prompt))
            for prompt in prompts
        ]
        lengths = [len(prompt) for prompt in prompts]
        positions = torch.tensor(lengths, device=self._device)  # [B], of the next tokens
        ends = scores = None
        with self.model.lock, parallel.computing():
            if echo and logprobs:
                hidden = self._prefill(prompts)  # [T, dim]
                scores = self._score(prompts, hidden, first)
                ends = hidden[positions.cumsum(0) - 1]  # [B, dim]
                del hidden
            elif any(limits):
                ends = self._prefill(prompts, ends_only=True)  # [B, dim]
            user = self.model.cache_user = object()
        if echo:
            yield _prompt_events(prompts, first, limits, decoders, scores)
        if not any(limits):
            return

        assert ends is not None
        with parallel.computing():
            logits = self.model.logits(ends)  # [B, V]
        # A row that has ended stays in the batch until all have ended: the published sampler draws
        # for it too, and the draws of the others depend on that.
        left = limits
        for step in itertools.count():
            with parallel.computing():
                tokens, ids, totals, token_scores = self._choose(
                    logits, temperature, top_p, generator
                )
            for row, total in enumerate(totals):
                if left[row] and not math.isfinite(total):
                    raise self._not_finite(f"token {step} of prompt {first + row}")
            events = []
            for row, token in enumerate(ids):
                if left[row] == 0:
                    continue
                left[row] -= 1
                reason: Literal["stop", "length"] | None = None
                if token in self.tokenizer.stop_tokens:
                    reason, left[row] = "stop", 0
                elif left[row] == 0:
                    reason = "length"
                text = decoders[row].add(token, reason)
                score = token_scores[row] if logprobs else None
                events.append(TokenEvent(first + row, token, text, score, reason))
            yield events
            if not any(left):
                return
            positions = positions.clamp(max=max_seq_len - 1)  # of rows that have ended
            lengths = [min(length + 1, max_seq_len) for length in lengths]
            ragged = len(set(lengths)) > 1
            with self.model.lock:
                if self.model.cache_user is not user:
                    raise RuntimeError(
                        "another generation has used this model since: finish a stream before "
                        "you start the next, or give each its own model"
                    )
                with parallel.computing():
                    logits = self._step(tokens, positions, max(lengths), masked=ragged)
            positions = positions + 1

    def _starts_text(self, prompt: list[int]) -> bool:
        """Whether what follows the prompt is a text of its own and no continuation."""
        if isinstance(self.formatter, Llama2ChatFormat) and self.formatter.asks(prompt):
            return True
        return prompt[-1] == self.tokenizer.bos_id

    def _prefill(self, prompts: list[list[int]], *, ends_only: bool = False) -> Tensor:
        """Hidden states [T, dim] of all prompts, packed one behind the other, or of their last
        tokens [B, dim]."""
        packed = [token for prompt in prompts for token in prompt]
        places = Places.of_spans([Span(0, len(prompt)) for prompt in prompts], self._device)
        tokens = torch.tensor(packed, device=self._device)
        return self.model.hidden(tokens, places, ends_only=ends_only)

    def _choose(
        self, logits: Tensor, temperature: float, top_p: float, generator: torch.Generator
    ) -> tuple[Tensor, list[int], list[float], list[float]]:
        """Next tokens [B] on every rank, the same as a list, the logarithms of the probabilities'
        sums, and of the tokens' own."""
        log_total = torch.logsumexp(logits, dim=-1)  # [B]
        if self.model.groups.rank == 0:
            tokens = next_tokens(logits, temperature, top_p, generator)
        else:
            tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        self.model.groups.broadcast_from_first(tokens)
        scores = logits.gather(-1, tokens[:, None])[:, 0] - log_total
        # in one piece, the only time in a step that the host waits for the device; the ids are
        # exact: a vocabulary is below 2^24
        ids, totals, logprobs = torch.stack((tokens.float(), log_total, scores)).tolist()
        return tokens, [int(token) for token in ids], totals, logprobs

    def _not_finite(self, where: str) -> FloatingPointError:
        dtype = str(self.model.output.weight.dtype).removeprefix("torch.")
        return FloatingPointError(
            f"the logits of {where} are not finite (computed in {dtype}): the weights are damaged "
            "(python -m llama verify finds it), or the model needs a wider range: build it with "
            "dtype='bfloat16' or 'float32'"
        )

    def _score(self, prompts: list[list[int]], hidden: Tensor, first: int) -> list[list[float]]:
        """Log-probability of every prompt token given those before it; 0.0 for the first."""
        following = [token for prompt in prompts for token in [*prompt[1:], 0]]
        targets = torch.tensor(following, device=self._device)  # [T]
        chunk = max(1, _LOGITS_CHUNK // self.model.params.vocab_size)
        scores: list[float] = []
        for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = self.model.logits(h)  # [chunk, V]
            chosen = logits.gather(-1, target[:, None])[:, 0]
            log_total = torch.logsumexp(logits, dim=-1)
            # a prompt token's logit may be -inf; a sum of all can not
            scores += (chosen - log_total).masked_fill(~log_total.isfinite(), math.nan).tolist()
        rows, start = [], 0
        for row, prompt in enumerate(prompts, start=first):
            if any(map(math.isnan, scores[start : start + len(prompt)])):
                raise self._not_finite(f"prompt {row}")
            rows.append([0.0, *scores[start : start + len(prompt) - 1]])
            start += len(prompt)
        return rows

    def _checked(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int | None,
        temperature: float,
        top_p: float,
        truncate: bool,
    ) -> tuple[list[list[int]], int]:
        """The prompts as lists, and how many tokens may be generated."""
        prompts = _token_lists(prompt_tokens)
        args = self.model.params
        if max_gen_len is None:
            max_gen_len = args.max_seq_len - 1
        for name, value, kind in (
            ("max_gen_len", max_gen_len, numbers.Integral),
            ("temperature", temperature, numbers.Real),
            ("top_p", top_p, numbers.Real),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} is {value!r}, expected a number")
        if max_gen_len < 0:
            raise ValueError(f"max_gen_len is {max_gen_len}, expected 0 or more")
        if temperature != 0 and not _MIN_TEMPERATURE <= temperature < math.inf:
            raise ValueError(
                f"temperature is {temperature}, expected 0 (greedy) or at least {_MIN_TEMPERATURE}"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}, expected more than 0 and at most 1")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {i} has no tokens, expected at least one (bos_id, say)")
            if len(prompt) > args.max_seq_len and not truncate:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, but max_seq_len is {args.max_seq_len}: "
                    "shorten it, build with a larger max_seq_len, or let truncate=True keep the "
                    "end of a text"
                )
            for token in prompt:
                if not 0 <= token < args.vocab_size:
                    raise ValueError(
                        f"prompt {i} has the token id {token}, but the vocabulary is 0 to "
                        f"{args.vocab_size - 1}"
                    )
        room = min(max_gen_len, args.max_seq_len // 2)
        return [self._shortened(prompt, args.max_seq_len - room) for prompt in prompts], max_gen_len

    def _shortened(self, prompt: list[int], length: int) -> list[int]:
        """A prompt that fits, or the last ``length`` tokens of it."""
        if len(prompt) <= self.model.params.max_seq_len:
            return prompt
        start = prompt[:1] if prompt[0] == self.tokenizer.bos_id and length > 1 else []
        return start + prompt[len(prompt) - length + len(start) :]


def _token_lists(prompt_tokens: Sequence[Sequence[int]]) -> list[list[int]]:
    prompts = []
    for i, prompt in enumerate(prompt_tokens):
        try:
            prompts.append([operator.index(token) for token in prompt])
        except TypeError as error:
            raise TypeError(
                f"prompt {i} is {prompt!r:.60}, expected a list of token ids ({error})"
            ) from None
    return prompts


def _new_generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator with this seed.

    Raises:
        TypeError, ValueError: it isn't an integer that torch takes.
    """
    if not isinstance(seed, numbers.Integral):
        raise TypeError(f"seed is {seed!r}, expected an integer")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed is {seed}, expected -2**63 to 2**64 - 1")
    return torch.Generator(device).manual_seed(int(seed))


def _check_ranks(n_ranks: int, args: ModelArgs, found: checkpoint.Checkpoint) -> None:
    if n_ranks in args.rank_counts:
        return
    shards = f" (cut into {found.n_shards} shards)" if found.layout == "native" else ""
    best = min(args.rank_counts, key=lambda n: abs(n - found.n_shards))
    counts = ", ".join(map(str, args.rank_counts))
    raise ValueError(
        f"{str(found.folder)!r}{shards} does not divide by {n_ranks} ranks, but by {counts}; start "
        f"it with\n    {parallel.torchrun_line(best)}"
    )


class _TextDecoder:
    """Turns one row's tokens into pieces of text that end where a character ends.

    At the start of a text the space goes that SentencePiece put before the first word; a
    continuation keeps it, so that prompt and generation join to the text.
    """

    def __init__(self, tokenizer: Tokenizer | SentencePieceTokenizer, *, starts_text: bool) -> None:
        self._tokenizer = tokenizer
        self._drop_space = starts_text and tokenizer.drops_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int, finish_reason: str | None) -> str:
        """Text of the next token; bytes that are still waiting come out when the row ends."""
        data = b"" if finish_reason == "stop" else self._tokenizer.decode_bytes([token])
        if data and self._drop_space:
            self._drop_space = False
            dropped = data.removeprefix(b" ")
            if self._tokenizer.decode([token]) == dropped.decode(errors="replace"):
                data = dropped  # else the space is the token's own, as of " \u2047 "
        return self._utf8.decode(data, final=finish_reason is not None)


def _prompt_events(
    prompts: list[list[int]],
    first: int,
    limits: list[int],
    decoders: list[_TextDecoder],
    scores: list[list[float]] | None,
) -> list[TokenEvent]:
    events = []
    for row, prompt in enumerate(prompts):
        for i, token in enumerate(prompt):
            last = i == len(prompt) - 1 and limits[row] == 0
            reason: Literal["length"] | None = "length" if last else None
            text = decoders[row].add(token, reason)
            score = scores[row][i] if scores else None
            events.append(TokenEvent(first + row, token, text, score, reason))
    return events


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that ``build`` takes.

    Raises:
        ValueError: there is no such device, or none for this rank.
    """
    no_nccl = parallel.n_processes() > 1 and not dist.is_nccl_available()
    if device is None:
        if torch.cuda.is_available() and no_nccl:
            warnings.warn(
                "this build of torch has no NCCL, by which CUDA devices communicate: the "
                f"{parallel.n_processes()} processes run on the CPU",
                stacklevel=3,
            )
            device = "cpu"
        elif torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available() and parallel.n_processes() == 1:
            device = "mps"
        else:
            device = "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected 'cuda', 'mps' or 'cpu'") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(resolved.type, False):
        usable = " or ".join(repr(name) for name, there in available.items() if there)
        why = ""
        if resolved.type == "cuda":
            why = f" (torch {torch.__version__} finds no CUDA driver or device)"
            if torch.version.cuda is None:
                why = (
                    f" (torch {torch.__version__} is built without CUDA: install another build, "
                    "see https://pytorch.org/get-started)"
                )
        raise ValueError(f"device is {str(device)!r}, but this machine has {usable}{why}")
    if resolved.type != "cuda":
        return resolved
    if no_nccl:
        raise ValueError(
            f"device is {str(device)!r}, but this build of torch has no NCCL, by which the "
            f"{parallel.n_processes()} processes would communicate: give device='cpu'"
        )
    return _cuda_device(resolved)


def _cuda_device(device: torch.device) -> torch.device:
    """This process's CUDA device: under torchrun, LOCAL_RANK's."""
    n_devices = torch.cuda.device_count()
    if device.index is not None and device.index >= n_devices:
        raise ValueError(f"device is {str(device)!r}, but this machine has {n_devices} of them")
    if not dist.is_torchelastic_launched():
        return device
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.index not in (None, local_rank):
        raise ValueError(
            f"device is {str(device)!r}, but under torchrun this rank's is cuda:{local_rank}: "
            "give device='cuda'"
        )
    if local_rank >= n_devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise ValueError(
            f"torchrun started {parallel.n_local_processes()} processes on this machine, which has "
            f"{n_devices} CUDA devices{limited}: give --nproc_per_node {n_devices}, or device='cpu'"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def dtype_of(name: str | torch.dtype) -> torch.dtype:
    """A dtype that weights can have, by its name.

    Raises:
        ValueError: there is no such one.
    """
    choices = {str(d).removeprefix("torch."): d for d in checkpoint.FLOAT_DTYPES[:3]}
    found = choices.get(str(name).removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype is {name!r}, expected one of {', '.join(choices)}")
    return found


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the device computes in it, else what it is fast with."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    return torch.bfloat16 if fast.cpu_computes_bfloat16() else torch.float32
