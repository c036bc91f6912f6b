"""OpenAI's tools in Llama 3.1's format: definitions in the prompt, calls, and results.

The prompt is "JSON based tool calling" of Meta's prompt format, which PyPI's ``llama-models`` has
as llama3_1/prompt_format.md: the system message begins with ``Environment: ipython``, and a user
message defines the functions. The model answers ``<|python_tag|>``, the call as JSON and
``<|eom_id|>``, or the JSON alone; a result has the role ``ipython``. The page's other forms of a
call are read too: ``<function=name>{...}</function>`` and ``name.call(query="...")``. Later models
get the same format; the one with Python calls, which Meta also publishes for Llama 3.2 1B and 3B,
isn't used.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from llama.chat_template import AnyChatFormat
from llama.dialog import Dialog, Message, normalize_message

_ENVIRONMENT = "Environment: ipython"
# Meta's wording, which is a part of the format
_BEFORE_DEFINITIONS = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n"
)
_AFTER_DEFINITIONS = "\n\nReturn function calls in JSON format."
_MAX_DEFINITIONS = 2**22  # characters; indentation can make them many times those of the body
# Calls of tools that the models know by name, such as brave_search, and of custom ones
_BUILT_IN_CALL = re.compile(r'(\w+)\.call\((\w+)="([^"]*)"\)', re.ASCII)
_FUNCTION_START = re.compile(r"<function=([^>]+)>\s*")
_FUNCTION_END = re.compile(r"\s*</function>")
_SURROGATE = re.compile("[\ud800-\udfff]")  # which UTF-8 can't express, and an answer's JSON can
_SEPARATORS = tuple("; \t\r\n")
_DECODER = json.JSONDecoder()
_TOOL_KEYS = ("type", "function")
_FUNCTION_KEYS = ("name", "description", "parameters", "strict")

Function = dict[str, Any]
Json = Mapping[str, Any]


def with_tools(
    messages: Sequence[Json],
    tools: Sequence[Json] | None,
    tool_choice: str | Json | None,
    formatter: AnyChatFormat,
) -> Dialog:
    """A dialog of this library from OpenAI's messages, with the tools that the model may call.

    The role ``developer`` becomes ``system``. Of several results, the order is that of their calls.
    With ``tool_choice`` "none", the tools aren't in the prompt.

    Raises:
        ValueError: the model's chat format has no tools (before Llama 3.1), a definition or
            ``tool_choice`` isn't valid, or calls and results don't match.
    """
    functions = _functions(tools)
    _check_choice(functions, tool_choice)
    offered = [] if tool_choice == "none" else list(functions.values())
    if formatter.tool_call_id is None:
        if offered:
            raise ValueError(
                f"there are tools, which this model's chat format ({type(formatter).__name__}) "
                "doesn't have: they need Llama 3.1 or later in Meta's format"
            )
        return [_renamed(message) for message in messages]
    dialog = _with_calls(messages)
    return _with_definitions(dialog, offered) if offered else dialog


def answer_schema(
    tools: Sequence[Json] | None, tool_choice: str | Json | None
) -> dict[str, Any] | None:
    """The JSON schema of an answer that must be a call; None if the model may choose.

    Raises:
        ValueError: a definition or ``tool_choice`` isn't valid.
    """
    functions = _functions(tools)
    name = _check_choice(functions, tool_choice)
    if name is not None:
        return _call_schema(functions[name], "#")
    if tool_choice != "required":
        return None
    return {"anyOf": [_call_schema(f, f"#/anyOf/{i}") for i, f in enumerate(functions.values())]}


def tool_calls(
    answer: Message, tools: Sequence[Json] | None
) -> tuple[str | None, list[dict[str, Any]]]:
    """The content of a generated message, and its calls of these tools as OpenAI's ``tool_calls``.

    Several calls are separated by ``;`` or whitespace, or are in a list. A text that holds anything
    else, or the name of another tool, is content. Ids are random.

    Raises:
        ValueError: a definition isn't valid; never for an answer.
    """
    functions = _functions(tools)
    content, text = answer["content"], answer.get("tool_call")
    if text is None:
        content, text = "", content
    calls = _parse(text, functions)
    if not calls:
        content, calls = content + text, []
    return content or None, [
        {
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
        for name, arguments in calls
    ]


# --- Definitions ----------------------------------------------------------------------------------


def _functions(tools: Sequence[Json] | None) -> dict[str, Function]:
    """Name, description and parameters of each function, by name."""
    functions: dict[str, Function] = {}
    for i, tool in enumerate(tools or []):
        is_function = isinstance(tool, Mapping) and tool.get("type") == "function"
        given = tool.get("function") if is_function else None
        name = given.get("name") if isinstance(given, Mapping) else None
        if not isinstance(given, Mapping) or not isinstance(name, str) or not name:
            form = "{'type': 'function', 'function': {'name': '...', 'parameters': {...}}}"
            raise _wrong(f"tool {i} is", tool, form)
        if name in functions:
            raise ValueError(f"tool {i} has the name {name!r} of an earlier one: rename it")
        others = [key for key, x in tool.items() if key not in _TOOL_KEYS and x is not None]
        others += [key for key, x in given.items() if key not in _FUNCTION_KEYS and x is not None]
        if others:
            raise ValueError(f"tool {i} has {others[0]!r:.60}, which isn't supported: leave it out")
        description, parameters = given.get("description"), given.get("parameters")
        if not isinstance(description, str | None):
            raise _wrong(f"the description of tool {i} is", description, "a string")
        is_object = isinstance(parameters, dict) and parameters.get("type", "object") == "object"
        if parameters is not None and not is_object:
            raise _wrong(f"the parameters of tool {i} are", parameters, "an object's JSON schema")
        functions[name] = {
            "name": name,
            "description": description or "",
            "parameters": parameters or {"type": "object", "properties": {}},
        }
    return functions


def _check_choice(functions: Mapping[str, Function], tool_choice: str | Json | None) -> str | None:
    """The name of the function that must be called, if one is named."""
    if tool_choice in (None, "none", "auto"):
        return None
    if tool_choice == "required":
        if not functions:
            raise ValueError("tool_choice is 'required', but there are no tools")
        return None
    is_named = isinstance(tool_choice, Mapping) and tool_choice.get("type") == "function"
    function = tool_choice.get("function") if isinstance(tool_choice, Mapping) else None
    if not is_named or not isinstance(function, Mapping):
        form = "{'type': 'function', 'function': {'name': '...'}}"
        raise _wrong("tool_choice is", tool_choice, f"'none', 'auto', 'required' or {form}")
    name = function.get("name")
    if not isinstance(name, str) or name not in functions:
        expected = f"one of the tools: {', '.join(functions)}"
        raise _wrong("tool_choice names the function", name, expected)
    return name


def _wrong(what: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{what} {value!r:.100}, expected {expected}")


def _call_schema(function: Function, place: str) -> dict[str, Any]:
    """The schema of a call, which is at the JSON pointer ``place`` of the whole."""
    parameters = _moved(function["parameters"], f"{place}/properties/parameters")
    properties = {
        "type": {"const": "function"},
        "name": {"const": function["name"]},
        "parameters": {"type": "object"} | parameters,
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _moved(schema: dict[str, Any], place: str) -> dict[str, Any]:
    """The schema with its references to itself ("#/$defs/...") as they are at ``place``."""
    if "$id" in schema:  # its references start there
        return schema

    def move(part: dict[str, Any]) -> dict[str, Any]:
        reference = part.get("$ref")
        if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
            part["$ref"] = place + reference[1:]
        return part

    moved: dict[str, Any] = json.loads(json.dumps(schema), object_hook=move)
    return moved


# --- Messages -------------------------------------------------------------------------------------


def _with_definitions(dialog: list[Message], functions: Sequence[Function]) -> list[Message]:
    system = _ENVIRONMENT
    if dialog and dialog[0]["role"] == "system":
        system += "\n\n" + dialog[0]["content"].strip()
        dialog = dialog[1:]
    text = _BEFORE_DEFINITIONS + _definitions(functions) + _AFTER_DEFINITIONS
    return [
        Message(role="system", content=system),
        Message(role="user", content=text),
        *dialog,
    ]


def _definitions(functions: Sequence[Function]) -> str:
    """The functions as indented JSON, whose length is checked while it is written."""
    encoder = json.JSONEncoder(indent=4, ensure_ascii=False)
    parts: list[str] = []
    n_chars = 0
    try:
        for function in functions:
            for part in encoder.iterencode({"type": "function", "function": function}):
                parts.append(part)
                n_chars += len(part)
                if n_chars > _MAX_DEFINITIONS:
                    raise ValueError(
                        f"the definitions of the tools have more than {_MAX_DEFINITIONS} "
                        "characters: give fewer or simpler ones"
                    )
            parts.append("\n")
    except RecursionError:
        raise ValueError("the definition of a tool is nested too deeply: simplify it") from None
    return "".join(parts[:-1])


def _with_calls(messages: Sequence[Json]) -> list[Message]:
    """The messages, with calls and results as in this library's dialogs."""
    dialog: list[Message] = []
    results: dict[str, Message | None] = {}  # of the last calls, by id
    for i, message in enumerate(messages):
        where, role = f"message {i}", _role(message)
        if role == "tool":
            call_id = message.get("tool_call_id")
            if not isinstance(call_id, str) or results.get(call_id, call_id) is not None:
                expected = "that of a call without a result in the assistant message before it: "
                raise _wrong(f"{where} has the tool_call_id", call_id, expected + _open(results))
            # some clients repeat the function's name, which is in the call
            results[call_id] = normalize_message({**message, "name": None}, where, tools=True)
            if None not in results.values():
                dialog += [result for result in results.values() if result is not None]
                results = {}
            continue
        if results:
            raise ValueError(f"{where} comes before the results of the calls {_open(results)}")
        if role == "assistant":
            texts = _call_texts(message.get("tool_calls") or [], where)
            results = dict.fromkeys(texts)
            content = "" if message.get("content") is None else message["content"]
            message = {**message, "content": content, "tool_calls": None}
            if texts:
                message |= {"tool_call": "; ".join(texts.values()), "eom": True}
        dialog.append(normalize_message(_renamed(message), where, tools=True))
    if results:
        raise ValueError(f"the results of the calls {_open(results)} are missing")
    return dialog


