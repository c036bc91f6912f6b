"""``python -m llama eval``: evaluate a folder with lm-evaluation-harness."""

import dataclasses
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import torch

from llama.accel.features import cpu_features
from llama.accel.kernels import instruction_set
from llama.commands.options import ModelOptions, runs_model
from llama.distributed.groups import is_first_process
from llama.extras import needs_extra
from llama.files import expanded
from llama.generation import Llama

_PACKAGES = ("torch", "lm_eval", "transformers", "tokenizers", "tiktoken", "datasets")


def _harness() -> Any:
    """The harness, and the module that adapts it."""
    with needs_extra("evaluation needs lm-evaluation-harness", "eval"):
        import lm_eval.tasks
        import lm_eval.utils

        from llama.integrations import lm_eval as adapter
    return lm_eval, adapter


@runs_model(max_seq_len=None, max_batch_size=8, seed=1234)
def evaluate(
    model: ModelOptions,
    tasks: str,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    include_path: str | None = None,
    apply_chat_template: bool = False,
    template: str = "meta",
    system: str | None = None,
    gen_kwargs: str | None = None,
    output: str | None = None,
) -> None:
    """Evaluate a model with lm-evaluation-harness, and print its table.

    Under torchrun, the ranks of a copy of the weights compute together, and copies divide the
    requests.

    Args:
        tasks: names of tasks or groups, separated by commas.
        num_fewshot: examples in each prompt; default: the task's.
        limit: documents per task, or their share if below 1; for trials only.
        include_path: folder of further tasks (YAML files).
        apply_chat_template: ask each question as a dialog.
        template: of dialogs: meta, or folder for the folder's own chat template.
        system: system message, or text before each prompt without apply_chat_template.
        gen_kwargs: changes of the tasks' generation options: max_gen_toks=64,temperature=0.5.
        output: file for the results, the configuration and each document's answers, in JSON.
    """
    harness, integration = _harness()
    names = [name for name in tasks.split(",") if name]
    manager = harness.tasks.TaskManager(include_path=include_path and expanded(include_path))
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise ValueError(
            f"--tasks has {unknown if names else 'no name'}, which the harness doesn't know: "
            "lm-eval ls tasks lists its own; give the folder of others with --include_path"
        )
    if output is not None and not Path(expanded(output)).absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {output} is in a folder that doesn't exist")
    llm = model.build()
    is_first = is_first_process()
    results = harness.simple_evaluate(
        model=integration.LlamaLM(llm, template, progress=is_first),
        tasks=names,
        num_fewshot=num_fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=apply_chat_template,
        system_instruction=system,
        gen_kwargs=gen_kwargs,
        random_seed=model.seed,
        numpy_random_seed=model.seed,
        torch_random_seed=model.seed,
        fewshot_random_seed=model.seed,
        bootstrap_iters=0,
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
        }
        found = {"llama": {**options, **_environment(llm)}, **results}
        text = json.dumps(found, indent=1, default=str, ensure_ascii=False)
        Path(expanded(output)).write_text(text, encoding="utf-8")


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
