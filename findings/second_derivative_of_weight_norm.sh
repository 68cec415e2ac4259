#!/usr/bin/env bash
# PyTorch 2.14.1: the second derivative of a layer under `nn.utils.parametrizations.weight_norm`.
#
# Guess before running: the layer is w = g v / |v|, which PyTorch computes by one fused operation;
# its first and second derivatives are those of the formula, or the second raises an error.
#
# Seen: the first derivative is the formula's, to rounding. The second, in float64 and without a
# warning, is off by tens of per cent, where the formula's agrees with differences of gradients;
# `torch.autograd.gradgradcheck` of the fused operation fails.
#
# Why it matters here: Hessian products, influence functions and gradient penalties of such a network
# would be wrong in silence. ksm_ext takes weight normalisation apart while it differentiates.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import nn
from torch.autograd import grad, gradgradcheck

torch.manual_seed(0)
layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2, bias=False).double())
g, v = (weight.detach() for weight in layer.parametrizations.weight.parameters())
inputs, along, step = torch.randn(5, 3).double(), torch.randn_like(v), 1e-5


def fused(v, g):
    return torch._weight_norm(v, g, 0)


def formula(v, g):
    return v * (g / v.norm(dim=1, keepdim=True))


assert torch.equal(fused(v, g), layer.weight)  # what the layer computes


def slope(weight, v, create_graph=False):
    v = v.clone().requires_grad_()
    loss = torch.tanh(inputs @ weight(v, g).T).square().sum()
    return grad(loss, v, create_graph=create_graph)[0], v


def curvature(weight):
    found, at = slope(weight, v, create_graph=True)
    return grad((found * along).sum(), at)[0]


ends = [slope(formula, v + sign * step * along)[0] for sign in (1, -1)]
differences = (ends[0] - ends[1]) / (2 * step)
off = {}
for weight in (fused, formula):
    first = (slope(weight, v)[0] - slope(formula, v)[0]).norm() / slope(formula, v)[0].norm()
    second = (curvature(weight) - differences).norm() / differences.norm()
    off[weight] = float(second)
    print(f"{weight.__name__}: first derivative off by {first:.1e}, second by {second:.1e}")
    assert first < 1e-12

assert off[formula] < 1e-7
assert off[fused] > 0.1
arguments = v.requires_grad_(), g.requires_grad_()
assert gradgradcheck(formula, arguments)
assert not gradgradcheck(fused, arguments, raise_exception=False)
PYTHON
echo "as found"
