# make demo: a byte model of this Python's standard library, trained by the recipe (docs/recipe.md), in about two minutes
# on two CPU cores. With GPT-2's architecture and AdamW: folio demo train_stdlib.
out_dir = "out-stdlib"
dataset = "stdlib"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 256

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0
bias = False
position = "rope"
norm = "unweighted"
activation = "relu2"
qk_norm = True
tie_weights = False
zero_init = True

optimizer = "muon"
learning_rate = 0.009
adam_learning_rate = 0.006
momentum = 0.9
beta2 = 0.99
weight_decay = 0.1
grad_clip = 0.0
schedule = "wsd"
decay_share = 0.7
warmup_iters = 0
min_lr = 0.0
max_iters = 1000
lr_decay_iters = 1000

eval_interval = 100
eval_iters = 20
log_interval = 10
