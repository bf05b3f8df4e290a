#!/bin/sh
# The paper's noise (0), suffix noise (1) and half of each at equal steps, in the folder where run.sh made its answers.
# Usage: noise.sh EVAL_DIR [STEPS]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
for share in 0 0.5 1; do
    wedlm train "$here/wedlm.yaml" --max_steps "${2:-200}" --suffix_noise $share --output_dir work/noise_$share
    python "$here/../../benchmarks/gsm8k.py" demo-base --adapter work/noise_$share/final \
        --data "$1/gsm8k_test.jsonl.gz" --dtype bfloat16 --streaming-window 4 --max-num-seqs 128 --kv-cache-gb 4 \
        --out work/noise_$share.json
done
