"""The comparison: its statistics, what it declares, and that its runs are done once, resumed, and chosen fairly."""

import functools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch
from conftest import Killed, at_step, command, kill

from tinylora_mtl import add_adapters, meta, remove_adapters, train
from tinylora_mtl.adapters import LAYERS
from tinylora_mtl.config import MINI_LR, TrainConfig, adapter_config
from tinylora_mtl.data.tasks import load_tasks
from tinylora_mtl.lab import compare, cost, heads, pictures, report
from tinylora_mtl.lab import plan as plans
from tinylora_mtl.lab.claims import (COSTS, T_975, UNITS, VARIANTS, Claim, Comparison, Group, best_rates,
                                     declare, few_of, joint_verdict, t_interval, verdict, word)
from tinylora_mtl.lab.plan import INNER_RATES, PRESETS, SAMPLE_COUNTS, SEARCH_SEEDS, Run, make_plan, match
from tinylora_mtl.lab.report import PUBLISHED, conditions_text, judge_claims, markdown, summary
from tinylora_mtl.run import fingerprints, gradients, training
from tinylora_mtl.run.checkpoint import place_of, put_back
from tinylora_mtl.run.folder import locked
from tinylora_mtl.run.methods import TYPED, typed_method
from tinylora_mtl.run.models import load_model
from tinylora_mtl.run.settings import read_config
from tinylora_mtl.train import GRADIENTS

TINY = ("--tasks word_sorting dyck_languages object_counting --seeds 2 --steps 3 --batch-size 6 --samples 8 12 "
        "--rates 1e-3 5e-3 --rank 2 --heads 4 --targets q_proj --device cpu").split()
TWO_TASKS = ("--tasks", "object_counting", "web_of_lies")  # of short answers


def tiny_plan(folder, *flags):
    return make_plan(compare.parse([*TINY, "--out", str(folder), *map(str, flags)]))


def tiniest_plan(folder, *methods):
    """A plan of one comparison, of which two trained groups are judged: four runs for each method."""
    comparison = Comparison(Group(methods[0]), Group(methods[1]) if methods[1:] else 0.0)
    return replace(tiny_plan(folder, *TWO_TASKS), claims=[Claim(1, "It is ahead.", (comparison,))])


def results_without_times(results):
    return json.loads(json.dumps(results), object_hook=lambda item: {
        key: value for key, value in item.items() if key not in ("seconds", "command")})


@functools.cache
def few_samples(name, *args):
    """The task of that name, with two samples to score."""
    task, = load_tasks([name], *args)
    return replace(task, validation=task.validation[:2], test=task.test[:2])


def patch_few(monkeypatch):
    """Two samples of a task to score, wherever tasks are loaded, one seed in the search, and no pictures.

    Returns the names of the trained runs.
    """
    monkeypatch.setattr(plans, "SEARCH_SEEDS", SEARCH_SEEDS[:1])
    for module in (training, compare, heads):
        monkeypatch.setattr(module, "load_tasks", lambda names, *args: [few_samples(name, *args) for name in names])
    monkeypatch.setattr(compare, "draw_comparison", lambda results, folder: None)
    trained = []

    def counted(*args, original=training.run_steps):
        trained.append(str(args[4].name))
        return original(*args)
    monkeypatch.setattr(training, "run_steps", counted)
    return trained


@pytest.fixture
def few(monkeypatch):
    return patch_few(monkeypatch)


WHOLE = (*TWO_TASKS, "--claims", 1, 4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, results) of a comparison of 16 runs, trained once. Whoever changes the folder takes a `copy`."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        trained = patch_few(patch)
        plan = tiny_plan(folder, *WHOLE)
        results = compare.compare(plan)
        assert sorted(trained) == sorted(run.name for run in plan.runs({}))  # each trained, once
    assert len(trained) == 4 * 2 + 4 * 2
    return folder, results


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that comparison's folder, to spoil."""
    return shutil.copytree(whole[0], tmp_path / "copy")


# ------------------------------------------------------------------------------------------------------ statistics
@pytest.mark.parametrize("df", range(1, len(T_975) + 1))
def test_the_quantiles_leave_a_fortieth_on_each_side(df):
    """Student's density, integrated by Simpson's rule between -t and t, is 0.95."""
    constant = math.gamma((df + 1) / 2) / (math.sqrt(df * math.pi) * math.gamma(df / 2))
    count, t = 20_000, T_975[df - 1]
    values = [constant * (1 + (t * (2 * i / count - 1)) ** 2 / df) ** (-(df + 1) / 2) for i in range(count + 1)]
    total = values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2])
    assert total * (2 * t / count) / 3 == pytest.approx(0.95, abs=2e-5)


def test_the_interval_is_that_of_the_textbook():
    """Student's own sleep data (Biometrika 1908): mean 1.58, sd 1.23, t(9) = 2.262: from 0.70 to 2.46."""
    sleep = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    middle, (low, high) = t_interval(sleep)
    assert (round(middle, 2), round(low, 2), round(high, 2)) == (1.58, 0.70, 2.46)
    assert t_interval([2.0, 2.0, 2.0]) == (2.0, [2.0, 2.0])
    assert t_interval([-value for value in sleep])[1] == pytest.approx([-high, -low])


@pytest.mark.parametrize("interval, claimed, margin, expected", [
    ([0.1, 3.0], 1, 0, "holds"), ([-3.0, -0.1], 1, 0, "does not hold"), ([-0.1, 3.0], 1, 0, "cannot tell"),
    ([0.0, 3.0], 1, 0, "cannot tell"), ([0.0, 0.0], 1, 0, "cannot tell"),
    ([0.1, 3.0], -1, 0, "does not hold"), ([-3.0, -0.1], -1, 0, "holds"), ([-3.0, 0.1], -1, 0, "cannot tell"),
    ([-1.9, -0.5], 1, 2, "holds"), ([-2.1, 4.0], 1, 2, "cannot tell"), ([-9.0, -2.1], 1, 2, "does not hold"),
    ([-9.0, -1.9], 1, 2, "cannot tell"), ([0.5, 1.9], -1, 2, "holds"), ([2.1, 9.0], -1, 2, "does not hold")])
def test_the_rule(interval, claimed, margin, expected):
    assert verdict(interval, claimed, margin, "cosine") == expected
    if margin:
        assert verdict(interval, claimed, margin, "points") == expected


@pytest.mark.parametrize("interval, said, of_better, of_worse", [
    ([0.1, 1.2], "better", "holds", "does not hold"), ([-1.2, -0.1], "worse", "does not hold", "holds"),
    ([0.1, 0.9], "better, by less than a point", "does not hold", "does not hold"),
    ([-0.9, -0.1], "worse, by less than a point", "does not hold", "does not hold"),
    ([-0.9, 0.9], "no different", "does not hold", "does not hold"),
    ([0.0, 0.0], "no different", "does not hold", "does not hold"),
    ([0.0, 0.9], "no different", "does not hold", "does not hold"),
    ([-0.1, 1.0], "undecided", "cannot tell", "cannot tell"), ([-1.0, 0.1], "undecided", "cannot tell", "cannot tell"),
    ([0.1, 1.0], "better", "holds", "does not hold")])
def test_the_four_words(interval, said, of_better, of_worse):
    assert word(interval) == said
    assert (verdict(interval), verdict(interval, claimed=-1)) == (of_better, of_worse)


def test_a_claim_needs_all_of_its_comparisons():
    assert joint_verdict(["holds", "holds"]) == "holds"
    assert joint_verdict(["holds", "cannot tell"]) == "cannot tell"
    assert joint_verdict(["holds", "cannot tell", "does not hold"]) == "does not hold"


def test_an_interval_holds_the_true_difference_in_95_of_100_comparisons():
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randn(4000, 5, generator=generator) + 1).tolist()
    inside = sum(low < 1 < high for _, (low, high) in map(t_interval, draws)) / len(draws)
    assert abs(inside - 0.95) < 0.012


