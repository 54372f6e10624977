"""Which of the papers' claims hold? python -m tinylora_mtl.lab.compare --preset quick

`claims.py` declares the claims, the comparisons and the rules, `plan.py` the runs that they need. Here these are done
through `train.main`, and read: results.json has every number with its seeds, and table.md and the pictures are made
from it alone. A finished run is never repeated, a half-finished one is gone on with, and several processes may work
through one list together (each skips the runs that another has in hand); so a comparison that was stopped goes on with
the same command.
"""

import io
import json
import shlex
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path

from tqdm.auto import tqdm

from ..run import training as train
from .claims import COSTS, MOST_SEEDS
from ..run.cli import Parser, Stopped, StopSignals, run_command, whole
from .cost import compare_costs
from ..evaluate import accuracies, average
from ..run.files import make_folder, read_json, write_file, write_json
from .heads import back_to_start, collect, open_finished, task_distances
from ..run.models import load_model, pick_length
from ..multihead import head_cosines, mean_of_pairs
from .pictures import draw_budgets, draw_cosines, draw_verdicts, say_missing
from .plan import PRESETS, SEARCH_SEED, SHARED, SIZES, Run, make_plan, samples_seen
from .report import best_rate, judge, markdown, summary
from ..run.folder import locked
from ..run.settings import MAY_DIFFER, TrainConfig, fill_in, flag_of, read_config, resume_config
from ..data.tasks import load_tasks


# ---------------------------------------------------------------------------------------------------------- the runs
def compare(plan, stop=None):
    """Do what is left of the list, then judge; writes results.json, table.md and the pictures, and returns the results.

    Raises ValueError for a run folder that holds another run than the one declared, and Stopped on a signal.
    """
    runs = plan.runs()
    waiting, rows = {run.name: run for run in runs}, {}
    with tqdm(total=len(runs), desc="runs", ncols=100) as bar:
        while waiting:
            before = len(waiting)
            for run in list(waiting.values()):
                lr = None
                if run.group.where != "cost":  # costs are measured, without training
                    lr = run.lr or choose(plan, run.group, rows)
                    if lr is None:
                        continue  # its search is still in the hands of another process
                bar.set_postfix_str(run.name[-60:])
                try:
                    rows[run.name] = do(plan, run, lr, stop)
                except (BlockingIOError, FileExistsError):  # another process has it, or has just begun it
                    continue
                del waiting[run.name]
                bar.update()
            if len(waiting) == before:
                bar.set_postfix_str("waiting for another process")
                time.sleep(2)
    results = judge(plan, [rows[run.name] for run in runs])
    write_reports(results, plan.out)
    return results


def choose(plan, group, rows):
    """The learning rate that the search found for a group of runs; None before all runs of the search are in."""
    tried = {lr: rows.get(Run(plan.searched(group), SEARCH_SEED, lr).name) for lr in plan.rates}
    return None if None in tried.values() else best_rate({lr: row["average_after"] for lr, row in tried.items()})


def do(plan, run, lr, stop):
    """Do, finish or read one run; returns its row for results.json. BlockingIOError if another process has it."""
    folder, guard = plan.out / "runs" / run.name, plan.out / "locks" / run.name
    make_folder(guard)  # not the run's own lock: that is train's, and covers neither reading nor measuring
    with locked(guard):
        row = {"name": run.name, "method": run.group.method, "where": run.group.where, "seed": run.seed,
               "search": run.lr is not None}
        if run.group.where == "cost":
            return row | do_cost(plan, run, folder)
        config = plan.config(run, lr)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # one bar is enough
                if (folder / "config.json").is_file():
                    refuse_another(folder, asdict(read_config(folder)), asdict(config))
                    results = train.main(resume_config(folder, device=config.device), resuming=True, stop=stop)
                else:
                    results = train.main(config, stop=stop, before=base_accuracies(plan, run, config))
                more = measure(plan, folder, plan.groups.get(run.group, set()) if run.lr is None else set())
        except Stopped as stopped:
            raise Stopped(stopped.number, "the same command goes on from here") from stopped
    names = ("average_before", "average_after", "average_after_interval", "after", "average_after_adapting",
             "trainable_parameters", "skipped_steps", "seconds")
    return row | {"samples": config.samples, "lr": lr, "rank": config.rank, "heads": config.heads,
                  "samples_seen": samples_seen(config)} | {key: results[key] for key in names if key in results} | more


def base_accuracies(plan, run, config):
    """What the base model scores on a run's tasks, measured once for all runs on the same samples."""
    key = run.group.where, config.split
    if key not in plan.before:
        model, tokenizer, _ = load_model(config.model, config.device, config.dtype)
        plan.before[key] = accuracies(model, tokenizer, load_tasks(config.tasks), config.split,
                                      pick_length(model, config.max_length), config.score)
    return plan.before[key]


def do_cost(plan, run, folder):
    """A measurement of costs: as `compare_costs`, kept in a file of its own."""
    pair = [fill_in(replace(plan.base, **settings, tasks=plan.places["tasks"], samples=plan.sizes[-1], seed=run.seed))
            for settings in COSTS[run.group.method]]
    file = folder / "results.json"
    if not file.is_file():
        make_folder(folder)
        began = time.perf_counter()
        costs = compare_costs(pair, swapped=run.seed % 2 == 1)
        write_json(file, {"configs": [asdict(config) for config in pair]} | costs
                   | {"seconds": round(time.perf_counter() - began, 1)})
    content = read_json(file)
    for was, config in zip(content.pop("configs"), pair):
        refuse_another(folder, was, asdict(config))
    return content


