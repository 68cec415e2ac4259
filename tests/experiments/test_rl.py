"""Reinforcement learning: physics, policies in batches, estimates, games, choices, and the run."""

import json
import shutil
import sqlite3
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.func import functional_call, grad

pytest.importorskip("yaml")
pytest.importorskip("matplotlib")

from experiments.common import saved_figure
from experiments.experiment import Run
from experiments.rl import judging, learning_curve, metaworld, objectives, selecting
from experiments.rl.cartpole import MAX_ANGLE, MAX_POSITION, SPREAD, TIME_STEP, CartPoles, Physics
from experiments.rl.data import PHYSICS, Camps, assigned, suite_of
from experiments.rl.experiment import COMMANDS, PROGRAM, answers, judge_of, learning, problem_of
from experiments.rl.games import is_complete, weights_of
from experiments.rl.judging import Judge, differences, interval, judge, resampled, row_numbers
from experiments.rl.linearisation import errors
from experiments.rl.methods import METHODS, RETRAINED, Answer, estimator_of
from experiments.rl.model import Model, Policies
from experiments.rl.ppo import Training, collect, generalised, standardised, train
from experiments.rl.rollouts import MOST_COPIES, better_action, log_ratio, seen_by, steps_of
from experiments.rl.settings import PRESETS, Curve, Selection
from experiments.rl.truth import (
    JUDGE_SEED,
    REFERENCE_SEED,
    Control,
    retrained,
    returns_lost,
    train_subsets,
)
from experiments.runner import main
from experiments.settings import load_settings, replaced
from ksm_ext.subsets import all_subsets

