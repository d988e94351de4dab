"""The LightningModule and DataModule of pre-training.

Letters: B rows, T tokens, E experts, K experts per token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from specgate.errors import ConfigError
from specgate.moe.pretrain.grouped import grouped
from specgate.moe.pretrain.objectives import Batch, FromStep, Steps
from specgate.moe.pretrain.tokens import EOS, SENTINELS, Corpus, load

ROUTERS = ("SwitchTransformersTop1Router", "OlmoeTopKRouter")


def build(family: str, architecture: dict[str, Any]) -> nn.Module:
    """A freshly initialised model.

    Raises:
        ConfigError: if the family is neither ``switch`` nor ``olmoe``.
    """
    if family == "switch":
        return SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**architecture))
    if family == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**architecture))
    raise ConfigError(f"Cannot pre-train family {family!r}; choose switch or olmoe.")


@contextmanager
def router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Raw router logits of every MoE layer, ``[tokens, E]`` each, in the order in which the layers ran."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        logits = output[2] if type(module).__name__.startswith("Switch") else output[0]
        seen.append(logits.reshape(-1, logits.shape[-1]).float())

    handles = [m.register_forward_hook(keep) for m in model.modules() if type(m).__name__ in ROUTERS]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(logits_NE: Tensor, top_k: int) -> Tensor:
    """E * sum_e (share of choices of e) * (mean probability of e), for one layer (Fedus et al. 2021, eq. 4).

    1 when balanced. It must be taken layer by layer: pooled over layers, single layers collapse unseen.
    """
    E = logits_NE.shape[-1]
    share_E = F.one_hot(logits_NE.topk(top_k).indices, E).float().sum(1).mean(0) / top_k
    return E * (share_E * logits_NE.softmax(-1).mean(0)).sum()


def load_entropy(counts_E: Tensor) -> float:
    """Entropy of an expert load, divided by its maximum: 1 is perfectly balanced."""
    p_E = counts_E.double() / counts_E.sum()
    return float(-(p_E * p_E.clamp_min(1e-300).log()).sum() / math.log(len(p_E)))


class Pretraining(L.LightningModule):
    """Pre-trains one reference MoE with cross entropy, a balance loss per layer and a router z-loss (Zoph
    et al. 2022).

    Args:
        family: ``switch`` or ``olmoe``.
        architecture: keyword arguments of the transformers configuration.
        lr, weight_decay, warmup_steps, total_steps, final_lr: AdamW with warm-up and cosine decay to
        ``final_lr * lr``.
        balance, z: weights of the auxiliary losses, summed over layers.
    """

    tokens_seen: Tensor

    def __init__(
        self,
        family: str,
        architecture: dict[str, Any],
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        warmup_steps: int = 300,
        total_steps: int = 1000,
        final_lr: float = 0.05,
        balance: float = 0.01,
        z: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = build(family, architecture)
        self.top_k = 1 if family == "switch" else int(architecture["num_experts_per_tok"])
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Cross entropy in nats per token, auxiliary loss, router logits per layer."""
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with router_logits(self.model) as routed:
            logits_BTV = self.model(**inputs, use_cache=False).logits
        ce = F.cross_entropy(logits_BTV.float().flatten(0, 1), batch["labels"].flatten())
        aux = torch.zeros((), device=ce.device)
        for logits_NE in routed:
            aux = aux + self.hparams["balance"] * balance_loss(logits_NE, self.top_k)
            aux = aux + self.hparams["z"] * logits_NE.logsumexp(-1).square().mean()
        return ce, aux, routed

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        ce, aux, routed = self.loss(batch)
        self.tokens_seen += sum(v.numel() for k, v in batch.items() if k != "labels")
        if self.global_step % 50 == 0:
            entropy = [
                load_entropy(F.one_hot(r.topk(self.top_k).indices, r.shape[-1]).sum((0, 1)).cpu())
                for r in routed
            ]
            self.log_dict(
                {"loss": ce.detach(), "aux": aux.detach(), "entropy_min": min(entropy)},
                prog_bar=True,
                logger=True,
            )
        return ce + aux

    def on_fit_start(self) -> None:
        self.trained_on = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        self._grouped = grouped(self.model) if self.device.type == "cuda" else None
        if self._grouped:
            self._grouped.__enter__()

    def on_fit_end(self) -> None:
        if self._grouped:
            self._grouped.__exit__(None, None, None)

    def on_exception(self, exception: BaseException) -> None:
        self.on_fit_end()

    def configure_optimizers(self) -> Any:
        h = self.hparams
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": h["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=h["lr"], betas=(0.9, 0.95), eps=1e-8)

        def rate(step: int) -> float:
            if step < h["warmup_steps"]:
                return (step + 1) / h["warmup_steps"]
            done = min(1.0, (step - h["warmup_steps"]) / max(1, h["total_steps"] - h["warmup_steps"]))
            return h["final_lr"] + (1 - h["final_lr"]) * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PretrainingData(L.LightningDataModule):
    """Batches of a prepared corpus, one per optimiser step; a resumed run goes on at the next step.

    Args:
        corpus: directory of a prepared corpus.
        objective: ``causal`` or ``switch``.
        tokens_per_step, length, seed: see :class:`~specgate.moe.pretrain.objectives.Steps`.
        total_steps: steps of the whole run.
        num_workers: loader processes.
    """

    def __init__(
        self,
        corpus: str,
        objective: str,
        tokens_per_step: int,
        length: int,
        total_steps: int,
        seed: int = 0,
        num_workers: int = 2,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.corpus: Corpus = load(corpus)

    def train_dataloader(self) -> DataLoader[Batch]:
        from tokenizers import Tokenizer

        h = self.hparams
        tokenizer: Any = Tokenizer.from_file(str(self.corpus.directory / "tokenizer" / "tokenizer.json"))
        sentinels = [tokenizer.token_to_id(s) for s in SENTINELS]
        steps = Steps(
            self.corpus.train_N,
            h["objective"],
            h["tokens_per_step"],
            h["length"],
            sentinels,
            tokenizer.token_to_id(EOS),
            h["seed"],
        )
        start = self.trainer.global_step if self.trainer else 0
        return DataLoader(
            steps, batch_size=None, sampler=FromStep(start, h["total_steps"]), num_workers=h["num_workers"]
        )
