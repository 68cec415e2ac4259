"""Small networks of every kind that people train, each with data that it takes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

NUM_WORDS, LENGTH, SAMPLES = 13, 6, 4


class Reader(nn.Module):
    """Words through a body of layers; the mean of what comes out is classified."""

    def __init__(self, body, positions=False, embed=None, read=None):
        super().__init__()
        self.embed = embed or nn.Embedding(NUM_WORDS, 8, padding_idx=0)
        self.positions = nn.Parameter(torch.randn(1, LENGTH, 8)) if positions else None
        self.body, self.head = body, nn.Linear(8, 3)
        self.read = read or (lambda body, x: body(x))

    def forward(self, ids):
        x = self.embed(ids)
        x = x if self.positions is None else x + self.positions
        return self.head(self.read(self.body, x).mean(1))


def recurrent(kind):
    return lambda: Reader(kind(8, 8, batch_first=True), read=lambda body, x: body(x)[0])


def attention(first):
    def read(body, x):
        x = x if first else x.transpose(0, 1)
        x = body(x, x, x)[0]
        return x if first else x.transpose(0, 1)

    return lambda: Reader(nn.MultiheadAttention(8, 2, batch_first=first), read=read)


def encoder(**options):
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)  # noqa: E731
    return lambda: Reader(layer(), positions=True)


class Straight(torch.autograd.Function):
    """Signs that let gradients through, in the style of before ``torch.func``."""

    @staticmethod
    def forward(ctx, x):
        return x.sign() * x.abs().mean(-1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class FusedLinear(torch.autograd.Function):
    """A linear layer in one function, with its weight, as fused kernels have it."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).T @ x.flatten(0, -2)


class Fused(nn.Linear):
    def forward(self, x):
        return FusedLinear.apply(x, self.weight) + self.bias


class LowRank(nn.Module):
    """A frozen layer with an adapter of low rank."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_B(self.lora_A(x))


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(NUM_WORDS, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.bag(ids).tanh())


class Tied(nn.Module):
    """A language model whose head is its embedding, and is called as a function."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Embedding(NUM_WORDS, 8), nn.Linear(8, 8)

    def forward(self, input_ids):
        x = self.mix(self.embed(input_ids)).tanh()
        return {"logits": F.linear(x, self.embed.weight), "hidden": x}


class Returning(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.net, self.kind = nn.Linear(5, 3), kind

    def forward(self, x):
        logits = self.net(x)
        return {"tuple": (logits, x), "list": [logits], "dict": {"logits": logits}}[self.kind]


def former_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = nn.utils.weight_norm(nn.Linear(5, 6))
    return nn.Sequential(normed, nn.Tanh(), nn.Linear(6, 3))


class Prototypes(nn.Module):
    """Distances to prototypes, of which PyTorch knows no forward derivative."""

    def __init__(self):
        super().__init__()
        self.map, self.prototypes = nn.Linear(5, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return -torch.cdist(self.map(x), self.prototypes)


class Mean(nn.Module):
    """Over positions, or places of an image."""

    def forward(self, x):
        return x.flatten(2).mean(2)


def images():
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3, padding="same"), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 4, (2, 3), stride=2, padding=1, dilation=(1, 2), groups=2), nn.Dropout(0.5)),
        *(nn.GroupNorm(2, 4), nn.PReLU(), Mean(), nn.Linear(4, 3)),
    )


def signals():
    return nn.Sequential(
        nn.Conv1d(2, 6, 3, padding=1),
        nn.InstanceNorm1d(6, affine=True),
        nn.GELU(),
        Mean(),
        nn.Linear(6, 3),
    )


class Batchwise(nn.Module):
    """Whose samples in a batch would have another output than alone."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x):
        return self.net(x / x.detach().abs().max())


class Cut(nn.Module):
    """Whose control flow looks at the data."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(NUM_WORDS, 8), nn.Linear(8, 3)

    def forward(self, ids):
        longest = int((ids > 0).sum(1).max())
        kept = (ids[:, :longest] > 0)[..., None]
        return self.head((self.embed(ids[:, :longest]) * kept).sum(1))


def words():
    ids = torch.randint(1, NUM_WORDS, (SAMPLES, LENGTH))
    ids[0, 4:] = 0
    return ids, torch.randint(3, (SAMPLES,))


def vectors():
    return torch.randn(SAMPLES, 5), torch.randint(3, (SAMPLES,))


def text(mask=True, left=False, causal=True, decoder=False):
    ids = torch.randint(1, NUM_WORDS, (SAMPLES, LENGTH))
    there = torch.ones_like(ids)
    there[0, 4:] = 0
    there = there.flip(1) if left else there
    batch = {"input_ids": ids, "labels": torch.randint(3, (SAMPLES,))}
    if causal:
        batch["labels"] = ids.masked_fill(there == 0, -100)
    if mask:
        batch["attention_mask"] = there
    if decoder:
        batch["decoder_input_ids"] = ids.flip(0)
    return batch


