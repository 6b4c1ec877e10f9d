"""Which tensors of a prior have a row for each id: its input embeddings, its output heads, and the heads' biases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.errors import CodebookError

EMBEDDINGS = (
    "embed_tokens", "wte", "tok_embeddings", "tok_embedding", "tok_emb", "token_embeddings", "token_embedding",
    "token_emb", "word_embeddings", "word_embedding", "embed_in",
)  # fmt: skip
HEADS = ("lm_head", "lm_heads", "embed_out", "output_projection", "to_logits", "output", "head")
"""Modules as transformers, nanoGPT, minGPT, Llama, x-transformers and their descendants call them."""


@dataclass(frozen=True)
class Tables:
    """Keys by codebook, in stage order, or all of one codebook. heads: none where they are tied to the embeddings."""

    embeddings: tuple[str, ...]
    heads: tuple[str, ...]
    biases: tuple[str, ...]


def find_tables(prior: Checkpoint, embeddings: Sequence[str], heads: Sequence[str]) -> Tables:
    """embeddings, heads: keys that the user names, a bias that stands alone among the heads; without any, told by name.

    Raises CodebookError where none or several could be meant, or a key is not there or holds no rows of numbers.
    """
    tables = tuple(embeddings) or _named(prior, EMBEDDINGS, "weight", "--embedding-key")
    if not tables:
        raise CodebookError(
            f"{prior.path} has no tensor named like an embedding of tokens; name it with --embedding-key, "
            "or what holds tokens with --key"
        )
    outputs = tuple(heads) or _named(prior, HEADS, "weight", "--head-key")
    weights = tuple(key for key in outputs if len(prior.shapes.get(key, ())) != 1)
    alone = tuple(key for key in outputs if key not in weights)  # BERT's bias has a place of its own
    beside = (re.sub(r"weight$", "bias", key) for key in weights)
    biases = alone or tuple(key for key in beside if key not in weights and key in prior.entries)
    found = Tables(tables, weights, biases or _named(prior, HEADS, "bias", "--head-key"))
    for key in (*found.embeddings, *found.heads, *found.biases):
        entry = prior.entries.get(key)
        if entry is None:
            raise CodebookError(f"{prior.path} has no tensor {key}")
        if not entry.shape or not entry.dtype.startswith(("F", "BF")):
            raise CodebookError(f"{key} in {prior.path} is {entry.dtype} {list(entry.shape)}; expected rows of floats")
    return found


def _named(prior: Checkpoint, names: Sequence[str], leaf: str, option: str) -> tuple[str, ...]:
    """One tensor, or several that differ in one number alone: those of the codebooks. The first name that occurs
    counts."""
    for name in names:
        pattern = re.compile(rf"(.*\.)?{name}(\.\d+)?\.{leaf}")
        keys = [key for key in prior.entries if pattern.fullmatch(key)]
        if len({re.sub(r"\d+(?=\.\w+$)", "#", key) for key in keys}) > 1:
            raise CodebookError(f"{prior.path}: each of {', '.join(keys)} could be meant; name it with {option}")
        if keys:
            return tuple(sorted(keys, key=lambda key: [int(number) for number in re.findall(r"\d+", key)]))
    return ()
