"""What `bench` measures: the rows, as data, and for each a function that makes its two sides, (ours, theirs).

A side is a function without arguments that does the work once. Both sides of a row do it on the same samples.
"""

import io
import itertools
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from ..run import training as train
from ..adapters import find_adapters, merge_adapters, target_names
from ..align import alignment_of
from ..batching import NO_LABEL, encode_target, label_logits, label_loss
from ..run.cli import StopSignals
from .cost import draw, prepare, step_through, stepper, training_step
from ..evaluate import SLACK, evaluation_mode, generate_answers
from ..meta import meta_gradients
from ..run.models import load_model, pick_device
from ..multihead import MultiHeadLoRALinear
from ..run.settings import TrainConfig, fill_in
from ..data.tasks import load_tasks

LAYER_TOKENS, LOSS_TOKENS = 1024, 4096
RUN_STEPS = 10  # of a whole training run


@dataclass(frozen=True)
class Place:
    """A model to measure on, with its tasks, or (with `shape`) a single layer."""

    name: str
    kind: str = "mini"  # or "model" or "layers", as in `Row.where`
    model: str = "mini"
    tasks: tuple = ("mini",)
    batch_size: int = 64
    samples: int = 16  # of each task, to evaluate
    device: str = "auto"
    dtype: str = "auto"
    shape: tuple | None = None  # (d_in, d_out)

    def config(self, **changes):
        """The TrainConfig of a run here."""
        return fill_in(TrainConfig(**{"model": self.model, "tasks": self.tasks, "batch_size": self.batch_size,
                                      "device": self.device, "dtype": self.dtype, "method": "lora"} | changes))

    def base(self):
        """(the model without adapters, its tokenizer)."""
        return load_model(self.model, self.device, self.dtype)[:2]


# --------------------------------------------------------------------------------------------------- the two sides
def peft_model(place, names, dropout):
    """The base model with PEFT's LoRA in the layers of these names."""
    from peft import LoraConfig, get_peft_model
    lora = LoraConfig(r=TrainConfig.rank, lora_alpha=TrainConfig.alpha, lora_dropout=dropout, target_modules=names,
                      task_type="CAUSAL_LM")
    return get_peft_model(place.base()[0], lora).train()


def step_and_peft(place, dropout):
    config, model, batches = prepare(place.config(dropout=dropout))
    theirs = peft_model(place, list(find_adapters(model)), dropout).base_model.model  # inside, as our loop takes it
    drawn = draw(batches, config)
    return step_through(model, drawn, config), step_through(theirs, drawn, config)


def step_and_floor(place, dropout):
    """What no adapter that trains can do without: forward, and backward down to the embedded tokens."""
    config, model, batches = prepare(place.config(dropout=dropout))
    frozen = place.base()[0].requires_grad_(False).train()
    frozen.enable_input_require_grads()
    drawn = draw(batches, config)
    turn = itertools.cycle(drawn)
    return step_through(model, drawn, config), lambda: label_loss(frozen, next(turn)).backward()


def layer_and_loop(place, heads):
    """R-LoRA's layer, forward and backward, in our form and in the published one, on the same parameters."""
    torch.manual_seed(0)
    device = pick_device(place.device)
    layer = MultiHeadLoRALinear(torch.nn.Linear(*place.shape, device=device), TrainConfig.rank, TrainConfig.alpha,
                                heads, head_dropout=0.1, random_init=True, rank_stabilized=True)
    x = torch.randn(LAYER_TOKENS, place.shape[0], device=device, requires_grad=True)
    upstream = torch.randn(LAYER_TOKENS, place.shape[1], device=device)
    inputs = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return [partial(lambda form: torch.autograd.grad(form(x), inputs, upstream), form)
            for form in (layer, partial(loop_over_heads, layer))]


