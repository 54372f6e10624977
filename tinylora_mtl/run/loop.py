"""A run: `train`, with what happens between two steps: log, progress bar, checkpoints, signals, steps passed over."""

import json
import sys
import time

from tqdm.auto import tqdm

from ..batching import collate
from ..train import train
from .checkpoint import capture, open_metrics, save_checkpoint, synced_length
from .cli import Stopped
from .distributed import gather, process_rank
from .gradients import gradients_for
from .likeness import head_cosines
from .models import compile_model


def run_steps(model, state, config, tasks, folder, progress, began, stop):
    """Train from where `state` stands to the last step; `progress` is kept up to date.

    tasks: for what is said of a step that is passed over; began: when the run began, as time.perf_counter() has it.
    Raises Stopped, the step finished and saved, if `stop` has noted a signal.
    """
    called = model.train()  # what stands for the model in a step
    if config.compile:
        sample = collate([rows[0] for rows in state.batches.rows], [0] * len(tasks), state.batches.pad_id)
        called = compile_model(model, sample)
    stop.wait, stopping = True, 0  # from here on a signal is only noted, and ends the run after a step
    bar = tqdm(desc=config.method, ncols=80, initial=state.step, total=config.steps, disable=process_rank() > 0)
    with open_metrics(folder, progress.metrics_bytes) as metrics, bar:
        for step, numbers in good_steps(called, state, config, progress, tasks):
            log = step % config.log_every == 0 or step in (1, config.steps)
            if "loss" in numbers and log:
                numbers = {name: value if name == "lr" else round(float(value), 6) for name, value in numbers.items()}
                numbers |= head_cosines(model)
                bar.set_postfix(loss=f"{numbers['loss']:.3f}", refresh=False)
            bar.update()
            if "loss" not in numbers or log:
                metrics.write(json.dumps({"step": step} | numbers) + "\n")
                metrics.flush()
            stopping = max(gather(stop.number))  # asked once: a signal that comes after this is for the next step
            if step % config.checkpoint_every == 0 or step == config.steps or stopping:
                progress.seconds, progress.metrics_bytes = time.perf_counter() - began, synced_length(metrics)
                save_checkpoint(folder, capture(state, progress, model))
            if stopping:
                break
    stop.wait = False
    if stopping or stop.number:
        raise Stopped(stopping or stop.number)
    model.eval()


def good_steps(model, state, config, progress, tasks):
    """(step, metrics) of every step of `train`; of a step that is passed over, metrics is {"skipped_steps": how many}.

    Raises FloatingPointError if that is more than config.skip_bad_steps.
    """
    gradients, seen = gradients_for(config), []

    def step_gradients(model, batch, config):
        seen[:] = [query["task_ids"] for _, query in batch] if isinstance(batch, list) else [batch["task_ids"]]
        return gradients(model, batch, config)

    while state.step < config.steps:
        try:
            yield from train(model, state, config, step_gradients)
        except FloatingPointError as error:
            names = ", ".join(tasks[number].name for number in sorted({i for ids in seen for i in ids.tolist()}))
            problem = f"{error}, in a batch of {names}"
            if progress.skipped_steps >= config.skip_bad_steps:
                already = f", after {config.skip_bad_steps} skipped before it" if config.skip_bad_steps else ""
                raise FloatingPointError(f"{problem}{already}; a lower --lr usually helps, and --skip-bad-steps N "
                                         "passes over up to N such steps") from error
            progress.skipped_steps += 1
            if process_rank() == 0:
                tqdm.write(f"{problem}: skipped", file=sys.stderr)
            yield state.step, {"skipped_steps": progress.skipped_steps}
