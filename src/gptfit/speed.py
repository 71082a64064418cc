"""Seconds of an optimizer step, predicted from what the step computes and moves; the error is stated.

    micro-step = max(compute + traffic, launches) (+ what FSDP moves, where that is longer)
    step       = micro-steps + optimizer + gradients between cards

compute   FLOPs / (dense peak x matmul_efficiency), and beside it FLOPs x sm_seconds_per_flop / SMs: what an SM does for
          each FLOP besides it (operands, softmax, epilogues) does not shrink as its tensor cores grow. A causal flash
          kernel does 7/12 of the attention FLOPs that flops_per_token counts, at about 7/12 of a matmul's rate: they
          are taken as counted. Half a wave of tiles is idle at the end of each matmul, which small models feel.
traffic   bytes that norms, residuals, activations, matmul operands, logits and weights move, counted below, /
          (bandwidth x bandwidth_share).
launches  kernels x LAUNCH_SECONDS: eager small models wait for Python, not for the card.

Which peak: bf16 and fp16 the tensor cores' with fp32 accumulation. float32 the faster of TF32 and FP32: both programs
allow TF32; the RTX 3060 rows had it off, on a card where both rates are the same. bf16 on a card without bf16 units
(before Ampere) runs emulated: half the FP32 rate, by no measurement of ours. The traffic of activations is the same
whether the compute dtype is bf16 or fp16.

Left out: data loading, evaluation, checkpoints; and what a data sheet does not say of a card: a limit of its power (an
L4 of 72 W is 20 % slower than the above says), clocks above the rated boost and large L2 caches (an RTX 4070 is 35 %
faster). Where runs of a card are published, they say it: seconds are divided by the card's factor (card_factors.py).
"""

import math
from dataclasses import dataclass, field

