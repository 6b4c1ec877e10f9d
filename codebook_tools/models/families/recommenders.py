"""The layouts of RQ-VAEs that make semantic ids of item embeddings: perceptrons around residual codebooks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.checkpoints.tensors import Shapes
from codebook_tools.models.family import Family

if TYPE_CHECKING:
    from torch.nn import Module

_TENSOR = re.compile(r"\d+\.(weight|bias|running_mean|running_var|num_batches_tracked)")


@dataclass(frozen=True)
class Layout:
    """Names of a codebase's tensors.

    Attributes:
        side: The layers of encoder and decoder, below "encoder." and "decoder.".
        levels: The list of codebooks, each an "embedding.weight".
        biased: Whether linear layers have a bias.
    """

    side: str
    levels: str
    biased: bool

    def codebooks(self, shapes: Shapes) -> tuple[str, ...]:
        """The keys of the codebooks, in the order of the levels."""
        count = 0
        while self._codebook(count) in shapes:
            count += 1
        return tuple(map(self._codebook, range(count)))

    def _codebook(self, level: int) -> str:
        return f"{self.levels}.{level}.embedding.weight"

    def linear(self, shapes: Shapes, side: str) -> list[int]:
        """The places of the linear layers of "encoder" or "decoder" in their sequence."""
        start = f"{side}.{self.side}."
        keys = (key for key, shape in shapes.items() if key.startswith(start) and len(shape) == 2)
        return sorted(int(key.removeprefix(start).partition(".")[0]) for key in keys)

    def prefix(self, checkpoint: Checkpoint) -> str | None:
        """What precedes the layout's own key names ("", "model.", ...); None for another layout."""
        first, keys = self._codebook(0), checkpoint.shapes
        prefixes = (key.removesuffix(first) for key in keys if key == first or key.endswith(f".{first}"))
        return min((prefix for prefix in prefixes if self._fits(checkpoint.shapes, prefix)), key=len, default=None)

    def _fits(self, shapes: Shapes, prefix: str) -> bool:
        inner = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        codebooks = self.codebooks(inner)
        starts = tuple(f"{side}.{self.side}." for side in ("encoder", "decoder"))
        rest = [key for key in inner if not key.startswith(starts) and key not in codebooks]
        if any(key.startswith((f"{self.levels}.", "encoder.", "decoder.")) for key in rest):
            return False  # such as a projection of the codes
        places = [key.partition(f"{self.side}.")[2] for key in inner if key.startswith(starts)]
        if not all(map(_TENSOR.fullmatch, places)):
            return False
        widths = list[list[int]]()
        for side, start in zip(("encoder", "decoder"), starts, strict=True):
            names = [f"{start}{place}" for place in self.linear(inner, side)]
            if not names or any((f"{name}.bias" in inner) != self.biased for name in names):
                return False
            layers = [inner.get(f"{name}.weight", ()) for name in names]
            if any(len(layer) != 2 for layer in layers) or any(a[0] != b[1] for a, b in pairwise(layers)):
                return False
            widths.append([layers[0][1], layers[-1][0]])
        dims = {inner[key][1] for key in codebooks if len(inner[key]) == 2}
        return dims == {widths[0][1]} == {widths[1][0]} and widths[0][0] == widths[1][1]


LC_REC = Layout("mlp_layers", "rq.vq_layers", biased=True)
RECOMMENDER = Layout("mlp", "layers", biased=False)


def make(shapes: Shapes, _: Checkpoint, layout: Layout, of_2025: bool = False) -> Module:
    """A fresh network for the shapes. of_2025: whether it has SiLUs and reconstructs rows of unit length."""
    from codebook_tools.models.networks.recommenders import RQVAE

    return RQVAE(shapes, layout, of_2025)


_CAVEAT = (
    "files from before 2026-03-28 have SiLUs and reconstruct rows of unit length, and do not say so: "
    "if reconstructions are poor, try --family rq-vae-recommender-2025"
)

FAMILIES = {
    "lc-rec": Family(prefix=LC_REC.prefix, make=partial(make, layout=LC_REC)),
    "rq-vae-recommender": Family(
        prefix=RECOMMENDER.prefix, make=partial(make, layout=RECOMMENDER), caveats=lambda _: (_CAVEAT,)
    ),
    "rq-vae-recommender-2025": Family(prefix=RECOMMENDER.prefix, make=partial(make, layout=RECOMMENDER, of_2025=True)),
}
"""LC-Rec's names are those of LETTER and MiniOneRec, too. The last counts only where it is named."""
