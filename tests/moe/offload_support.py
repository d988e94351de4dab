"""What the tests of offloading share: saved tiny models, what they give when resident, comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

import specgate
from specgate.moe.families import FAMILIES, moe_layers
from specgate.runtime import native
from tests.moe.tiny_hosts import VOCAB, make_host

SWITCH = "switch_transformers"
STORES = ["simple", *(["native"] if native.available() else [])]
IMPLEMENTATIONS = [
    (family, implementation)
    for family in FAMILIES
    for implementation in ([None] if family == SWITCH else ["eager", "batched_mm", "grouped_mm"])
]
CONTEXT = 64  # tokens that budgets are planned for
_FOLDERS: dict[str, Path] = {}
_RESIDENT: dict[tuple[str, str | None, int, int], Run] = {}


@dataclass
class Run:
    """What a model gives: logits of a prompt, generated tokens, their logits."""

    logits: Tensor
    tokens: Tensor
    steps: list[Tensor]


def saved(family: str, tmp_path_factory: Any) -> Path:
    """The directory of a tiny model; the same for all tests of a run."""
    if family not in _FOLDERS:
        folder = tmp_path_factory.mktemp("offload") / family
        model = make_host(family)
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):  # zero at first, which would not tell expert from expert
                torch.nn.init.normal_(parameter)
        model.save_pretrained(folder)
        _FOLDERS[family] = folder
    return _FOLDERS[family]


def opened(folder: Path, slots: int | None = None, **more: Any) -> Any:
    """An offload with so many slots (None: the least, too many: all), free ones poisoned."""
    plan = specgate.offload(folder, context=CONTEXT).plan
    slots = plan.least_slots if slots is None else min(slots, plan.blocks)
    made = specgate.offload(folder, plan.budget_for(slots), context=CONTEXT, poison=True, **more)
    assert made.plan.slots == slots
    return made


def load_resident(folder: Path, implementation: str | None = None, dtype: torch.dtype | None = None) -> Any:
    """The whole model in memory, as transformers loads it.

    Its experts are copied: transformers leaves Switch's where they are in the mapped file, at any multiple of
    8 bytes, and the last bit of a matrix-vector product of MKL depends on that. Slots are aligned.
    """
    seq2seq = tf.AutoConfig.from_pretrained(folder).is_encoder_decoder
    auto = tf.AutoModelForSeq2SeqLM if seq2seq else tf.AutoModelForCausalLM
    given = {"experts_implementation": implementation, "dtype": dtype}
    more = {name: value for name, value in given.items() if value is not None}
    model = auto.from_pretrained(folder, **more).eval()
    for layer in moe_layers(model):
        for parameter in layer.experts.parameters():
            parameter.data = parameter.data.clone()
    return model


def prompt(sequences: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Sequences of different length, padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(2, VOCAB, (sequences, 12), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    for b in range(1, sequences):
        mask_BT[b, : 5 * b] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def run(model: Any, tokens: int, inputs: dict[str, Tensor] | None = None) -> Run:
    """A forward pass over a prompt, and greedy generation from it."""
    inputs = prompt() if inputs is None else inputs
    more: dict[str, Tensor] = {}
    if model.config.is_encoder_decoder:
        more["decoder_input_ids"] = inputs["input_ids"][:, :9]
    with torch.no_grad():
        logits = model(**inputs, **more).logits
        out = model.generate(
            **inputs,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return Run(logits, out.sequences, list(out.logits))


def resident_run(
    family: str, folder: Path, implementation: str | None, tokens: int, sequences: int = 2
) -> Run:
    """:func:`run` of the resident model, made once per test process."""
    key = (family, implementation, tokens, sequences)
    if key not in _RESIDENT:
        _RESIDENT[key] = run(load_resident(folder, implementation), tokens, prompt(sequences))
    return _RESIDENT[key]


def assert_same(found: Run, wanted: Run) -> None:
    """Equal bit for bit."""
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.tokens, wanted.tokens)
    assert len(found.steps) == len(wanted.steps)
    assert all(torch.equal(a, b) for a, b in zip(found.steps, wanted.steps, strict=True))
    assert not wanted.logits.isnan().any()


def expert_parameters(model: nn.Module) -> list[str]:
    """Names of the experts' parameters in a model."""
    return [name for name, _ in model.named_parameters() if ".experts." in name]
