"""Documents decoded together: which ones form a batch, and intervals that know who is in which batch.

Letters: D documents, G groups of them (batches), B documents of a group, R resamples.

A few documents fill only a few groups, and which ones meet by chance decides much. So documents are dealt
into groups several times, each time anew. A document then is in several groups; resampling groups as if they
were independent would make intervals too narrow, and resampling whole documents would leave almost no group
complete. :func:`weights_of` resamples documents and gives a group the weight that is the first-order term
(the Hajek projection) of the product of its members' counts: van der Vaart, "Asymptotic Statistics", 1998,
chapter 12 (U-statistics).
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

    With counts ``c_d`` of a resample: ``1 + (D - 1) / (D - B) * sum over members of (c_d - 1)``. The factor
    undoes that groups are drawn from the same D documents. For groups of one it is ``c_d``. NaN where every
    group holds all documents: then nothing tells how others would do.
    """
    counts_RD = resampled(documents, resamples, seed)
    size = len(groups[0])
    if size == documents and documents > 1:
        return np.full((resamples, len(groups)), np.nan)
    member_DG = np.zeros((documents, len(groups)))
    for g, members in enumerate(groups):
        member_DG[list(members), g] = 1.0
    factor = (documents - 1) / (documents - size) if documents > 1 else 1.0
    return 1.0 + factor * ((counts_RD - 1.0) @ member_DG)
