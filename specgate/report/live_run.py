"""One generation, and what is to be known of it: when each token came, which logits, how long experts were
waited for.

Letters: T tokens generated, V token ids.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from specgate.report.live_models import Prompt
from specgate.report.spans import Marks, Span


class Stamps:
    """A streamer that notes when tokens come; transformers hands it the prompt first.

    Attributes:
        times: nanoseconds of the monotonic clock, of each token.
    """

    def __init__(self) -> None:
        self.times: list[int] = []
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.monotonic_ns())

    def end(self) -> None:
        pass


class Forced:
    """A logits processor that leaves one token at each step: a document goes on.

    Args:
        prompt: tokens before the first step. next_T: what comes.
    """

    def __init__(self, prompt: int, next_T: Sequence[int]) -> None:
        self._prompt, self._next_T = prompt, next_T

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wanted = self._next_T[input_ids.shape[1] - self._prompt]
        out = torch.full_like(scores, -torch.inf)
        out[:, wanted] = 0.0
        return out


@dataclass(frozen=True)
class Generated:
    """What a prompt gave.

    Attributes:
        first: seconds until the first token was there.
        each: seconds of each further token.
        window: from the first token to the last.
        tokens: generated.
        digest: of the logits of all steps, bit by bit.
    """

    first: float
    each: list[float]
    window: Span
    tokens: list[int]
    digest: str


@torch.inference_mode()
def generate(model: Any, prompt: Prompt, tokens: int, device: torch.device, forced: bool) -> Generated:
    """Greedy decoding of a fixed number of tokens, or forced along the document."""
    ids_1T = prompt.ids_1T.to(device)
    stamps = Stamps()
    more: dict[str, Any] = {}
    if forced:
        more["logits_processor"] = [Forced(ids_1T.shape[1], prompt.next_T)]
    begin = time.monotonic_ns()
    found = model.generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=tokens,
        min_new_tokens=None if forced else tokens,
        do_sample=False,
        streamer=stamps,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        **more,
    )
    times = stamps.times
    logits_TV = torch.stack([step[0] for step in found.logits]).float().cpu()
    digest = hashlib.sha256(logits_TV.contiguous().numpy().tobytes()).hexdigest()[:16]
    return Generated(
        first=(times[0] - begin) * 1e-9,
        each=[(b - a) * 1e-9 for a, b in itertools.pairwise(times)],
        window=(times[0], times[-1]),
        tokens=found.sequences[0, -len(times) :].tolist(),
        digest=digest,
    )


class Watched:
    """Notes how long an offloaded model waits for experts; a context.

    Wraps ``acquire`` of that model's own store and takes the wrapping off again.

    Args:
        model: of ``specgate.offload``, or any other, of which nothing is noted.

    Attributes:
        waits: spans from the call until kernels may use the experts, once the context was left.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._store: Any = getattr(getattr(model, "specgate", None), "store", None)
        self._device = device
        self.waits: list[Span] = []
        self._pairs: list[tuple[Any, Any]] = []

    def __enter__(self) -> Watched:
        self._marks = marks = Marks(self._device)
        if self._store is not None:
            acquire = self._store.acquire

            def timed(layer: int, experts: Sequence[int]) -> list[int]:
                begin = marks.mark()
                slots: list[int] = acquire(layer, experts)
                self._pairs.append((begin, marks.mark()))
                return slots

            self._store.acquire = timed
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None:
            del self._store.acquire
        if kind is None and self._pairs:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.waits = [(self._marks.read(begin), self._marks.read(end)) for begin, end in self._pairs]
