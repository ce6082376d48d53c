"""Predicted memory against real training: docs/results/memory-truth.md.

Each case (memory_truth_case.py) is simulated, trained for two steps under the tracker, and trained
for two steps without it in a process of its own, whose growth is measured. Cases that have a row
are skipped, so that a run can be continued.

    python benchmarks/memory_truth.py           # CPU: about half an hour on 2 cores
    python benchmarks/memory_truth.py --cuda    # on a GPU of 40 GB
    python benchmarks/memory_truth.py --page    # only the page, from the rows
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from memory_truth_case import CASES, CUDA_CASES, STEPS, Case
from simulated_rows import Row, Tables, fill, gib, markdown
from simulated_rows import read_rows as _read
from velora_torch.report.environment import machine_info, version_info

HERE = Path(__file__).parent
ROWS = HERE / "results" / "memory_truth.jsonl"
PAGE = HERE.parent / "docs" / "results" / "memory-truth.md"
COMMAND = "python benchmarks/memory_truth.py"
BYTES = ("peak", "saved", "gradients", "optimizer_state")
"""What must be equal to the byte."""
GOAL = {"cpu": 0.10, "cuda": 0.03}
"""How far a prediction may be from the growth."""

# glibc gives freed memory back at once: large blocks are mapped one by one, in a single heap.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}


def child(name: str, what: str, device: str) -> dict[str, Any]:
    """Run one part of a case in a process of its own."""
    command = [sys.executable, str(HERE / "memory_truth_case.py"), name, what]
    command += ["--cuda"] if device == "cuda" else []
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise RuntimeError(f"{name}, {what}: exit {done.returncode}: {' '.join(last)}")
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def row_of(name: str, case: Case, device: str) -> Row:
    """One case: predicted, tracked, and how far the process or the card really grew."""
    predicted, tracked, grown = (
        child(name, what, device) for what in ("predicted", "tracked", "growth")
    )
    ours, real = predicted.pop("segments"), tracked.pop("segments")
    return {
        "benchmark": "memory_truth",
        "case": name,
        "device": device,
        "model": case.model,
        "dtype": case.dtype,
        "batch": case.batch,
        "seq": case.seq,
        "setup": str(case.setup),
        "accumulation": case.setup.accumulation,
        "steps": STEPS,
        "predicted": predicted,
        "tracked": tracked,
        "segments": len(real),
        "segments_equal": sum(ours.get(segment) == peak for segment, peak in real.items()),
        **grown,
        "ratio": predicted["peak"] / grown["growth"],
    }


def measure(device: str, only: str | None) -> int:
    """Measure the cases that have no row yet; the number of those that failed."""
    cases = CUDA_CASES if device == "cuda" else CASES
    common = {
        "command": COMMAND + (" --cuda" if device == "cuda" else ""),
        "machine": vars(machine_info(device)),
        "versions": version_info(),
    }
    known = {row["case"] for row in read_rows(ROWS) if row["device"] == device}
    chosen = [name for name in cases if name not in known and (only is None or only in name)]
    failed = 0
    for number, name in enumerate(chosen, 1):
        print(f"{number}/{len(chosen)} {name}", end=" ", flush=True)
        try:
            row = row_of(name, cases[name], device)
        except RuntimeError as error:
            failed += 1
            print(f"FAILED: {error}", flush=True)
            continue
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **common}) + "\n")
        equal = ", ".join(part for part in BYTES if _is_equal(row, part)) or "nothing"
        print(f"predicted/growth {row['ratio']:.3f}, equal: {equal}", flush=True)
    return failed


def read_rows(path: Path) -> list[Row]:
    """Rows in the order of the cases."""
    rows = _read(path) if path.exists() else []
    order = [*CASES, *CUDA_CASES]
    return sorted(rows, key=lambda row: order.index(row["case"]))


def _is_equal(row: Row, part: str) -> bool:
    return bool(row["predicted"][part] == row["tracked"][part])


# ------------------------------------------------------------------ the page


def tables(rows: list[Row]) -> Tables:
    """The tables of the page."""
    return {
        device: _table([row for row in rows if row["device"] == device])
        for device in ("cpu", "cuda")
    } | {"summary": _summary([row for row in rows if row["device"] == "cpu"])}


def _summary(rows: list[Row]) -> str:
    exact = sum(all(_is_equal(row, part) for part in BYTES) for row in rows)
    near = sum(abs(row["ratio"] - 1) <= GOAL["cpu"] for row in rows)
    ratios = [row["ratio"] for row in rows]
    return markdown(
        ["cases", "equal to the byte", "peak within 10% of the growth", "predicted / growth"],
        [[str(len(rows)), str(exact), str(near), f"{min(ratios):.3f} to {max(ratios):.3f}"]],
    )


def _table(rows: list[Row]) -> str:
    if not rows:
        return "Not yet measured."
    header = ["case", "batch", "predicted peak", "saved", "gradients", "optimizer state"]
    header += ["equal to the byte", "measured growth", "predicted / growth"]
    return markdown(header, [_line(row) for row in rows])


def _line(row: Row) -> list[str]:
    size = str(row["batch"]) + (f" × {row['seq']}" if row["seq"] else "")
    apart = "; ".join(_apart(row, part) for part in BYTES if not _is_equal(row, part))
    equal = apart or f"yes, and {row['segments_equal']} of {row['segments']} segments"
    numbers = [gib(row["predicted"][part]) for part in BYTES]
    far = abs(row["ratio"] - 1) > GOAL[row["device"]]
    ratio = f"**{row['ratio']:.3f}**" if far else f"{row['ratio']:.3f}"
    return [row["case"], size, *numbers, equal, gib(row["growth"]), ratio]


def _apart(row: Row, part: str) -> str:
    ours, real = row["predicted"][part], row["tracked"][part]
    name = part.replace("_", " ")
    return f"{name} {(ours - real) / real:+.2%}" if real else f"{name} {ours - real:+d} bytes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    parser.add_argument("--only", help="cases whose name contains this")
    options = parser.parse_args()
    failed = 0 if options.page else measure("cuda" if options.cuda else "cpu", options.only)
    if PAGE.exists():
        page = fill(PAGE.read_text(encoding="utf-8"), tables(read_rows(ROWS)))
        PAGE.write_text(page, encoding="utf-8")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
