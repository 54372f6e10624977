"""Train an adapter on several tasks at once: python -m tinylora_mtl.train --method align

Without any flag: Align-LoRA on the embedded model and its eight tasks, on a CPU, without a network, in about a
minute. The same command with --method lora, hydralora, rlora, mlora or meta trains the other methods.
Read `main` first, then `train`: that is all there is.
"""

import json
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from .adapters import METHODS as LAYER_METHODS
from .adapters import AdapterConfig, adapter_parameters, add_adapters, save_adapter
from .align import ALIGNMENTS, alignment_gradients, alignment_loss, collect_features, real_tokens
from .batching import NO_LABEL, BalancedBatches, collate, label_loss, split_batch
from .cli import Parser, run_command
from .evaluate import SCORES, accuracies, average, average_interval, check_labels, table, task_accuracy
from .meta import adapted_to, meta_gradients
from .models import DTYPES, load_model, pick_length
from .tasks import load_tasks, require_samples

METHODS = [*LAYER_METHODS, "align", "meta"]  # the last two train plain LoRA layers, each in its own way
MINI_LR = {"lora": 5e-3, "hydralora": 5e-3, "rlora": 5e-3, "mlora": 2e-3, "align": 5e-3, "meta": 5e-3}
ALIGN_WEIGHT = {"kl": 0.2, "mmd": 0.01}  # λ as in the authors' script (KL) and as reported for the paper (MMD)


