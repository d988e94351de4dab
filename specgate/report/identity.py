"""Which trace was it: the identity that goes into metrics.json, and how its routing is distributed.

Letters: N tokens, L MoE layers, E experts per layer, K experts per token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch

from specgate.traces.batch import RoutingBatch, StackSpec
from specgate.traces.datamodule import RoutingDataModule
from specgate.traces.schema import PHASES, SPLITS


def trace_identity(data: RoutingDataModule, name: str) -> dict[str, Any]:
    """What was traced: host, stack, phase, sizes per split, the SHA-256 of each header (it covers every file)
    and of the text that is scored.

    Args:
        name: the trace's name in rows and tables.
    """
    spec, headers = data.spec, [reader.header for reader in data.readers]
    tokens, sequences = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    documents: dict[str, set[str]] = {split: set() for split in SPLITS}
    for reader in data.readers:
        table = reader.stack(data.stack).sequences
        mine_S = table.phase_S == PHASES.index(data.phase)
        for number, split in enumerate(SPLITS):
            chosen_S = mine_S & (table.split_S == number)
            tokens[split] += int(table.length_S[chosen_S].sum())
            sequences[split] += int(chosen_S.sum())
            documents[split] |= {
                reader.header.documents[int(d)].name for d in set(table.document_S[chosen_S].tolist())
            }
    return {
        "name": name,
        "model": [header.model_id for header in headers],
        "revision": [header.revision for header in headers],
        "family": [header.family for header in headers],
        "stack": data.stack,
        "phase": data.phase,
        "layers": spec.layers,
        "experts": spec.experts,
        "top_k": spec.top_k,
        "hidden_size": spec.hidden_size,
        "domains": data.domains,
        "tokens": tokens,
        "sequences": sequences,
        "documents": {split: len(names) for split, names in documents.items()},
        "routing_control": [header.routing_control for header in headers],
        "text_sha256": {split: data.text_digest(split) for split in SPLITS[1:]},
        "sha256": [hashlib.sha256((path / "trace.json").read_bytes()).hexdigest() for path in data.paths],
    }


def expert_load(spec: StackSpec, batches: Iterable[RoutingBatch]) -> dict[str, Any]:
    """How often each expert is used in the scored tokens of ``batches``, and how skewed that is.

    Returns:
        ``share``: L lists of E shares of all uses in that layer (they sum to 1); ``entropy``: L normalised
        entropies (1 = all experts equally often); ``hot_quarter``: L shares of uses that fall on the busiest
        quarter of experts.
    """
    count_LE = torch.zeros(spec.layers, spec.experts, dtype=torch.float64)
    for batch in batches:
        experts_NLK = batch.experts_BTLK[batch.mask_BT].cpu()
        for layer in range(spec.layers):
            count_LE[layer] += torch.bincount(experts_NLK[:, layer].flatten(), minlength=spec.experts)
    share_LE = count_LE / count_LE.sum(1, keepdim=True)
    entropy_L = torch.special.entr(share_LE).sum(1) / torch.tensor(float(max(spec.experts, 2))).log()
    quarter = max(1, spec.experts // 4)
    hot_L = share_LE.topk(quarter, dim=1).values.sum(1)
    return {
        "share": [[round(value, 5) for value in row] for row in share_LE.tolist()],
        "entropy": [round(value, 4) for value in entropy_L.tolist()],
        "hot_quarter": [round(value, 4) for value in hot_L.tolist()],
    }