def refuse_another(folder, was, declared):
    """ValueError if a folder's run has other settings than the one that is declared: results would be mixed."""
    for name, value in declared.items():
        had, value = [list(v) if isinstance(v, tuple) else v for v in (was.get(name), value)]
        if had != value and name not in (*MAY_DIFFER, "out", "overwrite") and not (name == "max_length" and not value):
            raise ValueError(f"{folder} holds a run with {flag_of(name)} {had}, and this comparison has {value}; name "
                             "another --out")


def measure(plan, folder, wanted):
    """What the comparisons need of a finished run beyond its results, kept in measures.json: nothing is done twice."""
    wanted, file = wanted & {"cosine", "distance", "moved", "unseen"}, folder / "measures.json"
    found = read_json(file) if file.is_file() else {}
    unseen = load_tasks(plan.held_out) if "unseen" in wanted else []
    names = [task.name for task in unseen]  # not those of plan.held_out, which may be paths
    if unseen and list(found.get("unseen_tasks", names)) != names:
        found = {}  # they were others
    if wanted <= set(found):
        return found
    config, tasks, model, tokenizer = open_finished(folder, plan.base.device)
    apart = "distance" in wanted or "moved" in wanted
    if "unseen" in wanted:
        found["unseen_tasks"] = accuracies(model, tokenizer, unseen, "test", config.max_length, config.score)
        found["unseen"] = average(found["unseen_tasks"])
    if apart:
        found["distance"] = mean_distance(model, tokenizer, tasks, config)
    back_to_start(model, config)
    if apart:
        found["distance_start"] = mean_distance(model, tokenizer, tasks, config)
        found["moved"] = found["distance"] - found["distance_start"]
    if "cosine" in wanted:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        layers = [(0, head_cosines(model)["head_cosine"])]
        layers += [(line["step"], line["head_cosine"]) for line in lines if "head_cosine" in line]
        found |= {"cosine_start": layers[0][1], "cosine_end": layers[-1][1],
                  "cosine_curve": [[step, None if None in values else average(dict(enumerate(values)))]
                                   for step, values in layers]}
        found["cosine"] = found["cosine_curve"][-1][1]
    write_json(file, found)
    return found


def mean_distance(model, tokenizer, tasks, config):
    """The mean over the layers of the tasks' distance: what the alignment loss is, on validation samples."""
    apart = task_distances(collect(model, tokenizer, tasks, config.max_length))
    return average({name: mean_of_pairs(matrix).item() for name, matrix in apart.items()})


def write_reports(results, out):
    """results.json, and table.md and the pictures from it."""
    try:
        with locked(out):
            write_json(out / "results.json", results)
            write_file(out / "table.md", markdown(results).encode())
            if not say_missing():
                for draw in (draw_verdicts, draw_budgets, draw_cosines):
                    draw(results, out)
    except BlockingIOError:
        pass  # another process that worked through the same list is writing the same


# -------------------------------------------------------------------------------------------------------- the command
def parse(argv=None):
    """The flags."""
    parser = Parser("lab.compare", __doc__)
    shown = TrainConfig.__dataclass_fields__
    parser.add_argument("--preset", choices=PRESETS, default="full", help="quick: a few minutes; full: hours")
    parser.add_argument("--claims", type=whole(1, 8), nargs="+", metavar="N", help="which of the claims 1 to 8")
    parser.add_argument("--seeds", type=whole(2, MOST_SEEDS), help="runs of each kind (default: quick 3, full 6)")
    parser.add_argument("--tasks", nargs="+", help=shown["tasks"].metadata["help"])
    parser.add_argument("--held-out", nargs="+", metavar="TASK", help="claim 6: tasks not trained on")
    parser.add_argument("--languages", nargs="+", metavar="TASK", help="claim 8: tasks, each in another language")
    parser.add_argument("--samples", type=whole(2), nargs="+", metavar="N", help="claim 7: training samples per task; "
                        "all other runs have the largest; with three or more also MeTA-LoRA's inner rate "
                        f"(default: {' '.join(map(str, SIZES))})")
    parser.add_argument("--rates", type=float, nargs="+", metavar="LR", help="learning rates to choose from")
    parser.add_argument("--out", help="folder for the runs and results (default: runs/compare-PRESET)")
    parser.add_argument("--report", metavar="FOLDER", help="only make table.md and pictures from results.json again")
    for name in SHARED:
        kind = {"type": str, "nargs": "+"} if shown[name].type is tuple else {"type": shown[name].type}
        parser.add_argument(flag_of(name), default="mini" if name == "model" else None,
                            help=shown[name].metadata["help"], **kind)
    return parser.parse_args(argv)


def main(argv=None):
    """Compare, or only report; returns the results."""
    args = parse(argv)
    if args.report:
        out = Path(args.report)
        results = read_json(out / "results.json")
        write_reports(results, out)
    else:
        with StopSignals() as stop:
            command = shlex.join(["python", "-m", "tinylora_mtl.lab.compare", *(sys.argv[1:] if argv is None else argv)])
            plan = make_plan(args, command)
            results, out = compare(plan, stop), plan.out
    print(summary(results))
    print(f"\nmean differences with their 95 % intervals; all tables are in\n{out / 'table.md'}")
    return results


if __name__ == "__main__":
    run_command(main)
