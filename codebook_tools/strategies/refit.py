"""Re-Fit: rebuild the codebook from the latents by k-means."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from codebook_tools.codebook import REMOVED, Codebook, Latents, Surgery
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.options import Option
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies._validation import EngineOption

if TYPE_CHECKING:
    from torch import Tensor

    from codebook_tools.clustering.seeding import Init


@dataclass(frozen=True)
class Refit:
    """k centroids of the latents, by k-means until an iteration gains little, in the codebook's own metric.

    No old code keeps its identity.

    Source: Hu et al. 2021, "Global Context with Discrete Diffusion in VQ Modelling" (VQ-DDM, arXiv 2112.01799).

    Attributes:
        k: Size of the new codebook.
        init: How seeds are drawn; "used" starts from the k most used codes, filled up with latents drawn by squared
            error where fewer are in use.
        iterations: Most iterations of Lloyd.
        seed: Of the seeding.
        engine: Which k-means runs; see clustering/engines.py.
        exact: Whether k-means runs over all latents, in one pass an iteration; seeds are drawn from a sample.
        balance: Whether cells of even size are sought, as semantic ids need: the mean distance is minimized in place of
            the mean square (clustering/balanced.py), and a fine-tuning goes on with that.
        device: That k-means runs on.
        watch: Called with the progress.
    """

    summary: ClassVar = (
        "Re-Fit: a new codebook by k-means on the latents, then fine-tune with the original encoder and decoder."
    )
    example: ClassVar = "codebook refit model.safetensors --k 128 --data images/"
    trains: ClassVar = True
    clusters: ClassVar = True

    k: Annotated[int, Option("Codes of the new codebook.", metavar="K", names=("--k", "-k"))]
    init: Annotated[
        Literal["kmeans++", "afkmc2", "used", "random"],
        Option("Where it starts; used: at the codes in use.", panel="k-means"),
    ] = "kmeans++"
    iterations: Annotated[int, Option("At most so many Lloyd iterations.", metavar="N", panel="k-means")] = 300
    seed: int = 0
    exact: Annotated[
        bool, Option("Over all latents, not a million, of --latents or --latents-cache.", panel="k-means")
    ] = False
    balance: Annotated[
        bool,
        Option("Cells of even size, also after fine-tuning: fewer ids collide, outliers err more.", panel="k-means"),
    ] = False
    engine: EngineOption = "auto"
    device: str = field(default="cpu", repr=False, compare=False)
    watch: Watch = field(default_factory=Watch, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, way_out in (("k", "--k 1 or more"), ("iterations", "--iterations 1 or more")):
            if getattr(self, name) < 1:
                raise CodebookError(f"{name}={getattr(self, name)} is below 1; use {way_out}")
        if self.balance and self.engine not in ("auto", "native"):
            raise CodebookError(
                f"engine={self.engine} has no balanced k-means; use --engine native, or leave out --balance"
            )

    def __call__(self, codebook: Codebook, latents: Latents, counts: Tensor) -> Surgery:
        """Replace all codes by centroids of the latents."""
        import torch

        from codebook_tools.clustering.balanced import BALANCED
        from codebook_tools.clustering.engines import chosen, cluster
        from codebook_tools.data.latents import StoredLatents, joined
        from codebook_tools.data.sampling import drawn_rows

        if not codebook.metric.is_distance:
            search, rows = codebook.metric.words
            raise CodebookError(
                f"refit has no k-means for {search} lookup with {rows} rows; prune, quantize and grow work for it"
            )
        whole = latents if self.exact and not isinstance(latents, StoredLatents) else None
        points = (joined(latents) if whole is None else drawn_rows(whole, self.seed)).to(self.device)
        init: Init | Tensor = self._from_used(codebook, points, counts) if self.init == "used" else self.init
        power = BALANCED if self.balance else 2.0
        clustering = cluster(
            points,
            self.k,
            engine=self.engine,
            init=init,
            iterations=self.iterations,
            seed=self.seed,
            metric=codebook.metric,
            whole=whole,
            power=power,
            watch=self.watch,
        )
        new = replace(codebook, vectors=clustering.centroids.cpu())
        index_map = torch.full((codebook.size,), REMOVED)
        choice = chosen(self.engine, self.k, codebook.dim)
        return Surgery(new, index_map, engine=choice.engine, engine_reason=choice.reason, power=power)

    def _from_used(self, codebook: Codebook, points: Tensor, counts: Tensor) -> Tensor:
        import torch

        from codebook_tools.clustering.seeding import draw_by_error, seeds

        order = counts.argsort(descending=True, stable=True)[: self.k]
        used = replace(codebook, vectors=codebook.vectors[order[counts[order] > 0]].to(points.device))
        if not used.size:
            return seeds(points, self.k, "kmeans++", self.seed)
        return torch.cat([used.vectors, points[draw_by_error(points, used, self.k - used.size, self.seed)]])
