"""Games in, interaction values out, and the data and models of HuggingFace, against their own."""

import itertools
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import norm
from torch.utils.data import ConcatDataset, Subset

from ksm_ext import RBF, GradientEstimator, Linear, collect_features, fit_surrogate
from ksm_ext.interop import (
    attribution_table,
    scores_of_game,
    to_game,
    to_interaction_values,
    to_pandas,
    to_polars,
    to_xarray,
)
from ksm_ext.network.gradients import parameter_names
from ksm_ext.network.outputs import log_odds
from ksm_ext.subsets import all_subsets, bernoulli

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
PAIRS = [(index, 2) for index in ("SII", "k-SII", "STII", "FSII", "BII", "FBII")]
INDICES = [("SV", 1), *PAIRS, ("BV", 1)]


@pytest.fixture
def shapiq():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        return pytest.importorskip("shapiq")


def worth(coalitions):
    """A game of five players with effects of every order; (m, 5) bool -> (m,)."""
    one = coalitions @ np.array([0.5, -1.0, 2.0, 0.0, 0.3])
    return 3.0 + one - 1.5 * coalitions[:, [0, 2]].all(1) + 0.7 * coalitions[:, 1:].all(1)


@pytest.mark.parametrize("index, order", INDICES)
def test_a_game_comes_back_as_its_exact_interactions(shapiq, index, order):
    class Auction(shapiq.Game):
        def value_function(self, coalitions):
            return worth(coalitions)

    game = Auction(n_players=5, normalize=False)
    masks = all_subsets(5).numpy()
    surrogate = fit_surrogate(masks, scores_of_game(game, masks), kernel=RBF(gamma=0.5), ridge=0.0)
    found = to_interaction_values(surrogate, index)
    assert_equal_interactions(found, shapiq.ExactComputer(game)(index, order), order, 1e-9)
    assert found.index == index and found.n_players == 5 and found.max_order == order
    assert found.estimated and found.estimation_budget == 32


@pytest.mark.parametrize("index, order", INDICES)
@pytest.mark.parametrize("kernel", [Linear() + 0.5 * RBF(gamma=0.2), "lasso"], ids=str)
def test_a_surrogate_is_a_game_itself(shapiq, index, order, kernel):
    n = 6
    masks = bernoulli(n, 30, 0.5, seed=1)
    truth = worth(masks[:, :5].numpy()) + 0.1 * np.arange(30) % 0.7
    scores = pd.DataFrame({"u": -truth, "v": truth})
    surrogate = fit_surrogate(masks, scores, kernel=kernel, share_ridge=True)

    def game(rows):  # by the scores that are there, which attributions use
        return surrogate.predict(rows, observed=True)["v"].to_numpy()

    computer = shapiq.ExactComputer(game, n)
    for target in (1, "v"):
        for each in {order, 1}:
            found = to_interaction_values(surrogate, index, each, target)
            assert_equal_interactions(found, computer(index, each), each, 1e-10)
    whole = game(np.ones((1, n))).item()
    if index in ("SV", "k-SII", "STII", "FSII"):
        assert sum(found.interactions.values()) == pytest.approx(whole, abs=1e-10)


def assert_equal_interactions(found, expected, order, tolerance):
    players = range(expected.n_players)
    sets = [s for size in range(order + 1) for s in itertools.combinations(players, size)]
    assert list(found.interactions) == sets
    for tasks in sets:
        assert found[tasks] == pytest.approx(expected[tasks], abs=tolerance)
    assert found.baseline_value == pytest.approx(expected.baseline_value, abs=tolerance)


def test_effects_alone_are_values(shapiq):
    masks = all_subsets(5)
    surrogate = fit_surrogate(masks, worth(masks.numpy()), kernel="anova2", ridge=0.1)
    for index, _ in PAIRS:
        readout = "banzhaf" if index in ("BII", "FBII") else "shapley"
        found = to_interaction_values(surrogate, index, order=1)
        assert (found.index, found.max_order) == ("BV" if readout == "banzhaf" else "SV", 1)
        effects = [found[(task,)] for task in range(5)]
        np.testing.assert_array_equal(effects, surrogate.attribute(readout))


