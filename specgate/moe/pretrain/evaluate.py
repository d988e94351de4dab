"""What a reference MoE has learned: held-out loss per domain, balance per layer, how far popularity
foresees its routing.

Letters: W windows, T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from specgate.moe.pretrain.module import load_entropy, router_logits
from specgate.moe.pretrain.ngram import NGram
from specgate.moe.pretrain.objectives import Batch, causal, prefix_lm
from specgate.moe.pretrain.tokens import Corpus

WINDOWS = 250  # held-out windows of each domain


def baselines(corpus: Corpus) -> dict[str, dict[str, np.ndarray]]:
    """Log-probabilities (nats) of the held-out tokens under a unigram and a 4-gram model, per domain.

    Counted once and kept beside the corpus. Shapes: ``{domain: {"unigram": [N], "4-gram": [N]}}`` float32.
    """
    path = corpus.directory / "ngram.npz"
    if not path.is_file():
        model = NGram(np.asarray(corpus.train_N), 4, corpus.info["vocab_size"])
        found = {}
        for domain, tokens in corpus.heldout.items():
            found[f"{domain}/unigram"] = model.unigram_log_probs(tokens).astype(np.float32)
            found[f"{domain}/4-gram"] = model.log_probs(tokens).astype(np.float32)
        np.savez(path, **found)  # type: ignore[arg-type]
    kept = np.load(path)
    return {d: {m: kept[f"{d}/{m}"] for m in ("unigram", "4-gram")} for d in corpus.heldout}


def window_of(family: str, length: int) -> tuple[int, int]:
    """Tokens of a held-out window, and how many of them lead in without being scored."""
    return (2 * length, length) if family == "switch" else (length + 1, 1)


def add_baselines(
    loss: dict[str, dict[str, float]],
    family: str,
    corpus: Corpus,
    length: int = 128,
    windows_per_domain: int = WINDOWS,
) -> None:
    """Adds the unigram and 4-gram losses on exactly the tokens that :func:`evaluate` scored.

    Args:
        loss: the ``loss`` that :func:`evaluate` returned; changed in place.
        family, corpus, length, windows_per_domain: as given there.
    """
    width, lead = window_of(family, length)
    for domain, models in baselines(corpus).items():
        n = min(len(corpus.heldout[domain]) // width, windows_per_domain)
        for name, logp_N in models.items():
            if n:
                scored = logp_N[: n * width].reshape(n, width)[:, lead:]
                loss[domain][name] = -float(scored.astype(np.float64).mean())


def load_reference(directory: Path, family: str, device: str = "cpu") -> nn.Module:
    """The saved model in evaluation mode, float32 arithmetic on its bfloat16-rounded weights."""
    auto: Any = AutoModelForSeq2SeqLM if family == "switch" else AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32).eval().to(device)


def _run(model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    device = next(model.parameters()).device
    batch = {k: v.to(device) for k, v in batch.items()}
    with torch.inference_mode(), router_logits(model) as routed:
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
        nll = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return nll, list(routed)


def evaluate(
    model: nn.Module,
    family: str,
    corpus: Corpus,
    top_k: int,
    length: int = 128,
    rows: int = 32,
    windows_per_domain: int = WINDOWS,
) -> dict[str, Any]:
    """Held-out loss and routing statistics.

    Args:
        model: the reference model.
        family: ``switch`` (scored on continuing a prefix) or ``olmoe`` (next token).
        corpus: the prepared corpus it was trained on.
        top_k: experts per token.
        length: tokens scored per window; Switch reads as many before them.
        rows: windows per batch.
        windows_per_domain: at most so many windows of each domain.

    Returns:
        ``loss``: nats per token for each domain; ``load_entropy``: per
        MoE layer (Switch: the encoder's layers, then the decoder's), domains weighted equally;
        ``popularity_recall``: recall@K per layer of always naming the K experts most used in training text.
    """
    width, lead = window_of(family, length)

    def batch_of(window_WT: np.ndarray) -> Batch:
        return prefix_lm(window_WT, length) if family == "switch" else causal(window_WT)

    rng = np.random.default_rng(0)
    start = rng.integers(0, len(corpus.train_N) - width, (windows_per_domain, 1)) + np.arange(width)
    train_WT = np.asarray(corpus.train_N)[start].astype(np.int64)
    popular = _counts(
        model, [batch_of(train_WT[i : i + rows]) for i in range(0, len(train_WT), rows)], top_k
    )[1]
    loss: dict[str, dict[str, float]] = {}
    shares: list[list[Tensor]] = []
    for domain, tokens in track(sorted(corpus.heldout.items()), description="held-out domains"):
        n = min(len(tokens) // width, windows_per_domain)
        if n == 0:
            continue
        tokens_WT = tokens[: n * width].reshape(n, width).astype(np.int64)
        nll, counts = _counts(model, [batch_of(tokens_WT[i : i + rows]) for i in range(0, n, rows)], top_k)
        loss[domain] = {"model": float(nll.double().mean()), "tokens": n * (width - lead)}
        shares.append([c / c.sum() for c in counts])
    layers = [torch.stack(s).mean(0) for s in zip(*shares, strict=True)]
    recall = [float(s[p.topk(top_k).indices].sum()) for s, p in zip(layers, popular, strict=True)]
    return {
        "loss": loss,
        "load_entropy": [load_entropy(s) for s in layers],
        "popularity_recall": recall,
        "popularity_over_chance": sum(recall) / len(recall) / (top_k / len(layers[0])),
    }


def _counts(model: nn.Module, batches: list[Batch], top_k: int) -> tuple[Tensor, list[Tensor]]:
    """Negative log-likelihood of every scored token, and how often each expert of each layer was chosen."""
    nlls, counts = [], []
    for batch in batches:
        nll, routed = _run(model, batch)
        nlls.append(nll.cpu())
        counts.append(
            [torch.bincount(r.topk(top_k).indices.flatten().cpu(), minlength=r.shape[-1]) for r in routed]
        )
    return torch.cat(nlls), [torch.stack(c).sum(0).double() for c in zip(*counts, strict=True)]
