"""Priors, which predict tokens: embedding, head, bias and config follow the index map."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, repeat
from pathlib import Path

import torch
from torch import Tensor

from codebook_tools.checkpoints.layout import is_directory_output, split_others
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.write import maps_sha256, write_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.remapping.index_map import IndexMap
from codebook_tools.remapping.prior_config import Change, followed
from codebook_tools.remapping.prior_tables import Tables, find_tables
from codebook_tools.remapping.request import RemapRequest
from codebook_tools.remapping.token_ids import Counts
from codebook_tools.remapping.vocabulary import AnyVocabulary, JointVocabulary, Vocabulary
from codebook_tools.runtime.version import VERSION

_GENERATION = "generation_config.json"
_TOKENIZER = {"tokenizer.json", "vocab.json", "added_tokens.json"}


@dataclass(frozen=True)
class PriorSettings:
    """How a prior was remapped, as its metadata record it.

    Attributes:
        on_removed: "error", or "nearest" to let a new code without an old one inherit the rows of those nearest to it.
        offset: The id of code 0.
        pad_to_multiple: What the number of ids is padded to.
        embedding_keys: Keys of embeddings that the user names.
        head_keys: The same, of heads and their biases.
    """

    on_removed: str
    offset: int
    pad_to_multiple: int
    embedding_keys: list[str]
    head_keys: list[str]

    def vocabularies(self, maps: Sequence[IndexMap]) -> list[Vocabulary]:
        """The vocabulary of each codebook."""
        return [Vocabulary(codes, self.offset, self.pad_to_multiple) for codes in maps]


@dataclass(frozen=True, eq=False)
class RemappedPrior:
    """A prior after a surgery.

    Attributes:
        tables: Which tensors have a row for each id.
        changed: The new tables, by key.
        embedded: The vocabulary of each embedding, and its number of rows before.
        config: New text of the directory's config; None where there is none.
        others: New text of other files of the directory, by name.
    """

    tables: Tables
    changed: dict[str, Tensor]
    embedded: list[tuple[AnyVocabulary, int]]
    config: bytes | None
    others: dict[str, bytes]


def remapped(prior: Checkpoint, maps: Sequence[IndexMap], settings: PriorSettings) -> RemappedPrior:
    """Let a prior's tables and config follow the index maps.

    Args:
        prior: The prior.
        maps: One for all tables, or one for each.
        settings: How.

    Raises:
        CodebookError: A table is missing or has fewer rows than the codes need, or a new code inherits no row.
    """
    vocabularies = settings.vocabularies(maps)
    for one in vocabularies:
        unmatched = one.unmatched
        if settings.on_removed == "error" and bool(unmatched.any()):
            raise CodebookError(
                f"{int(unmatched.sum())} of {len(unmatched)} new codes of {one.codes.key}, the first "
                f"{int(unmatched.int().argmax())}, are no old one's; --on-removed nearest gives each the mean row of "
                "the old codes nearest to it"
            )
    tables = find_tables(prior, settings.embedding_keys, settings.head_keys)
    embeddings = [*_paired(prior, tables.embeddings, vocabularies)]
    rows = chain(embeddings, _paired(prior, tables.heads, vocabularies))
    changed = {key: vocabulary.new_rows(prior.tensor(key)) for key, vocabulary in rows}
    for key, vocabulary in _paired(prior, tables.biases, vocabularies):
        changed[key] = vocabulary.new_bias(prior.tensor(key))
    if vocabularies[0].multiple > 1 and len({prior.shapes[key][0] for key in changed}) > 1:
        raise CodebookError(f"{prior.path}: {', '.join(changed)} differ in length; --pad-to-multiple would part them")
    embedded = [(vocabulary, prior.shapes[key][0]) for key, vocabulary in embeddings]
    return RemappedPrior(tables, changed, embedded, *_configs(prior, embedded))


def remap_prior(
    prior: Checkpoint, output: Path, maps: Sequence[IndexMap], request: RemapRequest
) -> tuple[Counts, list[str]]:
    """Write the remapped prior.

    Args:
        prior: The prior.
        output: File or directory.
        maps: One for all tables, or one for each.
        request: How.

    Returns:
        Counts of the rows of all embeddings, and warnings.

    Raises:
        CodebookError: As `remapped`, or tokens are to be masked, which is not for priors.
    """
    if isinstance(request.on_removed, int):
        raise CodebookError(f"--on-removed mask={request.on_removed} is for tokens; for a prior, give error or nearest")
    keys = [*request.embedding_key], [*request.head_key]
    settings = PriorSettings(request.on_removed, request.offset, request.pad_to_multiple, *keys)
    new = remapped(prior, maps, settings)
    about = about_remapping(prior, maps, settings)
    write_checkpoint(prior, output, new.changed, about, {}, new.config, new.others, force=request.force)
    counts = sum((vocabulary.counts(rows) for vocabulary, rows in new.embedded), Counts())
    return counts, [*_warnings(prior, output, new.tables, settings.vocabularies(maps))]


def _paired(
    prior: Checkpoint, keys: Sequence[str], vocabularies: Sequence[Vocabulary]
) -> Iterator[tuple[str, AnyVocabulary]]:
    """Each table with its vocabulary: that of one codebook, or the joint one of all codebooks where there are fewer
    tables than codebooks and each is long enough. Raises CodebookError where the numbers do not match, or a table is
    too short."""
    joint = JointVocabulary.of(vocabularies)
    fewer = 0 < len(keys) < len(vocabularies)
    if fewer and all(prior.shapes[key][0] >= joint.end for key in keys):
        yield from ((key, joint) for key in keys)
        return
    if len(vocabularies) > 1 and keys and len(keys) != len(vocabularies):
        raise CodebookError(
            f"{prior.path}: {len(keys)} tables ({', '.join(keys)}) for {len(vocabularies)} codebooks; name one of each "
            "with --embedding-key and --head-key, or the only codebook with --codebook-key"
        )
    each = vocabularies if len(vocabularies) > 1 else repeat(vocabularies[0])
    for key, vocabulary in zip(keys, each, strict=False):
        rows = prior.shapes[key][0]
        if rows < vocabulary.end:
            raise CodebookError(
                f"{key} in {prior.path} has {rows} rows, and the map's {vocabulary.codes.old_size} codes from id "
                f"{vocabulary.offset} on need {vocabulary.end}; is the map of another checkpoint, or --offset another?"
            )
        yield key, vocabulary


def _configs(prior: Checkpoint, embedded: Sequence[tuple[AnyVocabulary, int]]) -> tuple[bytes | None, dict[str, bytes]]:
    """New text of a directory's config, and of its other files that depend on the vocabulary."""
    if prior.folder is None or prior.config_path is None:
        return None, {}
    changes = {
        (rows, vocabulary.rows(rows), part.codes.old_size, part.codes.size)
        for vocabulary, rows in embedded
        for part in vocabulary.parts
    }
    if len(changes) > 1:
        raise CodebookError(f"{prior.config_path} has one vocabulary size, and the codebooks' new sizes differ")
    before, after, old, new = changes.pop()
    change = Change((before, after), (old, new), embedded[0][0].new_id)
    generation = prior.folder / _GENERATION
    others = {_GENERATION: followed(generation, change, prior.config_path)} if generation.is_file() else {}
    return followed(prior.config_path, change), others


