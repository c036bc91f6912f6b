"""JSON by a schema: masks, whole answers of the demo model, and their neighbours."""

import copy
import json
import random
import sys
import weakref
from pathlib import Path
from typing import Any

import jsonschema
import llama_models.llama3
import pytest
import torch
from conftest import DEMO, SHARED

from llama import Llama, Tokenizer
from llama.request import Request
from llama.sampling import SamplingParams, new_generator
from llama.serving import structured
from llama.serving.structured import JsonConstraint
from llama.serving.tools import answer_schema, tool_calls
from llama.tokenizer import AnyTokenizer
from llama.vocab.tokenizer_json import tokenizer_json

SUM: dict[str, Any] = {
    "type": "object",
    "properties": {"sum": {"type": "integer", "maximum": 999}, "sure": {"type": "boolean"}},
    "required": ["sum", "sure"],
    "additionalProperties": False,
}
# nested, with references, choices and bounded strings, so that every answer is short
TREE: dict[str, Any] = {
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 6}},
            "required": ["name"],
            "additionalProperties": False,
        }
    },
    "type": "object",
    "properties": {
        "kind": {"enum": ["oak", "élan", 'a "b" \\ c']},
        "leaves": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
        "age": {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 300}]},
    },
    "required": ["kind", "age"],
    "additionalProperties": False,
}
SCHEMAS = {"sum": SUM, "tree": TREE}


@pytest.fixture(scope="module", params=["tiktoken", "tokenizer.json", "SentencePiece"])
def any_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: Any) -> AnyTokenizer:
    original = Tokenizer(str(DEMO / "tokenizer.model"), llama31=True)
    if request.param == "tiktoken":
        return original
    path = SHARED / "stories260K" / "native" / "tokenizer.model"
    if request.param == "tokenizer.json":
        path = tmp_path_factory.mktemp("json") / "tokenizer.json"
        path.write_text(json.dumps(tokenizer_json(original)))
    elif not path.is_file():
        pytest.skip(f"needs the real vocabulary {path}")
    return Tokenizer(str(path))


def allowed(constraint: JsonConstraint, tokenizer: AnyTokenizer) -> set[int]:
    logits = torch.zeros(tokenizer.n_words)
    constraint.mask(logits)
    assert set(logits.tolist()) <= {0.0, -torch.inf}
    return set(torch.nonzero(logits == 0).flatten().tolist())


def text_of(tokenizer: AnyTokenizer, tokens: list[int]) -> str:
    return tokenizer.decode_bytes(tokens).decode()


# --- Masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_random_walk_ends_as_valid_json(any_tokenizer: AnyTokenizer, name: str) -> None:
    """Also: a stop token is allowed exactly where the text is complete, and all of them are; no
    other control token ever is."""
    rng = random.Random(0)
    for _ in range(10):
        constraint = JsonConstraint(any_tokenizer, SCHEMAS[name])
        tokens: list[int] = []
        while True:
            found = allowed(constraint, any_tokenizer)
            stops = found & any_tokenizer.stop_tokens
            assert found & any_tokenizer.control_ids == stops
            assert all(any_tokenizer.decode_bytes(i) for i in found - stops)
            if found == stops:
                break
            assert not stops  # both schemas are objects, complete at the closing brace only
            token = rng.choice(sorted(found))
            constraint.accept(token)
            tokens.append(token)
            assert len(tokens) < 200
        assert stops == any_tokenizer.stop_tokens
        constraint.accept(min(stops))
        assert constraint.error is None
        text = text_of(any_tokenizer, tokens)
        value = json.loads(text)
        jsonschema.validate(value, SCHEMAS[name])
        assert text.count("\n") == 0


