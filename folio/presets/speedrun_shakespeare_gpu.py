# nanoGPT's best validation loss with train_shakespeare_char.py, 1.47 by its README, in a few seconds of training on a
# GPU: a model of the same size with the parts of modded-nanogpt's records. The hyperparameters were chosen on the last
# tenth of the training split.
out_dir = "out-speedrun-shakespeare-gpu"
dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 32
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
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
adam_learning_rate = 0.01
momentum = 0.9
beta2 = 0.99
weight_decay = 0.0
grad_clip = 0.0
schedule = "wsd"
decay_share = 0.7
warmup_iters = 0
min_lr = 0.0
max_iters = 300
lr_decay_iters = 300

# the whole validation split, at the start and the end
eval_interval = 300
eval_iters = 0
log_interval = 10
