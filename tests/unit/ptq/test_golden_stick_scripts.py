"""The flow of Golden Stick's example scripts, with their imports' module paths below `gs_dist.golden_stick`."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from checkpoints import tiny_checkpoint
from mindspore import dtype as msdtype
from ptq_networks import CHANNELS, Decoder, Mlp, batches, parameter_values, strategies
from ptq_networks import DecoderLayer as OwnLayer
from runs import run_inline, small_recipe
from safetensors.numpy import load_file

from gs_dist.checkpoint.check import check
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.data.dataset import open_dataset
from gs_dist.errors import DatasetError, OutputError, UserError
from gs_dist.golden_stick.common import BackendTarget
from gs_dist.golden_stick.datasets import get_datasets
from gs_dist.golden_stick.ptq import (
    PTQ,
    AWQConfig,
    OutliersSuppressionType,
    PrecisionRecovery,
    PTQConfig,
    PTQMode,
    QuantGranularity,
    RoundToNearest,
)
from gs_dist.golden_stick.ptq.models import AutoQuantForCausalLM
from gs_dist.golden_stick.ptq.smooth_quant import SmoothQuant
from gs_dist.ptq import PTQ as CopyingPTQ
from gs_dist.ptq import DecoderHelper, save_pretrained

AWQ = {
    "weight_quant_dtype": msdtype.qint4x2,
    "weight_quant_granularity": QuantGranularity.PER_GROUP,
    "group_size": 64,
    "outliers_suppression": OutliersSuppressionType.AWQ,
}
SMOOTH = {
    "weight_quant_dtype": msdtype.int8,
    "act_quant_dtype": msdtype.int8,
    "outliers_suppression": OutliersSuppressionType.SMOOTH,
}


def create_ptq(kind: str, mode: PTQMode) -> PTQ:
    """As the scripts for Qwen3 make their algorithm: settings, policies, then private attributes."""
    common: dict[str, Any] = {"mode": mode, "backend": BackendTarget.ASCEND, "opname_blacklist": ["head"]}
    policies: OrderedDict[str, PTQConfig | None] = OrderedDict()
    if kind == "smoothquant":
        config = PTQConfig(**common, **SMOOTH)
        dynamic = PTQConfig(
            mode=mode,
            backend=BackendTarget.ASCEND,
            weight_quant_dtype=msdtype.int8,
            act_quant_dtype=msdtype.int8,
            outliers_suppression=OutliersSuppressionType.NONE,
            precision_recovery=PrecisionRecovery.NONE,
            act_quant_granularity=QuantGranularity.PER_TOKEN,
            weight_quant_granularity=QuantGranularity.PER_CHANNEL,
        )
        policies[r".*\.down_proj.*"] = dynamic
    else:
        config = PTQConfig(**common, **AWQ, algo_args=AWQConfig())
    ptq = PTQ(config=config, layer_policies=policies)
    if kind == "awq-a16w4":
        ptq._config.weight_symmetric = False
    ptq._config.algorithm_cache_path = ""
    ptq._config.always_use_fp_input_in_processer = True
    ptq._config.set_dump_path("")
    ptq.decoder_layer_types.append(OwnLayer)
    return ptq


@pytest.mark.parametrize("kind", ["smoothquant", "awq-a16w4"])
def test_script_that_discards_what_apply_returns_saves_a_quantized_network(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network passed in is quantised, saved by its parameters_dict, and loads into a network DEPLOY made."""
    network, rows = Decoder(), batches()
    wanted = network(ms.Tensor(rows[0])).asnumpy()
    ptq = create_ptq(kind, PTQMode.QUANTIZE)
    ptq.apply(network, datasets=rows)
    network.phase = "quant_convert"
    ptq.convert(network)
    label = "SmoothQuant-W8-perchannel-A8-pertensor" if kind == "smoothquant" else "AWQ-wclip-W4-pergroup"
    found = strategies(capsys.readouterr().out)
    assert found["layers.1.q_proj"] == label
    assert found["head"] == "NA"
    if kind == "smoothquant":
        assert found["layers.1.down_proj"] == "W8-perchannel-A8-pertoken"
    path = tmp_path / "rank_0" / kind
    path.parent.mkdir()
    ms.save_checkpoint(
        network.parameters_dict(), str(path), choice_func=lambda x: "cache" not in x, format="safetensors"
    )
    stored = load_file(path.with_suffix(".safetensors"))
    assert stored["layers.0.q_proj.weight"].dtype == np.int8
    assert ("layers.0.q_proj.weight_offset" in stored) == (kind == "awq-a16w4"), "zero points, as _config asks"

    deployed = Decoder(seed=9)
    ptq = create_ptq(kind, PTQMode.DEPLOY)
    ptq.apply(deployed)
    ptq.convert(deployed, str(path.with_suffix(".safetensors")))
    x = ms.Tensor(rows[0])
    np.testing.assert_array_equal(deployed(x).asnumpy(), network(x).asnumpy())
    assert 0 < np.linalg.norm(network(x).asnumpy() - wanted) < 0.3 * np.linalg.norm(wanted)