SMOKE = PRESETS["smoke"]
QUICK = replace(
    SMOKE,
    training=replace(SMOKE.training, num_rollouts=2, num_steps=32),
    curve=Curve(sizes=(12,), num_draws=2),
    selection=Selection(size=2, num_draws=1, num_seeds=2),
)
SHORT = Training(num_environments=6, num_steps=16, num_rollouts=2, batch_size=32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# -- physics ------------------------------------------------------------------------------------


def accelerations(physics, state, push):
    """Of cart and pole, from the two equations of Lagrange, solved as a linear system."""
    _, _, angle, angle_dot = state
    m, length = physics.mass_pole, physics.half_length
    matrix = torch.stack(
        [
            torch.stack([torch.tensor(physics.mass_cart + m), m * length * angle.cos()]),
            torch.stack([angle.cos(), torch.tensor(4 / 3 * length)]),
        ]
    )
    right = torch.stack(
        [push + m * length * angle_dot**2 * angle.sin(), physics.gravity * angle.sin()]
    )
    return torch.linalg.solve(matrix.double(), right.double())


def test_poles_move_by_the_equations_of_lagrange():
    """Forces on cart and pole, solved as a linear system; there in closed form."""
    kinds = [*PHYSICS.values(), *Camps(1, 3)._physics[1:]]
    poles = CartPoles([kinds, kinds], 50, generator(), torch.float64)
    for _ in range(60):
        before = poles.observations.clone()
        actions = torch.randint(2, (2, len(kinds)), generator=generator())
        step = poles.step(actions)
        for row in range(2):
            for number, physics in enumerate(kinds):
                state = before[row, number]
                push = physics.force * (1 if actions[row, number] else -1)
                x_acc, angle_acc = accelerations(physics, state, torch.tensor(push))
                moved = torch.stack([state[1], x_acc, state[3], angle_acc])
                expected = state + TIME_STEP * moved
                torch.testing.assert_close(step.last[row, number], expected)
                fallen = abs(expected[0]) > MAX_POSITION or abs(expected[2]) > MAX_ANGLE
                assert bool(step.terminated[row, number]) == bool(fallen)


def test_poles_move_as_those_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    kinds = list(PHYSICS.values())
    poles = CartPoles([kinds], 500, generator(), torch.float64)
    theirs = []
    for physics in kinds:
        env = gymnasium.make("CartPole-v1").unwrapped
        env.reset(seed=0)
        env.gravity, env.masscart, env.masspole = (
            physics.gravity,
            physics.mass_cart,
            physics.mass_pole,
        )
        env.length, env.force_mag = physics.half_length, physics.force
        env.total_mass = env.masscart + env.masspole
        env.polemass_length = env.masspole * env.length  # which setting the length leaves stale
        theirs.append(env)
    ended = 0
    for _ in range(200):
        actions = torch.randint(2, (1, len(kinds)), generator=poles._generator)
        for env, state in zip(theirs, poles.observations[0], strict=True):
            env.state, env.steps_beyond_terminated = state.numpy().copy(), None
        step = poles.step(actions)
        for number, env in enumerate(theirs):
            _, reward, terminated, _, _ = env.step(int(actions[0, number]))
            torch.testing.assert_close(step.last[0, number], torch.tensor(env.state))
            assert reward == step.rewards[0, number]
            assert terminated == bool(step.terminated[0, number])
            ended += terminated
    assert ended > 10


def test_episodes_are_cut_off_at_the_horizon_and_begin_anew():
    still = Physics(force=0.0, gravity=0.0)
    poles = CartPoles([[still] * 3], 5, generator())
    first = poles.observations.clone()
    assert (first.abs() <= SPREAD).all() and first.std() > 0
    for number in range(1, 11):
        step = poles.step(torch.zeros(1, 3, dtype=torch.int64))
        assert bool(step.truncated.all()) == (number % 5 == 0) and not step.terminated.any()
        assert torch.equal(step.last, poles.observations) == (number % 5 != 0)
    assert not torch.equal(poles.observations, first)


# -- tasks --------------------------------------------------------------------------------------


def test_tasks_of_a_subset_share_the_samples_alike():
    masks = all_subsets(5)
    tasks, shares = assigned(masks, 7)
    for mask, own, share in zip(masks, tasks, shares, strict=True):
        sums = torch.zeros(5).index_add(0, own, share)
        torch.testing.assert_close(sums, mask.float())
    with pytest.raises(ValueError, match="must be at least 5 like the tasks, got 4"):
        assigned(masks, 4)


def test_suites_are_camps():
    suite = suite_of("3+2")
    forces = [x.force for x in suite._physics]
    assert forces == [10.0, 10.0, 10.0, -10.0, -10.0] and suite.camps.tolist() == [1, 1, 1, -1, -1]
    assert suite.task_names[3] == "plain, reversed"
    for name in ("nine", "9+1", "0+3", "3", "5+0", "6+x+6", "6+6\n", "", "+"):
        with pytest.raises(ValueError, match=r"`data\.suites` must be"):
            suite_of(name)


def test_a_suite_whose_package_is_missing_is_refused_in_words(monkeypatch, tmp_path, capsys):
    metaworld.benchmark.cache_clear()
    monkeypatch.setitem(sys.modules, "metaworld", None)
    status = main(PROGRAM, ["train-subsets", "--preset", "paper", "--output", str(tmp_path)])
    assert status == 2
    assert "`data.suites` must be of installed packages, got MT10" in capsys.readouterr().err


REFUSED = {
    "data.suites=[6]": r"`suites\[0\]` must be of type str, got 6",
    "data.suites=[]": r"`data\.suites` must be one suite or more, got none",
    "data.suites=6+6": r"`suites` must be .*, got '6\+6'. Write a list, \[6\+6\]\.",
    "data.suites=[5+0]": r"`data\.suites` must be 'MT10' or two numbers",
    "data.horizon=0": "`horizon` must be at least 1, got 0",
    "data.num_episodes=0": "`num_episodes` must be at least 1, got 0",
    "model.widths=[]": "`widths` must be one number or more, got none",
    "model.widths=[x]": r"`widths\[0\]` must be of type int, got 'x'",
    "model.widths=[8, 0]": "`widths` must be at least 1, got 0",
    "training.num_steps=0": "`num_steps` must be at least 1, got 0",
    "training.batch_size=0": "`batch_size` must be at least 1, got 0",
    "training.num_rollouts=0": "`num_rollouts` must be at least 1, got 0",
    "training.learning_rate=.nan": "`learning_rate` must be finite, got nan",
    "training.learning_rate=-1": "`learning_rate` must be positive, got -1.0",
    "training.discount=1": "`discount` must be between 0 and 1, got 1.0",
    "training.trace=.nan": "`trace` must be between 0 and 1, got nan",
    "truth.batch=0": "`batch` must be at least 1, got 0",
    "truth.num_subsets=0": "`num_subsets` must be at least 8, got 0",
    "truth.num_seeds=0": "`num_seeds` must be at least 1, got 0",
    "truth.num_edge_seeds=1": "`num_edge_seeds` must be at least 2, got 1",
    "truth.num_references=0": "`num_references` must be at least 8, got 0",
    "truth.num_judged=7": "`num_judged` must be at least 8, got 7",
    "truth.num_judges=0": "`num_judges` must be at least 1, got 0",
    "methods.num_samples=1": "`num_samples` must be from 2 to 2048, by `num_models`, got 1",
    "methods.num_calibrated=21": "`methods.num_calibrated` must be at most 20, .*, got 21",
    "methods.damping=0": "`damping` must be positive, got 0.0",
    "curve.sizes=[12, 21]": r"`curve\.sizes` must be at most 20, `truth\.num_subsets`, got 21",
    "curve.sizes=[]": "`sizes` must be one number or more, got none",
    "curve.num_draws=1": "`num_draws` must be at least 2, got 1",
    "selection.size=0": "`size` must be at least 1, got 0",
    "selection.size=5": r"`selection\.size` must be at most 4, all tasks .*, got 5",
    "selection.num_seeds=1": "`num_seeds` must be at least 2, got 1",
    "objectives.confidence=1": "`confidence` must be strictly between 0 and 1, got 1.0",
    "objectives.chosen_seeds=1": "`chosen_seeds` must be at least 2, got 1",
}


@pytest.mark.parametrize("change", REFUSED)
def test_settings_that_come_to_nothing_are_refused(change):
    with pytest.raises(ValueError, match=REFUSED[change]):
        load_settings(SMOKE, None, [change])


def test_settings_that_fit_together_are_taken_in_any_order():
    changes = ["truth.num_subsets=9", "curve.sizes=[9]", "methods.num_calibrated=5"]
    for order in permutations(changes):
        assert load_settings(SMOKE, None, order).curve.sizes == (9,)


# -- policies in batches ------------------------------------------------------------------------


def trained(masks, training, seed=0):
    settings = replace(SMOKE, training=training)
    return Control(settings).policies(suite_of("3+2"), masks, seed)


def test_a_policy_is_the_same_in_a_batch_as_alone():
    masks = all_subsets(5)[[3, 9, 17, 30]]
    together = trained(masks, SHORT)
    for number, mask in enumerate(masks):
        alone = trained(mask[None], SHORT)
        start = Policies(1, 4, 2, SMOKE.model, 0)
        for both, one, first in zip(together.weights, alone.weights, start.weights, strict=True):
            torch.testing.assert_close(both[number :: len(masks)], one, atol=1e-5, rtol=1e-4)
            assert not torch.equal(one, first)


def test_a_policy_without_tasks_stays_as_it_began():
    policies = trained(torch.zeros(2, 5, dtype=torch.bool), SHORT)
    for weight, first in zip(
        policies.weights, Policies(2, 4, 2, SMOKE.model, 0).weights, strict=True
    ):
        assert torch.equal(weight, first)


@pytest.mark.parametrize("discrete", [True, False])
def test_one_policy_of_a_batch_is_a_module(discrete):
    policies = Policies(3, 4, 2, Model((8, 6)), 1, discrete=discrete)
    for weight in policies.weights:
        weight.add_(torch.randn(weight.shape, generator=generator()))
    x = torch.randn(3, 5, 4, generator=generator(1))
    said, values = policies.both(x)
    torch.testing.assert_close(said, policies.said(x))
    torch.testing.assert_close(values, policies.values(x))
    actions = policies.sample(said, generator(2))
    logarithms = policies.log_probabilities(said, actions)
    for number in range(3):
        module = policies.policy(number)
        ours = module(x[number])
        if discrete:
            expected = torch.distributions.Categorical(logits=said[number])
            torch.testing.assert_close(ours, said[number])
        else:
            deviation = policies.weights[-1][number].exp()
            normal = torch.distributions.Normal(said[number], deviation)
            expected = torch.distributions.Independent(normal, 1)
            torch.testing.assert_close(ours[..., 0], said[number])
        torch.testing.assert_close(expected.log_prob(actions[number]), logarithms[number])
        torch.testing.assert_close(expected.entropy(), policies.entropies(said)[number])


def test_actions_are_drawn_by_their_probabilities():
    policies = Policies(1, 4, 3, Model((8,)), 0)
    said = torch.tensor([0.5, -1.0, 0.2]).expand(1, 40_000, 3)
    shares = policies.sample(said, generator())[0].bincount(minlength=3) / 40_000
    torch.testing.assert_close(shares, said[0, 0].softmax(0), atol=0.01, rtol=0)


def test_advantages_are_discounted_sums_of_errors():
    """Against the double sum, episode by episode."""
    training = Training(discount=0.9, trace=0.8)
    shape = 2, 7, 3
    rewards, before, after = (torch.randn(shape, generator=generator(k)).double() for k in range(3))
    terminated, cut = (torch.rand(shape, generator=generator(k)) < 0.2 for k in (3, 4))
    found = generalised(rewards, before, after, terminated, cut, training)
    for p in range(2):
        for e in range(3):
            for h in range(7):
                total, factor = 0.0, 1.0
                for k in range(h, 7):
                    ahead = 0.0 if terminated[p, k, e] else 0.9 * after[p, k, e]
                    total += factor * (rewards[p, k, e] + ahead - before[p, k, e])
                    if terminated[p, k, e] or cut[p, k, e]:
                        break
                    factor *= 0.9 * 0.8
                torch.testing.assert_close(found[p, h, e], torch.as_tensor(total))


def test_a_step_of_training_is_that_of_the_textbook():
    """One policy, one step of Adam: the clipped objective and the critic, written for modules."""
    once = replace(SHORT, num_rollouts=1, num_epochs=1, batch_size=96, max_norm=1e9)
    policies = Policies(1, 4, 2, Model((8,)), 3, dtype=torch.float64)
    for number, weight in enumerate(policies.weights):
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator(number)).double())
    first = [weight.clone() for weight in policies.weights]
    shares = torch.tensor([[1.0, 1.0, 0.5, 0.5, 2.0, 0.0]]).double()

    def poles():
        return CartPoles([[Physics()] * 6], 20, generator(), torch.float64)

    rollout = collect(policies, poles(), once, generator(9))
    weigh = (shares / shares.sum()).repeat(1, 16) / 16
    gains = standardised(rollout.advantages, weigh)
    assert float((weigh * gains).sum()) == pytest.approx(0, abs=1e-9)
    weights = [weight.clone().requires_grad_() for weight in first]
    copied = Policies(1, 4, 2, Model((8,)), 3, dtype=torch.float64)
    copied.weights = weights
    said, values = copied.both(rollout.observations)
    chosen = said.log_softmax(-1).gather(-1, rollout.actions[..., None])[..., 0]
    loss = (values - rollout.returns).square() - gains * (chosen - chosen.detach()).exp()
    (weigh * loss).sum().backward()
    train(policies, poles(), shares, once, generator(9))
    rate = once.learning_rate
    for after, before, weight in zip(policies.weights, first, weights, strict=True):
        step = weight.grad / (weight.grad.abs() + 1e-5)  # Adam's first
        torch.testing.assert_close(after, before - rate * step, atol=1e-9, rtol=1e-6)


