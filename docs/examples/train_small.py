# A config as nanoGPT's users write it.
wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-small"

batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = max_iters

eval_interval = 1000
eval_iters = 200
weight_decay = 1e-1
