"""``python -m llama batch``: answer the prompts and dialogs of a JSONL file."""

import contextlib
import dataclasses
import hashlib
import sys
import time
from array import array
from collections import deque
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from llama import memory
from llama.commands.batch_lines import Line, answer, map_lines, read_lines
from llama.commands.batch_output import Output
from llama.commands.options import ModelOptions, SamplingOptions, runs_model
from llama.completions import Completion
from llama.distributed import collectives
from llama.distributed.groups import is_first_process
from llama.files import check_regular, expanded
from llama.generation import Llama
from llama.request import Request
from llama.sampling import new_generator

# They change the speed, and answers only by rounding.
_NOT_RECORDED = ("max_batch_size", "model_parallel_size")

Prompt = tuple[Line, "array[int]"]  # 4 bytes a token


@runs_model(max_seq_len=None, max_batch_size=16)
def batch(model: ModelOptions, sampling: SamplingOptions, input: str, output: str) -> None:
    """Answer the prompts and dialogs of a JSONL file; repeat an interrupted command to continue it.

    Under torchrun, the ranks of a copy of the weights compute together, and copies divide the
    lines. docs/scale.md has the format. A line's own options override the command's.

    Args:
        input: JSONL file of prompts, dialogs or OpenAI's requests.
        output: JSONL file of the answers, in the order in which they finish.
    """
    check_regular(expanded(input))
    data = expanded(input).read_bytes()
    lines = read_lines(input, data, sampling.params())
    run = {name: x for name, x in dataclasses.asdict(model).items() if name not in _NOT_RECORDED}
    run |= dataclasses.asdict(sampling) | {"input_sha256": hashlib.sha256(data).hexdigest()}
    del data  # may be large
    out = Output(expanded(output), run)
    llm = model.build()
    groups, is_first = llm.model.groups, is_first_process()
    with collectives.fail_fast():
        collectives.check_same_on_all_ranks("batch", run, collectives.world)
    prompts = ordered(encode_lines(input, lines, llm))
    with contextlib.closing(out):
        numbers = out.begin({line.id: line.number for line in lines}) if is_first else None
        missing = set(collectives.broadcast_json(numbers, collectives.world))
        if is_first and len(missing) < len(lines):
            print(f"{output} has {len(lines) - len(missing)} answers", file=sys.stderr)
        own = [prompt for prompt in prompts if prompt[0].number in missing]
        own = own[groups.replica :: groups.n_replicas]
        if groups.rank == 0 and not is_first:
            out.open_part(groups.replica)
        try:
            for line, request, completion in generate(llm, own, model.seed, progress=is_first):
                if groups.rank == 0:
                    text = answer(line, request, completion, llm.formatter, model.ckpt_dir)
                    out.write(line.id, text)
        except BaseException:
            if is_first:
                print(f"{output} isn't complete: repeat the command to continue", file=sys.stderr)
            raise
        if not is_first:
            out.close()
        collectives.broadcast_json(None, collectives.world)  # now all have
        if is_first:
            out.end()
            print(f"{output}: {len(lines)} answers")


def encode_lines(name: str, lines: Sequence[Line], llm: Llama) -> list[Prompt]:
    """The lines with their prompts' tokens, instead of their content.

    Args:
        name: of the file, for errors.

    Raises:
        ValueError: prompts are too long, or the model doesn't support them; the message lists them.
    """
    max_seq_len = llm.model.params.max_seq_len

    def encode(line: Line) -> Prompt:
        tokens = line.content
        if line.is_chat:
            tokens = llm.formatter.encode_dialog_prompt(line.content)
        elif isinstance(line.content, str):
            tokens = llm.tokenizer.encode(line.content, bos=True, eos=False)
        if len(tokens) > max_seq_len:
            raise ValueError(
                f"it has {len(tokens)} tokens, but max_seq_len is {max_seq_len}: shorten it, or "
                "raise --max_seq_len"
            )
        llm.engine.request(tokens, line.params, line.number)  # checks the ids
        line.content = None
        return line, array("i", tokens)

    return map_lines(name, encode, lines, lambda line: line.number)


def ordered(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The longest prompts first, so that neighbours have similar lengths: a decoding step reads the
    cache up to its longest row. Prompts that have the first half of their tokens in common follow
    each other, so that it is computed once."""
    runs: list[list[Prompt]] = []
    for prompt in sorted(prompts, key=lambda prompt: (prompt[1], prompt[0].number)):
        half = (len(prompt[1]) + 1) // 2
        if not runs or runs[-1][-1][1][:half] != prompt[1][:half]:
            runs.append([])
        runs[-1].append(prompt)
    runs.sort(key=lambda run: max(len(tokens) for _, tokens in run), reverse=True)
    return [prompt for run in runs for prompt in run]


def generate(
    llm: Llama, prompts: Sequence[Prompt], seed: int, *, progress: bool
) -> Iterator[tuple[Line, Request, Completion]]:
    """The completions of prompts, as they finish.

    The slots of the engine stay full. Each line draws from its own generator, seeded with its seed,
    or ``seed`` plus its number, so that neither order nor neighbours change an answer.
    """
    engine, model = llm.engine, llm.model
    waiting = deque(prompts)
    running: dict[Request, tuple[Line, Completion]] = {}
    started, n_tokens = time.monotonic(), 0
    n_copies = model.groups.n_replicas
    of = f" of copy 1 of {n_copies}" if n_copies > 1 else ""
    with (
        tqdm(total=len(prompts), desc=f"Lines{of}", disable=not progress) as bar,
        model.groups.collective_call("batch"),
        memory.explain_oom(lambda: memory.plan_of(model, engine.max_prefill_tokens)),
        model.lock,
    ):
        engine.cancel_all()
        while waiting or running:
            while waiting and len(running) < 2 * model.params.max_batch_size:
                line, tokens = waiting.popleft()
                request = engine.request(tokens, line.params, line.number)
                own_seed = (seed + line.number) % 2**64 if line.seed is None else line.seed
                engine.add([request], new_generator(own_seed, model.device))
                running[request] = line, Completion()
            for request, event in engine.step():
                running[request][1].add(event, is_stop_token=request.is_stop_token(event))
                n_tokens += 1 + (len(request.prompt) if len(request.tokens) == 1 else 0)
            finished = [request for request in running if request.finish_reason]
            for request in finished:
                line, completion = running.pop(request)
                yield line, request, completion
            rate = n_tokens / (time.monotonic() - started)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(len(finished))
