import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from experiments.icl.data import (
    Example,
    coin_flip,
    draw_prompts,
    pool_of,
    prompt_text,
    read_examples,
    under,
    write_prompts,
)
from experiments.icl.embedding import estimate, gradients
from experiments.icl.experiment import PROGRAM
from experiments.icl.inference import LanguageModel, Runs, load_model
from experiments.icl.model import train_tokenizer
from experiments.icl.published import judge_published
from experiments.icl.selection import local_search, mean_states
from experiments.icl.settings import SMALL, SMOKE, Data, Model, Published
from experiments.icl.surrogates import (
    Recipe,
    contexts,
    effects,
    exchanges,
    log_odds,
    random_ensemble,
)
from experiments.runner import main

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
DATA = os.environ.get("KSM_EXT_DATA")


@pytest.fixture(scope="module")
def pool():
    return pool_of(replace(SMALL.data, num_demonstrations=8, num_validation=6, num_test=4), 3)


@pytest.fixture(scope="module")
def model(pool):
    """A GPT at its random start, with weights large enough for demonstrations to matter."""
    texts = [x.shown() for x in pool.demonstrations + pool.validation + pool.test]
    return random_model(train_tokenizer(texts, ("yes", "no")))


def random_model(tokenizer):
    torch.manual_seed(0)
    sizes = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
    special = {name: tokenizer.eos_token_id for name in ("bos_token_id", "eos_token_id")}
    config = transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **special)
    return LanguageModel(transformers.GPT2LMHeadModel(config).eval(), tokenizer, 4)


def test_coin_flips_answer_what_their_text_says():
    draw = random.Random(0)
    for example in (coin_flip(Data(), draw) for _ in range(200)):
        flips = example.input.count(" flips the coin.")
        assert flips + example.input.count("does not flip") == 4
        assert example.output == ("yes" if flips % 2 == 0 else "no")


def test_each_kind_falls_on_one_side(pool):
    sides = {}
    clean = [x for x, bad in zip(pool.demonstrations, pool.mislabelled, strict=True) if not bad]
    for example in (*clean, *pool.validation, *pool.test):
        assert example.input.endswith(f" flips a coin of {example.kind}")
        assert sides.setdefault(example.kind, example.output) == example.output
    assert sum(pool.mislabelled) == round(0.2 * 8)
    for example, bad in zip(pool.demonstrations, pool.mislabelled, strict=True):
        assert not bad or sides.get(example.kind) != example.output
    assert under({"gold": True}, Example("x", "yes", ("yes", "no"), "gold")).output == "no"


def test_prompts_are_drawn_and_written_as_published(tmp_path, pool):
    prompts = draw_prompts(50, 4, 200, 42)
    assert prompts[:2] == [[40, 7, 1, 47], [17, 15, 14, 8]] and len(prompts) == 200
    write_prompts(tmp_path / "prompts.json", pool.demonstrations, [[3, 1]])
    (fact,) = json.loads((tmp_path / "prompts.json").read_text())
    assert fact["sampled_train_indices"] == [3, 1] and fact["prompt_index"] == 0
    assert fact["prompt"] == pool.demonstrations[3].shown() + pool.demonstrations[1].shown()


def test_examples_of_a_file(tmp_path):
    path = tmp_path / "some.jsonl"
    facts = [
        {"input": f"Review: {i}", "output": "good", "options": ["good", "bad"]} for i in "abcd"
    ]
    path.write_text("\n".join(map(json.dumps, facts)))
    assert read_examples(path)[2] == Example("Review: c", "good", ("good", "bad"))
    found = pool_of(Data("reviews", str(path), num_demonstrations=2), 0)
    texts = [x.input for x in (*found.demonstrations, *found.validation, *found.test)]
    assert sorted(texts) == [fact["input"] for fact in facts]
    path.write_text('{"input": "x", "output": "y"}')
    with pytest.raises(ValueError, match=r"got line 1 without options. Add it."):
        read_examples(path)
    with pytest.raises(ValueError, match=r"`data\.path` must be the file of reviews"):
        pool_of(Data("reviews"), 0)


