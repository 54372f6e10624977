"""Two processes train as one does: gradients, whole runs, files, going on, errors. gloo on the CPU, real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, flags_of, make_batch, make_llama, randomize_adapters, run, tree
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from tinylora_mtl import adapter_parameters, add_adapters
from tinylora_mtl.config import TrainConfig, adapter_config
from tinylora_mtl.run import checkpoint, distributed, folder, loop, training
from tinylora_mtl.run.checkpoint import list_checkpoints, load_checkpoint
from tinylora_mtl.run.distributed import process_group, process_rank, world_size
from tinylora_mtl.run.gradients import gradients_for
from tinylora_mtl.run.settings import check_sizes
from tinylora_mtl.data.tasks import Task

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
STEPS = {"lora": {"method": "lora"}, "hydralora": {"method": "hydralora"},
         "pieces": {"method": "rlora", "accumulation": 3},
         "kl": {"method": "align"}, "kl in pieces": {"method": "align", "accumulation": 2},
         "mmd": {"method": "align", "align": "mmd"}, "meta": {"method": "meta", "inner_lr": 0.1},
         "checkpointing": {"method": "align", "accumulation": 2, "gradient_checkpointing": True}}


def round_of_four():
    return [(make_batch(seed=t, tasks=(t,)), make_batch(seed=9 + t, tasks=(t,), each=3)) for t in range(4)]


def one_step(**changes):
    """(metrics, gradients by name) of a step: of the one process, or of this one of several."""
    config = TrainConfig(**{"dropout": 0.0, "align_weight": 0.5, **changes})
    model = make_llama()
    add_adapters(model, adapter_config(config))
    randomize_adapters(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.method == "meta":
        batch = round_of_four()
    else:
        batch = {key: tensor.flip(0) for key, tensor in make_batch(each=4).items()}  # the first share is the shorter
        assert len({batch["attention_mask"][i::2].sum().item() for i in range(2)}) == 2
    exchanges = []

    def all_reduce(tensor, original=torch.distributed.all_reduce):
        exchanges.append(tensor.numel())
        return original(tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", all_reduce)
        metrics = gradients_for(config)(model.train(), batch, config)
    assert len(exchanges) == world_size() - 1  # one for all micro-batches together
    return metrics, {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}


def many_tokens():
    """The alignment by MMD of more tokens than it takes, whose choice is random, in each process from another seed."""
    model = make_llama()
    add_adapters(model, adapter_config(TrainConfig()))
    config = TrainConfig(method="align", align="mmd", align_weight=0.5)
    torch.manual_seed(process_rank())
    return gradients_for(config)(model.train(), make_batch(each=60), config)["alignment"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes makes of every step of STEPS."""
    folder = tmp_path_factory.mktemp("steps")
    result = torchrun(__file__, folder)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"{number}.pt") for number in range(2)]


def torchrun(*arguments, module=()):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
                           *module, *map(str, arguments)], env=ONE_THREAD, text=True, capture_output=True, timeout=300)


def torchrun_train(*flags):
    return torchrun(*flags, module=("-m", "tinylora_mtl.train"))


@pytest.mark.parametrize("name", STEPS)
def test_the_step_of_two_processes_is_that_of_one(both, name):
    numbers, gradients = one_step(**STEPS[name])
    for process in both:
        torch.testing.assert_close(process[name][1], gradients, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(process[name][0], numbers, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(both[0][name][1][key], both[1][name][1][key]) for key in gradients)


def test_the_alignment_is_a_part_of_the_gradient(both):
    """And not so small a part that the test above would pass without it."""
    for name in ("kl", "mmd"):
        _, without = one_step(**STEPS[name], align_weight=0.0)
        assert max((both[0][name][1][key] - without[key]).abs().max() for key in without) > 1e-3


def test_all_processes_take_the_same_random_tokens(both):
    assert torch.equal(both[0]["many tokens"], both[1]["many tokens"])


# ------------------------------------------------------------------------------------------------------ whole runs
def tiny(folder, **changes):
    return flags_of(**TINY | dict(steps=4, log_every=1, batch_size=8, dropout=0.0) | changes | {"out": folder})


def steps_logged(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    """The same adapter, to rounding, the same log and results, times aside."""
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (one, other)]
    torch.testing.assert_close(*map(load_file, files), atol=1e-4, rtol=1e-3)
    results = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (one, other)]
    assert len(logs[0]) == len(logs[1])
    for ours, theirs in zip(*(map(json.loads, log) for log in logs)):
        assert ours.pop("head_cosine", []) == pytest.approx(theirs.pop("head_cosine", []), rel=1e-3, abs=1e-4)
        assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["align", "meta"])
def test_a_whole_run(tmp_path, method):
    settings = dict(method=method, seed=3)
    run(tmp_path / "one", **dict(steps=4, log_every=1, batch_size=8, dropout=0.0) | settings)
    result = torchrun_train(*tiny(tmp_path / "two", **settings))
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert steps_logged(tmp_path / "two") == [1, 2, 3, 4]
    assert sum("on cpu, in 2 processes" in line for line in result.stdout.splitlines()) == 1
    assert result.stdout.count("results") == 0 and result.stdout.count(str(tmp_path / "two")) == 1
    assert "Warning" not in result.stderr and result.stderr.count("100%") <= 2
    keys = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.model.layers.") for key in keys)