def test_lists_of_cells_are_exchanged_too() -> None:
    """A SequentialCell calls a list of its own, which must hold the quantised cells, too."""
    network = Mlp()
    x = ms.Tensor(batches()[0])
    before = network(x).asnumpy()
    copied = CopyingPTQ(PTQConfig(opname_blacklist=[])).apply(network, datasets=batches())
    assert (network(x).asnumpy() == before).all(), "gs_dist.ptq leaves the network alone"
    assert RoundToNearest(PTQConfig()).apply(network, datasets=batches()) is network
    np.testing.assert_array_equal(network(x).asnumpy(), copied(x).asnumpy())
    assert (network(x).asnumpy() != before).any()


def test_refused_data_leave_the_network_alone() -> None:
    """What fails before the cells are solved changes no cell."""
    network = Decoder()
    before = parameter_values(network)
    ptq = create_ptq("smoothquant", PTQMode.QUANTIZE)
    with pytest.raises((ValueError, RuntimeError)):
        ptq.apply(network, datasets=[np.full((1, 4, CHANNELS), np.nan, np.float32)])
    assert parameter_values(network).keys() == before.keys()


def test_network_that_is_a_linear_cannot_take_its_own_place() -> None:
    """The message says what to use."""
    with pytest.raises(UserError, match=r"gs_dist\.ptq"):
        PTQ().apply(Mlp().body[0], datasets=batches())


def test_settings_that_do_not_exist_are_refused() -> None:
    """Private settings are checked as the constructor checks them, and unknown ones are no silent attributes."""
    ptq = PTQ(PTQConfig())
    with pytest.raises(ValueError, match="act_range"):
        ptq._config.act_range = "median"
    with pytest.raises(AttributeError, match="weight_symetric"):
        ptq._config.weight_symetric = False  # type: ignore[attr-defined]  # misspelt on purpose
    assert SmoothQuant(PTQConfig(**SMOOTH))._config.outliers_suppression is OutliersSuppressionType.SMOOTH


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("from gs_dist.golden_stick.ptq.network_helpers.mf_net_helpers import Qwen3Helper", "DecoderHelper"),
        ("from gs_dist.golden_stick.datasets import create_ceval_dataset", "gs-dist evaluate"),
        ("from gs_dist.golden_stick.ptq.ptq import InputCatcher", "as a whole"),
    ],
)
def test_import_of_what_is_missing_says_what_to_use(statement: str, says: str) -> None:
    """A script learns at its import what it must change."""
    with pytest.raises(ImportError, match=says):
        exec(statement)


def calibration_file(directory: Path) -> Path:
    path = directory / "calibrate.jsonl"
    text = "\n".join(json.dumps({"prompt": f"It is a truth number {i}, universally acknowledged."}) for i in range(20))
    path.write_text(text)
    return path


@pytest.mark.parametrize(("fields", "format"), [(SMOOTH, "golden-stick"), (SMOOTH, "ascend"), (AWQ, "gptq")])
def test_three_calls_make_a_directory_that_engines_load(fields: dict[str, Any], format: str, tmp_path: Path) -> None:
    """from_pretrained, calibrate and save_quantized: the files compute what the calibrated network computes."""
    model = tiny_checkpoint(tmp_path / "model", tokenizer=True)
    tokenizer = DecoderHelper(model).create_tokenizer()
    rows = get_datasets(
        "calibrate", str(calibration_file(tmp_path)), "train", 1, 64, 16, tokenizer, 0, 1, False, n_samples=8
    )
    assert len(rows) == 8
    quantized = AutoQuantForCausalLM.from_pretrained(model)
    quantized.calibrate(PTQConfig(opname_blacklist=["lm_head"], **fields), OrderedDict(), datasets=rows)
    out = Path(quantized.save_quantized(tmp_path / "out" / "model", backend=BackendTarget.ASCEND, format=format))
    assert check(out).clean
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    ids = rows[0]["input_ids"]
    logits = quantized.network(ms.Tensor(ids)).asnumpy()
    loaded = deployed(out, fields)
    cells = dict(loaded.cells_and_names())
    quantized_cells = [cell for cell in quantized.network.cells_and_names() if hasattr(cell[1], "quantized")]
    assert len(quantized_cells) == 14
    for name, cell in quantized_cells:
        np.testing.assert_array_equal(cells[name].float_weight().asnumpy(), cell.weight.asnumpy(), err_msg=name)
        if cell.input_scale is not None:  # which the formats round to half precision
            np.testing.assert_allclose(cells[name].input_scale.asnumpy(), cell.input_scale.asnumpy(), rtol=2**-8)
    difference = loaded(ms.Tensor(ids)).asnumpy() - logits
    assert np.linalg.norm(difference) < 0.05 * np.linalg.norm(logits)
    with pytest.raises(OutputError, match="in use"):
        quantized.save_quantized(out, format=format)


