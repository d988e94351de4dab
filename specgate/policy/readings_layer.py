"""Readings of what a decoded layer costs the host: operations, the router read back, slots sent over.

Letters: K experts of a token, D hidden size, I width of an expert, S slots.

A model whose host must know each layer's experts launches nothing ahead of the device: :func:`read_host`
measures the parts of such a layer with tensors that are too small to keep a device busy, and
:func:`read_gathered` how fast experts are multiplied that are first copied together (``batched_mm``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from specgate.moe.hosts import quiet_imports
from specgate.policy.readings import MIB, Reading, timed, waiter
from specgate.small_tensors import to_device

#: Operations of one call of :class:`SmallLayer` that are not views, by its parts.
DENSE_OPERATIONS, EXPERT_OPERATIONS = 5, 18
ROUND_NS = 20e6  # of one call over and over: the host's own time varies
COPY_MIB = 64  # of the copy that the host waits for: longer than anything else in a layer


class SmallLayer:
    """One token through a layer that is too small to keep a device busy.

    The experts are those of transformers' gpt_oss, run as it decodes on a GPU (``batched_mm``), so that the
    time between operations is in the reading too.

    Args:
        device: where it runs.
        size: D and I.

    Attributes:
        hidden_1D: what the next call begins with.
    """

    def __init__(self, device: torch.device, size: int = 16) -> None:
        quiet_imports()
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        K, S = 4, 8
        sizes = {"num_local_experts": S, "num_experts_per_tok": K, "hidden_size": size}
        config = GptOssConfig(**sizes, intermediate_size=size, num_hidden_layers=1)
        config._experts_implementation = "batched_mm"
        self.device = device
        self._experts = GptOssExperts(config).to(device).requires_grad_(False)
        for parameter in self._experts.parameters():
            parameter.zero_()
        self._table_LK = torch.zeros(8, K, dtype=torch.int64, device=device)
        self._slots_1K = torch.zeros(1, K, dtype=torch.int64, device=device)
        self._weights_1K = torch.zeros(1, K, device=device)
        self.hidden_1D = torch.zeros(1, size, device=device)
        self._dense_MD = torch.zeros(2 * size, size, device=device)

    def _add(self, out_1D: Tensor) -> None:
        self.hidden_1D = F.rms_norm(self.hidden_1D + out_1D, self.hidden_1D.shape[1:])

    def dense(self) -> None:
        """A matrix, and the sums and norms around it and the experts."""
        self._add(F.linear(self.hidden_1D, self._dense_MD)[:, : self.hidden_1D.shape[1]])
        self._add(self.hidden_1D)

    def experts(self, slots_1K: Tensor | None = None) -> Tensor:
        """Experts by index."""
        chosen_1K = self._slots_1K if slots_1K is None else slots_1K
        out: Tensor = self._experts(self.hidden_1D, chosen_1K, self._weights_1K)
        return out

    def read_back(self) -> list[int]:
        """The router's choice, which the host waits for."""
        chosen: list[int] = self._table_LK[3].tolist()
        return chosen

    def send(self, slots: list[int]) -> Tensor:
        """Slots to the device; the host waits until they are there, and for all that came before."""
        return torch.tensor([slots], device=self.device)

    def send_ahead(self, slots: list[int]) -> Tensor:
        """Slots to the device; the host goes on at once."""
        return to_device(slots, self.device)[None]


