#!/usr/bin/env bash
# transformers 5.17.0, DeepSeek-V2: norm_topk_prob of config.json changes nothing; with DeepSeek-V3 it does.
#
# The key stands in DeepSeek-V2's own configs, in transformers' config class, and in the code that DeepSeek published with
# the weights, where it makes the chosen experts' weights sum to one. A model that says true gets other logits here than
# there, and nothing tells.
#
# Valid input: one tiny model with the same weights, norm_topk_prob true and false. Seen:
#   deepseek_v2: largest difference of logits 0, exactly     deepseek_v3: 0.0095
# Exits 0 while this holds, 1 once it changes. torch's CPU build: TORCH_INDEX=https://download.pytorch.org/whl/cpu.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
"$place/venv/bin/pip" install -q --disable-pip-version-check "transformers==5.17.0" "numpy==1.26.4"
"$place/venv/bin/python" - <<'P'
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

sizes = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, vocab_size=100)
heads = dict(num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16)
heads |= dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1)
differences = []
for kind in (DeepseekV2Config, DeepseekV3Config):
    logits = []
    for normalised in (True, False):
        config = kind(**sizes, **heads, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
        config.norm_topk_prob = normalised
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            logits.append(model(torch.arange(10)[None]).logits)
    differences.append(float((logits[0] - logits[1]).abs().max()))
    print(f"transformers {transformers.__version__}, {kind.model_type}: largest difference {differences[-1]:.4g}")
sys.exit(not (differences[0] == 0.0 and differences[1] > 1e-4))
P
