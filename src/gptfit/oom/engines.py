"""Errors that have a cause and remedies of their own, by their wording: those of programs with an allocator or a budget
of their own, and of memories that are not the card's. Nothing of a torch run's tape applies to them.
Sources: the JAX manual (GPU memory allocation); tf.config; Paddle's own message; llama.cpp's tools/server; mlx; vLLM's
engine arguments; Ray's manual (out-of-memory prevention); bitsandbytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SMALLER = "a smaller batch, or shorter sequences"
WHOSE = ("nvidia-smi", "which processes hold the card, and how much of it")


@dataclass(frozen=True, slots=True)
class Engine:
    """Whose error it is: the cause in one clause, and what to type, each with its reason."""

    cause: str
    remedies: tuple[tuple[str, str], ...]


ENGINES: Mapping[str, Engine] = MappingProxyType(
    {
        "JAX": Engine(
            "XLA (JAX) had no room in what it may hold of the card: it takes 75 % of it at the start, for itself",
            (
                (SMALLER, "what one compiled step holds is the sum that XLA prints"),
                ("XLA_PYTHON_CLIENT_MEM_FRACTION=0.95", "it may hold 75 % of the card unless told"),
                ("jax.checkpoint(block)", "keeps the input of each block alone, and computes it again in backward"),
                WHOSE,
            ),
        ),
        "TPU": Engine(
            "XLA had no room in the memory of a TPU core: the program's buffers are larger than that",
            (
                (SMALLER, "a core's memory is not shared with the other cores: the batch of each core counts"),
                ("jax.checkpoint, or torch_xla's checkpoint", "computes each block again in backward"),
                ("shard parameters and optimizer state (FSDP)", "each core then holds a part of them"),
            ),
        ),
        "TensorFlow": Engine(
            "TensorFlow's allocator had no room left in what it holds of the card",
            (
                (SMALLER, "activations shrink with it"),
                WHOSE,
                (
                    "tf.config.experimental.set_memory_growth(gpu, True)",
                    "else TensorFlow takes the whole card at the start, which two programs cannot do",
                ),
                ("tf.keras.mixed_precision.set_global_policy('mixed_float16')", "2 bytes an element of activations"),
            ),
        ),
        "PaddlePaddle": Engine(
            "PaddlePaddle's allocator had no room left on the card",
            (
                WHOSE,
                (SMALLER, "activations shrink with it"),
                ("FLAGS_fraction_of_gpu_memory_to_use=0.98", "the part of the card that Paddle may hold"),
            ),
        ),
        "llama.cpp": Engine(
            "llama.cpp asked the driver for one buffer (weights, KV cache or computing) that the card had no room for",
            (
                ("-ngl <fewer>", "that many layers on the card; the others stay in the computer's memory"),
                ("-c <shorter>", "the KV cache grows with the context; Ollama: num_ctx"),
                ("--cache-type-k q8_0 --cache-type-v q8_0", "the KV cache in half the bytes"),
                ("-ub 256", "the buffer for computing grows with the micro-batch"),
                WHOSE,
            ),
        ),
        "MLX": Engine(
            "Apple's GPU had no room for it: of the computer's memory Metal gives a process a part only, and one "
            "buffer less than that",
            (
                (SMALLER, "activations shrink with it; mlx_lm.lora: --batch-size, --max-seq-length"),
                ("mlx_lm.lora --grad-checkpoint", "computes each block again in backward"),
                ("close other programs", "the GPU has no memory of its own: it shares the computer's"),
            ),
        ),
        "CuPy": Engine(
            "CuPy's memory pool had no room left on the card; what PyTorch caches beside it is closed to it",
            (
                ("cupy.get_default_memory_pool().free_all_blocks()", "gives back what CuPy caches"),
                ("torch.cuda.empty_cache()", "gives back what PyTorch caches, if it runs in the same process"),
                WHOSE,
            ),
        ),
        "ONNX Runtime": Engine(
            "ONNX Runtime's arena could not grow by what it asked for",
            (
                (SMALLER, "activations shrink with it"),
                ("arena_extend_strategy=kSameAsRequested", "the arena otherwise grows by powers of two"),
                WHOSE,
            ),
        ),
        "TensorRT": Engine(
            "TensorRT could not have its workspace, or the engine's activations, from the driver",
            (
                WHOSE,
                ("trtexec --memPoolSize=workspace:1024", "MiB that a layer's tactics may use while it is built"),
                (SMALLER, "of the optimization profile: its largest shapes are what is allocated"),
            ),
        ),
        "a Java program's heap": Engine(
            "a Java program's heap (in the computer's memory, not a GPU's) reached its limit",
            (("-Xmx8g", "its limit; Spark: spark.driver.memory, spark.executor.memory"),),
        ),
        "Node.js's heap": Engine(
            "a Node.js program's heap (in the computer's memory, not a GPU's) reached its limit",
            (("NODE_OPTIONS=--max-old-space-size=8192", "its limit in MiB"),),
        ),
        "vLLM": Engine(
            "vLLM may hold the part of the card that gpu_memory_utilization says; beside weights and a trial step "
            "that leaves too little for the KV cache",
            (
                ("--max-model-len <shorter>", "the cache must hold at least one sequence of that length"),
                ("--gpu-memory-utilization 0.95", "the part of the whole card that vLLM may hold, 0.9 unless told"),
                WHOSE,
                ("--enforce-eager", "no CUDA graphs, which take memory of their own"),
                ("--tensor-parallel-size 2", "each card then holds half of the weights"),
            ),
        ),
        "Ray": Engine(
            "Ray ended a worker, as the node's own memory (not a GPU's) was 95 % full: before the kernel would",
            (
                ("fewer workers, or @ray.remote(num_cpus=<more>)", "fewer of them run at once on a node"),
                ("ray logs raylet.out", "lists the processes that held most"),
                (
                    "RAY_memory_usage_threshold=0.98",
                    "the share at which it ends one; the kernel's killer comes next",
                ),
            ),
        ),
        "a notebook's memory": Engine(
            "the notebook's own memory (RAM, not the GPU's) was full, and its service ended the process",
            (
                ("load the data in parts: numpy memmap, streaming=True", "not the whole file at once"),
                ("from_pretrained(..., dtype=torch.bfloat16, device_map='cuda')", "weights go straight to the GPU"),
                ("del what is not needed; restart the session", "cells that ran before still hold their variables"),
            ),
        ),
        "a compiler ended": Engine(
            "compilers that built a package in parallel filled the computer's memory, and the kernel ended one",
            (
                ("MAX_JOBS=2 pip install ...", "one compiler for each core otherwise, with gigabytes each for CUDA"),
                ("a wheel built for your torch and CUDA", "then nothing is compiled"),
            ),
        ),
        "no batch fits": Engine(
            "accelerate halved the batch at each out-of-memory error until none was left: not even one sample fits",
            (
                ("nvidia-smi", "whether another process holds the card"),
                ("gradient_checkpointing=True", "keeps the input of each block alone, and computes it again"),
                ('optim="adamw_bnb_8bit", or LoRA', "gradients and optimizer state do not shrink with the batch"),
                ("auto_find_batch_size=False", "shows the error itself, with its figures: paste that one"),
            ),
        ),
        "a data loader's worker ended": Engine(
            "a data loader's worker ended without an error of its own: most are killed as the computer's memory is "
            "full, some crash",
            (
                ("num_workers=0", "the main process then loads: a crash shows its own error"),
                ("dmesg | grep -i 'out of memory'", "shows whether the kernel ended it"),
                ("fewer DataLoader workers (num_workers=2)", "each is a process with its own copy of what it touches"),
            ),
        ),
        "paging file": Engine(
            "Windows could not promise that much memory: RAM and paging file together were spoken for",
            (
                ("a larger paging file: System, Advanced, Performance, Virtual memory", "it need only be promised"),
                ("num_workers=0", "each worker is a process that loads CUDA's libraries again, gigabytes of promises"),
            ),
        ),
        "pinned memory": Engine(
            "page-locked memory of the computer, for copies to the GPU, could not be had: it lies in RAM, not on the "
            "card",
            (
                ("DataLoader(pin_memory=False)", "copies are a little slower, from ordinary memory"),
                ("free -h; ulimit -l", "what RAM is left, and how much of it a process may lock"),
                ("fewer DataLoader workers, prefetch_factor=2", "each batch that waits is locked in RAM"),
                WHOSE,
            ),
        ),
        "bitsandbytes": Engine(
            "bitsandbytes could not have memory of its own, outside PyTorch's allocator: a paged optimizer's state is "
            "managed memory, of the card and the computer together",
            (
                WHOSE,
                ("optim=adamw_8bit, not a paged one", "under Windows and WSL managed memory cannot exceed the card"),
                ("free -h", "what the computer itself has left"),
            ),
        ),
    }
)
