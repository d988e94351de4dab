"""``python -m specgate COMMAND``: the small commands. The large ones: collect.py, train.py, benchmark.py."""

from __future__ import annotations

import runpy
import sys

from specgate import __version__

#: Command -> (module run as a program, what it does).
COMMANDS = {
    "doctor": ("specgate.doctor", "what this machine has, and what to do about what it has not"),
    "demo": (
        "specgate.demo",
        "trace two real MoEs, train predictors, write a report (what `make demo` runs)",
    ),
    "convert": ("specgate.traces.convert", "traces from npz/npy arrays and Parquet, and back"),
    "pretrain": ("specgate.moe.pretrain", "train a small reference MoE on text"),
    "results": ("specgate.report.results", "docs/RESULTS.md from metrics.json files"),
}


def usage() -> str:
    """The help text, one line per command."""
    lines = [f"specgate {__version__}: foresees which experts a Mixture-of-Experts model will need", ""]
    lines += ["usage: python -m specgate COMMAND [ARGUMENTS]", ""]
    lines += [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    lines += [
        "",
        "From the repository: python collect.py, python train.py, python benchmark.py (--help on each).",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs one command with the rest of the arguments; returns its exit code (2: no such command)."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(__version__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f"specgate: no command {name!r}; the commands are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    before = sys.argv
    sys.argv = [f"specgate {name}", *rest]
    try:
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
