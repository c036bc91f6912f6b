"""The lines of batch files: requests as they are read, answers as they are written."""

import codecs
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from llama.completions import Completion
from llama.dialog import normalize_dialog, normalize_message
from llama.extras import needs_extra
from llama.files import listed, parse_json
from llama.generation import Llama
from llama.request import Request, TokenEvent
from llama.sampling import SamplingParams, new_generator

_OPTIONS: dict[str, tuple[type, ...]] = {
    "max_gen_len": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "seed": (int,),
    "stop": (str, list),
    "logprobs": (bool,),
}
_SHOWN_FAULTS = 20

# of max_gen_len, temperature and top_p; None: the kind of line has its own
Defaults = Mapping[str, Any]


class Answer(Protocol):
    """The answer to a line, collected from the events of its requests."""

    def add(self, events: Sequence[tuple[Request, TokenEvent]]) -> None: ...

    def text(self) -> bytes:
        """The line of the output, when all requests have finished."""


class Line(Protocol):
    """A line of a batch file: ``number``, from 1, and ``id``, its own or its number."""

    number: int
    id: str | int

    def encode(self, llm: Llama) -> list[list[int]]:
        """The prompts, in tokens; the line then forgets their texts.

        Raises:
            TypeError, ValueError: the model doesn't support them.
        """

    def requests(self, llm: Llama, prompts: Sequence[Sequence[int]]) -> list[Request]:
        """
        Raises:
            TypeError, ValueError: the model doesn't support them.
        """

    def seeds(self, n_requests: int, default: int) -> list[int]:
        """Of the generator of each request."""

    def new_answer(self, requests: Sequence[Request], llm: Llama, model: str) -> Answer:
        """
        Args:
            model: its name, in answers that have one.
        """


@dataclasses.dataclass
class PromptLine:
    """A prompt (a text, or token ids) or a dialog."""

    number: int
    id: str | int
    content: Any
    is_chat: bool
    params: SamplingParams
    seed: int | None

    def encode(self, llm: Llama) -> list[list[int]]:
        tokens = self.content
        if self.is_chat:
            tokens = llm.formatter.encode_dialog_prompt(self.content)
        elif isinstance(self.content, str):
            tokens = llm.tokenizer.encode(self.content, bos=True, eos=False)
        self.content = None
        return [tokens]

    def requests(self, llm: Llama, prompts: Sequence[Sequence[int]]) -> list[Request]:
        [tokens], longest = prompts, llm.model.params.max_seq_len
        if len(tokens) > longest:
            raise ValueError(
                f"it has {len(tokens)} tokens, but max_seq_len is {longest}: shorten it, or raise "
                "--max_seq_len"
            )
        return [llm.engine.request(tokens, self.params, self.number)]

    def seeds(self, n_requests: int, default: int) -> list[int]:
        return [default if self.seed is None else self.seed] * n_requests

    def new_answer(self, requests: Sequence[Request], llm: Llama, model: str) -> Answer:
        return _PromptAnswer(self, requests[0], llm)


class _PromptAnswer:
    def __init__(self, line: PromptLine, request: Request, llm: Llama) -> None:
        self._line, self._request, self._formatter = line, request, llm.formatter
        self._completion = Completion()

    def add(self, events: Sequence[tuple[Request, TokenEvent]]) -> None:
        for request, event in events:
            self._completion.add(event, is_stop_token=request.is_stop_token(event))

    def text(self) -> bytes:
        completion, request = self._completion, self._request
        generation: Any = "".join(completion.pieces)
        if self._line.is_chat:
            generation = completion.answer(self._formatter)
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": len(request.tokens)}
        return as_line(
            {
                "id": self._line.id,
                **completion.prediction(generation, request.params),
                "finish_reason": request.finish_reason,
                "usage": usage,
            }
        )