def loop_over_heads(layer, x):
    """y = W x + b + Σ_i w_i · s B_i drop(A x), with an A x and an output [..., d_out] for each head."""
    y, weights = layer.base(x), torch.softmax(layer.router(x), dim=-1)  # [..., N]
    for i, head in enumerate(layer.heads):
        y = y + weights[..., i:i + 1] * F.linear(layer.head_dropout(layer.lora_A(x)), head) * layer.scaling
    return y


def losses(place, ours, theirs):
    """The alignment loss and its gradient, for two numbers of tasks among the same tokens."""
    config = place.config()
    names, device = target_names(place.base()[0], config.targets), pick_device(place.device)
    features = {name: torch.randn(LOSS_TOKENS, config.rank, device=device, requires_grad=True) for name in names}

    def loss(tasks):
        owner = torch.arange(LOSS_TOKENS) % tasks
        return torch.autograd.grad(alignment_of(features, owner, "kl"), list(features.values()))
    return partial(loss, ours), partial(loss, theirs)


def round_and_steps(place):
    """A round of MeTA-LoRA, and a LoRA step on each of the batches that it computes gradients on."""
    each = place.batch_size // 4
    config, model, batches = prepare(place.config(method="meta", tasks_per_round=2, inner_steps=2, support=each,
                                                  query=each))
    _, other, _ = prepare(place.config())
    episodes = batches.episodes(config.tasks_per_round, config.support, config.query)
    batches.episodes = lambda *_: episodes  # the same in every round, for tasks differ in length
    waiting = []
    step = stepper(other, lambda: train.multitask_step(other, waiting.pop(), config), config)

    def steps():
        for support, query in episodes:
            waiting.extend([support] * config.inner_steps + [query])
        while waiting:
            step()
    return stepper(model, lambda: train.meta_step(model, batches, config, log=False), config), steps


