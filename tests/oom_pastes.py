"""Out-of-memory pastes for tests: labelled ones, ones written from figures, and what forums and loggers do to them."""

import html
import json
import random
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "oom"
LABELS = {row["id"]: row for row in map(json.loads, (DATA / "labels.jsonl").read_text().splitlines())}
FIGURES = (
    *("tried_bytes", "total_bytes", "free_bytes", "allocated_bytes", "reserved_bytes", "reserved_unallocated_bytes"),
    *("process_bytes", "other_processes_bytes", "device_index"),
)
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
SITE = "/usr/lib/python3.12/site-packages/torch"

# Frames of a phase, outermost first: file, function, code.
FRAMES = {
    "forward": (
        ("train.py", "<module>", "logits, loss = model(X, Y)"),
        (f"{SITE}/nn/modules/module.py", "_call_impl", "return forward_call(*args, **kwargs)"),
        ("/home/u/nanoGPT/model.py", "forward", "logits = self.lm_head(x)"),
    ),
    "backward": (
        ("train.py", "<module>", "scaler.scale(loss).backward()"),
        (f"{SITE}/_tensor.py", "backward", "torch.autograd.backward("),
        (f"{SITE}/autograd/__init__.py", "backward", "_engine_run_backward("),
        (f"{SITE}/autograd/graph.py", "_engine_run_backward", "return Variable._execution_engine.run_backward("),
    ),
    "optimizer": (
        ("train.py", "<module>", "optimizer.step()"),
        (f"{SITE}/optim/optimizer.py", "wrapper", "out = func(*args, **kwargs)"),
        (f"{SITE}/optim/adamw.py", "step", "adamw("),
        (f"{SITE}/optim/adamw.py", "_multi_tensor_adamw", "exp_avg_sq_sqrt = torch._foreach_sqrt(device_exp_avg_sqs)"),
    ),
    "eval": (
        ("train.py", "<module>", "losses = estimate_loss()"),
        (f"{SITE}/utils/_contextlib.py", "decorate_context", "return func(*args, **kwargs)"),
        ("train.py", "estimate_loss", "logits, loss = model(X, Y)"),
        ("model.py", "forward", "logits = self.lm_head(x)"),
    ),
    "model_load": (
        ("train.py", "<module>", "model.to(device)"),
        (f"{SITE}/nn/modules/module.py", "to", "return self._apply(convert)"),
        (f"{SITE}/nn/modules/module.py", "convert", "return t.to("),
    ),
    "loss": (
        ("train.py", "<module>", "loss = F.cross_entropy(logits.view(-1, V), y.view(-1))"),
        (f"{SITE}/nn/functional.py", "cross_entropy", "return torch._C._nn.cross_entropy_loss(input, target)"),
    ),
    "checkpoint": (
        ("train.py", "<module>", "checkpoint = torch.load(ckpt_path, map_location=device)"),
        (f"{SITE}/serialization.py", "load", "return _load(opened_zipfile,"),
        (f"{SITE}/serialization.py", "_cuda_deserialize", "return obj.cuda(device)"),
    ),
    "data": (
        ("train.py", "<module>", "X, Y = get_batch('train')"),
        ("train.py", "get_batch", "x = x.pin_memory().to(device, non_blocking=True)"),
    ),
    "compile": (
        ("train.py", "<module>", "logits, loss = model(X, Y)"),
        (f"{SITE}/_dynamo/eval_frame.py", "_fn", "return fn(*args, **kwargs)"),
        (f"{SITE}/_inductor/runtime/triton_heuristics.py", "run", "self.autotune_to_one_config(*args, **kwargs)"),
        (f"{SITE}/_inductor/runtime/triton_heuristics.py", "benchmark_all_configs", "launcher: self.bench(launcher)"),
    ),
}
STYLES = ("torch<1.4", "torch1.x", "torch2.1", "torch2.2", "torch2.9")
_ADVICE = {
    "torch1.x": "If reserved memory is >> allocated memory try setting max_split_size_mb to avoid fragmentation.  See "
    "documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF",
    "torch2.1": "If reserved but unallocated memory is large try setting max_split_size_mb to avoid fragmentation.  "
    "See documentation for Memory Management and PYTORCH_CUDA_ALLOC_CONF",
    "torch2.2": "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:"
    "True to avoid fragmentation.  See documentation for Memory Management  (https://pytorch.org/docs/stable/notes)",
    "torch2.9": "If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True "
    "to avoid fragmentation.  See documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes)",
}


@dataclass(frozen=True)
class Paste:
    """A traceback, line by line, and what a reader must get from it."""

    lines: tuple[str, ...]
    truth: dict[str, Any]


