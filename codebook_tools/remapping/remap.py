"""Rewrites token files and priors by index maps, each into a new file or directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from codebook_tools.checkpoints.atomic import check_apart, check_free
from codebook_tools.checkpoints.layout import SUFFIX
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.checkpoints.write import write_file
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.models.output import check_output
from codebook_tools.remapping.index_map import IndexMap, codebook_sizes, model_path, read_index_maps
from codebook_tools.remapping.priors import remap_prior
from codebook_tools.remapping.request import PRIOR_SUFFIXES, RemapRequest
from codebook_tools.remapping.token_files import LEVEL_AXIS, TOKEN_SUFFIXES, has_levels, rewrite_tokens
from codebook_tools.remapping.token_ids import Counts, Translation
from codebook_tools.remapping.token_writers import items_path

MANY = 0.1
"""Share of tokens of removed codes beyond which tokens are better made anew: a map knows no latents."""


@dataclass(frozen=True)
class Remapped:
    """The result of `remap`.

    Attributes:
        tokens: Ids read, and rows of priors' vocabularies.
        changed: Those whose number is another one now.
        removed: Those of codes that lost their identity.
        nearest: Of the removed, those that became the nearest code.
        outputs: Path of the output by that of the source.
        warnings: A line each.
        next_step: What is better done; None where there is nothing.
    """

    tokens: int
    changed: int
    removed: int
    nearest: int
    outputs: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    next_step: str | None = None

    def to_json(self) -> dict[str, object]:
        """All fields, by name."""
        return asdict(self)


def remap(request: RemapRequest) -> Remapped:
    """Rewrite every source by the maps, one after another.

    Raises:
        CodebookError: Before anything is written where that is possible. Outputs that were written before are whole,
            and the message names them.
    """
    maps = read_index_maps(request.maps, request.codebook_key)
    _check_apart(request)
    priors = {source: _open(source, request) for source in request.sources}
    outputs = {str(source): str(request.output_of(source)) for source in request.sources}
    counts, of_tokens, warnings, done = Counts(), Counts(), list[str](), list[str]()
    for source, prior in priors.items():
        try:
            if prior is None:
                of_tokens += _remap_tokens(source, maps, request)
            else:
                rows, remarks = remap_prior(prior, request.output_of(source), maps, request)
                counts, warnings = counts + rows, [*warnings, *remarks]
        except CodebookError as error:
            raise (CodebookError(f"{error}; already written: {', '.join(done)}") if done else error) from error
        done.append(outputs[str(source)])
    return Remapped(
        **asdict(counts + of_tokens),
        outputs=outputs,
        warnings=tuple(warnings),
        next_step=_next_step(of_tokens, request),
    )


def _check_apart(request: RemapRequest) -> None:
    """Raise CodebookError where two sources have one output, or an output is a map or another source."""
    outputs = dict[str, Path]()
    for source in dict.fromkeys(request.sources):
        output = request.output_of(source)
        first = outputs.setdefault(os.path.realpath(output), source)
        if first != source:
            raise CodebookError(f"{first} and {source} would both be written to {output}; give one of them")
        # Whether a source may be its own output depends on its kind, which _open checks.
        check_apart([output], {*request.sources, *request.maps} - {source})


def _open(source: Path, request: RemapRequest) -> Checkpoint | None:
    """The prior, or None for a token file: one with integers alone, or with a --key. Checks the output, too."""
    if not source.exists():
        raise CodebookError(f"no such file: {source}")
    if source.is_file() and source.suffix not in TOKEN_SUFFIXES | PRIOR_SUFFIXES:
        readable = ", ".join(sorted(TOKEN_SUFFIXES | {SUFFIX}))
        raise CodebookError(f"{source} holds neither tokens ({readable}) nor a prior's weights; convert it first")
    output = request.output_of(source)
    if source.is_dir() or source.suffix not in TOKEN_SUFFIXES:
        prior = read_checkpoint(source)
        integers = all(dtype.startswith(("I", "U")) for dtype in prior.dtypes.values())
        if source.suffix != SUFFIX or not (integers or request.key):
            check_output(prior, output, request.force)
            return prior
    _check_token_output(source, output, request.force)
    return None


def _check_token_output(source: Path, output: Path, force: bool) -> None:
    if output.suffix != source.suffix:
        raise CodebookError(f"{output} does not end in {source.suffix}, in which {source} is written again")
    if output.resolve() == source.resolve():
        raise CodebookError(f"{output} is the file that is read, which is never overwritten; write elsewhere")
    if not output.parent.is_dir():
        raise CodebookError(f"no such folder: {output.parent}; make it first, or write elsewhere with --output")
    if output.is_dir():
        raise CodebookError(f"{output} is a directory; name a file with --output")
    for target in (output, *([items_path(output)] if items_path(source).is_file() else [])):
        check_free(target, force)


def _remap_tokens(source: Path, maps: tuple[IndexMap, ...], request: RemapRequest) -> Counts:
    axis = request.axis
    if axis is None and len(maps) > 1:
        if not has_levels(source, request.key, len(maps)):
            raise CodebookError(
                f"{source}: the map has {len(maps)} codebooks; --axis N says which axis of the tokens runs over them, "
                f"or --codebook-key whose tokens these all are: {', '.join(one.key for one in maps)}"
            )
        axis = LEVEL_AXIS
    if axis is None and not request.codebook_key:
        _check_alone(source, request)
    translation = Translation(maps, request.on_removed, request.offset, request.special)
    chunks = rewrite_tokens(source, translation, request.key, axis)
    output = request.output_of(source)
    write_file(output, chunks, force=request.force)
    if items_path(source).is_file():
        _copy(items_path(source), items_path(output), request.force)
    return translation.counts


def _check_alone(source: Path, request: RemapRequest) -> None:
    """Raise CodebookError for tokens of several levels where the map is of one, and would be applied to all."""
    books = codebook_sizes(request.maps[-1])
    if len(books) > 1 and has_levels(source, request.key, len(books)):
        raise CodebookError(
            f"{source} has {len(books)} levels, and the map one codebook of {len(books)}: name those of all levels, in "
            f"order, with --codebook-key, of {', '.join(books)}; or make the tokens anew with `codebook encode`"
        )


def _copy(source: Path, target: Path, force: bool) -> None:
    try:
        with source.open("rb") as file:
            write_file(target, iter(partial(file.read, 1 << 20), b""), force=force)
    except OSError as error:
        raise CodebookError(f"cannot read {source}: {one_line(error)}") from error


def _next_step(counts: Counts, request: RemapRequest) -> str | None:
    """Where many of the tokens are approximations, the command that makes them anew. counts: of token files."""
    if counts.removed <= MANY * counts.tokens:
        return None
    model = model_path(request.maps[-1])
    became = "nearest codes" if request.on_removed == "nearest" else "masks"
    command = f"codebook encode {'MODEL' if model is None else model} --data DATA -o tokens.npy"
    share = f"{counts.removed / counts.tokens:.0%}"
    return f"{share} of the tokens were of codes that are gone, and are {became} now: `{command}` makes them anew"
