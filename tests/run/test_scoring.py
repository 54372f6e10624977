"""Scoring whole splits: accuracies, their intervals, the table, and the command."""

import json
import re

import pytest
import torch
from conftest import TINY, command, make_llama, run

from tinylora_mtl import AdapterConfig, add_adapters, evaluate, save_adapter
from tinylora_mtl.batching import encode_target
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.data.tasks import Task, load_tasks, scored_samples, with_shots
from tinylora_mtl.evaluate import EXTRA_TOKENS, prompt_batch
from tinylora_mtl.run import ranking, scoring, training
from tinylora_mtl.run.cli import run_command
from tinylora_mtl.run.models import MINI, load_model
from tinylora_mtl.run.samples import say_cut
from tinylora_mtl.run.scoring import average, average_interval, commonest, interval, table, task_accuracy


@pytest.mark.slow
def test_scoring_prints_no_warnings_of_the_libraries(tmp_path):
    """With both kinds of scoring, in a process of its own: such warnings come once."""
    for score in ("choose", "generate"):
        done = command("--tasks", "navigate", "--score", score, "--score-samples", 50, module="evaluate", cwd=tmp_path)
        assert done.returncode == 0 and not re.search("warning|deprecated", done.stderr, re.IGNORECASE), done.stderr


def test_intervals_are_wilsons():
    """Values of the score interval for 10 trials, as in the tables; and it covers what it should."""
    for right, (low, high) in {0: (0.0, 0.2775), 5: (0.2366, 0.7634), 9: (0.5958, 0.9821), 10: (0.7225, 1.0)}.items():
        assert interval(right / 10, 10) == pytest.approx([low, high], abs=1e-4)
    generator, truth, counts = torch.Generator().manual_seed(0), {"a": 0.98, "b": 0.5, "c": 0.75}, {}
    covered = 0
    for _ in range(2000):
        counts = {"a": 60, "b": 250, "c": 100}
        drawn = {name: (torch.rand(counts[name], generator=generator) < p).double().mean().item()
                 for name, p in truth.items()}
        low, high = average_interval(drawn, counts)
        covered += low <= average(truth) <= high
    assert 0.935 < covered / 2000 < 0.975


def test_accuracy_counts_every_sample():
    model, tokenizer, _ = load_model("mini", "cpu")
    samples = [("order pen axe =", "axe pen"), ("sort ink cup bag =", "bag cup ink"), ("order hen axe =", "hen axe")]
    assert task_accuracy(model, tokenizer, Task("sort", [], [], samples)) == pytest.approx(2 / 3)
    assert not model.training


def test_table_fits_in_80_columns():
    long = "tracking_shuffled_objects"
    columns = {"before": {long: 0.5, "b": 0.0}, "after": {long: 0.25, "b": 1.0},
               "after adapting": {long: 1.0, "b": 1.0}}
    lines = table(columns, {long: 100, "b": 50}, {"b": 0.62}).splitlines()
    assert lines[0].split()[-2:] == ["n", "commonest"]
    assert lines[1].split() == ["tracki…fled_objects", "50.0", "(40-60)", "25.0", "(18-34)", "100.0", "(96-100)",
                                "100", "-"]
    assert lines[2].split()[-2:] == ["50", "62.0"]
    assert lines[3].split() == ["average", "25.0", "(20-31)", "62.5", "(57-67)", "100.0", "(96-100)", "150"]
    assert max(map(len, lines)) <= 80
    assert table(columns, {long: 100, "b": 50}, {"b": 0.62, long: 0.5}).split()[-1] == "56.0"
    del columns["after adapting"]
    assert table(columns, {long: 100, "b": 50}, {}).splitlines()[1].startswith(long)  # two columns leave room for it
    assert max(map(len, table({"after": {"x" * 99: 0.5}}, {"x" * 99: 2000}, {}).splitlines())) <= 80


def test_what_the_commonest_training_answer_gets():
    yes, no = [(f"y{i}", "yes") for i in range(9)], [(f"n{i}", "no") for i in range(6)]
    closed = Task("closed", yes + no, [], [*no, *yes[:2]], ("no", "yes"))
    free, untrained = Task("free", yes, [], no), Task("u", [], [], no, ("no",))
    assert commonest([closed, free, untrained], "test") == {"closed": 2 / 8}
    spelled = Task("s", [(f"p{i}", answer) for i, answer in enumerate(["yes", "Yes", "yes.", "no", "no"])], [],
                   [("a", "YES"), ("b", "no"), ("c", "yes")], ("Yes", "no", "yes", "yes."))
    assert commonest([spelled], "test") == {"s": 2 / 3}  # spelled in three ways, it is still the commonest


