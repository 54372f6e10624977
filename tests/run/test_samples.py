"""What is said of samples before a run takes its time, and what is refused."""

import io
import json
import sys
import unicodedata

import pytest
from conftest import run
from tokenizers import AddedToken, normalizers, processors
from transformers import AutoTokenizer

from tinylora_mtl.batching import encode_prompt
from tinylora_mtl.data.tasks import Task
from tinylora_mtl.evaluate import is_right
from tinylora_mtl.run import cli, scoring
from tinylora_mtl.run.models import MINI, load_model
from tinylora_mtl.run.samples import check_samples


@pytest.fixture(scope="module")
def mini():
    return load_model("mini", "cpu")[:2]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": p, "target": a}, ensure_ascii=False) + "\n" for p, a in rows),
                    encoding="utf-8")


def said(capsys, mini, *tasks, tokenizer=None, score="generate", training=False, max_length=100):
    check_samples(mini[0], tokenizer or mini[1], tasks, "test", max_length, score, training)
    return capsys.readouterr().out.splitlines()


QUESTION = "navigate Answer:"
CLOSED = [(f"{QUESTION} {i}", ("Yes", "No")[i % 2]) for i in range(20)]


def test_nothing_is_said_of_good_samples(capsys, mini):
    assert said(capsys, mini, Task("t", CLOSED, [], [("a", "Yes")], ("No", "Yes")), training=True) == []
    assert said(capsys, mini, Task("t", CLOSED, [], [("a", " yes.")], ("No", "Yes")), score="choose") == []


def test_labels_that_only_the_test_split_has_are_told(capsys, mini):
    task = Task("rare", CLOSED, [], [("a", "Yes"), ("b", "maybe"), ("c", "maybe"), ("d", "No")], ("No", "Yes"))
    assert said(capsys, mini, task, score="choose") == [
        "task 'rare': 2 of 4 test targets can never be matched, 'maybe' for one: none of the training labels"]


def test_targets_that_the_tokenizer_changes_are_told(capsys, mini):
    end = mini[1].eos_token
    task = Task("t", CLOSED, [], [("a", f"Yes {end} No"), ("b", end), ("c", "Yes")])
    assert said(capsys, mini, task) == [f"task 't': 2 of 3 test targets can never be matched, 'Yes {end} No' for one: "
                                        "changed by the tokenizer, or ended too soon"]
    unknown = Task("zh", CLOSED, [], [("a", "\u597d"), ("b", "Yes")])
    found = said(capsys, mini, unknown)
    survives = is_right(mini[1].decode(mini[1](" \u597d", add_special_tokens=False)["input_ids"]), "\u597d")
    assert (found == []) == survives


def test_targets_with_an_end_token_of_the_models_own_are_told(capsys, mini):
    model, ids = mini[0], mini[1](" Yes", add_special_tokens=False)["input_ids"]
    task, own = Task("t", CLOSED, [], [("a", "Yes"), ("b", "No")], ("No", "Yes")), model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [own, ids[0]]
        assert said(capsys, mini, task)[0].startswith("task 't': 1 of 2 test targets can never be matched, 'Yes' for one")
        for wrong in ("</s>", [2, None], [[2]]):
            model.generation_config.eos_token_id = wrong
            with pytest.raises(ValueError, match="eos_token_id of the model's generation settings is no token's"):
                said(capsys, mini, task)
    finally:
        model.generation_config.eos_token_id = own


def test_composed_and_decomposed_characters_are_the_same(capsys, mini):
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    decomposed = unicodedata.normalize("NFD", "fünf")
    assert decomposed != "fünf" and is_right("fünf", decomposed) and is_right(decomposed, "FÜNF")
    assert said(capsys, mini, Task("t", CLOSED, [], [("a", decomposed)]), tokenizer=tokenizer) == []


def test_cut_prompts_are_counted_in_training_too(capsys, mini):
    long = [("word " * 60 + str(i), "Yes") for i in range(3)]
    task = Task("t", CLOSED + long, [], [("a", "Yes"), long[0]])
    assert said(capsys, mini, task, max_length=40, training=True) == [
        "3 of 23 training prompts are too long for --max-length 40: their beginning is cut",
        "1 of 2 test prompts are too long for --max-length 40: their beginning is cut"]
    assert said(capsys, mini, task, max_length=40) == [
        "1 of 2 test prompts are too long for --max-length 40: their beginning is cut"]