def test_the_texts_of_a_finite_schema(any_tokenizer: AnyTokenizer) -> None:
    """All ways lead to one of them, and to each."""
    schema = {"enum": [1, 12, 123, "un", "under", "\u00e9", True, None]}
    texts = [json.dumps(value, ensure_ascii=False).encode() for value in schema["enum"]]
    vocabulary = [any_tokenizer.decode_bytes(i) for i in range(any_tokenizer.n_words)]
    ends = set()

    def visit(prefix: tuple[int, ...]) -> None:
        constraint = JsonConstraint(any_tokenizer, schema)
        for token in prefix:
            constraint.accept(token)
        done = any_tokenizer.decode_bytes(prefix)
        found = allowed(constraint, any_tokenizer)
        assert bool(found & any_tokenizer.stop_tokens) == (done in texts), done
        if done in texts:
            ends.add(done)
        following = found - any_tokenizer.control_ids
        assert all(any(t.startswith(done + vocabulary[i]) for t in texts) for i in following), done
        assert following or done in texts
        for token in following:
            visit((*prefix, token))

    visit(())
    assert ends == set(texts)


def test_a_string_has_no_control_tokens(any_tokenizer: AnyTokenizer) -> None:
    """Nor their names' bytes: it can't end the turn."""
    constraint = JsonConstraint(any_tokenizer, {"type": "string"})
    for text in ('"', "a", "<|"):
        for token in any_tokenizer.encode(f"\n{text}", bos=False, eos=False)[-len(text) :]:
            constraint.accept(token)
        found = allowed(constraint, any_tokenizer)
        assert len(found) > 100
        assert not found & any_tokenizer.control_ids


