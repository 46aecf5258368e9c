#!/usr/bin/env bash
# Tests and measurements that need a GPU, after changes that were made without one.
#
#   bench/gpu.sh                         all parts, in the order of PARTS; about an hour
#   bench/gpu.sh tests latency           some parts; none takes much more than ten minutes
#   QUICK=1 bench/gpu.sh                 a small model and tiny shapes on any device, to check the script
#
# Rows go to $OUT (default: bench/results/gpu-DATE), the output of each part to $OUT/PART.log. A part that fails is
# reported at the end. Copy rows worth keeping to bench/results/ and run `python -m bench.report`.
set -uo pipefail
cd "$(dirname "$0")/.."
PARTS=(tests latency training kernels sweep memcheck)
PYTHON=${PYTHON:-python}
OUT=${OUT:-bench/results/gpu-$(date +%F)}
DEVICE=cuda
CONFIG=configs/ats_r50_0.1_0.2.yaml
SMALL=() TINY=() ROUNDS=() PEERS=all
if [ -n "${QUICK:-}" ]; then
    CONFIG=configs/quickstart.yaml SMALL=(--small) TINY=(--quick) ROUNDS=(--rounds 1) PEERS=
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || DEVICE=cpu
fi

tests() {  # compiles the kernels in parallel first
    [ -n "${QUICK:-}" ] || "$PYTHON" -m ats_detr kernels compile ats_r50_0.1_0.2 || return
    "$PYTHON" -m pytest -n 0 -m gpu --timeout 0 ${QUICK:+--collect-only -q}
}
latency() {  # captured: at most 2.8 ms for 1 image and 6.5 ms for 4 (H200); the encoder at 10 % at most 0.25 of dense
    "$PYTHON" -m bench.latency --config $CONFIG --device $DEVICE --dtype bfloat16 --image-size 800x1333 \
        --images same --batch 1,4 --ratios 0.05,0.1,0.2,0.3,0.5,1.0 --modes captured,captured-stages,captured-dense,packed,dense \
        --json "$OUT/latency.jsonl" "${TINY[@]}"
}
training() {  # a step at most 1.3 times the time of its kernels
    "$PYTHON" -m bench.training --device $DEVICE --json "$OUT/training.jsonl" "${ROUNDS[@]}"
}
kernels() {  # attention at 10 %, forward and backward: at least deformops with bfloat16 sums, 1.3 times its float32 sums
    for part in attention tokens linear; do
        "$PYTHON" -m bench.kernels --part $part --json "$OUT/kernels.jsonl" "${SMALL[@]}" || return
    done
}
sweep() {
    "$PYTHON" -m bench.sweep --config $CONFIG --device $DEVICE --dtype bfloat16 --image-size 800x1333 \
        --batch 1,4 --peers "$PEERS" --out "$OUT/sweep" "${TINY[@]}"
}
memcheck() {  # each tensor has an allocation of its own, so that a read past its end is found
    local checked=(tests/kernels/test_{attention,convolution,geometry,linear,normalization,packing,selection}.py)
    [ -z "${QUICK:-}" ] || { ls "${checked[@]}"; return; }
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
        "$PYTHON" -m pytest -n 0 --timeout 0 "${checked[@]}"
}

mkdir -p "$OUT"
failed=()
for part in "${@:-${PARTS[@]}}"; do
    [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "part $part: must be one of ${PARTS[*]}" >&2; exit 2; }
    echo "== $part"
    "$part" 2>&1 | tee "$OUT/$part.log" || failed+=("$part")
done
[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}" >&2; exit 1; }
