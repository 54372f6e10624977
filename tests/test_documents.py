"""The documents, as a reader goes through them: every code block runs, in order, and prints what stands below it."""

import ast
import contextlib
import importlib
import inspect
import io
import json
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import tinylora_mtl
from tinylora_mtl.classroom import notebook
from tinylora_mtl.lab import compare
from tinylora_mtl.lab.bench import figure_table
from tinylora_mtl.lab.plan import make_plan
from tinylora_mtl.lab.report import PUBLISHED, TABLES, difference
from tinylora_mtl.run.files import read_json

ROOT = Path(tinylora_mtl.__file__).parents[1]
READMES = ["README.md", "tinylora_mtl/run/README.md", "tinylora_mtl/lab/README.md"]
RESULTS = "tinylora_mtl/assets/results/README.md"
BLOCK = re.compile(r"(?:(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<body>.*?)```)", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def blocks(text):
    """[(mark, language, body)] of the code blocks of a document; the mark is a comment on the line before."""
    return [(found["mark"] or "", found["language"], found["body"]) for found in BLOCK.finditer(text)]


def same(printed, shown, varies=False):
    """Whether a block shows what was printed: the same words, and numbers that are nearly equal (or only there).

    Three dots on a line of their own stand for any number of lines.
    """
    if "\n...\n" in shown:
        first, last = shown.split("\n...\n")
        lines = printed.splitlines()
        return (same("\n".join(lines[:len(first.splitlines())]), first, varies)
                and same("\n".join(lines[-len(last.splitlines()):]), last, varies))
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (printed, shown)]
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (printed, shown)]
    return words[0] == words[1] and (varies or numbers[0] == pytest.approx(numbers[1], rel=0.05, abs=0.021))


def run_block(language, body, names, more=None):
    """Run a block as a reader would; returns what it prints (a command's bar and warnings aside).

    more: {module: flags to add to its commands}, which make a run shorter whose output is not shown.
    """
    if language == "python":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(body, "<document>", "exec"), names)
        return printed.getvalue()
    printed = ""
    for module, flags in commands(body):
        done = run_command(module, [*flags, *((more or {}).get(module, []) if "--resume" not in flags else [])])
        assert done.returncode == 0, f"{module} {flags}\n{done.stderr}"
        printed += done.stdout
    return printed


def commands(body):
    """[(module, flags)] of the commands of the package in a block; what stands before "-m" is how they are started."""
    found = []
    for line in body.replace("\\\n", " ").splitlines():
        start, _, rest = line.rpartition(" -m tinylora_mtl.")
        assert re.search(r"\bpython$|^torchrun\b", start), line
        module, *flags = shlex.split(rest, comments=True)
        found.append((module, flags))
    return found


def run_command(module, flags, **variables):
    """A command as a reader gives it, run to its end."""
    return subprocess.run([sys.executable, "-m", f"tinylora_mtl.{module}", *flags], capture_output=True, text=True,
                          timeout=900, env=os.environ | variables)


# What stands between <!-- mini: verdicts --> and <!-- end --> is made from the published results (assets/results), so that
# no number there was ever typed; with <!-- mini+smollm2: starts --> both files stand side by side. And between
# <!-- source: lora.LoRALinear.forward --> and <!-- end --> stand the lines of that function, without its docstring.
def source(name):
    """The lines of a function of this package, "module.function" or "module.Class.method", without its docstring."""
    text = textwrap.dedent(inspect.getsource(pkgutil.resolve_name(f"tinylora_mtl.{name}")))
    docstring, lines = ast.parse(text).body[0].body[0], text.splitlines()
    return "\n".join(lines[:docstring.lineno - 1] + lines[docstring.end_lineno:])