from gptfit.card_factors import card_factor
from gptfit.config import RunConfig
from gptfit.errors import GptfitError
from gptfit.gpus import GpuProfile
from gptfit.memory.tape import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens of all cards together per second; `low` to `high` is its interval. `mfu` as nanoGPT has it: model FLOPs
    (recomputation not counted) over the dense peak of the dtype."""

    tokens_per_second: float
    seconds_per_step: float
    mfu: float
    low: float
    high: float
    source: str


@dataclass(frozen=True, slots=True)
class Constants:
    """What is fitted; benchmarks/calibrate_speed.py prints these and what they predict."""

    matmul_efficiency: float  # of the dense peak at rated boost; 1 is the limit of the search: cards boost above it
    fp32_efficiency: float  # the same of FP32 and TF32 peaks
    sm_seconds_per_flop: float
    bandwidth_share: float


# Fitted on the calibration rows of measured/throughput.jsonl.
CONSTANTS = Constants(
    matmul_efficiency=1.0,
    fp32_efficiency=0.631,
    sm_seconds_per_flop=7.03e-14,
    bandwidth_share=0.935,
)

# Nine of ten of the rows like these (compiled, bf16, one card, Ampere or newer) are within this factor, with their card
# left out of the fit. tests/test_speed.py makes both claims of the sources again.
LIKE_ROWS_FACTOR = 1.4
GENERAL_SOURCE = "from FLOPs, bytes and the profile"
LIKE_ROWS_SOURCE = f"{GENERAL_SOURCE}, fitted to 37 published runs on 15 cards: median error 9 % on a card left out"
# The same on a card with runs of its own, each predicted by its others: nine in ten are within 8 %, but the runs of a
# card come from one machine mostly. Of those that nothing was fitted to, the worst was 11 % off.
MEASURED_CARD_FACTOR = 1.2
# Eager, fp32, fp16, before Ampere or several cards: few rows or none.
OTHER_FACTOR = 1.6
OTHER_CLAUSE = "; runs like this one were hardly measured"
TILE = 128 * 128  # output elements that one SM makes at a time, in cuBLAS's usual matmul kernels
# Tensors as wide as n_embd, as q, k and v, as the MLP: how often one block reads or writes each, forward and backward.
RESIDUAL_PASSES, WIDTH_PASSES, QKV_PASSES = 12, 24, 6
HIDDEN_PASSES = {"gelu": 12, "relu2": 12, "swiglu": 19}
DROPOUT_PASSES = 4
# Forward's share of FLOPs and passes: backward does twice as much.
FORWARD = 1 / 3
# Bytes an eager block moves over those of a compiled one: norms in fp32 with casts in and out, residual gradients added
# in kernels of their own, some 76 bytes more for each of n_embd to the 228 above.
EAGER_TRAFFIC = 1.35
# Read and written once more where norms' outputs, activations and weight copies are made again: counted off layers.py,
# not measured on a GPU; on a CPU a step takes 1 to 2 % longer.
REMADE_WIDTH_BYTES, REMADE_HIDDEN_BYTES = 28, 4
# Of a compiled block under activation_memory_budget, made again in backward: the MLP's activation, written once more,
# both norms' outputs, and the sums of the stream (four reads or writes). Counted, not measured.
LEAN_WIDTH_PASSES = 6
# Python and the driver, for each kernel, where nothing else is waited for. No row here is that small.
LAUNCH_SECONDS = 5e-6
# Kernels of one block, forward and backward, of one chunk of the loss, and of the rest of a micro-step and a step;
# compiled or eager. Those of a chunk are counted off loss.py.
BLOCK_KERNELS = {True: 26, False: 72}
CHUNK_KERNELS = {True: 10, False: 23}
OTHER_KERNELS = 60
LOOP_STEP_KERNELS = 8 * 12  # for-loop optimizers: parameters of a block x kernels for each

# Bytes read and written in one step for each parameter: parameter, gradient and state (fused), fp32.
OPTIMIZER_BYTES = {"adamw": 28, "adamw16bit": 20, "adamw8bit": 17, "adafactor": 28, "lion": 20, "muon": 22, "sgd": 20}
CLIP_BYTES = 12
FOREACH_FACTOR = 2.5  # foreach and for-loop run each operation of the update as its own kernel
MUON_FLOPS = 5 * 5  # five Newton-Schulz rounds, each about 5·n_embd FLOPs for an element

# Assumed bytes per second between cards, all-reduce included: NVLink on data-centre chips, PCIe 4.0 x16 on others.
NVLINK_BYTES_PER_SECOND = 200e9
PCIE_BYTES_PER_SECOND = 12e9
NVLINK_CAPABILITIES = ("7.0", "8.0", "9.0", "10.0")


@dataclass(frozen=True, slots=True)
class StepTime:
    """The parts of one optimizer step in seconds: the first four of a micro-step, the last two once a step."""

    compute: float
    traffic: float
    launch: float
    sharding: float
    micro_steps: int
    optimizer: float
    all_reduce: float
    seconds: float = field(init=False)

    def __post_init__(self) -> None:
        micro = max(self.compute + self.traffic, self.launch, self.sharding)
        object.__setattr__(self, "seconds", self.micro_steps * micro + self.optimizer + self.all_reduce)


def predict(run: RunConfig, profile: GpuProfile, flops_per_token: int, program: str = "gptfit") -> Speed:
    """The speed of `run` on `profile` under that program; `flops_per_token` as in the estimate (forward and backward,
    nothing recomputed). n_gpus cards are taken to be alike and in one machine."""
    pace = Pace(work_of(run, flops_per_token, program), profile)
    seconds = pace.seconds(run.batch_size, run.micro_steps)
    tokens_per_second = run.tokens_per_step / seconds
    peak = dense_peak(run.dtype, profile)
    like_rows = run.compile and run.dtype == "bfloat16" and run.n_gpus == 1 and float(profile.compute_capability) >= 8.0
    own = card_factor(profile.name)
    source = (GENERAL_SOURCE if own.n_runs else LIKE_ROWS_SOURCE) + own.clause
    factor = MEASURED_CARD_FACTOR if own.n_runs else LIKE_ROWS_FACTOR
    if not like_rows:
        factor, source = OTHER_FACTOR, source + OTHER_CLAUSE
    if profile.measured is not None:
        source += f"; times {profile.speed_factor:.2f}, {profile.measured.source}"
    return Speed(
        tokens_per_second=tokens_per_second,
        seconds_per_step=seconds,
        mfu=flops_per_token * tokens_per_second / (peak * run.n_gpus),
        low=tokens_per_second / factor,
        high=tokens_per_second * factor,
        source=source,
    )


def seconds_to_tokens(speed: Speed, n_tokens: int) -> float:
    """Seconds of training until `n_tokens` are seen. Raises GptfitError for a negative number."""
    if n_tokens < 0:
        raise GptfitError(f"{n_tokens} tokens: expected 0 or more", "tokens is how many the run shall see")
    return n_tokens / speed.tokens_per_second


def dense_peak(dtype: str, profile: GpuProfile) -> float:
    """FLOP/s that matmuls of `dtype` run against on this card (see the top for float32 and for emulated bf16)."""
    flops = profile.flops
    if dtype == "bfloat16":
        return flops.bf16 or flops.fp32 / 2
    if dtype == "float16":
        return flops.fp16 or flops.fp32
    return max(flops.tf32 or 0.0, flops.fp32)


@dataclass(frozen=True, slots=True)
class Work:
    """What a step of some run computes and moves, on any card, whatever its micro-batch."""

    run: RunConfig
    n_params: float
    token_flops: float
    token_bytes: float
    once_bytes: float  # that weights and their gradients move in one micro-step, and in one of several
    accumulating_bytes: float
    offload_bytes: int  # for each token
    kernels: float
    chunk_size: int  # of a chunked loss in tokens; 0 without
    chunk_bytes: int  # that each chunk moves, whatever its tokens
    update_bytes: float
    update_flops: float


def work_of(run: RunConfig, flops_per_token: int, program: str) -> Work:
    """The work of a step. `batch_size` and `gradient_accumulation_steps` of `run` do not matter."""
    n_embd, n_layer = run.n_embd, run.n_layer
    attention_flops = 12 * n_layer * run.block_size * n_embd
    matmul_params = max(0.0, (flops_per_token - attention_flops) / 6)
    head_params = n_embd * run.vocab_size
    n_params = matmul_params + (0 if run.tie_embeddings else head_params)
    recompute = recomputed_share(run)

    block_bytes = n_layer * block_token_bytes(run) * (1 + recompute)
    if not run.compile:
        block_bytes *= EAGER_TRAFFIC
    if run.activation_memory_budget < 1:
        block_bytes += n_layer * DTYPE_BYTES[run.dtype] * (run.n_hidden + LEAN_WIDTH_PASSES * n_embd)
    if run.recompute_cheap:
        block_bytes += n_layer * (REMADE_WIDTH_BYTES * n_embd + REMADE_HIDDEN_BYTES * run.n_hidden)
    update_bytes, update_flops = optimizer_work(run, n_params, max(0.0, matmul_params - head_params))
    chunked = run.loss == "chunked" and program != "nanogpt"
    # The sum of the head's gradient over chunks is set to 0 first, and scaled last.
    once_bytes = 12 * head_params if chunked else 0
    return Work(
        run=run,
        n_params=n_params,
        token_flops=flops_per_token + recompute * max(0, flops_per_token - 6 * head_params),
        token_bytes=block_bytes + logit_token_bytes(run, program),
        once_bytes=once_bytes + weight_bytes(run, n_params, accumulating=False),
        accumulating_bytes=once_bytes + weight_bytes(run, n_params, accumulating=True),
        offload_bytes=offload_token_bytes(run) if run.activation_offload else 0,
        kernels=OTHER_KERNELS + n_layer * BLOCK_KERNELS[run.compile] * (1 + recompute),
        chunk_size=run.loss_chunk_size if chunked else 0,
        chunk_bytes=chunk_head_bytes(run) if chunked else 0,
        update_bytes=update_bytes,
        update_flops=update_flops,
    )


class Pace:
    """Some work on one card: seconds of a step for any micro-batch. A search asks for thousands of them."""

    def __init__(self, work: Work, profile: GpuProfile, constants: Constants = CONSTANTS) -> None:
        run = work.run
        self.work = work
        self.speed_factor = profile.speed_factor
        self.card_factor = card_factor(profile.name).factor
        self.ideal_rate = 1 / dense_peak(run.dtype, profile)
        self.sm_count = profile.sm_count
        emulated = run.dtype == "bfloat16" and profile.flops.bf16 is None
        efficiency = constants.fp32_efficiency if emulated or run.dtype == "float32" else constants.matmul_efficiency
        self.rate = 1 / (dense_peak(run.dtype, profile) * efficiency)
        self.rate += constants.sm_seconds_per_flop / profile.sm_count
        self.bandwidth = profile.bandwidth_bytes_per_second * constants.bandwidth_share
        self.optimizer = work.update_bytes / run.shards / self.bandwidth + work.update_flops * self.rate
        if run.optimizer_impl == "for-loop":
            self.optimizer = max(self.optimizer, run.n_layer * LOOP_STEP_KERNELS * LAUNCH_SECONDS)
        several = run.n_gpus > 1
        self.all_reduce, self.sharding = between_cards(run, profile, work.n_params) if several else (0.0, 0.0)

    def step(self, batch_size: int, micro_steps: int) -> StepTime:
        """One optimizer step of micro-batches of `batch_size` sequences, part by part."""
        work = self.work
        n_tokens = batch_size * work.run.block_size
        tiles = max(1.0, n_tokens * work.run.n_embd / TILE)
        # Half a wave is idle; 5/12 of a block's FLOPs are matmuls with n_embd columns, the rest have 3 or 4 times that.
        compute = n_tokens * work.token_flops * self.rate * (1 + 0.3 * self.sm_count / tiles)
        moved = n_tokens * work.token_bytes + (work.accumulating_bytes if micro_steps > 1 else work.once_bytes)
        kernels = work.kernels
        if work.chunk_size:
            n_chunks = math.ceil(n_tokens / work.chunk_size)
            kernels += CHUNK_KERNELS[work.run.compile] * n_chunks
            moved += n_chunks * work.chunk_bytes
        traffic = n_tokens * work.offload_bytes / PCIE_BYTES_PER_SECOND + moved / self.bandwidth
        launch = kernels * LAUNCH_SECONDS
        return StepTime(compute, traffic, launch, self.sharding, micro_steps, self.optimizer, self.all_reduce)

    def seconds(self, batch_size: int, micro_steps: int) -> float:
        """With what was measured of the card; its factor makes no matmul faster than the peak."""
        step = self.step(batch_size, micro_steps)
        ideal = micro_steps * batch_size * self.work.run.block_size * self.work.token_flops * self.ideal_rate
        rest = (step.optimizer + step.all_reduce) / self.card_factor
        return max(step.seconds / self.card_factor, ideal + rest) / self.speed_factor

    def least_token_seconds(self) -> float:
        """What a token takes at least on one of the cards, whatever the micro-batch: no card is idle, and weights and
        the optimizer cost nothing."""
        work = self.work
        offload = work.offload_bytes / PCIE_BYTES_PER_SECOND
        moved = work.token_bytes + (work.chunk_bytes / work.chunk_size if work.chunk_size else 0)
        factor = self.card_factor * self.speed_factor
        return (work.token_flops * self.rate + moved / self.bandwidth + offload) / factor


def step_time(
    run: RunConfig, profile: GpuProfile, flops_per_token: int, program: str, constants: Constants
) -> StepTime:
    """One optimizer step, part by part."""
    pace = Pace(work_of(run, flops_per_token, program), profile, constants)
    return pace.step(run.batch_size, run.micro_steps)


def recomputed_share(run: RunConfig) -> float:
    """FLOPs of the blocks that checkpointing adds, as a share of forward and backward: one forward, of a part of it."""
    if run.activation_checkpointing == "none":
        return 0.0
    part = 1.0
    if run.activation_checkpointing == "attention":
        kv_width = run.n_kv_head * run.head_size
        attention = run.n_embd * (2 * run.n_embd + 2 * kv_width) + 2 * run.block_size * run.n_embd
        part = attention / (attention + run.n_embd * run.n_hidden * (3 if run.mlp == "swiglu" else 2))
    return part * FORWARD / run.checkpoint_every


def offload_token_bytes(run: RunConfig) -> int:
    """Bytes saved for backward that go to the host for each token and come back; nothing hides them."""
    size, stream_size = DTYPE_BYTES[run.dtype], DTYPE_BYTES[run.param_dtype]
    kv_width = run.n_kv_head * run.head_size
    # Each block: both norms' inputs and outputs, q, k and v, the attention's output for two, the MLP's hidden layers.
    widths = 2 * run.n_embd + run.n_embd + 2 * kv_width + 2 * run.n_embd + 2 * run.n_hidden
    return 2 * run.n_layer * (2 * run.n_embd * stream_size + widths * size)


def block_token_bytes(run: RunConfig) -> float:
    """Bytes that one compiled block moves for one token, forward and backward, matmul operands included."""
    size = DTYPE_BYTES[run.dtype]
    head_size = run.n_embd // run.n_head
    qkv = run.n_embd + 2 * run.n_kv_head * head_size
    passes = WIDTH_PASSES * run.n_embd + QKV_PASSES * qkv + HIDDEN_PASSES[run.mlp] * run.n_hidden
    if run.dropout:
        passes += DROPOUT_PASSES * run.n_embd
    # The residual stream has the embedding's dtype.
    moved = size * passes + RESIDUAL_PASSES * run.n_embd * DTYPE_BYTES[run.param_dtype]
    if run.attention == "math":
        # The scores: written, scaled, masked, softmax in fp32, cast, read; twice that in backward.
        moved += 3 * (3 * size + 24) * run.n_head * run.block_size
    return moved


def logit_token_bytes(run: RunConfig, program: str) -> float:
    """Bytes that the head's output and the loss move for one token."""
    size = DTYPE_BYTES[run.dtype]
    if run.loss == "chunked" and program != "nanogpt" and not run.compile:
        return run.vocab_size * (6 * size + 20)  # loss.eager_chunk line by line, and its three matmuls
    if run.compile:
        # Written, read twice by the loss; in backward read, its gradient written and read by two matmuls. In chunks the
        # same, as inductor writes it (loss.fused_chunk), or less where it makes one pass of the first two.
        # nanoGPT's returned logits add a tensor of zeros, written and read.
        return run.vocab_size * size * (9 if program == "nanogpt" else 7)
    # Cast, log_softmax and nll with their backwards each have a tensor of their own, in fp32.
    return run.vocab_size * (4 * size + 9 * 4)


