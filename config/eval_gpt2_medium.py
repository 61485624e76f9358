# Evaluates OpenAI's pretrained gpt2-medium, by default on OpenWebText.
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
init_from = "gpt2-medium"
