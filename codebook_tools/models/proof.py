"""Proof that a written file is what was reported: its network loads it, and its own quantizer chooses the codes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.layout import is_directory_output, own_config_path, partial_path
from codebook_tools.checkpoints.read import Checkpoint, read_checkpoint
from codebook_tools.clustering.assignment import nearest, squared_errors
from codebook_tools.codebook import Codebook
from codebook_tools.data.latents import rows_of
from codebook_tools.errors import CodebookError, VerificationError
from codebook_tools.models.agreement import Agreement, agreement, encoded_batches, has_quantizer, in_training, near_ties
from codebook_tools.models.load import reloaded
from codebook_tools.models.model import Book, Model
from codebook_tools.models.registry import FAMILIES
from codebook_tools.models.stored_codes import codes_of_rows, effective_rows, stored_rows
from codebook_tools.runtime.devices import wide

KEPT_CODES = 0.9
"""Share of the codes in use that must remain in use after one training step; one code may always be lost."""

GROWN_DISTORTION = 1.1
"""Factor by which the distortion may grow in one training step."""

_ASIDE = 1e-3  # relative: what smoothing and rounding add to the way to a mean


@dataclass(frozen=True)
class Proof:
    """How the reported result was compared with the model that loads the file.

    Attributes:
        by: "quantizer", the model's own quantizer chose codes and emitted vectors; "module", a module loaded the file
            and each codebook was read back from it; "file", the file alone was read back, for there is no network.
        agree: Codes that were equal: those chosen for latents by a quantizer, else rows of codebooks.
        of: How many were compared.
        near_ties: Codes that differ where both are equally near, up to rounding.
        revived: Codes that the module's own training step moved far, as its revival of dead codes does.
    """

    by: Literal["quantizer", "module", "file"]
    agree: int
    of: int
    near_ties: int = 0
    revived: int = 0

    def to_json(self) -> dict[str, object]:
        """The keys of the JSON output."""
        return {name: value for name, value in asdict(self).items() if name != "revived"}


def read_partial(output: Path) -> Checkpoint:
    """The checkpoint that was written for `output`, before it is renamed to that."""
    written = read_checkpoint(partial_path(output))
    config = partial_path(own_config_path(output))
    return replace(written, config_path=config) if not is_directory_output(output) and config.is_file() else written


def prove_file(written: Checkpoint, meant: Sequence[tuple[FoundCodebook, Codebook]]) -> Proof:
    """Read codebooks back from a file, under each of their names.

    Args:
        written: The file.
        meant: Each codebook with its place in that file.

    Raises:
        VerificationError: A codebook in the file is another than was meant.
    """
    rows = 0
    for book, codebook in meant:
        for place in book.places:
            codes = effective_rows(written, replace(place, form=book.form))
            if not torch.equal(codes, codebook.vectors.cpu()):
                raise VerificationError(f"{written.path}: {place.key} on disk is not the codebook that was meant")
        rows += codebook.size
    return Proof("file", rows, rows)


def prove(model: Model, written: Checkpoint, media: Sequence[Tensor]) -> Proof:
    """Load a written file into a fresh network, and compare that with the model whose figures are reported.

    Args:
        model: As it was measured, with the codebooks that were meant.
        written: The file, which need not be in its place yet.
        media: Batches of calibration data.

    Raises:
        VerificationError: The network does not load the file, has other codes than were meant, its own quantizer
            chooses or gives out others, or one step of its own training wipes them out.
    """
    try:
        fresh = reloaded(model, written)
        pretrained = _pretrained(model, written)
    except VerificationError:
        raise
    except CodebookError as error:
        raise VerificationError(f"the network does not load {written.path.name}: {error}") from error
    rows = _read_back(model, fresh, fresh.network)
    if pretrained is not None:
        _read_back(model, fresh, pretrained)
        fresh = replace(fresh, network=pretrained.to(fresh.device).eval().requires_grad_(False))
    if not has_quantizer(fresh.network):
        return Proof("module", rows, rows, revived=_train_a_step(fresh, media))
    result = agreement(fresh, encoded_batches(fresh, media))
    if not result.ok:
        raise VerificationError(
            f"the quantizer of the network that loads {written.path.name} disagrees: {result.reason}"
        )
    return Proof("quantizer", result.agree, result.of, result.near_ties, _train_a_step(fresh, media))


def prove_opened(model: Model, agreed: Agreement | None, media: Sequence[Tensor]) -> Proof:
    """Compare a file with the network that has loaded it.

    Args:
        model: As loaded.
        agreed: The comparison with the network's own quantizer, where there was one already.
        media: Batches of calibration data.

    Raises:
        VerificationError: As for `prove`.
    """
    rows = _read_back(model, model, model.network)
    if agreed is None and has_quantizer(model.network):
        agreed = agreement(model, encoded_batches(model, media))
        if not agreed.ok:
            raise VerificationError(f"the network's own quantizer disagrees: {agreed.reason}")
    revived = _train_a_step(model, media)
    if agreed is None:
        return Proof("module", rows, rows, revived=revived)
    return Proof("quantizer", agreed.agree, agreed.of, agreed.near_ties, revived)


def _pretrained(model: Model, written: Checkpoint) -> nn.Module | None:
    """The network as its library loads a directory; None for a file, or a family of no library."""
    load = FAMILIES[model.family].pretrained if model.family in FAMILIES and written.folder else None
    if load is None or written.folder is None:
        return None
    with redirect_stderr(io.StringIO()):  # progress bars, and what libraries say of keys, which is looked at here
        network, missing, unexpected = load(written.folder)
    unknown = [key for key in unexpected if key not in model.checkpoint.entries]
    if missing or unknown:
        raise VerificationError(f"its library loads {written.path.name} without {(missing or unknown)[0]}")
    fresh: nn.Module = network.float()
    return fresh


@dataclass(frozen=True)
class _Loaded:
    """The tensors of a module by file key, like a checkpoint; those that it lacks come `from_file`."""

    module: nn.Module
    names: dict[str, str]
    from_file: Checkpoint

    @property
    def path(self) -> Path:
        return self.from_file.path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.from_file.shapes

    def tensor(self, key: str) -> Tensor:
        if key not in self.names:
            return self.from_file.tensor(key)
        tensor: Tensor = self.module.state_dict()[self.names[key]]
        return tensor.detach().cpu().reshape(self.from_file.entries[key].shape)


def _loaded(fresh: Model, network: nn.Module) -> _Loaded:
    return _Loaded(network, {key: name for name, key in fresh.keys.items()}, fresh.checkpoint)


def _codes_in(fresh: Model, book: Book, network: nn.Module, place: FoundCodebook | None = None) -> Tensor:
    """(size, dim) float32: the codes of a book as a module holds them now."""
    stored, tensors = replace(place or book.stored, form=book.stored.form), _loaded(fresh, network)
    rows = stored_rows(tensors.tensor(stored.key), stored)
    if book.read is not None and book.rows is not None:  # no formula: each row has the code that it was read with
        codes = {row.tobytes(): code for row, code in zip(book.rows.numpy(), book.vectors.cpu(), strict=True)}
        unknown = torch.full((book.stored.dim,), torch.nan)
        return torch.stack([codes.get(row.tobytes(), unknown) for row in rows.numpy()])
    return codes_of_rows(tensors, stored, rows)


def _read_back(model: Model, fresh: Model, network: nn.Module) -> int:
    """Check that each codebook is in the module as in `model`, under each of its names. Returns how many rows."""
    rows = 0
    for book in fresh.books:
        for place in book.stored.places:
            if not torch.equal(_codes_in(fresh, book, network, place), book.vectors.cpu()):
                raise VerificationError(
                    f"{fresh.checkpoint.path.name}: {place.key} in the network that has loaded it is not the codebook "
                    "that was meant"
                )
        rows += len(book.vectors)
    return rows


def _train_a_step(fresh: Model, media: Sequence[Tensor]) -> int:
    """Run one forward pass in training mode on a copy of the network, and check that its codes survive.

    Returns how many codes it moved far. Raises VerificationError where too few are left in use, or the distortion
    grows.
    """
    if not media or not in_training(fresh.network):
        return 0
    before = _latents(fresh, media[0])
    moved = deepcopy(fresh.network)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if has_quantizer(moved):
            encoded = fresh.encode_media(media[0])
            moved.train()
            ran = _attempt(moved.quantize, encoded)
        else:
            moved.train()
            ran = _attempt(moved, fresh.in_own_range(media[0]))
    if not ran:
        return 0
    revived = 0
    for book, latents in zip(fresh.books, before, strict=True):
        if book.read is not None:
            continue
        codes = _codes_in(fresh, book, moved.eval()).to(fresh.device)
        if not bool(codes.isfinite().all()):
            raise VerificationError(f"one training step of the network makes {book.key} not finite")
        after = replace(book.codebook, vectors=codes)
        chosen = nearest(latents, book.codebook)
        used, distortion = _use(latents, book.codebook, chosen)
        # Smoothed sums move each code by a little: of two that are as near as each other the first one chosen counts.
        moved_to = nearest(latents, after)
        alike = near_ties(latents, after, moved_to, chosen, relative=_ASIDE)
        used_after, distortion_after = _use(latents, after, torch.where(alike, chosen, moved_to))
        grown = distortion_after > GROWN_DISTORTION * distortion + 1e-12
        few = used_after < min(KEPT_CODES * used, used - 1)  # one code more or less says nothing
        if grown or (few and not _follow_their_means(latents, book.codebook, codes)):
            raise VerificationError(
                f"one training step of the network undoes {book.key}: {used} codes in use become {used_after}, and the "
                f"distortion {distortion:.4g} becomes {distortion_after:.4g}; what lies beside it is not understood"
            )
        far = (codes - book.vectors).norm(dim=1) > 0.5 * book.vectors.norm(dim=1).mean()
        revived += int(far.sum())
    return revived


def _follow_their_means(latents: Tensor, codebook: Codebook, moved: Tensor) -> bool:
    """Whether each code that was chosen moved straight towards the mean of its latents, and no other one moved.

    That is what the state beside them should do, however many codes the training then loses.
    """
    chosen = nearest(latents, codebook)
    hits = torch.bincount(chosen, minlength=codebook.size)
    sums = torch.zeros_like(codebook.vectors).index_add_(0, chosen, latents)
    sums, before, after = map(wide, (sums, codebook.vectors, moved))
    hits = hits.to(before.device)
    towards = torch.where(hits[:, None] > 0, sums / hits.clamp(min=1)[:, None] - before, 0.0)
    step = after - before
    share = ((step * towards).sum(1) / towards.square().sum(1).clamp(min=1e-30)).clamp(0, 1)
    aside = (step - share[:, None] * towards).norm(dim=1)
    rounding = 0.1 * before.norm(dim=1).max()
    return bool((aside <= _ASIDE * (towards.norm(dim=1) + before.norm(dim=1) + rounding)).all())


def _attempt(call: Any, *arguments: object) -> bool:
    """Whether the call succeeds: a user's forward may need more than the data."""
    try:
        call(*arguments)
    except Exception:
        return False
    return True


def _latents(model: Model, media: Tensor) -> list[Tensor]:
    """(n, dim) of each book."""
    with torch.no_grad():
        return [rows_of(latents) for latents in model.pass_through(media).latents]


def _use(latents: Tensor, codebook: Codebook, codes: Tensor) -> tuple[int, float]:
    """How many distinct `codes` (n,) latents (n, dim) have, and the mean squared distance to them."""
    return int(torch.bincount(codes, minlength=codebook.size).count_nonzero()), float(
        squared_errors(latents, codebook, codes).mean()
    )