def test_returns_are_those_of_single_episodes():
    """A policy that always pushes to the right, against poles that are stepped by hand."""
    suite = suite_of("3+2")
    policies = Policies(2, 4, 2, SMOKE.model, 0)
    policies.weights[5][:2] = torch.tensor([0.0, 50.0])
    lost = returns_lost(policies, suite, 30, 3, generator(4))
    assert lost.shape == (2, 5) and torch.equal(lost[0], lost[1])
    tasks = torch.arange(5).repeat_interleave(3)
    poles = suite.environments(tasks[None], 30, generator(4))
    lengths = []
    for number in range(15):
        state, steps = poles.observations[0, number].double(), 0
        physics = suite._physics[tasks[number]]
        while steps < 30 and abs(state[0]) <= MAX_POSITION and abs(state[2]) <= MAX_ANGLE:
            x_acc, angle_acc = accelerations(physics, state, torch.tensor(physics.force))
            state = state + TIME_STEP * torch.stack([state[1], x_acc, state[3], angle_acc])
            steps += 1
        lengths.append(steps)
    expected = 1 - torch.tensor(lengths).view(5, 3).double().mean(1) / 30
    torch.testing.assert_close(lost[0], expected)


# -- estimates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [True, False])
def test_the_log_ratio_has_the_gradient_of_the_log_probability(discrete):
    policies = Policies(1, 4, 2, Model((8,)), 0, discrete=discrete, dtype=torch.float64)
    policies.weights[2].add_(1.0)
    model = policies.policy(0)
    states = torch.randn(6, 4, generator=generator()).double()
    actions = policies.sample(policies.said(states[None]), generator())[0]
    advantages = torch.tensor([1.0, -2.0, 0.5, -0.1, 3.0, -1.0]).double()
    weights = {name: x.detach() for name, x in model.named_parameters()}

    def ratio(weights, row):
        batch = states[row : row + 1], actions[row : row + 1], advantages[row : row + 1]
        return log_ratio(lambda x: functional_call(model, weights, (x,)), batch)[0]

    for row in range(6):
        assert ratio(weights, row) == 0
        found = grad(ratio)(weights, row)
        model.zero_grad()
        said = model(states[row])
        if discrete:
            logarithm = said.log_softmax(-1)[actions[row]]
        else:
            means, log_std = said.unbind(-1)
            z = (actions[row] - means) / log_std.exp()
            logarithm = (-(z**2) / 2 - log_std).sum()
        logarithm.backward()
        for name, weight in model.named_parameters():
            expected = advantages[row].sign() * weight.grad
            torch.testing.assert_close(found[name], expected)


