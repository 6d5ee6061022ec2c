"""Quantises a model with llm-compressor, for `jobs/benchmark.py --peer`; runs in an interpreter that has it.

    python jobs/llm_compressor_run.py MODEL TOKENS.npy OUTPUT POLICY

TOKENS.npy holds (samples, length) token ids; POLICY is a policy of gs_dist as JSON. Written for llm-compressor 0.14,
which is not a dependency of gs_dist.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def modifiers(policy: dict[str, Any]) -> list[Any]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    bits = {"int8": 8, "qint4x2": 4}[policy["weight_quant_dtype"]]
    group = policy["group_size"]
    weights = QuantizationArgs(
        num_bits=bits,
        symmetric=policy["weight_symmetric"],
        strategy="group" if group else "channel",
        group_size=group or None,
    )
    inputs = None
    if policy["act_quant_dtype"]:
        dynamic = policy["act_quant_granularity"] == "per_token"
        inputs = QuantizationArgs(num_bits=8, strategy="token" if dynamic else "tensor", dynamic=dynamic)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)}
    shared: dict[str, Any] = {"config_groups": groups, "ignore": ["lm_head"]}
    before: list[Any] = []
    if policy["outliers_suppression"] == "smooth":
        from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

        before = [SmoothQuantModifier(smoothing_strength=0.5)]
    if policy["outliers_suppression"] == "awq":
        from llmcompressor.modifiers.transform.awq import AWQModifier

        before = [AWQModifier()]
    if policy["precision_recovery"] == "gptq":
        from llmcompressor.modifiers.gptq import GPTQModifier

        return [*before, GPTQModifier(**shared)]
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [*before, QuantizationModifier(**shared)]


def main() -> None:
    import numpy as np
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model_path, tokens_path, output, policy = sys.argv[1:5]
    tokens = np.load(tokens_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    torch.manual_seed(0)
    # It asks for a tokenizer even where the samples are tokens.
    words = Tokenizer(WordLevel({"unknown": 0}, unk_token="unknown"))
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="unknown"),
        dataset=Dataset.from_list(rows),
        recipe=modifiers(json.loads(policy)),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(output)


if __name__ == "__main__":
    main()
