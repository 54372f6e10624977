"""The list of runs behind the claims: which there are, under which conditions, with which settings of `train`."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapters import adapter_parameters, add_adapters, remove_adapters
from .claims import METHODS, Group, declare, few_of
from ..run.models import load_model
from ..run.settings import TrainConfig, adapter_config, check, check_sizes, fill_in
from ..data.tasks import TASK_SETS, check_labels, load_tasks, require_samples

PRESETS = {
    "quick": {"claims": [1, 4, 5], "seeds": 3, "steps": 60, "batch_size": 32, "rates": [3e-3, 1e-2],
              "tasks": ["word_sorting", "dyck_languages", "object_counting"], "held_out": []},
    "full": {"claims": [1, 2, 3, 4, 5, 6, 7, 8], "seeds": 6, "steps": 150, "batch_size": 32,
             "rates": [1e-3, 3e-3, 8e-3, 2e-2], "tasks": ["mini"],
             "held_out": ["boolean_expressions", "object_counting"]},  # for "tasks not trained on"
}
RATES = [2e-4, 5e-4, 1e-3, 2e-3]  # searched on models other than mini
SIZES = [10, 20, 50, 100, 500]  # training samples per task of claim 7's curve; all other runs have the last
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
    places: dict  # {"tasks", "languages": names of the tasks to train on}
    held_out: list  # tasks to score that were not trained on
    sizes: list
    rates: list
    seeds: int
    claims: list
    out: Path
    command: str = ""

    def __post_init__(self):
        self.few = few_of(self.sizes)
        self.groups = {}  # {Group: the quantities that its runs are needed for}
        for comparison in (comparison for claim in self.claims for comparison in claim.comparisons):
            for side, quantity in ((comparison.left, comparison.quantity),
                                   (comparison.right, comparison.right_quantity or comparison.quantity)):
                if isinstance(side, Group):
                    self.groups.setdefault(side, set()).add(quantity)
        names = {group.method for group in self.groups if group.where != "cost"}
        self.methods, self.parameters = match(names, self.base)
        self.before = {}  # {(where, split): what the base model scores}, once it is known

    def runs(self):
        """The declared list: first the search of the learning rates, then seed by seed what they are for."""
        searched = dict.fromkeys(self.searched(group) for group in self.groups if group.where != "cost")
        return ([Run(group, SEARCH_SEED, lr) for group in searched for lr in self.rates]
                + [Run(group, seed) for seed in range(self.seeds) for group in self.groups])

    def searched(self, group):
        """The group whose learning rate a group takes: of the same method, with all or with few samples.

        How few they are makes no difference, and MeTA-LoRA is for few in any case.
        """
        few = METHODS[group.method]["method"] == "meta" or (group.samples or self.sizes[-1]) < self.sizes[-1]
        return Group(group.method, group.where, self.few if few else None)

    def conditions(self):
        """For results.json: what all runs have in common."""
        return {name: getattr(self.base, name) for name in SHARED} | self.places | {
            "held_out": self.held_out, "sizes": self.sizes, "seeds": list(range(self.seeds)),
            "search_seed": SEARCH_SEED, "threads": torch.get_num_threads(), "parameters": self.parameters}

    def config(self, run, lr):
        """The TrainConfig of a run. A search never sees the test split."""
        settings, tasks = self.methods[run.group.method], self.places[run.group.where]
        samples, more = run.group.samples or self.sizes[-1], {}
        if settings["method"] == "meta":  # a round's query sets are as a batch of the others: all tasks, as many each
            half = max(1, min(samples // 2, self.base.batch_size // len(tasks)))
            more = {"support": half, "query": half, "tasks_per_round": len(tasks)}
        return fill_in(replace(
            self.base, **settings | more, tasks=tasks, samples=samples, seed=run.seed, lr=lr,
            split="test" if run.lr is None else "validation", skip_bad_steps=self.base.steps,  # counted, not fatal
            out=str(self.out / "runs" / run.name)))


def samples_seen(config):
    """How many samples went forward and backward in a run, each as often as it came."""
    if config.method == "meta":
        return config.steps * config.tasks_per_round * (config.inner_steps * config.support + config.query)
    return config.steps * (config.batch_size // len(config.tasks)) * len(config.tasks)


def match(names, base):
    """({method: TrainConfig settings}, {method: trainable parameters}) with every `match` of claims.METHODS worked out.

    Parameters grow linearly with the rank and with the heads, so two counts tell which value comes nearest to
    HydraLoRA's number. ValueError if that is not within TOLERANCE.
    """
    model, _, _ = load_model(base.model, base.device, base.dtype)

    def count(**settings):
        add_adapters(model, adapter_config(fill_in(replace(base, **settings))))
        number = sum(parameter.numel() for parameter in adapter_parameters(model).values())
        remove_adapters(model)
        return number

    wanted, methods, counts = count(method="hydralora"), {}, {}
    for name in sorted(names):
        settings = dict(METHODS[name])
        knob = settings.pop("match", None)
        if knob:
            two, three = (count(**settings | {knob: value}) for value in (2, 3))
            settings[knob] = max(2, round(2 + (wanted - two) / (three - two)))
        methods[name], counts[name] = settings, count(**settings)
        if knob and abs(counts[name] / wanted - 1) > TOLERANCE:
            raise ValueError(f"{name} has {counts[name]:,} parameters at --{knob} {settings[knob]}, which is not "
                             f"within {TOLERANCE:.0%} of HydraLoRA's {wanted:,}; another --rank or --heads may do")
    return methods, counts


def make_plan(args, command=""):
    """The Plan of the command line; ValueError for what does not go together."""
    preset = PRESETS[args.preset]
    mini = args.model == "mini"
    own = {name: getattr(args, name, None) for name in SHARED}
    base = replace(TrainConfig(rank=4, steps=preset["steps"], batch_size=preset["batch_size"]),
                   **{name: value for name, value in own.items() if value is not None})
    check(base)
    tasks = [name for given in args.tasks or preset["tasks"] for name in TASK_SETS.get(given, [given])]
    held_out = args.held_out or (preset["held_out"] if mini and not args.tasks else [])
    tasks = [name for name in tasks if name not in held_out]
    languages = args.languages or (["mini-multilingual"] if mini else [])
    places = {"tasks": tasks, "languages": [name for given in languages for name in TASK_SETS.get(given, [given])]}
    sizes = sorted(set(args.samples or SIZES))
    if len(sizes) < 2 or sizes[0] > 50:
        raise ValueError("--samples needs at least two sizes, the smallest at most 50")
    numbers = args.claims or preset["claims"]
    needs = {6: (held_out, "--held-out"), 8: (languages, "--languages")}
    for number, (there, flags) in needs.items():
        if number in numbers and not there:
            if args.claims:
                raise ValueError(f"claim {number} needs {flags}")
            print(f"without claim {number}: it needs {flags}")
    claims = [claim for claim in declare(sizes) if claim.number in numbers and needs.get(claim.number, (True,))[0]]
    name = "" if mini else f"-{Path(args.model).name}"
    plan = Plan(base, places, held_out, sizes, args.rates or (preset["rates"] if mini else RATES),
                args.seeds or preset["seeds"], claims, Path(args.out or f"runs/compare{name}-{args.preset}"), command)
    check_runs(plan)
    return plan


def check_runs(plan):
    """ValueError for what would be found out only after hours of runs."""
    loaded = {where: load_tasks(names) for where, names in plan.places.items() if names}
    for run in plan.runs():
        if run.group.where != "cost" and run.seed in (SEARCH_SEED, 0):
            check_sizes(plan.config(run, run.lr or plan.rates[0]), loaded[run.group.where])
    held_out = load_tasks(plan.held_out) if plan.held_out else []
    require_samples(held_out, "test")
    check_labels(held_out, plan.base.score)
