"""lm-evaluation-harness on this library: the numbers of the harness's own hf model."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, ROOT, TORCHRUN, run

from llama import Llama
from llama.__main__ import convert_folder
from llama.chat_template import LLAMA3_TEMPLATE

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


def test_a_context_that_is_too_long_loses_its_start(demo: Llama) -> None:
    model = LlamaLM(demo, progress=False)
    long = list(range(10, 400))
    pairs: list[Any] = [(None, context, [20, 300, 41]) for context in (long, long[-254:])]
    first, second = model._loglikelihood_tokens(pairs)
    assert first == second


def test_one_begin_of_text_token(demo: Llama) -> None:
    model, bos = LlamaLM(demo), demo.tokenizer.bos_id
    assert model.tok_encode("one").count(bos) == 1
    assert model.tok_encode("<|begin_of_text|>one") == model.tok_encode("one")
    assert model.tok_encode("one", add_special_tokens=False).count(bos) == 0


def test_options_without_a_counterpart_are_refused(demo: Llama) -> None:
    model = LlamaLM(demo, progress=False)
    cases = (
        ({"top_k": 5}, "generation_kwargs has top_k, expected until"),
        ({"max_gen_toks": 256}, "max_gen_toks is 256, but max_seq_len is 256: lower it"),
    )
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            model.generate_until([Instance("generate_until", {}, ("Once", options), 0)])
    too_long = Instance("loglikelihood", {}, ("Once", " upon" * 300), 0)
    with pytest.raises(ValueError, match=r"continuation 0 has \d+ tokens, but max_seq_len is 256"):
        model.loglikelihood([too_long])


def command(tasks: Path, *options: str | Path) -> list[str | Path]:
    return ["-m", "llama", "eval", DEMO, "--include_path", tasks, "--max_seq_len", "256", *options]


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.mark.slow
def test_the_command(tasks: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    options = ("--tasks", "local_choice,local_until", "--limit", "4", "--output", output)
    result = run(sys.executable, *command(tasks, *options), env=OFFLINE)
    assert result.returncode == 0, result.stderr
    assert "local_choice" in result.stdout
    assert "log-likelihoods: 100%" in result.stderr
    found = json.loads(output.read_text())
    assert found["llama"]["versions"]["torch"]
    assert found["llama"]["ways"].startswith("linear layers: ")
    assert len(found["samples"]["local_until"]) == 4
    for wrong, message in (
        (("--tasks", "local_choice,nothing"), "error: --tasks has ['nothing'], which the harness"),
        (("--tasks", "local_choice", "--output", tmp_path / "no" / "x"), "a folder that doesn't"),
    ):
        result = run(sys.executable, *command(tasks, *wrong), env=OFFLINE)
        assert result.returncode == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_two_ranks(tasks: Path, tmp_path: Path) -> None:
    """Tensor parallel, and as two replicas."""

    def evaluated(n_ranks: int, size: int) -> Any:
        output = tmp_path / f"{n_ranks}-{size}.json"
        options = ("--tasks", ",".join(TASKS), "--dtype", "float32", "--output", output)
        launch = [*TORCHRUN, str(n_ranks)] if n_ranks > 1 else [sys.executable]
        ranks = ("--model_parallel_size", str(size))
        result = run(*launch, *command(tasks, *options, *ranks), env=OFFLINE, timeout=200)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("|local_choice") == 1
        return json.loads(output.read_text())

    one = evaluated(1, 1)
    for size in (2, 1):
        two = evaluated(2, size)
        found = two["llama"]["tensor_parallel"], two["llama"]["replicas"]
        assert found == (size, 2 // size)
        for task in TASKS:
            for metric, value in one["results"][task].items():
                if isinstance(value, float):
                    assert two["results"][task][metric] == pytest.approx(value, rel=1e-5)
        pairs = zip(one["samples"]["local_until"], two["samples"]["local_until"], strict=True)
        for a, b in pairs:
            assert a["resps"] == b["resps"]


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    from llama.commands.evaluate import evaluate

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ImportError, match=r"needs lm-evaluation-harness .* -e \"\.\[eval\]\""):
        evaluate(str(DEMO), "arc_easy")


def test_an_installation_without_extras_imports_none() -> None:
    code = "import sys, llama.__main__; assert 'lm_eval' not in sys.modules, 'imported'"
    result = run(sys.executable, "-c", code, cwd=ROOT)
    assert result.returncode == 0, result.stderr
