"""Which tensors of a prior have a row for each id: input embeddings, output heads, and the biases of heads."""

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
    """Keys of tensors, one for each codebook in the order of the quantizer stages, or all of one codebook.

    Attributes:
        embeddings: (ids, width) each.
        heads: (ids, width) each; none where they are tied to the embeddings.
        biases: (ids,) each, of the heads.
    """

    embeddings: tuple[str, ...]
    heads: tuple[str, ...]
    biases: tuple[str, ...]


def find_tables(prior: Checkpoint, embeddings: Sequence[str], heads: Sequence[str]) -> Tables:
    """Find a prior's tables by the names that common libraries use.

    Args:
        prior: The prior.
        embeddings: Keys that the user names instead.
        heads: The same, of heads; a key of one dimension among them is a bias.

    Raises:
        CodebookError: No tensor or several have such a name, or a key is missing or is not a table of floats.
    """
    tables = tuple(embeddings) or _named(prior, EMBEDDINGS, "weight", "--embedding-key")
    if not tables:
        raise CodebookError(
            f"{prior.path} has no tensor named like an embedding of tokens; name it with --embedding-key, "
            "or what holds tokens with --key"
        )
    outputs = tuple(heads) or _named(prior, HEADS, "weight", "--head-key")
    weights = tuple(key for key in outputs if len(prior.shapes.get(key, ())) != 1)
    alone = tuple(key for key in outputs if key not in weights)  # BERT's bias is in another module than its weight
    beside = (re.sub(r"weight$", "bias", key) for key in weights)
    biases = alone or tuple(key for key in beside if key not in weights and key in prior.entries)
    biases = biases or _named(prior, HEADS, "bias", "--head-key")
    for key in (*tables, *weights, *biases):
        entry = prior.entries.get(key)
        if entry is None:
            raise CodebookError(f"{prior.path} has no tensor {key}")
        if not entry.shape or not entry.dtype.startswith(("F", "BF")):
            raise CodebookError(f"{key} in {prior.path} is {entry.dtype} {list(entry.shape)}; expected rows of floats")
    return Tables(tables, weights, biases)


def _named(prior: Checkpoint, names: Sequence[str], leaf: str, option: str) -> tuple[str, ...]:
    """Keys under the first of the names that occurs: one, or several that differ in a number alone, one a codebook."""
    for name in names:
        pattern = re.compile(rf"(.*\.)?{name}(\.\d+)?\.{leaf}")
        keys = [key for key in prior.entries if pattern.fullmatch(key)]
        if len({re.sub(r"\d+(?=\.\w+$)", "#", key) for key in keys}) > 1:
            raise CodebookError(f"{prior.path}: each of {', '.join(keys)} could be meant; name it with {option}")
        if keys:
            return tuple(sorted(keys, key=lambda key: [int(number) for number in re.findall(r"\d+", key)]))
    return ()
