"""Makes `llm_compressor/SCHEME/`: directories of a few KB as llm-compressor 0.14 writes them, for `gs-dist check`.

Run it with an interpreter that has llm-compressor:

    PYTHON_OF_IT tests/data/make_llm_compressor.py

Weights and samples are random, from a fixed seed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

OUTPUT = Path(__file__).with_name("llm_compressor")
VOCABULARY, LENGTH = 64, 16
WEIGHTS = {
    "w8a8-static": QuantizationArgs(num_bits=8, strategy="channel"),
    "w8a8-dynamic": QuantizationArgs(num_bits=8, strategy="channel"),
    "w4a16": QuantizationArgs(num_bits=4, strategy="group", group_size=16),
}
INPUTS = {
    "w8a8-static": QuantizationArgs(num_bits=8, strategy="tensor"),
    "w8a8-dynamic": QuantizationArgs(num_bits=8, strategy="token", dynamic=True),
}


def make(scheme: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory() as source:  # it looks for files beside a model that was loaded
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
        calibrate(LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16), scheme)


def calibrate(model: LlamaForCausalLM, scheme: str) -> None:
    ids = torch.randint(0, VOCABULARY, (4, LENGTH)).tolist()
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    group = QuantizationScheme(targets=["Linear"], weights=WEIGHTS[scheme], input_activations=INPUTS.get(scheme))
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list([{"input_ids": row, "attention_mask": [1] * LENGTH} for row in ids]),
        recipe=QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"]),
        max_seq_length=LENGTH,
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    model.save_pretrained(OUTPUT / scheme)
    tokenizer.save_pretrained(OUTPUT / scheme)


def main() -> None:
    shutil.rmtree(OUTPUT, ignore_errors=True)
    for scheme in WEIGHTS:
        make(scheme)


if __name__ == "__main__":
    main()
