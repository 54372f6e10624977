"""The pictures of `compare` and `heads`, PNG and SVG, drawn from their numbers alone. Needs matplotlib, in [plots].

Made for 800 pixels, the width of a README column. Colours are Okabe and Ito's, which the colour-blind can tell apart;
no meaning hangs on colour alone.
"""

import itertools
import sys
from contextlib import contextmanager

from .claims import t_interval

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKS = "osD^vPX*"
VERDICTS = {"holds": (BLUE, "o"), "does not hold": (RED, "X"), "cannot tell": ("#777777", "D")}


def matplotlib_is_missing():
    """Whether matplotlib is missing; if so, say how to get it."""
    try:
        import matplotlib  # noqa: F401
        return False
    except ImportError:
        print('no pictures: they need matplotlib; pip install "tinylora_mtl[plots]" (from a copy of the source: '
              '".[plots]")', file=sys.stderr)
        return True


@contextmanager
def picture(folder, name, height, columns=1, **options):
    """Yields (figure, axes) of 8 inches by `height` to draw on, without a display; NAME.png and NAME.svg come of it."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False,
                                "axes.spines.right": False, "svg.hashsalt": "tinylora_mtl"})  # always the same file
    figure = Figure(figsize=(8, height), layout="constrained")
    yield figure, figure.subplots(1, columns, **options)
    figure.savefig(folder / f"{name}.png", dpi=200)  # twice 800 pixels, for sharp screens
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def draw_comparison(results, folder):
    """The pictures of a comparison: verdicts, controls, budgets and cosines."""
    if matplotlib_is_missing():
        return
    for name, decides in (("verdicts", True), ("controls", False)):
        rows = [(claim["claim"], row) for claim in results["claims"] for row in claim["comparisons"]
                if row["unit"] == "points" and row["decides"] == decides]
        if rows:
            draw_differences(rows, folder, name)
    where = [where for where in ("tasks", "languages") if accuracies_by_count(results, "meta", where)]
    if where:
        draw_budgets(results, where, folder)
    runs = [run for run in results["runs"] if "cosine_curve" in run]
    if runs:
        draw_cosines(runs, folder)


def draw_differences(rows, folder, name):
    """The mean difference in accuracy and its interval, a line for each of (claim's number, comparison)."""
    with picture(folder, name, 1.2 + 0.27 * len(rows)) as (figure, axes):
        for y, (_, row) in enumerate(rows):
            colour, mark = VERDICTS[row["verdict"]]
            axes.plot(row["interval"], [y, y], color=colour, linewidth=2)
            axes.plot(row["mean"], y, mark, color=colour, markersize=6)
            if row["margin"]:
                axes.plot(-row["claimed"] * row["margin"], y, "|", color=BLACK, markersize=9)
        axes.axvline(0, color=BLACK, linewidth=0.8)
        names = [f"{number}  {row['name'].removeprefix('accuracy: ')}" for number, row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("difference in accuracy (points)\nmean and 95 % interval over seeds")
        for meaning, (colour, mark) in (VERDICTS | {"margin of “keeps up”": (BLACK, "|")}).items():
            axes.plot([], [], mark, color=colour, label=meaning)
        figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)


def draw_budgets(results, places, folder):
    """Claim 7: accuracy against training samples per task, a panel for the tasks and one for the languages."""
    with picture(folder, "budgets", 3.6, len(places), sharey=True, squeeze=False) as (_, (panels,)):
        for axes, where in zip(panels, places):
            for method, label, colour, mark, aside in (  # a little aside, so that no bar hides another
                    ("meta", "MeTA-LoRA", RED, "o", 0.97), ("lora_matched", "LoRA", BLUE, "s", 1.03)):
                accuracies = accuracies_by_count(results, method, where)
                counts = sorted(accuracies)
                middles, limits = zip(*[t_interval(accuracies[count]) for count in counts])
                reach = [middle - low for middle, (low, _) in zip(middles, limits)]
                axes.errorbar([aside * count for count in counts], middles, reach, color=colour, marker=mark,
                              capsize=3, label=label)
                axes.set(xscale="log", xlabel="training samples per task", title=where)
                axes.set_xticks(counts, counts)
                axes.minorticks_off()
        panels[0].set_ylabel("accuracy (%)\nmean and 95 % interval over seeds")
        panels[0].legend(frameon=False)


def accuracies_by_count(results, method, where):
    """{training samples per task: [accuracy in percent of each seed]}; runs of the search are on other samples."""
    found = {}
    for run in results["runs"]:
        if (run["method"], run["where"], run["search"]) == (method, where, False):
            found.setdefault(run["samples"], []).append(100 * run["average_after"])
    return found


def draw_cosines(runs, folder):
    """Claim 1: how alike the heads are during training, the mean of the layers, a line for each seed."""
    methods = list(dict.fromkeys(run["method"] for run in runs))
    with picture(folder, "cosines", 3.6) as (_, axes):
        for run in runs:
            number = methods.index(run["method"])
            points = [(step, value) for step, value in run["cosine_curve"] if value is not None]
            axes.plot(*zip(*points), color=COLOURS[number], marker=MARKS[number], markersize=3.5,
                      label=run["method"] if run["seed"] == 0 else None)
        axes.axhline(0, color=BLACK, linewidth=0.8)
        axes.set(xlabel="optimiser step", ylabel="mean cosine between heads\n(1: copies, 0: unrelated)")
        axes.legend(frameon=False)


def draw_heads(findings, matrices, components, folder):
    """heads: heads and tasks by layer, and the samples' features by task; head_cosines: the figure of R-LoRA's paper.

    matrices: the cosines of every pair of heads, [N, N] for each layer. Returns the paths of the files.
    """
    if matplotlib_is_missing():
        return []
    with picture(folder, "heads", 4.2, 2) as (_, (left, right)):
        for name, label, colour, style in (("head_cosine_start", "heads, at the start", SKY, ":"),
                                           ("head_cosine", "heads, now", BLUE, "-"),
                                           ("task_cosine", "tasks' mean features, now", ORANGE, "--")):
            values = [layer[name] for layer in findings["layers"]]
            if None not in values:
                left.plot(range(1, len(values) + 1), values, style, color=colour, label=label)
        left.axhline(0, color=BLACK, linewidth=0.8)
        left.set(xlabel="adapted layer, from the first to the last", ylabel="mean cosine over pairs")
        points, owner, shares = components
        for i, task in enumerate(findings["distances"]):
            right.plot(*points[owner == i].T.tolist(), MARKS[i % len(MARKS)], markersize=3.5,
                       label=" " + task.replace("$", r"\$"),  # no formula, and no name that begins with _
                       color=COLOURS[i % len(COLOURS)], fillstyle="full" if i < len(COLOURS) else "none")
        right.set(xlabel=f"first component of A x ({100 * shares[0]:.0f} % of the variance)",
                  ylabel=f"second component ({100 * shares[1]:.0f} %)")
        for axes, columns in ((left, 1), (right, 2)):
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)
    if matrices:
        mean = (sum(matrices) / len(matrices)).tolist()
        with picture(folder, "head_cosines", 4.0) as (figure, axes):
            image = axes.imshow(mean, cmap="cividis", vmin=min(0.0, *map(min, mean)), vmax=1)
            for i, j in itertools.product(range(len(mean)), repeat=2):
                axes.text(j, i, f"{mean[i][j]:.2f}", ha="center", va="center", fontsize=9,
                          color=BLACK if mean[i][j] > 0.5 else "white")
            axes.set(xlabel="head", ylabel="head", xticks=range(len(mean)), yticks=range(len(mean)),
                     xticklabels=range(1, len(mean) + 1), yticklabels=range(1, len(mean) + 1))
            figure.colorbar(image, label="cosine, mean of the layers")
    return [folder / f"{name}.{kind}" for name in (["heads", "head_cosines"] if matrices else ["heads"])
            for kind in ("png", "svg")]
