"""A model of transformers, for `gptfit trace`: it is built on fake tensors, so nothing is downloaded."""

import torch


def make(batch_size: int = 4, block_size: int = 256, n_layer: int = 4):
    """transformers computes the loss where it is given labels; gptfit takes the `loss` of what the model returns."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=n_layer, n_embd=384, n_head=6, n_positions=block_size, use_cache=False)
    model = GPT2LMHeadModel(config)
    ids = torch.zeros(batch_size, block_size, dtype=torch.int64)
    return model, {"input_ids": ids, "labels": ids}