def test_prompts_that_another_task_trains_on_are_counted(capsys, mini):
    test = [("Is 1 good?", "red"), ("Is  2 good? ", "blue"), ("Is 3 good?", "red")]
    tasks = [Task("a", [("Is 1 good?", "yes"), ("Is 2 good?", "no")], [], [("Is 4 good?", "yes")]),
             Task("b", [("Is 5 good?", "red")], [], test)]
    assert said(capsys, mini, *tasks, training=True) == [
        "2 of 3 test prompts of task 'b' are training prompts of task 'a'"]


def test_tokens_that_the_model_does_not_have_are_refused_only_where_they_come(mini, capsys):
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    rows = mini[0].get_input_embeddings().weight.shape[0]
    while len(tokenizer) < rows:
        tokenizer.add_tokens(f"filler{len(tokenizer)}")
    tokenizer.add_tokens([AddedToken("<|user|>", special=True)])
    assert said(capsys, mini, Task("t", CLOSED, [], CLOSED), tokenizer=tokenizer, training=True) == []
    for task in (Task("t", CLOSED, [], [("<|user|> a", "Yes")]), Task("t", CLOSED, [], [("a", "<|user|>")])):
        with pytest.raises(ValueError, match=rf"task 't' has .* token '<|user|>', number {rows} .* for {rows} tokens"):
            said(capsys, mini, task, tokenizer=tokenizer)
    for task in (Task("t", [("<|user|> a", "Yes")], [], CLOSED), Task("t", CLOSED, [], CLOSED, ("Yes", "<|user|>"))):
        with pytest.raises(ValueError, match="task 't' has a sample with the token"):
            said(capsys, mini, task, tokenizer=tokenizer, training=True)


def test_a_prompt_without_tokens_is_refused(capsys, mini):
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    for begin in (True, False):  # with a begin token before it, it is as empty
        if not begin:
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        with pytest.raises(ValueError, match="task 't' has a prompt without a single token: '.u200b'"):
            said(capsys, mini, Task("t", CLOSED, [], [("\u200b", "Yes")]), tokenizer=tokenizer)


def test_start_tokens_are_not_put_before_a_prompt_that_has_them(mini):
    start, text = mini[1].bos_token, "one two three four five"
    plain = encode_prompt(mini[1], text, 50)
    assert plain[0] == mini[1].bos_token_id and encode_prompt(mini[1], start + text, 50) == plain
    assert encode_prompt(mini[1], start + text, 4) == encode_prompt(mini[1], text, 4) == plain[:1] + plain[-3:]


def test_meta_takes_what_there_is_if_nobody_asked_for_more(tmp_path):
    write(tmp_path / "t" / "train.jsonl", [(f"q{i} Answer:", "Yes") for i in range(40)])
    write(tmp_path / "t" / "validation.jsonl", CLOSED[:4])
    found = run(tmp_path / "run", tasks=(str(tmp_path / "t"), "word_sorting"), method="meta", samples=None)
    assert found["method"] == "meta"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["samples"] is None
    stored = json.loads((tmp_path / "run" / "fingerprints.json").read_text())["tasks"]
    assert [stored[name]["train"]["samples"] for name in ("t", "word_sorting")] == [40, 50]
    with pytest.raises(ValueError, match="50 training samples are asked for, but task 't' has 40"):
        run(tmp_path / "other", tasks=(str(tmp_path / "t"),), method="meta", samples=50)


def test_what_a_console_cannot_show_is_escaped_and_the_table_comes_first(tmp_path, monkeypatch):
    write(tmp_path / "zh" / "test.jsonl", [("\u95ee\u9898 1", "\u597d"), ("\u95ee\u9898 2", "\u574f")])
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", narrow)
    cli.run_command(lambda: scoring.command(["--tasks", str(tmp_path / "zh"), "--show", "1", "--device", "cpu"]))
    narrow.flush()
    lines = narrow.buffer.getvalue().decode("cp1252").splitlines()
    assert any(line.startswith("[zh] \\u95ee\\u9898 1") for line in lines)
    assert lines.index(next(line for line in lines if line.startswith("average"))) < lines.index("[zh] \\u95ee\\u9898 1")