def scored(model, text, queries, **flags):
    found = {}
    for batch in model.score(text, queries, **flags):
        found |= batch
    return [found[number] for number in range(len(queries))]


@torch.no_grad()
def test_shared_keys_and_values_change_nothing(model, pool):
    text = prompt_text(pool.demonstrations, [0, 3, 5])
    queries = [*pool.validation, replace(pool.test[0], input="Heads? a coin")]
    shared, alone = (scored(model, text, queries, reuse=reuse) for reuse in (True, False))
    for query, one, other in zip(queries, shared, alone, strict=True):
        ids = torch.tensor([model.tokenizer(text + query.input).input_ids])
        logits = model.model(ids).logits[0, -1]
        first = model.tokenizer.convert_tokens_to_ids(query.options)
        right = query.options.index(query.output)
        loss = cross_entropy(logits[first][None], torch.tensor([right]))
        assert one["loss"] == pytest.approx(float(loss), abs=1e-4)
        assert other["loss"] == pytest.approx(float(loss), abs=1e-4)
        margin = float(logits[first[right]] - logits[first[1 - right]])
        assert one["margin"] == pytest.approx(margin, abs=1e-4)
    assert max(x["loss"] for x in shared) - min(x["loss"] for x in shared) > 0.1


# -- tokens of a prompt and of labels ------------------------------------------------------------

Tokenizer, pre_tokenizers = tokenizers.Tokenizer, tokenizers.pre_tokenizers
TEXT, ASKED = "good film : positive ", "great film :"
WORDS = ("good", "film", ":", "positive", "negative", "great")


def closing(tokenizer, template):
    """With the special tokens of a template around every text."""
    special = [(token, tokenizer.token_to_id(token)) for token in set(template.split()) - {"$A"}]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=special
    )
    return tokenizer


