"""lm-evaluation-harness on this library: the numbers of the harness's own hf model."""

import functools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, PROGRAMS, ROOT, TORCHRUN, run

from llama import Llama
from llama.__main__ import convert_folder
from llama.accel import features
from llama.chat_template import LLAMA3_TEMPLATE
from llama.commands.evaluate import evaluate

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra [eval]")

import datasets  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from llama.integrations.lm_eval import LlamaLM  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness's packages
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "num_fewshot": 4,
        "fewshot_split": "test",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "local_until": {
        "output_type": "generate_until",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 40, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "local_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of the tasks, with their documents."""
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        # reading the harness's own tasks takes seconds
        manager = functools.partial(TaskManager, include_defaults=False)
        patch.setattr(lm_eval.tasks, "TaskManager", manager)
        yield write_tasks(folder)


def write_tasks(folder: Path) -> Path:
    rng = random.Random(0)
    documents = []
    for i in range(20):
        name, animal = rng.choice(["Lily", "Tom", "Mia", "Ben"]), rng.choice(["dog", "cat", "bird"])
        right = f" his {animal}."
        choices = [right, f" a purple. {animal}", f" she {animal} went", f" the the {animal}"]
        rng.shuffle(choices)
        query = f"Once upon a time, {name} had a {animal}. One day, {name} went to the park with"
        text = " ".join([f"{query} {choices[0]}"] * (1 + i))
        documents.append(
            {
                "query": query,
                "choices": choices,
                "gold": choices.index(right),
                "answer": right,
                "text": text,
            }
        )
    data = folder / "documents.jsonl"
    data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
    for name, options in TASKS.items():
        common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
        task = {"task": name, "test_split": "test", **common, **options}
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # YAML includes JSON
    group = {
        "group": "local_group",
        "task": ["local_choice"],
        "aggregate_metric_list": [{"metric": "acc"}],
    }
    (folder / "group.yaml").write_text(json.dumps(group))
    return folder


def results(model: Any, tasks: Path, **options: Any) -> dict[str, Any]:
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    return dict(found)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        pytest.param("demo", "folder", marks=pytest.mark.slow),
        ("stories260K", None),
    ],
)
def test_the_numbers_of_the_hf_model(
    name: str, template: str | None, tasks: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """On several windows of 256 tokens, with examples in the prompt, and as dialogs. The folder
    has Meta's format as its template."""
    source = DEMO if name == "demo" else request.getfixturevalue("stories") / "native"
    folder = str(tmp_path / "hf")
    convert_folder(str(source), folder, format="hf")
    llm = Llama.build(folder, max_seq_len=256, max_batch_size=8, dtype="float32", device="cpu")
    options: dict[str, Any] = {}
    if template is not None:
        options = {"apply_chat_template": True, "system_instruction": "Answer in one sentence."}
    ours = results(LlamaLM(llm, template or "meta", progress=False), tasks, **options)
    arguments = f"pretrained={folder},dtype=float32,max_length=256"
    theirs = results("hf", tasks, model_args=arguments, device="cpu", batch_size=4, **options)
    for task in TASKS:
        pairs = zip(ours["samples"][task], theirs["samples"][task], strict=True)
        for mine, other in pairs:
            assert mine["doc_id"] == other["doc_id"]
            for [got], [wanted] in zip(mine["resps"], other["resps"], strict=True):
                if task == "local_choice":
                    assert float(got[0]) == pytest.approx(float(wanted[0]), abs=1e-4)
                    assert got[1] == wanted[1]
                elif task == "local_until":
                    assert got == wanted
                else:
                    assert got == pytest.approx(wanted, rel=1e-6)
        for metric, value in theirs["results"][task].items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5)


