from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from checkpoints import tiny_checkpoint

from gs_dist.calibration.device import Device
from gs_dist.calibration.network import DecoderNetwork
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.model.device_kind import DeviceKind
from gs_dist.ptq import (
    PTQ,
    CausalDecoder,
    DecoderHelper,
    OutliersSuppressionType,
    PTQConfig,
    PTQMode,
    QuantGranularity,
)

KINDS = {
    "llama": {"tie": True},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {},
}


def token_ids(num: int = 3, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 128, (2, 12)).astype(np.int32) for _ in range(num)]


def reference(directory: Path, ids: np.ndarray) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """Logits, and each layer's captured activations, by the decoder of the distributed job."""
    reader = CheckpointReader(directory)
    network = DecoderNetwork(reader.architecture, Device(kind=DeviceKind.CPU))
    outer = network.outer_weights(reader.read_outer())
    hidden = network.embed(outer, ids)
    captured = []
    for layer in range(reader.architecture.num_layers):
        hidden, seen = network.forward_layer(network.layer_weights(layer, reader.read_layer(layer)), hidden)
        captured.append({name: tensor.asnumpy() for name, tensor in seen.items()})
    return network.logits(outer, hidden).asnumpy(), captured


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_distributed_decoder(kind: str, tmp_path: Path):
    """The network of cells computes what the job's compiled layers compute."""
    directory = tiny_checkpoint(tmp_path / kind, kind, **KINDS[kind])
    ids = token_ids(1)[0]
    logits = CausalDecoder.from_checkpoint(directory)(ms.Tensor(ids)).asnumpy()
    wanted, _ = reference(directory, ids)
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_parameters_have_the_checkpoints_names(kind: str, tmp_path: Path):
    """Every tensor of the checkpoint is a parameter of that name, with those values."""
    directory = tiny_checkpoint(tmp_path / kind, kind)
    reader = CheckpointReader(directory)
    parameters = {p.name: p.asnumpy() for p in CausalDecoder.from_checkpoint(directory).get_parameters()}
    assert set(parameters) == set(reader.tensors)
    for name, tensor in reader.read(list(reader.tensors)).items():
        np.testing.assert_array_equal(parameters[name], tensor)


def test_helper_quantizes_the_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """With the ready helper, weights, activations and KV cache of a checkpoint are quantised by their own names."""
    directory = tiny_checkpoint(tmp_path / "model")
    helper = DecoderHelper(directory)
    network = helper.create_network()
    config = PTQConfig(act_quant_dtype=ms.int8, kvcache_quant_dtype=ms.int8, act_symmetric=True)
    policies = OrderedDict(
        {
            r".*mlp\.down_proj": PTQConfig(
                act_quant_dtype=ms.int8,
                act_quant_granularity=QuantGranularity.PER_TOKEN,
                outliers_suppression=OutliersSuppressionType.SMOOTH,
            )
        }
    )
    ptq = PTQ(config, policies)
    ids = token_ids()
    fake = ptq.apply(network, network_helper=helper, datasets=[{"input_ids": row} for row in ids])
    converted = ptq.convert(fake)
    printed = capsys.readouterr().out
    for text in ("model.layers.1.mlp.down_proj", "SmoothQuant-W8-perchannel-A8-pertoken", "C8-perchannel"):
        assert text in printed
    assert type(converted.lm_head).__name__ == "Dense", "the head lies outside the decoder layers"
    captured = [reference(directory, row)[1] for row in ids]
    for layer, cell in enumerate(fake.model.layers):
        largest = max(np.abs(seen[layer]["attention_input"]).max() for seen in captured)
        np.testing.assert_allclose(cell.self_attn.q_proj.input_scale.asnumpy(), largest / 127.5, rtol=1e-4)
        keys = np.max([np.abs(seen[layer]["key"]).reshape(-1, 32).max(axis=0) for seen in captured], axis=0)
        np.testing.assert_allclose(cell.self_attn.cache.key_scale.asnumpy(), keys / 127.5, rtol=1e-4)
    x = ms.Tensor(ids[0])
    np.testing.assert_array_equal(converted(x).asnumpy(), fake(x).asnumpy())
    wanted = network(x).asnumpy()
    assert np.linalg.norm(fake(x).asnumpy() - wanted) < 0.05 * np.linalg.norm(wanted)


def test_deployed_decoder_loads_a_checkpoint(tmp_path: Path):
    """A checkpoint of a quantised decoder loads into the structure that DEPLOY builds."""
    directory = tiny_checkpoint(tmp_path / "model")
    helper = DecoderHelper(directory)
    ptq = PTQ(PTQConfig(act_quant_dtype=ms.int8))
    quantized = ptq.convert(ptq.apply(helper.create_network(), helper, token_ids()))
    path = str(tmp_path / "decoder.safetensors")
    ms.save_checkpoint(quantized, path, format="safetensors")
    deploy = PTQ(PTQConfig(mode=PTQMode.DEPLOY, act_quant_dtype=ms.int8))
    loaded = deploy.convert(deploy.apply(helper.create_network(), helper), path)
    x = ms.Tensor(token_ids(1)[0])
    np.testing.assert_array_equal(loaded(x).asnumpy(), quantized(x).asnumpy())


def test_helper_generates_the_likeliest_tokens(tmp_path: Path):
    """Generate appends the argmax of the last logits, token by token."""
    helper = DecoderHelper(tiny_checkpoint(tmp_path / "model"), sequence_length=14)
    network = helper.create_network()
    ids = token_ids(1)[0]
    found = helper.generate(network, ids, do_sample=False, max_new_tokens=2)
    assert found.shape == (2, 14)
    logits = network(ms.Tensor(found[:, :13])).asnumpy()
    np.testing.assert_array_equal(found[:, 12], logits[:, 11].argmax(axis=-1))
    np.testing.assert_array_equal(found[:, 13], logits[:, 12].argmax(axis=-1))
    np.testing.assert_array_equal(helper.generate(network, ids), found)
    with pytest.raises(ValueError, match="do_sample"):
        helper.generate(network, ids, do_sample=True)


def test_helper_tells_specs(tmp_path: Path):
    """get_spec answers by name, and refuses names it does not know and names that are none."""
    helper = DecoderHelper(tiny_checkpoint(tmp_path / "model", tokenizer=True), batch_size=4, sequence_length=12)
    assert (helper.get_spec("batch_size"), helper.get_spec("seq_length"), helper.get_spec("num_layers")) == (4, 12, 2)
    with pytest.raises(KeyError, match="batch"):
        helper.get_spec("batch")
    with pytest.raises(TypeError):
        helper.get_spec(1)
    assert helper.create_tokenizer().get_vocab_size() > 0


def test_helper_without_tokenizer_says_so(tmp_path: Path):
    """A directory without tokenizer.json has no tokenizer to create."""
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        DecoderHelper(tiny_checkpoint(tmp_path / "model")).create_tokenizer()
