from __future__ import annotations

import threading

import mindspore as ms
import numpy as np
import pytest
from mindspore import mint, nn
from ptq_networks import Decoder, DecoderLayer, Mlp, batches, random_dense

from gs_dist.ptq import PTQ, PTQConfig
from gs_dist.ptq.structure import copy_network, find_layers, find_linears, is_linear


class Doubled(nn.Cell):
    """Doubles its input; stands in for an exchanged cell."""

    def construct(self, x):
        return x * 2


def test_linears_are_found_by_what_they_compute():
    """nn.Dense and mint.nn.Linear count, a subclass that computes something else does not."""

    class Scaled(nn.Dense):
        def construct(self, x):
            return super().construct(x) * 2

    class Renamed(nn.Dense):
        pass

    assert is_linear(nn.Dense(4, 4))
    assert is_linear(mint.nn.Linear(4, 4))
    assert is_linear(Renamed(4, 4))
    assert not is_linear(Scaled(4, 4))
    assert not is_linear(nn.ReLU())


def test_layers_are_the_outermost_cells_of_a_type():
    """Decoder layers come in order with their linears, and a layer within a layer is part of the outer one."""

    class Pair(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            rng = np.random.default_rng(0)
            self.first, self.second = DecoderLayer(rng), DecoderLayer(rng)

    network = nn.CellList([Pair(), DecoderLayer(np.random.default_rng(1))])
    layers = find_layers(network, [Pair, DecoderLayer])
    assert [(layer.index, layer.name, len(layer.linears)) for layer in layers] == [(0, "0", 6), (1, "1", 3)]
    assert find_layers(network, []) == []


def test_copy_shares_parameters_and_no_cells():
    """The copy consists of new cells that hold the caller's own parameters."""
    network = Decoder()
    copied = copy_network(network)
    assert all(a is b for a, b in zip(copied.get_parameters(), network.get_parameters(), strict=True))
    originals = {id(cell) for _, cell in network.cells_and_names()}
    assert not any(id(cell) in originals for _, cell in copied.cells_and_names())
    own = copy_network(network, share_parameters=False)
    assert not any(a is b for a, b in zip(own.get_parameters(), network.get_parameters(), strict=True))


def test_every_reference_to_an_exchanged_cell_is_exchanged():
    """A cell that is registered twice, kept in a list or in a SequentialCell is replaced everywhere."""

    class Tangled(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Dense(4, 4)
            self.again = self.first
            self.kept = [self.first]
            self.chain = nn.SequentialCell(nn.ReLU(), self.first)

        def construct(self, x):
            return self.chain(self.again(self.kept[0](self.first(x))))

    network = Tangled()
    x = ms.Tensor(np.ones((1, 4), np.float32))
    np.testing.assert_array_equal(copy_network(network, {"first": Doubled()})(x).asnumpy(), 16 * np.ones((1, 4)))
    assert type(network.first) is nn.Dense


def test_linear_that_is_used_twice_is_quantized_once():
    """A linear applied at two places gets one scale from what both places send it."""

    class Twice(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.linear = random_dense(np.random.default_rng(0), 64, 64, has_bias=False)

        def construct(self, x):
            return self.linear(self.linear(x) * 100)

    network, data = Twice(), batches(2)
    fake = PTQ(PTQConfig(act_quant_dtype=ms.int8, act_symmetric=True)).apply(network, datasets=data)
    weight = network.linear.weight.asnumpy()
    largest = max(np.abs(x @ weight.T * 100).max() for x in data)
    np.testing.assert_allclose(fake.linear.input_scale.asnumpy(), largest / 127.5, rtol=1e-5)


def test_network_that_is_itself_a_linear():
    """A bare nn.Dense is quantised too."""
    dense = random_dense(np.random.default_rng(0), 64, 8)
    ptq = PTQ()
    converted = ptq.convert(ptq.apply(dense, datasets=batches(1)))
    x = ms.Tensor(batches(1)[0])
    np.testing.assert_allclose(converted(x).asnumpy(), dense(x).asnumpy(), atol=0.5)
    assert [form.name for form in find_linears(dense)] == [""]


def test_mint_linear_is_quantized():
    """mint.nn.Linear is replaced like nn.Dense."""

    class Modern(nn.Cell):
        def __init__(self) -> None:
            super().__init__()
            self.linear = mint.nn.Linear(64, 8)

        def construct(self, x):
            return self.linear(x)

    network = Modern()
    fake = PTQ().apply(network, datasets=batches(1))
    x = ms.Tensor(batches(1)[0])
    difference = np.abs(fake(x).asnumpy() - network(x).asnumpy()).max()
    assert 0 < difference < 0.5


def test_network_that_cannot_be_copied_is_told_why():
    """A lock among a network's attributes is named as the reason."""
    network = Mlp()
    network.lock = threading.Lock()
    with pytest.raises(ValueError, match="cannot be copied"):
        PTQ().apply(network, datasets=batches(1))
