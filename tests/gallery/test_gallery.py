"""The methods of the gallery: each against its equation, written out, and each through a whole run."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import TINY, Killed, at_step, kill, make_batch, make_llama
from torch import nn

from tinylora_mtl import gallery
from tinylora_mtl.adapters import LAYERS, AdapterConfig, adapter_parameters, add_adapters, find_adapters, merge_adapters
from tinylora_mtl.config import MINI_LR, TrainConfig
from tinylora_mtl.gallery import bora, lori, lori_sparse, more, mtl_lora, multilora, smora
from tinylora_mtl.lab.heads import inspect_run
from tinylora_mtl.loss import label_logits, label_loss
from tinylora_mtl.run import scoring, training
from tinylora_mtl.run.adapter_files import adapter_tensors, load_adapter, save_adapter
from tinylora_mtl.run.folder import how_to_go_on
from tinylora_mtl.run.gradients import gradients_for
from tinylora_mtl.run.methods import TYPED, find_method, in_gallery, typed_method
from tinylora_mtl.run.models import load_model
from tinylora_mtl.run.settings import resume_config
from tinylora_mtl.train import GRADIENTS

METHODS = in_gallery()
CORE = {"lora", "hydralora", "rlora", "mlora", "align", "meta"}
BY_TASK = {"bora", "more", "mtl_lora"}


@pytest.fixture(autouse=True)
def known():
    """The gallery's methods are known to the core in these tests, and forgotten after each."""
    for name in METHODS:
        find_method(name)
    yield
    for table in (LAYERS, MINI_LR, GRADIENTS):
        for name in [name for name in table if name not in CORE]:
            del table[name]
    TYPED.clear()


def layer(module, d_in=6, d_out=5, **changes):
    """A layer with random numbers in all that trains."""
    torch.manual_seed(0)
    settings = {"rank": 3, "alpha": 6, "heads": 2, "tasks": ("a", "b", "c")} | changes
    made = module.Layer(nn.Linear(d_in, d_out), AdapterConfig("x", **settings))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("base."):
                parameter.copy_(torch.randn_like(parameter))
    return made


X = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([0, 2, 1, 2])


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# -------------------------------------------------------------------------------------------------- the equations
def test_multilora_is_its_equation():
    made = layer(multilora)
    A, B = made.lora_A.weight.split(3), made.lora_B.weight.split(3, dim=1)
    branches = sum(made.gates[:, i] * (X @ A[i].T @ B[i].T) for i in range(2))
    close(made(X), made.base(X) + 2 * branches)  # s = 6 / 3
    close(X @ made.delta().T, 2 * branches)
    fresh = multilora.Layer(nn.Linear(6, 400), AdapterConfig("x", rank=9, heads=2))
    assert fresh.lora_B.weight.detach().abs().max() == pytest.approx(1 / 3, rel=0.01) and not fresh.gates.any()


def test_mtl_lora_is_its_equation():
    made = layer(mtl_lora)
    w = torch.softmax(made.mixture / 0.1, dim=-1)
    B = [sum(w[t, i] * made.heads[i] for i in range(2)) for t in range(3)]
    made.task_ids = IDS
    rows = [X[n] @ made.lora_A.weight.T @ made.task_matrices[t].T @ B[t].T for n, t in enumerate(IDS.tolist())]
    close(made(X), made.base(X) + 2 * torch.stack(rows))
    made.task_ids = 2
    close(X @ made.delta().T, 2 * X @ made.lora_A.weight.T @ made.task_matrices[2].T @ B[2].T)
    fresh = mtl_lora.Layer(nn.Linear(6, 5), AdapterConfig("x", rank=3, heads=2, tasks=("a", "b")))
    assert torch.equal(fresh.task_matrices.detach(), torch.eye(3).repeat(2, 1, 1)) and not fresh.heads.any()


def test_lori_trains_b_alone():
    made = layer(lori)
    assert [name for name, _ in made.named_parameters() if not name.startswith("base.")] == ["lora_B.weight"]
    close(made(X), made.base(X) + 2 * X @ made.lora_A.weight.T @ made.lora_B.weight.T)
    other = lori.Layer(nn.Linear(6, 5), AdapterConfig("x", rank=3))
    assert not torch.equal(other.lora_A.weight, made.lora_A.weight)  # drawn, not a constant


