"""How to start a run on several GPUs, in words for a shell: a torchrun line, or a Slurm script around it."""

import shlex
from pathlib import Path

from gptfit.asked import Asked
from gptfit.config import RunConfig
from gptfit.errors import GptfitError, nearest

GPUS_PER_NODE = 8
KINDS = ("torchrun", "slurm")

# SIGTERM two minutes before the time is up: the run ends its step and saves; the same script goes on from there.
SLURM = """\
#!/bin/bash
#SBATCH --job-name=gptfit
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
{note}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=
if ls {out}/checkpoint-* > /dev/null 2>&1; then resume=--resume; fi
srun torchrun --nnodes={nodes} --nproc_per_node={per_node} \\
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d \\
    --rdzv_endpoint="$head:29500" \\
    -m {command} $resume
"""


# Of fsdp over several nodes.
NOTE = """\
# strategy=fsdp sends parameters between nodes in every micro-batch. hsdp shards
# within a node and sends gradients once a step: gptfit estimate says if it fits
"""


def start_script(kind: str, asked: Asked, run: RunConfig, out: str) -> str:
    """What starts `run` on its `n_gpus`, as a torchrun line (one machine) or a Slurm script.

    Raises GptfitError for another kind, and for a number of GPUs that fills no whole machines of GPUS_PER_NODE.
    """
    if kind not in KINDS:
        raise GptfitError(f'cannot print "{kind[:60]}"{nearest(kind[:60], KINDS)}', "--print torchrun or --print slurm")
    per_node = run.shard_gpus if run.strategy == "hsdp" else min(run.n_gpus, GPUS_PER_NODE)
    nodes = run.n_gpus // per_node
    if run.n_gpus % per_node or (kind == "torchrun" and nodes > 1):
        raise GptfitError(
            f"n_gpus={run.n_gpus}: expected up to {GPUS_PER_NODE} for one machine"
            + (f", or a multiple of {GPUS_PER_NODE}" if kind == "slurm" else ""),
            f"--print slurm starts several machines, n_gpus={max(1, nodes) * GPUS_PER_NODE} as an example",
        )
    command = asked.gptfit("train", {}, "--out", out)
    if kind == "torchrun":
        return f"torchrun --standalone --nproc_per_node={per_node} -m {command}\n"
    note = NOTE if nodes > 1 and run.strategy == "fsdp" else ""
    return SLURM.format(note=note, nodes=nodes, per_node=per_node, out=shlex.quote(str(Path(out))), command=command)
