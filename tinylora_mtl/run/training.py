"""Train an adapter on several tasks at once: python -m tinylora_mtl.train --method align

Without any flag: Align-LoRA on the embedded model and its eight tasks, on a CPU, without a network, in about a
minute. The same command with --method lora, hydralora, rlora, mlora or meta trains the other methods.
Read `train` between its two rulers, then `multitask_step` or `meta_step`; the rest is preparation, measuring and
keeping. A run that was stopped goes on with --resume FOLDER.
"""

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from ..adapters import adapter_parameters, add_adapters, save_adapter
from ..align import alignment_gradients, alignment_loss, collect_features, through_features
from ..batching import NO_LABEL, BalancedBatches, collate, label_loss, split_batch
from .checkpoint import capture, load_checkpoint, open_metrics, restore, save_checkpoint, synced_length
from .cli import Parser, Stopped, StopSignals
from .distributed import (average_over_processes, data_parallel, gather, keep_to_itself, merge, process_group, rank,
                          same_random_numbers, share, sum_over_processes, world)
from ..evaluate import accuracies, average, average_interval, say_cut, table, task_accuracy
from .files import read_json, write_json
from ..meta import adapted_to, meta_gradients
from .models import checkpoint_layers, compile_model, load_model, pick_length
from ..multihead import head_cosines
from .folder import open_run
from .settings import TrainConfig, adapter_config, add_flags, check, check_sizes, fill_in, resume_config
from ..data.tasks import load_tasks


def main(config, resuming=False, stop=None, before=None):
    """Train one adapter, measure before and after, write the run folder; returns what results.json holds.

    resuming: go on with the run in config.out instead of starting one (`resume` does that). stop: a StopSignals, if
    signals are to end the run between two steps. before: the base model's accuracies, if they are known. Raises
    ValueError for settings that cannot work (before anything is written), FileExistsError for a folder that already
    holds a run, FloatingPointError for numbers that are not finite.
    """
    began = time.perf_counter()
    check(config)
    if resuming and (Path(config.out) / "results.json").is_file():
        print(f"the run in {config.out} is finished: nothing is left to do")
        return read_json(Path(config.out) / "results.json")
    config = fill_in(config)
    tasks = load_tasks(config.tasks, config.samples, config.seed)
    check_sizes(config, tasks)
    model, tokenizer, device = load_model(config.model, config.device, config.dtype)
    config = replace(config, max_length=pick_length(model, config.max_length))
    torch.manual_seed(config.seed)
    add_adapters(model, adapter_config(config))
    if rank() > 0:  # from the same start, every process has dropout masks of its own
        torch.manual_seed(config.seed + rank())
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    batches = BalancedBatches(tasks, tokenizer, config.max_length, config.seed)
    say_cut(tokenizer, tasks, config.split, config.max_length)
    with open_run(config, resuming) as folder:
        counts = {task.name: len(getattr(task, config.split)) for task in tasks}
        scoring = config.split, config.max_length, config.score
        results = {"method": config.method, "seed": config.seed, "split": config.split, "score": config.score,
                   "samples": counts} | describe(config, model, tasks, device)
        progress = load_checkpoint(folder) if resuming else None
        if resuming:
            print(f"resumed after step {progress['step']}" if progress else "no checkpoint yet: from the first step")
        if not progress:
            progress = {"step": 0, "skipped_steps": 0, "metrics_bytes": 0, "seconds": 0.0,
                        "before": before or accuracies(model, tokenizer, tasks, *scoring)}
        progress["began"] = began - progress["seconds"]  # as if it had never been stopped
        train(model, batches, tasks, config, folder, progress, stop or StopSignals())
        columns = {"before": progress["before"]}
        columns["after"] = accuracies(model, tokenizer, tasks, *scoring)
        if config.method == "meta":  # "after" is the shared adapter as it is; this is each task's own θ_i
            columns["after_adapting"] = accuracies_after_adapting(model, tokenizer, tasks, batches, config)
        if rank() == 0:
            save_adapter(model, folder / "adapter")
        results |= columns | {f"average_{name}": average(column) for name, column in columns.items()}
        results |= {f"average_{name}_interval": average_interval(columns[name], counts) for name in columns}
        results["skipped_steps"] = progress["skipped_steps"]
        results["seconds"] = round(time.perf_counter() - progress["began"], 1)
        if rank() == 0:
            write_json(folder / "results.json", results)  # the last file: with it, the run is finished
    print(table({name.replace("_", " "): column for name, column in columns.items()}, counts))
    print(f"{config.split} accuracy in percent, with its 95 % interval over the n samples\n"
          f"{results['seconds']:.0f} s in all; the run is in\n{folder}")
    return results


def resume(folder):
    """Go on with the run in a folder from its last checkpoint, with its own settings; returns as `main` does."""
    return main(resume_config(folder), resuming=True)