def about_remapping(
    prior: Checkpoint, maps: Sequence[IndexMap], settings: PriorSettings, version: str = VERSION
) -> dict[str, str]:
    """Metadata of the remapped prior, without PREFIX.

    Args:
        prior: The original.
        maps: The maps that it followed.
        settings: How.
        version: Of the program that wrote the file.
    """
    about = {
        "command": "remap",
        "version": version,
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "codebooks": json.dumps({codes.key: codes.size for codes in maps}),
        "source_sha256": prior.sha256,
        "nearest_sha256": maps_sha256({f"{i}/nearest": codes.nearest for i, codes in enumerate(maps)}),
    }
    # No file beside a prior records its hash: only this shows a damaged version.
    return {**about, "about_sha256": hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()}


def _warnings(prior: Checkpoint, output: Path, tables: Tables, vocabularies: Sequence[Vocabulary]) -> Iterator[str]:
    inherited = torch.cat([vocabulary.inherited for vocabulary in vocabularies])
    merged, barren = int((inherited > 1).sum()), int((inherited == 0).sum())
    if merged:
        low = "" if tables.biases else "; for want of a head bias they are too unlikely, by up to as many times"
        yield f"{merged} codes stand for several old ones: their rows are means, so the prior is approximate there{low}"
    if barren:
        yield f"{barren} new codes are nearest to no old one: their rows are the mean of all codes"
    if vocabularies[0].multiple > 1 and not tables.biases:
        yield "rows of padding have the logit 0, not a low one, for the head has no bias"
    if prior.folder is None and prior.config_path is not None:
        yield f"{prior.config_path.name} beside it is left as it is; give the directory to have it follow"
    if prior.folder is not None and is_directory_output(output):
        others, left_out = split_others(prior.folder, prior.files)
        tokenizer = [path.name for path in others if path.name in _TOKENIZER]
        if tokenizer:
            yield f"{', '.join(tokenizer)} goes along as it is, with the ids of the old vocabulary"
        if left_out:
            yield f"of the prior's directory, {', '.join(left_out[:3])} does not go into the new one"
