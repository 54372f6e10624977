"""The list of runs behind the claims: which there are, under which conditions, with which settings of `train`.

Learning rates are chosen first, for each variant by itself, by the accuracy on validation samples, the mean of the
tasks, with SEARCH_SEEDS, which do nothing else. With the first seed seven rates are tried, a factor of 1.6 to 1.7 apart
(the lowest was added when two variants had shown that they want it); with the others the best of those and its two
neighbours. The best of these three, in the mean of all search seeds, is taken. For MeTA-LoRA the first seed tries five
of the rates with every one of INNER_RATES, twice as many runs. Then come the runs that are judged, on test samples,
seed by seed.

Of generated tasks every seed has samples of its own, training samples too, so that an interval tells what other samples
would have changed, not only other random numbers.

Tasks, steps and the number of seeds come from a pilot on validation samples, of seeds (2000 to 2003) that nothing else
has. At 150 steps of 30 samples web_of_lies and tracking_shuffled_objects differed by 10 to 20 points between seeds, and
without them R-LoRA and LoRA of its size by 1.4 ± 1.7 (mean, standard deviation). At 300 steps of 18 it is -0.7 ± 0.5,
so eight seeds are to give intervals of about ± 0.4 points.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import __version__
from ..adapters import adapter_parameters, add_adapters, find_adapters, remove_adapters
from ..config import TrainConfig, adapter_config, resolve
from ..data.embedded import LANGUAGES
from ..data.tasks import EMBEDDED, TASK_SETS, check_labels, embedded_samples, load_tasks, own_name, require_samples
from ..run import files, models, settings
from ..run.methods import find_method, typed_method
from .claims import COSTS, VARIANTS, Group, best_rates, declare, few_of

PRESETS = {
    "quick": {"claims": [1, 4, 5], "search_seeds": 1, "seeds": 3, "steps": 60, "batch_size": 32, "rates": [3e-3, 1e-2],
              "score_samples": 200, "tasks": ["word_sorting", "dyck_languages", "object_counting"], "held_out": []},
    "full": {"claims": None, "search_seeds": 3, "seeds": 8, "steps": 300, "batch_size": 18,
             "rates": [6e-4, 1e-3, 1.7e-3, 2.8e-3, 4.6e-3, 7.5e-3, 1.2e-2], "score_samples": 1000, "tasks": ["mini"],
             # Not trained on. The first two are learned late and all at once, so that seeds would differ by 20 points.
             "held_out": ["web_of_lies", "tracking_shuffled_objects", *LANGUAGES]},
}
RATES = [1.2e-4, 2e-4, 3.3e-4, 5.5e-4, 9e-4, 1.5e-3, 2.5e-3]  # searched on models other than mini
INNER_RATES = [0.005, 0.02, 0.08]  # of MeTA-LoRA
SAMPLE_COUNTS = [50, 500]  # training samples per task of claim 7's curve; all other runs have the last
SEARCH_SEEDS = [1000, 1001, 1002]  # of the runs that choose learning rates; the others have 0, 1, 2, …
TOLERANCE = 0.05  # by how much matched numbers of parameters may differ
SHARED = ("model", "steps", "batch_size", "accumulation", "rank", "alpha", "heads", "targets", "max_length", "score",
          "score_samples", "device", "dtype")  # settings of train that all runs of a comparison have in common


@dataclass(frozen=True)
class Run:
    """One entry of the list: a run of `train`, or a measurement of costs."""

    group: Group
    seed: int
    tried: tuple | None = None  # of a run of the search: (lr,), or (lr, inner_lr); else they are what the search chose

    @property
    def name(self):
        group = self.group
        parts = [group.method.replace(" ", "_"), group.where, str(group.samples or "all"), f"seed{self.seed}"]
        return "-".join(parts if self.tried is None else ["search", *parts, *(f"lr{rate:g}" for rate in self.tried)])


@dataclass
class Plan:
    """What is compared, under which conditions."""

    base: TrainConfig  # what all runs share
    task_sets: dict  # {"tasks", "languages": names of the tasks to train on}
    held_out: list  # tasks to score that were not trained on
    sample_counts: list
    rates: list
    search_seeds: list
    seeds: list  # of the runs that are judged
    claims: list
    out: Path
    command: str = ""
    methods: tuple = ()  # those of the table, keys of VARIANTS or any of the package

    def __post_init__(self):
        self.groups = {}  # {Group: the quantities that its runs are needed for}
        for comparison in (comparison for claim in self.claims for comparison in claim.comparisons):
            for side, quantity in comparison.both():
                if isinstance(side, Group):
                    self.groups.setdefault(side, set()).add(quantity)
        for method in self.methods:  # MeTA-LoRA is for few samples
            few = few_of(self.sample_counts) if settings_of(method)["method"] == "meta" else None
            self.groups.setdefault(Group(method, samples=few), set()).add("accuracy")
            self.groups[Group(method, "cost")] = {"time", "memory"}
        trained = sorted({group.method for group in self.groups if group.method not in COSTS})
        names = [own_name(name) for name in self.task_sets["tasks"]]
        self.variants, self.parameters, self.merges = match(trained, self.base, names)
        self.before = {}  # {(tasks, split): what a model scores at the start}, once known

    def runs(self, rows):
        """The list, as far as it is known from {name: row}: the search of the learning rates, then what they are for.

        It grows when a search has finished with its first seed. Costs come last, for nothing may compute beside them.
        """
        first, *others = self.search_seeds
        searched = dict.fromkeys(self.searched(group) for group in self.groups if group.where != "cost")
        return ([Run(group, first, tried) for group in searched for tried in self.tried(group)]
                + [Run(group, seed, tried)
                   for seed in others for group in searched for tried in self.tried_again(group, rows)]
                + [Run(group, seed) for seed in self.seeds for group in self.groups if group.where != "cost"]
                + [Run(group, seed) for group in self.groups if group.where == "cost"
                   for seed in (self.seeds if group.method in COSTS else [0])])  # of --methods once

    def cost_pair(self, method):
        """The settings of the two runs whose steps are compared: a pair of COSTS, or LoRA and a method."""
        return COSTS[method] if method in COSTS else ({"method": "lora"}, self.variants[method])

    def tried(self, group):
        """What the search tries for a group: [(lr,), ...], or for MeTA-LoRA, of fewer rates, [(lr, inner_lr), ...]."""
        if settings_of(group.method)["method"] != "meta":
            return [(lr,) for lr in self.rates]
        return [(lr, inner_lr) for inner_lr in INNER_RATES for lr in self.rates[1:-1] or self.rates]

    def tried_again(self, group, rows):
        """Of `tried` the best with the first seed and its neighbours, three in all; [] until they are known."""
        found = {tried: rows.get(Run(group, self.search_seeds[0], tried).name) for tried in self.tried(group)}
        if None in found.values():
            return []
        best = best_rates({tried: row["average_after"] for tried, row in found.items()})
        same = [tried for tried in found if tried[1:] == best[1:]]  # at that inner rate
        start = max(0, min(same.index(best) - 1, len(same) - 3))
        return same[start:start + 3]

    def searched(self, group):
        """The group whose learning rate a group takes: of the same variant, with all or with few samples.

        How few they are makes no difference, nor whether they are of the tasks or of the languages, and MeTA-LoRA is
        for few in any case.
        """
        few = settings_of(group.method)["method"] == "meta" or group.samples not in (None, self.sample_counts[-1])
        return Group(group.method, samples=few_of(self.sample_counts) if few else None)

    def samples_of(self, names, seed):
        """The tasks of these names with the samples of a seed: generated ones as files in the comparison's folder."""
        return [str(self.task_folder(name, seed)) if name in EMBEDDED else name for name in names]

    def task_folder(self, name, seed):
        """The folder of an embedded task with other samples, a split a file, which is written if it is not there."""
        folder = self.out / "tasks" / f"seed{seed}" / name
        if not folder.is_dir():
            files.make_folder(folder.parent)
            with TemporaryDirectory(dir=folder.parent) as own:  # whole or not at all: others may need it too
                files.make_folder(Path(own) / name)
                for split, samples in embedded_samples(name, seed).items():
                    lines = [json.dumps({"prompt": prompt, "target": target}) for prompt, target in samples]
                    files.write_file(Path(own) / name / f"{split}.jsonl", "\n".join(lines).encode())
                try:
                    os.rename(Path(own) / name, folder)
                except OSError:
                    if not folder.is_dir():  # else another process was first
                        raise
        return folder

    def sizes(self, tasks, samples):
        """For MeTA-LoRA: a round's queries are as a batch of the others, with all tasks and as many samples of each."""
        each = max(1, min(samples // 2, self.base.batch_size // len(tasks)))
        return {"support": each, "query": each, "tasks_per_round": len(tasks)}

    def config(self, run, rates):
        """The TrainConfig of a run, rates: as `tried`. A search never sees the test split."""
        tasks, samples = self.task_sets[run.group.where], run.group.samples or self.sample_counts[-1]
        return settings.with_full_paths(resolve(replace(
            self.base, **self.variants[run.group.method] | dict(zip(("lr", "inner_lr"), rates)),
            **self.sizes(tasks, samples), tasks=self.samples_of(tasks, run.seed), samples=samples, seed=run.seed,
            split="test" if run.tried is None else "validation",
            skip_bad_steps=self.base.steps,  # they are counted, not fatal
            out=str(self.out / "runs" / run.name))))

    def shared_conditions(self):
        """What all runs have in common, also those of a longer list with more seeds or claims."""
        return {name: getattr(self.base, name) for name in SHARED} | self.task_sets | {
            "held_out": self.held_out, "sizes": self.sample_counts, "search_seeds": self.search_seeds,
            "rates": self.rates, "inner_rates": INNER_RATES, "version": __version__, "source_sha256": hash_of_source()}

    def conditions(self):
        """For results.json: what was compared, and how."""
        return self.shared_conditions() | {"seeds": self.seeds, "parameters": self.parameters,
                                           "methods": {method: self.merges[method] for method in self.methods}}


@cache
def hash_of_source():
    """A hash of this package's code and of the embedded model: the same code, the same hash, wherever it is."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted([*package.rglob("*.py"), *(package / "assets" / "mini").iterdir()]):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def settings_of(name):
    """A variant's settings of train; any other name is that of a method, as it is."""
    return VARIANTS.get(name, {"method": name})


def match(names, base, tasks):
    """What there is to know of variants before they are trained, with every `match` of VARIANTS worked out.

    Parameters grow linearly with the rank and with the heads, so two counts tell which value comes nearest to
    HydraLoRA's number. ValueError if that is not within TOLERANCE. tasks: their names.
    -> three dicts by name: TrainConfig settings, numbers of trainable parameters, and whether they can be merged.
    """
    model, _, _ = models.load_model(base.model, base.device, base.dtype)

    def build(**changes):
        add_adapters(model, replace(adapter_config(resolve(replace(base, **changes))), tasks=tuple(tasks)))
        number, merges = sum(p.numel() for p in adapter_parameters(model).values()), merging(model)
        remove_adapters(model)
        return number, merges

    wanted, variants, counts, merges = build(method="hydralora")[0], {}, {}, {}
    for name in names:
        changes = dict(settings_of(name))
        find_method(changes["method"])
        knob, alpha = changes.pop("match", None), changes.pop("alpha", None)
        if knob:
            two, three = (build(**changes | {knob: value})[0] for value in (2, 3))
            changes[knob] = max(2, round(2 + (wanted - two) / (three - two)))
        if alpha:
            changes["alpha"] = alpha(base, replace(base, **changes))
        variants[name], (counts[name], merges[name]) = changes, build(**changes)
        if knob and abs(counts[name] / wanted - 1) > TOLERANCE:
            raise ValueError(f"{name} has {counts[name]:,} parameters at --{knob} {changes[knob]}, which is not "
                             f"within {TOLERANCE:.0%} of HydraLoRA's {wanted:,}; another --rank or --heads may do")
    return variants, counts, merges


def merging(model):
    """Whether a model's adapters can be merged: "yes", "for one task" (which must be told, to answer too) or "no"."""
    adapter = next(iter(find_adapters(model).values()))
    by_task = hasattr(adapter, "task_ids")
    if by_task:
        adapter.task_ids = 0
    try:
        adapter.delta()
    except ValueError:
        return "no"
    return "for one task" if by_task else "yes"


def make_plan(args, command=""):
    """The Plan of the command line; ValueError for what does not go together, before hours of runs find it out."""
    preset, mini = PRESETS[args.preset], args.model == "mini"
    given = {name: getattr(args, name) for name in SHARED if getattr(args, name) is not None}
    preset_settings = {name: preset[name] for name in ("steps", "batch_size", "score_samples")}
    base = TrainConfig(**{"rank": 4} | preset_settings | given)
    settings.check(base)
    tasks, languages, held_out = ([name for given in names for name in TASK_SETS.get(given, [given])] for names in (
        args.tasks or preset["tasks"], args.languages or (["mini-multilingual"] if mini else []),
        args.held_out or (preset["held_out"] if mini and not args.tasks else [])))
    tasks = [name for name in tasks if own_name(name) not in map(own_name, held_out)]
    if not tasks:
        raise ValueError("no task is left to train on: all are held out")
    sample_counts = sorted(set(args.samples or SAMPLE_COUNTS))
    if len(sample_counts) < 2 or sample_counts[0] > 50:
        raise ValueError("--samples needs at least two sizes, the smallest at most 50")
    declared = {claim.number for claim in declare(sample_counts)}
    numbers = set(args.claims or (set() if args.methods else preset["claims"] or declared))
    if not numbers <= declared:
        raise ValueError(f"there is no claim {max(numbers)}; claims.py has {', '.join(map(str, sorted(declared)))}")
    methods = tuple(name if name in VARIANTS else typed_method(name) for name in args.methods or ())
    for name in methods:
        settings.check(replace(base, method=settings_of(name)["method"]))
    for number, there, flag in ((8, languages, "--languages"), (10, held_out, "--held-out")):
        if number in numbers and not there:
            if args.claims:
                raise ValueError(f"claim {number} needs {flag}")
            print(f"without claim {number}: it needs {flag}")
            numbers.remove(number)
    out = args.out or f"runs/compare{'' if mini else f'-{Path(args.model).name}'}-{args.preset}"
    plan = Plan(base, {"tasks": tasks, "languages": languages}, held_out, sample_counts,
                sorted(set(args.rates or (preset["rates"] if mini else RATES))), SEARCH_SEEDS[:preset["search_seeds"]],
                list(range(args.first_seed, args.first_seed + (args.seeds or preset["seeds"]))),
                [claim for claim in declare(sample_counts) if claim.number in numbers], Path(out), command, methods)
    for rate in plan.rates:
        settings.check(replace(base, lr=rate))
    loaded = {where: load_tasks(names, sample_counts[-1]) for where, names in plan.task_sets.items() if names}
    for run in plan.runs({}):
        if run.group.where != "cost" and run.seed in (plan.search_seeds[0], plan.seeds[0]):
            settings.check_sizes(plan.config(run, run.tried or plan.rates[:1]), loaded[run.group.where])
    if held_out:
        unseen = load_tasks(held_out)
        require_samples(unseen, "test")
        check_labels(unseen, base.score)
    return plan
