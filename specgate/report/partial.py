"""Measurements of a long run, kept as they come: what an interrupted run had is not lost.

Written as ``partial.json`` into the run's folder after every measurement, and removed once metrics.json is
there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specgate.errors import ConfigError
from specgate.report.record import write_json

NAME = "partial.json"


class Partial:
    """The measurements so far.

    Args:
        folder: of this run.
        settings: what was measured; measurements of other settings are not taken over.
        resume: folder of the interrupted run to go on from, or None.

    Attributes:
        measured: by key.
        taken: how many came from the interrupted run.

    Raises:
        ConfigError: if there is nothing to go on from, or it was measured with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], resume: str | Path | None = None) -> None:
        self.path = folder / NAME
        text = json.dumps(settings, sort_keys=True, default=str)
        self._fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.measured: dict[str, dict[str, Any]] = {}
        if resume is not None:
            self.measured = self._read(Path(resume) / NAME)
        self.taken = len(self.measured)

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(path.read_text())
            fingerprint, measured = found["fingerprint"], dict(found["measured"])
        except FileNotFoundError:
            raise ConfigError(
                f"resume={path.parent} holds no {NAME}; give the folder of an interrupted run."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); run again without resume=.") from None
        if fingerprint != self._fingerprint:
            raise ConfigError(
                f"resume={path.parent} was measured with other settings; repeat its command and add resume=."
            )
        return measured

    def add(self, key: str, measurement: dict[str, Any]) -> None:
        """Keeps a measurement."""
        self.measured[key] = measurement
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"fingerprint": self._fingerprint, "measured": self.measured})

    def finish(self) -> None:
        """Everything is measured."""
        self.path.unlink(missing_ok=True)

    def farewell(self, total: int, setting: str) -> str:
        """What to tell somebody who interrupts the run."""
        done = len(self.measured)
        if not done:
            return "Interrupted before the first of its measurements was done; nothing is kept."
        return (
            f"Interrupted: {done} of {total} measurements are kept; repeat the command with "
            f"{setting}.resume={self.path.parent} to go on."
        )
