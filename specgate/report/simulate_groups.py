"""Documents decoded together: which ones form a batch, and intervals that know who is in which batch.

Letters: D documents, G groups of them (batches), B documents of a group, R resamples.

A few documents fill only a few groups, and which ones meet by chance decides much. So documents are dealt
into groups several times, each time anew. A document then is in several groups: to resample groups as if they
shared nobody would make intervals too narrow, and a resample of documents would leave almost no group
complete. :func:`weights_of` resamples documents and takes the first-order term of the product of a group's
members' counts (the Hajek projection of a U-statistic: van der Vaart, "Asymptotic Statistics", 1998, chapter
12), scaled for the groups that there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from specgate.errors import ConfigError
from specgate.report.simulate_rows import resampled

Groups = list[list[int]]


def groups_of(documents: int, size: int, deals: int, seed: int) -> Groups:
    """Documents ``0..D-1`` in groups of ``size``, dealt ``deals`` times.

    A deal leaves out those that fill no group; the next one begins with them. Of one document each, or if
    all fit one group, a single deal says everything.

    Raises:
        ConfigError: fewer documents than one group needs.
    """
    if documents < size:
        raise ConfigError(
            f"{documents} documents make no batch of {size}; choose smaller simulate.batches or more "
            "documents."
        )
    if size == 1 or size == documents:
        return [list(range(i, i + size)) for i in range(0, documents, size)]
    random = np.random.default_rng(seed)
    left: list[int] = []
    out: Groups = []
    for _ in range(deals):
        others = [d for d in random.permutation(documents).tolist() if d not in left]
        order = [*left, *others]
        whole = documents - documents % size
        out += [sorted(order[i : i + size]) for i in range(0, whole, size)]
        left = order[whole:]
    return out


def weights_of(
    groups: Sequence[Sequence[int]], documents: int, resamples: int, seed: int
) -> NDArray[np.float64]:
    """Weight of each group in each resample of the documents, ``[R, G]``; 1 on average.

    With counts ``c_d`` of a resample: ``1 + k * sum over members of (c_d - 1)``. k is such that the variance
    of a weighted mean (divide by the sum of the weights) is right where a group's value is the sum of its
    members' own; what depends on who meets whom is counted more than once, so intervals are rather too wide.
    For groups of one document the weight is ``c_d``. NaN where a deal makes one group only: too many of its
    members are those of every other group to tell how other documents would do.
    """
    counts_RD = resampled(documents, resamples, seed)
    size = len(groups[0])
    if size == 1:
        return counts_RD[:, [g[0] for g in groups]].astype(np.float64)
    if documents < 2 * size:
        return np.full((resamples, len(groups)), np.nan)
    member_DG = np.zeros((documents, len(groups)))
    for g, members in enumerate(groups):
        member_DG[list(members), g] = 1.0
    centred_DG = member_DG - member_DG.mean(axis=1, keepdims=True)
    found_DD = member_DG @ centred_DG.T  # a member's own value, and those of whom it met, in its weight
    found_DD -= found_DD.mean(axis=0, keepdims=True)
    wanted = (member_DG.sum(axis=1) ** 2).sum() * (documents - 1) / documents
    factor = np.sqrt(wanted / (found_DD**2).sum())
    return np.asarray(1.0 + factor * ((counts_RD - 1.0) @ member_DG))
