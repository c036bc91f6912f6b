"""Generation options: stop strings, top_logprobs, n, continue_final_message, top_p=0."""

from typing import Any, cast

import pytest
import torch
from conftest import DEMO, PARAMS
from reference import logits as oracle_logits
from torch import Tensor

from llama import Dialog, Llama, Message, Tokenizer
from llama.chat import ChatFormat
from llama.detokenizer import Detokenizer
from llama.sampling import sample_top_p

STORY = "Once upon a time"
QUESTION: Dialog = [{"role": "user", "content": "What is 23 + 45?"}]


def story(demo: Llama, **options: Any) -> Any:
    return demo.text_completion([STORY], temperature=0, max_gen_len=30, **options)[0]


# --- stop -------------------------------------------------------------------------------------


def test_a_stop_string_is_found_across_token_boundaries(demo: Llama) -> None:
    whole = story(demo, logprobs=True)
    for i in range(1, len(whole["tokens"]) - 3):
        before, (first, second) = "".join(whole["tokens"][:i]), whole["tokens"][i : i + 2]
        stop = first[-1] + second
        at = whole["generation"].find(stop)
        result = story(demo, stop=[stop, "\0 in no text"], logprobs=True)
        assert 0 < at <= len(before + first)
        assert result["generation"] == "".join(result["tokens"]) == whole["generation"][:at]
        assert len(result["logprobs"]) == len(result["tokens"]) <= i + 2


def test_the_first_of_several_stop_strings_ends_the_text(demo: Llama) -> None:
    text = story(demo)["generation"]
    stops = [text[20:24], text[12:15], text[30:33]]
    assert story(demo, stop=stops)["generation"] == text[: min(map(text.find, stops))]


def test_an_incomplete_stop_string_stays_in_the_text(demo: Llama) -> None:
    text = story(demo)["generation"]
    result = story(demo, stop=[text[-3:] + "\0", text[5:9] + "\0"], logprobs=True)
    assert result["generation"] == "".join(result["tokens"]) == text


def test_a_stop_string_in_the_prompt_is_ignored(demo: Llama) -> None:
    plain, stopped = (story(demo, echo=True, stop=stop) for stop in ([], ["upon a"]))
    assert stopped == plain


def test_a_stop_string_ends_a_stream_with_finish_reason_stop(demo: Llama) -> None:
    ids = demo.tokenizer.encode(STORY, bos=True, eos=False)
    text = story(demo)["generation"]
    events = [step[0] for step in demo.stream([ids], 30, 0, stop=[text[10:14]])]
    assert "".join(event.text for event in events) == text[: text.find(text[10:14])]
    assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["stop"]


def test_a_stop_id_ends_generate_and_is_left_out(llm: Llama) -> None:
    whole = llm.generate([[5, 6, 7]], 20, temperature=0)[0][0]
    stop = whole[6]
    tokens, logprobs = llm.generate([[5, 6, 7]], 20, 0, logprobs=True, stop=[stop])
    assert tokens == [whole[: whole.index(stop)]]
    assert logprobs is not None
    assert len(logprobs[0]) == len(tokens[0])


def test_an_answer_ends_at_a_stop_string(demo: Llama) -> None:
    answer = demo.chat_completion([QUESTION], temperature=0, stop=[" ="])[0]["generation"]
    assert answer == {"role": "assistant", "content": "23 + 45"}


def test_a_stop_string_may_begin_with_a_split_character(tokenizer: Tokenizer) -> None:
    """The stop string begins with "é", whose two bytes are separate tokens."""
    ids = [tokenizer.encode(s, bos=False, eos=False) for s in ("caf", "é", "s")]
    detokenizer = Detokenizer(tokenizer, starts_text=False)
    detokenizer.stop = ["és"]
    pieces = [detokenizer.add(token) for part in ids for token in part]
    assert "".join(pieces) == "caf"
    assert detokenizer.stopped


# --- top_logprobs -----------------------------------------------------------------------------


def test_top_logprobs_match_the_oracle(llm: Llama, weights: dict[str, Tensor]) -> None:
    prompt = [5, 6, 7]
    steps = list(llm.stream([prompt, [9]], 4, 0, echo=True, top_logprobs=3, logprobs=True))
    events = [event for step in steps for event in step if event.row == 0]
    tokens = [event.token for event in events]
    expected = torch.log_softmax(oracle_logits(weights, PARAMS, tokens), -1).topk(3)
    assert events[0].top_logprobs is None  # the first token has no context
    for i, event in enumerate(events[1:]):
        assert event.top_logprobs is not None
        assert list(event.top_logprobs) == expected.indices[i].tolist()
        assert list(event.top_logprobs.values()) == pytest.approx(
            expected.values[i].tolist(), abs=1e-4
        )
        if i >= len(prompt) - 1:  # generated greedily
            assert event.logprob == pytest.approx(next(iter(event.top_logprobs.values())))


