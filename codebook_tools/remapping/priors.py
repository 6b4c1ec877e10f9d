"""Priors, which predict tokens: embedding, head and bias follow the index map along the vocabulary, and the config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from torch import Tensor

from codebook_tools.checkpoints.layout import is_directory_output, split_others
from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.write import maps_sha256, write_checkpoint
from codebook_tools.errors import CodebookError
from codebook_tools.remapping.prior_config import Change, followed
from codebook_tools.remapping.prior_tables import Tables, find_tables
from codebook_tools.remapping.request import OnRemoved
from codebook_tools.remapping.vocabulary import JointVocabulary, Vocabulary
from codebook_tools.runtime.version import VERSION

_GENERATION = "generation_config.json"
_TOKENISER = {"tokenizer.json", "vocab.json", "added_tokens.json"}


@dataclass(frozen=True, eq=False)
class RemappedPrior:
    """changed: new tables by key. embedded: each embedding's vocabulary, and its rows before. config, others: what the
    config and other files of a directory are to hold."""

    tables: Tables
    changed: dict[str, Tensor]
    embedded: list[tuple[Vocabulary | JointVocabulary, int]]
    config: bytes | None
    others: dict[str, bytes]


def remapped(
    prior: Checkpoint,
    vocabularies: Sequence[Vocabulary],
    on_removed: OnRemoved,
    embedding_keys: Sequence[str] = (),
    head_keys: Sequence[str] = (),
) -> RemappedPrior:
    """The prior with its tables as the vocabularies make them, and its config.

    vocabularies: one for all tables, or one for each. on_removed: "nearest" lets a new code that is no old one's
    inherit the rows of those nearest to it. Raises CodebookError where a table is not found or too short for the codes,
    or a new code inherits nothing.
    """
    if isinstance(on_removed, int):
        raise CodebookError(f"--on-removed mask={on_removed} is for tokens; for a prior, give error or nearest")
    for vocabulary in vocabularies:
        bereft = vocabulary.bereft
        if on_removed == "error" and bool(bereft.any()):
            raise CodebookError(
                f"{int(bereft.sum())} of {len(bereft)} new codes of {vocabulary.codes.key}, the first "
                f"{int(bereft.int().argmax())}, are no old one's; --on-removed nearest gives each the mean row of "
                "the old codes nearest to it"
            )
    tables = find_tables(prior, embedding_keys, head_keys)
    changed, embedded = dict[str, Tensor](), list[tuple[Vocabulary | JointVocabulary, int]]()
    for key, one in _paired(prior, tables.embeddings, vocabularies):
        changed[key] = one.new_rows(prior.tensor(key))
        embedded.append((one, prior.shapes[key][0]))
    for key, one in _paired(prior, tables.heads, vocabularies):
        changed[key] = one.new_rows(prior.tensor(key))
    for key, one in _paired(prior, tables.biases, vocabularies):
        changed[key] = one.new_bias(prior.tensor(key))
    if vocabularies[0].multiple > 1 and len({prior.shapes[key][0] for key in changed}) > 1:
        raise CodebookError(f"{prior.path}: {', '.join(changed)} differ in length; --pad-to-multiple would part them")
    return RemappedPrior(tables, changed, embedded, *_configs(prior, embedded))


def remap_prior(
    prior: Checkpoint,
    output: Path,
    vocabularies: Sequence[Vocabulary],
    on_removed: OnRemoved,
    embedding_keys: Sequence[str] = (),
    head_keys: Sequence[str] = (),
    *,
    force: bool = False,
) -> tuple[list[tuple[Vocabulary | JointVocabulary, int]], list[str]]:
    """Write `remapped` to `output`. Returns each embedding's vocabulary with its rows before, and warnings."""
    new = remapped(prior, vocabularies, on_removed, embedding_keys, head_keys)
    about = about_remapping(prior, vocabularies, on_removed, embedding_keys, head_keys)
    write_checkpoint(prior, output, new.changed, about, {}, new.config, new.others, force=force)
    return new.embedded, [*_warnings(prior, output, new.tables, vocabularies)]


