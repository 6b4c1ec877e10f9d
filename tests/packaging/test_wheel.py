"""What is installed: two packages, complete, and no module of a name that could be anyone's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from places import ROOT


@pytest.mark.slow
def test_the_wheel_holds_both_packages_whole_and_no_module_called_cli(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, for a build leaves folders behind
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("codebook_tools", "cli", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        metadata = next(archive.read(name).decode() for name in sizes if name.endswith(".dist-info/METADATA"))
        points = next(archive.read(name).decode() for name in sizes if name.endswith("entry_points.txt"))
    tops = {name.partition("/")[0] for name in sizes if ".dist-info/" not in name}
    assert tops == {"codebook_tools", "codebook_cli"}
    for folder, package in (("codebook_tools", "codebook_tools"), ("cli", "codebook_cli")):
        for file in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{file.relative_to(ROOT / folder).as_posix()}" in sizes, (
                f"{file.name} is not in the wheel"
            )
        assert f"{package}/py.typed" in sizes
    assert 100_000 < sizes["codebook_tools/models/demo.safetensors"] <= 2_000_000
    assert "codebook = codebook_cli.app:main" in points
    assert "Name: codebook-tools" in metadata and "Requires-Python: >=3.11" in metadata
    assert any(name.endswith("LICENSE") for name in sizes)
