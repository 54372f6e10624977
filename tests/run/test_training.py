"""`train` from end to end on the embedded model: it learns, says what it did, and does the same thing twice."""

import json
from pathlib import Path

import pytest
import torch
from conftest import TINY, run
from safetensors.torch import load_file

from tinylora_mtl import AdapterConfig, add_adapters, load_adapter
from tinylora_mtl import train as core
from tinylora_mtl.run import training
from tinylora_mtl.adapters import find_adapters
from tinylora_mtl.run.scoring import accuracies
from tinylora_mtl.run.models import load_model
from tinylora_mtl.data.tasks import load_tasks, scored_samples
from tinylora_mtl.config import METHODS, TrainConfig
from tinylora_mtl.run.training import parse

@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_run_can_be_loaded(tmp_path, capsys, method, few):
    results = run(tmp_path / "a run", method=method)
    assert results == json.loads((tmp_path / "a run" / "results.json").read_text())
    assert results["method"] == method and results["seed"] == 0
    assert set(results["before"]) == set(results["after"]) == {"word_sorting", "dyck_languages"}
    assert results["average_after"] == pytest.approx(sum(results["after"].values()) / 2)
    assert ("after_adapting" in results) == (method == "meta")
    lines = [json.loads(line) for line in (tmp_path / "a run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert ("alignment" in lines[0]) == (method == "align")
    assert ("support_loss_before" in lines[0]) == (method == "meta")
    printed = capsys.readouterr().out
    assert "word_sorting" in printed and "average" in printed and str(tmp_path) in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 80

    model, tokenizer, _ = load_model("mini", "cpu")
    total = sum(p.numel() for p in model.parameters())
    load_adapter(model, tmp_path / "a run" / "adapter")
    assert results["trainable_parameters"] == sum(p.numel() for p in model.parameters()) - total
    again = accuracies(model, tokenizer, training.load_tasks(TINY["tasks"]), "validation")
    assert again == results["after"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_reaches_what_a_zeroed_branch_cannot(tmp_path, method):
    """60 steps on two tasks; then B (or the heads) are set to zero, and the accuracy falls back to the base's."""
    results = run(tmp_path, method=method, steps=60, batch_size=32, samples=500, rank=8, support=16, query=16,
                  inner_steps=3, targets=("all-linear",))
    assert results["average_after"] > results["average_before"] + 0.3
    model, tokenizer, _ = load_model("mini", "cpu")
    load_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        for adapter in find_adapters(model).values():
            (adapter.heads if hasattr(adapter, "heads") else adapter.lora_B.weight).zero_()
    scored = scored_samples(load_tasks(TINY["tasks"]), "validation", TINY["score_samples"])
    assert accuracies(model, tokenizer, scored, "validation") == results["before"]


@pytest.mark.parametrize("method", ["rlora", "meta"])
def test_same_seed_same_files(tmp_path, method, few):
    for name in ("a", "b"):
        run(tmp_path / name, method=method)
    run(tmp_path / "c", method=method, seed=1)
    for file in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    text = [[line for line in (tmp_path / name / "results.json").read_text().splitlines() if '"seconds"' not in line]
            for name in ("a", "b")]
    assert text[0] == text[1]
    a, c = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("a", "c"))
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_accumulation_gives_the_same_training(tmp_path, few):
    """In one piece or in three, the losses and the alignment of every step agree."""
    logs = []
    for pieces in (1, 3):
        run(tmp_path / str(pieces), method="align", accumulation=pieces, batch_size=6, steps=4, log_every=1)
        logs.append([json.loads(line) for line in (tmp_path / str(pieces) / "metrics.jsonl").read_text().splitlines()])
    for one, other in zip(*logs):
        assert one == pytest.approx(other, rel=1e-3)


def test_the_base_model_is_not_changed_by_training(tmp_path, monkeypatch, few):
    kept = []
    monkeypatch.setattr(training, "load_model", lambda *args: kept.append(load_model(*args)) or kept[0])
    run(tmp_path, method="rlora")
    fresh = load_model("mini", "cpu")[0].state_dict()
    for name, tensor in kept[0][0].state_dict().items():
        if "lora" not in name and "heads" not in name and "router" not in name:
            assert torch.equal(tensor, fresh[name.replace(".base.", ".")])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_tasks(tmp_path, monkeypatch, few):
    original, calls = core.label_loss, []

    def spoiled(*args):
        calls.append(1)
        return original(*args) * (float("nan") if len(calls) == 2 else 1.0)
    monkeypatch.setattr(core, "label_loss", spoiled)
    with pytest.raises(FloatingPointError, match="not finite at step 2, .*in a batch of word_sorting, dyck_languages"):
        run(tmp_path, method="lora")


def test_every_flag_has_help_and_the_defaults_are_those_of_the_config():
    assert parse([]) == (TrainConfig(), False, False) and parse(["--print-config"])[2]
    config, resuming, _ = parse("--tasks navigate web_of_lies --batch-size 6 --lr 0.1 --overwrite --targets q_proj".split())
    assert not resuming
    assert config == TrainConfig(tasks=["navigate", "web_of_lies"], batch_size=6, lr=0.1, overwrite=True,
                                 targets=["q_proj"])
    assert all(field.metadata["help"] for field in TrainConfig.__dataclass_fields__.values())


def test_a_folder_with_a_run_is_kept_unless_told(tmp_path, few):
    run(tmp_path, method="lora")
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match="already holds a run; name another --out, or add --overwrite"):
        run(tmp_path, method="lora", seed=3)
    assert (tmp_path / "results.json").read_bytes() == before
    assert run(tmp_path, method="lora", seed=3, overwrite=True)["seed"] == 3


def test_run_folders_are_numbered(tmp_path, monkeypatch, few):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run(None, out=None, method="lora", steps=1)
    names = sorted(path.name for path in Path("runs").iterdir())
    assert names == ["lora-word_sorting-dyck_languages-seed0", "lora-word_sorting-dyck_languages-seed0-2"]


def test_main_works_from_a_notebook_and_a_plain_module():
    """No global state: adapters can be added to a model by hand, beside `run`."""
    model, _, _ = load_model("mini", "cpu")
    assert len(add_adapters(model, AdapterConfig("rlora"))) == 3 * model.config.num_hidden_layers


def test_a_recipe_sets_what_the_paper_s_script_sets_and_each_field_can_be_another(capsys):
    config, resuming, _ = training.parse(["--recipe", "rlora-paper", "--model", "mini", "--rank", "2"])
    expected = {"model": "mini", "method": "rlora", "rank": 2, "alpha": 32, "dropout": 0.1, "heads": 5, "lr": 2e-4,
                "batch_size": 96, "accumulation": 16, "warmup": 0.03}
    assert {name: getattr(config, name) for name in expected} == expected and not resuming
    assert tuple(config.targets) == ("gate_proj", "up_proj", "down_proj")
    note, _, printed = capsys.readouterr().out.partition("\n")
    assert note.startswith("rlora-paper: not known of it: steps") and json.loads(printed)["alpha"] == 32
    align, _, _ = training.parse(["--recipe", "align-paper", "--resume", "auto", "--out", "nowhere"])
    assert (align.model, align.rank, align.align_weight, align.batch_size) == ("Qwen/Qwen2.5-7B", 8, 0.2, 50)
    for flags, message in ((["--recipe", "x"], "there are: rlora-paper, align-paper"),
                           (["--recipe", "rlora-paper", "--resume", "runs/x"], "leave --recipe out")):
        with pytest.raises(ValueError, match=message):
            training.parse(flags)


@pytest.mark.parametrize("name", ["rlora-paper", "align-paper"])
def test_a_recipe_runs_on_the_embedded_model(tmp_path, name):
    config, _, _ = training.parse(["--recipe", name, "--model", "mini", "--steps", "2", "--tasks", "navigate",
                                   "web_of_lies", "--dtype", "float32", "--score-samples", "5", "--device", "cpu",
                                   "--out", str(tmp_path / "run")])
    assert training.run(config)["trainable_parameters"] > 0
