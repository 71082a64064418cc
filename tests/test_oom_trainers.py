"""Pastes of other trainers: recognised, their keys read as they spell them, and answered in their words."""

from dataclasses import replace

import pytest

from gptfit.oom import trainers
from gptfit.oom.diagnose import Diagnosis, explain_text
from gptfit.oom.trainers import NANOCHAT as NANOCHAT_
from gptfit.oom.trainers import TRAINERS, spelled, trainer_of

CARD = (
    "GPU 0 has a total capacity of 23.69 GiB of which {free} is free. Including non-PyTorch memory, this process has "
)
CARD += "{process} memory in use. Of the allocated memory {allocated} is allocated by PyTorch, and 104.85 MiB is "
CARD += "reserved by PyTorch but unallocated."


def failed(frames: str, tried: str, free: str = "1.07 GiB", allocated: str = "22.10 GiB") -> str:
    number, unit = free.split()
    process = f"{23.69 - float(number) / (1024 if unit == 'MiB' else 1):.2f} GiB"  # nothing is held by others
    message = CARD.format(free=free, process=process, allocated=allocated)
    error = f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate {tried}. {message}"
    return f"Traceback (most recent call last):\n{frames}{error}\n"


def frame(file: str, function: str, code: str) -> str:
    return f'  File "/home/u/.venv/lib/python3.12/site-packages/{file}", line 40, in {function}\n    {code}\n'


