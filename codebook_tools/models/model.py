"""A model that runs: its network, its codebook inside it, and the file that both came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from codebook_tools.assignment import emitted, nearest, unit
from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.reading import Checkpoint, torch_dtype
from codebook_tools.codebook import Codebook, Emit, Lookup
from codebook_tools.errors import CodebookError, VerificationError
from codebook_tools.images import Images
from codebook_tools.latents import EncodedLatents
from codebook_tools.models.companions import changed_codebook, rounded, rows_of, stored_as

INPUT_RANGES = ((-1.0, 1.0), (0.0, 1.0), (-0.5, 0.5))
"""Tried in turn: the file does not say what its network was trained on."""


@dataclass(eq=False)
class Model:
    """A network with `encode` and `decode` in float32, and what must be known to work on it and write it back.

    network: holds the codebook's tensor under the same name as the file. keys: file key by network name.
    found: where the codebook lies. lookup, emit: how it is used. input_range: of the network's images.
    channels: of its images. stride: image sides are multiples of it. carried: file keys the network does not know.
    remake: the network anew, of the file's codebook size, with fresh weights, in torch's default dtype on the CPU.
    caveats: what to warn of.
    """

    family: str
    checkpoint: Checkpoint
    network: nn.Module
    keys: Mapping[str, str]
    found: FoundCodebook
    remake: Callable[[], nn.Module]
    lookup: Lookup = Lookup.EUCLIDEAN
    emit: Emit = Emit.RAW
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    input_range: tuple[float, float] = INPUT_RANGES[0]
    channels: int = 3
    stride: int = 1
    carried: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()

    # What flows through it

    def encode(self, images: Tensor) -> Tensor:
        """images (n, channels, height, width) in [0, 1], on any device -> latents (n, dim, *grid) float32."""
        low, high = self.input_range
        with self.autocast():
            latents = self._call("encode", images.to(self.device) * (high - low) + low)
        return _checked(latents, self.found.dim).float()

    def decode(self, quantised: Tensor) -> Tensor:
        """emitted codes (n, dim, *grid) -> images (n, channels, height, width), not clamped to [0, 1]."""
        low, high = self.input_range
        with self.autocast():
            images = self._call("decode", quantised)
        if not isinstance(images, Tensor):
            raise CodebookError(f"the network's decode returns a {type(images).__name__}; expected a tensor of images")
        return (images.float() - low) / (high - low)

    def latents(self, images: Images, batch: int) -> EncodedLatents:
        """The latents of many images, as a stream."""

        def encode(pixels: Tensor) -> Tensor:
            with torch.no_grad():
                return self.encode(pixels).movedim(1, -1).flatten(1, -2)

        return EncodedLatents(images, encode, batch)

    def assign(self, latents: Tensor) -> Tensor:
        """latents (n, dim, *grid) -> the index of each one's nearest code, (n, *grid) int64."""
        rows = latents.movedim(1, -1)
        return nearest(rows.reshape(-1, rows.shape[-1]), self.codebook).reshape(rows.shape[:-1])

    def embed(self, codes: Tensor) -> Tensor:
        """codes (n, *grid) int64 -> what the decoder gets of them, (n, dim, *grid) float32."""
        return emitted(self.codebook)[codes].movedim(-1, 1).contiguous()

    def embed_trained(self, codes: Tensor) -> Tensor:
        """As `embed`, with gradients to the codebook where it takes some."""
        vectors = rows_of(_named(self.network, self.name), self.found)
        return (unit(vectors) if self.emit is Emit.UNIT else vectors)[codes].movedim(-1, 1)

    def _call(self, method: str, argument: Tensor) -> object:
        try:
            return getattr(self.network, method)(argument)
        except Exception as error:  # whatever a user's network raises
            raise CodebookError(
                f"the network's {method} fails on {tuple(argument.shape)}: {type(error).__name__}: {error}"
            ) from error

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    # The codebook in it

    @property
    def name(self) -> str:
        """The network's name of the codebook's tensor."""
        return next(name for name, key in self.keys.items() if key == self.found.key)

    @property
    def codebook(self) -> Codebook:
        return Codebook(rows_of(_named(self.network, self.name).detach(), self.found), self.lookup, self.emit)

    def install(self, codebook: Codebook) -> None:
        """Put a codebook of any size into the running network, rounded to the stored dtype, and prove that it is there.

        Raises VerificationError where the network then holds, bit by bit, anything else.
        """
        meant = rounded(self.checkpoint, self.found.key, codebook.vectors).to(self.device)
        old = _named(self.network, self.name)
        new = stored_as(meant, old.detach(), self.found.axis)
        owner = self.network.get_submodule(self.name.rpartition(".")[0])
        leaf = self.name.rpartition(".")[2]
        setattr(owner, leaf, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        if isinstance(owner, nn.Embedding):
            owner.num_embeddings = codebook.size
        self.found = replace(self.found, size=codebook.size)
        if _named(self.network, self.name).shape != new.shape or not torch.equal(self.codebook.vectors, meant):
            raise VerificationError(f"{self.found.key} in the running model is not the codebook that was installed")

    def set_vectors(self, vectors: Tensor) -> None:
        """Overwrite the running codes, (size, dim) float32, without rounding: for training; surgery installs."""
        tensor = _named(self.network, self.name)
        with torch.no_grad():
            tensor.copy_(stored_as(vectors, tensor, self.found.axis))

    def with_fresh_network(self, seed: int) -> Model:
        """The same model around a network that was never trained, its weights drawn by seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.remake()
        return replace(self, network=network.float().to(self.device).eval().requires_grad_(False))

    # The file it becomes

    def changed(self, counts: Tensor) -> dict[str, Tensor]:
        """Every tensor in which the model differs from its file, by file key, in the stored dtypes and shapes.

        counts: (size,), assignments per code, for the companions.
        """
        entries = self.checkpoint.entries
        tensors = {}
        for name, tensor in self.network.state_dict().items():
            key, running = self.keys[name], tensor.detach().cpu()
            # In the running dtype: a float64 file does not become another by being loaded.
            if key != self.found.key and not torch.equal(running, self.checkpoint.tensor(key).to(running.dtype)):
                tensors[key] = running.to(torch_dtype(entries[key].dtype)).contiguous()
        return tensors | changed_codebook(self.checkpoint, self.found, self.codebook.vectors.cpu(), counts.cpu())

    def round_to_stored(self) -> None:
        """Round every weight as its file will store it, so that what is measured is what can be loaded again."""
        with torch.no_grad():
            for name, tensor in self.network.state_dict().items():
                tensor.copy_(tensor.to(torch_dtype(self.checkpoint.entries[self.keys[name]].dtype)))

    def probe(self, height: int, width: int) -> None:
        """Find out `channels` and `stride` by encoding an empty image of that size, or one of 64 or 256 pixels.

        Raises CodebookError where no number of channels goes through, or the network gives no grid of latents.
        """
        problems = {}
        for sides in ((height, width), (64, 64), (256, 256)):
            for channels in (3, 1):
                try:
                    latents = self._encode_blank(channels, *sides)
                except CodebookError as error:
                    problems[channels] = error
                    continue
                grid = _checked(latents, self.found.dim).shape[2:]
                self.channels = channels
                self.stride = self._stride(sides[-1], grid[-1]) if len(grid) == 2 else 1
                return
        raise CodebookError(f"the network encodes neither RGB images ({problems[3]}) nor grey ones ({problems[1]})")

    def _encode_blank(self, channels: int, height: int, width: int) -> object:
        with torch.no_grad():
            return self._call("encode", torch.zeros(1, channels, height, width, device=self.device))

    def _stride(self, side: int, positions: int) -> int:
        """Pixels to a position along a side. Where few positions leave that open (a network of stride 4 makes 2 of 10
        pixels, too), a larger side decides, if the network takes it."""
        stride = max(1, side // positions)
        if stride * positions == side and positions >= stride:
            return stride
        larger = side << max(0, (256 // side).bit_length() - 1)
        try:
            latents = _checked(self._encode_blank(self.channels, larger, larger), self.found.dim)
        except CodebookError:
            return stride
        return max(1, round(larger / latents.shape[-1]))


def _checked(latents: object, dim: int) -> Tensor:
    if not isinstance(latents, Tensor):
        raise CodebookError(
            f"the network's encode returns a {type(latents).__name__}; expected a tensor (n, {dim}, ...)"
        )
    if latents.ndim < 3 or latents.shape[1] != dim:
        shape = tuple(latents.shape)
        raise CodebookError(
            f"the network's encode returns {shape}; expected (n, {dim}, ...), for codes of {dim} dimensions"
        )
    return latents


def _named(network: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor = getattr(network.get_submodule(owner), leaf)
    assert isinstance(tensor, Tensor)
    return tensor
