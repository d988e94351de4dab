"""How results look and what things are called, in tables and plots alike.

Colours are Paul Tol's "muted" set (https://personal.sron.nl/~pault/), distinguishable under the common
colour-vision deficiencies; each predictor also has a marker of its own, so that nothing hangs on colour
alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
ORACLE = "oracle"


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of one predictor."""

    color: str
    marker: str
    line: str = "-"


_LOOKS = {
    "popularity": Look("#8a8a8a", "o"),
    "markov": Look("#117733", "s"),
    "markov2": Look("#66BB55", "d"),
    "previous_token": Look("#DDAA33", "^"),
    "recency": Look("#999933", "v"),
    "token_table": Look("#44AA99", "D"),
    "router_lookahead": Look("#AA4499", "P"),
    "router_mean_expert": Look("#882255", "X"),
    "mlp": Look("#CC6677", "h"),
    "router_residual": Look("#332288", "*"),
    "hierarchical": Look("#EE7733", "H"),
    "gnn": Look("#0077BB", "p"),
    "transformer_xl": Look("#CC3311", ">"),
    "seq2seq": Look("#33BBEE", "<"),
    "meta_moe": Look("#AAAA00", "8"),
    "attention": Look("#000000", "o"),
    "expert_lowrank": Look("#EE3377", "s"),
    "ensemble": Look("#225522", "D"),
    "shadow": Look("#BBBBBB", "^"),
    ORACLE: Look("#000000", "_", "--"),
}
_SPARE = (
    *(Look("#88CCEE", "v"), Look("#661100", "^"), Look("#6699CC", "s"), Look("#DDCC77", "D")),
    *(Look("#997700", "X"), Look("#994455", "P"), Look("#004488", "h"), Look("#6F4C9B", "*")),
)

KIND_TITLES = {
    "within": "same token",
    "entry": "before the first MoE layer",
    "wrapped": "across into the next token",
}
KIND_NOTES = {
    "within": "Same token: from a MoE layer to later layers of the same token.",
    "entry": "Before the first MoE layer: the token's id is known (and, while decoding, earlier tokens).",
    "wrapped": "Across into the next token: from the last layers to the first ones of the next token, "
    "which is not sampled yet.",
}
_PREFILL = "in prefill nothing ahead is known of earlier tokens either, so this falls back to popularity"
FOOTNOTES = {"previous_token": _PREFILL, "recency": _PREFILL}


def look_of(predictor: str, all_predictors: Sequence[str]) -> Look:
    """The look of a predictor: fixed for those specgate ships, from a spare set for others."""
    if predictor in _LOOKS:
        return _LOOKS[predictor]
    others = [name for name in all_predictors if name not in _LOOKS]
    return _SPARE[others.index(predictor) % len(_SPARE)]


def kinds_of(rows: Iterable[Row]) -> list[str]:
    """The kinds of target that occur, in reading order."""
    found = {row["kind"] for row in rows}
    return [kind for kind in KIND_TITLES if kind in found]


def traces_of(rows: Iterable[Row]) -> list[str]:
    """Names of the traces in the order of the rows."""
    return list(dict.fromkeys(row["trace"] for row in rows))


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose columns have the wanted values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def scored_rows(record: Mapping[str, Any]) -> list[Row]:
    """The rows that a record is about: of its locked test split if it has any (train.py also scores
    validation).
    """
    split = record.get("split", "test")
    return select(record["rows"], split=split) or list(record["rows"])


def mean_recall(rows: Iterable[Row], predictor: str) -> float:
    """A predictor's recall@K averaged over its horizons (within the token, or whatever kind there is)."""
    mine = select(rows, predictor=predictor)
    kinds = kinds_of(mine)
    values = [row["recall_at_k"] for row in mine if row["kind"] == kinds[0]]
    return sum(values) / len(values)


def ranked(rows: Sequence[Row]) -> list[str]:
    """Predictors from worst to best: free ones, learned ones, the oracle last."""
    group = {row["predictor"]: (row["predictor"] == ORACLE, bool(row["learned"])) for row in rows}
    return sorted(group, key=lambda name: (*group[name], mean_recall(rows, name), name))


def best_free(rows: Sequence[Row]) -> str | None:
    """The free predictor with the highest recall, or None."""
    names = [
        name for name in ranked(rows) if name != ORACLE and not select(rows, predictor=name)[0]["learned"]
    ]
    return names[-1] if names else None


def main_predictor(rows: Sequence[Row]) -> str:
    """The predictor that a report is about: the best learned one, else the best free one, else what there
    is.
    """
    names = ranked(rows)
    candidates = [name for name in names if name != ORACLE]
    return candidates[-1] if candidates else names[-1]


def horizon_name(horizon: int) -> str:
    """N+1, N+2, ..."""
    return f"N+{horizon}"


def trace_title(row: Row) -> str:
    """A trace in words: name, stack and phase (unless the name says so)."""
    about = [word for word in (row["stack"], row["phase"]) if word not in row["trace"]]
    return f"{row['trace']} ({', '.join(about)})" if about else str(row["trace"])


def slug(trace: str) -> str:
    """A trace's name as part of a file name."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in trace)
