"""Which error a text is about. The first rule that is found decides; CUDA's own allocator comes first, as its
message often stands beside others that follow from it."""

import re

# kind, wording, pattern on the text without white space, explanation for what is no out-of-memory error.
RULES: tuple[tuple[str, str, str, str], ...] = (
    ("mps", "mps", r"mpsbackendoutofmemory", ""),
    ("xpu", "xpu", r"xpuoutofmemory", ""),
    ("hip", "hip", r"hipoutofmemory|hiperror:?outofmemory|hiperroroutofmemory", ""),
    (
        "cuda_async_allocator",
        "cudaMallocAsync",
        r"allocationondevice\d?wouldexceedallowedmemory|cudamallocasync.{0,80}outofmemory",
        "",
    ),
    (
        "per_process_limit",
        "memory fraction",
        r"preemptiv\w{0,6}reject|exceed\w{0,4}theallowedmemory|per_process_memory_fraction.{0,60}exceed",
        "",
    ),
    (
        "cuda_caching_allocator",
        "",
        r"cudaoutofmemory\.?(?!.{0,3}$)|triedtoallocate[\d.]{1,18}[kmgt]?i?b.{0,40}gpu|morethan1ebmemory",
        "",
    ),
    ("triton_shared_memory", "triton", r"outofresources?:sharedmemory|triton.{0,60}outofresources", ""),
    (
        "shm",
        "shm",
        r"insufficientsharedmemory|buserror|/dev/shm|unabletoopensharedmemory|nospaceleftondevice.{0,60}shm",
        "",
    ),
    ("nccl", "nccl", r"nccl.{0,120}(?:outofmemory|failedtocudacalloc)|failedtocudacalloc", ""),
    ("cublas", "cublas", r"cublas_status_(?:alloc_failed|not_initialized)", ""),
    (
        "cudnn",
        "cudnn",
        r"cudnn_status_(?:alloc_failed|not_initialized|internal_error)|unabletofindavalidcudnnalgorithm|"
        r"cudnn.{0,40}unabletofindanengine",
        "",
    ),
    (
        "not_oom",
        "",
        r"device-sideasserttriggered",
        "a kernel's assertion failed on the GPU: mostly a token id or class index out of "
        "range. Run once with CUDA_LAUNCH_BLOCKING=1, or on the CPU, to see which",
    ),
    (
        "not_oom",
        "",
        r"illegalmemoryaccess|misalignedaddress",
        "a kernel read or wrote outside its tensors: a bug in a kernel or an "
        "index, not a lack of memory. CUDA_LAUNCH_BLOCKING=1 shows where",
    ),
    (
        "host_ram",
        "host",
        r"defaultcpuallocator|cannotallocatememory|can'tallocatememory|memoryerror|unabletoallocate[\d.]{1,12}[kmgt]ib|"
        r"std::bad_alloc|cudahostalloc.{0,60}outofmemory|arraymemoryerror",
        "",
    ),
    (
        "cuda_driver",
        "driver",
        r"cudaerror:outofmemory|cudadrivererror:(?:outofmemory|invalidargument)|cuda_error_out_of_memory|"
        r"cudaerrormemoryallocation|nvml_success==|acceleratorerror.{0,60}outofmemory|cudaoutofmemory",
        "",
    ),
    (
        "host_killed",
        "killed",
        r"oom-kill|oomkilled|outofmemory:killedprocess|exitcode:?(?:137|-9)|signal9|sigkill|returncode-9|"
        r"exitstatus137|\(killed\)",
        "",
    ),
    (
        "not_oom",
        "",
        r"ncclinvalidargument|ncclinvalidusage|ncclunhandledsystemerror|ncclsystemerror|ncclremoteerror",
        "NCCL was called wrongly or lost a peer; memory is not the matter",
    ),
    (
        "not_oom",
        "",
        r"sigterm|signal15",
        "the process was told to end (SIGTERM): a scheduler's time limit or a person, not memory",
    ),
    (
        "not_oom",
        "",
        r"outofbounds|indexerror|keyerror|valueerror|typeerror|assertionerror|filenotfounderror|modulenotfounderror|"
        r"importerror|attributeerror|nameerror|syntaxerror|zerodivisionerror|notimplementederror",
        "an ordinary Python error: its last line says what is wrong",
    ),
    ("cuda_caching_allocator", "", r"outofmemory|triedtoallocate", ""),
)
_RULES = tuple((kind, wording, re.compile(pattern), why) for kind, wording, pattern, why in RULES)
_KILLED = re.compile(r"^\s*(?:\S{1,80}:\s?line\s\d{1,6}:\s+\d{1,9}\s)?Killed\b")


def kind_of(lines: list[str]) -> tuple[str, str, str]:
    """kind, wording ("" where the figures' wording tells the version), and what it is instead of an OOM."""
    text = re.sub(r"\s+", "", "".join(line[:4000] for line in lines)).lower()[:400_000]
    for kind, wording, pattern, why in _RULES:
        if pattern.search(text):
            return kind, wording, why
        if kind == "host_ram" and any(_KILLED.match(line) for line in lines):
            return "host_killed", "killed", ""
    return "not_oom", "", "nothing in it speaks of memory"
