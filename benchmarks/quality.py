"""What 16, 8 and 4 bits cost in accuracy, next to llama.cpp: see benchmarks/README.md.

python benchmarks/quality.py
python benchmarks/quality.py --folders demo/model,../shared/models/stories260K/native
"""

import contextlib
import datetime
import itertools
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fire
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import llamacpp  # noqa: E402
from benchmarks.gguf_files import write_gguf  # noqa: E402
from demo import data  # noqa: E402
from demo.evaluate import as_dialog  # noqa: E402
from llama import Llama  # noqa: E402
from llama.chat import ChatFormat  # noqa: E402
from llama.memory import plan_of  # noqa: E402

SUMS = "sums: new pairs of numbers"
LENGTH = 256  # tokens of the longest text
OURS = ("bfloat16", "int8", "int4")
THEIRS = ("BF16", "Q8_0", "Q4_0")
# llama.cpp with the tensors and widths that this library quantizes: the same bits per weight
ALIKE: dict[str, Any] = {"pad": True, "override": {"token_embd": "BF16", "output": "Q8_0"}}
Logits = Callable[[list[int]], Tensor]


@dataclass
class Loss:
    """Sums over the predicted tokens of some texts.

    Attributes:
        log_loss: negative natural-log probabilities of the next tokens.
        divergence: Kullback-Leibler divergences from the float32 model's distribution, in nats.
        n_same: how often the most likely token is the float32 model's.
    """

    n: int = 0
    log_loss: float = 0.0
    divergence: float = 0.0
    n_same: int = 0

    def add(self, tokens: list[int], logits: Tensor, reference: Tensor) -> None:
        """Count a text.

        Args:
            logits, reference: [len(tokens), V], of the model and of the float32 model.
        """
        q = torch.log_softmax(logits[:-1].double(), dim=-1)
        p = torch.log_softmax(reference[:-1].double(), dim=-1)
        self.n += len(q)
        self.log_loss -= q.gather(-1, torch.tensor(tokens[1:])[:, None]).sum().item()
        self.divergence += (p.exp() * (p - q)).sum().item()
        self.n_same += int((p.argmax(-1) == q.argmax(-1)).sum())

    def figures(self) -> dict[str, float]:
        """Perplexity and means per token."""
        return {
            "perplexity": math.exp(self.log_loss / self.n),
            "divergence": self.divergence / self.n,
            "same_token": self.n_same / self.n,
        }


@dataclass
class Candidate:
    """A model in one format.

    Attributes:
        bits: per weight of the whole model.
        logits: of every token of a text, [S, V].
        answers: the greedy answers to questions, given as token ids.
    """

    name: str
    bits: float
    logits: Logits
    answers: Callable[[list[list[int]]], list[str]]
    losses: dict[str, Loss] = field(default_factory=dict)


