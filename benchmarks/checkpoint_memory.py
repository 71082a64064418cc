"""What saving a sharded run costs in host memory: gathered in a file, as adamw8bit is, beside parts in a folder.

    python benchmarks/checkpoint_memory.py [--processes 2] [KEY=VALUE …]

Processes on a CPU, strategy=fsdp, one step each. The figures are MiB by which a process's anonymous memory (RssAnon of
/proc, so Linux alone) rises above what it holds between steps, the most of the first rank and of the others. From a
CPU parts are written as they are; in the last row each is copied first, as from a GPU.
"""

import argparse
import ctypes
import gc
import multiprocessing
import os
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

KEYS = {
    "n_layer": 6, "n_head": 8, "n_embd": 1024, "vocab_size": 257, "block_size": 16, "batch_size": 1, "max_iters": 1,
    "dtype": "float32", "compile": False, "eval_interval": 0, "warmup_iters": 0, "strategy": "fsdp",
}  # fmt: skip


def held_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def rise_mib(work: Callable[[], Any]) -> float:
    """By how much more is held at the worst moment of `work` than before it, looked at every two milliseconds."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would be used again unseen
    before, most, over = held_mib(), [0.0], threading.Event()

    def look() -> None:
        while not over.wait(0.002):
            most[0] = max(most[0], held_mib() - before)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        work()
    finally:
        over.set()
        looking.join()
    return most[0]


def copied(loader: Any) -> Any:
    for _, item in loader.items:
        yield loader.resolve_fun(item).detach().clone(), item


def measure(rank: int, n: int, port: int, way: str, values: dict[str, Any], folder: str, results: Any) -> None:
    """One process of the run: sends rank and rise."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()})
    from torch.distributed.checkpoint import filesystem

    from gptfit import session
    from gptfit.config import make_run
    from gptfit.train import train

    if way == "gathered":
        session.GATHERED = ("adamw",)
    if way == "parts, copied":
        filesystem._SerialCpuLoader.values = copied  # pyright: ignore[reportAttributeAccessIssue]
    save = session.Session.save

    def measured(self: Any, out: Path) -> Any:
        saved: list[Any] = []
        results.put((rank, rise_mib(lambda: saved.append(save(self, out)))))
        return saved[0]

    session.Session.save = measured  # pyright: ignore[reportAttributeAccessIssue]
    train(make_run(values), folder, device_name="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    n = given.processes
    values = {**KEYS, "n_gpus": n, "gradient_accumulation_steps": n}
    for change in given.changes:
        key, _, value = change.partition("=")
        values[key] = int(value) if value.isdigit() else value
    context = multiprocessing.get_context("spawn")
    print(f"{'':16}{'first rank':>12}{'others':>12}{'on disk':>12}")
    for way in ("gathered", "parts", "parts, copied"):
        with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
            probe.bind(("localhost", 0))
            port, results = probe.getsockname()[1], context.Queue()
            probe.close()
            processes = [
                context.Process(target=measure, args=(rank, n, port, way, values, folder, results)) for rank in range(n)
            ]
            for process in processes:
                process.start()
            rises = dict(results.get() for _ in range(n))
            for process in processes:
                process.join()
            on_disk = sum(path.stat().st_size for path in Path(folder).glob("checkpoint-*/*"))
            on_disk += sum(path.stat().st_size for path in Path(folder).glob("checkpoint-*.pt"))
            others = max(rise for rank, rise in rises.items() if rank)
        print(f"{way:16}{rises[0]:12,.1f}{others:12,.1f}{on_disk / 1024**2:12,.1f}")


if __name__ == "__main__":
    main()