def test_samples_are_of_their_task_and_in_proportion_to_advantages():
    suite, settings = suite_of("3+2"), replaced(SMOKE, {"methods": {"num_samples": 400}})
    policies = [trained(torch.ones(1, 5, dtype=torch.bool), SHORT, seed) for seed in (0, 1)]
    seen = seen_by(policies, suite, settings)
    assert [len(x[0]) for x in seen.tasks] == [400] * 5 == [len(x[0]) for x in seen.drawn]
    alike = torch.cat([x[2] for x in seen.tasks]).abs()
    drawn = torch.cat([x[2] for x in seen.drawn]).abs()
    # Drawn in proportion to |A|, its mean is E A² / E |A|, and that of 1 / |A| is 1 / E |A|.
    assert float(drawn.mean()) == pytest.approx(float((alike**2).mean() / alike.mean()), rel=0.1)
    states, actions, advantages = seen.tasks[0]
    _, better = better_action((states, actions, advantages))
    assert torch.equal(better == actions, advantages > 0)


def test_short_rollouts_take_no_more_environments():
    suite, asked = suite_of("3+2"), []
    policy = trained(torch.ones(1, 5, dtype=torch.bool), SHORT)
    counted = SimpleNamespace(
        task_names=suite.task_names,
        environments=lambda tasks, *rest: asked.append(tasks) or suite.environments(tasks, *rest),
    )
    for num_steps in (1, 3, 64, 2000):
        settings = replaced(SMOKE, {"training": {"num_steps": num_steps}})
        steps = steps_of(policy, counted, settings, generator())
        assert asked[-1].shape[1] <= 5 * MOST_COPIES
        assert all(1024 <= len(states) <= 2 * max(1024, num_steps) for states, *_ in steps)


