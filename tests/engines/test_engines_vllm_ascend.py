"""vLLM-Ascend's own loader on what is published for it, on a CPU, with the card's operators emulated.

Run with `pytest -m engines tests/engines`, in the environment that `tests/engines/environment.sh` makes.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import dialects
import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import DTYPES

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.dialects.ascend.codec import AscendCodec
from gs_dist.results.quantized import QuantizedLayer, QuantizedLinear

pytestmark = pytest.mark.engines

VERSIONS = ("0.23.0", "0.25.1rc1")
WIDE = {"hidden_size": 128}  # heads of 32 channels, which an int8 cache is cut into
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "W8A8, llama": (dialects.W8A8, {}),
    "W8A8, qwen2 (biases)": (dialects.W8A8, {"model_type": "qwen2"}),
    "W8A8, float16, zero points": (
        dialects.W8A8_ASYMMETRIC,
        {"model_type": "qwen2", "dtype": "float16", "zero_point": 9},
    ),
    "W8A8, Outlier Suppression+": (dialects.W8A8_PLUS, {}),
    "W8A8_MIX, llama": (dialects.W8A8_MIX, {}),
    "W8A8_MIX, qwen2 (biases)": (dialects.W8A8_MIX, {"model_type": "qwen2"}),
    "W8A8_DYNAMIC, mistral": (dialects.W8A8_DYNAMIC, {"model_type": "mistral"}),
    "W8A8_DYNAMIC, qwen2 (biases)": (dialects.W8A8_DYNAMIC, {"model_type": "qwen2"}),
    "W8A16, qwen3": (dialects.W8A16, {"model_type": "qwen3"}),
    "W8A8, int8 KV cache": (dialects.W8A8, {"model_type": "qwen3", "kv_cache": "per_channel", **WIDE}),
}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Loaded(NamedTuple):
    """What the engine made of one directory."""

    linears: list[dict[str, Any]]
    layers: dict[int, QuantizedLayer]
    directory: Path
    outputs: dict[str, npt.NDArray[np.float32]]


@pytest.fixture(scope="module", params=VERSIONS)
def loaded(
    engines: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, Loaded]:
    """Every case, loaded by one version of the package."""
    root = tmp_path_factory.mktemp("ascend")
    layers = {
        name: dialects.save_model(root / str(number), AscendCodec(), policy, **options)
        for number, (name, (policy, options)) in enumerate(CASES.items())
    }
    directories = [str(root / str(number)) for number in range(len(CASES))]
    outputs = root / "outputs.npz"
    script = Path(__file__).with_name("load_ascend.py")
    package = engines / f"vllm-ascend-{request.param}"
    command = [str(engines / "bin/python"), str(script), str(package), str(outputs), *directories]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(CASES), result.stderr[-3000:]
    assert not [line for line in lines if "refused" in line], lines
    with np.load(outputs) as held:
        arrays = {name: held[name] for name in held.files}
    return {
        name: Loaded(
            lines[number]["linears"],
            layers[name],
            root / str(number),
            {k.partition(":")[2]: v for k, v in arrays.items() if k.startswith(f"{number}:")},
        )
        for number, name in enumerate(CASES)
    }


def test_every_parameter_has_its_tensor_and_none_is_left_over(loaded: dict[str, Loaded]) -> None:
    """Name, dtype and shape are those that the engine allocates; all linears are quantised, and it says with what."""
    rows = []
    for name, found in loaded.items():
        allocated, held = (sum(linear[key] for linear in found.linears) for key in ("allocated", "found"))
        left = [tensor for linear in found.linears for tensor in linear["left_over"]]
        misfits = [text for linear in found.linears for text in linear["misfits"]]
        rows.append(f"| {name} | {allocated} | {held} | {len(left)} |")
        assert (held, left, misfits) == (allocated, [], []), name
        expected = 4 * len(found.layers) + (len(found.layers) if "KV" in name else 0)
        assert len(found.linears) == expected, name
        assert {linear["kind"] for linear in found.linears} - {"C8"} == {name.partition(",")[0]}
    print("\n| scheme | parameters allocated | found | left over |\n|---|---|---|---|\n" + "\n".join(rows))


def rounded(
    x: npt.NDArray[np.float64], linear: QuantizedLinear, dtype: Any, *, decodes: bool
) -> npt.NDArray[np.float64]:
    """What the linear reads after the engine rounded it; a static scale's reciprocal has the served dtype."""
    if linear.policy.act_quant_dtype is None:
        return x
    if linear.input_scale is None or (linear.policy.mixes_phases and not decodes):
        single = np.float32(x)
        steps = np.abs(single).max(axis=-1, keepdims=True) / np.float32(127)
        return np.asarray(np.rint(single / steps).astype(np.float64) * steps)
    zero = linear.input_zero_point or 0
    reciprocal = float(np.array(1 / np.float32(linear.input_scale)).astype(dtype))
    codes = np.clip(np.rint(np.float32(x) * np.float32(reciprocal)) + zero, -128, 127).astype(np.float64)
    return np.asarray((codes - zero) * linear.input_scale)


def test_it_computes_what_the_integers_stand_for(loaded: dict[str, Loaded]) -> None:
    """Outputs of the engine's own methods against rounded inputs times dequantised weights, in NumPy's float64.

    What differs is the last step, a rounding to bfloat16 or float16; and of a static linear with a bias, its rounding
    to a whole number of the integer product's steps.
    """
    compared = 0
    for name, found in loaded.items():
        stated = json.loads((found.directory / "config.json").read_text())["torch_dtype"]
        half, dtype = stated == "float16", DTYPES[stated]
        for key in [key for key in found.outputs if not key.endswith(":x")]:
            prefix, _, output = key.partition(":")
            parts = prefix.split(".")
            layer, inside = found.layers[int(parts[2])], ".".join(parts[3:-1])
            members = [layer.linears[f"{inside}.{member}"] for member in FUSED.get(parts[-1], (parts[-1],))]
            x = found.outputs[f"{prefix}:x"].astype(np.float64)
            expected = np.concatenate(
                [
                    rounded(x, m, dtype, decodes=output == "decoded") @ m.dequantized().astype(np.float64).T
                    + (0 if m.bias is None else m.bias)
                    for m in members
                ],
                axis=1,
            )
            steps = [np.ravel(m.scale * (m.input_scale or 0)) * (m.bias is not None) for m in members]
            slack = 2.0 ** (-10 if half else -7) * np.abs(expected) + 0.51 * np.concatenate(steps) + 2e-3
            wrong = np.abs(found.outputs[key] - expected) > slack
            # A value on a rounding edge falls to either side by the last digit of a float32.
            assert wrong.mean() < 0.01, (name, key, wrong.sum())
            compared += 1
    outputs = {name: 1 + name.startswith("W8A8_MIX") for name in loaded}  # prefilled, and by a node that only decodes
    assert compared == sum(4 * len(found.layers) * outputs[name] for name, found in loaded.items())


def test_what_it_loads_passes_the_checker(loaded: dict[str, Loaded]) -> None:
    """The rules that are applied for this engine let all of it pass."""
    for name, found in loaded.items():
        report = check(found.directory, "vllm-ascend")
        assert report.clean, (name, report.render())
