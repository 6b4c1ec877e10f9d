"""Where a result goes, and in which layout: as a file, or as a directory that the model's own library loads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from codebook_tools.checkpoints.atomic import check_apart
from codebook_tools.checkpoints.config import with_entries
from codebook_tools.checkpoints.layout import (
    CONFIG,
    SUFFIX,
    index_map_path,
    is_directory_output,
    named,
    own_card_path,
    own_config_path,
    split_others,
    training_path,
)
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.write import check_writable
from codebook_tools.errors import CodebookError
from codebook_tools.models.registry import size_entry
from codebook_tools.runtime.hub_ids import copy_of
from codebook_tools.strategies.padding import power_of_two

_NOT_WRITTEN = {".pt", ".pth", ".ckpt", ".bin"}


def default_output(checkpoint: Checkpoint, command: str, size: int, folder: Path | None = None) -> Path:
    """`<name>.<command>-k<K>` beside the model, or in `folder`: a directory where there is a config to go with it.

    That of a model in the hub's cache is in the current folder.
    """
    place = named(checkpoint.folder or checkpoint.path)
    copy = copy_of(place)
    name = copy.name if copy else place.name if checkpoint.folder else place.stem
    ending = "" if _has_config(checkpoint) else SUFFIX
    beside = place.parent if copy is None else Path()
    return (beside if folder is None else folder) / (f"{name}.{command}-k{size}" + ending)


def check_output(
    checkpoint: Checkpoint, output: Path, force: bool, read: Iterable[Path] = (), with_card: bool = False
) -> None:
    """Check where a result would be written.

    Args:
        checkpoint: The model.
        output: Of the result.
        force: Whether an older result may be replaced.
        read: Further files that must not be replaced.
        with_card: Whether a model card is written beside a file.

    Raises:
        CodebookError: The output cannot be written, has no known format, or would replace what is read.
    """
    if copy_of(output):
        raise CodebookError(f"{output} lies in the hub's cache, which is never written; write elsewhere with --output")
    if output.name in ("", ".."):
        raise CodebookError(f"--output {output} has no name of its own, to write a partial one beside it; spell it out")
    as_folder, described = is_directory_output(output), _has_config(checkpoint)
    sources = {path.resolve() for path in (*checkpoint.files, checkpoint.folder, checkpoint.config_path) if path}
    written = {output.resolve()} if as_folder else {output.resolve(), own_config_path(output).resolve()}
    if sources & written:
        raise CodebookError(f"{output} is the model itself, which is never overwritten; write elsewhere with --output")
    check_apart((output, index_map_path(output), training_path(output)), (*sources, *read))
    if as_folder and any(output.resolve() in source.parents for source in sources):
        raise CodebookError(f"{output} holds the model, which is never overwritten; write elsewhere with --output")
    if as_folder and not described and output.is_dir():
        raise CodebookError(f"{output} is a directory; name a file with --output")
    if as_folder and (not described or output.suffix in _NOT_WRITTEN):
        raise CodebookError(f"{output} does not end in {SUFFIX}, the one format that is written")
    beside = [own_config_path(output)] * described + [own_card_path(output)] * with_card
    check_writable(output, force, beside)


def check_size(checkpoint: Checkpoint, size: int | None) -> None:
    """Raise CodebookError, with the nearest sizes that it takes, where the model's config refuses so many codes."""
    entry = size_entry(checkpoint)
    if size is None or size < 1 or entry is None or not entry.power_of_two:
        return
    above = power_of_two(size)
    if size != above:
        raise CodebookError(
            f"{size} codes: {checkpoint.config_path} takes powers of two only; the nearest are {above // 2} and {above}"
        )


def written_config(checkpoint: Checkpoint, size: int) -> bytes | None:
    """The original's config with K set to `size`; None where none is to be written."""
    path, entry = checkpoint.config_path, size_entry(checkpoint)
    if path is None or (entry is None and checkpoint.folder is None):
        return None
    text = path.read_bytes()
    return with_entries(text, entry.values(size)) if entry else text


def remarks(checkpoint: Checkpoint, old: int, new: int, output: Path) -> list[str]:
    """Warnings of what is not copied to the directory `output`, and of a config that K is not known in.

    Args:
        checkpoint: The model.
        old: Its number of codes.
        new: That of the result.
        output: Of the result.
    """
    warnings, left_out = list[str](), list[str]()
    if checkpoint.folder and is_directory_output(output):
        left_out = split_others(checkpoint.folder, checkpoint.files)[1]
    if left_out:
        few = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
        warnings.append(f"of the model's directory, {few} does not go into the new one")
    if checkpoint.folder and checkpoint.config_path and size_entry(checkpoint) is None and new != old:
        warnings.append(f"{CONFIG} goes along as it is: no entry of it is known to be K, which is {new} now")
    return warnings


def _has_config(checkpoint: Checkpoint) -> bool:
    return checkpoint.folder is not None or size_entry(checkpoint) is not None