def test_interaction_values_are_kept_as_shapiq_keeps_them(shapiq, tmp_path):
    masks = all_subsets(5)
    surrogate = fit_surrogate(masks, worth(masks.numpy()), kernel="anova2", ridge=0.1)
    found = to_interaction_values(surrogate, "k-SII")
    found.to_json_file(tmp_path / "values.json")
    again = shapiq.InteractionValues.from_json_file(tmp_path / "values.json")
    assert again.interactions == found.interactions and again.index == "k-SII"


class Table:
    """A game by its method alone, of two values."""

    n_players = 5

    def value_function(self, coalitions):
        assert coalitions.dtype == bool
        return np.stack([worth(coalitions), -worth(coalitions)], 1)


def test_games_answer_as_the_masks():
    masks = all_subsets(5)
    expected = worth(masks.numpy())
    assert torch.equal(scores_of_game(worth, masks), torch.from_numpy(expected))
    np.testing.assert_array_equal(
        scores_of_game(Table(), masks.int().numpy()), np.stack([expected, -expected], 1)
    )
    index = [f"s{row}" for row in range(32)]
    series = scores_of_game(worth, pd.DataFrame(masks.numpy(), index))
    pd.testing.assert_series_equal(series, pd.Series(expected, index))
    frame = scores_of_game(Table(), pd.DataFrame(masks.numpy(), index))
    pd.testing.assert_frame_equal(frame, pd.DataFrame({0: expected, 1: -expected}, index))


@pytest.mark.parametrize(
    "error, found, game, n",
    [
        (TypeError, "`game` must be callable, got int. Pass a shapiq.Game", 3, 5),
        (ValueError, r"of one player per task, got one of 5 for 4 columns", Table(), 4),
        (ValueError, r"\(16,\) or \(16, t\) values, got shape \(4\)", lambda c: c.sum(0), 4),
        (TypeError, "`game` must be numeric, got list of dtype <U1", lambda c: ["x"], 4),
    ],
)
def test_what_is_no_game(error, found, game, n):
    with pytest.raises(error, match=found):
        scores_of_game(game, all_subsets(n))


@pytest.mark.parametrize(
    "options, found",
    [
        ({"index": "CHII"}, "`index` must be one of 'SV', 'BV', .*, got 'CHII'. Others have no"),
        ({"order": 3}, "`order` must be one of 2, 1, got 3. SII of more tasks has no closed form"),
        ({"index": "SV", "order": 2}, "`order` must be one of 1, got 2"),
        ({"target": "w"}, "`target` must be one of 'u', 'v', got 'w'"),
        ({"target": -1}, "`target` must be one of 'u', 'v', or a number below 2, got -1"),
    ],
)
def test_what_has_no_interaction_values(options, found):
    names = {"target_names": ["u", "v"]}
    surrogate = fit_surrogate(all_subsets(4), torch.randn(16, 2), kernel="rbf", ridge=0.1, **names)
    with pytest.raises(ValueError, match=found):
        to_interaction_values(surrogate, **options)


def test_shares_have_no_interaction_values():
    shares = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    surrogate = fit_surrogate(shares, shares[:, 0], kernel="linear")
    with pytest.raises(ValueError, match="`readout` must be 'loo' for real-valued weights"):
        to_interaction_values(surrogate)
    with pytest.raises(ValueError, match="`surrogate` must be of 0/1 masks, got one of real"):
        to_game(surrogate)


# -- surrogates as games ------------------------------------------------------------------------


@pytest.fixture
def surrogate():
    """Of two targets, with noise, one of them named."""
    masks = bernoulli(5, 24, 0.5, seed=3)
    scores = torch.from_numpy(worth(masks.numpy()))
    scores = scores + 0.1 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    names = {"task_names": list("abcde"), "target_names": ["u", "v"]}
    return fit_surrogate(masks, torch.stack([scores, -scores], 1), kernel="exponential", **names)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("target", [1, "v"])
