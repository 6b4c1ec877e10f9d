"""Which deliberate faults do the tests find? Draws mutants by seed, and runs on each the tests that reach its line.

    python tools/mutants.py mutants.json --shared ../shared

A mutant is one changed operator, constant, condition or statement. The fast tests run first, then the slow ones, each
list in order of duration, and the first failure ends it. Results are kept after each mutant, so that a second call goes
on where the first one stopped. The tests of `--tests COMMIT` may be others than those of the code that is changed.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOMS = ("clustering", "checkpoints", "strategies", "training", "remapping")
SWAPS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip

PROBE = """
import os
_known = set()
def hit(number):
    context = os.environ.get("MUTANT_CONTEXT", "")
    if "MUTANT_REACH" in os.environ and (number, context) not in _known:
        _known.add((number, context))
        with open(os.path.join(os.environ["MUTANT_REACH"], f"{os.getpid()}.hits"), "a") as file:
            file.write(f"{number}\\t{context}\\n")
"""

PLUGIN = """
import os, json
import pytest
def _note(kind, *values):
    with open(os.path.join(os.environ["MUTANT_REACH"], f"{os.getpid()}.tests"), "a") as file:
        file.write(json.dumps([kind, *values]) + "\\n")
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item):
    os.environ["MUTANT_CONTEXT"] = item.nodeid
    rest = any(item.get_closest_marker(name) for name in ("slow", "hostile", "packaging"))
    _note("uses", item.nodeid, list(item.fixturenames), rest)
    yield
@pytest.hookimpl(hookwrapper=True)
def pytest_fixture_setup(fixturedef, request):
    before = os.environ.get("MUTANT_CONTEXT", "")
    if fixturedef.scope != "function":
        os.environ["MUTANT_CONTEXT"] = "fixture:" + fixturedef.argname
    yield
    os.environ["MUTANT_CONTEXT"] = before
def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" in os.environ or "PYTEST_XDIST_TESTRUNUID" not in os.environ:
        _note("took", report.nodeid, report.duration, report.failed)
"""


@dataclass(frozen=True)
class Mutant:
    """A fault: in `file`, function `where`, the source `before` at (line, column) becomes `after`."""

    file: str
    where: str
    line: int
    start: int
    end: int
    before: str
    after: str


def main() -> None:
    """Draw, find the tests that reach each mutant, and run those."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="a JSON file, which a second call goes on with")
    parser.add_argument("--code", default="HEAD", help="the commit whose code is changed")
    parser.add_argument("--tests", help="the commit whose tests run; left out: that of the code")
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--mutants", type=Path, help="take the mutants of these results, where their source is still there"
    )
    parser.add_argument("--shared", type=Path, help="the checkpoints and data that some tests read")
    parser.add_argument("--work", type=Path, default=Path("build/mutants"), help="a folder for copies of the code")
    parser.add_argument("--fast", action="store_true", help="only the tests of `make test`")
    parser.add_argument("--minutes", type=float, default=10, help="the most that the tests of one mutant may take")
    arguments = parser.parse_args()
    tree = _copy(arguments.work.absolute(), arguments.code, arguments.tests, arguments.shared)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {"mutants": []}
    if not results["mutants"]:
        drawn = _again(arguments.mutants, tree) if arguments.mutants else draw(tree, arguments.count, arguments.seed)
        results["mutants"] = [asdict(mutant) for mutant in drawn]
        results["tests"] = reach(tree, drawn, arguments.work.absolute(), fast=arguments.fast)
        _save(arguments.results, results)
    for number, entry in enumerate(results["mutants"]):
        if "killed" not in entry:
            entry |= run(tree, entry, number, results["tests"], arguments.minutes * 60)
            _save(arguments.results, results)
            print(
                number, entry["file"], entry["line"], entry["before"], "->", entry["after"], entry["killed"], flush=True
            )
    print(summary(results))


def summary(results: dict[str, Any]) -> str:
    """How many the fast tests killed, and all."""
    fast = sum(entry["killed"] == "fast" for entry in results["mutants"])
    slow = sum(entry["killed"] == "slow" for entry in results["mutants"])
    return f"{fast} of {len(results['mutants'])} killed by the fast tests, {fast + slow} by all"


def draw(tree: Path, count: int, seed: int) -> list[Mutant]:
    """Some of all mutants of the rooms, alike by seed."""
    paths = sorted(path for room in ROOMS for path in (tree / "codebook_tools" / room).rglob("*.py"))
    every = [mutant for path in paths for mutant in sites(path.read_text(), str(path.relative_to(tree)))]
    return random.Random(seed).sample(every, count)


