"""A model for the Python API: a checkpoint that is loaded, or a module in memory that is wrapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from codebook_tools.checkpoints.hub import located
from codebook_tools.data.user_data import PathLike
from codebook_tools.errors import CodebookError
from codebook_tools.models.user_network import NetworkMaker
from codebook_tools.models.wrapped import Function, Wrapped
from codebook_tools.workflows.request import Request


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint, or a module in memory, that can be operated on. Made by `load` and `wrap`.

    Attributes:
        request: The model, and how it is opened; data and seed are added by each call.
    """

    request: Request

    def __repr__(self) -> str:
        return f"Model({self.request.title!r})"


def load(
    path: PathLike,
    *,
    network: NetworkMaker | None = None,
    family: str | None = None,
    codebooks: Sequence[str] = (),
    metric: str | None = None,
    input_range: tuple[float, float] | None = None,
    modality: str = "auto",
    latent_axis: int | None = None,
    companions: Sequence[str] = (),
    as_stored: Sequence[str] = (),
    device: str = "auto",
    precision: str = "fp32",
    compiled: bool = False,
) -> Model:
    """A checkpoint: a .safetensors file, a directory of diffusers or transformers, an index of shards, or a .pt file.

    Args:
        path: Of the file or the directory; or a model of the Hugging Face hub, "org/name[@revision]" or
            "hf://org/name[@revision][/path]", whose files are fetched into its cache.
        network: For a layout that is not known: "FILE.py:FUNCTION", or a function that, called with codebook_size=K,
            returns a module with `encode` and `decode`.
        family: Name of a known layout, in place of the recognized one.
        codebooks: Keys of the codebooks to operate on; empty for all.
        metric: A name of `ct.METRICS`, such as "cosine": how a network of yours searches its codes.
        input_range: Lowest and highest value of the network's input, such as (-1, 1); None for the best of three.
        modality: "images", "audio" or "arrays"; "auto" tries a network of yours on the first rows of arrays.
        latent_axis: The axis of latents that holds the dimensions of a code, where two fit.
        companions: "KEY=ROLE", what a tensor beside a codebook holds: sums, counts, copy, flag or fresh.
        as_stored: Keys of tensors beside a codebook that do not change the codes.
        device: "auto", "cpu", "cuda:1" ...
        precision: "fp32" or "bf16", of the network; codes are always searched in float32.
        compiled: Whether `torch.compile` makes encode and decode faster.

    Returns:
        The model. Its network is made when a call needs it.

    Raises:
        CodebookError: There is no such file or model, or it is no checkpoint.
    """
    request = Request(
        model=located(path),
        network=network,
        family=family,
        codebook_key=_names(codebooks),
        metric=metric,
        input_range=input_range,
        modality=modality,
        latent_axis=latent_axis,
        companion=_names(companions),
        as_stored=_names(as_stored),
        device=device,
        precision=precision,
        compiled=compiled,
    )
    _ = request.checkpoint  # opened now
    return Model(request)


def wrap(
    module: nn.Module,
    codebooks: Sequence[str] = (),
    *,
    encode: Function | None = None,
    decode: Function | None = None,
    quantize: Function | None = None,
    metric: str | None = None,
    input_range: tuple[float, float] | None = None,
    modality: str = "auto",
    latent_axis: int | None = None,
    companions: Sequence[str] = (),
    as_stored: Sequence[str] = (),
    device: str | None = None,
) -> Model:
    """A module that lives in memory, such as in a training script. `operate` changes it in place.

    Args:
        module: Any module with `encode(media) -> latents (n, dim, *grid)` and `decode(quantized) -> media`.
        codebooks: Names of the codebooks in its `state_dict()`; empty for those that names and shapes identify.
        encode: (module, media) -> latents, where the module has no such method.
        decode: (module, quantized) -> media, where the module has no such method.
        quantize: (module, latents) -> (quantized, codes int64), the module's own quantizer: ours must agree with it.
        metric: A name of `ct.METRICS`, such as "cosine": how the module searches its codes.
        input_range: Lowest and highest value of the module's input, to which images, in [0, 1], are mapped; None for
            (0, 1).
        modality: "images", "audio" or "arrays"; "auto" tries the module on the first rows.
        latent_axis: The axis of latents that holds the dimensions of a code, where two fit.
        companions: "KEY=ROLE", what a tensor beside a codebook holds: sums, counts, copy, flag or fresh.
        as_stored: Names of tensors beside a codebook that do not change the codes.
        device: That the work is done on; None for the module's own.

    Returns:
        The model, whose weights and codes are those that the module has now.

    Raises:
        CodebookError: The module has no `encode` or `decode`, or no such codebook.
    """
    wrapped = Wrapped(module, encode, decode, quantize)
    if device is None:
        device = str(next((tensor.device for tensor in module.state_dict().values()), "cpu"))
    request = Request(
        wrapped=wrapped,
        codebook_key=_names(codebooks),
        metric=metric,
        input_range=input_range,
        modality=modality,
        latent_axis=latent_axis,
        companion=_names(companions),
        as_stored=_names(as_stored),
        device=device,
    )
    checkpoint = request.checkpoint
    if missing := [key for key in request.codebook_key if key not in checkpoint.entries]:
        near = [key for key, shape in checkpoint.shapes.items() if len(shape) == 2][:8]
        raise CodebookError(f"{wrapped.name} has no tensor {missing[0]}; its matrices are {', '.join(near) or 'none'}")
    return Model(request)


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
