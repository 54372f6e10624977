"""What `heads` tells about a run, against loops, and what it writes."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import command, run
from safetensors.torch import load_file

from tinylora_mtl import adapter_parameters, kl_alignment
from tinylora_mtl.adapters import find_adapters
from tinylora_mtl.align import collect_features
from tinylora_mtl.batching import encode
from tinylora_mtl.data.tasks import load_tasks
from tinylora_mtl.lab import heads
from tinylora_mtl.run.likeness import mean_of_pairs
from tinylora_mtl.run import training
from tinylora_mtl.run.adapter_files import PREFIX
from tinylora_mtl.run.cli import run_command


def cosine(a, b):
    a, b = a.flatten().tolist(), b.flatten().tolist()
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny run of each kind, scored on two samples of a task."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "load_tasks", lambda *args: [
            replace(task, validation=task.validation[:2]) for task in load_tasks(*args)])
        for method in ("rlora", "align"):
            run(folder / method, method=method, warmup=0.0, targets=("all-linear",))
    return folder


def test_the_log_of_a_run_has_the_cosines_of_its_adapter(trained):
    lines = [json.loads(line) for line in (trained / "rlora" / "metrics.jsonl").read_text().splitlines()]
    tensors = load_file(trained / "rlora" / "adapter" / "adapter_model.safetensors")
    stacks = [tensor for name, tensor in tensors.items() if ".heads" in name]
    loops = [sum(cosine(a[i], a[j]) for i in range(5) for j in range(i)) / 10 for a in stacks]
    assert sorted(lines[-1]["head_cosine"]) == pytest.approx(sorted(loops), abs=1e-4) and len(loops) == 35


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(heads, "SAMPLES", 5)


def one_by_one(model, tokenizer, tasks, part):
    """{layer: a list for each task} of what a part gives for each sample by itself, so without any padding."""
    found = {}
    for task_id, task in enumerate(tasks):
        for sample in task.validation[:5]:
            with torch.no_grad(), collect_features(model, part) as outputs:
                model(torch.tensor([encode(tokenizer, sample)[0]]))
            for name, z in outputs.items():
                found.setdefault(name, [[] for _ in tasks])[task_id].append(z[0])
    return found


def test_features_and_router_against_samples_one_by_one(trained, short):
    config, tasks, model, tokenizer = heads.open_finished(trained / "rlora", "cpu")
    features = heads.collect(model, tokenizer, tasks, config.max_length)[0]
    expected = one_by_one(model, tokenizer, tasks, "lora_A")
    assert list(expected) == list(find_adapters(model))
    apart, alike = heads.task_distances(features), heads.task_cosines(features)
    assert apart.shape == alike.shape == (35, 2, 2)
    for distances, cosines_, (first, second) in zip(apart, alike, expected.values()):
        first, second = torch.cat(first), torch.cat(second)
        assert [len(torch.cat(samples)) for samples in features] == [len(first), len(second)]
        assert mean_of_pairs(distances).item() == pytest.approx(kl_alignment([first, second]).item(), rel=1e-3)
        assert distances.diagonal().abs().max() < 1e-6 and torch.allclose(distances, distances.T)
        assert cosines_[0, 1].item() == pytest.approx(cosine(first.mean(0), second.mean(0)), abs=1e-4)
    weights = heads.router_weights(heads.collect(model, tokenizer, tasks, config.max_length, "router")[0])
    for layer, tasks_scores in zip(weights, one_by_one(model, tokenizer, tasks, "router").values(), strict=True):
        loop = torch.stack([torch.stack([torch.softmax(token, 0) for z in samples for token in z]).mean(0)
                            for samples in tasks_scores])
        assert torch.allclose(layer, loop, atol=1e-5) and torch.allclose(layer.sum(1), torch.ones(2))


def test_principal_components_against_the_covariance(trained, short):
    config, tasks, model, tokenizer = heads.open_finished(trained / "align", "cpu")
    features = heads.collect(model, tokenizer, tasks, config.max_length)[0]
    points, owner, shares = heads.principal_components(features)
    table = torch.stack([torch.cat([z[:, layer].mean(0) for layer in range(35)])
                         for samples in features for z in samples]).double()
    table = table - table.mean(0)
    values, vectors = torch.linalg.eigh(table.T @ table)
    assert owner.tolist() == [0] * 5 + [1] * 5
    assert shares == pytest.approx((values.flip(0)[:2] / values.sum()).tolist(), rel=1e-3)
    assert torch.allclose(points.double().abs(), (table @ vectors.flip(1)[:, :2]).abs(), atol=1e-3)


def test_back_to_start_is_the_adapter_that_the_run_began_with(tmp_path, few):
    """A single step at a learning rate that is 0 in float32 leaves the start in the file."""
    run(tmp_path, method="rlora", steps=1, lr=1e-60)
    config, _, model, _ = heads.open_finished(tmp_path, "cpu")
    torch.manual_seed(123)
    heads.back_to_start(model, config)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, tensors[PREFIX + name + ("" if name.endswith(".weight") else ".weight")])


def test_what_is_printed_and_written(trained, short, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    report = heads.main(["--run", str(trained / "rlora"), "--device", "cpu"])
    printed = capsys.readouterr()
    assert json.loads((trained / "rlora" / "heads.json").read_text()) == report
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shown = {line.split()[0]: line.split()[1:] for line in printed.out.splitlines() if line.strip()}
    for kind in kinds:
        own = [layer for layer in report["layers"] if layer["layer"].endswith(kind)]
        assert len(own) == 5
        assert shown[kind][1] == f"{sum(layer['head_cosine'] for layer in own) / 5:.2f}"
        assert shown[kind][4] == f"{sum(layer['distance'] for layer in own) / 5:.2f}"
    assert "no pictures: they need matplotlib" in printed.err
    assert list(report["router"]) == ["word_sorting", "dyck_languages"]
    layers = report["layers"]
    assert len(layers) == 35 and all(layer["head_cosine_start"] == pytest.approx(-0.25, abs=0.02) for layer in layers)
    assert all(layer["distance"] != layer["distance_start"] > 0 for layer in layers)
    mean = sum(layer["distance"] for layer in layers) / 35
    line, = [line for line in printed.out.splitlines() if line.startswith("all ")]
    assert line.split()[-1] == f"{mean:.2f}"

    report = heads.main(["--run", str(trained / "align"), "--device", "cpu"])
    assert report["router"] == {} and report["layers"][0]["head_cosine"] is None
    assert "router" not in capsys.readouterr().out


def test_pictures(trained, short):
    pytest.importorskip("matplotlib")
    for method, names in (("rlora", {"heads", "head_cosines"}), ("align", {"heads"})):
        heads.main(["--run", str(trained / method), "--device", "cpu"])
        for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
            files = [file for file in (trained / method).iterdir() if file.suffix == suffix]
            assert {file.stem for file in files} == names
            assert all(file.read_bytes().startswith(start) for file in files)


@pytest.mark.parametrize("name", ["bench", "compare", "heads"])
def test_what_is_a_command_ends_as_one(name):
    lines = (Path(heads.__file__).parent / f"{name}.py").read_text().splitlines()
    assert lines[-2:] == ['if __name__ == "__main__":', "    cli.run_command(main)"]


def test_a_run_that_is_not_finished_is_one_line(tmp_path, trained, capsys):
    shutil.copy(trained / "rlora" / "config.json", tmp_path)
    with pytest.raises(SystemExit) as end:
        run_command(lambda: heads.main(["--run", str(tmp_path)]))
    answer = capsys.readouterr().err
    assert end.value.code == 2 and len(answer.splitlines()) == 1
    assert "is not finished, so it has no adapter" in answer


def test_the_pictures_of_the_walkthrough(tmp_path):
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"inner_lr": 0.2}')
    lines = [{"step": step, "loss": 1.0, "support_loss_before": 2.0, "support_loss_last": 1.5} for step in (1, 10)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = command(tmp_path, run, cwd=tmp_path, module="lab.pictures")
    assert done.returncode == 0, done.stderr
    for name in ("methods", "support"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
