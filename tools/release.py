"""Wheel, sdist and bill of materials of the last commit: the same bytes whenever, wherever and by whom they are made.

python tools/release.py dist
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def steady(sdist: Path, moment: int) -> None:
    """Rewrites an sdist without what setuptools takes from the clock and from whoever builds it."""
    with tarfile.open(sdist) as archive:
        held = [(entry, archive.extractfile(entry)) for entry in archive.getmembers()]
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as steadied:
            for entry, content in sorted(held, key=lambda pair: pair[0].name):
                entry.mtime, entry.uid, entry.gid = moment, 0, 0
                entry.uname, entry.gname, entry.pax_headers = "", "", {}
                steadied.addfile(entry, content)
    sdist.write_bytes(gzip.compress(tar.getvalue(), mtime=moment))


def run(*arguments: str, said: str | None = None, moment: str) -> None:
    """A module of this environment, whose words matter only if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "SOURCE_DATE_EPOCH": moment},
        input=said,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)


def release(out: Path) -> list[Path]:
    """Builds the last commit into a folder that is new or holds an earlier release."""
    moment = subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True).strip()
    committed = subprocess.check_output(["git", "archive", "HEAD"], cwd=ROOT)
    os.umask(0o022)  # the modes of files are part of both archives
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(committed)) as archive:
            archive.extractall(folder, filter="data")
        made = Path(folder) / "dist"
        # The wheel is built from the sdist, which is thus seen to be complete; with the setuptools that is pinned here.
        run("build", "--no-isolation", "--outdir", str(made), folder, moment=moment)
        (sdist,), (wheel,) = made.glob("*.tar.gz"), made.glob("*.whl")
        steady(sdist, int(moment))
        pins = "".join((Path(folder) / "requirements" / name).read_text() for name in ("runtime.txt", "torch.txt"))
        bill = made / sdist.name.replace(".tar.gz", ".cdx.json")
        of = ["--pyproject", f"{folder}/pyproject.toml", "--mc-type", "library"]
        to = ["--output-reproducible", "--output-file", str(bill)]
        run("cyclonedx_py", "requirements", "-", *of, *to, said=pins, moment=moment)
        out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(path, out)) for path in (wheel, sdist, bill)]


if __name__ == "__main__":
    for path in release(Path(sys.argv[1]).absolute()):
        print(path)
