"""Which other programs have a form for a run's model: what `gptfit export` can write, told before torch is loaded."""

from gptfit.config import ModelConfig
from gptfit.errors import GptfitError

# What a family of transformers is, in the keys of a run.
GPT2 = {"norm": "layernorm", "mlp": "gelu", "position": "learned"}
LLAMA = {"norm": "rmsnorm", "mlp": "swiglu", "position": "rope"}
NEITHER = {"qk_norm": False, "logit_softcap": 0.0}
# What nanoGPT's model.py can be, beside its model_args.
NANOGPT_MODEL = {**GPT2, **NEITHER, "tie_embeddings": True}


def refusal(run: ModelConfig, form: str) -> GptfitError | None:
    """Why the model has no such form (hf or nanogpt), naming the key; None where it has one."""
    return _no_huggingface(run) if form == "hf" else _no_nanogpt(run)


def check_form(run: ModelConfig, form: str) -> None:
    """Raises what `refusal` gives."""
    if (error := refusal(run, form)) is not None:
        raise error


def _no_huggingface(run: ModelConfig) -> GptfitError | None:
    family = GPT2 if run.norm == "layernorm" else LLAMA
    name = "GPT-2" if family is GPT2 else "Llama"
    for key, value in {**family, **NEITHER}.items():
        if getattr(run, key) != value:
            return GptfitError(
                f"{key}={getattr(run, key)} with norm={run.norm} has no Hugging Face form: {name} has {key}={value}",
                "layernorm, gelu and learned positions export as GPT-2; rmsnorm, swiglu and rope as Llama",
            )
    if family is GPT2 and run.n_kv_head != run.n_head:
        return GptfitError(
            f"n_kv_head={run.n_kv_head} with norm=layernorm has no Hugging Face form: GPT-2 has as many as n_head",
            "rmsnorm, swiglu and rope export as Llama, which has grouped heads",
        )
    return None


def _no_nanogpt(run: ModelConfig) -> GptfitError | None:
    wanted = {**NANOGPT_MODEL, "n_kv_head": run.n_head, "n_hidden": 4 * run.n_embd}
    for key, value in wanted.items():
        if getattr(run, key) != value:
            other = "--format hf has one" if _no_huggingface(run) is None else "Hugging Face's has none either"
            return GptfitError(
                f"{key}={getattr(run, key)} has no form in nanoGPT, whose model has {key}={value}", other
            )
    return None
