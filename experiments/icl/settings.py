"""Settings of in-context learning: its examples, its language model, its prompts, its presets."""

from dataclasses import dataclass, field, replace

from experiments.settings import Section, Settings
from ksm_ext.checks import message


@dataclass(frozen=True)
class Data(Section):
    """The examples of which demonstrations and queries are drawn.

    Attributes:
        task: ``"coin_flip"`` is generated; any other name is that of a file.
        path: A ``.jsonl`` of ``input``, ``output`` and ``options``, or the published
            ``coin_flip.json``; empty for generated examples.
        people: Who may flip a generated coin, one after the other.
        coins: Kinds of coin. Each kind falls on a hidden side of its own, which only demonstrations
            tell; without any, the text and the answers are the published ones.
        coin_weights: How often each kind is asked for and demonstrated.
        num_demonstrations: n.
        num_validation: Queries that methods may look at.
        num_test: Queries that selections are judged by.
        mislabelled: Share of demonstrations with the wrong answer.
    """

    task: str = "coin_flip"
    path: str = ""
    people: int = 4
    coins: tuple[str, ...] = ()
    coin_weights: tuple[float, ...] = ()
    num_demonstrations: int = 50
    num_validation: int = 400
    num_test: int = 400
    mislabelled: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.coin_weights) not in (0, len(self.coins)):
            found = f"{len(self.coin_weights)} for {len(self.coins)}"
            remedy = "Give one weight per kind, or none."
            raise ValueError(message("coin_weights", "as many as `coins`", found, remedy))


@dataclass(frozen=True)
class Model(Section):
    """The language model.

    Attributes:
        name: A folder or hub name of a causal language model; empty trains a small GPT.
        four_bit: Load it in 4 bit (nf4), which needs ``bitsandbytes`` and a GPU.
        width: Width of the GPT that is trained here.
        num_layers: Layers of the GPT.
        num_heads: Attention heads of a layer.
        learning_rate: The highest of its training.
        batch_size: Prompts in a step.
        num_steps: Steps of its training.
        noise: Share of wrong answers among the demonstrations it is trained on.
        seed: Draws its first weights and its training prompts.
    """

    name: str = ""
    four_bit: bool = False
    width: int = 64
    num_layers: int = 2
    num_heads: int = 4
    learning_rate: float = 2e-3
    batch_size: int = 64
    num_steps: int = 2500
    noise: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Prompts(Section):
    """Which prompts are run.

    Attributes:
        size: k demonstrations in each.
        count: m.
        seed: Draws them, and with the number of the repetition everything else.
        batch_size: Queries in a forward pass.
        num_folds: Surrogates are fitted to the others and judged on each fold in turn.
        loo_groups: Independent measurements of the leave-one-out effects.
        loo_contexts: Contexts in each, which share no demonstration.
    """

    size: int = 4
    count: int = 200
    seed: int = 42
    batch_size: int = 128
    num_folds: int = 5
    loo_groups: int = 4
    loo_contexts: int = 12


@dataclass(frozen=True)
class Methods(Section):
    """What the methods are given.

    Attributes:
        num_anchors: Prompts at which gradients are taken.
        num_estimated: Prompts whose losses are estimated from them.
        num_orders: Orders over which a selected set is averaged.
        num_random: Random sets for the baseline.
        num_rounds: Rounds of the guided surrogate.
        guided_share: Share of its prompts that it spends on them.
        num_repetitions: Seeds of pool, prompts and queries for the selection.
    """

    num_anchors: int = 20
    num_estimated: int = 2000
    num_orders: int = 6
    num_random: int = 20
    num_rounds: int = 4
    guided_share: float = 0.4
    num_repetitions: int = 5


@dataclass(frozen=True)
class Published(Section):
    """The published coin_flip scores.

    Attributes:
        path: The folder of the scores; empty skips them.
        num_fit: Prompts to fit, the others are held out.
        num_permutations: Random splits.
        min_variance: The least of a target's scores among the held-out prompts.
    """

    path: str = ""
    num_fit: int = 80
    num_permutations: int = 5
    min_variance: float = 0.1


@dataclass(frozen=True)
class PromptSettings(Settings):
    """An experiment that runs prompts.

    Attributes:
        prompts: Which prompts are run.
        methods: What the methods are given.
        published: The published scores.
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    prompts: Prompts = field(default_factory=Prompts)
    methods: Methods = field(default_factory=Methods)
    published: Published = field(default_factory=Published)


PAPER = PromptSettings(model=Model(name="Qwen/Qwen2-7B", four_bit=True))
SMALL = PromptSettings(
    Data(
        people=1,
        coins=("gold", "silver", "copper", "iron", "tin", "brass", "nickel", "lead"),
        coin_weights=(0.24, 0.2, 0.16, 0.12, 0.1, 0.08, 0.06, 0.04),
        num_validation=64,
        num_test=64,
        mislabelled=0.2,
    )
)
SMOKE = replace(
    SMALL,
    data=replace(
        SMALL.data,
        coins=("gold", "silver", "copper"),
        coin_weights=(0.5, 0.3, 0.2),
        num_demonstrations=12,
        num_validation=16,
        num_test=16,
    ),
    model=Model(width=32, num_steps=600, batch_size=32, learning_rate=4e-3),
    prompts=Prompts(size=3, count=40, loo_groups=2, loo_contexts=2),
    methods=Methods(num_anchors=6, num_estimated=200, num_repetitions=2, num_random=5),
)
PRESETS = {"paper": PAPER, "small": SMALL, "smoke": SMOKE}
