"""The options in groups by what they are about: each once, with its type, default, unit, bounds, help and role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from folio.config.declare import (
    AFTER_FILE,
    EACH,
    ITSELF,
    HellaSwagStyle,
    TokenDtype,
    Weights,
    checkpoint_option,
    depth_option,
    hellaswag_data_option,
    hellaswag_style_option,
    max_flops_option,
    option,
    out_dir_option,
    token_dtype_option,
    weights_option,
)
from folio.errors import UserError
from folio.model.config import AUTO, GPTConfig

MICRO_STEPS = 1_000_000  # of a step, at most


@dataclass(frozen=True)
class Output:
    """Where a run writes, how it starts, what it keeps."""

    out_dir: str = out_dir_option()
    init_from: str = option(
        "scratch",
        "scratch | resume | auto | a model",
        details="resume: continue the run in out_dir; auto: resume if there is a run, else from scratch; gpt2, "
        "gpt2-medium, gpt2-large, gpt2-xl: OpenAI's weights; or another out_dir, a .pt file, a Hugging Face folder or "
        "name",
        path=ITSELF,
        role="call",
        local=True,
        nanogpt=True,
    )
    always_save_checkpoint: bool = option(
        True, "False: keep the best checkpoint and the latest only", nanogpt=True, advanced=True
    )
    checkpoint_interval: int | AUTO = option(
        "auto", "between checkpoints; auto: every evaluation", unit="steps", min=1, advanced=True
    )
    keep_checkpoints: int = option(
        2,
        "latest checkpoints to keep",
        details="This counts those at multiples of checkpoint_interval; the two newest and the best are kept as well.",
        min=1,
        advanced=True,
    )
    async_checkpoint: bool | AUTO = option(
        "auto",
        "write checkpoints while training continues",
        details="auto: on a GPU, and with several processes",
        advanced=True,
    )


@dataclass(frozen=True)
class Evaluation:
    """What is measured while a run trains, and how often; everything is measured at the end as well."""

    eval_interval: int = option(2000, "between evaluations", unit="steps", min=1, nanogpt=True)
    eval_iters: int = option(
        200,
        "per evaluation; 0: all",
        unit="batches",
        details="The number over all ranks together. 0: every validation token, and as many windows of train.",
        min=0,
        nanogpt=True,
    )
    eval_only: bool = option(
        False, "evaluate once and exit; nothing is written", role="call", nanogpt=True, advanced=True
    )
    hellaswag_interval: int = option(0, "between HellaSwag evaluations; 0: none", unit="steps", min=0, advanced=True)
    hellaswag_style: HellaSwagStyle = hellaswag_style_option(advanced=True)
    hellaswag_data: str = hellaswag_data_option(advanced=True)
    hellaswag_limit: int = option(
        0,
        "of HellaSwag, from the first; 0: all 10,042",
        unit="items",
        details="Training waits until they are scored.",
        min=0,
        advanced=True,
    )
    sample_interval: int = option(0, "between samples; 0: none", unit="steps", min=0, advanced=True)
    sample_prompt: str = option(
        "Hello, I'm a language model,", "prompt that samples continue", path=AFTER_FILE, advanced=True
    )
    sample_count: int = option(4, "samples at a time, of each process", min=1, max=10_000, advanced=True)
    sample_tokens: int = option(
        32, "of a sample, with those of the prompt", unit="tokens", min=1, max=1_000_000, advanced=True
    )
    sample_top_k: int = option(50, "draw from the k most likely tokens; 0: from all", min=0, advanced=True)


@dataclass(frozen=True)
class Logging:
    """What a run reports, and where to."""

    log_interval: int = option(1, "between lines of progress", unit="steps", min=1, nanogpt=True, advanced=True)
    monitor: bool = option(True, "False: no losses, measurements and samples on the console", advanced=True)
    log_txt: bool | Literal["gpt-from-scratch"] = option(
        False,
        "write a log.txt too",
        details="True: in build-nanogpt's format; gpt-from-scratch: in GPT-from-scratch's",
        advanced=True,
    )
    track: str = option("", "trackers: tensorboard, wandb, trackio, or several: a,b", advanced=True)
    wandb_log: bool = option(
        False, "log to Weights & Biases", details="as --track=wandb does", nanogpt=True, advanced=True
    )
    wandb_project: str = option("owt", "project there, and with trackio", nanogpt=True, advanced=True)
    wandb_run_name: str = option(
        "gpt2",
        "name of the run there; empty: W&B chooses one",
        none="",
        local=True,
        nanogpt=True,
        advanced=True,
    )
    profile: int = option(
        0,
        "to profile: time and memory; 0: none",
        unit="steps",
        details="Two steps run first; evaluations and checkpoints between the steps are profiled as well.",
        min=0,
        role="call",
        advanced=True,
    )


@dataclass(frozen=True)
class Data:
    """Which tokens are read, and in which order."""

    dataset: str = option(
        "openwebtext",
        "a data set's name or folder",
        details="A name stands for data/<name> under the working folder, else under the folder of train.py.",
        path=ITSELF,
        role="data",
        local=True,
        nanogpt=True,
        public=True,
    )
    data_dir: str = option("", "token files instead: a folder or glob", path=ITSELF, role="data", local=True)
    token_dtype: TokenDtype = token_dtype_option(advanced=True)
    data_mixture: str = option(
        "",
        "several data sets by weight instead, such as a=0.7,b=0.3",
        path=EACH,
        role="data",
        local=True,
        advanced=True,
    )
    batch_size: int = option(12, "of a micro batch", unit="rows", min=1, max=MICRO_STEPS, nanogpt=True, public=True)
    window: int = option(0, "of a row, at most block_size; 0: block_size", unit="tokens", min=0, advanced=True)
    gradient_accumulation_steps: int = option(
        40,
        "micro steps in a step, over all ranks",
        min=1,
        max=MICRO_STEPS,
        nanogpt=True,
        public=True,
    )
    total_batch_size: int = option(
        0,
        "in a step, over all ranks; 0: by gradient_accumulation_steps",
        unit="tokens",
        details="Instead of gradient_accumulation_steps.",
        min=0,
        advanced=True,
    )
    sampling: Literal["epoch", "random", "sequential"] = option(
        "epoch",
        "order of the rows",
        details="epoch: each window once, shuffled; random: with replacement; sequential: in the order of the files",
        public=True,
        advanced=True,
    )
    document_mask: bool = option(False, "keep attention within a document", advanced=True)
    eot: int | AUTO = option(
        "auto", "id of the token between documents; auto: as the data set says", min=0, advanced=True
    )

    def row(self, block_size: int) -> int:
        """Tokens of a row for a model with this many positions. Raises UserError if ``window`` is above them."""
        if self.window > block_size:
            raise UserError(
                f"window={self.window} is above block_size={block_size}: the positions of the model; lower --window"
            )
        return self.window or block_size


@dataclass(frozen=True)
class Optimizer:
    """The optimizer, its settings and learning rate, and when to end."""

    optimizer: Literal["adamw", "muon"] = option(
        "adamw",
        "adamw | muon",
        details="muon: for the matrices of the blocks; AdamW for embeddings, head, norms and biases. An update is as "
        "large as AdamW's, so that learning_rate and weight_decay mean the same.",
        public=True,
        advanced=True,
    )
    learning_rate: float = option(6e-4, "highest learning rate", min=0, nanogpt=True, public=True)
    adam_learning_rate: float | AUTO = option(
        "auto",
        "muon: highest learning rate of AdamW's part; auto: as learning_rate",
        details="The schedule scales it as it scales learning_rate.",
        min=0,
        public=True,
        advanced=True,
    )
    momentum: float = option(
        0.95, "muon: decay of the mean of the gradients", min=0, below=1, public=True, advanced=True
    )
    ema_decay: float = option(
        0.0,
        "highest decay of a moving average of the weights; 0: no average",
        details="The decay of update t is (1 + t) / (10 + t) if that is less. The average's validation loss is "
        "ema/val_loss; folio sample, eval and export use it with --weights=ema.",
        min=0,
        below=1,
        public=True,
        advanced=True,
    )
    max_iters: int = option(600_000, "to train, each one update", unit="steps", min=0, nanogpt=True, public=True)
    max_minutes: float = option(
        0.0,
        "after which this call ends; 0: no limit",
        unit="minutes",
        min=0,
        role="call",
        public=True,
        advanced=True,
    )
    patience: int = option(
        0,
        "without a better validation loss after which to end; 0: no limit",
        unit="evaluations",
        min=0,
        public=True,
        advanced=True,
    )
    weight_decay: float = option(0.1, "AdamW's, of matrices and embeddings", min=0, nanogpt=True, public=True)
    beta1: float = option(
        0.9, "decay of the mean of the gradients", min=0, below=1, nanogpt=True, public=True, advanced=True
    )
    beta2: float = option(
        0.95, "decay of the mean of their squares", min=0, below=1, nanogpt=True, public=True, advanced=True
    )
    grad_clip: float = option(
        1.0, "highest norm of the gradients; 0: no clipping", min=0, nanogpt=True, public=True, advanced=True
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "stop | skip: what to do after a loss or gradient that is not finite",
        details="stop: the run ends, and its checkpoints stay. skip: the update is left out and training continues; "
        "ten such updates in a row end the run. A gradient that overflows float16 does not count: its update is left "
        "out, and the loss scale is lowered.",
        public=True,
        advanced=True,
    )
    max_loss_z: float = option(
        0.0,
        "leave out the update of a loss this many standard deviations above the mean; 0: never",
        details="The mean is that of the last 128 losses. As in OLMo-core, where the limit is 6.",
        min=0,
        public=True,
        advanced=True,
    )
    decay_lr: bool = option(True, "False: a constant learning rate", nanogpt=True, public=True, advanced=True)
    schedule: Literal["cosine", "linear", "wsd"] = option(
        "cosine",
        "cosine | linear | wsd: how the learning rate falls",
        details="From learning_rate after the warm-up to min_lr at lr_decay_iters. wsd: constant, then linear.",
        public=True,
        advanced=True,
    )
    decay_share: float = option(
        0.2,
        "wsd: share of the steps after the warm-up in which the rate falls",
        above=0,
        max=1,
        public=True,
        advanced=True,
    )
    warmup_iters: int = option(2000, "of linear warm-up", unit="steps", min=0, nanogpt=True, public=True)
    lr_decay_iters: int = option(600_000, "until the rate is at min_lr", unit="steps", min=0, nanogpt=True, public=True)
    min_lr: float = option(6e-5, "lowest learning rate", min=0, nanogpt=True, public=True)
    warmup: Literal["folio", "nanogpt"] = option(
        "folio", "how the warm-up counts; nanogpt: divide by warmup_iters + 1", public=True, advanced=True
    )
    restart_interval: int = option(
        0,
        "after which the learning rate and the data start again; 0: never",
        unit="steps",
        min=0,
        public=True,
        advanced=True,
    )


@dataclass(frozen=True)
class Source:
    """Which trained model."""

    out_dir: str = out_dir_option()
    init_from: str = option(
        "resume",
        "resume | gpt2 | a model",
        details="resume: the model in out_dir; gpt2, gpt2-medium, gpt2-large, gpt2-xl: OpenAI's weights; or another "
        "out_dir, a .pt file, a Hugging Face folder or name",
        path=ITSELF,
        nanogpt=True,
    )
    checkpoint: str = checkpoint_option()
    weights: Weights = weights_option()


@dataclass(frozen=True)
class Sampling:
    """What to continue, and how."""

    start: str = option("\n", "prompt, or FILE:name of a file that has it", path=AFTER_FILE, nanogpt=True)
    num_samples: int = option(10, "samples to draw", min=1, max=10_000, nanogpt=True)
    max_new_tokens: int = option(500, "in each, after the prompt", unit="tokens", min=1, max=1_000_000, nanogpt=True)
    temperature: float = option(
        0.8,
        "randomness; 0: always the most likely token",
        details="Logits are divided by it: below 1 the likely tokens become likelier, above 1 the unlikely ones.",
        min=0,
        nanogpt=True,
    )
    top_k: int = option(200, "draw from the k most likely tokens; 0: from all", min=0, nanogpt=True)
    top_p: float = option(1.0, "draw from the fewest tokens with this probability", above=0, max=1)
    interactive: bool = option(
        False,
        "continue each prompt that you type",
        details="num_samples is 1 unless you set it; start, if you set it, is the first prompt. From a pipe, it "
        "reads one prompt per line.",
    )


@dataclass(frozen=True)
class System:
    """The device, and how it computes."""

    seed: int = option(1337, "seed of every random choice", min=0, role="machine")
    device: str = option(
        "auto", "auto | cpu | cuda | cuda:0 | mps", details="auto: cuda, else mps, else cpu", role="machine"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "auto | float32 | bfloat16 | float16",
        details="The type of the arithmetic; weights stay float32. auto: bfloat16 where it is fast.",
        role="machine",
    )
    compile: bool | AUTO = option(
        "auto", "torch.compile", details="auto: where the run is long enough to repay it", role="machine"
    )
    deterministic: bool = option(False, "the same bits again on a GPU too; slower there", role="machine", advanced=True)
    matmul_precision: Literal["auto", "highest", "high", "medium"] = option(
        "auto",
        "precision of float32 products",
        details="as torch.set_float32_matmul_precision takes it",
        role="machine",
        advanced=True,
    )
    autotune: bool = option(
        True,
        "measure once which attention kernel is fastest on this CPU",
        details="A run of minutes or more measures for about two seconds, if no run of this shape did; the user's "
        "cache folder remembers what was fastest, as folio/autotune.json. False: the built-in choice. A resumed run "
        "keeps its own.",
        role="machine",
        advanced=True,
    )


@dataclass(frozen=True)
class Processes:
    """What each of several processes holds, and how long they wait for one another."""

    backend: Literal["auto", "nccl", "gloo"] = option(
        "auto", "backend of the process group; auto: by device", role="machine", advanced=True
    )
    parallel: Literal["ddp", "fsdp", "hsdp"] = option(
        "ddp",
        "what each process holds",
        details="ddp: the whole model; fsdp: a share of it; hsdp: a share of it, with all shares within each machine",
        role="machine",
        advanced=True,
    )
    activation_checkpointing: Literal["none", "block"] = option(
        "none",
        "compute activations again to save memory",
        details="block: keep only the input of each block, and compute the rest again in the backward pass",
        role="machine",
        advanced=True,
    )
    timeout: float = option(
        300.0,
        "to wait for another process before all end",
        unit="seconds",
        details="Until the first step is done, half an hour.",
        min=1,
        max=31_536_000,
        role="machine",
        advanced=True,
    )
    check_replicas_every: int = option(
        0,
        "between comparisons of the weights of several processes; 0: none",
        unit="steps",
        min=0,
        role="machine",
        advanced=True,
    )


@dataclass(frozen=True)
class TrainConfig:
    """All options of a training run, in groups."""

    output: Output = field(default_factory=Output)
    data: Data = field(default_factory=Data)
    model: GPTConfig = field(default_factory=lambda: GPTConfig(vocab_size="auto", bias=False))
    optimizer: Optimizer = field(default_factory=Optimizer)
    evaluation: Evaluation = field(default_factory=Evaluation)
    logging: Logging = field(default_factory=Logging)
    system: System = field(default_factory=System)
    processes: Processes = field(default_factory=Processes)
    depth: int = depth_option()
    max_flops: float = max_flops_option()
    sources: dict[str, str] = field(default_factory=dict)  # option → the file or call that set it