def test_lori_sparse_keeps_a_tenth_of_all_layers_together():
    layers = [layer(lori_sparse, 10, 20, rank=5), layer(lori_sparse, 10, 20, rank=5)]
    with torch.no_grad():
        layers[1].lora_B.weight.mul_(0.01)  # whose largest are smaller than the other's smallest tenth
    largest = layers[0].lora_B.weight.abs().flatten().topk(20).indices
    lori_sparse.keep_the_largest(layers)
    kept = layers[0].mask.flatten().nonzero()[:, 0]
    assert len(kept) == 20 and set(kept.tolist()) == set(largest.tolist())
    assert not layers[1].mask.any() and not layers[0].lora_B.weight.any()
    with torch.no_grad():
        layers[0].lora_B.weight.fill_(1.0)
    x = torch.randn(3, 10)
    close(layers[0](x), layers[0].base(x) + 6 / 5 * x @ layers[0].lora_A.weight.T @ layers[0].mask.T)
    close(x @ layers[0].delta().T, layers[0](x) - layers[0].base(x))


@pytest.mark.parametrize("parts", [1, 2])
def test_lori_makes_its_masks_half_way(parts):
    model, batch = make_llama(), make_batch(each=4)
    adapters = add_adapters(model, AdapterConfig("lori_sparse", rank=4)).values()
    config = TrainConfig(method="lori_sparse", steps=4, batch_size=12, accumulation=parts)
    optimizer, kept = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2), []
    for _ in range(4):
        optimizer.zero_grad()
        gradients_for(config)(model.train(), batch, config)
        optimizer.step()
        kept.append(torch.cat([adapter.mask.flatten() for adapter in adapters]).mean().item())
    assert kept == pytest.approx([1, 1, 0.1, 0.1], abs=0.002)


def test_smora_is_its_equation_and_evens_out_its_load():
    made = layer(smora, rank=4, heads=2).eval()
    made.load_bias.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1]))
    expected = made.base(X).clone()
    for n in range(4):
        for i in range(7):
            x = X[n, i]
            q = torch.sigmoid(made.rank_router.weight @ x) + made.load_bias
            chosen = q.argsort(descending=True)[:2]
            for j in chosen.tolist():
                g = 2 * q[j] / q[chosen].sum()
                expected[n, i] += 6 / 2 * g * (made.lora_A.weight[j] @ x) * made.lora_B.weight[:, j]
    close(made(X), expected)
    before, made = made.load_bias.clone(), made.train()
    q = torch.sigmoid(made.rank_router(X)) + before
    counts = torch.stack([(q.topk(2).indices == j).sum() for j in range(4)])
    made(X)
    grown = (made.load_bias - before) / 1e-5
    torch.testing.assert_close(grown, torch.sign(14.0 - counts), rtol=0, atol=0.02)  # 28 tokens with 2 ranks of 4 each


def test_bora_is_its_equation():
    made = layer(bora)
    made.task_ids = IDS
    rows = [X[n] @ made.task_A[t].T @ made.task_B[t].T for n, t in enumerate(IDS.tolist())]
    close(made(X), made.base(X) + 2 * torch.stack(rows))
    fresh = bora.Layer(nn.Linear(6, 5), AdapterConfig("x", rank=3, tasks=("a", "b")))
    assert torch.equal(fresh.task_A[1], fresh.lora_A.weight) and not fresh.task_B.any()


