"""The device a run trains on: which one, what it can do, and what it has held."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
