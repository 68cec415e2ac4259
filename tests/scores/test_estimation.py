"""GradientEstimator where its linearisation is exact."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import softplus
from torch.utils.data import TensorDataset

import ksm_ext
from ksm_ext import GradientEstimator, Projector
from ksm_ext.network.gradients import parameter_names
from ksm_ext.network.outputs import cross_entropy, prediction
from ksm_ext.selection import Predictor, exact, under_budget
from ksm_ext.subsets import all_subsets, bernoulli

SIZES = (5, 9, 4, 7)
MASKS = all_subsets(4)


def data(sizes=SIZES, features=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(features, generator=generator, dtype=dtype)
    tasks = []
    for size in sizes:
        x = torch.randn(size, features, generator=generator, dtype=dtype)
        noise = torch.randn(size, generator=generator, dtype=dtype)
        tasks.append((x, (x @ direction + noise > 0).long()))
    return tasks


def linear(features=3, seed=0, dtype=torch.float64):
    """Two classes: the log-odds are linear in the parameters."""
    torch.manual_seed(seed)
    return nn.Linear(features, 2).to(dtype)


def estimator(**options):
    arguments = {"projector": None, "ridge": 0.1, "progress": False, **options}
    models = arguments.pop("models", linear())
    targets = arguments.pop("targets", {"new": data((20,), seed=1)[0], "old": data()[0]})
    return GradientEstimator(models, arguments.pop("tasks", data()), targets, **arguments)


def by_hand(model, mask, ridge, target):
    """Logistic regression of the parameters themselves, by L-BFGS."""
    start = [weight.detach().clone() for weight in model.parameters()]
    moved = [weight.clone().requires_grad_() for weight in start]
    x, y = (torch.cat(part) for part in zip(*data(), strict=True))
    inside = mask.repeat_interleave(torch.tensor(SIZES))

    def odds(weights, x, y):
        logits = x @ weights[0].T + weights[1]
        return (logits[:, 1] - logits[:, 0]) * (2 * y - 1)

    def objective():
        optimizer.zero_grad()
        distance = sum((a - b).square().sum() for a, b in zip(moved, start, strict=True))
        loss = ridge / 2 * distance
        if inside.any():
            loss = loss + softplus(-odds(moved, x[inside], y[inside])).mean()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(
        moved, max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    optimizer.step(lambda: objective().detach())
    return float(softplus(-odds(moved, *target)).mean().detach())


def test_where_outputs_are_linear_it_is_the_retrained_model():
    fitted = estimator().fit()
    scores = fitted.predict(MASKS)
    assert scores.shape == (16, 2) and scores.dtype == torch.float64
    for row, mask in enumerate(MASKS):
        for column, target in enumerate((data((20,), seed=1)[0], data()[0])):
            expected = by_hand(linear(), mask, 0.1, target)
            assert abs(float(scores[row, column]) - expected) < 1e-4


def in_the_network(fitted, model, masks, target, parameters="*"):
    """(m,): the loss on a target of the network itself with parameters ``W + P z``."""
    losses = []
    for z in fitted._solve(0, masks, fitted.ridge):
        moved, offset = dict(model.named_parameters()), 0
        for name in parameter_names(model, parameters):
            size = moved[name].numel()
            change = (
                z[offset : offset + size]
                if fitted.projector is None
                else fitted.projector.adjoint(z[None], size, offset=offset)[0]
            )
            moved[name], offset = moved[name] + change.view_as(moved[name]), offset + size
        call = partial(functional_call, model, moved)
        losses.append(cross_entropy(lambda *a, **k: call(a, k), target).mean())  # noqa: B023
    return torch.stack(losses).detach()


@pytest.mark.parametrize("projector", [None, Projector(4, kind="rademacher", seed=3)])
def test_moved_parameters_in_the_network_agree_where_outputs_are_linear(projector):
    fitted = estimator(projector=projector).fit()
    expected = in_the_network(fitted, linear(), MASKS, data()[0])
    torch.testing.assert_close(fitted.predict(MASKS)[:, 1], expected, rtol=1e-10, atol=1e-10)


def residual(model, batch):
    return prediction(model, batch) - batch[-1]


def test_squared_loss_is_ridge_regression():
    model = nn.Linear(3, 1).double()
    tasks = [(x, x @ torch.tensor([1.0, -2.0, 0.5]).double() + y) for x, y in data()]
    fitted = estimator(
        models=model, tasks=tasks, targets=tasks[0], output=residual, loss="squared"
    ).fit()
    scores = fitted.predict(MASKS)
    x, y = (torch.cat(part) for part in zip(*tasks, strict=True))
    with_one = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    start = torch.cat([model.weight[0], model.bias]).detach()
    for row, mask in enumerate(MASKS):
        inside = mask.repeat_interleave(torch.tensor(SIZES))
        a, r = with_one[inside], (y - with_one @ start)[inside]
        gram = a.T @ a / max(len(a), 1) + 0.1 * torch.eye(4).double()
        moved = start + torch.linalg.solve(gram, a.T @ r / max(len(a), 1))
        target = torch.cat([tasks[0][0], torch.ones(5, 1)], 1) @ moved - tasks[0][1]
        assert abs(float(scores[row, 0]) - float(target.square().mean() / 2)) < 1e-10


def test_one_step_of_unit_curvature_from_the_full_set():
    model = linear()
    scores = estimator(solver="step").fit().predict(MASKS)
    x, y = (torch.cat(part) for part in zip(*data(), strict=True))
    new, labels = data((20,), seed=1)[0]

    def odds(weights, x, y):
        logits = x @ weights[:6].view(2, 3).T + weights[6:]
        return (logits[:, 1] - logits[:, 0]) * (2 * y - 1)

    start = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    features = torch.autograd.functional.jacobian(lambda w: odds(w, x, y), start)
    slopes = -torch.sigmoid(-odds(start, x, y))[:, None] * features
    for row, mask in enumerate(MASKS):
        inside = mask.repeat_interleave(torch.tensor(SIZES))
        if inside.any():
            curvature = features[inside].T @ features[inside] / inside.sum()
            change = slopes[inside].mean(0) - slopes.mean(0)
            z = -torch.linalg.inv(curvature + 0.1 * torch.eye(8).double()) @ change
        else:
            z = torch.zeros(8).double()
        expected = softplus(-odds(start + z, new, labels)).mean()
        assert abs(float(scores[row, 0]) - float(expected)) < 1e-12
    kept = torch.nn.functional.cross_entropy(model(new), labels).detach()
    assert abs(float(scores[MASKS.all(1)][0, 0]) - float(kept)) < 1e-12


def test_one_step_is_exact_for_the_squared_loss_at_its_minimum():
    tasks = [(x, x @ torch.tensor([1.0, -2.0, 0.5]).double() + y) for x, y in data()]
    x, y = (torch.cat(part) for part in zip(*tasks, strict=True))
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1).double(), y).solution
    model = nn.Linear(3, 1).double()
    model.load_state_dict({"weight": best[None, :3], "bias": best[3:]})
    options = {"models": model, "tasks": tasks, "targets": tasks[0], "output": residual}
    exact, step = (
        estimator(**options, loss="squared", solver=solver).fit().predict(MASKS)
        for solver in ("exact", "step")
    )
    torch.testing.assert_close(step, exact, rtol=1e-10, atol=1e-10)


TIMES = [torch.arange(size) % 3 for size in SIZES]  # how often each sample is taken


@pytest.mark.parametrize("solver", ["exact", "step"])
@pytest.mark.parametrize("loss", ["logistic", "squared"])
def test_whole_weights_are_repeated_samples(loss, solver):
    """To the tolerance of the convex solver; a sample taken 0 times is not there."""
    options = {"loss": loss, "solver": solver}
    repeated = [
        tuple(part.repeat_interleave(times, 0) for part in task)
        for task, times in zip(data(), TIMES, strict=True)
    ]
    expected = estimator(tasks=repeated, **options).fit().predict(MASKS)
    weights = [0.1 * times for times in TIMES]  # their unit does not matter
    scores = estimator(sample_weights=weights, **options).fit().predict(MASKS)
    tight = loss == "squared" or solver == "step"
    torch.testing.assert_close(scores, expected, rtol=1e-10 if tight else 1e-4, atol=0)
    assert not torch.allclose(scores, estimator(**options).fit().predict(MASKS), rtol=1e-3)


def test_weights_in_every_form():
    """One for each task or sample, by name, in one array; equal ones are none."""
    names = list("abcd")
    numbers = [1.0, 0.5, 2.0, 0.0]
    expected = estimator(sample_weights=numbers).fit().predict(MASKS)
    arrays = [number * torch.ones(size) for number, size in zip(numbers, SIZES, strict=True)]
    by_name = {"a": 1.0, "d": 0.0, "c": np.full(4, 2.0), "b": [0.5] * 9}
    for weights in (arrays, torch.cat(arrays), by_name, pd.Series(numbers, index=names)[::-1]):
        scores = estimator(sample_weights=weights, task_names=names).fit().predict(MASKS)
        torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)
    alike = estimator(sample_weights=[1e-300] * 4).fit().predict(MASKS)
    torch.testing.assert_close(alike, estimator().fit().predict(MASKS), rtol=1e-5, atol=0)
    without = expected[MASKS[:, :3].any(1) == 0]  # of nothing, and of the task without weight
    assert len(without) == 2 and torch.equal(without[0], without[1])


def test_advantages_have_their_sign_in_the_output_and_their_size_as_weight():
    """Weighted logistic regression of sampled actions, as of policy gradients: by L-BFGS."""
    actions = [(x, y, torch.sin(7.0 * x[:, 0])) for x, y in data()]

    def signed(model, batch):
        return ksm_ext.network.outputs.log_odds(model, batch[:2]) * batch[2].sign()

    weights = [advantage.abs() for *_, advantage in actions]
    options = {"tasks": actions, "targets": actions[0], "output": signed}
    scores = estimator(**options, sample_weights=weights).fit().predict(MASKS)
    x, y, advantage = (torch.cat(part) for part in zip(*actions, strict=True))
    model = linear()
    start = torch.cat([weight.detach().flatten() for weight in model.parameters()])

    def losses(w, rows):
        logits = x[rows] @ w[:6].view(2, 3).T + w[6:]
        odds = (logits[:, 1] - logits[:, 0]) * (2 * y[rows] - 1)
        return softplus(-odds * advantage[rows].sign())

    for row, mask in enumerate(MASKS[1:], start=1):
        inside = mask.repeat_interleave(torch.tensor(SIZES))
        size = advantage[inside].abs()
        moved = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [moved], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure(moved=moved, inside=inside, size=size, optimizer=optimizer):
            optimizer.zero_grad()
            mean = (losses(moved, inside) * size).sum() / size.sum()
            loss = mean + 0.05 * (moved - start).square().sum()
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        expected = losses(moved.detach(), torch.arange(SIZES[0])).mean()
        assert abs(float(scores[row, 0] - expected)) < 1e-4


def test_a_store_of_features_serves_all_weights(tmp_path):
    estimator(store=tmp_path).fit()
    weights = [1.0, 2.0, 3.0, 4.0]
    fitted = estimator(store=tmp_path, sample_weights=weights).fit()
    expected = estimator(sample_weights=weights).fit().predict(MASKS)
    assert torch.equal(fitted.predict(MASKS), expected)
    truth = 1.0 + 2.0 * expected
    fitted.calibrate(MASKS[:8], truth[:8], ridges=[0.1])
    torch.testing.assert_close(fitted.predict(MASKS), truth)


@pytest.mark.parametrize("loss", ["logistic", "squared"])
def test_the_ridge_that_is_chosen(loss):
    """A share of the largest curvature, in whatever unit parameters are."""
    weights = [1.0, 2.0, 0.0, 0.5]
    options = {"ridge": None, "loss": loss, "sample_weights": weights}
    fitted = estimator(**options)
    assert fitted.ridge is None and str(fitted) == (
        "Estimates of 2 targets by subsets of 4 tasks from 1 network: "
        "gradients as they are, solver exact, samples weighed, ridge to be chosen"
    )
    fitted.fit()
    x = torch.cat([x for x, _ in data()])
    odds = torch.autograd.functional.jacobian(
        lambda w: (x @ w[:6].view(2, 3).T + w[6:]).diff(dim=1)[:, 0], torch.zeros(8).double()
    )
    right = linear()(x).softmax(1)[:, 0].detach()
    bent = right * (1 - right) if loss == "logistic" else torch.ones(len(x)).double()
    bent = bent * torch.tensor(weights).double().repeat_interleave(torch.tensor(SIZES))
    total = float(torch.tensor(weights) @ torch.tensor(SIZES).float())
    top = float(torch.linalg.eigvalsh(odds.T @ (bent[:, None] * odds) / total)[-1])
    assert fitted.ridge == pytest.approx(top / 100, rel=0.05)
    same = estimator(**{**options, "ridge": fitted.ridge}).fit()
    assert torch.equal(fitted.predict(MASKS), same.predict(MASKS))
    fitted.calibrate(MASKS, 2 * same.predict(MASKS), ridges=[1.0])
    assert fitted.ridge == 1.0


def test_a_ridge_is_chosen_for_networks_that_do_not_move():
    still = nn.Linear(3, 2).double()
    still.load_state_dict({"weight": torch.zeros(2, 3), "bias": torch.tensor([900.0, -900.0])})
    tasks = [(0 * x, torch.zeros_like(y)) for x, y in data()]
    scores = estimator(models=still, tasks=tasks, ridge=None).fit().predict(MASKS)
    assert scores.isfinite().all()


def test_an_empty_subset_keeps_the_model():
    scores = estimator().fit().predict(torch.zeros(1, 4, dtype=torch.bool))
    x, y = data()[0]
    loss = torch.nn.functional.cross_entropy(linear()(x), y).detach()
    assert abs(float(scores[0, 1]) - float(loss)) < 1e-12


def test_models_are_averaged():
    models = [linear(seed=seed) for seed in (0, 1)]
    together = estimator(models=models).fit().predict(MASKS)
    each = [estimator(models=model).fit().predict(MASKS) for model in models]
    torch.testing.assert_close(together, (each[0] + each[1]) / 2)


def test_a_store_gives_the_same_scores(tmp_path):
    plain = estimator().fit().predict(MASKS)
    for _ in range(2):  # the second time from the store
        assert torch.equal(estimator(store=tmp_path / "features").fit().predict(MASKS), plain)
    assert (tmp_path / "features" / "model_0" / "tasks" / "gradients.npy").exists()


def test_answers_have_the_kind_of_the_masks():
    fitted = estimator().fit()
    expected = fitted.predict(MASKS)
    assert isinstance(fitted.predict(MASKS.numpy()), np.ndarray)
    frame = pytest.importorskip("pandas").DataFrame(MASKS.numpy())
    assert list(fitted.predict(frame).columns) == ["new", "old"]
    np.testing.assert_array_equal(fitted.predict(frame).to_numpy(), expected.numpy())


def test_tasks_may_be_datasets():
    tasks = [TensorDataset(*task) for task in data()]
    torch.testing.assert_close(
        estimator(tasks=tasks).fit().predict(MASKS), estimator().fit().predict(MASKS)
    )


def test_calibration_finds_ridge_and_scale():
    truth = 3.0 + 2.0 * estimator(ridge=1.0).fit().predict(MASKS)
    fitted = estimator().fit().calibrate(MASKS[:10], truth[:10], ridges=[0.01, 1.0, 10.0])
    assert fitted.ridge == 1.0
    torch.testing.assert_close(fitted.calibration.slope, torch.full((2,), 2.0).double())
    torch.testing.assert_close(fitted.predict(MASKS), truth)
    assert len(fitted.calibration.errors) == 12
    assert min(fitted.calibration.errors.values()) < 1e-20


@pytest.mark.parametrize("unit", [1e-200, 1e200, 1e300])
def test_calibration_has_no_unit(unit):
    """Errors are relative, whatever the size of the scores: no square overflows."""
    truth = 2.0 * estimator(ridge=1.0).fit().predict(MASKS[:10])
    each = [
        estimator().fit().calibrate(MASKS[:10], scale * truth, ridges=[0.1, 1.0])
        for scale in (1.0, unit)
    ]
    one, other = (fitted.calibration for fitted in each)
    assert one.ridge == other.ridge == 1.0
    assert one.correction == other.correction
    torch.testing.assert_close(other.slope / unit, one.slope)


def test_one_penalty_is_a_list_of_it():
    truth = estimator(ridge=1.0).fit().predict(MASKS[:10])
    one, other = (
        estimator().fit().calibrate(MASKS[:10], truth, ridges=each) for each in (0.1, [0.1])
    )
    assert one.ridge == other.ridge == 0.1
    torch.testing.assert_close(one.calibration.slope, other.calibration.slope)
    for wrong, expected in (("loo", "a list of penalties"), ([1.0, float("inf")], "finite")):
        with pytest.raises((TypeError, ValueError), match=f"^`ridges` must be {expected}"):
            estimator().fit().calibrate(MASKS[:10], truth, ridges=wrong)


def test_calibration_takes_success_rates_of_0():
    """Errors are in units of a target's root mean square, where one of its scores is 0."""
    plain = estimator().fit()
    truth = 2 * plain.predict(MASKS[:8])
    truth[3, 0], truth[:, 1] = 0.0, 0.0
    found = estimator().fit().calibrate(MASKS[:8], truth, ridges=[plain.ridge]).calibration
    estimate = plain.predict(MASKS[:8])
    unit = truth.square().mean(0).sqrt()
    none = ((estimate - truth)[:, 0] / unit[0]).square(), (estimate - truth)[:, 1].square()
    assert found.errors[plain.ridge, "none"] == pytest.approx(float(torch.cat(none).mean()))


