"""The package's dependencies, and its pages: links, commands, computed tables."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import PROGRAMS, ROOT, run

from demo import data
from llama import ModelArgs, memory

# Dependencies run one way: a module may import those of earlier lines and of its own. A folder
# includes its modules, except those that have a line of their own.
ORDER = [
    {"config"},
    {"extras", "files", "pages", "quantize"},
    {"distributed"},
    {"cache"},
    {"attention", "compat", "hooks"},
    {"model"},
    {"accel"},
    {"device"},
    {"checkpoint.sharding"},
    {"vocab"},
    {"detokenizer", "dialog", "sampling"},
    {"chat", "chat_template"},
    {"tokenizer"},
    {"request"},
    {"scoring", "slots"},
    {"engine"},
    {"memory", "notebook"},
    {"completions"},
    {"checkpoint"},
    {"build"},
    {"inspection", "score"},
    {"generation"},
    {"driver", "integrations"},
    {"commands", "serving"},
    {"cli"},
    {"__main__"},
]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (".", "docs", "demo", "benchmarks")
    for path in (ROOT / folder).glob("*.md")
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")


def imports_of(path: Path) -> set[str]:
    """Modules of llama that a file imports, as in "checkpoint.reader"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "llama":
            base = str(node.module).partition(".")[2]
            for name in (alias.name for alias in node.names):
                names = [base, f"{base}.{name}" if base else name]
                found.update(n for n in names if n and source(n).exists())
        elif isinstance(node, ast.Import):
            found.update(a.name.partition(".")[2] for a in node.names if a.name[:6] == "llama.")
    return found


def source(module: str) -> Path:
    path = ROOT / "llama" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def level(module: str) -> int:
    """The line of ORDER."""
    for name in (module, module.split(".")[0]):
        for i, names in enumerate(ORDER):
            if name in names:
                return i
    raise AssertionError(f"{module} has no line in ORDER")


def test_imports_point_one_way() -> None:
    for path in (ROOT / "llama").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "llama").with_suffix("").parts)
        module = module.removesuffix(".__init__")
        if module == "__init__":
            continue
        for imported in imports_of(path):
            assert level(imported) <= level(module), f"{module} imports {imported}"


def test_the_model_knows_neither_files_nor_accelerated_forms() -> None:
    for module in ("config", "cache", "attention", "compat", "model", "hooks"):
        known = {name.split(".")[0] for name in imports_of(source(module))}
        assert known <= {"config", "cache", "attention", "compat", "hooks", "distributed"}
    assert imports_of(ROOT / "tests" / "reference.py") == set()


def test_the_documented_names_are_importable() -> None:
    names = {
        "llama": "Llama Dialog Message ModelArgs Tokenizer Transformer",
        "llama.model": "ModelArgs RMSNorm precompute_freqs_cis apply_rotary_emb Attention "
        "FeedForward TransformerBlock Transformer repeat_kv reshape_for_broadcast",
        "llama.tokenizer": "Tokenizer ChatFormat Dialog Message Role",
        "llama.generation": "Llama CompletionPrediction ChatPrediction TokenEvent sample_top_p "
        "Role B_INST E_INST B_SYS E_SYS",
    }
    for module, wanted in names.items():
        for name in wanted.split():
            assert hasattr(__import__(module, fromlist=[name]), name), f"{module}.{name}"


def test_import_is_quiet_and_starts_nothing() -> None:
    result = run(sys.executable, "-W", "error::UserWarning", PROGRAMS / "quiet_import.py")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- The pages --------------------------------------------------------------------------------


def commands(page: str) -> list[str]:
    return re.findall(r"^    (?=\S*(?:python|torchrun|hf|pip))(.*)$", page, re.M)


def test_the_readme_is_short_and_both_languages_have_the_same_commands() -> None:
    assert len(README.splitlines()) <= 200
    assert len(commands(README)) >= 10
    assert commands(CHINESE) == commands(README)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", [README, CHINESE], ids=["English", "Chinese"])
def test_the_code_of_the_readme_prints_its_comments(page: str) -> None:
    snippet = re.search(r"```python\n(.*?)```", page, re.S)
    assert snippet is not None
    result = run(sys.executable, "-c", snippet[1], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    shown = re.findall(r"# prints: (.*)", snippet[1])
    assert shown
    for line in shown:
        assert line in result.stdout, result.stdout


def test_the_demos_table_is_what_its_kinds_promise() -> None:
    table = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| [\d.]+ % \|$", table, re.M)
    promised = {kind: share for kind, (_, share) in data.TESTS.items()}
    promised["stories: new name in the opening"] = data.STORY_TEST_FLOOR
    assert {row[0] for row in rows} == set(promised)
    for kind, right, asked in rows:
        assert int(right) / int(asked) >= promised[kind], kind


def test_the_memory_table_is_computed() -> None:
    """Weights and cache by the formulas of docs/memory.md, in bfloat16; the rest by the plan."""
    shapes = {
        "8B": ModelArgs(
            dim=4096, n_kv_heads=8, vocab_size=128256, multiple_of=1024, ffn_dim_multiplier=1.3
        ),
        "70B": ModelArgs(
            dim=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            vocab_size=128256,
            multiple_of=4096,
            ffn_dim_multiplier=1.3,
        ),
    }
    rows = re.findall(
        r"^\| (8B|70B), (\d) ranks? " + r"\| ([\d.]+) " * 6 + r"\|$",
        (ROOT / "docs" / "memory.md").read_text(),
        re.M,
    )
    assert len(rows) == 2
    for name, n_ranks, *shown in rows:
        args = shapes[name]
        kv_dim = args.kv_heads * args.head_dim
        layer = 2 * args.dim * (args.dim + kv_dim) + 3 * args.dim * args.ffn_hidden_dim
        norms = (2 * args.n_layers + 1) * args.dim
        split = args.n_layers * layer + 2 * args.vocab_size * args.dim
        weights = 2 * (split / int(n_ranks) + norms)
        token = 2 * 2 * args.n_layers * kv_dim / int(n_ranks)
        sizes = dataclasses.replace(args, max_batch_size=4, max_seq_len=8192)
        plan = memory.plan(sizes, int(n_ranks), torch.bfloat16, torch.device("cuda"))
        computed = [weights, 4 * 512 * token, 4 * 8192 * token]
        computed += [plan.workspace, plan.runtime, plan.total]
        assert [float(x) for x in shown] == [round(x / 2**30, 2) for x in computed]
