"""Let a safety classifier, such as Llama Guard, check a question and its answer.

python example_safety.py Llama-Guard-3-8B                                with the bundled demo model
python example_safety.py Llama-Guard-3-1B --ckpt_dir Meta-Llama-3.1-8B-Instruct
"""

import re
from pathlib import Path

from llama import Dialog, Llama, cli
from llama.chat_template import TemplateChatFormat
from llama.dialog import text_of

DEMO = str(Path(__file__).parent / "demo" / "model")


def build_guard(guard_dir: str, max_seq_len: int) -> Llama:
    """Build the classifier.

    Raises:
        ValueError: the folder has no chat_template of its own, with the classifier's prompt.
    """
    guard = Llama.build(guard_dir, max_seq_len=max_seq_len, max_batch_size=1)
    if not isinstance(guard.formatter, TemplateChatFormat):
        raise ValueError(
            f"{guard_dir!r} has no chat_template of its own, which has the classifier's "
            "instructions: give a Llama Guard folder in Hugging Face's layout"
        )
    return guard


def unsafe_categories(guard: Llama, dialog: Dialog) -> list[str]:
    """Classify the last message of a dialog between user and assistant, of any number of turns.

    Returns:
        The hazard categories, as ``categories_of`` reads them; [] if the message is safe.

    Raises:
        ValueError: the classifier can't read the message: it holds the name of a control token or a
            tool call, is too long for max_seq_len, or isn't in the template's text.
    """
    prompt = guard.formatter.encode_dialog_prompt(dialog)
    if text_of(dialog[-1], "the message").strip() not in guard.tokenizer.decode(prompt):
        raise ValueError("the classifier's chat_template leaves out the message to check")
    [tokens], _ = guard.generate([prompt], max_gen_len=64, temperature=0)
    return categories_of(guard.tokenizer.decode(tokens))


def categories_of(verdict: str) -> list[str]:
    """The categories of "unsafe\\nS1,S5"; [] for "safe". Any other verdict counts as unsafe."""
    verdict = verdict.strip()
    if verdict == "safe":
        return []
    found = re.fullmatch(r"unsafe\n([A-Z]\d+(?:,[A-Z]\d+)*)", verdict)
    return found[1].split(",") if found else [f"unknown verdict {verdict!r}"]


def main(
    guard_dir: str,
    ckpt_dir: str = DEMO,
    prompt: str = "What is the capital of Italy?",
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    guard_max_seq_len: int = 2048,
) -> None:
    """Answer a question if it is safe, and print the answer if it is safe too.

    Args:
        guard_dir: folder or hub id of the classifier, in Hugging Face's layout.
        ckpt_dir: folder or hub id of the chat model; default the demo model.
        prompt: the question.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: draw from the likeliest tokens that sum up to this probability.
        max_seq_len: longest question and answer together, in tokens.
        guard_max_seq_len: the same for the classifier, whose prompt also has its instructions.
    """
    guard = build_guard(guard_dir, guard_max_seq_len)
    llm = Llama.build(ckpt_dir, max_seq_len=max_seq_len, max_batch_size=1)
    dialog: Dialog = [{"role": "user", "content": prompt}]
    print(f"User: {prompt}\n")
    if categories := unsafe_categories(guard, dialog):
        print(f"Guard: the question is unsafe ({', '.join(categories)}) and isn't answered.")
        return
    [answer] = llm.chat_completion([dialog], temperature, top_p)
    if categories := unsafe_categories(guard, [*dialog, answer["generation"]]):
        print(f"Guard: the answer is unsafe ({', '.join(categories)}) and isn't shown.")
        return
    print(f"Assistant: {answer['generation']['content']}\n")
    print("Guard: both are safe.")


if __name__ == "__main__":
    cli.run(main)