def test_scores_that_are_nearly_0_do_not_decide_alone():
    """A rate of .02 in the units of all rates, not in its own."""
    plain = estimator().fit()
    truth = 2 * plain.predict(MASKS[:8])
    truth[3, 0] = 0.05 * truth[:, 0].mean()
    found = estimator().fit().calibrate(MASKS[:8], truth, ridges=[plain.ridge]).calibration
    estimate = plain.predict(MASKS[:8])
    unit = truth[:, 0].square().mean().sqrt(), truth[:, 1]
    parts = [((estimate - truth)[:, j] / unit[j]).square() for j in range(2)]
    assert found.errors[plain.ridge, "none"] == pytest.approx(float(torch.cat(parts).mean()))


def test_calibration_never_reverses_an_order():
    """Where the best slope is negative it is 0: the constrained least squares, and said."""
    plain = estimator().fit()
    estimate = plain.predict(MASKS)
    truth = torch.stack([5.0 - estimate[:, 0], 3.0 * estimate[:, 1]], dim=1)
    options = {"ridges": [plain.ridge]}
    found = estimator().fit().calibrate(MASKS, truth, **options)
    calibration = found.calibration
    assert calibration.held == ("new",) and calibration.correction == "affine"
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    close(calibration.slope, torch.tensor([0.0, 3.0]).double())
    close(calibration.intercept, torch.stack([truth[:, 0].mean(), 0 * truth[0, 1]]))
    said = "; slope held at 0 for new: a negative one would reverse ranks"
    assert str(calibration).endswith(said) and said in str(found)
    right = estimator().fit().calibrate(MASKS, 5.0 - truth, **options).calibration
    assert right.held == ("old",) and right.slope[0] == pytest.approx(1.0)
    alike = estimator().fit().calibrate(MASKS, 3.0 * estimate, **options).calibration
    assert alike.held == () and "held" not in str(alike)


