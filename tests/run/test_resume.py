"""A run that is stopped, in whatever way, goes on as if it had not been: the same adapter and log, bit for bit."""

import errno
import hashlib
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SETTINGS, TINY, Killed, at_step, flags_of, kill, outcome, run, start, stopped_run

from tinylora_mtl.run import checkpoint, loop, scoring, training
from tinylora_mtl.run.checkpoint import list_checkpoints, load_checkpoint
from tinylora_mtl.run.cli import Stopped, run_command
from tinylora_mtl.run.folder import locked
from tinylora_mtl.config import METHODS, TrainConfig
from tinylora_mtl.run.settings import MAY_DIFFER, resume_config


def steps_logged(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------- equal to the last bit
@pytest.mark.parametrize("method", METHODS)
def test_a_run_killed_again_and_again_is_the_run_that_was_never_stopped(tmp_path, capsys, few, method):
    run(tmp_path / "whole", method=method, **SETTINGS)
    assert steps_logged(tmp_path / "whole") == [1, 2, 4, 6, 7]
    stopped_run(tmp_path / "run", 2, method=method)  # before the first checkpoint
    capsys.readouterr()
    for killed_in, resumed in ((4, "no checkpoint yet"),  # at a checkpoint: step 4 is where it would go on
                               (3, "resumed after step 3"),  # (step 6) between two checkpoints, with step 4 logged
                               (None, "resumed after step 3")):
        with pytest.MonkeyPatch.context() as patch:
            if killed_in:
                at_step(patch, killed_in, kill)
                with pytest.raises(Killed):
                    training.resume(tmp_path / "run")
            else:
                training.resume(tmp_path / "run")
        assert resumed in capsys.readouterr().out
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_what_a_checkpoint_holds_matters(tmp_path, monkeypatch, few):
    """Spoil one part of a checkpoint at a time: the resumed run must then end in another adapter or log."""
    run(tmp_path / "whole", method="rlora", samples=11, **SETTINGS)
    stopped_run(tmp_path / "run", 5, method="rlora", samples=11)
    state = load_checkpoint(tmp_path / "run")
    other_rng = random.Random(99).getstate()

    def spoiled(change):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        content = torch.load(io.BytesIO(list_checkpoints(tmp_path / "run")[-1].read_bytes()[64:]), weights_only=True)
        change(content)
        checkpoint.save_checkpoint(tmp_path / "copy", content)
        training.resume(tmp_path / "copy")
        return outcome(tmp_path / "copy")

    def zero_moments(content):
        for moments in content["optimizer"]["state"].values():
            moments["exp_avg"].zero_()
    assert spoiled(lambda content: None) == outcome(tmp_path / "whole")
    for change in (lambda content: content["random"].update(cpu=torch.manual_seed(5).get_state()),
                   lambda content: content["batches"].update(rng=other_rng),
                   lambda content: content["batches"]["waiting"][0].clear(),
                   lambda content: content["schedule"].update(last_epoch=0), zero_moments,
                   lambda content: content["adapter"]["model.layers.0.mlp.down_proj.heads"].mul_(1.01),
                   lambda content: content.update(skipped_steps=1),
                   lambda content: content["before"].update(word_sorting=0.5)):
        assert spoiled(change) != outcome(tmp_path / "whole")
    assert state["step"] == 3 and len(state["batches"]["waiting"][0]) == 5


def test_seconds_are_those_of_all_lives(tmp_path, monkeypatch, few):
    clock = itertools.count(0, 10)
    for module in (training, loop):  # not the function itself, which others ask too
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    stopped_run(tmp_path, 5)  # began at 0, its checkpoint of step 3 at 10
    assert load_checkpoint(tmp_path)["seconds"] == 10
    assert training.resume(tmp_path)["seconds"] == 10 + 30  # began, two more checkpoints, the end


# --------------------------------------------------------------------------------------------- checkpoint files
def test_the_last_two_checkpoints_are_kept(tmp_path, few):
    run(tmp_path, **SETTINGS)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000006.pt", "step-000007.pt"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.suffix != ".pt"] == []
    for path in list_checkpoints(tmp_path):
        content = path.read_bytes()
        assert content[:64].decode() == hashlib.sha256(content[64:]).hexdigest()


def test_checkpoints_beyond_a_million_steps_are_in_order(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save_checkpoint(tmp_path, {"step": step})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999999.pt", "step-1000000.pt"]


@pytest.mark.parametrize("spoil", ["cut", "bit", "empty", "text"])
def test_a_spoiled_checkpoint_is_noticed_and_the_one_before_is_used(tmp_path, capsys, few, spoil):
    run(tmp_path / "whole", **SETTINGS)
    stopped_run(tmp_path / "run", 7)
    newest = list_checkpoints(tmp_path / "run")[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[:len(content) // 2], "bit": content, "empty": b"", "text": b"x" * 999}[spoil])
    capsys.readouterr()
    training.resume(tmp_path / "run")
    printed = capsys.readouterr().out
    assert len([line for line in printed.splitlines() if "step-000006.pt is not whole" in line]) == 1
    assert "resumed after step 3" in printed
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert load_checkpoint(tmp_path / "run")["step"] == 7 and len(list_checkpoints(tmp_path / "run")) == 2


def test_a_spoiled_checkpoint_never_pushes_out_a_whole_one(tmp_path, capsys, few):
    """With checkpoints 3 and a spoiled 6, going on with other intervals must keep whole ones."""
    stopped_run(tmp_path, 7)
    list_checkpoints(tmp_path)[-1].write_bytes(b"")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 3, kill)
        training.run(resume_config(tmp_path, checkpoint_every=5), resuming=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000003.pt", "step-000005.pt"]


def test_without_a_whole_checkpoint_the_run_starts_again(tmp_path, capsys, few):
    run(tmp_path / "whole", **SETTINGS)
    stopped_run(tmp_path / "run", 7)
    for path in list_checkpoints(tmp_path / "run"):
        path.write_bytes(path.read_bytes()[:-1])
    training.resume(tmp_path / "run")
    assert capsys.readouterr().out.count("is not whole") == 2
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


class Trick:
    """Pickled, it is a call that makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_checkpoint_from_a_stranger_runs_no_code(tmp_path, few):
    stopped_run(tmp_path, 5)
    content = io.BytesIO()
    torch.save({"step": 3, "trick": Trick(tmp_path / "made")}, content)
    digest = hashlib.sha256(content.getvalue()).hexdigest().encode()
    list_checkpoints(tmp_path)[-1].write_bytes(digest + content.getvalue())
    with pytest.raises(ValueError, match="step-000003.pt is no checkpoint of a run"):
        training.resume(tmp_path)
    assert not (tmp_path / "made").exists()
    torch.load(io.BytesIO(content.getvalue()), weights_only=False)
    assert (tmp_path / "made").exists()  # so it would have


@pytest.mark.parametrize("spoil", ["another run's", "a list", "a part is missing"])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, few, spoil):
    stopped_run(tmp_path / "run", 5)
    stopped_run(tmp_path / "other", 5, rank=4)
    if spoil == "another run's":
        shutil.copy(list_checkpoints(tmp_path / "other")[-1], list_checkpoints(tmp_path / "run")[-1])
    else:
        state = load_checkpoint(tmp_path / "run")
        content = io.BytesIO()
        torch.save(["step"] if spoil == "a list" else {"step": state["step"]}, content)
        list_checkpoints(tmp_path / "run")[-1].write_bytes(
            hashlib.sha256(content.getvalue()).hexdigest().encode() + content.getvalue())
    with pytest.raises(ValueError, match="other layers or shapes|is no checkpoint of a run"):
        training.resume(tmp_path / "run")


def test_a_log_that_lost_lines_is_noticed(tmp_path, few):
    stopped_run(tmp_path, 5)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl has lost lines"):
        training.resume(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_an_old_run_leaves_nothing_to_a_new_one(tmp_path, few):
    run(tmp_path, **SETTINGS)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        at_step(patch, 1, kill)
        run(tmp_path, seed=1, overwrite=True, **SETTINGS)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left - {".lock"} == {"config.json", "fingerprints.json", "metrics.jsonl"}
    results = training.resume(tmp_path)
    run(tmp_path / "fresh", seed=1, **SETTINGS)
    assert outcome(tmp_path) == outcome(tmp_path / "fresh") and results["seed"] == 1


def test_a_run_of_version_0_1_can_be_evaluated_but_not_gone_on_with(tmp_path, few):
    """Its config.json and its checkpoints have no format number."""
    stopped_run(tmp_path / "run", 5)
    content = load_checkpoint(tmp_path / "run")
    assert content.pop("format") == checkpoint.FORMAT == 2
    checkpoint.save_checkpoint(tmp_path / "run", content)
    with pytest.raises(ValueError, match="newest checkpoint is of another version .*format 1, here it is 2.*start it anew"):
        training.resume(tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config.pop("format") == 2
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the run in .* is of another version"):
        training.resume(tmp_path / "run")
    results = run(tmp_path / "done", **SETTINGS)
    (tmp_path / "done" / "config.json").write_text(json.dumps(config))
    assert training.resume(tmp_path / "done") == results  # nothing is left to do
    scores = scoring.command(["--run", str(tmp_path / "done"), "--device", "cpu"])
    assert set(scores) == set(results["after"])


# ------------------------------------------------------------------------------------------------------ settings
CHANGED = dict(model="elsewhere", tasks=["navigate"], method="lora", rank=3, alpha=8.0, dropout=0.3, heads=3,
               targets=["q_proj"], steps=8, batch_size=8, accumulation=2, lr=0.001, warmup=0.0, clip=2.0,
               max_length=100, samples=9, align="mmd", align_weight=0.1, tasks_per_round=1, support=2, query=2,
               inner_steps=1, inner_lr=0.1, seed=1, split="test", score_samples=9, score="choose", dtype="float16",
               log_every=1, out="elsewhere", overwrite=True, zero_start=True, shuffle_groups=True)


def test_changed_settings_are_refused_by_name(tmp_path, few, capsys):
    stopped_run(tmp_path, 5)
    assert set(CHANGED) == {item.name for item in fields(TrainConfig)} - set(MAY_DIFFER)
    for name, value in CHANGED.items():
        flags = [f"--{name.replace('_', '-')}"] if value is True else flags_of(**{name: value})
        with pytest.raises(ValueError, match=f"^{flags[0]} would make it another run"):
            training.parse(["--resume", str(tmp_path), *flags])
    same = flags_of(rank=2, tasks=TINY["tasks"], steps=7, dropout=0.2, method="align", out=tmp_path)
    config, resuming, _ = training.parse(["--resume", str(tmp_path), *same, "--device", "cpu", "--checkpoint-every", "2",
                                    "--skip-bad-steps", "4"])
    assert resuming and (config.checkpoint_every, config.skip_bad_steps, config.out) == (2, 4, str(tmp_path))
    training.run(config, resuming)
    kept = json.loads((tmp_path / "config.json").read_text())
    assert (kept["checkpoint_every"], kept["skip_bad_steps"], kept["steps"]) == (2, 4, 7)  # as the run ended


def test_a_finished_run_is_left_alone(tmp_path, few, capsys):
    results = run(tmp_path, **SETTINGS)
    before = outcome(tmp_path), (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    assert training.resume(tmp_path) == results
    assert capsys.readouterr().out == f"the run in {tmp_path} is finished: nothing is left to do\n"
    assert (outcome(tmp_path), (tmp_path / "metrics.jsonl").stat().st_mtime_ns) == before


# ------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_go_on(tmp_path, monkeypatch, capsys, few, number, status):
    run(tmp_path / "whole", **SETTINGS)
    folder = tmp_path / "a run"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, 4, lambda: os.kill(os.getpid(), number))
        run_command(lambda: training.command(flags_of(**TINY | SETTINGS, out=folder)))
    assert stopped.value.code == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert load_checkpoint(folder)["step"] == 4
    said = capsys.readouterr().err.splitlines()[-1]
    name = signal.Signals(number).name
    assert said == f"stopped by {name}; to go on: python -m tinylora_mtl.train --resume '{folder}'"
    training.command(shlex.split(said.split("tinylora_mtl.train ")[1]))
    assert outcome(folder) == outcome(tmp_path / "whole")


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, few):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        at_step(patch, 4, twice)
        run_command(lambda: training.command(flags_of(**TINY | SETTINGS, out=tmp_path)))
    assert stopped.value.code == 130 and load_checkpoint(tmp_path)["step"] == 3


@pytest.mark.parametrize("call", [1, 2])
def test_a_signal_while_scoring_stops_at_once(tmp_path, monkeypatch, capsys, few, call):
    calls, original = itertools.count(1), training.accuracies

    def score(*args):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # never slept through
        return original(*args)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(training, "accuracies", score)
        run_command(lambda: training.command(flags_of(**TINY | SETTINGS, out=tmp_path)))
    assert stopped.value.code == 143 and f"--resume {tmp_path}" in capsys.readouterr().err
    assert len(list_checkpoints(tmp_path)) == (0 if call == 1 else 2)
    training.resume(tmp_path)
    assert steps_logged(tmp_path) == [1, 2, 4, 6, 7]


def test_from_python_no_handler_is_touched(tmp_path, monkeypatch, few):
    seen = []
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 1, lambda: seen.append((signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))))
    run(tmp_path)
    assert seen == [before]


def test_ctrl_c_in_any_command_is_one_line(capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    finally:
        signal.signal(signal.SIGINT, before)
    assert stopped.value.code == 130 and capsys.readouterr().err == "stopped by SIGINT\n"
    assert issubclass(Stopped, KeyboardInterrupt)  # so that no `except Exception` on the way holds it up


# ---------------------------------------------------------------------------------------------------------- lock
HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); " \
       "print('held', flush=True); time.sleep(60)"


def test_another_process_in_the_run_folder_is_refused_and_a_killed_one_is_not(tmp_path, capsys, few):
    stopped_run(tmp_path, 5)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        capsys.readouterr()
        for flags in (["--resume", str(tmp_path)], flags_of(**TINY, out=tmp_path) + ["--overwrite"]):
            with pytest.raises(SystemExit) as refused:
                run_command(lambda: training.command(flags))
            assert refused.value.code == 2
            assert capsys.readouterr().err == (f"error: another process is using {tmp_path}; wait until it has ended, "
                                               "or stop it\n")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files
    finally:
        holder.kill()
        holder.wait()
    training.resume(tmp_path)
    with locked(tmp_path):  # and a run that has ended holds nothing
        pass


def test_a_run_holds_its_folder_to_the_end_and_no_longer(tmp_path, monkeypatch, few):
    held = []

    def probe(*args, original=training.write_json):
        ask = HOLD.replace("LOCK_EX", "LOCK_EX | fcntl.LOCK_NB").replace("time.sleep(60)", "0")
        held.append(subprocess.run([sys.executable, "-c", ask, tmp_path / ".lock"], capture_output=True).returncode)
        return original(*args)
    monkeypatch.setattr(training, "write_json", probe)
    run(tmp_path)
    assert held == [1]
    with locked(tmp_path):
        pass


def test_a_disk_without_locks_is_used_all_the_same(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with locked(tmp_path), locked(tmp_path):
        pass


# ----------------------------------------------------------------------------------------------- real processes
LONG = TINY | dict(steps=400, checkpoint_every=5, log_every=1, method="rlora", batch_size=2, tasks=("dyck_languages",))


def wait_for(condition, process, seconds=120):
    """Poll until the condition holds; the process must still be there then."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.0005)


@pytest.mark.slow
@pytest.mark.parametrize("number,status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_to_a_real_process(tmp_path, number, status):
    folder = tmp_path / "run"
    process = start(*flags_of(**LONG, out=folder))
    wait_for(lambda: len(list_checkpoints(folder)) == 2, process)
    process.send_signal(number)
    output, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    last = steps_logged(folder)[-1]
    assert last < 400 and list_checkpoints(folder)[-1].name == f"step-{last:06d}.pt"
    assert error.splitlines()[-1].endswith(f"to go on: python -m tinylora_mtl.train --resume {folder}")
    assert "Traceback" not in error


@pytest.mark.slow
def test_twenty_kills(tmp_path):
    """SIGKILL at random moments, and as soon as a checkpoint's new file appears: the run always goes on."""
    rng, kills, inside = random.Random(0), 0, 0
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert start(*flags_of(**LONG, out=whole)).wait() == 0
    while kills < 20 or inside < 3:
        assert kills < 40, f"only {inside} of {kills} kills met a checkpoint being written"
        log = folder / "metrics.jsonl"
        before = log.stat().st_mtime_ns if log.exists() else 0
        process = start(*(["--resume", folder] if (folder / "config.json").exists() else flags_of(**LONG, out=folder)))
        if kills == 0:
            time.sleep(rng.uniform(0, 3))  # perhaps before there is a run at all
        else:
            wait_for(lambda: log.exists() and log.stat().st_mtime_ns > before, process)
            if kills % 2:
                wait_for(lambda: list((folder / "checkpoints").glob("*.tmp")), process)
            else:
                time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
        kills += 1
        inside += bool(list((folder / "checkpoints").glob("*.tmp")))
        if log.exists():
            seen = re.findall(r'^\{"step": (\d+)', log.read_text(), re.MULTILINE)
            assert [int(step) for step in seen] == list(range(1, len(seen) + 1))
    last = start("--resume", folder)
    output, error = last.communicate()
    assert last.returncode == 0, error
    print(f"{kills} kills, {inside} of them inside a write")
    assert steps_logged(folder) == list(range(1, 401))
    assert outcome(folder) == outcome(whole)
