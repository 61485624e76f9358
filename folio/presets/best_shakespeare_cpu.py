# A low loss in the time that nanoGPT's CPU command takes: the model of speedrun_shakespeare_cpu, trained for
# longer, and the moving average of its weights (docs/recipe.md). Sample with --weights=ema.
out_dir = "out-best-shakespeare-cpu"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
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
learning_rate = 0.009
adam_learning_rate = 0.008
momentum = 0.9
beta2 = 0.99
weight_decay = 0.1
grad_clip = 0.0
schedule = "wsd"
decay_share = 0.7
warmup_iters = 0
min_lr = 0.0
max_iters = 1050
lr_decay_iters = 1050
ema_decay = 0.995

# evaluates at the start and the end only
eval_interval = 1050
eval_iters = 20
log_interval = 10

device = "cpu"
compile = False
