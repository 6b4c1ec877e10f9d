"""A written file in the module that it is for: whether its own forward says what the package reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from wired_modules import Wired, build
from wiring import Wiring

RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""By which a reported error may differ."""

NEAR, ROUNDING = 1e-5, 1e-6
"""Two squared distances are a near-tie where they differ by less, relative to themselves, or than what rounding of the
encoder's latents makes of them: a later stage's latents are differences of those, and have their rounding errors."""

LEAST_USED, MOST_DISTORTION = 0.9, 1.1
"""What one training-mode forward must leave, relative to before."""


@dataclass(frozen=True)
class Data:
    """The images: (n, 16, 16) uint8."""

    calibration_pixels: Tensor
    test_pixels: Tensor

    @cached_property
    def calibration(self) -> Tensor:
        """(n, 1, 16, 16) in [0, 1]."""
        return self.calibration_pixels[:, None].float() / 255

    @cached_property
    def test(self) -> Tensor:
        """(n, 1, 16, 16) in [0, 1]."""
        return self.test_pixels[:, None].float() / 255

    def latents(self, wiring: Wiring, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(n, dim) float32 by name of the file: what the encoder of a file makes of the images."""
        module = loaded(wiring, state, wiring.size)
        return {
            name: rows_of_grid(module.encode(images)).detach().contiguous()
            for name, images in (("calibration", self.calibration), ("held_out", self.test))
        }


@dataclass(frozen=True)
class Book:
    """A codebook as the package reports it: file key, codes, used codes and distortion."""

    key: str
    size: int
    used: int
    distortion: float


@dataclass(frozen=True)
class Reported:
    """What the package says of the file that it wrote. error: None where nothing was reconstructed."""

    books: tuple[Book, ...]
    error: float | None

    @staticmethod
    def of(result: Mapping[str, Any]) -> Reported:
        """The kept stage of a command's JSON."""
        stage = result["stages"][result["kept"]]
        books = (Book(one["key"], one["size"], one["used"], one["distortion"]) for one in stage["codebooks"])
        return Reported(tuple(books), stage["mse"])


@dataclass
class Checked:
    """What a check says.

    Attributes:
        problems: Silent disagreements.
        near_ties: Test latents whose two nearest codes are about equally near.
        explained: Differences that near-ties account for.
        inherent: 1 where a training step fails with a correct EMA state, too: then the state is not to blame.
    """

    problems: list[str] = field(default_factory=list)
    near_ties: int = 0
    explained: int = 0
    inherent: int = 0


@dataclass(frozen=True)
class Use:
    """What a module does with images or latents. used: codes in use, of each codebook."""

    used: tuple[int, ...]
    distortion: float
    near_ties: int
    error: float | None = None


def unknown_key(wiring: Wiring) -> str:
    """File key of the tensor that the package cannot know."""
    path = f"{wiring.prefix}{wiring.paths[0]}"
    if wiring.companion:
        return f"{path}.{wiring.companion}"
    return f"{path}.{wiring.steps[0].name}" + (".weight" if wiring.steps[0].layer else "")


@torch.no_grad()
def check_written(wiring: Wiring, written: Path, reported: Reported, data: Data) -> Checked:
    """Hold a written file against what was reported of it."""
    found, state = Checked(), load_file(written)
    found.problems += _unlike_names(wiring, state)
    sizes = {book.size for book in reported.books}
    size, *others = sorted(sizes)
    entries = _entries(wiring, reported)
    if others:
        found.problems.append(f"entries: codebooks of {len(sizes)} sizes, {sorted(sizes)}")
    if entries is None:
        found.problems.append(
            f"entries: {len(reported.books)} codebooks are reported, of {1 if wiring.detached else wiring.books}: "
            f"{[book.key for book in reported.books]}"
        )
    try:
        module = loaded(wiring, state, size)
    except RuntimeError as error:
        found.problems.append(f"loading: {' '.join(str(error).split())}")
        return found
    if entries is not None:
        _compare(found, entries, reported, _use(module, data.test, wiring.detached))
    _train(found, wiring, state, size, data)
    return found


def loaded(wiring: Wiring, state: Mapping[str, Tensor], size: int) -> Wired:
    """The module with a file's tensors, in float32 and evaluation mode. Raises RuntimeError where they do not fit."""
    bare = {key.removeprefix(wiring.prefix): tensor.float() for key, tensor in state.items()}
    astray = [key for key in state if not key.startswith(wiring.prefix)]
    if astray:
        raise RuntimeError(f"keys without the prefix {wiring.prefix}: {astray}")
    module = build(wiring, size)
    module.load_state_dict(bare, strict=True)
    return module.eval()


def rows_of_grid(latents: Tensor) -> Tensor:
    """(n, dim, *grid) -> (rows, dim)."""
    return latents.movedim(1, -1).flatten(0, -2)


def _unlike_names(wiring: Wiring, state: Mapping[str, Tensor]) -> list[str]:
    """Tensors of a shared codebook that are not the same under all of its names."""
    problems = []
    for group in range(wiring.books):
        paths = dict.fromkeys(path for path, of in zip(wiring.paths, wiring.groups, strict=True) if of == group)
        first, *rest = (f"{wiring.prefix}{path}." for path in paths)
        for key in (key for key in state if key.startswith(first)):
            for other in (other + key.removeprefix(first) for other in rest):
                if other not in state or not torch.equal(state[key], state[other]):
                    problems.append(f"sharing: {key} and {other} are one tensor, and differ in the written file")
    return problems


def _entries(wiring: Wiring, reported: Reported) -> list[Book] | None:
    """The reported codebooks in the order of the module's; None where they are not one for each."""
    groups = range(1 if wiring.detached else wiring.books)
    keys = [[wiring.prefix + key for key in wiring.keys_of(group)] for group in groups]
    entries = [[book for book in reported.books if book.key in own] for own in keys]
    if len(reported.books) != len(keys) or any(len(own) != 1 for own in entries):
        return None
    return [own[0] for own in entries]


def _use(module: Wired, images: Tensor, detached: bool = False) -> Use:
    """How a module in evaluation mode uses its codes on images (n, 1, height, width).

    detached: only the first stage's codebook is looked at, and nothing is reconstructed.
    """
    wiring, latents = module.wiring, module.encode(images)
    rest, ties = rows_of_grid(latents), 0
    rounding = ROUNDING * rest.double().norm(dim=1)
    used = [set[int]() for _ in range(1 if detached else wiring.books)]
    for group in wiring.groups[:1] if detached else wiring.groups:
        squared, codes = module.distances(rest, group)
        lengths = rest.double().norm(dim=1).clamp(min=1e-30) if wiring.cosine else 1.0
        ties += _near_ties(squared, codes, rounding / lengths)
        chosen, vectors = module.assign(rest, group)
        used[group].update(chosen.tolist())
        rest = rest - vectors
    if (wiring.cosine and wiring.unit_codes and len(wiring.groups) == 1) or (detached and wiring.unit_codes):
        first = normalize(rows_of_grid(latents), dim=-1)
        rest = first - module.assign(first, 0)[1]
    error = None
    if not detached:
        shown = module(images)[0].clamp(0, 1)
        error = float((shown.double() - images.double()).square().mean())
    return Use(tuple(map(len, used)), float(rest.double().square().sum(1).mean()), ties, error)


def _near_ties(squared: Tensor, codes: Tensor, rounding: Tensor) -> int:
    """How many latents have two nearest codes (K, dim) at about the same squared distance (n, K), and not the same
    vectors: among equals the lowest index is chosen by all. rounding: (n,) how far a latent may be off by it."""
    if squared.shape[1] < 2:
        return 0
    nearest, index = squared.topk(2, largest=False)
    first, second = nearest.T
    limit = NEAR * second + rounding * second.sqrt()
    unlike = (codes[index[:, 0]] != codes[index[:, 1]]).any(1)
    return int(((second - first <= limit) & unlike).sum())


def _compare(found: Checked, entries: list[Book], reported: Reported, use: Use) -> None:
    """Errors and used codes on the test data."""
    found.near_ties = use.near_ties
    problems = []
    for book, used in zip(entries, use.used, strict=True):
        if book.used != used:
            problems.append(
                (f"used codes: {book.used} of {book.key} are reported, {used} are measured", abs(book.used - used))
            )
    if use.error is None:
        stated, measured, what = entries[0].distortion, use.distortion, "distortion"
    else:
        stated, measured, what = float("nan") if reported.error is None else reported.error, use.error, "error"
    if not abs(stated - measured) <= RELATIVE * abs(measured) + ABSOLUTE:
        small = abs(stated - measured) <= 0.02 * use.near_ties * measured  # one latent elsewhere moves it little
        problems.append((f"{what}: {stated:.8g} is reported, {measured:.8g} is measured", 1 if small else 1 << 30))
    for text, least in problems:
        if least <= 2 * use.near_ties:
            found.explained += 1
        else:
            found.problems.append(text)


def _train(found: Checked, wiring: Wiring, state: Mapping[str, Tensor], size: int, data: Data) -> None:
    """One forward in training mode on the calibration images, by a module with the file's tensors."""
    worse = _trained(loaded(wiring, state, size), data)
    if worse is None:
        return
    ideal = loaded(wiring, state, size)
    if wiring.average is not None:
        _follow(ideal, data)
        if _trained(ideal, data) is not None:
            found.inherent = 1
            return
    found.problems.append(worse)


def _trained(module: Wired, data: Data) -> str | None:
    """What a training-mode forward loses; None where it is within the limits."""
    before = _use(module, data.calibration)
    module.train()
    module(data.calibration)
    after = _use(module.eval(), data.calibration)
    ties = 2 * max(before.near_ties, after.near_ties)  # a near-tie may fall to the other code
    lost = any(now + ties < LEAST_USED * then for then, now in zip(before.used, after.used, strict=True))
    if not lost and after.distortion <= MOST_DISTORTION * before.distortion:
        return None
    return (
        f"training: used codes {list(before.used)} -> {list(after.used)}, "
        f"distortion {before.distortion:.4g} -> {after.distortion:.4g}"
    )


def _follow(module: Wired, data: Data) -> None:
    """Give the module the EMA state that goes with its codes: counts on the calibration images, and their sums."""
    rest, hits = rows_of_grid(module.encode(data.calibration)), torch.zeros(module.wiring.books, module.codebook_size)
    for group in module.wiring.groups:
        codes, vectors = module.assign(rest, group)
        hits[group] += torch.bincount(codes, minlength=module.codebook_size)
        rest = rest - vectors
    for group in range(module.wiring.books):
        module.counts(group).copy_(hits[group].clamp(min=1))
        module.sums(group).copy_(module.rows(group) * module.divisors(module.counts(group))[:, None])
