"""What the forms of `gptfit serve` ask, answered as pages. It reads nothing of this machine but gptfit's own files.

`python -m gptfit.answers` answers one question from stdin, so that one that takes too long can be ended.
"""

import json
import sys
from collections.abc import Mapping

from gptfit.asked import Asked
from gptfit.card import find_card
from gptfit.door import PASTED, read_given
from gptfit.errors import GptfitError, nearest
from gptfit.gpus import gpu_names, load_gpu
from gptfit.options import options_of, program_of
from gptfit.presets import DEFAULT_PRESET, preset_names
from gptfit.report.html_forms import HOME, message_page, oom_page, start_page
from gptfit.report.html_parts import Html

OK, BAD_REQUEST, INTERNAL = 200, 400, 500
MOST_WORDS = 100


def answer(path: str, fields: Mapping[str, str]) -> tuple[int, Html]:
    """The HTTP status and the page for the form at `path`. An error is said above the form, filled in as it was."""
    try:
        return OK, explained(fields) if path == "/oom" else fitted(fields)
    except GptfitError as error:
        return BAD_REQUEST, home(fields, error)
    except Exception as error:
        text = " ".join(f"internal error: {type(error).__name__}: {error}".split())[:500]
        return INTERNAL, message_page(text, "please report it, with what was asked")


def home(fields: Mapping[str, str] | None = None, error: GptfitError | None = None) -> Html:
    """The page of both forms."""
    said = (error.message, error.hint) if error else None
    names = [(name, name) for name in gpu_names()]
    return start_page(names, [(name, name) for name in preset_names()], fields, said)


def explained(fields: Mapping[str, str]) -> Html:
    """As `gptfit explain-oom`. Raises GptfitError where there is no text, or a key cannot be read."""
    from gptfit.logfile import excerpt
    from gptfit.oom.diagnose import diagnose
    from gptfit.oom.failed_run import failed_run
    from gptfit.oom.read import read_paste

    text, words = fields.get("paste", ""), words_of(fields.get("run", ""))
    if not text.strip():
        raise GptfitError("there is no text to explain", "paste the traceback, or the end of the log")
    if starts := [word for word in words if "init" in word.partition("=")[0]]:
        raise GptfitError(f'"{starts[0][:60]}" is not read here', "n_layer=12 n_embd=768 tell the model's shape")
    facts = read_paste(excerpt([text.encode("utf-8", "replace")]).decode("utf-8", "replace"))
    return oom_page(diagnose(facts, failed_run(facts, None, words)))


def fitted(fields: Mapping[str, str]) -> Html:
    """As `gptfit plan --html`, or `estimate --html`. Raises GptfitError as they do."""
    from gptfit.estimate import estimate
    from gptfit.plan import plan
    from gptfit.report.html import estimate_page, plan_page

    words, pasted = words_of(fields.get("keys", "")), fields.get("pasted", "")
    preset = fields.get("preset", "") or DEFAULT_PRESET
    source = read_given(preset, words, pasted)
    program = fields.get("program", "").strip() or None
    gpu, reserve = fields.get("gpu", "").strip() or None, fields.get("reserve", "").strip() or None
    if gpu not in (None, "auto"):
        gpu = load_gpu(gpu).name
    card = find_card(gpu, reserve) if gpu else None
    what = fields.get("what", "plan")
    asked = Asked(PASTED if pasted.strip() else preset, words)
    options = options_of(gpu=card.profile.name if card else None, program=program, reserve=reserve)
    typed = asked.gptfit(what if what == "estimate" else "plan", {}, *options)
    name = program_of(program, source)
    if what == "estimate":
        on_card = (card.profile, card.reserve_bytes) if card else (None, 0)
        return estimate_page(estimate(source.run, name, *on_card), source, card, typed, HOME)
    if card is None:
        raise GptfitError("a plan is for a card, and none is chosen", "choose one, or ask for the estimate")
    from dataclasses import replace

    source = replace(source, program=name)
    return plan_page(plan(source, card.profile, card.reserve_bytes), source, card, typed, HOME)


def words_of(text: str) -> tuple[str, ...]:
    """KEY=VALUE words. Raises GptfitError for another word: a path, a preset, half an assignment."""
    words = tuple(text.split())
    for word in words:
        if "=" not in word:
            raise GptfitError(f'"{word[:60]}" is no KEY=VALUE{nearest(word[:60], preset_names(), 1)}',
                              "a file is not read here: paste its text, or choose a model")  # fmt: skip
    if len(words) > MOST_WORDS:
        raise GptfitError(f"{len(words)} changes are more than {MOST_WORDS}", "paste a config instead")
    return words


def main() -> None:
    """One question as JSON on stdin; the status on the first line of stdout, then the page."""
    asked = json.loads(sys.stdin.buffer.read())
    status, page = answer(asked["path"], asked["fields"])
    sys.stdout.buffer.write(f"{status}\n{page}".encode(errors="replace"))


if __name__ == "__main__":
    main()
