"""What all tests share: one thread, no network, tiny hosts and tiny traces made by the real recorder."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    # A shell's background job ignores Ctrl-C, and tests of what it does would wait for it in vain.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of an OLMoE with random weights (4 MoE layers, 8 experts, top-2)."""
    from tests.tiny import save_olmoe

    return save_olmoe(tmp_path_factory.mktemp("tiny_olmoe"))


@pytest.fixture(scope="session")
def tiny_switch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a Switch Transformer with random weights (3 MoE layers per stack, 4 experts)."""
    from tests.tiny import save_switch

    return save_switch(tmp_path_factory.mktemp("tiny_switch"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of small texts in two domains."""
    from tests.tiny import save_text

    return save_text(tmp_path_factory.mktemp("tiny_text"))


@pytest.fixture(scope="session")
def tiny_traces(
    tiny_olmoe: Path, tiny_switch: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Traces of the tiny hosts, made by the real recorder: ``{olmoe,switch}`` and ``{olmoe,switch}_decode``.

    Prefill traces have 96 sequences of 32 tokens, decode traces 40 of 24; all keep fp16 hidden states.
    """
    from rich.console import Console

    from specgate.moe.batches import Settings
    from specgate.moe.collection import collect
    from specgate.moe.hosts import load_host
    from specgate.moe.text import load_documents

    folder = tmp_path_factory.mktemp("tiny_traces")
    documents = load_documents(tiny_text)
    prefill = Settings(phase="prefill", sequences=96, length=32, batch_size=16, shard_sequences=48)
    decode = Settings(
        phase="decode", sequences=40, length=24, prompt_length=16, batch_size=20, shard_sequences=20
    )
    traces = {}
    for name, path in (("olmoe", tiny_olmoe), ("switch", tiny_switch)):
        host = load_host(str(path), device="cpu")
        for suffix, settings in (("", prefill), ("_decode", decode)):
            out = traces[name + suffix] = folder / (name + suffix)
            collect(host, documents, settings, out, Console(quiet=True))
    return traces
