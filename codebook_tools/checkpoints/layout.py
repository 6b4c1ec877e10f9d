"""Where a checkpoint's weights and config lie: in a directory as libraries lay it out, or side by side as files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from codebook_tools.errors import CodebookError

SUFFIX = ".safetensors"
CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""The names that libraries load, the first before the second, and either before any other."""

INDEX = ".index.json"
"""What a library adds to that name for the index of shards."""

_PICKLES = {"diffusion_pytorch_model.bin": WEIGHTS[0], "pytorch_model.bin": WEIGHTS[1]}
"""What libraries called their weights before, and call them now."""

PREFIX = "codebook_tools."
"""Of the metadata that we add."""

DECLARED = "declared"
"""The entry of it that keeps what a user said of tensors beside a codebook."""

AS_STORED = "as-stored"
"""That a tensor beside a codebook does not change the codes that come out."""

_PARTIAL = ".codebook.partial"
_INDEX_MAP, _TRAINING = ".index_map.safetensors", ".training.safetensors"
_OTHER_WEIGHTS = {SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".pkl"}
_SMALL = 16 << 20


def named(path: Path) -> Path:
    """The path with a name of its own, which "." and ".." lack."""
    return path.resolve() if path.name in ("", "..") else path


def is_directory_output(path: Path) -> bool:
    """Whether a result is written to `path` as a directory: told by the name, for nothing need be there yet."""
    return path.suffix != SUFFIX


def index_map_path(model: Path) -> Path:
    return _beside(model, _INDEX_MAP)


def training_path(model: Path) -> Path:
    """Where a fine-tuning keeps itself until its result is written."""
    return _beside(model, _TRAINING)


def _beside(model: Path, ending: str) -> Path:
    """Beside the file or the directory. Only a file's name loses its ending: `vae.refit-k128` is all name."""
    model = named(model)
    return model.with_name((model.name if is_directory_output(model) else model.stem) + ending)


def partial_path(path: Path) -> Path:
    """Where a file or directory is built before it is renamed: under a name that no download or editor gives, for what
    lies there is taken for what an interrupted run left."""
    return path.with_name(path.name + _PARTIAL)


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
    """The weights in a directory: a safetensors file or the index of several, else a library's pickle.

    Raises CodebookError where it has none, or cannot be told which are meant.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    for name in WEIGHTS:
        here = [known for known in (name, name + INDEX) if known in names]
        if len(here) == 2:
            raise CodebookError(f"{folder} holds {name} and sharded weights, {name + INDEX}; give the one meant")
        if here:
            return folder / here[0]
    indices = [name for name in names if name.endswith(SUFFIX + INDEX)]
    files = [name for name in names if name.endswith(SUFFIX) and not name.endswith((_INDEX_MAP, _TRAINING))]
    for kind, found in ((INDEX, indices), (SUFFIX, files)):
        if len(found) > 1:
            raise CodebookError(
                f"{folder} holds {len(found)} {kind} files, none called {WEIGHTS[0]}; give the file meant"
            )
        if found:
            return folder / found[0]
    for name in _PICKLES:
        if name + INDEX in names:
            raise CodebookError(f"{folder} holds {name} in shards, which are read as {SUFFIX} alone; save the model so")
        if name in names:
            return folder / name
    raise CodebookError(
        f"{folder} is a directory without a {SUFFIX} file; give the model's own folder, where its weights lie"
    )


def written_name(original: Path, config: Mapping[str, object] | None) -> str:
    """Of weights in a directory that is written, by those of the original and its config: as the library loads them."""
    by_config = WEIGHTS[1] if config and "model_type" in config else WEIGHTS[0]  # as transformers calls itself
    return _PICKLES.get(original.name, by_config)


def config_in(folder: Path) -> Path:
    """The config of a directory. Raises CodebookError where it has none."""
    path = folder / CONFIG
    if not path.is_file():
        raise CodebookError(f"{folder} has no {CONFIG}, by which a directory is read; give the file inside it")
    return path


def split_others(folder: Path, weights: Collection[Path]) -> tuple[list[Path], list[str]]:
    """What lies in a directory beside weights and config: files that go with any weights, and names of the rest.

    The rest is folders, other weights (they would not fit the new config), files of 16 MiB and more, and links out of
    the directory: only what the user named is read.
    """
    go, stay = [], list[str]()
    own = {CONFIG, *(path.name for path in weights)}
    for path in sorted(path for path in folder.iterdir() if path.name not in own):
        other = path.suffix in _OTHER_WEIGHTS or path.name.endswith(INDEX)
        # A link that leads round in a circle is no file, and resolving it fails.
        if path.is_file() and _is_inside(path, folder) and not other and path.stat().st_size < _SMALL:
            go.append(path)
        else:
            stay.append(path.name)
    return go, stay


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()
