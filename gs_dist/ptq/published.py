"""A model directory that a job published, in a network of this package's cells.

The integers go into the `QuantDense` cells of the network that `PTQ.apply` built in DEPLOY mode, everything else
into its parameters of the same names. Any of the formats will do, since each can be read back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gs_dist.calibration.device import Device
from gs_dist.checkpoint.dialects import codec_of, published_dialect
from gs_dist.checkpoint.reader import CheckpointReader
from gs_dist.errors import CheckpointError
from gs_dist.model.decoder import DecoderArchitecture
from gs_dist.model.dtypes import FLOATS
from gs_dist.ptq.cells import QuantDense
from gs_dist.ptq.kv_cache import QuantKVCache
from gs_dist.recipe.policy import QuantPolicy
from gs_dist.results.quantized import QuantizedKVCache, QuantizedLayer, QuantizedLinear
from gs_dist.solvers.strategy import strategy

__all__ = ["float_tensors", "load_published"]

Array = npt.NDArray[Any]


def float_tensors(reader: CheckpointReader) -> dict[str, Array]:
    """All tensors of the architecture by full name, NaN where a published directory holds integers instead."""
    architecture = reader.architecture
    shapes = dict(architecture.outer_tensors())
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        shapes.update({prefix + name: shape for name, shape in architecture.layer_tensors(layer).items()})
        for norm in architecture.layers[layer].norms:  # which Outlier Suppression Plus gives a bias
            if f"{prefix}{norm}.bias" in reader.tensors:
                shapes[f"{prefix}{norm}.bias"] = (architecture.hidden_size,)
    stored = [
        name
        for name, shape in shapes.items()
        if name in reader.tensors and reader.tensors[name].shape == shape and reader.tensors[name].dtype in FLOATS
    ]
    waiting = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items() if name not in stored}
    return {**reader.read(stored), **waiting}


def load_published(network: Any, directory: Path, device: Device) -> None:
    """Sets all parameters of a DEPLOY-mode network from a directory that a job published.

    Args:
        network: a `CausalDecoder` in which `PTQ` exchanged cells; changed in place.
        directory: holds the published model.
        device: turns arrays into tensors.

    Raises:
        CheckpointError: the directory is damaged or was not published by a job; the network has other linears, or
            its cells are of another scheme.
    """
    name = published_dialect(directory)
    if name is None:
        raise CheckpointError(
            f"{directory.name!r} holds a float model: give the model directory that a job published, such as "
            "OUTPUT/golden-stick"
        )
    reader = CheckpointReader(directory, quantized=True)
    architecture = reader.architecture
    cells = dict(network.cells_and_names())
    floats = dict(reader.read_outer())
    if architecture.tie_word_embeddings:
        floats["lm_head.weight"] = floats["model.embed_tokens.weight"]
    for layer in range(architecture.num_layers):
        prefix = architecture.layer_prefix(layer)
        decoded = codec_of(name).decode_layer(reader, layer)
        _fill_linears(cells, decoded, architecture)
        _fill_cache(cells.get(f"{prefix}self_attn.cache"), decoded.kv_cache, f"{prefix}self_attn")
        floats.update({prefix + tensor: array for tensor, array in decoded.tensors.items()})
    parameters = dict(_float_parameters(network, cells))
    if parameters.keys() != floats.keys():
        odd = sorted(parameters.keys() ^ floats.keys())
        where = "the network alone" if odd[0] in parameters else f"{directory.name!r} alone"
        raise CheckpointError(f"{odd[0]} is in {where}: build the network from this directory (DecoderHelper)")
    for tensor, array in floats.items():
        parameter = parameters[tensor]
        if tuple(parameter.shape) != array.shape:
            raise CheckpointError(f"{tensor} is {array.shape}, where the network has {tuple(parameter.shape)}")
        parameter.set_data(device.to_tensor(array.copy(), parameter.dtype))


def _fill_linears(cells: Mapping[str, Any], layer: QuantizedLayer, architecture: DecoderArchitecture) -> None:
    prefix = architecture.layer_prefix(layer.layer)
    for linear in architecture.linears(layer.layer):
        name, found = prefix + linear.name, layer.linears.get(linear.name)
        cell = cells.get(name)
        cell = cell if isinstance(cell, QuantDense) else None
        if cell is not None and found is not None and _stored(cell.policy) == _stored(found.policy):
            _require_room(name, cell, found)
            cell.fill(found)
        elif cell is not None or found is not None:
            held = "a float linear" if found is None else strategy(found.policy)
            built = "a float linear" if cell is None else f"{cell.strategy} of group_size {cell.policy.group_size}"
            raise _mismatch(name, held, built, "the weight and act settings of the PTQConfig")


def _stored(policy: QuantPolicy) -> tuple[object, ...]:
    """What of a policy decides how a linear is stored and computed; its groups show in the scale's shape."""
    inputs = policy.act_quant_granularity if policy.act_quant_dtype is not None else None
    return policy.weight_quant_dtype, policy.act_quant_dtype, inputs


def _require_room(name: str, cell: QuantDense, found: QuantizedLinear) -> None:
    """Refuses what the published linear has and the cell has no parameter for."""
    built, held = (cell.form.out_features, cell.form.in_features), found.codes.shape
    if held != built:
        raise CheckpointError(f"{name} is {held[0]} x {held[1]}, where the network has {built[0]} x {built[1]}")
    if found.scale.shape != tuple(cell.weight_scale.shape):
        groups = f"{found.scale.shape[1]} scales a row", f"{cell.weight_scale.shape[1]}"
        raise _mismatch(name, *groups, "weight_quant_granularity and group_size of the PTQConfig")
    wanted = (
        (bool(found.input_zero_point), cell.input_offset, "input zero point", "act_symmetric to False"),
        (found.zero_point is not None, cell.weight_offset, "weight zero points", "weight_symmetric to False"),
        (found.group_index is not None, cell.group_index, "group index", "algo_args to GPTQ's desc_act=True"),
        (found.bias is not None, cell.bias, "bias", "outliers_suppression to OUTLIER_SUPPRESSION_PLUS"),
    )
    for present, parameter, what, setting in wanted:
        if present and parameter is None:
            raise CheckpointError(f"{name} was published with {what}, which the network cannot hold: set {setting}")


def _fill_cache(cell: Any, cache: QuantizedKVCache | None, name: str) -> None:
    static = isinstance(cell, QuantKVCache) and cell.key_scale is not None
    if cache is None and not static:
        return
    if cache is None or not static:
        held = "no KV cache scales" if cache is None else "KV cache scales"
        built = cell.strategy if isinstance(cell, QuantKVCache) else "a float KV cache"
        raise _mismatch(name, held, built, "kvcache_quant_dtype and kvcache_quant_granularity")
    cell.fill(cache)


def _mismatch(name: str, held: str, built: str, settings: str) -> CheckpointError:
    return CheckpointError(f"{name} was published as {held}, and the network was built for {built}: correct {settings}")


def _float_parameters(network: Any, cells: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Parameters by name, those of exchanged cells left out."""
    exchanged = tuple(f"{name}." for name, cell in cells.items() if isinstance(cell, QuantDense | QuantKVCache))
    for parameter in network.get_parameters():
        if not parameter.name.startswith(exchanged):
            yield parameter.name, parameter