def test_the_expansion_is_exact_to_second_order():
    policy = Policies(1, 4, 2, Model((8,)), 0).policy(0)
    other = Policies(1, 4, 2, Model((8,)), 1).policy(0)
    states = torch.randn(50, 4, generator=generator())
    actions = torch.randint(2, (50,), generator=generator())
    found = errors(policy, [other], states, actions)
    (near, near_ratio), (far, far_ratio) = found[0.005], found[0.02]
    assert far / near == pytest.approx(4**4, rel=0.3)  # Δ² of the error, squared
    assert far_ratio / near_ratio == pytest.approx(4**2, rel=0.3)


# -- games, tables, choices ---------------------------------------------------------------------


def test_values_of_a_game_are_means_over_orders():
    masks = all_subsets(4)
    scores = torch.randn(16, 2, generator=generator()).double()
    assert is_complete(masks) and not is_complete(masks[1:])
    shapley = torch.zeros(4, 2).double()
    for order in permutations(range(4)):
        mask = torch.zeros(4, dtype=torch.bool)
        for task in order:
            before = scores[row_numbers(mask[None])[0]]
            mask[task] = True
            shapley[task] += (scores[row_numbers(mask[None])[0]] - before) / 24
    torch.testing.assert_close(weights_of(masks, "shapley") @ scores, shapley)
    alone = scores[15] - scores[15 - 2 ** torch.arange(4)]
    torch.testing.assert_close(weights_of(masks, "loo") @ scores, alone)
    inside = masks.double().T
    banzhaf = (inside @ scores - (1 - inside) @ scores) / 8
    torch.testing.assert_close(weights_of(masks, "banzhaf") @ scores, banzhaf)


def test_the_best_small_subset_is_chosen():
    masks, n = all_subsets(5), 5
    predictions = torch.randn(32, n, generator=generator()).double()
    said = {name: Answer(*[predictions] * 4) for name in METHODS}
    for held_out in (False, True):
        found = selecting.choices(said, n, 2, 3, held_out=held_out)
        for target in range(n):
            fitting = [
                row
                for row in range(1, 32)
                if masks[row].sum() <= 2 and not (held_out and masks[row, target])
            ]
            best = min(fitting, key=lambda row: float(predictions[row, target]))
            assert (found["kernel surrogate"][:, target] == masks[best]).all()
            assert (found["random grouping"][:, target].sum(-1) == 2).all()
            assert found["all tasks"][0, target].sum() == n - held_out
            assert bool(found["each alone"][0, target, target]) == (not held_out)


def test_interquartile_means_leave_out_both_tails():
    returns = torch.tensor([[0.0, 5.0], [1.0, 6.0], [2.0, 100.0], [3.0, 7.0]]).double()
    mean, low, high = selecting.interquartile_mean(returns)
    assert mean == pytest.approx((2 + 3 + 5 + 6) / 4) and low <= mean <= high
    constant = selecting.interquartile_mean(torch.ones(3, 4).double())
    assert constant == (1, 1, 1)


def test_the_seed_is_the_unit_of_what_is_chosen():
    """What targets share by a seed is in the interval; a choice shown twice adds nothing."""
    effects = torch.randn(40, generator=generator()).double()
    returns = effects[:, None, None].expand(40, 2, 12)
    _, low, high = selecting.interquartile_mean(returns)
    # The standard error of an interquartile mean of normal values is some 1.1 times the mean's.
    assert (high - low) / 2 == pytest.approx(1.96 * float(effects.std()) / 40**0.5, rel=0.35)
    noisy = returns + torch.randn(40, 1, 12, generator=generator(1)).double()
    once, twice = (selecting.interquartile_mean(x) for x in (noisy[:, :1], noisy))
    assert once == pytest.approx(twice, abs=0.01)
    less = selecting.interquartile_mean(noisy, noisy - 3)
    assert less == pytest.approx((3, 3, 3))