def _paired(
    prior: Checkpoint, keys: Sequence[str], vocabularies: Sequence[Vocabulary]
) -> Iterator[tuple[str, Vocabulary | JointVocabulary]]:
    """Each table with its vocabulary: that of one codebook, or where tables are fewer and long enough those of all, one
    after another. Raises CodebookError where their numbers do not meet, or a table is too short."""
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
    for key, one in zip(keys, vocabularies if len(vocabularies) > 1 else repeat(vocabularies[0]), strict=False):
        rows = prior.shapes[key][0]
        if rows < one.end:
            raise CodebookError(
                f"{key} in {prior.path} has {rows} rows, and the map's {one.codes.old_size} codes from id {one.offset} "
                f"on need {one.end}; is the map of another checkpoint, or --offset another?"
            )
        yield key, one


def _configs(
    prior: Checkpoint, embedded: Sequence[tuple[Vocabulary | JointVocabulary, int]]
) -> tuple[bytes | None, dict[str, bytes]]:
    """What the config of a directory is to hold, and others of its files that know the vocabulary."""
    if prior.folder is None or prior.config_path is None:
        return None, {}
    changes = {
        (rows, one.rows(rows), part.codes.old_size, part.codes.size)
        for one, rows in embedded
        for part in (one.parts if isinstance(one, JointVocabulary) else (one,))
    }
    if len(changes) > 1:
        raise CodebookError(f"{prior.config_path} has one vocabulary size, and the codebooks' new sizes differ")
    before, after, old, new = changes.pop()
    change = Change((before, after), (old, new), embedded[0][0].new_id)
    generation = prior.folder / _GENERATION
    others = {_GENERATION: followed(generation, change, prior.config_path)} if generation.is_file() else {}
    return followed(prior.config_path, change), others


def about_remapping(
    prior: Checkpoint,
    vocabularies: Sequence[Vocabulary],
    on_removed: OnRemoved,
    embedding_keys: Sequence[str],
    head_keys: Sequence[str],
    version: str = VERSION,
) -> dict[str, str]:
    """What the written file says of itself, without PREFIX. version: of the program that wrote it."""
    first = vocabularies[0]
    settings = {
        "on_removed": on_removed,
        "offset": first.offset,
        "pad_to_multiple": first.multiple,
        "embedding_keys": list(embedding_keys),
        "head_keys": list(head_keys),
    }
    maps = {f"{i}/nearest": one.codes.nearest for i, one in enumerate(vocabularies)}
    told = {
        "command": "remap",
        "version": version,
        "settings": json.dumps(settings, sort_keys=True),
        "codebooks": json.dumps({one.codes.key: one.codes.size for one in vocabularies}),
        "source_sha256": prior.sha256,
        "nearest_sha256": maps_sha256(maps),
    }
    # No file lies beside a prior that would hold its hash: a damaged version shows by this alone.
    return {**told, "about_sha256": hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}


def _warnings(prior: Checkpoint, output: Path, tables: Tables, vocabularies: Sequence[Vocabulary]) -> Iterator[str]:
    merged = sum(one.merged for one in vocabularies)
    if merged:
        low = "" if tables.biases else "; for want of a head bias they are too unlikely, by up to as many times"
        yield f"{merged} codes stand for several old ones: their rows are means, so the prior is approximate there{low}"
    barren = sum(int((one.inherited == 0).sum()) for one in vocabularies)
    if barren:
        yield f"{barren} new codes are nearest to no old one: their rows are the mean of all codes"
    if vocabularies[0].multiple > 1 and not tables.biases:
        yield "rows of padding have the logit 0, not a low one, for the head has no bias"
    if prior.folder is None and prior.config_path is not None:
        yield f"{prior.config_path.name} beside it is left as it is; give the directory to have it follow"
    if prior.folder is not None and is_directory_output(output):
        others, left_out = split_others(prior.folder, prior.files)
        tokeniser = [path.name for path in others if path.name in _TOKENISER]
        if tokeniser:
            yield f"{', '.join(tokeniser)} goes along as it is, with the ids of the old vocabulary"
        if left_out:
            yield f"of the prior's directory, {', '.join(left_out[:3])} does not go into the new one"
