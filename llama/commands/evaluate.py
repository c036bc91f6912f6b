"""``python -m llama eval``: evaluate a folder with lm-evaluation-harness."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from llama.accel.features import cpu_features
from llama.accel.kernels import instruction_set
from llama.commands.options import ModelOptions, runs_model
from llama.distributed.groups import is_first_process, n_processes
from llama.extras import needs_extra
from llama.files import expanded
from llama.generation import Llama

# The harness's defaults: 0 for Python's generator, which shuffles the answers of some tasks.
_SEED, _RANDOM_SEED = 1234, 0
_BOOTSTRAP_ITERS = 1000  # for standard errors that have no formula
_PACKAGES = ("torch", "lm_eval", "transformers", "tokenizers", "tiktoken", "datasets")


def _harness() -> Any:
    """The harness, and the module that adapts it."""
    with needs_extra("evaluation needs lm-evaluation-harness", "eval"):
        import lm_eval.tasks
        import lm_eval.utils

        from llama.integrations import lm_eval as adapter
    return lm_eval, adapter


@runs_model(max_seq_len=None, max_batch_size=8, seed=_SEED)
def evaluate(
    model: ModelOptions,
    tasks: str,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
    template: str = "meta",
    system: str | None = None,
    gen_kwargs: str | None = None,
    use_cache: str | None = None,
    confirm_run_unsafe_code: bool = False,
    output: str | None = None,
) -> None:
    """Evaluate a model with lm-evaluation-harness, and print its table.

    Under torchrun, the ranks of a copy of the weights compute together, and copies divide the
    requests.

    Args:
        tasks: names of tasks or groups, patterns (bbh_cot_fewshot_*) or YAML files, separated by
            commas.
        num_fewshot: examples in each prompt; default: the task's.
        limit: documents per task, or their share if below 1; for trials only.
        include_path: folder of further tasks (YAML files).
        apply_chat_template: ask each question as a dialog.
        fewshot_as_multiturn: with apply_chat_template, make each example a turn of the dialog;
            False puts all into the user's message.
        template: of dialogs: meta, or folder for the folder's own chat template.
        system: system message, or text before each prompt without apply_chat_template.
        gen_kwargs: changes of the tasks' generation options: max_gen_toks=64,temperature=0.5.
        use_cache: file to which answers are added, and from which a run that was interrupted
            continues; for the same model and options only. One process.
        confirm_run_unsafe_code: allow tasks that run code which the model wrote (HumanEval).
        output: file for the results, the configuration and each document's answers, in JSON.
    """
    harness, integration = _harness()
    manager = harness.tasks.TaskManager(include_path=include_path and expanded(include_path))
    names = _task_names(manager, tasks)
    if output is not None:
        path = Path(expanded(output)).absolute()
        if path.is_dir() or not path.parent.is_dir():
            fault = "is a folder" if path.is_dir() else "is in a folder that doesn't exist"
            raise FileNotFoundError(f"--output {output} {fault}, expected a file")
    if use_cache is not None and n_processes() > 1:
        raise ValueError("--use_cache needs one process: ranks could have different answers in it")
    llm = model.build()
    is_first = is_first_process()
    prompts = {
        "num_fewshot": num_fewshot,
        "limit": limit,
        "apply_chat_template": apply_chat_template,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system_instruction": system,
        "gen_kwargs": gen_kwargs,
    }
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # a process with threads shouldn't fork
    results = harness.simple_evaluate(
        model=integration.LlamaLM(llm, template, progress=is_first),
        tasks=names,
        task_manager=manager,
        use_cache=use_cache and str(expanded(use_cache)),
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        random_seed=_RANDOM_SEED if model.seed == _SEED else model.seed,
        numpy_random_seed=model.seed,
        torch_random_seed=model.seed,
        fewshot_random_seed=model.seed,
        bootstrap_iters=_BOOTSTRAP_ITERS if is_first else 0,
        **prompts,
    )
    if not is_first:
        return
    print(f"{model.ckpt_dir}: {llm.ways}")
    print(harness.utils.make_table(results))
    if "groups" in results:
        print(harness.utils.make_table(results, "groups"))
    if output is not None:
        options = dataclasses.asdict(model) | {
            "dtype": str(llm.model.tok_embeddings.weight.dtype),
            "max_seq_len": llm.model.params.max_seq_len,
            "template": template,
            **prompts,
        }
        found = {"llama": {**options, **_environment(llm)}, **results}
        path.write_text(json.dumps(found, indent=1, default=str, ensure_ascii=False), "utf-8")


def _task_names(manager: Any, tasks: str) -> list[str]:
    """The names that ``--tasks`` lists, with patterns replaced by what they match.

    Raises:
        ValueError: one doesn't exist, or there are none.
    """
    found: dict[str, list[str]] = {}
    for name in filter(None, (name.strip() for name in tasks.split(","))):
        is_file = name.endswith((".yaml", ".yml")) and Path(expanded(name)).is_file()
        found[name] = [str(expanded(name))] if is_file else manager.match_tasks([name])
    unknown = [name for name, matches in found.items() if not matches]
    if unknown or not found:
        raise ValueError(
            f"--tasks has {unknown if found else 'no name'}, which the harness doesn't know: "
            "lm-eval ls tasks lists its own; give the folder of others with --include_path"
        )
    return [name for matches in found.values() for name in matches]


def _environment(llm: Llama) -> dict[str, Any]:
    """Everything outside of the options that two equal runs share, see docs/evaluation.md."""
    groups = llm.model.groups
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "ways": str(llm.ways),
        "device": str(llm.model.device),
        "threads": torch.get_num_threads(),
        "processor": sorted(cpu_features()),
        "kernels": instruction_set(),
        "tensor_parallel": groups.size,
        "replicas": groups.n_replicas,
        "python": platform.python_version(),
        "versions": versions,
    }
