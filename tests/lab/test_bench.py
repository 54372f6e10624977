"""The bench: that it takes turns, turns ratios the right way up, judges fairly, and compares what does one work."""

import functools
import json
import os
import pickle
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import command

from tinylora_mtl import meta, train
from tinylora_mtl.adapters import adapter_parameters, find_adapters
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.data.tasks import load_tasks
from tinylora_mtl.lab import bench, cost
from tinylora_mtl.lab.bench import ROWS, Row

SMALL = TrainConfig(method="lora", batch_size=8, device="cpu")


@pytest.fixture(autouse=True)
def tasks_made_once(monkeypatch):
    for module in (cost, bench):
        monkeypatch.setattr(module, "load_tasks", lambda names, *rest: tasks_of(tuple(names), *rest))


@functools.cache
def tasks_of(names, *rest):
    return [replace(task, train=task.train[:40], test=task.test[:10]) for task in load_tasks(names, *rest)]


def rows(number):
    """The rows of a number, in ROWS' order."""
    return [row for row in ROWS if row.number == number]


def record(monkeypatch, module, name):
    """Every call of module.name from now on, as (arguments, result)."""
    calls, original = [], getattr(module, name)

    def recorded(*args, **options):
        calls.append((args, original(*args, **options)))
        return calls[-1][1]
    monkeypatch.setattr(module, name, recorded)
    return calls


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.tick(seconds)` moves."""
    class Clock:
        now = 0.0

        def tick(self, seconds):
            self.now += seconds
    clock = Clock()
    monkeypatch.setattr(cost, "clock", lambda: clock.now)
    return clock


# ------------------------------------------------------------------------------------------------------- measuring
def test_the_sides_take_turns_and_what_warms_up_is_not_counted(clock):
    order, slow = [], iter([9, 9, 1, 10, 2, 20, 3, 30])  # a b | b a | a b | b a, and the first pair warms up

    def side(name):
        order.append(name)
        clock.tick(next(slow))
    assert cost.take_turns(lambda *names: [partial(side, name) for name in names], "ab", 3) == [
        [10, 2, 30], [1, 20, 3]]
    assert "".join(order) == "abbaabba"


def test_a_ratio_is_the_median_of_the_pairs_with_their_quartiles():
    found = cost.paired_ratio([10.0, 1.0, 30.0, 80.0, 5.0], [10.0, 2.0, 10.0, 20.0, 2.5], "time", (None, 2.0))
    assert (found["ratio"], found["quartiles"], found["reached"]) == (2.0, [1.0, 3.0], True)  # 0.5 1 2 3 4
    assert found["ratio"] != statistics.median(found["ours"]) / statistics.median(found["theirs"])
    assert cost.paired_ratio([3.0], [2.0], "memory", (None, 1.0))["quartiles"] == [1.5, 1.5]
    assert cost.paired_ratio([2.0], [12.0], "speed", (5.0, None))["ratio"] == 6.0


@pytest.mark.parametrize("ratio, target, reached", [
    (1.0, (None, 1.0), True), (1.01, (None, 1.0), False), (0.2, (None, 1.0), True), (5.0, (5.0, None), True),
    (4.9, (5.0, None), False), (90.0, (5.0, None), True), (0.96, (0.97, 1.03), False), (1.0, (0.97, 1.03), True),
    (1.04, (0.97, 1.03), False)])
def test_targets_are_judged_by_their_bounds(ratio, target, reached):
    assert cost.paired_ratio([ratio], [1.0], "time", target)["reached"] is reached


def test_ours_is_above_and_theirs_below(monkeypatch, clock):
    row = Row(1, "this", "that", lambda config: (partial(clock.tick, 2), partial(clock.tick, 8)),
              {"time": (None, 1), "memory": (None, 1), "speed": (5, None)})
    monkeypatch.setattr(cost, "in_a_process", lambda function, make, arguments, which, uses: (300, 100)[which])
    figures = [bench.figure_of(row, quantity, SMALL, 4) for quantity in row.targets]
    assert [(f["quantity"], f["ratio"], f["reached"]) for f in figures] == [
        ("time", 0.25, True), ("memory", 3.0, False), ("speed", 4.0, False)]
    assert figures[0]["ours"] == [2] * 4 and figures[1]["theirs"] == [100] * 4


def allocate(*sizes):
    return [partial(lambda size: torch.ones(size // 4).sum(), size) for size in sizes]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="reads /proc")
def test_the_peak_of_a_side_is_measured_in_a_process_of_its_own():
    torch.ones(2 ** 26).sum()  # 256 MiB here are none there
    (small,), (large,) = cost.peaks(allocate, (32 * 2 ** 20, 96 * 2 ** 20), 1)
    assert 62 < (large - small) / 2 ** 20 < 66 and large < 110 * 2 ** 20


def kept_by_the_heap():
    """How many bytes stay with a process whose peak is measured after a tensor of 10 MiB is freed."""
    kept = []

    def side():
        torch.ones(30 * 2 ** 18)  # with it freed, glibc would keep all that is smaller
        before = resident()
        torch.ones(10 * 2 ** 18)
        kept.append(resident() - before)
    cost.peak_of(lambda: [side], (), 0, 1)
    return kept[0]


def resident():
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_available(), reason="reads /proc")
def test_what_is_freed_is_no_part_of_a_peak():
    assert cost.in_a_process(kept_by_the_heap) < 2 ** 20


def test_what_is_not_installed_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(bench, "ROWS", rows(1)[:1] + rows(6))
    monkeypatch.setattr(bench, "TrainConfig", lambda **options: SMALL)
    results = bench.main(["--repeats", "1"])
    assert [figure.get("missing") for figure in results["figures"]] == ["peft", None]
    assert "| not measured: needs peft |" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- reporting
def figure(number, what, on, ratio, **more):
    return {"row": number, "what": what, "against": "that", "quantity": "time", "target": [None, 1.05], "on": on,
            "ratio": ratio, "quartiles": [ratio - 0.1, ratio + 0.1], "reached": ratio <= 1.05} | more


def test_the_table_says_what_the_results_say():
    results = {"columns": ["mini", "a/real"], "on": "a card", "repeats": 7, "dtype": "bfloat16", "figures": [
        figure(1, "a", "mini", 1.0), figure(1, "a", "a/real", 1.2), figure(4, "b, 5 → 6", "a/real", 0.5),
        figure(5, "c", "mini", 0.7, missing="peft"), figure(5, "c", "mini", 7.0, target=[5, None], reached=True),
        figure(6, "d", "a/real", 1.0, target=[0.97, 1.03])]}
    assert bench.figure_table(json.loads(json.dumps(results))).splitlines() == [
        "|  |  | against | target | mini | real |", "|---|---|---|---|---|---|",
        "| 1 | a: time | that | at most 1.05 | 1.00 (0.90-1.10) | 1.20 (1.10-1.30), not reached |",
        "| 4 | b, 5 → 6: time | that | at most 1.05 |  | 0.50 (0.40-0.60) |",
        "| 5 | c: time | that | at most 1.05 | not measured: needs peft |  |",
        "| 5 | c: time | that | at least 5 | 7.00 (6.90-7.10) |  |",
        "| 6 | d: time | that | 0.97 to 1.03 |  | 1.00 (0.90-1.10) |", "",
        "Ratios, medians of 7 turns of each side (of memory at most 5), with their quartiles; weights in bfloat16.",
        "On a card."]


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    returned = bench.main(["--rows", "6", "--repeats", "2", "--device", "cpu", "--out", str(tmp_path / "new/a.json")])
    written = json.loads((tmp_path / "new/a.json").read_text())
    assert written == returned and capsys.readouterr().out.strip() == bench.figure_table(written)
    only, = written["figures"]
    assert "thread" in written["on"] and f"torch {torch.__version__}" in written["on"]
    assert len(only["ours"]) == 2 and only["on"] == "mini" and only["target"] == [None, 1.05]


def test_where_is_measured_what(monkeypatch):
    seen = []

    def figure_of(row, quantity, config, repeats):
        seen.append((row.number, quantity, config))
        return {"missing": "all"} | figure(row.number, row.what, "", 1.0)
    monkeypatch.setattr(bench, "figure_of", figure_of)
    monkeypatch.setattr(bench, "load_tasks", lambda names: [None] * 2)
    results = bench.main([])
    assert sorted({number for number, *_ in seen}) == [1, 3, 4, 5, 6, 7, 8, 10]
    assert {config.model for *_, config in seen} == {"mini"}
    assert {(f["row"] == 4, f["on"]) for f in results["figures"]} == {(False, "mini"), (True, "real size")}
    assert {f["what"].split(", ")[2] for f in results["figures"] if f["row"] == 4} == {"576 → 1536", "896 → 4864"}
    seen.clear()
    results = bench.main(["--model", "some/model", "--tasks", "x", "y", "--rows", "2", "4", "6"])
    assert [(number, quantity, config.model) for number, quantity, config in seen if number != 4] == [
        (2, "time", "some/model"), (2, "time", "some/model"), (6, "time", "mini"), (6, "time", "some/model")]
    assert {f["on"] for f in results["figures"] if f["row"] == 4} == {"some/model"}
    assert seen[0][2].tasks == ["x", "y"] and seen[0][2].batch_size == 16
    monkeypatch.setattr(bench, "load_tasks", lambda names: [None])
    with pytest.raises(ValueError, match="from 2 to 64 tasks"):
        bench.main([])


# -------------------------------------------------------------------------------- the two sides of a row do one work
def test_all_ten_rows_are_there_with_the_targets_that_were_set():
    assert [(row.number, row.targets) for row in ROWS] == [
        (1, {"time": (None, 1.0)}), (1, {"time": (None, 1.0)}), (2, {"time": (None, 1.12)}),
        (2, {"time": (None, 1.25)}), (3, {"time": (None, 1.25)}),
        *[(4, {"time": (None, 0.75), "memory": (None, 0.8)})] * 2,
        *[(4, {"time": (None, 0.5), "memory": (None, 0.5)})] * 2, (5, {"time": (None, 1.0), "memory": (None, 1.0)}),
        (5, {"time": (None, 1.0), "memory": (None, 1.0)}), (6, {"time": (None, 1.05)}), (7, {"time": (None, 1.25)}),
        (8, {"time": (None, 1.05)}), (9, {"time": (None, 0.75)}), (10, {"speed": (5.0, None)})]
    assert all(pickle.loads(pickle.dumps(row.sides)) for row in ROWS)  # for memory they go to other processes


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_pefts_step_has_our_loss(monkeypatch, dropout):
    pytest.importorskip("peft")
    row = rows(1)[dropout > 0]
    assert row.sides.keywords == {"dropout": dropout}
    losses = record(monkeypatch, train, "label_loss")
    sides = row.sides(SMALL)
    for side in sides:
        side()
    parameters = [[p for p in model.parameters() if p.requires_grad] for (model, _), _ in losses]
    with torch.no_grad():
        for a, b in zip(*parameters):
            b.copy_(a.normal_(std=0.1))
    for side in sides:
        torch.manual_seed(0)
        side()
    ((model, batch), loss), ((_, other_batch), other_loss) = losses[2:]
    assert torch.equal(batch["input_ids"], other_batch["input_ids"]) and [len(p) for p in parameters] == [70, 70]
    assert not torch.equal(batch["input_ids"], losses[0][0][1]["input_ids"])  # the second of the batches
    torch.testing.assert_close(loss, other_loss)
    for a, b in zip(*parameters):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {dropout}


def test_a_step_is_one_of_train_at_its_peak_rate_and_never_ends():
    """AdamW, clipping and the schedule are those of `train`; after the last batch comes the first again."""
    config, model, batches = cost.begin_run(SMALL)
    drawn = cost.some_batches(batches)
    side = cost.stepper(model, replace(config, steps=2), drawn[:2])
    assert len(drawn) == cost.WARM_UP + cost.STEPS
    steps = [side() for _ in range(5)]
    assert [number for number, _ in steps] == [1, 2, 3, 4, 5]
    assert all(metrics["lr"] == pytest.approx(config.lr) and metrics["gradient_norm"] > 0 for _, metrics in steps)
    losses = [metrics["loss"].item() for _, metrics in steps]
    assert losses[4] < losses[2] < losses[0]  # it learns: the same batch once more


def test_the_floor_has_the_same_loss_and_its_gradient_down_to_the_embeddings(monkeypatch):
    for row, dropout in zip(rows(2), (0.0, 0.05)):
        with monkeypatch.context() as patch:
            ours, theirs = (record(patch, module, "label_loss") for module in (train, bench))
            for side in row.sides(SMALL):
                side()
        torch.testing.assert_close(ours[0][1], theirs[0][1])  # B is zero
        frozen, model = theirs[0][0][0], ours[0][0][0]
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        assert {a.dropout.p for a in find_adapters(model).values()} == {dropout} and not find_adapters(frozen)
        hidden = []
        frozen.get_input_embeddings().register_forward_hook(lambda m, i, o: hidden.append(o))
        theirs[0][0][0](ours[0][0][1]["input_ids"]).logits.sum().backward()
        assert hidden[0].grad.any()


@pytest.mark.parametrize("number, index, expected", [
    (3, 0, [("rlora", None), ("lora", None)]), (5, 0, [("rlora", 0.1), ("hydralora", 0.1)]),
    (5, 1, [("rlora", 0.0), ("hydralora", 0.0)]), (6, 0, [("align", "kl"), ("lora", None)]),
    (7, 0, [("align", "mmd"), ("lora", None)])])
def test_two_methods_step_through_the_same_batches(monkeypatch, number, index, expected):
    steppers, losses = record(monkeypatch, cost, "stepper"), record(monkeypatch, train, "label_loss")
    alignments = record(monkeypatch, train, "alignment_loss")
    for side in rows(number)[index].sides(SMALL):
        side(), side()
    for ((_, config, _), _), (method, extra) in zip(steppers, expected):
        assert config.method == method
        assert extra is None or extra == (config.align if method == "align" else config.dropout)
    assert len(alignments) == 2 * (expected[0][0] == "align")
    batches = [batch["input_ids"] for (_, batch), _ in losses]
    assert torch.equal(batches[0], batches[2]) and torch.equal(batches[1], batches[3])
    assert batches[0].shape != batches[1].shape or not torch.equal(*batches[:2])
    assert len(losses[0][0][1]["task_ids"].unique()) == 8


@pytest.mark.parametrize("heads", [5, 16])
def test_the_loop_over_heads_computes_what_the_layer_computes(heads):
    assert {(row.sides.func, row.sides.keywords["heads"], row.sides.keywords["shape"]) for row in rows(4)} == {
        (bench.layer_and_loop, count, shape) for count in (5, 16) for shape in bench.SHAPES}
    layer, loop = (side.args[0] for side in bench.layer_and_loop(SMALL, (12, 20), heads))
    assert loop.args == (layer,) and len(layer.heads) == heads and layer.training and layer.head_dropout.p == 0.1
    torch.nn.init.normal_(layer.router.weight)
    layer.eval()
    x = torch.randn(7, 12, requires_grad=True)
    torch.testing.assert_close(layer(x), loop(x))
    inputs = [x, layer.lora_A.weight, layer.heads, layer.router.weight]
    torch.testing.assert_close(torch.autograd.grad(layer(x).sin().sum(), inputs),
                               torch.autograd.grad(loop(x).sin().sum(), inputs), atol=1e-5, rtol=1e-4)
    ours, theirs = (side() for side in bench.layer_and_loop(SMALL, (12, 20), heads))
    assert [g.shape for g in ours] == [g.shape for g in theirs] == [(1024, 12), (heads, 20, 8), (8, 12), (heads, 12)]


def test_a_round_and_the_steps_compute_gradients_on_the_same_batches(monkeypatch):
    ours, theirs = rows(8)[0].sides(SMALL)
    inner, outer = record(monkeypatch, meta, "label_loss"), record(monkeypatch, train, "label_loss")
    for _ in range(2):  # a second round is on the same batches again
        inner.clear(), outer.clear()
        ours()
        assert len(inner) == 6 and not outer  # n = 2 tasks, k = 2 steps and a query
        theirs()
        assert len(inner) == 6 and len(outer) == 6
        seen = [[args[1]["input_ids"].tolist() for args, _ in calls] for calls in (inner, outer)]
        assert seen[0] == seen[1] and len(seen[0][0]) == 2


def test_the_trainer_sees_the_samples_of_our_run(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(bench, "RUN_STEPS", 3)
    ours, seen = record(monkeypatch, train, "label_loss"), []
    peft_model = bench.peft_model

    def watched(*args):
        model = peft_model(*args)
        model.register_forward_pre_hook(lambda m, a, options: seen.append(options), with_kwargs=True)
        return model
    monkeypatch.setattr(bench, "peft_model", watched)
    run, trainer = rows(9)[0].sides(SMALL)
    for _ in range(2):  # a second run goes through the same samples again
        ours.clear(), seen.clear()
        assert len(run()) == 3
        trainer()
        batches = [args[1] for args, _ in ours]
        assert len(batches) == len(seen) == 3
        for a, b in zip(batches, seen):
            samples = [sorted((ids[real > 0].tolist(), labels[real > 0].tolist()) for ids, real, labels in zip(
                batch["input_ids"], batch["attention_mask"], batch["labels"])) for batch in (a, b)]
            assert samples[0] == samples[1] and len(samples[0]) == 8
    assert {len(adapter_parameters(args[0])) for args, _ in ours} == {70}


def test_the_plain_loop_gives_the_same_answers():
    ours, theirs = rows(10)[0].sides(SMALL)
    answers = ours()
    pairs = [(answer.removesuffix("…").strip(), plain) for answer, plain in zip(answers, theirs(), strict=True)]
    assert all(answer.startswith(plain) for answer, plain in pairs)  # in a batch there is room for its longest target
    assert sum(answer == plain != "" for answer, plain in pairs) > len(pairs) / 2
    assert len(answers) == 16 and len(set(answers)) > 5  # two of each of eight tasks


@pytest.mark.slow
def test_the_real_command(tmp_path):
    """Rows that are measured by turns, in processes of their own, and with a library that may be missing."""
    result = command("--rows", 1, 5, "--repeats", 1, "--device", "cpu", "--out", "b.json", cwd=tmp_path,
                     module="lab.bench")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "b.json").read_text())
    assert bench.figure_table(results) == result.stdout.strip() and len(results["figures"]) == 2 + 4
    assert all(f["ratio"] > 0 for f in results["figures"] if "missing" not in f)
