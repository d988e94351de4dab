"""Tokeniser and token streams for pre-training.

A prepared corpus is a directory: ``tokenizer/`` (transformers files), ``train.bin`` (uint16 token ids,
documents joined by
the end-of-text token, order shuffled), ``heldout.npz`` (token ids per domain) and ``corpus.json`` (what
went in).

Letters: N tokens.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specgate.errors import TextError
from specgate.moe.text import TextDocument, bundled_documents, load_documents, without_copies

PAD, EOS = "<pad>", "</s>"
SENTINELS = [f"<extra_id_{i}>" for i in range(32)]
PIECE = 40_000  # characters encoded at once, so that long books spread over the cores


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus.

    Shapes:
        train_N: uint16, memory-mapped.
        heldout: domain -> uint16 ``[N]``.
    """

    directory: Path
    train_N: np.ndarray
    heldout: dict[str, np.ndarray]
    info: dict


def train_tokenizer(documents: list[TextDocument], vocab_size: int, characters: int, seed: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) on an equal share of every domain.

    Args:
        documents: training documents.
        vocab_size: ids in all, special tokens included.
        characters: how many characters of each domain to learn from.
        seed: which of them.
    """
    rng = random.Random(seed)
    by_domain: dict[str, list[str]] = {}
    for d in documents:
        by_domain.setdefault(d.domain, []).extend(d.text[i : i + 4000] for i in range(0, len(d.text), 4000))
    sample: list[str] = []
    for pieces in by_domain.values():
        sample += rng.sample(pieces, min(len(pieces), max(1, characters // 4000)))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, *SENTINELS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` that ``AutoTokenizer`` loads."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, additional_special_tokens=SENTINELS
    ).save_pretrained(directory)


def encode(tokenizer: Tokenizer, documents: list[TextDocument]) -> list[np.ndarray]:
    """Token ids of each document, the end-of-text token last."""
    pieces = [
        (i, d.text[j : j + PIECE]) for i, d in enumerate(documents) for j in range(0, len(d.text), PIECE)
    ]
    parts: list[list[np.ndarray]] = [[] for _ in documents]
    for start in range(0, len(pieces), 512):
        chunk = pieces[start : start + 512]
        for (i, _), e in zip(chunk, tokenizer.encode_batch_fast([t for _, t in chunk]), strict=True):
            parts[i].append(np.array(e.ids, dtype=np.uint16))
    eos = np.array([tokenizer.token_to_id(EOS)], dtype=np.uint16)
    return [np.concatenate([*p, eos]) for p in parts]


def split_heldout(
    documents: list[TextDocument], characters: int, seed: int
) -> tuple[list[TextDocument], dict[str, list[TextDocument]]]:
    """Sets whole documents of each domain aside until ``characters`` are held out, never more than a fifth
    of the domain.

    A held-out document longer than that is cut; its rest is not trained on either.
    """
    rng = random.Random(seed)
    by_domain: dict[str, list[TextDocument]] = {}
    for d in documents:
        by_domain.setdefault(d.domain, []).append(d)
    train, heldout = [], {}
    for domain, docs in by_domain.items():
        docs = sorted(docs, key=lambda d: d.name)
        rng.shuffle(docs)
        docs.sort(
            key=lambda d: len(d.text) > 4 * characters
        )  # a whole library is not spent on one held-out book
        budget = min(characters, sum(len(d.text) for d in docs) // 5)
        aside: list[TextDocument] = []
        while len(docs) > 1 and sum(len(d.text) for d in aside) < budget:
            d = docs.pop(0)
            aside.append(TextDocument(d.name, domain, d.split, d.text[: 2 * characters]))
        heldout[domain] = aside
        train += docs
    return train, heldout


def prepare(
    directory: str | Path,
    sources: str | list[str],
    vocab_size: int = 8192,
    tokenizer_dir: str | None = None,
    tokenizer_characters: int = 3_000_000,
    heldout_characters: int = 200_000,
    exclude_bundled: bool = True,
    exclude_share: float = 0.05,
    seed: int = 0,
) -> Corpus:
    """Builds the corpus in ``directory`` unless it is there already.

    Args:
        directory: where the prepared corpus lives.
        sources: text files or directories (documents separated by a form-feed line).
        vocab_size: size of a newly trained vocabulary; at most 65,536.
        tokenizer_dir: directory of an existing ``tokenizer.json`` to use instead of training one.
        tokenizer_characters: characters of each domain that the vocabulary is learned from.
        heldout_characters: characters of each domain to hold out.
        exclude_bundled: leave out documents that also stand in the bundled text, which is traced later.
        exclude_share: share of a document's long lines that may stand in the bundled text.
        seed: of the held-out choice, the vocabulary sample and the document order.

    Raises:
        TextError: if there is no text, the vocabulary does not fit 16 bits, or the directory holds another
        corpus.
    """
    directory = Path(directory)
    wanted = {
        "sources": [str(Path(s).name) for s in ([sources] if isinstance(sources, str) else sources)],
        "vocab_size": vocab_size,
        "heldout_characters": heldout_characters,
        "exclude_bundled": exclude_bundled,
        "exclude_share": exclude_share,
        "seed": seed,
    }
    if not 300 <= vocab_size <= 65536:
        raise TextError(f"vocab_size={vocab_size} does not fit; choose between 300 and 65536.")
    if (directory / "corpus.json").is_file():
        return load(directory, wanted)
    documents = load_documents(sources)
    before = len(documents)
    if exclude_bundled:
        documents = without_copies(documents, bundled_documents("all"), exclude_share)
    train, heldout = split_heldout(documents, heldout_characters, seed)
    if not train:
        raise TextError(f"No training text is left in {sources}; give more than one document.")
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer_dir:
        tokenizer = Tokenizer.from_file(str(Path(tokenizer_dir) / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(train, vocab_size, tokenizer_characters, seed)
    save_tokenizer(tokenizer, directory / "tokenizer")
    random.Random(seed).shuffle(train)
    ids = encode(tokenizer, train)
    with open(directory / "train.bin.part", "wb") as f:
        for part in ids:
            part.tofile(f)
    os.replace(directory / "train.bin.part", directory / "train.bin")
    held = {k: np.concatenate(encode(tokenizer, v)) for k, v in heldout.items() if v}
    np.savez(directory / "heldout.npz", **held)  # type: ignore[arg-type]
    tokens: Counter[str] = Counter()
    for d, part in zip(train, ids, strict=True):
        tokens[d.domain] += len(part)
    info = wanted | {
        "documents": before,
        "left_out_as_copies": before - len(documents),
        "train_tokens": dict(sorted(tokens.items())),
        "heldout_tokens": {k: len(v) for k, v in held.items()},
        "characters": sum(len(d.text) for d in train),
        "vocab_size": tokenizer.get_vocab_size(),
    }
    (directory / "corpus.json").write_text(json.dumps(info | {"wanted": wanted}, indent=1))
    return load(directory, wanted)


def load(directory: str | Path, wanted: dict | None = None) -> Corpus:
    """Opens a prepared corpus.

    Raises:
        TextError: if it was prepared from other text or with other settings than ``wanted``.
    """
    directory = Path(directory)
    if not (directory / "corpus.json").is_file():
        raise TextError(f"No prepared corpus in {directory}; run the preparation first.")
    info = json.loads((directory / "corpus.json").read_text())
    if wanted is not None and info["wanted"] != wanted:
        raise TextError(
            f"{directory} holds a corpus prepared with {info['wanted']}; remove it or choose another cache."
        )
    heldout = dict(np.load(directory / "heldout.npz").items())
    return Corpus(directory, np.memmap(directory / "train.bin", dtype=np.uint16, mode="r"), heldout, info)
