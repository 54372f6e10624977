"""From the runs of a comparison to its verdicts, and from results.json to Markdown.

python -m tinylora_mtl.lab.report README.md writes the published results (assets/results) into a document: whatever stands
between <!-- mini: verdicts --> and <!-- end --> is made anew, so that no number there was ever typed; with
<!-- mini+smollm2: verdicts --> both files stand side by side. And between <!-- source: lora.LoRALinear.forward --> and
<!-- end --> stand the lines of that function, without its docstring.
"""

import ast
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path
from statistics import mean, stdev

from .claims import UNITS, Group, few_of, joint_verdict, t_interval, verdict
from ..run.cli import Parser, run_command
from ..run.files import read_json, write_file

PUBLISHED = Path(__file__).parents[1] / "assets" / "results"


def best_rate(tried):
    """The learning rate of the best accuracy in {rate: validation accuracy}; of equals the lowest."""
    return max(sorted(tried), key=tried.get)


def judge(plan, rows):
    """What results.json holds, from the rows of all runs."""
    cells = {}  # {(method, where, samples): {seed: row}}
    for row in rows:
        if not row["search"]:
            cells.setdefault((row["method"], row["where"], row.get("samples")), {})[row["seed"]] = row

    def values(side, quantity):
        if not isinstance(side, Group):
            return [side] * plan.seeds
        found = cells[side.method, side.where, None if side.where == "cost" else side.samples or plan.sizes[-1]]
        key = {"accuracy": "average_after", "adapted": "average_after_adapting"}.get(quantity, quantity)
        return [found[seed][key] * (100 if UNITS[quantity] == "points" else 1) for seed in range(plan.seeds)]

    claims, rates = [], []
    for claim in plan.claims:
        judged = []
        for c in claim.comparisons:
            differences = [left - right for left, right in
                           zip(values(c.left, c.quantity), values(c.right, c.right_quantity or c.quantity))]
            middle, interval = t_interval(differences)
            judged.append({"name": str(c), "quantity": c.quantity, "unit": UNITS[c.quantity], "claimed": c.claimed,
                           "margin": c.margin, "decides": c.decides, "differences": differences, "mean": middle,
                           "interval": interval, "verdict": verdict(interval, c.claimed, c.margin)})
        claims.append({"claim": claim.number, "text": claim.text, "comparisons": judged, "verdict": joint_verdict(
            [row["verdict"] for row in judged if row["decides"]])})
    for key in dict.fromkeys((row["method"], row["where"], row["samples"]) for row in rows if row["search"]):
        tried = {row["lr"]: row["average_after"] for row in rows
                 if row["search"] and (row["method"], row["where"], row["samples"]) == key}
        lr = best_rate(tried)
        rates.append(dict(zip(("method", "where", "samples"), key)) | {
            "lr": lr, "tried": {f"{rate:g}": value for rate, value in tried.items()},
            "at_the_edge": len(tried) > 2 and lr in (min(tried), max(tried))})
    return {"claims": claims, "rates": rates, "conditions": plan.conditions(), "runs": rows, "command": plan.command,
            "seconds": round(sum(row["seconds"] for row in rows), 1)}


def markdown(results):
    """What table.md holds, from results.json alone."""
    return "\n\n".join(piece(results, name) for name in ("conditions", "verdicts", "comparisons", "runs")) + "\n"


def summary(results):
    """The verdicts for a terminal of 80 columns."""
    lines = textwrap.wrap(conditions(results), 80)
    for claim in results["claims"]:
        lines += ["", *textwrap.wrap(f"{claim['claim']}. {claim['text']}", 80), f"   {claim['verdict'].upper()}"]
        for row in (row for row in claim["comparisons"] if row["decides"]):
            name = row["name"]
            if len(name) > 44:  # too long for one line with its numbers
                lines.append(f"   {name}")
                name = ""
            lines.append(f"   {name:44} {difference(row)} {row['unit']}")
    return "\n".join(lines)


def piece(results, name):
    """A piece of a document: one of TABLES, or "2: accuracy: rlora - hydralora", the difference that claim 2 found.

    ValueError for a name that is none.
    """
    if name in TABLES:
        return TABLES[name](results)
    for claim in results["claims"]:
        for row in claim["comparisons"]:
            if name == f"{claim['claim']}: {row['name']}":
                return difference(row)
    raise ValueError(f"the results have no {name!r}")


def difference(row):
    """The mean difference of a comparison and its interval."""
    low, high = row["interval"]
    return f"{row['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"


def conditions(results):
    """What all runs have in common, in a sentence."""
    shared = results["conditions"]

    def trained(where):
        names = [Path(task).stem for task in shared[where]]
        return f"{shared['batch_size'] // len(names) * len(names)} samples", ", ".join(names)  # of each task as many
    samples, names = trained("tasks")
    if any(run["where"] == "languages" for run in results["runs"]):
        names += " (claim 8: {} on {})".format(*trained("languages"))
    return textwrap.fill(
        f"{len(shared['seeds'])} seeds, {shared['steps']} steps of {samples}, model {Path(shared['model']).name} on "
        f"{names}; {len(results['runs'])} runs, {results['seconds'] / 3600:.1f} hours in all.", 120)


