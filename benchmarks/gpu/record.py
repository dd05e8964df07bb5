"""The record of the GPU suite: a line for every finished piece, its tables, and one page about all of them."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.gpu.pieces import SLICES


@dataclass(frozen=True, slots=True)
class Record:
    """The lines of a folder: what is finished, with its rows."""

    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "gpu_suite.jsonl"

    def lines(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        found: dict[tuple[str, str], dict[str, Any]] = {}  # the last line of a piece counts
        for text in self.file.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn by what stopped it
            found[line["slice"], line["name"]] = line
        return list(found.values())

    def add(self, line: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("a") as opened:
            opened.write(f"\n{json.dumps(line)}\n")  # after a line that was torn, one of its own
            opened.flush()
            os.fsync(opened.fileno())

    def tables(self) -> None:
        """A CSV per slice, with the columns of all its rows."""
        for name in SLICES:
            rows = [line["stamp"] | row for line in self.lines() if line["slice"] == name for row in line["rows"]]
            if rows:
                with (self.folder / f"gpu_{name}.csv").open("w", newline="") as opened:
                    writer = csv.DictWriter(opened, list(dict.fromkeys(key for row in rows for key in row)))
                    writer.writeheader()
                    writer.writerows(rows)


def summary(lines: list[dict[str, Any]], left: dict[str, int]) -> str:
    """One page: per slice what ran, what did not, and its numbers that matter."""
    parts = [f"# GPU suite on {machine()}", ""]
    for name in SLICES:
        own = [line for line in lines if line["slice"] == name]
        failed = [line for line in own if line["error"]]
        seconds = sum(line["seconds"] for line in own)
        parts.append(f"## {name}: {len(own)} pieces in {seconds:.0f} s, {len(failed)} failed, {left.get(name, 0)} left")
        parts += [f"- FAILED {line['name']}: {line['error'].splitlines()[0][:200]}" for line in failed]
        for line in own:
            parts += [f"- {line['name']}: {brief(row)}" for row in line["rows"] if name != "kernels"]
        if name == "kernels":
            parts += fastest(own)
        parts.append("")
    return "\n".join(parts)


def brief(row: dict[str, Any]) -> str:
    wanted = (
        "way",
        "state",
        "result",
        "seconds",
        "predicted_seconds",
        "tflop_per_s",
        "predicted_mib",
        "peak_mib",
        "predicted_with_weights_mib",
        "peak_with_weights_mib",
        "psnr_db",
        "policy",
        "offload",
    )
    return ", ".join(f"{key} {row[key]}" for key in wanted if row.get(key) not in (None, ""))


def fastest(lines: list[dict[str, Any]]) -> list[str]:
    """For every case and policy of the kernels, the backend that took least."""
    best: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in (row for line in lines for row in line["rows"] if row.get("p50_ms")):
        key = (row["case"], row["size"], row["way"].partition(", ")[2])
        if key not in best or row["p50_ms"] < best[key]["p50_ms"]:
            best[key] = row
    return [f"- {case} {size}: {row['way']}, {row['p50_ms']} ms, {rate(row)}" for (case, size, _), row in best.items()]


def rate(row: dict[str, Any]) -> str:
    return f"{row['tflop_per_s']} TFLOP/s" if row["tflop_per_s"] else f"{row['gb_per_s']} GB/s"
