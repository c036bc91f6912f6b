"""Dialogs of the interactive chat, without a terminal (test_interactive.py has those with one)."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO

from llama import Llama, Message, Tokenizer
from llama.commands.chat_session import COMMANDS, ChatSession
from llama.driver import Driver
from llama.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0)


@pytest.fixture
def session(demo: Llama) -> Iterator[ChatSession]:
    with Driver(demo) as driver:
        yield ChatSession(demo, driver, GREEDY)


def say(session: ChatSession, line: str) -> str:
    return "".join(session.respond(line))


def contents(session: ChatSession) -> list[str]:
    return [message["content"] for message in session.messages]


# --- Answers ------------------------------------------------------------------------------------


def test_answers_are_those_of_chat_completion(session: ChatSession, demo: Llama) -> None:
    dialog: list[Message] = []
    for question in ("What is 23 + 45?", "Spell the word garden."):
        dialog.append({"role": "user", "content": question})
        dialog.append(demo.chat_completion([dialog], temperature=0)[0]["generation"])
        assert say(session, question) == dialog[-1]["content"]
        assert session.messages == dialog
        assert session.note is None


def test_the_computed_tokens_of_a_turn_do_not_grow_with_the_history(session: ChatSession) -> None:
    lengths, computed = [], []
    for i in range(6):
        say(session, f"What is 2{i} + 45?")
        assert session.stats is not None
        lengths.append(session.stats.n_prompt)
        computed.append(session.stats.n_prompt - session.stats.n_reused)
    assert lengths[-1] > 4 * lengths[0]
    assert max(computed[1:]) <= lengths[0] + 2  # and the end of the last answer


def test_an_answer_that_is_stopped_stays_as_far_as_it_was_shown(
    session: ChatSession, demo: Llama
) -> None:
    whole = say(session, "Spell the word garden.")
    say(session, "/clear")
    with closing(session.respond("Spell the word garden.")) as pieces:
        shown = "".join(next(pieces) for _ in range(4))
    assert whole.startswith(shown)
    assert len(shown) < len(whole)
    assert contents(session) == ["Spell the word garden.", shown]
    assert session.stats is not None
    n_prompt = session.stats.n_prompt
    answer = ""
    for piece in session.respond("What is 23 + 45?"):
        answer += piece
        assert demo.engine.slots.n_free >= 7  # the first request doesn't run on
    assert answer == "23 + 45 = 68."
    assert session.stats.n_reused >= n_prompt


def test_an_answer_may_be_stopped_before_its_first_token(
    session: ChatSession, demo: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.engine.slots.forget()
    monkeypatch.setattr(demo.engine, "max_prefill_tokens", 2)
    with closing(session.respond("What is 23 + 45?")) as pieces:
        assert next(pieces) == ""
    assert contents(session) == ["What is 23 + 45?", ""]
    assert session.stats is not None
    assert "first token" not in str(session.stats)
    say(session, "/regen")
    assert contents(session) == ["What is 23 + 45?", "23 + 45 = 68."]


def test_a_failed_answer_leaves_the_dialog_as_it_was(
    session: ChatSession, demo: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    say(session, "What is 23 + 45?")
    before = list(session.messages)
    with monkeypatch.context() as patch:
        patch.setattr(demo.model, "logits", lambda h: torch.full((len(h), 1024), torch.nan))
        with pytest.raises(FloatingPointError, match="aren't finite"):
            say(session, "Spell the word garden.")
    assert session.messages == before
    with monkeypatch.context() as patch:

        def no_memory(*_: Any, **__: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(demo.model, "hidden", no_memory)
        with pytest.raises(torch.OutOfMemoryError, match=r"(?s)out of memory.*The plan was"):
            say(session, "Spell the word garden.")
    assert session.messages == before
    assert say(session, "What is 1 + 2?") == "1 + 2 = 3."


def test_a_dialog_without_room_is_refused_and_kept(session: ChatSession) -> None:
    say(session, "What is 23 + 45?")
    before = list(session.messages)
    with pytest.raises(ValueError, match=r"has \d{3} tokens, which .* max_seq_len \(256\).*/undo"):
        say(session, "What is 23 + 45? " * 40)
    assert session.messages == before
    assert say(session, "What is 1 + 2?") == "1 + 2 = 3."


def test_a_dialog_needs_room_for_one_token(session: ChatSession, demo: Llama) -> None:
    one = demo.formatter.encode_dialog_prompt([{"role": "user", "content": "word"}])
    words = ["word" + " word" * (n - len(one)) for n in (255, 256)]
    say(session, words[0])
    assert session.stats is not None
    assert (session.stats.n_prompt, session.stats.n_generated) == (255, 1)
    say(session, "/undo")
    with pytest.raises(ValueError, match="has 256 tokens, which leaves no room"):
        say(session, words[1])


def test_an_answer_that_is_cut_off_has_a_note(session: ChatSession) -> None:
    say(session, "/set max_gen_len 3")
    say(session, "Spell the word garden.")
    assert session.note == "the answer was cut off at max_gen_len (3 tokens)"
    say(session, "/set max_gen_len none")
    session._llm.sample = lambda logits, *_: torch.full((len(logits),), 70)  # type: ignore[method-assign]
    try:
        say(session, "Spell the word garden.")
    finally:
        del session._llm.sample
    assert session.note is not None
    assert session.note.startswith("the answer was cut off at max_seq_len (256 tokens): /undo")
    say(session, "/undo")
    assert session.note is None


def test_draws_differ_but_repeat_with_the_same_seed(demo: Llama) -> None:
    def draws(seed: int) -> list[str]:
        with Driver(demo) as driver:
            session = ChatSession(demo, driver, SamplingParams(16, 2.0, 1.0), seed=seed)
            return [say(session, line) for line in ("Tell me a story.", "/regen", "/regen")]

    first = draws(1)
    assert draws(1) == first
    assert len({*first, *draws(2)}) == 6


def test_a_tool_call_stays_in_the_dialog_as_one(folder: Path) -> None:
    """As in ``chat_completion``; the next turn then reuses all of its tokens."""
    llm = Llama.build(str(folder), max_seq_len=128, max_batch_size=1, device="cpu", dtype="float32")
    llm = Llama(llm.model, Tokenizer(str(DEMO / "tokenizer.model"), llama31=True))
    special, encode = llm.tokenizer.special_tokens, llm.tokenizer.encode
    answer = [
        *encode("Let me see.", bos=False, eos=False),
        special["<|python_tag|>"],
        *encode("2 + 3", bos=False, eos=False),
        special["<|eom_id|>"],
    ]
    tokens = iter([*answer, special["<|eot_id|>"]])
    llm.sample = lambda *_: torch.tensor([next(tokens)])  # type: ignore[method-assign]
    with Driver(llm) as driver:
        session = ChatSession(llm, driver, GREEDY)
        say(session, "What is 2 + 3?")
        assert session.messages[-1] == {
            "role": "assistant",
            "content": "Let me see.",
            "tool_call": "2 + 3",
            "eom": True,
        }
        n_first = session.stats.n_prompt if session.stats else 0
        say(session, "5")
        assert session.stats is not None
        assert session.stats.n_reused == n_first + len(answer) - 1


# --- Commands -----------------------------------------------------------------------------------


def test_undo_and_regen_and_clear(session: ChatSession) -> None:
    say(session, "What is 23 + 45?")
    say(session, "What is 1 + 2?")
    assert say(session, "/regen") == "1 + 2 = 3."
    assert contents(session) == [
        "What is 23 + 45?",
        "23 + 45 = 68.",
        "What is 1 + 2?",
        "1 + 2 = 3.",
    ]
    assert "'What is 1 + 2?'" in say(session, "/undo")
    assert contents(session) == ["What is 23 + 45?", "23 + 45 = 68."]
    say(session, "/system Answer in capital letters.")
    say(session, "/clear")
    assert contents(session) == ["Answer in capital letters."]
    for command, message in (("/undo", "no message to remove"), ("/regen", "no message to answer")):
        with pytest.raises(ValueError, match=message):
            say(session, command)


def test_the_system_message_is_set_and_removed(session: ChatSession) -> None:
    question = "What is the capital of France?"
    plain = say(session, question)
    assert say(session, "/system Answer in capital letters.") == "system message set"
    assert say(session, "/regen") == plain.upper()
    say(session, "/system Answer in capital letters.")
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]
    assert say(session, "/system") == "no system message"
    assert say(session, "/regen") == plain


def test_settings_are_shown_set_and_checked(session: ChatSession) -> None:
    say(session, "/set temperature 0.7")
    say(session, "/set max_gen_len 12")
    assert session.params == SamplingParams(12, 0.7, 0.9)
    assert say(session, "/set").splitlines() == ["temperature 0.7", "top_p 0.9", "max_gen_len 12"]
    assert "max_gen_len none" in say(session, "/set max_gen_len none")
    assert session.params.max_gen_len is None
    for words, message in (
        ("temperature hot", "temperature is 'hot', expected a number"),
        ("temperature none", "temperature is None, expected a number"),
        ("top_p 2", "top_p is 2, expected 0 to 1"),
        ("max_gen_len 1.5", r"max_gen_len is 1\.5, expected an integer"),
        ("seed 1", "'seed 1', expected one of temperature"),
        ("temperature", "'temperature', expected one of"),
    ):
        with pytest.raises(ValueError, match=message):
            say(session, f"/set {words}")
    assert session.params == SamplingParams(None, 0.7, 0.9)


def test_statistics_of_the_last_answer(session: ChatSession) -> None:
    with pytest.raises(ValueError, match="no answer yet"):
        say(session, "/stats")
    say(session, "What is 23 + 45?")
    assert session.stats is not None
    assert session.stats.first_token_s is not None
    assert 0 < session.stats.first_token_s < session.stats.total_s
    stats = dataclasses.replace(session.stats, n_reused=3, first_token_s=0.5, total_s=1.5)
    session.stats = dataclasses.replace(stats, n_generated=11)
    assert say(session, "/stats") == (
        f"prompt: {stats.n_prompt} tokens, 3 of them reused; first token after 0.500 s; "
        "answer: 11 tokens, 10.0 tokens per second"
    )


def test_help_lists_all_commands(session: ChatSession) -> None:
    lines = say(session, "/help").splitlines()
    assert [line.split()[0] for line in lines] == [*(f"/{name}" for name in COMMANDS), "//TEXT"]


def test_unknown_commands_and_arguments_are_refused(session: ChatSession) -> None:
    for line, message in (
        ("/quit now", r"unknown command /quit, expected one of /system, .*/help; .* with //"),
        ("/", "unknown command /,"),
        ("/ undo", "unknown command /,"),
        ("/undo 2", "/undo is followed by '2', expected nothing"),
        ("/save", "/save has no argument, expected /save FILE"),
    ):
        with pytest.raises(ValueError, match=message):
            say(session, line)
    assert session.messages == []


def test_text_is_sent_as_it_is(session: ChatSession) -> None:
    say(session, "/set max_gen_len 1")
    for line, sent in (
        ("//usr/bin", "/usr/bin"),
        ("  two\n  lines ", "  two\n  lines "),
        ("a//b",) * 2,
    ):
        say(session, line)
        assert session.messages[-2] == {"role": "user", "content": sent}


# --- Files --------------------------------------------------------------------------------------


def test_a_saved_dialog_goes_on_after_loading(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "my dialog.json"
    say(session, "/system Réponds en français.")
    say(session, "What is 23 + 45?")
    assert say(session, f"/save {path}") == f"3 messages written to {path}"
    messages = list(session.messages)
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"messages": messages}
    assert "Réponds" in text  # readable
    say(session, "What is 1 + 2?")
    say(session, f"/save {path}")  # again, over its own file
    say(session, "/undo")
    say(session, f"/save {path}")
    say(session, "/system")
    say(session, "/clear")
    assert say(session, f"/load {path}") == f"3 messages read from {path}"
    assert session.messages == messages
    say(session, "/regen")
    assert session.messages == messages


def test_a_loaded_dialog_of_llama_2_goes_on(stories: Path, tmp_path: Path) -> None:
    """Its format has no prompt for a dialog that ends with an answer."""
    llm = Llama.build(str(stories / "hf"), max_batch_size=1, device="cpu", dtype="float32")
    with Driver(llm) as driver:
        session = ChatSession(llm, driver, SamplingParams(8, 0.0), system="Be brief.")
        say(session, "Once")
        say(session, f"/save {tmp_path / 'dialog'}")
        say(session, "/clear")
        say(session, f"/load {tmp_path / 'dialog'}")
        say(session, "upon")
        assert [message["role"] for message in session.messages] == [
            "system",
            *("user", "assistant") * 2,
        ]


def test_a_saved_dialog_survives_a_full_disk(
    session: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data[:9])
        raise OSError(28, "No space left on device")

    path, link = tmp_path / "dialog.json", tmp_path / "link"
    link.symlink_to(path)
    say(session, "What is 23 + 45?")
    say(session, f"/save {link}")
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", full)
    say(session, "What is 1 + 2?")
    with pytest.raises(OSError, match="No space left"):
        say(session, f"/save {link}")
    assert path.read_bytes() == before
    assert link.is_symlink()


def test_save_replaces_saved_dialogs_only(session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes")
    say(session, "What is 23 + 45?")
    with pytest.raises(ValueError, match=r"notes\.txt' isn't a saved dialog"):
        say(session, f"/save {path}")
    assert path.read_text() == "my notes"
    with pytest.raises(FileNotFoundError):
        say(session, f"/save {tmp_path / 'none' / 'dialog.json'}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "isn't a saved dialog: Expecting property name"),
        ("[]", r"isn't a saved dialog, expected {\"messages\""),
        ('{"messages": ["hi"]}', "isn't a saved dialog, expected"),
        ('{"messages": [{"content": "hi"}]}', "can't be continued: message 0 is"),
        (
            '{"messages": [{"role": "robot", "content": "hi"}]}',
            "can't be continued: message 0 has the role 'robot'",
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": "one " * 300}]}),
            "can't be continued: the dialog has",
        ),
    ],
)
def test_a_file_that_cannot_be_loaded_changes_nothing(
    session: ChatSession, tmp_path: Path, text: str, message: str
) -> None:
    say(session, "What is 23 + 45?")
    before = list(session.messages)
    path = tmp_path / "dialog.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        say(session, f"/load {path}")
    with pytest.raises(FileNotFoundError):
        say(session, f"/load {tmp_path / 'none.json'}")
    assert session.messages == before
