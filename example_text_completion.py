"""Let a model continue texts.

python example_text_completion.py                                       the bundled demo model
torchrun --nproc_per_node 1 example_text_completion.py Meta-Llama-3-8B
torchrun --nproc_per_node 8 example_text_completion.py Meta-Llama-3-70B
"""

from pathlib import Path

from llama import Llama, cli

DEMO = str(Path(__file__).parent / "demo" / "model")

DEMO_PROMPTS = [
    "Once upon a time there was a little fox named Clara.",
    "A brave owl named Tom lived near the forest.",
    "Once there was a funny pig. The pig was named",
    "Once upon a time",
]
PROMPTS = [
    "The tide is caused by",
    "A good bread needs only four things: flour, water,",
    """Dear colleagues,

from next week the printer on the second floor will""",
    # few-shot: examples before the question
    """Write the country for each city.

Oslo: Norway
Lima: Peru
Nairobi: Kenya
Hanoi:""",
]


def main(
    ckpt_dir: str = DEMO,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
    prompt: str | list[str] | None = None,
) -> None:
    """Let a model continue texts and print both.

    Args:
        ckpt_dir: checkpoint folder, or hub id (owner/name); default the demo model.
        tokenizer_path: default tokenizer.model in the checkpoint folder.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_p: draw from the likeliest tokens that sum up to this probability.
        max_seq_len: longest text and continuation together, in tokens.
        max_gen_len: longest continuation, in tokens.
        max_batch_size: texts that are continued together; more run one batch after the other.
        prompt: a text, or a list ["one", "two"] of them, to be continued instead.
    """
    prompts = DEMO_PROMPTS if ckpt_dir == DEMO else PROMPTS
    if prompt is not None:
        prompts = [prompt] if isinstance(prompt, str) else prompt
    llm = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size)
    predictions = llm.text_completion(prompts, temperature, top_p, max_gen_len)
    for text, prediction in zip(prompts, predictions, strict=True):
        print(text)
        print(f"> {prediction['generation']}\n")
        print("==================================\n")


if __name__ == "__main__":
    cli.run(main)
