"""Scoring: greedy answers, exact match, and the command."""

import json
import re

import pytest
import torch
from conftest import command, make_llama

from tinylora_mtl import evaluate
from tinylora_mtl.run import training as train
from tinylora_mtl.batching import encode_target
from tinylora_mtl.evaluate import (SLACK, average, average_interval, choose_answers, count_cut, evaluation_mode,
                                   generate_answers, interval, is_right, like_lengths, log_likelihoods, prompt_batch,
                                   table, task_accuracy)
from tinylora_mtl.run.models import load_model
from tinylora_mtl.data.tasks import Task, load_tasks, with_shots
from tinylora_mtl.run.training import TrainConfig


@pytest.mark.parametrize("answer,target,right", [
    (" Yes", "Yes", True), ("Yes\nNo", "Yes", True), ("ant  axe", "ant axe", True), ("yes.", "Yes", True),
    ("No", "Yes", False), ("Yes No", "Yes", False), ("", "Yes", False), ("None\nYes", "Yes", False),
    ("\nYes", "Yes", False), ("No\nAnswer: Yes", "Yes", False), ("I think Yes", "Yes", False),
    ("none", "1", False), ("1", "none", False), ("12", "1", False), ("1 2", "12", False), ("1", "11", False),
    ("1,234", "1234", True), ("1,234", "1,234", True), ("1234", "1,234", True), ("1", "1,234", False),
    ("234", "1,234", False), ("1,2", "12", False), ("1,234,567.0", "1234567", True),
    ("-5", "-5", True), ("5", "-5", False), ("-5", "5", False), ("-5.0", "-5", True), ("- 5", "-5", False),
    ("3.50", "3.5", True), ("3.50", "3.50", True), ("3", "3.50", False), ("3.05", "3.5", False), ("3.", "3", True),
    ("(B)", "B", True), ("B", "(B)", True), ("(b)", "(B)", True), ("(A)", "B", False), ("(A) (B)", "B", False),
    ("A", "(B)", False), ("B) x", "B", False), (") ]", ") ]", True), (") ]", "] )", False), ("( )", "", False),
    ("100", "1E2", False), ("not_entailment", "entailment", False), ("0", "-0", True), ("007", "7", False),
    ("0110", "110", False), ("", ".", False), (".", ".", True), ("12345678901234567890123456789012", "1" * 32, False),
    ("12345678901234567890123456789012", "12345678901234567890123456789013", False)])
def test_normalized_exact_match(answer, target, right):
    assert is_right(answer, target) is right


def script(model, tokenizer, text):
    """Make a model write `text`, whatever it is asked; returns the list of its forward passes' sizes."""
    ids, calls = tokenizer(text, add_special_tokens=False)["input_ids"], []

    def write(module, inputs, logits):
        forced = torch.full_like(logits, -100.0)
        forced[:, -1, ids[min(len(calls), len(ids) - 1)]] = 0.0
        calls.append(logits.shape)
        return forced
    model.lm_head.register_forward_hook(write)
    return calls


@pytest.mark.parametrize("written,answer,passes", [
    (" Yes\nAnswer: No\nAnswer: No", "Yes", 2), ("\nYes", "", 1), (" Yes<pad> No", "Yes", None),
    (" Yes No No No No No No No No No", "Yes No No No No No …", None)])
def test_nothing_invented_after_the_answer_is_read(written, answer, passes):
    """Writing stops at the first line break, in the middle of what the model would go on to invent."""
    model, tokenizer, _ = load_model("mini", "cpu")
    calls = script(model, tokenizer, written)
    got = generate_answers(model, tokenizer, [("navigate Answer:", "Yes"), ("word Answer:", "No")])
    assert got == [answer] * 2
    assert len(calls) == (passes or 2 + SLACK)  # " Yes" and its end token, and the slack


def test_an_answer_that_is_cut_off_is_never_right():
    """' 3.0000000' breaks off after '3.000', which would be the number 3."""
    model, tokenizer, _ = load_model("mini", "cpu")
    script(model, tokenizer, " 3.00000000000001")
    answer, = generate_answers(model, tokenizer, [("x Answer:", "3")])
    assert answer.startswith("3.0") and answer.endswith(" …") and not is_right(answer, "3")


def test_the_end_of_a_chat_models_turn_ends_its_answer():
    model, tokenizer, _ = load_model("mini", "cpu")
    no = tokenizer(" No", add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, no]
    calls = script(model, tokenizer, " Yes No Yes Yes Yes")
    assert generate_answers(model, tokenizer, [("x Answer:", "Yes")]) == ["Yes"] and len(calls) == 2