def sites(source: str, file: str) -> Iterator[Mutant]:
    """All mutants of a file: within functions, outside of messages, assertions and annotations."""
    lines = source.splitlines()

    def mutant(
        where: str, start: ast.AST, end: ast.AST, old: str, new: str, *, between: bool = False
    ) -> Iterator[Mutant]:
        line, first = (start.end_lineno, start.end_col_offset) if between else (start.lineno, start.col_offset)  # type: ignore[attr-defined]
        last_line, last = (end.lineno, end.col_offset) if between else (end.end_lineno, end.end_col_offset)  # type: ignore[attr-defined]
        if line != last_line or not lines[line - 1].isascii():
            return
        text = lines[line - 1][first:last]
        if between:
            at = text.find(old)
            if at < 0:
                return
            first, text = first + at, old
            last = first + len(old)
        yield Mutant(file, where, line, first, last, text, new)

    def walk(node: ast.AST, where: str) -> Iterator[Mutant]:
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.AnnAssign | ast.arguments):
            return
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            where = f"{where}.{node.name}".lstrip(".")
        if where:
            yield from at(node, where)
        for child in ast.iter_child_nodes(node):
            if child not in getattr(node, "decorator_list", []) and child is not getattr(node, "returns", None):
                yield from walk(child, where)

    def at(node: ast.AST, where: str) -> Iterator[Mutant]:
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from mutant(where, node.left, node.comparators[0], *SWAPS[type(node.ops[0])], between=True)
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
            yield from mutant(where, node.left, node.right, *SWAPS[type(node.op)], between=True)
        elif isinstance(node, ast.BoolOp):
            yield from mutant(where, node.values[0], node.values[1], *SWAPS[type(node.op)], between=True)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            test = ast.get_source_segment(source, node.test) or ""
            yield from mutant(where, node.test, node.test, test, f"not ({test})")
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            value = node.value
            other = (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2
            yield from mutant(where, node, node, "", repr(other))
        elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(node, ast.AugAssign):
            yield from mutant(where, node, node, "", "pass")

    yield from walk(ast.parse(source), "")


def reach(tree: Path, mutants: list[Mutant], work: Path, *, fast: bool) -> dict[str, Any]:
    """Run all tests once with a probe before each mutant: those that pass, with duration and mutants reached."""
    notes = work / "reach"
    notes.mkdir(parents=True)
    (tree / "codebook_tools/_probe.py").write_text(PROBE)
    sources = {file: (tree / file).read_text() for file in {mutant.file for mutant in mutants}}
    for file, source in sources.items():
        (tree / file).write_text(_probed(source, [(n, m) for n, m in enumerate(mutants) if m.file == file]))
    (work / "path" / "mutant_plugin.py").write_text(PLUGIN)
    options = ["-p", "mutant_plugin", "-n", "2", "-p", "no:cacheprovider"]
    options += ["-m", "not (slow or hostile or packaging)"] if fast else []
    done = _pytest(tree, work, [*options, "tests"], None, {"MUTANT_REACH": str(notes)})
    for file, source in sources.items():
        (tree / file).write_text(source)
    (tree / "codebook_tools/_probe.py").unlink()
    tests = _reached(notes)
    if not tests:
        sys.exit(done.stdout + done.stderr)
    return tests


def _probed(source: str, mutants: list[tuple[int, Mutant]]) -> str:
    lines = source.splitlines(keepends=True)
    module = ast.parse(source)
    statements = list[ast.stmt]()
    for node in ast.walk(module):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list) and not isinstance(node, ast.Module):
                statements += [one for one in block if isinstance(one, ast.stmt) and not _is_elif(one, lines)]
    for number, mutant in sorted(mutants, key=lambda pair: -pair[1].line):
        around = [s for s in statements if _first(s) <= mutant.line <= (s.end_lineno or 0) and not _docstring(s)]
        line = _first(max(around, key=lambda s: (s.lineno, -(s.end_lineno or 0))))
        indent = lines[line - 1][: len(lines[line - 1]) - len(lines[line - 1].lstrip())]
        lines.insert(line - 1, f"{indent}__import__('codebook_tools._probe')._probe.hit({number})\n")
    return "".join(lines)


def _is_elif(statement: ast.stmt, lines: list[str]) -> bool:
    return lines[statement.lineno - 1].lstrip().startswith("elif")


def _first(statement: ast.stmt) -> int:
    """Its first line, decorators included."""
    decorators: list[ast.expr] = getattr(statement, "decorator_list", [])
    return min([statement.lineno, *(node.lineno for node in decorators)])


