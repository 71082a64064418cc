"""Traces the programs that people measured on real GPUs, and writes down what `gptfit accuracy` compares.

    python benchmarks/real_cards.py [ID …]

other_code/ has the programs, written anew from the public originals. Each takes between ten seconds and some minutes.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gptfit.accuracy import ROWS, TRACED, read_rows
from gptfit.tracefile import trace_file
from gptfit.units import MiB

HERE = Path(__file__).parent

# By measurement: the program, its arguments.
PROGRAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "nanochat-5090-d10-mb8-peak": ("nanochat.py:step_of", {"depth": 10}),
    "nanochat-5090-d20-mb8-peak": ("nanochat.py:step_of", {"depth": 20}),
    "dickles-4090-2x64-compile-peak": ("nanochat.py:small_step", {}),
    "lzw-4070-nanochat-d12-mb8-peak": ("nanochat_later.py:step_of", {"depth": 12}),
    "lzw-4070-nanochat-d12-mb8-peak-10k": ("nanochat_later.py:step_of", {"depth": 12}),
    "autoresearch-3060-b4": ("autoresearch.py:step_of", {"batch_size": 4}),
    "autoresearch-3060-b8": ("autoresearch.py:step_of", {"batch_size": 8}),
    "autoresearch-3060-b10": ("autoresearch.py:step_of", {"batch_size": 10}),
    "tr-adamw-base": ("speedrun.py:adamw_step", {}),
    "tr-muon-260": ("speedrun.py:muon_step", {}),
    "tr-softcap": ("speedrun.py:muon_step", {"cap": 30.0}),
    "cs336-duoan-small-eager": ("cs336.py:course_step", {"size": "small"}),
    "cs336-duoan-small-compile": ("cs336.py:course_step", {"size": "small", "compile": True}),
    "cs336-duoan-large-eager": ("cs336.py:course_step", {"size": "large"}),
    "cs336-duoan-large-compile": ("cs336.py:course_step", {"size": "large", "compile": True}),
    "cs336-enzo-xl-ctx512-fp32": ("cs336.py:course_step", {"size": "xl"}),
    "cs336-enzo-xl-ctx128-fp32": ("cs336.py:course_step", {"size": "xl", "block_size": 128}),
    "cs336-enzo-xl-ctx512-ckpt1": ("cs336.py:course_step", {"size": "xl", "group": 1}),
    "cs336-enzo-xl-ctx512-ckpt2": ("cs336.py:course_step", {"size": "xl", "group": 2}),
    "cs336-duoan-xl-ckpt4": ("cs336.py:course_step", {"size": "xl", "block_size": 2048, "group": 4}),
    "cs336-linyun-xl-ctx512-fp32": ("cs336.py:torch_step", {}),
    "cs336-linyun-xl-ctx512-bf16": ("cs336.py:torch_step", {"bfloat16": True}),
    "cs336-linyun-xl-ctx128-fwd-fp32": ("cs336.py:forward_only", {"block_size": 128}),
    "cs336-linyun-xl-ctx512-fwd-bf16": ("cs336.py:forward_only", {"bfloat16": True}),
    "cs336-linyun-xl-ctx1024-fwd-fp32": ("cs336.py:forward_only", {"block_size": 1024}),
    "cs336-linyun-xl-ctx2048-fwd-fp32": ("cs336.py:forward_only", {"block_size": 2048}),
    "cs336-linyun-xl-ctx2048-fwd-bf16": ("cs336.py:forward_only", {"block_size": 2048, "bfloat16": True}),
}


def trace_row(name: str) -> dict[str, object]:
    """What is written down of one measurement's program."""
    program, arguments = PROGRAMS[name]
    report = trace_file(f"{HERE / 'other_code' / program}", **arguments)
    return {
        "id": name,
        "metric": "max_memory_allocated",
        "program": f"benchmarks/other_code/{program}",
        "arguments": arguments,
        "compiled": bool(report.notes) or report.arguments.get("compile") is True,
        "mib": round(report.allocated_bytes / MiB, 2),
        "torch": torch.__version__.split("+")[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", nargs="*", choices=[[], *PROGRAMS], metavar="ID", help="measurements; all if none")
    chosen: Iterable[str] = parser.parse_args().ids or PROGRAMS
    measured = {str(row["id"]): row for row in read_rows(ROWS)}
    known = {str(row["id"]): row for row in read_rows(TRACED)} if TRACED.is_file() else {}
    print(f"{'':36}{'measured':>11}{'traced':>11}{'error':>10}")
    for name in chosen:
        row = known[name] = trace_row(name)
        figure, traced = float(str(measured[name]["mib"])), float(str(row["mib"]))
        print(f"{name:36}{figure:11,.1f}{traced:11,.1f}{traced / figure - 1:10.2%}")
        sys.stdout.flush()
        TRACED.write_text("".join(json.dumps(known[key]) + "\n" for key in PROGRAMS if key in known))


if __name__ == "__main__":
    main()
