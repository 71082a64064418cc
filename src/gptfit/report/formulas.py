"""`estimate --formulas`: the live set at the peak as sums to be checked by hand."""

from collections.abc import Iterator
from math import prod

from rich.console import RenderableType
from rich.text import Text

from gptfit.estimate import Needs, TensorRow
from gptfit.memory.tape import ALIGNMENT_BYTES, DTYPE_BYTES, rounded
from gptfit.report.terminal import QUIET, ByWidth, hanging, table, title
from gptfit.units import format_mib

# A sum of so many characters leaves room for its name in 80 columns, and then it is not cut in two.
LONGEST = 42

# How each category comes about.
WHY = {
    "parameter": "every weight of the model, in the dtype that the optimizer updates, as long as the run lasts",
    "optimizer state": "made in the first step and kept (AdamW: two fp32 numbers for each parameter, and a step)",
    "gradient": "one for each parameter; with accumulation all are alive during the last backward",
    "activation": "what forward keeps for backward, and the low-precision copies of the weights",
    "logits": "micro-batch × block × vocabulary: what the head gives, what the loss keeps of it, and their gradients",
    "temporary": "alive within one op alone",
    "workspace": "cuBLAS takes one for each thread that multiplies: the main one's and autograd's",
    "buffer": "the tokens of the micro-batch and what the model keeps beside its parameters",
    "slack": "scratch of kernels, and what the allocator does not split off a large block",
}


def formulas_view(needs: Needs) -> Iterator[RenderableType]:
    """Each category with what it is, its rows, and the sum; the sums add up to what is allocated."""
    yield title("Alive at the peak: count × [shape] × bytes of an element")
    yield hanging(f"A tensor takes a multiple of {ALIGNMENT_BYTES} bytes; where that is more than its own, it is said.")
    for category, n_bytes in needs.breakdown():
        yield Text(f"\n{category}: {WHY.get(category, '')}".rstrip(": "), style=QUIET)
        of_it = [row for row in needs.tensors if row.category == category]
        rows = [row_text(row) for row in of_it if format_mib(row.n_bytes) != "0.0"]
        small_bytes = [row.n_bytes for row in of_it if format_mib(row.n_bytes) == "0.0"]
        if small_bytes:
            rows.append((f"{len(small_bytes)} smaller", "", f"{sum(small_bytes):,} B", format_mib(sum(small_bytes))))
        rows.append(("sum", "", "", format_mib(n_bytes)))
        columns = ("", "dtype", "count × [shape] × bytes", "MiB")
        folded = table(columns, rows, right=("MiB",))
        fits = max(len(sum_) for _, _, sum_, _ in rows) <= LONGEST
        yield ByWidth(table(columns, rows, right=("MiB",), whole=columns[1:]), folded) if fits else folded
    yield Text(f"\n  allocated, the sum of all: {format_mib(needs.allocated_bytes)} MiB")


def row_text(row: TensorRow) -> tuple[str, str, str, str]:
    return row.name, row.dtype, formula(row), format_mib(row.n_bytes)


def formula(row: TensorRow) -> str:
    """`12 × [12 × 1024 × 3072] × 2 B`: the count, where it is not 1, the shape and the bytes of an element."""
    size = DTYPE_BYTES[row.dtype]
    count = f"{row.count} × " if row.count > 1 else ""
    each_bytes = size * prod(row.shape)
    block_bytes = rounded(each_bytes)
    takes = f", each {block_bytes:,} B" if block_bytes != each_bytes else ""
    return f"{count}[{' × '.join(map(str, row.shape or (1,)))}] × {size} B{takes}"