def test_boras_loss_draws_tasks_to_their_mean():
    """The gradient of τ/2 · Σ ‖θ_t - Θ‖² by hand, and in micro-batches the same."""
    model, config = make_llama(), TrainConfig(method="bora", batch_size=12, lr=1e-3)
    add_adapters(model, AdapterConfig("bora", rank=2, tasks=("a", "b", "c"), targets=("q_proj",)))
    adapters = find_adapters(model).values()
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.randn_like(parameter))
    batch = make_batch(each=4)
    found = {}
    for parts in (1, 3):
        model.zero_grad()
        metrics = gradients_for(replace(config, accumulation=parts))(model, batch, replace(config, accumulation=parts))
        found[parts] = {name: parameter.grad.clone() for name, parameter in adapter_parameters(model).items()}
    torch.testing.assert_close(found[1], found[3], rtol=1e-3, atol=1e-5)
    mean = next(iter(adapters)).lora_A.weight
    own = next(iter(adapters)).task_A
    close(mean.grad, 1e-2 * (mean - own).sum(0))  # Θ takes no part in the forward pass
    apart = sum((a.task_A - a.lora_A.weight).square().sum() + (a.task_B - a.lora_B.weight).square().sum()
                for a in adapters)
    close(metrics["apart"], apart.detach())


def test_more_is_its_equation_and_its_gate_learns():
    made = layer(more, rank=4)
    made.task_ids = IDS
    p = torch.softmax(made.rank_gate(made.tasks), dim=-1)
    ranks = (p.argmax(-1) + 1).tolist()
    rows = [X[n] @ made.lora_A.weight[:ranks[t]].T @ made.lora_B.weight[:, :ranks[t]].T
            for n, t in enumerate(IDS.tolist())]
    close(made(X), made.base(X) + 6 / 4 * torch.stack(rows))
    assert len(set(ranks)) > 1  # or the test would tell less
    made(X).square().sum().backward()
    assert made.rank_gate.weight.grad.abs().max() > 0 and made.tasks.grad.abs().max() > 0


# ----------------------------------------------------------------------------------------- what all have in common
@pytest.mark.parametrize("method", METHODS)
def test_it_starts_as_the_base_and_every_parameter_trains(method):
    model = make_llama()
    batch = make_batch(each=4)
    before = label_logits(model, batch)[0]
    add_adapters(model, AdapterConfig(method, rank=4, heads=3, tasks=("a", "b", "c")))
    for adapter in find_adapters(model).values():
        if method in BY_TASK:
            adapter.task_ids = 1
    torch.testing.assert_close(label_logits(model.eval(), batch)[0], before, rtol=1e-3, atol=1e-4)
    config = TrainConfig(method=method, steps=20, batch_size=12)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=1e-2)
    start = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(gradients_for(config)(model.train(), batch, config)["loss"].item())
        optimizer.step()
    assert losses[-1] < losses[0]
    still = [name for name, parameter in adapter_parameters(model).items() if torch.equal(parameter, start[name])]
    assert not still


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_bit_for_bit_and_its_files_hold_all(tmp_path, method):
    config = TrainConfig(method=method, **TINY | {"out": str(tmp_path / "run"), "steps": 6, "checkpoint_every": 2,
                                                  "heads": 2})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 5, kill)
        training.run(config)
    results = training.resume(tmp_path / "run")
    whole = training.run(replace(config, out=str(tmp_path / "whole")))
    assert results["after"] == whole["after"] == scoring.command(["--run", str(tmp_path / "run"), "--device", "cpu"])
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    description = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (description["peft_type"], description["method"], description["tasks"]) == (
        "TINYLORA_MTL_GALLERY", method, list(TINY["tasks"]))
    if method == "bora":  # its tasks have an A each, so there is no one space of features
        with pytest.raises(ValueError, match="no adapted layer has features A x"):
            inspect_run(tmp_path / "run", "cpu")
    else:
        assert len(inspect_run(tmp_path / "run", "cpu")[0]["layers"]) == 5


