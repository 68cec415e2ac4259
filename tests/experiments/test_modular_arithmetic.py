import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.experiment import Run
from experiments.modular_arithmetic import experiment
from experiments.modular_arithmetic.data import OPERATIONS, arithmetic
from experiments.modular_arithmetic.experiment import PROGRAM, ModularArithmetic
from experiments.modular_arithmetic.settings import PRESETS, SMOKE
from experiments.runner import main
from experiments.settings import load_settings
from experiments.truth import growing, models, retrained, subsets

CONFIGS = Path(experiment.__file__).parent / "configs"
RULES = {  # in plain integers
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "quad": lambda a, b: a * a + a * b + b * b,
    "cubic": lambda a, b: a**3 + a * b,
    "cubic2": lambda a, b: a**3 + a * b * b + b,
    "quad3": lambda a, b, c: a * a + b * b + c * c + a * b + b * c + c * a,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_labels_are_the_results(operation):
    p = 7
    data = arithmetic(operation, p, 3, 0.3, None, 0)
    tokens = torch.cat([data.inputs, data.held_inputs])
    labels = torch.cat([data.labels, data.held_labels])
    operands = tokens[:, 0::2].tolist()
    for values, label in zip(operands, labels.tolist(), strict=True):
        if operation in RULES:
            assert label == RULES[operation](*values) % p
        else:
            a, b = values
            divides = operation == "div" or b % 2 == 1
            assert (label * b - a) % p == 0 if divides else label == (a - b) % p
    r = OPERATIONS[operation].num_operands
    assert len(labels) == (p - 1 if OPERATIONS[operation].divides else p) * p ** (r - 1)
    assert tokens[:, 1::2].unique().tolist() == ([p + 1] if r == 1 else [p, p + 1])


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "quad3"])
def test_operations_commute_where_they_say_so(operation):
    rule = OPERATIONS[operation]
    a, b = torch.cartesian_prod(torch.arange(1, 7), torch.arange(1, 7)).T
    same = bool((rule.apply(7, a, b) % 7 == rule.apply(7, b, a) % 7).all())
    assert same == rule.commutes


def test_tasks_are_the_cells_and_share_nothing_with_the_targets():
    data = arithmetic("add", 23, 5, 0.3, None, 33)
    assert len(data.by_task()) == len(data.by_target()) == 25
    seen = {tuple(row) for x, _ in data.by_task() for row in x.tolist()}
    held = {tuple(row) for x, _ in data.by_target().values() for row in x.tolist()}
    assert len(seen) + len(held) == 23**2 and not seen & held
    for cell, (x, _) in enumerate(data.by_task()):
        assert set((x[:, 0] * 5 // 23 * 5 + x[:, 2] * 5 // 23).tolist()) == {cell}
    for (x, _), name in zip(data.by_target().values(), data.target_names, strict=True):
        (a, b), (c, d) = ([int(n) for n in span.split("-")] for span in name.split(", "))
        assert x[:, 0].min() >= a and x[:, 0].max() <= b
        assert x[:, 2].min() >= c and x[:, 2].max() <= d


def smoke(**training):
    return ModularArithmetic(replace(SMOKE, training=replace(SMOKE.training, **training)))


@pytest.mark.parametrize("perturbation", ["none", "sam", "nso"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_repeats_and_learns(optimizer, perturbation):
    experiment = smoke(
        optimizer=optimizer,
        perturbation=perturbation,
        learning_rate=0.01,
        weight_decay=0.0,
        num_steps=40,
    )
    data, mask = experiment.data(), torch.ones(9, dtype=torch.bool)

    def losses():
        return [float(experiment.score(m).mean()) for m in experiment.train("main", mask, 1)]

    assert losses() == losses()
    *_, last = experiment.train("main", mask, 1)
    loss = nn.functional.cross_entropy(last(data.inputs), data.labels)
    assert loss < 2.4  # log 13 = 2.56 knows nothing


def test_a_task_that_is_left_out_is_not_trained_on():
    experiment = smoke(checkpoints=(1.0,), learning_rate=0.01, num_steps=60)
    mask = torch.zeros(9, dtype=torch.bool)
    (untouched,) = experiment.train("main", mask, 0)
    start = experiment.initial_model(0)
    for one, other in zip(untouched.parameters(), start.parameters(), strict=True):
        assert torch.equal(one, other)
    mask[4] = True
    (trained,) = experiment.train("main", mask, 0)
    inputs, labels = experiment.data().by_task()[4]
    right = [(net(inputs).argmax(1) == labels).double().mean() for net in (trained, untouched)]
    assert right[0] > right[1]


def test_retrained_scores_are_those_of_the_network(tmp_path):
    experiment = smoke(num_steps=8)
    mask = subsets(experiment)[:2]
    scores = retrained(Run(experiment, tmp_path), mask, 2)
    assert scores.shape == (2, 2, 3, 9)
    for number, network in enumerate(experiment.train("main", mask[1], 1)):
        torch.testing.assert_close(scores[1, 1, number], experiment.score(network))
    with pytest.raises(ValueError, match="settings"):
        retrained(Run(smoke(num_steps=8, learning_rate=0.5), tmp_path), mask, 2)


def test_models_are_read_as_they_were_trained(tmp_path):
    run = Run(smoke(num_steps=8), tmp_path)
    first, second = models(run), models(run)
    for paths in zip(first, second, strict=True):
        for one, other in zip(*paths, strict=True):
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(a, b)
    assert len(first) == 2 and len(first[0]) == 3


def test_the_mirror_of_a_cell_has_its_operands_exchanged():
    experiment = ModularArithmetic(SMOKE)
    pairs, _ = experiment.special()
    names = experiment.data().task_names
    for task, target in pairs.nonzero().tolist():
        assert names[task].split(", ") == names[target].split(", ")[::-1]
    assert int(pairs.sum()) == 9


def test_growing_subsets():
    masks = growing(ModularArithmetic(SMOKE))
    assert masks.sum(1).tolist() == list(range(1, 10))
    assert all(bool((masks[i + 1] | ~masks[i]).all()) for i in range(8))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_is_readable(file):
    assert load_settings(PRESETS["paper"], file).data.modulus == 97


@pytest.mark.slow
def test_smoke_run_end_to_end_and_again(tmp_path, capsys):
    assert main(PROGRAM, ["run", "--preset", "smoke", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["name"] for row in rows} >= {"kernel surrogate", "TRAK", "influence, EK-FAC"}
    first = (tmp_path / "table.md").read_text()
    for name in ("linear_and_kernel", "sample_complexity", "over_training", "density"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    capsys.readouterr()
    assert main(PROGRAM, ["figures", "--preset", "smoke", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "table.md").read_text() == first