# Banner of transformers' Trainer (trainer.py), frames of transformers 4.5x.
TRANSFORMERS = """***** Running training *****
  Instantaneous batch size per device = 16
  Total train batch size (w. parallel, distributed & accumulation) = 32
  Gradient Accumulation steps = 2
""" + failed(
    frame("transformers/trainer.py", "training_step", "loss = self.compute_loss(model, inputs)")
    + frame("transformers/models/gpt2/modeling_gpt2.py", "forward", "loss = self.loss_function(")
    + frame("transformers/loss/loss_utils.py", "ForCausalLMLoss", "logits = logits.float()"),
    "3.07 GiB",
)
COMPILED = frame("torch/_inductor/output_code.py", "__call__", "return self.current_callable(inputs)")
COMPILED += """  File "/tmp/torchinductor_root/xy/cxy.py", line 900, in call
    buf200 = empty_strided_cuda((8, 512, 65536), (33554432, 65536, 1), torch.bfloat16)
"""
NANOCHAT = """torchrun --nproc_per_node=1 -m scripts.base_train -- --depth=4 --device-batch-size=8 --max-seq-len 512
Vocab size: 65,536
Tokens / micro-batch / rank: 8 x 512 = 4,096
Total batch size 524,288 => gradient accumulation steps: 128
""" + failed(COMPILED, "512.00 MiB", "100.00 MiB", "1.20 GiB")
LITGPT = """{'precision': 'bf16-true',
 'train': TrainArgs(save_interval=1000, global_batch_size=32, micro_batch_size=8, max_seq_length=512)}
""" + failed(
    frame("litgpt/finetune/full.py", "fit", "fabric.backward(loss / train.gradient_accumulation_iters(devices))"),
    "394.00 MiB",
)
TORCHTUNE = """INFO:torchtune.utils._logging:Running FullFinetuneRecipeSingleDevice with resolved config:
batch_size: 4
compile: false
dtype: bf16
enable_activation_checkpointing: false
gradient_accumulation_steps: 8
model:
  _component_: torchtune.models.llama3_2.llama3_2_1b
optimizer:
  _component_: bitsandbytes.optim.PagedAdamW8bit
tokenizer:
  max_seq_len: 2048
""" + failed(frame("torchtune/modules/transformer.py", "forward", "output = self.unembed(h)"), "1.96 GiB", "0.20 GiB")
TRL = """trainer = SFTTrainer(
    args=SFTConfig(per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=2048, bf16=True),
)
""" + failed(
    frame("trl/trainer/sft_trainer.py", "training_step", "return super().training_step(*args, **kwargs)")
    + frame("accelerate/accelerator.py", "backward", "loss.backward(**kwargs)"),
    "9.27 GiB",
)
FIT = frame("lightning/pytorch/trainer/trainer.py", "fit", "call._call_and_handle_interrupt(") + frame(
    "lightning/pytorch/strategies/strategy.py",
    "optimizer_step",
    "return self.precision_plugin.optimizer_step(optimizer, model=model, closure=closure, **kwargs)",
)
STEP = '  File "/home/u/lit.py", line 31, in training_step\n    loss = self.model(x, y)\n'
LIGHTNING = (
    "Using bfloat16 Automatic Mixed Precision (AMP)\nTrainer(accumulate_grad_batches=4, max_epochs=1)\n"
    + failed(
        FIT
        + STEP
        + '  File "/home/u/model.py", line 187, in forward\n    loss = F.cross_entropy(logits.view(-1, 50304), y)\n',
        "3.07 GiB",
    )
)
CASES = {
    "lightning": (LIGHTNING, {"gradient_accumulation_steps": 4, "dtype": "bfloat16", "compile": False}),
    "huggingface": (TRANSFORMERS, {"batch_size": 16, "gradient_accumulation_steps": 2, "compile": False}),
    "nanochat": (
        NANOCHAT,
        {"batch_size": 8, "block_size": 512, "n_layer": 4, "n_embd": 256, "n_head": 2, "vocab_size": 65536}
        | {"gradient_accumulation_steps": 128, "n_gpus": 1, "compile": True, "dtype": "bfloat16"},
    ),
    "litgpt": (
        LITGPT,
        {"batch_size": 8, "block_size": 512, "dtype": "bfloat16", "param_dtype": "bfloat16"}
        | {"gradient_accumulation_steps": 4},
    ),
    "torchtune": (
        TORCHTUNE,
        {"batch_size": 4, "block_size": 2048, "dtype": "bfloat16", "compile": False, "optimizer": "adamw8bit"}
        | {"gradient_accumulation_steps": 8, "activation_checkpointing": "none"},
    ),
    "trl": (
        TRL,
        {"batch_size": 8, "block_size": 2048, "dtype": "bfloat16", "gradient_accumulation_steps": 4},
    ),
}
EXPECTED = {
    "lightning": ("accumulate_grad_batches", "training_step", "checkpoint("),
    "huggingface": (
        "per_device_train_batch_size=8, gradient_accumulation_steps=4",
        "gradient_checkpointing=True",
        "use_liger_kernel=True",
    ),
    "nanochat": ("--device-batch-size=", "checkpoint("),
    "litgpt": ("--train.micro_batch_size 4", "--train.max_seq_length"),
    "torchtune": ("batch_size=", "enable_activation_checkpointing=True", "LinearCrossEntropyLoss"),
    "trl": ("per_device_train_batch_size=4, gradient_accumulation_steps=8", 'loss_type="chunked_nll"', "max_length="),
}
NANOGPTS = ("--batch_size", "train.py", "model.py")


@pytest.mark.parametrize("name", CASES)
def test_a_trainer_is_recognised_and_answered_in_its_words(name: str) -> None:
    text, config = CASES[name]
    answer = explain_text(text)
    assert (answer.trainer, dict(answer.recognised)) == (name, config)
    changes = " | ".join(remedy.change for remedy in answer.remedies)
    assert [word for word in EXPECTED[name] if word not in changes] == []
    assert not any(word in remedy.change + remedy.why for remedy in answer.remedies for word in NANOGPTS)
    assert any("logits" in text for text in (answer.summary, answer.cause))
    assert answer.to_json()["trainer"] == name


