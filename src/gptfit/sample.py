"""Text from a checkpoint."""

import math
from dataclasses import replace
from pathlib import Path

import torch

from gptfit.checkpoint import Checkpoint, latest_valid
from gptfit.config import derive
from gptfit.device import adapt, pick_device
from gptfit.errors import GptfitError
from gptfit.model import GPT
from gptfit.named import no_checkpoint
from gptfit.tokenizer import Tokenizer, get_tokenizer, nearer


def sample(
    checkpoint_dir: Path | str,
    prompt: str = "\n",
    n_tokens: int = 500,
    temperature: float = 0.8,
    top_k: int = 200,
    seed: int = 1337,
    device_name: str = "",
    raw: bool = False,
) -> str:
    """`prompt` and `n_tokens` more, drawn from the newest checkpoint of a folder; the defaults are nanoGPT's.

    Temperature 0 always takes the likeliest token; `top_k` 0 leaves all tokens in. With an empty prompt the
    text begins as a text of the data begins. Of a run with ema_decay it is the average of the weights that draws, or
    with `raw` the weights themselves. Raises GptfitError where there is no checkpoint or no tokenizer.
    """
    found = latest_valid(Path(checkpoint_dir))
    if found is None:
        raise no_checkpoint(checkpoint_dir)
    if temperature < 0 or top_k < 0 or n_tokens < 0:
        raise GptfitError(
            f"temperature={temperature} top_k={top_k} n_tokens={n_tokens}: none may be negative", "0.8, 200 and 500"
        )
    if not math.isfinite(temperature) or not -(2**63) <= seed < 2**64:
        raise GptfitError(
            f"temperature={temperature} seed={seed}: expected a finite number and one of 64 bits", "0.8 and 1337"
        )
    device = pick_device(device_name)
    tokenizer = get_tokenizer(nearer(found.checkpoint.tokenizer, found.path.parent))
    model = load_model(replace(found.checkpoint, ema={}) if raw else found.checkpoint, device)
    ids = start_ids(tokenizer, prompt, model.run.vocab_size)
    torch.manual_seed(seed)
    n_prompt = len(ids) if prompt else 0
    ids = extend(model, ids, n_tokens, temperature, top_k, min(tokenizer.n_vocab, model.run.vocab_size))
    return prompt + tokenizer.decode(ids[n_prompt:] if prompt else ids[1:])


def load_model(checkpoint: Checkpoint, device: torch.device) -> GPT:
    """The checkpoint's model, ready to be asked. On a CPU it computes in float32, whatever it was trained in."""
    run = checkpoint.run
    run = derive(run, dtype="float32", param_dtype="float32") if device.type == "cpu" else adapt(run, device)[0]
    model = GPT(run)
    model.load_state_dict(dict(checkpoint.weights))
    return model.to(device).eval()


def start_ids(tokenizer: Tokenizer, prompt: str, vocab_size: int) -> list[int]:
    """Ids of the prompt, or of what stands before a text. Raises GptfitError for ids that the model does not have."""
    if prompt:
        ids = [int(i) for i in tokenizer.encode(prompt.encode())]
    else:
        ids = [tokenizer.end_of_text if tokenizer.end_of_text is not None else 0]
    if max(ids) >= vocab_size:
        raise GptfitError(
            f"the tokenizer {tokenizer.name} gives the id {max(ids)}, but the model has {vocab_size}",
            "this checkpoint was trained on other tokens",
        )
    return ids


def extend(model: GPT, ids: list[int], n_tokens: int, temperature: float, top_k: int, n_vocab: int) -> list[int]:
    """`ids` and `n_tokens` drawn ids below `n_vocab`; the model sees the last block_size of them each time.

    Randomness comes from the CPU's generator, so that a seed means the same on every device.
    """
    device = next(model.parameters()).device
    ids = list(ids)
    for _ in range(n_tokens):
        seen_BT = torch.tensor([ids[-model.run.block_size :]], device=device)
        logits_V = model.logits(seen_BT)[0, :n_vocab].cpu()
        if temperature == 0:
            ids.append(int(logits_V.argmax()))
            continue
        if 0 < top_k < n_vocab:
            logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -torch.inf
        ids.append(int(torch.multinomial(torch.softmax(logits_V / temperature, -1), 1)))
    return ids
