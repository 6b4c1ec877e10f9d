"""The optimizers of a fine-tuning: Muon for kernels, and Adam for the rest or for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from codebook_tools.training.learning_rate import muon_rms, relative_rates
from codebook_tools.training.muon import Muon

BETAS = (0.9, 0.95)  # of Adam; with 0.999 the first, large gradients still count after 1,000 steps


def kernels_of(network: nn.Module) -> list[nn.Parameter]:
    """The parameters that map vectors to vectors: two rows and two columns at least, and no table of embeddings."""
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    return [
        parameter
        for parameter in network.parameters()
        if parameter.ndim > 1 and 1 < len(parameter) < parameter.numel() and id(parameter) not in tables
    ]


def optimizers_of(
    parameters: Sequence[nn.Parameter], kernels: Sequence[nn.Parameter], steps: int
) -> dict[str, torch.optim.Optimizer]:
    """Create the optimizers of parameters.

    Args:
        parameters: All that trains.
        kernels: Those that Muon moves; others, which do not train, may be among them.
        steps: Of the run.

    Returns:
        "muon" and "adam", where they have parameters. Groups have the key `share`: the factor on their learning rate.
    """
    by_muon = {id(kernel) for kernel in kernels}
    groups = dict[tuple[bool, float], list[nn.Parameter]]()
    for parameter, rate in zip(parameters, relative_rates(parameters), strict=True):
        groups.setdefault((id(parameter) in by_muon, rate), []).append(parameter)
    muon, adam = (
        [{"params": group, "share": rate} for (is_kernel, rate), group in groups.items() if is_kernel is wanted]
        for wanted in (True, False)
    )
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if muon:
        optimizers["muon"] = Muon(muon, muon_rms(steps))
    if adam:
        optimizers["adam"] = torch.optim.Adam(adam, betas=BETAS)
    return optimizers
