"""Writes nvfp4.safetensors: a weight that compressed-tensors packed as NVFP4, and what it turns it back into.

python tests/data/make_nvfp4.py    # with torch 2.13, compressed-tensors 0.19
"""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam
from safetensors.torch import save_file


def main() -> None:
    """Rows of magnitudes over three decades, so that block scales take many exponents."""
    torch.manual_seed(0)
    weight = torch.randn(8, 64) * torch.logspace(-3, 0, 8)[:, None]
    form = "nvfp4-pack-quantized"
    scheme = QuantizationScheme(targets=["Linear"], format=form, **NVFP4A16)
    whole = generate_gparam(weight.min(), weight.max())
    blocks = weight.reshape(8, 4, 16)
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=whole)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(
        {"weight": weight, "weight_scale": scale, "weight_global_scale": whole.reshape(1)}, scheme
    )
    restored = compressor.decompress(dict(stored), scheme)["weight"]
    save_file({**stored, "restored": restored.contiguous()}, Path(__file__).with_name("nvfp4.safetensors"))


if __name__ == "__main__":
    main()
