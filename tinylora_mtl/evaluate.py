"""Accuracy per task: python -m tinylora_mtl.evaluate --run runs/align-mini-seed0 --show 5

Two ways of scoring. `generate`: the model writes its answer greedily, up to the first line break or end token, and it
is right if it equals the target (see `normalize`). `choose`, for tasks with a closed set of labels: the answer is the
label that the model finds most likely. Without --run or --adapter the base model itself is scored. Tasks that were not
trained on are best asked with solved examples before each prompt: --tasks bbh --shots 3 --max-length 1024.
"""

import math
import re
from contextlib import contextmanager
from dataclasses import replace
from decimal import Context, Decimal
from pathlib import Path

import torch

from .adapters import load_adapter
from .batching import collate, encode_prompt, encode_target, forward, send
from .run.cli import Parser, run_command
from .run.distributed import merge, rank, world
from .run.models import load_model, pick_length
from .run.settings import TrainConfig, read_config
from .data.tasks import SCORES, check_labels, load_tasks, require_samples, with_shots

SLACK = 4  # tokens that an answer may have beyond the longest target, for "(B)" where the target is "B"


# --------------------------------------------------------------------------------------------------------- answers
def generate_answers(model, tokenizer, samples, max_length=512, batch_size=128):
    """The model's greedy answer to each (prompt, target) sample, a list of str in the same order.

    An answer ends at its first line break or end token: what a model goes on to invent is never read. It may be SLACK
    tokens longer than the longest target of its batch; one that is cut off there ends in "…", and is never right.
    """
    ends = set(tokenizer.all_special_ids)
    own = model.generation_config.eos_token_id  # a chat model's turns end in other tokens than its texts
    eos = sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})
    answers = [""] * len(samples)
    for chosen in like_lengths(samples, batch_size):
        room = max(len(encode_target(tokenizer, samples[i][1])) for i in chosen) + SLACK
        batch = prompt_batch(tokenizer, [samples[i][0] for i in chosen], max_length - room, model.device)
        with evaluation_mode(model):
            written = model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
                do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,  # greedy, plainly
                max_new_tokens=room, stop_strings=["\n"], tokenizer=tokenizer,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=eos)[:, batch["input_ids"].shape[1]:]  # [batch, new]
        for i, ids in zip(chosen, written.tolist()):
            length = next((n for n, token in enumerate(ids) if token in ends | set(eos)), None)
            line, *after = tokenizer.decode(ids[:length]).split("\n", 1)
            answers[i] = line.strip() + ("" if after or length is not None else " …")
    return answers


