"""What `make release` builds of the last commit: the same bytes each time, and it runs where it is installed."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from places import ROOT
from processes import ran

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="a release is built of a commit"),
]


def call(*command: object, **options: object) -> str:
    done = ran(*command, **options)
    assert done.exit_code == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "dist"
    call(sys.executable, ROOT / "tools" / "release.py", folder)
    return folder


def test_a_second_build_elsewhere_later_and_by_another_has_the_same_bytes(dist: Path, tmp_path: Path) -> None:
    clone, again, scratch = tmp_path / "a clone", tmp_path / "again", tmp_path / "scratch"
    scratch.mkdir()
    call("git", "clone", "--quiet", ROOT, clone, umask=0o077)
    others = {**os.environ, "TMPDIR": str(scratch), "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    call(sys.executable, clone / "tools" / "release.py", again, umask=0o077, env=others, cwd=tmp_path)
    built = {path.name: path.read_bytes() for path in dist.iterdir()}
    assert sorted(name.partition("-0")[0] for name in built) == ["codebook_tools"] * 3
    assert {path.name for path in again.iterdir()} == built.keys()
    for path in again.iterdir():
        assert path.read_bytes() == built[path.name], path.name


def test_the_sdist_has_what_is_committed_and_nothing_that_a_build_leaves(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if not archive.getmember(name).isdir()}
    committed = set(call("git", "ls-tree", "-r", "-z", "--name-only", "HEAD", cwd=ROOT).split("\0")) - {""}
    assert committed - packed == {".gitignore"}
    assert {name for name in packed - committed if ".egg-info/" not in name} == {"PKG-INFO", "setup.cfg"}


def test_the_wheel_holds_both_packages_whole_and_no_module_called_cli(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        metadata = next(archive.read(name).decode() for name in sizes if name.endswith(".dist-info/METADATA"))
        points = next(archive.read(name).decode() for name in sizes if name.endswith("entry_points.txt"))
    packages = {"codebook_tools": "codebook_tools", "cli": "codebook_cli"}
    assert {name.partition("/")[0] for name in sizes if ".dist-info/" not in name} == set(packages.values())
    committed = call("git", "ls-tree", "-r", "--name-only", "HEAD", *packages, cwd=ROOT).splitlines()
    modules = (file.partition("/") for file in committed if file.endswith((".py", "py.typed")))
    assert {f"{packages[folder]}/{name}" for folder, _, name in modules} <= sizes.keys()
    assert 100_000 < sizes["codebook_tools/models/demo.safetensors"] <= 2_000_000
    assert "codebook = codebook_cli.app:main" in points and any(name.endswith("LICENSE") for name in sizes)
    assert "Name: codebook-tools" in metadata and "Requires-Python: >=3.11" in metadata


def test_the_bill_names_every_pin_that_is_needed_to_run(dist: Path) -> None:
    bill = json.loads(next(dist.glob("*.cdx.json")).read_text(encoding="utf-8"))
    assert bill["metadata"]["component"]["name"] == "codebook-tools" and "serialNumber" not in bill
    lines = [(ROOT / "requirements" / name).read_text(encoding="utf-8") for name in ("runtime.txt", "torch.txt")]
    pinned = {line.split()[0] for line in "\n".join(lines).splitlines() if "==" in line}
    assert {f"{entry['name']}=={entry['version']}" for entry in bill["components"]} == pinned
    unhashed = {entry["name"] for entry in bill["components"] if "externalReferences" not in entry}
    assert unhashed <= {"torch"}


@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_runs_from_a_clean_environment(dist: Path, tmp_path: Path, kind: str) -> None:
    """The dependencies alone are those of this environment, whose own codebook_tools is an editable one: a path in a
    .pth file does not bring the .pth files that lie there."""
    clean = tmp_path / "clean"
    call(sys.executable, "-m", "venv", "--without-pip", clean)
    python, packages = clean / "bin" / "python", Path(sysconfig.get_path("purelib", vars={"base": str(clean)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    away = {"cwd": tmp_path, "env": {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}}
    assert ran(python, "-c", "import codebook_tools", **away).exit_code
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    call(*install, "--no-build-isolation", "--ignore-installed", next(dist.glob(kind)), **away)
    where = call(python, "-c", "import codebook_tools, codebook_cli; print(codebook_tools.__file__)", **away)
    assert Path(where.strip()).is_relative_to(packages)
    codebook = clean / "bin" / "codebook"
    assert "512" in call(codebook, "inspect", **away)
    call(codebook, "prune", "--steps", "0", "-o", "pruned.safetensors", **away)
    assert (tmp_path / "pruned.safetensors").stat().st_size > 100_000