def test_prompts_give_way_to_the_targets_of_their_own_batch_only():
    """One long target among short ones, as training has it; a target without room is refused before anything runs."""
    model, tokenizer, _ = load_model("mini", "cpu")
    prompts = []
    model.model.register_forward_pre_hook(lambda module, args, kwargs: prompts.append(kwargs["input_ids"].shape),
                                          with_kwargs=True)
    long, short = "word " * 10 + "Answer:", "word " * 7 + "Answer:"
    samples = [(long, "x"), (long, "x"), (short, "word " * 12)]
    whole, left = (len(tokenizer(prompt)["input_ids"]) for prompt in (long, short))
    target = len(encode_target(tokenizer, samples[2][1]))
    longest = target + SLACK + left  # what is left where the long target is
    generate_answers(model, tokenizer, samples, longest, batch_size=2)
    read = [length for _, length in prompts if length > 1]
    assert read == [left, whole] and whole > left + 5
    task = Task("t", [], [], samples)
    assert count_cut(tokenizer, [task], "test", longest) == 0
    assert count_cut(tokenizer, [Task("t", [], [], samples[:2])], "test", whole + SLACK) == 2
    with pytest.raises(ValueError, match=f"task 't': a target of {target} tokens, and 4 to spare, leaves no room"):
        count_cut(tokenizer, [task], "test", target + SLACK)


def test_likelihoods_that_are_not_finite_choose_nothing():
    model, tokenizer, _ = load_model("mini", "cpu")
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits * float("nan"))
    with pytest.raises(FloatingPointError, match="not finite, so none can be chosen; .* try --dtype float32"):
        choose_answers(model, tokenizer, [("x Answer:", "Yes")], ("No", "Yes"))


def test_a_model_without_keys_and_values_cannot_choose():
    from transformers import MambaConfig, MambaForCausalLM
    _, tokenizer, _ = load_model("mini", "cpu")
    model = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="no keys and values to go on from; use --score generate"):
        choose_answers(model, tokenizer, [("x Answer:", "Yes")], ("No", "Yes"))


def test_scoring_prints_no_warnings_of_the_libraries(tmp_path):
    """With both kinds of scoring, in a process of its own: such warnings come once."""
    for score in ("choose", "generate"):
        done = command("--tasks", "navigate", "--score", score, module="evaluate", cwd=tmp_path)
        assert done.returncode == 0 and not re.search("warning|deprecated", done.stderr, re.IGNORECASE), done.stderr


def test_the_chosen_label_is_the_likeliest_whole_answer():
    """Against one forward pass per label, without padding: Σ log p of the label's tokens and of the end token."""
    model, tokenizer, _ = load_model("mini", "cpu")
    torch.manual_seed(0)
    with torch.no_grad():  # a random model, so that no label is favoured by far
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    labels = ("Yes", "No", "1", "10", "axe pen cup", "1 0")
    samples = [(prompt, "Yes") for prompt, _ in load_tasks(["word_sorting"])[0].test[:12]]
    expected = []
    for prompt, _ in samples:
        start, scores = tokenizer(prompt)["input_ids"], []
        for label in labels:
            option = encode_target(tokenizer, label)
            logits = model(torch.tensor([start + option])).logits[0].log_softmax(-1)
            scores.append(sum(logits[len(start) + i - 1, token].item() for i, token in enumerate(option)))
        expected.append(labels[scores.index(max(scores))])
    model.train()
    assert choose_answers(model, tokenizer, samples, labels, batch_size=13) == expected
    assert model.training and len(set(expected)) > 1
    assert choose_answers(model, tokenizer, samples, labels, max_length=12) != expected  # the prompts are cut


def test_nothing_is_dropped_while_scoring():
    """A model that is in training mode answers as in evaluation mode, time after time."""
    from tinylora_mtl import AdapterConfig, add_adapters
    model, tokenizer, _ = load_model("mini", "cpu")
    add_adapters(model, AdapterConfig("rlora", dropout=0.5))
    samples = load_tasks(["navigate"])[0].test[:20]
    prompts = prompt_batch(tokenizer, [prompt for prompt, _ in samples], 200, "cpu")
    found = []
    for training in (False, True, True):
        model.train(training)
        with evaluation_mode(model):
            found.append(log_likelihoods(model, prompts, [[5, 1], [6, 1]]))
        assert model.training is training
    assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


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
        expected = tokenizer.decode(written).split("\n")[0].strip()
        assert expected and answer.startswith(expected)


def test_prompts_of_like_length_are_read_together():
    """Every one once, at most `batch_size`, and none more than half as long again as another."""
    lengths = [40, 3, 10, 61, 59, 4, 40, 40, 60, 15, 16]
    lists = list(like_lengths([("x" * length, "y") for length in lengths], 3))
    assert sorted(sum(lists, [])) == list(range(len(lengths)))
    assert [[lengths[i] for i in chosen] for chosen in lists] == [[3, 4], [10, 15], [16], [40, 40, 40], [59, 60, 61]]
    assert list(like_lengths([], 3)) == []