def choose_answers(model, tokenizer, samples, labels, max_length=512, batch_size=128):
    """For each (prompt, target) sample the label that is likeliest as its whole answer, a list of str.

        argmax over labels of log p(label, end token | prompt), summed over the label's tokens
    The end token counts, so that a label is not preferred for being the beginning of another ("1" and "10").
    """
    options = [encode_target(tokenizer, label) for label in labels]
    answers = [""] * len(samples)
    for chosen in like_lengths(samples, max(1, batch_size // len(labels))):
        batch = prompt_batch(tokenizer, [samples[i][0] for i in chosen], max_length - max(map(len, options)),
                             model.device)
        with evaluation_mode(model):
            likely = log_likelihoods(model, batch, options)
        if not torch.isfinite(likely).all():
            raise FloatingPointError("the likelihoods of the labels are not finite, so none can be chosen; in float16 "
                                     "they can overflow: try --dtype float32")
        for i, label in zip(chosen, likely.argmax(-1).tolist()):
            answers[i] = labels[label]
    return answers


def log_likelihoods(model, batch, options):
    """log p(option | prompt) for a batch of prompts and each of `options`, lists of token ids -> [prompts, options].

    A prompt is read once, whatever the number of options: they go on from its keys and values.
    """
    mask, count, longest = batch["attention_mask"], len(options), max(map(len, options))
    ids = torch.tensor([option + [0] * (longest - len(option)) for option in options], device=mask.device)
    read = forward(model, batch["input_ids"], mask, 1, use_cache=True)
    logits = read.logits[:, -1:].repeat_interleave(count, 0)  # [prompts · options, 1, vocabulary]: the first token's
    if longest > 1:
        try:
            cache = read.cache if "cache" in read else read.past_key_values  # its newer and its older name
            cache.batch_repeat_interleave(count)
        except AttributeError as error:  # a recurrent model keeps a state instead
            raise ValueError("this model has no keys and values to go on from; use --score generate") from error
        new = ids[:, :-1].repeat(len(mask), 1)  # [prompts · options, longest - 1]
        mask = torch.cat([mask.repeat_interleave(count, 0), torch.ones_like(new)], 1)
        rest = forward(model, new, mask, longest - 1, use_cache=True, cache=cache).logits
        logits = torch.cat([logits, rest], 1)  # [prompts · options, longest, vocabulary]
    chosen = logits.float().log_softmax(-1).gather(-1, ids.repeat(len(batch["input_ids"]), 1)[..., None])[..., 0]
    counted = torch.tensor([[i < len(option) for i in range(longest)] for option in options], device=mask.device)
    return (chosen.view(-1, count, longest) * counted).sum(-1)  # [prompts, options]


@contextmanager
def evaluation_mode(model):
    """No dropout and no gradient within the block; the model's mode is as before after it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def like_lengths(samples, batch_size):
    """Lists of indices of (prompt, target) samples, those of like length together.

    No prompt is more than half as long again as another of its list: on a CPU, padding costs as much as text.
    """
    lists = []
    for i in sorted(range(len(samples)), key=lambda i: len(samples[i][0])):
        if not lists or len(lists[-1]) == batch_size or len(samples[i][0]) > 1.5 * len(samples[lists[-1][0]][0]):
            lists.append([])
        lists[-1].append(i)
    return lists


def prompt_batch(tokenizer, prompts, max_length, device):
    """A batch of prompts, without labels, on a device."""
    rows = [encode_prompt(tokenizer, prompt, max_length) for prompt in prompts]
    batch = collate([(ids, ids) for ids in rows], [0] * len(rows), tokenizer.pad_token_id)
    return {key: send(tensor, device) for key, tensor in batch.items()}


def count_cut(tokenizer, tasks, split, max_length):
    """How many prompts of a split are too long for `max_length`, answer included, so that their beginning is not read.

    Raises ValueError for a target that leaves no room for its prompt.
    """
    cut = 0
    for task in tasks:
        for prompt, target in getattr(task, split):
            room = len(encode_target(tokenizer, target)) + SLACK
            if room >= max_length:
                raise ValueError(f"task {task.name!r}: a target of {room - SLACK} tokens, and {SLACK} to spare, leaves "
                                 f"no room for its prompt in --max-length {max_length}: {target[:40]!r}")
            if len(prompt.encode()) + 8 > max_length - room:  # a token is a byte at least; most need no closer look
                cut += len(encode_prompt(tokenizer, prompt, 10 ** 9)) > max_length - room
    return cut


def say_cut(tokenizer, tasks, split, max_length):
    """Print how many prompts `count_cut` counts, if any."""
    cut = count_cut(tokenizer, tasks, split, max_length)
    if cut:
        print(f"{cut} of {sum(len(getattr(task, split)) for task in tasks)} {split} prompts are too long for "
              f"--max-length {max_length}: their beginning is cut")


# --------------------------------------------------------------------------------------------------------- scoring
def normalize(answer):
    """What is compared: the first line, without regard to white space, case, a final full stop, brackets around a
    single word ("(B)" is "B"), and how a number is written ("1,234.50" is "1234.5", but "007" is no number)."""
    text = " ".join(answer.split("\n")[0].casefold().split())
    text = text[:-1] if text.endswith(".") and len(text) > 1 else text
    text = re.sub(r"^\((\w+)\)$", r"\1", text)
    if re.fullmatch(r"[+-]?(0|[1-9]\d*|[1-9]\d{0,2}(,\d{3})+)(\.\d+)?", text):
        number = Decimal(text.replace(",", "")).normalize(Context(prec=len(text)))  # every digit counts
        return f"{abs(number) if number == 0 else number:f}"
    return text


def is_right(answer, target):
    """Whether an answer equals the target after `normalize`: no part of a longer answer is taken for the whole."""
    return normalize(answer) == normalize(target)


def task_answers(model, tokenizer, task, split, max_length, score):
    """The model's answers to a split of a task, a list of str."""
    samples = getattr(task, split)
    if score == "generate":
        return generate_answers(model, tokenizer, samples, max_length)
    return choose_answers(model, tokenizer, samples, task.labels, max_length)


def task_accuracy(model, tokenizer, task, split="test", max_length=512, score="generate"):
    """Share of a split's samples answered right, 0 to 1."""
    answers = task_answers(model, tokenizer, task, split, max_length, score)
    return sum(is_right(answer, target) for answer, (_, target) in zip(answers, getattr(task, split))) / len(answers)


def accuracies(model, tokenizer, tasks, split="test", max_length=512, score="generate"):
    """{task name: accuracy, 0 to 1} on a split of each task. Several processes share the tasks."""
    scores = merge({task.name: task_accuracy(model, tokenizer, task, split, max_length, score)
                    for task in tasks[rank()::world()]})
    return {task.name: scores[task.name] for task in tasks}


def average(values):
    """The mean of a dict's values, every task counting the same."""
    return sum(values.values()) / len(values)


def interval(accuracy, count):
    """The 95 % interval [low, high] of an accuracy measured on `count` samples, by Wilson's score.

    It tells how far chance in drawing the test samples reaches, not how runs with other seeds differ. Source: Wilson,
    JASA 1927; unlike accuracy ± 1.96 standard errors it is not empty at 0 and 1, and does not leave 0 to 1.
    """
    z = 1.96
    center = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count * count))
    return [max(0.0, center - reach), min(1.0, center + reach)]


