"""Where a checkpoint's weights and config lie: in a directory as diffusers lays it out, or side by side as files."""

from __future__ import annotations

from pathlib import Path

from codebook_tools.errors import CodebookError

SUFFIX = ".safetensors"
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""The names that libraries load, the first before the second, and either before any other."""

PREFIX = "codebook_tools."
"""Of the metadata that we add."""

_INDEX_MAP = ".index_map.safetensors"
_OTHER_WEIGHTS = {SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".pkl"}
_SMALL = 16 << 20


def named(path: Path) -> Path:
    """The path with a name of its own, which "." and ".." lack."""
    return path.resolve() if path.name in ("", "..") else path


def is_directory_output(path: Path) -> bool:
    """Whether a result is written to `path` as a directory: told by the name, for nothing need be there yet."""
    return path.suffix != SUFFIX


def index_map_path(model: Path) -> Path:
    """Beside the file or the directory. Only a file's name loses its ending: `vae.refit-k128` is all name."""
    model = named(model)
    return model.with_name((model.name if is_directory_output(model) else model.stem) + _INDEX_MAP)


def partial_path(path: Path) -> Path:
    """Where a file or directory is built before it is renamed."""
    return path.with_name(path.name + ".partial")


def aside_path(path: Path) -> Path:
    """Where the directory waits that another is about to replace."""
    return path.with_name(path.name + ".old")


def own_config_path(weights: Path) -> Path:
    """Of a single file: the config that is read before a config.json in the same folder, which may be of many."""
    return weights.with_name(f"{weights.stem}.{CONFIG}")


def config_beside(weights: Path) -> Path | None:
    """The config of a single file, None where there is none."""
    return next((path for path in (own_config_path(weights), weights.with_name(CONFIG)) if path.is_file()), None)


def weights_in(folder: Path) -> Path:
    """The one file of weights in a directory. Raises CodebookError where it has none, several, or shards."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any(name.endswith(SUFFIX + ".index.json") for name in names):
        raise CodebookError(f"{folder} holds sharded weights, which are not supported yet; save the model in one file")
    found = [name for name in names if name.endswith(SUFFIX) and not name.endswith(_INDEX_MAP)]
    known = next((name for name in WEIGHTS if name in found), None)
    if known is None and not found:
        raise CodebookError(
            f"{folder} is a directory without a {SUFFIX} file; give the model's own folder, where its weights lie"
        )
    if known is None and len(found) > 1:
        raise CodebookError(
            f"{folder} holds {len(found)} {SUFFIX} files, none called {WEIGHTS[0]}; give the file meant"
        )
    return folder / (known or found[0])


def config_in(folder: Path) -> Path:
    """The config of a directory. Raises CodebookError where it has none."""
    path = folder / CONFIG
    if not path.is_file():
        raise CodebookError(f"{folder} has no {CONFIG}, by which a directory is read; give the {SUFFIX} file inside it")
    return path


def split_others(folder: Path) -> tuple[list[Path], list[str]]:
    """What lies in a directory beside weights and config: files that go with any weights, and names of the rest.

    The rest is folders, other weights (they would not fit the new config), files of 16 MiB and more, and links out of
    the directory: only what the user named is read.
    """
    go, stay = [], list[str]()
    for path in sorted(folder.iterdir()):
        if path.name in (CONFIG, weights_in(folder).name):
            continue
        inside = path.resolve().parent == folder.resolve()
        if path.is_file() and inside and path.suffix not in _OTHER_WEIGHTS and path.stat().st_size < _SMALL:
            go.append(path)
        else:
            stay.append(path.name)
    return go, stay
