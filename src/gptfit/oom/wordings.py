"""The wordings of out-of-memory errors, and of what is taken for one, as text without white space or quotes.

An allocator's own message outranks what follows from it (a failed library call, a killed worker). Sources: the
messages' own code in torch (1.0 to 2.14), CUDA, NCCL, Triton, the Linux kernel, Slurm and Kubernetes.
"""

import re
from dataclasses import dataclass

from gptfit.oom.pattern import lazy

ALLOCATOR, PINNED, FAILED, KILLED, OTHER = range(5)


@dataclass(frozen=True, slots=True)
class Rule:
    """One wording: its rank, the kind it means, its name, and what it is instead for what is no lack of memory."""

    rank: int
    kind: str
    wording: str
    pattern: re.Pattern[str]
    explanation: str = ""
    words: tuple[str, ...] = ()  # one of them is in every text that the pattern finds: it is not tried without


def _rule(rank: int, kind: str, wording: str, pattern: str, explanation: str = "", words: tuple[str, ...] = ()) -> Rule:
    return Rule(rank, kind, wording, lazy(pattern), explanation, words)


_SIZE = r"[\d.,]{1,20}(?:[kmgt]i?b|bytes)"
INDEX = (
    "a token id or a class index out of range, mostly. Run once on the CPU, or with CUDA_LAUNCH_BLOCKING=1, to see it"
)
NCCL_FAULT = "NCCL was called wrongly or lost a peer; the first error of another rank says why"

# An allocator that is not torch's. Its wording is a name in `gptfit.oom.engines`.
_GGML = r"(?:ggml|llama_(?:model_load|new_context|kv_cache|init)|llamarunner)"

