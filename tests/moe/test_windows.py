"""Cutting and choosing windows: coverage, stratification, and the same choice every time."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specgate.errors import TextError
from specgate.moe.text import TextDocument
from specgate.moe.windows import (
    Tokenised,
    Window,
    _equal_shares,
    _split_quotas,
    cut_prompts,
    cut_windows,
    select,
    tokenise,
)

SPLITS = ("train", "validation", "test")


def text_of(*lengths: int, prefix: list[int] | None = None) -> Tokenised:
    documents = [TextDocument(f"d{i}", "x", "train", "") for i in range(len(lengths))]
    return Tokenised(documents, [np.arange(n, dtype=np.int32) for n in lengths], prefix or [])


def test_windows_cover_every_document_in_order() -> None:
    assert cut_windows(text_of(25, 10, 3, 1), 10, seq2seq=False) == [
        Window(0, 0, 10, 10), Window(0, 10, 20, 20), Window(0, 20, 25, 25), Window(1, 0, 10, 10),
        Window(2, 0, 3, 3),
    ]  # fmt: skip


def test_begin_of_text_counts_as_part_of_the_window() -> None:
    assert cut_windows(text_of(18, prefix=[7]), 10, seq2seq=False) == [
        Window(0, 0, 9, 9),
        Window(0, 9, 18, 18),
    ]


def test_a_decoder_goes_on_where_its_encoder_stopped() -> None:
    assert cut_windows(text_of(35), 10, seq2seq=True) == [
        Window(0, 0, 10, 20), Window(0, 10, 20, 30), Window(0, 20, 30, 35),
    ]  # fmt: skip
    assert cut_windows(text_of(10), 10, seq2seq=True) == [Window(0, 0, 5, 10)]  # halved
    assert cut_windows(text_of(11), 10, seq2seq=True) == [Window(0, 0, 5, 11)]
    assert cut_windows(text_of(2), 10, seq2seq=True) == []


def test_prompts_are_whole() -> None:
    assert cut_prompts(text_of(25, 9), 10) == [Window(0, 0, 10, 10), Window(0, 10, 20, 20)]


@given(st.integers(1, 400), st.integers(8, 64), st.booleans())
def test_windows_never_leave_their_document(size: int, length: int, seq2seq: bool) -> None:
    for w in cut_windows(text_of(size), length, seq2seq):
        assert 0 <= w.start < w.cut <= w.stop <= size
        assert w.cut - w.start <= length
        assert w.stop - w.cut <= length
        assert (w.stop > w.cut) == seq2seq


def corpus(shape: dict[tuple[str, str], list[int]]) -> tuple[list[Window], list[TextDocument]]:
    """``(split, domain) -> windows per document``."""
    documents, windows = [], []
    for (split, domain), counts in shape.items():
        for count in counts:
            windows += [Window(len(documents), i, i + 1, i + 1) for i in range(count)]
            documents.append(TextDocument(f"{split}-{domain}-{len(documents)}", domain, split, ""))
    return windows, documents


def test_selection_reaches_every_split_and_domain_and_document() -> None:
    windows, documents = corpus(
        {("train", "big"): [50] * 10, ("train", "small"): [5] * 4, ("validation", "big"): [30] * 2,
         ("validation", "small"): [4], ("test", "big"): [40] * 2, ("test", "small"): [6] * 2}
    )  # fmt: skip
    chosen = select(windows, documents, 100, seed=3)
    assert len(chosen) == len(set(chosen)) == 100
    cells = Counter((documents[w.document].split, documents[w.document].domain) for w in chosen)
    splits = Counter(documents[w.document].split for w in chosen)
    assert min(splits.values()) >= 10
    assert cells["train", "small"] == 20  # all of it: less than an equal share
    assert cells["validation", "small"] == 4
    assert cells["train", "big"] == splits["train"] - 20
    turns = Counter(
        w.document
        for w in chosen
        if documents[w.document].split == "train" and documents[w.document].domain == "big"
    )
    assert len(turns) == 10
    assert max(turns.values()) - min(turns.values()) <= 1


def test_selection_is_a_function_of_its_seed() -> None:
    windows, documents = corpus({(s, d): [20] * 3 for s in SPLITS for d in "abc"})
    first = select(windows, documents, 60, seed=1)
    assert first == select(list(windows), list(documents), 60, seed=1)
    assert first != select(windows, documents, 60, seed=2)
    assert first[:20] != sorted(first)[:20]  # shuffled: the beginning is no one domain
    assert sorted(select(windows, documents, 10_000, seed=1)) == sorted(windows)


@given(
    st.dictionaries(st.sampled_from(SPLITS), st.integers(1, 500), min_size=1),
    st.integers(1, 1200),
)
def test_split_quotas_add_up(available: dict[str, int], total: int) -> None:
    total = min(total, sum(available.values()))
    quotas = _split_quotas(available, total)
    assert sum(quotas.values()) == total
    assert all(0 <= quotas[s] <= available[s] for s in available)
    if total >= 10:
        assert all(quotas[s] >= min(available[s], total // 10) for s in available)


@given(st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 50), min_size=1), st.integers(0, 300))
def test_equal_shares_are_as_equal_as_they_can_be(available: dict[str, int], total: int) -> None:
    quotas = _equal_shares(available, total)
    assert sum(quotas.values()) == min(total, sum(available.values()))
    assert all(quotas[k] <= available[k] for k in available)
    open_ = [quotas[k] for k in available if quotas[k] < available[k]]
    if open_:
        assert max(open_) - min(open_) <= 1
        assert all(quotas[k] <= max(open_) + 1 for k in available)


def test_no_text_is_an_error(tiny: SimpleNamespace) -> None:
    with pytest.raises(TextError, match="no document"):
        tokenise(tiny.tokenizer(), [])
    with pytest.raises(TextError, match="long enough"):
        select([], [], 5, seed=0)


def test_same_names_are_told_apart(tiny: SimpleNamespace) -> None:
    documents = [TextDocument("a/0", "a", s, "the fox " * 9) for s in ("train", "test", "train")]
    found = tokenise(tiny.tokenizer(), documents)
    assert [d.name for d in found.documents] == ["a/0", "a/0 (2)", "a/0 (3)"]
    assert found.prefix == []
    assert found.ids[0].dtype == np.int32
    assert tiny.tokenizer().decode(found.ids[1]) == "the fox " * 9
