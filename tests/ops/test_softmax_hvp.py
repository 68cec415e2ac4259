import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import softmax_hvp as reference
from torch.func import hessian, jvp, vmap
from torch.nn.functional import cross_entropy

from ksm_ext import ops


def problem(s=3, b=4, c=7, dtype=torch.float64, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator).to(device)  # noqa: E731
    return 3 * draw(b, c), draw(s, b, c), draw(b).abs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "s, b, c", [(1, 1, 1), (3, 4, 7), (20, 3, 33), (2, 5, 1000), (17, 2, 5000)]
)
def test_it_is_the_formula(s, b, c, dtype, device):
    logits, tangents, weights = problem(s, b, c, dtype, device)
    for w in (None, weights):
        exact = reference(logits.cpu(), tangents.cpu(), None if w is None else w.cpu())
        found = ops.softmax_hvp(logits, tangents, weights=w)
        assert found.dtype == dtype and found.is_contiguous()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.cpu().double(), exact, rtol=50 * eps, atol=20 * eps)
        again = tangents.clone()
        assert ops.softmax_hvp_(again, logits, weights=w) is again
        assert torch.equal(again, found)


def test_a_result_beyond_the_caches(device):
    logits, tangents, _ = problem(6, 64, 32768, torch.float32, device)  # 50 MB: streaming stores
    found = ops.softmax_hvp(logits, tangents)
    p = logits.double().softmax(1)
    wide = tangents.double()
    exact = p * (wide - (p * wide).sum(2, keepdim=True))
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-9)


def test_it_is_the_hessian_of_cross_entropy():
    logits, tangents, _ = problem(2, 1, 6)
    matrix = hessian(lambda z: cross_entropy(z, torch.tensor([4])))(logits).reshape(6, 6)
    found = ops.softmax_hvp(logits, tangents)
    torch.testing.assert_close(found[:, 0], tangents[:, 0] @ matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_and_classes_that_cannot_be(dtype, device):
    logits, tangents, _ = problem(3, 4, 40, dtype, device)
    logits[0] = torch.linspace(-1e4, 1e4, 40)
    logits[1, 5:] = -torch.inf
    logits[2] = 1e30 if dtype == torch.float32 else 1e300
    found = ops.softmax_hvp(logits, tangents)
    assert bool(found.isfinite().all())
    assert not found[:, 1, 5:].any() and found[:, 1, :5].any()
    exact = reference(logits.cpu(), tangents.cpu(), None)
    torch.testing.assert_close(found.cpu().double(), exact, rtol=1e-4, atol=1e-6)
    logits[3, 0] = torch.nan
    assert bool(ops.softmax_hvp(logits, tangents)[:, 3].isnan().all())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 40), st.integers(0, 5), st.integers(0, 70), st.integers(0, 1000))
def test_any_shape(s, b, c, seed):
    logits, tangents, weights = problem(s, b, c, seed=seed)
    found = ops.softmax_hvp(logits, tangents, weights=weights)
    torch.testing.assert_close(found, reference(logits, tangents, weights))


def test_it_is_symmetric_semi_definite_and_blind_to_constants(device):
    logits, tangents, weights = problem(5, 3, 12, device=device)
    found = ops.softmax_hvp(logits, tangents, weights=weights)
    gram = torch.einsum("rij,qij->rq", tangents, found)
    torch.testing.assert_close(gram, gram.T)
    assert float(torch.linalg.eigvalsh(gram)[0]) > 0
    flat = ops.softmax_hvp(logits, torch.ones_like(tangents), weights=weights)
    torch.testing.assert_close(flat, torch.zeros_like(flat), rtol=0, atol=1e-14)


def test_derivatives_in_both_modes_and_again(device):
    logits, tangents, weights = problem(device=device)
    tangents.requires_grad_()
    call = lambda t: ops.softmax_hvp(logits, t, weights=weights)  # noqa: E731
    assert torch.autograd.gradcheck(call, tangents, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda t: call(t.sin()), tangents)
    other = torch.randn_like(tangents)
    for function in (call, torch.compile(call, backend="aot_eager")):
        value, moved = jvp(function, (tangents.detach(),), (other,))
        torch.testing.assert_close(value, call(tangents.detach()))
        torch.testing.assert_close(moved, call(other))


@pytest.mark.parametrize("of_logits", [None, 1])
@pytest.mark.parametrize("of_tangents", [None, 0, 2])
@pytest.mark.parametrize("of_weights", [None, 0])
def test_vmap(of_logits, of_tangents, of_weights, device):
    dims = (of_logits, of_tangents, of_weights)
    if dims == (None, None, None):
        return

    def stacked(pick, dim):
        if dim is None:
            return pick(problem(device=device))
        return torch.stack([pick(problem(device=device, seed=i)) for i in range(5)], dim=dim)

    args = [stacked(lambda p, k=k: p[k], dim) for k, dim in enumerate(dims)]
    call = lambda z, t, w: ops.softmax_hvp(z, t, weights=w)  # noqa: E731
    found = vmap(call, in_dims=dims)(*args)
    for i in range(5):
        one = [x if d is None else x.select(d, i) for x, d in zip(args, dims, strict=True)]
        torch.testing.assert_close(found[i], call(*one))


def test_opcheck_and_strides(device):
    logits, tangents, weights = problem(device=device)
    torch.library.opcheck(torch.ops.ksm_ext.softmax_hvp.default, (logits, tangents, weights))
    torch.library.opcheck(torch.ops.ksm_ext.softmax_hvp.default, (logits, tangents, None))
    torch.library.opcheck(torch.ops.ksm_ext.softmax_hvp_.default, (tangents, logits, None))
    expected = ops.softmax_hvp(logits, tangents)
    strided = tangents.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(ops.softmax_hvp(logits.T.contiguous().T, strided), expected)


def test_bad_input():
    logits, tangents, weights = problem()
    with pytest.raises(ValueError, match="`logits` must be 2-dimensional"):
        ops.softmax_hvp(logits[0], tangents)
    with pytest.raises(ValueError, match=r"`tangents` must be of shape \(3, 4, 7\)"):
        ops.softmax_hvp(logits, tangents[:, :, :5])
    with pytest.raises(TypeError, match=r"`tangents` must be of dtype torch\.float64"):
        ops.softmax_hvp(logits, tangents.float())
    with pytest.raises(TypeError, match="`logits` must be float32 or float64"):
        ops.softmax_hvp(logits.half(), tangents.half())
    with pytest.raises(ValueError, match=r"`weights` must be of shape \(4,\)"):
        ops.softmax_hvp(logits, tangents, weights=weights[:2])
    with pytest.raises(ValueError, match="`tangents` must be contiguous"):
        ops.softmax_hvp_(tangents.transpose(0, 1).contiguous().transpose(0, 1), logits)
    with pytest.raises(ValueError, match="`logits` must be a constant"):
        ops.softmax_hvp(logits.requires_grad_(), tangents)
