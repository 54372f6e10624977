"""How fast is it? python -m tinylora_mtl.lab.bench --model path/to/a/model --out runs/bench.json

Every figure is a ratio: what something costs against the same work done in another way, or against a method that it
adds to. ROWS is the list; the functions above it make the two sides of each, from the TrainConfig of a LoRA run. Times
are taken by turns in one process, memory in fresh processes (`cost.py`); a ratio is the median of the paired ratios,
with their quartiles. Let nothing else compute while it runs.
"""

import io
import itertools
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F

from ..adapters import find_adapters
from ..batching import encode_target
from ..config import TrainConfig
from ..data.tasks import load_tasks
from ..evaluate import EXTRA_TOKENS, generate_answers
from ..loss import NO_LABEL, label_loss
from ..multihead import MultiHeadLoRALinear
from ..run import cli, files, models
from ..run.checkpoint import place_of, put_back
from ..train import TrainState, train
from .cost import MEMORY_REPEATS, begin_run, paired_ratio, peaks, some_batches, stepper, take_turns, training_steps
from .report import markdown_table

SHAPES = ((576, 1536), (896, 4864))  # d_in, d_out of the widest layers of SmolLM2-135M and Qwen2.5-0.5B
LAYER_TOKENS = 1024
RUN_STEPS = 10  # of a whole training run


def base_model(config):
    """(the model without adapters, its tokenizer)."""
    return models.load_model(config.model, config.device, config.dtype)[:2]


def peft_model(config, names, dropout):
    """The base model with PEFT's LoRA in the layers of these names."""
    from peft import LoraConfig, get_peft_model
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=dropout, target_modules=names,
                      task_type="CAUSAL_LM")
    return get_peft_model(base_model(config)[0], lora).train()


def step_and_peft(config, dropout):
    """A training step through our LoRA layers, and one through PEFT's."""
    config, model, batches = begin_run(replace(config, dropout=dropout))
    theirs = peft_model(config, list(find_adapters(model)), dropout).base_model.model  # inside, as our loop takes it
    drawn = some_batches(batches)
    return stepper(model, config, drawn), stepper(theirs, config, drawn)


def step_and_floor(config, dropout):
    """What no adapter that trains can do without: forward, and backward down to the embedded tokens."""
    config, model, batches = begin_run(replace(config, dropout=dropout))
    frozen = base_model(config)[0].requires_grad_(False).train()
    frozen.enable_input_require_grads()
    drawn = some_batches(batches)
    turn = itertools.cycle(drawn)
    return stepper(model, config, drawn), lambda: label_loss(frozen, next(turn)).backward()


def two_methods(config, methods, **settings):
    """A training step of each of two methods."""
    return training_steps(*(replace(config, method=method, **settings) for method in methods))


def layer_and_loop(config, shape, heads):
    """R-LoRA's layer, forward and backward, in our form and in the published one, on the same parameters."""
    torch.manual_seed(0)
    device = models.pick_device(config.device)
    layer = MultiHeadLoRALinear(torch.nn.Linear(*shape, device=device), config.rank, config.alpha, heads,
                                head_dropout=0.1, random_init=True, rank_stabilized=True)
    x, upstream = (torch.randn(LAYER_TOKENS, width, device=device) for width in shape)
    inputs = [x.requires_grad_(), *(parameter for parameter in layer.parameters() if parameter.requires_grad)]

    def gradients(form):
        return torch.autograd.grad(form(x), inputs, upstream)
    return partial(gradients, layer), partial(gradients, partial(loop_over_heads, layer))


def loop_over_heads(layer, x):
    """y = W x + b + Σ_i w_i · s B_i drop(A x), with an A x and an output [..., d_out] for each head."""
    y, weights = layer.base(x), torch.softmax(layer.router(x), dim=-1)  # [..., N]
    for i, head in enumerate(layer.heads):
        y = y + weights[..., i:i + 1] * F.linear(layer.head_dropout(layer.lora_A(x)), head) * layer.scaling
    return y


def round_and_steps(lora):
    """A round of MeTA-LoRA, and a LoRA step on each of the batches that it computes gradients on."""
    each = lora.batch_size // 4
    config, model, rounds = begin_run(replace(lora, method="meta", tasks_per_round=2, inner_steps=2, support=each,
                                              query=each))
    episodes = next(rounds)  # the same in every round, for tasks differ in length
    batches = [batch for support, query in episodes for batch in [support] * config.inner_steps + [query]]
    lora, lora_model, _ = begin_run(lora)
    step = stepper(lora_model, lora, batches)
    return stepper(model, config, [episodes]), lambda: [step() for _ in batches]


