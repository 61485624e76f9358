# GPT-2 124M on ten billion tokens of FineWeb-Edu, as build-nanogpt trains it:
# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_124m_fineweb.py
out_dir = "log"
log_txt = True

# made by data/fineweb_edu/prepare.py, or build-nanogpt's own edu_fineweb10B
dataset = "fineweb_edu"
sampling = "sequential"

# 64 rows × 1,024 tokens × 8 micro steps = 524,288 tokens a step
batch_size = 64
block_size = 1024
total_batch_size = 2**19
max_iters = 19073

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 715
lr_decay_iters = 19073

vocab_size = 50304
bias = True
activation = "gelu_tanh"
dtype = "bfloat16"

eval_interval = 250
eval_iters = 20
hellaswag_interval = 250
sample_interval = 250
checkpoint_interval = 5000
keep_checkpoints = 4
wandb_project = "fineweb"
wandb_run_name = "gpt2-124M"
