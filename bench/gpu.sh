#!/usr/bin/env bash
# The first hour on GPUs: every part of bench/gpu.py, one after another, then a table for README.
#
#   bench/gpu.sh               random Qwen3-4B and 8B shapes, nothing to download but the packages
#   bench/gpu.sh --rehearse    the same on a CPU with tiny shapes, in a few minutes
#
# Other options go to bench/gpu.py (--shapes qwen3-4b, --out FOLDER). PARTS="tests loop" runs these
# alone; LIMIT is the seconds that a part may take. What is skipped or fails is named in the table,
# and the rest runs. Status 1 if a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."

out=runs/gpu
next=""
for option in "$@"; do
    [ "$next" = --out ] && out=$option
    next=$option
done
mkdir -p "$out/results"
failed=""
for part in ${PARTS:-$(python bench/gpu.py --parts)}; do
    echo "--- $part ---"
    rm -f "$out/results/$part.json"
    timeout --kill-after=30 "${LIMIT:-1500}" python bench/gpu.py --part "$part" "$@" > "$out/$part.log" 2>&1
    code=$?
    tail -n 1 "$out/$part.log"
    if [ "$code" != 0 ]; then
        failed="$failed $part"
        echo "$part: status $code, see $out/$part.log"
    fi
done
python bench/gpu.py --table "$@" | tee "$out/table.md"
if [ -n "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
