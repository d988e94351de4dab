"""Windows of routed tokens over mapped traces, and the assembly of a batch from them.

Letters: B windows in a batch, W windows in all, T tokens of the longest window of a batch, S sequences, L MoE
layers, K experts per token, D hidden size.

A window is ``length`` scored tokens of one sequence, ``before`` tokens of context to their left and, while
decoding, one token to their right (the target of the wrapped horizons of the last scored token). Context and
right neighbour are valid but not scored, so that every token of a split is scored exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from specgate.traces.arrays import Array
from specgate.traces.batch import RoutingBatch
from specgate.traces.reader import TraceReader


@dataclass(frozen=True)
class WindowTable:
    """Where each window lies; all arrays are ``[W]`` int64.

    ``trace`` says which trace, ``first`` the first scored token (counted over the stack), ``length`` how many
    are scored, ``before`` and ``after`` how many valid tokens surround them; ``domain`` and ``document`` are
    indices over all traces.
    """

    trace: Array
    first: Array
    length: Array
    before: Array
    after: Array
    domain: Array
    document: Array

    def __len__(self) -> int:
        return len(self.first)


def cut_windows(
    start_S: Array, length_S: Array, window: int, context: int, successor: bool
) -> tuple[Array, ...]:
    """Cut sequences into windows of ``window`` scored tokens (the last one shorter), without a loop.

    Args:
        start_S, length_S: first token and length of each sequence.
        window: scored tokens per window.
        context: at most this many tokens of the same sequence precede them.
        successor: whether the token after the window is wanted too.

    Returns:
        sequence, first, length, before, after: five int64 arrays ``[W]``, ordered by sequence and position.
    """
    pieces_S = -(-length_S // window)
    sequence_W = np.repeat(np.arange(len(start_S)), pieces_S)
    piece_W = np.arange(len(sequence_W)) - np.repeat(np.cumsum(pieces_S) - pieces_S, pieces_S)
    offset_W = piece_W * window
    left_W = length_S[sequence_W] - offset_W
    length_W = np.minimum(left_W, window)
    before_W = np.minimum(offset_W, context)
    after_W = ((left_W > length_W) & successor).astype(np.int64)
    return sequence_W, start_S[sequence_W] + offset_W, length_W, before_W, after_W


class WindowDataset(Dataset[RoutingBatch]):
    """Windows over one or several traces; ``__getitems__`` gathers a whole batch at once.

    Pass :func:`as_is` as the DataLoader's ``collate_fn``.
    """

    def __init__(
        self,
        readers: list[TraceReader],
        stack: str,
        table: WindowTable,
        phase: str,
        hidden: bool,
        dropped: bool,
    ) -> None:
        self.readers, self.stack, self.table, self.phase = readers, stack, table, phase
        self.hidden, self.dropped = hidden, dropped

    def __len__(self) -> int:
        return len(self.table)

    def key(self) -> str:
        """Equal for equal windows of the same shards, a hash."""
        digest = hashlib.sha256(f"{self.stack} {self.phase} {self.hidden} {self.dropped}".encode())
        for reader in self.readers:
            digest.update("".join(shard.sha256 for shard in reader.header.shards).encode())
        for column in vars(self.table).values():
            digest.update(np.ascontiguousarray(column).tobytes())
        return digest.hexdigest()

    def text_digest(self, documents: Sequence[str]) -> str:
        """Equal for windows of the same text in whatever shards and order, a hash; ``documents`` names those
        that the table counts."""
        t, digests = self.table, []
        views = [reader.stack(self.stack) for reader in self.readers]
        for trace, first, length, document in zip(t.trace, t.first, t.length, t.document, strict=True):
            ids = views[trace].gather("token_ids", np.arange(first, first + length))
            window = hashlib.sha256(documents[document].encode() + b"\0")
            window.update(np.ascontiguousarray(ids.astype("<i8")).tobytes())
            digests.append(window.digest())
        return hashlib.sha256(b"".join(sorted(digests))).hexdigest()

    def __getitem__(self, index: int) -> RoutingBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> RoutingBatch:
        """The batch of these windows, padded on the right to the longest of them."""
        w, t = np.asarray(indices, dtype=np.int64), self.table
        before, length, after = t.before[w], t.length[w], t.after[w]
        total = before + length + after
        step_1T = np.arange(int(total.max()))[None, :]
        valid_BT = step_1T < total[:, None]
        mask_BT = (step_1T >= before[:, None]) & (step_1T < (before + length)[:, None])
        token_BT = (t.first[w] - before)[:, None] + step_1T
        rows = _Gatherer(self.readers, self.stack, t.trace[w], token_BT, valid_BT)
        experts_BTLK = rows("experts").long()
        has_weights = all(r.stack(self.stack).info.has_weights for r in self.readers)
        if has_weights:
            weights_BTLK = rows("weights").float()
        else:  # ranks unknown: each of the K experts counts the same
            weights_BTLK = torch.full(experts_BTLK.shape, 1.0 / experts_BTLK.shape[3])
            weights_BTLK *= torch.from_numpy(valid_BT)[:, :, None, None]
        return RoutingBatch(
            experts_BTLK=experts_BTLK,
            weights_BTLK=weights_BTLK,
            token_ids_BT=rows("token_ids").long(),
            positions_BT=rows("positions").long(),
            valid_BT=torch.from_numpy(valid_BT),
            mask_BT=torch.from_numpy(mask_BT),
            domain_B=torch.from_numpy(t.domain[w]),
            document_B=torch.from_numpy(t.document[w]),
            hidden_BTLD=rows("hidden").float() if self.hidden else None,
            dropped_BTL=rows("dropped").bool() if self.dropped else None,
            phase=self.phase,
        )


class _Gatherer:
    """Reads a field at the valid tokens of a batch; padding becomes zero."""

    def __init__(
        self, readers: list[TraceReader], stack: str, trace_B: Array, token_BT: Array, valid_BT: Array
    ) -> None:
        flat = np.nonzero(valid_BT.reshape(-1))[0]
        trace_N = np.broadcast_to(trace_B[:, None], valid_BT.shape).reshape(-1)[flat]
        token_N = token_BT.reshape(-1)[flat]
        self.shape = valid_BT.shape
        self.full = len(flat) == valid_BT.size
        self.parts = []
        for i in np.unique(trace_B).tolist():
            mine = trace_N == i
            self.parts.append((readers[i].stack(stack), token_N[mine], flat[mine]))

    def __call__(self, field: str) -> Tensor:
        if len(self.parts) == 1 and self.full:
            view, token_N, _ = self.parts[0]
            return _tensor(view.gather(field, token_N.reshape(self.shape)))
        out: Tensor | None = None
        for view, token_N, where_N in self.parts:
            rows = _tensor(view.gather(field, token_N))
            if out is None:
                out = rows.new_zeros((self.shape[0] * self.shape[1], *rows.shape[1:]))
            out[torch.from_numpy(where_N)] = rows.to(out.dtype)
        assert out is not None  # a batch has at least one window
        return out.reshape(*self.shape, *out.shape[1:])


def _tensor(rows: np.ndarray[Any, Any]) -> Tensor:
    """A torch tensor of the rows (uint16 widened, since torch computes little with it)."""
    return torch.from_numpy(rows.astype(np.int32) if rows.dtype == np.uint16 else rows)


def as_is(batch: Any) -> Any:
    """The collate function: :meth:`WindowDataset.__getitems__` has made the batch already."""
    return batch
