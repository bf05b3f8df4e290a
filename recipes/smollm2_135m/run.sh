#!/bin/sh
# The embedded checkpoint from its data, on one GPU: about 45 minutes on an H100.
# Usage: run.sh DATA_DIR EVAL_DIR [STAGE...]; all stages by default, in this order:
#   prompts teacher answers wedlm pack text control evaluate
# DATA_DIR holds the training files that the three YAML files name, EVAL_DIR gsm8k_test.jsonl.gz and wikitext2_test.txt.gz.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
benchmarks=$here/../../benchmarks
data=$1 eval=$2
shift 2

prompts() {
    python "$here/prompts.py" work/data work/prompts
    # Every fifth text of OpenStax: all of them would be half of the mixture.
    python - work/data <<'PYTHON'
import lzma, sys
with lzma.open(f"{sys.argv[1]}/openstax_text.jsonl.xz", "rt") as source:
    lines = [line for number, line in enumerate(source) if number % 5 == 0]
with lzma.open("work/openstax_text_fifth.jsonl.xz", "wt", preset=0) as target:
    target.writelines(lines)
PYTHON
}

teacher() { wedlm train "$here/teacher.yaml"; }

answers() { python "$here/answers.py" work/teacher/final work/data work/prompts work/answers; }

wedlm_stages() {
    wedlm train "$here/wedlm.yaml"
    wedlm train "$here/wedlm_2.yaml"
}

pack() { python "$here/pack.py" demo-base work/wedlm_2/final work/change.safetensors work/embedded_1 0.93; }

text() {
    wedlm train "$here/wedlm_3.yaml"
    python "$here/pack.py" work/embedded_1 work/wedlm_3/final work/change_2.safetensors work/embedded
}

control() {
    wedlm train "$here/wedlm.yaml" --objective autoregressive --output_dir work/control_1
    wedlm train "$here/wedlm_2.yaml" --objective autoregressive --distill_text false --lora_init work/control_1/final \
        --save_dtype bfloat16 --output_dir work/control
    gsm8k demo-base --adapter work/control/final --decoding autoregressive --out work/control.json
    perplexity demo-base --adapter work/control/final
}

evaluate() {
    gsm8k work/embedded --out work/embedded.json
    perplexity demo-base
    perplexity work/embedded
}

gsm8k() { python "$benchmarks/gsm8k.py" "$@" --data "$eval/gsm8k_test.jsonl.gz"; }

perplexity() { python "$benchmarks/perplexity.py" "$@" --data "$eval/wikitext2_test.txt.gz"; }

mkdir -p work
ln -sfn "$data" work/data
for stage in ${*:-prompts teacher answers wedlm pack text control evaluate}; do
    case $stage in
        wedlm) wedlm_stages ;;
        prompts | teacher | answers | pack | text | control | evaluate) $stage ;;
        *) echo "the stage is $stage; expected prompts, teacher, answers, wedlm, pack, text, control or evaluate" >&2; exit 2 ;;
    esac
done
