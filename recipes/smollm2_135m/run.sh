#!/bin/sh
# The embedded checkpoint from its data, on one GPU: about 40 minutes on an H100. Usage: run.sh DATA_DIR EVAL_DIR
# DATA_DIR holds the training files that the three YAML files name, EVAL_DIR gsm8k_test.jsonl.gz and wikitext2_test.txt.gz.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
benchmarks=$here/../../benchmarks
mkdir -p work
ln -sfn "$1" work/data
python "$here/prompts.py" work/data work/prompts
# Every fifth text of OpenStax: all of them would be half of the mixture.
python - "$1" <<'PYTHON'
import lzma, sys
with lzma.open(f"{sys.argv[1]}/openstax_text.jsonl.xz", "rt") as source:
    lines = [line for number, line in enumerate(source) if number % 5 == 0]
with lzma.open("work/openstax_text_fifth.jsonl.xz", "wt", preset=0) as target:
    target.writelines(lines)
PYTHON
wedlm train "$here/teacher.yaml"
python "$here/answers.py" work/teacher/final work/data work/prompts work/answers
wedlm train "$here/wedlm.yaml"
wedlm train "$here/wedlm_2.yaml"
python "$here/pack.py" work/wedlm_2/final work/change.safetensors work/embedded
wedlm train "$here/wedlm.yaml" --objective autoregressive --output_dir work/control_1
wedlm train "$here/wedlm_2.yaml" --objective autoregressive --anchor_text false --lora_init work/control_1/final \
    --merge_lora true --output_dir work/control
python "$benchmarks/gsm8k.py" work/control/final --data "$2/gsm8k_test.jsonl.gz" --decoding autoregressive --out work/control.json
python "$benchmarks/gsm8k.py" work/embedded --data "$2/gsm8k_test.jsonl.gz" --out work/embedded.json
for model in demo-base work/control/final work/embedded; do
    python "$benchmarks/perplexity.py" "$model" --data "$2/wikitext2_test.txt.gz"
done
