"""A user's own file and the function in it that makes what is traced.

The file is imported and the function called: it is the user's program, run because they asked for it, with all that
it does. Nothing of it is sandboxed. What it prints goes to stderr, as stdout is for the answer.
"""

import contextlib
import functools
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gptfit.config import shown
from gptfit.cudaseen import cuda_is_seen
from gptfit.errors import GptfitError, nearest
from gptfit.named import FORM, function_in
from gptfit.recorder import tensors_in

RETURNS = "return (module, batch) or a callable that runs one micro-step, and behind it the optimizer if there is one"

# What torch says where code asks for the memory of a tensor that has none, and what to do about it.
REFUSALS = (
    (
        r"data pointer|data_ptr|Pointer argument .* cannot be accessed",
        "a kernel that is launched by hand asks for a tensor's memory, and a trace has none",
        "make the kernel an op with torch.library.custom_op and give it a fake form with register_fake",
    ),
    (
        r"no fake impl|fake impl registered|Meta tensors|meta kernel",
        "it has no fake kernel",
        "register one with torch.library.register_fake",
    ),
    (
        r"\.numpy\(\) is not supported|convert .* to numpy",
        "the values of a tensor go to numpy, and a trace has none",
        "write the step so that it stays in torch",
    ),
    (
        r"No module named 'triton|active drivers",
        "its kernels need Triton and a GPU, and a trace runs without them",
        "import them where the step needs them, and let the factory take a form in plain torch",
    ),
    (
        r"NCCL|process group has not been init",
        "the code sets up several processes, and a trace is of one",
        "leave torch.distributed out of the factory: the module without DistributedDataParallel or FSDP around it",
    ),
    (
        r"CUDA_HOME|\bnvcc\b|\bninja\b|Error building extension",
        "it builds a kernel of its own, which needs CUDA's compiler",
        "build it where a GPU is, and let the factory take a form in plain torch",
    ),
    (
        r"FlexAttention",
        "flex_attention runs as a kernel that is compiled for a GPU",
        "let the factory take scaled_dot_product_attention, which keeps as much",
    ),
    (
        r"SparseTensorImpl|sparse tensor",
        "a sparse tensor has as many entries as its values say, and a trace has none",
        "let the factory take dense gradients (sparse=False), which need more",
    ),
    (
        r"not compiled with CUDA|no NVIDIA driver|No CUDA GPUs",
        "the code asks CUDA itself, and a trace runs without it",
        'leave torch.cuda out of the factory; tensors and modules may be put on "cuda"',
    ),
)

# How far a callable is searched for modules: a partial of a function that closes over a list of them.
MAX_DEPTH = 3


@dataclass(frozen=True, slots=True)
class Factory:
    """A function of a user's file, and the names of the arguments that it takes."""

    path: Path
    name: str
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    required: tuple[str, ...]
    defaults: Mapping[str, Any]

    def __call__(self, **arguments: Any) -> "Made":
        """Calls the function, and sorts what it returns.

        Raises GptfitError where an argument is missing, and for what is neither of the forms that can be traced.
        """
        missing = [name for name in self.required if name not in arguments]
        if missing:
            raise GptfitError(
                f"{self.name}() in {self.path.name} has to be told {', '.join(missing)}",
                f"give {'it' if len(missing) == 1 else 'them'} as {' '.join(f'{name}=VALUE' for name in missing)}",
            )
        return sort_out(self.function(**arguments), f"{self.name}() in {self.path.name}")


@dataclass(slots=True)
class Made:
    """What a factory returned: a module with a batch, or a callable that runs one micro-step of `model`.

    `optimizers` is empty where it returned none.
    """

    model: nn.Module
    batch: "Sequence[Any] | Mapping[str, Any] | None" = None
    micro_step: Callable[[], Any] | None = None
    optimizers: tuple[Any, ...] = ()


def load_factory(spec: str) -> Factory:
    """The function that `FILE.py:NAME` means. The file is imported, which runs it: it is the user's own code.

    Raises GptfitError for a file or a name that is not there, and for an exception in the file.
    """
    path, name = function_in(spec)
    with users_code(path):
        module = import_file(path)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        what = "is not a function" if hasattr(module, name) else "is not in it"
        choices = f"; it has {', '.join(own[:5])}" if own else ""
        raise GptfitError(f"{path.name}: {name} {what}{nearest(name, own) or choices}", FORM)
    return Factory(path, name, function, *arguments_of(function))


def import_file(path: Path) -> Any:
    name = f"gptfit_traced_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise GptfitError(f"{path.name} is not a Python file", FORM)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def arguments_of(function: Callable[..., Any]) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, Any]]:
    """Names that can be given by keyword, those that must be, and the defaults of the others."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a callable written in C
        return (), (), {}
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = tuple(p.name for p in named if p.default is p.empty)
    return tuple(p.name for p in named), required, {p.name: p.default for p in named if p.default is not p.empty}


@contextlib.contextmanager
def users_code(path: Path) -> Iterator[None]:
    """Runs a user's code as `python FILE.py` would find its imports; whatever it raises becomes one line.

    Raises GptfitError with the exception's type, its message and the line of the user's file.
    """
    sys.path.insert(0, str(path.parent))
    try:
        with contextlib.redirect_stdout(sys.stderr), cuda_is_seen():
            yield
    except GptfitError as error:
        where = line_of(error, path) or (line_of(error.__cause__, path) if error.__cause__ else "")
        raise GptfitError(f"{where}: {error.message}" if where else error.message, error.hint) from error
    except (Exception, SystemExit) as error:
        raise GptfitError(*explanation(error, line_of(error, path) or path.name)) from error
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(path.parent))


def line_of(error: BaseException, path: Path) -> str:
    """`train.py line 12`: the innermost place in the user's files that `error` came through, or an empty string."""
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{Path(error.filename).name} line {error.lineno}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if path.parent in Path(frame.filename).parents and "site-packages" not in frame.filename
    ]
    return f"{Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""


