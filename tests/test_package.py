"""The shape of the project: who imports whom, and what the README says of it."""

import ast
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run

from demo import data
from llama import ModelArgs

# Each module may import those before it (generation the lot).
LAYERS = [
    "files",
    "watch",
    "parallel",
    "model",
    "huggingface",
    "pth_safety",
    "checkpoint",
    "vocabulary",
    "tokenizer",
    "llama2",
    "sampling",
    "fast",
    "memory",
    "convert",
    "verify",
    "generation",
    "cli",
    "__main__",
]
PAGES = ["README.md", "MODEL_CARD.md", "USE_POLICY.md", "demo/README.md"]
PAGES += ["benchmarks/README.md", "docs/performance.md", "docs/reliability.md"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def imports_of(path: Path) -> set[str]:
    """Modules of llama that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "llama":
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("llama."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("llama."))
    return found


def test_imports_point_one_way() -> None:
    modules = {path.stem for path in (ROOT / "llama").glob("*.py")} - {"__init__"}
    assert modules == set(LAYERS)
    for i, module in enumerate(LAYERS):
        assert imports_of(ROOT / "llama" / f"{module}.py") <= set(LAYERS[:i])
    assert imports_of(ROOT / "llama" / "model.py") == {"parallel"}
    assert "parallel" not in imports_of(ROOT / "llama" / "checkpoint.py")
    assert imports_of(ROOT / "llama" / "tokenizer.py") == {"vocabulary"}
    assert imports_of(ROOT / "tests" / "reference.py") == set()


def test_import_is_quiet_and_starts_nothing() -> None:
    script = (
        "import sys, llama, torch; "
        "assert not torch.distributed.is_initialized(); "
        "assert 'transformers' not in sys.modules; "
        "assert 'sentencepiece' not in sys.modules; "
        "assert 'safetensors' not in sys.modules"
    )
    result = run(sys.executable, "-W", "error::UserWarning", "-c", script)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --- The README -------------------------------------------------------------------------------


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_tree_names_the_files_that_are_there() -> None:
    named = re.findall(r"^    ([\w./-]+)  ", section("Files"), re.M)
    tracked = run("git", "ls-files", cwd=ROOT).stdout.split()
    shown = [p for p in tracked if not p.startswith(("demo/model/", "benchmarks/results/", ".git"))]
    assert sorted(named) == sorted(shown)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(name: str) -> None:
    path = ROOT / name
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
    assert not re.search(r"TODO|[A-Z]+_TABLE|^TABLE|TABLE_|TRAIN_MINUTES", text, re.M)


def test_the_demos_table_is_what_its_kinds_promise() -> None:
    table = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \| [\d.]+ % \|$", table, re.M)
    promised = {kind: share for kind, (_, share) in data.TESTS.items()}
    promised["stories: new name in the opening"] = data.STORY_TEST_FLOOR
    assert {row[0] for row in rows} == set(promised)
    for kind, right, asked in rows:
        assert int(right) / int(asked) >= promised[kind], kind


def test_the_memory_table_is_computed() -> None:
    """Weights and cache by the formulas of the section, in bfloat16."""
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
        r"^\| (8B|70B), (\d) ranks? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$",
        section("Memory"),
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
        computed = [weights, 4 * 512 * token, 4 * 8192 * token]
        assert [float(x) for x in shown] == [round(x / 2**30, 2) for x in computed]


def test_the_notebook_snippet_runs() -> None:
    snippet = re.search(r"```python\n(.*?)```", section("In Python"), re.S)
    assert snippet is not None
    result = run(sys.executable, "-c", snippet[1], cwd=ROOT)
    assert result.returncode == 0, result.stderr
    shown = re.findall(r"# prints: (.*)", snippet[1])
    assert len(shown) > 2
    for line in shown:
        assert line in result.stdout, result.stdout


def test_messages_of_the_table_are_in_the_code() -> None:
    source = "".join(p.read_text() for p in [*ROOT.glob("llama/*.py"), ROOT / "download.sh"])
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    messages = re.findall(r"^\| `([^`]+)` \|", section("Messages and what they mean"), re.M)
    assert len(messages) >= 8
    for message in messages:
        for part in re.split(r"\s*…\s*", message):
            assert part in source, part