def read_lines(name: str, data: bytes, defaults: Defaults) -> list[Line]:
    """The requests of a file. Blank lines are skipped, but counted.

    Args:
        name: of the file, for errors.
        defaults: for lines that don't have them.

    Raises:
        ValueError: lines aren't valid; the message lists them.
    """
    numbers: dict[str | int, int] = {}

    def parse(numbered: tuple[int, bytes]) -> Line:
        line = _parse(*numbered, defaults)
        other = numbers.setdefault(line.id, line.number)
        if other != line.number:
            raise ValueError(
                f"its id {line.id!r:.80} is that of line {other} too: ids must differ (without "
                "one, a line has its number)"
            )
        str(line.id).encode()  # fails for half a surrogate pair, which can't be written
        return line

    data = data.removeprefix(codecs.BOM_UTF8)
    texts = [(i, text) for i, text in enumerate(data.split(b"\n"), start=1) if text.strip()]
    if not texts:
        raise ValueError(f"{name} is empty, expected a JSON object on each line")
    return map_lines(name, parse, texts, lambda numbered: numbered[0])


def map_lines(
    name: str,
    function: Callable[[Any], Any],
    items: Sequence[Any],
    number_of: Callable[[Any], int],
) -> list[Any]:
    """``function`` of each item.

    Raises:
        ValueError: it raised TypeError or ValueError; the message has up to 20 of them, each with
            the number of the line.
    """
    results, faults = [], []
    for item in items:
        try:
            results.append(function(item))
        except (TypeError, ValueError) as error:
            faults.append(f"  line {number_of(item)}: {error}")
    if faults:
        more = [f"  and {len(faults) - _SHOWN_FAULTS} more"] if len(faults) > _SHOWN_FAULTS else []
        raise ValueError(
            "\n".join([f"lines of {name} aren't valid:", *faults[:_SHOWN_FAULTS], *more])
        )
    return results


def _parse(number: int, text: bytes, defaults: Defaults) -> Line:
    found = parse_json(text)
    if not isinstance(found, dict):
        raise TypeError(f"it is {found!r:.60}, expected a JSON object")
    if "custom_id" in found or "body" in found:
        with needs_extra("lines of OpenAI's batch API need pydantic", "serve"):
            from llama.commands.batch_openai import parse_api_line
        return parse_api_line(number, found, defaults)
    fields = {name: value for name, value in found.items() if value is not None}
    check_known("it", fields, ["id", "prompt", "messages", *_OPTIONS])
    contents = [name for name in ("prompt", "messages") if name in fields]
    if len(contents) != 1:
        raise ValueError(
            f"it has {'both' if contents else 'neither'}, expected either prompt or messages"
        )
    key = fields.get("id", number)
    if type(key) not in (str, int):
        raise TypeError(f"its id is {key!r:.60}, expected a text or a whole number")
    options = {name: fields[name] for name in _OPTIONS if name in fields}
    for name, value in options.items():
        if type(value) not in _OPTIONS[name]:
            kinds = " or ".join(kind.__name__ for kind in _OPTIONS[name])
            raise TypeError(f"{name} is {value!r:.60}, expected {kinds}")
    seed = options.pop("seed", None)
    if seed is not None:
        new_generator(seed, torch.device("cpu"))  # checks its range
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    options = {name: value for name, value in defaults.items() if value is not None} | options
    is_chat = contents == ["messages"]
    content = (_messages if is_chat else _prompt)(fields[contents[0]])
    return PromptLine(number, key, content, is_chat, SamplingParams(**options), seed)


def check_known(where: str, fields: dict[str, Any], known: Sequence[str]) -> None:
    if unknown := fields.keys() - set(known):
        raise ValueError(
            f"{where} has {listed(sorted(unknown))}, expected only {', '.join(known)}: leave out "
            "what isn't supported"
        )


def _prompt(value: Any) -> str | list[int]:
    is_valid = isinstance(value, str)
    if isinstance(value, list):
        is_valid = all(type(token) is int for token in value)
    if not is_valid:
        raise TypeError(
            f"prompt is {value!r:.60}, expected a text or a list of token ids (of several prompts, "
            "each has its own line)"
        )
    return value


def _messages(value: Any) -> Any:
    # what the model's format excludes is found when the line is encoded
    normalize_dialog(value, False, partial(normalize_message, tools=True))
    return value


def as_line(found: Any) -> bytes:
    return json.dumps(found, ensure_ascii=False).encode() + b"\n"


def id_of(text: bytes) -> Any:
    """The id of the line that an answer belongs to; None if the text isn't an answer."""
    try:
        found = parse_json(text)
    except ValueError:
        return None
    key = found.get("custom_id", found.get("id")) if isinstance(found, dict) else None
    return key if type(key) in (str, int) else None
