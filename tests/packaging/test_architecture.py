"""The rooms of the house: a file imports only from rooms before its own; neither help nor a header waits for torch."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from places import ROOT
from processes import ran
from safetensors.torch import save_file

from codebook_tools.checkpoints.tensors import Stored
from codebook_tools.models.families.zalando import CODEBOOK as ZALANDO

LIBRARY, COMMAND_LINE = "codebook_tools", "codebook_cli"

ROOMS = (
    *("errors", "codebook", "runtime", "clustering", "checkpoints", "data", "strategies", "models", "evaluation"),
    *("remapping", "training", "diagnosis", "workflows", "report", COMMAND_LINE, "__main__"),
)
"""From the ground up: a room imports only from rooms before it. A room is a folder or a module of codebook_tools; the
folder cli/ is one."""


def sources() -> list[tuple[str, Path]]:
    """(room, file) of every module of the library and of the command line."""
    library = ROOT / LIBRARY
    inside = [file for file in library.rglob("*.py") if file != library / "__init__.py"]
    rooms = [(file.relative_to(library).parts[0].removesuffix(".py"), file) for file in inside]
    return sorted([*rooms, *((COMMAND_LINE, file) for file in (ROOT / "cli").rglob("*.py"))])


TREES = {file: (room, ast.parse(file.read_text(encoding="utf-8"))) for room, file in sources()}


def imported(tree: ast.AST) -> Iterator[str]:
    """Rooms that a module's imports name, wherever in it they stand; "" is the library's own __init__."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top in (COMMAND_LINE, LIBRARY):
                yield COMMAND_LINE if top == COMMAND_LINE else rest.partition(".")[0]


def faults(room: str, tree: ast.AST) -> list[str]:
    """What a room imports and must not: what is not before it in the list."""
    before = ROOMS[: ROOMS.index(room) + 1]
    return [f"{room} imports {other or LIBRARY}" for other in imported(tree) if other not in before]


def test_the_rooms_are_those_of_the_list() -> None:
    assert {room for room, _ in TREES.values()} == set(ROOMS)


def test_a_module_imports_only_from_rooms_before_its_own() -> None:
    upward = {file.relative_to(ROOT).as_posix(): faults(room, tree) for file, (room, tree) in TREES.items()}
    assert {name: names for name, names in upward.items() if names} == {}


