"""Losses of queries under prompts, by any causal language model of `transformers`.

The loss of a query is the cross-entropy over the first tokens in which its options differ, and its
margin the log-probability of the right one less that of the best other. Tokens are those of prompt
and option as one text, since what a tokenizer makes of a label depends on what precedes it. The
special tokens that it opens a text with (BOS) are read; those that it closes a text with (EOS, SEP)
are not, since the option follows. All queries of a prompt begin with the same tokens: these are run
once, and their keys and values serve every batch of queries.

Results are lines of JSON, one for each prompt and query. What is on disk is not run again; a query
that fails is a line with its reason.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.common import one_thread
from experiments.experiment import Run
from experiments.icl.data import Example, prompt_text
from experiments.icl.model import padded, train
from experiments.icl.settings import Model
from ksm_ext.checks import message


@dataclass(frozen=True)
class Prompt:
    """What the model reads before an option.

    Attributes:
        ids: Tokens up to where the options part.
        opening: How many of them are special and come before the text.
        first: Next token of each option.
        right: The number of the right option.
    """

    ids: list[int]
    opening: int
    first: list[int]
    right: int


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        model: A causal language model of `transformers`.
        tokenizer: The tokenizer that goes with it.
        batch_size: Queries in a forward pass.
    """

    model: Any
    tokenizer: Any
    batch_size: int

    @property
    def context(self) -> int:
        """The most tokens that it reads."""
        most = getattr(self.model.config, "max_position_embeddings", None)
        return int(self.tokenizer.model_max_length if most is None else most)

    @property
    def is_small(self) -> bool:
        """Whether a second thread would cost more than it gains."""
        return bool(self.model.num_parameters() < 10_000_000)

    @property
    def pad(self) -> int:
        """A token to fill up with."""
        special = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        size = self.model.get_input_embeddings().weight.shape[0]
        # A tokenizer may have none, or one beyond the model's vocabulary.
        return next((int(token) for token in special if token is not None and token < size), 0)

    def tokens(self, text: str) -> tuple[list[int], int]:
        """A text's tokens, and how many special ones open it; those that close it are left out.

        Raises:
            ValueError: If the text has no tokens of its own.
        """
        coded = self.tokenizer(text, return_special_tokens_mask=True)
        special = coded.special_tokens_mask
        if 0 not in special:
            remedy = "Give words that the tokenizer knows."
            raise ValueError(message("text", "of one token or more", repr(text), remedy))
        return coded.input_ids[: len(special) - special[::-1].index(0)], special.index(0)

    def prompt(self, text: str, query: Example) -> Prompt:
        """What is read of a query after a text.

        Raises:
            ValueError: If the output is none of the options, two go on alike, or there are more
                tokens than the model reads.
        """
        if query.output not in query.options:
            expected, remedy = f"one of {', '.join(query.options)}", "Add it to the options."
            raise ValueError(message("output", expected, repr(query.output), remedy))
        read = [self.tokens(f"{text}{query.input} {option}") for option in query.options]
        rows = [ids for ids, _ in read]
        shared = _shared(rows)
        first = [ids[shared] for ids in rows]
        if not shared:
            expected = "of one token or more before its options part"
            raise ValueError(message("prompt", expected, "none", "Give the query an input."))
        if len(set(first)) < len(first):
            found = ", ".join(query.options)
            expected = "of different first tokens"
            raise ValueError(message("options", expected, found, "Choose other words."))
        if shared > self.context:
            expected, remedy = f"of at most {self.context} tokens", "Use fewer demonstrations."
            raise ValueError(message("prompt", expected, str(shared), remedy))
        return Prompt(rows[0][:shared], read[0][1], first, query.options.index(query.output))

    def score(
        self, text: str, queries: Sequence[Example], *, reuse: bool = True
    ) -> Iterator[dict[int, dict[str, Any]]]:
        """``loss`` and ``margin`` of each query after a text, or the ``error`` that kept it.

        Args:
            text: Demonstrations.
            queries: What follows, one at a time.
            reuse: Run what they share once.

        Yields:
            Batch by batch, results by the number of the query.
        """
        failed: dict[int, dict[str, Any]] = {}
        ready: list[tuple[int, Prompt]] = []
        for number, query in enumerate(queries):
            try:
                ready.append((number, self.prompt(text, query)))
            except ValueError as error:
                failed[number] = {"error": str(error)}
        if failed:
            yield failed
        shared = _shared([prompt.ids for _, prompt in ready]) if reuse and len(ready) > 1 else 0
        prefix = self._prefix(ready[0][1].ids[:shared]) if shared else None
        ready.sort(key=lambda item: len(item[1].ids))  # little padding
        for start in range(0, len(ready), self.batch_size):
            batch = ready[start : start + self.batch_size]
            last = self._last_logits([prompt.ids for _, prompt in batch], shared, prefix)
            yield {
                number: _result(logits[prompt.first].log_softmax(0), prompt.right)
                for logits, (number, prompt) in zip(last, batch, strict=True)
            }

    def _keeping(self, cache: Any) -> dict[str, Any]:
        """Keyword arguments to fill a cache; `transformers` renames it in 5.40."""
        named = "cache" in signature(self.model.forward).parameters
        return {"cache" if named else "past_key_values": cache, "use_cache": True}

    @torch.inference_mode()
    def _prefix(self, ids: list[int]) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        inputs = torch.tensor([ids], device=self.model.device)
        self.model(inputs, **self._keeping(cache))
        return cache

    @torch.inference_mode()
    def _last_logits(self, rows: list[list[int]], shared: int, prefix: Any) -> Tensor:
        """Logits (b, vocabulary) after the last token of each row."""
        tails = [row[shared:] for row in rows]
        inputs, mask = padded(tails, self.pad, self.model.device)
        places = torch.arange(inputs.shape[1], device=inputs.device) + shared
        cached = {"use_cache": False}
        if prefix is not None:
            cached = self._keeping(_repeated(prefix, len(rows), self.model.config))
            mask = torch.cat([mask.new_ones(len(rows), shared), mask], dim=1)
        logits = self.model(
            inputs, attention_mask=mask, position_ids=places.expand(len(rows), -1), **cached
        ).logits
        ends = torch.tensor([len(tail) - 1 for tail in tails])
        return logits[torch.arange(len(rows)), ends].float().cpu()


