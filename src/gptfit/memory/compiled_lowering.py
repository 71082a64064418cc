"""From operations to the nodes that inductor schedules: what is written down, and how each node reads it.

A miniature of torch 2.13's lowering. What is computed element by element is kept as a formula and inlined where it is
read (torch/_inductor/ir.py, Pointwise), until something needs it as a tensor, or it has grown too large
(torch/_inductor/graph.py, run_node; ir.py, StorageBox.should_realize_on_reuse).
"""

import math
from collections.abc import Iterable, Sequence, Set

from gptfit.memory.compiled_graph import (
    ATTENTION_BACKWARD,
    BMM,
    CAT,
    INPUT,
    ITEM,
    MM,
    MOMENTS,
    POINT,
    SCATTER,
    VIEW,
    Change,
    Op,
    contiguous,
)
from gptfit.memory.compiled_loops import Node, set_loops
from gptfit.memory.compiled_views import (
    Atom,
    Box,
    Buffer,
    Read,
    View,
    at_place,
    in_order,
    is_even,
    places,
    refined,
    seen,
    strides_of,
    whole,
)  # fmt: skip

# torch/_inductor/config.py: realize_reads_threshold, realize_acc_reads_threshold of a GPU, unroll_reductions_threshold.
MOST_READS, MOST_READS_AT_ALL, UNROLLED = 4, 8, 8