def run_and_trainer(config):
    """A whole run, and PEFT with transformers' Trainer, as its users write it, on the same samples."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    config, model, batches = begin_run(replace(config, steps=RUN_STEPS))
    theirs = peft_model(config, list(find_adapters(model)), 0.0)
    start = place_of(batches)
    rows = [{"input_ids": ids[real > 0].tolist(), "labels": labels[real > 0].tolist()}
            for batch in itertools.islice(batches, RUN_STEPS)
            for ids, real, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"])]
    collator = DataCollatorForSeq2Seq(base_model(config)[1], label_pad_token_id=NO_LABEL)

    class InOrder(Trainer):  # it shuffles otherwise
        def _get_train_sampler(self, *_):
            return None

    def ours():
        put_back(batches, start)
        return [metrics["loss"].item() for _, metrics in train(model, TrainState(model, batches, config), config)]

    def trainer():
        with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            InOrder(theirs, TrainingArguments(
                folder, max_steps=RUN_STEPS, per_device_train_batch_size=len(rows) // RUN_STEPS,
                learning_rate=config.lr, lr_scheduler_type="cosine", logging_steps=config.log_every,
                save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=model.device.type == "cpu"),
                train_dataset=rows, data_collator=collator).train()
    return ours, trainer


def evaluation_and_loop(config):
    """Answers written in batches, and one sample at a time."""
    (model, tokenizer), tasks = base_model(config), load_tasks(config.tasks)
    samples = [sample for task in tasks for sample in (task.test or task.validation)[:config.batch_size // 4]]

    def plain(prompt, target):  # as anyone would write it down
        max_new_tokens = len(encode_target(tokenizer, target)) + EXTRA_TOKENS  # never more than in a batch
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
        written = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, stop_strings=["\n"],
                                 tokenizer=tokenizer, pad_token_id=tokenizer.pad_token_id)
        text = tokenizer.decode(written[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return text.split("\n")[0].strip()
    return partial(generate_answers, model, tokenizer, samples), lambda: [plain(*sample) for sample in samples]


@dataclass(frozen=True)
class Row:
    """Something measured against something else, on the same samples."""

    number: int
    what: str
    against: str
    sides: Callable  # (the TrainConfig of a LoRA run) -> the two sides, ours and theirs
    targets: dict  # {"time", "memory" or "speed" (samples in a time): (at least, at most)}; None: no such bound
    where: str = "models"  # the embedded model and the one of --model; only that "model"; single "layers" of real size


ROWS = [
    *[Row(1, f"LoRA step, dropout {dropout:g}", "PEFT's LoRA", partial(step_and_peft, dropout=dropout),
          {"time": (None, 1.0)}) for dropout in (0.0, 0.05)],
    *[Row(2, f"LoRA step, dropout {dropout:g}", "frozen model, to its inputs", partial(step_and_floor, dropout=dropout),
          {"time": (None, bound)}, "model") for dropout, bound in ((0.0, 1.12), (0.05, 1.25))],
    Row(3, "R-LoRA step, 5 heads", "LoRA", partial(two_methods, methods=("rlora", "lora")), {"time": (None, 1.25)}),
    *[Row(4, f"R-LoRA layer, {heads} heads, {shape[0]} → {shape[1]}", "loop over heads, as published",
          partial(layer_and_loop, shape=shape, heads=heads), {"time": (None, time), "memory": (None, memory)}, "layers")
      for heads, time, memory in ((5, 0.75, 0.8), (16, 0.5, 0.5)) for shape in SHAPES],
    *[Row(5, f"R-LoRA step, dropout {dropout:g}", "HydraLoRA",
          partial(two_methods, methods=("rlora", "hydralora"), dropout=dropout),
          {"time": (None, 1.0), "memory": (None, 1.0)}) for dropout in (0.1, 0.0)],
    Row(6, "Align step (KL)", "LoRA", partial(two_methods, methods=("align", "lora")), {"time": (None, 1.05)}),
    Row(7, "Align step (MMD)", "LoRA", partial(two_methods, methods=("align", "lora"), align="mmd"),
        {"time": (None, 1.25)}),
    Row(8, "MeTA round", "(k + 1) n LoRA steps", round_and_steps, {"time": (None, 1.05)}),
    Row(9, "whole LoRA run", "PEFT and Trainer", run_and_trainer, {"time": (None, 0.75)}, "model"),
    Row(10, "evaluation", "`generate`, one by one", evaluation_and_loop, {"speed": (5.0, None)}),
]


def figure_of(row, quantity, config, repeats):
    """A figure of a row, a dict; where something is not installed, it names it."""
    target = row.targets[quantity]
    figure = {"row": row.number, "what": row.what, "against": row.against, "quantity": quantity, "target": list(target)}
    try:
        measure = peaks if quantity == "memory" else take_turns
        return figure | paired_ratio(*measure(row.sides, (config,), repeats), quantity, target)
    except ImportError as error:
        return figure | {"missing": error.name or str(error).strip().split("\n")[0]}


def in_words(figure):
    """A figure in words: ratio, quartiles, and whether the target is reached."""
    if "missing" in figure:
        return f"not measured: needs {figure['missing']}"
    low, high = figure["quartiles"]
    return f"{figure['ratio']:.2f} ({low:.2f}-{high:.2f}){'' if figure['reached'] else ', not reached'}"


def figure_table(results):
    """The results as a table in Markdown, and what they were measured on."""
    lines = {}
    for figure in results["figures"]:
        least, most = figure["target"]
        target = f"at most {most}" if least is None else f"at least {least}" if most is None else f"{least} to {most}"
        name = figure["row"], f"{figure['what']}: {figure['quantity']}", figure["against"], target
        lines.setdefault(name, {})[figure["on"]] = in_words(figure)
    table = markdown_table(["", "", "against", "target", *(Path(column).name for column in results["columns"])], [
        [*name, *(cells.get(column, "") for column in results["columns"])] for name, cells in lines.items()])
    return (f"{table}\n\nRatios, medians of {results['repeats']} turns of each side (of memory at most "
            f"{MEMORY_REPEATS}), with their quartiles; weights in {results['dtype']}.\nOn {results['on']}.")


def main(argv=None):
    """Measure, print the table; returns the results."""
    parser = cli.Parser("lab.bench", __doc__)
    parser.add_argument("--model", default="mini", help="a folder or Hub name, measured beside mini; rows 2 "
                        "and 9 need one")
    parser.add_argument("--tasks", nargs="+", default=["mini"], help="the tasks of that model (default: mini's)")
    parser.add_argument("--rows", type=cli.whole(1, 10), nargs="+", metavar="N", default=range(1, 11),
                        help="which rows of the table to measure (default: all 10)")
    parser.add_argument("--repeats", type=cli.whole(1), default=7, help="turns of each side (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", *models.DTYPES], help="of the frozen weights")
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    args = parser.parse_args(argv)

    if args.out:
        files.make_folder(args.out.parent)
    configs = {"mini": TrainConfig(method="lora", device=args.device, dtype=args.dtype)}
    if args.model != "mini":
        configs[args.model] = replace(configs["mini"], model=args.model, tasks=args.tasks, batch_size=16)
    for config in configs.values():
        if not 2 <= len(load_tasks(config.tasks)) <= config.batch_size:
            raise ValueError(f"--tasks must be from 2 to {config.batch_size} tasks: a batch has samples of each")
    columns = ["mini", "real size" if args.model == "mini" else args.model]
    places, figures = {"models": list(configs), "model": list(configs)[1:], "layers": columns[1:]}, []
    device = models.pick_device(args.device)
    dtype = "float32" if (args.dtype, device.type) == ("auto", "cpu") else args.dtype
    results = {"columns": columns, "repeats": args.repeats, "on": models.machine_name(device), "dtype": dtype,
               "figures": figures}
    for row in (row for number in args.rows for row in ROWS if row.number == number):
        for on, quantity in itertools.product(places[row.where], row.targets):
            figure = figure_of(row, quantity, configs.get(on, configs["mini"]), args.repeats)
            print(f"{row.number} {row.what}, {quantity}, {on}: {in_words(figure)}", file=sys.stderr, flush=True)
            figures.append(figure | {"on": on})
            if args.out:  # now, for it may be stopped
                files.write_json(args.out, results)
    print(figure_table(results))
    return results


if __name__ == "__main__":
    cli.run_command(main)
