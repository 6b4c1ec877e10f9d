"""The protocols of a network, a family's module or the user's own, and what is understood of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any, Protocol

from torch import Tensor

from codebook_tools.errors import CodebookError

Quantize = Callable[[int, Tensor], Tensor]
"""quantize(stage, latents) -> what the decoder gets in their place, of the same shape.

Latents are (n, dim, *grid), (n, dim), or of a user's network (n, t, dim).

The caller of `walk` decides what that is: the nearest codes, or those with a straight-through gradient.
"""


Search = Callable[[Tensor, Iterable[int], Quantize], Tensor]
"""search(latents (n, dim, *grid), stages, quantize) -> the sum of what residual stages quantize, of the same shape.

Each stage quantizes what those before it leave. The greedy search takes the nearest code at each; others may call
`quantize` with more items than n, and get back any multiple of them.
"""


class Network(Protocol):
    """A family's module, or the user's own, in the order encode, walk, decode."""

    def encode(self, media: Tensor, /) -> Any:
        """From media to latents.

        Args:
            media: Images (n, channels, height, width) in the model's range, waveforms (n, channels, samples) in
                [-1, 1], or arrays (n, ...).

        Returns:
            (n, dim, *grid), (n, t, dim) or (n, dim); or, of a `Walking` network, anything that its `walk` takes.
        """

    def decode(self, quantized: Any, /) -> Tensor:
        """What `walk` returned -> media of the shape that `encode` took."""


class Walking(Network, Protocol):
    """A network of several codebooks, or with projections around one.

    Attributes:
        codebooks: File keys, without the family's prefix, in the order of the stages.
        not_in_tokens: A sentence on what `decode` uses beside the codes; None, or no attribute, where there is nothing.
    """

    codebooks: tuple[str, ...]

    def walk(self, encoded: Any, quantize: Quantize, /) -> Any:
        """What `encode` returned -> what `decode` takes.

        It calls quantize(stage, latents) once a stage, in order, and lets gradients through: a residual stage passes
        on `residual - quantized`, without detaching it.
        """


class Quantizing(Network, Protocol):
    """A network with a quantizer of its own, which our results are compared with."""

    def quantize(self, encoded: Any, /) -> tuple[Any, Tensor]:
        """What `encode` returned -> what `walk` returns for it, and codes int64.

        Codes are (n, *grid) of one codebook, (n, levels, *grid) of several. In training mode it also updates the codes
        as training does, such as by a step of their moving average.
        """


class Entered(Walking, Protocol):
    """A `Walking` network whose `encode` returns more than latents, and which files of latents can enter.

    A network whose `encode` returns latents needs nothing for that.

    Attributes:
        latent_dim: Dimensions of the latents that `encode` makes.
    """

    latent_dim: int

    def from_latents(self, latents: Tensor, /) -> Any:
        """latents (n, dim, *grid) as `encode` makes them -> what it returns for them."""


def searches(network: Any) -> bool:
    """Whether the `walk` of a network takes a Search for its residual stages, as its third argument."""
    return walks(network) and "search" in signature(network.walk).parameters


def walks(network: object) -> bool:
    """Whether a network has the two members of `Walking`."""
    return hasattr(network, "walk") and hasattr(network, "codebooks")


def declared_codebooks(network: object) -> tuple[str, ...]:
    """The names of a network's own codebooks where it says them in `codebooks`, which may also be a layer's name."""
    names = getattr(network, "codebooks", ())
    own = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    return tuple(names) if own else ()


def axis_of(latents: object, dim: int, axis: int | None) -> int:
    """The axis of latents that holds the dimensions of a code.

    Args:
        latents: What a network gives to its quantizer, (n, dim, *grid), (n, t, dim) or (n, dim).
        dim: Length of the axis.
        axis: The axis that the user says; None for the second, or else the only one of that length.

    Raises:
        CodebookError: There is none, several fit, or the latents are no tensor.
    """
    if not isinstance(latents, Tensor):
        raise CodebookError(
            f"the network's encode returns a {type(latents).__name__}; expected a tensor (n, {dim}, ...)"
        )
    fitting = axes_of_length(latents, dim)
    if axis is not None and -latents.ndim < axis < latents.ndim and axis % latents.ndim in fitting:
        return axis % latents.ndim
    if axis is None and (1 in fitting or len(fitting) == 1):
        return fitting[0]
    expected = f"(n, {dim}, ...)" if axis is None else f"--latent-axis {axis} to have length {dim}"
    which = f"; axes {', '.join(map(str, fitting))} fit, say which with --latent-axis" if fitting else ""
    shape = tuple(latents.shape)
    raise CodebookError(
        f"the network's encode returns {shape}; expected {expected}, for codes of {dim} dimensions{which}"
    )


def axes_of_length(latents: Tensor, dim: int) -> list[int]:
    """The axes of latents, after the first, that have a length."""
    return [axis for axis in range(1, latents.ndim) if latents.shape[axis] == dim]


@contextmanager
def explained(method: str, argument: object, compiled: bool = False) -> Iterator[None]:
    """Turn what a network, or torch.compile, raises into a CodebookError that names the method and its argument."""
    try:
        yield
    except CodebookError:
        raise
    except Exception as error:
        size = tuple(argument.shape) if isinstance(argument, Tensor) else type(argument).__name__
        if compiled:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise CodebookError(
                f"the network's {method} cannot be compiled for {size}: {type(error).__name__}: {reason}; "
                "leave out --compile"
            ) from error
        raise CodebookError(f"the network's {method} fails on {size}: {type(error).__name__}: {error}") from error
