"""Text that a host writes: from training documents alone, the same for one seed, traced as training text."""

from __future__ import annotations

from pathlib import Path

import pytest

from specgate.moe.generate import main, prompts_BP
from specgate.moe.hosts import load_host
from specgate.moe.text import TextDocument, load_documents
from tests.tiny import save_olmoe, save_switch


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_olmoe(tmp_path_factory.mktemp("writer") / "olmoe")


def test_writes_documents_that_trace_as_training_text(olmoe: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a.txt.xz", tmp_path / "b.txt"]
    for file in files:
        command = [str(olmoe), "--out", str(file), "--documents", "5", "--tokens", "12", "--batch-size", "2"]
        assert main([*command, "--device", "cpu"]) == 0
    first, second = (load_documents(file, split="train") for file in files)
    assert [d.text for d in first] == [d.text for d in second]
    assert 3 <= len(first) <= 5  # a random model may write nothing but blanks
    assert {d.split for d in first} == {"train"}
    assert list(tmp_path.glob("*.tmp")) == []


def test_prompts_come_from_training_documents(olmoe: Path) -> None:
    host = load_host(str(olmoe), device="cpu")
    documents = [
        TextDocument("x/0", "x", "train", "abcdefgh" * 4),
        TextDocument("x/1", "x", "test", "ZZZZZZZZ" * 40),
        TextDocument("x/2", "x", "train", "ab"),
    ]
    prompts = prompts_BP(host, documents, 20, 4, seed=0)
    assert prompts.shape == (20, 4)
    texts = host.tokenizer.batch_decode(prompts)
    assert all(text in documents[0].text for text in texts)
    assert len(set(texts)) > 3


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--documents", "0"], "--documents 0 is too small"),
        (["--temperature", "0"], "--temperature 0.0 is not positive"),
        (["--prompt-length", "1000000"], "no training document has 1000000 tokens"),
    ],
)
def test_nonsense_is_refused(
    olmoe: Path, tmp_path: Path, extra: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(olmoe), "--out", str(tmp_path / "x.txt"), "--device", "cpu", *extra]) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x.txt").exists()


def test_an_encoder_decoder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    switch = save_switch(tmp_path / "switch")
    command = [str(switch), "--out", str(tmp_path / "x.txt"), "--documents", "1", "--device", "cpu"]
    assert main(command) == 1
    assert "is an encoder-decoder" in capsys.readouterr().err
