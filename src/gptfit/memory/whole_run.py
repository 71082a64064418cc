"""A whole run's phases, each with its peak: what comes before, between and after steady steps may decide, too."""

from gptfit.config import RunConfig, derive
from gptfit.memory.autograd import Writer
from gptfit.memory.step import PROGRAMS, Pieces, batch_buffers, first_steps, steady_step
from gptfit.memory.tape import Event, Item, Tape


def run_phases(run: RunConfig, program: str, p: Pieces) -> tuple[tuple[str, int], ...]:
    """Live bytes at the peak of each phase, in the order in which a run meets them. `p` are pieces of a whole run."""
    peaks = {
        "loading a checkpoint": Tape(loading(program, p)),
        "evaluation": evaluation(p),
        "first step": first_steps(derive(run, eval_interval=0) if run.eval_interval else run, p, n_steps=1),
        "steady step": steady_step(run, p),
        "sampling": Tape([*standing(p), *sampling(run, program)]),
        "saving a checkpoint": Tape(standing(p)),  # tensors are copied to the host one by one
    }
    return tuple((name, tape.peak().live_bytes) for name, tape in peaks.items())


def short_run(run: RunConfig, p: Pieces) -> Tape:
    """A run's first steps and the evaluation after them, when the optimizer's state is there, too."""
    return Tape([*first_steps(run, p, n_steps=4).items, *(p.evaluation if run.eval_interval else [])])


def evaluation(p: Pieces) -> Tape:
    """An evaluation between two steps: parameters, optimizer state and the batch are alive."""
    return Tape([*standing(p), *p.evaluation])


def evaluation_bytes(p: Pieces) -> int:
    """Live bytes at its peak."""
    return evaluation(p).peak().live_bytes


def standing(p: Pieces) -> list[Item]:
    """What is alive between two steps."""
    return [*p.parameter_items, *p.states, *p.batch, *p.kept]


def loading(program: str, p: Pieces) -> list[Item]:
    """nanoGPT's train.py loads a checkpoint onto the GPU, where its weights are beside the model's for a while, its
    optimizer's states are taken over; gptfit loads it on the CPU."""
    twice = []
    if program == "nanogpt":
        twice = [
            Event(1, param.buffer._replace(name=f"{param.name} of the checkpoint"))
            for param in p.parameters
            for _ in range(param.count)
        ]
    return [*p.parameter_items, *p.states, *twice]


def sampling(run: RunConfig, program: str) -> list[Item]:
    """One token drawn, block_size of them seen: no gradients, not compiled, logits of the last position alone."""
    w = Writer(run.n_layer)
    w.grad_enabled = w.training = False
    one = derive(run, batch_size=1, compile=False, activation_memory_budget=1.0)
    twin = PROGRAMS[program](w, one)
    idx = w.empty(*batch_buffers(one)[0][:4])
    logits, _ = twin.forward(idx, None)
    del logits, idx
    return w.items
