"""Which pieces of the text are traced: documents cut into windows, windows chosen evenly and always the same.

Letters: S sequences.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from specgate.errors import TextError
from specgate.moe.text import SPLITS, TextDocument

MIN_SHARE = 0.1  # of the sequences, for every split that has text
SHORTEST = 4  # a last window counts from length / SHORTEST tokens on


class Window(NamedTuple):
    """Tokens ``start`` to ``stop`` of a document; an encoder reads up to ``cut``, its decoder goes on."""

    document: int
    start: int
    cut: int
    stop: int


@dataclass(frozen=True)
class Tokenised:
    """Documents as token ids.

    Attributes:
        documents: the texts.
        ids: int32 token ids of each document, special tokens left out.
        prefix: ids that the tokeniser puts before every text (a begin-of-text token), part of each window.
    """

    documents: list[TextDocument]
    ids: list[np.ndarray[Any, np.dtype[np.int32]]]
    prefix: list[int]


def tokenise(tokenizer: Any, documents: Sequence[TextDocument]) -> Tokenised:
    """Token ids of every document. Documents that share a name are told apart by a number.

    Raises:
        TextError: if there is no document.
    """
    if not documents:
        raise TextError("There is no document to trace; name text that is not empty.")
    seen: Counter[str] = Counter()
    named = []
    for document in documents:
        seen[document.name] += 1
        again = seen[document.name]
        named.append(document if again == 1 else replace(document, name=f"{document.name} ({again})"))
    texts = [document.text for document in named]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    start = getattr(tokenizer, "bos_token_id", None)
    around = tokenizer("", add_special_tokens=True)["input_ids"]
    prefix = [start] if start is not None and list(around[:1]) == [start] else []
    return Tokenised(named, [np.asarray(ids, dtype=np.int32) for ids in encoded], prefix)


def cut_windows(text: Tokenised, length: int, seq2seq: bool) -> list[Window]:
    """Consecutive windows of ``length`` tokens (begin-of-text token included) over every document.

    With ``seq2seq`` a window is what an encoder reads, followed by up to ``length`` tokens that the decoder
    is taught; windows still advance by one encoder length, so that each text is once read and once
    continued. A document too short for that is halved. Last windows shorter than a quarter of ``length``
    are left out.
    """
    body = length - len(text.prefix)
    least = max(2, body // SHORTEST)
    windows = []
    for number, ids in enumerate(text.ids):
        size = len(ids)
        for start in range(0, size, body):
            cut = min(start + body, size)
            if not seq2seq:
                if cut - start >= least:
                    windows.append(Window(number, start, cut, cut))
                continue
            stop = min(cut + length, size)
            if stop - cut < least and start == 0:
                cut = size // 2
            if stop - cut >= least and cut - start >= least:
                windows.append(Window(number, start, cut, stop))
    return windows


def cut_prompts(text: Tokenised, length: int) -> list[Window]:
    """Consecutive prompts of exactly ``length`` tokens (begin-of-text token included) over every document."""
    body = length - len(text.prefix)
    return [
        Window(number, start, start + body, start + body)
        for number, ids in enumerate(text.ids)
        for start in range(0, len(ids) - body + 1, body)
    ]


def select(
    windows: Sequence[Window], documents: Sequence[TextDocument], sequences: int, seed: int
) -> list[Window]:
    """``sequences`` of the windows (all, where there are fewer), stratified over splits and domains,
    shuffled.

    Every split that has text gets at least a tenth of them (MIN_SHARE), the rest follows the amount of
    text; within a split the domains get equal shares as far as their text goes; within a domain the
    documents take turns.

    Raises:
        TextError: if no window is left.
    """
    if not windows:
        raise TextError("No document is long enough for one window; give longer text or a smaller length.")
    cells: dict[str, dict[str, list[Window]]] = {split: defaultdict(list) for split in SPLITS}
    for window in windows:
        document = documents[window.document]
        cells[document.split][document.domain].append(window)
    available = {split: sum(map(len, cells[split].values())) for split in SPLITS if cells[split]}
    total = min(sequences, len(windows))
    chosen: list[Window] = []
    for split, quota in _split_quotas(available, total).items():
        domains = cells[split]
        for domain, count in _equal_shares({d: len(w) for d, w in domains.items()}, quota).items():
            rng = np.random.default_rng([seed, zlib.crc32(f"{split}/{domain}".encode())])
            chosen += _take_turns(domains[domain], rng)[:count]
    order = np.random.default_rng([seed, len(chosen)]).permutation(len(chosen))
    return [chosen[i] for i in order]


def _take_turns(windows: Sequence[Window], rng: np.random.Generator) -> list[Window]:
    """The windows in random order, but no document twice before every other one had its turn."""
    turn: Counter[int] = Counter()
    keyed: list[tuple[int, int, Window]] = []
    for i in rng.permutation(len(windows)):
        keyed.append((turn[windows[i].document], len(keyed), windows[i]))
        turn[windows[i].document] += 1
    return [window for _, _, window in sorted(keyed, key=lambda k: k[:2])]


def _split_quotas(available: Mapping[str, int], total: int) -> dict[str, int]:
    """Shares of ``total`` that follow ``available``, but at least MIN_SHARE each as far as the text goes."""
    least = max(1, -(-total // round(1 / MIN_SHARE)))
    quotas = dict.fromkeys(available, 0)
    left = total
    for split in available:  # train first, so that a tiny total still trains
        quotas[split] = min(available[split], least, left)
        left -= quotas[split]
    spare = {split: available[split] - quotas[split] for split in available}
    everything = sum(spare.values())
    for split in available:
        extra = left * spare[split] // everything if everything else 0
        quotas[split] += extra
        spare[split] -= extra
    for split in available:  # what rounding left over
        extra = min(spare[split], total - sum(quotas.values()))
        quotas[split] += extra
    return quotas


def _equal_shares(available: Mapping[str, int], total: int) -> dict[str, int]:
    """``total`` spread as evenly as ``available`` allows, in the order of the names."""
    quotas = dict.fromkeys(sorted(available), 0)
    left = min(total, sum(available.values()))
    while left:
        open_ = [name for name in quotas if quotas[name] < available[name]]
        share = max(1, left // len(open_))
        for name in open_:
            extra = min(share, available[name] - quotas[name], left)
            quotas[name] += extra
            left -= extra
    return quotas
