"""Llama.inspect, and how predictions look in a notebook."""

import json
import math

import pytest
import torch
from conftest import DEMO
from peers import huggingface_model

from llama import Llama
from llama.notebook import Prediction

TEXT = "What is 23 + 45? It is 68."


def test_equal_to_hugging_face() -> None:
    llm = Llama.build(str(DEMO), max_seq_len=64, dtype="float32", device="cpu")
    seen = llm.inspect(TEXT)
    model = huggingface_model(vars(llm.model.params), llm.model.state_dict())
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(
            torch.tensor([seen.tokens]), output_hidden_states=True, output_attentions=True
        )
    assert seen.tokens == llm.tokenizer.encode(TEXT, bos=True, eos=False)
    assert "".join(seen.texts[1:]) == TEXT
    for got, expected in (
        (seen.hidden_states, torch.cat(wanted.hidden_states)),
        (seen.attentions, torch.cat(wanted.attentions)),
        (seen.logits, wanted.logits[0]),
    ):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    lens = seen.logit_lens()
    assert lens.shape == (7, len(seen.tokens), llm.model.vocab_size)
    assert torch.equal(lens[-1], seen.logits)
    middle = model.lm_head(model.model.norm(wanted.hidden_states[3]))[0].detach()
    torch.testing.assert_close(lens[3], middle, atol=2e-4, rtol=1e-4)


def test_the_model_is_as_before() -> None:
    # float32: in bfloat16 a score depends on the prefixes that earlier calls have cached
    demo = Llama.build(str(DEMO), max_seq_len=256, dtype="float32", device="cpu")
    forms = [vars(block.attention).get("attend") for block in demo.model.layers]
    plain = demo.score([(TEXT, " Yes.")])[0].logprobs
    demo.inspect([5])
    with pytest.raises(ValueError, match="max_seq_len"):
        demo.inspect([5] * 300)
    with pytest.raises(ValueError, match="there are no tokens to inspect"):
        demo.inspect([])
    for ids, error in (([5, 9999], ValueError), ([-1], ValueError), ([[5]], TypeError)):
        with pytest.raises(error, match="prompt 0"):
            demo.inspect(ids)  # type: ignore[arg-type]
    assert [type(token) for token in demo.inspect(torch.tensor([5, 6])).tokens] == [int, int]  # type: ignore[arg-type]
    assert [vars(block.attention).get("attend") for block in demo.model.layers] == forms
    assert demo.score([(TEXT, " Yes.")])[0].logprobs == pytest.approx(plain, abs=1e-3)


def test_probes_can_be_trained_on_the_results(demo: Llama) -> None:
    seen = demo.inspect(TEXT)
    tokens = torch.tensor([seen.tokens])
    results = [seen.hidden_states, seen.attentions, seen.logits, seen.logit_lens()]
    for x in [*results, *demo.hidden_states(tokens)]:
        assert not x.requires_grad
        probe = torch.zeros(x.shape[-1], dtype=x.dtype, requires_grad=True)
        (x @ probe).float().sum().backward()
        assert probe.grad is not None
        x.mul_(2)  # in place, as with any tensor


def test_predictions_in_a_notebook(demo: Llama) -> None:
    dialog = [[{"role": "user", "content": "What is 23 + 45?"}]]
    [plain] = demo.chat_completion(dialog, temperature=0)  # type: ignore[arg-type]
    assert plain._repr_html_() == "<pre>23 + 45 = 68.</pre>"  # type: ignore[attr-defined]
    [scored] = demo.text_completion(["One"], temperature=0, logprobs=True, max_gen_len=4)
    assert scored._repr_html_().count("<span") == len(scored["tokens"])  # type: ignore[attr-defined]
    assert json.loads(json.dumps(scored)) == {**scored} == scored
    coloured = Prediction(generation="<b>x", tokens=["<b>", "x"], logprobs=[math.log(0.25), 0.0])
    assert coloured._repr_html_() == (
        '<pre style="white-space: pre-wrap">'
        '<span style="background: rgba(255, 0, 0, 0.525)" '
        'title="&#x27;&lt;b&gt;&#x27;: 25.0 %, log-probability -1.386">&lt;b&gt;</span>'
        '<span style="background: rgba(255, 0, 0, 0.000)" '
        'title="&#x27;x&#x27;: 100.0 %, log-probability 0.000">x</span></pre>'
    )
    assert Prediction(generation="<b>")._repr_html_() == "<pre>&lt;b&gt;</pre>"
