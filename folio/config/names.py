"""Suggests an option for an unknown name: a misspelled one, or another trainer's name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from folio.config.table import table

FOREIGN = {  # another trainer's name of an option → ours
    theirs: ours
    for ours, names in {
        "learning_rate": "lr max_lr base_lr peak_lr lr_max",
        "min_lr": "lr_min final_lr end_lr eta_min",
        "weight_decay": "wd",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
        "grad_clip": "max_grad_norm clip_grad clip_grad_norm grad_clip_norm gradient_clip_val gradient_clipping clip",
        "warmup_iters": "warmup_steps num_warmup_steps lr_warmup_steps warmup_iterations",
        "warmup_iters, which counts steps": "warmup_ratio warmup_frac warmup_fraction",
        "lr_decay_iters": "decay_steps lr_decay_steps decay_iters",
        "max_iters": "max_steps num_steps n_steps steps total_steps train_steps training_steps max_train_steps "
        "num_training_steps iters iterations num_iterations max_iterations train_iters",
        "max_iters, which counts steps": "epochs num_epochs n_epochs max_epochs num_train_epochs max_tokens",
        "max_minutes": "max_time time_limit",
        "max_flops": "target_flops max_compute",
        "patience": "early_stopping_patience early_stopping",
        "batch_size": "bs batch train_batch_size per_device_train_batch_size per_device_batch_size device_batch_size "
        "micro_batch_size microbatch_size mbs n_batches",
        "total_batch_size, which counts tokens": "global_batch_size gbs effective_batch_size",
        "gradient_accumulation_steps": "grad_accum grad_accum_steps gradient_accumulation grad_acc_steps grad_acc "
        "accumulate_grad_batches accumulation_steps accum_steps",
        "block_size": "context_length context_size context ctx_len n_ctx n_positions max_position_embeddings seq_len "
        "seq_length sequence_length max_seq_len max_seq_length max_sequence_length",
        "n_layer": "num_layers n_layers num_hidden_layers layers",
        "n_head": "num_heads n_heads num_attention_heads heads",
        "n_embd": "d_model model_dim hidden_size hidden_dim emb_dim embed_dim embedding_dim n_embed width dim",
        "vocab_size": "padded_vocab_size n_vocab vocab",
        "dropout": "drop_rate dropout_rate dropout_prob attn_pdrop resid_pdrop embd_pdrop",
        "activation": "activation_function hidden_act",
        "position, such as --position=rope": "rope rotary position_embedding_type pos_embedding",
        "norm": "norm_type normalization",
        "token_shift": "smear",
        "qk_norm": "use_qk_norm qk_layernorm",
        "logit_softcap": "softcap final_logit_softcapping",
        "tie_weights": "tie_word_embeddings weight_tying",
        "out_dir": "output_dir save_dir checkpoint_dir ckpt_dir log_dir logdir run_dir default_root_dir output_path",
        "init_from": "model model_name model_name_or_path pretrained from_pretrained load load_from ckpt_path",
        "init_from, such as --init_from=resume": "resume resume_from resume_from_checkpoint",
        "checkpoint_interval": "save_steps save_every save_interval save_freq checkpoint_every ckpt_interval",
        "keep_checkpoints": "save_total_limit max_checkpoints",
        "eval_interval": "eval_steps eval_every eval_freq val_every val_interval val_loss_every val_check_interval",
        "eval_iters": "eval_batches val_batches val_steps limit_val_batches",
        "log_interval": "logging_steps log_every log_every_n_steps log_freq print_every",
        "sample_interval": "sample_every generate_every",
        "track": "report_to logger",
        "wandb_log": "wandb use_wandb",
        "wandb_project": "project",
        "wandb_run_name": "run_name wandb_name",
        "data_dir": "data data_path data_root dataset_dir dataset_path train_data train_file train_path input_bin",
        "dataset": "dataset_name",
        "seed": "random_seed manual_seed",
        "dtype, such as --dtype=bfloat16": "bf16 fp16 amp precision mixed_precision torch_dtype",
        "compile": "torch_compile",
        "device": "accelerator cuda",
        "parallel": "strategy fsdp",
        "activation_checkpointing": "gradient_checkpointing",
        "start": "prompt",
        "num_samples": "n_samples num_return_sequences",
        "max_new_tokens": "num_tokens n_tokens new_tokens max_tokens length",
        "temperature": "temp",
        "workers": "num_workers num_proc n_proc",
        "text_key": "text_column text_field",
        "val_fraction": "val_split val_size test_size",
    }.items()
    for theirs in names.split()
}


def unknown(name: str, options: type) -> str:
    """One line about an option that does not exist, with a suggestion."""
    return f"unknown option {name!r}: {suggestion(name, options) or '--help lists them'}"


def suggestion(name: str, options: type) -> str:
    """Suggests the option that has this name in another trainer, or a similar name; "" if there is none."""
    known, plain = table(options), name.lower().replace("-", "_")
    ours, comma, note = FOREIGN.get(plain, "").partition(",")
    return f"did you mean {ours!r}{comma}{note}?" if ours in known else did_you_mean(plain, known)


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Asks whether the most similar known word is meant; "" if none is similar."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]!r}?" if close else ""