def train(model, batches, tasks, config, folder, progress, stop):
    """The training loop: AdamW on the adapters, linear warm-up, cosine decay, clipped gradients.

    progress: the checkpoint to go on from, or the same without the states that `restore` needs; its `step` and
    `skipped_steps` are kept up to date. Raises Stopped, the step finished and saved, if `stop` has noted a signal.
    """
    parameters = adapter_parameters(model)
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    on_gpu = next(iter(parameters.values())).is_cuda  # there one kernel updates all; a CPU gains nothing to speak of
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=0.0, fused=on_gpu or None)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup * config.steps), config.steps)
    if "adapter" in progress:
        restore(progress, parameters, optimizer, schedule, batches)
    model.train()
    called = model  # what stands for the model in a step
    if config.compile:
        called = compile_model(model, collate([rows[0] for rows in batches.rows], [0] * len(tasks), batches.pad_id))
    if config.method != "meta":  # which averages its gradients itself
        called = data_parallel(called)
    stop.wait, stopping = True, 0  # from here on a signal is only noted, and ends the run after a step
    bar = tqdm(range(progress["step"] + 1, config.steps + 1), desc=config.method, ncols=80,
               initial=progress["step"], total=config.steps, disable=rank() > 0)
    with open_metrics(folder, progress["metrics_bytes"]) as metrics, bar:
        for step in bar:
            log = step % config.log_every == 0 or step in (1, config.steps)
            # ---------------------------------------------------------------- a single training step
            optimizer.zero_grad()
            if config.method == "meta":
                numbers, task_ids = meta_step(called, batches, config, log)
            else:
                batch = batches.balanced(config.batch_size)
                numbers, task_ids = multitask_step(called, batch, config), batch["task_ids"]
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip)
            lr = schedule.get_last_lr()[0]  # 0 in the first step, if there is a warm-up
            # No step must be taken to NaN. `bool` waits for the device: the one time in a step (but for the log).
            finite = bool(torch.isfinite(norm + numbers["loss"]))
            if finite:
                optimizer.step()
                schedule.step()
            # --------------------------------------------------------------------------------------
            progress["step"] = step
            if not finite:
                what = "gradient" if torch.isfinite(numbers["loss"]) else "loss"
                names = ", ".join(tasks[task_id].name for task_id in sorted(set(task_ids.tolist())))
                skip(f"the {what} is not finite at step {step}, in a batch of {names}", progress, config)
                numbers = {"skipped_steps": progress["skipped_steps"]}
            elif log:
                numbers = {name: round(float(value), 6) for name, value in numbers.items()}
                numbers |= {"gradient_norm": round(norm.item(), 6), "lr": lr} | head_cosines(model)
                bar.set_postfix(loss=f"{numbers['loss']:.3f}")
            if log or not finite:
                metrics.write(json.dumps({"step": step} | numbers) + "\n")
                metrics.flush()
            stopping = max(gather(stop.number))  # asked once: a signal that comes after this is for the next step
            if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                progress["seconds"] = time.perf_counter() - progress["began"]
                progress["metrics_bytes"] = synced_length(metrics)
                save_checkpoint(folder, progress | capture(parameters, optimizer, schedule, batches))
            if stopping:
                break
    stop.wait = False
    if stopping or stop.number:
        raise Stopped(stopping or stop.number)
    model.eval()
    for idle in idle_parts(parameters, start) if rank() == 0 else ():
        print(f"warning: {idle}", file=sys.stderr)


def skip(problem, progress, config):
    """Count a step that is passed over and say so; FloatingPointError if that is more than --skip-bad-steps."""
    if progress["skipped_steps"] >= config.skip_bad_steps:
        already = f", after {config.skip_bad_steps} skipped before it" if config.skip_bad_steps else ""
        raise FloatingPointError(f"{problem}{already}; a lower --lr usually helps, and --skip-bad-steps N passes over "
                                 "up to N such steps")
    progress["skipped_steps"] += 1
    if rank() == 0:
        tqdm.write(f"{problem}: skipped", file=sys.stderr)


def idle_parts(parameters, start):
    """What training should have moved and has not, a line for each kind: zero B or heads, and what is as at the start.

    parameters, start: {name: tensor}, now and before the first step.
    """
    zero = [name for name, parameter in parameters.items() if name.endswith("lora_B.weight") and not parameter.any()]
    zero += [f"{name}[{i}]" for name, parameter in parameters.items() if name.endswith("heads")
             for i, head in enumerate(parameter) if not head.any()]
    same = [name for name, parameter in parameters.items() if torch.equal(parameter, start[name])]
    return [f"{len(names)} of the adapter's tensors {what}: {', '.join(names[:3])}{', …' if names[3:] else ''}"
            for names, what in ((zero, "are still zero, so they do nothing"), (same, "were changed by no step"))
            if names]


