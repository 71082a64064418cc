"""One model on several GPUs: how a micro-batch is computed and its gradients are shared.

All strategies give the mean gradient over the ranks' micro-batches, so that with equal shares the step is that
of one GPU with all the sequences.

Running out of memory on one rank. The others wait in a collective that this rank will not reach. So each
strategy knows the collectives of a step in advance, from a rehearsal on a few tokens, and counts those done: the rank
that failed plays out the rest with what is in its buffers. Then all ranks stand at the same point, and can
agree to do the step again.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from gptfit.config import RunConfig
from gptfit.distributed import Ranks
from gptfit.errors import GptfitError
from gptfit.model import GPT, compile_model, set_memory_budget
from gptfit.optim import Stepper

REHEARSED_TOKENS = 8

# Adafactor normalises rows and columns in place, which torch does not do on sharded tensors.
UNSHARDABLE = ("adafactor",)


class Strategy(Protocol):
    """How the ranks share the work on `model`."""

    model: GPT

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor: ...

    def micro_batch(self, left: int) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch after which `left` follow in the step; without gradients,
        around the forward of an evaluation."""
        ...

    def zero_grad(self, optimizer: Stepper) -> None: ...

    def play_out(self) -> None:
        """What this rank still owes the others of the step in which it failed."""
        ...

    def start_over(self) -> None:
        """After a step or an evaluation that some rank could not finish, on all ranks."""
        ...

    def compile(self) -> None: ...

    def clip(self, max_norm: float) -> Tensor:
        """Clips the gradients of all parameters together; their norm before."""
        ...

    def load(self, states: Mapping[str, Any]) -> None:
        """The whole weights of `states` into the model."""
        ...

    def gathered(self, states: Mapping[str, Any]) -> dict[str, Any]:
        """`states` of the model or the optimizer with every tensor whole: on rank 0, and on the CPU if it was not."""
        ...

    def scattered(self, states: Mapping[str, Any], optimizer: Stepper) -> dict[str, Any]:
        """The optimizer's whole `states` as this rank holds them."""
        ...