def option(default, text, **extra):
    """A field of TrainConfig that is a command-line flag too, with its help text."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class TrainConfig:
    """Everything that decides a run. Each field is a flag of the same name: --batch-size is `batch_size`."""

    model: str = option("mini", "mini, a local folder in Hugging Face format, or a name on the Hugging Face Hub")
    tasks: tuple = option(("mini",), "tasks: mini, mini-multilingual or any of their tasks, tasks from the Hub (sst2, "
                                     "boolq, ...), JSON Lines files, folders with train.jsonl and test.jsonl")
    method: str = option("align", "how to train", choices=METHODS)
    rank: int = option(8, "r, the width of the adapters")
    alpha: float = option(16.0, "the adapters' scaling is alpha / rank, for rlora and mlora alpha / sqrt(rank)")
    dropout: float = option(None, "dropout of the adapters (default: 0; rlora and mlora 0.1)", type=float)
    heads: int = option(5, "number of heads of hydralora, rlora and mlora")
    targets: tuple = option(None, "layers to adapt, by the last part of their name, or all-linear (default: all-linear "
                                  "on mini; else gate, up and down projections if there are any, as in the papers)")
    steps: int = option(300, "optimiser steps (rounds, for meta)")
    batch_size: int = option(64, "samples in a step, the same number of each task")
    accumulation: int = option(1, "compute a step in this many pieces, one after another, to save memory; without "
                                 "dropout the result is the same")
    lr: float = option(None, "peak learning rate (default: chosen for each method on mini, 5e-4 on other models)",
                       type=float)
    warmup: float = option(0.03, "share of the steps in which the learning rate rises; then it falls as a cosine")
    clip: float = option(1.0, "largest norm of a step's gradient")
    max_length: int = option(None, "prompts are cut from the left to this many tokens, answer included (default: 512, "
                                   "or what the model has positions for)", type=int)
    samples: int = option(None, "training samples per task (default: all; meta 50)", type=int)
    align: str = option("kl", "the alignment loss, for --method align", choices=list(ALIGNMENTS))
    align_weight: float = option(None, "its weight, lambda (default: kl 0.2, mmd 0.01)", type=float)
    tasks_per_round: int = option(4, "meta: tasks sampled for a round")
    support: int = option(16, "meta: samples of a task that the inner steps see")
    query: int = option(16, "meta: samples of a task that the outer gradient is taken on")
    inner_steps: int = option(3, "meta: steps of plain gradient descent on the support set")
    inner_lr: float = option(0.005, "meta: their learning rate")
    seed: int = option(0, "seeds the adapters' start, the batches, the dropout and which samples are kept")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("auto", "of the frozen weights; adapters are float32. auto: bfloat16 for a model saved in half "
                                "precision on a GPU that has it, else float32", choices=["auto", *DTYPES])
    split: str = option("test", "the samples that accuracy is measured on; choose settings on validation",
                        choices=["test", "validation"])
    score: str = option("generate", "write the answer, or choose the likeliest of a task's labels", choices=SCORES)
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    out: str = option(None, "the run folder (default: the first free of runs/METHOD-TASKS-seedN)", type=str)
    overwrite: bool = option(False, "replace a run that is already in --out")


def main(config):
    """Train one adapter, measure before and after, write the run folder; returns what results.json holds.

    Raises ValueError for settings that cannot work (before anything is written), FileExistsError for a folder that
    already holds a run, FloatingPointError for a loss that is not finite.
    """
    began = time.perf_counter()
    check(config)
    config = fill_in(config)
    tasks = load_tasks(config.tasks, config.samples, config.seed)
    check_sizes(config, tasks)
    model, tokenizer, device = load_model(config.model, config.device, config.dtype)
    config = replace(config, max_length=pick_length(model, config.max_length))
    torch.manual_seed(config.seed)
    add_adapters(model, adapter_config(config))
    batches = BalancedBatches(tasks, tokenizer, config.max_length, config.seed, device)
    folder = make_run_folder(config)

    trainable = sum(p.numel() for p in adapter_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    sizes = [len(task.train) for task in tasks]
    span = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    print(f"{config.method} on {config.model}: {len(tasks)} tasks of {span} training samples\n"
          f"{config.steps} steps at a learning rate of {config.lr:g}, on {device}\n"
          f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.1f} %)")
    counts = {task.name: len(getattr(task, config.split)) for task in tasks}
    results = {"method": config.method, "seed": config.seed, "split": config.split, "score": config.score,
               "samples": counts, "trainable_parameters": trainable, "total_parameters": total}
    scoring = config.split, config.max_length, config.score
    columns = {"before": accuracies(model, tokenizer, tasks, *scoring)}
    train(model, batches, tasks, config, folder)
    columns["after"] = accuracies(model, tokenizer, tasks, *scoring)
    if config.method == "meta":  # "after" is the shared adapter as it is; this is each task's own θ_i
        columns["after_adapting"] = accuracies_after_adapting(model, tokenizer, tasks, batches, config)
    save_adapter(model, folder / "adapter")

    results |= columns | {f"average_{name}": average(column) for name, column in columns.items()}
    results |= {f"average_{name}_interval": list(average_interval(column, counts)) for name, column in columns.items()}
    results["seconds"] = round(time.perf_counter() - began, 1)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table({name.replace("_", " "): column for name, column in columns.items()}, counts))
    print(f"{config.split} accuracy in percent, with its 95 % interval over the n samples\n"
          f"{results['seconds']:.0f} s in all; the run is in\n{folder}")
    return results


def train(model, batches, tasks, config, folder):
    """The training loop: AdamW on the adapters, linear warm-up, cosine decay, clipped gradients."""
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.steps), config.steps)
    model.train()
    with open(folder / "metrics.jsonl", "w") as metrics:
        bar = tqdm(range(1, config.steps + 1), desc=config.method, ncols=80)
        for step in bar:
            log = step % config.log_every == 0 or step in (1, config.steps)
            # ---------------------------------------------------------------- a single training step
            optimizer.zero_grad()
            if config.method == "meta":
                numbers, task_ids = meta_step(model, batches, config, log)
            else:
                batch = batches.balanced(config.batch_size)
                numbers, task_ids = multitask_step(model, batch, config), batch["task_ids"]
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            if not torch.isfinite(norm + numbers["loss"]):
                names = ", ".join(tasks[task_id].name for task_id in sorted(set(task_ids.tolist())))
                raise FloatingPointError(f"the loss is not finite at step {step}, in a batch of {names}; "
                                         "a lower --lr usually helps")
            lr = schedule.get_last_lr()[0]  # 0 in the first step: the warm-up starts there
            optimizer.step()
            schedule.step()
            # --------------------------------------------------------------------------------------
            if log:
                numbers = {name: round(float(value), 6) for name, value in numbers.items()}
                numbers |= {"gradient_norm": round(norm.item(), 6), "lr": lr}
                metrics.write(json.dumps({"step": step} | numbers) + "\n")
                metrics.flush()
                bar.set_postfix(loss=f"{numbers['loss']:.3f}")
    model.eval()


def multitask_step(model, batch, config):
    """Gradients of one step for every method but MeTA-LoRA, left in `.grad`; returns the numbers to log.

        L = L_task (+ λ · L_align)
    Computed in `accumulation` pieces. The pieces' losses are divided by the labels of the whole batch, and the
    alignment is that of the whole batch, so without dropout the gradient is the same for any number of pieces.
    """
    pieces = split_batch(batch, config.accumulation)
    labels = (batch["labels"] != NO_LABEL).sum()
    numbers = {"loss": 0.0}
    if config.method == "align" and len(pieces) > 1:
        numbers["alignment"], gradient_pieces = alignment_gradients(model, pieces, config.align)
    for i, piece in enumerate(pieces):
        with collect_features(model) if config.method == "align" else nullcontext() as features:
            loss = label_loss(model, piece, labels)
        numbers["loss"] += loss.detach()
        if config.method == "align":
            if len(pieces) == 1:
                alignment = alignment_loss(features, piece, config.align)
                numbers["alignment"] = alignment.detach()
            else:  # Σ Z · dL_align/dZ has the gradient of L_align, through the features of this piece
                alignment = sum((real_tokens(z, piece) * gradient_pieces[name][i]).sum()
                                for name, z in features.items())
            loss = loss + config.align_weight * alignment
        loss.backward()
    return numbers


def meta_step(model, batches, config, log):
    """MeTA-LoRA's two stages for one round, the outer gradient left in `.grad`; returns the numbers to log."""
    episodes = batches.episodes(min(config.tasks_per_round, len(batches.rows)), config.support, config.query)
    losses = [] if log else None
    gradients = meta_gradients(model, episodes, config.inner_lr, config.inner_steps, losses)
    for name, parameter in adapter_parameters(model).items():
        parameter.grad = gradients[name]
    task_ids = torch.cat([query["task_ids"] for _, query in episodes])
    numbers = {"loss": torch.zeros(())}  # between two log steps the gradient's norm alone tells what is not finite
    if log:
        before, after, query = torch.tensor(losses).mean(0)  # [n, 3] -> 3 means over the tasks
        numbers = {"loss": query, "support_loss_before": before, "support_loss_after": after}
    return numbers, task_ids


