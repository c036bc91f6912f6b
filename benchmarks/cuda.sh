#!/usr/bin/env bash
# Everything that needs a GPU, in ten minutes: the gpu tests (meanwhile random weights are written),
# the machine's limits, this library and its peers; see benchmarks/README.md.
#
#     bash benchmarks/cuda.sh [SHAPE] [further arguments of run.py]
#
# Leaves JSON lines, a table and logs in benchmarks/results/cuda-DATE (RESULTS: another folder), with
# what was measured before an error or the end of a part's time. BUDGET: seconds in all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
budget=${BUDGET:-590}
case "${1:-}" in "" | -*) set -- auto "$@" ;; esac
out=${RESULTS:-benchmarks/results}/cuda-$(date -u +%Y%m%d-%H%M%S)
mkdir -p "$out"
status=0

benchmark() { # SECONDS arguments: those of the command line come last, and win
  local seconds=$1
  shift
  timeout -k 10 "$seconds" python benchmarks/run.py --device cuda --vs hf,reference "$@"
}

benchmark $((budget / 3)) --prepare --shape "$@" >"$out/prepare.txt" 2>&1 &
preparing=$!
timeout -s INT -k 10 $((budget / 3)) python -m pytest -q -m gpu 2>&1 | tee "$out/tests.txt" ||
  { status=1 && echo "cuda.sh: the gpu tests failed, or took over $((budget / 3)) s"; }
wait "$preparing" ||
  { status=1 && echo "cuda.sh: preparing failed:" && tail -n 3 "$out/prepare.txt"; }

benchmark $((budget - SECONDS)) --figures decode,prefill,weights,load,sampling,ranks \
  --limit $((budget / 5)) --tests "$out/tests.txt" --results "$out" --shape "$@" \
  2>&1 | tee "$out/log.txt" || { status=1 && echo "cuda.sh: not everything was measured"; }
ls -1 "$out"/*
exit "$status"