def test_an_interval_holds_its_estimate():
    values = torch.randn(200, generator=generator()).double()
    mean, low, high = interval(resampled([lambda rows: float(values[rows].mean())], 200))
    assert mean == pytest.approx(float(values.mean()))
    half = 1.96 * float(values.std()) / 200**0.5
    assert high - mean == pytest.approx(half, rel=0.25) == mean - low


def test_an_interval_is_over_runs_too():
    runs = torch.randn(30, generator=generator()).double().tolist()
    mean, low, high = interval(resampled([lambda rows, x=x: x for x in runs], 5))
    half = 1.96 * float(torch.tensor(runs).std()) / 30**0.5
    assert mean == pytest.approx(sum(runs) / 30)
    assert high - mean == pytest.approx(half, rel=0.25) == mean - low


def test_ceilings_are_what_a_perfect_method_reaches():
    """Of noise whose variance is known, some of it common to the subsets of a run."""
    masks = all_subsets(9)[1:]
    signal = masks.double() @ torch.randn(9, 4, generator=generator()).double()
    draw = torch.randn(12, len(masks), 4, generator=generator(1)).double()
    tilt = torch.randn(12, 9, 4, generator=generator(2)).double()
    runs = signal + draw + 0.3 * masks.double() @ tilt
    rows = torch.arange(len(masks))
    truth = Judge(masks, runs[0], torch.ones_like(rows).bool(), torch.ones_like(rows), rows, runs)
    found = truth.ceilings()
    table = torch.cat([torch.zeros(1, 4), signal])  # row_numbers begin with the empty subset
    perfect = judging_of(Answer(*[table] * 4), truth)
    assert found["residual"][0] == pytest.approx(perfect["residual"], abs=0.02)
    assert found["lds"][0] == pytest.approx(perfect["lds"], abs=0.02)
    said = {"ours": Answer(*[table] * 4), "theirs": Answer(*[table.flip(0)] * 4)}
    drawn = {name: judge(name, answer, truth) for name, answer in said.items()}
    less, low, high = differences(drawn, "ours", "lds")["theirs"]
    assert low < less < high and less == pytest.approx(
        perfect["lds"] - judging_of(said["theirs"], truth)["lds"]
    )


def judging_of(answer, truth):
    """Errors and ranks by scipy, each training by itself."""
    said = answer.predictions[truth.rows]
    ranks = [spearmanr(said[:, k], run[:, k])[0] for run in truth.runs for k in range(4)]
    errors = [(said - run).square().mean(0).sum() / run.var(0).sum() for run in truth.runs]
    return {"lds": float(np.mean(ranks)), "residual": float(np.mean(errors))}


@pytest.mark.parametrize("camps", [[1, 1, -1], [0, 0, 0]])
def test_figures_count_camps_where_there_are_some(camps, monkeypatch, tmp_path):
    figures, masks = [], all_subsets(3)
    scores = torch.rand(8, 3, generator=generator()).double()
    unseen, rows = masks.any(1), torch.arange(1, 8)
    truth = Judge(masks, scores, unseen, torch.ones(8), rows, scores[None, 1:])

    @contextmanager
    def kept(path, *size):
        with saved_figure(path, *size) as figure:
            yield figures.append(figure) or figure

    monkeypatch.setattr(judging, "saved_figure", kept)
    metrics = {x: {"lds": (0.5, 0.4, 0.6)} for x in ("ours", "ceiling")}
    judging.draw(metrics, truth, torch.tensor(camps), scores, tmp_path / "x.png")
    right = figures[0].axes[1]
    expected = "own camp less the other" if any(camps) else "tasks of the subset"
    assert right.get_xlabel() == expected
    signs = torch.tensor(camps if any(camps) else [1, 1, 1])
    drawn = torch.as_tensor(right.lines[0].get_xdata())
    assert (drawn - masks[1:].long() @ signs).abs().max() < 0.5


# -- the run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All commands but that of objectives, with policies that have hardly begun."""
    run = Run(Control(QUICK), tmp_path_factory.mktemp("rl"))
    with joblib.parallel_config("sequential"):
        for name, command in COMMANDS.items():
            if name != "objectives":
                command(run)
    return run


def test_everything_is_written(finished):
    names = {path.name for path in finished.output.iterdir()}
    parts = ("fitted", "references", "edges", "judges", "all", "chosen")
    assert {f"scores-3+2-{part}.sqlite" for part in parts} <= names
    for table in ("table", "selection", "expansion", "learning_curve"):
        assert f"{table}-3+2.md" in names
    text = (finished.output / "table-3+2.md").read_text()
    assert all(f"| {name} |" in text for name in (*METHODS, "ceiling"))


def test_scores_in_the_store_are_those_of_single_policies(finished):
    masks = all_subsets(5)
    stored = retrained(finished, "3+2", "references", masks, [REFERENCE_SEED])[0]
    for row in (0, 11, 31):
        alone = finished.experiment.score(suite_of("3+2"), masks[row], REFERENCE_SEED)
        torch.testing.assert_close(alone, stored[row], atol=0.02, rtol=0)


