"""Both oracles together: perfect prefetch into a cache that evicts what is used farthest in the future."""

from __future__ import annotations

from typing import ClassVar

from specgate.policy.perfect_prefetch import PerfectPrefetch


class Oracle(PerfectPrefetch):
    """The ``oracle`` policy: Belady's eviction and perfect prefetch of the next ``depth`` events.

    A newcomer is fetched only if it is used before its victim, so that more depth does not push out what is
    needed sooner. Every share of "the oracle's gain" is a share of this one's.

    Args:
        depth: events that are foreseen.
    """

    name: ClassVar[str] = "oracle"
    eviction: ClassVar[str] = "belady"

    def __init__(self, depth: int = 24) -> None:
        super().__init__(depth)