def verdicts(*compared):
    """A row for each claim, a column for each of the results; "-" for a claim that one of them did not compare."""
    texts = {claim["claim"]: claim["text"] for results in compared for claim in results["claims"]}
    if any(texts[claim["claim"]] != claim["text"] for results in compared for claim in results["claims"]):
        raise ValueError("the results are on other claims, for example on another number of samples")
    columns = [{claim["claim"]: f"**{claim['verdict']}**" for claim in results["claims"]} for results in compared]
    names = [Path(results["conditions"]["model"]).name for results in compared]
    return "\n".join([f"| claim | {' | '.join(names)} |", f"|---|{'---|' * len(names)}", *[
        f"| {number}. {texts[number]} | {' | '.join(column.get(number, '-') for column in columns)} |"
        for number in sorted(texts)]])


def comparisons(results):
    """A row for each comparison."""
    lines = ["| claim | comparison | claimed | mean difference [95 % interval] | unit | verdict |",
             "|---|---|---|---|---|---|"]
    for claim in results["claims"]:
        for row in claim["comparisons"]:
            name = f"**{row['name']}**" if row["decides"] else row["name"]
            limit = f"{-row['claimed'] * row['margin'] or 0:g}"
            lines.append(f"| {claim['claim']} | {name} | {'>' if row['claimed'] > 0 else '<'} {limit} | "
                         f"{difference(row)} | {row['unit']} | {row['verdict']} |")
    return "\n".join([*lines, "", "Comparisons in bold decide the claim. Accuracy is on test samples, the mean of the "
                                  "tasks; unseen: of the tasks that were not trained on."])


def runs(results):
    """A row for each group of runs, with the conditions that differ."""
    groups = {}
    for row in results["runs"]:
        if not row["search"] and row["where"] != "cost":
            groups.setdefault((row["method"], row["where"], row["samples"]), []).append(row)
    lines = ["| method | trained on | samples per task | samples seen | rank | heads | parameters | learning rate "
             "| accuracy, mean ± sd over seeds | seconds a run |", "|---|---|---|---|---|---|---|---|---|---|"]
    edges = {(rate["method"], rate["where"], rate["lr"]) for rate in results["rates"] if rate["at_the_edge"]}
    for (method, where, samples), rows in groups.items():
        first, values = rows[0], [100 * row["average_after"] for row in rows]
        heads = first["heads"] if any(kind in method for kind in ("hydra", "rlora", "mlora")) else "-"
        skipped = sum(row["skipped_steps"] for row in rows)
        skipped = f" ({skipped} steps skipped)" if skipped else ""
        edge = "*" if (method, where, first["lr"]) in edges else ""
        lines.append(f"| {method} | {where} | {samples} | {first['samples_seen']:,} | {first['rank']} | {heads} "
                     f"| {first['trainable_parameters']:,} | {first['lr']:g}{edge} | {mean(values):.1f} ± "
                     f"{stdev(values):.1f}{skipped} | {mean(row['seconds'] for row in rows):.0f} |")
    return "\n".join([*lines, "", "Learning rates were chosen for each method on validation samples, with a seed of "
                                  "their own; * marks the smallest or largest of those tried. Runs with fewer samples "
                                  "than all, and all runs of meta, have the rate that was found with "
                                  f"{few_of(results['conditions']['sizes'])} samples. Parameters are those that train."])


TABLES = {"conditions": conditions, "verdicts": verdicts, "comparisons": comparisons, "runs": runs}


def source(name):
    """The lines of a function of this package, "module.function" or "module.Class.method", without its docstring."""
    part = pkgutil.resolve_name(f"tinylora_mtl.{name}")
    text = textwrap.dedent(inspect.getsource(part))
    first = ast.parse(text).body[0].body[0]
    lines = text.splitlines()
    return "\n".join(lines[:first.lineno - 1] + lines[first.end_lineno:])


def filled(text):
    """A document with every piece between <!-- FILE: NAME --> and <!-- end --> made anew, from a file or source."""
    def fill(found):
        if found[2] == "source":
            return f"{found[1]}\n```python\n{source(found[3])}\n```\n<!-- end -->"
        results = [read_json(PUBLISHED / f"{name}.json") for name in found[2].split("+")]
        made = piece(results[0], found[3]) if len(results) == 1 else TABLES[found[3]](*results)
        return found[1] + (f"\n{made}\n" if found[3] in TABLES else made) + "<!-- end -->"
    return re.sub(r"(<!-- ([\w+]+): (.+?) -->).*?<!-- end -->", fill, text, flags=re.DOTALL)


def main(argv=None):
    """Fill documents in place."""
    parser = Parser("lab.report", __doc__)
    parser.add_argument("documents", nargs="+", type=Path, help="Markdown files, for example README.md walkthrough.md")
    for document in parser.parse_args(argv).documents:
        write_file(document, filled(document.read_text(encoding="utf-8")).encode())


if __name__ == "__main__":
    run_command(main)
