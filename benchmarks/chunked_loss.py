"""What the chunked loss costs over chunk sizes: forward and backward of head and loss alone, beside the full loss.

    python benchmarks/chunked_loss.py [--tokens 2048] [--rounds 5] [--dtype float32] [--threads 1] [--device cpu]
        [--compile] [--chunks 512 2048]

GPT-2's head: 768 wide, 50,304 tokens. All take turns; a ratio is the median over the rounds of that size's time over
the full loss's in the same round. On a CPU the time is the processor's, which a busy machine disturbs less than the
clock on the wall. With --compile both are as the trainer compiles them: the full loss with its head, of the chunked one
what lies between the matmuls.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from gptfit.device import DTYPES
from gptfit.loss import Chunk, chunked_cross_entropy, eager_chunk, full_cross_entropy, fused_chunk

N_EMBD, VOCAB_SIZE = 768, 50304
CHUNK_SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def seconds(loss_of: Callable[[], Tensor], leaves: tuple[Tensor, ...], device: torch.device) -> float:
    """Of one forward and backward."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    for leaf in leaves:
        leaf.grad = None
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    loss_of().backward()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--chunks", type=int, nargs="+", default=CHUNK_SIZES)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    device, dtype = torch.device(given.device), DTYPES[given.dtype]
    x_NC = torch.randn(given.tokens, N_EMBD, device=device).to(dtype).requires_grad_()
    weight_VC = (torch.randn(VOCAB_SIZE, N_EMBD, device=device) * 0.02).requires_grad_()
    targets_N = torch.randint(VOCAB_SIZE, (given.tokens,), device=device)

    def full() -> Tensor:
        return full_cross_entropy(x_NC @ weight_VC.to(dtype).T, targets_N)

    chunk: Chunk = eager_chunk
    if given.compile:
        full = torch.compile(full, dynamic=False)
        torch._dynamo.config.recompile_limit = len(given.chunks)  # each is a shape of its own
        chunk = torch.compile(fused_chunk, dynamic=False)

    def chunked(size: int) -> Callable[[], Tensor]:
        return lambda: chunked_cross_entropy(x_NC, weight_VC, targets_N, size, chunk=chunk)

    forms = {"full": full} | {str(size): chunked(size) for size in given.chunks if size <= given.tokens}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for index in range(given.rounds + 1):
        for name, form in forms.items():
            taken = seconds(form, (x_NC, weight_VC), device)
            if index:  # the first round is to warm up
                times[name].append(taken)
    print(f"{'chunk':>6} {'ms':>10} {'ratio':>7}")
    for name, taken in times.items():
        ratio = median(a / b for a, b in zip(taken, times["full"], strict=True))
        print(f"{name:>6} {median(taken) * 1e3:>10,.0f} {ratio:>7.3f}")


if __name__ == "__main__":
    main()
