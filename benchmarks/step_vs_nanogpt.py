"""The trainer's step beside nanoGPT's: time and peak memory, the same model, data and tokens.

    python benchmarks/step_vs_nanogpt.py [--compile] [--rounds 7] [--sizes small,wide] [--threads 1] [KEY=VALUE …]

Ours is train.py's own step, nanoGPT's that of nanogpt_train.py. They take turns, step by step: what slows the machine
down slows down both. A ratio is the median over the rounds of ours over nanoGPT's in that round. On a CPU the time is
that of one thread on the processor, which a busy machine disturbs less than the clock on the wall; --threads 2 takes
two threads and the wall clock. Peaks are those of a trace of both, on fake tensors, as on a GPU; they do not depend on
the machine.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from nanogpt_train import NanoGPTTrainer

from gptfit.config import RunConfig, derive, make_run
from gptfit.data import TRAIN
from gptfit.distributed import launched
from gptfit.scalars import parse_override
from gptfit.setup import set_up
from gptfit.trace import trace_program
from gptfit.train import _step  # pyright: ignore[reportPrivateUsage]

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "vocab_size": 320, "block_size": 128, "batch_size": 16}
# GPT-2 124M's width and vocabulary, two of its layers.
WIDE = {"n_layer": 2, "n_head": 12, "n_embd": 768, "vocab_size": 50304, "block_size": 512, "batch_size": 4}
SIZES = {"small": SMALL, "wide": WIDE}
COMMON = {"dtype": "float32", "gradient_accumulation_steps": 1, "eval_interval": 0}
# Where memory is compared at full size: GPT-2 124M as nanoGPT trains it, bf16, a micro-batch of 12.
FULL = {"compile": False, "gradient_accumulation_steps": 40}


def timed(step: Callable[[], Any], clock: Callable[[], float]) -> float:
    """Seconds of one step; both wait for their loss, and so for the device."""
    began = clock()
    step()
    return clock() - began


def time_steps(run: RunConfig, device: str, rounds: int) -> tuple[float, float, float]:
    """Median seconds a step, ours and nanoGPT's, and the median of their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        session, _ = set_up(run, Path(folder), False, device, launched(), lambda event: None)
        nanogpt = NanoGPTTrainer(run, session.data.tokens(TRAIN), session.device)
        ours, theirs = (lambda: _step(session)), nanogpt.step
        for step in (ours, theirs) * 2:  # the steady step is the second
            step()
        clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
        pairs: list[tuple[float, float]] = []
        for index in range(rounds):  # who goes first changes from round to round
            if index % 2:
                their, own = timed(theirs, clock), timed(ours, clock)
            else:
                own, their = timed(ours, clock), timed(theirs, clock)
            pairs.append((own, their))
    own, their = zip(*pairs, strict=True)
    return median(own), median(their), median(a / b for a, b in pairs)


def peaks(run: RunConfig) -> tuple[float, float]:
    """Peak MiB of live tensors in a traced step, ours and nanoGPT's."""
    plain = derive(run, loss="full", activation_checkpointing="none", recompute_cheap=False, expandable_segments=False)
    own, their = trace_program(run).live_bytes, trace_program(plain, "nanogpt").live_bytes
    return own / 2**20, their / 2**20


def row(name: str, what: str, own: float, their: float, ratio: float) -> None:
    print(f"{name:<22} {what:<14} {own:>10,.1f} {their:>10,.1f} {ratio:>7.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="both under torch.compile (needs a C++ compiler)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="time alone")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    changes = dict(parse_override(change) for change in given.changes)
    print(f"{'size':<22} {'figure':<14} {'gptfit':>10} {'nanoGPT':>10} {'ratio':>7}")
    for size in given.sizes.split(","):
        run = make_run({**COMMON, **SIZES[size], "compile": given.compile, **changes})
        own, their, ratio = time_steps(run, given.device, given.rounds)
        row(size, "ms a step", own * 1e3, their * 1e3, ratio)
        if not given.no_memory:
            own, their = peaks(run)
            row(size, "peak MiB", own, their, own / their)
    if not given.no_memory:
        for cheap in (False,) if given.compile else (False, True):
            own, their = peaks(make_run({**FULL, "compile": given.compile, "recompute_cheap": cheap}))
            row("124M, recompute_cheap" if cheap else "GPT-2 124M, 12×1024", "peak MiB", own, their, own / their)


if __name__ == "__main__":
    main()