class Lowering:
    """Lowers `ops`; `sizes` and names of buffers are found in `buffers`, parts of others in `whole_of`."""

    def __init__(self, ops: Sequence[Op], kept: Set[str]) -> None:
        self.kept = kept
        self.buffers: dict[str, Buffer] = {}
        self.whole_of: dict[str, str] = {}
        self.nodes: list[Node] = []
        self.named: dict[str, str] = {}  # buffers that are outputs, by what they are
        self.items: dict[tuple[int, object], Buffer] = {}
        self.count = 0
        self.values: dict[int, View] = {}
        users: dict[int, dict[int, Op]] = {}
        for op in ops:
            if op.kind != INPUT and op.label not in kept:
                for arg in op.args:
                    users.setdefault(arg.index, {})[op.index] = op
        self.users = users
        for op in ops:
            self.values[op.index] = self.lowered(op)
        self.finish()

    # ---- buffers -----------------------------------------------------------------------------------------------------

    def fresh(self, shape: Sequence[int], dtype: str, strides: tuple[int, ...] | None = None, name: str = "") -> Buffer:
        if not name:
            name = f"buf{self.count}"
            self.count += 1
        made = self.buffers[name] = Buffer(name, shape, dtype, strides)
        return made

    def on(self, buffer: Buffer) -> Box:
        dims = [(size,) for size in buffer.shape]
        moves = tuple((i, 1) if size > 1 else (-1, 0) for i, size in enumerate(buffer.shape))
        box = Box(dims, [Read(buffer.name, (0,) * len(buffer.shape), moves)], frozenset(), buffer.dtype)
        box.buffer = buffer
        return box

    def add(self, node: Node) -> None:
        self.nodes.append(node)

    def loop(
        self,
        op: Op,
        dims: tuple[tuple[int, ...], ...],
        inner: tuple[tuple[int, ...], ...],
        reads: Sequence[Read],
        buffer: Buffer,
    ) -> None:
        needs = tuple(dict.fromkeys(read.name for read in reads))
        self.add(Node(len(self.nodes), (buffer,), op, dims=dims, inner=inner, touched=tuple(reads), needs=needs))

    def write(self, box: Box, op: Op) -> None:
        """Writes a formula down."""
        if box.buffer is not None:
            return
        buffer = self.fresh(box.shape, box.dtype)
        self.loop(op, box.dims, (), box.reads, buffer)
        self.settle(box, buffer)

    def settle(self, box: Box, buffer: Buffer) -> None:
        moves: list[tuple[int, int]] = []
        for i, dim in enumerate(box.dims):
            below = math.prod(dim)
            for size in dim:
                below //= size
                moves.append((i, below) if size > 1 else (-1, 0))
        box.reads = (Read(buffer.name, (0,) * len(buffer.shape), tuple(moves)),)
        box.ops = frozenset()
        box.buffer = buffer

    def copied(self, view: View, op: Op) -> View:
        """A view written down as it is seen."""
        dims = tuple(tuple(atom.size for atom in dim) for dim in view.dims)
        box = Box(dims, view.reads(), view.box.ops, view.box.dtype)
        self.write(box, op)
        return whole(box)

    def argument(self, view: View, op: Op) -> tuple[View, str]:
        """What a call of a library is handed: a buffer, or a view of one that is steps through memory."""
        self.write(view.box, op)
        buffer = view.box.buffer
        assert buffer is not None
        buffer.fix()
        if not all(is_even(dim, view, buffer) for dim in view.dims):
            view = self.copied(view, op)
            buffer = view.box.buffer
            assert buffer is not None
            buffer.fix()
        return view, buffer.name

    def with_strides(self, view: View, op: Op, strides: tuple[int, ...]) -> str:
        """The same, laid out in that order."""
        view, name = self.argument(view, op)
        buffer = self.buffers[name]
        own = strides_of(view, buffer)
        sized = [(s, o) for s, o, size in zip(strides, own, view.shape, strict=True) if size > 1]
        if [s for s, _ in sorted(sized, key=lambda pair: pair[0])] != sorted(s for s, _ in sized) or not in_order(
            sized
        ):
            made = self.copied(view, op)
            assert made.box.buffer is not None
            made.box.buffer.strides = strides
            name = made.box.buffer.name
        return name

    # ---- operations --------------------------------------------------------------------------------------------------

    def lowered(self, op: Op) -> View:
        if op.kind == INPUT or op.label in self.kept:
            of_attention = op.kind == ITEM and len(op.shape) == 4
            strides = laid_out(op) if of_attention else op.strides or None
            buffer = self.buffers.get(op.label) or self.fresh(op.shape, op.dtype, strides, op.label)
            buffer.fix()
            return whole(self.on(buffer))
        if op.kind == VIEW and isinstance(op.data, Change) and op.data.how == "slice":
            made = op.args[0].args[0] if op.args[0].kind == VIEW else op  # the projection, which is kept in rows
            if made.label in self.kept:
                return self.part_kept(op, made)
        view = getattr(self, f"lower_{op.kind.replace(' ', '_')}")(op)
        return self.after(op, view)

    def part_kept(self, op: Op, made: Op) -> View:
        """Columns of what is kept: an input by itself, that lies in the whole."""
        assert isinstance(op.data, Change)
        *outer, step = contiguous((*op.shape[:-1], made.shape[-1]))
        buffer = self.fresh(op.shape, op.dtype, (*outer, step), f"{made.label} from {op.data.numbers[0]}")
        self.whole_of[buffer.name] = made.label
        self.fresh(made.shape, made.dtype, contiguous(made.shape), made.label)
        return whole(self.on(buffer))

    def after(self, op: Op, view: View) -> View:
        """What becomes of a result by its users."""
        users = self.users.get(op.index, {})
        n_users = len(users) + bool(op.output)
        box = view.box
        if op.output:
            if not view.is_whole and box.buffer is None:
                view = self.copied(view, op)
            else:
                self.write(box, op)
            assert view.box.buffer is not None
            view.box.buffer.fix()
            name = view.box.buffer.name
            self.named[op.output] = self.whole_of[name] if op.kind == SCATTER else name
            return view
        if n_users > 1:
            kinds = {user.kind for user in users.values()}
            if box.buffer is None and kinds & {MM, BMM, ATTENTION_BACKWARD} and len(box.reads) > 1:
                self.write(box, op)
            if MM in kinds:
                if box.buffer is None and not view.is_whole:
                    view = self.copied(view, op)
                    if isinstance(op.data, Change) and op.data.how == "permute":
                        assert view.box.buffer is not None
                        view.box.buffer.strides = contiguous(op.shape[::-1])[::-1]
                view, _ = self.argument(view, op)
                box = view.box
            if box.buffer is None and (box.is_large or len(box.reads) > MOST_READS):
                self.write(box, op)
        if box.buffer is None and len(box.reads) > 1 and (len(box.reads) > MOST_READS_AT_ALL or box.is_large):
            self.write(box, op)
        return view

    def formula(self, op: Op, views: Sequence[View], dtype: str, n: int = 1, numbers: Iterable[object] = ()) -> Box:
        """`n` operations with some numbers; what is of another type is converted first."""
        views = refined(views)
        dims = tuple(tuple(atom.size for atom in dim) for dim in views[0].dims)
        own = [(op.index, i) for i in range(n)] + [(number, dtype) for number in numbers]
        if dtype != "bool":
            own += [(id(view.box), dtype) for view in views if view.box.dtype != dtype]
        ops = frozenset(own).union(*(view.box.ops for view in views))
        return Box(dims, [read for view in views for read in view.reads()], ops, dtype)

    def lower_point(self, op: Op) -> View:
        assert isinstance(op.data, tuple)
        n, numbers = op.data
        return whole(self.formula(op, [self.values[arg.index] for arg in op.args], op.dtype, n, numbers))

    def lower_view(self, op: Op) -> View:
        assert isinstance(op.data, Change)
        return seen(self.values[op.args[0].index], op.data)

    def lower_sum(self, op: Op) -> View:
        assert isinstance(op.data, tuple)
        summed, keep = op.data
        return self.reduced(op, self.values[op.args[0].index], summed, keep, op.dtype)

    def reduced(self, op: Op, view: View, summed: Sequence[int], keep: bool, dtype: str) -> View:
        n = math.prod(view.shape[i] for i in summed)
        outer = tuple(
            ((Atom(1),) if i in summed else dim) for i, dim in enumerate(view.dims) if keep or i not in summed
        )
        kept_dims = [dim for i, dim in enumerate(view.dims) if i not in summed]
        inner = [view.dims[i] for i in summed]
        if n < UNROLLED and math.prod(op.shape) != 1:
            reads = [read for place in places(inner) for read in at_place(view, outer, inner, place).reads()]
            box = Box(
                tuple(tuple(a.size for a in dim) for dim in outer),
                reads,
                view.box.ops | {(op.index, i) for i in range(n)},
                dtype,
            )
            return whole(box)
        arranged = View(view.box, (*kept_dims, *inner), view.starts)
        buffer = self.fresh([math.prod(a.size for a in dim) for dim in outer], dtype)
        self.loop(
            op,
            tuple(tuple(a.size for a in dim) for dim in kept_dims),
            tuple(tuple(a.size for a in dim) for dim in inner),
            arranged.reads(),
            buffer,
        )
        self.nodes[-1].into = None
        return whole(self.on(buffer))

    def lower_mean(self, op: Op) -> View:
        assert isinstance(op.data, tuple)
        summed, keep = op.data
        total = self.reduced(op, self.values[op.args[0].index], summed, keep, "float32")
        return whole(self.formula(op, [total], op.dtype, 1, [("index", op.args[0].shape[summed[0]])]))

    def lower_moments(self, op: Op) -> View:
        """Two steps: the mean, written down, then the squares of what differs from it."""
        view = self.values[op.args[0].index]
        last = len(view.dims) - 1
        width = [("index", op.args[0].shape[last])]
        mean = self.formula(op, [self.reduced(op, view, (last,), True, "float32")], "float32", 1, width)
        self.write(mean, op)
        self.pair = whole(mean)
        squares = whole(self.formula(op, [view, whole(mean)], "float32", 2))
        total = self.reduced(op, squares, (last,), True, "float32")
        return whole(self.formula(op, [total], "float32", 1, width))

    def lower_item(self, op: Op) -> View:
        source = op.args[0]
        assert isinstance(op.data, int)
        if source.kind == MOMENTS:
            return self.pair if op.data else self.values[source.index]
        return whole(self.on(self.items[source.index, op.data]))

    def lower_random(self, op: Op) -> View:
        buffer = self.fresh(op.shape, op.dtype)
        seeds = self.values[op.args[0].index].box.reads[0]
        read = Read(seeds.name, (0,), ((-1, 0),) * len(op.shape))
        self.loop(op, tuple((size,) for size in op.shape), (), [read], buffer)
        return whole(self.on(buffer))

    def call(self, op: Op, views: Sequence[View]) -> View:
        names = [self.argument(view, op)[1] for view in views]
        return self.called(op, names)

    def called(self, op: Op, names: Sequence[str]) -> View:
        buffer = self.fresh(op.shape, op.dtype, contiguous(op.shape))
        self.add(Node(len(self.nodes), (buffer,), op, calls=True, needs=tuple(dict.fromkeys(names))))
        return whole(self.on(buffer))

    def lower_mm(self, op: Op) -> View:
        return self.call(op, [self.values[arg.index] for arg in op.args])

    lower_addmm = lower_bmm = lower_mm

    def lower_attention(self, op: Op) -> View:
        return self.several(op, [self.argument(self.values[arg.index], op)[1] for arg in op.args])

    def lower_attention_backward(self, op: Op) -> View:
        """Its arguments are laid out as they are outside of inductor (constrain_to_fx_strides)."""
        names = []
        for arg in op.args:
            view = self.values[arg.index]
            if len(arg.shape) == 4:
                names.append(self.with_strides(view, op, laid_out(arg)))
            else:
                names.append(self.argument(view, op)[1])
        return self.several(op, names)

    def several(self, op: Op, names: Sequence[str]) -> View:
        """A call that makes several tensors: its handle has no size."""
        handle = self.fresh((0,), "uint8", (1,))
        self.add(Node(len(self.nodes), (handle,), op, calls=True, needs=tuple(dict.fromkeys(names))))
        assert isinstance(op.data, list)
        for item in op.data:
            buffer = self.fresh(item.shape, item.dtype, item.strides or contiguous(item.shape))
            self.items[op.index, item.data] = buffer
            if not self.users.get(item.index):
                continue  # nobody reads it: left out, though counted
            self.add(Node(len(self.nodes), (buffer,), item, calls=True, needs=(handle.name,)))
        return whole(self.on(handle))

    def lower_cat(self, op: Op) -> View:
        """Each part is written into its place."""
        parts: list[tuple[Buffer, int]] = []
        start = 0
        for arg in op.args:
            view = self.values[arg.index]
            if view.box.buffer is None and view.is_whole:
                self.write(view.box, op)
            else:
                view = self.copied(view, op)
            assert view.box.buffer is not None
            parts.append((view.box.buffer, start))
            start += arg.shape[-1]
        buffer = self.fresh(op.shape, op.dtype, contiguous(op.shape))
        for part, start in parts:
            self.whole_of[part.name] = buffer.name
            part.strides = buffer.strides
            starts = (*(0 for _ in op.shape[1:]), start)
            node = next(node for node in reversed(self.nodes) if part in node.makes)
            node.into = Read(part.name, starts, ())
        needs = tuple(part.name for part, _ in parts)
        self.add(Node(len(self.nodes), (buffer,), op, calls=True, no_kernel=True, needs=needs))
        return whole(self.on(buffer))

    def lower_full(self, op: Op) -> View:
        buffer = self.fresh(op.shape, op.dtype, contiguous(op.shape))
        self.loop(op, tuple((size,) for size in op.shape), (), [], buffer)
        return whole(self.on(buffer))

    def lower_scatter(self, op: Op) -> View:
        """Adds rows to those of a table that their numbers name."""
        table, numbers, rows = (self.values[arg.index] for arg in op.args)
        target = table.box.reads[0].name
        buffer = self.fresh(op.shape, op.dtype, contiguous(op.shape))
        self.whole_of[buffer.name] = target
        both = refined([rows, View(numbers.box, (*numbers.dims, (Atom(1),)), numbers.starts)])
        reads = [read for view in both for read in view.reads()]
        dims = tuple(tuple(atom.size for atom in dim) for dim in both[0].dims)
        self.loop(op, dims, (), reads, buffer)
        node = self.nodes[-1]
        node.needs = (*node.needs, target)
        node.into = Read(
            target, (0, 0), tuple((-1, 0) for dim in dims[:-1] for _ in dim) + tuple((1, 1) for _ in dims[-1])
        )
        return whole(self.on(buffer))

    # ---- loops -------------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Fixes what strides are free, in order, and with them the loops."""
        for node in self.nodes:
            if not node.calls:
                set_loops(node, self.buffers)
            else:
                for buffer in node.makes:
                    buffer.fix()


def laid_out(op: Op) -> tuple[int, ...]:
    """The strides of queries, keys, values, an output or its gradient outside of inductor."""
    _, h, t, d = op.shape
    of_low = op.kind == ITEM and op.args[0].dtype != "float32"  # which lies as queries do
    first = op.args[0].args[0] if of_low else op
    by_head = first.kind == CAT or (first.kind == VIEW and first.args[0].kind == POINT)  # turned, or repeated
    return (h * t * d, t * d, d, 1) if by_head else (h * t * d, d, h * d, 1)