class Alone:
    """One process: nothing to share."""

    def __init__(self, model: GPT) -> None:
        self.model = model

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.model(inputs_BT, targets_BT)

    def micro_batch(self, left: int) -> AbstractContextManager[None]:
        return nullcontext()

    def zero_grad(self, optimizer: Stepper) -> None:
        optimizer.zero_grad()

    def play_out(self) -> None:
        pass

    def start_over(self) -> None:
        pass

    def compile(self) -> None:
        compile_model(self.model)

    def clip(self, max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def load(self, states: Mapping[str, Any]) -> None:
        self.model.load_state_dict(dict(states))

    def gathered(self, states: Mapping[str, Any]) -> dict[str, Any]:
        return dict(states)

    def scattered(self, states: Mapping[str, Any], optimizer: Stepper) -> dict[str, Any]:
        return dict(states)


class Replicated(Alone):
    """DistributedDataParallel: a whole model on each rank, gradients averaged while the last backward runs.

    Gradients are views into its buckets and stay there: set to None, the first micro-step would make a second set
    beside the buckets, which are alive in any case.
    """

    def __init__(self, model: GPT, size: int) -> None:
        super().__init__(model)
        self.size = size
        self.wrapped: nn.Module = model
        self._wrap()

    def loss(self, inputs_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return (self.wrapped if torch.is_grad_enabled() else self.model)(inputs_BT, targets_BT)

    @contextmanager
    def micro_batch(self, left: int) -> Iterator[None]:
        # An evaluation owes nothing.
        self.reduced = 0 if torch.is_grad_enabled() else len(self.buckets)
        assert isinstance(self.wrapped, DistributedDataParallel)
        with self.wrapped.no_sync() if left else nullcontext():
            yield

    def zero_grad(self, optimizer: Stepper) -> None:
        optimizer.zero_grad(set_to_none=False)

    def play_out(self) -> None:
        for bucket in self.buckets[self.reduced :]:
            dist.all_reduce(bucket)

    def start_over(self) -> None:
        """A new wrapper: the reducer of a backward that was cut short takes no other."""
        self._wrap()

    def _wrap(self) -> None:
        self.wrapped = nn.Module()  # the buckets of a former wrapper go before new ones are made
        self.model.zero_grad(set_to_none=True)
        self.buckets: list[Tensor] = []
        self.wrapped = DistributedDataParallel(self.model, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self.wrapped.register_comm_hook(None, self._reduce)
        # After the first backward DDP makes its buckets anew, in the order in which gradients came.
        for _ in range(2):
            self.buckets.clear()
            rehearse(self)

    def _reduce(self, _state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # pyright: ignore[reportPrivateImportUsage]
        """What DDP does by itself, counted. Buckets come in the same order on all ranks and in all steps."""
        buffer = bucket.buffer()
        if bucket.index() == len(self.buckets):
            self.buckets.append(buffer)
        self.reduced += 1
        work = dist.all_reduce(buffer.div_(self.size), async_op=True)
        assert work is not None
        return work.get_future().then(lambda future: future.value()[0])


class Sharded(Alone):
    """FSDP2: each rank keeps 1/n of every parameter, gradient and state; a block is whole while it computes.

    Parameters are gathered in their own dtype, as the model casts for itself what it computes with. Gradients are
    scattered after each micro-batch: whole ones would be as large as on one GPU.

    With several `copies` (HSDP) the n are the GPUs of one node, and each node has all parts: what is gathered stays
    within a node, and once a step the parts of the gradients are averaged over the nodes.
    """

    def __init__(self, model: GPT, n: int, copies: int = 1) -> None:
        super().__init__(model)
        shape, names = ((n,), ("shard",)) if copies == 1 else ((copies, n), ("replicate", "shard"))
        self.mesh = init_device_mesh(model.lm_head.weight.device.type, shape, mesh_dim_names=names)
        self.across = self.mesh.get_group("replicate") if copies > 1 else None
        for block in cast(nn.ModuleList, model.transformer["h"]):
            fully_shard(block, mesh=self.mesh)
        self.root = fully_shard(model, mesh=self.mesh)
        self.script: list[Collective] = []  # of one micro-batch
        self.position = self.left = 0
        self.evaluation: list[Collective] = []
        self.done: list[Collective] = []
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_all_gather(CountedGather(self.done))
                module.set_custom_reduce_scatter(CountedScatter(self.done))
        rehearse(self)
        self.script = list(self.done)
        with torch.no_grad():
            rehearse(self)
        self.evaluation = list(self.done)

    @contextmanager
    def micro_batch(self, left: int) -> Iterator[None]:
        self.done.clear()
        self.left = left
        if self.across is not None:
            self.root.set_requires_all_reduce(left == 0)
        yield
        if not torch.is_grad_enabled():
            self.root.reshard()  # FSDP leaves the embeddings whole for a backward that does not come

    def play_out(self) -> None:
        script = self.script if torch.is_grad_enabled() else self.evaluation
        shards = self.mesh.get_group("shard")
        for left in range(self.left, -1, -1):
            for collective in script[len(self.done) :] if left == self.left else script:
                collective.play(shards, self.across if left == 0 else None)

    def start_over(self) -> None:
        """Drops what a forward or a backward that was cut short left: whole parameters, gradients not yet scattered."""
        for part in self.root._get_fsdp_state()._state_ctx.all_states:
            for parameter in (p for group in part._fsdp_param_groups for p in group.fsdp_params):
                if hasattr(parameter, "_unsharded_param"):  # the reset leaves its gradient, to be added to
                    parameter._unsharded_param.grad = None
        self.root.reset_iter_state()

    def compile(self) -> None:
        """Block by block: gathering happens between them."""
        set_memory_budget(self.model.run)
        for block in cast(nn.ModuleList, self.model.transformer["h"]):
            block.compile()

    def load(self, states: Mapping[str, Any]) -> None:
        own = self.model.state_dict()
        super().load({name: self._own(value, own[name]) for name, value in states.items()})

    def gathered(self, states: Mapping[str, Any]) -> dict[str, Any]:
        keep = dist.get_rank() == 0

        def whole(tensor: DTensor) -> Tensor | None:
            full = tensor.full_tensor()
            return full.cpu() if keep else None

        return tree_map_only(DTensor, whole, dict(states))

    def scattered(self, states: Mapping[str, Any], optimizer: Stepper) -> dict[str, Any]:
        if "parts" in states:
            parts = zip(states["parts"], optimizer.parts, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
            return {"parts": [self.scattered(part, own) for part, own in parts]}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        scattered = {
            index: {name: self._own(value, parameters[index]) for name, value in state.items()}
            for index, state in states["state"].items()
        }
        return {**states, "state": scattered}

    def _own(self, value: Any, parameter: Tensor) -> Any:
        """A state as large as its parameter is sharded as that is; smaller ones every rank has whole."""
        if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
            value = value.to(parameter.device)
            return distribute_tensor(value, self.mesh, parameter.placements, src_data_rank=None)
        return value


@dataclass(frozen=True, slots=True)
class Collective:
    """One gather or scatter, enough of it to take part in it without data."""

    gathers: bool
    n_in: int
    n_out: int
    dtype: torch.dtype
    device: torch.device

    def play(self, group: dist.ProcessGroup, across: dist.ProcessGroup | None) -> None:
        """In `group`; what is scattered is then averaged in `across`, too: FSDP allocates nothing between the two."""
        data = torch.zeros(self.n_in, dtype=self.dtype, device=self.device)
        out = torch.empty(self.n_out, dtype=self.dtype, device=self.device)
        if self.gathers:
            dist.all_gather_into_tensor(out, data, group)
        else:
            dist.reduce_scatter_tensor(out, data, group=group)
            if across is not None:
                dist.all_reduce(out, group=across)


class CountedGather(DefaultAllGather):
    def __init__(self, done: list[Collective]) -> None:
        self.done = done

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *rest: Any, **options: Any) -> Any:
        work = super().__call__(output_tensor, input_tensor, *rest, **options)
        self.done.append(
            Collective(True, input_tensor.numel(), output_tensor.numel(), output_tensor.dtype, output_tensor.device)
        )
        return work


class CountedScatter(DefaultReduceScatter):
    def __init__(self, done: list[Collective]) -> None:
        self.done = done

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *rest: Any, **options: Any) -> Any:
        work = super().__call__(output_tensor, input_tensor, *rest, **options)
        self.done.append(
            Collective(False, input_tensor.numel(), output_tensor.numel(), output_tensor.dtype, output_tensor.device)
        )
        return work


def rehearse(strategy: Strategy) -> None:
    """Forward and backward of a few tokens, for what they set up, not compiled. Leaves gradients of zero."""
    model = strategy.model
    device = model.lm_head.weight.device
    n_tokens = min(REHEARSED_TOKENS, model.run.block_size)
    ids_BT = torch.zeros(1, n_tokens, dtype=torch.int64, device=device)
    with strategy.micro_batch(left=0), torch.compiler.set_stance("force_eager"):
        loss = strategy.loss(ids_BT, ids_BT)
        if loss.requires_grad:
            loss.backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def share_model(model: GPT, run: RunConfig, ranks: Ranks) -> Strategy:
    """`model` under the strategy of `run`.

    Raises GptfitError where its optimizer cannot work on parts of parameters.
    """
    if ranks.size == 1:
        return Alone(model)
    if run.shards > 1 and run.optimizer in UNSHARDABLE:
        raise GptfitError(
            f"optimizer={run.optimizer} with strategy={run.strategy}: it needs whole parameters, and these are shards",
            "strategy=ddp, or another optimizer: adamw, lion, muon, sgd",
        )
    return Sharded(model, run.shards, run.n_gpus // run.shards) if run.shards > 1 else Replicated(model, ranks.size)
