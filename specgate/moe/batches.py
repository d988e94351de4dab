"""Runs one batch of windows through the host and turns what the recorder saw into arrays of a trace.

Letters: B sequences, T tokens, S sequences that left tokens behind, N flat tokens, L MoE layers, h as in
``Lh`` the layers whose hidden states are kept, P prompt tokens, G generated tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specgate.errors import ConfigError, SpecgateError
from specgate.moe.families import MoELayer, agrees, decide, router_input
from specgate.moe.hosts import Host
from specgate.moe.recorder import HIDDEN, Recorder, Routing, join
from specgate.moe.windows import Tokenised, Window
from specgate.traces.schema import PHASES
from specgate.traces.store import StackArrays

CONTROLS = ("all", "sample", "none")
SAMPLED = 8  # control=sample checks every eighth batch


@dataclass(frozen=True)
class Settings:
    """What is collected (plain values; together with model and text they determine every byte of the trace).

    Attributes:
        phase: ``prefill`` (text is read) or ``decode`` (text is generated).
        sequences: how many.
        length: tokens of a sequence: read (of each stack), or generated.
        prompt_length: tokens that generation starts from.
        batch_size: sequences at once.
        hidden: keep hidden states: ``none``, ``fp16`` or ``int8``.
        hidden_layers: MoE layers of each stack whose hidden states are kept; all of them when None.
        control: recompute ``all`` decisions by hand, those of a ``sample`` of the batches, or ``none``.
        temperature: of sampling while decoding; 0 takes the likeliest token.
        shard_sequences: sequences per shard at most (in whole batches): what a kill may cost.
        seed: of the choice of windows and of sampling.
    """

    phase: str = "prefill"
    sequences: int = 2000
    length: int = 128
    prompt_length: int = 64
    batch_size: int = 16
    hidden: str = "fp16"
    hidden_layers: tuple[int, ...] | None = None
    control: str = "all"
    temperature: float = 0.8
    shard_sequences: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("phase", self.phase, PHASES),
            ("hidden", self.hidden, HIDDEN),
            ("control", self.control, CONTROLS),
        ):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")
        for name in ("sequences", "batch_size", "shard_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; it must be at least 1.")
        for name in ("length", "prompt_length"):
            if getattr(self, name) < 4:
                raise ConfigError(f"{name}={getattr(self, name)} is too small; it must be at least 4 tokens.")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} is negative; 0 takes the likeliest token.")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """The settings among the values of a configuration."""
        chosen = {name: values[name] for name in cls.__dataclass_fields__}
        if chosen["batch_size"] is None:
            chosen["batch_size"] = 64 if chosen["phase"] == "decode" else 16
        if chosen["hidden_layers"] is not None:
            chosen["hidden_layers"] = tuple(int(layer) for layer in chosen["hidden_layers"])
        return cls(**chosen)


@dataclass
class Control:
    """Counts of the routing control of one stack.

    Attributes:
        decisions, agree: recomputed from the exact hidden state, and how many of them are what executed.
        stored_decisions, stored_agree: the same from the hidden states as stored.
    """

    decisions: int = 0
    agree: int = 0
    stored_decisions: int = 0
    stored_agree: int = 0

    def add(self, other: dict[str, int]) -> None:
        """Adds the counts of a shard."""
        for name, value in other.items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Batch:
    """What one batch left behind: arrays and control counts per stack."""

    arrays: dict[str, StackArrays]
    control: dict[str, Control] = field(default_factory=dict)


class BatchRunner:
    """Runs batches of one collection.

    Args:
        host: the model.
        text: the tokenised documents.
        settings: what to collect.
        document_of: index in ``text`` -> index in the trace's header.
    """

    def __init__(self, host: Host, text: Tokenised, settings: Settings, document_of: dict[int, int]) -> None:
        self.host, self.text, self.settings, self.document_of = host, text, settings, document_of
        self.seq2seq = len(host.family.stacks) > 1
        config: Any = host.model.config
        self.pad_id = _first(config.pad_token_id, getattr(host.tokenizer, "pad_token_id", None), 0)
        self.start_id = _first(getattr(config, "decoder_start_token_id", None), self.pad_id)
        generation = getattr(host.model, "generation_config", None)
        ends = _first(getattr(generation, "eos_token_id", None), getattr(config, "eos_token_id", None), [])
        self.eos_ids = [int(i) for i in (ends if isinstance(ends, list | tuple) else [ends])]
        stacks = ("decoder",) if self.seq2seq and settings.phase == "decode" else None
        with_control = settings.control != "none"
        common: dict[str, Any] = {
            "hidden": settings.hidden,
            "layers": settings.hidden_layers,
            "stacks": stacks,
        }
        self.recorder = Recorder(host.model, control=with_control, **common)
        self._unchecked = Recorder(host.model, control=False, **common)
        self.layers: dict[str, list[MoELayer]] = self.recorder.layers

    def run(self, number: int, windows: Sequence[Window]) -> Batch:
        """Batch ``number`` of the collection.

        Raises:
            SpecgateError: if a decision recomputed by hand is not what executed.
        """
        checked = self.settings.control == "all" or (
            self.settings.control == "sample" and number % SAMPLED == 0
        )
        recorder = self.recorder if checked else self._unchecked
        devices = [self.host.device] if self.host.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), recorder:
            torch.manual_seed(_seed(self.settings.seed, number))
            run = self._prefill if self.settings.phase == "prefill" else self._decode
            found = run(recorder, windows)
        batch = Batch({})
        documents = np.array([self.document_of[w.document] for w in windows], dtype=np.int32)
        for stack, (routing, ids_BT, positions_BT, mask_BT) in found.items():
            batch.arrays[stack] = self._arrays(routing, ids_BT, positions_BT, mask_BT, documents)
            if checked:
                batch.control[stack] = self._control(stack, number, routing, mask_BT)
        return batch

    def _ids(self, windows: Sequence[Window], decoder: bool = False) -> tuple[Tensor, Tensor]:
        """Right-padded token ids ``[B, T]`` that a stack reads, and the mask of the real ones."""
        rows = []
        for w in windows:
            ids = self.text.ids[w.document]
            if decoder:  # shifted right: the start token, then all but the last token
                rows.append(np.concatenate([[self.start_id], ids[w.cut : w.stop - 1]]))
            else:
                rows.append(np.concatenate([np.asarray(self.text.prefix, np.int64), ids[w.start : w.cut]]))
        ids_BT = torch.full((len(rows), max(map(len, rows))), int(self.pad_id))
        mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for b, row in enumerate(rows):
            ids_BT[b, : len(row)] = torch.from_numpy(row.astype(np.int64))
            mask_BT[b, : len(row)] = True
        return ids_BT, mask_BT

    def _prefill(
        self, recorder: Recorder, windows: Sequence[Window]
    ) -> dict[str, tuple[Routing, Tensor, Tensor, Tensor]]:
        """One forward pass over text, the decoder of an encoder-decoder taught by the text that follows."""
        device = self.host.device
        ids_BT, mask_BT = self._ids(windows)
        inputs = {"input_ids": ids_BT.to(device), "attention_mask": mask_BT.long().to(device)}
        read = {"encoder" if self.seq2seq else "decoder": (ids_BT, mask_BT)}
        if self.seq2seq:
            taught_BT, taught_mask_BT = self._ids(windows, decoder=True)
            inputs["decoder_input_ids"] = taught_BT.to(device)
            inputs["decoder_attention_mask"] = taught_mask_BT.long().to(device)
            read["decoder"] = (taught_BT, taught_mask_BT)
        self._forward(inputs)
        calls = recorder.take()
        return {
            stack: (calls[stack][0], ids, torch.arange(ids.shape[1]).expand_as(ids), mask)
            for stack, (ids, mask) in read.items()
            if stack in calls
        }

    def _forward(self, inputs: dict[str, Tensor]) -> None:
        """The host without its language-model head, which routing does not need."""
        model: Any = self.host.model
        if not self.seq2seq:
            model(**inputs, use_cache=False, logits_to_keep=1)
            return
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        read = model.get_encoder()(input_ids=ids, attention_mask=mask)
        model.get_decoder()(
            input_ids=inputs["decoder_input_ids"],
            attention_mask=inputs["decoder_attention_mask"],
            encoder_hidden_states=read[0],
            encoder_attention_mask=mask,
            use_cache=False,
        )

    def _decode(
        self, recorder: Recorder, windows: Sequence[Window]
    ) -> dict[str, tuple[Routing, Tensor, Tensor, Tensor]]:
        """Real generation; kept are the steps that read a generated token (Switch: or the start token)."""
        device, s = self.host.device, self.settings
        ids_BP, mask_BP = self._ids(windows)
        sampling: dict[str, Any] = {"do_sample": False}
        if s.temperature > 0:
            sampling = {"do_sample": True, "temperature": s.temperature, "top_k": 0, "top_p": 1.0}
        model: Any = self.host.model
        out = model.generate(
            input_ids=ids_BP.to(device),
            attention_mask=mask_BP.long().to(device),
            max_new_tokens=s.length if self.seq2seq else s.length + 1,
            pad_token_id=int(self.pad_id),
            num_beams=1,
            use_cache=True,
            **sampling,
        ).cpu()
        calls = recorder.take()["decoder"]
        # Switch's decoder starts from one start token: its first call is a step like the others.
        first = 0 if self.seq2seq else ids_BP.shape[1]
        steps = calls if self.seq2seq else calls[1:]
        ids_BT = out[:, first : first + len(steps)]
        positions_BT = (first + torch.arange(ids_BT.shape[1])).expand_as(ids_BT)
        ended_BT = torch.isin(ids_BT, torch.tensor(self.eos_ids, dtype=ids_BT.dtype))
        if self.seq2seq:
            ended_BT[:, 0] = False  # the start token may share the id of another special token
        running_BT = ended_BT.cumsum(1) == 0
        if not steps or not running_BT.any():
            return {}
        return {"decoder": (join(steps), ids_BT, positions_BT, running_BT)}

    def _arrays(
        self, routing: Routing, ids_BT: Tensor, positions_BT: Tensor, mask_BT: Tensor, documents_B: np.ndarray
    ) -> StackArrays:
        tokens = {k: v.numpy() for k, v in routing.select(mask_BT).items() if k != "agrees"}
        lengths_B = mask_BT.sum(1).numpy()
        kept_S = lengths_B > 0
        phase = PHASES.index(self.settings.phase)
        scale = tokens.pop("scale", None)
        return StackArrays(
            **tokens,
            hidden_scale=scale,
            token_ids=ids_BT[mask_BT].numpy().astype(np.int32),
            positions=positions_BT[mask_BT].numpy().astype(np.int32),
            seq_offsets=np.concatenate([[0], lengths_B[kept_S].cumsum()]).astype(np.int64),
            seq_document=documents_B[kept_S],
            seq_phase=np.full(int(kept_S.sum()), phase, dtype=np.uint8),
        )

    def _control(self, stack: str, number: int, routing: Routing, mask_BT: Tensor) -> Control:
        """Counts agreement; a disagreement on exact hidden states ends the collection."""
        assert routing.agrees_BTL is not None
        wrong_BTL = ~routing.agrees_BTL & mask_BT[..., None]
        if wrong_BTL.any():
            b, t, layer = (int(i) for i in wrong_BTL.nonzero()[0])
            name = self.layers[stack][layer].name
            executed = routing.experts_BTLK[b, t, layer].tolist()
            raise SpecgateError(
                f"Routing control failed in batch {number}, sequence {b}, token {t}: {name} executed experts "
                f"{executed}, which its router does not choose for that hidden state ({int(wrong_BTL.sum())} "
                f"of {wrong_BTL.shape[2] * int(mask_BT.sum())} decisions differ); this transformers version "
                "does not do what specgate/moe/families.py says."
            )
        decisions = int(mask_BT.sum()) * wrong_BTL.shape[2]
        control = Control(decisions=decisions, agree=decisions)
        if routing.hidden_BTLD is not None:
            kept = self.recorder.hidden_layers[stack]
            for place, index in enumerate(kept):
                hidden_ND = routing.hidden_BTLD[:, :, place][mask_BT].float()
                if routing.scale_BTL is not None:
                    hidden_ND *= routing.scale_BTL[:, :, place][mask_BT].float()[:, None]
                executed_NK = routing.experts_BTLK[:, :, index][mask_BT].long()
                control.stored_decisions += len(executed_NK)
                control.stored_agree += int(_agree_from(self.layers[stack][index], hidden_ND, executed_NK))
        return control


def _agree_from(layer: MoELayer, hidden_ND: Tensor, experts_NK: Tensor) -> Tensor:
    """How many stored hidden states lead to the experts that executed (capacity left aside)."""
    weight: Any = layer.norm.weight
    with torch.no_grad():
        decision = decide(layer, router_input(layer, hidden_ND[None].to(weight.device, weight.dtype)))
        return agrees(decision, experts_NK[None].to(weight.device)).sum()


def concatenate(parts: Sequence[StackArrays]) -> StackArrays:
    """The arrays of several batches, one after another."""
    joined: dict[str, Any] = {}
    for name in vars(parts[0]):
        values = [getattr(part, name) for part in parts]
        if name == "seq_offsets":
            starts = np.cumsum([0, *(v[-1] for v in values)])
            moved = [v[1:] + start for v, start in zip(values, starts[:-1], strict=True)]
            joined[name] = np.concatenate([[0], *moved]).astype(np.int64)
        else:
            joined[name] = None if values[0] is None else np.concatenate(values)
    return StackArrays(**joined)


def _first(*values: Any) -> Any:
    """The first value that is not None."""
    return next(v for v in values if v is not None)


def _seed(seed: int, number: int) -> int:
    """A seed for batch ``number`` that has nothing to do with its neighbours'."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "big")
