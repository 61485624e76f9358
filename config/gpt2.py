# GPT-2 124M by its own architecture, of any data set; it exports to Hugging Face as GPT-2: folio train gpt2 --dataset=my
# Depth's rules give the batch and the number of steps (docs/depth.md): 12 tokens for each parameter, about an hour on an
# H100, or 4 passes over a smaller data set. nanoGPT's 600,000 steps are config/train_gpt2.py.
depth = 12
block_size = 1024

position = "learned"
norm = "layernorm"
activation = "gelu_tanh"
qk_norm = False
tie_weights = True
zero_init = False
bias = True

optimizer = "adamw"
learning_rate = 6e-4
min_lr = 6e-5
weight_decay = 0.1
beta2 = 0.95
schedule = "cosine"
log_interval = 10