def accuracies_after_adapting(model, tokenizer, tasks, batches, config):
    """{task: accuracy} with stage 1 run once more for each task, on support + query of its own training samples."""
    scores = {}
    for task_id, task in enumerate(tasks):
        rows = [batches.rows[task_id][index] for index in batches.draw(task_id, config.support + config.query)]
        support = collate(rows, [task_id] * len(rows), tokenizer.pad_token_id, batches.device)
        with adapted_to(model, support, config.inner_lr, config.inner_steps):
            scores[task.name] = task_accuracy(model, tokenizer, task, config.split, config.max_length, config.score)
    return scores


def adapter_config(config):
    """The adapters of a run: Align-LoRA and MeTA-LoRA have plain LoRA layers."""
    method = config.method if config.method in LAYER_METHODS else "lora"
    return AdapterConfig(method, config.rank, config.alpha, config.dropout, config.heads, config.targets)


def fill_in(config):
    """The config with every default that depends on the method or the model in its place."""
    mini = config.model == "mini"
    defaults = {"lr": MINI_LR[config.method] if mini else 5e-4, "align_weight": ALIGN_WEIGHT[config.align],
                "samples": 50 if config.method == "meta" else None, "targets": ("all-linear",) if mini else None}
    return replace(config, **{name: value for name, value in defaults.items() if getattr(config, name) is None})


