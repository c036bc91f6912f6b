#!/usr/bin/env bash
# Everything that needs a GPU: parity on CUDA with and without graphs and torch.compile, then the
# benchmark. Name the shapes; by default 1B and 8B, which take 50 GB of disk.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ "$#" -gt 0 ] || set -- 1B 8B
python -m pytest -q -m gpu
for shape in "$@"; do
  python benchmarks/run.py --shape "$shape" --vs hf --plot
  python benchmarks/run.py --shape "$shape" --figures decode --compile
done
