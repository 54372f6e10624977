"""Mistakes and mishaps: each ends in a line or two that name the thing and the remedy, and nothing is written."""

import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import SETTINGS, TINY, command, flags_of, outcome, run, start, stopped_run, tree
from safetensors.torch import load_file, save_file

from tinylora_mtl import AdapterConfig, add_adapters, load_adapter, save_adapter
from tinylora_mtl import train as core
from tinylora_mtl.run import training
from tinylora_mtl.run.checkpoint import list_checkpoints, load_checkpoint
from tinylora_mtl.run.cli import run_command
from tinylora_mtl.run.models import MINI, load_model

# ------------------------------------------------------------------------------------- adapters from a stranger
PAYLOAD = "../../etc/passwd"


def entry(**changes):
    """Spoil an adapter by other entries in its adapter_config.json."""
    return lambda config, tensors: config.update(changes)


def tensor(change):
    """Spoil an adapter by another first tensor."""
    def spoil(config, tensors):
        key = sorted(tensors)[0]
        tensors[key] = change(tensors[key])
    return spoil


def one_nan(x):
    x = x.clone()
    x[-1, -1] = float("nan")
    return x


ADAPTERS = {  # name: (method, how it is spoiled, what the line must say)
    "wrong shape": ("lora", tensor(lambda x: x[:, :-1]), r"has shape \[2, 255\], not \[2, 256\]"),
    "other rank": ("lora", entry(r=3), r"has shape \[2, 256\], not \[3, 256\]"),
    "no dimension": ("lora", tensor(lambda x: x.sum()), r"has shape \[\], not"),
    "extra key": ("lora", lambda c, t: t.update(more=torch.zeros(2)), "more is not known"),
    "missing key": ("lora", lambda c, t: t.pop(sorted(t)[1]), "lora_B.weight is missing"),
    "no layer at all": ("lora", lambda c, t: t.clear(), "it is for another model: there is no layer"),
    "path as a layer": ("lora", lambda c, t: t.update({f"base_model.model.{PAYLOAD}.lora_A.weight": torch.zeros(2, 2)}),
                        "there is no layer ../../etc/passwd"),
    "nan": ("lora", tensor(one_nan), "holds a number that is not finite"),
    "infinity": ("lora", tensor(lambda x: x / 0), "holds a number that is not finite"),
    "whole numbers": ("lora", tensor(lambda x: x.int()), "holds int32, not floating-point numbers"),
    "rank of zero": ("lora", entry(r=0), "its r is 0, not a whole number from 1 to 4096"),
    "rank below zero": ("lora", entry(r=-8), "its r is -8"),
    "absurd rank": ("lora", entry(r=10 ** 9), "its r is 1000000000, not a whole number from 1"),
    "number beyond all": ("lora", entry(r=10 ** 300), "its r is 1000000"),
    "rank as text": ("lora", entry(r="2"), "its r is '2', not a whole number"),
    "rank as truth": ("lora", entry(r=True), "its r is True, not a whole"),
    "rank as fraction": ("lora", entry(r=2.0), "its r is 2.0, not a whole"),
    "no rank": ("lora", lambda c, t: c.pop("r"), r"lora_A.weight has shape \[2, 256\], not \[8, 256\]"),  # PEFT's default
    "alpha as a list": ("lora", entry(lora_alpha=[16]), r"its lora_alpha is \[16\]"),
    "alpha nan": ("lora", entry(lora_alpha=float("nan")), "its lora_alpha is nan"),
    "alpha infinite": ("lora", entry(lora_alpha=float("inf")), "its lora_alpha is inf"),
    "alpha huge": ("lora", entry(lora_alpha=1e300), r"its lora_alpha is 1e\+300"),
    "dropout as text": ("lora", entry(lora_dropout="0.1"), "its lora_dropout is '0.1'"),
    "dropout of one": ("lora", entry(lora_dropout=1.0), "its lora_dropout is 1.0"),
    "use_rslora as text": ("lora", entry(use_rslora="yes"), "its use_rslora is 'yes'"),
    "type as a list": ("lora", entry(peft_type=["LORA"]), r"its type is \['LORA'\]"),
    "another type": ("lora", entry(peft_type="IA3"), "its type is IA3, not LoRA"),
    "dora": ("lora", entry(use_dora=True), "it uses use_dora"),
    "pissa": ("lora", entry(init_lora_weights="pissa"), "it uses init_lora_weights"),
    "start as a dict": ("lora", entry(init_lora_weights={}), "it uses init_lora_weights"),
    "huge heads": ("rlora", entry(heads=10 ** 8), "its heads is 100000000, not a whole number from 1 to 1024"),
    "more heads": ("rlora", entry(heads=6), r"has shape \[5, 112, 2\], not \[6, 112, 2\]"),
    "heads as text": ("rlora", entry(heads="5"), "its heads is '5'"),
    "method of another type": ("rlora", entry(method="lora"), "its method 'lora' is none of its type's"),
    "unknown method": ("rlora", entry(method="os.system"), "its method 'os.system' is none"),
    "method as a list": ("rlora", entry(method=["rlora"]), r"its method \['rlora'\] is none"),
    "no router": ("rlora", lambda c, t: t.pop(next(k for k in t if "router" in k)), "router.weight is missing"),
    "other router": ("hydralora", lambda c, t: t.update({k: v[:-1] for k, v in t.items() if "router" in k}),
                     r"router.weight has shape \[4, 112\]|router.weight has shape \[4, 256\]"),
}
RAW = {  # name: (file, its bytes, what the line must say)
    "config not json": ("adapter_config.json", b"{", "adapter_config.json is no file that can be read: Expecting"),
    "config a list": ("adapter_config.json", b"[]", "it holds a list, not an object"),
    "config empty": ("adapter_config.json", b"", "adapter_config.json is no file that can be read"),
    "config not utf-8": ("adapter_config.json", b'{"r": "\xff\xfe"}', "can't decode byte 0xff"),
    "config deep": ("adapter_config.json", b'{"r": ' + b"[" * 10 ** 5 + b"]" * 10 ** 5 + b"}", "recursion"),
    "config long number": ("adapter_config.json", b'{"r": ' + b"9" * 10 ** 5 + b"}", "can be read: Exceeds the limit"),
    "weights cut off": ("adapter_model.safetensors", None, "is not an adapter that can be loaded"),
    "weights empty": ("adapter_model.safetensors", b"", "is not an adapter that can be loaded"),
    "weights a pickle": ("adapter_model.safetensors", b"\x80\x04cos\nsystem\n", "is not an adapter that can be loaded"),
    "header of exabytes": ("adapter_model.safetensors", b"\xff" * 7 + b"\x0f{}", "is not an adapter that can be loaded"),
    "header beyond the file": ("adapter_model.safetensors", (10 ** 6).to_bytes(8, "little") + b"{}",
                               "is not an adapter that can be loaded"),
    "tensor beyond the file": ("adapter_model.safetensors", lambda header: header.update(
        {"x": {"dtype": "F32", "shape": [10 ** 6, 10 ** 6], "data_offsets": [0, 4 * 10 ** 12]}}),
        "is not an adapter that can be loaded"),
    "tensors that overlap": ("adapter_model.safetensors", lambda header: header.update(
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}), "is not an adapter that can be loaded"),
}


