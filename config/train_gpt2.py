# GPT-2 124M on OpenWebText, to a loss of about 2.85, in a few days on 8 A100s:
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
wandb_log = True
wandb_project = "owt"
wandb_run_name = "gpt2-124M"

# 12 rows × 1,024 tokens × 40 micro steps = 491,520 tokens a step; 600,000 steps are 300 B tokens
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
