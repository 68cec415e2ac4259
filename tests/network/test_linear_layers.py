"""Weights of one layer: found, and their products the same as by differentiating alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ksm_ext.network.hessian import Hessian
from ksm_ext.network.linear_layers import lone_layers

WIDTH = 24


class Network(nn.Module):
    """Layers of every kind: used once, used twice, tied to a table, and in a norm beside it."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(WIDTH, WIDTH)
        self.once, self.twice, self.beside = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.turned, self.narrow = Conv1D(2 * WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.square = Conv1D(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.table.weight

    def forward(self, index):
        x = torch.tanh(self.once(self.table(index)))
        x = x + torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.narrow(torch.tanh(self.turned(x))) + self.square(x)
        x = self.beside(x) * self.beside.weight.square().mean()
        return self.tied(torch.tanh(x)).mean(1)


LONE = {"once.weight", "turned.weight", "narrow.weight", "square.weight"}


def problem(rows):
    torch.manual_seed(0)
    network = Network().double()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.3)
    return network, (torch.randint(WIDTH, (rows, 3)), torch.randint(WIDTH, (rows,)))


def test_only_weights_that_one_layer_uses_are_found():
    network, (index, labels) = problem(2)

    def total(weights):
        outputs = torch.func.functional_call(network, weights, (index,))
        return F.cross_entropy(outputs, labels)

    weights = {name: w.detach() for name, w in network.named_parameters()}
    found = lone_layers(total, weights)
    assert set(found) == LONE
    assert {name for name, layer in found.items() if layer.input_first} == {
        "turned.weight",
        "square.weight",
    }
    assert found["turned.weight"].shape == (6, 2 * WIDTH)
    # A part of them, and rows that are more numbers than the weight.
    some = {name: weights[name] for name in ("once.weight", "beside.weight")}
    assert set(lone_layers(total, some)) == {"once.weight"}
    index, labels = index.repeat(10, 1), labels.repeat(10)
    assert not lone_layers(total, weights)


def test_layers_keep_the_dtype_that_autocast_gives_them():
    network, data = problem(2)
    network.float()
    seen = []
    network.narrow.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    v = torch.randn(3, sum(w.numel() for w in network.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        operator = Hessian(network, data)
        found = operator(v)
        expected = Hessian(network, data, vectors_per_pass=1)(v)
    assert operator._forward and "narrow.weight" in next(iter(operator._lone.values()))
    assert {*seen} == {torch.bfloat16}
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("vectors_per_pass", [3, 7])
def test_products_are_those_of_reverse_mode(batch_size, vectors_per_pass):
    network, data = problem(5)
    v = torch.randn(7, sum(w.numel() for w in network.parameters())).double()
    sizes = {"batch_size": batch_size, "vectors_per_pass": vectors_per_pass}
    operator = Hessian(network, data, **sizes)
    found = operator(v)
    expected = Hessian(network, data, vectors_per_pass=1)(v)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert operator._forward  # not by the way it is compared with
    assert all(set(lone) == LONE for lone in operator._lone.values()) == (batch_size < 5)


def test_a_linear_network_and_a_part_of_its_weights():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)).double()
    data = torch.randn(2, 9).double(), torch.randn(2, 9).double()
    for names in (None, "1.weight"):
        operator = Hessian(network, data, "squared_error", parameters=names, vectors_per_pass=4)
        v = torch.randn(4, operator.shape[0]).double()
        alone = Hessian(network, data, "squared_error", parameters=names, vectors_per_pass=1)
        torch.testing.assert_close(operator(v), alone(v), rtol=1e-12, atol=1e-12)