def test_only_what_is_missing_is_trained_again(finished, tmp_path):
    name = "scores-3+2-references.sqlite"
    (tmp_path / name).write_bytes((finished.output / name).read_bytes())
    with closing(sqlite3.connect(tmp_path / name)) as database, database:
        before = set(database.execute("SELECT subset, seed, scores FROM runs"))
        database.execute("DELETE FROM runs WHERE subset = (SELECT min(subset) FROM runs)")
        (left,) = database.execute("SELECT count(*) FROM runs").fetchone()
    assert 0 < left == len(before) - 1
    again = Run(finished.experiment, tmp_path)
    retrained(again, "3+2", "references", all_subsets(5), [REFERENCE_SEED])
    with closing(sqlite3.connect(tmp_path / name)) as database:
        assert set(database.execute("SELECT subset, seed, scores FROM runs")) == before


def test_settings_that_scores_do_not_depend_on_leave_the_store_open(finished, tmp_path):
    changes = {
        "data": {"suites": ["3+2", "2+2"]},
        "truth": {"num_seeds": 1, "num_judged": 8},
        "methods": {"num_samples": 50},
        "curve": {"num_draws": 3},
        "selection": {"num_seeds": 3},
        "objectives": {"num_episodes": 1},
    }
    shutil.copytree(finished.output, tmp_path, dirs_exist_ok=True)
    other = Run(Control(replaced(QUICK, changes)), tmp_path)
    pair = [
        retrained(run, "3+2", "references", all_subsets(5), [REFERENCE_SEED])
        for run in (finished, other)
    ]
    assert torch.equal(*pair)
    for changed in ({"training": {"num_rollouts": 3}}, {"data": {"horizon": 90}}):
        other = Run(Control(replaced(QUICK, changed)), tmp_path)
        with pytest.raises(ValueError, match="must be a new file"):
            retrained(other, "3+2", "references", all_subsets(5), [REFERENCE_SEED])


def test_predictions_are_judged_by_every_seed(finished):
    truth = judge_of(finished, "3+2")
    assert truth.runs.shape == (2, len(truth.judged), 5) and truth.unseen[truth.judged].all()
    assert len({*truth.judged.tolist()}) == len(truth.judged) == int(truth.unseen.sum())
    for row in (0, len(truth.judged) - 1):
        for run, seed in zip(truth.runs, (REFERENCE_SEED, JUDGE_SEED), strict=True):
            mask = truth.masks[truth.judged[row]]
            alone = finished.experiment.score(suite_of("3+2"), mask, seed)
            torch.testing.assert_close(alone, run[row], atol=0.02, rtol=0)


def test_methods_that_have_seen_all_subsets_are_not_judged(finished, tmp_path):
    """Before anything but the subsets to fit to and the references is trained."""
    shutil.copytree(finished.output, tmp_path, dirs_exist_ok=True)
    (tmp_path / "scores-3+2-judges.sqlite").unlink()
    changed = {"truth": {"num_subsets": 30}}
    with pytest.raises(ValueError, match=r"`truth\.num_subsets` must be few enough for 8 ref.* 30"):
        judge_of(Run(Control(replaced(QUICK, changed)), tmp_path), "3+2")
    assert not (tmp_path / "scores-3+2-judges.sqlite").exists()


def test_the_learning_curve_sees_no_training_that_it_is_judged_by(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.output, tmp_path, dirs_exist_ok=True)
    (tmp_path / "learning_curve-3+2.safetensors").unlink()
    problem, runs, seen = problem_of(finished, "3+2"), train_subsets(finished, "3+2"), []
    fit = RETRAINED["ridge datamodel"]
    monkeypatch.setitem(RETRAINED, "ridge datamodel", lambda x: seen.append(x) or fit(x))
    with joblib.parallel_config("sequential"):
        learning(Run(finished.experiment, tmp_path), "3+2")
    allowed = {
        (tuple(mask.tolist()), tuple(scores.tolist()))
        for run in runs
        for mask, scores in zip(problem.masks, run, strict=True)
    }
    drawn = [list(zip(x.masks.tolist(), x.scores.tolist(), strict=True)) for x in seen]
    assert len(drawn) == QUICK.curve.num_draws
    for pairs in drawn:
        assert len(pairs) == 12 and {(tuple(a), tuple(b)) for a, b in pairs} <= allowed
    firsts = {tuple(x) for x in runs[0].tolist()}
    assert 0 < sum(tuple(b) in firsts for _, b in drawn[0]) < 12  # of either seed
    assert learning_curve.FIRST[0] in (tmp_path / "learning_curve-3+2.md").read_text()


