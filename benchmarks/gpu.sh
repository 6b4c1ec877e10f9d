#!/usr/bin/env bash
# Everything that is measured on a GPU, within nine minutes: bash benchmarks/gpu.sh --out DIR [--shared DIR]
#   [--device cpu --quick] [--python PYTHON]
# Five small JSON files and a log, in order of worth; a part that fails or runs out of its time leaves what it had, and
# the next one begins. Needs Python 3.11 or later with torch and this package's other dependencies, and no network.
set -uo pipefail
cd "$(dirname "$0")/.."
out="" shared="" device=cuda quick="" python=python3
while [ $# -gt 0 ]; do
  case "$1" in
    --out) out=$2; shift 2 ;;
    --shared) shared=$2; shift 2 ;;
    --device) device=$2; shift 2 ;;
    --python) python=$2; shift 2 ;;
    --quick) quick=--quick; shift ;;
    *) echo "gpu.sh: unknown option $1" >&2; exit 2 ;;
  esac
done
[ -n "$out" ] || { echo "gpu.sh: --out DIR is missing" >&2; exit 2; }
mkdir -p "$out"
log="$out/log.txt"
: > "$log"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUBLAS_WORKSPACE_CONFIG=:4096:8 HF_HUB_OFFLINE=1
failed=0
part() { # NAME SECONDS [OPTION ...]
  local name=$1 seconds=$2
  shift 2
  [ -z "$quick" ] || seconds=$((3 * seconds)) # a CPU may be busy, and there is nothing to be in time for
  echo "== $name, at most $seconds s, $(date -u +%T)" | tee -a "$log"
  timeout --kill-after=5 "$seconds" "$python" "benchmarks/gpu/$name.py" --device "$device" $quick --out "$out/$name.json" "$@" \
    >> "$log" 2>&1
  local status=$?
  [ $status -eq 0 ] || { echo "== $name ended with $status" | tee -a "$log"; failed=1; }
}
part commands 130
part finetuning 190 ${shared:+--shared "$shared"}
part throughput 70
part clustering 80
part nearest 50
tail -n 3 "$log"
exit $failed
