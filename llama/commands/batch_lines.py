"""The lines of batch files: requests as they are read, answers as they are written."""

import codecs
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from llama.chat_template import AnyChatFormat
from llama.completions import Completion
from llama.dialog import normalize_dialog, normalize_message
from llama.files import listed, parse_json
from llama.request import Request
from llama.sampling import SamplingParams, new_generator

_OPTIONS: dict[str, tuple[type, ...]] = {
    "max_gen_len": (int,),
    "temperature": (int, float),
    "top_p": (int, float),
    "seed": (int,),
    "stop": (str, list),
    "logprobs": (bool,),
}
# The bodies of OpenAI's requests: the content, and the names of options.
_COMPLETION = {name: name for name in ("temperature", "top_p", "seed", "stop")} | {
    "max_tokens": "max_gen_len"
}
_CHAT = _COMPLETION | {"max_completion_tokens": "max_gen_len", "logprobs": "logprobs"}
_ENDPOINTS = {
    "/v1/completions": ("prompt", _COMPLETION),
    "/v1/chat/completions": ("messages", _CHAT),
}
# Fields that are accepted with this value only, which is the default, and others without effect:
# the same as in llama/serving/schema.py.
_FIXED: dict[str, Any] = {
    "n": 1,
    "stream": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "presence_penalty": 0,
    "suffix": "",
}
_WITHOUT_EFFECT = {
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
_SHOWN_FAULTS = 20


@dataclasses.dataclass
class Line:
    """A request of a batch file.

    Attributes:
        number: of the line, from 1.
        id: its own, or its number.
        content: a text, token ids, or messages.
        is_openai: it is a line of OpenAI's batch API, and its answer is too.
        seed: None if it has none.
    """

    number: int
    id: str | int
    content: Any
    is_chat: bool
    is_openai: bool
    params: SamplingParams
    seed: int | None


def read_lines(name: str, data: bytes, defaults: SamplingParams) -> list[Line]:
    """The requests of a file. Blank lines are skipped, but counted.

    Args:
        name: of the file, for errors.
        defaults: of the parameters that a line may have.

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


def _parse(number: int, text: bytes, defaults: SamplingParams) -> Line:
    found = parse_json(text)
    if not isinstance(found, dict):
        raise TypeError(f"it is {found!r:.60}, expected a JSON object")
    is_openai = "custom_id" in found or "body" in found
    if is_openai:
        key, fields, contents = _openai_fields(found)
    else:
        fields, contents = _not_null(found), ["prompt", "messages"]
        _check_known("it", fields, ["id", *contents, *_OPTIONS])
        key = fields.get("id", number)
    contents = [name for name in contents if name in fields]
    if len(contents) != 1:
        raise ValueError(
            f"it has {'both' if contents else 'neither'}, expected either prompt or messages"
        )
    if type(key) not in (str, int):
        raise TypeError(f"its id is {key!r:.60}, expected a text or a whole number")
    str(key).encode()  # fails for half a surrogate pair, which can't be written
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
    is_chat = contents == ["messages"]
    return Line(
        number,
        key,
        (_messages if is_chat else _prompt)(fields[contents[0]]),
        is_chat,
        is_openai,
        dataclasses.replace(defaults, **options) if options else defaults,
        seed,
    )


def _openai_fields(found: dict[str, Any]) -> tuple[Any, dict[str, Any], list[str]]:
    """Id, and fields named as in other lines, of a request of OpenAI's batch API."""
    _check_known("it", found, ["custom_id", "method", "url", "body"])
    key, body, url = found.get("custom_id"), found.get("body"), found.get("url")
    if not isinstance(key, str):
        raise TypeError(f"custom_id is {key!r:.60}, expected a text")
    if found.get("method") != "POST":
        raise ValueError(f"method is {found.get('method')!r:.60}, expected 'POST'")
    if not isinstance(url, str) or url not in _ENDPOINTS:
        raise ValueError(f"url is {url!r:.60}, expected one of {', '.join(_ENDPOINTS)}")
    if not isinstance(body, dict):
        raise TypeError(f"body is {body!r:.60}, expected a JSON object")
    content, names = _ENDPOINTS[url]
    body = {k: v for k, v in _not_null(body).items() if k not in _WITHOUT_EFFECT}
    for name, value in _FIXED.items():
        if body.pop(name, value) != value:
            raise ValueError(f"{name} is {found['body'][name]!r:.60}, expected {value!r} only")
    _check_known("body", body, ["model", content, *names])
    given = [name for name in names if name in body]
    if len({names[name] for name in given}) < len(given):
        raise ValueError("body has max_tokens and max_completion_tokens, expected one of them")
    if content not in body:
        raise ValueError(f"body has no {content}")
    value = body[content]
    if content == "messages" and isinstance(value, list):
        value = [
            {**message, "role": "system"}
            if isinstance(message, dict) and message.get("role") == "developer"
            else message
            for message in value
        ]
    return key, {content: value} | {names[name]: body[name] for name in given}, [content]


def _not_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _check_known(where: str, fields: dict[str, Any], known: Sequence[str]) -> None:
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


def answer(
    line: Line, request: Request, completion: Completion, formatter: AnyChatFormat, model: str
) -> bytes:
    """The line that answers a finished request.

    Args:
        model: its name in OpenAI's answers.
    """
    usage = {"prompt_tokens": len(request.prompt), "completion_tokens": len(request.tokens)}
    text = "".join(completion.pieces)
    found: dict[str, Any]
    if not line.is_openai:
        generation = completion.answer(formatter) if line.is_chat else text
        found = {"id": line.id, **completion.prediction(generation, request.params)}
        found |= {"finish_reason": request.finish_reason, "usage": usage}
    else:
        kind, choice = "text_completion", dict[str, Any](text=text)
        if line.is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            kind, choice = "chat.completion", {"message": message}
        body = {
            "id": f"batch-{line.number}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "choices": [
                {
                    "index": 0,
                    **choice,
                    "logprobs": _openai_logprobs(completion) if request.params.logprobs else None,
                    "finish_reason": request.finish_reason,
                }
            ],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
        found = {
            "id": f"batch_req_{line.number}",
            "custom_id": line.id,
            "response": {"status_code": 200, "request_id": f"batch-{line.number}", "body": body},
            "error": None,
        }
    return json.dumps(found, ensure_ascii=False).encode() + b"\n"


def _openai_logprobs(completion: Completion) -> dict[str, Any]:
    pairs = zip(completion.pieces, completion.logprobs, strict=True)
    return {
        "content": [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in pairs
        ]
    }


def id_of(text: bytes) -> Any:
    """The id of the line that an answer belongs to; None if the text isn't an answer."""
    try:
        found = parse_json(text)
    except ValueError:
        return None
    key = found.get("custom_id", found.get("id")) if isinstance(found, dict) else None
    return key if type(key) in (str, int) else None
