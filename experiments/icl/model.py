"""A small GPT, trained here on the task's own text where no pretrained model can be had.

Every training prompt obeys rules of its own, shown by demonstrations of which some are wrong, and
the model learns to answer each example from those before it. So it must learn in context, and what
a demonstration says matters.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.common import one_thread, write_json
from experiments.experiment import Run
from experiments.icl.data import Example, coin_flip, read_examples, under
from experiments.icl.settings import PromptSettings
from experiments.settings import as_dict
from ksm_ext.checks import message

CONTEXT = 512
NUM_TEXTS = 2000
MOST_KINDS = 4
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}


def train(run: Run) -> None:
    """Train a small GPT on the task's text, unless a model is named.

    Raises:
        ValueError: If the one on disk was trained with other settings.
    """
    folder, mark = run.output / "model", run.output / "model" / "trained.json"
    if run.settings.model.name:
        return
    facts = as_dict(run.settings)
    facts = {"data": facts["data"], "model": facts["model"], "size": run.settings.prompts.size}
    if mark.exists():
        if json.loads(mark.read_text())["settings"] != facts:
            expected, remedy = "a model of these settings", "Give another --output, or remove it."
            raise ValueError(message(str(folder), expected, "one of others", remedy))
        return
    print("No pretrained model is named (`model.name`): a small GPT is trained here.", flush=True)
    start = perf_counter()
    with one_thread():
        losses = train_model(run.settings, folder)
    seconds = perf_counter() - start
    print(f"{seconds:.0f} s; loss after 0, 1, … demonstrations: {losses}", flush=True)
    write_json(mark, {"settings": facts, "seconds": seconds, "loss by demonstrations": losses})


def train_model(settings: PromptSettings, folder: Path) -> str:
    """Train the GPT, and keep it with its tokenizer as `transformers` does.

    Returns:
        Its last losses, after 0, 1, … demonstrations.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    data, made = settings.data, settings.model
    draw = random.Random(made.seed)
    if data.path:
        examples = read_examples(Path(data.path))
    else:  # kinds are equally frequent while it learns
        equal = replace(data, coin_weights=())
        examples = [coin_flip(equal, draw) for _ in range(NUM_TEXTS)]
    tokenizer = train_tokenizer([example.shown() for example in examples], examples[0].options)
    config = GPTNeoXConfig(  # rotary: what precedes what is learned once for all places
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        hidden_size=made.width,
        intermediate_size=4 * made.width,
        num_hidden_layers=made.num_layers,
        num_attention_heads=made.num_heads,
        rotary_pct=1.0,
        hidden_act="relu",
        use_parallel_residual=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(made.seed)
        model = GPTNeoXForCausalLM(config)
    losses = _train(model, tokenizer, examples, settings, draw)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def train_tokenizer(texts: Sequence[str], options: Sequence[str]) -> Any:
    """Words and signs, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=list(SPECIAL.values()), vocab_size=20_000)
    tokenizer.train_from_iterator(chain(texts, options), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=CONTEXT, padding_side="right", **SPECIAL
    )


def _train(
    model: Any,
    tokenizer: Any,
    examples: list[Example],
    settings: PromptSettings,
    draw: random.Random,
) -> str:
    made = settings.model

    def coded(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    tokens = {x.input: coded(x.input) for x in examples}
    options = {option for example in examples for option in example.options}
    answers = {option: coded(f" {option}") for option in options}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=made.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, made.learning_rate, total_steps=made.num_steps, pct_start=0.1
    )
    by_kind: dict[str, list[Example]] = {}
    for example in examples:
        by_kind.setdefault(example.kind, []).append(example)
    running = torch.full((settings.prompts.size + 1,), float("nan"))
    steps = tqdm(range(made.num_steps), "train-model", mininterval=10)
    for step in steps:
        batch = [
            _prompt(by_kind, settings.prompts.size + 1, made.noise, draw, tokens, answers)
            for _ in range(made.batch_size)
        ]
        rows, ends, firsts = zip(*batch, strict=True)
        inputs, _ = padded(rows, tokenizer.pad_token_id)
        places, labels = torch.tensor(ends), torch.tensor(firsts)
        hidden = model.base_model(inputs, use_cache=False).last_hidden_state
        at = hidden[torch.arange(len(inputs))[:, None], places]  # (b, k + 1, width)
        losses = cross_entropy(
            model.get_output_embeddings()(at).flatten(0, 1), labels.flatten(), reduction="none"
        )
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        by_shots = losses.detach().view(labels.shape).mean(0)
        running = by_shots if step == 0 else 0.95 * running + 0.05 * by_shots
        if (step + 1) % 100 == 0:
            steps.write(f"step {step + 1}: loss after 0, 1, … demonstrations {spelled(running)}")
    return spelled(running)


def _prompt(
    by_kind: Mapping[str, Sequence[Example]],
    length: int,
    noise: float,
    draw: random.Random,
    tokens: Mapping[str, list[int]],
    answers: Mapping[str, list[int]],
) -> tuple[list[int], list[int], list[int]]:
    """Tokens, where answers are due, and the first tokens of the right ones.

    A prompt is about few kinds, so that most examples have another of their kind before them, and
    every other kind answers by the opposite, so that a majority of all answers tells nothing.
    """
    kinds = draw.sample(list(by_kind), min(draw.randint(1, MOST_KINDS), len(by_kind)))
    examples = [draw.choice(by_kind[draw.choice(kinds)]) for _ in range(length)]
    first = draw.random() < 0.5
    rule = {kind: (number % 2 == 0) == first for number, kind in enumerate(kinds)}
    ids: list[int] = []
    places, labels = [], []
    for example in examples:
        right = under(rule, example)
        shown = right.opposite() if draw.random() < noise else right
        ids += tokens[example.input]
        places.append(len(ids) - 1)
        labels.append(answers[right.output][0])
        ids += answers[shown.output]
    return ids, places, labels


def padded(rows: Sequence[list[int]], pad: int, device: Any = None) -> tuple[Tensor, Tensor]:
    """Tokens (b, l) filled up on the right, and where they are real."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, (torch.arange(longest, device=device) < lengths[:, None]).long()


def spelled(losses: Tensor) -> str:
    """Such as ``0.693 0.512``."""
    return " ".join(f"{loss:.3f}" for loss in losses.tolist())