def test_a_game_has_the_scores_that_attributions_are_of(shapiq, surrogate, target, normalize):
    game = to_game(surrogate, target, normalize=normalize)
    masks = all_subsets(5)
    expected = surrogate.predict(masks, observed=True)[:, 1].numpy()
    expected = expected - expected[0] * normalize
    np.testing.assert_array_equal(game(masks.numpy()), expected)
    for number in (0, 13, 31):  # of one dimension, as samplers ask
        row = masks[number].numpy()
        one = [game(row), game(row.astype(int)), game(tuple(np.flatnonzero(row)))]
        one.append(game(tuple(np.array(list("abcde"))[row].tolist())))
        one.append(game.value_function(row) - game.normalization_value)
        for found in one:
            np.testing.assert_array_equal(found, expected[number : number + 1])
    assert game.n_players == 5 and isinstance(game, shapiq.Game)
    assert (game.normalization_value != 0) == normalize
    again = scores_of_game(game, masks)
    np.testing.assert_array_equal(again, expected)


APPROXIMATORS = [
    *("SVARM", "SVARMIQ", "PermutationSamplingSV", "PermutationSamplingSII"),
    *("PermutationSamplingSTII", "StratifiedSamplingSV", "OwenSamplingSV", "KernelSHAP"),
    *("KernelSHAPIQ", "SHAPIQ", "RegressionFSII", "UnbiasedKernelSHAP"),
]


@pytest.mark.filterwarnings("ignore:Not all budget is required")
@pytest.mark.parametrize("name", APPROXIMATORS)
def test_approximators_find_shapley_values_of_the_game(shapiq, surrogate, name):
    order = {"max_order": 2} if name == "PermutationSamplingSTII" else {}
    approximator = getattr(shapiq, name)(n=5, random_state=0, **order)
    found = approximator.approximate(budget=4000, game=to_game(surrogate, "u"))
    exact = shapiq.ExactComputer(to_game(surrogate, "u"))(found.index, found.max_order)
    mine = to_interaction_values(surrogate, found.index, found.max_order, "u")
    for i in range(5):
        assert mine[(i,)] == pytest.approx(exact[(i,)], abs=1e-8)  # weights of 1e8 in FSII
        assert found[(i,)] == pytest.approx(mine[(i,)], abs=0.25)


# -- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("interactions", [False, True])
@pytest.mark.parametrize("readout", ["loo", "shapley"])
def test_tables_hold_the_answers(surrogate, readout, interactions):
    xarray, polars = pytest.importorskip("xarray"), pytest.importorskip("polars")
    options = {"readout": readout, "interactions": interactions, "level": 0.9}
    frame, dataset = to_pandas(surrogate, **options), to_xarray(surrogate, **options)
    pd.testing.assert_frame_equal(to_polars(surrogate, **options).to_pandas(), frame)
    ask = surrogate.interactions if interactions else surrogate.attribute
    value, std = ask(readout, return_std=True)
    half = norm.ppf(0.95) * std
    expected = {"value": value, "std": std, "low": value - half, "high": value + half}
    axes = ["task", "other_task", "target"] if interactions else ["task", "target"]
    names = {"task": list("abcde"), "other_task": list("abcde"), "target": ["u", "v"]}
    assert isinstance(dataset, xarray.Dataset) and dataset.attrs == {
        "readout": readout,
        "level": 0.9,
    }
    assert isinstance(to_polars(surrogate), polars.DataFrame)
    assert len(frame) == (10 if interactions else 5) * 2
    for name, table in expected.items():
        assert dataset[name].dims == tuple(axes)
        assert all(dataset[name].indexes[axis].tolist() == names[axis] for axis in axes)
        np.testing.assert_allclose(dataset[name], table, rtol=1e-12)
        for _, row in frame.iterrows():
            cell = dataset[name].sel({axis: row[axis] for axis in axes})
            assert row[name] == float(cell)
    long = dataset.to_dataframe().reset_index()[frame.columns]
    both = frame.merge(long, on=axes, suffixes=("", "_again"))
    assert len(both) == len(frame) and (both["value"] == both["value_again"]).all()