# ------------------------------------------------------------------------------------------------- what is declared
def test_ten_claims_each_with_something_that_decides():
    claims = declare(SAMPLE_COUNTS)
    assert [claim.number for claim in claims] == list(range(1, 11))
    for claim in claims:
        assert any(comparison.decides for comparison in claim.comparisons)
        names = [str(comparison) for comparison in claim.comparisons]
        assert len(set(names)) == len(names)
        for comparison in claim.comparisons:
            assert {comparison.quantity, comparison.right_quantity or comparison.quantity} <= set(UNITS)
            for side in (comparison.left, comparison.right):
                if isinstance(side, Group):
                    assert side.method in (COSTS if side.where == "cost" else VARIANTS)
    margins = {(claim.number, c.margin) for claim in claims for c in claim.comparisons if c.decides}
    assert margins == {(1, 0), (2, 0), (3, 0), (4, 0), (5, 2), (6, 0), (7, 2), (8, 2), (9, 0),
                       (10, 0)}
    assert few_of([10, 20, 50, 100, 500]) == 50 and few_of([8, 12]) == 8


def test_the_directions_are_those_that_the_papers_claim():
    """A world in which every paper is right: each quantity is what it would be, and all claims hold."""
    better = ["lora", "hydralora", "rlora", "mlora", "lora_matched", "align_mmd", "align_kl", "meta"]

    def value(side, quantity):
        if not isinstance(side, Group):
            return side
        world = {"time": -8.0, "memory": -20.0, "cosine": {"hydralora": 0.8, "mlora_heads": 0.9}.get(side.method, -0.2),
                 "distance": -1.0 * (side.method in ("align_kl", "align_mmd")), "moved": -0.5}
        return world.get(quantity, 10.0 * better.index(side.method) if side.method in better else 0.0)
    for claim in declare(SAMPLE_COUNTS):
        verdicts = []
        for c in claim.comparisons:
            difference = value(c.left, c.quantity) - value(c.right, c.right_quantity or c.quantity)
            verdicts.append((c.decides, verdict([difference - 0.1, difference + 0.1], c.claimed, c.margin,
                                                UNITS[c.quantity])))
        assert joint_verdict([found for decides, found in verdicts if decides]) == "holds", claim.text


def test_the_ablation_changes_one_thing_at_a_time():
    model, _, _ = load_model("mini", "cpu")
    seen = {}
    for name in ("rlora", "rlora_start", "rlora_dropout", "rlora_neither", "hydralora"):
        adapters = add_adapters(model, adapter_config(TrainConfig(**VARIANTS[name], rank=4)))
        adapter = next(iter(adapters.values()))
        seen[name] = (adapter.scaling, adapter.dropout.p, adapter.head_dropout.p, bool(adapter.heads.any()),
                      bool(adapter.router.weight.any()))
        remove_adapters(model)
    assert seen == {"rlora": (8, 0, 0.1, True, False), "rlora_start": (8, 0, 0, True, False),
                    "rlora_dropout": (8, 0, 0.1, False, True), "rlora_neither": (8, 0, 0, False, True),
                    "hydralora": (4, 0, 0, False, True)}


def test_matched_parameters_are_within_five_percent():
    """Counted against the formula: per layer of HydraLoRA r·d_in + N·r·d_out + N·d_in, of LoRA r·(d_in + d_out)."""
    methods, counts, _ = match(VARIANTS, TrainConfig(rank=4, heads=5), ["a", "b"])
    layers = 5 * [(112, 112)] * 4 + 5 * [(112, 256)] * 2 + 5 * [(256, 112)]
    hydra = sum(4 * d_in + 5 * 4 * d_out + 5 * d_in for d_in, d_out in layers)
    assert counts["hydralora"] == counts["rlora"] == hydra
    rank, number = methods["lora_matched"]["rank"], methods["mlora"]["heads"]
    assert counts["lora_matched"] == sum(rank * (d_in + d_out) for d_in, d_out in layers)
    assert counts["mlora"] == sum(4 * d_in + number * 4 * d_out for d_in, d_out in layers)
    matched = [name for name in VARIANTS if "match" in VARIANTS[name]]
    assert matched == ["lora_matched", "lora_scaled", "mlora", "mlora_mean", "align_kl", "align_mmd", "align_shuffled",
                       "meta"]
    assert all(abs(counts[name] / hydra - 1) <= 0.05 for name in matched)
    for other in (rank - 1, rank + 1):  # no other rank comes nearer
        assert abs(sum(other * sum(layer) for layer in layers) - hydra) >= abs(counts["lora_matched"] - hydra)
    assert "match" not in methods["meta"] and methods["lora"] == {"method": "lora"}
    model, _, _ = load_model("mini", "cpu")
    scalings = {}
    for variant in ("rlora", "lora_scaled", "mlora", "mlora_mean"):
        config = replace(TrainConfig(rank=4, heads=5), **methods[variant])
        scalings[variant] = next(iter(add_adapters(model, adapter_config(config)).values())).scaling
        remove_adapters(model)
    assert scalings == pytest.approx({"rlora": 8, "lora_scaled": 8, "mlora": 8, "mlora_mean": 8 / number})


def test_what_cannot_be_matched_is_refused():
    with pytest.raises(ValueError, match="not within 5% of HydraLoRA's"):
        match(["mlora"], TrainConfig(rank=32, heads=1), ["a"])


def test_settings_of_the_runs(tmp_path):
    plan = tiny_plan(tmp_path, "--claims", 6, 7, 8, "--held-out", "object_counting")
    runs = {run.name: run for run in plan.runs({})}
    assert len(runs) == len(plan.runs({}))
    configs = {name: plan.config(run, run.tried or (1e-3,)) for name, run in runs.items()}
    for name, config in configs.items():
        assert (config.split == "validation") == (config.seed in SEARCH_SEEDS) == name.startswith("search-")
        assert "object_counting" not in names_of(config)  # held out of --tasks
        assert config.steps == 3 and config.batch_size == 6
    one = configs["meta-tasks-8-seed1"]
    assert (one.support, one.query, one.tasks_per_round, one.samples) == (3, 3, 2, 8)
    assert names_of(configs["meta-languages-8-seed0"]) == load_names("mini-multilingual")
    assert configs["align_shuffled-tasks-all-seed0"].shuffle_groups
    assert configs["align_kl-tasks-all-seed0"].align == "kl" and not configs["align_kl-tasks-all-seed0"].shuffle_groups
    assert len({(c.rank, c.samples) for name, c in configs.items() if "-all-" in name and "meta" not in name
                and ("align" in name or "lora_matched" in name)}) == 1
    big = make_plan(compare.parse(["--claims", "7", "--device", "cpu"]))
    for size in (10, 20, 50, 500):  # every round has all tasks, and queries as a batch of the others
        config = big.config(Run(Group("meta", samples=size), 0), (1e-3, 0.02))
        assert (config.support, config.query, config.tasks_per_round) == (3, 3, 6)
        assert config.samples == big.config(Run(Group("lora_matched", samples=size), 0), (1e-3,)).samples
        assert (config.lr, config.inner_lr, config.score_samples) == (1e-3, 0.02, 1000)
    searched = [run for run in big.runs({}) if run.tried and run.group.method == "meta"]
    assert len(searched) == len(INNER_RATES) * (len(big.rates) - 2)
    assert sorted(big.rates) == big.rates and max(b / a for a, b in zip(big.rates, big.rates[1:])) < 1.71


def names_of(config):
    """The names of a run's tasks, which are folders where they are generated."""
    return [task.rsplit("/", 1)[-1] for task in config.tasks]


def test_every_seed_has_samples_of_its_own(tmp_path):
    """Also to train on, and the same ones for all methods; a task that is not generated is what it is."""
    plan = tiny_plan(tmp_path, "--claims", 4)
    configs = [plan.config(Run(Group(method), seed), (1e-3,)) for method, seed in
               (("rlora", 0), ("mlora", 0), ("rlora", 1), ("rlora", SEARCH_SEEDS[0]))]
    first, same, other, search = [load_tasks(config.tasks) for config in configs]
    assert first == same and [task.name for task in first] == names_of(configs[0])
    for tasks in (other, search):
        for one, another in zip(first, tasks):
            assert (len(one.train), len(one.validation), len(one.test)) == (500, 500, 1000)
            for split in ("train", "validation", "test"):
                shared = set(getattr(one, split)) & set(getattr(another, split))
                assert len(shared) < 0.5 * len(getattr(one, split))
    plan.task_sets["tasks"] = ["sst2"]
    assert plan.samples_of(["sst2"], 0) == ["sst2"]