def explanation(error: BaseException, where: str) -> tuple[str, str]:
    """Message and hint for an exception that came out of the user's code."""
    text = " ".join(str(error).split())
    for pattern, what, hint in REFUSALS:
        if re.search(pattern, text, re.IGNORECASE):
            op = re.search(r"\b\w+::\w+(?:\.\w+)?", text)
            return f"{where}: cannot trace {op.group(0) if op else 'this step'}: {what}", hint
    message = shown(text, 200)
    root = root_of(error)
    if root is not error:
        message = f"{message}, because of {type(root).__name__}: {shown(' '.join(str(root).split()), 100)}"
    hint = "the file's own code raises it; --debug shows the whole traceback"
    return f"{where}: {type(error).__name__}{': ' if message else ''}{message}", hint


def root_of(error: BaseException) -> BaseException:
    """The first of the exceptions that `error` was raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def sort_out(result: Any, who: str) -> Made:
    """What `who`, a factory, returned, part by part: batches and optimizers in any order behind module or callable.

    Raises GptfitError for anything that cannot be traced.
    """
    first, *rest = result if isinstance(result, tuple) and result else (result,)
    optimizers: list[Any] = []
    modules: list[nn.Module] = []
    batch: list[Any] = []
    for part in rest:
        steppers = part if isinstance(part, list | tuple) and part and all(map(is_optimizer, part)) else [part]
        if all(map(is_optimizer, steppers)):
            optimizers += steppers
        elif isinstance(part, nn.Module):
            modules.append(part)
        elif part is not None:
            batch.append(part)
    if isinstance(first, nn.Module) and batch and not modules:
        own = batch[0] if len(batch) == 1 and isinstance(batch[0], Mapping | list | tuple) else batch
        if any(True for _ in tensors_in(list(own.values()) if isinstance(own, Mapping) else own)):
            return Made(first, dict(own) if isinstance(own, Mapping) else tuple(own), None, tuple(optimizers))
    elif callable(first) and not isinstance(first, nn.Module) and not batch:
        modules = modules or modules_of(first)
        if not modules and not optimizers:
            raise GptfitError(
                f"the callable that {who} returned holds no module", "return (callable, module), or with its optimizer"
            )
        return Made(together(modules, optimizers), None, first, tuple(optimizers))
    kinds = ", ".join(type(part).__name__ for part in (first, *rest))
    raise GptfitError(f"{who} returned ({kinds}), which cannot be traced", RETURNS)


def is_optimizer(value: Any) -> bool:
    """Whether `value` steps like one of torch's, or like a class of the user's own."""
    return callable(getattr(value, "step", None)) and (
        hasattr(value, "param_groups") or callable(getattr(value, "zero_grad", None))
    )


def modules_of(function: Any) -> list[nn.Module]:
    """Modules that a callable holds: as an object, in its closure, or in what functools.partial has bound. Those
    inside another one are left out."""
    found: dict[nn.Module, None] = {}
    todo = [(function, 0)]
    while todo:
        value, depth = todo.pop(0)
        if isinstance(value, nn.Module):
            found[value] = None
        elif depth < MAX_DEPTH:
            todo += [(part, depth + 1) for part in parts_of(value, depth == 0)]
    inner = {part for module in found for part in module.modules() if part is not module}
    return [module for module in found if module not in inner]


def parts_of(value: Any, is_first: bool) -> Iterable[Any]:
    """What a callable or a container refers to. Other objects are not searched, but for the callable itself."""
    if isinstance(value, functools.partial):
        return (value.func, *value.args, *value.keywords.values())
    if inspect.ismethod(value):
        return (value.__self__, *vars(value.__self__).values(), value.__func__)
    if inspect.isfunction(value):
        seen = inspect.getclosurevars(value)
        return (*seen.nonlocals.values(), *seen.globals.values())
    if type(value) in (list, tuple, dict):
        return value.values() if isinstance(value, dict) else value
    return vars(value).values() if is_first and hasattr(value, "__dict__") else ()


def together(modules: Sequence[nn.Module], optimizers: Sequence[Any]) -> nn.Module:
    """One module of all that is trained: the one there is, several as a list, or an optimizer's parameters alone."""
    if len(modules) == 1:
        return modules[0]
    if modules:
        return nn.ModuleList(modules)
    holder = nn.Module()
    parameters = [
        p for optimizer in optimizers for group in getattr(optimizer, "param_groups", ()) for p in group["params"]
    ]
    for index, parameter in enumerate(dict.fromkeys(parameters)):
        holder.register_parameter(f"parameter {index}", parameter)
    return holder
