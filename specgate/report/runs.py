"""Many runs of train.py side by side: read, slimmed, grouped over seeds, ranked.

A *run* is one metrics.json; a *group* is the runs that differ in nothing but the seed. Nothing here imports
torch: it is read when every train.py starts (``specgate.report.sweep``).
"""

from __future__ import annotations

import io
import json
import statistics
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

from specgate.errors import SpecgateError

FILE_NAME = "metrics.json"
SCORES = ("n", "recall_at_k", "recall_at_2k", "exact_set", "top1", "ece", "ece_uncalibrated", "nll", "brier")
WITHIN = "within"
#: Configuration that does not make a run another experiment: where it writes, who watches it, its seed.
_BESIDE = ("paths", "hydra", "logger", "seed", "threads", "ckpt_path", "test")
_BESIDE_KEYS = (
    "data.num_workers", "data.verify", "data.pin_memory", "data.cache", "trainer.default_root_dir",
    "trainer.enable_progress_bar", "trainer.enable_model_summary", "callbacks.checkpoint.dirpath",
    "callbacks.keep_last.folder", "callbacks.median_stopping.folder", "callbacks.median_stopping.sweep",
)  # fmt: skip

Run = dict[str, Any]


def read_runs(sources: Iterable[str | Path]) -> list[Run]:
    """Every metrics.json of train.py under the given folders or inside the given ``.tar.gz`` archives.

    Raises:
        SpecgateError: if a source does not exist, or a metrics.json in it is damaged.
    """
    runs = []
    for source in map(Path, sources):
        for name, text in _documents(source):
            try:
                record = json.loads(text)
                if record.get("entry") == "train.py":
                    runs.append(slim_run(record, name))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise SpecgateError(
                    f"{source}: {name} is no metrics.json of train.py ({error!r}): delete it or run it again"
                ) from None
    return runs


def _documents(source: Path) -> Iterator[tuple[str, str]]:
    """(folder's name, text) of each metrics.json, in the order of job numbers where folders are numbers."""
    if source.is_dir():
        files = sorted(source.rglob(FILE_NAME), key=lambda file: _natural(file.relative_to(source).parent))
        for file in files:
            yield file.relative_to(source).parent.as_posix(), file.read_text()
    elif source.is_file() and source.name.endswith((".tar.gz", ".tgz", ".tar")):
        with tarfile.open(source) as archive:
            members = [m for m in archive if m.isfile() and PurePosixPath(m.name).name == FILE_NAME]
            for member in sorted(members, key=lambda m: _natural(PurePosixPath(m.name).parent)):
                content = archive.extractfile(member)
                assert content is not None  # a file, by the line above
                yield PurePosixPath(member.name).parent.as_posix(), io.TextIOWrapper(content).read()
    elif source.is_file() and source.name.endswith(".json"):
        yield source.parent.name, source.read_text()
    else:
        raise SpecgateError(
            f"{source} is no folder of runs, metrics.json or .tar.gz of them: give one of these"
        )


def _natural(path: PurePath) -> list[tuple[int, int, str]]:
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.parts]


_TRACE = ("name", "stack", "phase", "layers", "experts", "top_k", "hidden_size")


def slim_run(record: Mapping[str, Any], source: str = "") -> Run:
    """What tables over many runs need of one metrics.json; no curves, no local paths.

    Args:
        source: the run's folder, relative to what was given.
    """
    rows, trace = record["rows"], record["traces"][0]
    front, config = rows[0], record.get("config") or {}
    scores: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row in rows:
        kinds = scores.setdefault(row["split"], {}).setdefault(row["kind"], {})
        kinds[str(row["horizon"])] = {name: row[name] for name in SCORES if name in row}
    return {
        "source": source,
        "command": record["command"],
        "git": record["git"],
        "hardware": record["hardware"],
        "wall_seconds": record["wall_seconds"],
        "training_seconds": record.get("training_seconds"),
        "steps": record.get("steps"),
        "tokens_seen": record.get("tokens_seen"),
        "pruned": record.get("pruned"),
        "parameters": record.get("parameters"),
        "predictor": front["predictor"],
        "learned": front["learned"],
        "seed": config.get("seed"),
        "settings": settings(config) if record.get("steps") else untrained(record),
        "trace": {key: trace.get(key) for key in (*_TRACE, "revision", "text_sha256", "sha256")},
        "scores": scores,
    }


def untrained(record: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter to a run in which no optimizer took a step: the predictor's own, the members
    of an ensemble by name and number instead of by file.
    """
    found = model_settings(record.get("config") or {})
    members = (record.get("predictor_report") or {}).get("members")
    if members:
        counts = Counter(str(member).split(" ")[0] for member in members)
        found = {key: value for key, value in found.items() if key != "model.checkpoints"}
        found["model.of"] = "+".join(f"{n}×{name}" for name, n in counts.items())
    return found


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as one flat mapping, without what does not make a run another experiment; of paths
    the last part is kept.
    """
    flat: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else str(key))
        elif path not in _BESIDE_KEYS and not path.endswith(".seed"):
            flat[path] = [last(part) for part in node] if isinstance(node, list) else last(node)

    def last(value: Any) -> Any:
        return Path(value).name if isinstance(value, str) and "/" in value else value

    walk({key: value for key, value in config.items() if key not in _BESIDE}, "")
    return flat