def main(
    folders: str | tuple[str, ...] = str(ROOT / "demo" / "model"),
    texts: int = 100,
    questions: int = 200,
    results: str = str(ROOT / "benchmarks" / "results"),
) -> None:
    """Print a table for each model, and write a JSON line.

    Args:
        folders: native checkpoints, separated by commas.
        texts: of each kind: the demo's stories, and held-out dialogs of a model with Llama 3's
            format, or else what the float32 model itself writes.
        questions: sums that the demo model is asked.
        results: folder of the JSON lines.
    """
    torch.set_num_threads(1)  # small models are slower on more
    where = Path(results)
    where.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    for folder in folders.split(",") if isinstance(folders, str) else folders:
        record = measure(Path(folder).resolve(), texts, questions)
        print(f"\n{table(record)}\n")
        with (where / f"quality-{now}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def measure(folder: Path, n_texts: int, n_questions: int) -> dict[str, Any]:
    """The record of a model: its texts, and the figures of every format on them."""
    reference = _build(folder, "float32")
    n_weights = sum(weight.numel() for weight in reference.model.parameters())
    sets = texts_for(reference, n_texts)
    asked = [] if "dialogs" not in sets else data.test_dialogs(SUMS, n_questions)
    prompts = [reference.formatter.encode_dialog_prompt(as_dialog(dialog)) for dialog in asked]
    expected = [turns[-1][1] for _, turns in asked]
    formats = {}
    for candidate in _candidates(folder, reference, n_weights):
        for name, sequences in sets.items():
            loss = candidate.losses.setdefault(name, Loss())
            for tokens in sequences:
                loss.add(tokens, candidate.logits(tokens), _logits(reference, tokens))
        answers = candidate.answers(prompts) if prompts else []
        formats[candidate.name] = {
            "bits_per_weight": candidate.bits,
            **{name: loss.figures() for name, loss in candidate.losses.items()},
            "sums": sum(a == b for a, b in zip(answers, expected, strict=True)),
        }
    return {
        "model": "/".join(folder.parts[-2:]),
        "weights": n_weights,
        "tokens": {name: sum(len(s) - 1 for s in sequences) for name, sequences in sets.items()},
        "questions": len(expected),
        "ways": str(reference.ways),
        "llama.cpp": llamacpp.description(),
        "formats": formats,
    }


def texts_for(llm: Llama, n: int) -> dict[str, list[list[int]]]:
    """Texts as token ids that start with BOS, by their kind; no model was trained on them."""
    rng = random.Random("quality")
    encode = llm.tokenizer.encode
    stories = [" ".join(data.story_sentences(rng, test=True)) for _ in range(n)]
    sets = {"stories": [encode(text, bos=True, eos=True) for text in stories]}
    if isinstance(llm.formatter, ChatFormat):
        kinds = itertools.cycle(data.TESTS)
        dialogs = {kind: data.test_dialogs(kind, -(-n // len(data.TESTS))) for kind in data.TESTS}
        drawn = [dialogs[kind].pop() for kind in itertools.islice(kinds, n) if dialogs[kind]]
        sets["dialogs"] = [_with_answer(llm, dialog) for dialog in drawn]
    else:
        bos = [[llm.tokenizer.bos_id]] * n
        written, _ = llm.generate(bos, LENGTH - 2, temperature=1.0, top_p=1.0, seed=1)
        sets["its own"] = [[*start, *text] for start, text in zip(bos, written, strict=True)]
    return {name: [tokens[:LENGTH] for tokens in found] for name, found in sets.items()}


def _with_answer(llm: Llama, dialog: data.Dialog) -> list[int]:
    prompt = llm.formatter.encode_dialog_prompt(as_dialog(dialog))
    answer = llm.tokenizer.encode(dialog[1][-1][1], bos=False, eos=False)
    return [*prompt, *answer, llm.tokenizer.special_tokens["<|eot_id|>"]]


def _candidates(folder: Path, reference: Llama, n_weights: int) -> Iterator[Candidate]:
    """This library's formats, then llama.cpp's, each loaded when its turn comes."""
    for name in OURS:
        llm = _build(folder, name)
        bits = 8 * plan_of(llm.model, 1).weights / n_weights
        yield Candidate(name, bits, partial(_logits, llm), partial(_answers, llm))
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        changed: list[dict[str, Any]] = [{}] * len(THEIRS) + [ALIKE] * (len(THEIRS) - 1)
        for name, changes in zip(THEIRS + THEIRS[1:], changed, strict=True):
            write_gguf(folder, file, name, **changes)
            with contextlib.closing(llamacpp.Model(file, 1, LENGTH, 1, max_outputs=LENGTH)) as gguf:
                yield Candidate(
                    f"llama.cpp {name}{', our tensors' if changes else ''}",
                    8 * gguf.weight_bytes / n_weights,
                    partial(_gguf_logits, gguf),
                    partial(_gguf_answers, gguf, reference),
                )


def _build(folder: Path, name: str) -> Llama:
    is_dtype = name in ("float32", "bfloat16")
    with contextlib.redirect_stdout(sys.stderr):
        return Llama.build(
            str(folder),
            max_seq_len=LENGTH,
            max_batch_size=32,
            device="cpu",
            dtype=name if is_dtype else "bfloat16",
            quantize=None if is_dtype else name,
        )


def _logits(llm: Llama, tokens: list[int]) -> Tensor:
    return llm.model(torch.tensor([tokens]), 0)[0]


def _answers(llm: Llama, prompts: list[list[int]]) -> list[str]:
    tokens, _ = llm.generate(prompts, LENGTH, temperature=0)
    return [llm.tokenizer.decode(answer).strip() for answer in tokens]


def _gguf_logits(model: llamacpp.Model, tokens: list[int], start: int = 0) -> Tensor:
    n = len(tokens)
    if start == 0:
        model.clear()
    positions = list(range(start, start + n))
    return torch.from_numpy(model.forward(tokens, positions, [0] * n, [True] * n).copy())


def _gguf_answers(model: llamacpp.Model, llm: Llama, prompts: list[list[int]]) -> list[str]:
    answers = []
    for prompt in prompts:
        tokens, start = prompt, 0
        answer: list[int] = []
        while len(prompt) + len(answer) < LENGTH:
            chosen = int(_gguf_logits(model, tokens, start)[-1].argmax())
            if chosen in llm.tokenizer.stop_tokens:
                break
            answer.append(chosen)
            start, tokens = start + len(tokens), [chosen]
        answers.append(llm.tokenizer.decode(answer).strip())
    return answers


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    kinds = list(record["tokens"])
    head = ["bits per weight", *(f"{kind}: perplexity | mean KL | same token" for kind in kinds)]
    head += ["sums"] if record["questions"] else []
    n_columns = 1 + 1 + 3 * len(kinds) + bool(record["questions"])
    lines = [f"| {record['model']} | {' | '.join(head)} |", "|---" * n_columns + "|"]
    for name, figures in record["formats"].items():
        cells = [name, f"{figures['bits_per_weight']:.2f}"]
        for kind in kinds:
            values = figures[kind]
            cells += [f"{values['perplexity']:.4f}", f"{values['divergence']:.2e}"]
            cells.append(f"{100 * values['same_token']:.2f} %")
        if record["questions"]:
            cells.append(f"{figures['sums']} of {record['questions']}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    fire.Fire(main)
