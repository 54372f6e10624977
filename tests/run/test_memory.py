"""Long runs: memory does not grow with the number of steps."""

import json
import os
import subprocess
import sys

import pytest
from conftest import TINY, flags_of

from tinylora_mtl.config import METHODS

# Runs the real command in a process of its own and looks at its resident memory after every computed step.
WATCHED = """
import json, os, sys
from tinylora_mtl.run import cli, loop, training

seen = {}

def gradients_for(config, original=loop.gradients_for):
    gradients, count = original(config), [0]

    def step(*args):
        metrics = gradients(*args)
        count[0] += 1
        if count[0] % 500 == 0:
            pages = int(open("/proc/self/statm").read().split()[1])
            seen[count[0]] = pages * os.sysconf("SC_PAGE_SIZE")
        return metrics
    return step

loop.gradients_for = gradients_for
cli.run_command(lambda: training.command(sys.argv[1:]))
print(json.dumps(seen))
"""
# The least work that is still each method, whole, with log lines and checkpoints on the way.
LEAST = TINY | dict(steps=5000, tasks=("multistep_arithmetic", "boolean_expressions"), batch_size=2, rank=1, heads=2,
                    targets=("layers.4.mlp.down_proj",), tasks_per_round=1, support=1, query=1, inner_steps=1,
                    samples=2, checkpoint_every=500)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{method: (its run, the file of its errors)}, all begun at once: each keeps one core busy."""
    started, folder = {}, tmp_path_factory.mktemp("runs")
    for method in METHODS:
        errors = folder / f"{method}.txt"
        started[method] = subprocess.Popen(
            [sys.executable, "-c", WATCHED, *flags_of(**LEAST, method=method, out=folder / method)], text=True,
            stdout=subprocess.PIPE, stderr=errors.open("w"), env=os.environ | {"OMP_NUM_THREADS": "1"}), errors
    yield started
    for process, _ in started.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")
@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_over_5000_steps(processes, method):
    process, errors = processes[method]
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, errors.read_text()[-2000:]
    resident = {int(step): size for step, size in json.loads(output.splitlines()[-1]).items()}
    print(method, {step: f"{size / 2 ** 20:.0f} MiB" for step, size in resident.items()})
    assert list(resident) == list(range(500, 5001, 500))
    assert abs(resident[5000] / resident[500] - 1) < 0.05
