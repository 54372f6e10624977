"""From the runs of a comparison to its verdicts, and from results.json to a table in Markdown."""

from statistics import mean, stdev

from .claims import UNITS, Group, joint_verdict, t_interval, verdict


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
    """The tables of table.md: verdicts, then every group of runs with its conditions, from results.json alone."""
    conditions = results["conditions"]
    lines = [f"{len(conditions['seeds'])} seeds, {conditions['steps']} steps of {conditions['batch_size']} samples, "
             f"model {conditions['model']}; {len(results['runs'])} runs, {results['seconds'] / 3600:.1f} hours in all.",
             "", "| claim | verdict |", "|---|---|"]
    lines += [f"| {claim['claim']}. {claim['text']} | **{claim['verdict']}** |" for claim in results["claims"]]
    lines += ["", "| claim | comparison | claimed | mean difference [95 % interval] | unit | verdict |",
              "|---|---|---|---|---|---|"]
    for claim in results["claims"]:
        for row in claim["comparisons"]:
            low, high = row["interval"]
            name = f"**{row['name']}**" if row["decides"] else row["name"]
            limit = f"{-row['claimed'] * row['margin'] or 0:g}"
            lines.append(f"| {claim['claim']} | {name} | {'>' if row['claimed'] > 0 else '<'} {limit} | "
                         f"{row['mean']:+.2f} [{low:+.2f}, {high:+.2f}] | {row['unit']} | {row['verdict']} |")
    lines += ["", "Comparisons in bold decide the claim. Accuracy is on test samples, the mean of the tasks.", ""]
    groups = {}
    for row in results["runs"]:
        if not row["search"] and row["where"] != "cost":
            groups.setdefault((row["method"], row["where"], row["samples"]), []).append(row)
    if not groups:
        return "\n".join(lines)
    lines += ["| method | trained on | samples per task | samples seen | rank | heads | parameters | learning rate "
              "| accuracy, mean ± sd over seeds | seconds a run |", "|---|---|---|---|---|---|---|---|---|---|"]
    edges = {(rate["method"], rate["where"], rate["lr"]) for rate in results["rates"] if rate["at_the_edge"]}
    for (method, where, samples), rows in groups.items():
        first, values = rows[0], [100 * row["average_after"] for row in rows]
        heads = first["heads"] if any(kind in method for kind in ("hydra", "rlora", "mlora")) else "-"
        edge = "*" if (method, where, first["lr"]) in edges else ""
        lines.append(f"| {method} | {where} | {samples} | {first['samples_seen']:,} | {first['rank']} | {heads} "
                     f"| {first['trainable_parameters']:,} | {first['lr']:g}{edge} | {mean(values):.1f} ± "
                     f"{stdev(values):.1f} | {mean(row['seconds'] for row in rows):.0f} |")
    lines += ["", "Learning rates were chosen for each method on validation samples, with a seed of their own; * marks "
              "the smallest or largest of those tried. Parameters are those that train."]
    return "\n".join(lines) + "\n"
