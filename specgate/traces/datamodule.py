"""A LightningDataModule over routing traces: splits by document, windows, batches straight from mapped
memory.

Letters: B windows in a batch, S sequences, L MoE layers, E experts, K experts per token, D hidden size.

Documents are split, never tokens: all sequences of a document lie in one split, also when several traces hold
it. The
test split is locked: nothing but :meth:`RoutingDataModule.test_dataloader` reads it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from specgate.errors import TraceError
from specgate.traces.arrays import Array
from specgate.traces.batch import RoutingBatch
from specgate.traces.cached import CachedDataset
from specgate.traces.reader import StackView, TraceReader
from specgate.traces.schema import PHASES, SPLITS, StackSpec, check_ratios, split_of
from specgate.traces.windows import WindowDataset, WindowTable, as_is, cut_windows

log = logging.getLogger(__name__)
DECODE_CONTEXT = 32


class RoutingDataModule(L.LightningDataModule):
    """Serves windows of one stack and phase of one or several traces.

    Args:
        traces: directory of a trace, or several (equal L, E, K and D).
        stack: ``encoder`` or ``decoder``.
        phase: ``prefill`` or ``decode``; the two are never mixed.
        window: longer sequences are cut into windows of this many scored tokens.
        batch_size: windows per batch.
        num_workers: loader processes; 0 assembles batches in this one (usually fast enough).
        context: tokens of the same sequence that precede a window, valid but not scored. None: 32 for decode,
            where earlier tokens are known, and 0 for prefill, where they are not.
        max_sequences: at most so many sequences per split (a number, or a mapping from split to number),
            chosen by ``seed``; None takes all.
        splits: shares of train, validation and test for documents whose trace says nothing about their split.
        everything: all documents are the test split, whatever the trace says of them. For text that nothing
            was trained or tuned on, such as another domain; there are no train and validation batches then.
        train_on_prefill: train on prefill sequences too, as if their text were being decoded (only for phase
            decode of a decoder, which goes through the same states when it reads a text as when it writes
            it). What is scored stays decoded text.
        use_hidden: serve hidden states if the trace has them; False makes an id-only data set of any trace.
        seed: of the order of training batches and of the training sequences kept under ``max_sequences``.
        pin_memory: passed to the DataLoader.
        cache: a device (``cpu``, ``cuda``) that holds each split whole once it is opened, so that a step
            costs no reading and no copy; ``auto`` is the first GPU if there is one; None reads each batch
            from the mapped files.
        verify: compare every file with its SHA-256 when opening.

    Raises:
        TraceError: when first used, if a trace is missing, damaged or of another shape, phase or stack.
    """

    def __init__(
        self,
        traces: str | Path | Sequence[str | Path],
        stack: str = "decoder",
        phase: str = "prefill",
        window: int = 128,
        batch_size: int = 16,
        num_workers: int = 0,
        context: int | None = None,
        max_sequences: int | Mapping[str, int | None] | None = None,
        splits: Sequence[float] = (0.8, 0.1, 0.1),
        everything: bool = False,
        train_on_prefill: bool = False,
        use_hidden: bool = True,
        seed: int = 0,
        pin_memory: bool = False,
        verify: bool = True,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        self.paths = [Path(p) for p in ([traces] if isinstance(traces, (str, Path)) else traces)]
        if not self.paths:
            raise TraceError("data.traces is empty; name at least one trace directory.")
        if phase not in PHASES:
            raise TraceError(f"data.phase is {phase!r}; choose one of {', '.join(PHASES)}.")
        for name, value in (("window", window), ("batch_size", batch_size)):
            if value < 1:
                raise TraceError(f"data.{name} is {value}; it must be at least 1.")
        if context is not None and context < 0:
            raise TraceError(f"data.context is {context}; it must be 0 or more.")
        if isinstance(max_sequences, Mapping) and (odd := sorted(set(max_sequences) - set(SPLITS))):
            raise TraceError(f"data.max_sequences names split {odd[0]!r}; choose among {', '.join(SPLITS)}.")
        if train_on_prefill and (stack, phase) != ("decoder", "decode"):
            raise TraceError(
                f"data.train_on_prefill is for decoding, not for {phase} of the {stack}; leave it out, or "
                "set data.stack=decoder data.phase=decode."
            )
        check_ratios(tuple(splits))
        self.stack, self.phase, self.window, self.batch_size = stack, phase, window, batch_size
        self.context = context if context is not None else (DECODE_CONTEXT if phase == "decode" else 0)
        self.num_workers, self.max_sequences, self.seed = num_workers, max_sequences, seed
        self.splits = (float(splits[0]), float(splits[1]), float(splits[2]))
        self.everything, self.use_hidden, self.train_on_prefill = everything, use_hidden, train_on_prefill
        self.pin_memory, self.verify = pin_memory, verify
        self.cache = cache if cache != "auto" else "cuda" if torch.cuda.is_available() else None
        self._opened: _Opened | None = None
        self._datasets: dict[str, WindowDataset | CachedDataset] = {}

    # --- what predictors and reports ask ---

    @property
    def readers(self) -> list[TraceReader]:
        """The opened traces, in the order they were given."""
        return self._open().readers

    @property
    def spec(self) -> StackSpec:
        """What a predictor must know of the stack (``hidden_size`` is None when no hidden states are
        served).
        """
        return self._open().spec

    @property
    def domains(self) -> list[str]:
        """Names of the domains; ``domain_B`` of a batch counts them."""
        return self._open().domains

    @property
    def documents(self) -> list[str]:
        """Names of the documents; ``document_B`` of a batch counts them."""
        return self._open().documents

    @property
    def routers(self) -> dict[int, dict[str, Tensor]] | None:
        """The host's routers by MoE layer (see :meth:`TraceReader.routers`), or None if the traces lack them.

        Raises:
            TraceError: if the traces come from different routers.
        """
        found = [r.routers(self.stack) for r in self.readers]
        first = found[0]
        for path, other in zip(self.paths[1:], found[1:], strict=True):
            same = (other is None and first is None) or (
                other is not None
                and first is not None
                and other.keys() == first.keys()
                and all(
                    other[i].keys() == first[i].keys()
                    and all(torch.equal(other[i][k], first[i][k]) for k in first[i])
                    for i in first
                )
            )
            if not same:
                raise TraceError(
                    f"{path} was recorded from other routers than {self.paths[0]}; train on one of them."
                )
        return first

    def text_digest(self, split: str) -> str | None:
        """SHA-256 of the text that a split's windows hold (documents, token ids), however it was sharded.

        Returns:
            hexadecimal digits, or None if the split is empty.
        """
        try:
            return self._open().dataset(self, split).text_digest(self.documents)
        except TraceError:
            return None

    # --- Lightning ---

    def setup(self, stage: str | None = None) -> None:
        """Open (and verify) the traces. The test split stays shut until :meth:`test_dataloader`."""
        self._open()

    def train_dataloader(self) -> DataLoader[RoutingBatch]:
        """Shuffled windows of the training documents; the order depends on ``seed`` and epoch only."""
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[RoutingBatch]:
        """Windows of the validation documents, in order."""
        return self._loader("validation")

    def test_dataloader(self) -> DataLoader[RoutingBatch]:
        """Windows of the locked test documents, in order. Touch it once per reported result."""
        log.info("opening the locked test split of %s", ", ".join(map(str, self.paths)))
        return self._loader("test")

    def transfer_batch_to_device(
        self, batch: RoutingBatch, device: torch.device, dataloader_idx: int
    ) -> RoutingBatch:
        """Move a batch (Lightning calls this)."""
        return batch.to(device, non_blocking=self.pin_memory)

    # --- inside ---

    def _loader(self, split: str) -> DataLoader[RoutingBatch]:
        if split not in self._datasets:
            windows = self._open().dataset(self, split)
            self._datasets[split] = windows if self.cache is None else CachedDataset(windows, self.cache)
        dataset = self._datasets[split]
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=EpochSampler(dataset, self.seed) if split == "train" else None,
            num_workers=self.num_workers if self.cache is None else 0,
            collate_fn=as_is,
            pin_memory=self.pin_memory and self.cache is None,
            persistent_workers=self.num_workers > 0 and self.cache is None,
        )

    def _open(self) -> _Opened:
        if self._opened is None:
            self._opened = _Opened(self)
        return self._opened


class EpochSampler(RandomSampler):
    """A permutation that depends on seed and epoch alone, so that a resumed training sees the order it would
    have.
    """

    def __init__(self, dataset: WindowDataset | CachedDataset, seed: int) -> None:
        super().__init__(dataset)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (Lightning calls this before each one)."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        return iter(generator.permutation(len(self.data_source)).tolist())


class _Opened:
    """The opened traces of a data module and what they agree on."""

    def __init__(self, dm: RoutingDataModule) -> None:
        self.readers = [TraceReader(p, verify=dm.verify) for p in dm.paths]
        self.views = [r.stack(dm.stack) for r in self.readers]
        self.hidden = dm.use_hidden and all(v.info.hidden_dtype != "none" for v in self.views)
        self.dropped = all(v.info.has_dropped for v in self.views)
        for path, reader, view in zip(dm.paths, self.readers, self.views, strict=True):
            self._check(dm, path, reader, view)
        info = self.views[0].info
        self.spec = StackSpec(
            layers=info.layers,
            experts=info.experts,
            top_k=info.top_k,
            hidden_size=info.hidden_size if self.hidden else None,
            vocab_size=max(r.header.vocab_size for r in self.readers),
            phase=dm.phase,
            bidirectional=dm.stack == "encoder" and dm.phase == "prefill",
        )
        self.domains = list(dict.fromkeys(d for r in self.readers for d in r.header.domains))
        split_of_document: dict[str, str] = {}
        self.names: list[Array] = []  # per trace: document index in the header -> index over all traces
        self.domain_of: list[Array] = []
        for path, reader in zip(dm.paths, self.readers, strict=True):
            documents = reader.header.documents
            for d in documents:
                split = "test" if dm.everything else d.split or split_of(d.name, dm.splits)
                if split_of_document.setdefault(d.name, split) != split:
                    raise TraceError(
                        f"Document {d.name!r} is in split {split!r} of {path} but in "
                        f"{split_of_document[d.name]!r} of another trace; import one of them again with "
                        "equal splits."
                    )
            index = {name: i for i, name in enumerate(split_of_document)}
            self.names.append(np.array([index[d.name] for d in documents], dtype=np.int64))
            self.domain_of.append(np.array([self.domains.index(d.domain) for d in documents], dtype=np.int64))
        self.documents = list(split_of_document)
        self.split_D = np.array([SPLITS.index(s) for s in split_of_document.values()], dtype=np.int64)

    def _check(self, dm: RoutingDataModule, path: Path, reader: TraceReader, view: StackView) -> None:
        first, info = self.views[0].info, view.info
        if dm.phase not in reader.header.phases and not dm.train_on_prefill:
            raise TraceError(
                f"{path} holds phase {' and '.join(reader.header.phases)}, not {dm.phase!r}; set data.phase "
                "or choose another trace."
            )
        shape = [
            (i.layers, i.experts, i.top_k, i.hidden_size if self.hidden else None) for i in (first, info)
        ]
        if shape[0] != shape[1]:
            raise TraceError(
                f"{path} has (layers, experts, top_k, hidden_size) {shape[1]} but {dm.paths[0]} has "
                f"{shape[0]}; only traces of equal shape can be mixed."
            )
        if self.hidden and info.hidden_layers != list(range(info.layers)):
            raise TraceError(
                f"{path} records hidden states of MoE layers {info.hidden_layers} only; set "
                "data.use_hidden=false or collect all layers."
            )

    def dataset(self, dm: RoutingDataModule, split: str) -> WindowDataset:
        """The windows of one split.

        Raises:
            TraceError: if the split has no sequence.
        """
        if dm.everything and split != "test":
            raise TraceError(
                f"With data.everything=true all of {', '.join(map(str, dm.paths))} is the test split and "
                f"nothing is left for {split!r}; set data.everything=false to train or calibrate on it."
            )
        number = SPLITS.index(split)
        chosen: list[Array] = []
        for view, names in zip(self.views, self.names, strict=True):
            s = view.sequences
            mine = self.split_D[names[s.document_S]] == number
            if split != "train" or not dm.train_on_prefill:
                mine &= s.phase_S == PHASES.index(dm.phase)
            chosen.append(np.nonzero(mine)[0])
        total = sum(map(len, chosen))
        if not total:
            raise TraceError(
                f"No {dm.phase} sequence of {', '.join(map(str, dm.paths))} is in split {split!r}; trace "
                "more documents or change data.splits."
            )
        limit = dm.max_sequences.get(split) if isinstance(dm.max_sequences, Mapping) else dm.max_sequences
        if limit is not None and limit < total:
            if limit < 1:
                raise TraceError(
                    f"data.max_sequences is {limit} for split {split!r}; take at least 1 sequence."
                )
            keep = np.zeros(total, dtype=bool)
            seed = dm.seed if split == "train" else 0  # runs of several seeds are scored on the same
            keep[np.random.default_rng([seed, number]).permutation(total)[:limit]] = True
            parts = np.split(keep, np.cumsum([len(c) for c in chosen])[:-1])
            chosen = [c[k] for c, k in zip(chosen, parts, strict=True)]
        columns: list[tuple[Array, ...]] = []
        for i, (view, sequences) in enumerate(zip(self.views, chosen, strict=True)):
            s = view.sequences
            which, first, length, before, after = cut_windows(
                s.start_S[sequences], s.length_S[sequences], dm.window, dm.context, dm.phase == "decode"
            )
            document = s.document_S[sequences][which]
            trace = np.full(len(which), i, dtype=np.int64)
            columns.append(
                (trace, first, length, before, after, self.domain_of[i][document], self.names[i][document])
            )
        table = WindowTable(*(np.concatenate(c) for c in zip(*columns, strict=True)))
        return WindowDataset(self.readers, dm.stack, table, dm.phase, self.hidden, self.dropped)
