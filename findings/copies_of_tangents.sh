#!/usr/bin/env bash
# PyTorch 2.14.1: what forward differentiation of many directions at once, vmap(jvp), copies.
#
# Guess before running: a stack of directions is one matrix (s, p), its columns cut into tangents of
# the weights' shapes; they have the weights' strides, so `jvp` reads them where they are.
#
# Seen: every tangent but one is filled with zeros and copied, s p numbers in all, as their places
# in storage are not their weights' places. Where the weights are cut from one vector (p,) in the same
# order, shapes, strides and answers being the same, nothing is copied.
#
# Why it matters here: on few tokens these copies were a third of a batched Hessian product. ksm_ext
# cuts its weights from one vector, too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch.func import jvp, vmap
from torch.profiler import ProfilerActivity, profile

torch.manual_seed(0)
shapes, directions = [(64, 64), (64, 64), (64, 64)], 16
numel = 64 * 64
inputs = torch.randn(2, 64)


def cut(vector):
    parts = vector.split(numel, -1)
    return tuple(
        x.unflatten(-1, shape) for x, shape in zip(parts, shapes, strict=True)
    )


def network(*weights):
    x = inputs
    for weight in weights:
        x = torch.tanh(x @ weight.T)
    return x


flat = torch.randn(3 * numel) / 8
stack = torch.randn(directions, 3 * numel)
weights = {"one by one": tuple(x.clone() for x in cut(flat)), "of one vector": cut(flat)}
copied, answers = {}, {}
for name, at in weights.items():
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        answers[name] = vmap(lambda *v, at=at: jvp(network, at, v)[1])(*cut(stack))
    copied[name] = sum(
        directions * numel
        for event in seen.events()
        if event.name == "aten::copy_" and event.input_shapes[0][-2:] == [64, 64]
    )
    print(f"weights {name}: {copied[name]:,} of {stack.numel():,} numbers copied")

assert torch.equal(*answers.values())
assert copied["one by one"] == 2 * directions * numel  # the first tangent starts where weights do
assert copied["of one vector"] == 0
PYTHON
echo "as found"
