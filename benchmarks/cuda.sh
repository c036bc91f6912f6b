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
touch "$out/tests.txt" "$out/log.txt"
status=0
set -m # else the jobs below would ignore SIGINT, at which pytest prints its summary
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
trap 'exit 130' INT TERM
# the output goes to files: a pipe would stay open for as long as any process that was left behind
tail -qf -n +1 "$out/tests.txt" "$out/log.txt" &

benchmark() { # SECONDS arguments: those of the command line come last, and win
  exec timeout -k 10 "$1" python benchmarks/run.py --device cuda --vs hf,reference "${@:2}"
}

failed() { # message: the run goes on
  status=1
  echo "cuda.sh: $1" >>"$out/log.txt"
}

benchmark $((budget / 3)) --prepare --shape "$@" >"$out/prepare.txt" 2>&1 &
preparing=$!
timeout -s INT -k 10 $((budget / 3)) python -m pytest -q -m gpu >"$out/tests.txt" 2>&1 &
wait $! || failed "the gpu tests failed, or took over $((budget / 3)) s"
wait "$preparing" || failed "preparing failed: $(tail -n 3 "$out/prepare.txt")"

benchmark $((budget - SECONDS)) --figures decode,prefill,weights,load,sampling,ranks \
  --limit $((budget / 5)) --tests "$out/tests.txt" --results "$out" --shape "$@" \
  >>"$out/log.txt" 2>&1 &
wait $! || failed "not everything was measured"
echo "cuda.sh: $SECONDS s; see $(cd "$out" && pwd)" >>"$out/log.txt"
sleep 1 # until it is shown
exit "$status"
