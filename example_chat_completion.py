"""Let a model answer.

python example_chat_completion.py                                       the bundled demo model
torchrun --nproc_per_node 1 example_chat_completion.py Meta-Llama-3-8B-Instruct
torchrun --nproc_per_node 8 example_chat_completion.py Meta-Llama-3-70B-Instruct
"""

from pathlib import Path

from llama import Dialog, Llama, cli

DEMO = str(Path(__file__).parent / "demo" / "model")

DEMO_DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "What is 23 + 45?"}],
    [
        {"role": "user", "content": "Hi, my name is Clara."},
        {"role": "assistant", "content": "Nice to meet you, Clara!"},
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "The capital of Italy is Rome."},
        {"role": "user", "content": "Do you remember my name?"},
    ],
    [
        {"role": "system", "content": "Answer in capital letters."},
        {"role": "user", "content": "What sound does a cow make?"},
    ],
    [{"role": "user", "content": "Spell the word garden."}],
    [{"role": "user", "content": "Who wrote Hamlet?"}],
]
DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "Why is the sky blue, in two sentences?"}],
    [
        {"role": "user", "content": "I have two days in Lisbon. What should I see?"},
        {
            "role": "assistant",
            "content": "Day one: Alfama and the castle, then fado in the evening. "
            "Day two: Belém with its tower and monastery, and the pastries next door.",
        },
        {"role": "user", "content": "It will rain on the second day. Change the plan."},
    ],
    [
        {"role": "system", "content": "Answer with a haiku."},
        {"role": "user", "content": "What is it like to debug a program at night?"},
    ],
    [
        {"role": "system", "content": "Answer with emojis only."},
        {"role": "user", "content": "How do I get from Berlin to Paris without flying?"},
    ],
    [{"role": "user", "content": "Write a short note to my neighbours: I practise the drums."}],
]


def main(
    ckpt_dir: str = DEMO,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
    prompt: str | list[str] | None = None,
) -> None:
    """Let a model answer questions and print the dialogs.

    Args:
        ckpt_dir: checkpoint folder, or hub id (owner/name); default the demo model.
        tokenizer_path: default tokenizer.model in the checkpoint folder.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: draw from the likeliest tokens that sum up to this probability.
        max_seq_len: longest dialog and answer together, in tokens.
        max_batch_size: dialogs that are answered together; more run one batch after the other.
        max_gen_len: longest answer, in tokens; default what max_seq_len leaves.
        prompt: a question, or a list ["one", "two"] of them, to be asked instead.
    """
    dialogs = DEMO_DIALOGS if ckpt_dir == DEMO else DIALOGS
    if prompt is not None:
        questions = [prompt] if isinstance(prompt, str) else prompt
        dialogs = [[{"role": "user", "content": question}] for question in questions]
    llm = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    answers = llm.chat_completion(dialogs, temperature, top_p, max_gen_len)
    for dialog, answer in zip(dialogs, answers, strict=True):
        for message in [*dialog, answer["generation"]]:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        print("==================================\n")


if __name__ == "__main__":
    cli.run(main)