def _docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _reached(notes: Path) -> dict[str, Any]:
    tests = dict[str, dict[str, Any]]()
    for path in sorted(notes.glob("*.tests")):
        for kind, name, *values in map(json.loads, path.read_text().splitlines()):
            test = tests.setdefault(
                name, {"seconds": 0.0, "failed": False, "fixtures": [], "slow": False, "reaches": []}
            )
            if kind == "uses":
                test["fixtures"], test["slow"] = values
            else:
                test["seconds"] += values[0]
                test["failed"] |= values[1]
    hits = dict[str, set[int]]()
    for path in sorted(notes.glob("*.hits")):
        for line in path.read_text().splitlines():
            number, context = line.split("\t")
            hits.setdefault(context, set()).add(int(number))
    for name, test in tests.items():
        contexts = [name, *(f"fixture:{fixture}" for fixture in test.pop("fixtures"))]
        test["reaches"] = sorted(set[int]().union(*(hits.get(context, set()) for context in contexts)))
    return {name: test for name, test in tests.items() if not test["failed"]}


def run(tree: Path, entry: dict[str, Any], number: int, tests: dict[str, Any], limit: float) -> dict[str, Any]:
    """Change the code, run the tests that reach it, and change it back."""
    path = tree / entry["file"]
    source = path.read_text()
    lines = source.splitlines(keepends=True)
    line = lines[entry["line"] - 1]
    lines[entry["line"] - 1] = line[: entry["start"]] + entry["after"] + line[entry["end"] :]
    reaching = sorted(
        (name for name in tests if number in tests[name]["reaches"]), key=lambda name: tests[name]["seconds"]
    )
    path.write_text("".join(lines))
    try:
        for suite in ("fast", "slow"):
            chosen, total = list[str](), 0.0
            for name in reaching:
                total += tests[name]["seconds"] * (tests[name]["slow"] == (suite == "slow"))
                if tests[name]["slow"] == (suite == "slow") and total <= limit:
                    chosen.append(name)
            if chosen and (by := _failing(tree, chosen, 3 * total + 120)):
                return {"killed": suite, "by": by, "reached": len(reaching)}
    finally:
        path.write_text(source)
    return {"killed": None, "reached": len(reaching)}


def _failing(tree: Path, tests: list[str], limit: float) -> str | None:
    """The first test that fails, or what else went wrong."""
    listed = tree.parent / "tests.txt"
    listed.write_text("\n".join(tests))
    try:
        done = _pytest(tree, tree.parent, ["-x", "-q", "-p", "no:cacheprovider", f"@{listed}"], limit, {})
    except subprocess.TimeoutExpired:
        return "no end"
    if done.returncode == 0:
        return None
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].split(" - ")[0] if failed else f"exit code {done.returncode}"


def _pytest(
    tree: Path, work: Path, words: list[str], limit: float | None, more: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(work / "path"), "PYTHONDONTWRITEBYTECODE": "1", **more}
    return subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=tree,
        env=environment,
        timeout=limit,
        capture_output=True,
        text=True,
    )


def _copy(work: Path, code: str, tests: str | None, shared: Path | None) -> Path:
    """A checkout of the code, with the tests of another commit where asked; imported in place of what is installed."""
    tree = work / "main"
    if not tree.exists():
        (work / "path").mkdir(parents=True)
        subprocess.run(["git", "worktree", "add", "--detach", str(tree), code], check=True, capture_output=True)
        if tests:
            subprocess.run(["git", "rm", "-rq", "tests"], cwd=tree, check=True)
            subprocess.run(["git", "checkout", tests, "--", "tests"], cwd=tree, check=True)
        for name, folder in (("codebook_tools", "codebook_tools"), ("codebook_cli", "cli")):
            (work / "path" / name).symlink_to(tree / folder)
        if shared:
            (work / "shared").symlink_to(shared.absolute())
    return tree


def _again(path: Path, tree: Path) -> list[Mutant]:
    """The mutants of earlier results, found again by function and text; one whose source is gone is left out."""
    found = list[Mutant]()
    for entry in json.loads(path.read_text())["mutants"]:
        source = (tree / entry["file"]).read_text() if (tree / entry["file"]).exists() else ""
        alike = [m for m in sites(source, entry["file"])
                 if (m.where, m.before, m.after) == (entry["where"], entry["before"], entry["after"])]  # fmt: skip
        if alike:
            found.append(min(alike, key=lambda mutant: abs(mutant.line - entry["line"])))
        else:
            print("gone:", entry["file"], entry["where"], entry["before"])
    return found


def _save(path: Path, results: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    main()
