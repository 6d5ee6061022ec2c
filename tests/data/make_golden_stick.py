"""Makes golden_stick_1.4.1.npz: what MindSpore Golden Stick 1.4.1 computes for a tiny decoder layer on a CPU.

Golden Stick pins an older MindSpore, so it needs an environment of its own (Python 3.11; the package itself is
not needed):

    python3.11 -m venv stick
    stick/bin/pip install mindspore==2.7.1.post1 mindspore-gs==1.4.1 pyarrow==25.0.1
    stick/bin/python tests/data/make_golden_stick.py

Only its MindOne path runs without an Ascend card. GPTQ fails there, and is left out.

Three networks are quantised. `layer` is a decoder layer with grouped-query attention. `solo` is a norm and one
linear: the output of the "decoder layer" that Golden Stick's searches compare is then the linear's own, so that
its losses can be held against those of a search by Gram matrix. `positive` is `solo` with an input far from 0, of
which only the input and its range are kept.

Names of the arrays, all without pickle:

    NETWORK/weight/LINEAR      float16 (out, in), exact in float32
    NETWORK/norm/NORM          float16 (in,)
    NETWORK/input/INPUT        float32 (samples, tokens, in), the float network's, before any rescaling
    NETWORK/SCHEME/LINEAR/...  codes int8 (out, in); weight_scale float32 (out,) or (groups, out);
                               weight_offset; input_scale and input_offset of static activations;
                               clip float32 (out, groups), the range kept by weight clipping
    NETWORK/SCHEME/LINEAR/...  of the first linear that reads an input: smooth_scale float32 (in,), and of a
                               search alpha, losses (of each exponent in the order tried)
    NETWORK/SCHEME/summary     the table `PTQ.summary` prints, as rows of [layer name, type]
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import numpy as np
from datasets import Dataset
from mindspore import nn, ops
from mindspore_gs.common import BackendTarget
from mindspore_gs.ptq import PTQ, OutliersSuppressionType, PTQConfig, PTQMode, QuantGranularity
from mindspore_gs.ptq.algo_modules.mindone import AWQSmoother, LinearClipper, OSLSmoother, anti_outliers
from mindspore_gs.ptq.plugins.mindone_plugin import MindOneModelHubPlugin
from mindspore_gs.ptq.quant_cells.mindone.linear_clip_wrappers import ClipLinearCell

HERE = Path(__file__).parent
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 64, 128, 4, 2, 16
NUM_SAMPLES, NUM_TOKENS = 2, 32

SCHEMES: dict[str, dict[str, Any]] = {
    "w8a16": {},
    "w8a8": {"act_quant_dtype": ms.dtype.int8},
    "smoothquant": {
        "act_quant_dtype": ms.dtype.int8,
        "outliers_suppression": OutliersSuppressionType.SMOOTH,
    },
    "osl": {
        "act_quant_dtype": ms.dtype.int8,
        "outliers_suppression": OutliersSuppressionType.OUTLIER_SUPPRESSION_LITE,
    },
    "w4a16": {
        "weight_quant_dtype": ms.dtype.qint4x2,
        "weight_quant_granularity": QuantGranularity.PER_GROUP,
        "group_size": 64,
    },
    "awq": {
        "weight_quant_dtype": ms.dtype.qint4x2,
        "weight_quant_granularity": QuantGranularity.PER_GROUP,
        "group_size": 64,
        "outliers_suppression": OutliersSuppressionType.AWQ,
    },
}


class RMSNorm(nn.Cell):
    """Golden Stick tells a norm from a linear by the name of its class."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.weight = ms.Parameter(ms.Tensor(weight))

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return x * ops.rsqrt(ops.mean(x * x, -1, keep_dims=True) + 1e-6) * self.weight


def dense(weight: np.ndarray) -> nn.Dense:
    return nn.Dense(weight.shape[1], weight.shape[0], weight_init=ms.Tensor(weight), has_bias=False)