def average_interval(values, counts):
    """The 95 % interval of `average`: the tasks' own intervals, which are independent, added in squares.

    Source: Zou and Donner, Statistics in Medicine 2008 (the method of variance estimates recovery)."""
    mean = average(values)
    limits = {name: interval(values[name], counts[name]) for name in values}
    low, high = (math.sqrt(sum((values[name] - limits[name][side]) ** 2 for name in values)) / len(values)
                 for side in (0, 1))
    return [max(0.0, mean - low), min(1.0, mean + high)]


def table(columns, counts):
    """Lines of a table: a row for each task and one for the average, in percent with 95 % intervals, and the samples.

    columns: {heading: {task: accuracy}}; counts: {task: number of samples}. Long task names are cut to fit 80 columns.
    """
    width = min(max(len(name) for name in [*counts, "average"]), 73 - 16 * len(columns))

    def row(name, cells, count):
        name = name if len(name) <= width else f"{name[:width - 13]}…{name[-12:]}"  # names often differ at the end
        return f"{name:{width}}" + "".join(f"{cell:>16}" for cell in cells) + f"{count:>7}"

    def cell(value, limits):
        return f"{100 * value:.1f} ({100 * limits[0]:.0f}-{100 * limits[1]:.0f})"

    lines = [row("", columns, "n")]
    lines += [row(name, [cell(column[name], interval(column[name], counts[name])) for column in columns.values()],
                  counts[name]) for name in counts]
    lines += [row("average", [cell(average(column), average_interval(column, counts)) for column in columns.values()],
                  sum(counts.values()))]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------- command
def show(model, tokenizer, task, split, count, max_length, score):
    """Print the first `count` samples of a task: the prompt, the model's answer, the right one."""
    task = replace(task, **{split: getattr(task, split)[:count]})
    answers = task_answers(model, tokenizer, task, split, max_length, score)
    for (prompt, target), answer in zip(getattr(task, split), answers):
        mark = "right" if is_right(answer, target) else "wrong"
        print(f"\n[{task.name}] {prompt}\n  {mark}: the model says {answer!r}, the answer is {target!r}")


def main(argv=None):
    """Score a model, or a model with an adapter, on tasks; returns {task name: accuracy}."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--run", type=Path, help="a run folder of train: its adapter, model and settings are used")
    parser.add_argument("--adapter", type=Path, help="an adapter folder, for use without --run")
    parser.add_argument("--model", help="mini, a folder, or a Hub name (default: the run's model, or mini)")
    parser.add_argument("--tasks", nargs="+", help="names or paths of tasks (default: the run's tasks, or mini)")
    parser.add_argument("--split", choices=["test", "validation"], help="samples to score (default: the run's; test)")
    parser.add_argument("--score", choices=SCORES, help="how to score (default: as in the run, or generate)")
    parser.add_argument("--shots", type=int, default=0, metavar="N", help="solved samples before each prompt")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N prompts of each task with answers")
    parser.add_argument("--max-length", type=int, help="prompts are cut from the left to this many tokens, answer "
                                                       "included (default: the run's; 512, or what the model has)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: as in the run, or auto)")
    args = parser.parse_args(argv)

    run = read_config(args.run, finished=not args.adapter) if args.run else TrainConfig()
    split, score = args.split or run.split, args.score or run.score
    max_length = run.max_length if args.max_length is None else args.max_length
    if (max_length is not None and max_length < 1) or args.show < 0 or args.shots < 0:
        raise ValueError("--max-length must be at least 1, --show and --shots at least 0")
    tasks = load_tasks(args.tasks or run.tasks)
    require_samples(tasks, split)
    check_labels(tasks, score)
    if args.shots:
        tasks = [with_shots(task, split, args.shots) for task in tasks]
    model, tokenizer, _ = load_model(args.model or run.model, args.device, args.dtype or run.dtype)
    max_length = pick_length(model, max_length)
    say_cut(tokenizer, tasks, split, max_length)
    folder = args.adapter or (args.run / "adapter" if args.run else None)
    if folder:
        load_adapter(model, folder)
    scores = accuracies(model, tokenizer, tasks, split, max_length, score)
    for task in tasks if args.show else []:
        show(model, tokenizer, task, split, args.show, max_length, score)
    print(table({"accuracy": scores}, {task.name: len(getattr(task, split)) for task in tasks}))
    print(f"{split} accuracy in percent, with its 95 % interval over the n samples; scored by {score}")
    return scores


if __name__ == "__main__":
    run_command(main)