def write_header(file, change):
    """Rewrite the header of a safetensors file and leave its data."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size:])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with runs, adapters and models of all kinds, to be named on the command line."""
    world = tmp_path_factory.mktemp("world")
    (world / "file").write_text("not a folder")
    (world / "empty").mkdir()
    good = {}
    for method in ("lora", "rlora", "hydralora"):
        adapted = load_model("mini", "cpu")[0]
        add_adapters(adapted, AdapterConfig(method, rank=2, targets=("layers.0.mlp.down_proj", "layers.1.mlp.up_proj")))
        save_adapter(adapted, good.setdefault(method, world / "adapters" / method))
    for name, (method, spoil, _) in ADAPTERS.items():
        folder = shutil.copytree(good[method], world / "adapters" / name)
        config, tensors = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / WEIGHTS)
        spoil(config, tensors)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)
    for name, (file, content, _) in RAW.items():
        folder = shutil.copytree(good["lora"], world / "adapters" / name)
        if callable(content):
            write_header(folder / file, content)
        else:
            (folder / file).write_bytes((folder / file).read_bytes()[:-10] if content is None else content)
    shutil.copytree(good["lora"], world / "adapters" / "no weights")
    (world / "adapters" / "no weights" / WEIGHTS).unlink()

    for name, (file, content) in MODELS.items():
        folder = shutil.copytree(MINI, world / "models" / name)
        if content is None:
            (folder / file).unlink()
        elif file == "model.safetensors" and callable(content):
            tensors = load_file(folder / file)
            content(tensors)
            save_file(tensors, folder / file, metadata={"format": "pt"})
        elif callable(content):
            changed = json.loads((folder / file).read_text())
            content(changed)
            (folder / file).write_text(json.dumps(changed))
        else:
            (folder / file).write_bytes(content)

    with pytest.MonkeyPatch.context() as patch:  # a finished run, and one that was killed
        patch.chdir(world)
        run("done", method="lora", steps=1)
        stopped_run("run", 2, method="meta", checkpoint_every=1)
    for name, change in RUNS.items():
        folder = world / "runs-spoiled" / name
        folder.mkdir(parents=True)
        config = json.loads((world / "run" / "config.json").read_text())
        content = change(config) if callable(change) else change
        (folder / "config.json").write_bytes(json.dumps(config).encode() if content is None else content)
    return world