def test_text_without_a_choice_is_in_the_vocabularys_own_tokens(
    any_tokenizer: AnyTokenizer,
) -> None:
    text = '"Once upon a time there was a little dog."'
    constraint = JsonConstraint(any_tokenizer, {"const": json.loads(text)})
    tokens: list[int] = []
    while not (found := allowed(constraint, any_tokenizer)) & any_tokenizer.stop_tokens:
        assert len(found) == 1
        tokens += found
        constraint.accept(tokens[-1])
    assert text_of(any_tokenizer, tokens) == text
    line = any_tokenizer.encode(f"\n{text}", bos=False, eos=False)
    assert line[-len(tokens) :] == tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_excluded_logits_change(tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """In place, also for a row of a batch and for weights with more rows than the vocabulary."""
    logits = torch.randn(3, tokenizer.n_words + 64).to(dtype)
    before = logits.clone()
    constraint = JsonConstraint(tokenizer, SUM)
    constraint.mask(logits[1])
    assert torch.equal(logits[::2], before[::2])
    kept = logits[1] > -torch.inf
    assert set(torch.nonzero(kept).flatten().tolist()) == allowed(constraint, tokenizer)
    assert torch.equal(logits[1][kept], before[1][kept])
    assert not kept[tokenizer.n_words :].any()
    assert logits[1, int(logits[1].argmax())] > -torch.inf


def test_any_object_without_a_schema(tokenizer: Tokenizer) -> None:
    constraint = JsonConstraint(tokenizer, None)
    text = '{"a": [1, {"b": null}, "x\\n"], "c": -1.5e3}'
    for token in tokenizer.encode(text, bos=False, eos=False):
        found = allowed(constraint, tokenizer)
        assert token in found
        assert not found & tokenizer.stop_tokens
        constraint.accept(token)
    assert allowed(constraint, tokenizer) == tokenizer.stop_tokens
    [bracket] = tokenizer.encode("[", bos=False, eos=False)
    assert bracket not in allowed(JsonConstraint(tokenizer, None), tokenizer)


def test_whitespace_is_bounded(tokenizer: Tokenizer) -> None:
    """A greedy model whose likeliest token is always a space or a newline finishes."""
    blank = [i for i in range(tokenizer.n_words) if not tokenizer.decode_bytes(i).strip()]
    constraint = JsonConstraint(tokenizer, {**SUM, "required": ["sum", "sure"]})
    tokens = []
    for _ in range(60):
        logits = -torch.arange(tokenizer.n_words) / tokenizer.n_words
        logits[blank] = 1.0
        logits[list(tokenizer.stop_tokens)] = 2.0
        constraint.mask(logits)
        token = int(logits.argmax())
        if token in tokenizer.stop_tokens:
            break
        constraint.accept(token)
        tokens.append(token)
    jsonschema.validate(json.loads(tokenizer.decode(tokens)), SUM)


# --- Schemas and tokenizers ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nothing"}, "nothing"),
        ({"type": "string", "pattern": "("}, "isn't supported"),
        ({"$ref": "#/$defs/missing"}, "missing"),
        ({"$ref": "https://localhost/schema.json"}, "localhost"),
        ({"type": "object", "properties": 3}, "isn't supported"),
        ({"not": {"type": "string"}}, "not"),
        ({"const": "\ud800"}, "isn't supported: Value is not JSON"),
        ({"const": 10**40}, "isn't supported: Value is not JSON"),
        ({"enum": [f"value {i}" for i in range(100_000)]}, "too big"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "unsatisfiable"),
        ({"if": {"type": "integer"}, "then": {"minimum": 3}}, "if"),
        ({"type": "string", "format": "what"}, "what"),
        ([], r"is \[\], expected an object"),
        ("{}", "is '{}', expected an object"),
    ],
)
def test_bad_schemas_are_refused(tokenizer: Tokenizer, schema: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JsonConstraint(tokenizer, schema)


def test_vocabularies_that_cant_be_constrained_are_refused(tmp_path: Path) -> None:
    content = tokenizer_json(Tokenizer(str(DEMO / "tokenizer.model")))
    model = content["model"]
    letter = next(iter(model["vocab"]))
    others = {name: i for name, i in model["vocab"].items() if name != letter}
    content["model"] = {**model, "vocab": others, "merges": []}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokens for 255 of 256 bytes"):
        JsonConstraint(Tokenizer(str(path)), None)
    endless = Tokenizer(str(DEMO / "tokenizer.model"))
    endless.stop_tokens.clear()
    with pytest.raises(ValueError, match="the vocabulary has 0 stop tokens"):
        JsonConstraint(endless, None)


def test_the_vocabulary_is_read_once_and_freed_with_its_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = Tokenizer(str(DEMO / "tokenizer.model"))
    constraint = JsonConstraint(own, SUM)
    with monkeypatch.context() as patch:
        patch.setattr(structured, "_Vocabulary", None)
        JsonConstraint(own, TREE)
    gone = weakref.ref(own)
    del own, constraint
    assert gone() is None


def test_llama_3s_vocabulary() -> None:
    """128,256 tokens, of which many are parts of characters."""
    path = Path(llama_models.llama3.__file__).parent / "tokenizer.model"
    tokenizer = Tokenizer(str(path), llama31=True)
    constraint = JsonConstraint(tokenizer, {"enum": ["漢字 👩‍👩‍👧"]})
    tokens = tokenizer.encode('"漢字 👩‍👩‍👧"', bos=False, eos=False)
    for token in tokens:
        assert token in allowed(constraint, tokenizer)
        constraint.accept(token)
    assert allowed(constraint, tokenizer) == tokenizer.stop_tokens


def test_without_llguidance_the_command_is_named(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        ImportError, match=r'needs llguidance .*constraints.txt -e "\.\[structured\]"'
    ):
        JsonConstraint(tokenizer, SUM)


def test_copies_go_on_separately(tokenizer: Tokenizer) -> None:
    first = JsonConstraint(tokenizer, SUM)
    second = copy.copy(first)
    start = allowed(first, tokenizer)
    [token] = tokenizer.encode("{", bos=False, eos=False)
    second.accept(token)
    assert allowed(first, tokenizer) == start != allowed(second, tokenizer)
    assert allowed(copy.copy(second), tokenizer) == allowed(second, tokenizer)


def test_an_error_ends_the_answer(tokenizer: Tokenizer) -> None:
    """Not the engine, whose other requests go on."""
    constraint = JsonConstraint(tokenizer, SUM)
    constraint.accept(tokenizer.encode("x", bos=False, eos=False)[0])
    assert constraint.error is not None
    assert "\n" not in constraint.error
    first = constraint.error
    assert allowed(constraint, tokenizer) == tokenizer.stop_tokens
    assert constraint.error == first


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"n": {"$ref": "#/$defs/n"}}, "$ref": "#/$defs/n"},
        {
            "type": "object",
            "properties": {"n": {"$ref": "#"}},
            "required": ["n"],
        },
    ],
)
def test_a_schema_without_a_finite_text_ends_with_an_error(
    tokenizer: Tokenizer, schema: dict[str, Any]
) -> None:
    constraint = JsonConstraint(tokenizer, schema)
    for _ in range(3):
        found = allowed(constraint, tokenizer)
        if constraint.error:
            break
        constraint.accept(min(found))
    assert constraint.error
    assert allowed(constraint, tokenizer) == tokenizer.stop_tokens