def test_the_walk_sees_an_upward_import() -> None:
    for room, source in (
        ("evaluation", "from codebook_tools import workflows"),
        ("evaluation", "import codebook_tools.workflows.operate as o"),
        ("clustering", "def later():\n    from codebook_tools.models.model import Model"),
        ("report", "from codebook_cli.app import app"),
        ("runtime", "from codebook_tools.unheard_of import x"),
        ("runtime", "from codebook_tools import load"),
    ):
        assert len(faults(room, ast.parse(source))) == 1, source


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / LIBRARY / room).is_dir()])
def test_each_room_says_what_it_holds(room: str) -> None:
    text = (ROOT / LIBRARY / room / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:codebook_tools/)?([\w./]+(?:\.py|/))`", text)
    assert [name for name in named if not (ROOT / LIBRARY / room / name).exists()] == []


def test_relative_imports_stay_within_their_folder() -> None:
    climbing = [
        file.name
        for file, (_, tree) in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 1 + (file.parent.name == "commands")
    ]
    assert climbing == []


def test_the_library_never_prints_and_never_exits() -> None:
    forbidden = ("print", "exit", "quit", "sys.exit", "os._exit", "sys.stdout.write")
    calls = [
        f"{file.name}:{node.lineno}"
        for file, (room, tree) in TREES.items()
        if room not in (COMMAND_LINE, "__main__")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in forbidden
    ]
    assert calls == []


NO_NAMES = {"found", "told", "its", "given", "shown", "seen", "held"}


def test_definitions_have_nouns_for_names() -> None:
    """Of arguments, assigned variables and attributes, functions, classes and fields."""
    rooms = dict[str, list[str]]()
    for file, (room, tree) in TREES.items():
        for node in ast.walk(tree):
            assigned = isinstance(getattr(node, "ctx", None), ast.Store)
            if assigned or isinstance(node, ast.arg | ast.FunctionDef | ast.ClassDef):
                name = next((getattr(node, key) for key in ("id", "attr", "arg", "name") if hasattr(node, key)), "")
                if name in NO_NAMES:
                    rooms.setdefault(room, []).append(f"{file.name}:{node.lineno} {name}")
    assert rooms == {}


HEAVY = """
heavy = {"torch", "numpy", "scipy", "sklearn", "faiss", "PIL", "safetensors", "torchmetrics", "diffusers"}
heavy |= {"transformers"}
heavy |= {"lightning", "accelerate"}
print("HEAVY", sorted((heavy - set(sys.argv[1].split(","))) & set(sys.modules)))
"""


def run(program: str, allowed: str, *arguments: str, **environment: str) -> str:
    """What a program prints in a process of its own; at the end the heavy packages that it imported beside those
    allowed, separated by commas."""
    program = f"import sys\n{program}\n{HEAVY}"
    done = ran(sys.executable, "-c", program, allowed, *arguments, env={**os.environ, **environment})
    assert done.exit_code == 0, done.stderr
    return done.stdout


COMMANDS = (
    *("inspect", "measure", "refit", "prune", "quantize", "restart", "grow", "condense", "finetune", "compare"),
    *("diagnose", "verify", "encode", "decode", "remap"),
)


CALLS = """
from codebook_cli.app import app
for arguments in {calls}:
    try:
        app(arguments, prog_name="codebook")
    except SystemExit as end:
        assert end.code in (None, 0, 2), (arguments, end.code)
"""


def test_help_imports_neither_torch_nor_any_heavy_package() -> None:
    printed = run(CALLS.format(calls=[[], ["--help"], *([name, "--help"] for name in COMMANDS)]), "")
    assert printed.splitlines()[-1] == "HEAVY []"
    assert printed.count("Usage:") == 2 + len(COMMANDS)
    assert all(f"codebook {name} model" in printed for name in COMMANDS if name not in ("decode", "remap")), (
        "each shows an example"
    )


@pytest.mark.parametrize(
    ("words", "offered"), [("codebook re", ["refit", "restart", "remap"]), ("codebook refit --ite", ["--iterations"])]
)
def test_completion_imports_no_more_than_help_does(words: str, offered: list[str]) -> None:
    asked = {"_CODEBOOK_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert run(CALLS.format(calls=[[]]), "", **asked).splitlines() == [*offered, "HEAVY []"]


def one_file(folder: Path) -> list[str]:
    path = folder / "model.safetensors"
    save_file({"quantize.embedding.weight": torch.zeros(16, 4), "encoder.weight": torch.rand(4, 3, 3, 3)}, path)
    return [str(path)]


def sharded(folder: Path) -> list[str]:
    places = {"quantize.embedding.weight": "a.safetensors", "encoder.conv.weight": "b.safetensors"}
    for key, name in places.items():
        save_file({key: torch.zeros(16, 4)}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text("{}")
    return [str(folder)]


@pytest.mark.parametrize(
    ("model", "output"), [(one_file, []), (sharded, ["--json"]), (lambda folder: [], []), (one_file, ["--json"])]
)
def test_a_header_is_shown_without_torch(model: Callable[[Path], list[str]], output: list[str], tmp_path: Path) -> None:
    program = """
import runpy
allowed = sys.argv.pop(1)
try:
    runpy.run_module("codebook_tools", run_name="__main__", alter_sys=False)
except SystemExit as end:
    assert not end.code, end.code
sys.argv.insert(1, allowed)
"""
    printed = run(program, "numpy,safetensors", "inspect", *model(tmp_path), *output)
    assert printed.splitlines()[-1] == "HEAVY []"
    assert "embedding.weight" in printed


def test_inspecting_opens_nothing_but_codebooks_and_what_follows_them(
    codebook: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = one_file(tmp_path)
    read, chunks = set[str](), Stored.chunks
    monkeypatch.setattr(Stored, "chunks", lambda entry: read.add(entry.key) or chunks(entry))
    monkeypatch.setattr(Stored, "tensor", lambda entry: pytest.fail(f"{entry.key} was read"))
    for arguments in ((path,), (path, "--json"), ()):
        assert codebook("inspect", *arguments).exit_code == 0
    assert read == {"quantize.embedding.weight", ZALANDO}, "of the file, and of the demo"