def test_dialogs(demo: Llama) -> None:
    dialog = [{"role": "user", "content": "What is 23 + 45?"}]
    model = LlamaLM(demo, progress=False)
    text = model.apply_chat_template(dialog)
    assert model.tok_encode(text) == demo.formatter.encode_dialog_prompt(dialog)  # type: ignore[arg-type]
    request = Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 20}), 0)
    assert model.generate_until([request]) == ["23 + 45 = 68."]
    open_end = [*dialog, {"role": "assistant", "content": "23 + 45 ="}]
    text = model.apply_chat_template(open_end, add_generation_prompt=False)
    assert text.endswith("23 + 45 =")
    request = Instance("loglikelihood", {}, (text, " 68"), 0)
    [(_, is_greedy)] = model.loglikelihood([request])
    assert is_greedy
    assert (model.chat_template(True), model.chat_template(False)) == ("meta", None)
    with pytest.raises(ValueError, match="the folder has no chat template"):
        LlamaLM(demo, "folder")
    with pytest.raises(ValueError, match="template is 'alpaca', expected one of meta, folder"):
        LlamaLM(demo, "alpaca")


DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
WITH_DATES = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\n"
    + DATES
    + "' + system + '<|eot_id|>' }}"
    + LLAMA3_TEMPLATE.removeprefix("{{ bos_token }}")
)


def test_the_folders_template_may_add_dates(tmp_path: Path) -> None:
    """As Hugging Face's of Llama 3.1 does, which is otherwise Meta's format."""
    convert_folder(str(DEMO), str(tmp_path / "hf"), format="hf")
    path = tmp_path / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": WITH_DATES}))
    llm = Llama.build(str(tmp_path / "hf"), max_seq_len=64, dtype="float32", device="cpu")
    dialog = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    meta, folder = (LlamaLM(llm, name).apply_chat_template(dialog) for name in ("meta", "folder"))
    assert folder == meta.replace("Be brief.", f"{DATES}Be brief.")


