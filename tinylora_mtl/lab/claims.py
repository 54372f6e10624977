"""What the papers claim, as data: the variants that are compared, the comparisons and the rules.

A claim is a sentence and some comparisons. A comparison is a quantity, two groups of runs (a run for each seed) and the
direction that is claimed. From the differences between the two runs of each seed come the mean, its 95 % interval and,
for accuracies, one of four words. A POINT is the size of difference that the papers report:

    "better", "worse"   the interval excludes 0; "…, by less than a point" if it lies within a POINT of 0 all the same
    "no different"      it holds 0 and lies within a POINT of it
    "undecided"         any other

A comparison that decides a claim holds, does not hold, or cannot tell. A claim of "better" holds if the word is
"better", cannot tell if it is "undecided", and else does not hold: better by less than a point is not what was claimed.
"Keeps up with" is a claim that the difference is above -MARGIN (a test of non-inferiority): it holds if the whole
interval is, does not hold if none of it is, and else cannot tell. So it is for other quantities than accuracy, with 0.
A claim holds if all comparisons that decide it hold, and does not hold as soon as one of them does not. The others are
shown beside them: controls, ablations, baselines.

Intervals are not corrected for their number (no Holm). "All must hold" needs no correction. But each of the deciding
comparisons may be wrong in one case of 40, so "one does not hold" may be wrong in up to as many of 40 cases as there
are comparisons: claim 6 has 8. And of the comparisons that decide nothing, one in twenty of those without any
difference excludes 0.

An interval is about other seeds, which have other samples too where the tasks are generated (of claim 3: other
measurements). Learning rates are the same for all seeds.
"""

from dataclasses import dataclass
from functools import partial
from math import sqrt
from statistics import mean, stdev

MARGIN = 2.0  # points of accuracy: the most that a method may be behind and still "keep up"
POINT = 1.0  # point of accuracy: what lies within it is no difference that the papers would report
NEAR_COPIES = 0.5  # heads with a mean cosine above this are more alike than not: half way from unrelated to the same
# The 97.5 % quantile of Student's t distribution for 1, 2, 3, … degrees of freedom.
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
         2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
         2.0796, 2.0739, 2.0687)
MOST_SEEDS = len(T_975) + 1

# What is compared, as TrainConfig settings. `match` names the setting that is chosen so that as many parameters train
# as in HydraLoRA at --rank and --heads; the others have that rank. `alpha`, where it is not --alpha, is a function of
# the shared settings and the variant's own. Each variant has its learning rate searched for itself.
VARIANTS = {
    "lora": {"method": "lora"},
    "lora_matched": {"method": "lora", "match": "rank"},
    # With R-LoRA's scaling, which at the same learning rate makes its steps longer.
    "lora_scaled": {"method": "lora", "match": "rank",
                    "alpha": lambda base, own: own.rank * base.alpha / sqrt(base.rank)},
    "hydralora": {"method": "hydralora"},
    "rlora": {"method": "rlora"},
    # R-LoRA's ablation. All four have its scaling alpha / √r and its router, so that one thing changes at a time: the
    # multi-head dropout (0.1 or 0), and the start (random heads with a router at zero, or heads at zero with a
    # Kaiming-uniform router: with both at zero the heads would stay equal for ever).
    "rlora_start": {"method": "rlora", "dropout": 0.0},
    "rlora_dropout": {"method": "rlora", "zero_start": True},
    "rlora_neither": {"method": "rlora", "zero_start": True, "dropout": 0.0},
    "rlora_released": {"method": "rlora_released"},  # as in the released code: `gallery/rlora_released.py`
    "mlora": {"method": "mlora", "match": "heads"},
    "mlora_mean": {"method": "mlora", "match": "heads", "alpha": lambda base, own: base.alpha / own.heads},
    "mlora_heads": {"method": "mlora"},  # with as many heads as R-LoRA: n of them start at a mean cosine of -1/(n - 1)
    "mlora_zero": {"method": "mlora", "zero_start": True},
    "mlora_released": {"method": "mlora_released"},
    "align_kl": {"method": "align", "align": "kl", "match": "rank"},
    "align_mmd": {"method": "align", "align": "mmd", "match": "rank"},
    "align_shuffled": {"method": "align", "align": "kl", "shuffle_groups": True, "match": "rank"},
    "meta": {"method": "meta", "match": "rank"},  # its inner rate is searched with the outer one
}
# Three starts of the heads, each with a router (R-LoRA) and without (M-LoRA, with as many heads).
STARTS = {"as in the paper": ("rlora", "mlora_heads"), "zero": ("rlora_dropout", "mlora_zero"),
          "as released": ("rlora_released", "mlora_released")}
