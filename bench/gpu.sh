#!/usr/bin/env bash
# The first hour on GPUs: every part of bench/gpu.py, one after another, then a table for README.
#
#   bench/gpu.sh               random Qwen3-4B and 8B shapes, nothing to download but the packages
#   bench/gpu.sh --rehearse    the same on a CPU with tiny shapes, in a few minutes
#
# Other options go to bench/gpu.py (--shapes qwen3-4b, --out FOLDER). PARTS="tests loop" runs these
# alone; LIMIT is the seconds that a part may take, GRACE those that its programs then have to end.
# What is skipped or fails is named in the table, and the rest runs. Status 1 if a part failed.
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

# What is left of a part: timeout makes a process group of itself and all that it starts. Torchrun's
# ranks have groups of their own, and end with torchrun.
group=""
end_group() {
    kill -KILL -- "-$group" 2>/dev/null
}
trap 'kill "$group" && wait "$group"; end_group; exit 130' INT TERM

for part in ${PARTS:-$(python bench/gpu.py --parts)}; do
    echo "--- $part ---"
    rm -f "$out/results/$part.json"
    # 90 s: torchrun gives its ranks 30 to end, then kills them.
    timeout --kill-after="${GRACE:-90}" "${LIMIT:-1500}" \
        python bench/gpu.py --part "$part" "$@" > "$out/$part.log" 2>&1 &
    group=$!
    wait "$group"
    code=$?
    end_group
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
