"""Each wording of an out-of-memory error, and of what is taken for one, is told for what it is."""

import pytest

from gptfit.oom.read import read_paste
from gptfit.oom.wordings import RULES

KINDS = (
    *("cuda_caching_allocator", "cuda_driver", "cuda_async_allocator", "cublas", "cudnn", "nccl", "hip", "xpu", "mps"),
    *("host_ram", "host_killed", "shm", "triton_shared_memory", "per_process_limit", "not_oom"),
)
GiB = 1 << 30
ASSERTION = (
    "/pytorch/Indexing.cu:1093: indexSelectSmallIndex: block: [0,0,0] Assertion `srcIndex < srcSelectDimSize` failed."
)
ASYNC = """torch.OutOfMemoryError: Allocation on device 1 would exceed allowed memory. (out of memory)
Currently allocated     : 22.50 GiB
Requested               : 4.00 GiB
Device limit            : 24.00 GiB
Free (according to CUDA): 0 bytes
PyTorch limit (set by user-supplied memory fraction)
                        : 17179869184.00 GiB"""
NCCL = """torch.distributed.DistBackendError: NCCL error in: ../ProcessGroupNCCL.cpp:1691, NCCL version 2.19.3
ncclUnhandledCudaError: Call to CUDA function failed.
Last error:
"""
LIMIT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80.00 GiB of which {free} "
    "is free. 50.00 GiB allowed; Of the allocated memory {allocated} is allocated by PyTorch, "
    "and 1.00 GiB is reserved by PyTorch but unallocated."
)
WORDINGS = (
    ("cuda_caching_allocator", "RuntimeError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 3.95 GiB total"),
    ("cuda_caching_allocator", "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU "),
    ("cuda_caching_allocator", "RuntimeError: CUDA out of memory. Tried to allocate more than 1EB memory."),
    (
        "cuda_caching_allocator",
        "RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:838",
    ),
    ("cuda_caching_allocator", "i get cuda out of memory whatever i do"),
    ("cuda_caching_allocator", "显存不足，尝试分配 2.00 GiB"),
    ("cuda_caching_allocator", LIMIT.format(free="0 bytes", allocated="9.58 GiB")),
    ("per_process_limit", LIMIT.format(free="12.00 GiB", allocated="9.58 GiB")),
    ("per_process_limit", LIMIT.format(free="1.00 GiB", allocated="48.00 GiB")),
    (
        "per_process_limit",
        LIMIT.partition(" GPU")[0].format() + " (GPU 0; 12.00 GiB total capacity; 4.00 GiB already "
        "allocated; 7.00 GiB free; 4.77 GiB allowed; 4.74 GiB reserved in total by PyTorch)",
    ),
    (
        "hip",
        "torch.OutOfMemoryError: HIP out of memory. Tried to allocate 76.00 MiB. GPU 0 has a total capacity",
    ),
    ("hip", "RuntimeError: HIP error: out of memory"),
    ("cuda_async_allocator", ASYNC),
    ("xpu", "RuntimeError: XPU out of memory. Tried to allocate 8.00 GiB (GPU 0; 15.11 GiB total capacity; 5.20 GiB"),
    ("xpu", "RuntimeError: level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    (
        "mps",
        "RuntimeError: MPS backend out of memory (MPS allocated: 14.29 GiB, other allocations: 3.65 GiB, max allowed",
    ),
    ("mps", "RuntimeError: Invalid buffer size: 19.07 GB"),
    ("cublas", "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ("cublas", "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    ("cublas", "RuntimeError: cublas runtime error : resource allocation failed at THCGeneral.cpp:216"),
    ("cudnn", "RuntimeError: cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ("cudnn", "RuntimeError: cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    ("cudnn", "RuntimeError: GET was unable to find an engine to execute this computation"),
    ("nccl", f"{NCCL}Cuda failure 2 'out of memory'"),
    ("nccl", f"{NCCL}Failed to CUDA calloc async 608 bytes"),
    ("cuda_driver", "RuntimeError: CUDA error: out of memory"),
    ("cuda_driver", "torch.AcceleratorError: CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    ("cuda_driver", "RuntimeError: CUDA driver error: out of memory"),
    ("cuda_driver", "RuntimeError: CUDA driver error: invalid argument"),
    ("cuda_driver", "RuntimeError: cuda runtime error (2) : out of memory at /pytorch/THCStorage.cu:58"),
    (
        "cuda_driver",
        "RuntimeError: cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    ),
    ("host_ram", "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 98467840000 bytes."),
    ("host_ram", "MemoryError"),
    (
        "host_ram",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate 12.5 GiB for an array with shape (1677721600,)",
    ),
    ("host_ram", "OSError: [Errno 12] Cannot allocate memory"),
    ("host_ram", "terminate called after throwing an instance of 'std::bad_alloc'"),
    ("host_ram", "OSError: [WinError 1455] The paging file is too small for this operation to complete."),
    ("host_ram", "RuntimeError: CUDA error: out of memory\ncudaHostAlloc failed"),
    ("host_killed", "step 3: loss 9.8\nKilled"),
    ("host_killed", "/bin/bash: line 1:  12345 Killed                  python train.py"),
    ("host_killed", "[1]    12345 killed     python train.py"),
    ("host_killed", "command terminated with exit code 137"),
    (
        "host_killed",
        "failed (exitcode: -9) local_rank: 0 (pid: 123) of binary: /usr/bin/python\nChildFailedError: train.py",
    ),
    ("host_killed", "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=123.0."),
    ("host_killed", "srun: error: gpu01: task 0: Out Of Memory"),
    ("host_killed", "kernel: Out of memory: Killed process 12345 (python) total-vm:123456kB, anon-rss:1234kB"),
    ("host_killed", "Reason:       OOMKilled\nExit Code:    137"),
    ("host_killed", "RuntimeError: DataLoader worker (pid 1234) is killed by signal: Killed. "),
    ("shm", "RuntimeError: DataLoader worker (pid 1234) is killed by signal: Bus error."),
    ("shm", "RuntimeError: unable to open shared memory object </torch_123_456> in read-write mode"),
    ("shm", "RuntimeError: unable to write to file </torch_123_456>: No space left on device (28)"),
    (
        "triton_shared_memory",
        "No valid triton configs. OutOfMemoryError: out of resource: triton_mm Required: 147456 "
        "Hardware limit:101376 Reducing block sizes or `num_stages` may help.",
    ),
)
# What it is instead, in the explanation.
FRIENDS = (
    ("illegal", "RuntimeError: CUDA error: an illegal memory access was encountered", "outside its tensors"),
    ("assert", "RuntimeError: CUDA error: device-side assert triggered", "out of range"),
    (
        "cublas after an assert",
        f"{ASSERTION}\nRuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when",
        "out of range",
    ),
    ("mentioned", "I get CUDA out of memory?\nRuntimeError: CUDA error: device-side assert triggered", "out of range"),
    ("cublas", "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(`", "shapes"),
    ("cudnn", "RuntimeError: cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. non-contiguous input", "strides"),
    (
        "architecture",
        "RuntimeError: CUDA error: no kernel image is available for execution on the device",
        "architecture",
    ),
    ("argument", "RuntimeError: CUDA error: invalid argument", "launched with sizes"),
    ("nccl", "ncclInvalidArgument: Invalid value for an argument.", "NCCL was called wrongly"),
    ("nccl timeout", "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12", "lost a peer"),
    ("first error", "KeyError: 'x'\n[Rank 1] Watchdog caught collective operation timeout", "KeyError: 'x'"),
    ("sigterm", "torch.distributed.elastic.multiprocessing.api.SignalException: Process 123 got signal: 15", "SIGTERM"),
    (
        "own error",
        "ValueError: y\nSending process 1 closing signal SIGTERM\nforcefully exiting via Signals.SIGKILL",
        "ValueError: y",
    ),
    ("slurm", "slurmstepd: error: *** JOB 123 ON gpu01 CANCELLED AT 2026-07-12 DUE TO TIME LIMIT ***", "time limit"),
    ("disk", "OSError: [Errno 28] No space left on device", "disk"),
    ("files", "OSError: [Errno 24] Too many open files", "ulimit -n"),
    ("segfault", "Segmentation fault (core dumped)", "segmentation fault"),
    ("launcher", "ChildFailedError: train.py FAILED\nexitcode : 1", "the worker's own error"),
    ("python", "Traceback (most recent call last):\nKeyError: 'meta'", "KeyError: 'meta'"),
    ("nothing", "training went fine, loss 2.3", "nothing in it speaks of memory"),
)


@pytest.mark.parametrize(("kind", "text"), WORDINGS)
def test_a_wording_means_its_kind(kind, text):
    facts = read_paste(text)
    assert (facts.kind, facts.explanation) == (kind, "")
    assert facts.wording


@pytest.mark.parametrize(("text", "why"), [row[1:] for row in FRIENDS], ids=[row[0] for row in FRIENDS])
def test_what_is_taken_for_a_lack_of_memory_is_told_for_what_it_is(text, why):
    facts = read_paste(text)
    assert facts.kind == "not_oom"
    assert why in facts.explanation


def test_every_kind_has_a_wording_here_and_every_rule_a_known_kind():
    assert {kind for kind, _ in WORDINGS} | {"not_oom"} == set(KINDS)
    assert {rule.kind for rule in RULES} <= set(KINDS)
    assert all(rule.explanation for rule in RULES if rule.kind == "not_oom")


def test_the_asynchronous_allocator_prints_a_table():
    facts = read_paste(ASYNC)
    figures = facts.tried_bytes, facts.allocated_bytes, facts.total_bytes, facts.free_bytes, facts.device_index
    assert figures == (4 * GiB, 22.5 * GiB, 24 * GiB, 0, 1)
    assert facts.allowed_bytes is None, "17179869184.00 GiB means that no limit is set"


def test_mps_prints_gb_and_means_gib():
    text = (
        "MPS backend out of memory (MPS allocated: 11.00 GB, other allocations: 6.65 GB, max allowed: 18.00 GB). Tried "
    )
    facts = read_paste(text + "to allocate 512.00 MB on private pool. Use PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0")
    assert (facts.allocated_bytes, facts.allowed_bytes, facts.tried_bytes) == (11 * GiB, 18 * GiB, GiB // 2)
    assert facts.total_bytes is facts.other_processes_bytes is None


def test_torch_2_3_stopped_after_gpu_or_printed_the_number_as_a_character():
    start = "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU"
    cut = read_paste(start + " \x00")
    assert (cut.wording, cut.tried_bytes, cut.device_index) == ("torch2.3", 20 << 20, None)
    assert cut.total_bytes is cut.free_bytes is cut.other_processes_bytes is None
    assert any("torch 2.3" in note for note in cut.notes)
    for number in ("\x01", "^A"):
        whole = read_paste(
            f"{start} {number} has a total capacity of 8.00 GiB of which 1.00 GiB is free. Of the allocated"
        )
        assert (whole.device_index, whole.total_bytes) == (1, 8 * GiB)


def test_a_driver_that_does_not_tell_is_not_believed():
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB of which 0 bytes "
    text += "is free. {} Of the allocated memory 13.50 GiB is allocated by PyTorch, and 1.00 MiB is reserved"
    own = read_paste(text.format("Including non-PyTorch memory, this process has 17179869184.00 GiB memory in use."))
    other = read_paste(text.format("Process 31 has 17179869184.00 GiB memory in use."))
    assert (own.process_bytes, own.other_processes_bytes, own.free_bytes) == (None, 0, 0)
    assert (other.process_bytes, other.other_processes_bytes) == (None, None)
    assert all(any("WSL" in note for note in facts.notes) for facts in (own, other))


def test_two_words_that_claim_one_figure_lose_it():
    """A line of the message is missing: "total capacity of 1", "78.00 MiB is free"."""
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1\n78.00 MiB is free."
    facts = read_paste(text)
    assert (facts.tried_bytes, facts.total_bytes, facts.free_bytes) == (2 * GiB, None, None)


@pytest.mark.parametrize(
    "text",
    [
        "cuda out of memory tried to allocate 2.50gb gpu 1 24 gib total capacity 21.5 gib already allocated 737m free",
        "CUDA OOM, tried to allocate 2,50 GiB (GPU 1, 24.00 GiB total capacity, 21.50 GiB allocated, 737 MB free)",
        "tried allocating 2.5 GB, gpu 1: 24 GB total, 21.5 GB allocated, 737 MB free",
    ],
)
def test_what_was_typed_by_hand_is_read_too(text):
    facts = read_paste(text)
    figures = facts.tried_bytes, facts.total_bytes, facts.allocated_bytes, facts.free_bytes, facts.device_index
    assert figures == (2.5 * GiB, 24 * GiB, 21.5 * GiB, 737 << 20, 1)
