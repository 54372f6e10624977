"""Make a handout for a class: python -m tinylora_mtl.classroom.blank DIR

The package with the bodies of the exercises taken out, their tests, and a README that lists them. An exercise is a
function whose docstring begins with [ex1], [ex2], …: that docstring is its whole specification. A student fills the
bodies in, runs `pytest -m ex1`, and at the end `python -m tinylora_mtl.train` runs on the student's own code.

    python -m tinylora_mtl.classroom.blank --teacher DIR

writes what the student should not have: the solutions, answers to the walkthrough's questions, more tests, the marks.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
BESIDE = ("LICENSE", "pyproject.toml", "tests/conftest.py", "tests/classroom/test_exercises.py")
README = """# Exercises with multi-task LoRA

Nine functions of the package `tinylora_mtl` have lost their bodies (the eighth is two). Each docstring is the whole
specification; the paper is named there or at the top of the file. Write them in this order, for some use others:

{}

    python -m pip install -e ".[test]"
    python -m pytest -m ex1                                          # tests the first, and says what to look at
    python -m pytest -m "ex1 or ex2"
    python -m tinylora_mtl.train                                     # runs on your code, once all are done
"""
FOR_TEACHERS = ("tests/conftest.py", *(f"tests/classroom/{name}" for name in (
    "test_exercises.py", "test_hidden.py", "marks.json", "answers.md")))
TAG = re.compile(r"\[(ex\d+)\] ")


def exercises(source):
    """The exercises in the text of a module: [(tag, function's name, first line of its body, last line), ...].

    Lines count from 1; the body is what comes after the docstring.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        tag = TAG.match((isinstance(node, ast.FunctionDef) and ast.get_docstring(node)) or "")
        if tag:
            found.append((tag[1], node.name, node.body[0].end_lineno + 1, node.end_lineno))
    return sorted(found, key=lambda exercise: exercise[2])


def blanked(source):
    """The text of a module with an error in place of the body of every exercise."""
    lines = source.splitlines(keepends=True)
    for tag, name, first, last in reversed(exercises(source)):
        indent = re.match(" *", lines[first - 1])[0]
        lines[first - 1:last] = [f'{indent}raise NotImplementedError("exercise {tag}, {name}, is still to be done")\n']
    return "".join(lines)


def make_handout(folder):
    """Write the handout to a new folder; returns the exercises, [(tag, file, function's name), ...].

    Raises FileExistsError for a folder that is there already (it may hold a student's work), and FileNotFoundError
    where there is only the installed package, without the tests and the README.
    """
    folder = new_folder(folder, BESIDE)
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (folder / PACKAGE.name / "gallery").glob("[!_]*.py"):  # methods that differ from LoRA by a few lines,
        file.unlink()  # so that many of the others solve an exercise; how to write one of one's own stays
    found = []
    for file in sorted((folder / PACKAGE.name).rglob("*.py")):
        source, short = file.read_text(encoding="utf-8"), file.relative_to(folder / PACKAGE.name).as_posix()
        found += [(tag, short, name) for tag, name, *_ in exercises(source)]
        file.write_text(blanked(source), encoding="utf-8", newline="\n")
    rows = [f"- {tag}: `{name}` in `{PACKAGE.name}/{short}`" for tag, short, name in sorted(found)]
    (folder / "README.md").write_text(README.format("\n".join(rows)), encoding="utf-8", newline="\n")
    (folder / "tests" / "classroom").mkdir(parents=True)
    for name in BESIDE:
        shutil.copyfile(PACKAGE.parent / name, folder / name)
    return sorted(found)


def new_folder(folder, needed):
    """The Path of a folder to be made, once it is sure that it can be filled from this copy of the source."""
    folder, missing = Path(folder), [name for name in needed if not (PACKAGE.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"it is made from a copy of the source: there is no {PACKAGE.parent / missing[0]}")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; name a new folder")
    return folder


def make_teachers_folder(folder):
    """Write the teacher's folder, which `grade` needs; returns it. Errors as `make_handout`."""
    folder = new_folder(folder, FOR_TEACHERS)
    folder.mkdir(parents=True)
    for name in FOR_TEACHERS:
        shutil.copyfile(PACKAGE.parent / name, folder / Path(name).name)
    (folder / "pytest.ini").write_text("[pytest]\n")  # so that no settings around it count
    parts = ["# Solutions\n"]
    for file in sorted(PACKAGE.rglob("*.py")):
        text, short = file.read_text(encoding="utf-8"), file.relative_to(PACKAGE).as_posix()
        for tag, name, first, last in exercises(text):
            body = "\n".join(text.splitlines()[first - 1:last])
            parts.append(f"## {tag}: `{name}` in {short}\n\n```python\n{body}\n```\n")
    (folder / "solutions.md").write_text("\n".join(sorted(parts)), encoding="utf-8", newline="\n")
    return folder


def main(argv=None):
    """Make a handout and say what is in it; a mistake is one line."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["-h"], ["--help"]):
        return print(__doc__)
    if arguments[:1] == ["--teacher"] and len(arguments) == 2:
        return print(f"solutions, answers, tests and marks are in {make_teachers_folder(arguments[1])}; to grade: "
                     f"python -m tinylora_mtl.classroom.grade DIR --tests {arguments[1]}")
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise ValueError("one new folder is to be named: python -m tinylora_mtl.classroom.blank DIR")
    for tag, file, name in make_handout(arguments[0]):
        print(f"{tag}  {file:14} {name}")
    print(f"the handout is in {arguments[0]}; there: pip install -e '.[test]', then pytest -m ex1")


if __name__ == "__main__":
    from ..run.cli import run_command
    run_command(main)
