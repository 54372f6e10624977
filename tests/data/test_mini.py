"""The embedded model: what it knows, what it does not, and that the recipe in `pretrain.py` still runs."""

import json
import random
import subprocess
import sys

import pytest

from tinylora_mtl.data.embedded import LANGUAGES, SKILLS, worded_sample
from tinylora_mtl.run.models import MINI, load_model
from tinylora_mtl.data.pretrain import draw, skill_accuracy, symbolic_sample


@pytest.fixture(scope="module")
def mini():
    model, tokenizer, _ = load_model("mini", "cpu")
    return model, tokenizer


@pytest.mark.parametrize("skill", SKILLS)
def test_every_skill_is_in_the_base_model(mini, skill):
    rng = random.Random("a seed that pre-training did not use")
    assert skill_accuracy(*mini, [symbolic_sample(skill, rng) for _ in range(500)]) > 0.9


def test_the_worded_tasks_are_not(mini):
    rng = random.Random(1)
    samples = [worded_sample(name, rng) for name in [*SKILLS, *LANGUAGES] for _ in range(50)]
    assert skill_accuracy(*mini, samples) < 0.35


def test_it_is_small_and_can_encode_any_text(mini):
    model, tokenizer = mini
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert sum(file.stat().st_size for file in MINI.iterdir()) < 4_500_000
    for text in ("Any text: naïve, 日本語, 🙂, tabs\tand\nlines", "  two spaces "):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_every_word_of_the_worded_tasks_is_one_token_that_was_read(mini):
    _, tokenizer = mini
    rng = random.Random(0)
    read = {token for prompt, answer in (draw(rng) for _ in range(30_000))
            for token in tokenizer(f"{prompt} {answer or ''}")["input_ids"]}
    for name in [*SKILLS, *LANGUAGES]:
        for _ in range(200):
            prompt, answer = worded_sample(name, rng)
            assert set(tokenizer(prompt)["input_ids"]) <= read
            assert set(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) <= read


def test_no_worded_prompt_is_answered_in_pretraining():
    """The cue that ends every worded prompt is in no prompt that has an answer."""
    rng = random.Random(0)
    samples = [draw(rng) for _ in range(20_000)]
    cues = ("Answer", "Antwort", "Réponse", "Respuesta", "Risposta")
    for name in [*SKILLS, *LANGUAGES]:
        assert worded_sample(name, rng)[0].rstrip(" :").endswith(cues)
    assert not [prompt for prompt, answer in samples if answer is not None and any(cue in prompt for cue in cues)]
    assert sum(prompt.rstrip(" :").endswith(cues) for prompt, _ in samples) > 500  # but they are read, as text


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    subprocess.run([sys.executable, "-m", "tinylora_mtl.data.pretrain", "--out", str(tmp_path / "mini"), "--steps", "20",
                    "--batch-size", "16"], check=True, capture_output=True, timeout=300)
    model, tokenizer, _ = load_model(str(tmp_path / "mini"), "cpu")
    shipped = load_model("mini", "cpu")
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in shipped[0].named_parameters()}
    assert tokenizer.get_vocab() == shipped[1].get_vocab()
    assert json.loads((tmp_path / "mini" / "config.json").read_text())["model_type"] == "llama"