def model_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the predictor itself, which say one variant from another."""
    return {key: value for key, value in settings(config).items() if key.startswith("model.")}


def trace_key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Runs of one key were scored on the same text, as the same host's stack routed it."""
    trace = run["trace"]
    text = (trace.get("text_sha256") or {}).get("test")
    scored = (*dict.fromkeys(trace["revision"]), text) if text else tuple(trace["sha256"])
    return trace["stack"], trace["phase"], trace.get("hidden_size") is None, *scored


def trace_name(run: Mapping[str, Any]) -> str:
    """``olmoe_ref (decoder, prefill)``."""
    trace = run["trace"]
    about = [word for word in (trace["stack"], trace["phase"]) if word not in trace["name"]]
    name = f"{trace['name']} ({', '.join(about)})" if about else str(trace["name"])
    return name + (", ids only" if trace.get("hidden_size") is None else "")


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single value) of ``count`` values."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None of no values."""
        if not values:
            return None
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def text(self, scale: float = 1.0, digits: int = 3) -> str:
        """``61.2 ± 0.08`` (one digit more for the deviation where the mean has few); the mean alone where
        there is one value, or all are equal."""
        mean = f"{scale * self.mean:.{digits}f}"
        if not self.deviation:
            return mean
        return f"{mean} ± {scale * self.deviation:.{digits + (digits in (1, 2))}f}"

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        deviation = None if self.deviation is None else round(self.deviation, 6)
        return {"mean": round(self.mean, 6), "deviation": deviation, "count": self.count}


@dataclass
class Group:
    """Runs that differ only in their seed.

    Attributes:
        label: the predictor and the settings that other groups have differently.
        recall: what it is ranked by: validation recall@K over the horizons that all groups foresee.
    """

    runs: list[Run]
    label: str = ""
    recall: Spread | None = None

    @property
    def predictor(self) -> str:
        """Its registry name."""
        return str(self.runs[0]["predictor"])

    @property
    def seeds(self) -> list[Any]:
        """In the order of the runs."""
        return [run["seed"] for run in self.runs]

    def score(self, split: str, kind: str, horizon: int, name: str) -> Spread | None:
        """Over the runs that have it."""
        cells = [run["scores"].get(split, {}).get(kind, {}).get(str(horizon), {}) for run in self.runs]
        return Spread.of([cell[name] for cell in cells if cell.get(name) is not None])

    def mean_score(self, split: str, kind: str, horizons: Sequence[int], name: str) -> Spread | None:
        """The score averaged over horizons in each run, then spread over the runs."""
        values = []
        for run in self.runs:
            of = run["scores"].get(split, {}).get(kind, {})
            found = [of[str(h)][name] for h in horizons if str(h) in of and of[str(h)].get(name) is not None]
            if len(found) == len(horizons) and found:
                values.append(statistics.fmean(found))
        return Spread.of(values)

    def value(self, name: str) -> Spread | None:
        """Of a number that the run has once, such as ``training_seconds``."""
        return Spread.of([float(run[name]) for run in self.runs if run[name] is not None])


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs of one trace, grouped over seeds, best first."""
    groups: dict[str, Group] = {}
    for run in runs:
        key = json.dumps([run["predictor"], run["settings"]], sort_keys=True)
        groups.setdefault(key, Group([])).runs.append(run)
    found = list(groups.values())
    for group in found:
        group.label = " ".join([group.predictor, *_differing(group, found)])
    horizons = common_horizons(found)
    for group in found:
        group.recall = group.mean_score("validation", WITHIN, horizons, "recall_at_k")
    return sorted(found, key=lambda group: (-(group.recall.mean if group.recall else 0.0), group.label))


def _differing(group: Group, groups: Sequence[Group]) -> list[str]:
    """``key=value`` of settings in which this group differs: from others of its predictor, or (but for the
    model's own) from any that was trained.
    """
    words, mine = [], group.runs[0]["settings"]
    for key, value in sorted(
        mine.items(), key=lambda item: (isinstance(item[1], list), "trainer." not in item[0])
    ):
        rivals = [g for g in groups if g.predictor == group.predictor or not key.startswith("model.")]
        own = key.startswith("model.")
        theirs = [rival.runs[0]["settings"] for rival in rivals if own or rival.runs[0]["steps"]]
        if any(other.get(key) != value for other in theirs):
            shown = f"{value:.4g}" if isinstance(value, float) else str(value)
            if isinstance(value, list):
                shown = "+".join(map(str, value))
            name = key
            for section in ("model.", "callbacks.", "trainer.", "data."):
                name = name.removeprefix(section)
            if name.endswith("_target_"):  # a class stands for its section
                name, shown = name.removesuffix("._target_"), shown.rpartition(".")[2]
            if name != "_target_":  # the predictor's own, which the label begins with
                words.append(f"{name}={shown}")
    return words


def common_horizons(groups: Sequence[Group], kind: str = WITHIN) -> list[int]:
    """Horizons that every run was scored at on the validation split."""
    sets = [
        {int(h) for h in run["scores"].get("validation", {}).get(kind, {})} for g in groups for run in g.runs
    ]
    return sorted(set.intersection(*sets)) if sets else []


def all_horizons(groups: Sequence[Group], kind: str = WITHIN) -> list[int]:
    """Horizons that any run was scored at."""
    return sorted(
        {
            int(h)
            for g in groups
            for run in g.runs
            for split in run["scores"].values()
            for h in split.get(kind, {})
        }
    )


def by_trace(runs: Sequence[Run]) -> dict[tuple[Any, ...], list[Run]]:
    """Runs by what they were scored on, in order of appearance."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(trace_key(run), []).append(run)
    return found
