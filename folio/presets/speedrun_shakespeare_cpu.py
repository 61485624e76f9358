# nanoGPT's loss after its CPU command, 1.898, in seconds on a CPU: a model of the same size with the parts of
# modded-nanogpt's records. The hyperparameters, except the number of steps, were chosen on the last tenth of the
# training split (docs/recipe.md).
out_dir = "out-speedrun-shakespeare-cpu"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
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

optimizer = "muon"
learning_rate = 0.016
adam_learning_rate = 0.03
momentum = 0.8
beta2 = 0.99
weight_decay = 0.0
grad_clip = 0.0
schedule = "wsd"
decay_share = 0.7
warmup_iters = 0
min_lr = 0.0
max_iters = 112
lr_decay_iters = 112

# evaluates at the start and the end only
eval_interval = 112
eval_iters = 5
log_interval = 10

device = "cpu"
compile = False
