"""The embedded model: what it knows, what it does not, and that the recipe in `pretrain.py` still runs."""

import json
import random
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import make_llama

from tinylora_mtl.data import pretrain
from tinylora_mtl.data.embedded import ANSWERS, LANGUAGES, SKILLS, worded_sample
from tinylora_mtl.data.pretrain import STAGES, make_part, pretraining_sample, symbolic_sample, weighted_gradients
from tinylora_mtl.evaluate import accuracy, generate_answers
from tinylora_mtl.run.models import MINI, load_model


@pytest.fixture(scope="module")
def mini():
    model, tokenizer, _ = load_model("mini", "cpu")
    return model, tokenizer


@pytest.fixture(scope="module")
def read():
    """Samples as pre-training reads them."""
    rng = random.Random(0)
    return [pretraining_sample(rng) for _ in range(10_000)]


@pytest.mark.parametrize("skill", SKILLS)
def test_every_skill_is_in_the_base_model(mini, skill):
    rng = random.Random("a seed that pre-training did not use")
    samples = [symbolic_sample(skill, rng) for _ in range(250)]
    assert accuracy(generate_answers(*mini, samples), samples) > 0.9


def test_the_worded_tasks_are_not(mini):
    rng = random.Random(1)
    samples = [worded_sample(name, rng) for name in [*SKILLS, *LANGUAGES] for _ in range(25)]
    assert accuracy(generate_answers(*mini, samples), samples) < 0.35


def test_it_is_small_and_can_encode_any_text(mini):
    model, tokenizer = mini
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert sum(file.stat().st_size for file in MINI.iterdir()) < 4_500_000
    for text in ("Any text: naïve, 日本語, 🙂, tabs\tand\nlines", "  two spaces "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_every_word_of_the_worded_tasks_is_one_token_that_was_read(mini, read):
    _, tokenizer = mini
    rng = random.Random(1)

    def tokens(texts, **options):
        return {token for ids in tokenizer(texts, **options)["input_ids"] for token in ids}
    known = tokens([f"{prompt} {answer or ''}" for prompt, answer in read])
    worded = [worded_sample(name, rng) for name in [*SKILLS, *LANGUAGES] for _ in range(200)]
    assert tokens([prompt for prompt, _ in worded]) <= known
    assert tokens([f" {answer}" for _, answer in worded], add_special_tokens=False) <= known


def test_no_worded_prompt_is_answered_in_the_first_stage(read):
    """Nothing that begins as a worded prompt has an answer, whatever it is about; such prompts are read as text."""
    rng = random.Random(0)

    def begins(prompt):
        return tuple(prompt.split()[:2])  # "Sort the", "Ann lies.", "¿Cuánto es"
    worded = {begins(worded_sample(name, rng)[0]) for name in [*SKILLS, *LANGUAGES] for _ in range(300)}
    assert not [prompt for prompt, answer in read if answer is not None and begins(prompt) in worded]
    assert sum(begins(prompt) in worded for prompt, _ in read) > 250


def test_in_the_second_stage_worded_prompts_have_the_answers_of_others(monkeypatch):
    """Right as often as chance has it: half of the time where there are two answers, and rarely elsewhere."""
    drawn = []

    def record(*args):
        drawn.append((args[0], *worded_sample(*args)))
        return drawn[-1][1:]
    monkeypatch.setattr(pretrain, "worded_sample", record)
    rng, right = random.Random(0), {}
    assert STAGES[1]["shares"]["guesses"] > 0 and "guesses" not in STAGES[0]["shares"]
    for _ in range(4000):
        drawn.clear()
        prompt, answer = pretraining_sample(rng, {"guesses": 1})
        (name, own_prompt, own), (other, _, others) = drawn
        assert (name, prompt, answer) == (other, own_prompt, others)
        right.setdefault(name, []).append(own == answer)
    for name, found in right.items():
        share = sum(found) / len(found)
        assert 0.4 < share < 0.6 if name in ANSWERS else share < 0.25, name


def test_every_cue_is_answered_in_pretraining(read):
    """So that before any training the model answers something, and a method is not measured by whether it does."""
    rng = random.Random(0)
    for name in [*SKILLS, *LANGUAGES]:
        cue = re.search(r"\w+ ?:$", worded_sample(name, rng)[0])[0]
        assert sum(prompt.endswith(cue) for prompt, answer in read if answer is not None) >= 10


def test_the_weighted_loss_of_parts_is_that_of_the_whole(mini):
    """1 for a token of an answer and its end, 0.1 for one of a text, 0 for a question; against one sample at a time."""
    _, tokenizer = mini
    samples = [("calc 3 add 4 =", "7"), ("Yes or No", None), ("sort hat bag ink =", "bag hat ink"), ("one two", None)]
    model = make_llama(vocab_size=len(tokenizer))
    total, weight = 0, 0
    for prompt, answer in samples:
        ids = tokenizer(f"{prompt} {answer or ''}".strip())["input_ids"] + [tokenizer.eos_token_id] * bool(answer)
        first = len(tokenizer(prompt)["input_ids"]) - 1 if answer else 0
        losses = F.cross_entropy(model(torch.tensor([ids])).logits[0, first:-1], torch.tensor(ids[first + 1:]),
                                 reduction="none")
        total += (1 if answer else 0.1) * losses.sum()
        weight += (1 if answer else 0.1) * len(losses)
    (total / weight).backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for parts in ([samples], [samples[:1], samples[1:]], [samples[:2], samples[2:]]):
        model.zero_grad()
        metrics = weighted_gradients(model, [make_part(part, tokenizer) for part in parts], None)
        torch.testing.assert_close(metrics["loss"], (total / weight).detach())
        torch.testing.assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, wanted)


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    flags = ["--out", str(tmp_path / "mini"), "--steps", "20", "--batch-size", "16"]
    subprocess.run([sys.executable, "-m", "tinylora_mtl.data.pretrain", *flags], check=True, capture_output=True,
                   timeout=300)
    model, tokenizer, _ = load_model(str(tmp_path / "mini"), "cpu")
    shipped = load_model("mini", "cpu")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shipped[0].named_parameters()}
    assert tokenizer.get_vocab() == shipped[1].get_vocab()
    assert json.loads((tmp_path / "mini" / "config.json").read_text())["model_type"] == "llama"
