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
from llama.commands.batch_lines import Answer, Line, map_lines, read_lines
from llama.commands.batch_output import Output
from llama.commands.options import ModelOptions, SamplingOptions, runs_model
from llama.distributed import collectives
from llama.distributed.groups import is_first_process
from llama.files import check_regular, expanded
from llama.generation import Llama
from llama.request import Request
from llama.sampling import new_generator

# They change the speed, and answers only by rounding.
_NOT_RECORDED = ("max_batch_size", "model_parallel_size")

Prompts = tuple[Line, list["array[int]"]]  # of a line: 4 bytes a token


@runs_model(max_seq_len=None, max_batch_size=16, temperature=None, top_p=None)
def batch(model: ModelOptions, sampling: SamplingOptions, input: str, output: str) -> None:
    """Answer the prompts and dialogs of a JSONL file; repeat an interrupted command to continue it.

    Under torchrun, the ranks of a copy of the weights compute together, and copies divide the
    lines. docs/scale.md has the format. A line's own options come first, then the command's; the
    defaults are temperature 0.6 and top_p 0.9, and for OpenAI's lines those of the API.

    Args:
        input: JSONL file of prompts, dialogs or OpenAI's requests.
        output: JSONL file of the answers, in the order in which they finish.
    """
    check_regular(expanded(input))
    data = expanded(input).read_bytes()
    defaults = dataclasses.asdict(sampling)
    lines = read_lines(input, data, defaults)
    run = {name: x for name, x in dataclasses.asdict(model).items() if name not in _NOT_RECORDED}
    run |= defaults | {"input_sha256": hashlib.sha256(data).hexdigest()}
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
            name = model.ckpt_dir
            for line, answer in generate(llm, own, model.seed, name=name, progress=is_first):
                if groups.rank == 0:
                    out.write(line.id, answer)
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


def encode_lines(name: str, lines: Sequence[Line], llm: Llama) -> list[Prompts]:
    """The lines with their prompts' tokens, instead of their texts.

    Args:
        name: of the file, for errors.

    Raises:
        ValueError: prompts are too long, or the model doesn't support them; the message lists them.
    """

    def encode(line: Line) -> Prompts:
        prompts = line.encode(llm)
        line.requests(llm, prompts)  # checks them
        return line, [array("i", tokens) for tokens in prompts]

    return map_lines(name, encode, lines, lambda line: line.number)


def ordered(lines: Sequence[Prompts]) -> list[Prompts]:
    """The longest prompts first, so that neighbours have similar lengths: a decoding step reads the
    cache up to its longest row. Prompts that have the first half of their tokens in common follow
    each other, so that it is computed once. Of several prompts of a line, the first counts."""
    runs: list[list[Prompts]] = []
    before = array("i")
    for each in sorted(lines, key=lambda each: (each[1], each[0].number)):
        first = each[1][0]
        n = (len(first) + 1) // 2
        if before[:n] != first[:n]:
            runs.append([])
        runs[-1].append(each)
        before = first
    runs.sort(key=lambda run: max(len(prompts[0]) for _, prompts in run), reverse=True)
    return [each for run in runs for each in run]


@dataclasses.dataclass
class _Running:
    """A line whose requests the engine has."""

    line: Line
    answer: Answer
    n_left: int  # requests that haven't finished


def generate(
    llm: Llama, lines: Sequence[Prompts], seed: int, *, name: str, progress: bool
) -> Iterator[tuple[Line, bytes]]:
    """The answers to lines, as they finish.

    The slots of the engine stay full. Each line draws from generators of its own, with its seed or
    ``seed`` plus its number, so that neither order nor neighbours change an answer.

    Args:
        name: of the model, in OpenAI's answers.
    """
    engine, model = llm.engine, llm.model
    waiting = deque(lines)
    running: dict[Request, _Running] = {}
    started, n_tokens = time.monotonic(), 0
    n_copies = model.groups.n_replicas
    of = f" of copy 1 of {n_copies}" if n_copies > 1 else ""
    with (
        tqdm(total=len(lines), desc=f"Lines{of}", disable=not progress) as bar,
        model.groups.collective_call("batch"),
        memory.explain_oom(lambda: memory.plan_of(model, engine.max_prefill_tokens)),
        model.lock,
    ):
        engine.cancel_all()
        while waiting or running:
            while waiting and len(running) < 2 * model.params.max_batch_size:
                line, prompts = waiting.popleft()
                requests = line.requests(llm, prompts)
                its = _Running(line, line.new_answer(requests, llm, name), len(requests))
                seeds = line.seeds(len(requests), (seed + line.number) % 2**64)
                for request, own_seed in zip(requests, seeds, strict=True):
                    engine.add([request], new_generator(own_seed, model.device))
                    running[request] = its
            for request, event in engine.step():
                running[request].answer.add([(request, event)])
                n_tokens += 1 + (len(request.prompt) if len(request.tokens) == 1 else 0)
            n_finished = 0
            for request in [request for request in running if request.finish_reason]:
                its = running.pop(request)
                its.n_left -= 1
                if its.n_left == 0:
                    n_finished += 1
                    yield its.line, its.answer.text()
            rate = n_tokens / (time.monotonic() - started)
            bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            bar.update(n_finished)
