"""The nearest code on the device: a million latents of 8 dimensions against 16,384 and 262,144 codes.

    python benchmarks/gpu/nearest.py --out FILE.json [--device cuda] [--quick]

Ours, which decides near-ties in float64, against torch.cdist and argmin in slabs; seconds in turn, peak memory, and how
many codes differ between the two.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from part import forget_peak, in_turn, options, peak, spread, write
from torch import Tensor

from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import Codebook

SCORES = 1 << 26
"""That torch.cdist holds at a time."""


def by_cdist(points: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([torch.cdist(rows, codes).argmin(1) for rows in torch.split(points, max(1, SCORES // len(codes)))])


def main() -> None:
    given = options(__doc__ or "")
    found: dict[str, Any] = {}
    cases = ((2000, 8, 256), (2000, 8, 4096)) if given.quick else ((1_000_000, 8, 16_384), (1_000_000, 8, 262_144))
    for count, dim, k in cases:
        drawn = torch.Generator().manual_seed(0)
        points, codes = (torch.randn(n, dim, generator=drawn).to(given.device) for n in (count, k))
        codebook = Codebook(codes)
        forget_peak(given.device)
        chosen = nearest(points, codebook)
        memory = peak(given.device)
        ways = {"ours": partial(nearest, points, codebook), "torch.cdist": partial(by_cdist, points, codes)}
        seconds = in_turn(given.device, ways, 1 if given.quick else 3)
        found[f"{count:,} x {dim}, {k:,} codes"] = {
            "seconds": {name: spread(its) for name, its in seconds.items()},
            "ours_to_cdist": spread([a / b for a, b in zip(*seconds.values(), strict=True)]),
            "peak_bytes": memory,
            "codes_that_differ": int((chosen != by_cdist(points, codes)).sum()),
        }
        write(given, found)
        print(found, flush=True)


if __name__ == "__main__":
    main()
