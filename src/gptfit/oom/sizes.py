"""Sizes that a text tells only by their product: a number of parameters, the tokens of a step."""

from collections.abc import Mapping

from gptfit.oom.read import OomFacts
from gptfit.oom.runkeys import GPT2

# nanoGPT's train.py where neither its config file nor the command line tells.
DEFAULTS = {"batch_size": 12, "block_size": 1024, "gradient_accumulation_steps": 40}


def n_params_of(n_layer: int, n_embd: int, vocab_size: int, bias: bool, block_size: int = 0) -> int:
    """Parameters of a GPT-2 (nanoGPT's model.py); without learned positions where no block_size is given, which is
    what nanoGPT prints."""
    block = 12 * n_embd * n_embd + (13 if bias else 2) * n_embd
    return (vocab_size + block_size) * n_embd + n_layer * block + (2 if bias else 1) * n_embd


def gpt2_of(n_params: int) -> dict[str, object]:
    """The GPT-2 that has so many parameters, printed exactly or as 123.59M; nothing where there is none."""
    within = 0 if n_params % 10_000 else 5_001
    for n_layer, n_head, n_embd in GPT2.values():
        for vocab_size, bias in ((50304, False), (50304, True), (50257, True), (50257, False)):
            for block_size in (0, 1024):
                if abs(n_params_of(n_layer, n_embd, vocab_size, bias, block_size) - n_params) <= within:
                    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd}
                    return {**shape, "vocab_size": vocab_size, "bias": bias}
    return {}


def inferred(facts: OomFacts, told: Mapping[str, object]) -> dict[str, object]:
    """Sizes beside those `told` that a number of parameters, or nanoGPT's tokens of a step, settle."""
    found: dict[str, object] = {}
    if facts.n_params and not {"n_layer", "n_embd"} & told.keys():
        found |= {key: value for key, value in gpt2_of(facts.n_params).items() if key not in told}
    if facts.program == "nanogpt" and facts.tokens_per_step:
        known = {key: told.get(key, default) for key, default in DEFAULTS.items()}
        product = 1
        for value in known.values():
            product *= int(str(value))
        if product == facts.tokens_per_step:
            found |= {key: value for key, value in known.items() if key not in told}
        elif "batch_size" in told and "block_size" not in told and facts.tokens_per_step % (product // 1024) == 0:
            found["block_size"] = facts.tokens_per_step // (product // 1024)
    return found
