"""Scoring: greedy answers, exact match, and the command."""

import json

import pytest
import torch
from conftest import make_llama

from tinylora_mtl import evaluate, train
from tinylora_mtl.batching import encode_target
from tinylora_mtl.evaluate import generate_answers, is_right, table, task_accuracy
from tinylora_mtl.models import load_model
from tinylora_mtl.tasks import load_tasks
from tinylora_mtl.train import TrainConfig


@pytest.mark.parametrize("answer,target,right", [
    (" Yes", "Yes", True), ("Yes\nNo", "Yes", True), ("\n Yes", "Yes", True), ("ant  axe", "ant axe", True),
    ("No", "Yes", False), ("Yes No", "Yes", False), ("", "Yes", False), ("None\nYes", "Yes", False),
    ("1", "none", False), ("none", "1", False), ("12", "1", False), ("1 2", "12", False), ("yes", "Yes", False)])
def test_exact_match_of_the_first_line(answer, target, right):
    assert is_right(answer, target) is right


def test_answers_are_the_greedy_ones_one_sample_at_a_time():
    """Batched and padded on the left, the answers are those of a plain argmax loop without padding."""
    model, tokenizer, _ = load_model("mini", "cpu")
    samples = [sample for task in load_tasks(["word_sorting", "navigate"]) for sample in task.test[:6]]
    for (prompt, target), answer in zip(samples, generate_answers(model, tokenizer, samples, batch_size=5)):
        ids = tokenizer(prompt)["input_ids"]
        written = []
        while len(written) < len(encode_target(tokenizer, target)):
            token = model(torch.tensor([ids + written])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
        assert tokenizer.decode(written).startswith(answer[:1]) and answer.startswith(tokenizer.decode(written))


def test_accuracy_counts_every_sample():
    model, tokenizer, _ = load_model("mini", "cpu")
    samples = [("order pen axe =", "axe pen"), ("sort ink cup bag =", "bag cup ink"), ("order hen axe =", "hen axe")]
    assert task_accuracy(model, tokenizer, samples) == pytest.approx(2 / 3)
    assert not model.training


def test_long_prompts_are_scored_too():
    model, tokenizer, _ = load_model("mini", "cpu")
    long = ("word " * 400 + "order pen axe =", "axe pen")
    assert len(generate_answers(model, tokenizer, [long], max_length=64)) == 1


def test_table_fits_in_80_columns():
    text = table({"before": {"tracking_shuffled_objects": 0.5}, "after": {"tracking_shuffled_objects": 0.25},
                  "after adapting": {"tracking_shuffled_objects": 1.0}}, ["tracking_shuffled_objects"])
    assert text.splitlines()[1].split() == ["tracking_shuffled_objects", "50.0", "%", "25.0", "%", "100.0", "%"]
    assert max(map(len, text.splitlines())) <= 80


def test_the_command_scores_a_run_an_adapter_and_the_base(tmp_path, capsys):
    config = TrainConfig(tasks=("word_sorting",), method="lora", steps=30, batch_size=16, out=str(tmp_path / "run"),
                         device="cpu", split="validation")
    results = train.main(config)
    assert evaluate.main(["--run", str(tmp_path / "run")]) == results["after"]  # on the run's own split
    folder = ["--adapter", str(tmp_path / "run" / "adapter"), "--tasks", "word_sorting", "--split", "validation"]
    assert evaluate.main(folder) == results["after"] != results["before"]
    capsys.readouterr()
    assert evaluate.main([*folder[2:], "--show", "2"]) == results["before"]
    printed = capsys.readouterr().out
    assert printed.count("[word_sorting] Sort the following words") == 2 and printed.count("the answer is") == 2


def test_a_run_of_another_model_is_refused(tmp_path):
    from tinylora_mtl import AdapterConfig, add_adapters, save_adapter
    model = make_llama()
    add_adapters(model, AdapterConfig())
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "config.json").write_text(json.dumps({"model": "mini", "tasks": ["navigate"]}))
    with pytest.raises(ValueError, match="does not fit this model"):
        evaluate.main(["--run", str(tmp_path)])