def _renamed(message: Any) -> Any:
    """The message with the role ``system`` for ``developer``."""
    return {**message, "role": "system"} if _role(message) == "developer" else message


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _open(results: Mapping[str, Message | None]) -> str:
    return ", ".join(call_id for call_id, result in results.items() if result is None) or "none"


def _call_texts(calls: Any, message: str) -> dict[str, str]:
    """Calls in the model's format, by id."""
    if not isinstance(calls, list):
        raise _wrong(f"the tool_calls of {message} are", calls, "a list")
    texts: dict[str, str] = {}
    for i, call in enumerate(calls):
        where = f"call {i} of {message}"
        function = call.get("function") if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str):
            form = "{'name': '...', 'arguments': '{...}'}}"
            raise _wrong(
                f"{where} is", call, f"{{'id': '...', 'type': 'function', 'function': {form}"
            )
        given = function.get("arguments")
        try:
            arguments = json.loads(given) if isinstance(given, str) else None
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise _wrong(f"the arguments of {where} are", given, "a JSON object as a string")
        call_id = call.get("id")
        if not isinstance(call_id, str) or call_id in texts:
            raise _wrong(f"the id of {where} is", call_id, "a string that no other call has")
        call = {"type": "function", "name": name, "parameters": arguments}
        text = json.dumps(call, ensure_ascii=False)
        texts[call_id] = _SURROGATE.sub(lambda half: f"\\u{ord(half[0]):x}", text)
    return texts