def test_the_presets_train_on_the_tasks_that_they_name():
    quick, full = (make_plan(compare.parse(["--preset", preset, "--device", "cpu"])) for preset in PRESETS)
    assert quick.task_sets["tasks"] == PRESETS["quick"]["tasks"] and quick.held_out == []
    assert sorted(full.task_sets["tasks"] + full.held_out) == sorted(load_names("mini") + load_names("mini-multilingual"))
    assert full.held_out == ["web_of_lies", "tracking_shuffled_objects", *load_names("mini-multilingual")]
    assert {task.rsplit("/", 1)[-1] for task in quick.config(quick.runs({})[0], (1e-3,)).tasks} == {
        "word_sorting", "dyck_languages", "object_counting"}


def load_names(given):
    return [task.name for task in load_tasks([given])]


@pytest.mark.parametrize("variant", ["lora_matched", "meta"])
def test_samples_seen_are_those_that_were_seen(tmp_path, monkeypatch, few, variant):
    seen = []
    for module in (train, meta):
        def counted(model, batch, original=module.label_loss):
            if torch.is_grad_enabled():
                seen.append(len(batch["task_ids"]))
            return original(model, batch)
        monkeypatch.setattr(module, "label_loss", counted)
    monkeypatch.setattr(training, "accuracies_after_adapting", lambda model, tokenizer, tasks, *rest: {
        task.name: 0.0 for task in tasks})
    plan = tiny_plan(tmp_path, *TWO_TASKS, "--claims", 7, "--batch-size", 5)
    row = compare.carry_out(plan, Run(Group(variant, samples=8), 0), (1e-3,), None)
    assert sum(seen) == row["samples_seen"] == (3 * 4 if variant == "lora_matched" else 3 * 2 * (3 * 2 + 2))


# ------------------------------------------------------------------------------------------------- from end to end
def test_what_is_written_follows_from_the_runs(whole):
    folder, results = whole
    written = json.loads((folder / "results.json").read_text())
    assert written == results and [claim["claim"] for claim in written["claims"]] == [1, 4]
    runs = {(run["method"], run["seed"]): run for run in written["runs"] if not run["search"]}
    assert len(runs) == 8 and all("after" in run and run["skipped_steps"] == 0 for run in runs.values())
    for row in written["claims"][1]["comparisons"]:
        (one, other), unit = row["name"].split(": ")[1].split(" - "), 100 if row["quantity"] == "accuracy" else 1
        key = {"accuracy": "average_after"}.get(row["quantity"], row["quantity"])
        expected = [unit * (runs[one, seed][key] - runs[other, seed][key]) for seed in (0, 1)]
        assert row["differences"] == pytest.approx(expected)
        assert row.get("word") == (word(row["interval"]) if row["quantity"] == "accuracy" else None)
        middle, interval = t_interval(row["differences"])
        assert (row["mean"], row["interval"]) == (middle, interval)
        assert row["verdict"] == verdict(interval, row["claimed"], unit=row["unit"])
    hydra, rlora = runs["hydralora", 0], runs["rlora", 0]
    assert set(hydra["cosine_start"]) == {None} and rlora["cosine_start"] == pytest.approx([-1 / 3] * 5, abs=0.03)
    assert hydra["cosine"] == pytest.approx(sum(hydra["cosine_end"]) / 5)
    assert [step for step, _ in hydra["cosine_curve"]] == [0, 1, 3]
    table = (folder / "table.md").read_text()
    assert table == markdown(written)
    assert all(claim["text"] in table and f"**{claim['verdict']}**" in table for claim in written["claims"])
    assert f"{hydra['trainable_parameters']:,}" in table


def test_a_finished_comparison_trains_nothing_again(whole, copy, few):
    assert results_without_times(compare.compare(tiny_plan(copy, *WHOLE))) == results_without_times(whole[1])
    assert few == []


def test_a_comparison_that_is_killed_goes_on_and_repeats_nothing(whole, copy, few):
    """It is killed in the second step of its last but one run."""
    plan = tiny_plan(copy, *WHOLE)
    *_, killed, last = [run.name for run in plan.runs({})]
    (copy / "results.json").unlink()
    forget_rows(copy, killed, last)
    for name in (killed, last):
        shutil.rmtree(copy / "runs" / name)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 2, kill)
        compare.compare(plan)
    assert few == [killed] and not (copy / "results.json").exists() and not (copy / "runs" / last).exists()
    again = compare.compare(plan)
    assert few == [killed, killed, last]  # that one was gone on with, no other
    assert results_without_times(again) == results_without_times(whole[1])


def forget_rows(folder, *names):
    """Take the rows of some runs, or of all, out of a comparison's rows.jsonl."""
    conditions, *rows = [line for line in (folder / compare.ROWS).read_text().splitlines(True) if line.strip()]
    kept = [row for row in rows if names and json.loads(row).get("name") not in names]
    (folder / compare.ROWS).write_text("".join([conditions, *kept]))


def test_rows_alone_are_enough_to_go_on_with(whole, copy, few):
    """On another machine, say, with no run's folder; and folders alone are enough too."""
    shutil.rmtree(copy / "runs")
    assert results_without_times(compare.compare(tiny_plan(copy, *WHOLE))) == results_without_times(whole[1])
    folders = shutil.copytree(whole[0], copy / "folders")
    forget_rows(folders)
    assert results_without_times(compare.compare(tiny_plan(folders, *WHOLE))) == results_without_times(whole[1])
    assert few == []


def test_a_longer_list_looks_again_into_runs_that_lack_what_it_needs(copy, few, tmp_path):
    """A row of a shorter list of claims has no cosines, say; the run is not trained again."""
    plan = tiny_plan(copy, *TWO_TASKS, "--claims", 1, 4)
    rows = (copy / compare.ROWS).read_text()
    stripped = [{key: value for key, value in json.loads(line).items() if not key.startswith("cosine")}
                for line in rows.splitlines() if line]
    (copy / compare.ROWS).write_text("".join(json.dumps(row) + "\n" for row in stripped))
    results = compare.compare(plan)
    assert few == [] and all("cosine" in run for run in results["runs"]
                             if not run["search"] and run["method"] in ("hydralora", "rlora"))
    moved = copy.rename(tmp_path / "elsewhere")  # with its tasks, and runs that have to be looked into
    (moved / compare.ROWS).unlink()
    for file in moved.glob("runs/*/measures.json"):
        file.unlink()
    assert results_without_times(compare.compare(tiny_plan(moved, *WHOLE))) == results_without_times(results)
    assert few == []


def test_a_line_that_was_not_written_to_its_end_is_passed_over(copy, few, whole):
    with open(copy / compare.ROWS, "a") as file:
        file.write('{"name": "mlora-tas')
    assert results_without_times(compare.compare(tiny_plan(copy, *WHOLE))) == results_without_times(whole[1])
    compare.append_line(copy / compare.ROWS, {"name": "more"})
    assert json.loads((copy / compare.ROWS).read_text().splitlines()[-1]) == {"name": "more"}
    (copy / compare.ROWS).write_text("")
    assert results_without_times(compare.compare(tiny_plan(copy, *WHOLE))) == results_without_times(whole[1])
    assert few == []


