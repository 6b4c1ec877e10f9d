"""What reads files from strangers, each with sound files to begin from: for `fuzz.py`, and for the quick test of it.

Any bytes must end in a result, or in one clear line that says what is wrong with them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from seeds import (
    HARMLESS,
    MAP,
    VQMODEL,
    headers,
    image_arrays,
    index_files,
    latent_files,
    map_files,
    pickled,
    pictures,
    recipes,
    results,
    rows,
    safetensors_files,
    saved_by_torch,
    shards,
    stats_files,
    tars,
    token_files,
    unfinished,
    vqmodel,
    waveforms,
    with_length,
    with_twists,
    zipped,
)

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.data.audio import Waveforms
from codebook_tools.data.dataset import Media
from codebook_tools.data.images import Images
from codebook_tools.data.items import find_items
from codebook_tools.data.latent_files import open_latents, split_latents
from codebook_tools.data.modality import Modality
from codebook_tools.diagnosis.training_trace import read_trace
from codebook_tools.errors import CodebookError, one_line
from codebook_tools.evaluation.stats_file import holds_sample, read_part, read_stats
from codebook_tools.models.load import load_model
from codebook_tools.remapping.index_map import read_index_maps
from codebook_tools.remapping.token_files import rewrite_tokens
from codebook_tools.remapping.token_ids import Translation
from codebook_tools.remapping.token_readers import check_range, open_tokens
from codebook_tools.training.recipe_file import read_recipe, steps_of
from codebook_tools.training.resume import SnapshotFile
from codebook_tools.workflows.comparison_rows import RowStore
from codebook_tools.workflows.inspect_checkpoint import inspect_checkpoint

__all__ = ["TARGETS", "VQMODEL", "Target", "tried"]


@dataclass(frozen=True)
class Target:
    """name: of the file that the bytes go into. seeds: sound files. read: all that is done with it. around: what lies
    beside it, made once. wrap: what the bytes are put into, so that they get past the first check."""

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    around: Callable[[Path], object] = lambda folder: None
    wrap: Callable[[bytes], bytes] = lambda data: data


def tried(target: Target, folder: Path, data: bytes) -> str | None:
    """Read it as the bytes `data`. Returns the line that says why not, None where it could be read; whatever else is
    raised is a fault."""
    path = folder / target.name
    path.write_bytes(target.wrap(data))
    try:
        target.read(path)
    except CodebookError as error:
        said = str(error)
        assert said and "\n" not in said and "\r" not in said, f"not one line: {said!r}"
        return said
    return None


def load_folder(path: Path) -> None:
    load_model(read_checkpoint(path.parent))


def look(path: Path, modality: Modality) -> None:
    """List what there is, and decode all: what cannot be read says why."""
    media = Media(find_items([path], modality), modality)
    for item in media.items[:64]:
        found = media.decode(item)
        if isinstance(found, Exception):
            assert one_line(found)


def read_latents(path: Path) -> None:
    for part in split_latents(open_latents([path], 4)):
        for _ in part:
            pass


def rewrite(path: Path) -> None:
    for _ in rewrite_tokens(path, Translation((MAP,), "nearest"), (), None):
        pass


def read_tokens(path: Path) -> None:
    for names, codes in open_tokens(path).batches(1, 64):
        check_range(codes, [4], names, path)


def read_counts(path: Path) -> None:
    holds_sample(path)
    with contextlib.suppress(CodebookError):
        read_part(path)
    model = read_checkpoint(path)
    found = next(iter(inspect_checkpoint(path).detection.codebooks), None)
    if found is not None:
        read_stats(path, model, found)


TARGETS: dict[str, Target] = {
    "safetensors": Target("m.safetensors", safetensors_files, lambda path: _all_of(path)),
    "safetensors header": Target("m.safetensors", headers, lambda path: _all_of(path), wrap=with_length),
    "index of shards": Target("m.safetensors.index.json", index_files, inspect_checkpoint, shards),
    "torch.save": Target(
        "m.pt",
        lambda: [saved_by_torch(is_zip, beside) for beside in (HARMLESS, {}) for is_zip in (True, False)],
        lambda path: _all_of(path),
    ),
    "pickle in torch.save": Target(
        "m.pt", lambda: [pickled(HARMLESS), pickled()], lambda path: _all_of(path), wrap=zipped
    ),
    "config": Target("config.json", lambda: with_twists([json.dumps(VQMODEL).encode()]), load_folder, vqmodel),
    "picture": Target("a.png", pictures, lambda path: look(path, Images())),
    "tar": Target("a.tar", tars, lambda path: look(path, Images())),
    "npy of images": Target("a.npy", lambda: image_arrays("npy"), lambda path: look(path, Images())),
    "npz of images": Target("a.npz", lambda: image_arrays("npz"), lambda path: look(path, Images())),
    "sound": Target("a.wav", waveforms, lambda path: look(path, Waveforms(rate=1600, stride=8, size=160))),
    "npy of latents": Target("l.npy", lambda: latent_files("npy"), read_latents),
    "safetensors of latents": Target("l.safetensors", lambda: latent_files("safetensors"), read_latents),
    "index map": Target("m.index_map.safetensors", map_files, lambda path: read_index_maps([path])),
    **{
        f"{kind} of tokens": Target(f"t.{kind}", partial(token_files, kind), rewrite)
        for kind in ("npy", "safetensors", "parquet", "tar", "jsonl")
    },
    **{
        f"{kind} to decode": Target(f"t.{kind}", partial(token_files, kind), read_tokens)
        for kind in ("npy", "safetensors", "parquet", "jsonl")
    },
    "stats": Target("s.safetensors", stats_files, read_counts),
    "trace": Target("t.json", results, read_trace),
    "unfinished fine-tuning": Target(
        "m.training.safetensors", unfinished, lambda path: SnapshotFile(path, {"k": 4}, resume=True).read()
    ),
    "recipe": Target("r.yaml", recipes, lambda path: steps_of(read_recipe(path), batch_size=64, seed=0)),
    "rows of a comparison": Target("rows.json", rows, lambda path: RowStore(path.parent)),
}


def _all_of(path: Path) -> None:
    """The header, what is found in it, and every tensor."""
    inspect_checkpoint(path)
    read_checkpoint(path).tensors()
