"""Decoding learns from text that was read: the same states, other things known of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specgate.errors import TraceError
from specgate.traces.datamodule import RoutingDataModule
from tests.traces.helpers import header_for, stack_info, write_trace
from tests.traces.test_datamodule import LENGTHS, documents, loaders


def test_prefill_sequences_are_trained_on_as_if_decoded_and_never_scored(tmp_path: Path) -> None:
    trace = tmp_path / "both"
    stacks = {"encoder": stack_info(2, 8, 1, dropped=True), "decoder": stack_info(3, 8, 2)}
    header = replace(header_for(stacks, phases=("prefill", "decode")), documents=documents())
    write_trace(trace, stacks, LENGTHS, header, phases=(0, 1))
    stacks = {"decoder": stack_info(3, 8, 2)}
    header = replace(header_for(stacks, phases=("prefill",)), documents=documents())
    write_trace(tmp_path / "read", stacks, LENGTHS, header)  # without a single decoded sequence
    both = [trace, tmp_path / "read"]
    plain, more = (
        RoutingDataModule(trace if not flag else both, "decoder", "decode", window=8, train_on_prefill=flag)
        for flag in (False, True)
    )
    sizes = [
        {split: sum(int(b.mask_BT.sum()) for b in loader) for split, loader in loaders(dm).items()}
        for dm in (plain, more)
    ]
    tokens = [r.stack("decoder").sequences for r in more.readers]
    assert sizes[1]["train"] == sum(int(s.length_S[s.split_S == 0].sum()) for s in tokens)
    assert sizes[1]["train"] > sizes[0]["train"]
    assert {k: v for k, v in sizes[1].items() if k != "train"} == {
        k: v for k, v in sizes[0].items() if k != "train"
    }
    assert {b.phase for b in more.train_dataloader()} == {"decode"}
    assert more.text_digest("test") == plain.text_digest("test")
    with pytest.raises(TraceError, match="holds phase prefill, not 'decode'"):
        _ = RoutingDataModule(tmp_path / "read", "decoder", "decode").spec
    for stack, phase in (("decoder", "prefill"), ("encoder", "decode")):
        with pytest.raises(TraceError, match=f"train_on_prefill is for decoding, not for {phase} of the"):
            RoutingDataModule(trace, stack, phase, train_on_prefill=True)