def labelled(name: str) -> str:
    return (DATA / f"{name}.txt").read_text(encoding="utf-8")


def size_of(text: str) -> int:
    """The bytes of `1.54 GiB`."""
    number, unit = text.split()
    return round(float(number) * UNITS[unit])


def written(rng: random.Random, style: str, phase: str) -> Paste:
    """A traceback that torch of that version would print, with figures drawn at random."""

    def figure() -> str:
        whole = rng.choice((rng.randint(1, 9), rng.randint(10, 99), rng.randint(100, 1000)))
        return f"{whole}.{rng.randint(0, 99):02d} {'MiB' if whole > 90 else rng.choice(('MiB', 'GiB'))}"

    tried, total, allocated, last = (figure() for _ in range(4))
    free = rng.choice((figure(), "0 bytes", "896.00 KiB"))
    device = rng.randint(0, 7)
    truth = dict.fromkeys(FIGURES) | {
        "tried_bytes": size_of(tried),
        "total_bytes": size_of(total),
        "free_bytes": size_of(free),
        "allocated_bytes": size_of(allocated),
        "device_index": device,
    }
    text = f"CUDA out of memory. Tried to allocate {tried}"
    if style in ("torch<1.4", "torch1.x"):
        text += f" (GPU {device}; {total} total capacity; {allocated} already allocated; {free} free; {last} "
        text += "cached)" if style == "torch<1.4" else f"reserved in total by PyTorch) {_ADVICE[style]}"
        truth["reserved_bytes"] = None if style == "torch<1.4" else size_of(last)
    else:
        capacity = "capacty" if style == "torch2.1" else "capacity"
        text += f". GPU {device} has a total {capacity} of {total} of which {free} is free. "
        others = [figure() for _ in range(rng.choice((0, 0, 1, 2)))]
        text += "".join(f"Process {rng.randint(100, 99999)} has {size} memory in use. " for size in others)
        if rng.random() < 0.7:
            own = figure()
            text += f"Including non-PyTorch memory, this process has {own} memory in use. "
            truth["process_bytes"] = size_of(own)
        pools = f"with {figure()} allocated in private pools (e.g., CUDA Graphs), " if rng.random() < 0.2 else ""
        text += (
            f"Of the allocated memory {allocated} is allocated by PyTorch, {pools}and {last} is reserved by PyTorch "
        )
        text += f"but unallocated. {_ADVICE[style]}"
        truth |= {"other_processes_bytes": sum(map(size_of, others)), "reserved_unallocated_bytes": size_of(last)}
    error = {"torch<1.4": "RuntimeError", "torch1.x": "RuntimeError", "torch2.1": "torch.cuda.OutOfMemoryError"}
    lines = ["Traceback (most recent call last):"]
    for file, function, code in FRAMES[phase]:
        lines += [f'  File "{file}", line {rng.randint(1, 2000)}, in {function}', f"    {code}"]
        if rng.random() < 0.3:
            lines.append("    " + "^" * len(code))
    lines.append(f"{error.get(style, 'torch.OutOfMemoryError')}: {text}")
    return Paste(tuple(lines), truth | {"kind": "cuda_caching_allocator", "wording": style, "phase": phase})


Lines = list[str]
Layout = Callable[[random.Random, Lines], Lines]


def cut_at(lines: Lines, width: int) -> Lines:
    """As a terminal wraps, amid words."""
    return [line[at : at + width] for line in lines for at in range(0, max(1, len(line)), width)]


def at_words(lines: Lines, width: int) -> Lines:
    return [part for line in lines for part in (textwrap.wrap(line, width, break_on_hyphens=False) or [""])]


def _each(form: str) -> Layout:
    return lambda rng, lines: [form.format(line) for line in lines]


def _cut(width: int) -> Layout:
    return lambda rng, lines: cut_at(lines, width)


def _worded(width: int) -> Layout:
    return lambda rng, lines: at_words(lines, width)


def _bars(rng: random.Random, lines: Lines) -> Lines:
    bar = "step 12/1000:   1%|██        | 12/1000 [00:09<12:31,  1.32it/s]"
    return [part for line in cut_at(lines, 80) for part in ((line, bar) if rng.random() < 0.2 else (line,))]


def _boxed(rng: random.Random, lines: Lines) -> Lines:
    inner = [f"│ {line.ljust(76)} │" for line in cut_at(lines, 76)]
    return ["╭" + "─" * 78 + "╮", *inner, "╰" + "─" * 78 + "╯"]


