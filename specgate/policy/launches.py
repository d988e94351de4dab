"""When each event's parts end, given what the host launches and what the device must do.

Letters: L MoE layers, N events, S steps. Times are nanoseconds.

The host launches operations ahead of the device, one after the other, but waits where it must know something:
the router's choice, and the next token. How far ahead it gets decides whether the device waits for the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Nanoseconds = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Work:
    """What a workload asks of host and device.

    Attributes:
        dense_N: device time of the stretch before each router. launches_N: the host's time to launch it.
        experts_N: device time of each event's experts. launch_experts: the host's time to launch them.
        head_S: device time of the head of the step before. launch_head: the host's time to launch it.
        operation: the host's time for one operation: the device can begin when the first is launched.
        layers: L.
        asked: the host's time to hand over what is foreseen: at the begin of a step, and once an event's
            experts are launched.
    """

    dense_N: Nanoseconds
    launches_N: Nanoseconds
    experts_N: Nanoseconds
    launch_experts: float
    head_S: Nanoseconds
    launch_head: float
    operation: float
    layers: int
    asked: float = 0.0

    @property
    def first_N(self) -> NDArray[np.bool_]:
        """Whether an event is the first of its step."""
        return np.arange(len(self.dense_N)) % max(self.layers, 1) == 0


@dataclass(frozen=True, eq=False)
class Ends:
    """What follows.

    Attributes:
        pre_N, exec_N: as in :class:`specgate.policy.costs.Costs`.
        host_N: of their sum, in which the host waits for an answer or sends something over.
        late_pre_N, late_exec_N: whether launches bound the rest, not the device.
        bound_pre_N, bound_exec_N: of pre_N and exec_N, in which the host launches, or hands over what is
            foreseen, and the device does nothing meanwhile, or less.
        launch_N: as in Costs; None: launches are in the other times.
    """

    pre_N: Nanoseconds
    exec_N: Nanoseconds
    host_N: Nanoseconds
    late_pre_N: NDArray[np.bool_]
    late_exec_N: NDArray[np.bool_]
    bound_pre_N: Nanoseconds
    bound_exec_N: Nanoseconds
    launch_N: Nanoseconds | None = None

    @property
    def unhidden_N(self) -> Nanoseconds:
        """What follows on the event before until the router has chosen, if no event waits for experts."""
        if self.launch_N is None:
            return self.pre_N
        before_N = np.concatenate([np.zeros(min(1, len(self.exec_N))), self.exec_N[:-1]])
        unhidden_N: Nanoseconds = np.maximum(self.pre_N, self.launch_N - before_N)
        return unhidden_N


def answered_at_once(work: Work) -> Ends:
    """Waiting for the router costs nothing of its own: all that a vendor's figures tell."""
    dense_N, launches_N = work.dense_N.copy(), work.launches_N.copy()
    dense_N[work.first_N] += work.head_S
    launches_N[work.first_N] += work.launch_head + work.asked
    exec_N = np.maximum(work.experts_N, work.launch_experts)
    before_N = np.concatenate([np.zeros(min(1, len(exec_N))), exec_N[:-1]])
    launched_N = np.full(len(exec_N), float(work.launch_experts))
    launched_N[:1] = 0.0
    waited_N = np.maximum(0.0, launches_N + launched_N + work.asked - before_N)
    late_pre_N, late_exec_N = waited_N > dense_N, work.experts_N < work.launch_experts
    return Ends(
        np.maximum(dense_N, waited_N),
        exec_N,
        np.zeros(len(exec_N)),
        late_pre_N,
        late_exec_N,
        np.where(late_pre_N, waited_N, 0.0),
        np.where(late_exec_N, work.launch_experts, 0.0),
    )


