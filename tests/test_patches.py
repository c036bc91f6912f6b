"""Subclasses, replaced methods and forward hooks affect generation; hidden states."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEMO, PARAMS, new_model, random_weights
from cuda_standin import OnCpu
from peers import huggingface_model
from torch import Tensor, nn

from llama import Llama, Tokenizer
from llama.accel import compile as compiling
from llama.accel import cpu, cuda
from llama.model import FeedForward

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14], [3, 1]]


@pytest.fixture
def llm() -> Llama:
    model = new_model(PARAMS, random_weights(PARAMS), max_seq_len=64, max_batch_size=4)
    llm = Llama(model, Tokenizer(str(DEMO / "tokenizer.model")))
    llm.tokenizer.stop_tokens = set()
    return llm


def by_forward(llm: Llama, prompt: list[int], n: int) -> list[int]:
    """Greedy tokens by full forward passes, as a user would write it."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(llm.model(torch.tensor([tokens]), 0)[0, -1].argmax()))
    return tokens[len(prompt) :]


# --- Subclasses and replaced methods ----------------------------------------------------------


class Shouting(Llama):
    def generate(self, prompt_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        ids = self.tokenizer.encode("HELLO", bos=False, eos=False)
        return [ids for _ in prompt_tokens], [[-1.0] * len(ids) for _ in prompt_tokens]


def test_a_subclass_builds_itself() -> None:
    assert type(Shouting.build(str(DEMO), max_seq_len=64, device="cpu")) is Shouting


def test_an_overridden_generate_is_used_by_the_other_calls(llm: Llama) -> None:
    shouting = Shouting(llm.model, llm.tokenizer)
    text = shouting.text_completion(["Once", "Twice"], logprobs=True)
    assert [row["generation"] for row in text] == ["HELLO", "HELLO"]
    assert text[0]["logprobs"] == [-1.0] * len(text[0]["tokens"])
    assert shouting.text_completion(["Once"], stop=["LL"])[0]["generation"] == "HE"
    answer = shouting.chat_completion([[{"role": "user", "content": "Hi"}]])[0]
    assert answer["generation"] == {"role": "assistant", "content": "HELLO"}


class Recording(Llama):
    def generate(self, prompt_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        self.options = kwargs
        return super().generate(prompt_tokens, *args, **kwargs)


def test_an_overridden_generate_gets_the_options_that_are_given(llm: Llama) -> None:
    recording = Recording(llm.model, llm.tokenizer)
    texts = [recording.text_completion(["Once"], 1.0, max_gen_len=8, seed=0) for _ in range(2)]
    assert recording.options == {"seed": 0}
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="top_logprobs is 2, expected 0: generate is overridden"):
        recording.text_completion(["Once"], top_logprobs=2)


def test_a_replaced_sampler_is_used(llm: Llama) -> None:
    shapes = []

    def least_likely(logits: Tensor, *_: Any) -> Tensor:
        shapes.append(logits.shape[0])
        return logits.argmin(-1)

    llm.sample = least_likely  # type: ignore[method-assign, assignment]
    tokens = llm.generate(PROMPTS, 3, temperature=0.7)[0]
    first = llm.model(torch.tensor([PROMPTS[0]]), 0)[0, -1].argmin()
    assert tokens[0][0] == first
    assert shapes == [2, 2, 2]


def test_stop_tokens_changed_after_build_take_effect(llm: Llama) -> None:
    whole = llm.generate([PROMPTS[0]], 10, temperature=0)[0][0]
    llm.tokenizer.stop_tokens = {whole[4]}
    expected = whole[: whole.index(whole[4])]
    assert llm.generate([PROMPTS[0]], 10, temperature=0)[0][0] == expected


# --- Hooks ------------------------------------------------------------------------------------


def damped(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output * 0.5 - 0.25


@pytest.mark.parametrize(
    "name", ["layers.0", "layers.1", "norm", "", "layers.1.attention", "layers.1.feed_forward.w1"]
)
def test_forward_hooks_take_effect_in_generation(llm: Llama, name: str) -> None:
    plain = llm.generate(PROMPTS, 8, temperature=0)[0]
    module = llm.model.get_submodule(name)

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return -output if name == "" else damped(module, inputs, output)

    handle = module.register_forward_hook(hook)
    hooked = llm.generate(PROMPTS, 8, temperature=0)[0]
    assert hooked != plain
    assert hooked == [by_forward(llm, prompt, 8) for prompt in PROMPTS]
    handle.remove()
    assert llm.generate(PROMPTS, 8, temperature=0)[0] == plain


@pytest.mark.parametrize("name", ["layers.1", "layers.1.attention", "norm"])
def test_a_patched_forward_takes_effect(llm: Llama, name: str) -> None:
    plain = llm.generate(PROMPTS, 8, temperature=0)[0]
    module: Any = llm.model.get_submodule(name)
    forward: Callable[..., Tensor] = module.forward
    module.forward = lambda *args: forward(*args) * 0.5 - 0.25
    assert llm.generate(PROMPTS, 8, temperature=0)[0] != plain
    assert llm.generate(PROMPTS, 8, temperature=0)[0] == [
        by_forward(llm, prompt, 8) for prompt in PROMPTS
    ]


def test_the_last_block_sees_every_token_while_it_has_a_hook(llm: Llama) -> None:
    shapes: list[torch.Size] = []
    hook = llm.model.layers[-1].register_forward_hook(lambda _m, _i, y: shapes.append(y.shape))
    llm.generate(PROMPTS, 1, temperature=0)
    llm.model(torch.tensor([[1, 2, 3], [4, 5, 6]]), 0)
    hook.remove()
    assert shapes == [(12, 128), (2, 3, 128)]


def test_cuda_graphs_are_bypassed_with_hooks(llm: Llama) -> None:
    capture = OnCpu()
    model: Any = llm.model
    model.decode = cuda.GraphedStep(model, model.decode, any_length=False, capture=capture)
    plain = llm.generate(PROMPTS, 8, temperature=0)[0]
    assert capture.n_replays == 7
    handle = model.layers[0].register_forward_hook(damped)
    assert llm.generate(PROMPTS, 8, temperature=0)[0] == [by_forward(llm, p, 8) for p in PROMPTS]
    assert capture.n_replays == 7
    handle.remove()
    assert llm.generate(PROMPTS, 8, temperature=0)[0] == plain
    assert capture.n_replays == 14


def test_compiled_steps_are_bypassed_with_hooks(
    llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def compile_nothing(step: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
        def counted(*args: Any) -> Tensor:
            nonlocal steps
            steps += 1
            return step(*args)

        return counted

    monkeypatch.setattr(torch, "compile", compile_nothing)
    model: Any = llm.model
    model.decode = compiling.compiled_decode(model)
    llm.generate(PROMPTS, 8, temperature=0)
    assert steps == 7
    model.norm.register_forward_hook(damped)
    assert llm.generate(PROMPTS, 8, temperature=0)[0] == [by_forward(llm, p, 8) for p in PROMPTS]
    assert steps == 7


@pytest.mark.parametrize("name", ["w1", "w2", "w3"])
def test_the_fused_swiglu_is_bypassed_with_hooks(llm: Llama, name: str) -> None:
    for module in llm.model.modules():
        if isinstance(module, FeedForward):
            module.compute = cpu.swiglu_weight_lhs
    plain = llm.generate(PROMPTS, 8, temperature=0)[0]
    llm.model.get_submodule(f"layers.0.feed_forward.{name}").register_forward_hook(damped)
    hooked = llm.generate(PROMPTS, 8, temperature=0)[0]
    assert hooked != plain
    assert hooked == [by_forward(llm, prompt, 8) for prompt in PROMPTS]


def test_prefixes_cached_with_a_hook_are_not_reused_without_it(llm: Llama) -> None:
    prompt = list(range(20, 50))
    plain = llm.generate([prompt], 8, temperature=0)[0]
    with llm.model.layers[0].register_forward_hook(damped):
        assert llm.generate([prompt], 8, temperature=0)[0] != plain
    assert llm.generate([prompt], 8, temperature=0)[0] == plain


# --- Hidden states ----------------------------------------------------------------------------


def test_hidden_states_match_hugging_face(llm: Llama) -> None:
    tokens = torch.tensor([PROMPTS[0], list(range(100, 110))])
    theirs = huggingface_model(PARAMS, random_weights(PARAMS))
    with torch.no_grad():
        expected = theirs(tokens, output_hidden_states=True).hidden_states
    states = llm.hidden_states(tokens)
    assert len(states) == len(expected) == PARAMS["n_layers"] + 1
    for ours, reference in zip(states, expected, strict=True):
        assert ours.shape == (2, 10, 128)
        assert ours.dtype == torch.float32
        assert (ours - reference).norm() / reference.norm() < 1e-5
    assert torch.equal(llm.hidden_states(tokens, [2, 0])[0], states[2])
    assert torch.equal(llm.hidden_states(tokens, [2, 0])[1], states[0])


def test_hidden_states_leave_no_hooks_and_refuse_unknown_layers(llm: Llama) -> None:
    before = llm.generate(PROMPTS, 8, temperature=0)[0]
    with pytest.raises(ValueError, match="layers has 3, expected 0 to 2"):
        llm.hidden_states(torch.tensor([[1]]), [3])
    with pytest.raises(ValueError, match="max_seq_len 64"):
        llm.hidden_states(torch.zeros(1, 65, dtype=torch.int64))
    assert not any(module._forward_hooks for module in llm.model.modules())
    assert llm.generate(PROMPTS, 8, temperature=0)[0] == before
