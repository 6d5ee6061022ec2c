"""What float16 cannot hold is found between the linears too, and bounds never hide it."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from checkpoints import random_tensors, tiny_config

from gs_dist.calibration import float16_watch
from gs_dist.calibration.device import open_device
from gs_dist.calibration.float16_watch import Float16Watch
from gs_dist.calibration.network import DecoderNetwork, RoutedActivation
from gs_dist.errors import LayerError
from gs_dist.model.families import read_architecture

Arrays = dict[str, Any]
TOKENS = 24


class Model:
    """A tiny model's first layer, run by the network itself on random hidden states."""

    def __init__(self, model_type: str = "llama", **overrides: Any) -> None:
        config = tiny_config(model_type, torch_dtype="float16", num_hidden_layers=1, **overrides)
        self.architecture = read_architecture(config)
        prefix = self.architecture.layer_prefix(0)
        tensors = random_tensors(config, "float16")
        self.tensors: Arrays = {n.removeprefix(prefix): a for n, a in tensors.items() if n.startswith(prefix)}
        self.hidden = np.random.default_rng(5).standard_normal((2, TOKENS, 64)).astype(np.float32)

    def run(self) -> tuple[np.ndarray, Arrays]:
        network = DecoderNetwork(self.architecture, open_device("cpu"))
        weights = network.layer_weights(0, self.tensors)
        after, captured = network.forward_layer(weights, network.device.to_tensor(self.hidden))
        routed = {name: part for name, part in captured.items() if isinstance(part, RoutedActivation)}
        self.routed = {
            name: (part.values.asnumpy()[: part.num_routed], part.tokens[: part.num_routed])
            for name, part in routed.items()
        }
        return after.asnumpy(), {name: array.asnumpy() for name, array in captured.items() if name not in routed}

    def watch(self, final_norm: Any = None, head: Any = None) -> Float16Watch:
        return Float16Watch(
            "model.layers.0.",
            self.architecture.layers[0],
            self.tensors,
            epsilon=self.architecture.rms_norm_eps,
            final_norm=final_norm,
            head=head,
        )

    def look(self, mask: Any = None, final_norm: Any = None, head: Any = None) -> None:
        after, captured = self.run()
        self.watch(final_norm, head).look(3, self.hidden, after, captured, mask, self.routed)


def told(refused: pytest.ExceptionInfo[LayerError]) -> float:
    """The number in a message."""
    found = re.search(r"(?:reach|reaches) ([\d.e+]+) in micro-batch 3", str(refused.value))
    assert found is not None, str(refused.value)
    return float(found[1])


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "mistral", "olmo2", "deepseek_v3", "glm4_moe", "qwen2_moe"]
)
def test_an_ordinary_model_is_let_through(model_type: str) -> None:
    """Of every kind of layer, with and without padding."""
    model = Model(model_type)
    model.look()
    model.look(np.arange(TOKENS)[None, :] < np.array([[20], [24]]))


def test_hidden_states_beyond_float16_are_refused() -> None:
    """No linear reads them: the norm before it makes them small again."""
    model = Model()
    model.hidden[1, 4, 7] = 7e4
    with pytest.raises(
        LayerError, match=r"^model\.layers\.0: the hidden states behind it reach 7e\+04 in micro-batch 3"
    ):
        model.look()


def test_padding_does_not_count() -> None:
    """What stands behind the end of a sample is never served."""
    model = Model()
    model.hidden[1, 20:, 7] = 7e4
    model.look(np.arange(TOKENS)[None, :] < np.array([[20], [20]]))


def test_what_a_block_adds_is_looked_at_though_the_next_takes_it_away() -> None:
    """The sum between attention and mlp, where what is behind the layer is small."""
    model = Model()
    model.tensors["self_attn.o_proj.weight"][7] = np.float16(300.0)
    after, captured = model.run()
    captured["attention_output"] = np.full_like(captured["attention_output"], 5.0)
    with pytest.raises(LayerError, match="what a block adds to the hidden states, or their sum, reaches") as refused:
        model.watch().look(3, model.hidden, np.zeros_like(after), captured)
    assert told(refused) == pytest.approx(300 * 5 * 64, rel=0.01)


