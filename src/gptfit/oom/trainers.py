"""Whose code trained: how it spells what saves memory, which twin stands for it, and what it does unless told.

Sources: nanoGPT train.py and model.py; transformers training_args.py; trl sft_config.py (1.x); nanochat
scripts/base_train.py (92d63d4); lightning 2.6 trainer/trainer.py; litgpt args.py and finetune/full.py; torchtune
recipes/configs/llama3_1 (0.6).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Word = tuple[str, str]  # what to type, and why it helps

CHUNKED = "the loss is computed in chunks: the logits are never all there, nor their gradient"
AGAIN = "keeps the input of each block alone, and computes the block again in backward: about a third slower"
HALF = "2 bytes an element for what multiplies, and for most activations"
LISTS = "the step makes no lists as large as the parameters (torch's default on CUDA is foreach)"
BITS = "2 bytes of state a parameter instead of 8; the numbers of training change a little"
FUSES = "compiled, the loss makes no fp32 copies of the logits, and fewer activations are kept"
SHORTER = "the tokens of a micro-batch, and attention over them, shrink; the model sees shorter texts"


@dataclass(frozen=True, slots=True)
class Trainer:
    """`twin` is the program whose tape stands for it, `exact` says that it is that very code. `assumed` are its keys
    where neither the text nor the user tells. `batch` spells a micro-batch and its accumulation; `words` the levers.
    `per_gpu`: its accumulation counts one GPU's steps. `divides`: its micro-batch must divide the tokens of a step."""

    title: str
    twin: str
    batch: str
    words: Mapping[str, Word]
    assumed: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    exact: bool = False
    per_gpu: bool = True
    divides: bool = False


