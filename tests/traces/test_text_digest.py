"""A split's text has one digest, however it was collected."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from specgate.moe.batches import Settings
from specgate.moe.collection import collect
from specgate.moe.hosts import load_host
from specgate.moe.text import load_documents
from specgate.traces.datamodule import RoutingDataModule
from specgate.traces.schema import SPLITS


def test_text_digest_is_the_texts_and_not_the_shards(
    tiny_traces: dict[str, Path], tiny_olmoe: Path, tiny_text: Path, tmp_path: Path
) -> None:
    trace = tiny_traces["olmoe"]
    data = RoutingDataModule(trace, window=16)
    digests = {split: data.text_digest(split) for split in SPLITS}
    assert len(set(digests.values())) == len(SPLITS)
    assert RoutingDataModule(trace, window=8).text_digest("test") != digests["test"]
    assert RoutingDataModule(trace, window=16, max_sequences=1).text_digest("test") != digests["test"]
    assert RoutingDataModule(trace, window=16, everything=True).text_digest("train") is None
    again = Settings(phase="prefill", sequences=96, length=32, batch_size=8, shard_sequences=16)
    host = load_host(str(tiny_olmoe), device="cpu")
    collect(host, load_documents(tiny_text), again, tmp_path / "again", Console(quiet=True))
    other = RoutingDataModule(tmp_path / "again", window=16)
    assert len(other.readers[0].header.shards) != len(data.readers[0].header.shards)
    assert {split: other.text_digest(split) for split in SPLITS} == digests
