# The loss of OpenAI's pretrained gpt2-large; its weights cannot be read yet.
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = "gpt2-large"
