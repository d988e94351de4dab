"""One self-contained HTML page from a metrics.json: pictures inside, no script, no network, light and
dark.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specgate.report.record import describe_hardware
from specgate.report.style import main_predictor, select, trace_title, traces_of
from specgate.report.tables import (
    Table,
    calibration_table,
    detail_table,
    domain_table,
    summary_table,
    trace_table,
)
from specgate.report.verdict import verdict

CAPTIONS = {
    "accuracy": "Share of the experts used that each predictor names among its K most probable, against how "
    "many MoE layers ahead it looks. Thick lines were trained; thin ones are free; the dashed line is the "
    "oracle.",
    "layers": "The same for the best predictor, by the layer it looks from; below, its lead over the best "
    "free predictor in each cell. Published prefetchers are weakest in the first layers (left edge).",
    "reliability": "Honest probabilities lie on the diagonal: of all experts given 30 %, 30 % are used. Bars "
    "show how often each probability is given.",
    "decay": "Further ahead a forecast is less often right. It is honest if its confidence falls with it.",
    "thresholds": "A prefetcher fetches every expert above a threshold: recall is what it gains, 1 − "
    "precision what it wastes. Below the link's break-even precision prefetching costs more than it saves.",
    "load": "How often each expert is used, relative to an even share, and how even that is per layer.",
}

STYLE = """
:root { color-scheme: light dark;
  --ink: #1d1f23; --soft: #5b616b; --paper: #ffffff; --line: #dfe2e7; --card: #f6f7f9;
  --accent: #332288; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e7e9ed; --soft: #a3a9b4; --paper: #15171b; --line: #343841; --card: #1e2127;
    --accent: #a99cf0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 2rem 1.25rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p { max-width: 48rem; }
.lead { font-size: 1.08rem; }
.verdict { background: var(--card); border-left: 4px solid var(--accent); padding: .7rem 1rem; margin: 1rem 0;
  border-radius: 0 .4rem .4rem 0; max-width: 52rem; }
.verdict p { margin: .3rem 0; }
nav a { margin-right: 1rem; }
a { color: var(--accent); }
figure { margin: 1.6rem 0; }
figcaption { font-size: .92rem; color: var(--soft); margin: .3rem 0; max-width: 48rem; }
figure.table figcaption { color: var(--ink); font-weight: 600; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: .4rem;
  padding: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .7rem; text-align: left; white-space: nowrap; }
th { border-bottom: 2px solid var(--line); font-weight: 600; }
th.n, td.n { text-align: right; }
tr.section td { border-top: 1px solid var(--line); }
tr.strong td { font-weight: 700; color: var(--accent); }
tr.strong td:first-child { color: inherit; font-weight: inherit; }
.note { font-size: .82rem; color: var(--soft); margin: .2rem 0; max-width: 60rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font-size: .9em; background: var(--card); padding: .1em .3em; border-radius: .25em; }
"""

INTRODUCTION = (
    "A Mixture-of-Experts model sends each token, in each MoE layer, to K of E experts. Where experts do not "
    "all fit into fast memory, a runtime must know which ones are needed before they are. This page shows "
    "how well that is foreseen one, two and more MoE layers ahead (N+1, N+2, ...), on documents that no "
    "predictor was trained or tuned on, next to predictors that cost nothing to train and to an oracle."
)


def page(record: Mapping[str, Any], pictures: Mapping[str, Mapping[str, Path]]) -> str:
    """The whole page.

    Args:
        record: content of a metrics.json with rows.
        pictures: ``{trace: {picture: path of the PNG}}`` as :func:`specgate.report.plots.draw_all` returns
            it.
    """
    rows, load = record["rows"], record.get("load", {})
    traces = traces_of(rows)
    anchors = {trace: f"trace-{i}" for i, trace in enumerate(traces)}
    titles = {trace: trace_title(select(rows, trace=trace)[0]) for trace in traces}
    parts = [
        "<h1>How well is expert routing foreseen?</h1>",
        f"<p class=lead>{_text(INTRODUCTION)}</p>",
        "<nav>" + "".join(f'<a href="#{anchors[t]}">{_text(titles[t])}</a>' for t in traces) + "</nav>",
    ]
    if record.get("traces"):
        parts += ["<h2>What was traced</h2>", trace_table(record["traces"], load).to_html()]
    parts += ["<h2>The result</h2>", summary_table(rows).to_html()]
    for trace in traces:
        parts.append(f'<h2 id="{anchors[trace]}">{_text(titles[trace])}</h2>')
        sentences = "".join(f"<p>{_text(line)}</p>" for line in verdict(rows, trace, load.get(trace)))
        parts.append(f"<div class=verdict><p><strong>Is it worth predicting?</strong></p>{sentences}</div>")
        parts += _sections(rows, trace, pictures.get(trace, {}), record.get("skipped", []))
    parts += ["<h2>How this was made</h2>", _origin(record)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>specgate: how well is expert routing foreseen?</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def plain_page(
    record: Mapping[str, Any],
    title: str,
    introduction: str,
    tables: Sequence[Table],
    pictures: Sequence[tuple[Path, str]],
) -> str:
    """A page of tables and pictures, for the modes that have no page of their own.

    Args:
        pictures: (path of the PNG, caption), embedded.
    """
    parts = [f"<h1>{_text(title)}</h1>", f"<p class=lead>{_text(introduction)}</p>"]
    parts += [table.to_html() for table in tables]
    parts += [_picture(path, caption, caption) for path, caption in pictures]
    parts += ["<h2>How this was made</h2>", _origin(record)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>specgate: {_text(title)}</title><style>{STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def write_page(record: Mapping[str, Any], pictures: Mapping[str, Mapping[str, Path]], path: Path) -> Path:
    """Write :func:`page` to ``path``."""
    path.write_text(page(record, pictures), encoding="utf-8")
    return path


def _sections(rows: Any, trace: str, pictures: Mapping[str, Path], skipped: Any) -> list[str]:
    mine = select(rows, trace=trace)
    tables: dict[str, Table] = {
        "accuracy": detail_table(rows, trace),
        "decay": calibration_table(rows, trace),
    }
    if len(mine[0].get("per_domain", {})) > 1:
        tables["layers"] = domain_table(rows, trace)
    parts = []
    for name, caption in CAPTIONS.items():
        if name in pictures:
            about = f"{name} of {main_predictor(mine)} on {trace}"
            parts.append(_picture(pictures[name], caption, about))
        if name in tables:
            parts.append(tables[name].to_html())
    left_out = [f"{s['predictor']} ({s['reason']})" for s in skipped if s["trace"] == trace]
    if left_out:
        parts.append(f"<p class=note>Left out: {_text('; '.join(left_out))}.</p>")
    return parts


def _picture(path: Path, caption: str, about: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{_text(about)}">'
        f"<figcaption>{_text(caption)}</figcaption></figure>"
    )


def _origin(record: Mapping[str, Any]) -> str:
    git = record.get("git")
    commit = (
        "not in a repository" if git is None else git["commit"] + (" with changes" if git["dirty"] else "")
    )
    facts = {
        "command": record["command"],
        "started": f"{record['started']}, {record['wall_seconds']:.0f} s",
        "hardware": describe_hardware(record["hardware"]),
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        "code": commit,
    }
    if record.get("mode") not in ("live", "replay"):  # nothing is scored there
        facts["documents"] = (
            f"{record.get('split', 'test')} split, by document; scaling fitted on the validation split"
        )
    for trace in record.get("traces", []):
        facts[f"trace {trace['name']}"] = ", ".join(f"sha256 {digest}" for digest in trace["sha256"])
    return "<dl>" + "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items()) + "</dl>"


def _text(value: Any) -> str:
    return html.escape(str(value))
