"""A run knows its data and its base: what has changed since is told, and what was trained on is not scored."""

import json
import random
import re

import pytest
import torch
from conftest import TINY, Killed, at_step, kill, make_llama, run
from transformers import AutoTokenizer

from tinylora_mtl import AdapterConfig, add_adapters, load_adapter, save_adapter
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.lab import heads
from tinylora_mtl.run import fingerprints, scoring, training
from tinylora_mtl.run.models import MINI, load_model

ROWS = [(f"What is item {i}?", random.Random(i).choice(["Red", "Blue", "Yes", "No"])) for i in range(160)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": prompt, "target": answer}) + "\n" for prompt, answer in rows))
    return path


def trained(tmp_path, task, **changes):
    run(tmp_path / "run", **dict(tasks=(str(task),), method="lora", samples=None, split="test") | changes)
    return tmp_path / "run"


def test_a_file_that_grows_is_scored_on_prompts_that_were_not_trained_on(tmp_path, capsys):
    task = write(tmp_path / "items.jsonl", ROWS[:120])
    folder = trained(tmp_path, task)
    capsys.readouterr()
    scoring.command(["--run", str(folder), "--device", "cpu"])
    assert "changed" not in capsys.readouterr().out
    write(task, ROWS)
    scoring.command(["--run", str(folder), "--device", "cpu"])
    printed = capsys.readouterr().out
    then, now = map(int, re.search(r"test samples of task 'items' have changed .* \((\d+) then, (\d+) now\)",
                                   printed).groups())
    assert now > then and "were trained on" not in printed
    write(task, ROWS[119::-1])  # sorted otherwise, it is the same
    scoring.command(["--run", str(folder), "--device", "cpu"])
    assert "changed" not in capsys.readouterr().out


def test_prompts_that_were_trained_on_are_not_scored(tmp_path, capsys):
    """Neither where they have moved into the test split, nor as another task's."""
    write(tmp_path / "t" / "train.jsonl", ROWS[:60])
    test = write(tmp_path / "t" / "test.jsonl", ROWS[60:80])
    folder = trained(tmp_path, tmp_path / "t")
    write(test, ROWS[70:80] + ROWS[:7])
    stored = fingerprints.read_fingerprints(folder)["training_prompts"].split()
    count = sum(fingerprints.of_prompt(prompt) in stored for prompt, _ in ROWS[:7])
    assert 0 < count < 8
    with pytest.raises(ValueError, match=rf"20 then, 17 now.; {count} of 17 test prompts of task 't' were trained on, so"):
        scoring.command(["--run", str(folder), "--device", "cpu"])
    write(tmp_path / "other" / "test.jsonl", [(f" {prompt}", "Red") for prompt, _ in ROWS[:7]])
    with pytest.raises(ValueError, match=f"{count} of 7 test prompts of task 'other' were trained on"):
        scoring.command(["--run", str(folder), "--tasks", str(tmp_path / "other"), "--device", "cpu"])
    scoring.command(["--adapter", str(folder / "adapter"), "--tasks", str(tmp_path / "other"), "--device", "cpu"])


def test_prompts_shared_by_tasks_are_told_and_scored(tmp_path, capsys):
    for name, part in {"a": (ROWS[:60], ROWS[60:70]), "b": (ROWS[70:120], ROWS[:8])}.items():
        write(tmp_path / name / "train.jsonl", part[0])
        write(tmp_path / name / "test.jsonl", part[1])
    run(tmp_path / "run", tasks=(str(tmp_path / "a"), str(tmp_path / "b")), method="lora", samples=None, split="test")
    said, = re.findall(r"(\d of 8) test prompts of task 'b' are training prompts of task 'a'", capsys.readouterr().out)
    scoring.command(["--run", str(tmp_path / "run"), "--device", "cpu"])
    assert f"{said} test prompts of task 'b' were trained on, as prompts of another task" in capsys.readouterr().out


def unfinished(tmp_path, **changes):
    """A run that is killed in its fifth step, with a checkpoint at the fourth."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        trained(tmp_path, write(tmp_path / "t.jsonl", ROWS[:80]), **dict(steps=7, checkpoint_every=4) | changes)
    return tmp_path / "run"


@pytest.mark.parametrize("change,message", [
    (ROWS[:60], "the training samples of task 't' have changed since the run began .59 then, 42 now"),
    (ROWS[79::-1], "the training samples of task 't' have changed since the run began .59 as before, but others"),
    ([(prompt, "Red") for prompt, _ in ROWS[:80]], "training samples .*; the validation samples .*; the test samples")])
def test_a_run_does_not_go_on_with_other_data(tmp_path, change, message):
    folder = unfinished(tmp_path)
    write(tmp_path / "t.jsonl", change)
    with pytest.raises(ValueError, match=message):
        training.resume(folder)


def model_folder(tmp_path, seed=0):
    tokenizer = AutoTokenizer.from_pretrained(MINI)
    make_llama(seed, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    return str(tmp_path / "m")


def test_a_run_does_not_go_on_with_another_base(tmp_path):
    folder = unfinished(tmp_path, model=model_folder(tmp_path))
    model_folder(tmp_path, seed=1)
    with pytest.raises(ValueError, match="the weights of the base model have changed since the run began"):
        training.resume(folder)
    model_folder(tmp_path, seed=0)
    assert training.resume(folder)["seconds"] > 0


def test_a_run_does_not_go_on_with_another_configuration_or_tokenizer(tmp_path, capsys):
    folder, name = unfinished(tmp_path, model=model_folder(tmp_path)), "the configuration or the tokenizer of the base"
    config, tokenizer = (tmp_path / "m" / file for file in ("config.json", "tokenizer.json"))
    before = config.read_text(), tokenizer.read_text()
    config.write_text(json.dumps(json.loads(before[0]) | {"rms_norm_eps": 0.1}))
    with pytest.raises(ValueError, match=name):
        training.resume(folder)
    config.write_text(json.dumps(json.loads(before[0]) | {"use_cache": False, "eos_token_id": 3}))  # these are no matter
    content = json.loads(before[1])
    vocabulary = content["model"]["vocab"]
    one, other = "yes" if "yes" in vocabulary else list(vocabulary)[300], list(vocabulary)[301]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    tokenizer.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=name):
        training.resume(folder)
    tokenizer.write_text(before[1])
    training.resume(folder)
    config.write_text(json.dumps(json.loads(before[0]) | {"hidden_act": "gelu"}))
    for look in (lambda: scoring.command(["--run", str(folder), "--device", "cpu"]), lambda: heads.inspect_run(folder)):
        capsys.readouterr()
        look()
        assert f"{name} model has changed since the run began" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{}", '{"base": "", "tasks": [], "training_prompts": ""}', "[]", "{",
                                     '{"base": "", "configuration_and_tokenizer": "", "tasks": {"t": 1}, '
                                     '"training_prompts": ""}',
                                     '{"base": "", "configuration_and_tokenizer": "", "tasks": {"t": {"test": 5}}, '
                                     '"training_prompts": ""}'])
def test_spoiled_fingerprints_are_refused(tmp_path, content):
    folder = trained(tmp_path, write(tmp_path / "t.jsonl", ROWS[:80]))
    (folder / "fingerprints.json").write_text(content)
    for look in (lambda: scoring.command(["--run", str(folder), "--device", "cpu"]), lambda: heads.inspect_run(folder)):
        with pytest.raises(ValueError, match="fingerprints.json is no file that can be read"):
            look()


def test_the_fingerprints_of_another_run_are_none_of_this_one(tmp_path):
    folder = unfinished(tmp_path)
    (tmp_path / "t.jsonl").rename(tmp_path / "other.jsonl")
    other = trained(tmp_path / "whole", tmp_path / "other.jsonl")
    (tmp_path / "other.jsonl").rename(tmp_path / "t.jsonl")
    (folder / "fingerprints.json").write_bytes((other / "fingerprints.json").read_bytes())
    with pytest.raises(ValueError, match="task 't' is not in fingerprints.json"):
        training.resume(folder)
    (folder / "adapter").mkdir()
    with pytest.raises(ValueError, match="task 't' of the run in .* is not in its fingerprints.json"):
        scoring.command(["--run", str(folder), "--device", "cpu"])


def test_a_run_whose_files_have_moved_goes_on_with_their_new_places(tmp_path):
    folder = unfinished(tmp_path, model=model_folder(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "t.jsonl").rename(tmp_path / "elsewhere" / "t.jsonl")
    (tmp_path / "m").rename(tmp_path / "elsewhere" / "m")
    given = ["--resume", str(folder), "--tasks", str(tmp_path / "elsewhere" / "t.jsonl"), "--model",
             str(tmp_path / "elsewhere" / "m")]
    training.command(given)
    config = json.loads((folder / "config.json").read_text())
    assert config["model"] == str(tmp_path / "elsewhere" / "m")
    assert config["tasks"] == [str(tmp_path / "elsewhere" / "t.jsonl")]


def test_labels_that_have_changed_are_told(tmp_path, capsys):
    write(tmp_path / "t" / "train.jsonl", ROWS[:80])
    write(tmp_path / "t" / "test.jsonl", ROWS[80:100])
    folder = trained(tmp_path, tmp_path / "t", score="choose")
    write(tmp_path / "t" / "train.jsonl", [(prompt, answer.replace("Red", "Green")) for prompt, answer in ROWS[:80]])
    scoring.command(["--run", str(folder), "--device", "cpu"])
    assert "the labels of task 't' have changed since the run began" in capsys.readouterr().out


def test_a_run_without_fingerprints_neither_goes_on_nor_is_scored_on_its_own_tasks(tmp_path, capsys):
    folder = unfinished(tmp_path)
    (folder / "fingerprints.json").unlink()
    with pytest.raises(ValueError, match="of an older version of this package and has no fingerprints.json"):
        training.resume(folder)
    other = trained(tmp_path / "whole", tmp_path / "t.jsonl")
    (other / "fingerprints.json").unlink()
    with pytest.raises(ValueError, match="older version .* so test prompts of task 't' may have been trained on"):
        scoring.command(["--run", str(other), "--device", "cpu"])
    capsys.readouterr()
    scoring.command(["--run", str(other), "--tasks", "word_sorting", "--device", "cpu"])
    assert "so test prompts may have been trained on as another task's" in capsys.readouterr().out


def test_heads_tell_what_has_changed(tmp_path, capsys):
    task = write(tmp_path / "t.jsonl", ROWS[:120])
    folder = trained(tmp_path, task)
    write(task, ROWS)
    heads.inspect_run(folder, "cpu")
    assert "the validation samples of task 't' have changed since the run began" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fingerprint_of_a_base(dtype, tmp_path):
    """The same before adapters go in and with them in, compiled or not; another for any other weight."""
    def fresh(**changes):
        return make_llama(**changes).to(getattr(torch, dtype))

    model = fresh()
    expected = fingerprints.of_base(model)
    assert fingerprints.of_base(make_llama()) == expected  # whatever the dtype
    add_adapters(model, AdapterConfig("rlora", targets=("q_proj", "lm_head")))
    assert fingerprints.of_base(model) == expected == fingerprints.of_base(torch.compile(model))
    model.model.layers[0] = torch.compile(model.model.layers[0])  # a block of it
    assert fingerprints.of_base(model) == expected
    for name, parameter in fresh().named_parameters():
        changed = fresh()
        changed.get_parameter(name).data.view(-1)[-1] += 0.5
        assert fingerprints.of_base(changed) != expected
    assert fingerprints.of_base(fresh(num_hidden_layers=1)) != expected != fingerprints.of_base(fresh(seed=1))


def test_an_adapter_warns_on_another_base(tmp_path, recwarn):
    model = make_llama()
    add_adapters(model, AdapterConfig(rank=2))
    save_adapter(model, tmp_path / "adapter")
    assert "base_sha256" not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    load_adapter(make_llama(), tmp_path / "adapter")
    load_adapter(make_llama().to(torch.bfloat16), tmp_path / "adapter")
    half = make_llama().to(torch.float16)  # whose rounded weights are told from none
    load_adapter(half, tmp_path / "adapter")
    save_adapter(half, tmp_path / "half")
    load_adapter(make_llama(), tmp_path / "half")
    assert not recwarn
    with pytest.warns(UserWarning, match="was trained on other base weights than this model has"):
        load_adapter(make_llama(seed=1), tmp_path / "adapter")


def test_settings_in_force_are_printed_and_nothing_is_done(tmp_path, capsys):
    training.command(["--print-config", "--method", "meta", "--tasks", "word_sorting", "--out", str(tmp_path / "run")])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == set(TrainConfig.__dataclass_fields__) and not (tmp_path / "run").exists()
    assert (printed["lr"], printed["max_length"], printed["targets"]) == (5e-3, 256, ["all-linear"])
    assert printed["score_samples"] == 200


def flags(tmp_path, *more):
    return ["--resume", "auto", "--out", str(tmp_path / "run"), "--tasks", "t.jsonl", "--method", "lora", "--steps", "7",
            "--batch-size", "4", "--rank", "2", "--checkpoint-every", "4", "--device", "cpu", *more]


def test_one_command_starts_goes_on_and_ends(tmp_path, capsys, monkeypatch):
    """Killed before there is anything, in the middle, and given again when all is done."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.jsonl", ROWS[:80])
    with pytest.raises(ValueError, match="--resume auto needs --out"):
        training.command(["--resume", "auto"])
    for step, left in ((1, False), (5, True)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            at_step(patch, step, kill)
            training.command(flags(tmp_path))
        assert list((tmp_path / "run").glob("checkpoints/*")) != [] or not left
    (tmp_path / "run" / "config.json").rename(tmp_path / "config.json")  # as if killed before it was written
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 6, kill)
        training.command(flags(tmp_path))
    capsys.readouterr()
    training.command(flags(tmp_path))
    assert "resumed after step 4" in capsys.readouterr().out
    training.command(flags(tmp_path))
    assert "nothing is left to do" in capsys.readouterr().out
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")  # the same file by another way
    training.command([{"t.jsonl": "../sub/../t.jsonl"}.get(flag, flag) for flag in flags(tmp_path)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--steps would make it another run"):
        training.command(flags(tmp_path, "--steps", "8"))
    expected = training.run(TrainConfig(tasks=("t.jsonl",), method="lora", steps=7, batch_size=4, rank=2, device="cpu",
                                        out=str(tmp_path / "never stopped")))
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found | {"seconds": 0} == expected | {"seconds": 0}


def test_the_parameters_of_routers_are_counted_by_themselves(tmp_path, capsys):
    found = run(tmp_path / "run", method="rlora")
    model, _, _ = load_model("mini", "cpu")
    adapters = add_adapters(model, AdapterConfig("rlora", rank=2, targets=TINY["targets"]))
    assert found["router_parameters"] == sum(adapter.router.weight.numel() for adapter in adapters.values()) > 0
    assert f", {found['router_parameters']:,} of them in routers" in capsys.readouterr().out
    assert run(tmp_path / "other", method="lora")["router_parameters"] == 0