RULES: tuple[Rule, ...] = (
    _rule(
        ALLOCATOR,
        "cuda_driver",
        "TPU",
        r"atthebottomofmemory|device=tpu:\d{1,4}:resource_exhausted|inmemoryspacehbm|tpu_execute_op.{0,60}resource_exhausted",
        words=("bottomofmemory", "resource_exhausted", "memoryspacehbm"),
    ),
    _rule(
        ALLOCATOR,
        "host_ram",
        "TensorFlow",
        r"oomwhenallocatingtensor[^|]{0,200}?byallocator(?:cpu|mklcpu)",
        words=("oomwhenallocating",),
    ),
    _rule(
        ALLOCATOR,
        "hip",
        "TensorFlow",
        r"rocm_driver.{0,60}failedtoalloc(?:ate)?\d|fromdevice:hip",
        words=("rocm_driver", "fromdevice:hip"),
    ),
    _rule(
        ALLOCATOR,
        "cuda_driver",
        "TensorFlow",
        r"oomwhenallocatingtensor|dsttensorisnotinitialized|allocator\(gpu_\d{1,2}_bfc\)ranoutofmemory|cuda_driver\.cc:\d{1,5}\]?failedtoallocate"
        r"|tensorflow.{0,80}resourceexhaustederror|failedtoallocate[\d.]{1,12}[kmg]\(\d{1,20}bytes\)fromdevice",
        words=("oomwhenallocating", "dsttensor", "_bfc)", "cuda_driver.cc", "tensorflow", "fromdevice"),
    ),
    _rule(
        ALLOCATOR,
        "cuda_driver",
        "JAX",
        r"resource_?exhausted:(?:outofmemory|failedtoallocate)|xlaruntimeerror:resource_exhausted",
        words=("resource_exhausted", "resourceexhausted"),
    ),
    _rule(
        ALLOCATOR,
        "cuda_driver",
        "PaddlePaddle",
        r"outofmemoryerroron(?:gpu|npu|xpu)|enforceallocating<=available",
        words=("memoryerroron", "enforceallocating"),
    ),
    _rule(
        ALLOCATOR,
        "cuda_driver",
        "llama.cpp",
        rf"{_GGML}.{{0,120}}?(?:cudamallocfailed|outofmemory|unabletoallocate\w{{1,12}}buffer)|outofmemory.{{0,200}}?ggml-?cuda",
        words=("ggml", "llama"),
    ),
    _rule(ALLOCATOR, "cuda_driver", "CuPy", r"cupy.{0,40}outofmemoryerror", words=("cupy",)),
    _rule(
        ALLOCATOR,
        "cuda_driver",
        "ONNX Runtime",
        r"onnxruntime.{0,300}?(?:bfc_?arena|failedtoallocatememory)|availablememoryof\d{1,20}issmallerthanrequestedbytes",
        words=("onnxruntime", "smallerthanrequestedbytes"),
    ),
    _rule(
        ALLOCATOR,
        "cuda_driver",
        "TensorRT",
        r"\[trt\].{0,120}outofmemory|requestedamountofgpumemory\(\d{1,20}bytes\)could",
        words=("[trt]", "requestedamountofgpumemory"),
    ),
    _rule(
        ALLOCATOR, "host_ram", "a Java program's heap", r"java\.lang\.outofmemoryerror|javaheapspace", words=("java",)
    ),
    _rule(
        ALLOCATOR,
        "host_ram",
        "Node.js's heap",
        r"javascriptheapoutofmemory|reachedheaplimit",
        words=("javascriptheap", "reachedheaplimit"),
    ),
    _rule(ALLOCATOR, "mps", "MLX", r"metal::malloc|\[metal\]commandbuffer", words=("metal",)),
    _rule(ALLOCATOR, "mps", "MPS backend out of memory", r"mpsbackendoutofmemory"),
    _rule(
        ALLOCATOR, "mps", "Invalid buffer size", rf"invalidbuffersize:{_SIZE}|kiogpucommandbuffercallbackerroroutofmem"
    ),
    _rule(ALLOCATOR, "xpu", "XPU out of memory", r"xpuoutofmemory"),
    _rule(
        ALLOCATOR,
        "xpu",
        "out of device memory",
        r"ur_result_error_out_of_|pi_error_out_of_|ze_result_error_out_of_|outofdevicememory",
    ),
    _rule(ALLOCATOR, "hip", "HIP out of memory", r"hipoutofmemory"),
    _rule(
        ALLOCATOR,
        "hip",
        "HIP error: out of memory",
        r"hiperror:?outofmemory|hiperroroutofmemory|hsa_status_error_out_of_resources|hipmalloc\w{0,10}failed",
    ),
    _rule(
        ALLOCATOR,
        "cuda_async_allocator",
        "cudaMallocAsync",
        r"allocationondevice\d{0,3}wouldexceed|cudamallocasync.{0,80}outofmemory",
    ),
    _rule(
        ALLOCATOR,
        "per_process_limit",
        "refused in advance",
        r"preemptive(?:ly)?reject|preemptiveoom|rejected(?:by|preemptively).{0,60}throw_on_cudamalloc_oom"
        r"|would\s?exceed.{0,60}per_?process_?memory_?(?:fraction|limit)|hami-core.{0,60}oom\d",
    ),
    _rule(
        ALLOCATOR,
        "cuda_caching_allocator",
        "",
        rf"(?<!you)tr(?:ied|ying)(?:to)?allocat(?:e|ing):?{_SIZE}.{{0,12}}\(?[gn]pu",
    ),
    _rule(ALLOCATOR, "cuda_caching_allocator", "more than 1EB", r"morethan1ebmemory"),
    _rule(ALLOCATOR, "cuda_caching_allocator", "", r"(?:error:|cuda|npu)(?:cuda|npu)?outofmemory[.,:;]?tr(?:ied|ying)"),
    _rule(
        ALLOCATOR, "cuda_caching_allocator", "", r"(?:gpu\d{0,3}hasa?totalcapa|isallocatedbypytorch|alreadyallocated;)"
    ),
    _rule(ALLOCATOR, "cuda_caching_allocator", "", r"error:(?:cuda|npu)outofmemory"),
    _rule(ALLOCATOR, "cuda_caching_allocator", "NVML assertion", r"nvml_success==\w{0,20}internalassert"),
    _rule(
        FAILED,
        "triton_shared_memory",
        "out of resource",
        r"outofresources?:(?:shared|tensor)_?memory|outofresources?:.{1,80}?required:\d{1,9}.{0,4}hardwarelimit|toomuchshareddata",
    ),
    _rule(
        FAILED,
        "shm",
        "shared memory",
        r"insufficientsharedmemory|outofsharedmemory|unabletoopensharedmemory"
        r"|unabletoallocatesharedmemory|unabletowritetofile<?/torch_|unabletommap\d{0,15}bytesfromfile<?/torch_"
        r"|sharedmemorysegment.{0,30}/dev/shm|/dev/shm.{0,120}(?:nospaceleft|full|100%)|nospaceleftondevice.{0,80}/dev/shm"
        r"|buserror|sigbus|raiseyoursharedmemorylimit|(?:exitcode|returncode)[:=]?-7(?!\d)",
    ),
    _rule(
        FAILED,
        "nccl",
        "NCCL out of memory",
        r"cudafailure\d{0,3}outofmemory|failedtocuda(?:host)?calloc|failedtocudamalloc|nccl.{0,120}cuda[\w:]{0,12}outofmemory",
    ),
    _rule(
        FAILED,
        "cublas",
        "CUBLAS_STATUS_ALLOC_FAILED",
        r"cublas_status_alloc_failed|cublas_status_internal_errorwhencallingcublascreate|cublasruntimeerror:(?:resource|library)",
    ),
    _rule(FAILED, "cublas", "CUBLAS_STATUS_NOT_INITIALIZED", r"cublas_status_not_initialized"),
    _rule(
        FAILED,
        "cudnn",
        "cuDNN",
        r"cudnn_status_(?:alloc_failed|not_initialized|internal_error|execution_failed|mapping_error)"
        r"|unabletofindavalidcudnn|(?:get|find)wasunabletofindanengine|nocudnnplan",
    ),
    _rule(
        FAILED,
        "host_ram",
        "DefaultCPUAllocator",
        r"defaultcpuallocator|notenoughmemory:youtriedtoallocate|buynewram",
    ),
    _rule(
        PINNED,
        "host_ram",
        "pinned memory",
        r"cudahostalloc|cudahostregister|hiphostmalloc|failedtoallocatepinned|allocatepinnedhost"
        r"|failedtoalloc(?:ate)?\d{1,20}bytesonhost|inpinmemorythread.{0,1500}cudaerror:outofmemory"
        r"|\.pin_memory\(\)[\^~]{0,80}(?:torch\.)?(?:runtime|accelerator)error:cudaerror:outofmemory",
    ),
    _rule(FAILED, "cuda_caching_allocator", "no batch fits", r"noexecutablebatchsizefound"),
    _rule(FAILED, "cuda_driver", "cuda runtime error (2)", r"cudaruntimeerror\(2\):outofmemory|error=2:outofmemory"),
    _rule(FAILED, "cuda_driver", "bitsandbytes", r"outofmemoryatline\d{1,6}infile"),
    _rule(
        FAILED,
        "per_process_limit",
        "vLLM",
        r"noavailablememoryforthecacheblocks|tokensthatcanbestoredinkvcache|kvcacheisneeded,whichislarger"
        r"|freememoryondevice.{0,80}lessthandesiredgpumemoryutilization",
    ),
    _rule(
        FAILED,
        "host_ram",
        "MemoryError",
        rf"(?<!outof)memoryerror(?!:cuda|:hip|:xpu|:mps)|unabletoallocate{_SIZE}|std::bad_alloc|can(?:no)?tallocatememory"
        r"|\[errno12\]|unabletommap",
    ),
    _rule(FAILED, "host_ram", "paging file", r"winerror1455|pagingfileistoosmall|页面文件太小"),
    _rule(
        FAILED,
        "cuda_driver",
        "CUDA driver error",
        r"cudadrivererror:(?:outofmemory|invalidargument)",
    ),
    _rule(
        FAILED,
        "cuda_driver",
        "CUDA error: out of memory",
        r"cudaerror:?outofmemory|cuda_error_out_of_memory|cudaerrormemoryallocation|cudaruntimeerror\(2\):outofmemory"
        r"|cudafailedwitherroroutofmemory|cudamalloc\w{0,10}failed:?outofmemory|tritonerror\[cuda\]:outofmemory"
        r"|(?:cusolver|cusparse|cufft|curand|cublaslt|cutensor)_?(?:status_)?(?:alloc_failed|allocation_failed)"
        r"|enginecudaoutofmemory",
    ),
    _rule(
        KILLED,
        "host_killed",
        "Ray",
        r"killedduetothenoderunninglowonmemory|killedduetomemorypressure|ray_memory_usage_threshold",
    ),
    _rule(
        KILLED,
        "host_killed",
        "killed",
        r"oom-kill|oom_kill|oomkilled|outofmemory:killed?process|killedprocess\d{1,9}"
        r"|exit(?:ed)?(?:with)?(?:code|status):?[ (]?(?:137|-9)(?!\d)"
        r"|exitcode-?:?(?:137|-9)(?!\d)|returncode[:=]?(?:-9|137)(?!\d)|(?:non-zeroexitstatus|returned)-?:?(?:137|-9)(?!\d)|signal:?9(?!\d)"
        r"|(?<!via)(?<!viasignals\.)sigkill(?!_handler)|killedbysignal:killed"
        r"|cgroupout-of-memory|task\d{1,5}:outofmemory|exceeded(?:job|step)?memorylimit|term_memlimit"
        r"|memory(?:cgroup)?outofmemory|nodewaslowonresource:memory|nodereunninglowonmemory|noderunninglowonmemory"
        r"|kernelappearstohavedied|jobkilled:.{0,20}mem",
    ),
    _rule(
        KILLED,
        "host_killed",
        "a compiler ended",
        r"killedsignalterminatedprogram|diedduetosignal9|internalcompilererror:killed",
    ),
    _rule(
        KILLED,
        "host_killed",
        "a notebook's memory",
        r"usingallavailableram|triedtoallocatemorememorythanisavailable|crashedafterusingallavailable",
    ),
    _rule(
        KILLED,
        "host_killed",
        "a data loader's worker ended",
        r"workerexitedunexpectedly|worker\(pid\(?s?\)?[\d,]{1,60}\)exited",
    ),
    _rule(OTHER, "not_oom", "device-side assert", r"device-sideassert", f"a kernel's check failed on the GPU: {INDEX}"),
    _rule(
        OTHER,
        "not_oom",
        "illegal memory access",
        r"illegalmemoryaccess|cuda_error_illegal_address|misalignedaddress|memoryaccessfaultbygpu",
        "a kernel read or wrote outside its tensors: a wrong index or a kernel's bug. CUDA_LAUNCH_BLOCKING=1 tells",
    ),
    _rule(
        OTHER,
        "not_oom",
        "unspecified launch failure",
        r"unspecifiedlaunchfailure|illegalinstruction|launchtimedout|uncorrectableecc|unknownerror|device_lost|xid\(pci",
        "a kernel or the card failed: a kernel's bug, overheating, or a display's watchdog; dmesg names the Xid",
    ),
    _rule(
        OTHER,
        "not_oom",
        "no kernel for this card",
        r"nokernelimageisavailable|invaliddevicefunction|notcompatiblewiththecurrentpytorch",
        "this build of torch has no kernels for this card: install one built for its architecture",
    ),
    _rule(
        OTHER,
        "not_oom",
        "no usable CUDA device",
        r"invaliddeviceordinal|nocuda-capable|foundnonvidiadriver|driverversionisinsufficient|notcompiledwithcuda"
        r"|drivertoooldfor|nvidiadriveronyoursystemistooold|nogpusareavailable",
        "torch cannot use a CUDA device here: nvidia-smi and torch.cuda.is_available() say more",
    ),
    _rule(
        OTHER,
        "not_oom",
        "cuBLAS",
        r"cublas_status_(?:execution_failed|invalid_value|not_supported|internal_error|arch_mismatch)",
        f"a matrix product was called with shapes or data it cannot take; on a GPU that is {INDEX}",
    ),
    _rule(
        OTHER,
        "not_oom",
        "cuDNN",
        r"cudnn_status_(?:bad_param|not_supported|arch_mismatch|version_mismatch)",
        "cuDNN does not take these shapes, types or strides, or two versions of it are loaded",
    ),
    _rule(
        OTHER,
        "not_oom",
        "invalid argument",
        r"cudaerror:invalid(?:argument|configuration)|invalidconfigurationargument",
        "a kernel was launched with sizes it cannot take: an empty tensor or a very large dimension",
    ),
    _rule(
        OTHER,
        "not_oom",
        "NCCL",
        r"ncclinvalid(?:argument|usage)|ncclsystemerror|ncclunhandled\w{0,6}error|ncclremoteerror|ncclinternalerror"
        r"|cudafailure\d{0,3}(?:invalid|illegal|unspec|peer)|watchdogcaughtcollective|unhandledsystemerror|unhandledcudaerror"
        r"|ncclerror|collectiveoperationtimeout|ncclcommunicatorwasaborted",
        NCCL_FAULT,
    ),
    _rule(
        OTHER,
        "not_oom",
        "time limit",
        r"duetotimelimit|term_runlimit|walltimeexceeded|exceededwalltime",
        "the scheduler's time limit ended the job",
    ),
    _rule(
        OTHER,
        "not_oom",
        "too many open files",
        r"toomanyopenfiles|receivedzeroitemsofancdata|received0itemsofancdata",
        "too many open files: ulimit -n, or torch.multiprocessing.set_sharing_strategy('file_system')",
    ),
    _rule(OTHER, "not_oom", "disk full", r"nospaceleftondevice|diskquotaexceeded", "a disk is full, not a memory"),
    _rule(
        OTHER,
        "not_oom",
        "SIGSEGV",
        r"sigsegv|segmentationfault|exitcode-?:?-11(?!\d)|signal:?11(?!\d)|0xc0000005",
        "a program's own fault (a segmentation fault), in a compiled library mostly",
    ),
    _rule(
        OTHER,
        "not_oom",
        "a data loader's worker was ended",
        r"killedbysignal:(?:terminated|hangup|interrupt)",
        "a data loader's worker was told to end, by a scheduler, a person, or as the main process ended: its error is "
        "further up",
    ),
    _rule(OTHER, "not_oom", "KeyboardInterrupt", r"keyboardinterrupt|sigint", "someone ended it with Ctrl-C"),
)
SIGTERM = _rule(
    OTHER,
    "not_oom",
    "SIGTERM",
    r"sigterm|gotsignal:?15|signal:?15(?!\d)|exitcode-?:?-15(?!\d)|exit(?:code|status):?143|^terminated",
    "the process was told to end (SIGTERM): a time limit, a preemption, or the launcher after another rank's error",
)
LAUNCHER = _rule(
    OTHER,
    "not_oom",
    "launcher's report",
    r"childfailederror|calledprocesserror",
    "only the launcher's report that a worker failed; the worker's own error stands further up in the log",
)
