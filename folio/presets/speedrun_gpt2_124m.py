# A model of GPT-2's size on FineWeb-Edu by record 8 of modded-nanogpt, in 12.4 minutes of steps, 5 dollars on 8 H100:
# torchrun --standalone --nproc_per_node=8 train.py config/speedrun_gpt2_124m.py
# Nobody has run it. It is sized on paper:
# Record 8 (2024-11-03) has these parts: rotary positions, QK-norm, ReLU², norms without weights, an untied head, outputs
# that start at zero, Muon, wsd. Its log has a loss of 3.276 on FineWeb, not FineWeb-Edu, after 4,578 steps of 524,288
# tokens, 2.4 billion, in 10.8 minutes at 462,000 tokens/s a GPU. Its embedding has a learning rate of its own, 150 times
# the head's, which is not an option here. So this run has the 5,100 steps of records 5 to 7, which have one rate for both.
# Folio trained GPT-2 124M with 477,000 tokens/s on one H100, compiled, without CUDA graphs, as several processes do.
# 5,100 · 524,288 / (8 · 450,000) = 743 s, then compilation, evaluations and HellaSwag; 8 GPUs at 3 dollars an hour.
out_dir = "out-speedrun-gpt2-124m"

# made by data/fineweb_edu/prepare.py, or build-nanogpt's own edu_fineweb10B; 27 of its 100 shards
dataset = "fineweb_edu"
sampling = "sequential"

# 32 rows × 1,024 tokens × 16 micro steps = 524,288 tokens a step
batch_size = 32
block_size = 1024
total_batch_size = 2**19
max_iters = 5100

# heads of 128, as the records have
n_layer = 12
n_head = 6
n_embd = 768
vocab_size = 50304
bias = False
position = "rope"
norm = "unweighted"
activation = "relu2"
qk_norm = True
tie_weights = False
zero_init = True

# Muon's update in record 8 is 0.02 · √max(1, rows / columns) times an orthogonal matrix, here the rate · 0.2 ·
# √max(rows, columns): equal for 768 × 768 and 3,072 × 768 at 0.02 / (0.2 · √768) = 0.0036. Adam's is that of records 5-7.
optimizer = "muon"
learning_rate = 3.6e-3
adam_learning_rate = 3.6e-3
momentum = 0.95
beta2 = 0.95
weight_decay = 0.0
grad_clip = 0.0
schedule = "wsd"
decay_share = 1450 / 5100
warmup_iters = 0
lr_decay_iters = 5100
min_lr = 0.0
dtype = "bfloat16"

eval_interval = 250
eval_iters = 20
hellaswag_interval = 1000
sample_interval = 1000
checkpoint_interval = 1000
wandb_project = "fineweb"
wandb_run_name = "speedrun-124M"