WEIGHTS = "adapter_model.safetensors"
MODELS = {  # name: (file, its new content, or how its JSON is changed, or None: taken away)
    "config not json": ("config.json", b"{"), "config a list": ("config.json", b"[]"),
    "no type": ("config.json", lambda config: config.pop("model_type")),
    "unknown type": ("config.json", lambda config: config.update(model_type="nobody")),
    "a picture model": ("config.json", lambda config: config.update(model_type="vit")),
    "own code": ("config.json", lambda config: (config.pop("model_type"), config.update(
        auto_map={"AutoConfig": "trick.Config", "AutoModelForCausalLM": "trick.Model"}))),
    "no weights": ("model.safetensors", None), "weights cut off": ("model.safetensors", b"\x00" * 100),
    "a tensor missing": ("model.safetensors", lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight")),
    "other width": ("config.json", lambda config: config.update(hidden_size=96)),
}
RUNS = {  # name: the content of config.json, or how it is changed
    "not json": b"{", "a list": b"[1, 2]", "deep": b"[" * 10 ** 5, "empty": b"", "not utf-8": b'{"a": "\xff"}',
    "unknown setting": lambda config: config.update(rnk=2), "rank as text": lambda config: config.update(rank="2"),
    "rank as truth": lambda config: config.update(rank=True), "rank of zero": lambda config: config.update(rank=0),
    "steps beyond": lambda config: config.update(steps=10 ** 400),
    "tasks as text": lambda config: config.update(tasks="x"),
    "no tasks": lambda config: config.update(tasks=[]), "task as number": lambda config: config.update(tasks=[1]),
    "method as list": lambda config: config.update(method=["lora"]), "lr as text": lambda config: config.update(lr="1"),
    "model as number": lambda config: config.update(model=1),
    "other method": lambda config: config.update(method="dora"),
    "no such model": lambda config: config.update(model="gone"), "split": lambda config: config.update(split="train"),
    "lr beyond": lambda config: config.update(lr=10 ** 400),
}

FLAGS = {  # of train: what the line must say
    "--method dora": "unknown method 'dora'; there are: lora, hydralora, rlora, mlora, align, meta",
    "--model nowhere": "unknown model 'nowhere'.*there are: mini",
    "--model empty": "empty", "--model file": "file",
    "--tasks navigat": "unknown task 'navigat'; there are: mini, mini-multilingual, boolean_expressions",
    "--tasks navigate navigate": "'navigate' is asked for more than once",
    "--tasks mini navigate": "'navigate' is asked for more than once",
    "--tasks": "--tasks: expected at least one argument",
    "--align cosine": "unknown align 'cosine'; there are: kl, mmd",
    "--split train": "unknown split 'train'; there are: test, validation",
    "--device tpu": "device 'tpu' is not to be had", "--device cuda:99": "device 'cuda:99' is not to be had",
    "--device meta": "device 'meta' is not to be had",
    "--rank 0": "--rank must be at least 1, got 0", "--rank 99999999": "--rank must be at most 4096, got 99999999",
    "--rank 2.5": "--rank: invalid int value: '2.5'", "--rank": "--rank: expected one argument",
    "--heads 0 --method rlora": "--heads must be at least 1, got 0",
    "--heads 1 --method rlora": "heads must be at least 2, got 1",
    "--heads 99999 --method rlora": "--heads must be at most 1024, got 99999",
    "--steps 0": "--steps must be at least 1, got 0", "--steps many": "invalid int value: 'many'",
    f"--steps 1{'0' * 400}": "--steps must be at most 1000000000, got 1000",
    "--batch-size 0": "--batch-size must be at least 1, got 0",
    "--batch-size 7": "--batch-size 7 cannot hold 8 tasks",
    "--batch-size 99999999999": "--batch-size must be at most 1048576",
    "--batch-size 15 --accumulation 12": "--batch-size 15 cannot hold 8 tasks in 12 micro-batch",
    "--accumulation 0": "--accumulation must be at least 1",
    "--tasks navigate": "align needs at least two tasks",
    "--lr -1": "--lr must be above 0, got -1.0", "--lr nan": "--lr must be above 0, got nan",
    "--lr 1e999": "--lr must be above 0, got inf", "--clip 0": "--clip must be above 0, got 0.0",
    "--alpha 0": "--alpha must be above 0, got 0.0", "--alpha inf": "--alpha must be above 0, got inf",
    "--dropout 1": "dropout must be at least 0 and below 1, got 1.0",
    "--dropout nan": "dropout must be at least 0 and below 1, got nan", "--dropout -0.1": "dropout must be at least 0",
    "--align-weight nan": "--align-weight must be at least 0, got nan",
    "--warmup 2": "--warmup must be from 0 to 1, got 2.0", "--warmup nan": "--warmup must be from 0 to 1, got nan",
    "--samples 0": "--samples must be at least 1, got 0",
    "--score-samples 0": "--score-samples must be at least 1, got 0",
    "--samples 501": "501 training samples are asked for, but task 'boolean_expressions' has 500",
    "--method meta --samples 20": "has 20 training samples, fewer than --support 16 plus --query 16",
    "--method meta --inner-steps -1": "--inner-steps must be at least 0, got -1",
    "--method meta --inner-lr 0": "--inner-lr must be above 0",
    "--method meta --support 0": "--support must be at least 1",
    "--method meta --query 0": "--query must be at least 1",
    "--method meta --tasks-per-round 0": "--tasks-per-round must be at least 1",
    "--seed 99999999999999999999": "--seed must be at most 9223372036854775807",
    "--targets c_attn": "no linear layer matches the target 'c_attn'; the model has: down_proj, gate_proj",
    "--targets q_proj typo": "no linear layer matches the target 'typo'",
    "--max-length 0": "--max-length must be at least 1", "--max-length 3": "no room for its prompt in --max-length 3",
    "--max-length 257": "--max-length 257 is more than the 256 positions that the model has",
    "--dtype int8": "unknown dtype 'int8'; there are: auto, float32, bfloat16, float16",
    "--score guess": "unknown score 'guess'; there are: generate, choose",
    "--score choose": "task 'word_sorting' has no closed set of labels to choose from; use --score generate",
    "--tasks navigate mini-multilingual navigate": "'navigate' is asked for more than once",
    "--log-every 0": "--log-every must be at least 1", "--checkpoint-every 0": "--checkpoint-every must be at least 1",
    "--skip-bad-steps -1": "--skip-bad-steps must be at least 0, got -1",
    "--nonsense": "unrecognized arguments: --nonsense", "--overwrite yes": "unrecognized arguments: yes",
    # run folders
    "--out done": "done already holds a run; name another --out, or add --overwrite",
    "--out=": "--out is empty", "--resume nowhere": "nowhere is not a run folder: it has no config.json",
    "--resume empty": "empty is not a run folder", "--resume file": "file is not a run folder",
    "--resume": "--resume: expected one argument",
    "--resume run --rank 4": "--rank would make it another run: run has 2, not 4",
    "--resume run --tasks mini": "--tasks would make it another run", "--resume run --out other": "--out would make",
    "--resume run --overwrite": "--overwrite would make it another run", "--resume done --seed 1": "--seed would make",
    "--resume run --checkpoint-every 0": "--checkpoint-every must be at least 1",
    # the environment: no folder can be made there, even by root
    "--out file/run": "the folder file/run cannot be made: Not a directory; name another --out",
    "--out file": "the folder file cannot be made: File exists; name another --out",
    "--out /proc/run": "the folder /proc/run cannot be made: .*; name another --out",
    "--out /dev/full/run": "the folder /dev/full/run cannot be made: Not a directory",
    f"--out {'x' * 300}": "File name too long",
}
OTHERS = {  # of the other commands: what the line must say
    "evaluate --run nowhere": "nowhere is not a run folder: it has no config.json",
    "evaluate --run run": "the run in run is not finished, so it has no adapter; python -m .*train --resume run goes",
    "evaluate --run done --adapter nowhere": "nowhere is not an adapter folder: it has no adapter_config.json",
    "evaluate --adapter empty": "empty is not an adapter folder: it has no adapter_config.json",
    "evaluate --adapter file": "file is not an adapter folder",
    "evaluate --adapter adapters/no%weights": f"it has no {WEIGHTS}",
    "evaluate --tasks x": "unknown task 'x'", "evaluate --split x": "invalid choice: 'x'",
    "evaluate --score-samples 0": "--score-samples: must be from 1 to",
    "evaluate --show x": "invalid int", "evaluate --show -1": "--show",
    "evaluate --max-length 0": "--max-length: must be",
    "evaluate --max-length -5": "--max-length: must be from 1", "evaluate --device tpu": "device 'tpu' is not",
    "evaluate --nonsense": "unrecognized arguments: --nonsense",
    "data.pretrain --steps 0": "--steps: must be from 1 to", "data.pretrain --steps x": "--steps: invalid int value: 'x'",
    "data.pretrain --batch-size 3": "--batch-size: must be from 4 to",
    "data.pretrain --seed 99999999999999999999": "--seed: must be",
    "data.pretrain --out file": "the folder file cannot be made: File exists; name another --out",
    "data.pretrain --out file/model": "the folder file/model cannot be made: Not a directory; name another --out",
    "data.pretrain --out /proc/model": "the folder /proc/model cannot be made",
}
TABLE = {f"train {flags}": said for flags, said in FLAGS.items()} | OTHERS
TABLE |= {f"evaluate --adapter adapters/{name.replace(' ', '%')}": said
          for name, (_, _, said) in (ADAPTERS | RAW).items()}
TABLE |= {f"train --model models/{name.replace(' ', '%')}": f"models/{name}" for name in MODELS}
TABLE |= {f"train --resume runs-spoiled/{name.replace(' ', '%')}": "gone" if name == "no such model" else
          f"runs-spoiled/{name}/config.json" for name in RUNS}
TABLE |= {f"evaluate --run runs-spoiled/{name.replace(' ', '%')}": f"runs-spoiled/{name}/config.json"
          for name in ("a list", "deep", "tasks as text", "model as number")}
REAL = ["train --method dora", "train --model nowhere", "train --resume nowhere", "train --resume run --rank 4",
        "train --out done", "train --out file/run", "train --out /dev/full/run", "train --lr nan",
        "train --resume runs-spoiled/deep", "train --model models/own%code", "train --model models/a%tensor%missing",
        "evaluate --adapter adapters/nan",
        "evaluate --run run", "evaluate --adapter adapters/header%of%exabytes", "data.pretrain --out file"]


def words(line):
    """The command, and its flags: `%` stands for a space within one, and --out= for an empty one."""
    name, *flags = [word.replace("%", " ") for word in line.split()]
    return name, flags


def check_refusal(status, output, error, said):
    assert status == 2 and output == ""
    assert 1 <= len(error.strip().splitlines()) <= 2 and "Traceback" not in error
    assert re.search(said, error), error


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # it is run again, as the command
@pytest.mark.parametrize("line", TABLE)
def test_bad_input_is_one_line_and_status_2_and_changes_nothing(world, monkeypatch, capfd, line):
    monkeypatch.chdir(world)
    before = tree(world)
    name, flags = words(line)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"tinylora_mtl.{name}", run_name="__main__")
    captured = capfd.readouterr()
    check_refusal(stopped.value.code, captured.out, captured.err, TABLE[line])
    assert tree(world) == before


