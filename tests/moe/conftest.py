"""Fixtures of the tests of ``specgate/moe``."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from specgate.moe.collection import collect
from specgate.moe.hosts import load_host
from specgate.moe.text import load_documents
from tests.moe.tiny_hosts import (
    CONFIGS,
    KINDS,
    QUIET,
    VOCAB,
    Hosts,
    Paths,
    Texts,
    make_host,
    make_text,
    make_tokenizer,
)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The helpers of this file."""
    return SimpleNamespace(
        host=make_host, tokenizer=make_tokenizer, families=list(CONFIGS), configs=CONFIGS, vocab=VOCAB
    )


@pytest.fixture(scope="session")
def saved_hosts(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """A tiny Switch and a tiny OLMoE as transformers directories, with a tokeniser."""
    folders = {}
    for family in ("switch_transformers", "olmoe"):
        folder = tmp_path_factory.mktemp("hosts") / family
        make_host(family).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        folders[family] = folder
    return folders


@pytest.fixture(scope="session")
def text_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Text files of two domains with documents in every split."""
    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def hosts(saved_hosts: Paths) -> Hosts:
    torch.set_num_threads(1)
    return {name: load_host(str(path), device="cpu") for name, path in saved_hosts.items()}


@pytest.fixture(scope="session")
def documents(text_files: list[str]) -> Texts:
    return load_documents(text_files)


@pytest.fixture(scope="session")
def whole(hosts: Hosts, documents: Texts, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """One uninterrupted collection of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    for kind, (host, settings) in KINDS.items():
        collect(hosts[host], documents, settings, folder / kind, QUIET)
    return {kind: folder / kind for kind in KINDS}