def two_rounds(place, ours, theirs):
    """MeTA-LoRA's gradients with k = n = ours, and = theirs, all from one support and one query batch."""
    config, model, batches = prepare(place.config(method="meta"))
    episode, = batches.episodes(1, place.batch_size // 4, place.batch_size // 4)
    return [partial(meta_gradients, model, [episode] * size, config.inner_lr, size) for size in (ours, theirs)]


def run_and_trainer(place):
    """A whole run of `train`, and PEFT with transformers' Trainer, as its users write it, on the same samples."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    config, model, batches = prepare(place.config(steps=RUN_STEPS))
    theirs, tasks = peft_model(place, list(find_adapters(model)), 0.0), load_tasks(place.tasks)
    start = batches.state()
    rows = [{"input_ids": ids[real > 0].tolist(), "labels": labels[real > 0].tolist()} for _ in range(RUN_STEPS)
            for batch in [batches.balanced(config.batch_size)]
            for ids, real, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])]

    collator = DataCollatorForSeq2Seq(place.base()[1], label_pad_token_id=NO_LABEL)

    class InOrder(Trainer):  # it shuffles otherwise
        def _get_train_sampler(self, *_):
            return None

    def ours():
        batches.set_state(start)
        progress = {"step": 0, "skipped_steps": 0, "metrics_bytes": 0, "seconds": 0.0, "began": time.perf_counter()}
        with TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            train.train(model, batches, tasks, config, Path(folder), progress, StopSignals())

    def trainer():
        with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            InOrder(theirs, TrainingArguments(
                folder, max_steps=RUN_STEPS, per_device_train_batch_size=len(rows) // RUN_STEPS,
                learning_rate=config.lr, lr_scheduler_type="cosine", logging_steps=config.log_every,
                save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=model.device.type == "cpu"),
                train_dataset=rows, data_collator=collator).train()
    return ours, trainer


def evaluation_and_loop(place):
    """Answers written in batches, and one sample at a time."""
    (model, tokenizer), tasks = place.base(), load_tasks(place.tasks)
    samples = [sample for task in tasks for sample in (task.test or task.validation)[:place.samples]]
    return partial(generate_answers, model, tokenizer, samples), partial(plain_answers, model, tokenizer, samples)


def plain_answers(model, tokenizer, samples):
    """The answers as anyone would write it down: `generate` for one sample after another."""
    answers = []
    for prompt, target in samples:
        room = len(encode_target(tokenizer, target)) + SLACK  # never more than in a batch
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        written = model.generate(**inputs, do_sample=False, max_new_tokens=room, stop_strings=["\n"],
                                 tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(written[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        answers.append(text.split("\n")[0].strip())
    return answers


def merged_and_base(place):
    """A forward pass of the model with its adapters merged, and of the base model."""
    config, model, batches = prepare(place.config())
    with torch.no_grad():
        for adapter in find_adapters(model).values():
            adapter.lora_B.weight.normal_(std=0.01)
    merge_adapters(model)
    batch = batches.balanced(config.batch_size)

    def forward(model):
        with evaluation_mode(model):
            return label_logits(model, batch)[0]
    return partial(forward, model), partial(forward, place.base()[0])


# -------------------------------------------------------------------------------------------------------- the rows
@dataclass(frozen=True)
class Row:
    """Something measured against something else."""

    number: int
    what: str
    against: str
    make: Callable  # (place) -> the two sides
    targets: dict  # {"time", "memory" or "speed" (samples in a time): (at least, at most)}; None: no such bound
    where: tuple = ("mini", "model")  # the embedded model, the one of --model, or single "layers" of real size


def at_most(bound):
    return None, bound


def methods(ours, theirs):
    """Two training steps by their settings."""
    return lambda place: (training_step(place.config(**ours)), training_step(place.config(**theirs)))


ROWS = [
    *[Row(1, f"LoRA step, dropout {dropout:g}", "PEFT's LoRA", partial(step_and_peft, dropout=dropout),
          {"time": at_most(1.0)}) for dropout in (0.0, 0.05)],
    *[Row(2, f"LoRA step, dropout {dropout:g}", "frozen model, to its inputs",
          partial(step_and_floor, dropout=dropout), {"time": at_most(bound)}, where=("model",))
      for dropout, bound in ((0.0, 1.12), (0.05, 1.25))],
    Row(3, "R-LoRA step, 5 heads", "LoRA", methods({"method": "rlora"}, {}), {"time": at_most(1.25)}),
    *[Row(4, f"R-LoRA layer, {heads} heads", "loop over heads, as published", partial(layer_and_loop, heads=heads),
          {"time": at_most(time), "memory": at_most(memory)}, where=("layers",))
      for heads, time, memory in ((5, 0.75, 0.8), (16, 0.5, 0.5))],
    *[Row(5, f"R-LoRA step, dropout {dropout:g}", "HydraLoRA",
          methods({"method": "rlora", "dropout": dropout}, {"method": "hydralora", "dropout": dropout}),
          {"time": at_most(1.0), "memory": at_most(1.0)}) for dropout in (0.1, 0.0)],
    Row(6, "Align step (KL)", "LoRA", methods({"method": "align"}, {}), {"time": at_most(1.05)}),
    Row(7, "Align step (MMD)", "LoRA", methods({"method": "align", "align": "mmd"}, {}), {"time": at_most(1.25)}),
    Row(8, "alignment loss (KL), 512 tasks", "8 tasks", partial(losses, ours=512, theirs=8), {"time": at_most(2.0)}),
    Row(9, "MeTA round", "(k + 1) n LoRA steps", round_and_steps, {"time": at_most(1.05)}),
    Row(10, "MeTA round, k = n = 8", "k = n = 1", partial(two_rounds, ours=8, theirs=1), {"memory": at_most(1.05)}),
    Row(11, "whole LoRA run", "PEFT and Trainer", run_and_trainer, {"time": at_most(0.75)}, where=("model",)),
    Row(12, "evaluation", "`generate`, one by one", evaluation_and_loop, {"speed": (5.0, None)}),
    Row(13, "merged model, forward", "base model", merged_and_base, {"time": (0.97, 1.03)}),
]
