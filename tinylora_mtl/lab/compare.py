"""Which of the papers' claims hold? python -m tinylora_mtl.lab.compare --preset quick

`claims.py` declares the claims, the comparisons and the rules, `plan.py` the runs that they need. Here these are done
as `train` does them, and read: results.json has every number with its seeds, and table.md and the pictures are made
from it alone. A finished run is never repeated, a half-finished one is gone on with, and several processes may work
through one list together (each skips the runs that another has in hand); so the same command goes on with a comparison
that was stopped.
"""

import io
import json
import math
import shlex
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch
from tqdm.auto import tqdm

from ..batching import collate, encode
from ..config import TrainConfig, resolve
from ..data.tasks import load_tasks, own_name, scored_samples
from ..evaluate import evaluation_mode, length_buckets
from ..loss import label_loss
from ..run import cli, files, models, scoring, settings, training
from ..run.checkpoint import check_format
from ..run.folder import locked
from .claims import MOST_SEEDS, best_rates
from .cost import compare_costs
from .heads import inspect_run, open_finished
from .pictures import draw_comparison
from .plan import PRESETS, SAMPLE_COUNTS, SHARED, Run, make_plan
from .report import judge_claims, markdown, summary

ROWS = "rows.jsonl"  # in the folder of a comparison: what its runs have in common, then a line for each finished one


def compare(plan, stop=None):
    """Do what is left of the list, then judge; writes results.json, table.md and the pictures, and returns the results.

    Raises ValueError for a run folder that holds another run than the one declared, and Stopped on a signal.
    """
    with tqdm(desc="runs", ncols=100) as bar:
        while True:
            rows = read_rows(plan)
            runs = plan.runs(rows)
            left = [run for run in runs if not enough(plan, run, rows)]
            bar.total = len(runs)
            bar.update(len(runs) - len(left) - bar.n)
            if not left:
                break
            for run in left:
                bar.set_postfix_str(run.name[-60:])
                if run.group.where == "cost" and left[0].group.where != "cost":
                    continue  # another process still trains
                try:
                    append_line(plan.out / ROWS, carry_out(plan, run, rates_of(plan, run, rows), stop))
                    break
                except (BlockingIOError, FileExistsError):  # another process has it, or has just begun it
                    pass
            else:
                bar.set_postfix_str("waiting for another process")
                time.sleep(2)
    results = judge_claims(plan, [rows[run.name] for run in runs])
    write_reports(results, plan.out)
    return results


def rates_of(plan, run, rows):
    """A run's learning rates, by the search if not given; BlockingIOError if not all of the search is in yet."""
    if run.tried or run.group.where == "cost":  # costs are measured, without training
        return run.tried
    searched = plan.searched(run.group)
    tried = {rates: [rows.get(Run(searched, seed, rates).name) for seed in plan.search_seeds]
             for rates in plan.tried_again(searched, rows)}
    if not tried or any(None in found for found in tried.values()):
        raise BlockingIOError("the search is still in the hands of another process")
    return best_rates({rates: mean(row["average_after"] for row in found) for rates, found in tried.items()})


def enough(plan, run, rows):
    """Whether a run is in the rows, with all that the claims need of it."""
    needed = set() if run.tried else plan.groups[run.group] - {"accuracy", "adapted"}
    return run.name in rows and needed <= set(rows[run.name])


def read_rows(plan):
    """{name: row} of the runs that are in the comparison's rows.jsonl.

    With this file alone, which is small, a comparison can be gone on with on another machine. ValueError if they are of
    other conditions. A line that was not written to its end is passed over.
    """
    file, conditions, found = plan.out / ROWS, json.loads(json.dumps(plan.shared_conditions())), {}
    for line in file.read_bytes().splitlines() if file.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found[row.get("name")] = row  # the conditions have none
    for name, value in conditions.items() if None in found else ():
        if found[None].get(name) != value:
            raise ValueError(f"{file} holds runs with {name} {found[None].get(name)!s:.60}, and this comparison has "
                             f"{value!s:.60}; name another --out")
    if None not in found:
        files.make_folder(plan.out)
        append_line(file, conditions)
    return found


def append_line(file, content):
    """Add a line of JSON to a file, in one piece, for others may add to it at the same time."""
    with open(file, "ab", buffering=0) as stream:
        stream.write(b"\n" + json.dumps(content).encode() + b"\n")  # also after a line that has no end