NANOGPT = Trainer(
    title="nanoGPT",
    twin="nanogpt",
    exact=True,
    per_gpu=False,
    batch="--batch_size={batch} --gradient_accumulation_steps={steps}",
    assumed={"expandable_segments": False},
    words={
        "detached": (
            "return logits.detach(), loss",
            "model.py, GPT.forward: compiled backward fills a tensor of zeros for the returned, unused logits",
        ),
        "returned": (
            "return None, loss",
            "model.py, GPT.forward while training: train.py keeps the returned logits, and never reads them",
        ),
        "compile": ("--compile=True", FUSES),
        "gptfit": ("gptfit train with the same keys", CHUNKED),
        "checkpointing": (
            "x = checkpoint(block, x, use_reentrant=False)",
            f"model.py, GPT.forward, with torch.utils.checkpoint: {AGAIN}",
        ),
        "bfloat16": ("--dtype=bfloat16", HALF),
        "fused": ("torch.optim.AdamW(..., fused=True)", LISTS),
        "block": ("--block_size={block}", SHORTER),
        "eval": ("--batch_size={batch}", "estimate_loss evaluates batches of that size too"),
    },
)
GPTFIT = Trainer(
    title="gptfit",
    twin="gptfit",
    exact=True,
    per_gpu=False,
    batch="batch_size={batch} gradient_accumulation_steps={steps}",
    words={
        "compile": ("compile=True", FUSES),
        "chunked": ("loss=chunked", CHUNKED),
        "checkpointing": ("activation_checkpointing=block", AGAIN),
        "bfloat16": ("dtype=bfloat16", HALF),
        "fused": ("optimizer_impl=fused", LISTS),
        "adamw8bit": ("optimizer=adamw8bit", BITS),
        "adamw16bit": ("optimizer=adamw16bit", "4 bytes of state a parameter instead of 8, and no package needed"),
        "block": ("block_size={block}", SHORTER),
        "eval": ("eval_batch_size={batch}", "the evaluation's batch need not be that of training"),
    },
)
_EAGER = {"compile": False, "loss": "full", "expandable_segments": False, "optimizer_impl": "foreach", "n_gpus": 1}
HUGGINGFACE = Trainer(
    title="transformers' Trainer",
    twin="gptfit",
    batch="per_device_train_batch_size={batch}, gradient_accumulation_steps={steps}",
    assumed={**_EAGER, "batch_size": 8, "gradient_accumulation_steps": 1, "dtype": "float32"},
    words={
        "checkpointing": ("gradient_checkpointing=True", AGAIN),
        "chunked": (
            "use_liger_kernel=True",
            "Liger's fused loss: the logits are never all there, nor their float32 copy",
        ),
        "bfloat16": ("bf16=True", HALF),
        "fused": ('optim="adamw_torch_fused"', LISTS),
        "adamw8bit": ('optim="adamw_bnb_8bit"', BITS),
        "compile": ("torch_compile=True", FUSES),
        "block": ("block_size={block} (or max_length, where the data is tokenized)", SHORTER),
        "eval": (
            "per_device_eval_batch_size={batch}, prediction_loss_only=True",
            "else the logits of all evaluation batches are kept on the card; eval_accumulation_steps=1 moves them off",
        ),
    },
)
TRL = Trainer(
    title="TRL",
    twin="gptfit",
    batch=HUGGINGFACE.batch,
    assumed={**HUGGINGFACE.assumed, "dtype": "bfloat16"},
    words={
        **HUGGINGFACE.words,
        "chunked": ('loss_type="chunked_nll"', f"SFTConfig: {CHUNKED}; use_liger_kernel=True in older versions"),
        "block": ("max_length={block}", SHORTER),
    },
)
NANOCHAT = Trainer(
    title="nanochat",
    twin="gptfit",
    batch="--device-batch-size={batch}",
    divides=True,
    assumed={
        **{"norm": "rmsnorm", "mlp": "relu2", "position": "rope", "qk_norm": True, "logit_softcap": 15.0},
        **{"tie_embeddings": False, "vocab_size": 32768, "block_size": 2048, "batch_size": 32, "loss": "full"},
        **{"optimizer": "muon", "compile": True, "gradient_accumulation_steps": 1},
    },
    words={
        "block": ("--max-seq-len={block}", SHORTER),
        "checkpointing": (
            "x = checkpoint(block, x, ..., use_reentrant=False)",
            f"nanochat/gpt.py, GPT.forward, with torch.utils.checkpoint; there is no switch for it: {AGAIN}",
        ),
        "chunked": (
            "F.cross_entropy in nanochat/gpt.py over chunks of tokens",
            f"there is no switch for it, its code says TODO: {CHUNKED}",
        ),
        "eval": ("--device-batch-size={batch}", "the evaluation's batch is that of training"),
    },
)
LIGHTNING = Trainer(
    title="Lightning's Trainer",
    twin="gptfit",
    batch="DataLoader(batch_size={batch}), Trainer(accumulate_grad_batches={steps})",
    assumed={**_EAGER, "gradient_accumulation_steps": 1, "dtype": "float32"},
    words={
        "checkpointing": (
            "x = checkpoint(block, x, use_reentrant=False)",
            f"in the model's forward, with torch.utils.checkpoint: {AGAIN}",
        ),
        "chunked": ("F.cross_entropy in training_step over chunks of tokens", CHUNKED),
        "bfloat16": ('Trainer(precision="bf16-mixed")', HALF),
        "fused": ("torch.optim.AdamW(..., fused=True)", f"configure_optimizers: {LISTS}"),
        "adamw8bit": ("bitsandbytes.optim.AdamW8bit(...)", f"configure_optimizers: {BITS}"),
        "compile": ("module = torch.compile(module)", f"before trainer.fit: {FUSES}"),
        "block": ("a block_size of {block} in the dataset", SHORTER),
        "eval": (
            "val_dataloader: DataLoader(batch_size={batch})",
            "the validation's batch need not be that of training",
        ),
    },
)
LITGPT = Trainer(
    title="LitGPT",
    twin="gptfit",
    batch="--train.micro_batch_size {batch}",
    assumed={**_EAGER, "batch_size": 4, "gradient_accumulation_steps": 1},
    words={
        "block": ("--train.max_seq_length {block}", SHORTER),
        "bfloat16": ("--precision bf16-true", "parameters, gradients and optimizer state in 2 bytes as well"),
        "checkpointing": (
            "activation_checkpointing_policy={{Block}}",
            f"set in litgpt's FSDPStrategy for several devices; on one it is to be added: {AGAIN}",
        ),
        "adamw8bit": ("--optimizer bitsandbytes.optim.AdamW8bit", BITS),
        "compile": ("model = torch.compile(model)", FUSES),
        "eval": ("--train.micro_batch_size {batch}", "validate() uses it too, and takes its loss unchunked"),
    },
)
TORCHTUNE = Trainer(
    title="torchtune",
    twin="gptfit",
    batch="batch_size={batch} gradient_accumulation_steps={steps}",
    assumed={
        **{**_EAGER, "batch_size": 2, "gradient_accumulation_steps": 1, "param_dtype": "bfloat16"},
        **{"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "tie_embeddings": False},
    },
    words={
        "checkpointing": ("enable_activation_checkpointing=True", AGAIN),
        "chunked": ("loss=torchtune.modules.loss.LinearCrossEntropyLoss", CHUNKED),
        "bfloat16": ("dtype=bf16", "parameters, gradients and optimizer state in 2 bytes as well"),
        "fused": ("optimizer.fused=True", LISTS),
        "adamw8bit": ("optimizer=bitsandbytes.optim.PagedAdamW8bit", BITS),
        "compile": ("compile=True", FUSES),
        "block": ("tokenizer.max_seq_len={block}", SHORTER),
        "eval": ("batch_size={batch}", "the validation's batch is that of training"),
    },
)
TORCHTITAN = Trainer(
    title="torchtitan",
    twin="gptfit",
    batch="--training.local_batch_size {batch}",
    assumed={
        **{**_EAGER, "batch_size": 8, "gradient_accumulation_steps": 1},
        **{"norm": "rmsnorm", "mlp": "swiglu", "position": "rope", "tie_embeddings": False},
    },
    words={
        "checkpointing": ("--activation_checkpoint.mode full", AGAIN),
        "block": ("--training.seq_len {block}", SHORTER),
        "fused": ("--optimizer.implementation fused", LISTS),
        "compile": ("--compile.enable", FUSES),
        "eval": ("--validation.local_batch_size {batch}", "the validation's batch need not be that of training"),
    },
)
# Where nothing tells whose code ran, and no figure is computed.
ANY = Trainer(
    title="",
    twin="nanogpt",
    batch="batch_size={batch}, gradient_accumulation_steps={steps}",
    words={
        "checkpointing": (
            "x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)",
            f"in the model's forward, for each block: {AGAIN}",
        ),
        "chunked": ("F.cross_entropy over chunks of tokens", CHUNKED),
        "bfloat16": ("with torch.autocast('cuda', dtype=torch.bfloat16):", HALF),
        "fused": ("torch.optim.AdamW(..., fused=True)", LISTS),
        "adamw8bit": ("bitsandbytes.optim.AdamW8bit(...)", BITS),
        "block": ("shorter sequences", SHORTER),
        "eval": ("with torch.no_grad():, and a smaller batch", "nothing is then kept for a backward that never comes"),
    },
)
TRAINERS: Mapping[str, Trainer] = MappingProxyType(
    {
        "nanogpt": NANOGPT,
        "gptfit": GPTFIT,
        "huggingface": HUGGINGFACE,
        "trl": TRL,
        "nanochat": NANOCHAT,
        "lightning": LIGHTNING,
        "litgpt": LITGPT,
        "torchtune": TORCHTUNE,
        "torchtitan": TORCHTITAN,
    }
)


def trainer_of(recognised: str, program: str | None = None) -> Trainer:
    """The trainer that the text tells, or the program that the user names; nanoGPT where neither does."""
    return TRAINERS.get(program or recognised, NANOGPT)


def spelled(word: Word, **sizes: object) -> Word:
    """The words with sizes put in; one that is not known is left to the reader."""
    change, why = word
    return change.format_map({"batch": "<fewer>", "steps": "<more>", "block": "<shorter>", **sizes}), why
