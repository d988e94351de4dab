"""What stage best of the zoo trains, and how: the most accurate predictor of each data set and the best cheap
one. docs/LOG.md says how the settings were found."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Best:
    """One predictor on one data set.

    Attributes:
        options: of train.py. more: traces that it learns from besides its own, and besides all further text;
            None: from its own alone.
    """

    epochs: int
    options: tuple[str, ...] = ()
    more: tuple[str, ...] | None = None


LOW_RANK = (
    *("model.by_expert=true", "model.depth=true", "model.ngram_rows=65536"),
    *("model.head_width=8", "model.value_width=24", "model.span=32", "model.lr=8.0e-3"),
)
"""What all forms of expert_lowrank have in common."""
BEST = {
    ("olmoe_ref_prefill", "attention"): Best(4, ("model.width=64", "model.regress=40.0"), ()),
    ("olmoe_ref_prefill", "expert_lowrank"): Best(
        5, (*LOW_RANK, "model.units=[30,16,8,6]", "model.foresee=[8,5,4,3]", "model.heads=2"), ()
    ),
    ("switch_ref_encoder", "attention"): Best(14, ("model.units=64", "model.regress=8.0")),
    ("switch_ref_encoder", "expert_lowrank"): Best(
        6, (*LOW_RANK, "model.units=80", "model.foresee=[32,16]", "model.heads=3", "model.dropout=0.1")
    ),
    ("switch_ref_decoder", "attention"): Best(8),
    ("switch_ref_decoder", "expert_lowrank"): Best(
        8, (*LOW_RANK, "model.units=80", "model.foresee=[32,16]", "model.heads=3", "model.dropout=0.1")
    ),
    ("olmoe_ref_decode", "transformer_xl"): Best(6),
    ("olmoe_ref_decode", "expert_lowrank"): Best(
        3,
        (
            *LOW_RANK,
            "model.units=[18,9,5,4]",
            "model.foresee=[6,4,3]",
            "model.heads=2",
            "data.train_on_prefill=true",
        ),
        ("olmoe_ref",),
    ),
    ("gpt_oss_20b", "transformer_xl"): Best(40, ("model.dropout=0.3",)),
}