def test_tables_without_intervals_have_none(surrogate):
    table = attribution_table(surrogate, intervals=False)
    assert np.isnan(table["std"]).all() and np.isnan(table["high"]).all()
    assert table["value"] == surrogate.attribute().T.flatten().tolist()


def test_tables_are_sorted_and_cut_by_target(surrogate):
    values = surrogate.attribute("banzhaf")
    for sort, key in [("size", lambda v: -v.abs()), ("value", lambda v: -v)]:
        table = attribution_table(surrogate, "banzhaf", targets=["v", 0], sort=sort, top=2)
        names = np.array(list("abcde"))
        expected = [names[key(values[:, j]).argsort(stable=True)[:2]].tolist() for j in (1, 0)]
        assert table["task"] == [*expected[0], *expected[1]]
        assert table["target"] == list("vvuu")


@pytest.mark.parametrize(
    "options, found",
    [
        ({"readout": "taylor"}, "`readout` must be one of 'loo', 'shapley', 'banzhaf', got 'ta"),
        ({"targets": ["w"]}, "`targets` must be one of 'u', 'v', got 'w'"),
        ({"sort": "name"}, "`sort` must be one of 'size', 'value', 'none', got 'name'"),
        ({"top": 0}, "`top` must be at least 1, got 0"),
        ({"level": 1.0}, "`level` must be strictly between 0 and 1, got 1.0"),
    ],
)
def test_what_no_table_has(surrogate, options, found):
    with pytest.raises(ValueError, match=found):
        attribution_table(surrogate, **options)


@pytest.mark.parametrize("export", [to_pandas, to_polars, to_xarray, to_game])
def test_only_surrogates_are_exported(export):
    with pytest.raises(TypeError, match="`surrogate` must be a surrogate, got ndarray"):
        export(np.zeros((3, 2)))


# -- HuggingFace's data sets, trainers and adapters ---------------------------------------------

VOCABULARY, LENGTH = 17, 6


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture
def sentences():
    """Padded sequences of tokens, a ``datasets.Dataset`` as tokenizers leave it."""
    datasets = pytest.importorskip("datasets")
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCABULARY, (12, LENGTH))
    mask = np.arange(LENGTH) < rng.integers(3, LENGTH + 1, (12, 1))
    columns = {
        "input_ids": np.where(mask, ids, 0).tolist(),
        "attention_mask": mask.astype(int).tolist(),
        "labels": np.where(mask, ids, -100).tolist(),
    }
    return datasets.Dataset.from_dict(columns)