def carry_out(plan, run, rates, stop):
    """Do, finish or read one run; returns its row for results.json. BlockingIOError if another process has it."""
    folder = plan.out / "runs" / run.name
    guard = plan.out / "locks" / (run.name if run.group.where != "cost" else "cost")  # costs one at a time
    row = {"name": run.name, "method": run.group.method, "where": run.group.where, "seed": run.seed,
           "search": run.tried is not None, "on": models.machine_name(models.pick_device(plan.base.device))}
    files.make_folder(guard)  # not the run's own lock: that is train's, and covers neither reading nor measuring
    with locked(guard):
        if run.group.where == "cost":
            return row | costs_of(plan, run, folder)
        config = plan.config(run, rates)
        base = tuple(config.tasks), config.split  # on the same samples all start as the base, to rounding
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # one bar is enough
                if (folder / "config.json").is_file():
                    had = files.read_json(folder / "config.json")
                    check_format(had, f"the run in {folder}")
                    refuse_another(folder, had, config)
                    config_on = replace(settings.resume_config(folder, device=config.device), tasks=config.tasks)
                    results = training.run(config_on, resuming=True, stop=stop)
                else:
                    results = training.run(config, stop=stop, before=plan.before.get(base))
                inside = look_inside(
                    plan, folder, run.group.where, run.seed, plan.groups[run.group]) if run.tried is None else {}
        except cli.Stopped as stopped:
            raise cli.Stopped(stopped.number, "the same command goes on from here") from stopped
    plan.before[base] = results["before"]
    seen = config.batch_size // len(config.tasks)  # of each task in a step, forward and backward, as often as it came
    if config.method == "meta":
        seen = config.inner_steps * config.support + config.query
    names = ("samples", "lr", "rank", "alpha", "heads", *(("inner_lr",) if config.method == "meta" else ()))
    row |= {name: getattr(config, name) for name in names}
    row["samples_seen"] = config.steps * seen * len(config.tasks)
    names = ("average_before", "average_after", "average_after_interval", "after", "average_after_adapting",
             "trainable_parameters", "skipped_steps", "seconds")
    return row | {name: results[name] for name in names if name in results} | inside


def costs_of(plan, run, folder):
    """A measurement of costs: as `compare_costs`, kept in a file of its own."""
    tasks, samples = plan.task_sets["tasks"], plan.sample_counts[-1]
    pair = [resolve(replace(plan.base, **changes, **plan.sizes(tasks, samples), tasks=tasks, samples=samples,
                            seed=run.seed)) for changes in plan.cost_pair(run.group.method)]
    file = folder / "results.json"
    if not file.is_file():
        files.make_folder(folder)
        costs = compare_costs(pair, swapped=run.seed % 2 == 1)
        files.write_json(file, {"configs": [asdict(config) for config in pair]} | costs)
    content = files.read_json(file)
    for had, config in zip(content.pop("configs"), pair):
        refuse_another(folder, had, config)
    return content


def refuse_another(folder, had, config):
    """ValueError if a folder's run, with the settings `had`, is not the declared one: results would be mixed."""
    for name, value in json.loads(json.dumps(asdict(config))).items():  # tuples are lists in a file
        may_differ = name in (*settings.MAY_DIFFER, "out", "overwrite") or (name, value) == ("max_length", None)
        if name == "tasks":  # their files may have been moved, with the comparison's folder
            value, had = [Path(task).name for task in value], had | {name: [Path(task).name for task in had[name]]}
        if value != had.get(name) and not may_differ:
            raise ValueError(f"{folder} holds a run with {settings.flag_of(name)} {had.get(name)}, and this comparison "
                             f"has {value}; name another --out")


def look_inside(plan, folder, where, seed, wanted):
    """What the comparisons need of a finished run beyond its results, kept in measures.json: nothing is done twice."""
    wanted, file = wanted & {"cosine", "distance", "moved", "unseen", "bits"}, folder / "measures.json"
    trained = plan.samples_of(plan.task_sets[where], seed)  # the folder may have been moved, with its tasks
    found = files.read_json(file) if file.is_file() else {}
    unseen = plan.samples_of(plan.held_out, seed) if "unseen" in wanted else []
    if wanted <= set(found) and (not unseen or list(found["unseen_tasks"]) == list(map(own_name, unseen))):
        return found
    if wanted & {"unseen", "bits"}:
        config, tasks, model, tokenizer = open_finished(folder, plan.base.device, trained)
        bits = target_bits(model, tokenizer, scored_samples(tasks, "test", config.score_samples), config.max_length)
        found |= {"bits_of": bits, "bits": scoring.average(bits)}
    if unseen:
        unseen = scored_samples(load_tasks(unseen), "test", config.score_samples)
        scores = scoring.accuracies(model, tokenizer, unseen, "test", config.max_length, config.score)
        found |= {"unseen_tasks": scores, "unseen": scoring.average(scores)}
    layers = inspect_run(folder, plan.base.device, trained)[0]["layers"] if wanted - {"unseen", "bits"} else []
    if wanted & {"distance", "moved"}:
        found |= {name: mean(layer[name] for layer in layers) for name in ("distance", "distance_start")}
        found["moved"] = found["distance"] - found["distance_start"]
    if "cosine" in wanted:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        cosines = {0: [layer["head_cosine_start"] for layer in layers]}  # {step: of each layer}
        cosines |= {line["step"]: line["head_cosine"] for line in lines if "head_cosine" in line}
        curve = [[step, None if None in values else mean(values)] for step, values in cosines.items()]
        found |= {"cosine_start": cosines[0], "cosine_end": [*cosines.values()][-1], "cosine_curve": curve,
                  "cosine": curve[-1][1]}
    files.write_json(file, found)
    return found


