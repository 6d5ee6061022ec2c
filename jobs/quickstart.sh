#!/usr/bin/env bash
# From nothing but Python 3.11 to a quantised model: makes an environment (.venv, or $GS_DIST_VENV), fetches SmolLM2-135M,
# quantises it to W8A8 over two stages with text of this repository, compares perplexities on other text, and shows what
# both models answer.
# Run again, it does only what is not done yet. GS_DIST_QUICKSTART: where model and result go (build/quickstart).
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=environment.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

workspace=${GS_DIST_QUICKSTART:-$gs_dist_root/build/quickstart}
model=$workspace/SmolLM2-135M-Instruct
output=$workspace/smollm2-w8a8

step() {
    printf '\n== %s\n' "$*"
}

step "1/5 environment"
make_environment quickstart
export PATH="${python%/*}:$PATH"
cd -- "$gs_dist_root"

step "2/5 model"
python jobs/fetch_smollm2.py "$model"

step "3/5 quantise: 8-bit weights and activations, SmoothQuant, 2 stages"
gs-dist quantize jobs/recipes/smollm2-w8a8.yaml "model=$model" "output=$output"

step "4/5 perplexity on text that calibration has not seen"
gs-dist evaluate "$output" --model "$model" --data jobs/data/austen-evaluation.parquet --sequence-length 512

step "5/5 what both answer"
gs-dist generate "$output" --model "$model" "What is the capital of France?" "Name three colours." --max-new-tokens 40

printf '\nThe model is in %s; gs-dist is in %s.\n' "$output/compressed-tensors" "${python%/*}"
