"""From the runs of a comparison to its verdicts, and from results.json to Markdown."""

import textwrap
from collections import Counter
from pathlib import Path
from statistics import mean, median, stdev

from .claims import POINT, STARTS, UNITS, Group, best_rates, few_of, joint_verdict, t_interval, verdict, word
from .cost import STEPS

PUBLISHED = Path(__file__).parents[1] / "assets" / "results"


def judge_claims(plan, rows):
    """What results.json holds, from the rows of all runs."""
    tested, searched, rates = {}, {}, []
    for row in rows:
        group = row["method"], row["where"], row.get("samples")
        if row["search"]:
            tried = tuple(row[name] for name in ("lr", "inner_lr") if name in row)
            searched.setdefault(group, {}).setdefault(tried, []).append(row["average_after"])
        else:
            tested[(*group, row["seed"])] = row

    def values(side, quantity):  # of each seed
        if not isinstance(side, Group):
            return [side] * len(plan.seeds)
        samples = None if side.where == "cost" else side.samples or plan.sample_counts[-1]
        key = {"accuracy": "average_after", "adapted": "average_after_adapting"}.get(quantity, quantity)
        return [tested[side.method, side.where, samples, seed][key] * (100 if UNITS[quantity] == "points" else 1)
                for seed in plan.seeds]

    def judged(comparison):
        differences = [left - right for left, right in zip(*(values(*side) for side in comparison.both()))]
        middle, interval = t_interval(differences)
        return {"name": str(comparison), "quantity": comparison.quantity, "unit": UNITS[comparison.quantity],
                "claimed": comparison.claimed, "margin": comparison.margin, "decides": comparison.decides,
                "differences": differences, "mean": middle, "interval": interval,
                "verdict": verdict(interval, comparison.claimed, comparison.margin, UNITS[comparison.quantity])
                } | ({"word": word(interval)} if UNITS[comparison.quantity] == "points" else {})

    claims = [{"claim": claim.number, "text": claim.text, "comparisons": [judged(c) for c in claim.comparisons]}
              for claim in plan.claims]
    for claim in claims:
        claim["verdict"] = joint_verdict([row["verdict"] for row in claim["comparisons"] if row["decides"]])
    for (method, where, samples), tried in searched.items():
        seeds, lrs = max(map(len, tried.values())), {lr for lr, *_ in tried}
        best = best_rates({each: mean(found) for each, found in tried.items() if len(found) == seeds})
        rates.append({"method": method, "where": where, "samples": samples, **dict(zip(("lr", "inner_lr"), best)),
                      "tried": {" ".join(f"{rate:g}" for rate in each): found for each, found in tried.items()},
                      "at_the_edge": len(lrs) > 2 and best[0] in (min(lrs), max(lrs))})
    return {"claims": claims, "rates": rates, "conditions": plan.conditions(), "runs": rows, "command": plan.command,
            "seconds": round(sum(row["seconds"] for row in rows), 1)}


def summary(results):
    """The verdicts for a terminal of 80 columns."""
    lines = textwrap.wrap(conditions_text(results), 80)
    for claim in results["claims"]:
        lines += ["", *textwrap.wrap(f"{claim['claim']}. {claim['text']}", 80), f"   {claim['verdict'].upper()}"]
        for row in (row for row in claim["comparisons"] if row["decides"]):
            name = row["name"]
            if len(name) > 44:  # too long for one line with its numbers
                lines.append(f"   {name}")
                name = ""
            lines.append(f"   {name:44} {difference(row)} {row['unit']}")
    if rows := method_rows(results):
        lines += ["", f"{'':20} {'accuracy [95 %]':20} {'time':>6} {'memory':>6}  can be merged"]
        lines += [f"{name[:20]:20} {accuracy:20} {time:>6} {memory:>6}  {merges}"
                  for name, accuracy, time, memory, merges, *_ in rows]
    return "\n".join(lines)


def difference(row):
    """The mean difference of a comparison and its interval."""
    low, high = row["interval"]
    return f"{row['mean']:+.2f} [{low:+.2f}, {high:+.2f}]"


