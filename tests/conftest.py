"""What the tests share: a tiny random model and batches for it, and tiny runs, stopped in the middle if need be."""

import functools
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for so small models a second thread costs more than it gives

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tinylora_mtl import adapter_parameters
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.data import tasks
from tinylora_mtl.data.tasks import load_tasks
from tinylora_mtl.run import loop, training

tasks.embedded_samples = functools.cache(tasks.embedded_samples)  # always the same, and made anew by hundreds of tests

# Settings of a run that takes a second or two.
TINY = dict(tasks=("word_sorting", "dyck_languages"), steps=3, batch_size=4, rank=2, samples=8, support=4, query=4,
            tasks_per_round=2, inner_steps=2, targets=("down_proj",), device="cpu", split="validation",
            score_samples=50)


def run(folder, **changes):
    """A tiny run in this process; returns its results."""
    return training.run(TrainConfig(**TINY | {"out": str(folder)} | changes))


def flags_of(**settings):
    """Settings as flags: rank=2 -> ["--rank", "2"]."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", *(value if isinstance(value, (tuple, list)) else [str(value)])]
    return flags


def command(*flags, cwd, module="train"):
    """A real command, run to its end."""
    return subprocess.run([sys.executable, "-m", f"tinylora_mtl.{module}", *map(str, flags)], cwd=cwd, text=True,
                          capture_output=True, timeout=300)


def tree(folder):
    """{path: content} of all that is in a folder, to see whether anything was written or changed."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def make_llama(seed=0, **changes):
    """A random Llama small enough for a double loop: 2 layers, width 16, 50 tokens."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                 max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**sizes | changes)).eval()


def make_batch(seed=0, tasks=(0, 1, 2), each=2, length=9):
    """A batch with left padding, random tokens, and labels on the last columns."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(tasks) * each
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    mask, labels = torch.ones_like(ids), torch.full_like(ids, -100)
    for row in range(rows):
        mask[row, :row % 4] = 0
        answer = 1 + row % 3
        labels[row, -answer:] = ids[row, -answer:]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels,
            "task_ids": torch.tensor(tasks).repeat_interleave(each)}


def randomize_adapters(model, seed=0, std=0.1):
    """Move every adapter parameter off its start, so that a forgotten factor or term shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def llama():
    return make_llama()


@pytest.fixture
def batch():
    return make_batch()


# ------------------------------------------------------------------------------------ runs that are stopped
# Seven steps, checkpoints at 3, 6 and 7, lines of metrics.jsonl at 1, 2, 4, 6 and 7; dropout, so that random states
# count, and six samples of eight used up at step 3, so that the place in a pass counts.
SETTINGS = dict(steps=7, checkpoint_every=3, log_every=2, dropout=0.2, warmup=0.3)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


@pytest.fixture
def few(monkeypatch):
    """Two samples of a task to score instead of fifty: scoring is not what these tests are about."""
    def load(*args):
        return [replace(task, validation=task.validation[:2]) for task in load_tasks(*args)]
    monkeypatch.setattr(training, "load_tasks", load)


def at_step(monkeypatch, number, action):
    """Have `action()` called in the middle of the n-th step that is computed from now on."""
    count = itertools.count(1)

    def gradients_for(config, original=loop.gradients_for):
        gradients = original(config)

        def step(model, batch, config):
            metrics = gradients(model, batch, config)
            if next(count) == number:
                action()
            return metrics
        return step
    monkeypatch.setattr(loop, "gradients_for", gradients_for)


def kill():
    raise Killed


def stopped_run(folder, step, **changes):
    """A run that is killed in the middle of a step (counted from its start)."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, step, kill)
        run(folder, **SETTINGS | changes)


def outcome(folder):
    """All that a run leaves, its times aside."""
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    files = ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl")
    return results, *[(folder / file).read_bytes() for file in files]


def start(*flags):
    return subprocess.Popen([sys.executable, "-m", "tinylora_mtl.train", *map(str, flags)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