def describe(config, model, tasks, device):
    """Print what is going to happen; returns the numbers of parameters, for the results."""
    trainable = sum(p.numel() for p in adapter_parameters(model).values())
    total = sum(p.numel() for p in model.parameters())
    sizes = [len(task.train) for task in tasks]
    span = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    where = device if world() == 1 else f"{device}, in {world()} processes"
    print(f"{config.method} on {Path(config.model).name}: {len(tasks)} tasks of {span} training samples\n"
          f"{config.steps} steps at a learning rate of {config.lr:g}, on {where}\n"
          f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.1f} %)")
    return {"trainable_parameters": trainable, "total_parameters": total}


def multitask_step(model, batch, config):
    """Gradients of one step for every method but MeTA-LoRA, left in `.grad`; returns the numbers to log.

        L = L_task (+ λ · L_align)          in the log: `loss` is L_task, `alignment` is L_align without λ
    Computed in `accumulation` pieces. The pieces' losses are divided by the labels of the whole batch, and the
    alignment is that of the whole batch, so the gradient is the same for any number of pieces, but for dropout and for
    the random tokens of MMD. In the same way for several processes, each of which is given the whole batch and computes
    its share.
    """
    if config.shuffle_groups:  # as many samples in each group as before, but of any task
        with same_random_numbers(torch.device("cpu")):
            batch = batch | {"task_ids": batch["task_ids"][torch.randperm(len(batch["task_ids"]))]}
    pieces = split_batch(share(batch), config.accumulation)
    label_count = (batch["labels"] != NO_LABEL).sum()
    numbers = {"loss": 0.0}
    if config.method == "align" and len(pieces) > 1:
        numbers["alignment"], gradients = alignment_gradients(model, pieces, config.align)
    for i, piece in enumerate(pieces):
        with nullcontext() if i == len(pieces) - 1 else keep_to_itself(model):  # the last one exchanges the sum of all
            with collect_features(model) if config.method == "align" else nullcontext() as features:
                loss = label_loss(model, piece, label_count)
            numbers["loss"] += loss.detach()
            if config.method == "align":
                if len(pieces) == 1:
                    alignment = alignment_loss(features, piece, config.align)
                    numbers["alignment"] = alignment.detach()
                else:  # not L_align itself, but of the same gradient
                    alignment = through_features(features, piece, gradients[i])
                loss = loss + config.align_weight * alignment
            (world() * loss).backward()  # the exchange takes the mean over the processes; this makes it the sum
    numbers["loss"] = sum_over_processes(numbers["loss"])
    return numbers


def meta_step(model, batches, config, log):
    """MeTA-LoRA's two stages for one round, the outer gradient left in `.grad`; returns the numbers to log."""
    episodes = batches.episodes(min(config.tasks_per_round, len(batches.rows)), config.support, config.query)
    losses = [] if log else None
    gradients = meta_gradients(model, episodes[rank()::world()], config.inner_lr, config.inner_steps, losses)
    average_over_processes(gradients.values())  # each has as many tasks as any other
    for name, parameter in adapter_parameters(model).items():
        parameter.grad = gradients[name]
    task_ids = torch.cat([query["task_ids"] for _, query in episodes])
    numbers = {"loss": torch.zeros(())}  # between two log steps the gradient's norm alone tells what is not finite
    if log:
        means = torch.tensor(losses).mean(0)  # [n, 3] -> 3 means over the tasks
        average_over_processes([means])
        before, after, query_loss = means
        numbers = {"loss": query_loss, "support_loss_before": before, "support_loss_after": after}
    return numbers, task_ids


def accuracies_after_adapting(model, tokenizer, tasks, batches, config):
    """{task: accuracy} with stage 1 run once more for each task, on support + query of its own training samples."""
    scores = {}
    for task_id, task in enumerate(tasks):
        rows = [batches.rows[task_id][index] for index in batches.draw(task_id, config.support + config.query)]
        support = collate(rows, [task_id] * len(rows), tokenizer.pad_token_id)
        if task_id % world() == rank():  # all draw for every task, so that each gets the samples it always gets
            with adapted_to(model, support, config.inner_lr, config.inner_steps):
                scores[task.name] = task_accuracy(model, tokenizer, task, config.split, config.max_length, config.score)
    scores = merge(scores)
    return {task.name: scores[task.name] for task in tasks}


def parse(argv=None):
    """Command line -> (TrainConfig, whether it is a run to go on with).

    argparse itself answers unknown flags and values, with exit status 2; ValueError as in `resume_config`.
    """
    parser = Parser("train", __doc__)
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, which has its settings")
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    folder = given.pop("resume")
    return (TrainConfig(**given), False) if folder is None else (resume_config(folder, **given), True)


def command(argv=None):
    """The command: a signal ends it between two steps, with a checkpoint."""
    with process_group():
        config, resuming = parse(argv)
        with StopSignals() as stop:
            main(config, resuming, stop)

