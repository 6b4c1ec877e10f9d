"""Every dependency is listed with its licence, and none that is needed to run binds the code of its users."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from places import ROOT

pytestmark = pytest.mark.packaging

PERMISSIVE = {
    *("0BSD", "BSD", "BSD License", "BSD-2-Clause", "BSD-3-Clause", "3-Clause BSD License", "BSL-1.0"),
    *("Apache 2.0 License", "Apache Software License", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"),
    *("MIT", "MIT License", "MIT-0", "MIT-CMU", "ISC License (ISCL)", "Zlib", "CC0-1.0"),
    *("CNRI-Python", "PSF-2.0", "Python Software Foundation License"),
}
WEAK_COPYLEFT = {"tqdm": {"MPL-2.0"}, "certifi": {"Mozilla Public License 2.0 (MPL 2.0)"}}
"""Licences that bind changes to the package itself alone: each is allowed where it was looked at."""


def pins(file: str) -> dict[str, str]:
    text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][a-z0-9.-]*)==([^ ;\\\n]+)", text, re.MULTILINE))


def listed(heading: str) -> dict[str, tuple[str, str]]:
    """Version and licence by name, of the table under a heading."""
    text = (ROOT / "requirements" / "licences.md").read_text(encoding="utf-8")
    section = text.partition(f"## {heading}")[2].partition("\n## ")[0]
    rows = re.findall(r"\| (\S+) \| (\d\S*) \| (.+) \|", section)
    return {name: (version, licence) for name, version, licence in rows}


RUNTIME = listed("Needed to run")
TORCH = pins("torch.txt")


def test_the_list_is_that_of_the_pins() -> None:
    runtime = pins("runtime.txt") | TORCH
    assert {name: version for name, (version, _) in RUNTIME.items()} == runtime
    rest = {name: version for name, version in pins("tested.txt").items() if name not in runtime}
    assert {name: version for name, (version, _) in listed("Needed to develop").items()} == rest


def test_a_licence_leaves_users_their_own_code() -> None:
    licences = {name: set(re.split(r" AND | OR |; ", text)) for name, (_, text) in RUNTIME.items()}
    others = {name: names - PERMISSIVE - WEAK_COPYLEFT.get(name, set()) for name, names in licences.items()}
    assert {name: names for name, names in others.items() if names} == {}


def test_what_is_needed_to_run_is_tested_in_the_same_versions() -> None:
    assert pins("runtime.txt").items() <= pins("tested.txt").items()


def test_the_oldest_versions_are_those_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["all"])]
    floors = {requirement.name: Version(next(iter(requirement.specifier)).version) for requirement in declared}
    assert floors.keys() <= (pins("runtime.txt") | TORCH).keys()
    oldest = {name: Version(version) for name, version in pins("oldest.txt").items()}
    assert {name: oldest[name] for name in floors.keys() - TORCH.keys()}.items() <= floors.items()


@pytest.mark.parametrize("file", ["runtime.txt", "tested.txt", "oldest.txt"])
def test_every_pin_has_hashes(file: str) -> None:
    text = (ROOT / "requirements" / file).read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(blocks) > 50 and all("--hash=sha256:" in block for block in blocks)