@pytest.mark.parametrize("method", METHODS)
def test_it_comes_back_from_its_files_and_merges_or_says_why_not(tmp_path, method):
    model, batch = make_llama(), make_batch(each=2)
    add_adapters(model, AdapterConfig(method, rank=4, heads=3, tasks=("a", "b", "c")))
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor += 0.1 * torch.rand_like(tensor)
    save_adapter(model, tmp_path)
    again = make_llama()
    load_adapter(again, tmp_path)
    for adapter in [*find_adapters(model).values(), *find_adapters(again).values()]:
        if method in BY_TASK:
            adapter.task_ids = 2
    expected = label_logits(model.eval(), batch)[0]
    assert torch.equal(label_logits(again.eval(), batch)[0], expected)
    if method in ("smora", "rlora_released"):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match="no single weight"):
            merge_adapters(model)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    else:
        merge_adapters(model)
        torch.testing.assert_close(label_logits(model, batch)[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", sorted(BY_TASK))
def test_it_merges_only_for_a_task_that_was_named(method):
    """Not for whatever the last batch held, even if that was one sample."""
    model = make_llama()
    adapters = add_adapters(model, AdapterConfig(method, rank=2, tasks=("a", "b"))).values()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for told in (None, torch.tensor([1])):
        for adapter in adapters:
            adapter.task_ids = told
        with pytest.raises(ValueError, match="tell the layer which one"):
            merge_adapters(model)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", sorted(BY_TASK))
def test_a_task_that_it_does_not_know_is_refused(tmp_path, method):
    config = TrainConfig(method=method, **TINY | {"out": str(tmp_path / "run")})
    training.run(config)
    with pytest.raises(ValueError, match="tasks word_sorting, dyck_languages, so it cannot answer task 'navigate'"):
        scoring.command(["--run", str(tmp_path / "run"), "--tasks", "navigate", "--device", "cpu"])
    model = make_llama()
    add_adapters(model, AdapterConfig(method, rank=2, tasks=("a", "b", "c")))
    with pytest.raises(ValueError, match="has to be told the task"):
        label_loss(model, make_batch())


def test_each_file_is_short():
    for name in METHODS:
        module = LAYERS[name]["layer"].__module__.rsplit(".", 1)[-1]
        lines = open(f"{multilora.__file__.removesuffix('multilora.py')}{module}.py").read().splitlines()
        assert len(lines) <= 60, name


# ---------------------------------------------------------------------------------------------- a method of your own
MINE = '''
"""LoRA whose branch is halved."""
from tinylora_mtl.lora import LoRALinear
LR = 1e-3
class Layer(LoRALinear):
    def __init__(self, base, config):
        super().__init__(base, config.rank, config.alpha / 2)
'''


def test_a_file_of_your_own_is_taken_from_the_command_line_alone(tmp_path):
    file = tmp_path / "halved_lora.py"
    file.write_text(MINE)
    config, resuming, _ = training.parse(["--method", str(file), "--steps", "3"])
    assert config.method == "halved_lora" and not resuming
    results = training.run(replace(config, **TINY | {"out": str(tmp_path / "run")}))
    forget("halved_lora")
    with pytest.raises(ValueError, match="unknown method 'halved_lora'"):
        scoring.command(["--run", str(tmp_path / "run"), "--device", "cpu"])
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(content | {"method": str(file)}))
    with pytest.raises(ValueError, match="unknown method"):
        scoring.command(["--run", str(tmp_path / "run"), "--device", "cpu"])
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    scores = scoring.command(["--run", str(tmp_path / "run"), "--device", "cpu", "--method", str(file)])
    assert scores == results["after"]


def test_a_file_with_gradients_alone_and_a_layer_below_another(tmp_path):
    """A method may keep LoRA's layers; and a layer's own parent counts as its own."""
    (tmp_path / "twice.py").write_text(
        "from tinylora_mtl.train import lora_gradients\nLR = 1e-3\n\ndef gradients(model, batch, config):\n"
        "    lora_gradients(model, batch, config)\n    return lora_gradients(model, batch, config)\n")
    name = typed_method(str(tmp_path / "twice.py"))
    results = training.run(TrainConfig(method=name, **TINY | {"out": str(tmp_path / "run")}))
    assert name not in LAYERS and results["trainable_parameters"] > 0
    parent = MINE.replace("class Layer", "class Parent") + "    def forward(self, x):\n        return self.base(x)\n"
    (tmp_path / "below.py").write_text(parent + "class Layer(Parent):\n    pass\n")
    with pytest.raises(ValueError, match="a forward of its own, so it needs a delta too"):
        typed_method(str(tmp_path / "below.py"))


@pytest.mark.parametrize("wrong", [lambda delta: delta.T, lambda delta: delta[:, :1]])
def test_a_delta_of_another_shape_changes_nothing(monkeypatch, wrong):
    """Although only the last layer has it: all are asked before one is changed."""
    model = make_llama()
    *_, last = add_adapters(model, AdapterConfig("lora", rank=2)).values()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    monkeypatch.setattr(last, "delta", lambda delta=last.delta: wrong(delta()))
    with pytest.raises(ValueError, match="has another shape than its weight"):
        merge_adapters(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert len(find_adapters(model)) > 1


def test_a_run_knows_the_file_of_its_method(tmp_path, capsys):
    """Another file of that name goes on with no run and says so when it scores; the hint to go on names the file."""
    file = tmp_path / "a folder" / "my_lora.py"
    file.parent.mkdir()
    file.write_text(MINE)
    name = typed_method(str(file))
    assert how_to_go_on("a run", name) == f"to go on: python -m tinylora_mtl.train --resume 'a run' --method '{file}'"
    config = TrainConfig(method=name, **TINY | {"out": str(tmp_path / "run")})
    training.run(config)
    flags = ["--run", str(tmp_path / "run"), "--device", "cpu", "--method", str(file)]
    scoring.command(flags)
    assert "the file of the method has changed" not in capsys.readouterr().out
    file.write_text(MINE + "# another\n")
    assert typed_method(str(file)) == name  # again: as in a notebook, after the file was changed
    scoring.command(flags)
    assert "the file of the method has changed since the run began" in capsys.readouterr().out
    (tmp_path / "run" / "results.json").unlink()
    with pytest.raises(ValueError, match="the file of the method has changed since the run began"):
        training.run(resume_config(tmp_path / "run"), resuming=True)
    forget(name)
    with pytest.raises(ValueError, match="a file of yours is --method path/to/my_lora.py"):
        scoring.command(flags[:-2])
    with pytest.raises(ValueError, match="known once tinylora_mtl.run.methods.typed_method"):
        load_adapter(load_model("mini", "cpu")[0], tmp_path / "run" / "adapter")


def test_the_tutorial_builds_one_from_nothing(tmp_path, monkeypatch):
    """Its code as it stands in the docstring, trained, scored, and merged."""
    tutorial, after = gallery.__doc__.split("and once it has been trained, in Python:")
    code, after = ([line[4:] for line in text.splitlines() if line.startswith("    ") and "python -m" not in line]
                   for text in (tutorial, after))
    file = tmp_path / "my_method.py"
    file.write_text("\n".join(code))
    name = typed_method(str(file))
    results = training.run(TrainConfig(method=name, **TINY | {"out": str(tmp_path / "run")}))
    flags = ["--run", str(tmp_path / "run"), "--device", "cpu", "--method", str(file)]
    forget(name)
    assert scoring.command(flags) == results["after"]
    model, batch = make_llama(), make_batch()
    add_adapters(model, AdapterConfig(name, rank=2))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.copy_(torch.rand_like(parameter))
    expected = label_logits(model.eval(), batch)[0]
    merge_adapters(model)
    torch.testing.assert_close(label_logits(model, batch)[0], expected, rtol=1e-3, atol=1e-4)
    forget(name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "run").rename(tmp_path / "runs" / "my_method-mini-seed0")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec("\n".join(after), names)
    assert type(names["model"].model.layers[0].self_attn.q_proj) is nn.Linear


def forget(name):
    """As in another process, which has not been told of a file."""
    for known in (LAYERS, MINI_LR, TYPED):
        known.pop(name, None)


@pytest.mark.parametrize("text, message", [
    ("x = 1", "is no method: it needs LR"), ("LR = 1", "is no method"), (None, "there is no file"),
    ("from torch.nn import Module as Layer\nLR = 1", "is no LoRALinear"),
    (MINE + "    def forward(self, x):\n        return self.base(x)\n", "a forward of its own, so it needs a delta too")])
def test_a_file_that_is_no_method_is_refused(tmp_path, text, message):
    file = tmp_path / "some.py"
    if text:
        file.write_text(text)
    with pytest.raises(ValueError, match=message):
        typed_method(str(file))
    (tmp_path / "lora.py").write_text(MINE)
    with pytest.raises(ValueError, match="has the name of a method of this package"):
        typed_method(str(tmp_path / "lora.py"))
