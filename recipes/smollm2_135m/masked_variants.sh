#!/bin/sh
# Variants of the LoRA of masked rows at equal steps, each trained and evaluated (docs/log.md, "Seven variants"), after the stages
# prompts and answers of masked.sh. One variant takes 18 GB of GPU memory in training; those named run at the same time.
# They start from what was usual before them, a rate of 1e-3 and entropy_weight 0.5; masked_lora.yaml has what was best. STEPS: 160.
# Usage: masked_variants.sh NAME...; names: usual rate2 rate4 entropy0 entropy1 distill1 rank32 block16 noise16 mlp upper20
set -eu
here=$(cd "$(dirname "$0")" && pwd)
set -f # lists in brackets are no patterns

settings() {
    case $1 in
        usual) ;;
        rate2) echo "--learning_rate 2e-3" ;;
        rate4) echo "--learning_rate 4e-3" ;;
        entropy0) echo "--entropy_weight 0" ;;
        entropy1) echo "--entropy_weight 1" ;;
        distill1) echo "--distill_masked 1" ;;
        rank32) echo "--lora_rank 32" ;;
        block16) echo "--block_size 16" ;;
        noise16) echo "--block_size 16 --suffix_noise 0.6" ;;
        mlp) echo "--lora_targets [gate_proj,up_proj,down_proj]" ;;
        upper20) echo "--lora_layers [$(seq -s , 10 29)]" ;;
        *) echo "the variant is $1; expected one of those in the first lines of this file" >&2; exit 2 ;;
    esac
}

variant() {
    out=work/variants/$1
    mkdir -p "$out"
    # shellcheck disable=SC2046
    wedlm train "$here/masked_lora.yaml" --max_steps "${STEPS:-160}" --learning_rate 1e-3 --entropy_weight 0.5 \
        --train_data [work/masked_answers/first.jsonl] --output_dir "$out" --cache_dir "$out/tokens" \
        --logging_steps 20 $(settings "$1")
    evaluate --adapter "$out/final" --rows 16 --out "$out/tokens_a_forward.json"
}

evaluate() {
    python "$here/../../benchmarks/masked_adapter.py" demo-base --base-answers work/variants/base.json.gz \
        --set gsm8k=work/masked_prompts/eval_gsm8k.jsonl.gz:200 --set chat=work/masked_prompts/eval_chat.jsonl.gz:60 \
        --set code=work/masked_prompts/eval_code.jsonl.gz:60 "$@"
}

for name in "$@"; do settings "$name" > /dev/null; done
mkdir -p work/variants
evaluate --out work/variants/base.json
pids=
for name in "$@"; do
    variant "$name" > "work/$name.log" 2>&1 &
    pids="$pids $!"
done
failed=0
for pid in $pids; do wait "$pid" || failed=1; done
exit $failed
