"""What the reference models learn: next tokens (OLMoE), span corruption and prefix continuation (Switch).

A batch is a function of (seed, step) alone, so that an interrupted run goes on with exactly the batches it
would have seen.
All rows of a batch have the same lengths: no padding, because Switch's routers would count it against their
capacity.

Letters: B rows, W window, N stream tokens, S encoder tokens, T decoder tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

Batch = dict[str, Tensor]


def windows(stream_N: np.ndarray, rows: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """``rows`` random windows of the stream: ``[B, W]`` int64."""
    start_B1 = rng.integers(0, len(stream_N) - width, size=(rows, 1))
    return stream_N[start_B1 + np.arange(width)].astype(np.int64)


def causal(window_BW: np.ndarray) -> Batch:
    """Next-token prediction: ``input_ids`` and ``labels`` are ``[B, W - 1]``."""
    return {"input_ids": torch.from_numpy(window_BW[:, :-1]), "labels": torch.from_numpy(window_BW[:, 1:])}


def prefix_lm(window_BW: np.ndarray, prefix: int, start_id: int = 0) -> Batch:
    """The encoder reads ``prefix`` tokens, the decoder continues (Raffel et al. 2020, section 3.2.1)."""
    return _seq2seq(window_BW[:, :prefix], window_BW[:, prefix:], start_id)


def span_corruption(
    window_BW: np.ndarray, sentinels: list[int], eos_id: int, rng: np.random.Generator, start_id: int = 0
) -> Batch:
    """15 % of the tokens in spans of mean length 3 are replaced by sentinels and asked for (Raffel et al.
    2020).

    Shapes:
        window_BW: ``[B, W]`` with W >= 16.
        input_ids: ``[B, W - noise + spans + 1]``; labels: ``[B, noise + spans + 1]``.
    """
    B, W = window_BW.shape
    noise = max(1, round(0.15 * W))
    spans = min(max(1, round(noise / 3)), len(sentinels), noise, W - noise)
    lengths_B2S = np.stack(
        [_composition(W - noise, spans, B, rng), _composition(noise, spans, B, rng)], axis=2
    )
    ends = lengths_B2S.reshape(B, 2 * spans).cumsum(1)
    segment_BW = (np.arange(W)[None, :, None] >= ends[:, None, :]).sum(2)  # 0, 1, 2, ...: odd ones are noise
    is_noise = segment_BW % 2 == 1
    first = np.zeros_like(is_noise)
    first[:, 1:] = is_noise[:, 1:] & ~is_noise[:, :-1]
    sentinel_BW = np.asarray(sentinels)[np.minimum(segment_BW // 2, len(sentinels) - 1)]
    kept = np.where(first, sentinel_BW, window_BW)[~is_noise | first].reshape(B, -1)
    # decoder: each span announced by its sentinel. Write (sentinel, token) pairs and keep what belongs.
    pairs = np.stack([sentinel_BW, window_BW], axis=2).reshape(B, 2 * W)
    wanted = np.stack([first, is_noise], axis=2).reshape(B, 2 * W)
    asked = pairs[wanted].reshape(B, -1)
    eos_B1 = np.full((B, 1), eos_id)
    return _seq2seq(np.concatenate([kept, eos_B1], 1), np.concatenate([asked, eos_B1], 1), start_id)


def _composition(total: int, parts: int, rows: int, rng: np.random.Generator) -> np.ndarray:
    """Random ways to write ``total`` as a sum of ``parts`` positive integers: ``[B, parts]``."""
    cuts = rng.random((rows, total - 1)).argsort(1)[:, : parts - 1] + 1
    cuts = np.sort(np.concatenate([np.zeros((rows, 1), int), cuts, np.full((rows, 1), total)], 1), 1)
    return np.diff(cuts, axis=1)


def _seq2seq(source_BS: np.ndarray, target_BT: np.ndarray, start_id: int) -> Batch:
    target = torch.from_numpy(np.ascontiguousarray(target_BT))
    start = torch.full((len(target), 1), start_id)
    return {
        "input_ids": torch.from_numpy(np.ascontiguousarray(source_BS)),
        "decoder_input_ids": torch.cat([start, target[:, :-1]], 1),
        "labels": target,
    }


class Steps(Dataset[Batch]):
    """Batch number i of the run.

    Args:
        stream_N: training tokens.
        objective: ``"causal"`` or ``"switch"`` (prefix continuation and span corruption by turns).
        tokens_per_step: tokens that one batch shows the model (encoder and decoder together).
        length: tokens per row (causal), or the longest encoder and decoder input (switch).
        sentinels, eos_id: ids of the special tokens.
        seed: of the whole run.
    """

    def __init__(
        self,
        stream_N: np.ndarray,
        objective: str,
        tokens_per_step: int,
        length: int,
        sentinels: list[int],
        eos_id: int,
        seed: int = 0,
    ) -> None:
        self.stream_N, self.objective, self.tokens_per_step, self.length = (
            stream_N,
            objective,
            tokens_per_step,
            length,
        )
        self.sentinels, self.eos_id, self.seed = sentinels, eos_id, seed

    def __getitem__(self, step: int) -> Batch:
        rng = np.random.default_rng([self.seed, step])
        if self.objective == "causal":
            return causal(windows(self.stream_N, self.tokens_per_step // self.length, self.length + 1, rng))
        if step % 2 == 0:
            prefix = int(rng.integers(self.length // 4, self.length + 1))
            width = prefix + self.length
            return prefix_lm(windows(self.stream_N, self.tokens_per_step // width, width, rng), prefix)
        width = int(rng.integers(self.length // 2, int(self.length * 1.1)))
        window_BW = windows(self.stream_N, self.tokens_per_step // int(width * 1.2), width, rng)
        return span_corruption(window_BW, self.sentinels, self.eos_id, rng)


class FromStep(Sampler[int]):
    """Steps ``start`` to ``total`` of a run; its length is the whole run's, as a resumed Lightning
    epoch expects.
    """

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))