@pytest.mark.slow
def test_a_signal_ends_all_with_a_checkpoint_and_the_run_goes_on(tmp_path):
    """torchrun passes a SIGTERM on; all stop after the same step, and what goes on is the run that was not stopped."""
    settings = dict(method="rlora", dropout=0.2, steps=60, checkpoint_every=10)
    for name in ("whole", "run"):
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
                                    "-m", "tinylora_mtl.train", *map(str, tiny(tmp_path / name, **settings))],
                                   env=ONE_THREAD, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if name == "run":
            while not list_checkpoints(tmp_path / name):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
        output, error = process.communicate(timeout=200)
        assert (process.returncode == 0) == (name == "whole"), error
    last = steps_logged(tmp_path / "run")[-1]
    state = load_checkpoint(tmp_path / "run")
    assert 10 <= last < 60 and state["step"] == last
    assert not torch.equal(state["random"]["cpu"], state["random_of_others"][0]["cpu"])  # masks differ
    said = f"stopped by SIGTERM; to go on: python -m tinylora_mtl.train --resume {tmp_path / 'run'}"
    assert error.count(said) == 1
    result = torchrun_train("--resume", tmp_path / "run")
    assert result.returncode == 0 and result.stdout.count(f"resumed after step {last}") == 1, result.stderr
    assert steps_logged(tmp_path / "run") == list(range(1, 61))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_only_the_first_process_writes(tmp_path, few, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for module in (training, loop, checkpoint, folder):
        monkeypatch.setattr(module, "process_rank", lambda: 1)
    run(None, out=None, method="lora", steps=2, checkpoint_every=1)
    assert tree(tmp_path) == {}
    assert capsys.readouterr().err == ""  # no bar either


# ---------------------------------------------------------------------------------------------------------- errors
@pytest.mark.slow
def test_an_error_of_all_is_told_once(tmp_path):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.json").write_text("{}")
    for flags, line in [
            (tiny(tmp_path / "run", batch_size=6), "error: --batch-size 6 has 3 samples of each of 2 tasks, which 2 "
                                                   "processes cannot share equally"),
            (["--steps", "many"], "error: argument --steps: invalid int value: 'many'"),
            (tiny(tmp_path / "held"), "already holds a run; name another --out")]:
        result = torchrun_train(*flags)
        assert result.returncode != 0
        assert result.stderr.count(line) == 1, result.stderr
        assert not any("tinylora_mtl" in text and "File" in text for text in result.stderr.splitlines())  # no traceback
    assert not (tmp_path / "run").exists()


def test_every_process_has_its_part_of_every_task(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    batch, seen = make_batch(each=4), []
    for number in range(2):
        monkeypatch.setattr(distributed, "process_rank", lambda: number)
        part = distributed.share(batch)
        assert part["task_ids"].tolist() == [0, 0, 1, 1, 2, 2]
        seen += part["input_ids"].tolist()
    assert sorted(seen) == sorted(batch["input_ids"].tolist())


def test_what_cannot_be_shared_is_refused(monkeypatch):
    tasks = [Task(name, [("a", "b")] * 50, [("a", "b")], [("a", "b")]) for name in "abc"]
    monkeypatch.setattr("tinylora_mtl.run.settings.world_size", lambda: 2)
    check_sizes(TrainConfig(method="lora", batch_size=6), tasks)
    check_sizes(TrainConfig(method="lora", batch_size=12, accumulation=6), tasks)
    for settings, problem in [
            (dict(method="lora", batch_size=9), "--batch-size 9 has 3 samples of each of 3 tasks, which 2 processes"),
            (dict(method="lora", batch_size=12, accumulation=7), "--batch-size 12 cannot hold 3 tasks in 7"),
            (dict(method="meta"), "2 processes cannot share the 3 tasks of a round equally")]:
        with pytest.raises(ValueError, match=problem):
            check_sizes(TrainConfig(**settings), tasks)
    check_sizes(TrainConfig(method="meta", tasks_per_round=2), tasks)


def test_the_table_in_the_rooms_readme():
    """Its numbers from the formulas below it, and from the parameters of the layers themselves."""
    text = (Path(distributed.__file__).parent / "README.md").read_text()
    lines = text.split("<!-- worked out -->\n")[1].split("\n\n")[0].splitlines()[2:]
    rows = {line.split("|")[1].strip(): [cell.split()[0] for cell in line.split("|")[2:-1]] for line in lines}
    assert list(rows) == ["lora", "align", "meta", "mlora", "hydralora", "rlora"]
    processes, tokens, layers, rank = 8, 64 * 512, 3 * 32, 8
    for method, row in rows.items():
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                                                 num_hidden_layers=32, num_attention_heads=32))
        weights = sum(parameter.numel() for parameter in model.parameters())
        adapters = add_adapters(model, adapter_config(TrainConfig(method=method, rank=rank)))
        assert len(adapters) == layers and weights == 6_738_415_616
        trains = sum(parameter.numel() for parameter in adapter_parameters(model).values())
        state = (24 if method == "meta" else 16) * trains
        sent = 2 * (processes - 1) / processes * 4 * trains
        features = (processes - 1) / processes * tokens * (layers * rank * 2 + 8) if method == "align" else 0
        assert row == [f"{trains / 1e6:.1f}", f"{2 * weights / 1e9:.1f}", f"{state / 1e6:.0f}", f"{sent / 1e6:.0f}",
                       f"{features / 1e6:.0f}"]


if __name__ == "__main__":  # one of the two processes of `both`
    with process_group():
        found = {name: one_step(**changes) for name, changes in STEPS.items()} | {"many tokens": many_tokens()}
        torch.save(found, f"{sys.argv[1]}/{process_rank()}.pt")
