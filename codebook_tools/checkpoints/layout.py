"""Names and paths: of weights and config in a directory or side by side, and of what is written beside a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.hub_ids import copy_of, lies_within

SUFFIX = ".safetensors"
CONFIG = "config.json"
CARD = "README.md"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""File names that libraries load, in order of preference."""

INDEX = ".index.json"
"""What a library appends to such a name for the index of shards."""

PICKLES = {"diffusion_pytorch_model.bin": WEIGHTS[0], "pytorch_model.bin": WEIGHTS[1]}
"""The former name of a library's weights, and the present one."""

PREFIX = "codebook_tools."
"""Of the metadata that this package adds."""

DECLARED = "declared"
"""The metadata entry with the user's statements on tensors beside a codebook."""

AS_STORED = "as-stored"
"""The statement that a tensor beside a codebook does not change the codes."""

_PARTIAL = ".codebook.partial"
INDEX_MAP, _TRAINING = ".index_map.safetensors", ".training.safetensors"
_OTHER_WEIGHTS = {SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".gguf", ".pkl"}
SMALL = 16 << 20
"""Bytes; a file beside weights that has more does not go along with them."""


def named(path: Path) -> Path:
    """The path with a name to append to, which "." and ".." lack."""
    return path.resolve() if path.name in ("", "..") else path


def is_directory_output(path: Path) -> bool:
    """Whether a result is written to `path` as a directory, by its name: it need not exist yet."""
    return path.suffix != SUFFIX


def index_map_path(model: Path) -> Path:
    """Of the index map beside a written checkpoint."""
    return _beside(model, INDEX_MAP)


def stored_map(model: Path) -> Path:
    """Of the index map of a checkpoint that was written earlier: beside it, or within a directory on the hub."""
    inside = sorted(model.glob(f"*{INDEX_MAP}")) if copy_of(model) else []
    return inside[0] if len(inside) == 1 else index_map_path(model)


def training_path(model: Path) -> Path:
    """Of the snapshot from which an interrupted fine-tuning resumes, beside its output."""
    return _beside(model, _TRAINING)


def _beside(model: Path, ending: str) -> Path:
    """Beside the file or directory; only a .safetensors name loses its ending, since `vae.refit-k128` has none."""
    model = named(model)
    return model.with_name((model.name if is_directory_output(model) else model.stem) + ending)


def partial_path(path: Path) -> Path:
    """The temporary name of a file or directory until it is renamed.

    No download or editor gives such a name: a file of it is taken for what an interrupted run left.
    """
    return path.with_name(path.name + _PARTIAL)


def aside_path(path: Path) -> Path:
    """Where a directory is moved that is about to be replaced."""
    return path.with_name(path.name + ".old")


def own_config_path(weights: Path) -> Path:
    """Of the config of a single file, which precedes a config.json in the folder: that may belong to another model."""
    return weights.with_name(f"{weights.stem}.{CONFIG}")


def own_card_path(weights: Path) -> Path:
    """Of the model card of a single file."""
    return weights.with_name(f"{weights.stem}.{CARD}")


def config_beside(weights: Path) -> Path | None:
    """The path of a single file's config, None where there is none."""
    return next((path for path in (own_config_path(weights), weights.with_name(CONFIG)) if path.is_file()), None)


def weights_in(folder: Path) -> Path:
    """The weights in a directory: a safetensors file or the index of several, else a library's pickle.

    Raises:
        CodebookError: There are none, or several between which the names do not decide.
    """
    return folder / chosen_weights(sorted(path.name for path in folder.iterdir() if path.is_file()), str(folder))


def chosen_weights(names: Sequence[str], folder: str) -> str:
    """As `weights_in`, of the sorted names of the files in a folder, which messages call `folder`."""
    for name in WEIGHTS:
        present = [known for known in (name, name + INDEX) if known in names]
        if len(present) == 2:
            raise CodebookError(f"{folder} holds {name} and sharded weights, {name + INDEX}; give the one meant")
        if present:
            return present[0]
    indices = [name for name in names if name.endswith(SUFFIX + INDEX)]
    files = [name for name in names if name.endswith(SUFFIX) and not name.endswith((INDEX_MAP, _TRAINING))]
    for kind, candidates in ((INDEX, indices), (SUFFIX, files)):
        if len(candidates) > 1:
            raise CodebookError(
                f"{folder} holds {len(candidates)} {kind} files, none called {WEIGHTS[0]}; give the file meant"
            )
        if candidates:
            return candidates[0]
    for name in PICKLES:
        if name + INDEX in names:
            raise CodebookError(f"{folder} holds {name} in shards, which are read as {SUFFIX} alone; save the model so")
        if name in names:
            return name
    raise CodebookError(
        f"{folder} is a directory without a {SUFFIX} file; give the model's own folder, where its weights lie"
    )


def config_in(folder: Path) -> Path:
    """The path of a directory's config.

    Raises:
        CodebookError: There is none.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise CodebookError(f"{folder} has no {CONFIG}, by which a directory is read; give the file inside it")
    return path


def goes_along(name: str) -> bool:
    """Whether a file is one of the texts beside weights that libraries and readers want."""
    text = Path(name).suffix.lower() in _TEXTS or name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    return text and not name.endswith(INDEX)


_TEXTS = {".json", ".md", ".txt", ".yaml", ".yml", ".model"}


def split_others(folder: Path, weights: Collection[Path]) -> tuple[list[Path], list[str]]:
    """Sort what lies in a directory beside its weights and config.

    Returns:
        Paths of the files that are copied with any weights, and names of the rest: folders, other weights (they would
        not fit the new config), files of 16 MiB and more, and links out of the directory, which the user did not name.
    """
    copied, left = [], list[str]()
    own = {CONFIG, *(path.name for path in weights)}
    for path in sorted(path for path in folder.iterdir() if path.name not in own):
        other = path.suffix in _OTHER_WEIGHTS or path.name.endswith(INDEX)
        # is_file comes first: of a link to itself it is False, where resolving fails.
        inside = path.is_file() and lies_within(path, folder)
        if inside and not other and path.stat().st_size < SMALL:
            copied.append(path)
        else:
            left.append(path.name)
    return copied, left