@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("inner", ["", frame("torch/nn/modules/module.py", "_call_impl", "return forward_call(*args)")])
def test_the_innermost_work_decides_within_lightnings_optimizer_step(with_closure: bool, inner: str) -> None:
    """A paste may leave out the frames between: what training_step calls is no work of the optimizer's."""
    closure = frame("torch/optim/adamw.py", "step", "loss = closure()") if with_closure else ""
    answer = explain_text(failed(FIT + closure + STEP + inner, "3.07 GiB"))
    assert (answer.facts.phase, answer.trainer) == ("forward", "lightning")
    step = frame("torch/optim/adamw.py", "_multi_tensor_adamw", "torch._foreach_sqrt(device_exp_avg_sqs)")
    assert explain_text(failed(FIT + step, "148.00 MiB")).facts.phase == "optimizer"


def figures(answer: Diagnosis) -> list[int]:
    return [remedy.saves_bytes for remedy in answer.remedies if remedy.saves_bytes is not None]


def test_a_model_that_the_text_does_not_tell_gets_no_figures() -> None:
    answer = explain_text(TRANSFORMERS)
    assert figures(answer) == [] and answer.instant is None
    assert any("does not tell the model's shape" in warning for warning in answer.warnings)


def test_a_model_that_the_text_names_gets_figures_and_what_they_rest_on() -> None:
    answer = explain_text(TORCHTUNE)
    assert figures(answer)
    assert answer.instant is not None
    rows = {row.name: row.n_bytes for row in answer.instant.rows}
    assert rows["parameters"] == pytest.approx(2 * 1_235_814_400, rel=0.001)  # in bf16; the number is Meta's
    assert any("llama-3.2-1b" in warning for warning in answer.warnings)
    assert any("gptfit's code" in warning for warning in answer.warnings)


def test_added_weights_are_not_priced_as_a_whole_model() -> None:
    answer = explain_text(TORCHTUNE.replace("FullFinetuneRecipe", "LoRAFinetuneRecipe") + "lora_rank: 8, lora\n")
    assert figures(answer) == []


def test_keys_that_cannot_be_of_this_run_are_said_and_not_used() -> None:
    answer = explain_text(TORCHTUNE.replace("22.10 GiB", "3.10 GiB"))
    assert figures(answer) == [] and answer.instant is None
    assert any("not those of this run" in warning for warning in answer.warnings)
    assert answer.tensor is None or answer.tensor.confidence != "exact"


def test_what_a_run_does_already_is_not_advised() -> None:
    answer = explain_text(TRL.replace("bf16=True", "bf16=True, gradient_checkpointing=True"))
    assert not {"bf16=True", "gradient_checkpointing=True"} & {remedy.change for remedy in answer.remedies}


def test_a_micro_batch_of_nanochat_divides_the_tokens_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code asserts so: of 30 sequences a step, a micro-batch may have 5 or 3, but not 4."""
    text = NANOCHAT.replace("1.20 GiB", "0.73 GiB").replace("512.00 MiB. GPU", "384.00 MiB. GPU")
    text = (
        text.replace("steps: 128", "steps: 5")
        .replace("batch-size=8", "batch-size=6")
        .replace("8 x 512", "6 x 512")
        .replace("((8, 512", "((6, 512")
    )

    def largest(free: int) -> int:
        answer = explain_text(text.replace("100.00 MiB is", f"{free}.00 MiB is"))
        return next((remedy.micro_batch for remedy in answer.remedies if remedy.micro_batch and remedy.enough), 0)

    room = range(100, 900, 100)
    divides = [largest(free) for free in room]
    monkeypatch.setattr(trainers, "TRAINERS", {**TRAINERS, "nanochat": replace(NANOCHAT_, divides=False)})
    plain = [largest(free) for free in room]
    assert 4 in plain
    assert divides == [max((size for size in (1, 2, 3, 5) if size <= best), default=0) for best in plain]


@pytest.mark.parametrize("name", TRAINERS)
def test_all_words_can_be_spelled(name: str) -> None:
    trainer = trainer_of(name)
    for word in (*trainer.words.values(), (trainer.batch, "")):
        change, _ = spelled(word, batch=4, steps=8, block=512)
        assert change.isprintable() and "{" not in change.replace("{Block}", "")
