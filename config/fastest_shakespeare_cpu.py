# The loss of speedrun_shakespeare_cpu in the least time, by a model of one layer (docs/recipe.md).
out_dir = "out-fastest-shakespeare-cpu"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64

n_layer = 1
n_head = 2
n_embd = 64
dropout = 0.0
bias = False
position = "rope"
norm = "unweighted"
activation = "relu2"
token_shift = 3
qk_norm = True
tie_weights = False
zero_init = True

optimizer = "muon"
learning_rate = 0.05
adam_learning_rate = 0.06
momentum = 0.8
beta2 = 0.99
weight_decay = 0.0
grad_clip = 0.0
schedule = "wsd"
decay_share = 0.7
warmup_iters = 0
min_lr = 0.0
max_iters = 145
lr_decay_iters = 145

# evaluates at the start and the end only
eval_interval = 145
eval_iters = 5
log_interval = 10

device = "cpu"
compile = False
