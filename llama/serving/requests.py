"""The engine's requests for the body of an API call."""

import copy
from collections.abc import Sequence

from llama.generation import Llama
from llama.request import Request
from llama.serving.schema import ApiError, Body, ChatBody, CompletionBody
from llama.serving.structured import JsonConstraint
from llama.serving.tools import with_tools


def encode_prompts(llm: Llama, body: Body) -> list[list[int]]:
    """The prompts of a call whose body has been checked, in tokens.

    Raises:
        ApiError: a message isn't valid, or needs something that the model's format doesn't have.
    """
    try:
        if isinstance(body, CompletionBody):
            return [
                llm.tokenizer.encode(prompt, bos=True, eos=False)
                if isinstance(prompt, str)
                else prompt
                for prompt in body.prompts
            ]
        messages = [message.model_dump(exclude_unset=True) for message in body.messages]
        dialog = with_tools(messages, body.tools, body.tool_choice, llm.formatter)
        return [llm.formatter.encode_dialog_prompt(dialog)]
    except ValueError as error:
        raise ApiError(400, str(error), body.prompt_field) from None


def new_requests(llm: Llama, body: Body, prompts: Sequence[Sequence[int]]) -> list[Request]:
    """A request for each choice of each prompt; those of a prompt follow one another.

    Raises:
        ApiError: a prompt is too long or isn't valid, or a JSON schema isn't supported.
    """
    params, longest = body.params(), llm.model.params.max_seq_len
    for prompt in prompts:
        if len(prompt) + (params.max_gen_len != 0) > longest:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens, and max_seq_len is {longest}, including "
                "the answer: shorten it, or start with a larger --max_seq_len",
                body.prompt_field,
                "context_length_exceeded",
            )
    try:
        requests = [
            llm.engine.request(prompt, params) for prompt in prompts for _ in range(body.n_choices)
        ]
    except (TypeError, ValueError) as error:
        raise ApiError(400, str(error), body.prompt_field) from None
    if isinstance(body, ChatBody):
        _constrain(llm, body, requests)
    return requests


def _constrain(llm: Llama, body: ChatBody, requests: list[Request]) -> None:
    is_json, schema = body.answer_schema()
    if not is_json:
        return
    try:
        constraint = JsonConstraint(llm.tokenizer, schema)
    except (ImportError, ValueError) as error:
        place = "response_format" if body.wants_json else "tools"
        raise ApiError(400, str(error), place) from None
    for request in requests:
        request.constraint = copy.copy(constraint)