def test_several_processes_may_need_the_same_samples_at_once(tmp_path):
    """Each of eight sees a task's folder whole or not at all, and none fails."""
    program = ("import sys; from tinylora_mtl.lab import compare; from tinylora_mtl.lab.plan import make_plan; "
               "from tinylora_mtl.data.tasks import load_tasks; plan = make_plan(compare.parse(sys.argv[1:]));"
               "print(all(len(load_tasks([str(plan.task_folder('navigate', seed))])[0].test) == 1000 "
               "for seed in range(50, 60)))")
    flags = [sys.executable, "-c", program, *TINY, "--claims", "4", "--out", str(tmp_path)]
    both = [subprocess.Popen(flags, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    assert [process.communicate(timeout=200)[0] for process in both] == ["True\n"] * 3
    assert sorted(path.name for path in (tmp_path / "tasks" / "seed50").iterdir()) == ["navigate"]


def test_rows_of_other_conditions_or_of_other_code_are_refused(copy, few):
    with pytest.raises(ValueError, match="rows.jsonl holds runs with steps 3, and this comparison has 4; name another"):
        compare.compare(tiny_plan(copy, *WHOLE, "--steps", 4))
    conditions, *rows = [line for line in (copy / compare.ROWS).read_text().splitlines(True) if line.strip()]
    (copy / compare.ROWS).write_text("".join([conditions.replace('"source_sha256": "', '"source_sha256": "0'), *rows]))
    with pytest.raises(ValueError, match="holds runs with source_sha256 0"):
        compare.compare(tiny_plan(copy, *WHOLE))
    assert few == []


def test_bits_are_those_of_the_whole_answer(few):
    """Against the likelihood of each answer, end token included, by itself."""
    model, tokenizer, _ = load_model("mini", "cpu")
    task, = load_tasks(["navigate"])
    task = replace(task, test=task.test[:5])
    total = 0.0
    for prompt, target in task.test:
        ids = tokenizer(prompt)["input_ids"]
        answer = [*tokenizer(f" {target}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1:-1]
        total -= logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item() / math.log(2)
    assert compare.target_bits(model, tokenizer, [task], 512) == {"navigate": pytest.approx(total / 5, rel=1e-4)}


def test_the_table_comes_from_the_results_alone(copy, few, monkeypatch, capsys):
    results = json.loads((copy / "results.json").read_text())
    results["claims"][0]["verdict"] = "does not hold"
    (copy / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(compare, "make_plan", None)
    compare.main(["--report", str(copy)])
    assert "**does not hold**" in (copy / "table.md").read_text()
    assert "DOES NOT HOLD" in capsys.readouterr().out


def test_a_run_in_the_hands_of_another_process_is_skipped_and_waited_for(copy, monkeypatch, few):
    plan = tiny_plan(copy, *WHOLE)
    taken = plan.runs({})[0].name
    shutil.rmtree(copy / "runs" / taken)
    forget_rows(copy)
    other = locked(copy / "locks" / taken)
    other.__enter__()
    done, waits = [], []

    def carry_out(plan, run, *rest, original=compare.carry_out):
        row = original(plan, run, *rest)
        done.append(run.name)
        return row

    def sleep(seconds):
        waits.append(list(done))
        other.__exit__(None, None, None)
    monkeypatch.setattr(compare, "carry_out", carry_out)
    monkeypatch.setattr(compare.time, "sleep", sleep)
    compare.compare(plan)
    method = plan.runs({})[0].group.method
    assert len(waits) == 1 and taken not in waits[0]
    assert not [name for name in waits[0] if name.startswith(f"{method}-")]  # its rate was not known yet
    assert len(waits[0]) == len(plan.runs({})) - 1 - len(plan.seeds) and done[len(waits[0])] == taken
    assert few == [taken]


def test_a_run_that_train_is_using_is_skipped_too(copy, few):
    plan = tiny_plan(copy, *WHOLE)
    run = plan.runs({})[0]
    (copy / "runs" / run.name / "results.json").unlink()
    with locked(copy / "runs" / run.name), pytest.raises(BlockingIOError):
        compare.carry_out(plan, run, run.tried, None)


def test_results_of_other_settings_are_never_mixed_in(copy, few):
    (copy / compare.ROWS).unlink()
    with pytest.raises(ValueError, match="holds a run with --steps 3, and this comparison has 4; name another --out"):
        compare.compare(tiny_plan(copy, *WHOLE, "--steps", 4))
    (copy / compare.ROWS).unlink()
    plan = tiny_plan(copy, *WHOLE)
    file = copy / "runs" / plan.runs({})[0].name / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"format": config["format"] - 1}))
    with pytest.raises(ValueError, match="is of another version of this package"):
        compare.compare(plan)
    assert few == []


# ------------------------------------------------------------------------------------------ the learning-rate search
class Untouchable(list):
    """A split that must not be looked at; how many samples it has may be known."""

    def __iter__(self):
        raise AssertionError("the test samples were looked at")
    __getitem__ = __contains__ = __iter__


def test_the_search_never_looks_at_test_samples(tmp_path, monkeypatch, few):
    """In runs of the search any look at the test split fails; and other test samples leave every choice as it is."""
    def load(names, samples, seed, at_most):
        tasks = [few_samples(name, samples, seed) for name in names]
        return [replace(task, test=Untouchable(task.test) if seed in SEARCH_SEEDS else
                        [("?", "no")] * 2 if spoiled else task.test) for task in tasks]
    monkeypatch.setattr(fingerprints, "of_split", lambda task, split: {})  # a hash tells nothing of what is right
    monkeypatch.setattr(training, "load_tasks", load)
    chosen = []
    for spoiled in (False, True):
        results = compare.compare(tiniest_plan(tmp_path / str(spoiled), "mlora"))
        assert all(run["seed"] in SEARCH_SEEDS for run in results["runs"] if run["search"])
        chosen.append((results["rates"], [run["lr"] for run in results["runs"]]))
    assert chosen[0] == chosen[1] and len(chosen[0][1]) == 4


def test_the_best_rate_on_validation_is_taken_by_all_runs_of_the_method(tmp_path, monkeypatch, few):
    """With accuracies that depend on the split and the rate alone, every method takes the rate best on validation."""
    now = {}

    def remember(config, original=training.resolve):
        now["lr"] = original(config).lr
        return original(config)
    monkeypatch.setattr(training, "resolve", remember)
    monkeypatch.setattr(training, "accuracies", lambda model, tokenizer, tasks, split, *rest: {
        task.name: {("validation", 0.005): 0.9, ("test", 0.001): 0.8}.get((split, now["lr"]), 0.1) for task in tasks})
    results = compare.compare(tiniest_plan(tmp_path, "rlora", "lora_matched"))
    assert {run["lr"] for run in results["runs"] if not run["search"]} == {0.005}
    assert [rate["lr"] for rate in results["rates"]] == [0.005, 0.005]
    assert all(rate["tried"] == {"0.001": pytest.approx([0.1]), "0.005": pytest.approx([0.9])}
               for rate in results["rates"])
    assert read_config(tmp_path / "runs" / "rlora-tasks-all-seed1").lr == 0.005
    assert best_rates({(2e-3,): 0.5, (1e-3,): 0.5, (5e-3,): 0.4}) == (1e-3,)  # the lower of equals


def test_the_best_rate_is_best_in_the_mean_of_the_search_s_seeds(tmp_path):
    """Of the first seed's best and its neighbours, and for MeTA-LoRA at the inner rate that was best with it."""
    plan = tiny_plan(tmp_path, "--claims", 7)
    plan.rates, few = [1e-3, 2e-3, 3e-3, 4e-3, 5e-3], 12
    for method, inner in (("lora_matched", ()), ("meta", (0.02,))):
        run, group = Run(Group(method, samples=few), 0), plan.searched(Group(method, samples=few))
        rows = {Run(group, SEARCH_SEEDS[0], tried).name: {"average_after": 0.5} for tried in plan.tried(group)[1:]}
        assert plan.tried_again(group, rows) == []  # the first seed has not tried all of them
        with pytest.raises(BlockingIOError):
            compare.rates_of(plan, run, rows)
        rows[Run(group, SEARCH_SEEDS[0], plan.tried(group)[0]).name] = {"average_after": 0.5}
        rows[Run(group, SEARCH_SEEDS[0], (3e-3, *inner)).name] = {"average_after": 0.8}  # the best by one seed
        again = plan.tried_again(group, rows)
        assert again == [(2e-3, *inner), (3e-3, *inner), (4e-3, *inner)]
        for seed in SEARCH_SEEDS[1:]:
            rows |= {Run(group, seed, tried).name: {"average_after": 0.7} for tried in again}
            rows[Run(group, seed, again[0]).name] = {"average_after": 0.9}  # (.5 + .9 + .9) / 3 > (.8 + .7 + .7) / 3
            rows[Run(group, seed, (1e-3, *inner)).name] = {"average_after": 1.0}  # not of the three
        assert compare.rates_of(plan, run, rows) == again[0]
        listed = [r for r in plan.runs(rows) if r.tried and r.group == group]
        assert len(listed) == len(plan.tried(group)) + 3 * (len(SEARCH_SEEDS) - 1)
        del rows[Run(group, SEARCH_SEEDS[2], again[2]).name]
        with pytest.raises(BlockingIOError):
            compare.rates_of(plan, run, rows)


def test_at_an_end_of_the_rates_the_three_next_to_it_are_tried_again(tmp_path):
    plan = tiny_plan(tmp_path, "--claims", 4)
    group = Group("rlora")
    for rates, best, expected in (([1, 2, 3, 4], 4, [2, 3, 4]), ([1, 2, 3, 4], 1, [1, 2, 3]), ([1, 2], 2, [1, 2]),
                                  ([1], 1, [1])):
        plan.rates = rates
        rows = {Run(group, SEARCH_SEEDS[0], (rate,)).name: {"average_after": float(rate == best)} for rate in rates}
        assert plan.tried_again(group, rows) == [(rate,) for rate in expected]


def test_a_rate_that_one_seed_tried_is_not_the_best(tmp_path, whole):
    """In the results: the choice is between those that all search seeds tried."""
    rows = [row | {"average_after": 0.99} if row["search"] and row["seed"] == SEARCH_SEEDS[0] else row
            for row in whole[1]["runs"]]
    first = next(row for row in rows if row["search"])
    lower = first["lr"] / 2
    rows += [row | {"seed": SEARCH_SEEDS[1], "average_after": 0.01} for row in rows if row["search"]]
    rows.append(first | {"lr": lower})
    rates = judge_claims(tiny_plan(tmp_path, *WHOLE), rows)["rates"]
    chosen = next(rate for rate in rates if rate["method"] == first["method"])
    assert chosen["lr"] != lower and len(chosen["tried"][f"{lower:g}"]) == 1


def test_which_search_a_group_takes_its_rate_from(tmp_path):
    plan = tiny_plan(tmp_path, "--claims", 5)
    for group, expected in {
            Group("rlora"): Group("rlora"), Group("rlora", "languages"): Group("rlora"),
            Group("lora_matched", samples=8): Group("lora_matched", samples=8),
            Group("meta", samples=12): Group("meta", samples=8),
            Group("meta", "languages", 8): Group("meta", samples=8)}.items():
        assert plan.searched(group) == expected


# ---------------------------------------------------------------------------------------------------- the controls
def test_shuffled_groups_have_the_sizes_of_the_tasks_and_other_members(monkeypatch):
    used = []

    def loss(features, batch, kind, original=train.alignment_loss):
        used.append(batch)
        return original(features, batch, kind)
    monkeypatch.setattr(train, "alignment_loss", loss)
    for shuffled in (False, True):
        config, model, batches = cost.begin_run(TrainConfig(
            tasks=["word_sorting", "dyck_languages"], steps=3, batch_size=16, samples=8, rank=2,
            shuffle_groups=shuffled, device="cpu"))
        start = place_of(batches)
        true = [next(batches) for _ in range(3)]
        put_back(batches, start)
        del used[:]
        list(train.train(model, train.TrainState(model, batches, config), config, gradients.gradients_for(config)))
        ids, got = ([batch["task_ids"].tolist() for batch in drawn] for drawn in (true, used))
        assert len(got) == 3 and all(sorted(group) == sorted(real) for group, real in zip(got, ids))  # eight and eight
        assert (got != ids) == shuffled
        assert all(torch.equal(batch["input_ids"], real["input_ids"]) for batch, real in zip(used, true))
    assert len({tuple(group) for group in got}) == 3  # drawn anew in every step


def test_tasks_not_trained_on_and_distances_are_measured_once(tmp_path, monkeypatch, few):
    plan = tiny_plan(tmp_path, "--claims", 6, 10, "--held-out", "object_counting")
    row = compare.carry_out(plan, Run(Group("rlora"), 0), (1e-3,), None)
    assert list(row["unseen_tasks"]) == ["object_counting"] and row["unseen"] == row["unseen_tasks"]["object_counting"]
    assert list(row["after"]) == ["word_sorting", "dyck_languages"] and "distance" not in row
    aligned = Run(Group("align_kl"), 0)
    row = compare.carry_out(plan, aligned, (1e-3,), None)
    assert row["moved"] == row["distance"] - row["distance_start"] and row["distance_start"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "open_finished", None)
        assert compare.carry_out(plan, aligned, (1e-3,), None) == row
    own = tmp_path / "of my own"
    own.mkdir()
    (own / "test.jsonl").write_text('{"prompt": "1 + 1? Answer:", "target": "2"}\n')
    plan.held_out = [str(own)]
    row = compare.carry_out(plan, aligned, (1e-3,), None)
    assert list(row["unseen_tasks"]) == ["of my own"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "open_finished", None)
        assert compare.carry_out(plan, aligned, (1e-3,), None) == row


def test_the_base_is_measured_once_for_the_same_samples(tmp_path, monkeypatch, few):
    plan, scored = tiny_plan(tmp_path, "--claims", 2, 8), []

    def count(model, tokenizer, tasks, split, *args):
        scored.append(([task.name for task in tasks], split))
        return {task.name: len(scored) / 100 for task in tasks}
    monkeypatch.setattr(training, "accuracies", count)
    monkeypatch.setattr(training, "accuracies_after_adapting", lambda *args: count(*args[:3], "after"))
    monkeypatch.setattr(training, "run_steps", lambda *args: scored.append("trained"))
    monkeypatch.setattr(compare, "look_inside", lambda *args: {})
    rows = [compare.carry_out(plan, Run(Group(*group), seed, tried), (1e-3,), None) for group, seed, tried in (
        (("lora",), 0, None), (("lora",), SEARCH_SEEDS[0], (1e-3,)), (("rlora",), 0, None),
        (("meta", "languages", 8), 0, None), (("lora_matched", "languages", 8), 0, None))]
    names, languages = plan.task_sets["tasks"], plan.task_sets["languages"]
    assert scored == [(names, "test"), "trained", (names, "test"),
                      (names, "validation"), "trained", (names, "validation"),
                      "trained", (names, "test"),
                      (languages, "test"), "trained", (languages, "test"), (languages, "after"),
                      "trained", (languages, "test")]
    before = [row["average_before"] for row in rows]
    assert before == pytest.approx([0.01, 0.04, 0.01, 0.09, 0.09])


# -------------------------------------------------------------------------------------------------- a table of methods
def test_a_table_of_methods(tmp_path, monkeypatch, few, capsys):
    """Of the core, of the gallery, and of a file: each has its rate searched, and costs are taken when all are done."""
    mine = tmp_path / "half_lora.py"
    mine.write_text("from tinylora_mtl.lora import LoRALinear\nLR = 1e-3\n\nclass Layer(LoRALinear):\n"
                    "    def __init__(self, base, config):\n        super().__init__(base, 1, config.alpha)\n")
    methods, taken = ("lora", "meta", "rlora", "mtl_lora", "half_lora"), []

    def costs(configs, swapped):
        taken.append([config.method for config in configs])
        assert len(few) == 4 * 4 + 8  # all training is done; meta has three inner rates
        step = {"lora": 0.0, "meta": 200.0, "half_lora": -10.0}.get(configs[1].method, 50.0)
        return {"time": step + 1, "memory": -step / 4, "seconds": 1.0}
    monkeypatch.setattr(compare, "compare_costs", costs)
    for known in (MINI_LR, LAYERS, GRADIENTS, TYPED):  # as they were, when the test is done
        for name in methods[-2:]:
            monkeypatch.setitem(known, name, None)
            del known[name]
    results = compare.main([*TINY, *TWO_TASKS, "--out", str(tmp_path / "out"), "--methods", *methods[:-1], str(mine)])
    assert results["claims"] == []
    assert taken == [["lora", method] for method in methods]
    assert results["conditions"]["methods"] == {"lora": "yes", "meta": "yes", "rlora": "no", "half_lora": "yes",
                                                "mtl_lora": "for one task"}
    table = (tmp_path / "out" / "table.md").read_text()
    first = table[:table.index("Time and peak memory")]
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in first.splitlines() if line.startswith("| ")}
    assert set(lines) == {"method", *methods}
    runs = [run for run in results["runs"]
            if (run["method"], run["where"], run["search"]) == ("half_lora", "tasks", False)]
    assert len(runs) == 2 and {run["lr"] for run in runs} <= {1e-3, 5e-3}
    assert lines["half_lora"][1:4] == ["0.91", "1.02", "yes"] and lines["meta"][1] == "3.01"
    assert lines["half_lora"][-2] == f"{runs[0]['trainable_parameters']:,}"
    assert lines["meta"][-1].strip(" |") == "8" and lines["lora"][-1].strip(" |") == "12"
    shown = capsys.readouterr().out
    assert "half_lora" in shown and max(map(len, shown.splitlines()[:-1])) <= 80
    assert "claims" not in table and "no different" not in table.lower()


@pytest.mark.parametrize("flags, message", [
    (("--methods", "lorra"), "unknown method 'lorra'"), (("--methods", "nowhere.py"), "there is no file nowhere.py")])
def test_methods_that_there_are_not(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        tiny_plan(tmp_path, *flags)


# -------------------------------------------------------------------------------------------------------- the costs
def test_a_fresh_process_knows_the_methods_of_the_gallery_and_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "my way.py").write_text(
        "from tinylora_mtl.lora import LoRALinear\nLR = 1e-3\n\nclass Layer(LoRALinear):\n"
        "    def __init__(self, base, config):\n        super().__init__(base, 2, 4)\n")
    for known in (MINI_LR, LAYERS, GRADIENTS, TYPED):  # as they were, when the test is done
        monkeypatch.setitem(known, "my way", None)
        del known["my way"]
    name = typed_method(str(tmp_path / "my way.py"))
    configs = [TrainConfig(method=method, device="cpu", batch_size=8, targets=("q_proj",))
               for method in ("mtl_lora", name)]
    seconds = cost.in_a_process(cost.take_turns, cost.training_steps, configs, 1, 0)
    assert len(seconds) == 2 and min(map(min, seconds)) > 0


def test_costs_are_differences_in_percent_whichever_goes_first(monkeypatch):
    costs = {"a": (2.0, 100), "b": (1.5, 110)}
    monkeypatch.setattr(cost, "in_a_process", lambda function, *args, **options: (
        [[costs[name][0]] * 3 for name in args[1]] if function is cost.take_turns else costs[args[1][args[2]]][1]))
    for swapped in (False, True):
        found = cost.compare_costs(("a", "b"), swapped)
        assert (found["time"], found["memory"]) == pytest.approx((-25, 10))
        assert found["step_seconds"] == [2.0, 1.5] and found["peak_bytes"] == [100, 110]


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="reads /proc")
def test_the_peak_counts_what_a_side_allocates_and_nothing_before():
    torch.ones(2 ** 25).sum()  # 128 MiB, gone before the count begins
    used = cost.peak_of(lambda: [None, lambda: torch.ones(2 ** 24).sum()], (), 1, 2)  # 64 MiB, gone when it ends
    assert 62 * 2 ** 20 < used < 80 * 2 ** 20  # less may be taken from what the process holds already