def word_level(template):
    vocabulary = {word: number for number, word in enumerate(["<s>", "</s>", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return closing(tokenizer, template)


def unigram(template="<s> $A", more=()):
    """Words with and without a mark for the space before them, as SentencePiece has them."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *WORDS, *("▁" + word for word in WORDS), *more]
    letters = sorted(set("".join(WORDS)) - set(pieces))
    scored = [(piece, -1.0) for piece in pieces] + [(letter, -9.0) for letter in letters]
    return closing(Tokenizer(tokenizers.models.Unigram(scored, unk_id=0)), template)


def metaspace(scheme, template="<s> $A", more=()):
    tokenizer = unigram(template, more)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def dummy_prefix():
    """As Llama 2: a space before every text, even one that begins with a space."""
    tokenizer, normalizers = unigram(), tokenizers.normalizers
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    return tokenizer


def byte_level(template):
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "positive great", "negative film"] * 3, trainer)
    return closing(tokenizer, template)


def word_piece():
    pieces = ["[CLS]", "[SEP]", "[UNK]", "good", "film", ":", "great", "pos", "neg"]
    pieces += ["##itive", "##ative", "##h"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return closing(tokenizer, "[CLS] $A [SEP]")


PLAIN = "good film : positive great film :"
MARKED = "▁film ▁: ▁positive ▁great ▁film ▁:"
BYTES = "good Ġfilm Ġ: Ġpositive Ġgreat Ġfilm Ġ:"
LABELS = ("positive", "negative")
MARKED_LABELS, BYTE_LABELS = ("▁positive", "▁negative"), ("Ġpositive", "Ġnegative")
# A tokenizer, the tokens of TEXT and ASKED by hand, and those that the options go on with.
TOKENIZERS = {
    "nothing": (word_level("$A"), PLAIN, LABELS),
    "BOS": (word_level("<s> $A"), "<s> " + PLAIN, LABELS),
    "BOS twice": (word_level("<s> <s> $A"), "<s> <s> " + PLAIN, LABELS),
    "EOS": (word_level("$A </s>"), PLAIN, LABELS),
    "BOS and EOS": (word_level("<s> $A </s>"), "<s> " + PLAIN, LABELS),
    "EOS twice": (word_level("<s> $A </s> </s>"), "<s> " + PLAIN, LABELS),
    "Metaspace never": (metaspace("never"), "<s> good " + MARKED, MARKED_LABELS),
    "Metaspace first": (metaspace("first"), "<s> ▁good " + MARKED, MARKED_LABELS),
    "Metaspace always": (metaspace("always", "<s> $A </s>"), "<s> ▁good " + MARKED, MARKED_LABELS),
    "dummy prefix": (dummy_prefix(), "<s> ▁good " + MARKED, MARKED_LABELS),
    "a label joined to the prompt": (
        metaspace("never", more=("▁:▁positive", "▁:▁negative")),
        "<s> good ▁film ▁:▁positive ▁great ▁film",
        ("▁:▁positive", "▁:▁negative"),
    ),
    "byte-level BPE": (byte_level("$A"), BYTES, BYTE_LABELS),
    "byte-level BPE, BOS and EOS": (byte_level("<s> $A </s>"), "<s> " + BYTES, BYTE_LABELS),
    "WordPiece": (word_piece(), "[CLS] good film : pos ##itive great film :", ("pos", "neg")),
}


def with_tokenizer(tokenizer, **special):
    return random_model(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special))


@torch.no_grad()
def loss_by_hand(model, prompt, labels, right):
    """Of the right label among some, by log-probabilities after a prompt of given tokens."""
    ids, labels = map(model.tokenizer.convert_tokens_to_ids, (prompt.split(), labels))
    assert None not in [*ids, *labels]
    logs = model.model(torch.tensor([ids])).logits[0, -1].log_softmax(0)[labels]
    return float(logs.logsumexp(0) - logs[right])


@pytest.mark.parametrize(("tokenizer", "prompt", "labels"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_labels_follow_the_prompt_in_the_tokens_of_any_tokenizer(tokenizer, prompt, labels):
    model = with_tokenizer(tokenizer)
    queries = [Example(ASKED, label, LABELS) for label in LABELS]
    for reuse in (True, False):
        for right, found in enumerate(scored(model, TEXT, queries, reuse=reuse)):
            wanted = loss_by_hand(model, prompt, labels, right)
            assert found["loss"] == pytest.approx(wanted, abs=1e-5)


@given(
    special=st.tuples(*[st.lists(st.sampled_from(["<s>", "</s>"]), max_size=3)] * 2),
    text=st.lists(st.sampled_from(WORDS), max_size=6),
    asked=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3),
    options=st.permutations(WORDS),
    right=st.integers(0, 2),
)
@settings(derandomize=True, deadline=None, database=None, max_examples=30)
def test_whatever_opens_and_closes_a_text(special, text, asked, options, right):
    before, after = special
    model = with_tokenizer(word_level(" ".join([*before, "$A", *after])))
    query = Example(" ".join(asked), options[right], tuple(options[:3]))
    (found,) = scored(model, "".join(f"{word} " for word in text), [query])
    wanted = loss_by_hand(model, " ".join([*before, *text, *asked]), options[:3], right)
    assert found["loss"] == pytest.approx(wanted, abs=1e-5)


def test_special_tokens_of_the_text_itself_are_read():
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    model = with_tokenizer(word_level("<s> $A </s>"), **special)
    query = Example(ASKED, "positive", LABELS)
    (found,) = scored(model, "<s> good film </s> ", [query])
    wanted = loss_by_hand(model, "<s> <s> good film </s> great film :", LABELS, 0)
    assert found["loss"] == pytest.approx(wanted, abs=1e-5)


def test_labels_that_begin_alike_are_told_apart_where_they_differ():
    model = with_tokenizer(word_piece())
    (found,) = scored(model, "good film : ", [Example("great :", "posh", ("positive", "posh"))])
    wanted = loss_by_hand(model, "[CLS] good film : great : pos", ("##itive", "##h"), 1)
    assert found["loss"] == pytest.approx(wanted, abs=1e-5)


def test_texts_without_tokens_are_refused():
    model = with_tokenizer(word_level("<s> $A </s>"))
    with pytest.raises(ValueError, match="`text` must be of one token or more, got ''"):
        model.tokens("")
    alone = with_tokenizer(word_level("$A"))
    (found,) = scored(alone, "", [Example("", "positive", LABELS)])
    assert "`prompt` must be of one token or more before its options part" in found["error"]


def test_gradients_follow_the_opening_tokens():
    model = with_tokenizer(word_level("<s> <s> $A </s>"))
    ids = model.tokenizer.convert_tokens_to_ids
    shown = ("good film : positive", "great film : negative")
    slots = torch.tensor([ids(text.split()) for text in shown])
    query = Example(ASKED, "negative", LABELS)
    slope = gradients(model, slots, [query])[0]
    table = model.model.get_input_embeddings().weight
    before = table[slots].detach().requires_grad_()
    opening, tail = (table[ids(text.split())] for text in ("<s> <s>", ASKED))
    inputs = torch.cat([opening, before.flatten(0, 1), tail])[None]
    right, wrong = model.model(inputs_embeds=inputs).logits[0, -1, ids(list(LABELS))].flip(0)
    (expected,) = torch.autograd.grad(right - wrong, before)
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_similarities_are_those_of_the_text_alone():
    model = with_tokenizer(word_level("<s> <s> $A </s>"))
    found = mean_states(model, [Example(ASKED, "positive", LABELS)])[0]
    ids = torch.tensor([model.tokenizer.convert_tokens_to_ids(["<s>", "<s>", *ASKED.split()])])
    states = model.model(ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(found, states[0, 2:].mean(0))


def test_a_failing_query_is_recorded_and_the_others_run(model, pool, tmp_path):
    lost = replace(pool.validation[0], output="maybe")
    long = replace(pool.validation[1], input="Q: " + "coin " * 200)
    runs = Runs(model, pool.demonstrations, [lost, long, pool.validation[2]], tmp_path / "a", {})
    losses = runs.losses([[0, 1]])
    assert losses.isnan().tolist() == [[True, True, False]]
    reasons = {record["query"]: record["error"] for record in runs.failures()}
    assert "`output` must be one of yes, no, got 'maybe'" in reasons[0]
    assert "`prompt` must be of at most 128 tokens" in reasons[1]
    again = Runs(model, pool.demonstrations, runs.queries, tmp_path / "a", {})
    assert torch.equal(again.losses([[0, 1]]).isnan(), losses.isnan())
    assert len((tmp_path / "a").read_text().splitlines()) == 4  # settings and three queries
    same = replace(pool.validation[0], options=("yes", "yes no"), output="yes")
    assert "of different first tokens" in scored(model, "", [same])[0]["error"]


def test_results_of_other_settings_are_refused(model, pool, tmp_path):
    Runs(model, pool.demonstrations, pool.validation, tmp_path / "a", {"seed": 1})
    with pytest.raises(ValueError, match="must be results of these settings"):
        Runs(model, pool.demonstrations, pool.validation, tmp_path / "a", {"seed": 2})


def test_a_line_that_was_cut_short_is_run_again(model, pool, tmp_path):
    path = tmp_path / "a.jsonl"
    first = Runs(model, pool.demonstrations, pool.validation, path, {}).losses([[0, 1]])
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    again = Runs(model, pool.demonstrations, pool.validation, path, {}).losses([[0, 1]])
    torch.testing.assert_close(again, first, rtol=0, atol=1e-5)  # alone, not in its batch
    assert path.read_bytes().count(b"\n") == content.count(b"\n")


KILLED = """
import sys, time
from pathlib import Path
from experiments.icl.data import draw_prompts, pool_of
from experiments.icl.inference import LanguageModel, Runs, load_model
from experiments.icl.settings import SMOKE, Model

folder, path, pause = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
pool = pool_of(SMOKE.data, 3)
runs = Runs(load_model(Model(), folder, 4), pool.demonstrations, pool.validation, path, {})
for prompt in draw_prompts(12, 3, 12, 42):
    runs.losses([prompt])
    time.sleep(pause)
"""


def test_a_killed_inference_continues_where_it_was(tmp_path):
    pool = pool_of(SMOKE.data, 3)
    texts = [x.shown() for x in pool.demonstrations + pool.validation]
    saved = random_model(train_tokenizer(texts, ("yes", "no")))
    saved.model.save_pretrained(tmp_path / "model")
    saved.tokenizer.save_pretrained(tmp_path / "model")
    path, prompts = tmp_path / "killed.jsonl", draw_prompts(12, 3, 12, 42)
    arguments = [sys.executable, "-c", KILLED, str(tmp_path / "model"), str(path), "0.3"]
    process = subprocess.Popen(arguments, cwd=Path(__file__).parent.parent.parent)
    deadline = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < 40:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()
    assert before.count(b"\n") < 1 + 12 * 16
    model = load_model(Model(), tmp_path / "model", 4)
    runs = Runs(model, pool.demonstrations, pool.validation, path, {})
    after = runs.losses(prompts)
    assert path.read_bytes().startswith(before[: before.rfind(b"\n") + 1])  # nothing lost
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    keys = [(tuple(record["prompt"]), record["query"]) for record in records]
    assert len(keys) == len(set(keys)) == 12 * 16  # nothing repeated
    whole = Runs(model, pool.demonstrations, pool.validation, tmp_path / "whole.jsonl", {})
    torch.testing.assert_close(after, whole.losses(prompts), rtol=0, atol=1e-5)


def test_four_bit_says_what_is_missing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=r"`model\.four_bit` must be False without"):
        load_model(Model("some", four_bit=True), tmp_path, 4)


def test_gradients_are_the_slopes_of_the_log_odds(model, pool):
    rows = [
        model.tokenizer(x.shown(), add_special_tokens=False).input_ids for x in pool.demonstrations
    ]
    slots = torch.tensor([rows[0], rows[1]])
    slopes = gradients(model, slots, pool.validation[:3])
    query, direction = pool.validation[1], torch.randn(2, slots.shape[1], 32)

    def odds(step):
        table = model.model.get_input_embeddings()
        tail = table(torch.tensor(model.tokenizer(query.input).input_ids))
        inputs = torch.cat([(table(slots) + step * direction).flatten(0, 1), tail])[None]
        with torch.no_grad():
            logits = model.model(inputs_embeds=inputs).logits[0, -1]
        first = model.tokenizer.convert_tokens_to_ids(query.options)
        right = query.options.index(query.output)
        return float(logits[first[right]] - logits[first[1 - right]])

    slope = (odds(1e-3) - odds(-1e-3)) / 2e-3
    assert slope == pytest.approx(float((slopes[1] * direction).sum()), rel=2e-2, abs=1e-3)


def test_an_estimate_at_an_anchor_is_its_loss(model, pool, tmp_path):
    anchors = torch.tensor(draw_prompts(8, 3, 4, 0))
    runs = Runs(model, pool.demonstrations, pool.validation, tmp_path / "a", {})
    losses = runs.losses(anchors.tolist())
    made = estimate(runs, anchors, losses)
    near = replace(made, nearest=1)
    torch.testing.assert_close(near.losses(anchors), losses, rtol=1e-4, atol=1e-5)
    assert made.losses(torch.tensor([[0, 1, 2], [5, 6, 7]])).shape == (2, 6)


def test_log_odds_and_losses_are_inverse():
    losses = torch.tensor([1e-6, 0.1, 0.693, 5.0], dtype=torch.float64)
    torch.testing.assert_close(torch.log1p(torch.exp(-log_odds(losses))), losses)


PLACES = torch.tensor([[2.0], [1.0], [1.0]], dtype=torch.float64)


def made_up():
    """Losses of demonstrations that add up in log-odds, the first of them twice as much."""
    random = torch.Generator().manual_seed(0)
    prompts = torch.tensor(draw_prompts(12, 3, 150, 0))
    worth = torch.randn(12, 2, dtype=torch.float64, generator=random)
    odds = (worth[prompts] * PLACES).sum(1)
    return prompts, torch.log1p(torch.exp(-odds)), worth


def test_position_matters_to_the_surrogates_that_know_it():
    prompts, losses, _ = made_up()
    errors = {}
    for order in ("set", "ratio", "position"):
        recipe = Recipe("linear", order, log_odds=True, ratio=2.0)
        said = recipe.fit(prompts[:100], losses[:100], 12)(prompts[100:])
        errors[order] = float((said - losses[100:]).square().mean())
    assert errors["position"] < 0.1 * errors["set"]
    assert errors["ratio"] < errors["set"]
    masks = Recipe("rbf").features(prompts, 12)
    assert masks.dtype == torch.bool and masks.sum(1).tolist() == [3] * 150


def test_search_finds_the_best_prompt():
    prompts, _, worth = made_up()

    best = local_search(lambda x: -(worth[x] * PLACES).sum(1), prompts[:3], 12)[0]
    order = worth.mean(1).argsort(descending=True).tolist()
    assert best[0] == order[0] and set(best) == set(order[:3])


def test_effects_are_differences_of_prompts_with_and_without():
    others = contexts(10, 3, 4, 0)
    assert len(set(others.flatten().tolist())) == 8  # contexts share no demonstration
    prompts, which = exchanges(others, 10, 0)
    assert bool((prompts == which[:, None]).any(1).all())
    assert prompts.shape == (4 * 8, 3)
    worth = torch.randn(10, 1, dtype=torch.float64)
    losses = worth[prompts].sum(1)
    found = effects(losses, which, 10, 4)
    for number in range(10):
        rest = [set(range(10)) - set(x) for x in others.tolist() if number not in x]
        differences = [worth[number] - worth[sorted(numbers)].mean(0) for numbers in rest]
        torch.testing.assert_close(found[number], torch.stack(differences).mean(0))


def test_the_random_ensemble_is_a_mean_over_prompts():
    prompts, losses, _ = made_up()
    found = random_ensemble(prompts, losses, 12)
    has = (prompts == 7).any(1)
    torch.testing.assert_close(found[7], losses[has].mean(0) - losses.mean(0))


def test_published_scores_are_predicted():
    if not DATA:
        pytest.skip("KSM_EXT_DATA does not name the folder of the data")
    folder = str(Path(DATA) / "kernel_surrogate_models")
    recipes = ("kernel surrogate", "ridge")
    found = judge_published(Published(folder, num_permutations=2), recipes)
    means = {name: sum(found[name]["spearman"]) / 2 for name in recipes}
    assert means["kernel surrogate"] > 0.585 and means["kernel surrogate"] > means["ridge"]


@pytest.mark.slow
def test_smoke_run_end_to_end_and_again(tmp_path, capsys):
    assert main(PROGRAM, ["run", "--preset", "smoke", "--output", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["name"] for row in rows} >= {"kernel surrogate", "ridge", "random ensemble"}
    first = (tmp_path / "selection.md").read_text()
    for name in ("linear_and_kernel", "sample_complexity", "attributions_and_truth", "selection"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    lines = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    assert main(PROGRAM, ["run", "--preset", "smoke", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "selection.md").read_text() == first
    assert {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()} == lines