def waited_for(work: Work, readback: float, upload: float, ahead: bool) -> Ends:
    """The host reads each router's choice, and sends the slots of the experts over once they are there.

    Args:
        readback: from the end of what is waited for until the host goes on.
        upload: from then until the first of the experts' operations can be launched.
        ahead: whether the host goes on while the device works; a CPU is both.
    """
    E, o = work.launch_experts, work.operation
    if not ahead:
        exec_N, bound_exec_N = work.experts_N + E, np.full(len(work.experts_N), E)
        bound_N = work.launches_N + work.asked
        bound_N[work.first_N] += work.launch_head + work.asked
        pre_N = work.dense_N + bound_N
        pre_N[work.first_N] += work.head_S
        late_pre_N, late_exec_N = pre_N > 2 * work.dense_N, work.experts_N < E
    else:
        exec_N = np.maximum(E, o + work.experts_N)
        late_exec_N = exec_N <= E
        bound_exec_N = np.where(late_exec_N, E, o)
        before_N = np.concatenate([np.full(min(1, len(exec_N)), E), exec_N[:-1]])
        # The device works on when the host has launched the experts before; negative: it is done by then.
        after_N = before_N - E - work.asked
        begin_N = np.maximum(after_N, o)
        pre_N = np.maximum(work.launches_N, begin_N + work.dense_N) - after_N
        late_pre_N = work.launches_N > begin_N + work.dense_N
        bound_N = np.where(late_pre_N, work.launches_N, begin_N) - after_N
        first_N = work.first_N
        begun_S, after_S = begin_N[first_N], after_N[first_N]
        head_N = np.maximum(work.launch_head, begun_S + work.head_S) - after_S + work.asked
        launches_S, dense_S = work.launches_N[first_N], o + work.dense_N[first_N]
        pre_N[first_N] = head_N + np.maximum(launches_S, dense_S)
        late_pre_N[first_N] = launches_S > dense_S
        bound_N[first_N] = np.where(work.launch_head > begun_S + work.head_S, work.launch_head, begun_S)
        bound_N[first_N] += np.where(launches_S > dense_S, launches_S, o) - after_S + work.asked
    host_N = np.full(len(exec_N), readback + upload)
    host_N[work.first_N] += readback  # of the token before
    return Ends(
        pre_N + host_N - upload, exec_N + upload, host_N, late_pre_N, late_exec_N, bound_N, bound_exec_N
    )


def launched_ahead(work: Work, readback: float, send: float) -> Ends:
    """The same, but nothing is waited for when slots are sent: the host launches while experts are copied.

    Args:
        readback: see :func:`waited_for`.
        send: the host's time to send the slots of an event.
    """
    E, o, first_N = work.launch_experts, work.operation, work.first_N
    exec_N = work.experts_N + (send + o)  # of an event that waits for no copy; others have that behind them
    dense_N = np.maximum(work.launches_N, o + work.dense_N) + readback  # if the device waits for the host
    head_S = np.maximum(work.launch_head, o + work.head_S) + readback
    pre_N, launch_N = work.dense_N + readback, dense_N + (send + E + work.asked)
    pre_N[first_N] = work.head_S + readback + work.asked + dense_N[first_N]
    launch_N[first_N] += head_S + work.asked
    bound_N = np.where(
        first_N, work.asked + np.where(work.launches_N > o + work.dense_N, work.launches_N, o), 0.0
    )
    if len(launch_N):  # there are no experts before, and the host begins with the head
        pre_N[0] = launch_N[0] = head_S[0] + work.asked + dense_N[0]
        bound_N[0] += work.launch_head if work.launch_head > o + work.head_S[0] else o
    host_N = np.full(len(exec_N), readback + send)
    host_N[first_N] += readback
    before_N = np.concatenate([np.zeros(min(1, len(exec_N))), exec_N[:-1]])
    late_N = launch_N > before_N + pre_N
    never_N, begun_N = np.zeros(len(exec_N), dtype=np.bool_), np.full(len(exec_N), send + o)
    return Ends(pre_N, exec_N, host_N, late_N, never_N, bound_N, begun_N, launch_N)