def _parts(lines: Lines) -> list[tuple[str, int, str, str]]:
    """File, line, function and code of each frame."""
    found = []
    for line, after in pairwise(lines):
        frame = re.match(r'  File "(.*)", line (\d+), in (.*)', line)
        if frame:
            found.append((frame[1], int(frame[2]), frame[3], after.strip()))
    return found


def _rich(rng: random.Random, lines: Lines) -> Lines:
    inner: Lines = []
    for file, number, function, code in _parts(lines):
        inner += [*at_words([f"{file}:{number} in {function}"], 76), "", f"  {number - 1:4d} │   x = self.drop(y)"]
        inner += [f"❱ {number:4d} │   {code}"[:76], ""]
    top = "╭" + " Traceback (most recent call last) ".center(78, "─") + "╮"
    body = [f"│ {line.ljust(76)} │" for line in inner]
    return [top, *body, "╰" + "─" * 78 + "╯", *cut_at([lines[-1].removeprefix("torch.")], 80)]


def _notebook(rng: random.Random, lines: Lines) -> Lines:
    found = ["-" * 75, "OutOfMemoryError                          Traceback (most recent call last)"]
    for file, number, function, code in _parts(lines):
        where = f"Cell In[3], line {number}" if function == "<module>" else f"File {file}:{number}, in {function}(self)"
        found += [
            where,
            f"    {number - 1} x = 3",
            f"--> {number}     {code}",
            f"    {number + 1} optimizer_zero = 3",
            "",
        ]
    return [*found, lines[-1].removeprefix("torch.")]


def _pytest(rng: random.Random, lines: Lines) -> Lines:
    frames = [part for f, n, function, code in _parts(lines) for part in (f"{f}:{n}: in {function}", f"    {code}")]
    return [*frames, "E   " + lines[-1]]


def _wide(rng: random.Random, lines: Lines) -> Lines:
    last = "".join(chr(ord(character) + 0xFEE0) if "!" <= character <= "~" else character for character in lines[-1])
    return ["训练到第一个step就爆显存了，求助：", *lines[:-1], last, "请问怎么解决？"]


def _other_error(lines: Lines) -> Lines:
    return ["Traceback (most recent call last):", '  File "x.py", line 8, in <module>', "    optimizer.step()", *lines]


