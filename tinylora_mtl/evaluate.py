"""Accuracy per task: python -m tinylora_mtl.evaluate --run runs/align-mini-seed0 --show 5

The model writes its answer greedily, up to the end token; its first line is right if it equals the target, differences
in white space aside. Without --run or --adapter the base model itself is scored.
"""

import shlex
from pathlib import Path

import torch

from .adapters import load_adapter
from .batching import collate, encode_prompt, encode_target
from .cli import Parser, run_command
from .models import load_model
from .settings import TrainConfig, read_config
from .tasks import load_tasks


@torch.no_grad()
def generate_answers(model, tokenizer, samples, max_length=512, batch_size=128):
    """The model's greedy answer to each (prompt, target) sample, a list of str in the same order.

    An answer may be one token longer than the longest target of its batch: enough to tell right from wrong.
    """
    was_training = model.training
    model.eval()
    prompts = [encode_prompt(tokenizer, prompt, max_length) for prompt, _ in samples]
    room = [len(encode_target(tokenizer, target)) for _, target in samples]
    order = sorted(range(len(samples)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    answers = [""] * len(samples)
    for start in range(0, len(order), batch_size):
        chosen = order[start:start + batch_size]
        batch = collate([(prompts[i], prompts[i]) for i in chosen], [0] * len(chosen), tokenizer.pad_token_id,
                        model.device)
        written = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,  # whatever the model's default
            max_new_tokens=max(room[i] for i in chosen), pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id)[:, batch["input_ids"].shape[1]:]  # [batch, new tokens]
        for i, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True)):
            answers[i] = text
    model.train(was_training)
    return answers


def is_right(answer, target):
    """Whether the first line of an answer equals the target, differences in white space aside."""
    first_line = answer.strip().split("\n")[0]
    return first_line.split() == target.split()


def task_accuracy(model, tokenizer, samples, max_length=512):
    """Share of samples answered right, 0 to 1."""
    answers = generate_answers(model, tokenizer, samples, max_length)
    return sum(is_right(answer, target) for answer, (_, target) in zip(answers, samples)) / len(samples)


def accuracies(model, tokenizer, tasks, split="test", max_length=512):
    """{task name: accuracy, 0 to 1} on a split of each task."""
    return {task.name: task_accuracy(model, tokenizer, getattr(task, split), max_length) for task in tasks}


def average(values):
    """The mean of a dict's values, every task counting the same."""
    return sum(values.values()) / len(values)


def table(columns, names):
    """Lines of a table with a row for each task and one for the average; columns: {heading: {task: accuracy}}."""
    width = max(len(name) for name in [*names, "average"])
    lines = [" " * width + "".join(f"{heading:>16}" for heading in columns)]
    lines += [f"{name:{width}}" + "".join(f"{100 * column[name]:14.1f} %" for column in columns.values())
              for name in names]
    lines += [f"{'average':{width}}" + "".join(f"{100 * average(column):14.1f} %" for column in columns.values())]
    return "\n".join(lines)


def show(model, tokenizer, task, split, count, max_length):
    """Print the first `count` samples of a task: the prompt, the model's answer, the right one."""
    samples = getattr(task, split)[:count]
    for (prompt, target), answer in zip(samples, generate_answers(model, tokenizer, samples, max_length)):
        mark = "right" if is_right(answer, target) else "wrong"
        print(f"\n[{task.name}] {prompt}\n  {mark}: the model says {answer.strip()!r}, the answer is {target!r}")


def main(argv=None):
    """Score a model, or a model with an adapter, on tasks; returns {task name: accuracy}."""
    parser = Parser("evaluate", __doc__)
    parser.add_argument("--run", type=Path, help="a run folder of train: its adapter, model and tasks are used")
    parser.add_argument("--adapter", type=Path, help="an adapter folder, for use without --run")
    parser.add_argument("--model", help="the embedded model or a folder (default: the run's model, or mini)")
    parser.add_argument("--tasks", nargs="+", help="names of tasks (default: the run's tasks, or mini)")
    parser.add_argument("--split", choices=["test", "validation"], help="samples to score (default: the run's, or test)")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N prompts of each task with answers")
    parser.add_argument("--max-length", type=int, help="prompts are cut to this many tokens (default: the run's, or 512)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args(argv)

    run = read_config(args.run) if args.run else TrainConfig()
    split, max_length = args.split or run.split, run.max_length if args.max_length is None else args.max_length
    if max_length < 1 or args.show < 0:
        raise ValueError("--max-length must be at least 1 and --show at least 0")
    if args.run and not args.adapter and not (args.run / "adapter").is_dir():
        raise ValueError(f"the run in {args.run} is not finished, so it has no adapter; python -m tinylora_mtl.train "
                         f"--resume {shlex.quote(str(args.run))} goes on with it")
    tasks = load_tasks(args.tasks or run.tasks)
    model, tokenizer, _ = load_model(args.model or run.model, args.device)
    folder = args.adapter or (args.run / "adapter" if args.run else None)
    if folder:
        load_adapter(model, folder)
    scores = accuracies(model, tokenizer, tasks, split, max_length)
    for task in tasks if args.show else []:
        show(model, tokenizer, task, split, args.show, max_length)
    print(table({f"{split} accuracy": scores}, list(scores)))
    return scores


if __name__ == "__main__":
    run_command(main)
