"""A file of results that grows: the machine of every run, and rows by key, the newest of each.

    {"runs": [machine and command of each run], "rows": [{"key", "run": which of them measured it, ...}]}

Rows of different GPU models or library versions do not belong into one table: such a file is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SAME = ("gpu", "torch", "triton")


class Record:
    """Rows being measured.

    Args:
        path: The file, continued if it is there; None keeps nothing.
        machine: What `benchmarks.timing.machine` says of this run.

    Raises:
        SystemExit: The file holds figures of another machine.
    """

    def __init__(self, path: Path | None, machine: dict[str, Any]):
        self.path = path
        self._runs: list[dict[str, Any]] = []
        self._rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            held = json.loads(path.read_text(encoding="utf-8"))
            self._runs, self._rows = held["runs"], {row["key"]: row for row in held["rows"]}
            known = self._runs[-1] if self._runs else {}
            other = [f for f in _SAME if f in known and known[f] != machine.get(f)]
            if other:
                raise SystemExit(
                    f"{path} holds figures of {other[0]} {known[other[0]]}, "
                    f"this is {machine.get(other[0])}. Give another --output."
                )
        self._runs.append(machine)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep a row in place of an older one of that key, and write the file."""
        self._rows[key] = {"key": key, "run": len(self._runs) - 1, **row}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Of runs of which no row is left nothing needs to be said.
        used = sorted({row["run"] for row in self._rows.values()})
        rows = [{**row, "run": used.index(row["run"])} for row in self._rows.values()]
        text = json.dumps({"runs": [self._runs[run] for run in used], "rows": rows}, indent=1)
        beside = self.path.with_suffix(".partial")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(self.path)
