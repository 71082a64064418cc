"""What --print writes is what a shell and Slurm take."""

import shlex
import subprocess

import pytest

from gptfit.asked import Asked
from gptfit.cluster import start_script
from gptfit.config import make_run
from gptfit.errors import GptfitError


def of(kind: str, n_gpus: int, out: str = "out") -> str:
    asked = Asked("gpt2", (f"n_gpus={n_gpus}", "strategy=fsdp"))
    return start_script(kind, asked, make_run({"n_gpus": n_gpus, "gradient_accumulation_steps": n_gpus}), out)


def test_a_torchrun_line_starts_a_process_for_each_gpu():
    words = shlex.split(of("torchrun", 4))
    assert words[:3] == ["torchrun", "--standalone", "--nproc_per_node=4"]
    assert words[3:] == ["-m", "gptfit", "train", "gpt2", "n_gpus=4", "strategy=fsdp", "--out", "out"]


@pytest.mark.parametrize(("n_gpus", "nodes", "per_node"), [(1, 1, 1), (6, 1, 6), (8, 1, 8), (32, 4, 8)])
def test_a_slurm_script_asks_for_as_many_gpus_as_it_starts_processes(n_gpus, nodes, per_node):
    script = of("slurm", n_gpus)
    assert f"--nodes={nodes}\n" in script and f"--gpus-per-node={per_node}\n" in script
    assert f"--nnodes={nodes} --nproc_per_node={per_node} " in script and nodes * per_node == n_gpus
    assert max(len(line) for line in script.splitlines()) <= 80


@pytest.mark.parametrize("saved", ["", "checkpoint-00000005.pt", "checkpoint-00000005/plain.pt"])
def test_the_script_runs_and_goes_on_where_there_is_a_checkpoint(tmp_path, saved):
    """By bash, with Slurm's commands replaced by an echo."""
    out = tmp_path / "my run"
    out.mkdir()
    if saved:
        (out / saved).parent.mkdir(exist_ok=True)
        (out / saved).touch()
    fake = 'scontrol() { echo node7; }; srun() { printf "%s\\n" "$@"; }; SLURM_JOB_ID=11\n'
    done = subprocess.run(["bash", "-euc", fake + "SLURM_JOB_NODELIST=node[7-8]\n" + of("slurm", 16, str(out))],
                          capture_output=True, text=True)  # fmt: skip
    words = done.stdout.splitlines()
    assert words[0] == "torchrun" and "--rdzv_endpoint=node7:29500" in words and "--rdzv_id=11" in words
    assert words[words.index("--out") + 1] == str(out)
    assert ("--resume" in words) == bool(saved)


def test_what_cannot_be_started_is_said():
    with pytest.raises(GptfitError, match=r'cannot print "slum"; did you mean slurm\?'):
        of("slum", 2)
    with pytest.raises(GptfitError, match="n_gpus=16: expected up to 8 for one machine"):
        of("torchrun", 16)
    with pytest.raises(GptfitError, match=r"n_gpus=12: .* or a multiple of 8"):
        of("slurm", 12)