def markdown_table(head, rows):
    """A table in Markdown, from lists of cells."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def conditions_text(results):
    """What all runs have in common, in a sentence."""
    shared = results["conditions"]

    def trained(where):
        names = [Path(task).name.removesuffix(".jsonl") for task in shared[where]]
        return f"{shared['batch_size'] // len(names) * len(names)} samples", ", ".join(names)  # of each task as many
    samples, names = trained("tasks")
    if any(run["where"] == "languages" for run in results["runs"]):
        names += " (claim 8: {} on {})".format(*trained("languages"))
    return textwrap.fill(
        f"{len(shared['seeds'])} seeds, {shared['steps']} steps of {samples}, model {Path(shared['model']).name} on "
        f"{names}; {len(results['runs'])} runs, {results['seconds'] / 3600:.1f} hours in all.", 120)


def version_of(results):
    """The version of this package that the runs are of; 0.1 did not note it."""
    return results["conditions"].get("version", "0.1")


def verdict_table(*compared):
    """A row for each claim, a column for each model; of its results the first that have the claim, "-" if none have.

    What is of another version than the first says so. A claim with another text is another claim.
    """
    texts = {claim["claim"]: claim["text"] for results in reversed(compared) for claim in results["claims"]}
    columns = {}  # {model: its results}
    for results in compared:
        columns.setdefault(Path(results["conditions"]["model"]).name, []).append(results)

    def cell(column, number):
        for results in column:
            old = f" ({version_of(results)})" if version_of(results) != version_of(compared[0]) else ""
            for claim in results["claims"]:
                if (claim["claim"], claim["text"]) == (number, texts[number]):
                    return f"**{claim['verdict']}**{old}"
        return "-"

    return markdown_table(["claim", *columns], [
        [f"{number}. {text}", *(cell(column, number) for column in columns.values())]
        for number, text in sorted(texts.items())])


def start_table(*compared):
    """Claim 9: how alike the heads are at the end, and the accuracy, a row for each start; means over seeds ± 95 %."""
    def cell(results, method):
        runs = [run for run in results["runs"] if run["method"] == method and not run["search"] and "cosine" in run]
        middle, (low, _) = t_interval([run["cosine"] for run in runs])
        right, (least, _) = t_interval([100 * run["average_after"] for run in runs])
        return f"{middle:.2f} ± {middle - low:.2f} ({right:.1f} ± {right - least:.1f} %)"

    names = [Path(results["conditions"]["model"]).name for results in compared]
    head = ["start of the heads", *(f"{name}: {which}" for name in names for which in ("with a router", "without"))]
    return markdown_table(head, [[start, *(cell(results, method) for results in compared for method in pair)]
                                 for start, pair in STARTS.items()])


def comparison_table(results):
    """A row for each comparison; results of version 0.1 have no words."""
    compared = [(claim["claim"], row) for claim in results["claims"] for row in claim["comparisons"]]
    worded = any("word" in row for _, row in compared)
    rows = [[number, f"**{row['name']}**" if row["decides"] else row["name"],
             f"{'>' if row['claimed'] > 0 else '<'} {-row['claimed'] * row['margin'] or 0:g}", difference(row),
             row["unit"], *([row.get("word", "-")] if worded else []), row["verdict"]] for number, row in compared]
    head = ["claim", "comparison", "claimed", "mean difference [95 % interval]", "unit",
            *(["in a word"] if worded else []), "verdict"]
    notes = (" Bits: the mean of -log2 p(right answer), so less is better. No different: within "
             f"{POINT:g} point.") if worded else ""
    return (f"{markdown_table(head, rows)}\n\nComparisons in bold decide the claim. Accuracy is on test samples, the "
            f"mean of the tasks; unseen: of the tasks that were not trained on.{notes}")


def run_table(results):
    """A row for each group of runs, with the conditions that differ."""
    groups, rows = {}, []
    for row in results["runs"]:
        if not row["search"] and row["where"] != "cost":
            groups.setdefault((row["method"], row["where"], row["samples"]), []).append(row)
    for (method, where, samples), runs in groups.items():
        first, accuracies = runs[0], [100 * run["average_after"] for run in runs]
        heads = first["heads"] if any(kind in method for kind in ("hydra", "rlora", "mlora")) else "-"
        skipped = sum(run["skipped_steps"] for run in runs)
        rows.append([
            method, where, samples, f"{first['samples_seen']:,}", first["rank"], heads,
            f"{first['trainable_parameters']:,}", searched_rate(results, first) + (
                f", inner {first['inner_lr']:g}" if "inner_lr" in first else ""),
            f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}" + (f" ({skipped} steps skipped)" if skipped else ""),
            f"{median(run['seconds'] for run in runs):.0f}"])
    head = ["method", "trained on", "samples per task", "samples seen", "rank", "heads", "parameters", "learning rate",
            "accuracy, mean ± sd over seeds", "seconds a run, median"]
    return (f"{markdown_table(head, rows)}\n\nLearning rates were chosen for each method on validation samples, with "
            "seeds of their own; * marks the smallest or largest of more than two. Runs with fewer samples than all, "
            f"and all runs of meta, have the rate that was found with {few_of(results['conditions']['sizes'])} "
            "samples. Parameters are those that train.")


def searched_rate(results, run):
    """The learning rate of a run, with * if it is the smallest or largest of more than two that were tried."""
    edges = {(rate["method"], rate["lr"]) for rate in results["rates"] if rate["at_the_edge"]}
    return f"{run['lr']:g}{'*' * ((run['method'], run['lr']) in edges)}"


def task_table(results):
    """A row for each group of runs with all samples, a column for each task: mean ± standard deviation over seeds."""
    tables = []
    for where in ("tasks", "languages"):
        names, rows = [Path(task).name.removesuffix(".jsonl") for task in results["conditions"][where]], {}
        for run in results["runs"]:
            if (run["search"], run["where"], run["samples"] if "samples" in run else 0) == (
                    False, where, results["conditions"]["sizes"][-1]):
                rows.setdefault(run["method"], []).append(run["after"])
        if rows:
            tables.append(markdown_table(["method", *names], [
                [method, *(f"{100 * mean(after[name] for after in runs):.1f} ± "
                           f"{100 * stdev(after[name] for after in runs):.1f}" for name in names)]
                for method, runs in rows.items()]))
    return "\n\n".join(tables) + "\n\nAccuracy on test samples by task, mean ± standard deviation over seeds."


def machine_text(results):
    """What the runs were done on, in a sentence."""
    counts = Counter(run.get("on", "a machine that is not named") for run in results["runs"])
    return textwrap.fill("Done on: " + "; ".join(f"{name} ({count} runs)" for name, count in counts.items())
                         + f"; version {version_of(results)} of this package.", 120)


def method_rows(results):
    """Of each of --methods, the most accurate first: its name, what it reaches and what it takes; cells of a table."""
    rows, done = [], [run for run in results["runs"] if not run["search"]]
    for method, merges in results["conditions"].get("methods", {}).items():
        runs = [run for run in done if (run["method"], run["where"]) == (method, "tasks")]
        middle, (low, high) = t_interval([100 * run["average_after"] for run in runs])
        cost = next(run for run in done if (run["method"], run["where"]) == (method, "cost"))
        costs = [f"{1 + cost[name] / 100:.2f}" for name in ("time", "memory")]
        first, accuracy = runs[0], f"{middle:.1f} [{low:.1f}, {high:.1f}]"
        rows.append((middle, [method, accuracy, *costs, merges, searched_rate(results, first), first["rank"],
                              f"{first['trainable_parameters']:,}", first["samples"]]))
    return [cells for _, cells in sorted(rows, key=lambda row: -row[0])]


def method_table(results):
    """The rows of --methods."""
    head = ["method", "accuracy [95 % interval]", "time", "memory", "can be merged", "learning rate", "rank",
            "parameters", "samples per task"]
    return (f"{markdown_table(head, method_rows(results))}\n\nAccuracy on test samples, the mean of the tasks. Time "
            "and peak memory of a training step are multiples of LoRA's, measured side by side (time: medians of "
            f"{STEPS}\nsteps, by turns). For one task: it differs by task, so it must be told which, also to answer. "
            "*: the smallest or largest rate\nthat was tried.")


TABLES = {"conditions": conditions_text, "starts": start_table, "methods": method_table, "verdicts": verdict_table,
          "comparisons": comparison_table, "runs": run_table, "tasks": task_table, "machines": machine_text}


def markdown(results):
    """What table.md holds, from results.json alone."""
    left_out = {"methods"} if not results["conditions"].get("methods") else set()
    if 9 not in {claim["claim"] for claim in results["claims"]}:
        left_out |= {"starts"}
    if not results["claims"]:
        left_out |= {"verdicts", "comparisons"}
    return "\n\n".join(table(results) for name, table in TABLES.items() if name not in left_out) + "\n"
