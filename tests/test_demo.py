"""The demo model answers held-out questions; its data generator and training script work."""

import random
import re
import sys
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, run

from demo import data
from demo.evaluate import wrong_answers, wrong_stories
from llama import Llama

# Samples are small, so their floors are below those of the full table in demo/README.md.
SAMPLE_SLACK = 0.07


@pytest.mark.parametrize("kind", data.TESTS)
def test_held_out_questions_are_answered(demo: Llama, kind: str) -> None:
    wrong, asked = wrong_answers(demo, kind, count=40)
    assert asked >= 30
    assert 1 - len(wrong) / asked >= data.TESTS[kind][1] - SAMPLE_SLACK, wrong


def test_stories_are_consistent(demo: Llama) -> None:
    wrong, asked = wrong_stories(demo, count=20)
    assert asked == 20
    assert 1 - len(wrong) / asked >= data.STORY_TEST_FLOOR - SAMPLE_SLACK, wrong


def test_answers_end_with_the_turn(demo: Llama) -> None:
    ids = demo.formatter.encode_dialog_prompt([{"role": "user", "content": "What is 23 + 45?"}])
    events = [events[0] for events in demo.stream([ids], temperature=0)]
    assert "".join(event.text for event in events) == "23 + 45 = 68."
    assert events[-1].token == demo.tokenizer.special_tokens["<|eot_id|>"]
    assert events[-1].finish_reason == "stop"


def test_digits_never_merge(demo: Llama) -> None:
    tokens = [demo.tokenizer.decode([i]) for i in range(768)]
    assert [t for t in tokens if any(c.isdigit() for c in t) and len(t) > 1] == []


def test_the_model_is_small_and_its_widths_are_multiples_of_eight() -> None:
    args = Llama.build(str(DEMO), device="cpu").model.params
    for width in (args.dim, args.ffn_hidden_dim, args.vocab_size, args.n_heads):
        assert width % 8 == 0
    assert args.kv_heads < args.n_heads
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 4e6


@pytest.mark.slow
def test_nothing_held_out_is_in_the_training_text() -> None:
    rng = random.Random(2)
    questions: set[str] = set()
    sheets: set[tuple[str, str]] = set()
    for _ in range(20000):
        questions.update(question for question, _ in data.dialog(rng)[1])
        sheets.update(re.findall(r"(?:Say|Spell) (\w+)\.|(\d+ \+ \d+)", data.drill(rng)))
    practised = {a or b for a, b in sheets}
    assert len(questions) > 10000
    assert len(practised) > 5000
    for kind in data.TESTS:
        for _, turns in data.test_dialogs(kind, 100):
            # for remembered names, only the introduction is held out
            asked = turns[0][0] if kind.startswith("names") else turns[-1][0]
            assert asked not in questions, kind
            answer = turns[-1][1]
            exercise = answer.split(" =")[0].removeprefix("You said ").strip(".").replace("-", "")
            assert exercise not in practised, kind


def test_there_are_at_least_fifty_facts() -> None:
    assert len(data.FACT_LIST) >= 50


def test_story_faults_are_found() -> None:
    rng = random.Random(1)
    for _ in range(200):
        assert data.story_fault(data.story(rng, animal="fox"), "fox") is None
    story = data.story(rng, animal="fox")
    assert data.story_fault(story, "bear") == "bear became fox"
    assert "not a sentence" in str(data.story_fault(story + " The end."))
    assert "only 1" in str(data.story_fault(story.split(".")[0] + "."))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_training_writes_a_loadable_checkpoint(tmp_path: Path) -> None:
    """Two training steps, end to end: vocabulary, weights, native files."""
    result = run(sys.executable, ROOT / "demo" / "train.py", "--out", tmp_path, "--steps", "2")
    assert result.returncode == 0, result.stderr
    # deterministic: the same vocabulary as the bundled model's
    assert (tmp_path / "tokenizer.model").read_bytes() == (DEMO / "tokenizer.model").read_bytes()
    assert (tmp_path / "params.json").read_bytes() == (DEMO / "params.json").read_bytes()
    llm = Llama.build(str(tmp_path), max_seq_len=32, device="cpu")
    assert len(llm.text_completion(["Once"], max_gen_len=3)) == 1


@pytest.mark.slow
def test_evaluate_prints_a_table() -> None:
    result = run(sys.executable, ROOT / "demo" / "evaluate.py", "--count", "3")
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == len(data.TESTS) + 2