def read_host(device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """The host's time for the parts of a layer.

    Returns:
        Readings in nanoseconds (``ns``, ``low``, ``high``): ``operation``, one of many launched in a row;
        ``layer``: all operations of one, with neither of the following; ``readback`` and ``upload``: how much
        longer it takes if the router's choice is read back, and if slots are sent over; ``send``: as
        ``upload``, but from pinned memory, and the host does not wait; ``synchronous``:
        a layer with both; ``copied``: the same if a copy to the device goes before, less that copy;
        ``ahead``: as ``copied``, but with ``send``.
    """
    layer, wait = SmallLayer(device), waiter(device)

    def plain() -> None:
        layer.dense()
        layer.experts()

    def reads() -> None:
        plain()
        layer.read_back()

    def sends() -> None:
        layer.dense()
        layer.experts(layer.send([0, 1, 2, 3]))

    def both() -> None:
        layer.dense()
        layer.experts(layer.send(layer.read_back()))

    source = torch.ones(COPY_MIB * MIB, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros_like(source, device=device)

    def copies() -> None:
        target.copy_(source, non_blocking=True)

    def copied() -> None:
        layer.dense()
        slots = layer.read_back()
        copies()
        layer.experts(layer.send(slots))

    def goes() -> None:
        layer.dense()
        layer.experts(layer.send_ahead([0, 1, 2, 3]))

    def ahead() -> None:
        layer.dense()
        slots = layer.read_back()
        copies()
        layer.experts(layer.send_ahead(slots))

    copy_alone = _and(copies, wait)
    calls = {"plain": plain, "reads": reads, "sends": sends, "goes": goes, "both": both}
    calls |= {"alone": copy_alone, "copied": copied, "ahead": ahead}
    with torch.inference_mode():
        found = in_turns(calls, wait, repeats)
    base = found["plain"]
    count = DENSE_OPERATIONS + EXPERT_OPERATIONS

    def besides(name: str, part: str = "plain") -> dict[str, float]:
        return _reading([max(0.0, x - y) for x, y in zip(found[name], found[part], strict=True)])

    return {
        "operation": _reading([ns / count for ns in base]),
        "layer": _reading(base),
        "readback": besides("reads"),
        "upload": besides("sends"),
        "send": besides("goes"),
        "synchronous": _reading(found["both"]),
        "copied": besides("copied", "alone"),
        "ahead": besides("ahead", "alone"),
    }


def in_turns(
    calls: Mapping[str, Callable[[], object]], wait: Callable[[], None], repeats: int
) -> dict[str, list[float]]:
    """Nanoseconds of each call in every round; each round runs all of them, so that they share its noise."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):  # the first warms up
        for name, call in calls.items():
            wait()
            begin, done = time.perf_counter_ns(), 0
            while time.perf_counter_ns() - begin < ROUND_NS:
                call()
                done += 1
            wait()
            if turn:
                found[name].append((time.perf_counter_ns() - begin) / done)
    return found


def _reading(taken: Sequence[float]) -> dict[str, float]:
    return Reading(statistics.median(taken), min(taken), max(taken)).as_dict()


def _and(first: Callable[[], None], then: Callable[[], None]) -> Callable[[], None]:
    def both() -> None:
        first()
        then()

    return both


def read_gathered(
    top_k: int,
    hidden: int,
    width: int,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Any]:
    """Experts of one token that are copied together and then multiplied: three passes over their bytes.

    Shapes:
        Slots ``[S, 3DI]`` of which ``[D, 2I]`` and ``[I, D]`` are views, as in an expert store; K of them in
        turn, so that no cache holds them.

    Returns:
        A reading of the K experts (``ns``, ``low``, ``high``), ``top_k``, ``bytes`` read and written (3 K
        experts), ``gb_per_s``.
    """
    K, weights = top_k, 3 * hidden * width
    itemsize = torch.empty(0, dtype=dtype).element_size()
    turns = max(2, min(4, 256 * MIB // (K * weights * itemsize)))
    arena = torch.empty(turns * K, weights, dtype=dtype, device=device).fill_(0.01)
    up_SDI = arena[:, : 2 * hidden * width].view(-1, hidden, 2 * width)
    down_SID = arena[:, 2 * hidden * width :].view(-1, width, hidden)
    slots = [torch.arange(t * K, (t + 1) * K, device=device) for t in range(turns)]
    rows_KD = torch.ones(K, 1, hidden, dtype=dtype, device=device)
    turn = iter(range(1 << 62))

    def run() -> Tensor:
        slots_K = slots[next(turn) % turns]
        both_KI = torch.bmm(rows_KD, up_SDI[slots_K])
        return torch.bmm(both_KI[..., :width], down_SID[slots_K])

    with torch.inference_mode():
        reading = timed(run, waiter(device), repeats)
    moved = 3 * K * weights * itemsize
    return {"top_k": K, "bytes": moved} | reading.as_dict() | {"gb_per_s": round(moved / reading.ns, 4)}
