"""Ask the demo model held-out questions, and print its accuracy.

python demo/evaluate.py                     the whole table
python demo/evaluate.py --count 20          a quick look
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import data
from llama import Dialog, Llama, Message

MODEL = Path(__file__).resolve().parent / "model"


def as_dialog(dialog: data.Dialog) -> Dialog:
    """The messages up to the last question."""
    system, turns = dialog
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages[:-1]


def wrong_answers(llm: Llama, kind: str, count: int) -> tuple[list[tuple[str, str, str]], int]:
    """(question, expected, answer) of wrong greedy answers, and the number of questions."""
    dialogs = data.test_dialogs(kind, count)
    predictions = llm.chat_completion([as_dialog(d) for d in dialogs], temperature=0)
    wrong = []
    for (_, turns), prediction in zip(dialogs, predictions, strict=True):
        question, expected = turns[-1]
        if prediction["generation"]["content"] != expected:
            wrong.append((question, expected, prediction["generation"]["content"]))
    return wrong, len(dialogs)


def wrong_stories(llm: Llama, count: int) -> tuple[list[tuple[str, str, str]], int]:
    """(opening, fault, story) of the inconsistent stories, and the number of stories."""
    openings = data.test_story_openings(count)
    predictions = llm.text_completion(openings, temperature=0)
    wrong = []
    for opening, prediction in zip(openings, predictions, strict=True):
        story = opening + prediction["generation"]
        fault = data.story_fault(story)
        if fault is not None:
            wrong.append((opening, fault, story))
    return wrong, len(openings)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo model on held-out questions.")
    parser.add_argument("--model", default=str(MODEL), help="checkpoint folder")
    parser.add_argument("--count", type=int, default=200, help="maximum questions per kind")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--wrong", type=int, default=0, help="wrong answers to show per kind")
    args = parser.parse_args()
    llm = Llama.build(args.model, max_seq_len=256, max_batch_size=50, dtype=args.dtype)
    results = {kind: wrong_answers(llm, kind, args.count) for kind in data.TESTS}
    results["stories: new name in the opening"] = wrong_stories(llm, args.count)
    print(f"\n| greedy, {args.dtype} | right | of | |\n|---|---|---|---|")
    for kind, (wrong, asked) in results.items():
        right = asked - len(wrong)
        print(f"| {kind} | {right} | {asked} | {100 * right / asked:.1f} % |")
    for kind, (wrong, _) in results.items():
        for question, expected, answer in wrong[: args.wrong]:
            print(f"\n{kind}: {question}\n  expected: {expected}\n  answered: {answer}")


if __name__ == "__main__":
    main()
