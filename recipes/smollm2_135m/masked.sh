#!/bin/sh
# A LoRA of masked rows over the frozen base, from its data, on one GPU.
# Usage: masked.sh DATA_DIR EVAL_DIR [STAGE...]; all stages by default, in this order: prompts answers train pack evaluate
# PROCESSES (4) answer at the same time: one does not fill a GPU at this size.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
data=$1 eval=$2
shift 2

prompts() {
    python "$here/prompts.py" "$data" work/prompts
    python "$here/masked_prompts.py" "$data" "$eval" work/prompts/gsm8k_numbers.jsonl work/masked_prompts
}

answers() {
    mkdir -p work/masked_answers
    count=${PROCESSES:-4}
    for name in first more; do
        part=0 pids=
        while [ $part -lt "$count" ]; do
            OMP_NUM_THREADS=4 python "$here/masked_answers.py" demo-base work/masked_prompts/$name.jsonl.gz \
                work/masked_answers/$name.$part.part --part $part/"$count" &
            pids="$pids $!" part=$((part + 1))
        done
        for pid in $pids; do wait "$pid"; done
        cat work/masked_answers/$name.*.part > work/masked_answers/$name.jsonl
        rm work/masked_answers/$name.*.part
    done
}

train() { wedlm train "$here/masked_lora.yaml"; }

pack() { python "$here/pack_masked.py" work/masked_lora/final work/masked_packed; }

evaluate() {
    python "$here/../../benchmarks/masked_adapter.py" demo-base --adapter work/masked_packed --rows 16 32 \
        --set gsm8k=work/masked_prompts/eval_gsm8k.jsonl.gz --set code=work/masked_prompts/eval_code.jsonl.gz \
        --set chat=work/masked_prompts/eval_chat.jsonl.gz --set summaries=work/masked_prompts/eval_summaries.jsonl.gz \
        --base-answers work/masked_base.json.gz --out work/masked_adapter.json
}

mkdir -p work
for stage in ${*:-prompts answers train pack evaluate}; do
    case $stage in
        prompts | answers | train | pack | evaluate) $stage ;;
        *) echo "the stage is $stage; expected prompts, answers, train, pack or evaluate" >&2; exit 2 ;;
    esac
done