LAYOUTS: dict[str, Layout] = {
    "as it is": lambda rng, lines: lines,
    **{f"cut at {width}": _cut(width) for width in (33, 60, 80, 100, 132)},
    **{f"at words, {width}": _worded(width) for width in (60, 80, 100)},
    "quoted": _each("> {}"),
    "quoted deeply": lambda rng, lines: ["> " * rng.randint(1, 4) + line for line in lines],
    "quoted and cut": lambda rng, lines: ["> > " + line for line in cut_at(lines, 72)],
    "rank": _each("[rank1]: {}"),
    "any rank": lambda rng, lines: [f"[rank{rng.randint(0, 3)}]: {line}" for line in lines],
    "any rank, cut": lambda rng, lines: [f"[rank{rng.randint(0, 3)}]: {line}" for line in cut_at(lines, 80)],
    "rank, cut after": lambda rng, lines: cut_at([f"[rank1]: {line}" for line in lines], 80),
    "rank, spaced out": lambda rng, lines: [
        x for line in cut_at([f"[rank0]: {y}" for y in lines], 118) for x in (line, "")
    ],
    "elastic": _each("[default0]:{}"),
    "srun": _each("0: {}"),
    "mpirun": _each("[1,3]<stderr>:{}"),
    "ray": _each("(RayTrainWorker pid=123, ip=10.0.0.1) {}"),
    "pdsh": _each("worker-0: {}"),
    "compose": _each("trainer-1  | {}"),
    "kubernetes": _each("2026-07-12T03:12:11.123456789Z stderr F {}"),
    "syslog": _each("Jul 12 03:12:11 gpu01 python[12345]: {}"),
    "journal": _each("2026-07-12T03:12:11.123456+00:00 gpu01 python[123]: {}"),
    "logging": lambda rng, lines: [f"2026-07-{rng.randint(10, 28)} 03:12:11,123 ERROR {line}" for line in lines],
    "logging, cut": lambda rng, lines: cut_at([f"2026-07-12 03:12:11,123 ERROR {line}" for line in lines], 80),
    "loguru": _each("2026-07-12 03:12:11.123 | ERROR    | __main__:main:123 - {}"),
    "hydra": _each("[2026-07-12 03:12:11,123][train][ERROR] - {}"),
    "glog": _each("[rank0]:E0712 03:12:11.123000 140123 site-packages/torch/distributed/x.py:123] [0/0] {}"),
    "colours": _each("\x1b[31m{}\x1b[0m"),
    "colours, escape lost": _each("[31m{}[0m"),
    "colours, caret": _each("^[[1;31m{}^[[0m"),
    "colours, cut": lambda rng, lines: [f"\x1b[38;5;196m{line}\x1b[0m\x1b[K" for line in cut_at(lines, 100)],
    "entities": lambda rng, lines: [html.escape(line) for line in lines],
    "entities twice": lambda rng, lines: [html.escape(html.escape(line)) for line in lines],
    "paragraph": lambda rng, lines: ["<p>" + "<br>".join(map(html.escape, lines)) + "</p>"],
    "preformatted": lambda rng, lines: [
        "<pre><code>",
        *(f'<span class="x">{html.escape(x)}</span>' for x in lines),
        "</pre>",
    ],
    "html table": lambda rng, lines: [f"<tr><td>{n}</td><td>{html.escape(x)}</td></tr>" for n, x in enumerate(lines)],
    "non-breaking": lambda rng, lines: [f"<div>{html.escape(x).replace(' ', '&nbsp;')}</div>" for x in lines],
    "table": lambda rng, lines: ["| log |", "|---|", *(f"| {line} |" for line in lines)],
    "numbered table": lambda rng, lines: [
        "| # | line |",
        "|---|---|",
        *(f"| {n} | {x} |" for n, x in enumerate(lines)),
    ],
    "one cell": lambda rng, lines: ["| error | batch |", "|---|---|", f"| {'<br>'.join(lines)} | 12 |"],
    "fence": lambda rng, lines: ["Here it is:", "```python", *lines, "```", "Thanks"],
    "comment": lambda rng, lines: [f"# {line}" for line in at_words(lines, 100)],
    "diff": _each("+{}"),
    "indented": _each("        {}"),
    "line numbers": lambda rng, lines: [f"{number + 101:5d}  {line}" for number, line in enumerate(lines)],
    "grep": lambda rng, lines: [f"{number + 101}:{line}" for number, line in enumerate(lines)],
    "box": _boxed,
    "rich": _rich,
    "notebook": _notebook,
    "pytest": _pytest,
    "docker": lambda rng, lines: [json.dumps({"log": f"{line}\n", "stream": "stderr"}) for line in lines],
    "json": lambda rng, lines: [json.dumps({"level": "error", "exc_info": "\n".join(lines)})],
    "json, torn": lambda rng, lines: ['"error": ' + json.dumps("\n".join(lines)) + ","],
    "repr": lambda rng, lines: ["b" + repr("\n".join(lines))],
    "one line": lambda rng, lines: [" ".join(lines)],
    "one line with ranks": lambda rng, lines: [" ".join(f"[rank3]: {line}" for line in lines)],
    "bars": _bars,
    "bar before": lambda rng, lines: ["  1%|█▏        | 13/1000 [00:09<12:31,  1.32it/s]" + lines[0], *lines[1:]],
    "carriage returns": lambda rng, lines: ["\r".join(lines)],
    "windows": lambda rng, lines: ["\r\n".join(lines)],
    "padded": lambda rng, lines: [line.ljust(120) for line in cut_at(lines, 120)],
    "full width": _wide,
    "typographic": lambda rng, lines: [re.sub(r'"([^"]*)"', "“\\1”", line) for line in lines],
    "zero width": lambda rng, lines: [line.replace(".", ".\u200b") for line in lines],
    "bold": lambda rng, lines: [re.sub(r"(\d+\.\d\d \wiB)", r"**\1**", line) for line in lines],
    "lower case": lambda rng, lines: [*lines[:-1], lines[-1].lower()],
    "upper case": lambda rng, lines: [*lines[:-1], lines[-1].upper()],
    "no spaces": lambda rng, lines: [re.sub(r"(\d) ([GMK]iB)", r"\1\2", line) for line in lines],
    "GB": lambda rng, lines: [re.sub(r"([GMK])iB", r"\1B", line) for line in lines],
    "decimal commas": lambda rng, lines: [*lines[:-1], re.sub(r"(\d)\.(\d\d)\b", r"\1,\2", lines[-1])],
    "twice": lambda rng, lines: [*lines, "", *lines],
    "logged first": lambda rng, lines: [f"ERROR: {lines[-1]}", *lines],
    "launcher": lambda rng, lines: _other_error(
        ["ValueError: x", "", *lines, "", *_other_error(["ChildFailedError: x"])]
    ),
    "during": lambda rng, lines: [
        *lines,
        "",
        "During handling of the above exception:",
        *_other_error(["KeyError: 1"]),
    ],
}