def chunk_head_bytes(run: RunConfig) -> int:
    """Bytes that each chunk of the loss moves for the head's gradient: the sum in fp32 read and written; in half
    precision the product, too. The weight itself is left out: a matmul over all tokens reads it more than once, too."""
    size = DTYPE_BYTES[run.dtype]
    return (8 if size == 4 else 8 + 2 * size) * run.n_embd * run.vocab_size


def weight_bytes(run: RunConfig, n_params: float, accumulating: bool) -> float:
    """Bytes that weights and their gradients move in one micro-step, whatever its tokens."""
    size, param_size = DTYPE_BYTES[run.dtype], DTYPE_BYTES[run.param_dtype]
    cast = 0 if size == param_size else 2 * (size + param_size)  # weights down, gradients up
    accumulate = 3 * param_size if accumulating else 0
    return n_params * (4 * size + cast + accumulate)


def optimizer_work(run: RunConfig, n_params: float, n_block_params: float) -> tuple[float, float]:
    """Bytes and FLOPs of one update, gradient clipping included."""
    per_param = OPTIMIZER_BYTES[run.optimizer] * (1.0 if run.optimizer_impl == "fused" else FOREACH_FACTOR)
    if run.grad_clip:
        per_param += CLIP_BYTES
    flops = MUON_FLOPS * run.n_embd * n_block_params if run.optimizer == "muon" else 0.0
    return per_param * n_params * DTYPE_BYTES[run.param_dtype] / 4, flops


def between_cards(run: RunConfig, profile: GpuProfile, n_params: float) -> tuple[float, float]:
    """Seconds once a step (DDP: a ring all-reduce of the gradients, taken as not hidden behind backward) and seconds
    of each micro-step that can hide behind compute (FSDP: two all-gathers and a reduce-scatter). HSDP does both: FSDP
    within a node, and an all-reduce of each GPU's part over the nodes, here as if they were linked as cards are."""
    nvlink = profile.compute_capability in NVLINK_CAPABILITIES
    link = NVLINK_BYTES_PER_SECOND if nvlink else PCIE_BYTES_PER_SECOND
    copies = run.n_gpus // run.shards
    between = 2 * (copies - 1) / copies * n_params / run.shards / link * DTYPE_BYTES[run.param_dtype]
    within = (run.shards - 1) / run.shards * n_params / link
    return between, within * (2 * DTYPE_BYTES[run.dtype] + DTYPE_BYTES[run.param_dtype])
