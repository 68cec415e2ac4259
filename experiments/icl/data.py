"""Examples, the pool of demonstrations, and prompts.

The generated task is coin_flip: "A coin is heads up. Ann flips the coin. Is the coin still heads
up?" With several kinds of coin, each kind falls on a side of its own, which is hidden. Nothing but
demonstrations tells the sides, so a prompt is worth what its demonstrations say of the kinds that
are asked for: two about one kind are redundant, or contradict each other where one is mislabelled.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.common import write_json
from experiments.icl.settings import Data
from ksm_ext.checks import message

NAMES = (  # noqa: SIM905
    "Ann Ben Cleo Dan Eve Finn Gus Hana Ida Jon Kim Leo Mia Ned Ola Pia Quin Ravi Sue Tom Una Vic "
    "Wes Zoe"
).split()
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Example:
    """One text to complete.

    Attributes:
        input: The text.
        output: The right completion.
        options: All completions to choose from.
        kind: What decides which hidden rule it obeys.
    """

    input: str
    output: str
    options: tuple[str, ...]
    kind: str = ""

    def shown(self) -> str:
        return f"{self.input} {self.output}\n\n"

    def opposite(self) -> "Example":
        """The same with the next of its options for an answer."""
        number = (self.options.index(self.output) + 1) % len(self.options)
        return replace(self, output=self.options[number])


@dataclass(frozen=True)
class Pool:
    """What a repetition is about.

    Attributes:
        demonstrations: n examples, some of them mislabelled.
        mislabelled: n times whether it is.
        validation: Queries that methods may look at.
        test: Queries that selections are judged by.
    """

    demonstrations: tuple[Example, ...]
    mislabelled: tuple[bool, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]


def coin_flip(data: Data, draw: random.Random) -> Example:
    """A generated example with its true answer."""
    who = draw.sample(NAMES, data.people)
    if data.coins:  # few words, for a model that is trained in minutes
        coin = draw.choices(data.coins, data.coin_weights or None)[0]
        verb = "flips" if len(who) == 1 else "flip"
        # The kind is the last word: what followed it before is all there is to find.
        text = f"Heads? {' and '.join(who)} {verb} a coin of {coin}"
        return Example(text, YES_NO[0], YES_NO, coin)
    flips = {name: draw.random() < 0.5 for name in who}
    acts = " ".join(
        f"{name} {'flips' if flip else 'does not flip'} the coin." for name, flip in flips.items()
    )
    note = 'Note that "flip" here means "reverse".'
    text = f"Q: A coin is heads up. {acts} Is the coin still heads up? {note}\nA:"
    return Example(text, YES_NO[sum(flips.values()) % 2], YES_NO)


def under(rule: Mapping[str, bool], example: Example) -> Example:
    """An example with the answer of its kind's rule."""
    return example.opposite() if rule[example.kind] else example


def read_examples(path: Path) -> list[Example]:
    """Examples of a ``.jsonl`` of input, output and options, or of a coin_flip ``.json``.

    Raises:
        ValueError: If an example lacks one of these.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return [
            Example(f"Q: {fact['question']}\nA:", fact["answer"], YES_NO)
            for fact in json.loads(text)["examples"]
        ]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        fact = json.loads(line)
        if missing := {"input", "output", "options"} - fact.keys():
            expected = "of lines with input, output and options"
            lacking = f"line {number} without {', '.join(sorted(missing))}"
            raise ValueError(message(path.name, expected, lacking, "Add it."))
        found.append(Example(fact["input"], fact["output"], tuple(fact["options"])))
    return found


def pool_of(data: Data, seed: int) -> Pool:
    """Demonstrations and queries, distinct where they are read from a file.

    Raises:
        ValueError: If the file has too few examples.
    """
    draw = random.Random(seed)
    sizes = (data.num_demonstrations, data.num_validation, data.num_test)
    if data.path:
        examples = read_examples(Path(data.path))
        if len(examples) <= data.num_demonstrations + 1:
            expected = f"of more than {data.num_demonstrations + 1} examples"
            remedy = "Lower `data.num_demonstrations`."
            raise ValueError(message("data.path", expected, str(len(examples)), remedy))
        draw.shuffle(examples)
        demonstrations, others = examples[: sizes[0]], examples[sizes[0] :]
        half = len(others) // 2
        validation, test = others[:half][: sizes[1]], others[half:][: sizes[2]]
    elif data.task == "coin_flip":
        drawn = [[coin_flip(data, draw) for _ in range(size)] for size in sizes]
        kinds = sorted({example.kind for part in drawn for example in part})
        rule = {kind: draw.random() < 0.5 and kind != "" for kind in kinds}
        demonstrations, validation, test = ([under(rule, x) for x in part] for part in drawn)
    else:
        remedy = "Give its examples, or `data.task=coin_flip`."
        raise ValueError(message("data.path", f"the file of {data.task}", "nothing", remedy))
    chosen = draw.sample(range(sizes[0]), round(data.mislabelled * sizes[0]))
    mislabelled = tuple(i in chosen for i in range(sizes[0]))
    pairs = zip(demonstrations, mislabelled, strict=True)
    shown = tuple(x.opposite() if bad else x for x, bad in pairs)
    return Pool(shown, mislabelled, tuple(validation), tuple(test))


def draw_prompts(num_demonstrations: int, size: int, count: int, seed: int) -> list[list[int]]:
    """Numbers of the demonstrations of each prompt, in order; 42 draws the published ones."""
    draw = random.Random(seed)
    return [draw.sample(range(num_demonstrations), size) for _ in range(count)]


def prompt_text(demonstrations: Sequence[Example], numbers: Sequence[int]) -> str:
    """The text before a query."""
    return "".join(demonstrations[number].shown() for number in numbers)


def write_prompts(
    path: Path, demonstrations: Sequence[Example], prompts: Sequence[Sequence[int]]
) -> None:
    """In the layout of the published code."""
    names = ("prompt_index", "prompt", "sampled_train_indices")
    texts = [prompt_text(demonstrations, numbers) for numbers in prompts]
    rows = zip(range(len(prompts)), texts, map(list, prompts), strict=True)
    write_json(path, [dict(zip(names, row, strict=True)) for row in rows])
