"""Who may import whom, and how long a file may be: the core can be read as a book, without the rooms beside it."""

import ast
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path

import pytest

import tinylora_mtl

PACKAGE = Path(tinylora_mtl.__file__).parent
ROOMS = ("gallery", "data", "run", "lab", "classroom")
MAY_IMPORT = {"core": {"core"}, "gallery": {"core"}, "data": {"core"}, "run": {"core", "data", "gallery"},
              "lab": {"core", "data", "gallery", "run"}, "classroom": set()}
OF_THE_CORE = {*sys.stdlib_module_names, "torch", "transformers"}
OF_THE_ROOMS = OF_THE_CORE | {"datasets", "filelock", "huggingface_hub", "matplotlib", "peft", "safetensors",
                              "tokenizers", "tqdm"}
FILES = [path.relative_to(PACKAGE) for path in sorted(PACKAGE.rglob("*.py"))]


def room_of(path):
    return path.parts[0] if len(path.parts) > 1 else "core"


def imported(source, room):
    """The dotted names that a module's source imports, but for what stands under `if __name__ == "__main__":`."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        for node in ast.walk(node):
            if isinstance(node, ast.Import):
                yield from (name.name for name in node.names)
            elif isinstance(node, ast.ImportFrom):
                package = "tinylora_mtl" if room == "core" else f"tinylora_mtl.{room}"
                module = resolve_name("." * node.level + (node.module or ""), package)
                yield from (f"{module}.{name.name}" for name in node.names)


def foreign(source, room):
    """What a module of the core or of a room imports and may not."""
    names = []
    for name in imported(source, room):
        first, second = (*name.split("."), "")[:2]
        if first == "tinylora_mtl":
            theirs = second if second in ROOMS else "core" if (PACKAGE / f"{second}.py").is_file() else "the face"
            if theirs not in MAY_IMPORT[room] | {room} and not (name == "tinylora_mtl.__version__" and room == "lab"):
                names.append(name)
        elif first not in (OF_THE_CORE if room == "core" else OF_THE_ROOMS):
            names.append(name)
    return names


@pytest.mark.parametrize("room,source,expected", [
    ("core", "import torch.nn.functional as F, math\nfrom .lora import LoRALinear\nfrom transformers import x", []),
    ("core", "from .run.files import read_json", ["tinylora_mtl.run.files.read_json"]),
    ("core", "from . import lora, data", ["tinylora_mtl.data"]),
    ("core", "def f():\n    import tqdm", ["tqdm"]),
    ("core", "if __name__ == '__main__':\n    from .run.training import main\n    main()", []),
    ("core", "if __name__ == 'x':\n    from .run import y", ["tinylora_mtl.run.y"]),
    ("core", "import tinylora_mtl", ["tinylora_mtl"]),
    ("core", "from tinylora_mtl.lab.plan import x", ["tinylora_mtl.lab.plan.x"]),
    ("data", "import datasets\nfrom ..loss import label_loss\nfrom .tasks import Task\nfrom . import hub", []),
    ("data", "from ..run import models", ["tinylora_mtl.run.models"]),
    ("run", "from ..data.tasks import x\nfrom ..gallery import y\nfrom .. import align", []),
    ("run", "from ..lab.plan import x\nfrom .. import save_adapter, lab",
     ["tinylora_mtl.lab.plan.x", "tinylora_mtl.save_adapter", "tinylora_mtl.lab"]),
    ("lab", "from ..run.loop import x\nfrom ..data import y\nfrom ..train import z\nimport pandas", ["pandas"]),
    ("lab", "from .. import __version__", []),
    ("core", "from . import __version__", ["tinylora_mtl.__version__"]),
    ("lab", "from ..classroom.blank import x", ["tinylora_mtl.classroom.blank.x"]),
    ("classroom", "import ast\nfrom .blank import x", []),
    ("classroom", "from ..lora import LoRALinear", ["tinylora_mtl.lora.LoRALinear"])])
def test_the_rule_finds_what_is_foreign(room, source, expected):
    assert foreign(source, room) == expected


@pytest.mark.parametrize("path", [path for path in FILES if path != Path("__init__.py")], ids=str)
def test_imports_keep_to_the_rule(path):
    assert foreign((PACKAGE / path).read_text(), room_of(path)) == []


def test_files_are_short():
    lines = {path: len((PACKAGE / path).read_text().splitlines()) for path in FILES}
    core = {path: count for path, count in lines.items() if room_of(path) == "core"}
    assert {path: count for path, count in lines.items() if count > (150 if path in core else 300)} == {}
    assert sum(core.values()) <= 1250


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_line_is_longer_than_120_characters(path):
    assert [line for line in (PACKAGE / path).read_text(encoding="utf-8").splitlines() if len(line) > 120] == []


def test_what_is_run_with_m_is_not_imported_before():
    """Else Python has two copies of it, warns of that, and a method registered in one is unknown in the other."""
    program = ("import sys, tinylora_mtl; print([name for name in ('train', 'evaluate') "
               "if f'tinylora_mtl.{name}' in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stdout == "[]\n", done