def filled(text):
    """A document with every piece between <!-- FILE: NAME --> and <!-- end --> made anew, from a file or source.

    NAME is one of TABLES, "bench" (of assets/bench), or "2: accuracy: rlora - hydralora", the difference that claim 2
    found; else ValueError.
    """
    def fill(found):
        mark, file, name = found.groups()
        if file == "source":
            return f"{mark}\n```python\n{source(name)}\n```\n<!-- end -->"
        if name == "bench":
            return f"{mark}\n{figure_table(read_json(PUBLISHED.parent / 'bench' / f'{file}.json'))}\n<!-- end -->"
        results = [read_json(PUBLISHED / f"{part}.json") for part in file.split("+")]
        if name in TABLES:
            return f"{mark}\n{TABLES[name](*results)}\n<!-- end -->"
        for claim in results[0]["claims"]:
            for row in claim["comparisons"]:
                if name == f"{claim['claim']}: {row['name']}":
                    return f"{mark}{difference(row)}<!-- end -->"
        raise ValueError(f"the results have no {name!r}")
    return re.sub(r"(<!-- ([\w+]+): (.+?) -->).*?<!-- end -->", fill, text, flags=re.DOTALL)


def test_what_is_the_same():
    assert same("a  1.00 b\n", "a 1.01 b") and not same("a 1.0", "a 2.0") and same("a 1.0", "a 2.0", varies=True)
    assert not same("a 1.0 b", "a 1.0", varies=True) and same("1,000 (2-3)", "1000 (2-3)")
    assert same("a\nb\nc\nd\ne", "a\n...\nd\ne") and not same("a\nb\nc\nd\ne", "a\n...\nc\ne")


@pytest.mark.parametrize("name", ["walkthrough.md", RESULTS, *READMES])
def test_what_is_made_from_files_and_source_is_up_to_date(name):
    """python tests/test_documents.py --fill makes it anew."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert filled(text) == text


def test_the_line_counts_of_the_reading_list():
    """The README says how long each file of the core is, and names them all."""
    rows = re.findall(r"^\| (\[.*?\)) \| ([\d, ]+) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    stated = {name: int(lines) for names, counts in rows
              for name, lines in zip(re.findall(r"\((tinylora_mtl/\w+\.py)\)", names), counts.split(", "), strict=True)}
    counted = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
               for path in (ROOT / "tinylora_mtl").glob("*.py") if path.name != "__init__.py"}
    assert stated == counted


def test_everything_public_has_a_docstring():
    missing = []
    for module in pkgutil.walk_packages(tinylora_mtl.__path__, "tinylora_mtl."):
        names = vars(importlib.import_module(module.name))
        assert names["__doc__"], module.name
        missing += [f"{module.name}.{name}" for name, part in names.items() if inspect.isfunction(part)
                    and part.__module__.endswith(module.name) and not name.startswith("_") and not part.__doc__
                    and len(inspect.getsource(part).splitlines()) > 6]
    assert not missing


def make_desk(folder):
    """What the documents take for granted beside the package: a model, and tasks of the reader's own."""
    shutil.copytree(Path(tinylora_mtl.__file__).parent / "assets" / "mini", folder / "path" / "to" / "a" / "model")
    (folder / "path" / "to" / "a" / "task").mkdir()
    (folder / "my.py").write_text("from tinylora_mtl.lora import LoRALinear\nLR = 1e-3\n\nclass Layer(LoRALinear):\n"
                                  "    def __init__(self, base, config):\n        super().__init__(base, 2, 4)\n")
    for name in ("my_task.jsonl", "path/to/a/task/train.jsonl", "path/to/a/task/test.jsonl"):
        rows = [{"prompt": f"{name}: is {number} even? Answer:", "target": ("yes", "no")[number % 2]}
                for number in range(60 if "test" not in name else 20)]
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_the_walkthrough_is_an_afternoon():
    """At most 800 lines, and four hours by the sum of the minutes that it states."""
    text = (ROOT / "walkthrough.md").read_text(encoding="utf-8")
    minutes = [int(number) for number in re.findall(r"^\| [^|]+ \| (\d+) \| [^|]+ \|$", text, re.MULTILINE)]
    assert len(minutes) == 9 and sum(minutes) <= 240 and len(text.splitlines()) <= 800
    titles = re.findall(r"^## (\d\. .+)$", text, re.MULTILINE)
    assert len(titles) == 8 and all(f"| {title} |" in text for title in titles)
    tags = re.findall(r"\[(ex\d)\] Write", text)
    assert sorted(tags) == [f"ex{number}" for number in range(1, 10)]


