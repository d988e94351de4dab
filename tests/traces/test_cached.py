"""Windows held in memory are the windows that the mapped files hold."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specgate.errors import TraceError
from specgate.traces.batch import RoutingBatch
from specgate.traces.cached import CachedDataset
from specgate.traces.datamodule import RoutingDataModule
from specgate.traces.schema import Document
from tests.traces.helpers import header_for, stack_info, write_trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cached") / "trace"
    stacks = {"encoder": stack_info(2, 8, 1, dropped=True), "decoder": stack_info(3, 8, 2)}
    documents = [
        Document(f"doc-{i}", f"domain-{i % 3}", split)
        for i, split in enumerate(["train", "validation", "test"] * 2)
    ]
    header = replace(header_for(stacks, phases=("prefill", "decode")), documents=documents)
    lengths = [(5, 13, 8, 2, 9, 4), (7, 6, 11, 3, 12, 5), (2, 2, 4, 8, 9, 7, 3, 10)]
    write_trace(path, stacks, lengths, header, phases=(0, 1))
    return path


def tensors(batch: RoutingBatch) -> dict[str, Tensor]:
    return {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}


@pytest.mark.parametrize(("stack", "phase"), [("encoder", "prefill"), ("decoder", "decode")])
def test_cached_batches_equal_mapped_ones(trace: Path, stack: str, phase: str) -> None:
    options = {"stack": stack, "phase": phase, "window": 5, "batch_size": 3}
    plain, cached = RoutingDataModule(trace, **options), RoutingDataModule(trace, **options, cache="cpu")
    for split in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loaders = getattr(plain, split)(), getattr(cached, split)()
        assert len(loaders[0]) == len(loaders[1]) > 0
        for a, b in zip(*loaders, strict=True):
            held = tensors(b)
            assert tensors(a).keys() == held.keys()
            T = a.valid_BT.shape[1]
            for name, value in tensors(a).items():
                mine = held[name] if value.dim() == 1 else held[name][:, :T]
                assert mine.dtype == value.dtype
                assert torch.equal(mine, value), name
            assert not b.valid_BT[:, T:].any()


def test_a_device_that_is_not_there_is_refused(trace: Path) -> None:
    data = RoutingDataModule(trace, "encoder", cache="cuda:99")
    with pytest.raises(TraceError, match=r"data.cache=cuda:99 cannot hold .* data.cache=null"):
        data.val_dataloader()


def test_a_second_data_module_shares_what_is_held_and_another_one_does_not(trace: Path) -> None:
    def held(stack: str, window: int) -> dict[str, Tensor]:
        dataset = RoutingDataModule(trace, stack, cache="cpu", window=window).train_dataloader().dataset
        assert isinstance(dataset, CachedDataset)
        return dataset.held

    first = held("decoder", 2)
    assert held("decoder", 2) is first
    assert held("decoder", 1) is not first
    assert held("decoder", 2) is first
    held("encoder", 2), held("encoder", 1)
    assert held("decoder", 2) is not first  # three splits stay, no more