def test_top_logprobs_in_predictions(demo: Llama) -> None:
    text = demo.text_completion([STORY], 0, max_gen_len=5, top_logprobs=2)[0]
    assert len(text["top_logprobs"]) == len(text["tokens"]) == 5
    assert "logprobs" not in text
    assert all(len(each) == 2 for each in text["top_logprobs"])
    chat = demo.chat_completion([QUESTION], 0, top_logprobs=2, logprobs=True)[0]
    first = [next(iter(each.values())) for each in chat["top_logprobs"]]
    assert first == pytest.approx(chat["logprobs"])


def test_top_logprobs_are_capped_at_the_vocabulary(llm: Llama) -> None:
    event = next(llm.stream([[5]], 1, 0, top_logprobs=5000))[0]
    assert event.top_logprobs is not None
    assert len(event.top_logprobs) == llm.model.params.vocab_size
    total = torch.tensor(list(event.top_logprobs.values())).exp().sum()
    assert total == pytest.approx(1, abs=1e-4)


# --- n ----------------------------------------------------------------------------------------


def test_n_samples_of_a_prompt_are_consecutive(demo: Llama) -> None:
    prompts = [STORY, "A brave owl"]
    rows = demo.text_completion(prompts, 1.0, 0.95, 8, n=3, seed=1, echo=True)
    for i, row in enumerate(rows):
        assert row["generation"].removeprefix("<|begin_of_text|>").startswith(prompts[i // 3])
    assert len({row["generation"] for row in rows}) > 2
    assert rows == demo.text_completion(prompts, 1.0, 0.95, 8, n=3, seed=1, echo=True)


def test_n_answers_to_a_dialog(demo: Llama) -> None:
    answers = demo.chat_completion([QUESTION], temperature=0, n=3)
    assert answers == demo.chat_completion([QUESTION], temperature=0) * 3


# --- continue_final_message -------------------------------------------------------------------


def test_a_final_message_of_the_assistant_is_continued(demo: Llama) -> None:
    opened: Dialog = [*QUESTION, {"role": "assistant", "content": "23 + 45 ="}]
    answer = demo.chat_completion([opened], temperature=0, continue_final_message=True)[0]
    assert answer["generation"]["content"] == " 68."
    ids = demo.formatter.encode_dialog_prompt(opened, continue_final_message=True)
    closed = demo.formatter.encode_dialog_prompt(opened)
    assert closed[: len(ids)] == ids
    assert closed[len(ids)] == demo.tokenizer.special_tokens["<|eot_id|>"]


def test_only_a_message_of_the_assistant_can_be_continued(demo: Llama) -> None:
    with pytest.raises(ValueError, match=r"message 0, the last, has the role 'user', expected"):
        demo.chat_completion([QUESTION], continue_final_message=True)


def test_a_message_that_has_ended_cannot_be_continued() -> None:
    formatter = ChatFormat(Tokenizer(str(DEMO / "tokenizer.model"), llama31=True))
    call: Message = {"role": "assistant", "content": "", "tool_call": "print(", "eom": True}
    with pytest.raises(ValueError, match="message 1, the last, has 'eom', which ends it"):
        formatter.encode_dialog_prompt([*QUESTION, call], continue_final_message=True)
    del call["eom"]
    ids = formatter.encode_dialog_prompt([*QUESTION, call], continue_final_message=True)
    assert formatter.tokenizer.decode(ids).endswith("<|python_tag|>print(")


# --- top_p = 0 --------------------------------------------------------------------------------


def test_top_p_zero_takes_the_likeliest_token(llm: Llama) -> None:
    probs = torch.softmax(torch.randn(64, 500, generator=torch.Generator().manual_seed(3)), -1)
    assert torch.equal(sample_top_p(probs, 0)[:, 0], probs.argmax(-1))
    prompts = [[5, 6, 7], [9]]
    assert llm.generate(prompts, 12, 1.5, top_p=0)[0] == llm.generate(prompts, 12, temperature=0)[0]


# --- Invalid options --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "END"}, "stop is the str 'END', expected a list"),
        ({"stop": [""]}, "stop has '', expected strings"),
        ({"stop": [1.5]}, "stop has 1.5, expected strings"),
        ({"top_logprobs": -1}, "top_logprobs is -1, expected 0 or more"),
        ({"top_logprobs": "x"}, "top_logprobs is 'x', expected an integer"),
        ({"n": 0}, "n is 0, expected an integer of at least 1"),
        ({"n": 1.0}, "n is 1.0, expected an integer of at least 1"),
    ],
)
def test_invalid_options_are_refused(llm: Llama, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        llm.text_completion(["Once"], max_gen_len=2, **options)
    with pytest.raises((TypeError, ValueError), match=message):
        llm.chat_completion([[cast(Message, {"role": "user", "content": "Hi"})]], **options)