SIZES = {
    **{"vocab_size": NUM_WORDS, "hidden_size": 8, "intermediate_size": 12},
    **{"num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def hugging_face(kind, change=lambda model: model, **options):
    def make():
        import transformers

        names = {"classifier": "ForSequenceClassification", "lm": "ForCausalLM"}
        family, task = kind.split()
        task = names.get(task, task)
        config = getattr(transformers, f"{family}Config")(**{**SIZES, "num_labels": 3, **options})
        return change(getattr(transformers, family + task)(config))

    return make


GPT2 = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
DISTIL = {"dim": 8, "hidden_dim": 12, "n_layers": 1, "n_heads": 2}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}
VIT = {"image_size": 8, "patch_size": 4}


def checkpointing(model):
    model.activation_checkpointing_enable()
    return model


def no_longer_checkpointing(model):
    """As after training adapters: the hook that asks for the embedding's gradient stays."""
    model.enable_input_require_grads()
    model.activation_checkpointing_enable()
    model.activation_checkpointing_disable()
    return model


@dataclass(frozen=True)
class Network:
    """What makes a network and a batch, and which of its parameters move."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Any] = words
    parameters: str | None = None


def lazily(kind, **options):
    return lambda body, x: checkpoint(body, x, **options) if kind else body(x)


NETWORKS = {
    "perceptron": Network(
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), vectors
    ),
    "normalised": Network(
        lambda: nn.Sequential(
            *(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.RMSNorm(6), nn.Linear(6, 3))
        ),
        vectors,
    ),
    "convolutions, batch and group norm, dropout": Network(
        images, lambda: (torch.randn(SAMPLES, 2, 6, 5), torch.randint(3, (SAMPLES,)))
    ),
    "Conv1d, instance norm": Network(
        signals, lambda: (torch.randn(SAMPLES, 2, 9), torch.randint(3, (SAMPLES,)))
    ),
    "weight_norm": Network(
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.Tanh(), nn.Linear(6, 3)
        ),
        vectors,
    ),
    "nn.utils.weight_norm": Network(former_weight_norm, vectors),
    "cdist": Network(Prototypes, vectors),
    "nn.RNN": Network(recurrent(nn.RNN)),
    "nn.GRU": Network(recurrent(nn.GRU)),
    "nn.LSTM": Network(recurrent(nn.LSTM)),
    "nn.MultiheadAttention": Network(attention(True)),
    "nn.MultiheadAttention, positions first": Network(attention(False)),
    "nn.TransformerEncoderLayer": Network(encoder()),
    "nn.TransformerEncoderLayer, norm first": Network(encoder(norm_first=True)),
    "nn.EmbeddingBag": Network(lambda: Bag("sum")),
    "nn.Embedding(max_norm)": Network(
        lambda: Reader(nn.Linear(8, 8), embed=nn.Embedding(NUM_WORDS, 8, max_norm=0.5))
    ),
    "checkpoint": Network(lambda: Reader(nn.Linear(8, 8), read=lazily(True, use_reentrant=False))),
    "checkpoint, reentrant": Network(
        lambda: Reader(nn.Linear(8, 8), read=lazily(True, use_reentrant=True))
    ),
    "autograd.Function": Network(
        lambda: Reader(nn.Linear(8, 8), read=lambda body, x: Straight.apply(body(x)))
    ),
    "autograd.Function of a weight": Network(lambda: Reader(Fused(8, 8))),
    "low-rank adapters": Network(
        lambda: Reader(nn.Sequential(LowRank(), nn.Tanh()), embed=nn.Embedding(NUM_WORDS, 8)),
        parameters="*lora_*",
    ),
    "tied weights": Network(Tied, lambda: text(mask=False)),
    "returns a tuple": Network(lambda: Returning("tuple"), vectors),
    "returns a list": Network(lambda: Returning("list"), vectors),
    "returns a dict": Network(lambda: Returning("dict"), vectors),
    "cut to the longest": Network(Cut),
    "scaled by the batch": Network(Batchwise, vectors),
    "GPT-2": Network(hugging_face("GPT2 LMHeadModel", **GPT2), lambda: text(left=True)),
    "GPT-2 without mask": Network(
        hugging_face("GPT2 LMHeadModel", **GPT2), lambda: text(mask=False)
    ),
    "GPT-2, checkpointing": Network(hugging_face("GPT2 LMHeadModel", checkpointing, **GPT2), text),
    "GPT-2, no longer checkpointing": Network(
        hugging_face("GPT2 LMHeadModel", no_longer_checkpointing, **GPT2), text
    ),
    "GPT-2 classifier": Network(
        hugging_face("GPT2 classifier", **GPT2), lambda: text(causal=False)
    ),
    "Llama": Network(hugging_face("Llama lm", num_key_value_heads=1), text),
    "Mixtral": Network(
        hugging_face(
            *("Mixtral lm",),
            num_key_value_heads=1,
            num_local_experts=3,
            experts_implementation="eager",
        ),
        text,
    ),
    "BERT": Network(hugging_face("Bert classifier"), lambda: text(causal=False)),
    "RoBERTa": Network(hugging_face("Roberta classifier"), lambda: text(causal=False)),
    "DistilBERT": Network(
        hugging_face("DistilBert classifier", **DISTIL), lambda: text(causal=False)
    ),
    "T5": Network(
        hugging_face("T5 ForConditionalGeneration", decoder_start_token_id=0, **T5),
        lambda: text(decoder=True),
    ),
    "ViT": Network(
        hugging_face("ViT ForImageClassification", **VIT),
        lambda: {
            "pixel_values": torch.randn(SAMPLES, 3, 8, 8),
            "labels": torch.randint(3, (SAMPLES,)),
        },
    ),
}


def made(name, dtype=torch.float64, seed=0):
    """The network, with parameters of some size, and its batch, in one dtype."""
    torch.manual_seed(seed)
    model = NETWORKS[name].make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    batch = NETWORKS[name].batch()
    narrow = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
    if isinstance(batch, dict):
        return model.to(dtype), {key: narrow(column) for key, column in batch.items()}
    return model.to(dtype), tuple(map(narrow, batch))
