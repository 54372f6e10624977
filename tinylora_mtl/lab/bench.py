"""How fast is it? python -m tinylora_mtl.lab.bench --model path/to/a/model --out runs/bench.json

Every figure is a ratio: what something costs against the same work done in another way, or against a method that it
adds to (`bench_rows.py` has the list). Times are taken by turns in one process, memory in fresh processes (`cost.py`);
a ratio is the median of the paired ratios, with their quartiles. Let nothing else compute while it runs.
"""

import statistics
import sys
from pathlib import Path

import torch
import transformers

from .bench_rows import ROWS, Place
from ..run.cli import Parser, run_command, whole
from .cost import in_a_process, peak_of, take_turns
from ..run.files import make_folder, write_json
from ..run.models import DTYPES
from ..data.tasks import load_tasks

SHAPES = ((576, 1536), (896, 4864))  # d_in, d_out of the widest layers of SmolLM2-135M and Qwen2.5-0.5B
MEMORY_REPEATS = 5  # at most: each needs two processes


# ------------------------------------------------------------------------------------------------------- measuring
def measure(index, place, repeats):
    """The figures of ROWS[index] at a place, a list of dicts; where something is not installed, they name it."""
    row, figures = ROWS[index], []
    for quantity, target in row.targets.items():
        figure = {"row": row.number, "what": f"{row.what}, {place.name}" if place.shape else row.what,
                  "against": row.against, "quantity": quantity, "target": list(target), "on": place.name}
        try:
            if quantity == "memory":
                peaks = [[in_a_process(peak_of, side, index, place, which, repeats=2) for which in (0, 1)]
                         for _ in range(min(repeats, MEMORY_REPEATS))]
                ours, theirs = map(list, zip(*peaks))
            else:
                ours, theirs = take_turns(row.make(place), repeats)
            figures.append(figure | judge(ours, theirs, quantity, target))
        except ImportError as error:
            figures.append(figure | {"missing": error.name or str(error).strip().split("\n")[0]})
    return figures


def side(index, place, which):
    """One side of ROWS[index]; by its number, for functions within functions cannot be sent to another process."""
    return ROWS[index].make(place)[which]


def judge(ours, theirs, quantity, target):
    """The median and the quartiles of the paired ratios, and whether the median reaches the target (at least, at most).

    ours, theirs: seconds or bytes; "speed" is work in a time, so its ratio is that of the seconds the other way round.
    """
    ratios = [b / a if quantity == "speed" else a / b for a, b in zip(ours, theirs)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    least, most = target
    return {"ratio": ratio, "quartiles": [low, high], "ours": ours, "theirs": theirs,
            "reached": (least is None or ratio >= least) and (most is None or ratio <= most)}


# -------------------------------------------------------------------------------------------------------- reporting
def table(results):
    """The results as a table in Markdown."""
    columns, lines = results["columns"], {}
    for figure in results["figures"]:
        name = (figure["row"], f"{figure['what']}: {figure['quantity']}", figure["against"], bounds(*figure["target"]))
        column = figure["on"] if figure["on"] in columns else columns[-1]  # single layers stand with the real model
        lines.setdefault(name, {})[column] = cell(figure)
    head = ["", "", "against", "target", *columns]
    rows = [[str(part) for part in name] + [cells.get(column, "") for column in columns]
            for name, cells in lines.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["--"] * len(head), *rows])


def bounds(least, most):
    """A target in words."""
    if least is None or most is None:
        return f"at most {most:g}" if least is None else f"at least {least:g}"
    return f"{least:g} to {most:g}"


def cell(figure):
    """A figure in words: ratio, quartiles, and whether the target is reached."""
    if "missing" in figure:
        return f"not measured: needs {figure['missing']}"
    low, high = figure["quartiles"]
    return f"{figure['ratio']:.2f} ({low:.2f}-{high:.2f}){'' if figure['reached'] else ', not reached'}"


# --------------------------------------------------------------------------------------------------------- command
def places_of(args):
    """Where to measure. ValueError for tasks that do not fit into a batch."""
    here = {"device": args.device, "dtype": args.dtype}
    places = [Place("mini", **here)]
    if args.model != "mini":
        places.append(Place(Path(args.model).name, "model", args.model, tuple(args.tasks), batch_size=16, samples=4,
                            **here))
    for place in places:
        if not 2 <= len(load_tasks(place.tasks)) <= place.batch_size:
            raise ValueError(f"--tasks must be from 2 to {place.batch_size} tasks: a batch has samples of each")
    return places + [Place(f"{d_in} → {d_out}", "layers", shape=(d_in, d_out), **here) for d_in, d_out in SHAPES]


def main(argv=None):
    """Measure, print the table; returns the results."""
    parser = Parser("lab.bench", __doc__)
    parser.add_argument("--model", default="mini", help="a folder or Hub name, measured beside mini; rows 2 "
                        "and 11 need one")
    parser.add_argument("--tasks", nargs="+", default=["mini"], help="the tasks of that model (default: mini's)")
    numbers = {row.number: f"{row.number} {row.what.split(',')[0]}" for row in ROWS}
    parser.add_argument("--rows", type=whole(1, max(numbers)), nargs="+", metavar="N", default=list(numbers),
                        help=f"which to measure: {'; '.join(numbers.values())} (default: all)")
    parser.add_argument("--repeats", type=whole(1), default=7, help="turns of each side (default: 7)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of the frozen weights")
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    args = parser.parse_args(argv)

    places, figures = places_of(args), []
    for index, row in enumerate(ROWS):
        for place in places:
            if row.number in args.rows and place.kind in row.where:
                for figure in measure(index, place, args.repeats):
                    print(f"{row.number} {figure['what']}, {figure['quantity']}, {place.name}: {cell(figure)}",
                          file=sys.stderr, flush=True)
                    figures.append(figure)
    results = {"columns": ["mini", places[1].name if args.model != "mini" else "real size"], "repeats": args.repeats,
               "device": args.device, "dtype": args.dtype, "threads": torch.get_num_threads(),
               "torch": torch.__version__, "transformers": transformers.__version__, "figures": figures}
    if args.out:
        make_folder(args.out.parent)
        write_json(args.out, results)
    print(table(results))
    return results


if __name__ == "__main__":
    run_command(main)