def _result(logs: Tensor, right: int) -> dict[str, float]:
    others = torch.cat([logs[:right], logs[right + 1 :]])
    return {"loss": -float(logs[right]), "margin": float(logs[right] - others.max())}


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with; each keeps one of its own."""
    low, high = min(rows), max(rows)  # in the order of the dictionary, all others lie between
    most = min(map(len, rows)) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def _repeated(prefix: Any, count: int, config: Any) -> Any:
    """Keys and values of one prompt for ``count`` rows, its own left as they are."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    for number, layer in enumerate(prefix.layers):
        rows = (part.expand(count, -1, -1, -1) for part in (layer.keys, layer.values))
        cache.update(*rows, number)
    return cache


def load_model(settings: Model, folder: Path, batch_size: int) -> LanguageModel:
    """The model of the settings, or the one that was trained in ``folder``.

    Raises:
        RuntimeError: If it is wanted in 4 bit and ``bitsandbytes`` or a GPU is missing.
        OSError: If there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, options = settings.name or str(folder), {}
    if settings.four_bit:
        if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
            lacking = "no GPU" if find_spec("bitsandbytes") else "no bitsandbytes"
            expected = "False without bitsandbytes and a GPU"
            remedy = "Run `pip install bitsandbytes` on a machine with a GPU, or turn it off."
            raise RuntimeError(message("model.four_bit", expected, f"True with {lacking}", remedy))
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(name, **options).eval()
    if torch.cuda.is_available() and not settings.four_bit:
        model.to("cuda")
    return LanguageModel(model, AutoTokenizer.from_pretrained(name), batch_size)


# -- results on disk ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Runs:
    """Prompts of one pool, run on the same queries.

    Attributes:
        model: What runs them.
        demonstrations: n examples.
        queries: t of them.
        path: A file of JSON lines.
        facts: What the results depend on beside prompt and query.
    """

    model: LanguageModel
    demonstrations: Sequence[Example]
    queries: Sequence[Example]
    path: Path
    facts: Any
    _records: dict[tuple[tuple[int, ...], int], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what is there.

        Raises:
            ValueError: If it was made with other settings.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        facts = json.loads(json.dumps(self.facts))
        lines = _whole_lines(self.path)
        if not lines:
            self._append([{"settings": facts}])
            return
        if lines[0]["settings"] != facts:
            expected, found = "results of these settings", "those of others"
            remedy = "Give another --output, or remove the file."
            raise ValueError(message(str(self.path), expected, found, remedy))
        self._remember(lines[1:])

    def run(self, prompts: Iterable[Sequence[int]]) -> None:
        """Run what is missing of some prompts, batch by batch to the disk."""
        with one_thread() if self.model.is_small else nullcontext():
            for prompt in dict.fromkeys(map(tuple, prompts)):
                missing = [i for i in range(len(self.queries)) if (prompt, i) not in self._records]
                text = prompt_text(self.demonstrations, prompt)
                for found in self.model.score(text, [self.queries[i] for i in missing]):
                    pairs = ({"query": missing[i]} | result for i, result in found.items())
                    records = [{"prompt": list(prompt)} | pair for pair in pairs]
                    self._append(records)
                    self._remember(records)

    def losses(self, prompts: Sequence[Sequence[int]], what: str = "loss") -> Tensor:
        """(m, t) float64 of some prompts, run where they are missing; NaN where they failed."""
        self.run(prompts)
        keys = [[(tuple(prompt), i) for i in range(len(self.queries))] for prompt in prompts]
        found = [[self._records[key].get(what, float("nan")) for key in row] for row in keys]
        return torch.tensor(found, dtype=torch.float64)

    def whole(self, prompts: Sequence[Sequence[int]]) -> "Runs":
        """These, or where queries failed, those of the others that run under all the prompts."""
        fine = (~self.losses(prompts).isnan().any(0)).tolist()
        if all(fine):
            return self
        queries = [query for query, kept in zip(self.queries, fine, strict=True) if kept]
        path = self.path.with_name(f"{self.path.stem}-whole.jsonl")
        return Runs(self.model, self.demonstrations, queries, path, self.facts)

    def failures(self) -> list[dict[str, Any]]:
        return [record for record in self._records.values() if "error" in record]

    def _remember(self, records: Sequence[dict[str, Any]]) -> None:
        for record in records:
            self._records[tuple(record["prompt"]), record["query"]] = record

    def _append(self, records: Sequence[dict[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


@lru_cache(maxsize=1)  # of the run in hand
def model_of(run: Run) -> LanguageModel:
    """The language model; trained first where none is named."""
    train(run)
    return load_model(run.settings.model, run.output / "model", run.settings.prompts.batch_size)


def runs_of(run: Run, repetition: int, part: str = "validation") -> Runs:
    """What has been run on the queries of a part, ``"validation"`` or ``"test"``."""
    pool, settings = run.experiment.pool(repetition), run.settings
    facts = {"data": asdict(settings.data), "model": asdict(settings.model)}
    return Runs(
        model_of(run),
        pool.demonstrations,
        getattr(pool, part),
        run.output / "runs" / f"repetition{repetition}-{part}.jsonl",
        facts | {"part": part, "repetition": repetition, "size": settings.prompts.size},
    )


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a file, of which a line that a kill has cut short is taken away."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return [json.loads(line) for line in whole.splitlines()]
