"""The settings of a training run, as a plain dataclass."""

from dataclasses import dataclass, field, replace

from .adapters import LAYERS, AdapterConfig

MINI_LR = {"lora": 5e-3, "hydralora": 5e-3, "rlora": 5e-3, "mlora": 2e-3, "align": 5e-3, "meta": 5e-3}
METHODS = MINI_LR.keys()  # the last two of these train plain LoRA layers
META_SAMPLES = 50  # training samples that MeTA-LoRA keeps of a task if `samples` does not say it
ALIGN_WEIGHT = {"kl": 0.2, "mmd": 0.01}  # λ as in the authors' script (KL) and as reported for the paper (MMD)


def option(default, text, **extra):
    """A field with its sentence, which is the help text of its command-line flag too."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class TrainConfig:
    """Everything that decides a run. Each field is a flag of the same name: --batch-size is `batch_size`."""

    model: str = option("mini", "mini, a local folder in Hugging Face format, or a name on the Hugging Face Hub")
    tasks: tuple = option(("mini",), "tasks: mini, mini-multilingual or any of their tasks, tasks from the Hub (sst2, "
                                     "boolq, ...), JSON Lines files, folders with train.jsonl and test.jsonl")
    samples: int = option(None, "training samples per task (default: all; meta at most 50)", type=int)

    method: str = option("align", "how to train; also a name in gallery/, or FILE.py of your own", choices=METHODS)
    rank: int = option(8, "r, the width of the adapters")
    alpha: float = option(16.0, "the adapters' scaling is alpha / rank, for rlora and mlora alpha / sqrt(rank)")
    dropout: float = option(None, "dropout of the adapters (default: 0; rlora and mlora 0.1)", type=float)
    heads: int = option(5, "number of heads of hydralora, rlora and mlora")
    zero_start: bool = option(False, "rlora, mlora: start the heads from zero, to see what their random start does")
    targets: tuple = option(None, "layers to adapt, by the last part of their name, or all-linear (default: all-linear "
                                  "on mini; else gate, up and down projections if there are any, as in the papers)")

    steps: int = option(200, "optimiser steps (rounds, for meta)")
    batch_size: int = option(64, "samples in a step, the same number of each task (not for meta)")
    accumulation: int = option(1, "compute a step in this many micro-batches, to save memory (not for meta)")
    lr: float = option(None, "peak learning rate (default: by method on mini, 5e-4 on other models)", type=float)
    warmup: float = option(0.03, "share of the steps in which the learning rate rises; then it falls as a cosine")
    clip: float = option(1.0, "largest norm of a step's gradient")
    max_length: int = option(None, "prompts are cut from the left to this many tokens, answer included (default: 512, "
                                   "or what the model has positions for)", type=int)

    align: str = option("kl", "the alignment loss, for --method align", choices=tuple(ALIGN_WEIGHT))
    align_weight: float = option(None, "its weight, lambda (default: kl 0.2, mmd 0.01)", type=float)
    shuffle_groups: bool = option(False, "align: a control that aligns random groups of samples instead of tasks")
    tasks_per_round: int = option(4, "meta: tasks sampled for a round")
    support: int = option(16, "meta: samples of a task that the inner steps see")
    query: int = option(16, "meta: samples of a task that the outer gradient is taken on")
    inner_steps: int = option(3, "meta: steps of plain gradient descent on the support set")
    inner_lr: float = option(0.005, "meta: their learning rate")

    seed: int = option(0, "seeds the adapters' start, the batches, the dropout and which samples are kept")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("auto", "of the frozen weights; auto: bfloat16 for a model saved in half precision on a GPU "
                                "that has it, else float32", choices=("auto", "float32", "bfloat16", "float16"))
    gradient_checkpointing: bool = option(False, "compute each layer anew in the backward pass: less memory, about "
                                                 "half as much time again, the same result")
    compile: bool = option(False, "have torch compile the model for training (not for align); worth it for long runs")
    split: str = option("test", "what is scored; choose settings on validation", choices=("test", "validation"))
    score_samples: int = option(None, "score this many samples of each task (default: 200 on mini, else all)", type=int)
    score: str = option("generate", "write it, or choose the likeliest of the labels", choices=("generate", "choose"))
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    checkpoint_every: int = option(50, "steps between two checkpoints, from which --resume goes on")
    skip_bad_steps: int = option(0, "pass over up to this many steps whose gradient is not finite")
    out: str = option(None, "the run folder (default: the first free of runs/METHOD-TASKS-seedN)", type=str)
    overwrite: bool = option(False, "replace a run that is already in --out")


def resolve(config):
    """The config with every default that depends on the method or the model filled in. ValueError: unknown ones."""
    if config.method not in METHODS or config.align not in ALIGN_WEIGHT:
        raise ValueError(f"method {config.method!r} must be one of {', '.join(METHODS)}, align {config.align!r} one "
                         f"of {', '.join(ALIGN_WEIGHT)}")
    mini = config.model == "mini"
    defaults = {"lr": MINI_LR[config.method] if mini else 5e-4, "align_weight": ALIGN_WEIGHT[config.align],
                "targets": ("all-linear",) if mini else None, "score_samples": 200 if mini else None}
    return replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def adapter_config(config):
    """The adapters of a run: Align-LoRA and MeTA-LoRA have plain LoRA layers."""
    method = config.method if config.method in LAYERS else "lora"
    return AdapterConfig(method, config.rank, config.alpha, config.dropout, config.heads, config.targets,
                         random_init=False if config.zero_start else None)