def test_shots_are_training_samples_or_else_not_scored():
    train_split = [(f"train {i} Answer:", f"a{i}") for i in range(9)]
    task = Task("t", train_split, [], [("test Answer:", "b"), ("x Answer:", "c")])
    shown = with_shots(task, "test", 2).test
    assert [target for _, target in shown] == ["b", "c"]
    first, second, last = shown[0][0].split("\n\n")
    assert {first, second} <= {f"{prompt} {target}" for prompt, target in task.train} and first != second
    assert last == "test Answer:" and shown[1][0] == f"{first}\n\n{second}\n\nx Answer:"
    own = with_shots(Task("t", [], [], task.train), "test", 3).test
    assert len(own) == 6
    for prompt, target in own:
        *examples, question = prompt.split("\n\n")
        assert len(examples) == 3 and f"{question} {target}" not in examples
    with pytest.raises(ValueError, match="task 't' has 2 samples, too few for 2 shots"):
        with_shots(Task("t", [], [], task.test), "test", 2)


def test_a_shot_is_not_scored_with_other_spaces_either():
    samples = [(f"Is  {i // 2} good? "[i % 2:], "yes") for i in range(8)]
    for prompt, _ in with_shots(Task("t", [], [], samples), "test", 2).test:
        *examples, question = prompt.split("\n\n")
        assert not any(" ".join(example.split()).startswith(" ".join(question.split())) for example in examples)


def test_a_sample_that_comes_twice_is_one_shot():
    twice = with_shots(Task("t", [("a", "x"), ("a", "x"), ("b", "y")], [], [("q", "z")]), "test", 2)
    assert twice.test in ([("a x\n\nb y\n\nq", "z")], [("b y\n\na x\n\nq", "z")])
    with pytest.raises(ValueError, match="has 2 samples, too few for 3 shots"):
        with_shots(Task("t", [("a", "x"), ("a", "x"), ("b", "y")], [], [("q", "z")]), "test", 3)


def test_the_command_scores_a_run_an_adapter_and_the_base(tmp_path, capsys):
    config = TrainConfig(tasks=("word_sorting",), method="lora", steps=30, batch_size=16, out=str(tmp_path / "run"),
                         device="cpu", split="validation", score_samples=100)
    results = training.run(config)
    assert scoring.command(["--run", str(tmp_path / "run")]) == results["after"]  # on the run's own samples
    folder = ["--adapter", str(tmp_path / "run" / "adapter"), "--tasks", "word_sorting", "--split", "validation",
              "--score-samples", "100"]
    assert scoring.command(folder) == results["after"] != results["before"]
    capsys.readouterr()
    assert scoring.command([*folder[2:], "--show", "2"]) == results["before"]
    printed = capsys.readouterr().out
    assert printed.count("[word_sorting] Sort the following words") == 2 and printed.count("the answer is") == 2
    navigate = ["--tasks", "navigate", "--score", "choose", "--show", "1", "--score-samples", "50"]
    assert 0 < scoring.command([*navigate, "--shots", "2"])["navigate"] < 1  # one of two labels
    printed = capsys.readouterr().out
    assert printed.count("Answer: Yes") + printed.count("Answer: No") == 2 and "scored by choose" in printed


def test_prompts_that_are_cut_are_counted_and_told(capsys):
    model, tokenizer, _ = load_model("mini", "cpu")
    samples = scored_samples(load_tasks(["web_of_lies"]), "validation", 40)[0].validation
    lengths = sorted(len(tokenizer(prompt)["input_ids"]) for prompt, _ in samples)
    answer = len(encode_target(tokenizer, "Yes"))
    assert {len(encode_target(tokenizer, target)) for _, target in samples} == {answer}
    long = sum(length > lengths[20] for length in lengths)
    assert 0 < long < 40
    flags = ["--tasks", "web_of_lies", "--split", "validation", "--score", "choose", "--score-samples", "40"]
    scoring.command([*flags, "--max-length", str(lengths[20] + answer)])
    told = (f"{long} of 40 validation prompts are too long for --max-length {lengths[20] + answer}: "
            "their beginning is cut")
    assert told in capsys.readouterr().out.splitlines()
    scoring.command(flags)
    assert "too long" not in capsys.readouterr().out


def said_of_the_part(capsys):
    """The lines printed that tell how many samples were scored."""
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("scored on ")]


def test_what_part_of_the_samples_was_scored_is_told(tmp_path, capsys):
    results = run(tmp_path / "run", method="lora", score_samples=5)
    assert results["samples"] == dict.fromkeys(TINY["tasks"], 5)
    assert json.loads((tmp_path / "run" / "results.json").read_text())["samples"] == results["samples"]
    told = "scored on {} of 1000 validation samples; --score-samples takes more of each task"
    assert said_of_the_part(capsys) == [told.format(10)]
    assert scoring.command(["--run", str(tmp_path / "run")]) == results["after"]  # on the same five
    assert said_of_the_part(capsys) == [told.format(10)]
    scoring.command(["--run", str(tmp_path / "run"), "--score-samples", "7"])
    assert said_of_the_part(capsys) == [told.format(14)]


