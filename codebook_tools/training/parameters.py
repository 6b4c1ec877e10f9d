"""Which parameters a fine-tuning trains: those that gradients reach, in the halves of the network that train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from codebook_tools.models.model import Model


def trained_names(model: Model, pixels: Tensor, groups: tuple[str, ...]) -> set[str]:
    """Find the parameters of the encoder or the decoder by the gradients of a forward pass.

    The encoder is all that latents depend on, those of later books, too: training the decoder alone must not move them.

    Args:
        model: All its parameters require gradients afterwards.
        pixels: (n, ...), items to run.
        groups: "encoder", "decoder", or both.

    Returns:
        Names of the parameters, as the network has them.
    """
    parameters = {name: parameter for name, parameter in model.own_parameters() if parameter.is_floating_point()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    outputs = list[Tensor]()

    def cut(stage: int, latents: Tensor) -> Tensor:
        outputs.append(latents)
        return model.embed(model.assign(latents.detach(), stage), stage)

    reconstruction = model.run(pixels, cut)
    encoder = set[str]().union(*(_reached(latents, parameters) for latents in outputs))
    decoder = _reached(reconstruction, parameters) - encoder
    return (encoder if "encoder" in groups else set()) | (decoder if "decoder" in groups else set())


def written_names(network: nn.Module, names: set[str]) -> set[str]:
    """All keys of the state dict that change when the named parameters train.

    Those are the names, other names of the same parameters (a layer used many times), and the buffers beside them: a
    batch norm's running statistics train along.
    """
    chosen = {id(parameter) for name, parameter in network.named_parameters() if name in names}
    names = {name for name, parameter in network.named_parameters(remove_duplicate=False) if id(parameter) in chosen}
    owners = {name.rpartition(".")[0] for name in names}
    buffers = {name for name, _ in network.named_buffers() if name.rpartition(".")[0] in owners}
    return names | (buffers & network.state_dict().keys())


def _reached(output: Tensor, parameters: dict[str, nn.Parameter]) -> set[str]:
    if not output.requires_grad:  # a network that cuts its own gradients
        return set()
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True, retain_graph=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def set_trainable(model: Model, names: set[str]) -> list[nn.Parameter]:
    """Let the named parameters, and no others, require gradients; returns them in the network's order."""
    for name, parameter in model.network.named_parameters():
        parameter.requires_grad_(name in names)
    return [parameter for parameter in model.network.parameters() if parameter.requires_grad]


def training_mode(network: nn.Module) -> None:
    """Set training mode where something trains: a frozen encoder's batch norms must not drift."""
    for module in network.modules():
        module.training = any(parameter.requires_grad for parameter in module.parameters())
