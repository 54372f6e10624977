"""Tasks of one's own: JSON Lines files and folders, read right or refused by line number."""

import json
import re

import pytest

from tinylora_mtl.config import TrainConfig
from tinylora_mtl.data.tasks import load_tasks, require_samples
from tinylora_mtl.run import training
from tinylora_mtl.run.cli import run_command


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt, "target": target}) + "\n" for prompt, target in rows))
    return str(path)


def rows(count, prefix="q", answers="ab"):
    return [(f"{prefix}{i} Answer:", answers[i % len(answers)]) for i in range(count)]


def test_a_folder_keeps_its_splits(tmp_path):
    for split, count in {"train": 30, "validation": 5, "test": 7}.items():
        write(tmp_path / "reviews" / f"{split}.jsonl", rows(count, split))
    task, = load_tasks([str(tmp_path / "reviews")])
    assert task.name == "reviews" and task.labels == ("a", "b")
    assert (task.train, task.validation, task.test) == (rows(30, "train"), rows(5, "validation"), rows(7, "test"))


def test_a_folder_without_validation_gives_a_tenth_of_its_training_samples(tmp_path):
    write(tmp_path / "t" / "train.jsonl", rows(95) + [("q3 Answer:", "again")])
    write(tmp_path / "t" / "test.jsonl", rows(8, "test"))
    task, = load_tasks([str(tmp_path / "t")])
    assert 3 < len(task.validation) < 20 and len(task.train) + len(task.validation) == 96 and len(task.test) == 8
    assert sorted(task.train + task.validation) == sorted(rows(95) + [("q3 Answer:", "again")])
    assert not {prompt for prompt, _ in task.train} & {prompt for prompt, _ in task.validation}
    assert load_tasks([str(tmp_path / "t")], seed=5) == [task]


def test_held_out_splits_are_bounded(tmp_path):
    task, = load_tasks([write(tmp_path / "many.jsonl", rows(6000))])
    assert (len(task.validation), len(task.test)) == (200, 500) and 4700 < len(task.train) < 4900


def splits_of(task):
    return {prompt: split for split in ("train", "validation", "test") for prompt, _ in getattr(task, split)}


def test_the_split_of_a_prompt_does_not_change(tmp_path):
    """However the file grows or shrinks, is sorted or called; also where a split is full, which may only leave out."""
    def load(name, samples):
        task, = load_tasks([write(tmp_path / name, samples)])
        return splits_of(task)

    few, many = load("few.jsonl", rows(300)), load("many.jsonl", rows(8000)[::-1])
    assert few == load("other.jsonl", rows(300)[::-1]) == load("few.jsonl", rows(300))
    assert len(few) == 300 and sorted(set(few.values())) == ["test", "train", "validation"]
    kept = {prompt: split for prompt, split in many.items() if prompt in few}
    assert all(few[prompt] == split for prompt, split in kept.items())
    assert {few[prompt] for prompt in set(few) - set(kept)} == {"test", "validation"}
    assert 7000 < len(many) < 7300  # a fifth is held out, and of that 700 are kept


def test_a_prompt_is_the_same_with_other_spaces_or_composed_otherwise(tmp_path):
    """In another place of the file it is in the same split; beside a test split it is dropped."""
    twice = [(f"Is café  {i} good? ", "yes") for i in range(200)]
    other = [(f"Is cafe\u0301 {i} good?", "no") for i in range(200)]
    task, = load_tasks([write(tmp_path / "t.jsonl", twice + other)])
    found = splits_of(task)
    assert all(found[one] == found[same] for (one, _), (same, _) in zip(twice, other))
    write(tmp_path / "f" / "train.jsonl", other)
    write(tmp_path / "f" / "test.jsonl", twice[:20])
    assert len(load_tasks([str(tmp_path / "f")])[0].test) == 20
    assert len(splits_of(load_tasks([str(tmp_path / "f")])[0])) == 200


def test_at_most_so_many_samples_are_kept(tmp_path):
    write(tmp_path / "t" / "train.jsonl", rows(60))
    task, = load_tasks([str(tmp_path / "t")])
    assert load_tasks([str(tmp_path / "t")], at_most=500) == load_tasks([str(tmp_path / "t")], len(task.train))
    assert len(load_tasks([str(tmp_path / "t")], at_most=5)[0].train) == 5
    with pytest.raises(ValueError, match="500 training samples are asked for"):
        load_tasks([str(tmp_path / "t")], 500, at_most=5)