@pytest.mark.slow
def test_costs_are_measured_in_processes_of_their_own(tmp_path, few):
    plan = tiny_plan(tmp_path, "--claims", 3, "--batch-size", 24, "--targets", "all-linear")
    claim, = plan.claims
    published = replace(claim, comparisons=claim.comparisons[:2])  # the pair with dropout
    results = compare.compare(replace(plan, claims=[published]))
    assert few == [] and len(results["runs"]) == 2
    row = results["claims"][0]["comparisons"][0]
    assert row["name"] == "time: dropout 0.1" and len(row["differences"]) == 2
    for run in results["runs"]:
        assert all(value > 0 for value in run["step_seconds"] + run["peak_bytes"])
        assert run["time"] == pytest.approx(100 * (run["step_seconds"][1] / run["step_seconds"][0] - 1))
    assert row["mean"] < 0  # a mask on x for every head is far more work than one on A x


# ------------------------------------------------------------------------------------------------ published results
@pytest.mark.parametrize("file", sorted(PUBLISHED.glob("*.json")), ids=lambda file: file.stem)
def test_published_verdicts_follow_from_their_runs_by_the_rules(file):
    """Its claims as declared now, from the rows of the runs; and every interval from its differences.

    Version 0.1 had eight claims, other comparisons, and one rule for accuracies and all else.
    """
    results = json.loads(file.read_text())
    sizes, seeds = results["conditions"]["sizes"], results["conditions"]["seeds"]
    if "version" in results["conditions"]:
        plan = SimpleNamespace(claims=[claim for claim in declare(sizes) if claim.number in
                                       {claim["claim"] for claim in results["claims"]}],
                               sample_counts=sizes, seeds=seeds, command="", conditions=dict)
        assert judge_claims(plan, results["runs"])["claims"] == results["claims"]
    else:
        assert [claim["claim"] for claim in results["claims"]] == list(range(1, 9))
        for claim in results["claims"]:
            for row in claim["comparisons"]:
                assert row["verdict"] == verdict(row["interval"], row["claimed"], row["margin"], "by the one rule")
            assert claim["verdict"] == joint_verdict([row["verdict"] for row in claim["comparisons"]
                                                      if row["decides"]])
    for row in (row for claim in results["claims"] for row in claim["comparisons"]):
        assert len(row["differences"]) == len(seeds) >= 3
        reach = stdev(row["differences"]) / len(seeds) ** 0.5 * T_975[len(seeds) - 2]
        assert row["interval"] == pytest.approx([mean(row["differences"]) - reach, mean(row["differences"]) + reach])


