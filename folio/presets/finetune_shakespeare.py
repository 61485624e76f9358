# Fine-tunes GPT-2 XL on Shakespeare; --init_from=gpt2 starts from the smallest model.
import time

out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-" + str(time.time())

dataset = "shakespeare"
init_from = "gpt2-xl"
always_save_checkpoint = False

# 32 micro steps × 1 row × 1,024 tokens; the 301,966 tokens of Shakespeare are about 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