def test_a_file_is_split_by_prompt_and_the_task_has_its_name(tmp_path):
    """Each prompt comes three times; its samples are never in two splits."""
    task, = load_tasks([write(tmp_path / "own.jsonl", 3 * rows(50))])
    assert task.name == "own" and len(task.train) + len(task.validation) + len(task.test) == 150
    prompts = [{prompt for prompt, _ in split} for split in (task.train, task.validation, task.test)]
    assert len(set.union(*prompts)) == 50 == sum(map(len, prompts))


def test_training_prompts_that_are_tested_are_dropped(tmp_path):
    write(tmp_path / "t" / "train.jsonl", rows(40))
    write(tmp_path / "t" / "validation.jsonl", rows(4))
    write(tmp_path / "t" / "test.jsonl", rows(40)[3:9])
    task, = load_tasks([str(tmp_path / "t")])
    assert (task.train, task.validation, task.test) == (rows(40)[9:], rows(3), rows(40)[3:9])


def test_no_test_prompt_gets_into_validation(tmp_path):
    write(tmp_path / "t" / "train.jsonl", rows(100))
    write(tmp_path / "t" / "test.jsonl", rows(50))
    task, = load_tasks([str(tmp_path / "t")])
    assert len(task.test) == 50 and len(task.validation) + len(task.train) == 50 and task.validation
    assert not set(task.test) & set(task.validation + task.train)


def test_a_task_for_evaluation_only(tmp_path):
    write(tmp_path / "bbh" / "test.jsonl", rows(20))
    task, = load_tasks([str(tmp_path / "bbh")])
    assert task.train == task.validation == [] and len(task.test) == 20 and task.labels == ("a", "b")
    require_samples([task], "test")
    with pytest.raises(ValueError, match="task 'bbh' has no train samples; it has: 20 test"):
        require_samples([task], "test", "train")


@pytest.mark.parametrize("targets,labels", [
    (["yes", "no"] * 10, ("no", "yes")), ([str(i) for i in range(21)] * 9, ()),  # too many
    (["a", "b", "c", "d"] * 4, ()), (["a", "b", "c"] * 10, ("a", "b", "c"))])  # each too seldom
def test_closed_label_sets(tmp_path, targets, labels):
    write(tmp_path / "t" / "test.jsonl", [(f"q{i}", target) for i, target in enumerate(targets)])
    assert load_tasks([str(tmp_path / "t")])[0].labels == labels


def test_names_files_and_folders_mix(tmp_path):
    write(tmp_path / "t" / "train.jsonl", rows(20))
    names = ["navigate", str(tmp_path / "t") + "/", write(tmp_path / "f.jsonl", rows(20)), "word_sorting"]
    assert [task.name for task in load_tasks(names)] == ["navigate", "t", "f", "word_sorting"]
    with pytest.raises(ValueError, match="task 'f' is asked for more than once"):
        load_tasks([*names, write(tmp_path / "other" / "f.jsonl", rows(20))])


def test_labels_do_not_depend_on_how_many_samples_are_kept(tmp_path):
    path = write(tmp_path / "t.jsonl", rows(200, answers="abcdefghij"))
    few, = load_tasks([path], samples=4)
    assert len(few.train) == 4 and few.labels == tuple("abcdefghij")


GOOD = {
    "a byte-order mark": b'\xef\xbb\xbf{"prompt": "p", "target": "t"}\n',
    "CRLF": b'{"prompt": "p", "target": "t"}\r\n\r\n',
    "no last newline": b'{"prompt": "p", "target": "t"}',
    "blank lines": b'\n\n{"prompt": "p", "target": "t"}\n \n',
    "more columns": b'{"id": 3, "prompt": "p", "target": "t", "meta": {"x": [1]}}\n',
    "white space around the target": b'{"prompt": "p", "target": " t \\n"}\n',
}


@pytest.mark.parametrize("kind", GOOD)
def test_files_that_are_read(tmp_path, kind):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "test.jsonl").write_bytes(GOOD[kind])
    assert load_tasks([str(tmp_path / "t")])[0].test == [("p", "t")]


def test_any_script_and_very_long_lines_are_read_whole(tmp_path):
    samples = [("\U0001f600 \u05e9\u05dc\u05d5\u05dd \u202e abc \u2028 \x85 line", "\u4f60\u597d"),
               ("long " * 2_000_000, "x")]
    text = "".join(json.dumps({"prompt": p, "target": t}, ensure_ascii=False) + "\n" for p, t in samples)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "test.jsonl").write_text(text, encoding="utf-8", newline="\n")
    assert load_tasks([str(tmp_path / "t")])[0].test == samples