# Pairs whose costs are measured side by side, see cost.py. Published, both have dropout; without it HydraLoRA, too,
# needs A x only once.
COSTS = {"dropout 0.1": ({"method": "hydralora", "dropout": 0.1}, {"method": "rlora", "dropout": 0.1}),
         "no dropout": ({"method": "hydralora", "dropout": 0.0}, {"method": "rlora", "dropout": 0.0})}
UNITS = {"accuracy": "points", "adapted": "points", "unseen": "points", "bits": "bits", "cosine": "cosine",
         "distance": "nats", "moved": "nats", "time": "%", "memory": "%"}


@dataclass(frozen=True)
class Group:
    """The runs of one variant, a run for each seed."""

    method: str  # a key of VARIANTS; of COSTS where `where` is "cost"
    where: str = "tasks"  # trained on the tasks or on "languages"; "cost": not trained, only measured
    samples: int | None = None  # training samples of each task; None: all

    def __str__(self):
        samples = f", {self.samples} samples" if self.samples else ""
        return self.method + samples + (", languages" if self.where == "languages" else "")


@dataclass(frozen=True)
class Comparison:
    """left - right, seed by seed, of a quantity that compare.py or cost.py takes from a run."""

    left: Group
    right: Group | float  # a number: left is compared with that
    quantity: str = "accuracy"  # a key of UNITS
    claimed: int = 1  # +1: left is claimed to have more, -1: less
    margin: float = 0.0
    decides: bool = True
    right_quantity: str = ""  # where it is not the same as on the left

    def __str__(self):
        right = "" if self.right == 0 else f" - {self.right}"
        return f"{self.quantity}: {self.left}{right}" + (f" ({self.right_quantity})" if self.right_quantity else "")

    def both(self):
        """[(left, its quantity), (right, its quantity)]."""
        return [(self.left, self.quantity), (self.right, self.right_quantity or self.quantity)]


@dataclass(frozen=True)
class Claim:
    number: int
    text: str
    comparisons: tuple


def best_rates(tried):
    """The rates of the best accuracy in {(lr, ...): validation accuracy}; of equals the lowest."""
    return max(sorted(tried), key=tried.get)


def few_of(sample_counts):
    """The number of samples that claim 7 calls few: of those that are not all, the largest up to 50."""
    return max(count for count in sample_counts[:-1] if count <= 50)


