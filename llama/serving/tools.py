"""OpenAI's tools in Llama 3.1's format: definitions in the prompt, calls, and results.

This is "JSON based tool calling" of Meta's prompt format, which PyPI's ``llama-models`` has as
llama3_1/prompt_format.md: the system message begins with ``Environment: ipython``, and a user
message defines the functions. The model answers ``<|python_tag|>``, the call as JSON and
``<|eom_id|>``, or the JSON alone; a result has the role ``ipython``. Later models get the same
format.
"""

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from llama.chat_template import AnyChatFormat
from llama.dialog import Dialog, Message, text_of

_ENVIRONMENT = "Environment: ipython"
# the wording that the models were trained on
_BEFORE_DEFINITIONS = (
    "Answer the user's question by making use of the following functions if needed.\n"
    "If none of the function can be used, please say so.\n"
    "Here is a list of functions in JSON format:\n"
)
_AFTER_DEFINITIONS = "\n\nReturn function calls in JSON format."
# how the models call the tools they know by name, such as brave_search
_BUILT_IN_CALL = re.compile(r'(\w+)\.call\((\w+)="([^"]*)"\)')
_DECODER = json.JSONDecoder()

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

    Calls are JSON objects, several separated by ``;`` or whitespace or in a list. A text that holds
    anything else, or the name of another tool, is content. Ids are random.

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
            raise ValueError(
                f"tool {i} is {tool!r:.100}, expected "
                "{'type': 'function', 'function': {'name': '...', 'parameters': {...}}}"
            )
        if name in functions:
            raise ValueError(f"tool {i} has the name {name!r} of an earlier one: rename it")
        parameters = given.get("parameters")
        if not isinstance(parameters, dict | None):
            raise ValueError(
                f"the parameters of tool {i} are {parameters!r:.100}, expected a JSON schema"
            )
        functions[name] = {
            "name": name,
            "description": given.get("description") or "",
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
        raise ValueError(
            f"tool_choice is {tool_choice!r:.100}, expected 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': '...'}}"
        )
    name = function.get("name")
    if not isinstance(name, str) or name not in functions:
        raise ValueError(
            f"tool_choice names the function {name!r:.100}, expected one of the tools: "
            f"{', '.join(functions)}"
        )
    return name


def _call_schema(function: Function, place: str) -> dict[str, Any]:
    """The schema of a call, which is at the JSON pointer ``place`` of the whole."""
    parameters = _moved(function["parameters"], f"{place}/properties/parameters")
    properties = {
        "type": {"const": "function"},
        "name": {"const": function["name"]},
        "parameters": parameters,
    }
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself ("#/$defs/...") still hold at ``place``."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$id" in schema:  # its references start there
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = place + reference[1:]
    return moved


# --- Messages -------------------------------------------------------------------------------------


def _with_definitions(dialog: list[Message], functions: Sequence[Function]) -> list[Message]:
    system = _ENVIRONMENT
    if dialog and dialog[0].get("role") == "system":
        system += "\n\n" + text_of(dialog[0], "message 0").strip()
        dialog = dialog[1:]
    definitions = [
        json.dumps({"type": "function", "function": function}, indent=4, ensure_ascii=False)
        for function in functions
    ]
    text = _BEFORE_DEFINITIONS + "\n".join(definitions) + _AFTER_DEFINITIONS
    return [
        Message(role="system", content=system),
        Message(role="user", content=text),
        *dialog,
    ]


def _with_calls(messages: Sequence[Json]) -> list[Message]:
    """The messages, with calls and results as in this library's dialogs."""
    dialog: list[Message] = []
    results: dict[str, Message | None] = {}  # of the last calls, by id
    for i, message in enumerate(messages):
        where, renamed = f"message {i}", _renamed(message)
        is_result = isinstance(message, Mapping) and message.get("role") == "tool"
        if is_result:
            call_id = message.get("tool_call_id")
            if not isinstance(call_id, str) or results.get(call_id, call_id) is not None:
                raise ValueError(
                    f"{where} has the tool_call_id {call_id!r:.100}, expected that of a call "
                    f"without a result in the assistant message before it: {_open(results)}"
                )
            results[call_id] = Message(role="ipython", content=text_of(message, where))
            if None not in results.values():
                dialog += [result for result in results.values() if result is not None]
                results = {}
            continue
        if results:
            raise ValueError(f"{where} comes before the results of the calls {_open(results)}")
        if isinstance(message, Mapping) and message.get("role") == "assistant":
            calls = message.get("tool_calls") or []
            renamed = _answered(renamed, calls, where)
            results = dict.fromkeys(_ids(calls, where))
        dialog.append(renamed)
    if results:
        raise ValueError(f"the results of the calls {_open(results)} are missing")
    return dialog


def _renamed(message: Any) -> Any:
    """The message with the role ``system`` for ``developer``."""
    if isinstance(message, Mapping) and message.get("role") == "developer":
        return {**message, "role": "system"}
    return message


def _open(results: Mapping[str, Message | None]) -> str:
    return ", ".join(call_id for call_id, result in results.items() if result is None) or "none"


def _ids(calls: Sequence[Json], where: str) -> list[str]:
    ids = [call.get("id") for call in calls]
    valid = [call_id for call_id in ids if isinstance(call_id, str)]
    if len(set(valid)) < len(ids):
        raise ValueError(
            f"the tool_calls of {where} have the ids {ids!r:.100}, expected unique ones"
        )
    return valid


def _answered(message: dict[str, Any], calls: Any, where: str) -> Any:
    """An assistant's message with its calls as ``tool_call``."""
    message = {key: value for key, value in message.items() if key != "tool_calls"}
    if message.get("content") is None:
        message["content"] = ""
    if not isinstance(calls, list):
        raise ValueError(f"the tool_calls of {where} are {calls!r:.100}, expected a list")
    if calls:
        texts = [_call_text(call, f"call {i} of {where}") for i, call in enumerate(calls)]
        message |= {"tool_call": "; ".join(texts), "eom": True}
    return message


def _call_text(call: Any, where: str) -> str:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        raise ValueError(
            f"{where} is {call!r:.100}, expected {{'id': '...', 'type': 'function', 'function': "
            "{'name': '...', 'arguments': '{...}'}}"
        )
    given = function.get("arguments")
    try:
        arguments = json.loads(given) if isinstance(given, str) else None
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {where} are {given!r:.100}, expected a JSON object")
    return json.dumps(
        {"type": "function", "name": name, "parameters": arguments}, ensure_ascii=False
    )


# --- Answers --------------------------------------------------------------------------------------


def _parse(text: str, functions: Mapping[str, Function]) -> list[tuple[str, str]]:
    """Names and arguments of the calls that a text consists of; none if it isn't only calls."""
    text = text.strip()
    if built_in := _BUILT_IN_CALL.fullmatch(text):
        name, key, value = built_in.groups()
        return [(name, json.dumps({key: value}))] if name in functions else []
    found: list[Any] = []
    calls = []
    try:
        while text:
            value, end = _DECODER.raw_decode(text)
            found += value if isinstance(value, list) else [value]
            text = text[end:].lstrip("; \t\r\n")
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