def deployed(model: Path, fields: dict[str, Any]) -> Any:
    """A network that holds nothing but what the directory holds."""
    helper = DecoderHelper(model)
    ptq = CopyingPTQ(PTQConfig(mode=PTQMode.DEPLOY, opname_blacklist=["lm_head"], **fields))
    skeleton = ptq.apply(helper.create_network(), network_helper=helper)
    return ptq.convert(skeleton, ckpt_path=str(model / "model.safetensors.index.json"))


@pytest.mark.parametrize("propagation", ["original", "quantized"])
def test_saved_directory_is_what_a_job_publishes(propagation: str, tmp_path: Path) -> None:
    """The same codes and scales as the distributed job's, from the same samples: one layer loop serves both."""
    ptq = {"act_quant_dtype": "int8", "outliers_suppression": "smooth", "act_range": "minmax", "act_symmetric": False}
    config = small_recipe(tmp_path, num_layers=2, format=["golden-stick"], ptq={"weight_quant_dtype": "int8", **ptq})
    config = config.model_copy(update={"propagation": propagation})
    run_inline(config)
    dataset = open_dataset(config.calibration, 128, CheckpointReader(Path(config.model)).tokenizer_file)
    helper = DecoderHelper(config.model)
    algorithm = CopyingPTQ(PTQConfig(**SMOOTH, act_symmetric=False))
    applied = algorithm.apply(helper.create_network(), helper, dataset, propagation=propagation)
    saved = save_pretrained(applied, tmp_path / "saved", model=config.model)
    for path in sorted(Path(config.output, "golden-stick").glob("layer-*.safetensors")):
        mine, theirs = load_file(saved / path.name), load_file(path)
        assert mine.keys() == theirs.keys()
        for name, array in theirs.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(mine[name], array, rtol=2e-3, err_msg=name)
            elif name.endswith("quant_bias"):  # zero point times sum of codes
                assert np.abs(mine[name] - array).max() <= 2 * 128, name
            else:
                assert np.mean(mine[name] != array) < 0.01, name


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    """A network that apply never saw, one of another kind, and a model that is not the network's."""
    model, other = tiny_checkpoint(tmp_path / "model"), tiny_checkpoint(tmp_path / "other", num_layers=3)
    helper = DecoderHelper(model)
    network = helper.create_network()
    with pytest.raises(UserError, match="call apply"):
        save_pretrained(network, tmp_path / "out", model=model)
    with pytest.raises(UserError, match="CausalDecoder"):
        save_pretrained(Mlp(), tmp_path / "out", model=model)
    applied = CopyingPTQ(PTQConfig()).apply(network, helper, [np.arange(12, dtype=np.int32)[None]])
    with pytest.raises(UserError, match="not what the network was made from"):
        save_pretrained(applied, tmp_path / "out", model=other)
    with pytest.raises(UserError, match="format 'awq'"):
        save_pretrained(applied, tmp_path / "out", model=model, format="awq")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("calibrate", '{"text": "a"}', r"line 1: is not a row of dataset type calibrate \(KeyError: 'prompt'\)"),
        ("gsm8k", "not json", "line 1"),
        ("ceval", "{}", "dataset type 'ceval' is not read here"),
        ("wikitext2", "", "holds no text"),
    ],
)
def test_data_that_cannot_be_read_are_told_by_line(kind: str, line: str, says: str, tmp_path: Path) -> None:
    """File, line and what was looked for."""
    path = tmp_path / "data.jsonl"
    path.write_text(line)
    with pytest.raises(DatasetError, match=says):
        get_datasets(kind, str(path), "train", 1, 64, 16, object())
