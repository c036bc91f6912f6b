"""Train the demo model from scratch: text, vocabulary, weights, native checkpoint folder.

    python demo/train.py --out demo/model        20 to 25 minutes on 2 CPU cores

Needs the extra [demo]: transformers to train the model, tokenizers to train the vocabulary. The
text comes from demo/data.py. The model has Llama 3's architecture and 1.24 million parameters.
"""

import argparse
import base64
import hashlib
import json
import math
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import data
from llama import ModelArgs
from llama.checkpoint import huggingface
from llama.checkpoint.sharding import shard_specs
from llama.tokenizer import ChatFormat, Tokenizer
from llama.vocab.tiktoken_file import SPLIT_PATTERN

PARAMS: dict[str, Any] = {
    "dim": 128,
    "n_layers": 6,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": 1024,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
FFN_HIDDEN = 352  # round_up(2/3 * 4 * dim, multiple_of)
N_BASE_TOKENS = PARAMS["vocab_size"] - 256
ROW_TOKENS = 256
BATCH_ROWS = 8
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100


def train_vocabulary(path: Path, seed: int) -> None:
    """Byte-level BPE with Llama 3's pattern, in tiktoken's format. Digits are removed from its
    training text, so they never merge and the model adds digit by digit."""
    rng = random.Random(seed)
    texts = [data.story(rng) for _ in range(3000)]
    for _ in range(12000):
        system, turns = data.dialog(rng)
        texts += [system or "", *(text for turn in turns for text in turn)]
    texts = [re.sub(r"\d+", "", text) for text in texts]
    texts += ["system", "user", "assistant", "\n\n"] * 20000  # one token each, as in Llama 3

    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"), byte_level]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=N_BASE_TOKENS, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)

    byte_of = _byte_level_alphabet()
    ranks = [bytes([b]) for b in range(256)]
    for merge in json.loads(bpe.to_str())["model"]["merges"]:
        ranks.append(bytes(byte_of[char] for char in "".join(merge)))
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    path.write_text("".join(lines))


def _byte_level_alphabet() -> dict[str, int]:
    """The byte for each visible character of byte-level BPE (GPT-2's convention)."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


class Documents:
    """An endless stream of rows of ``ROW_TOKENS`` tokens, packed from whole documents."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer, self.format = tokenizer, ChatFormat(tokenizer)
        self.rng = random.Random(seed)
        self.pool: list[list[int]] = []

    def document(self) -> list[int]:
        kind = self.rng.random()
        if kind < 0.12:
            return self.tokenizer.encode(data.drill(self.rng), bos=True, eos=True)
        if kind < 0.32:
            return self.tokenizer.encode(data.story(self.rng), bos=True, eos=True)
        system, turns = data.dialog(self.rng)
        ids = [self.tokenizer.bos_id]
        if system is not None:
            ids += self.format.encode_message({"role": "system", "content": system})
        for question, answer in turns:
            ids += self.format.encode_message({"role": "user", "content": question})
            ids += self.format.encode_message({"role": "assistant", "content": answer})
        return ids

    def row(self) -> tuple[list[int], list[int], list[int]]:
        """``ROW_TOKENS + 1`` tokens with their positions and document numbers (0 for padding),
        packed greedily: the longest document that still fits comes next."""
        ids: list[int] = []
        positions: list[int] = []
        numbers: list[int] = []
        while True:
            while len(self.pool) < 40:
                document = self.document()
                if len(document) <= ROW_TOKENS:
                    self.pool.append(document)
            room = ROW_TOKENS + 1 - len(ids)
            fitting = [document for document in self.pool if len(document) <= room]
            if not fitting:
                return ids + [0] * room, positions + [0] * room, numbers + [0] * room
            best = max(fitting, key=len) if ids else self.pool[0]
            self.pool.remove(best)
            ids += best
            positions += range(len(best))
            numbers += [numbers[-1] + 1 if numbers else 1] * len(best)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs, targets (-100: none), positions, and the mask that keeps documents apart."""
        rows = [self.row() for _ in range(BATCH_ROWS)]
        ids, positions, numbers = (torch.tensor(part) for part in zip(*rows, strict=True))
        same = numbers[:, 1:] == numbers[:, :-1]  # a document's first token is not predicted
        targets = ids[:, 1:].masked_fill(~(same & (numbers[:, 1:] > 0)), -100)
        inside = numbers[:, :-1]
        mask = (inside[:, :, None] == inside[:, None, :]).tril()[:, None]
        return ids[:, :-1], targets, positions[:, :-1], mask


def new_model(seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=PARAMS["vocab_size"],
        hidden_size=PARAMS["dim"],
        intermediate_size=FFN_HIDDEN,
        num_hidden_layers=PARAMS["n_layers"],
        num_attention_heads=PARAMS["n_heads"],
        num_key_value_heads=PARAMS["n_kv_heads"],
        max_position_embeddings=2 * ROW_TOKENS,
        rms_norm_eps=PARAMS["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": PARAMS["rope_theta"]},
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 2:
                std = 0.02 if "embed" in key else 0.5 * weight.shape[1] ** -0.5
                if key.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= 0.5 * math.sqrt(2 * PARAMS["n_layers"])
                weight.normal_(0, std, generator=generator)
    return model


def train_weights(documents: Documents, steps: int, seed: int) -> LlamaForCausalLM:
    model = new_model(seed)
    matrices = [p for k, p in model.named_parameters() if p.dim() == 2 and "embed" not in k]
    others = [p for k, p in model.named_parameters() if p.dim() != 2 or "embed" in k]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), eps=1e-9, weight_decay=0, fused=True),
    ]
    start, mean_loss = time.time(), 0.0
    for step in range(1, steps + 1):
        done = max(0.0, (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS))
        rate = min(1.0, step / WARMUP_STEPS) * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate
        ids, targets, positions, mask = documents.batch()
        hidden = model.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
        ).last_hidden_state
        wanted = targets >= 0
        loss = F.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        mean_loss = loss.item() if step == 1 else 0.95 * mean_loss + 0.05 * loss.item()
        if step % 100 == 0 or step == steps:
            print(f"step {step}: loss {mean_loss:.4f}, {time.time() - start:.0f} s", flush=True)
    return model


def write_checkpoint(model: LlamaForCausalLM, folder: Path) -> None:
    """Write weights, params.json and checklist.chk in the native layout."""
    source = model.state_dict()
    native = {}
    for key in shard_specs(ModelArgs(**PARAMS)):
        tensor = source[huggingface.huggingface_key(key)]
        if huggingface.is_rotated(key):
            head_dim = PARAMS["dim"] // PARAMS["n_heads"]
            tensor = huggingface.halves_as_pairs(tensor, head_dim).reshape(tensor.shape)
        native[key] = tensor
    # clone: the tied embedding is two tensors in a native file
    tensors = {key: tensor.to(torch.bfloat16).clone() for key, tensor in native.items()}
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS) + "\n")
    sums = (
        f"{hashlib.md5((folder / name).read_bytes(), usedforsecurity=False).hexdigest()}  {name}\n"
        for name in ("consolidated.00.pth", "params.json", "tokenizer.model")
    )
    (folder / "checklist.chk").write_text("".join(sums))


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    train_vocabulary(args.out / "tokenizer.model", args.seed)
    documents = Documents(Tokenizer(str(args.out / "tokenizer.model")), args.seed)
    write_checkpoint(train_weights(documents, args.steps, args.seed), args.out)
    print(f"wrote {args.out} after {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
