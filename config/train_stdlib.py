# A byte model of the running Python's standard library by GPT-2's architecture and AdamW, in about two minutes on two CPU
# cores. It names their options, so that it can follow another preset: folio demo train_stdlib.
out_dir = "out-stdlib"
dataset = "stdlib"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 192
position = "learned"
norm = "layernorm"
activation = "gelu"
qk_norm = False
tie_weights = True
zero_init = False

optimizer = "adamw"
learning_rate = 2e-3
adam_learning_rate = "auto"
min_lr = 2e-4
weight_decay = 0.1
beta2 = 0.99
grad_clip = 1.0
schedule = "cosine"
warmup_iters = 50
max_iters = 1500
lr_decay_iters = 1500
ema_decay = 0.0

eval_interval = 100
eval_iters = 20
log_interval = 10
