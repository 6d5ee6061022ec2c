"""Makes `vllm_kernels.json`: which kernel vLLM's own chooser takes for packed integer weights on CUDA cards.

Run it in the environment that `tests/engines/environment.sh` makes:

    PYTHON_OF_IT tests/data/make_vllm_kernels.py

No card is needed: the chooser asks the platform alone, and the platform of the CPU build is told to answer as a CUDA
card of each capability would. Kernels of packages that vLLM does not bring along say by themselves that these are
missing.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
import vllm
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum
from vllm.scalar_type import scalar_types

CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0))
GROUPS = (0, 16, 32, 64, 96, 128, 256, 512)  # 0: a scale a channel
# Input channels, those of one card's share, output channels.
SHAPES = ((4096, 4096, 4096), (1536, 1536, 576), (576, 576, 1536), (29568, 14784, 8192), (4096, 1024, 4096))
TYPES = {
    (4, True): scalar_types.uint4b8,
    (8, True): scalar_types.uint8b128,
    (4, False): scalar_types.uint4,
    (8, False): scalar_types.uint8,
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
OUTPUT = Path(__file__).with_name("vllm_kernels.json")


class FakedCuda(Platform):
    """Answers as a CUDA card of `capability`."""

    _enum = PlatformEnum.CUDA
    device_name = device_type = "cuda"
    capability = CAPABILITIES[0]

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(*cls.capability)


def kernel(
    capability: tuple[int, int], shape: tuple[int, int, int], kind: tuple[int, bool], dtype: str, group: int
) -> str | None:
    """Name of the kernel's class, None where there is none."""
    FakedCuda.capability = capability
    whole, share, outputs = shape
    config = MPLinearLayerConfig(
        full_weight_shape=(whole, outputs),
        partition_weight_shape=(share, outputs),
        weight_type=TYPES[kind],
        act_type=DTYPES[dtype],
        group_size=group or -1,
        zero_points=not kind[1],
    )
    try:
        name: str = choose_mp_linear_kernel(config).__name__.removesuffix("LinearKernel")
        return name
    except ValueError:  # "Failed to find a kernel ..."
        return None


def main() -> None:
    current_platform.__class__ = FakedCuda  # kernels hold this very object
    rows = []
    for capability, shape, kind, dtype in itertools.product(CAPABILITIES, SHAPES, TYPES, DTYPES):
        row = {
            "capability": "{}.{}".format(*capability),
            "in_out_share": [shape[0], shape[2], shape[1]],
            "num_bits": kind[0],
            "symmetric": kind[1],
            "dtype": dtype,
            "kernels": [kernel(capability, shape, kind, dtype, group) for group in GROUPS],
        }
        rows.append(json.dumps(row))
    head = {"vllm": vllm.__version__, "groups": GROUPS}
    text = json.dumps(head)[:-1] + ', "rows": [\n' + ",\n".join(rows) + "\n]}\n"
    OUTPUT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