@torch.no_grad()
def target_bits(model, tokenizer, tasks, max_length):
    """{task: the mean over its test samples of -log2 p(target, end token | prompt)}, in bits."""
    found = {}
    for task in tasks:
        scoring.tell_task(model, task)
        nats = 0.0
        for chosen in length_buckets(task.test):
            rows = [encode(tokenizer, task.test[i], max_length) for i in chosen]
            batch = collate(rows, [0] * len(rows), tokenizer.pad_token_id)
            with evaluation_mode(model):
                nats += label_loss(model, batch | {"label_count": 1}).item()  # the sum over all of their tokens
        found[task.name] = nats / math.log(2) / len(task.test)
    return found


def write_reports(results, out):
    """results.json, and table.md and the pictures from it."""
    try:
        with locked(out):
            files.write_json(out / "results.json", results)
            files.write_file(out / "table.md", markdown(results).encode())
            draw_comparison(results, out)
    except BlockingIOError:
        pass  # another process that worked through the same list is writing the same


def parse(argv=None):
    """The flags."""
    parser = cli.Parser("lab.compare", __doc__)
    shown = TrainConfig.__dataclass_fields__
    parser.add_argument("--preset", choices=PRESETS, default="full", help="quick: a few minutes; full: hours")
    parser.add_argument("--claims", type=cli.whole(1), nargs="+", metavar="N", help="which of the claims in claims.py")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="a table of these instead: methods of the "
                        "package, variants of claims.py, or files")
    parser.add_argument("--seeds", type=cli.whole(2, MOST_SEEDS), help="runs of each kind (default: quick 3, full 8)")
    parser.add_argument("--first-seed", type=cli.whole(0, 999), default=0, help="the first of their seeds (default: 0)")
    parser.add_argument("--tasks", nargs="+", help=shown["tasks"].metadata["help"])
    parser.add_argument("--held-out", nargs="+", metavar="TASK", help="claim 10: tasks not trained on")
    parser.add_argument("--languages", nargs="+", metavar="TASK", help="claim 8: tasks, each in another language")
    parser.add_argument("--samples", type=cli.whole(2), nargs="+", metavar="N", help="claim 7: training samples per "
                        f"task; all other runs have the largest (default: {' '.join(map(str, SAMPLE_COUNTS))})")
    parser.add_argument("--rates", type=float, nargs="+", metavar="LR", help="learning rates to choose from")
    parser.add_argument("--out", help="folder for the runs and results (default: runs/compare-PRESET)")
    parser.add_argument("--report", metavar="FOLDER", help="only make table.md and pictures from results.json again")
    for name in SHARED:
        kind = {"type": str, "nargs": "+"} if shown[name].type is tuple else {"type": shown[name].type}
        parser.add_argument(settings.flag_of(name), default="mini" if name == "model" else None,
                            help=shown[name].metadata["help"], **kind)
    return parser.parse_args(argv)


def main(argv=None):
    """Compare, or only report; returns the results."""
    args = parse(argv)
    if args.report:
        out = Path(args.report)
        results = files.read_json(out / "results.json")
        write_reports(results, out)
    else:
        with cli.StopSignals() as stop:
            flags = sys.argv[1:] if argv is None else argv
            plan = make_plan(args, shlex.join(["python", "-m", "tinylora_mtl.lab.compare", *flags]))
            results, out = compare(plan, stop), plan.out
    print(summary(results))
    print(f"\nmean differences with their 95 % intervals; all tables are in\n{out / 'table.md'}")
    return results


if __name__ == "__main__":
    cli.run_command(main)