def queries_and_keys(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Both (b, t, heads, d) behind the rotary embedding, by transformers' formula in float64."""
    attention = model.architecture.layers[0].attention
    get = lambda name: model.tensors[name].astype(np.float64)  # noqa: E731 - reads as the formula does
    x = model.hidden.astype(np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.architecture.rms_norm_eps) * get("input_layernorm.weight")
    position = np.arange(TOKENS)[:, None]
    d = attention.head_dim
    angle = position / attention.rotary.theta ** (np.arange(0, d, 2) / d)
    cosine, sine = (np.concatenate([f(angle)] * 2, axis=1)[:, None] for f in (np.cos, np.sin))

    def heads(name: str, count: int) -> np.ndarray:
        y = x @ get(f"self_attn.{name}_proj.weight").T
        if f"self_attn.{name}_proj.bias" in model.tensors:
            y = y + get(f"self_attn.{name}_proj.bias")
        y = y.reshape(2, TOKENS, count, d)
        if attention.qk_norm == "head":
            norm = get(f"self_attn.{name}_norm.weight")
            y = y / np.sqrt((y**2).mean(-1, keepdims=True) + model.architecture.rms_norm_eps) * norm
        half = np.concatenate([-y[..., d // 2 :], y[..., : d // 2]], axis=-1)
        return np.asarray(y * cosine + half * sine)

    return heads("q", attention.num_heads), heads("k", attention.num_kv_heads)


def largest_product(model: Model) -> float:
    attention = model.architecture.layers[0].attention
    query, key = queries_and_keys(model)
    key = np.repeat(key, attention.num_heads // attention.num_kv_heads, axis=2)
    products = np.abs(np.einsum("bqhd,bkhd->bhqk", query, key))
    place = np.arange(TOKENS)
    distance = place[:, None] - place[None, :]
    seen = (distance >= 0) & (distance < (attention.window or TOKENS))
    return float(products[:, :, seen].max())


LOUD: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"sliding_window": 6}),
]


@pytest.mark.parametrize(("model_type", "overrides"), LOUD)
def test_products_of_queries_and_keys_are_those_of_the_formula(model_type: str, overrides: dict[str, Any]) -> None:
    """The number told is the largest that a query has with a key that it sees, before it is divided."""
    model = Model(model_type, **overrides)
    for name in ("q", "k"):
        if model_type == "qwen3":
            model.tensors[f"self_attn.{name}_norm.weight"] *= np.float16(90)
        else:
            model.tensors[f"self_attn.{name}_proj.weight"] *= np.float16(60)
    true = largest_product(model)
    assert true > float16_watch.FLOAT16_MAX
    with pytest.raises(LayerError, match="the product of a query and a key reaches") as refused:
        model.look()
    assert told(refused) == pytest.approx(true, rel=0.01)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("model_type", "overrides"), LOUD)
def test_bounds_never_hide_a_product(
    model_type: str, overrides: dict[str, Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limit anywhere around the true largest product, it is refused exactly where that is above."""
    model = Model(model_type, **overrides)
    model.hidden = np.random.default_rng(seed).standard_normal((2, TOKENS, 64)).astype(np.float32)
    true = largest_product(model)
    _, captured = model.run()
    watch = model.watch()
    for share in (0.25, 0.9, 0.999, 1.001, 1.1, 4.0):
        monkeypatch.setattr(float16_watch, "FLOAT16_MAX", share * true)
        found = watch._scores(captured, None)
        assert (found > share * true) == (share < 1)
        assert found <= true * 1.0001


def test_the_last_norm_is_looked_at_behind_the_last_layer() -> None:
    """Its output feeds the head, which no statistics are taken of."""
    model = Model()
    norm = np.ones(64, np.float16)
    model.look(final_norm=norm)
    norm[7] = 60000
    model.hidden[0, 0, 7] = 30.0
    with pytest.raises(LayerError, match="the output of the model's last norm reaches"):
        model.look(final_norm=norm)


@pytest.mark.parametrize("name", ["mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj"])
def test_what_a_linear_puts_out_is_looked_at_though_the_next_step_makes_it_small(name: str) -> None:
    """A gate of -7e4 is 0 behind the silu, and in float16 -inf, which is NaN behind it; so with norms."""
    model = Model("qwen3")
    weight = model.tensors[f"{name}.weight"]
    _, captured = model.run()
    x = captured["mlp_input" if name.startswith("mlp") else "attention_input"].reshape(-1, 64)
    loudest = x[np.argmax(np.square(x).sum(axis=1))]
    weight[3] = (-7e4 / np.square(loudest).sum() * loudest).astype(np.float16)
    captured["mlp_activation"][:] = 0  # of what else the loud row would be told
    with pytest.raises(LayerError, match=f"the output of {re.escape(name)} reaches") as refused:
        model.watch().look(3, model.hidden, model.hidden, captured)
    true = np.abs(x.astype(np.float64) @ weight.astype(np.float64).T).max()
    assert true > float16_watch.FLOAT16_MAX
    assert told(refused) == pytest.approx(true, rel=0.01)


@pytest.mark.parametrize("leaf", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_what_a_routed_experts_linear_puts_out_is_looked_at_for_its_own_tokens(model_type: str, leaf: str) -> None:
    """What stands behind it is small again; an expert that no real token reaches is not asked."""
    model = Model(model_type, **({"first_k_dense_replace": 0} if model_type == "deepseek_v3" else {}))
    model.look()
    mlp = model.architecture.layers[0].mlp
    number = max(range(mlp.num_experts), key=lambda n: model.routed[f"expert.{n}"][1].size)
    linear = mlp.experts[number][("gate_proj", "up_proj", "down_proj").index(leaf)].name
    after, captured = model.run()
    activation, tokens = model.routed[f"expert.{number}"]
    read = activation if leaf == "down_proj" else captured["mlp_input"].reshape(-1, 64)[tokens]
    weight = model.tensors[f"{linear}.weight"]
    made = np.abs(read @ weight.astype(np.float32).T)
    factor = np.float16(min(6e4 / np.abs(weight.astype(np.float32)).max(), 1.5e5 / made.max()))
    model.tensors[f"{linear}.weight"] = weight * factor
    wanted = np.abs(read @ model.tensors[f"{linear}.weight"].astype(np.float32).T).max()
    assert wanted > 65504
    with pytest.raises(LayerError, match=re.escape(f"the output of {linear} reaches")) as refused:
        model.watch().look(3, model.hidden, after, captured, None, model.routed)
    assert told(refused) == pytest.approx(wanted, rel=1e-2)
    padding = np.ones((2, TOKENS), bool)
    padding.reshape(-1)[tokens] = False
    model.watch().look(3, model.hidden, after, captured, padding, model.routed)


def test_what_stands_before_a_norm_behind_a_block_is_looked_at() -> None:
    """The norm makes it small again, but not infinity."""
    model = Model("olmo2")
    model.tensors["mlp.down_proj.weight"][7] = np.float16(300.0)
    after, captured = model.run()
    captured["mlp_activation"] = np.full_like(captured["mlp_activation"], 5.0)
    with pytest.raises(LayerError, match=r"the output of mlp\.down_proj reaches") as refused:
        model.watch().look(3, model.hidden, after, captured)
    assert told(refused) == pytest.approx(300 * 5 * captured["mlp_activation"].shape[-1], rel=0.01)


def test_the_sum_between_blocks_whose_norms_come_after_is_looked_at() -> None:
    """What a norm with a loud weight makes of the attention's output, added to hidden states that are well within."""
    model = Model("olmo2")
    model.hidden[0, 3, 7] = 6e4
    after, captured = model.run()
    model.tensors["post_attention_layernorm.weight"][7] = np.float16(6e4)
    output = captured["attention_output"].reshape(-1, captured["attention_output"].shape[-1]).astype(np.float64)
    added = output @ model.tensors["self_attn.o_proj.weight"].astype(np.float64).T
    added /= np.sqrt(np.square(added).mean(axis=1, keepdims=True) + model.architecture.rms_norm_eps)
    between = model.hidden.reshape(-1, 64) + added * model.tensors["post_attention_layernorm.weight"].astype(np.float64)
    true = np.abs(between).max()
    assert true > float16_watch.FLOAT16_MAX
    with pytest.raises(LayerError, match="what a block adds to the hidden states, or their sum, reaches") as refused:
        model.watch().look(3, model.hidden, np.zeros_like(after), captured)
    assert told(refused) == pytest.approx(true, rel=0.01)


def test_logits_are_looked_at_behind_the_last_layer() -> None:
    """Of a head with one loud row, by the formula in float64."""
    model = Model()
    norm, head = np.ones(64, np.float16), np.zeros((128, 64), np.float16)
    model.look(final_norm=norm, head=head)
    head[100] = 20000
    after, _ = model.run()
    states = after.reshape(-1, 64).astype(np.float64)
    normed = states / np.sqrt(np.square(states).mean(axis=1, keepdims=True) + model.architecture.rms_norm_eps)
    true = np.abs(normed @ head.astype(np.float64).T).max()
    assert true > float16_watch.FLOAT16_MAX
    with pytest.raises(LayerError, match="the largest logit reaches") as refused:
        model.look(final_norm=norm, head=head)
    assert told(refused) == pytest.approx(true, rel=0.01)


def test_infinity_and_nan_are_beyond_float16() -> None:
    """What a card has already lost is refused as well."""
    model = Model()
    after, _ = model.run()
    for lost in (np.inf, np.nan):
        after[0, 0, 0] = lost
        with pytest.raises(LayerError, match="the hidden states behind it reach"):
            model.watch().look(0, model.hidden, after, {})
