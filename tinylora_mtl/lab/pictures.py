"""The pictures of `compare` and `heads`, PNG and SVG, drawn from their numbers alone. Needs matplotlib, in [plots].

Made for 800 pixels, the width of a README column. Colours are Okabe and Ito's, which the colour-blind can tell apart;
no meaning hangs on colour alone.
"""

import sys

from .claims import t_interval

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, BLACK = COLOURS = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
MARKS = "osD^vPX*"
VERDICTS = {"holds": (BLUE, "o"), "does not hold": (RED, "X"), "cannot tell": ("#777777", "D")}


def say_missing():
    """Whether matplotlib is missing; if so, say how to get it."""
    try:
        import matplotlib  # noqa: F401
        return False
    except ImportError:
        print('no pictures: they need matplotlib; pip install "tinylora_mtl[plots]" (from a copy of the source: '
              '".[plots]")', file=sys.stderr)
        return True


def new_figure(height, columns=1, **options):
    """(figure, axes) of 8 inches by `height`, drawn without a display."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
                                "svg.hashsalt": "tinylora_mtl"})  # the same numbers make the same file
    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def save(figure, folder, name):
    """Write NAME.png and NAME.svg; returns their paths."""
    paths = [folder / f"{name}.png", folder / f"{name}.svg"]
    figure.savefig(paths[0], dpi=200)  # twice 800 pixels, for sharp screens
    figure.savefig(paths[1], metadata={"Date": None})
    return paths


# ------------------------------------------------------------------------------------------------------- of compare
def draw_verdicts(results, folder):
    """verdicts: the differences in accuracy that decide the claims, with their intervals; controls: the others."""
    paths = []
    for name, decides in (("verdicts", True), ("controls", False)):
        rows = [(claim["claim"], row) for claim in results["claims"] for row in claim["comparisons"]
                if row["unit"] == "points" and row["decides"] == decides]
        paths += draw_differences(rows, folder, name) if rows else []
    return paths


def draw_differences(rows, folder, name):
    """A line for each of (claim's number, comparison): the mean difference and its interval."""
    figure, axes = new_figure(1.2 + 0.27 * len(rows))
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
    for meaning, (colour, mark) in VERDICTS.items():
        axes.plot([], [], mark, color=colour, label=meaning)
    axes.plot([], [], "|", color=BLACK, label="margin of “keeps up”")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return save(figure, folder, name)


def draw_budgets(results, folder):
    """Claim 7: accuracy against training samples per task, a panel for each set of tasks."""
    places = [place for place in ("tasks", "languages") if any(
        run["method"] == "meta" and run["where"] == place for run in results["runs"])]
    if not places:
        return []
    figure, panels = new_figure(3.6, len(places), sharey=True, squeeze=False)
    for axes, place in zip(panels[0], places):
        for method, label, colour, mark, aside in (  # a little aside, so that no bar hides another
                ("meta", "MeTA-LoRA", RED, "o", 0.97), ("lora_matched", "LoRA", BLUE, "s", 1.03)):
            cells = accuracies_by_size(results, method, place)
            sizes = sorted(cells)
            middles, limits = zip(*[t_interval(cells[size]) for size in sizes])
            reach = [middle - low for middle, (low, _) in zip(middles, limits)]
            axes.errorbar([aside * size for size in sizes], middles, reach, color=colour, marker=mark, capsize=3,
                          label=label)
            axes.set_xscale("log")
            axes.set_xticks(sizes, sizes)
            axes.minorticks_off()
        axes.set_xlabel("training samples per task")
        axes.set_title(place, fontsize=10)
    panels[0][0].set_ylabel("accuracy (%)\nmean and 95 % interval over seeds")
    panels[0][0].legend(frameon=False)
    return save(figure, folder, "budgets")


def accuracies_by_size(results, method, place):
    """{training samples per task: [accuracy in percent of each seed]}; runs of the search are on other samples."""
    cells = {}
    for run in results["runs"]:
        if (run["method"], run["where"], run["search"]) == (method, place, False):
            cells.setdefault(run["samples"], []).append(100 * run["average_after"])
    return cells


def draw_cosines(results, folder):
    """Claim 1: how alike the heads are during training, the mean of the layers, a line for each seed."""
    runs = [run for run in results["runs"] if "cosine_curve" in run]
    if not runs:
        return []
    figure, axes = new_figure(3.6)
    for number, method in enumerate(dict.fromkeys(run["method"] for run in runs)):
        for i, run in enumerate(run for run in runs if run["method"] == method):
            points = [(step, value) for step, value in run["cosine_curve"] if value is not None]
            axes.plot(*zip(*points), color=COLOURS[number], marker=MARKS[number], markersize=3.5,
                      label=None if i else method)
    axes.axhline(0, color=BLACK, linewidth=0.8)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean cosine between heads\n(1: copies, 0: unrelated)")
    axes.legend(frameon=False)
    return save(figure, folder, "cosines")


# --------------------------------------------------------------------------------------------------------- of heads
def draw_heads(report, matrices, components, tasks, folder):
    """heads.png: heads and tasks by layer, and the samples' features by task; returns the paths."""
    figure, (left, right) = new_figure(4.2, 2)
    at = range(1, len(report["layers"]) + 1)
    for name, label, colour, style in (("head_cosine_start", "heads, at the start", SKY, ":"),
                                       ("head_cosine", "heads, now", BLUE, "-"),
                                       ("task_cosine", "tasks' mean features, now", ORANGE, "--")):
        if report["layers"][0][name] is not None:
            left.plot(at, [layer[name] for layer in report["layers"]], style, color=colour, label=label)
    left.axhline(0, color=BLACK, linewidth=0.8)
    left.set_xlabel("adapted layer, from the first to the last")
    left.set_ylabel("mean cosine over pairs")
    points, owner, shares = components
    for i, name in enumerate(tasks):
        right.plot(*points[owner == i].T.tolist(), MARKS[i % len(MARKS)], markersize=3.5, label=name,
                   color=COLOURS[i % len(COLOURS)], fillstyle="full" if i < len(COLOURS) else "none")
    right.set_xlabel(f"first component of A x ({100 * shares[0]:.0f} % of the variance)")
    right.set_ylabel(f"second component ({100 * shares[1]:.0f} %)")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16),
                    ncols=1 if axes is left else 2)
    written = save(figure, folder, "heads")
    return written + draw_matrix(matrices, folder)


def draw_matrix(matrices, folder):
    """head_cosines.png: the figure of R-LoRA's paper, the cosine of every pair of heads, mean of the layers."""
    if not matrices:
        return []
    mean = sum(matrices.values()) / len(matrices)
    figure, axes = new_figure(4.0)
    image = axes.imshow(mean.tolist(), cmap="cividis", vmin=min(0.0, mean.min().item()), vmax=1)
    for i, row in enumerate(mean.tolist()):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9,
                      color=BLACK if value > 0.5 else "white")
    ticks = range(len(mean)), range(1, len(mean) + 1)
    axes.set_xticks(*ticks)
    axes.set_yticks(*ticks)
    axes.set_xlabel("head")
    axes.set_ylabel("head")
    figure.colorbar(image, label="cosine, mean of the layers")
    return save(figure, folder, "head_cosines")