def test_calibration_makes_no_slope_of_rounding():
    masks = torch.tensor([[1, 1, 0, 1]]).bool().expand(6, -1)
    truth = torch.rand(6, 2, generator=torch.Generator().manual_seed(2)).double()
    fitted = estimator().fit().calibrate(masks, truth)
    calibration = fitted.calibration
    assert float(calibration.slope.max()) < 1e3 and calibration.held == ()
    assert float(fitted.predict(MASKS).abs().max()) < 1e3


def test_calibration_leaves_what_is_right():
    truth = estimator().fit().predict(MASKS)
    fitted = estimator().fit().calibrate(MASKS[:6], truth[:6], ridges=[0.1])
    assert fitted.calibration.errors[0.1, "none"] < 1e-24
    torch.testing.assert_close(fitted.predict(MASKS), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("ask", [lambda fitted: fitted, lambda fitted: fitted.predict])
def test_tasks_are_chosen_by_the_estimate_itself(ask):
    names = list("abcd")
    fitted = estimator(task_names=names).fit()
    assert isinstance(fitted, Predictor)
    predict = ask(fitted)
    means = fitted.predict(MASKS).mean(1)
    best = int(means.masked_fill(MASKS.sum(1) != 2, torch.inf).argmin())
    found = exact(predict, 4, 2, maximize=False)
    assert found.tasks == tuple(MASKS[best].nonzero()[:, 0].tolist())
    assert found.score == pytest.approx(float(means[best]), rel=1e-12)
    weights = pd.Series({"old": 1.0, "new": 0.0})  # in another order than the targets
    weighed = exact(predict, 4, 2, maximize=False, target_weights=weights)
    old = fitted.predict(MASKS)[:, 1].masked_fill(MASKS.sum(1) != 2, torch.inf)
    assert weighed.score == pytest.approx(float(old.min()), rel=1e-12)
    costs = pd.Series([4.0, 3.0, 2.0, 1.0], index=names[::-1])
    expected = under_budget(fitted.predict, [1.0, 2.0, 3.0, 4.0], 5, maximize=False)
    assert under_budget(predict, costs, 5, maximize=False) == expected


def test_a_single_data_set_has_no_name_that_scores_must_have():
    true = pd.DataFrame({"loss": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})
    fitted = estimator(targets=data()[0]).fit().calibrate(MASKS[:6], true, ridges=[0.1])
    assert fitted.calibration.slope.shape == (1,)


@pytest.mark.parametrize("names", [list("abc"), list("abca")])
def test_names_of_tasks_are_one_each(names):
    with pytest.raises(ValueError, match="`task_names` must be 4 different names, got "):
        estimator(task_names=names)


class Prompts(torch.utils.data.Dataset):
    """Token sequences as HuggingFace's causal language models take them."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 17, (count, 5), generator=generator)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def test_language_models_with_chosen_parameters():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).double()
    tasks = [Prompts(3, seed) for seed in range(3)]
    options = {"parameters": "*.mlp.*", "projector": Projector(32), "ridge": 100.0}
    fitted = GradientEstimator(model, tasks, Prompts(4, 9), progress=False, **options).fit()
    with torch.no_grad():
        tokens = Prompts(4, 9).tokens
        chances = model.eval()(tokens).logits[:, :-1].log_softmax(-1)
        loss = -chances.gather(2, tokens[:, 1:, None])[..., 0].sum(1).mean()
    empty = int((~all_subsets(3)).all(1).nonzero())
    scores = fitted.predict(all_subsets(3))[:, 0]
    assert abs(float(scores[empty] - loss)) < 1e-10  # of a sequence, the sum over its tokens
    batch = {"input_ids": tokens, "labels": tokens}
    moved = in_the_network(fitted, model, all_subsets(3), batch, "*.mlp.*")
    torch.testing.assert_close(scores, moved, rtol=1e-2, atol=0)


def calibrated(scores, count=16, **options):
    return estimator().fit().calibrate(MASKS[:count], scores, **options)


@pytest.mark.parametrize(
    "error, match, call",
    [
        (ValueError, "`models` must be one network", lambda: estimator(models=[])),
        (ValueError, "`tasks` must be one data set", lambda: estimator(tasks=[])),
        (ValueError, "`targets` must be one data set", lambda: estimator(targets={})),
        (ValueError, "`ridge` must be positive, got 0", lambda: estimator(ridge=0)),
        (ValueError, "`loss` must be one of", lambda: estimator(loss="hinge")),
        (ValueError, "`solver` must be one of", lambda: estimator(solver="newton")),
        (
            ValueError,
            "`sample_weights` must be 4 numbers or arrays, .* got none. Give one weight",
            lambda: estimator(sample_weights=[]),
        ),
        (
            ValueError,
            "`sample_weights` must be 2 different names, got '0' more than once",
            lambda: estimator(sample_weights={0: 1, "0": 2}),
        ),
        (
            ValueError,
            r"`sample_weights` must be 4 numbers or arrays, .* got 3 of shape \(\), ",
            lambda: estimator(sample_weights=[1.0, 1.0, 1.0]),
        ),
        (
            ValueError,
            r"`sample_weights` must be 4 numbers or arrays, .* got 4 of shape \(5\), shape \(8\)",
            lambda: estimator(sample_weights=[torch.ones(size) for size in (5, 8, 4, 7)]),
        ),
        (
            ValueError,
            "`sample_weights` must be non-negative and not all 0, got a least of -1.0. Put the",
            lambda: estimator(sample_weights=[1.0, -1.0, 1.0, 1.0]),
        ),
        (
            ValueError,
            "`sample_weights` must be non-negative and not all 0, got a least of 0.0",
            lambda: estimator(sample_weights=torch.zeros(25)),
        ),
        (
            ValueError,
            "`sample_weights` must be finite",
            lambda: estimator(sample_weights=[1.0, float("nan"), 1.0, 1.0]),
        ),
        (
            ValueError,
            "`sample_weights` must be by the names of tasks, got an unknown 'x'",
            lambda: estimator(sample_weights={"0": 1, "1": 1, "2": 1, "3": 1, "x": 1}),
        ),
        (
            ValueError,
            "`sample_weights` must be labelled along its tasks like `task_names`",
            lambda: estimator(
                sample_weights=pd.Series(1.0, index=list("abcx")), task_names=list("abcd")
            ),
        ),
        (RuntimeError, "`estimator` must be fitted", lambda: estimator().predict(MASKS)),
        (
            ValueError,
            r"`masks` must be of 4 columns like the tasks, got shape \(16, 3\)",
            lambda: estimator().fit().predict(MASKS[:, :3]),
        ),
        (
            ValueError,
            r"of shape \(16, 2\), got shape \(16, 1\)",
            lambda: calibrated(torch.ones(16)),
        ),
        (ValueError, "be finite", lambda: calibrated(torch.full((16, 2), torch.nan))),
        (ValueError, "four subsets or more, got 3", lambda: calibrated(torch.ones(3, 2), 3)),
        (ValueError, "one penalty or more", lambda: calibrated(torch.ones(16, 2), ridges=[])),
    ],
)
def test_errors_name_what_is_wrong(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_estimates_follow_really_retrained_networks():
    """A small network on digits with spoilt groups, retrained on 24 subsets."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.from_numpy(digits.data / 16).float()
    y = torch.from_numpy(digits.target)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    tasks = [(x[i : i + 40], y[i : i + 40].clone()) for i in range(0, 400, 40)]
    for task in (2, 7):
        tasks[task] = (tasks[task][0], tasks[task][1][torch.randperm(40, generator=generator)])
    target = x[400:], y[400:]

    def train(mask, seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        inside = [tasks[i] for i in mask.nonzero()[:, 0].tolist()]
        x, y = (torch.cat(part) for part in zip(*inside, strict=True))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model

    def score(mask, seed):
        logits = train(mask, seed)(target[0])
        return float(nn.functional.cross_entropy(logits, target[1]).detach())

    masks = bernoulli(10, 24, 0.7, seed=0)
    truth = ksm_ext.retrain_scores(score, masks, seeds=(0, 1), progress=False).mean
    model = train(torch.ones(10, dtype=torch.bool), 5)
    fitted = GradientEstimator(model, tasks, target, projector=Projector(512), progress=False).fit()
    correlation = ksm_ext.evaluation.lds(truth, fitted.predict(masks))
    assert float(correlation) > 0.9
