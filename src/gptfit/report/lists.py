"""The shorter views: presets, cards, a replay, a verification, an explained out-of-memory error."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from gptfit.report.plans import levers_view
from gptfit.report.terminal import BAD, GOOD, QUIET, commands, headline, live_rows, margin_text, table, title
from gptfit.units import format_bytes, format_mib

if TYPE_CHECKING:
    from gptfit.estimate import Estimate
    from gptfit.gpus import GpuProfile
    from gptfit.levers import LeverEffect
    from gptfit.oom.diagnose import Diagnosis
    from gptfit.prepare import Prepared
    from gptfit.presets import Preset
    from gptfit.verify import Verification


def models_view(presets: Iterable[tuple["Preset", int]]) -> Iterator[RenderableType]:
    """Presets with their number of parameters."""
    rows = []
    for preset, n_params in presets:
        run = preset.run
        shape = f"{run.n_layer} × {run.n_embd}"
        rows.append((preset.name, f"{n_params / 1e6:,.1f} M", shape, f"{run.block_size}", preset.title))
    yield table(("model", "parameters", "layers × width", "block", "what"), rows, right=("parameters", "block"))
    yield from commands(("gptfit plan gpt2-medium --gpu rtx4070",))


def models_json(presets: Iterable[tuple["Preset", int]]) -> dict[str, object]:
    """The object that `gptfit models --json` prints."""
    return {
        "schema": "gptfit.models/1",
        "models": [
            {"name": preset.name, "title": preset.title, "source": preset.source, "n_params": n_params, **preset.values}
            for preset, n_params in presets
        ],
    }


def gpus_view(profiles: Iterable["GpuProfile"]) -> Iterator[RenderableType]:
    """Cards with the memory that PyTorch sees on them."""
    rows = [(card.name, format_bytes(card.total_bytes), card.compute_capability, card.title) for card in profiles]
    yield table(("name", "memory", "cc", "card"), rows, right=("memory", "cc"))
    yield from commands(("gptfit gpus rtx4070", "gptfit plan --gpu rtx4070"))


def gpu_view(profile: "GpuProfile") -> Iterator[RenderableType]:
    """One card's figures, each with its source."""
    yield Text(f"{profile.title} ({profile.name}), compute capability {profile.compute_capability}", style="bold")
    rows = []
    for key, source in profile.sources.items():
        value = getattr(profile, key)
        rows.append((key, figure_text(key, value), source))
    yield table(("", " ", "source"), rows)
    yield from commands((f"gptfit plan --gpu {profile.name}",))


def figure_text(key: str, value: object) -> str:
    """A figure of a profile with its unit."""
    if isinstance(value, int) and key.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, float):
        return f"{value:.4g} {'bytes/s' if key.endswith('_per_second') else ''}".rstrip()
    if isinstance(value, int):
        return f"{value}"
    rates = dict(value) if isinstance(value, Iterable) else {}
    return "\n".join(f"{name} {rate:.4g}" for name, rate in rates.items() if rate is not None)


def gpus_json(profiles: Iterable["GpuProfile"]) -> dict[str, object]:
    """The object that `gptfit gpus --json` prints."""
    return {"schema": "gptfit.gpus/1", "gpus": [profile.model_dump(mode="json") for profile in profiles]}


def refusal_view(estimate: "Estimate", levers: Sequence["LeverEffect"], asked: str) -> Iterator[RenderableType]:
    """Why `gptfit train` does not start, and what would make the run fit."""
    yield headline(estimate.verdict, margin_text(estimate))
    yield Text(f"Its peak is in {estimate.phase} ({estimate.op}); the largest of what is alive then:")
    yield live_rows(estimate, 3)
    enough = [lever for lever in levers if lever.fits]
    yield from levers_view(enough or levers, verbose=False)
    yield from commands((f"{asked} --auto-fit", f"{asked} --force    (train it all the same)"))


def verification_view(answer: "Verification") -> Iterator[RenderableType]:
    """Whether estimate and trace agree, then where they do not."""
    estimated, traced = answer.estimate, answer.traced
    word, style = ("Agrees: ", GOOD) if answer.passed else ("Differs: ", BAD)
    yield Text.assemble(
        (word, style),
        f"estimated {format_bytes(estimated.live_bytes)} live at the peak, traced {format_bytes(traced.live_bytes)} "
        f"({estimated.program}'s code)",
    )
    yield from (Text(f"note: {note}", style=QUIET) for note in answer.notes)
    if answer.differences:
        yield title("Differences")
        rows = [
            (row.name, format_mib(row.estimate_bytes), format_mib(row.traced_bytes), f"{row.delta_bytes:+,}")
            for row in answer.differences
        ]
        right = ("estimate MiB", "traced MiB", "bytes")
        yield table(("what", *right), rows, right=right)


def prepared_view(answer: "Prepared") -> Iterator[RenderableType]:
    """What `gptfit data prepare` wrote."""
    yield Text(
        f"{answer.folder}: {answer.n_train:,} tokens to train on, {answer.n_val:,} to validate, "
        f"from {answer.n_files} files; tokenizer {answer.tokenizer}, {answer.vocab_size:,} ids"
    )
    if answer.skipped:
        yield Text(f"{len(answer.skipped)} files are not text and were passed over", style=QUIET)
    yield from commands((f"gptfit train tiny dataset={answer.folder} vocab_size={-(-answer.vocab_size // 64) * 64}",))


# The figures of a paste that a person looks for, in the order of the message.
FIGURES = (
    ("tried to allocate", "tried_bytes"),
    ("the card", "total_bytes"),
    ("free", "free_bytes"),
    ("this process", "process_bytes"),
    ("other processes", "other_processes_bytes"),
    ("allocated by PyTorch", "allocated_bytes"),
    ("reserved by PyTorch", "reserved_bytes"),
    ("reserved and unused", "reserved_unallocated_bytes"),
)


def diagnosis_view(answer: "Diagnosis") -> Iterator[RenderableType]:
    """What failed and why; then what helps, what does not, and the figures read from the text."""
    yield Text(answer.summary, style="bold")
    if answer.remedies:
        yield title("What helps")
        rows = [
            (
                remedy.change,
                "" if remedy.saves_bytes is None else format_bytes(remedy.saves_bytes),
                {True: "enough", False: "not enough", None: ""}[remedy.enough],
                remedy.why,
            )
            for remedy in answer.remedies
        ]
        yield table(("change", "saves", " ", "why"), rows, right=("saves",))
    if answer.not_remedies:
        yield title("What does not")
        yield table(("change", "why"), [(advice.change, advice.why) for advice in answer.not_remedies])
    read = [(name, getattr(answer.facts, key)) for name, key in FIGURES]
    known = [(name, format_bytes(n_bytes)) for name, n_bytes in read if n_bytes is not None]
    if known:
        yield title("Read from the text")
        yield table(("", " "), known, right=(" ",))
    yield from (Text(f"note: {warning}", style=QUIET) for warning in answer.warnings)
    if answer.estimate is None and answer.facts.kind != "not_oom":
        yield from commands(("gptfit explain-oom FILE --config gpt2 batch_size=12    (says by how much)",))