@pytest.mark.parametrize("file", sorted(PUBLISHED.glob("*.json")), ids=lambda file: file.stem)
def test_a_summary_names_all_that_decides_in_80_columns(file):
    results = json.loads(file.read_text())
    lines = summary(results).splitlines()
    assert max(map(len, lines)) <= 80
    for row in (row for claim in results["claims"] for row in claim["comparisons"] if row["decides"]):
        at = next(i for i, line in enumerate(lines) if f"   {row['name']} " in f"{line} ")
        assert f"{row['mean']:+.2f} [" in "".join(lines[at:at + 2])


def test_conditions_name_the_languages_where_there_are_runs_on_them():
    results = json.loads((PUBLISHED / "smollm2_first.json").read_text())
    assert "16 samples on negation_english, negation_german" in " ".join(conditions_text(results).split())
    results["conditions"]["batch_size"] = 23  # of three tasks 21 samples, of four 20
    text = " ".join(conditions_text(results).split())
    assert "steps of 21 samples, model SmolLM2" in text and "(claim 8: 20 samples on negation_english" in text
    results["runs"] = [run for run in results["runs"] if run["where"] != "languages"]
    assert "claim 8" not in conditions_text(results)


def test_what_the_documents_say_in_words_of_the_embedded_model():
    results = json.loads((PUBLISHED / "mini.json").read_text())
    runs = {}
    for run in results["runs"]:
        if not run["search"] and run["where"] == "tasks" and run["samples"] == 500:
            runs.setdefault(run["method"], []).append(run)
    rows = {(claim["claim"], row["name"]): row for claim in results["claims"] for row in claim["comparisons"]}
    cosine = {method: mean(run["cosine"] for run in found) for method, found in runs.items() if "cosine" in found[0]}
    assert cosine["mlora_heads"] < 0 < cosine["rlora"] < 0.2 < 0.6 < cosine["rlora_released"] < cosine["mlora_released"]
    assert cosine["mlora_released"] < cosine["mlora_zero"] and cosine["hydralora"] > 0.75
    assert all(rows[9, f"accuracy: rlora_{start} - rlora"]["word"] == "undecided" for start in ("dropout", "released"))
    lost = {run["seed"]: 100 * run["after"]["boolean_expressions"] for run in runs["rlora"]}
    worst = min(lost, key=lost.get)
    assert lost[worst] + 20 < min(value for seed, value in lost.items() if seed != worst) and len(lost) == 8
    assert 3.5 < runs["hydralora"][0]["trainable_parameters"] / runs["lora"][0]["trainable_parameters"] < 4
    assert all(rows[2, f"accuracy: {name}"]["interval"][0] < 0 for name in (
        "rlora_dropout - rlora_neither", "rlora_start - rlora_neither", "lora_scaled - lora_matched"))
    assert rows[6, "moved: align_kl"]["mean"] < -7 and -3.5 < rows[6, "moved: lora_matched"]["mean"] < -3
    assert abs(rows[6, "moved: align_kl"]["mean"] - rows[6, "moved: align_shuffled"]["mean"]) < 0.2
    assert rows[6, "accuracy: align_kl - align_shuffled"]["word"] == "undecided"
    assert rows[6, "accuracy: align_kl - lora_matched"]["word"] == "worse"
    spread = {method: {task: 100 * stdev(run["after"][task] for run in found) for task in found[0]["after"]}
              for method, found in runs.items() if found[0]["method"] != "meta"}
    wide = {method for method, by_task in spread.items() if by_task["boolean_expressions"] > 6}
    assert wide == {"rlora", "rlora_start", "mlora", "mlora_mean", "mlora_zero"}
    assert all(1 < by_task["boolean_expressions"] < 5 for method, by_task in spread.items() if method not in wide)
    assert {method for method, by_task in spread.items() if by_task["dyck_languages"] > 2} == {
        "mlora_heads", "rlora_released"}
    unseen = [100 * run["unseen"] for found in runs.values() for run in found if "unseen" in run]
    assert 9 < min(unseen) < max(unseen) < 20
    assert all(mean(run["unseen_tasks"]["web_of_lies"] for run in found) < 0.5
               for found in runs.values() if "unseen" in found[0])
    assert 0.2 < min(run["average_before"] for found in runs.values() for run in found if "average_before" in run)
    few = [rows[7, f"accuracy: {method}, 50 samples - lora_matched"]["mean"] for method in ("meta", "lora_matched")]
    assert abs(few[0] - few[1]) < 1 and rows[7, "accuracy: meta, 500 samples - lora_matched"]["word"] == "no different"
    assert abs(rows[8, "accuracy: lora_matched, 50 samples, languages - lora_matched, languages"]["mean"]
               - rows[8, "accuracy: meta, 50 samples, languages - lora_matched, languages"]["mean"]) < 1
    meta = [run for run in results["runs"] if run["method"] == "meta" and not run["search"]]
    assert {run["inner_lr"] for run in meta} == {0.02}
    seen = runs["lora_matched"][0]["samples_seen"]
    assert all(run["samples_seen"] == 4 * seen for run in meta if run["where"] == "tasks")
    assert all(abs(run["average_after"] - run["average_after_adapting"]) < 0.004 for run in meta)
    few = {where: [100 * run["average_after"] for run in meta if (run["where"], run["samples"]) == (where, 50)]
           for where in ("tasks", "languages")}
    assert {where: round(stdev(found)) for where, found in few.items()} == {"tasks": 2, "languages": 4}
    rates = {rate["method"]: rate["lr"] for rate in results["rates"] if rate["samples"] == 500}
    assert 4 < rates["lora_matched"] / rates["lora_scaled"] < 5


