# A byte model of the running Python's standard library, with GPT-2's architecture and AdamW, in about two minutes on two
# CPU cores.
out_dir = "out-stdlib"
dataset = "stdlib"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 128

n_layer = 4
n_head = 4
n_embd = 192

learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 50
max_iters = 1500
lr_decay_iters = 1500
beta2 = 0.99

eval_interval = 100
eval_iters = 20
log_interval = 10