def test_a_context_that_is_too_long_loses_its_start(
    demo: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LlamaLM(demo, progress=False)
    long = list(range(10, 400))
    pairs: list[Any] = [(None, context, [20, 300, 41]) for context in (long, long[-254:])]
    first, second = model._loglikelihood_tokens(pairs)
    assert first == second
    prompts: list[list[int]] = []

    def generate(rows: list[list[int]], **_: Any) -> tuple[list[list[int]], None]:
        prompts.extend(rows)
        return rows, None

    monkeypatch.setattr(demo, "generate", generate)
    text = "one two " * 200
    request = Instance("generate_until", {}, (text, {"max_gen_toks": 56}), 0)
    model.generate_until([request])
    assert prompts == [model.tok_encode(text)[-200:]]


def test_one_begin_of_text_token(demo: Llama) -> None:
    model, bos = LlamaLM(demo), demo.tokenizer.bos_id
    assert model.tok_encode("one").count(bos) == 1
    assert model.tok_encode("<|begin_of_text|>one") == model.tok_encode("one")
    assert model.tok_encode("one", add_special_tokens=False).count(bos) == 0


def test_options_of_tasks(demo: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    """The spellings that the harness's own tasks use."""
    given: list[dict[str, Any]] = []

    def generate(prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], None]:
        given.append(options)
        return [prompt[-1:] for prompt in prompts], None

    monkeypatch.setattr(demo, "generate", generate)
    model = LlamaLM(demo, progress=False)
    plain = {"max_gen_len": 99, "temperature": 0.0, "top_p": 1.0, "stop": []}
    cases: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
        ({"max_gen_toks": 99}, {}),
        ({"max_new_tokens": 99, "until": "\n"}, {"stop": ["\n"]}),
        ({"max_tokens": 99, "until": ["", "Q:"], "num_beams": 1}, {"stop": ["Q:"]}),
        ({"max_gen_toks": 99, "do_sample": False, "temperature": 0.7}, {}),
        ({"max_gen_toks": 99, "do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
        ({"max_gen_toks": 99, "temperature": 0.7}, {"temperature": 0.7}),
        ({"max_gen_toks": "99", "do_sample": True, "temperature": "0.0"}, {}),
    )
    for options, changes in cases:
        model.generate_until([Instance("generate_until", {}, ("Once", options), 0)])
        assert given.pop() == {**plain, **changes}
    # requests with different options are generated apart, and answered in order
    several = [(word, {"max_gen_toks": n}) for word, n in (("c", 9), ("b", 5), ("a", 9))]
    found = model.generate_until([Instance("generate_until", {}, x, 0) for x in several])
    assert found == ["c", "b", "a"]
    assert [options["max_gen_len"] for options in given] == [9, 5]


def test_options_without_a_counterpart_are_refused(demo: Llama) -> None:
    model = LlamaLM(demo, progress=False)
    cases = (
        ({"top_k": 5}, "generation_kwargs has top_k, expected until"),
        ({"num_beams": 4}, "generation_kwargs has num_beams, expected until"),
        ({"max_gen_toks": 256}, "max_gen_toks is 256, but max_seq_len is 256: lower it"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate_until([Instance("generate_until", {}, ("Once", options), 0)])
    too_long = Instance("loglikelihood", {}, ("Once", " upon" * 300), 0)
    with pytest.raises(ValueError, match=r"continuation 0 has \d+ tokens, but max_seq_len is 256"):
        model.loglikelihood([too_long])


@pytest.fixture
def evaluated(tasks: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the command in this process, and returns what it writes."""

    def run_it(names: str, **options: Any) -> dict[str, Any]:
        output = tmp_path / "results.json"
        common = {"include_path": str(tasks), "max_seq_len": 256, "dtype": "float32"}
        evaluate(str(DEMO), names, output=str(output), **common | options)
        return dict(json.loads(output.read_text()))

    return run_it


def test_what_the_command_writes(
    evaluated: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluated(
        "local_c*", limit=3, apply_chat_template=True, system="Be brief.", num_fewshot=1
    )
    table = capsys.readouterr().out
    assert "|local_choice" in table
    own = found["llama"]
    assert own["ways"].startswith("linear layers: ")
    assert own["ways"] in table
    assert own["versions"]["torch"] == torch.__version__
    assert own["versions"].keys() >= {"lm_eval", "transformers", "datasets"}
    assert (own["dtype"], own["max_seq_len"], own["threads"]) == ("torch.float32", 256, 1)
    assert (own["tensor_parallel"], own["replicas"], own["device"]) == (1, 1, "cpu")
    assert (own["system_instruction"], own["apply_chat_template"]) == ("Be brief.", True)
    assert set(own["processor"]) == features.cpu_features()
    seeds = [found["config"][f"{name}_seed"] for name in ("random", "numpy", "torch", "fewshot")]
    assert seeds == [0, 1234, 1234, 1234]  # the harness's own
    results = found["results"]["local_choice"]
    share = results["acc,none"]
    assert results["acc_stderr,none"] == pytest.approx((share * (1 - share) / 2) ** 0.5)
    samples = found["samples"]["local_choice"]
    assert len(samples) == 3
    prompts = [sample["arguments"][0][0] for sample in samples]
    one_turn = {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": False}
    other = evaluated("local_group", limit=1, seed=7, **one_turn)
    assert capsys.readouterr().out.count("|local_group") == 2  # and in the table of groups
    seeds = [other["config"][f"{name}_seed"] for name in ("random", "numpy", "torch", "fewshot")]
    assert seeds == [7] * 4
    prompts.append(other["samples"]["local_choice"][0]["arguments"][0][0])
    assert ["Be brief." in prompt for prompt in prompts] == [True] * 3 + [False]
    n_turns = [prompt.count("<|start_header_id|>user") for prompt in prompts]
    assert n_turns == [2] * 3 + [1]  # with one example


def test_tasks_of_the_command(
    evaluated: Callable[..., dict[str, Any]],
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unsafe = json.loads((tasks / "local_until.yaml").read_text())
    unsafe |= {"task": "local_unsafe", "unsafe_code": True}
    path = tmp_path / "unsafe.yaml"
    path.write_text(json.dumps(unsafe))
    names = f"{path}, local_choice,local_c*"
    allowed = {"confirm_run_unsafe_code": True, "gen_kwargs": "max_gen_toks=3"}
    found = evaluated(names, limit=1, **allowed)
    assert set(found["results"]) == {"local_unsafe", "local_choice"}
    [sample] = found["samples"]["local_unsafe"]
    assert sample["arguments"][0][1]["max_gen_toks"] == 3
    cases: tuple[tuple[str, dict[str, Any], type[Exception], str], ...] = (
        ("local_choice,nothing", {}, ValueError, r"--tasks has \['nothing'\], which the harness"),
        ("no_*", {}, ValueError, r"--tasks has \['no_\*'\]"),
        (",", {}, ValueError, "--tasks has no name"),
        (str(path), {}, ValueError, "marked as unsafe"),
        ("local_choice", {"template": "folder"}, ValueError, "the folder has no chat template"),
        ("local_choice", {"output": str(tmp_path / "no" / "x")}, OSError, "folder that doesn't"),
        ("local_choice", {"output": str(tmp_path)}, OSError, "is a folder, expected a file"),
    )
    for names, options, error, message in cases:
        with pytest.raises(error, match=message):
            evaluate(str(DEMO), names, include_path=str(tasks), **options)
    monkeypatch.setattr("llama.commands.evaluate.n_processes", lambda: 2)
    with pytest.raises(ValueError, match="--use_cache needs one process"):
        evaluated("local_choice", use_cache=str(tmp_path / "cache"))


def test_answers_are_cached_as_they_come(demo: Llama) -> None:
    """Not only at the end, by the harness: a run may be interrupted."""
    found = []

    class Hook:
        def add_partial(self, *answer: Any) -> None:
            found.append(answer)

    model = LlamaLM(demo, progress=False)
    model.set_cache_hook(Hook())
    wanted = []
    for kind, arguments in (
        ("loglikelihood", ("Once", " upon")),
        ("loglikelihood_rolling", ("Once upon",)),
        ("generate_until", ("Once", {"until": ["."], "max_gen_toks": 5})),
    ):
        [answer] = getattr(model, kind)([Instance(kind, {}, arguments, 0)])
        wanted.append((kind, arguments, answer))
    assert found == wanted


def test_a_run_continues(
    evaluated: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "answers")
    first = evaluated(",".join(TASKS), limit=2, use_cache=cache)
    monkeypatch.setattr(Llama, "score", None)
    monkeypatch.setattr(Llama, "generate", None)
    again = evaluated(",".join(TASKS), limit=2, use_cache=cache)
    for name, wanted in first["results"].items():
        assert again["results"][name] == wanted


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 1])
def test_two_ranks(
    size: int, evaluated: Callable[..., dict[str, Any]], tasks: Path, tmp_path: Path
) -> None:
    """Tensor parallel (the command line as it is), and as two replicas."""
    one = evaluated(",".join(TASKS), limit=6)
    output = tmp_path / "ranks.json"
    options = ["--tasks", ",".join(TASKS), "--include_path", tasks, "--dtype", "float32"]
    options += ["--max_seq_len", "256", "--limit", "6", "--output", output]
    program = ["-m", "llama"] if size == 2 else [PROGRAMS / "evaluate.py"]
    command = (*TORCHRUN, "2", *program, "eval", DEMO, "--model_parallel_size", str(size), *options)
    result = run(*map(str, command), env=OFFLINE, timeout=200)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("|local_choice") == 1
    for bar in ("Tokenizing inputs", "log-likelihoods", "generations"):
        n_bars = len(re.findall(rf"(?m)(?:^|[\r]){bar}: +0%", result.stderr))
        assert n_bars == 1, bar  # one rank shows them
    two = json.loads(output.read_text())
    assert (two["llama"]["tensor_parallel"], two["llama"]["replicas"]) == (size, 2 // size)
    for task in TASKS:
        for metric, value in one["results"][task].items():
            if isinstance(value, float):
                assert two["results"][task][metric] == pytest.approx(value, rel=1e-5)
    pairs = zip(one["samples"]["local_until"], two["samples"]["local_until"], strict=True)
    for a, b in pairs:
        assert a["resps"] == b["resps"]


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"needs lm-evaluation-harness .* -e \"\.\[eval\]\""):
        evaluate(str(DEMO), "arc_easy")


def test_an_installation_without_extras_imports_none() -> None:
    code = "import sys, llama.__main__; assert 'lm_eval' not in sys.modules, 'imported'"
    result = run(sys.executable, "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
