"""Accuracy per task, with intervals: the command behind python -m tinylora_mtl.evaluate"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

from ..adapters import find_adapters
from ..config import TrainConfig, resolve
from ..data.tasks import check_labels, load_tasks, own_name, require_samples, scored_samples, with_shots
from ..evaluate import accuracy, generate_answers, is_right, normalize
from ..evaluate import __doc__ as description
from ..targets import unwrap
from .adapter_files import load_adapter
from .cli import Parser, run_command, whole
from .distributed import merge, process_rank, world_size
from .fingerprints import base_changes, check_not_trained_on, read_fingerprints
from .methods import typed_method
from .models import load_model, pick_length
from .ranking import choose_answers
from .samples import check_samples
from .settings import read_config

WHAT_COMMONEST_IS = "commonest: what the commonest training answer gets, of tasks with few answers"


def task_answers(model, tokenizer, task, split, max_length, score):
    """The model's answers to a split of a task, a list of str."""
    samples = getattr(task, split)
    tell_task(model, task)
    if score == "generate":
        return generate_answers(model, tokenizer, samples, max_length)
    return choose_answers(model, tokenizer, samples, task.labels, max_length)


def tell_task(model, task):
    """Tell the adapters that differ by task (those with `task_ids`) which one is asked.

    ValueError for a task that they were not trained on.
    """
    for adapter in find_adapters(model).values():
        if hasattr(adapter, "task_ids"):
            names = unwrap(model).adapter_config.tasks
            if task.name not in names:
                raise ValueError(f"the adapter has something of its own for each of the tasks {', '.join(names)}, so "
                                 f"it cannot answer task {task.name!r}")
            adapter.task_ids = names.index(task.name)


def task_accuracy(model, tokenizer, task, split="test", max_length=512, score="generate"):
    """Share of a split's samples answered right, 0 to 1."""
    return accuracy(task_answers(model, tokenizer, task, split, max_length, score), getattr(task, split))


def accuracies(model, tokenizer, tasks, split="test", max_length=512, score="generate"):
    """{task name: accuracy, 0 to 1} on a split of each task. Several processes share the tasks."""
    scores = merge({task.name: task_accuracy(model, tokenizer, task, split, max_length, score)
                    for task in tasks[process_rank()::world_size()]})
    return {task.name: scores[task.name] for task in tasks}


def average(values):
    """The mean of a dict's values, every task counting the same."""
    return sum(values.values()) / len(values)


