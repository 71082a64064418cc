"""Memory that no tensor of the program asks for: cuBLAS workspaces and the CUDA context."""

MiB = 1 << 20

# Each thread that multiplies has a handle with a workspace of its own, taken from the caching allocator and kept:
# the main thread in forward, autograd's in backward (aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_HANDLES = 2
# :4096:2:16:8 in KiB, the default since torch 2.0; 32 MiB on Hopper (same file, getChosenWorkspaceSize),
# and since early 2026 (pytorch pull 175344) on compute capability 10 to 12 as well.
CUBLAS_WORKSPACE_BYTES = 8_519_680
LARGE_CUBLAS_WORKSPACE_BYTES = 32 * MiB

# Context and libraries of a training process where no card is named: the middle of what out-of-memory
# messages of 6 to 24 GB cards show as neither allocated nor reserved (120 to 504 MiB).
UNKNOWN_CARD_CONTEXT_BYTES = 300 * MiB


def cublas_workspace_bytes(compute_capability: str | None) -> int:
    """Bytes of one handle's workspace on a card of that compute capability (`8.9`)."""
    major = int(compute_capability.split(".")[0]) if compute_capability else 0
    return LARGE_CUBLAS_WORKSPACE_BYTES if major >= 9 else CUBLAS_WORKSPACE_BYTES