@pytest.mark.slow
@pytest.mark.parametrize("line", REAL)
def test_bad_input_to_the_real_command(world, line):
    before = tree(world)
    name, flags = words(line)
    refused = command(*flags, cwd=world, module=name)
    check_refusal(refused.returncode, refused.stdout, refused.stderr, TABLE[line])
    assert tree(world) == before


def test_the_table_is_large_enough():
    assert len(TABLE) >= 60 and len(REAL) >= 10


@pytest.mark.parametrize("name", [*ADAPTERS, *RAW, "no weights"])
def test_a_refused_adapter_leaves_the_model_alone(world, name):
    model = load_model("mini", "cpu")[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    with pytest.raises((ValueError, FileNotFoundError)):
        load_adapter(model, world / "adapters" / name)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters()) and set(vars(model)) == attributes


def test_a_good_adapter_of_each_kind_is_not_refused(world):
    for method in ("lora", "rlora", "hydralora"):
        assert len(load_adapter(load_model("mini", "cpu")[0], world / "adapters" / method)) == 2


def test_a_header_that_claims_too_much_takes_no_memory(world):
    """The shapes in the header are compared before anything of their size is made."""
    import resource
    model = load_model("mini", "cpu")[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    for name in ("huge heads", "absurd rank", "tensor beyond the file", "header of exabytes"):
        with pytest.raises(ValueError):
            load_adapter(model, world / "adapters" / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 50_000


def test_our_own_adapter_of_a_model_reached_over_dots_can_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(MINI, tmp_path / "model")
    model = load_model("../model", "cpu")[0]
    add_adapters(model, AdapterConfig())
    save_adapter(model, "adapter")
    assert load_adapter(load_model("mini", "cpu")[0], "adapter")


# -------------------------------------------------------------------------------------------------- no space left
@pytest.mark.parametrize("path,step", [("checkpoints/step-000006.pt", 3), (f"adapter/{WEIGHTS}", 7),
                                       ("adapter/adapter_config.json", 7), ("results.json", 7)])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays_whole(tmp_path, capsys, few, path, step):
    """The new file is a link to /dev/full, where every write fails as on a full disk."""
    run(tmp_path / "whole", **SETTINGS)
    folder = tmp_path / "run"
    stopped_run(folder, 5)
    (folder / path).parent.mkdir(exist_ok=True)
    (folder / (path + ".tmp")).symlink_to("/dev/full")
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: training.command(["--resume", str(folder)]))
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: no space left to write in {folder}: make room, then to go on: "
        f"python -m tinylora_mtl.train --resume {folder}")
    assert load_checkpoint(folder)["step"] == step and not list(folder.rglob("*.tmp"))
    assert not (folder / "results.json").exists()
    training.resume(folder)
    assert outcome(folder) == outcome(tmp_path / "whole")


