"""What a replay runs, as one small file: documents, forecasts of them, and which trace they are of.

The machine with the GPU then needs neither the trace nor the predictor. A script is a safetensors file:
``<i>.experts`` (int32 ``[T, L, K]``), ``<i>.weights`` (float32) and, where there is a predictor, ``<i>.p``
(float16 ``[T, P, H, E]``) of document ``i``; its metadata hold one JSON object, ``specgate_script``.

Letters: T tokens of a document, L MoE layers, P = L + 1 source points, H horizons, E experts, K experts per
token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specgate.errors import ConfigError, TraceError
from specgate.predictors.base import Predictor
from specgate.report.evaluate import labels_of
from specgate.report.identity import trace_identity
from specgate.report.replay_fit import Fitted, fit
from specgate.report.replay_trace import Document, load_documents
from specgate.traces.datamodule import RoutingDataModule

KEY, VERSION = "specgate_script", 1


@dataclass(frozen=True)
class Script:
    """Documents of one trace.

    Attributes:
        documents: to run, the first ones to warm up.
        trace: its name. identity, labels: as ``trace_identity`` and ``labels_of`` give them.
        split: that the documents are of.
        predictor: name of the one whose forecasts are in the documents, or None.
        fitted: what policies learn from training documents; None in a script that was made without.
    """

    documents: list[Document]
    trace: str
    identity: Mapping[str, Any]
    labels: Mapping[str, str]
    split: str
    predictor: str | None
    fitted: Fitted | None = None

    def part(self, documents: int, tokens: int) -> Script:
        """The first documents and tokens.

        Raises:
            ConfigError: if there are not so many.
        """
        kept = [document for document in self.documents if len(document) >= tokens][:documents]
        if len(kept) < documents:
            raise ConfigError(
                f"The script has {len(kept)} documents of {tokens} tokens and {documents} are asked for; "
                "make it again with as many."
            )
        return replace(self, documents=[_first(document, tokens) for document in kept])


def _first(document: Document, tokens: int) -> Document:
    p_TPHE = None if document.p_TPHE is None else document.p_TPHE[:tokens]
    return Document(document.name, document.experts_TLK[:tokens], document.weights_TLK[:tokens], p_TPHE)


def make_script(
    trace: str,
    data: RoutingDataModule,
    split: str,
    documents: int,
    tokens: int,
    predictor: Predictor | None,
    learns: bool = True,
) -> Script:
    """A script from a trace; ``learns``: with what policies learn from its training documents.

    Raises:
        SpecgateError: as :func:`specgate.report.replay_trace.load_documents`.
    """
    return Script(
        documents=load_documents(data, split, documents, tokens, predictor),
        trace=trace,
        identity=trace_identity(data, trace),
        labels={k: v for k, v in labels_of(data, trace).items() if k != "split"},
        split=split,
        predictor=None if predictor is None else predictor.name,
        fitted=fit(data) if learns else None,
    )


def save_script(script: Script, path: Path) -> None:
    """Writes a script, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    for i, document in enumerate(script.documents):
        tensors[f"{i}.experts"] = torch.tensor(document.experts_TLK, dtype=torch.int32)
        tensors[f"{i}.weights"] = document.weights_TLK.contiguous()
        if document.p_TPHE is not None:
            tensors[f"{i}.p"] = document.p_TPHE.contiguous()
    about = {name: getattr(script, name) for name in ("trace", "identity", "labels", "split", "predictor")}
    about["fitted"] = None if script.fitted is None else script.fitted.plain()
    about |= {"version": VERSION, "names": [document.name for document in script.documents]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, {KEY: json.dumps(about)})
    os.replace(partial, path)


def load_script(path: Path) -> Script:
    """Reads a script.

    Raises:
        TraceError: if it is none, damaged, or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[KEY])
            if about["version"] != VERSION:
                raise TraceError(
                    f"{path} is a script of version {about['version']} and this specgate reads {VERSION}; "
                    "make it again."
                )
            keys = set(file.keys())
            documents = [
                Document(
                    name,
                    file.get_tensor(f"{i}.experts").tolist(),
                    file.get_tensor(f"{i}.weights"),
                    file.get_tensor(f"{i}.p") if f"{i}.p" in keys else None,
                )
                for i, name in enumerate(about["names"])
            ]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise TraceError(
            f"{path} is no script of a replay ({' '.join(str(error).split())[:120]}); delete it and make "
            "it again."
        ) from None
    fitted = about.get("fitted")
    return Script(
        documents,
        about["trace"],
        about["identity"],
        about["labels"],
        about["split"],
        about["predictor"],
        None if fitted is None else Fitted(**fitted),
    )
