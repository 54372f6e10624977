"""Whole runs on a GPU: training, stopping, going on, scoring, compiling, and one process under torchrun with NCCL.

As tests/core/test_cuda.py: skipped without a GPU, TINYLORA_TEST_DEVICE=cpu tries them on a CPU.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import SETTINGS, flags_of, run, stopped_run

from tinylora_mtl.config import METHODS
from tinylora_mtl.run import scoring, training

DEVICE = os.environ.get("TINYLORA_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA GPU")
SMALL = SETTINGS | {"device": DEVICE}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_goes_on_and_is_scored(tmp_path, method, few):
    stopped_run(tmp_path / "run", 5, method=method, device=DEVICE)
    results = training.resume(tmp_path / "run")
    whole = run(tmp_path / "whole", method=method, **SMALL)
    logs = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("run", "whole")]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-3)
    assert results["after"].keys() == whole["after"].keys()


def test_what_a_run_reached_is_what_evaluate_finds(tmp_path):
    results = run(tmp_path / "run", method="lora", device=DEVICE, steps=20, lr=5e-3)
    assert scoring.command(["--run", str(tmp_path / "run"), "--device", DEVICE]) == results["after"]


def test_a_compiled_run_is_as_the_plain_one(tmp_path, few, capsys):
    plain, compiled = (run(tmp_path / str(compile), method="lora", steps=3, compile=compile, device=DEVICE)
                       for compile in (False, True))
    losses = [json.loads((tmp_path / str(compile) / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
              for compile in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and plain["samples"] == compiled["samples"]
    assert DEVICE == "cpu" or "torch.compile does not work here" not in capsys.readouterr().out


def test_one_process_under_torchrun(tmp_path):
    settings = dict(method="align", tasks=("word_sorting", "navigate"), steps=3, batch_size=8, samples=20, device=DEVICE,
                    split="validation", out=tmp_path / "run")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m",
                           "tinylora_mtl.train", *flags_of(**settings)], cwd=tmp_path, text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "results.json").is_file()