# --- Answers --------------------------------------------------------------------------------------


def _parse(text: str, functions: Mapping[str, Function]) -> list[tuple[str, str]]:
    """Names and arguments of the calls that a text consists of; none if it isn't only calls."""
    text = text.strip()
    found: list[Any] = []
    calls = []
    at = 0
    try:
        while at < len(text):
            if built_in := _BUILT_IN_CALL.match(text, at):
                name, key, value = built_in.groups()
                found.append({"name": name, "parameters": {key: value}})
                at = built_in.end()
            elif start := _FUNCTION_START.match(text, at):
                value, at = _DECODER.raw_decode(text, start.end())
                found.append({"name": start[1], "parameters": value})
                if end := _FUNCTION_END.match(text, at):
                    at = end.end()
            else:
                value, at = _DECODER.raw_decode(text, at)
                found += value if isinstance(value, list) else [value]
            while text.startswith(_SEPARATORS, at):
                at += 1
        for each in found:
            call = dict(each) if isinstance(each, dict) else {}
            name, kind = call.pop("name", None), call.pop("type", "function")
            arguments = call.pop("parameters", None)
            is_call = isinstance(name, str) and name in functions and kind == "function"
            if not is_call or not isinstance(arguments, dict) or call:
                return []
            # Python reads NaN and 1e999, which JSON can't express. Half of a surrogate pair, which
            # UTF-8 can't express, stays escaped.
            calls.append((name, json.dumps(arguments, allow_nan=False)))
    except (ValueError, RecursionError):
        return []
    return calls