def declare(sample_counts):
    """The ten claims; sample_counts: training samples per task of claim 7's curve, the last being all there are."""
    lora, matched, scaled, hydra, rlora = map(Group, ("lora", "lora_matched", "lora_scaled", "hydralora", "rlora"))
    mlora, averaged = Group("mlora"), Group("mlora_mean")
    start, dropout, neither = map(Group, ("rlora_start", "rlora_dropout", "rlora_neither"))
    kl, mmd, shuffled = map(Group, ("align_kl", "align_mmd", "align_shuffled"))
    *smaller, everything = sample_counts
    few, rivals, beside = few_of(sample_counts), (matched, hydra, rlora, mlora), partial(Comparison, decides=False)

    def few_samples(where):  # MeTA-LoRA with few samples: against LoRA with all, and against the honest baseline
        meta, full, honest = Group("meta", where, few), Group("lora_matched", where), Group("lora_matched", where, few)
        yield Comparison(meta, full, margin=MARGIN)
        yield beside(meta, full, "adapted", margin=MARGIN, right_quantity="accuracy")
        yield beside(honest, full, margin=MARGIN)
        yield beside(meta, honest)

    def starts():  # the router (M-LoRA has none) against the start of the heads; R-LoRA's dropout is in all of them
        pairs = [tuple(map(Group, pair)) for pair in STARTS.values()]
        for number, (routed, without) in enumerate(pairs):
            decides = number == 0  # the papers'
            yield Comparison(without, routed, "cosine", decides=decides)
            yield Comparison(without, NEAR_COPIES, "cosine", decides=decides)
            yield Comparison(routed, NEAR_COPIES, "cosine", claimed=-1, decides=decides)
        for routed, without in pairs[1:]:
            for one, usual in ((without, pairs[0][1]), (routed, pairs[0][0])):
                yield beside(one, usual, "cosine")
                yield beside(one, usual)

    def above(quantity, decides=True):  # Align-LoRA above all others
        return (Comparison(align, rival, quantity, decides=decides) for align in (kl, mmd) for rival in rivals)

    return [
        Claim(1, "Heads that start at zero stay near-copies (HydraLoRA); R-LoRA's do not.",
              (Comparison(hydra, rlora, "cosine"), Comparison(hydra, NEAR_COPIES, "cosine"),
               Comparison(rlora, NEAR_COPIES, "cosine", claimed=-1))),
        Claim(2, "R-LoRA is better than HydraLoRA, and that better than LoRA.",  # beside it the ablation of R-LoRA
              (Comparison(rlora, hydra), Comparison(hydra, lora), beside(rlora, hydra, "bits", claimed=-1),
               beside(hydra, lora, "bits", claimed=-1), beside(dropout, neither), beside(start, neither),
               beside(rlora, neither), beside(rlora, dropout), beside(rlora, start),
               beside(neither, hydra), beside(scaled, matched))),  # in both pairs the scaling alone differs
        Claim(3, "R-LoRA's steps take less time and less memory than HydraLoRA's.",
              tuple(Comparison(Group(pair, "cost"), 0.0, quantity, claimed=-1, decides=pair == "dropout 0.1")
                    for pair in COSTS for quantity in ("time", "memory"))),
        Claim(4, "A simpler multi-head adapter without a router (M-LoRA) beats the routed ones.",  # summed, or averaged
              (Comparison(mlora, hydra), Comparison(mlora, rlora), beside(mlora, hydra, "bits", claimed=-1),
               beside(mlora, rlora, "bits", claimed=-1), beside(averaged, hydra), beside(averaged, rlora),
               beside(averaged, mlora))),
        Claim(5, "A single LoRA of higher rank, with as many trainable parameters, keeps up with multi-head adapters.",
              (*(Comparison(matched, rival, margin=MARGIN) for rival in (hydra, rlora, mlora)),
               *(beside(matched, rival, "bits", claimed=-1) for rival in (hydra, rlora, mlora)))),
        Claim(6, "Align-LoRA (KL, MMD) beats LoRA of the same rank and all multi-head adapters.",
              (*above("accuracy"), *(beside(align, matched, "bits", claimed=-1) for align in (kl, mmd)),
               beside(kl, shuffled), *(beside(align, matched, "distance", claimed=-1) for align in (kl, mmd, shuffled)),
               *(beside(group, 0.0, "moved", claimed=-1) for group in (matched, kl, mmd, shuffled)))),
        Claim(7, f"MeTA-LoRA with {few} samples per task keeps up with LoRA with all {everything}.",
              (*few_samples("tasks"),
               *(beside(Group("meta", samples=count), Group("lora_matched", samples=count))
                 for count in smaller if count != few),
               beside(Group("meta", samples=everything), matched))),
        Claim(8, f"The same in several languages: with {few} samples per language it keeps up with LoRA with all.",
              tuple(few_samples("languages"))),
        Claim(9, "Without a router the heads become near-copies (M-LoRA); with one they do not (R-LoRA).",
              tuple(starts())),
        Claim(10, "Align-LoRA beats all of those on tasks that it was not trained on, too.",
              (*above("unseen"), beside(kl, shuffled, "unseen"))),
    ]


def t_interval(differences):
    """(mean, [low, high]) of paired differences, 2 to MOST_SEEDS of them: mean ± t · s / √n, 95 %."""
    count, middle = len(differences), mean(differences)
    reach = T_975[count - 2] * stdev(differences) / sqrt(count)
    return middle, [middle - reach, middle + reach]


def word(interval):
    """One of the four words at the top, for a difference in points of accuracy: what is said of the left side."""
    low, high = interval
    within = -POINT < low and high < POINT
    if low <= 0 <= high:
        return "no different" if within else "undecided"
    return ("better" if low > 0 else "worse") + (", by less than a point" if within else "")


def verdict(interval, claimed=1, margin=0.0, unit="points"):
    """The rule at the top, for one comparison: "holds", "does not hold" or "cannot tell"."""
    low, high = interval if claimed > 0 else (-interval[1], -interval[0])
    if unit == "points" and not margin:
        found = word([low, high])
        return {"better": "holds", "undecided": "cannot tell"}.get(found, "does not hold")
    return "holds" if low > -margin else "does not hold" if high < -margin else "cannot tell"


def joint_verdict(verdicts):
    """The verdict of a claim, from those of the comparisons that decide it."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if set(verdicts) == {"holds"} else "cannot tell"