def test_nothing_is_told_where_all_samples_were_scored(tmp_path, capsys):
    for split in ("train", "test"):
        rows = [{"prompt": f"{split} {i} Answer:", "target": "Yes"} for i in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for more in ({"score_samples": 8}, {"model": str(MINI), "score_samples": None}):
        results = run(tmp_path / "run", tasks=(str(tmp_path),), method="lora", samples=None, split="test",
                      overwrite=True, **more)
        assert list(results["samples"].values()) == [8]
        scoring.command(["--run", str(tmp_path / "run")])
    scoring.command(["--tasks", str(tmp_path), "--score-samples", "9"])
    assert said_of_the_part(capsys) == []


@pytest.mark.parametrize("flags,said", [
    (["--tasks", "mini"], ["scored on 1600 of 8000 test samples; --score-samples takes more of each task"]),
    (["--tasks", "navigate", "--score-samples", "1000"], []), (["--tasks", "navigate", "--model", str(MINI)], [])])
def test_of_the_embedded_model_200_samples_a_task_are_scored(monkeypatch, capsys, flags, said):
    """By its name; by its path it is any model, and all are."""
    monkeypatch.setattr(scoring, "accuracies", lambda model, tokenizer, tasks, *more: {t.name: 0.5 for t in tasks})
    scoring.command(flags)
    assert said_of_the_part(capsys) == said


@pytest.mark.parametrize("flags,message", [
    (["--run", "nowhere"], "nowhere is not a run folder: it has no config.json"),
    (["--adapter", "nowhere"], "nowhere is not an adapter folder: it has no adapter_config.json"),
    (["--tasks", "x"], "unknown task 'x'"), (["--split", "x"], "invalid choice: 'x'"),
    (["--score", "x"], "invalid choice: 'x'"), (["--shots", "-1"], "argument --shots: must be from 0 to"),
    (["--score", "choose"], "task 'word_sorting' has no closed set of labels"),
    (["--tasks", "navigate", "--shots", "501"], "task 'navigate' has 500 samples, too few for 501 shots"),
    (["--dtype", "int8"], "unknown dtype 'int8'; there are: auto, float32"),
    (["--max-length", "300"], "--max-length 300 is more than the 256 positions"),
    (["--score-samples", "0"], "argument --score-samples: must be from 1 to"),
    (["--show", "x"], "invalid int"), (["--show", "-1"], "argument --show: must be from 0 to"),
    (["--max-length", "-5"], "argument --max-length: must be from 1 to")])
def test_bad_input(capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: scoring.command(flags))
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and message in captured.err and len(captured.err.strip().splitlines()) == 1


def test_a_run_of_another_model_is_refused(tmp_path):
    model = make_llama()
    add_adapters(model, AdapterConfig())
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "config.json").write_text(json.dumps({"model": "mini", "tasks": ["navigate"]}))
    with pytest.raises(ValueError, match="does not fit this model"):
        scoring.command(["--run", str(tmp_path), "--tasks", "word_sorting"])
    with pytest.raises(ValueError, match="older version .* so test prompts of task 'navigate' may have been trained on"):
        scoring.command(["--run", str(tmp_path)])


def test_what_is_said_to_be_cut_is_what_is_cut(monkeypatch, capsys):
    model, tokenizer, _ = load_model("mini", "cpu")
    samples = [("word " * 10 + "Answer:", "x"), ("word " * 10 + "Answer:", "x"), ("word " * 7 + "Answer:", "word " * 12),
               ("word " * 3 + "Answer:", "y")]
    task, cut = Task("t", [], [], samples, ("x", "y", "word " * 5)), []

    def watched(model, tokenizer, prompts, max_length):
        cut.extend(len(tokenizer(prompt)["input_ids"]) > max_length for prompt in prompts)
        return prompt_batch(model, tokenizer, prompts, max_length)

    monkeypatch.setattr(evaluate, "prompt_batch", watched)
    monkeypatch.setattr(ranking, "prompt_batch", watched)
    found = set()
    for score, longest in ("generate", len(encode_target(tokenizer, "word " * 12)) + EXTRA_TOKENS), (
            "choose", len(encode_target(tokenizer, "word " * 5))):
        for more in range(1, 40, 2):
            cut.clear()
            scoring.task_answers(model, tokenizer, task, "test", longest + more, score)
            say_cut(model, tokenizer, [task], "test", longest + more, score)
            said = capsys.readouterr().out
            assert len(cut) == 4 and said.startswith(f"{sum(cut)} of 4 test prompts are too long" if any(cut) else "")
            assert any(cut) or said == ""
            found.add(sum(cut))
        with pytest.raises(ValueError, match=f"task 't': an answer of {longest} tokens leaves no room for its prompt in"):
            say_cut(model, tokenizer, [task], "test", longest, score)
    assert found == {0, 2, 3, 4}