# ------------------------------------------------------------------------------------- before the first step
def check(config):
    """ValueError, naming the flag, for a value that cannot work."""
    for item in fields(config):
        value, choices = getattr(config, item.name), item.metadata.get("choices")
        if choices and value not in choices:
            raise ValueError(f"unknown {item.name} {value!r}; there are: {', '.join(choices)}")
    flags = {name: f"--{name.replace('_', '-')}" for name in asdict(config)}
    for name in ("rank", "heads", "steps", "batch_size", "accumulation", "max_length", "samples", "tasks_per_round",
                 "support", "query", "log_every"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{flags[name]} must be at least 1, got {getattr(config, name)}")
    for name in ("lr", "inner_lr", "clip", "alpha"):
        if getattr(config, name) is not None and not 0 < getattr(config, name) < float("inf"):
            raise ValueError(f"{flags[name]} must be above 0, got {getattr(config, name)}")
    for name in ("align_weight", "inner_steps"):
        if getattr(config, name) is not None and not 0 <= getattr(config, name) < float("inf"):
            raise ValueError(f"{flags[name]} must be at least 0, got {getattr(config, name)}")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"--warmup must be from 0 to 1, got {config.warmup}")


def check_sizes(config, tasks):
    """ValueError if a batch cannot hold every task, or a task has too few samples, or no labels to choose from."""
    require_samples(tasks, "train", config.split)
    if config.method == "meta":
        for task in tasks:
            if len(task.train) < config.support + config.query:
                raise ValueError(f"task {task.name!r} has {len(task.train)} training samples, fewer than --support "
                                 f"{config.support} plus --query {config.query}")
    elif config.batch_size // len(tasks) * len(tasks) < max(len(tasks), config.accumulation):
        raise ValueError(f"--batch-size {config.batch_size} cannot hold {len(tasks)} tasks in {config.accumulation} "
                         "piece(s); each task needs the same number of places, and each piece a sample")
    check_labels(tasks, config.score)
    if config.method == "align" and len(tasks) < 2:
        raise ValueError("align needs at least two tasks: with one there is nothing to align")


def make_run_folder(config):
    """The run folder, made now, with config.json in it. FileExistsError if it holds a run and --overwrite is off."""
    if config.out is None:
        names = "-".join(Path(name).name for name in config.tasks)[:40]
        name = f"{config.method}-{names}-seed{config.seed}"
        folder, number = Path("runs") / name, 2
        while folder.exists():
            folder, number = Path("runs") / f"{name}-{number}", number + 1
    else:
        folder = Path(config.out)
        if (folder / "config.json").exists() and not config.overwrite:
            raise FileExistsError(f"{folder} already holds a run; name another --out, or add --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for old in ("results.json", "metrics.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (folder / old).unlink(missing_ok=True)  # never an old result beside a new config
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    return folder


def parse(argv=None):
    """Command line -> TrainConfig; argparse itself answers unknown flags and values, with exit status 2."""
    parser = Parser("train", __doc__)
    for item in fields(TrainConfig):
        flag, extra = f"--{item.name.replace('_', '-')}", dict(item.metadata)
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=extra["help"])
            continue
        if item.type is tuple:
            extra |= {"nargs": "+", "type": str}
        if "choices" in extra:  # `check` tells a wrong one
            extra["help"] += f": {', '.join(extra.pop('choices'))}"
        if item.default is not None:
            extra["help"] += f" (default: {' '.join(item.default) if item.type is tuple else item.default})"
        parser.add_argument(flag, **{"type": item.type, "default": item.default, **extra})
    return TrainConfig(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run_command(lambda: main(parse()))