def test_what_the_documents_say_in_words_of_the_real_model():
    results = json.loads((PUBLISHED / "smollm2.json").read_text())
    rows = {row["name"]: row for claim in results["claims"] for row in claim["comparisons"]}
    runs = {}
    for run in results["runs"]:
        if not run["search"]:
            runs.setdefault(run["method"], []).append(run)
    cosine = {method: mean(run["cosine"] for run in found) for method, found in runs.items() if "cosine" in found[0]}
    assert cosine["mlora_heads"] < cosine["rlora"] < 0 and 0.8 < min(
        cosine[name] for name in ("mlora_zero", "mlora_released", "rlora_dropout", "rlora_released"))
    told = [row["name"] for row in rows.values() if row.get("word") not in (None, "undecided")]
    assert told == ["accuracy: rlora_released - rlora"] and rows[told[0]]["word"] == "no different"
    assert rows["accuracy: mlora_released - mlora_heads"]["interval"][1] < 2
    reach = [row["interval"][1] - row["mean"] for row in rows.values() if row["unit"] == "points"]
    assert 0.55 < min(reach) < 0.65 and 2.3 < max(reach) < 2.4
    widest = max(stdev(row["differences"]) for row in rows.values() if row["unit"] == "points")
    assert t_interval([-widest / 2 ** 0.5, widest / 2 ** 0.5] * 8 + [0.0])[1][1] < 1.05  # 17 seeds
    sentiment = [100 * stdev(run["after"]["sentiment"] for run in found) for found in runs.values()]
    assert 1.5 < min(sentiment) < 2.5 and 4.5 < max(sentiment) < 5.5
    assert [rate["method"] for rate in results["rates"] if rate["at_the_edge"]] == ["lora_scaled"]
    before = {round(100 * run["average_before"], 1) for run in results["runs"] if not run["search"]}
    assert all(65 < value < 67 for value in before) and max(before) - min(before) < 1


def test_what_the_documents_say_in_words_of_all_methods():
    methods, lori = (json.loads((PUBLISHED / f"{name}.json").read_text()) for name in ("methods", "lori"))
    assert not any(rate["at_the_edge"] for rate in methods["rates"])
    rates = {rate["method"]: (rate["lr"], max(map(float, rate["tried"]))) for rate in lori["rates"]}
    assert rates == {"lori": (0.012, 0.09), "lori_sparse": (0.09, 0.09)}
    parameters = [results["conditions"]["parameters"][name] for results, name in ((lori, "lori"), (methods, "lora"))]
    assert 0.5 < parameters[0] / parameters[1] < 0.55
    mini = {run["name"]: run["after"] for run in json.loads((PUBLISHED / "mini.json").read_text())["runs"]
            if not run["search"] and "after" in run}
    same = [run["after"] == mini[run["name"]] for run in methods["runs"] if not run["search"] and run["name"] in mini]
    assert all(same) and len(same) == 10 * 8
    told = {name for name, merges in methods["conditions"]["methods"].items() if merges == "for one task"}
    assert told == {"mtl_lora", "bora", "more"}


