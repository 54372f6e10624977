"""The list of runs behind the claims: which there are, under which conditions, with which settings of `train`."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapters import adapter_parameters, add_adapters, remove_adapters
from ..config import TrainConfig, adapter_config, resolve
from ..data.tasks import TASK_SETS, check_labels, load_tasks, require_samples
from ..run import models, settings
from .claims import VARIANTS, Group, declare, few_of

PRESETS = {
    "quick": {"claims": [1, 4, 5], "seeds": 3, "steps": 60, "batch_size": 32, "rates": [3e-3, 1e-2],
              "tasks": ["word_sorting", "dyck_languages", "object_counting"], "held_out": []},
    "full": {"claims": [1, 2, 3, 4, 5, 6, 7, 8], "seeds": 6, "steps": 150, "batch_size": 32,
             "rates": [1e-3, 3e-3, 8e-3, 2e-2], "tasks": ["mini"],
             "held_out": ["boolean_expressions", "object_counting"]},  # for "tasks not trained on"
}
RATES = [2e-4, 5e-4, 1e-3, 2e-3]  # searched on models other than mini
SAMPLE_COUNTS = [10, 20, 50, 100, 500]  # training samples per task of claim 7's curve; all other runs have the last
SEARCH_SEED = 1000  # of the runs that choose learning rates; the others have 0, 1, 2, …
TOLERANCE = 0.05  # by how much matched numbers of parameters may differ
SHARED = ("model", "steps", "batch_size", "accumulation", "rank", "alpha", "heads", "targets", "max_length", "score",
          "device", "dtype")  # settings of train that all runs of a comparison have in common


@dataclass(frozen=True)
class Run:
    """One entry of the list: a run of `train`, or a measurement of costs."""

    group: Group
    seed: int
    lr: float | None = None  # given for a run of the search; else it is the rate that the search chose

    @property
    def name(self):
        group = self.group
        parts = [group.method.replace(" ", "_"), group.where, str(group.samples or "all"), f"seed{self.seed}"]
        return "-".join(parts if self.lr is None else ["search", *parts, f"lr{self.lr:g}"])


@dataclass
class Plan:
    """What is compared, under which conditions."""

    base: TrainConfig  # what all runs share
    task_sets: dict  # {"tasks", "languages": names of the tasks to train on}
    held_out: list  # tasks to score that were not trained on
    sample_counts: list
    rates: list
    seeds: int
    claims: list
    out: Path
    command: str = ""

    def __post_init__(self):
        self.groups = {}  # {Group: the quantities that its runs are needed for}
        for comparison in (comparison for claim in self.claims for comparison in claim.comparisons):
            for side, quantity in comparison.both():
                if isinstance(side, Group):
                    self.groups.setdefault(side, set()).add(quantity)
        trained = sorted({group.method for group in self.groups if group.where != "cost"})
        self.variants, self.parameters = match(trained, self.base)
        self.before = {}  # {(where, split): what the base model scores}, once it is known

    def runs(self):
        """The declared list: first the search of the learning rates, then seed by seed what they are for."""
        searched = dict.fromkeys(self.searched(group) for group in self.groups if group.where != "cost")
        return ([Run(group, SEARCH_SEED, lr) for group in searched for lr in self.rates]
                + [Run(group, seed) for seed in range(self.seeds) for group in self.groups])

    def searched(self, group):
        """The group whose learning rate a group takes: of the same variant, with all or with few samples.

        How few they are makes no difference, and MeTA-LoRA is for few in any case.
        """
        few = VARIANTS[group.method]["method"] == "meta" or group.samples not in (None, self.sample_counts[-1])
        return Group(group.method, group.where, few_of(self.sample_counts) if few else None)

    def config(self, run, lr):
        """The TrainConfig of a run. A search never sees the test split."""
        tasks, samples = self.task_sets[run.group.where], run.group.samples or self.sample_counts[-1]
        # For MeTA-LoRA: a round's query sets are as a batch of the others, with all tasks and as many samples of each.
        each = max(1, min(samples // 2, self.base.batch_size // len(tasks)))
        return settings.with_full_paths(resolve(replace(
            self.base, **self.variants[run.group.method], tasks=tasks, samples=samples, seed=run.seed, lr=lr,
            support=each, query=each, tasks_per_round=len(tasks), split="test" if run.lr is None else "validation",
            skip_bad_steps=self.base.steps,  # they are counted, not fatal
            out=str(self.out / "runs" / run.name))))

    def conditions(self):
        """For results.json: what all runs have in common."""
        return {name: getattr(self.base, name) for name in SHARED} | self.task_sets | {
            "held_out": self.held_out, "sizes": self.sample_counts, "seeds": list(range(self.seeds)),
            "search_seed": SEARCH_SEED, "threads": torch.get_num_threads(), "parameters": self.parameters}


def match(names, base):
    """({variant: TrainConfig settings}, {variant: trainable parameters}) with every `match` of VARIANTS worked out.

    Parameters grow linearly with the rank and with the heads, so two counts tell which value comes nearest to
    HydraLoRA's number. ValueError if that is not within TOLERANCE.
    """
    model, _, _ = models.load_model(base.model, base.device, base.dtype)

    def count(**changes):
        add_adapters(model, adapter_config(resolve(replace(base, **changes))))
        number = sum(parameter.numel() for parameter in adapter_parameters(model).values())
        remove_adapters(model)
        return number

    wanted, variants, counts = count(method="hydralora"), {}, {}
    for name in names:
        changes = dict(VARIANTS[name])
        knob = changes.pop("match", None)
        if knob:
            two, three = (count(**changes | {knob: value}) for value in (2, 3))
            changes[knob] = max(2, round(2 + (wanted - two) / (three - two)))
        variants[name], counts[name] = changes, count(**changes)
        if knob and abs(counts[name] / wanted - 1) > TOLERANCE:
            raise ValueError(f"{name} has {counts[name]:,} parameters at --{knob} {changes[knob]}, which is not "
                             f"within {TOLERANCE:.0%} of HydraLoRA's {wanted:,}; another --rank or --heads may do")
    return variants, counts


def make_plan(args, command=""):
    """The Plan of the command line; ValueError for what does not go together, before hours of runs find it out."""
    preset, mini = PRESETS[args.preset], args.model == "mini"
    given = {name: getattr(args, name) for name in SHARED if getattr(args, name) is not None}
    base = replace(TrainConfig(rank=4, steps=preset["steps"], batch_size=preset["batch_size"]), **given)
    settings.check(base)
    held_out = args.held_out or (preset["held_out"] if mini and not args.tasks else [])
    tasks, languages = ([name for given in names for name in TASK_SETS.get(given, [given])] for names in (
        args.tasks or preset["tasks"], args.languages or (["mini-multilingual"] if mini else [])))
    tasks = [name for name in tasks if name not in held_out]
    sample_counts = sorted(set(args.samples or SAMPLE_COUNTS))
    if len(sample_counts) < 2 or sample_counts[0] > 50:
        raise ValueError("--samples needs at least two sizes, the smallest at most 50")
    numbers = set(args.claims or preset["claims"])
    for number, there, flag in ((6, held_out, "--held-out"), (8, languages, "--languages")):
        if number in numbers and not there:
            if args.claims:
                raise ValueError(f"claim {number} needs {flag}")
            print(f"without claim {number}: it needs {flag}")
            numbers.remove(number)
    out = args.out or f"runs/compare{'' if mini else f'-{Path(args.model).name}'}-{args.preset}"
    plan = Plan(base, {"tasks": tasks, "languages": languages}, held_out, sample_counts,
                args.rates or (preset["rates"] if mini else RATES), args.seeds or preset["seeds"],
                [claim for claim in declare(sample_counts) if claim.number in numbers], Path(out), command)
    loaded = {where: load_tasks(names) for where, names in plan.task_sets.items() if names}
    for run in plan.runs():
        if run.group.where != "cost" and run.seed in (SEARCH_SEED, 0):
            settings.check_sizes(plan.config(run, run.lr or plan.rates[0]), loaded[run.group.where])
    if held_out:
        unseen = load_tasks(held_out)
        require_samples(unseen, "test")
        check_labels(unseen, base.score)
    return plan
