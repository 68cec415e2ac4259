"""Domains of text, as bytes to train on and windows that are held out.

Lines that several domains share are taken out of all of them, so that what is left of one language
in another is no help; and of a line that a domain repeats one copy stays, a held-out one where
there is one. Pages that most domains have are held out first: what is held out is as far as
possible the same text in every language.

Shapes: windows (b, l + 1) uint8 as int64: inputs are the first l bytes, labels the last l.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from experiments.text.pages import Pages, domains_of
from experiments.text.settings import Data
from experiments.trained import Grouped
from ksm_ext.checks import message


@dataclass(frozen=True, eq=False)
class Corpus(Grouped):
    """Text of n domains; the samples are the windows whose gradients are looked at.

    Attributes:
        texts: n tensors of bytes, int64: what is trained on.
        num_bytes: (n,) float64, how much there was of each before it was cut: natural shares.
        fingerprint: Of all bytes.
        held_pages: Names of the held-out pages of each domain.
    """

    texts: tuple[Tensor, ...]
    num_bytes: Tensor
    fingerprint: str
    held_pages: tuple[tuple[str, ...], ...]


@lru_cache(maxsize=2)  # every training of a process starts from it
def corpus(data: Data) -> Corpus:
    """Read the domains, and part them.

    Raises:
        ValueError: If a domain has too little text.
    """
    return made(domains_of(data.path, data.domains), data)


def made(pages: Mapping[str, Pages], data: Data) -> Corpus:
    """A corpus of pages by domain."""
    shared = shared_lines(pages)
    common = Counter(name for texts in pages.values() for name in texts)
    parts = {domain: _parted(texts, shared, common, data) for domain, texts in pages.items()}
    texts, held, samples = [], [], []
    digest = hashlib.sha256()
    for domain, (train, test, _) in parts.items():
        text = _as_bytes(train[: data.train_bytes])
        needed = max(2, data.gradient_windows) * data.length
        if len(text) <= needed or len(test) <= data.length:
            found = f"{len(train):,} bytes of {domain}, {len(test):,} of them held out"
            expected = f"more than {needed:,} bytes of every domain to train on, and held-out pages"
            raise ValueError(message("data", expected, found, "Add text, or leave it out."))
        texts.append(text)
        held.append(_windows(_as_bytes(test[: data.held_out_bytes]), data.length))
        own = _windows(text, data.length)
        step = max(1, len(own) // data.gradient_windows)
        samples.append(own[::step][: data.gradient_windows])
        digest.update(len(train).to_bytes(8, "big") + train + test)
    names, inputs, held_out = tuple(parts), torch.cat(samples), torch.cat(held)
    return Corpus(
        inputs=inputs[:, :-1],
        labels=inputs[:, 1:],
        tasks=_numbers(samples),
        held_inputs=held_out[:, :-1],
        held_labels=held_out[:, 1:],
        held_targets=_numbers(held),
        task_names=names,
        target_names=names,
        num_classes=256,
        texts=tuple(texts),
        num_bytes=torch.tensor([len(train) for train, _, _ in parts.values()]).double(),
        fingerprint=digest.hexdigest()[:16],
        held_pages=tuple(pages for _, _, pages in parts.values()),
    )


def shared_lines(pages: Mapping[str, Pages]) -> set[str]:
    """Lines that are in more than one domain, without what is around them."""
    found = [
        {line.strip() for text in p.values() for line in text.splitlines()} for p in pages.values()
    ]
    counts = Counter(line for lines in found for line in lines)
    return {line for line, count in counts.items() if count > 1}


def _parted(
    pages: Pages, shared: set[str], common: Mapping[str, int], data: Data
) -> tuple[bytes, bytes, tuple[str, ...]]:
    """Bytes to train on, held-out ones, and the names of the pages that these are of."""
    order = sorted(pages, key=lambda name: (-common[name], name))
    seen, test, held = set(shared), b"", []

    def rest(name: str) -> bytes:
        lines = dict.fromkeys(line.strip() for line in pages[name].splitlines())
        new = [line for line in lines if line and line not in seen]
        seen.update(new)
        return "".join(f"{line}\n" for line in new).encode()

    while order and len(test) < data.held_out_bytes:
        name = order.pop(0)
        test += rest(name)
        held.append(name)
    order.sort(key=lambda name: hashlib.sha256(name.encode()).digest())  # the cut takes a mixture
    return b"".join(map(rest, order)), test, tuple(held)


def _as_bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.int64)


def _windows(text: Tensor, length: int) -> Tensor:
    """(b, length + 1): windows whose labels do not overlap."""
    return text.unfold(0, length + 1, length)


def _numbers(parts: list[Tensor]) -> Tensor:
    return torch.arange(len(parts)).repeat_interleave(torch.tensor([len(x) for x in parts]))
