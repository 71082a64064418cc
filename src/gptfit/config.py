"""What a run is: the model, and how it is trained. Frozen, validated at the door, never edited.

Keys are nanoGPT's where nanoGPT has one. Values that follow from others (`n_kv_head` from `n_head`)
are defaults, so that deriving a config with another `n_head` moves them along.
"""

from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gptfit.errors import GptfitError, nearest


def default_n_hidden(n_embd: int, mlp: str) -> int:
    """Width of the MLP: 4·n_embd; for swiglu 8/3·n_embd rounded up to 256, as Llama does."""
    return 4 * n_embd if mlp != "swiglu" else -(-8 * n_embd // (3 * 256)) * 256


class ModelConfig(BaseModel):
    """A GPT: enough to build the module and to count its parameters and activations."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n_layer: int = Field(12, ge=1, le=2000)  # each is replayed; DeepNet has 1000 (arXiv 2203.00555)
    n_head: int = Field(12, ge=1)
    n_embd: int = Field(768, ge=1)
    n_kv_head: int = Field(default_factory=lambda data: data.get("n_head", 1), ge=1)
    vocab_size: int = Field(50304, ge=2)
    block_size: int = Field(1024, ge=1)
    bias: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    mlp: Literal["gelu", "swiglu", "relu2"] = "gelu"
    n_hidden: int = Field(
        default_factory=lambda data: default_n_hidden(data.get("n_embd", 1), data.get("mlp", "gelu")), ge=1
    )
    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = Field(10000.0, gt=0)
    tie_embeddings: bool = True
    attention: Literal["flash", "math"] = "flash"
    qk_norm: bool = False
    logit_softcap: float = Field(0.0, ge=0.0)

    @model_validator(mode="after")
    def _shapes_divide(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(f"rope needs an even head size, but n_embd / n_head is {self.head_size}")
        return self

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head


class RunConfig(ModelConfig):
    """A model and the run that trains it. `batch_size` is the micro-batch of one GPU;
    `gradient_accumulation_steps` counts all GPUs together, as in nanoGPT."""

    batch_size: int = Field(12, ge=1)
    gradient_accumulation_steps: int = Field(40, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    compile: bool = True
    loss: Literal["full", "chunked"] = "chunked"
    loss_chunk_size: int = Field(1024, ge=1)
    activation_checkpointing: Literal["none", "block", "attention"] = "none"
    checkpoint_every: int = Field(1, ge=1)
    activation_offload: bool = False
    recompute_cheap: bool = False
    activation_memory_budget: float = Field(1.0, gt=0.0, le=1.0)

    optimizer: Literal["adamw", "adamw16bit", "adamw8bit", "adafactor", "lion", "muon", "sgd"] = "adamw"
    optimizer_impl: Literal["fused", "foreach", "for-loop"] = "fused"
    optimizer_in_backward: bool = False
    created_first: Literal["nothing", "states", "gradients", "both"] = "nothing"
    learning_rate: float = Field(6e-4, gt=0)
    min_lr: float = Field(default_factory=lambda data: data.get("learning_rate", 6e-4) / 10, ge=0)
    weight_decay: float = Field(0.1, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    momentum: float = Field(0.9, ge=0, lt=1)
    grad_clip: float = Field(1.0, ge=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    on_nan: Literal["stop", "skip"] = "stop"
    decay_lr: bool = True
    warmup_iters: int = Field(2000, ge=0)
    max_iters: int = Field(600000, ge=1)
    lr_decay_iters: int = Field(default_factory=lambda data: data.get("max_iters", 600000), ge=1)
    lr_schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    cooldown_iters: int = Field(default_factory=lambda data: data.get("lr_decay_iters", 600000) // 5, ge=0)

    eval_interval: int = Field(2000, ge=0)
    eval_iters: int = Field(200, ge=1)
    eval_batch_size: int = Field(default_factory=lambda data: data.get("batch_size", 1), ge=1)
    checkpoint_interval: int = Field(default_factory=lambda data: data.get("eval_interval", 2000) or 2000, ge=0)
    keep_checkpoints: int = Field(2, ge=1)
    log_interval: int = Field(1, ge=1)
    patience: int = Field(0, ge=0)
    sample_interval: int = Field(0, ge=0)
    seed: int = 1337
    init_from: str = Field("scratch", max_length=4096)

    dataset: str = ""
    tokenizer: str = ""
    expandable_segments: bool = True
    n_gpus: int = Field(1, ge=1)
    shard_gpus: int = Field(default_factory=lambda data: min(8, data.get("n_gpus", 1)), ge=1)
    strategy: Literal["single", "ddp", "fsdp", "hsdp"] = Field(
        default_factory=lambda data: "single" if data.get("n_gpus", 1) == 1 else "ddp"
    )

    @model_validator(mode="after")
    def _steps_divide(self) -> Self:
        if self.gradient_accumulation_steps % self.n_gpus:
            raise ValueError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} counts all GPUs together "
                f"and is not divisible by n_gpus {self.n_gpus}"
            )
        if self.strategy == "single" and self.n_gpus > 1:
            raise ValueError(f"strategy single is for one GPU, but n_gpus is {self.n_gpus}")
        return self

    @model_validator(mode="after")
    def _nodes_are_whole(self) -> Self:
        if self.strategy == "hsdp" and (self.shard_gpus == 1 or self.n_gpus % self.shard_gpus or self.n_nodes == 1):
            raise ValueError(
                f"strategy hsdp shards over shard_gpus {self.shard_gpus} and replicates that over several nodes, "
                f"but n_gpus is {self.n_gpus}"
            )
        return self

    @model_validator(mode="after")
    def _eager_alone(self) -> Self:
        """What a compiled step has no use for: its backward takes everything that was saved at once."""
        for key, value in (
            ("activation_checkpointing", "attention"),
            ("activation_offload", True),
            ("recompute_cheap", True),
        ):
            if self.compile and getattr(self, key) == value:
                raise ValueError(f"{key}={value} is for compile=False: a compiled step chooses itself what it keeps")
        return self

    @model_validator(mode="after")
    def _compiled_alone(self) -> Self:
        """The budget is for what torch's partitioner keeps of a compiled graph; block checkpoints say it themselves."""
        budget = f"activation_memory_budget={self.activation_memory_budget:g}"
        if self.activation_memory_budget < 1 and not self.compile:
            raise ValueError(f"{budget} is for compile=True: it tells the compiled step what to keep")
        if self.activation_memory_budget < 1 and self.activation_checkpointing != "none":
            raise ValueError(
                f"{budget} goes with activation_checkpointing=none, not {self.activation_checkpointing}: "
                "both say what is computed again"
            )
        return self

    @model_validator(mode="after")
    def _one_low_precision(self) -> Self:
        """With weights in bf16 and activations in another dtype no norm has a kernel."""
        if self.param_dtype == "bfloat16" and self.dtype != "bfloat16":
            raise ValueError(f"param_dtype=bfloat16 computes in bfloat16, but dtype is {self.dtype}")
        return self

    @model_validator(mode="after")
    def _states_that_move(self) -> Self:
        """bf16 has 8 bits of precision: a change of less than 1/256 of a state is lost."""
        if self.optimizer == "adamw16bit" and self.beta2 > 0.99:
            raise ValueError(f"adamw16bit needs beta2 of at most 0.99, not {self.beta2:g}: its state would not move")
        return self

    @model_validator(mode="after")
    def _averages_that_move(self) -> Self:
        """An average in bf16 takes over no weight that is nearer to it than 1/256 of its decay's share."""
        if self.ema_decay and self.param_dtype == "bfloat16":
            raise ValueError(f"ema_decay={self.ema_decay:g} needs param_dtype=float32: an average in bf16 stands still")
        return self

    @model_validator(mode="after")
    def _steps_in_backward(self) -> Self:
        """A gradient that is used up in backward cannot be accumulated, clipped with the others, unscaled or shared."""
        needs = {"gradient_accumulation_steps": 1, "grad_clip": 0.0, "compile": False, "n_gpus": 1}
        wrong = [f"{key}={value:g}" for key, value in needs.items() if getattr(self, key) != value]
        if self.dtype == "float16":
            wrong.append("dtype=bfloat16 or float32")
        if self.on_nan == "skip":
            wrong.append("on_nan=stop")
        if self.optimizer_in_backward and wrong:
            raise ValueError(f"optimizer_in_backward needs {', '.join(wrong)}".replace("compile=0", "compile=False"))
        return self

    @model_validator(mode="after")
    def _creates_what_it_can(self) -> Self:
        """On several GPUs gradients are parts of buckets or of whole ones; adamw8bit's states are its package's own."""
        if self.created_first != "nothing" and (self.n_gpus > 1 or self.optimizer == "adamw8bit"):
            why = f"n_gpus {self.n_gpus}" if self.n_gpus > 1 else "optimizer=adamw8bit"
            raise ValueError(f"created_first={self.created_first} does not go with {why}: expected nothing")
        return self

    @property
    def creates_states_first(self) -> bool:
        """Whether the optimizer's states are there before the first forward, not from the first step on."""
        return self.created_first in ("states", "both")

    @property
    def creates_gradients_first(self) -> bool:
        """Whether gradients take and give back their memory before the first forward."""
        return self.created_first in ("gradients", "both")

    @property
    def shards(self) -> int:
        """GPUs that share each parameter, gradient and state; 1 where each has the whole."""
        return {"fsdp": self.n_gpus, "hsdp": self.shard_gpus}.get(self.strategy, 1)

    @property
    def n_nodes(self) -> int:
        """Groups of `shard_gpus` GPUs."""
        return self.n_gpus // self.shard_gpus

    @property
    def micro_steps(self) -> int:
        """Micro-batches that one GPU computes in one optimizer step."""
        return self.gradient_accumulation_steps // self.n_gpus

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.block_size * self.gradient_accumulation_steps


KEYS = tuple(RunConfig.model_fields)

# Far above any run (a trillion of anything), far below where products of shapes overflow a float.
MAX_NUMBER = 10**12

_HINT = "change that key on the command line as KEY=VALUE"
_HINT_KEYS = "keys are nanoGPT's: n_layer, batch_size …"

# What nanoGPT's train.py sets where a config says nothing, and what its code can only do.
NANOGPT = {
    "loss": "full",
    "activation_checkpointing": "none",
    "expandable_segments": False,
}


def make_run(values: Mapping[str, Any]) -> RunConfig:
    """A validated run from plain keys and values.

    Raises GptfitError naming the first bad key, its value and what was expected.
    """
    for key, value in values.items():
        check_key(key)
        # pydantic reads True as the integer 1, which nobody means by batch_size=True.
        if isinstance(value, bool) and RunConfig.model_fields[key].annotation in (int, float):
            raise GptfitError(f"{key}={value}: expected a number", _HINT)
    try:
        run = RunConfig.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        given = f"{key}={shown(first['input'])}: " if key else ""
        raise GptfitError(f"{given}{_expected(key, first['input'], first['msg'])}", _HINT) from None
    for key in values:
        value = getattr(run, key)
        if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
            raise GptfitError(f"{key}={shown(value)}: expected at most {MAX_NUMBER:.0e}", _HINT)
    return run


def check_key(key: str, where: str = "") -> None:
    """Raises GptfitError with the nearest key unless `key` is one of RunConfig's; `where` opens the line."""
    if key not in RunConfig.model_fields:
        raise GptfitError(f'{where}unknown key "{shown(key)}"{nearest(key[:60], KEYS, 1)}', _HINT_KEYS)


def shown(value: Any, limit: int = 60) -> str:
    """A given value as an error line prints it: no line breaks, cut at `limit` characters."""
    if isinstance(value, int) and value.bit_length() > 200:  # str() of a huge integer is slow, then an error
        return f"a number of {value.bit_length()} bits"
    text = str(value)
    cut = text if len(text) <= limit else text[:limit] + "…"
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in cut)


def _expected(key: str, given: Any, message: str) -> str:
    """What `key` takes: the choices and the nearest of them, or pydantic's own words."""
    choices = get_args(RunConfig.model_fields[key].annotation) if key else ()
    if choices:
        return f"expected {', '.join(choices[:-1])} or {choices[-1]}{nearest(str(given), choices, 1)}"
    message = message.removeprefix("Value error, ")
    return (message[:1].lower() + message[1:]).replace("input should be", "expected").split(", unable to parse")[0]


def derive(run: RunConfig, **changes: Any) -> RunConfig:
    """`run` with some keys changed, validated; values that were never set follow along.

    The only way to derive a run: pydantic's `model_copy` does not validate.
    """
    return make_run({**run.model_dump(exclude_unset=True), **changes})