def test_choices_are_compared_by_seeds_that_are_drawn_together(finished):
    facts = json.loads((finished.output / "selection-3+2.json").read_text())
    for name, fact in facts.items():
        mean, low, high = fact["returns"]
        assert low <= mean <= high, name
        assert len(fact["by target"]) == 5


def test_methods_are_judged_by_subsets_that_none_has_seen(finished):
    truth, problem = judge_of(finished, "3+2"), problem_of(finished, "3+2")
    unseen = {tuple(mask) for mask in truth.masks[truth.unseen].tolist()}
    assert unseen.isdisjoint(tuple(mask) for mask in problem.masks.tolist())
    assert len(unseen) == 32 - len({tuple(x) for x in problem.masks.tolist()}) - 1
    said = answers(finished, "3+2")
    assert set(said) == set(METHODS)
    for found, _ in said.values():
        assert found.predictions.shape == (32, 5) and found.shapley.shape == (5, 5)
    estimated = estimator_of(problem).predict(problem.masks)
    assert estimated.shape == problem.scores.shape and estimated.isfinite().all()


# -- peers --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_returns_are_those_of_stable_baselines():
    """Both reach poles that stand: 200 of 200 steps, on three seeds each."""
    baselines = pytest.importorskip("stable_baselines3")
    gymnasium = pytest.importorskip("gymnasium")
    evaluate = pytest.importorskip("stable_baselines3.common.evaluation").evaluate_policy
    training = Training()
    steps = training.num_rollouts * training.num_steps * training.num_environments
    ours, theirs = [], []
    for seed in range(3):
        policies = Policies(1, 4, 2, Model(), seed)
        poles = CartPoles([[Physics()] * training.num_environments], 200, generator(seed))
        train(policies, poles, torch.ones(1, training.num_environments), training, generator(seed))
        suite = Camps(1, 0)
        ours.append(200 * (1 - float(returns_lost(policies, suite, 200, 20, generator(seed)))))

        def make():
            return gymnasium.make("CartPole-v1", max_episode_steps=200)

        model = baselines.PPO(
            "MlpPolicy",
            baselines.common.env_util.make_vec_env(make, training.num_environments, seed=seed),
            n_steps=training.num_steps,
            batch_size=training.batch_size,
            n_epochs=training.num_epochs,
            learning_rate=lambda left: training.learning_rate * left,
            gamma=training.discount,
            gae_lambda=training.trace,
            policy_kwargs={"net_arch": [32, 32]},
            seed=seed,
            device="cpu",
        )
        model.learn(steps)
        theirs.append(evaluate(model, make(), n_eval_episodes=20, deterministic=False)[0])
    assert min(ours) > 0.9 * min(theirs) and sum(ours) > 0.95 * sum(theirs), (ours, theirs)


def test_chosen_weights_are_trained_by_seeds_of_their_own(monkeypatch, tmp_path):
    """Those by which they were chosen would speak for them."""
    told = {}

    def scored(train, masks, *, seeds, store, **_):
        told[store.name] = {*seeds}
        (first, *_) = train.args[2]  # weights of a batch
        shape = len(seeds), len(masks), 2 * len(first)
        return SimpleNamespace(values=torch.rand(shape, generator=generator()).double())

    space = SimpleNamespace(low=[0, 0])
    env = SimpleNamespace(unwrapped=SimpleNamespace(reward_space=space))
    monkeypatch.setattr(objectives, "environment", lambda name: env)
    monkeypatch.setattr(objectives, "retrain_scores", scored)
    settings = replaced(QUICK, {"objectives": {"batch": 12}})
    objectives.compare(Run(Control(settings), tmp_path), "two")
    drawn, chosen = (told[f"scores-two-{part}.sqlite"] for part in ("mixtures", "chosen"))
    assert len(drawn) == settings.objectives.num_seeds and not drawn & chosen
    assert len(chosen) == settings.objectives.chosen_seeds


@pytest.mark.filterwarnings("ignore")
def test_weights_of_objectives_reach_the_best_treasure():
    """Of the treasures at hand the one of the best discounted return, by brute force."""
    pytest.importorskip("mo_gymnasium")
    from experiments.rl.objectives import environment, returns

    env = environment("deep-sea-treasure-v0").unwrapped
    front = env.pareto_front(gamma=1.0)
    discount = SMOKE.objectives.training.discount
    weights = torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.05, 0.95]]).double()
    found = returns(SMOKE, "deep-sea-treasure-v0", weights, 0)
    for (a, b), ours in zip(weights.tolist(), found.tolist(), strict=True):

        def value(point, a=a, b=b):
            treasure, steps = float(point[0]), round(-float(point[1]))
            spent = sum(discount**k for k in range(steps))
            return a * discount ** (steps - 1) * treasure - b * spent

        best = max(value(point) for point in front)
        assert value(ours) > best - 0.05 * abs(best), (ours, front)