class Attention(nn.Cell):
    def __init__(self, weights: dict[str, np.ndarray], seen: dict[str, list[np.ndarray]]) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            dense(weights[f"self_attn.{name}_proj"]) for name in ("q", "k", "v", "o")
        )
        self.seen = seen

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        batch, tokens, _ = x.shape

        def heads(y: ms.Tensor, number: int) -> ms.Tensor:
            y = y.reshape(batch, tokens, number, HEAD_DIM).transpose(0, 2, 1, 3)
            return ops.repeat_interleave(y, HEADS // number, 1) if number < HEADS else y

        query, key = heads(self.q_proj(x), HEADS), heads(self.k_proj(x), KV_HEADS)
        value = heads(self.v_proj(x), KV_HEADS)
        scores = ops.softmax(ops.matmul(query, key.transpose(0, 1, 3, 2)) / HEAD_DIM**0.5, -1)
        mixed = ops.matmul(scores, value).transpose(0, 2, 1, 3).reshape(batch, tokens, HEADS * HEAD_DIM)
        record(self.seen, "self_attn.o_proj", mixed)
        return self.o_proj(mixed)


class MLP(nn.Cell):
    def __init__(self, weights: dict[str, np.ndarray], seen: dict[str, list[np.ndarray]]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            dense(weights[f"mlp.{name}_proj"]) for name in ("gate", "up", "down")
        )
        self.seen = seen

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        gate = self.gate_proj(x)
        product = gate * ops.sigmoid(gate) * self.up_proj(x)
        record(self.seen, "mlp.down_proj", product)
        return self.down_proj(product)


def record(seen: dict[str, list[np.ndarray]], name: str, x: ms.Tensor) -> None:
    if seen.get("on"):
        seen.setdefault(name, []).append(x.asnumpy()[0])


class DecoderLayer(nn.Cell):
    def __init__(self, weights: dict[str, np.ndarray], norms: dict[str, np.ndarray], seen: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(norms["input_layernorm"])
        self.self_attn = Attention(weights, seen)
        self.post_attention_layernorm = RMSNorm(norms["post_attention_layernorm"])
        self.mlp = MLP(weights, seen)
        self.seen = seen

    def construct(self, x: ms.Tensor) -> tuple[ms.Tensor]:
        normed = self.input_layernorm(x)
        record(self.seen, "self_attn.q_proj", normed)
        x = x + self.self_attn(normed)
        normed = self.post_attention_layernorm(x)
        record(self.seen, "mlp.gate_proj", normed)
        return (x + self.mlp(normed),)

    def smoothed(self) -> list[tuple[nn.Cell, list[nn.Cell]]]:
        attention, mlp = self.self_attn, self.mlp
        return [
            (self.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (attention.v_proj, [attention.o_proj]),
            (self.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            (mlp.up_proj, [mlp.down_proj]),
        ]


class SoloLayer(nn.Cell):
    def __init__(self, weights: dict[str, np.ndarray], norms: dict[str, np.ndarray], seen: dict[str, Any]) -> None:
        super().__init__()
        self.norm = RMSNorm(norms["norm"])
        self.proj = dense(weights["proj"])
        self.seen = seen

    def construct(self, x: ms.Tensor) -> tuple[ms.Tensor]:
        normed = self.norm(x)
        record(self.seen, "proj", normed)
        return (self.proj(normed),)

    def smoothed(self) -> list[tuple[nn.Cell, list[nn.Cell]]]:
        return [(self.norm, [self.proj])]


class Network(nn.Cell):
    def __init__(self, layer: nn.Cell) -> None:
        super().__init__()
        self.layers = nn.CellList([layer])

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.layers[0](x)[0]


class Model:
    """What the MindOne path asks of a model; a sample's only "token" is its index."""

    num_attention_heads, num_key_value_heads = HEADS, KV_HEADS

    def __init__(self, network: Network, samples: np.ndarray) -> None:
        self.network, self.samples = network, samples

    def _transformer_layers(self) -> list[type]:
        return [type(self.network.layers[0])]

    def get_layers_for_smooth(self, layer: Any) -> list[SimpleNamespace]:
        return [SimpleNamespace(prev_layer=source, curr_layer=linears) for source, linears in layer.smoothed()]

    def forward(self, item: dict[str, Any]) -> ms.Tensor:
        index = int(np.asarray(item["input_ids"]).reshape(-1)[0])
        return self.network(ms.Tensor(self.samples[index : index + 1]))


def half(values: np.ndarray) -> np.ndarray:
    """float32 that float16 holds exactly, so that it can be stored in half the space."""
    return values.astype(np.float16).astype(np.float32)


def problem(network: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]:
    """Weights, norm weights and samples (samples, tokens, channels), a few channels of which are large."""
    rng = np.random.default_rng({"layer": 1, "solo": 2, "positive": 3}[network])
    wide = INTERMEDIATE if network != "layer" else HIDDEN
    norm_names = ["input_layernorm", "post_attention_layernorm"] if network == "layer" else ["norm"]
    norms = {}
    for name in norm_names:
        norm = np.exp(0.4 * rng.standard_normal(wide))
        norm[rng.choice(wide, 4, replace=False)] *= 12
        norms[name] = half(norm)
    if network == "layer":
        shapes = {
            "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            "mlp.up_proj": (INTERMEDIATE, HIDDEN),
            "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
    else:
        shapes = {"proj": (48, INTERMEDIATE)}
    weights = {}
    for name, shape in shapes.items():
        rows = np.exp(0.3 * rng.standard_normal((shape[0], 1)))
        weights[name] = half(rng.standard_normal(shape) * rows / shape[1] ** 0.5)
    samples = rng.standard_normal((NUM_SAMPLES, NUM_TOKENS, wide))
    if network == "positive":
        samples = 3.0 + 0.3 * samples
    return weights, norms, half(samples)


def short(name: str) -> str:
    return name.replace("network.layers.0.", "").replace("._layer", "")


class Recorder:
    """Notes what Golden Stick's searches decide, as they decide it."""

    def __init__(self) -> None:
        self.found: dict[str, np.ndarray] = {}
        self._losses: list[float] = []
        smoother, clipper = anti_outliers.LinearSmoother, ClipLinearCell
        apply_scale, apply_clip = smoother._apply_smooth_scale, clipper._apply_clip

        def noted_scale(this: Any, info: Any, scale: ms.Tensor, *rest: Any) -> None:
            self.found[f"{short(info.curr_layer[0].layer_name)}/smooth_scale"] = scale.asnumpy().astype(np.float32)
            apply_scale(this, info, scale, *rest)

        def noted_clip(this: Any, value: ms.Tensor) -> None:
            self.found[f"{short(this.layer_name)}/clip"] = value.asnumpy()[..., 0]
            apply_clip(this, value)

        smoother._apply_smooth_scale, clipper._apply_clip = noted_scale, noted_clip
        for search in (AWQSmoother, OSLSmoother):
            self._watch(search)

    def _watch(self, search: Any) -> None:
        loss, choose = search._loss, search._search_best_ratio

        def noted_loss(this: Any, *args: Any) -> float:
            self._losses.append(loss(this, *args))
            return self._losses[-1]

        def noted_choice(this: Any, name: str, layer: Any, info: Any, *rest: Any) -> Any:
            self._losses.clear()
            scale, ratio = choose(this, name, layer, info, *rest)
            first = short(info.curr_layer[0].layer_name)
            self.found[f"{first}/alpha"] = np.float64(ratio)
            self.found[f"{first}/losses"] = np.array(self._losses)
            return scale, ratio

        search._loss, search._search_best_ratio = noted_loss, noted_choice


def summary_rows(ptq: PTQ, network: Network) -> np.ndarray:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ptq.summary(network)
    cells = [line.strip("| \n").split("|") for line in printed.getvalue().splitlines() if "network." in line]
    return np.array([[cell.strip() for cell in row] for row in cells])


def quantize(network_name: str, scheme: str, recorder: Recorder) -> dict[str, np.ndarray]:
    weights, norms, samples = problem(network_name)
    layer_type = DecoderLayer if network_name == "layer" else SoloLayer
    network = Network(layer_type(weights, norms, {}))
    network.update_parameters_name("network.")
    config = PTQConfig(
        mode=PTQMode.QUANTIZE,
        backend=BackendTarget.ASCEND,
        **{"weight_quant_dtype": ms.dtype.int8, **SCHEMES[scheme]},
    )
    ptq = PTQ(config)
    recorder.found.clear()
    indices = Dataset.from_dict({"input_ids": [[i] for i in range(len(samples))]})
    ptq.apply(Model(network, samples), datasets=indices, framework="mindone")
    result = dict(recorder.found)
    for name, cell in network.cells_and_names():
        if hasattr(cell, "weight_scale"):
            for kind in ("weight", "weight_scale", "weight_offset", "input_scale", "input_offset"):
                if hasattr(cell, kind):
                    key = "codes" if kind == "weight" else kind
                    result[f"{short('network.' + name)}/{key}"] = getattr(cell, kind).asnumpy()
    result["summary"] = summary_rows(ptq, network)
    return {f"{network_name}/{scheme}/{key}": value for key, value in result.items()}


def main() -> None:
    """Writes the file beside this script."""
    logging.disable(logging.INFO)
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU")
    plugin = MindOneModelHubPlugin.__new__(MindOneModelHubPlugin)  # its own models are not needed
    plugin._load_quant_cells()
    plugin._load_algo_modules()
    recorder = Recorder()
    assert LinearClipper in PTQ.pipeline
    arrays: dict[str, np.ndarray] = {}
    runs = {
        "solo": ["w4a16", "awq", "osl"],
        "positive": ["w8a8"],
        "layer": list(SCHEMES),
    }
    for network_name, schemes in runs.items():
        weights, norms, samples = problem(network_name)
        arrays.update({f"{network_name}/weight/{name}": w.astype(np.float16) for name, w in weights.items()})
        arrays.update({f"{network_name}/norm/{name}": w.astype(np.float16) for name, w in norms.items()})
        seen: dict[str, Any] = {"on": True}
        layer = (DecoderLayer if network_name == "layer" else SoloLayer)(weights, norms, seen)
        for sample in samples:
            layer(ms.Tensor(sample[None]))
        seen.pop("on")
        arrays.update({f"{network_name}/input/{name}": np.stack(values) for name, values in seen.items()})
        for scheme in schemes:
            arrays.update(quantize(network_name, scheme, recorder))
            print(network_name, scheme, flush=True)
    # Of `positive` only the input and its range are of interest.
    arrays = {name: array for name, array in arrays.items() if not name.startswith("positive/") or "/input" in name}
    np.savez_compressed(HERE / "golden_stick_1.4.1.npz", **arrays)


if __name__ == "__main__":
    main()