@pytest.mark.slow
def test_the_walkthrough_runs_as_a_notebook_from_top_to_bottom(tmp_path, monkeypatch):
    """All its cells, in a folder of their own; where the text goes on with what was printed, that is compared."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook.main(["a notebook.ipynb"])
    (tmp_path / "hidden").mkdir()  # what is shown was printed without pictures
    (tmp_path / "hidden" / "matplotlib.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hidden"))
    names, printed, checked = {"__name__": "walkthrough"}, None, 0
    for cell in read_json("a notebook.ipynb")["cells"]:
        if cell["cell_type"] == "code":
            assert "```" not in cell["source"]
            command = cell["source"].removeprefix("import sys\n").replace("!{sys.executable}", "python")
            printed = run_block("python" if command == cell["source"] else "bash", command, names)
        elif printed:
            mark, language, body = blocks(cell["source"])[0]
            assert language == "text" and re.match(r"(<!-- .* -->\n)?```text\n", cell["source"])
            if not mark.startswith("not compared"):
                assert same(printed, body, varies=mark == "varies"), f"printed:\n{printed}\nshown:\n{body}"
                checked += 1
            printed = None
    assert checked >= 11


@pytest.mark.slow
def test_the_readmes_run_from_start_to_end(tmp_path, monkeypatch):
    """In a copy of the source, with the reader's own model and tasks beside it.

    Runs whose output is not shown take two steps, and bench measures its shortest row. What needs the Hub is run up to
    where it says that there is none, and of a comparison that takes hours the list of its runs is made.
    """
    desk = tmp_path / "a copy"
    shutil.copytree(Path(tinylora_mtl.__file__).parent, desk / "tinylora_mtl",
                    ignore=shutil.ignore_patterns("__pycache__"))
    make_desk(desk)
    for name in "abcd":
        shutil.copytree(desk / "path" / "to" / "a" / "task", desk / name)
    monkeypatch.chdir(desk)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    more = {"train": ["--steps", "2"], "lab.bench": ["--rows", "6", "--repeats", "1"]}
    names, printed, seen = {"__name__": "readme"}, "", []
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    for mark, language, body in blocks(text):
        seen.append(mark or language)
        if mark == "the main job":  # .ci/run runs it as it stands
            printed = run_block("bash", body, names, more)
            shutil.copytree(desk / "runs" / "align-mini-seed0", desk / "path" / "to" / "a" / "run")
        elif language == "text":
            assert same(printed, body, varies=True), f"printed:\n{printed}\nshown:\n{body}"
        elif mark == "needs the Hugging Face Hub":
            for module, flags in commands(body):
                done = run_command(module, flags, HF_HUB_OFFLINE="1")
                assert done.returncode == 2 and "on the Hugging Face Hub (" in done.stderr.splitlines()[-1], done.stderr
        elif mark == "takes hours":
            for module, flags in commands(body):
                few = ["--samples", "10", "50"] if "--tasks" in flags else []  # the reader's own tasks are small here
                plan = make_plan(compare.parse([*flags, *few]))
                assert module == "lab.compare" and len(plan.runs({})) >= 20
        elif mark != "the tests":
            printed = run_block(language, body, names, more)
    assert {"the main job", "the tests", "text", "bash", "python", "takes hours"} <= set(seen)


def rewrite(path):
    """Put what is printed now into a document's text blocks: how they were made (with the working directory elsewhere)."""
    names, printed, text = {"__name__": "walkthrough"}, "", path.read_text(encoding="utf-8")

    def made(found):
        nonlocal printed
        if found["language"] == "text":
            return found[0].replace(f"```text\n{found['body']}", f"```text\n{printed}")
        if not (found["mark"] or "").startswith("source: "):
            printed = run_block(found["language"], found["body"], names)
        return found[0]
    path.write_text(filled(BLOCK.sub(made, text)), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    if sys.argv[1] == "--fill":
        for name in ("walkthrough.md", RESULTS, *READMES):
            (ROOT / name).write_text(filled((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
    else:  # a document whose blocks are run
        os.environ["OMP_NUM_THREADS"] = "1"
        rewrite(ROOT / sys.argv[1])
