"""Corpus preparation: nothing held out is trained on, nothing traced is trained on, round trips."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from specgate.errors import TextError
from specgate.moe.pretrain.tokens import EOS, encode, load, prepare, split_heldout
from specgate.moe.text import (
    SEPARATOR,
    UNSEEN_SCRIPTS,
    TextDocument,
    bundled_documents,
    documents_of,
    load_documents,
    split_of,
    without_copies,
)

WORDS = [
    "the",
    "routing",
    "of",
    "each",
    "token",
    "through",
    "many",
    "small",
    "experts",
    "is",
    "what",
    "we",
    "foresee",
    "and",
    "then",
    "prove",
    "honest",
]


def document(number: int, domain: str = "a") -> TextDocument:
    rng = random.Random(f"{domain}{number}")
    lines = [" ".join(rng.choices(WORDS, k=14)) + f" {domain}{number}.{i}" for i in range(20)]
    return TextDocument(f"{domain}/{number}", domain, "train", "\n".join(lines))


def write(folder: Path, domain: str, count: int) -> None:
    (folder / f"{domain}.txt").write_text(SEPARATOR.join(document(i, domain).text for i in range(count)))


def test_prepare_holds_out_whole_documents(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    write(source, "a", 20)
    write(source, "b", 10)
    corpus = prepare(tmp_path / "c", str(source), vocab_size=400, heldout_characters=3000)
    assert set(corpus.heldout) == {"a", "b"}
    tokenizer = Tokenizer.from_file(str(tmp_path / "c" / "tokenizer" / "tokenizer.json"))
    train, held = tokenizer.decode(corpus.train_N.tolist()), tokenizer.decode(corpus.heldout["a"].tolist())
    for i in range(20):
        marker = f"a{i}.7\n"
        assert (marker in train) != (marker in held)
    ends = sum(
        int((ids == tokenizer.token_to_id(EOS)).sum()) for ids in (corpus.train_N, *corpus.heldout.values())
    )
    assert ends == 20 + 10  # one after every document
    again = load(tmp_path / "c")
    assert np.array_equal(again.train_N, corpus.train_N)
    with pytest.raises(TextError, match="prepared with"):
        prepare(tmp_path / "c", str(source), vocab_size=401, heldout_characters=3000)


def test_documents_survive_encoding(tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    write(source, "a", 5)
    corpus = prepare(tmp_path / "c", str(source), vocab_size=400, heldout_characters=500)
    tokenizer = Tokenizer.from_file(str(corpus.directory / "tokenizer" / "tokenizer.json"))
    odd = TextDocument("x/0", "x", "train", "Zeichen äöü, 日本語\ttab\n\n  indent 12345 " * 3000)
    ids = encode(tokenizer, [odd, document(3)])
    assert tokenizer.decode(ids[0][:-1].tolist()) == odd.text
    assert ids[0][-1] == ids[1][-1] == tokenizer.token_to_id(EOS)


def test_copies_of_traced_text_are_left_out() -> None:
    documents = [document(i) for i in range(6)]
    half_copied = "\n".join(documents[2].text.split("\n")[:10]) + "\n" + document(99).text
    kept = without_copies(documents, [document(4), TextDocument("t", "t", "test", half_copied)], 0.05)
    assert [d.name for d in kept] == ["a/0", "a/1", "a/3", "a/5"]


def test_lines_that_everybody_has_tell_nothing() -> None:
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy"
    documents = [
        TextDocument(d.name, "a", "train", licence + "\n" + d.text) for d in map(document, range(12))
    ]
    assert len(without_copies(documents, [TextDocument("t", "t", "test", licence)], 0.0)) == 12


def test_heldout_never_takes_more_than_a_fifth() -> None:
    train, heldout = split_heldout([document(i) for i in range(10)], 10**9, 0)
    assert len(heldout["a"]) <= 3
    assert len(train) + len(heldout["a"]) == 10


def test_split_is_a_function_of_the_text() -> None:
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    for i in range(2000):
        counts[split_of(f"document {i}")] += 1
    assert counts["test"] == pytest.approx(400, abs=60)
    assert counts["validation"] == pytest.approx(300, abs=60)
    assert split_of("same") == split_of("same")


def test_bundled_text_has_every_split_in_every_domain() -> None:
    documents = bundled_documents("all")
    found = {(d.domain, d.split) for d in documents}
    domains = {d.domain for d in documents}
    assert len(domains) == 14
    assert len(found) == 3 * len(domains)
    with pytest.raises(TextError, match="Unknown text domain 'nope'"):
        bundled_documents(["nope"])
    assert domains - {d.domain for d in bundled_documents()} == set(UNSEEN_SCRIPTS)
    assert {d.domain for d in bundled_documents("bible_kjv")} == {"bible_kjv"}


def test_bad_text_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="does not exist"):
        load_documents(tmp_path / "missing")
    (tmp_path / "bad.txt.xz").write_bytes(b"not xz")
    with pytest.raises(TextError, match=r"not a whole \.xz"):
        list(documents_of(tmp_path / "bad.txt.xz"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match="not UTF-8 at byte 3"):
        list(documents_of(tmp_path / "latin.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TextError, match="holds no"):
        load_documents(tmp_path / "empty")
    (tmp_path / "blank.txt").write_text("  \n\f\n \n")
    with pytest.raises(TextError, match="is empty"):
        load_documents(tmp_path / "blank.txt")
    with pytest.raises(TextError, match="vocab_size=70000"):
        prepare(tmp_path / "c", str(tmp_path / "latin.txt"), vocab_size=70000)