def test_what_the_documents_say_in_words_of_the_first_comparison():
    results = json.loads((PUBLISHED / "smollm2_first.json").read_text())
    done = [run for run in results["runs"] if not run["search"] and run["where"] != "cost"]
    assert {(run["where"], round(100 * run["average_before"])) for run in done} == {("tasks", 72), ("languages", 48)}
    steps, size = results["conditions"]["steps"], results["conditions"]["batch_size"]
    assert [steps * (size // len(results["conditions"][where])) for where in ("tasks", "languages")] == [180, 120]
    runs = [run for run in done if run["where"] == "tasks"]
    ends = {method: [run["cosine_end"] for run in runs if run["method"] == method and "cosine_end" in run]
            for method in ("hydralora", "rlora")}
    ends = {method: mean(mean(layers) for layers in found) for method, found in ends.items()}
    assert ends["hydralora"] == pytest.approx(0.95, abs=0.01) and abs(ends["rlora"]) < 0.06
    rows = {(claim["claim"], row["name"]): row for claim in results["claims"] for row in claim["comparisons"]}
    assert rows[5, "accuracy: lora_matched - rlora"]["interval"][1] < 0  # R-LoRA is ahead of it
    for number, name in ((2, "hydralora - lora"), (2, "rlora - rlora_neither"), (4, "mlora - rlora"),
                         (6, "align_kl - lora_matched"), (6, "align_mmd - lora_matched"),
                         (6, "align_kl - align_shuffled")):
        assert rows[number, f"accuracy: {name}"]["verdict"] == "cannot tell"
    assert [name for (number, name), row in rows.items() if number == 6 and row["decides"]
            and row["verdict"] == "does not hold"] == ["accuracy: align_mmd - rlora"]
    assert rows[6, "unseen: align_mmd - lora_matched"]["verdict"] == "holds"
    assert rows[6, "unseen: align_kl - lora_matched"]["verdict"] == "cannot tell"
    assert all(rows[6, f"accuracy: align_{kind} - lora_matched"]["interval"][1] < 1 for kind in ("kl", "mmd"))
    assert round(rows[6, "unseen: align_mmd - lora_matched"]["mean"] * 200 / 100, 6) == 1.6
    assert all(rows[6, f"{quantity}: align_kl - {rival}"]["verdict"] == "cannot tell"
               for quantity in ("accuracy", "unseen") for rival in ("rlora", "mlora"))
    low = rows[7, "accuracy: meta, 50 samples - lora_matched"]["interval"][0]
    assert -2.1 < low < -2
    same_rate = {"rlora", "rlora_neither", "hydralora", "lora", "lora_matched"}
    assert {run["lr"] for run in runs if run["method"] in same_rate and run["samples"] == 500} == {0.003}
    assert {rate["lr"] for rate in results["rates"] if rate["method"] == "align_kl"} == {0.01} == {
        max(map(float, rate["tried"])) for rate in results["rates"]}
    assert rows[2, "accuracy: rlora_neither - hydralora"]["interval"][0] > 0
    assert rows[3, "time: no dropout"]["verdict"] == rows[3, "memory: no dropout"]["verdict"] == "cannot tell"
    assert all(rows[8, f"accuracy: {name}, languages"]["verdict"] == "cannot tell" for name in (
        "meta, 50 samples, languages - lora_matched, 50 samples",
        "lora_matched, 50 samples, languages - lora_matched"))
    assert [claim["verdict"] for claim in results["claims"] if claim["claim"] in (3, 8)] == ["holds", "holds"]


# ------------------------------------------------------------------------------------------- pictures and command
def test_pictures_are_written_where_matplotlib_is(tmp_path, whole, capsys):
    pytest.importorskip("matplotlib")
    results = json.loads((PUBLISHED / "smollm2_first.json").read_text())
    results["claims"] = [claim for claim in results["claims"] if claim["claim"] in (5, 8)]
    curve = pictures.accuracies_by_count(results, "meta", "tasks")
    assert {count: len(seeds) for count, seeds in curve.items()} == dict.fromkeys(results["conditions"]["sizes"], 5)
    pictures.draw_comparison(results, tmp_path)
    names = {"verdicts", "controls", "budgets", "cosines"}
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / f"{name}.svg").read_text()
    assert "no pictures" not in capsys.readouterr().err


def test_pictures_are_only_of_what_was_compared(copy):
    """Claim 1 has neither accuracies nor controls, and none of MeTA-LoRA's."""
    pytest.importorskip("matplotlib")
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(results | {"claims": results["claims"][:1]}))
    compare.main(["--report", str(copy)])
    assert {path.name for path in copy.glob("*.png")} == {"cosines.png"}


def test_without_matplotlib_there_is_a_message_and_all_the_rest(copy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (copy / "table.md").unlink()
    compare.main(["--report", str(copy)])
    assert (copy / "table.md").is_file() and not list(copy.glob("*.png"))
    assert 'no pictures: they need matplotlib; pip install "tinylora_mtl[plots]"' in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--claims", "11"], "there is no claim 11"), (["--seeds", "1"], "must be from 2 to 24"),
    (["--claims", "10"], "claim 10 needs --held-out"), (["--held-out", "x", "--claims", "10"], "unknown task 'x'"),
    (["--languages", "x"], "unknown task 'x'"), (["--score", "choose"], "'word_sorting' has no closed set of labels"),
    (["--batch-size", "2"], "--batch-size 2 cannot hold 3 tasks"),
    (["--claims", "6", "--tasks", "navigate", "--held-out", "web_of_lies"], "align needs at least two tasks"),
    (["--samples", "100", "200"], "the smallest at most 50"), (["--samples", "50", "600"], "600 training samples are"),
    (["--rates", "1e-3", "-1"], "--lr must be above 0"),
    (["--tasks", "navigate", "--held-out", "mini", "--claims", "10"], "no task is left to train on"), (["--steps", "0"], "--steps must be at least 1")])
def test_what_cannot_work_is_one_line_before_any_run(tmp_path, capsys, flags, message):
    with pytest.raises((ValueError, SystemExit)) as error:
        tiny_plan(tmp_path, *flags)
    assert message in str(error.value) + capsys.readouterr().err


def test_another_model_needs_languages_for_claim_8(tmp_path, monkeypatch, capsys):
    mini = load_model("mini", "cpu")
    monkeypatch.setattr("tinylora_mtl.lab.plan.models.load_model", lambda *args: mini)
    plan = tiny_plan(tmp_path, "--model", "another", "--held-out", "object_counting", "--rank", 4, "--heads", 5)
    assert [claim.number for claim in plan.claims] == [1, 2, 3, 4, 5, 6, 7, 9, 10]
    assert "without claim 8: it needs --languages" in capsys.readouterr().out
    with pytest.raises(ValueError, match="claim 8 needs --languages"):
        tiny_plan(tmp_path, "--model", "another", "--claims", 8)


def test_fresh_seeds(tmp_path):
    plan = tiny_plan(tmp_path, "--claims", 4, "--seeds", 3, "--first-seed", 5)
    assert plan.seeds == plan.conditions()["seeds"] == [5, 6, 7]
    assert {run.seed for run in plan.runs({}) if not run.tried} == {5, 6, 7}


def test_a_claim_of_ones_own_is_compared_with_the_others(tmp_path, monkeypatch):
    mine = Claim(11, "It makes no difference.", (Comparison(Group("lora"), Group("lora_matched")),))
    monkeypatch.setattr(plans, "declare", lambda sizes: [*declare(sizes), mine])
    plan = make_plan(compare.parse(["--device", "cpu", "--out", str(tmp_path)]))
    assert [claim.number for claim in plan.claims] == list(range(1, 12)) and Group("lora_matched") in plan.groups
    assert [claim.number for claim in tiny_plan(tmp_path, "--claims", 11).claims] == [11]


def test_the_table_of_verdicts():
    """A model's newest results come first; what is of another version says so, and another claim is no verdict."""
    def found(model, version, verdicts, text="as claimed"):
        return {"claims": [{"claim": number, "text": text, "verdict": verdict} for number, verdict in verdicts.items()],
                "conditions": {"model": model, "version": version}}

    def rows(*results):
        head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")]
                           for line in report.verdict_table(*results).splitlines()]
        return head[1:], [line[1:] for line in lines]
    mini = found("mini", "0.3.0", {1: "holds", 2: "cannot tell"})
    assert rows(mini) == (["mini"], [["**holds**"], ["**cannot tell**"]])
    new, old = found("a/model", "0.3.0", {1: "cannot tell"}), found("model", "0.1", {1: "holds", 2: "does not hold"})
    assert rows(mini, new) == (["mini", "model"], [["**holds**", "**cannot tell**"], ["**cannot tell**", "-"]])
    assert rows(mini, new, old) == (["mini", "model"], [["**holds**", "**cannot tell**"],
                                                        ["**cannot tell**", "**does not hold** (0.1)"]])
    other = found("model", "0.1", {1: "holds"}, "otherwise")
    assert rows(mini, other)[1] == [["**holds**", "-"], ["**cannot tell**", "-"]]


@pytest.mark.slow
def test_the_real_command_and_a_second_one_beside_it(tmp_path):
    flags = [sys.executable, "-m", "tinylora_mtl.lab.compare", *TINY, "--claims", "4", "--out", str(tmp_path / "out")]
    both = [subprocess.Popen(flags, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(2)]
    printed = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert all("4. A simpler multi-head adapter" in out for out, _ in printed)
    assert all(len(line) <= 80 for line in printed[0][0].splitlines()[:-1])
    again = command(*TINY, "--claims", 4, "--out", tmp_path / "out", cwd=tmp_path, module="lab.compare")
    assert again.returncode == 0 and again.stdout == printed[0][0] == printed[1][0]
