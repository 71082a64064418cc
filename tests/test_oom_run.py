"""What a paste tells of the run: its keys and where each stands, the program, shapes, versions, the card, the phase."""

import pytest

from gptfit.config import RunConfig, make_run
from gptfit.oom.diagnose import explain_text
from gptfit.oom.frames import Frame
from gptfit.oom.hints import ShapeHint
from gptfit.oom.phases import from_frames, phase_of
from gptfit.oom.read import read_paste
from gptfit.oom.runkeys import CHOICES, FLAGS, GPT2, INTEGERS, NUMBERS, OTHER_NAMES, PLACES
from oom_pastes import SITE

NANOGPT = """Overriding config with config/train_gpt2.py:
# GPT-2 (124M) on a node of 8 A100 40GB
wandb_log = True
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
weight_decay = 1e-1
Overriding: batch_size = 16
Overriding: dropout = 0.1
tokens per iteration will be: 655,360
found vocab_size = 65 (inside data/shakespeare_char/meta.pkl)
number of parameters: 123.69M
using fused AdamW: True
compiling the model... (takes a ~minute)
Traceback (most recent call last):
  File "train.py", line 300, in <module>
    x = nn.Linear(768, 3 * 768, bias=False, batch_size=4)
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.54 GiB."""
LIGHTNINGS = {"dtype": "float16", "gradient_accumulation_steps": 4}
RUNS = (
    (
        "python train.py --batch_size=32 --compile=False --dtype=float16",
        {"batch_size": 32, "compile": False, "dtype": "float16"},
    ),
    ("torchrun --nproc_per_node=4 train.py --block_size=2048", {"n_gpus": 4, "block_size": 2048}),
    ("Namespace(batch_size=8, bias=False, n_embd=384, lr=1)", {"batch_size": 8, "bias": False, "n_embd": 384}),
    (
        "run_clm.py --per_device_train_batch_size 16 --bf16 --gradient_checkpointing True --optim adamw_torch_fused",
        {
            "batch_size": 16,
            "dtype": "bfloat16",
            "activation_checkpointing": "block",
            "optimizer": "adamw",
            "optimizer_impl": "fused",
        },
    ),
    (
        "TrainingArguments(\nfp16=True,\nper_device_train_batch_size=8,\nmax_steps=-1,\n)",
        {"dtype": "float16", "batch_size": 8},
    ),
    ('{"n_positions": 1024, "n_embd": 768, "n_layer": 12}', {"block_size": 1024, "n_embd": 768, "n_layer": 12}),
    (
        "  Instantaneous batch size per device = 16\n  Gradient Accumulation steps = 2",
        {"batch_size": 16, "gradient_accumulation_steps": 2},
    ),
    ("(wte): Embedding(50304, 768)\n(0-11): 12 x Block(", {"vocab_size": 50304, "n_embd": 768, "n_layer": 12}),
    ("batch_size ...................... 4...........................updated", {"batch_size": 4}),
    ('trainer = Trainer(\n    precision="16-mixed",\n    accumulate_grad_batches=4,\n)', LIGHTNINGS),
    ("gptfit train gpt2 batch_size=8 loss=chunked", {"batch_size": 8, "loss": "chunked"}),
    (
        "python -m scripts.base_train --depth=20 --device_batch_size=32",
        {"batch_size": 32, "n_layer": 20, "n_embd": 1280, "n_head": 10},
    ),
    ("iter 3: loss 9.8, dropout: 0.1 it said, a batch_size of 12", {}),
)


def test_nanogpts_own_words_tell_the_run_and_an_override_wins():
    facts = read_paste(NANOGPT)
    assert dict(facts.config) == {
        **{
            "batch_size": 16,
            "block_size": 1024,
            "gradient_accumulation_steps": 40,
            "weight_decay": 0.1,
            "dropout": 0.1,
        },
        **{"vocab_size": 65, "optimizer_impl": "fused", "compile": True},
    }
    assert facts.config_places["batch_size"] == "override"
    assert facts.config_places["block_size"] == "config file"
    assert (facts.n_params, facts.tokens_per_step, facts.program) == (123_690_000, 655_360, "nanogpt")