@pytest.mark.parametrize(
    ("pattern", "start"),
    [
        ("^(a|aa)+$", "aaaaaaaaaaaaaaaaaaaa"),
        ("^(a{1,100}){1,100}$", "aaaaaaaaaaaaaaaaaaaa"),
        ("^.*a.{200}$", "abcabcabcabcabcabcab"),
        ("^(([a-z])+.)+[A-Z]([a-z])+$", "aaaaaaaaaaaaaaaaaaaa"),
    ],
)
def test_patterns_that_backtrack_elsewhere(tokenizer: Tokenizer, pattern: str, start: str) -> None:
    constraint = JsonConstraint(tokenizer, {"type": "string", "pattern": pattern})
    for token in tokenizer.encode('"' + start, bos=False, eos=False):
        assert token in allowed(constraint, tokenizer)
        constraint.accept(token)
    assert constraint.error is None


# --- Answers ------------------------------------------------------------------------------------


def question(demo: Llama, text: str) -> list[int]:
    return demo.formatter.encode_dialog_prompt([{"role": "user", "content": text}])


def request(demo: Llama, text: str, temperature: float = 0.0, limit: int = 80) -> Request:
    params = SamplingParams(temperature=temperature, top_p=1.0, max_gen_len=limit)
    return demo.engine.request(question(demo, text), params)


def run(demo: Llama, requests: list[Request]) -> list[list[int]]:
    """Each with its own seed; the tokens, without the stop token."""
    for i, each in enumerate(requests):
        demo.engine.add([each], new_generator(i, torch.device("cpu")))
    for _ in demo.engine.run(requests):
        pass
    stops = demo.tokenizer.stop_tokens
    return [each.tokens[:-1] if each.tokens[-1] in stops else each.tokens for each in requests]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_valid(demo: Llama, name: str, temperature: float) -> None:
    requests = [request(demo, f"What is {i} + 45?", temperature) for i in range(6)]
    for each in requests:
        each.constraint = JsonConstraint(demo.tokenizer, SCHEMAS[name])
    for each, tokens in zip(requests, run(demo, requests), strict=True):
        assert each.finish_reason == "stop"
        jsonschema.validate(json.loads(demo.tokenizer.decode(tokens)), SCHEMAS[name])
        assert each.constraint.error is None  # type: ignore[union-attr]


def test_the_models_choice_within_the_schema(demo: Llama) -> None:
    """Greedy, the constraint only takes away what isn't allowed."""
    schema = {"enum": ["The capital of Italy is Rome.", "The capital of Italy is Oslo."]}
    asked = request(demo, "What is the capital of Italy?")
    asked.constraint = JsonConstraint(demo.tokenizer, schema)
    [tokens] = run(demo, [asked])
    assert demo.tokenizer.decode(tokens) == '"The capital of Italy is Rome."'