def test_accuracy_counts_every_sample():
    model, tokenizer, _ = load_model("mini", "cpu")
    samples = [("order pen axe =", "axe pen"), ("sort ink cup bag =", "bag cup ink"), ("order hen axe =", "hen axe")]
    assert task_accuracy(model, tokenizer, Task("sort", [], [], samples)) == pytest.approx(2 / 3)
    assert not model.training


def test_long_prompts_are_scored_too():
    model, tokenizer, _ = load_model("mini", "cpu")
    long = ("word " * 400 + "order pen axe =", "axe pen")
    assert len(generate_answers(model, tokenizer, [long], max_length=64)) == 1


def test_table_fits_in_80_columns():
    long = "tracking_shuffled_objects"
    columns = {"before": {long: 0.5, "b": 0.0}, "after": {long: 0.25, "b": 1.0}, "after adapting": {long: 1.0, "b": 1.0}}
    lines = table(columns, {long: 100, "b": 50}).splitlines()
    assert lines[1].split() == [long, "50.0", "(40-60)", "25.0", "(18-34)", "100.0", "(96-100)",
                                "100"]
    assert lines[3].split() == ["average", "25.0", "(20-31)", "62.5", "(57-67)", "100.0", "(96-100)", "150"]
    assert max(map(len, lines)) <= 80
    assert max(map(len, table({"after": {"x" * 99: 0.5}}, {"x" * 99: 2000}).splitlines())) <= 80


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


def test_a_sample_that_comes_twice_is_one_shot():
    twice = with_shots(Task("t", [("a", "x"), ("a", "x"), ("b", "y")], [], [("q", "z")]), "test", 2)
    assert twice.test in ([("a x\n\nb y\n\nq", "z")], [("b y\n\na x\n\nq", "z")])
    with pytest.raises(ValueError, match="has 2 samples, too few for 3 shots"):
        with_shots(Task("t", [("a", "x"), ("a", "x"), ("b", "y")], [], [("q", "z")]), "test", 3)


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
    navigate = ["--tasks", "navigate", "--split", "validation", "--score", "choose", "--show", "1"]
    assert 0.3 < evaluate.main([*navigate, "--shots", "2"])["navigate"] < 0.7  # one of two labels, and it cannot know
    printed = capsys.readouterr().out
    assert printed.count("Answer: Yes") + printed.count("Answer: No") == 2 and "scored by choose" in printed


def test_prompts_that_are_cut_are_counted_and_told(capsys):
    model, tokenizer, _ = load_model("mini", "cpu")
    task = load_tasks(["navigate"])[0]
    room = 30 - (len(encode_target(tokenizer, "Yes")) + 4)  # of --max-length: the answer and four tokens to spare
    assert {len(encode_target(tokenizer, target)) for _, target in task.validation} == {30 - 4 - room}
    long = sum(len(tokenizer(prompt)["input_ids"]) > room for prompt, _ in task.validation)
    assert 0 < long < len(task.validation)
    flags = ["--tasks", "navigate", "--split", "validation", "--score", "choose"]
    evaluate.main([*flags, "--max-length", "30"])
    told = f"{long} of {len(task.validation)} validation prompts are too long for --max-length 30: their beginning is cut"
    assert told in capsys.readouterr().out.splitlines()
    evaluate.main(flags)
    assert "too long" not in capsys.readouterr().out


@pytest.mark.parametrize("flags,message", [
    (["--run", "nowhere"], "nowhere is not a run folder: it has no config.json"),
    (["--adapter", "nowhere"], "nowhere is not an adapter folder: it has no adapter_config.json"),
    (["--tasks", "x"], "unknown task 'x'"), (["--split", "x"], "invalid choice: 'x'"),
    (["--score", "x"], "invalid choice: 'x'"), (["--shots", "-1"], "--show and --shots at least 0"),
    (["--score", "choose"], "task 'word_sorting' has no closed set of labels"),
    (["--tasks", "navigate", "--shots", "501"], "task 'navigate' has 500 samples, too few for 501 shots"),
    (["--dtype", "int8"], "unknown dtype 'int8'; there are: auto, float32"),
    (["--max-length", "300"], "--max-length 300 is more than the 256 positions"),
    (["--show", "x"], "invalid int"), (["--show", "-1"], "--show and --shots at least 0"),
    (["--max-length", "-5"], "--max-length must be at least 1")])
def test_bad_input(capsys, flags, message):
    from tinylora_mtl.run.cli import run_command
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: evaluate.main(flags))
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and message in captured.err and len(captured.err.strip().splitlines()) == 1


def test_a_run_of_another_model_is_refused(tmp_path):
    from tinylora_mtl import AdapterConfig, add_adapters, save_adapter
    model = make_llama()
    add_adapters(model, AdapterConfig())
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "config.json").write_text(json.dumps({"model": "mini", "tasks": ["navigate"]}))
    with pytest.raises(ValueError, match="does not fit this model"):
        evaluate.main(["--run", str(tmp_path)])
