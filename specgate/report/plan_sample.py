"""A little real routing that comes with specgate, for plans where no trace is at hand.

``specgate/report/routing/<name>.safetensors``: uint8 ``<split>.<document> [T, L, K]``, the experts of tokens
that a bundled model generated from prompts of its own text, without any text. Made anew by

    python collect.py moe=olmoe_ref phase=decode sequences=48 hidden=none out=TRACE
    python -m specgate.report.plan_sample TRACE olmoe_ref

Letters: T tokens of a document, L MoE layers, E experts of a layer, K experts per token.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from specgate.policy.workload import Workload, decoding
from specgate.traces.datamodule import RoutingDataModule

FOLDER = Path(__file__).parent / "routing"
#: Family -> the model whose routing is most like its own; any other family: the first.
SAMPLES = {"": "olmoe_ref", "switch_transformers": "switch_ref"}
SPLITS = ("train", "validation")
MOST = 16  # documents of a split


@dataclass(frozen=True, eq=False)
class Sample:
    """Documents of one bundled model, one workload each, by split."""

    name: str
    documents: dict[str, list[Workload]]


def load_sample(family: str, tokens: int) -> Sample:
    """The sample for a family of architectures, each document's first ``tokens``."""
    name = SAMPLES.get(family, SAMPLES[""])
    found: dict[str, list[Workload]] = {split: [] for split in SPLITS}
    with safe_open(FOLDER / f"{name}.safetensors", framework="numpy") as file:
        experts = int(file.metadata()["experts"])
        for key in sorted(file.keys(), key=lambda key: (key.split(".")[0], int(key.split(".")[1]))):
            work = decoding([file.get_tensor(key)[:tokens].astype(np.int64)], experts, [key])
            found[key.split(".")[0]].append(work)
    return Sample(name, found)


def write_sample(trace: Path, name: str, folder: Path = FOLDER) -> Path:
    """Takes the first documents of a decode trace's splits; returns the file."""
    from specgate.report.simulate_trace import documents_of

    data = RoutingDataModule(trace, phase="decode", stack="decoder", window=128, use_hidden=False)
    tensors = {}
    for split in SPLITS:
        for i, work in enumerate(documents_of(data, split, MOST)["none"]):
            L, K = work.layers, work.top_k
            tensors[f"{split}.{i}"] = work.expert_M.reshape(work.steps, L, K).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", {"experts": str(data.spec.experts)})
    return folder / f"{name}.safetensors"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: the trace and the model's name."""
    trace, name = sys.argv[1:] if arguments is None else arguments
    print(write_sample(Path(trace), name))


if __name__ == "__main__":
    main()