def test_unconstrained_neighbours_are_unchanged(demo: Llama) -> None:
    texts = ["What is 23 + 45?", "Spell the word garden.", "What is the capital of Italy?"]
    temperatures = [0.0, 1.0, 0.8]
    plain = [request(demo, *pair) for pair in zip(texts, temperatures, strict=True)]
    expected = run(demo, plain)
    mixed = [request(demo, *pair) for pair in zip(texts, temperatures, strict=True)]
    for name in ("sum", "tree", "sum"):
        mixed.append(request(demo, "What is 1 + 2?", 1.0))
        mixed[-1].constraint = JsonConstraint(demo.tokenizer, SCHEMAS[name])
    tokens = run(demo, mixed)
    assert tokens[:3] == expected
    for name, ids in zip(("sum", "tree", "sum"), tokens[3:], strict=True):
        jsonschema.validate(json.loads(demo.tokenizer.decode(ids)), SCHEMAS[name])


def test_a_cancelled_request_leaves_the_others_valid(demo: Llama) -> None:
    requests = [request(demo, "What is 1 + 2?", 1.0) for _ in range(3)]
    for i, each in enumerate(requests):
        each.constraint = JsonConstraint(demo.tokenizer, TREE)
        demo.engine.add([each], new_generator(i, torch.device("cpu")))
    while len(requests[1].tokens) < 3:
        demo.engine.step()
    demo.engine.cancel(requests[1])
    while demo.engine.is_busy:
        demo.engine.step()
    assert [each.finish_reason for each in requests] == ["stop", "cancelled", "stop"]
    for each in (requests[0], requests[2]):
        jsonschema.validate(json.loads(demo.tokenizer.decode(each.tokens[:-1])), TREE)


def test_a_required_call_is_made(demo: Llama) -> None:
    """With references inside the definitions."""
    point = {
        "type": "object",
        "properties": {"x": {"type": "integer", "maximum": 9, "minimum": 0}},
        "required": ["x"],
        "additionalProperties": False,
    }
    line = {
        "$defs": {"Point": point},
        "type": "object",
        "properties": {"start": {"$ref": "#/$defs/Point"}, "end": {"$ref": "#/$defs/Point"}},
        "required": ["start", "end"],
        "additionalProperties": False,
    }
    schemas = {"wipe": point, "draw": line}
    tools = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in schemas.items()
    ]
    draw = {"type": "function", "function": {"name": "draw"}}
    choices: list[tuple[Any, set[str]]] = [("required", {"wipe", "draw"}), (draw, {"draw"})]
    for choice, expected in choices:
        names = set()
        asked = [request(demo, "What is 1 + 2?", 5.0) for _ in range(4)]
        for each in asked:
            each.constraint = JsonConstraint(demo.tokenizer, answer_schema(tools, choice))
        for tokens in run(demo, asked):
            answer = demo.tokenizer.decode(tokens)
            content, [call] = tool_calls({"role": "assistant", "content": answer}, tools)
            assert content is None
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            jsonschema.validate(json.loads(arguments), schemas[name])
            names.add(name)
        assert names == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_mask_is_applied_on_the_device_of_the_logits(tokenizer: Tokenizer) -> None:
    logits = torch.zeros(tokenizer.n_words, device="cuda", dtype=torch.bfloat16)
    constraint = JsonConstraint(tokenizer, SUM)
    constraint.mask(logits)
    kept = torch.nonzero(logits > -torch.inf).flatten().tolist()
    assert set(kept) == allowed(constraint, tokenizer)


def test_log_probabilities_are_those_without_a_schema(demo: Llama) -> None:
    prompt = demo.formatter.encode_dialog_prompt([{"role": "user", "content": "Hi"}])
    request = demo.engine.request(prompt, SamplingParams(1, temperature=0, logprobs=True))
    request.constraint = JsonConstraint(demo.tokenizer, SUM)
    demo.engine.add([request])
    [[(_, event)]] = list(demo.engine.run([request]))
    expected = demo.model(torch.tensor([prompt]), 0)[0, -1].log_softmax(-1)[event.token]
    assert event.logprob == pytest.approx(expected.item(), abs=1e-5)