FINE = b'{"prompt": "p", "target": "t"}\n'
BAD = {
    "no target": (FINE + b'{"prompt": "p", "answer": "t"}\n', "line 2: the row has no 'target'; it has: prompt, ans"),
    "no prompt": (FINE + b'{"target": "t"}\n', "line 2: the row has no 'prompt'"),
    "half a character": (b'{"prompt": "p", "target": "y\\ud83d"}\n', "line 1: 'utf-8' codec can't encode character"),
    "very deep": (FINE + b"[" * 200_000 + b"\n", "line 2: maximum recursion depth"),
    "an empty object": (b"{}\n", "line 1: the row has no 'prompt'; it has: nothing"),
    "an empty target": (b"\n" + FINE + b'{"prompt": "p", "target": " "}\n', "line 3: 'target' must be a text"),
    "an empty prompt": (b'{"prompt": "", "target": "t"}\n', "line 1: 'prompt' must be a text"),
    "a number": (b'{"prompt": "p", "target": 5}\n', "line 1: 'target' must be a text that is not empty, got 5"),
    "null": (b'{"prompt": "p", "target": null}\n', "line 1: 'target' must be a text"),
    "a line break in the target": (b'{"prompt": "p", "target": "a\\nb"}\n', "line 1: 'target' has a line break"),
    "a list": (FINE + b'["p", "t"]\n', "line 2: the row is not an object"),
    "no JSON": (FINE + FINE + b"prompt,target\n", "line 3: Expecting value"),
    "one JSON array": (b'[{"prompt": "p", "target": "t"}]', "line 1: the row is not an object"),
    "half a row": (FINE + b'{"prompt": "p", "tar', "line 2: Unterminated string"),
    "Latin-1": (FINE + '{"prompt": "é", "target": "t"}\n'.encode("latin-1"), "line 2: 'utf-8' codec can't decode"),
    "UTF-16": (FINE.decode().encode("utf-16"), "line 1: 'utf-16-le' codec can't decode"),
    "nothing": (b"", "holds no sample; a line is"),
    "blank lines only": (b"\n  \r\n", "holds no sample"),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_are_refused_by_line(tmp_path, capsys, kind):
    content, message = BAD[kind]
    path = tmp_path / "t.jsonl"
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: training.command(["--tasks", str(path), "--out", str(tmp_path / "run")]))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and len(printed.err.splitlines()) == 1
    assert re.match(f"error: .*t.jsonl(, | ){re.escape(message)}", printed.err), printed.err
    assert [item.name for item in tmp_path.iterdir()] == ["t.jsonl"]


@pytest.mark.parametrize("flags,message", [
    ("--tasks {0}/empty", "empty is not a task: the folder has neither train.jsonl nor test.jsonl"),
    ("--tasks {0}/nowhere", "unknown task '{0}/nowhere'; there are: mini, mini-multilingual, boolean_expressions"),
    ("--tasks {0}/t {0}/t", "task 't' is asked for more than once"),
    ("--tasks {0}/t word_sorting --samples 19", "19 training samples are asked for, but task 't' has 17"),
    ("--tasks {0}/t word_sorting --max-length 2 --split validation", "an answer of 2 tokens leaves no room for its prom"),
    ("--tasks {0}/only_test word_sorting", "task 'only_test' has no train samples; it has: 20 test"),
    ("--tasks {0}/t word_sorting", "task 't' has no test samples; it has: 17 train, 3 validation; --split valid"),
    ("--tasks {0}/one.jsonl word_sorting", "task 'one' has no test samples; .* give more rows, or a fold"),
    ("--tasks {0}/free word_sorting --split validation --score choose", "task 'free' has no closed set of labels")])
def test_tasks_that_cannot_be_trained_on(tmp_path, capsys, flags, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "t" / "train.jsonl", rows(20))
    write(tmp_path / "free" / "train.jsonl", [(f"q{i}", f"a{i}") for i in range(20)])
    write(tmp_path / "only_test" / "test.jsonl", rows(20))
    write(tmp_path / "one.jsonl", rows(1))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: training.command(
            [*flags.format(tmp_path).split(), "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path / "run")]))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and len(printed.err.splitlines()) == 1
    assert re.search(message.format(tmp_path), printed.err), printed.err
    assert sorted(tmp_path.rglob("*")) == before


def test_training_on_a_folder_and_an_embedded_task_together(tmp_path):
    for split in ("train", "test"):
        words = "one two three four".split() * 3
        write(tmp_path / "echo" / f"{split}.jsonl", [(f"say {word} {split} Answer:", word) for word in words])
    results = training.run(TrainConfig(
        tasks=(str(tmp_path / "echo"), "navigate"), method="lora", steps=2, batch_size=4, samples=4, device="cpu",
        score_samples=20, out=str(tmp_path / "run")))
    assert set(results["after"]) == {"echo", "navigate"} and results["samples"] == {"echo": 12, "navigate": 20}
