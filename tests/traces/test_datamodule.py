"""The data module: nothing lost, nothing twice, no document in two splits, batches equal to a naive loop."""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specgate.errors import TraceError
from specgate.traces.batch import RoutingBatch, StackSpec, targets
from specgate.traces.datamodule import RoutingDataModule
from specgate.traces.reader import TraceReader
from specgate.traces.schema import SPLITS, Document
from specgate.traces.windows import WindowDataset, cut_windows
from tests.traces.helpers import header_for, routers_for, stack_info, write_trace

LENGTHS = ((5, 3, 17), (1, 40, 8), (9, 33, 2, 4, 12), (16, 16, 1))


def loaders(dm: RoutingDataModule) -> dict[str, Any]:
    return dict(zip(SPLITS, (dm.train_dataloader(), dm.val_dataloader(), dm.test_dataloader()), strict=True))


def documents(n: int = 6) -> list[Document]:
    return [Document(f"doc-{i}", f"domain-{i % 3}", SPLITS[i % 3]) for i in range(n)]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both phases, two stacks, four shards, documents with splits of their own."""
    path = tmp_path_factory.mktemp("data") / "trace"
    stacks = {"encoder": stack_info(2, 8, 1, dropped=True), "decoder": stack_info(3, 8, 2)}
    header = replace(header_for(stacks, phases=("prefill", "decode")), documents=documents())
    write_trace(path, stacks, LENGTHS, header, phases=(0, 1))
    return path


def naive_windows(
    reader: TraceReader, stack: str, split: str, phase: int, window: int, context: int
) -> list[Any]:
    """(document, absolute tokens in the window, which of them are scored), by plain loops."""
    s = reader.stack(stack).sequences
    out = []
    for i in range(len(s)):
        if SPLITS[s.split_S[i]] != split or s.phase_S[i] != phase:
            continue
        start, length = int(s.start_S[i]), int(s.length_S[i])
        for first in range(0, length, window):
            last = min(first + window, length)
            low = max(0, first - context)
            high = min(last + 1, length) if phase == 1 else last
            tokens = [start + t for t in range(low, high)]
            out.append((int(s.document_S[i]), tokens, [first <= t < last for t in range(low, high)]))
    return out


@pytest.mark.parametrize(
    ("phase", "stack"), [("prefill", "encoder"), ("prefill", "decoder"), ("decode", "decoder")]
)
@pytest.mark.parametrize(("window", "context"), [(8, 4), (128, 0), (7, 32)])
def test_batches_equal_a_naive_loop(trace: Path, phase: str, stack: str, window: int, context: int) -> None:
    dm = RoutingDataModule(trace, stack, phase, window=window, context=context, batch_size=3)
    reader = TraceReader(trace)
    view = reader.stack(stack)
    everything = np.arange(view.num_tokens)
    raw = {f: view.gather(f, everything) for f in view.fields}
    for split in ("validation", "test"):
        want = naive_windows(reader, stack, split, ["prefill", "decode"].index(phase), window, context)
        loader = loaders(dm)[split]
        seen = 0
        for batch in loader:
            assert isinstance(batch, RoutingBatch)
            assert batch.phase == phase
            B, T = batch.valid_BT.shape
            group = want[seen : seen + B]
            seen += B
            assert max(len(g[1]) for g in group) == T
            for b, (document, tokens, scored) in enumerate(group):
                n = len(tokens)
                assert batch.valid_BT[b].tolist() == [True] * n + [False] * (T - n)
                assert batch.mask_BT[b].tolist() == scored + [False] * (T - n)
                assert dm.documents[int(batch.document_B[b])] == f"doc-{document}"
                assert dm.domains[int(batch.domain_B[b])] == f"domain-{document % 3}"
                for name, tensor in (
                    ("experts", batch.experts_BTLK),
                    ("weights", batch.weights_BTLK),
                    ("token_ids", batch.token_ids_BT),
                    ("positions", batch.positions_BT),
                    ("hidden", batch.hidden_BTLD),
                    ("dropped", batch.dropped_BTL),
                ):
                    assert (tensor is None) == (name not in raw)
                    if tensor is None:
                        continue
                    assert np.array_equal(tensor[b, :n].numpy(), raw[name][tokens])
                    assert not tensor[b, n:].any()
            assert (
                batch.experts_BTLK.dtype
                == batch.token_ids_BT.dtype
                == batch.positions_BT.dtype
                == torch.int64
            )
            assert batch.weights_BTLK.dtype == torch.float32
        assert seen == len(want)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    phase=st.sampled_from(["prefill", "decode"]),
    window=st.integers(1, 50),
    context=st.one_of(st.none(), st.integers(0, 50)),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_every_token_is_scored_exactly_once(
    trace: Path, phase: str, window: int, context: int | None, batch_size: int, seed: int
) -> None:
    dm = RoutingDataModule(
        trace,
        "decoder",
        phase,
        window=window,
        context=context,
        batch_size=batch_size,
        seed=seed,
        verify=False,
    )
    s = dm.readers[0].stack("decoder").sequences
    mine = s.phase_S == ["prefill", "decode"].index(phase)
    documents_of: dict[str, set[int]] = {}
    for number, (split, loader) in enumerate(loaders(dm).items()):
        scored: Counter[tuple[int, int]] = Counter()
        lengths = s.length_S[mine & (s.split_S == number)]
        pairs = 0
        for batch in loader:
            for b, t in zip(*np.nonzero(batch.mask_BT.numpy()), strict=True):
                scored[int(batch.document_B[b]), int(batch.positions_BT[b, t])] += 1
            pairs += int(targets(batch, 3)[1][:, :, -1, 0].sum())  # from the last layer into the next token
            documents_of.setdefault(split, set()).update(batch.document_B.tolist())
        want = Counter(
            (int(d), t)
            for d, n in zip(s.document_S[mine & (s.split_S == number)], lengths, strict=True)
            for t in range(int(n))
        )
        assert scored == want
        # While decoding, every token but a sequence's last has a next token to foresee, across windows too.
        assert pairs == (sum(int(n) - 1 for n in lengths) if phase == "decode" else 0)
    sets = list(documents_of.values())
    assert len(set().union(*sets)) == sum(map(len, sets))


@given(st.lists(st.integers(1, 60), max_size=8), st.integers(1, 30), st.integers(0, 40), st.booleans())
def test_windows_partition_sequences(lengths: list[int], window: int, context: int, successor: bool) -> None:
    length_S = np.array(lengths, dtype=np.int64)
    start_S = np.cumsum(length_S) - length_S + 1000
    sequence, first, length, before, after = cut_windows(start_S, length_S, window, context, successor)
    scored = np.concatenate(
        [np.arange(f, f + n) for f, n in zip(first, length, strict=True)] or [np.zeros(0)]
    )
    assert np.array_equal(scored, np.arange(1000, 1000 + sum(lengths)))
    for w in range(len(first)):
        low, high = start_S[sequence[w]], start_S[sequence[w]] + length_S[sequence[w]]
        assert 1 <= length[w] <= window
        assert first[w] - before[w] == max(low, first[w] - context)
        assert first[w] + length[w] + after[w] == min(high, first[w] + length[w] + int(successor))


def test_documents_without_a_split_are_hashed(tmp_path: Path) -> None:
    stacks = {"decoder": stack_info(hidden="none")}
    write_trace(tmp_path, stacks, [[3] * 60] * 2, header_for(stacks, documents=200))
    found = {}
    for name, ratios in (("default", (0.8, 0.1, 0.1)), ("other", (0.2, 0.4, 0.4))):
        dm = RoutingDataModule(tmp_path, splits=ratios)
        found[name] = {k: {int(d) for b in v for d in b.document_B} for k, v in loaders(dm).items()}
    for split in found.values():
        assert sum(map(len, split.values())) == len(set().union(*split.values()))
    assert len(found["default"]["train"]) > 70 > len(found["other"]["train"])


def test_everything_is_a_test_document(trace: Path) -> None:
    """A trace of other text is one test set: each sequence of any split once, and nothing to train on."""
    dm = RoutingDataModule(trace, "decoder", window=8, batch_size=5, everything=True)
    s = dm.readers[0].stack("decoder").sequences
    assert len(np.unique(s.split_S[s.phase_S == 0])) == 3
    batches = list(dm.test_dataloader())
    assert sum(int(b.mask_BT.sum()) for b in batches) == int(s.length_S[s.phase_S == 0].sum())
    found = {int(d) for b in batches for d in b.document_B}
    assert found == set(s.document_S[s.phase_S == 0].tolist())
    for loader, split in ((dm.train_dataloader, "train"), (dm.val_dataloader, "validation")):
        with pytest.raises(TraceError, match=f"everything=true .* nothing is left for '{split}'"):
            loader()


def test_order_depends_on_seed_and_epoch_only(trace: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = RoutingDataModule(trace, "decoder", window=4, batch_size=2, seed=seed).train_dataloader()
        assert isinstance(loader.dataset, WindowDataset)
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]  # Lightning does this
        return [int(x) for b in loader for x in b.token_ids_BT.flatten()]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 1) == order(0, 1)


@pytest.mark.parametrize("limit", [2, {"train": 3, "test": 1, "validation": None}])
def test_max_sequences(trace: Path, limit: Any) -> None:
    everything = RoutingDataModule(trace, "decoder", "decode", window=1000)
    few = RoutingDataModule(trace, "decoder", "decode", window=1000, max_sequences=limit)
    for split, loader in loaders(few).items():
        cap = limit if isinstance(limit, int) else limit[split]
        total = len(loaders(everything)[split].dataset)
        assert len(loader.dataset) == (total if cap is None else min(cap, total))


def test_workers_give_the_same_batches(trace: Path) -> None:
    one = list(RoutingDataModule(trace, "decoder", window=8, batch_size=4).train_dataloader())
    two = list(RoutingDataModule(trace, "decoder", window=8, batch_size=4, num_workers=2).train_dataloader())
    assert len(one) == len(two) > 1
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.experts_BTLK, b.experts_BTLK)
        assert isinstance(a.hidden_BTLD, Tensor)
        assert isinstance(b.hidden_BTLD, Tensor)
        assert torch.equal(a.hidden_BTLD, b.hidden_BTLD)


def test_dataset_survives_spawned_workers(trace: Path) -> None:
    """Pickled (as a spawned worker gets it), the data set maps its files anew and stays small."""
    loader = RoutingDataModule(trace, "decoder").train_dataloader()
    data = pickle.dumps(loader.dataset)
    assert len(data) < 50_000
    again = pickle.loads(data)
    assert torch.equal(again[0].experts_BTLK, loader.dataset[0].experts_BTLK)


def test_spec_routers_and_id_only(trace: Path) -> None:
    dm = RoutingDataModule([trace], "encoder")
    assert dm.spec == StackSpec(2, 8, 1, 4, 100, "prefill", bidirectional=True)
    assert dm.routers is not None
    assert dm.routers.keys() == {0, 1}
    assert dm.domains == ["domain-0", "domain-1", "domain-2"]
    bare = RoutingDataModule(trace, "encoder", use_hidden=False)
    assert bare.spec.hidden_size is None
    assert next(iter(bare.val_dataloader())).hidden_BTLD is None


def test_trace_without_weights_or_routers(tmp_path: Path) -> None:
    stacks = {"decoder": stack_info(2, 300, 4, D=None, hidden="none", has_weights=False)}
    write_trace(tmp_path, stacks, [[6, 3]] * 4, replace(header_for(stacks), documents=documents()))
    dm = RoutingDataModule(tmp_path)
    assert dm.routers is None
    batch = next(iter(dm.train_dataloader()))
    assert torch.equal(
        batch.weights_BTLK[batch.valid_BT], torch.full_like(batch.weights_BTLK[batch.valid_BT], 0.25)
    )
    assert not batch.weights_BTLK[~batch.valid_BT].any()
    assert int(batch.experts_BTLK.max()) > 255


def test_mixing_traces(tmp_path: Path) -> None:
    stacks = {"decoder": stack_info()}
    shared = [Document("shared", "b", "test"), *documents(3)]
    header = replace(header_for(stacks), documents=documents())
    write_trace(tmp_path / "a", stacks, [[4, 5, 6, 7] * 3], header, seed=1)
    header = replace(header_for(stacks), documents=shared)
    write_trace(tmp_path / "b", stacks, [[4, 5, 6, 7] * 3], header, seed=1)
    dm = RoutingDataModule([tmp_path / "a", tmp_path / "b"], window=3, batch_size=5)
    assert dm.domains == ["domain-0", "domain-1", "domain-2", "b"]
    assert dm.documents == [f"doc-{i}" for i in range(6)] + ["shared"]
    total, seen = 0, set()
    for split, loader in loaders(dm).items():
        for batch in loader:
            total += int(batch.mask_BT.sum())
            names = {dm.documents[d] for d in batch.document_B.tolist()}
            assert all(n == "shared" or SPLITS[int(n[4:]) % 3] == split for n in names)
            seen |= names
    assert total == 2 * 66
    assert "shared" in seen
    # Each trace alone gives the same tokens.
    alone = [
        int(b.mask_BT.sum())
        for p in "ab"
        for x in loaders(RoutingDataModule(tmp_path / p)).values()
        for b in x
    ]
    assert sum(alone) == total


def test_mixing_what_does_not_fit(tmp_path: Path) -> None:
    stacks = {"decoder": stack_info()}
    write_trace(tmp_path / "a", stacks, header=replace(header_for(stacks), documents=documents()))
    moved = [replace(d, split="train") for d in documents()]
    write_trace(tmp_path / "moved", stacks, header=replace(header_for(stacks), documents=moved))
    with pytest.raises(TraceError, match=r"'doc-1' is in split 'train' of .*moved but in 'validation'"):
        RoutingDataModule([tmp_path / "a", tmp_path / "moved"]).setup()
    wide = {"decoder": stack_info(E=9)}
    write_trace(tmp_path / "wide", wide)
    with pytest.raises(TraceError, match=r"\(3, 9, 2, 4\) but .*a has \(3, 8, 2, 4\)"):
        RoutingDataModule([tmp_path / "a", tmp_path / "wide"]).setup()
    write_trace(tmp_path / "other", stacks, header=replace(header_for(stacks), documents=documents()), seed=3)
    assert not torch.equal(
        routers_for(stacks, 0)["decoder.0.norm_weight"], routers_for(stacks, 3)["decoder.0.norm_weight"]
    )
    with pytest.raises(TraceError, match="other routers"):
        _ = RoutingDataModule([tmp_path / "a", tmp_path / "other"]).routers
    partial = {"decoder": replace(stack_info(), hidden_layers=[0, 2])}
    write_trace(tmp_path / "partial", partial)
    with pytest.raises(TraceError, match=r"MoE layers \[0, 2\] only"):
        RoutingDataModule(tmp_path / "partial").setup()
    assert RoutingDataModule(tmp_path / "partial", use_hidden=False).spec.hidden_size is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"phase": "training"}, "data.phase is 'training'"),
        ({"window": 0}, "data.window is 0"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"context": -1}, "data.context is -1"),
        ({"splits": (0.5, 0.1, 0.1)}, "add up to 1"),
        ({"max_sequences": {"dev": 1}}, "names split 'dev'"),
        ({"traces": []}, "data.traces is empty"),
        ({"stack": "middle"}, "no stack 'middle'"),
        ({"max_sequences": 0}, "data.max_sequences is 0"),
        ({"traces": "nowhere"}, "There is no trace at nowhere"),
    ],
)
def test_options_that_make_no_sense(trace: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TraceError, match=words):
        RoutingDataModule(**{"traces": trace, **options}).train_dataloader()


def test_phase_and_split_that_are_not_there(tmp_path: Path) -> None:
    stacks = {"decoder": stack_info()}
    only_train = [replace(d, split="train") for d in documents()]
    write_trace(tmp_path, stacks, header=replace(header_for(stacks), documents=only_train))
    with pytest.raises(TraceError, match="holds phase prefill, not 'decode'"):
        RoutingDataModule(tmp_path, phase="decode").setup()
    with pytest.raises(TraceError, match="is in split 'validation'"):
        RoutingDataModule(tmp_path).val_dataloader()


class Touch(L.LightningModule):
    """Counts tokens, to see the data module through Lightning's own loop."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.tokens: Counter[str] = Counter()

    def training_step(self, batch: RoutingBatch, _: int) -> Tensor:
        self.tokens["train"] += int(batch.mask_BT.sum())
        return self.weight * batch.weights_BTLK.sum()

    def validation_step(self, batch: RoutingBatch, _: int) -> None:
        self.tokens["validation"] += int(batch.mask_BT.sum())

    def test_step(self, batch: RoutingBatch, batch_idx: int) -> None:
        self.tokens["test"] += int(batch.mask_BT.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_runs_it_and_leaves_the_test_split_locked(
    trace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dm = RoutingDataModule(trace, "decoder", window=8)
    trainer = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    model = Touch()
    s = TraceReader(trace).stack("decoder").sequences
    total = [int(s.length_S[(s.phase_S == 0) & (s.split_S == i)].sum()) for i in range(3)]
    with caplog.at_level(logging.INFO, "specgate.traces.datamodule"):
        trainer.fit(model, dm)
        assert model.tokens == {"train": 2 * total[0], "validation": 2 * total[1]}
        assert "locked test split" not in caplog.text
        trainer.test(model, dm, verbose=False)
    assert model.tokens["test"] == total[2]
    assert "locked test split" in caplog.text
