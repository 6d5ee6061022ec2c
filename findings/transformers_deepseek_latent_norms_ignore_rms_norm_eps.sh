#!/usr/bin/env bash
# transformers 5.17.0, DeepSeek-V2 and -V3: the norms inside latent attention (q_a_layernorm, kv_a_layernorm) add 1e-6
# whatever config.json says in rms_norm_eps; all other norms of the same model follow it.
#
# Whoever writes the forward pass from config.json gives every norm one epsilon, and is right for the models that
# DeepSeek published, which say 1e-6. For any other value the logits differ, and nothing tells.
#
# Valid input: a tiny config with rms_norm_eps 0.01. Seen, for both models:
#   input_layernorm 0.01, q_a_layernorm 1e-06, kv_a_layernorm 1e-06
# Exits 0 while this holds, 1 once it changes. torch's CPU build: TORCH_INDEX=https://download.pytorch.org/whl/cpu.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q --disable-pip-version-check "torch==2.13.0+cpu" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
"$place/venv/bin/pip" install -q --disable-pip-version-check "transformers==5.17.0" "numpy==1.26.4"
"$place/venv/bin/python" - <<'P'
import sys

import transformers
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config

sizes = dict(hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, vocab_size=100)
heads = dict(num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16)
heads |= dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
seen = []
for kind in (DeepseekV2Config, DeepseekV3Config):
    config = kind(**sizes, **heads, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, rms_norm_eps=0.01)
    layer = AutoModelForCausalLM.from_config(config).model.layers[0]
    norms = (layer.input_layernorm, layer.self_attn.q_a_layernorm, layer.self_attn.kv_a_layernorm)
    seen.append(tuple(norm.variance_epsilon for norm in norms))
    print(f"transformers {transformers.__version__}, {kind.model_type}: input, q_a, kv_a {seen[-1]}")
sys.exit(seen != [(0.01, 1e-6, 1e-6)] * 2)
P
