"""Writes the list of all pinned dependencies with their licences, as pip-licenses reads them from what is installed.

python tools/licences.py requirements/licences.md
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"

TEXT = """\
# Licences of the dependencies

Written by `make licences`, from the metadata of the pinned packages. Codebook Tools itself is under Apache-2.0; they
are installed beside it, and none is part of it. `tests/packaging/test_licences.py` says which licences the first table
may hold.

## Needed to run, with every extra of `all`

{runtime}
Some wheels carry libraries of others, as their own licence texts say: numpy, scipy and faiss-cpu those of GCC (GPL with
the exception for runtime libraries), soundfile libsndfile (LGPL-2.1). A torch built for CUDA asks for libraries under
NVIDIA's own licences; one built for the CPU does without.

## Needed to develop, test and release

{development}"""


def plain(name: str) -> str:
    """A package's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    """Versions by name that a file of requirements/ pins, those for other systems too."""
    text = (REQUIREMENTS / file).read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9][a-z0-9.-]*)==([^ ;\\\n]+)", text, re.MULTILINE))


def table(pinned: dict[str, str], elsewhere: str) -> str:
    """Packages, versions and licences, of those installed beside this one or in a folder."""
    command = [sys.executable, "-m", "piplicenses", "--format", "json", "--with-system", "--packages", *pinned]
    listed = json.loads(subprocess.check_output(command, env={**os.environ, "PYTHONPATH": elsewhere}, text=True))
    licences = {plain(entry["Name"]): entry["License"] for entry in listed}
    lines = [f"| {name} | {version} | {licences[name]} |\n" for name, version in sorted(pinned.items())]
    return "".join(["| package | version | licence |\n", "|---|---|---|\n", *lines])


def install_for_other_systems(folder: str) -> None:
    """Installs what is pinned for some systems alone into a folder, where its metadata can be read."""
    text = (REQUIREMENTS / "tested.txt").read_text(encoding="utf-8")
    some = re.findall(r"^([a-z0-9][^ ]*) ; [^\\]*(.*(?:\n    --hash.*)+)", text, re.MULTILINE)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    install += ["--ignore-requires-python", "--target", folder, "--requirement", "/dev/stdin"]
    wanted = "".join(f"{pin} {hashes}\n" for pin, hashes in some)
    subprocess.run(install, input=wanted, text=True, check=True)


def main() -> None:
    runtime = pins("runtime.txt") | pins("torch.txt")
    development = {name: version for name, version in pins("tested.txt").items() if name not in runtime}
    with tempfile.TemporaryDirectory() as folder:
        install_for_other_systems(folder)
        text = TEXT.format(runtime=table(runtime, folder), development=table(development, folder))
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
