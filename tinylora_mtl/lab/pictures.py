"""The pictures of `compare` and `heads`, PNG and SVG, drawn from their numbers alone. Needs matplotlib, in [plots].

    python -m tinylora_mtl.lab.pictures FOLDER [RUN ...]      those of the walkthrough; RUN: runs of --method meta

Made for 800 pixels, the width of a README column. Colours are Okabe and Ito's, which the colour-blind can tell apart;
no meaning hangs on colour alone.
"""

import itertools
import json
import sys
from contextlib import contextmanager
from pathlib import Path

from ..run.cli import run_command
from ..run.files import make_folder
from .claims import STARTS, t_interval

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
def picture(folder, name, height, columns=1, rows=1, **options):
    """Yields (figure, axes) of 8 inches by `height` to draw on, without a display; NAME.png and NAME.svg come of it."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False,
                                "axes.spines.right": False, "svg.hashsalt": "tinylora_mtl"})  # always the same file
    figure = Figure(figsize=(8, height), layout="constrained")
    yield figure, figure.subplots(rows, columns, **options)
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
        far = max(abs(end) for _, row in rows for end in row["interval"]) > 10
        if far:  # or the small ones could not be seen
            ticks = [-20, -10, -5, -2, 0, 2, 5, 10, 20]
            axes.set_xscale("symlog", linthresh=5)
            axes.set_xticks(ticks, ticks)
            axes.minorticks_off()
        names = [f"{number}  {row['name'].removeprefix('accuracy: ')}" for number, row in rows]
        axes.set_yticks(range(len(rows)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("difference in accuracy (points)\nmean and 95 % interval over seeds"
                        + "\nlogarithmic beyond 5 points" * far)
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
    """Claims 1 and 9: how alike the heads are during training, the mean of the layers, a line for each seed."""
    panels = {"with a router": {"hydralora": "HydraLoRA, zero"}, "without a router": {}}
    for start, (routed, without) in STARTS.items():
        panels["with a router"][routed] = f"R-LoRA, {start}"
        panels["without a router"][without] = f"M-LoRA, {start}"
    drawn = {title: {method: label for method, label in labels.items() if any(run["method"] == method for run in runs)}
             for title, labels in panels.items()}
    drawn = {title: labels for title, labels in drawn.items() if labels}
    with picture(folder, "cosines", 4.0, len(drawn), sharey=True, squeeze=False) as (_, (row,)):
        for axes, (title, labels) in zip(row, drawn.items()):
            for run in (run for run in runs if run["method"] in labels):
                label = labels[run["method"]]
                number = list(STARTS).index(label.split(", ")[1])  # the colour tells the start
                points = [(step, value) for step, value in run["cosine_curve"] if value is not None]
                axes.plot(*zip(*points), color=COLOURS[number], marker=MARKS[number], markersize=3.5,
                          linestyle="--" if run["method"] == "hydralora" else "-",
                          label=label if run["seed"] == min(run["seed"] for run in runs) else None)
            axes.axhline(0, color=BLACK, linewidth=0.8)
            axes.set(xlabel="optimiser step", title=title)
            axes.legend(frameon=False, fontsize=8)
        row[0].set_ylabel("mean cosine between heads\n(1: copies, 0: unrelated)")


def by_kind(layers):
    """{"q_proj": its rows of heads.json, from the first block to the last, …}."""
    kinds = {}
    for layer in layers:
        kinds.setdefault(layer["layer"].rsplit(".", 1)[-1], []).append(layer)
    return kinds


def draw_heads(findings, matrices, components, folder):
    """heads: heads (or tasks) by kind of layer, and the samples' features by task at the start and now.

    head_cosines: the figure of R-LoRA's paper, from matrices, the cosines of all pairs of heads, [N, N] for each layer.
    components: what `principal_components` gives, at the start and now. Returns the paths of the files.
    """
    if matplotlib_is_missing():
        return []
    name = "head_cosine" if matrices else "task_cosine"
    with picture(folder, "heads", 4.2, 3) as (_, (left, *panels)):
        for number, (kind, layers) in enumerate(by_kind(findings["layers"]).items()):
            values = [layer[name] for layer in layers]
            if None not in values:
                left.plot(range(1, len(values) + 1), values, MARKS[number % len(MARKS)] + "-", markersize=3.5,
                          color=COLOURS[number % len(COLOURS)], label=" " + kind)
        left.axhline(0, color=BLACK, linewidth=0.8)
        left.set(xlabel="block, from the first to the last", title="cosine between " + (
            "heads, now" if matrices else "tasks, now"))
        for axes, (points, owner, shares), when in zip(panels, components, ("at the start", "now")):
            for i, task in enumerate(findings["distances"]):
                axes.plot(*points[owner == i].T.tolist(), MARKS[i % len(MARKS)], markersize=3.5,
                          label=" " + task.replace("$", r"\$"),  # no formula, and no name that begins with _
                          color=COLOURS[i % len(COLOURS)], fillstyle="full" if i < len(COLOURS) else "none")
            axes.set(title=f"A x, {when}", xlabel=f"1st component ({100 * shares[0]:.0f} %)",
                     ylabel=f"2nd component ({100 * shares[1]:.0f} %)")
        for axes in (left, panels[1]):
            axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16),
                        ncols=3 if axes is left else 1)
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


def draw_methods(folder):
    """A diagram of the four methods; grey and hatched is frozen."""
    with picture(folder, "methods", 6.6, 2, rows=2) as (_, panels):
        for axes, title in zip(panels.flat, ("LoRA\na branch of rank r beside a frozen layer",
                                             "HydraLoRA, R-LoRA\nheads on one A, weighed by a router",
                                             "Align-LoRA\na loss draws the tasks' features together",
                                             "MeTA-LoRA\nadapt to each task, then move what they share")):
            axes.set(xlim=(0, 10), ylim=(0, 10), title=title)
            axes.axis("off")
        lora, hydra, align, meta = panels.flat

        def box(axes, x, y, text, colour, width=1.7, frozen=False):
            axes.text(x, y, text, ha="center", va="center", fontsize=9, color=BLACK if frozen else "white",
                      bbox={"boxstyle": f"square,pad={width / 4}", "facecolor": "#eeeeee" if frozen else colour,
                            "edgecolor": "#999999" if frozen else BLACK, "hatch": "//" if frozen else None})

        def arrow(axes, start, end, text="", colour=BLACK, style="-", at=(0.1, 0.1)):
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linestyle": style,
                                                      "shrinkA": 11, "shrinkB": 11})
            axes.text((start[0] + end[0]) / 2 + at[0], (start[1] + end[1]) / 2 + at[1], text, fontsize=9, color=colour)

        def frozen_layer(axes, x, W, y):
            for place, text in ((x, "x"), (y, "y")):
                axes.text(*place, text, ha="center", va="center", fontsize=11, style="italic")
            box(axes, *W, "W", BLACK, frozen=True)
            arrow(axes, x, W)
            arrow(axes, W, y)

        for axes in (lora, align):  # y = W x + s · B A x
            frozen_layer(axes, (1.2, 5), (5, 8), (8.8, 5))
            box(axes, 3.6, 2.6, "A", BLUE)
            box(axes, 6.4, 2.6, "B", ORANGE)
            arrow(axes, (1.2, 5), (3.6, 2.6))
            arrow(axes, (3.6, 2.6), (6.4, 2.6), "z")
            arrow(axes, (6.4, 2.6), (8.8, 5), "· s", at=(0.2, -0.5))
        lora.text(5, 0.6, "y = W x + b + s · B A x,  B = 0 at first", ha="center", fontsize=9)

        frozen_layer(hydra, (0.8, 5), (5, 9), (9.4, 5))
        box(hydra, 2.8, 4.4, "A", BLUE)
        arrow(hydra, (0.8, 5), (2.8, 4.4))
        for i, y in enumerate((6.6, 4.4, 2.2)):
            box(hydra, 6.2, y, f"B$_{i + 1}$", (ORANGE, RED, PURPLE)[i])
            arrow(hydra, (2.8, 4.4), (6.2, y))
            arrow(hydra, (6.2, y), (9.4, 5))
            hydra.text(6.8, y + (-0.9, -0.6, -0.4)[i], f"· w$_{i + 1}$", fontsize=9, color=GREEN)
        box(hydra, 2.6, 0.9, "router", GREEN, width=1.4)
        arrow(hydra, (0.8, 5), (2.6, 0.9))
        hydra.text(4.1, 0.7, "w = softmax(W$_r$ x), one weight a head", fontsize=9, color=GREEN)

        for x, y, colour, mark in ((4.1, 0.9, PURPLE, "o"), (6.1, 0.9, GREEN, "s")):  # two tasks' clouds of z
            for dx, dy in ((-0.3, 0.1), (0.1, 0.35), (0.3, -0.1), (-0.05, -0.3), (0.05, 0.0)):
                align.plot(x + dx, y + dy, mark, color=colour, markersize=4)
        align.annotate("", (5.6, 0.9), (4.6, 0.9), arrowprops={"arrowstyle": "-|>,head_width=0.2", "color": BLACK})
        align.annotate("", (4.6, 0.9), (5.6, 0.9), arrowprops={"arrowstyle": "-|>,head_width=0.2", "color": BLACK})
        align.text(3.6, 0.9, "z of task 1", ha="right", va="center", fontsize=9, color=PURPLE)
        align.text(6.8, 0.9, "z of task 2", va="center", fontsize=9, color=GREEN)

        theta = (5, 4.6)
        meta.plot(*theta, "o", color=BLUE, markersize=11)
        meta.text(theta[0] + 0.4, theta[1] - 0.9, "θ, shared", fontsize=9, color=BLUE)
        for place, colour, i in (((1.4, 6.8), ORANGE, 1), ((4.2, 8.8), RED, 2), ((8.6, 7.2), PURPLE, 3)):
            meta.plot(*place, "s", color=colour, markersize=8)
            arrow(meta, theta, place, colour=colour, style="--")
            meta.text(place[0], place[1] + 0.6, f"θ$_{i}$", ha="center", fontsize=10, color=colour)
        arrow(meta, theta, (4.3, 1.6), "θ ← θ - β · mean of ∇L(Q$_i$; θ$_i$)", BLUE, at=(-4.2, -2.6))
        meta.text(7.3, 4.9, "k steps on its\nsupport set S$_i$", fontsize=9)


def draw_support(runs, folder):
    """Runs of MeTA-LoRA: the loss on the support sets before the first and before the last inner step of each round."""
    with picture(folder, "support", 3.0, len(runs), sharey=True, squeeze=False) as (_, (row,)):
        for axes, run in zip(row, runs):
            config = json.loads((run / "config.json").read_text(encoding="utf-8"))
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            for name, label, colour, style in (
                    ("support_loss_before", "support, before the first inner step", BLUE, "-"),
                    ("support_loss_last", "support, before the last", ORANGE, "--"),
                    ("loss", "query, after the last", GREEN, ":")):
                axes.plot([line["step"] for line in lines], [line[name] for line in lines], style, color=colour,
                          marker="o", markersize=3.5, label=label)
            axes.set(xlabel="round", title=f"inner rate {config['inner_lr']:g}")
        row[0].set_ylabel("loss")
        row[0].legend(frameon=False, fontsize=8)


def main(argv=None):
    """Draw the pictures of the walkthrough into a folder."""
    folder, *runs = map(Path, sys.argv[1:] if argv is None else argv)
    if matplotlib_is_missing():
        return
    make_folder(folder)
    draw_methods(folder)
    if runs:
        draw_support(runs, folder)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("a folder is to be named: python -m tinylora_mtl.lab.pictures FOLDER [RUN ...]")
    run_command(main)