LIMITED = """
import resource, sys
from tinylora_mtl.run import cli, training
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
cli.run_command(lambda: training.command(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit,made", [(1500, []), (60_000, ["config.json", "metrics.jsonl"])])
def test_a_file_that_may_not_grow_in_a_real_process(tmp_path, limit, made):
    """The log is the first that does not fit, or the checkpoint is."""
    flags = flags_of(**TINY | dict(steps=20, log_every=1, checkpoint_every=18, rank=8), out=tmp_path / "run")
    stopped = subprocess.run([sys.executable, "-c", LIMITED, str(limit), *flags], capture_output=True, text=True)
    assert stopped.returncode == 2 and "Traceback" not in stopped.stderr
    assert "no space left to write in" in stopped.stderr.splitlines()[-1]
    assert not list_checkpoints(tmp_path / "run")
    assert all((tmp_path / "run" / name).stat().st_size for name in made)
    process = start("--resume", tmp_path / "run")
    output, error = process.communicate()
    assert process.returncode == 0 and "no checkpoint yet" in output, error
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 20


def test_a_run_folder_that_cannot_be_written_to(tmp_path, capsys, few):
    """A lock file that is a folder: even root cannot write it."""
    stopped_run(tmp_path, 5)
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(SystemExit):
        run_command(lambda: training.command(["--resume", str(tmp_path)]))
    assert f"error: {tmp_path} cannot be written to: Is a directory" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- numbers watched
def spoil_loss(monkeypatch, *calls):
    """NaN as the loss of the n-th calls of label_loss."""
    original, count = core.label_loss, []

    def spoiled(*args):
        count.append(1)
        return original(*args) * (float("nan") if len(count) in calls else 1.0)
    monkeypatch.setattr(core, "label_loss", spoiled)


def test_bad_steps_are_skipped_counted_and_logged(tmp_path, monkeypatch, capsys, few):
    spoil_loss(monkeypatch, 2, 4)
    results = run(tmp_path, method="lora", steps=5, log_every=5, skip_bad_steps=2, checkpoint_every=1)
    assert results["skipped_steps"] == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4, 5]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 2, None]
    said = capsys.readouterr().err
    for step in (2, 4):
        line = f"the gradient is not finite at step {step}, the loss nan, in a batch of word_sorting, dyck_languages: skipped"
        assert said.count(line) == 1
    assert all(torch.isfinite(tensor).all() for tensor in load_file(tmp_path / "adapter" / WEIGHTS).values())


def test_a_skipped_step_changes_neither_adapter_nor_optimiser(tmp_path, monkeypatch, few):
    spoil_loss(monkeypatch, 3)
    run(tmp_path, method="lora", steps=3, skip_bad_steps=1, checkpoint_every=1)
    last = load_checkpoint(tmp_path)
    list_checkpoints(tmp_path)[-1].unlink()
    before = load_checkpoint(tmp_path)
    assert (before["step"], last["step"]) == (2, 3)
    assert all(torch.equal(before["adapter"][name], last["adapter"][name]) for name in last["adapter"])
    assert str(before["optimizer"]) == str(last["optimizer"])


def test_no_more_than_that_many_are_skipped_over_all_lives(tmp_path, few):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError, match="not finite at step 6, .* "
                                                              "after 2 skipped before it; a lower --lr"):
        spoil_loss(patch, 2, 4, 6)
        run(tmp_path / "a", method="lora", steps=7, skip_bad_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        spoil_loss(patch, 2)
        stopped_run(tmp_path / "b", 4, method="lora", skip_bad_steps=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError, match="after 1 skipped before it"):
        spoil_loss(patch, 2)
        training.resume(tmp_path / "b")


def test_without_the_flag_the_first_bad_loss_stops_the_run(tmp_path, monkeypatch, few):
    spoil_loss(monkeypatch, 2)
    with pytest.raises(FloatingPointError, match="^the gradient is not finite at step 2, the loss nan, in a batch of "
                                                 "word_sorting, dyck_languages; a lower --lr usually helps"):
        run(tmp_path, method="lora")


@pytest.mark.parametrize("method", ["lora", "meta"])
def test_a_gradient_that_is_not_finite_is_noticed_by_itself(tmp_path, monkeypatch, few, method):
    """Between two lines of the log MeTA-LoRA computes no loss, and only the norm of its gradient tells."""
    original, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, most):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 2:
            parameters[-1].grad.view(-1)[0] = float("inf")
        return original(parameters, most)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    with pytest.raises(FloatingPointError, match=r"^the gradient is not finite at step 2, the loss \d.*, in a batch of "):
        run(tmp_path, method=method)


def test_parts_that_are_still_zero_are_said_once(tmp_path, monkeypatch, capsys, few):
    run(tmp_path / "a", method="hydralora")
    assert "warning" not in capsys.readouterr().err
    spoil_loss(monkeypatch, 1, 2)
    run(tmp_path / "b", method="hydralora", steps=2, skip_bad_steps=2)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert re.match(r"warning: 5 of the adapter's tensors are still zero.*: model.*heads, ", warnings[0])


def test_an_alignment_without_gradient_is_one_line(tmp_path, monkeypatch, capsys, few):
    def load(*args):
        model, tokenizer, device = load_model(*args)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        return model, tokenizer, device
    monkeypatch.setattr(training, "load_model", load)
    with pytest.raises(SystemExit) as stopped:
        run_command(lambda: training.command(flags_of(**TINY, out=tmp_path / "run", method="align")))
    assert stopped.value.code == 2
    assert "error: the features have no gradient, so the alignment term would do nothing" in capsys.readouterr().err


def test_a_defect_of_the_package_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="a defect"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("a defect")))


def test_what_a_stranger_wrote_moves_no_cursor(capsys):
    with pytest.raises(SystemExit):
        run_command(lambda: (_ for _ in ()).throw(ValueError("a\n\x1b[2Jb")))
    assert capsys.readouterr().err == "error: a ?[2Jb\n"