def interval(accuracy, count):
    """The 95 % interval [low, high] of an accuracy measured on `count` samples: Wilson's score (JASA 1927).

    It tells how far chance in drawing the test samples reaches, not how runs with other seeds differ.
    """
    z = 1.96
    center = (accuracy + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(accuracy * (1 - accuracy) / count + z * z / (4 * count * count))
    return [max(0.0, center - reach), min(1.0, center + reach)]


def average_interval(values, counts):
    """The 95 % interval of `average`: the tasks' own intervals, which are independent, added in squares.

    Source: Zou and Donner, Statistics in Medicine 2008 (the method of variance estimates recovery)."""
    limits = [(value, *interval(value, counts[name])) for name, value in values.items()]
    below = math.sqrt(sum((value - low) ** 2 for value, low, _ in limits)) / len(values)
    above = math.sqrt(sum((high - value) ** 2 for value, _, high in limits)) / len(values)
    return [max(0.0, average(values) - below), min(1.0, average(values) + above)]


def table(columns, counts, common):
    """Lines of a table: a row for each task and one for the average, in percent with 95 % intervals, and the samples.

    columns: {heading: {task: accuracy}}; counts: {task: number of samples}; common: what `commonest` returns, the last
    column. Long task names are cut to fit 80 columns.
    """
    width = min(max(len(name) for name in [*counts, "average"]), 64 - 15 * len(columns))

    def row(name, cells, count, last):
        name = name if len(name) <= width else f"{name[:width - 13]}…{name[-12:]}"  # names often differ at the end
        return (f"{name:{width}}" + "".join(f"{cell:>15}" for cell in cells) + f"{count:>6}{last:>10}").rstrip()

    def cell(value, limits):
        return f"{100 * value:.1f} ({100 * limits[0]:.0f}-{100 * limits[1]:.0f})"

    lines = [row("", columns, "n", "commonest")]
    for name in counts:
        cells = [cell(column[name], interval(column[name], counts[name])) for column in columns.values()]
        lines += [row(name, cells, counts[name], f"{100 * common[name]:.1f}" if name in common else "-")]
    cells = [cell(average(column), average_interval(column, counts)) for column in columns.values()]
    lines += [row("average", cells, sum(counts.values()), f"{100 * average(common):.1f}" if len(common) == len(counts)
                  else "")]
    return "\n".join(lines)


def say_part(tasks, scored, split):
    """Print it if not all samples of a split were scored."""
    there, taken = (sum(len(getattr(task, split)) for task in each) for each in (tasks, scored))
    if taken < there:
        print(f"scored on {taken} of {there} {split} samples; --score-samples takes more of each task")


def commonest(tasks, split):
    """{task: the share of a split that its commonest training answer gets right}, for tasks with closed sets of labels.

    What a model reaches that has learned nothing but the commonest answer.
    """
    shares = {}
    for task in tasks:
        if task.labels and task.train:
            count = Counter(normalize(target) for _, target in sorted(task.train))
            answer, samples = count.most_common(1)[0][0], getattr(task, split)
            shares[task.name] = accuracy([answer] * len(samples), samples)
    return shares


def show(model, tokenizer, task, split, count, max_length, score):
    """Print the first `count` samples of a task: the prompt, the model's answer, the right one."""
    task = replace(task, **{split: getattr(task, split)[:count]})
    answers = task_answers(model, tokenizer, task, split, max_length, score)
    for (prompt, target), answer in zip(getattr(task, split), answers):
        mark = "right" if is_right(answer, target) else "wrong"
        print(f"\n[{task.name}] {prompt}\n  {mark}: the model says {answer!r}, the answer is {target!r}")


def command(argv=None):
    """Score a model, or a model with an adapter, on tasks; returns {task name: accuracy}."""
    parser = Parser("evaluate", description)
    parser.add_argument("--run", type=Path, help="a run folder of train: its adapter, model and settings are used")
    parser.add_argument("--adapter", type=Path, help="an adapter folder, for use without --run")
    parser.add_argument("--method", default="", metavar="FILE.py", help="the run's method, if it is a file of yours")
    parser.add_argument("--model", help="mini, a folder, or a Hub name (default: the run's model, or mini)")
    parser.add_argument("--tasks", nargs="+", help="names or paths of tasks (default: the run's tasks, or mini)")
    parser.add_argument("--split", choices=["test", "validation"], help="samples to score (default: the run's; test)")
    parser.add_argument("--score", choices=["generate", "choose"], help="how (default: as in the run, or generate)")
    parser.add_argument("--score-samples", type=whole(1), metavar="N", help="samples of each task to score "
                                                                            "(default: the run's; 200 on mini, or all)")
    parser.add_argument("--shots", type=whole(0), default=0, metavar="N", help="solved samples before each prompt")
    parser.add_argument("--show", type=whole(0), default=0, metavar="N", help="print N prompts a task, with answers")
    parser.add_argument("--max-length", type=whole(1), help="prompts are cut from the left to this many tokens, answer "
                                                            "included (default: the run's; 512, or what the model has)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: as in the run, or auto)")
    args = parser.parse_args(argv)
    typed_method(args.method)

    run = read_config(args.run, finished=not args.adapter) if args.run else resolve(TrainConfig(args.model or "mini"))
    split, score = args.split or run.split, args.score or run.score
    tasks = load_tasks(args.tasks or run.tasks)
    require_samples(tasks, split)
    check_labels(tasks, score)
    if args.run and not args.adapter:
        check_not_trained_on(args.run, [own_name(name) for name in run.tasks], tasks, split)
    if args.shots:
        tasks = [with_shots(task, split, args.shots) for task in tasks]
    scored = scored_samples(tasks, split, args.score_samples or resolve(run).score_samples)
    common = commonest(scored, split)
    model, tokenizer, _ = load_model(args.model or run.model, args.device, args.dtype or run.dtype)
    max_length = pick_length(model, args.max_length or run.max_length)
    check_samples(model, tokenizer, scored, split, max_length, score)
    stored = read_fingerprints(args.run) if args.run and not args.model else None
    for line in base_changes(stored, model, tokenizer, run.method, weights=False) if stored else ():
        print(line)  # of other weights the adapter itself warns
    folder = args.adapter or (args.run / "adapter" if args.run else None)
    if folder:
        load_adapter(model, folder)
    scores = accuracies(model, tokenizer, scored, split, max_length, score)
    print(table({"accuracy": scores}, {task.name: len(getattr(task, split)) for task in scored}, common))
    print(f"{split} accuracy in percent, with its 95 % interval over the n samples; scored by {score}\n"
          f"{WHAT_COMMONEST_IS}")
    say_part(tasks, scored, split)
    for task in scored if args.show else []:
        show(model, tokenizer, task, split, args.show, max_length, score)
    return scores


def main():
    """python -m tinylora_mtl.evaluate"""
    run_command(command)