@pytest.mark.parametrize(("text", "config"), RUNS)
def test_keys_are_told_in_many_forms(text, config):
    facts = read_paste(text)
    assert dict(facts.config) == config
    assert facts.config_places.keys() == config.keys()
    assert set(facts.config_places.values()) <= set(PLACES)


def test_every_key_is_one_of_gptfits_and_takes_these_values():
    keys = {*INTEGERS, *NUMBERS, *FLAGS, *CHOICES, *OTHER_NAMES.values()}
    assert keys <= RunConfig.model_fields.keys()
    assert all(len(choices) > 1 for choices in CHOICES.values())
    for n_layer, n_head, n_embd in GPT2.values():
        RunConfig.model_validate({"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd})


def test_a_compiled_graphs_own_line_tells_the_logits():
    code = "buf1 = empty_strided_cuda((16, 1024, 50304), (51511296, 50304, 1), torch.bfloat16)"
    text = f'Traceback (most recent call last):\n  File "/tmp/torchinductor_u/x.py", line 9, in call\n    {code}\n'
    facts = read_paste(text + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.54 GiB.")
    assert facts.shapes == (ShapeHint((16, 1024, 50304), "bfloat16", "empty_strided"),)
    sizes = {"batch_size": 16, "block_size": 1024, "vocab_size": 50304}
    assert dict(facts.config) == {**sizes, "compile": True, "dtype": "bfloat16"}
    typed = read_paste(f"python train.py --batch_size=8\n{text}CUDA out of memory. Tried to allocate 1.54 GiB.")
    assert typed.config["batch_size"] == 8, "what was typed is surer than what was made of a shape"


@pytest.mark.parametrize(
    ("text", "version", "gpu"),
    [
        ("torch==2.3.1+cu121 on an NVIDIA GeForce RTX 4070 Ti", "2.3.1", "NVIDIA GeForce RTX 4070 Ti"),
        ("PyTorch version: 2.9.0\nGPU: Tesla V100-SXM2-32GB", "2.9.0", "Tesla V100-SXM2-32GB"),
        ("GPU 0 has a total capacty of 8.00 GiB of which 1.00 GiB is free on my A100", "2.1", "A100"),
        ("Tried to allocate 2.00 GiB (GPU 0; 8.00 GiB total capacity; 1.00 MiB cached)", "<1.4", ""),
    ],
)
def test_versions_and_cards_are_named(text, version, gpu):
    facts = read_paste(text)
    assert (facts.torch_version, facts.gpu) == (version, gpu)


@pytest.mark.parametrize(
    ("program", "text"),
    [
        ("huggingface", 'File "/x/site-packages/transformers/trainer.py", line 1, in train'),
        ("nanochat", "python -m scripts.base_train"),
        ("trl", "trainer = SFTTrainer(model)"),
        ("torchtune", "tune run full_finetune_distributed"),
        ("litgpt", "litgpt finetune --train.micro_batch_size 4"),
        ("gptfit", "gptfit train gpt2"),
        ("unknown", "python main.py"),
    ],
)
def test_the_program_is_guessed(program, text):
    assert read_paste(text).program == program


def frames(*rows: tuple[str, str, str]) -> list[Frame]:
    return [Frame(file, 1, function, code) for file, function, code in rows]


CLOSURE = (f"{SITE}/optim/adamw.py", "step", "loss = closure()")
ENGINE = (f"{SITE}/autograd/graph.py", "_engine_run_backward", "return Variable._execution_engine.run_backward(")
PHASES = (
    (
        "forward",
        [
            ("trainer.py", "optimizer_step", "optimizer.step(closure)"),
            CLOSURE,
            ("m.py", "training_step", "self.model(x)"),
            ("m.py", "forward", "y = x @ w"),
        ],
    ),
    (
        "backward",
        [
            ("trainer.py", "optimizer_step", "optimizer.step(closure)"),
            CLOSURE,
            ("m.py", "backward", "loss.backward()"),
            ENGINE,
        ],
    ),
    (
        "backward",
        [
            ("train.py", "<module>", "loss.backward()"),
            ENGINE,
            (f"{SITE}/utils/checkpoint.py", "recompute_fn", "fn(*args)"),
            ("m.py", "forward", "y = x @ w"),
        ],
    ),
    ("optimizer", [("train.py", "<module>", "loss.backward()"), ENGINE, ("train.py", "hook", "optimizers[p].step()")]),
    ("optimizer", [("train.py", "<module>", "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)")]),
    (
        "eval",
        [
            ("train.py", "train", "evaluate(model)"),
            ("train.py", "evaluate", "model(x)"),
            ("m.py", "forward", "self.lm_head(x)"),
        ],
    ),
    (
        "eval",
        [
            ("sample.py", "<module>", "y = model.generate(x, 500)"),
            ("model.py", "generate", "logits, _ = self(idx_cond)"),
        ],
    ),
    (
        "model_load",
        [
            ("x.py", "<module>", "AutoModel.from_pretrained(n)"),
            ("m.py", "from_pretrained", "load("),
            (f"{SITE}/serialization.py", "load", "_load("),
        ],
    ),
    ("checkpoint", [("train.py", "<module>", "optimizer.load_state_dict(checkpoint['optimizer'])")]),
    (
        "loss",
        [
            ("train.py", "<module>", "loss = criterion(logits, y)"),
            (f"{SITE}/nn/modules/loss.py", "forward", "return F.cross_entropy("),
        ],
    ),
    (
        "forward",
        [
            ("train.py", "<module>", "logits, loss = model(X, Y)"),
            ("model.py", "forward", "loss = F.cross_entropy(logits, y)"),
        ],
    ),
    ("forward", [("train.py", "<module>", "model(x)"), ("model.py", "forward", "x = x.to(torch.float32)")]),
    (
        "forward",
        [
            ("train.py", "<module>", "model(x)"),
            (f"{SITE}/_inductor/codecache.py", "_run_from_cache", "compiled_graph(inputs)"),
        ],
    ),
    ("data", [("train.py", "<module>", "x = x.to(device)")]),
    ("unknown", [("train.py", "<module>", "main()")]),
    ("unknown", []),
)


@pytest.mark.parametrize(("phase", "rows"), PHASES)
def test_the_phase_is_that_of_the_work_under_way(phase, rows):
    assert phase_of(frames(*rows)) == phase


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([("train.py", "<module>", "model(x)"), ("model.py", "forward", "x = self.ln(x)")], {"compile": False}),
        (
            [
                ("train.py", "<module>", "model(x)"),
                (f"{SITE}/_dynamo/eval_frame.py", "compile_wrapper", "fn(x)"),
                ("model.py", "forward", "x = self.ln(x)"),  # a graph break
            ],
            {"compile": True},
        ),
        ([(f"{SITE}/nn/modules/linear.py", "forward", "return F.linear(")], {}),
        ([("train.py", "<module>", "loss.backward()"), ENGINE], {}),
        ([(f"{SITE}/optim/adamw.py", "_multi_tensor_adamw", "torch._foreach_sqrt(")], {"optimizer_impl": "foreach"}),
        ([(f"{SITE}/optim/adam.py", "_single_tensor_adam", "denom = (")], {"optimizer_impl": "for-loop"}),
    ],
)
def test_frames_tell_whether_the_step_was_compiled_and_how_the_optimizer_steps(rows, told):
    assert from_frames(frames(*rows)) == told


def test_what_was_typed_outranks_the_frames():
    code = '  File "model.py", line 1, in forward\n    x = self.ln(x)\n'
    text = f"python train.py --compile=True\nTraceback (most recent call last):\n{code}CUDA out of memory."
    facts = read_paste(text)
    assert (facts.config["compile"], facts.config_places["compile"]) == (True, "command line")


@pytest.mark.parametrize(
    "text", ["Killed", "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes."]
)
def test_what_frees_the_card_is_no_remedy_for_the_computers_memory(text: str) -> None:
    answer = explain_text(f"iter 120: loss 5.9921\n{text}\n", make_run({}), "nanogpt")
    assert answer.facts.kind in ("host_killed", "host_ram") and answer.remedies
    assert all(remedy.saves_bytes is None for remedy in answer.remedies)
