"""Which kernels of several blocks inductor makes one, in a lean backward: those that read the same table.

Two are fused unless more than MAX_DISTANCE nodes lie between the first part of one and the last of the other
(torch/_inductor/scheduler.py, are_long_distant_nodes).
"""

from collections.abc import Iterable

from gptfit.memory.compiled_plan import Kernel

MAX_DISTANCE = 64


def fuse_with_next(kernels: Iterable[Kernel], kind: str, other: str) -> None:
    """Fuses kernels of groups that end in `kind` with the next one of `other`, if that is fused with none yet."""
    kernels = list(kernels)
    taken = [kernel.group for kernel in kernels]
    position, last, start = 0, None, 0
    for kernel in kernels:
        if kernel.group.endswith(kind):
            last, start = kernel, position
        elif kernel.group.endswith(other) and last is not None and taken.count(kernel.group) == 1:
            near = position + kernel.parts - 1 - start <= MAX_DISTANCE
            last.group = kernel.group if near else last.group
            last = None
        position += kernel.parts
