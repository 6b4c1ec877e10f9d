"""`CodebookMonitor`: counts the codes of a training, and moves those that die."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from codebook_tools.errors import CodebookError
from codebook_tools.runtime import distributed
from codebook_tools.training.monitor.hooks import Hooks
from codebook_tools.training.monitor.quantizers import find_quantizers
from codebook_tools.training.monitor.tally import Figures
from codebook_tools.training.monitor.watched import Watched

Codes = Callable[[Any], Any]


class CodebookMonitor:
    """Counts the codes of each training forward of a module, and on request moves those that die.

    Counting reads what the quantizers take and return: it draws no random numbers, changes no gradient, weight or
    buffer, and does not make the host wait for a GPU. Figures are summed over the processes of torch.distributed: all
    of them make the same calls.

    Attributes:
        names: Keys of the codebooks in the module's state dict.
        steps: Steps of the optimizer so far; set it where a training resumes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        codebooks: Sequence[str] | None = None,
        codes: Codes | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        revive_every: int | None = None,
        refit_at: int | None = None,
        seed: int = 0,
    ) -> None:
        """Watch the quantizers of a module.

        Args:
            model: The module in training, also in a DistributedDataParallel, prepared by accelerate, or compiled.
            codebooks: Keys of the codebooks in its state dict; None to detect them.
            codes: From what the module's forward returns to codes, int64 of any shape, negative for padding; or to a
                pair (codes, latents), where codes are to be moved. Of several codebooks a list of them. None to read
                the calls of the quantizers.
            optimizer: After its steps codes are moved; its moments of moved codes become 0.
            revive_every: Steps after which dead codes move to latents that are drawn by squared error: codes with less
                than 3 % of the mean count, once there are 33 counts a code.
            refit_at: Step after which k-means on latents of the last 20 steps replaces all codes.
            seed: Of what is drawn for these, apart from torch's own random numbers.

        Raises:
            CodebookError: There is no codebook, or its codes cannot be moved.
        """
        act = revive_every is not None or refit_at is not None
        for name, value in (("revive_every", revive_every), ("refit_at", refit_at)):
            if value is not None and value < 1:
                raise CodebookError(f"{name}={value}: give a number of steps, 1 or more")
        if act and optimizer is None:
            raise CodebookError("revive_every and refit_at move codes after steps of an optimizer: give optimizer=")
        model = _unwrapped(model)
        quantizers = find_quantizers(model, codebooks)
        self._watched = [Watched(quantizer, seed + i, act) for i, quantizer in enumerate(quantizers)]
        self.names = tuple(quantizer.book.key for quantizer in quantizers)
        self.steps = 0
        self._revive_every, self._refit_at, self._codes = revive_every, refit_at, codes
        self._epochs, self._figures = 0, list[Figures]()
        self._hooks = Hooks()
        if codes is None:
            for watched in self._watched:
                watched.listen(self._hooks)
        else:
            self._hooks.listen(model, "forward", lambda: None, lambda args, kwargs, output: self._read(output))
        if act and optimizer is not None:
            self._optimizer = _plain(optimizer)
            self._hooks.add(self._optimizer.register_step_post_hook(lambda *_: self._after_step()))

    def epoch(self) -> Figures | list[Figures]:
        """End an epoch, which may be any number of steps, and begin the next.

        Returns:
            Figures of the codebook; of several, a list of them in the order of `names`.
        """
        with distributed.of_program():
            self._figures = [watched.figures(self._revive_every is not None) for watched in self._watched]
        self._epochs += 1
        if self._epochs == 1 and not any(figures["used"] for figures in self._figures):
            warnings.warn(
                f"no training forward of {', '.join(self.names)} was counted: the modules around them are not called, "
                "or are in evaluation mode; give codes=",
                stacklevel=2,
            )
        return self._figures[0] if len(self._figures) == 1 else self._figures

    def scalars(self) -> dict[str, float]:
        """The figures of the last epoch, by "codebook/used" and so on; of several codebooks by "codebook/NAME/used"."""
        prefixes = [f"codebook/{name}" for name in self.names] if len(self.names) > 1 else ["codebook"]
        return {
            f"{prefix}/{name}": float(value)
            for prefix, figures in zip(prefixes, self._figures, strict=False)
            for name, value in figures.items()
            if isinstance(value, int | float)
        }

    def log(self, writer: Any, step: int | None = None) -> None:
        """Write the figures of the last epoch, on rank 0.

        Args:
            writer: Has `add_scalar`, as TensorBoard's SummaryWriter, or `log`, as an Accelerator or a run of W&B.
            step: For the writer; None for the number of epochs.
        """
        step = self._epochs if step is None else step
        if hasattr(writer, "add_scalar"):
            with distributed.of_program():
                if distributed.rank():
                    return
            for name, value in self.scalars().items():
                writer.add_scalar(name, value, step)
        else:
            writer.log(self.scalars(), step=step)

    def close(self) -> None:
        """Leave the module and the optimizer as they were without the monitor."""
        self._hooks.remove()

    def _read(self, output: Any) -> None:
        """Count what `codes` makes of a forward's output."""
        assert self._codes is not None
        parts = self._codes(output)
        parts = parts if isinstance(parts, list) else [parts]
        if len(parts) != len(self._watched):
            raise CodebookError(
                f"codes= returns {len(parts)} entries, of {len(self._watched)} codebooks: {', '.join(self.names)}"
            )
        for watched, part in zip(self._watched, parts, strict=True):
            codes, latents = part if isinstance(part, tuple) else (part, None)
            watched.read((latents,), codes)

    def _after_step(self) -> None:
        self.steps += 1
        revives = self._revive_every is not None and self.steps % self._revive_every == 0
        with distributed.of_program(), torch.no_grad():
            for watched in self._watched:
                watched.refit_due |= self.steps == self._refit_at
                if watched.refit_due:
                    watched.refit(self._optimizer)
                elif revives and self._revive_every is not None:
                    watched.revive(self._optimizer, self._revive_every, self.steps)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's module inside of those that libraries wrap around it."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside of those that libraries wrap around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    plain: torch.optim.Optimizer = optimizer
    return plain