def adapted(transformers, seed=0):
    """A causal language model of 1,000 parameters with adapters of rank 1, nothing downloaded."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 4, "n_layer": 1}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, n_head=2, **tokens))
    adapter = {"task_type": "CAUSAL_LM", "r": 1, "target_modules": ["c_attn"]}
    lora = peft.LoraConfig(**adapter, fan_in_fan_out=True)
    model = peft.get_peft_model(model, lora).double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zeros at first, which would make half the gradients zero
            torch.nn.init.normal_(weight, std=0.1)
    return model


def by_hand(model, data):
    """Log-odds of every sequence and their gradients by what is trained, one sample at a time."""
    model.eval()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    odds, gradients = [], []
    for sample in data:
        one = {name: torch.as_tensor(column)[None] for name, column in sample.items()}
        labels = one.pop("labels")[0, 1:]
        chances = model(**one).logits[0, :-1].log_softmax(-1)
        kept = labels != -100
        right = chances[kept, labels[kept]].sum()
        odds.append(right - torch.log1p(-right.exp()))
        gradient = torch.autograd.grad(odds[-1], trained)
        gradients.append(torch.cat([block.flatten() for block in gradient]))
    return torch.stack(odds).detach(), torch.stack(gradients)


def penalised_loss(z, odds, gradients, ridge):
    """Mean cross-entropy at log-odds ``odds + gradients z``, with its penalty, and its slope."""
    at = odds + gradients @ z
    slope = ridge * z - gradients.T @ expit(-at) / len(at)
    return np.logaddexp(0, -at).mean() + ridge / 2 * z @ z, slope


def test_a_trainers_model_and_data_are_tasks(transformers, sentences, tmp_path):
    steps = {"output_dir": str(tmp_path), "max_steps": 3, "learning_rate": 0.1, "use_cpu": True}
    quiet = {"disable_tqdm": True, "report_to": []}
    quiet |= {"save_strategy": "no", "logging_strategy": "no"}
    options = transformers.TrainingArguments(**steps, **quiet)
    trainer = transformers.Trainer(adapted(transformers), options, train_dataset=sentences)
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    after = trainer.model.named_parameters()
    moved = [name for name, weight in after if (weight != before[name]).any()]
    assert moved == parameter_names(trainer.model) == parameter_names(trainer.model, "*lora_*")

    data = trainer.train_dataset.with_format("torch")
    tasks = [Subset(data, range(3)), data.select(range(3, 7)), data[7:9]]  # a dict of tensors
    estimator = GradientEstimator(
        trainer.model, tasks, data.select(range(9, 12)), ridge=0.3, engine="loop", progress=False
    ).fit()
    odds, gradients = (table.numpy() for table in by_hand(trainer.model, sentences))
    members = [range(3), range(3, 7), range(7, 9)]
    masks = all_subsets(3)
    for mask, score in zip(masks, estimator.predict(masks), strict=True):
        rows = [row for task in mask.nonzero()[:, 0] for row in members[task]]
        z = np.zeros(gradients.shape[1])
        if rows:
            given = odds[rows], gradients[rows], 0.3
            z = minimize(penalised_loss, z, given, jac=True, tol=1e-9).x
        expected = np.logaddexp(0, -(odds[9:] + gradients[9:] @ z)).mean()
        assert float(score[0]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("parameters", [None, "*lora_*"])
@pytest.mark.parametrize("kind", ["dataset", "subset", "tensors", "encoding", "joined"])
def test_gradients_of_adapters_on_any_kind_of_data(transformers, sentences, kind, parameters):
    model, data = adapted(transformers), sentences.with_format("torch")
    given = {
        "dataset": lambda: data,
        "subset": lambda: Subset(data, range(12)),
        "tensors": lambda: data[:],
        "encoding": lambda: transformers.BatchEncoding(data[:]),
        "joined": lambda: ConcatDataset([data.select(range(5)), Subset(data, range(5, 12))]),
    }[kind]()
    options = {"parameters": parameters, "engine": "loop", "progress": False}
    features = collect_features(model, given, log_odds, **options)
    odds, gradients = by_hand(model, sentences)
    torch.testing.assert_close(features.values, odds, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(features.gradients, gradients, rtol=1e-9, atol=1e-9)


def test_sequences_of_their_own_lengths(transformers, sentences):
    """Right padding is never attended to, so that sequences may be as long as they are."""
    model, padded = adapted(transformers), sentences.with_format("torch")
    lengths = padded["attention_mask"][:].sum(1)
    ragged = [
        {name: row[name][:length] for name in ("input_ids", "labels")}
        for row, length in zip(padded, lengths, strict=True)
    ]
    odds, gradients = by_hand(model, sentences)
    features = collect_features(model, ragged, log_odds, batch_size=1, progress=False)
    torch.testing.assert_close(features.values, odds, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(features.gradients, gradients, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="`data` must be samples of one shape, got stack expects"):
        collect_features(model, ragged, log_odds, progress=False)


def test_lists_are_no_tensors(transformers, sentences):
    with pytest.raises(TypeError, match=r"got list in input_ids.*with_format\('torch'\)"):
        collect_features(adapted(transformers), sentences, log_odds, progress=False)
