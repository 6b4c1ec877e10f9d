"""A model that runs: its network, its codebooks, and the file that both came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.detect import FoundCodebook
from codebook_tools.checkpoints.read import Checkpoint, torch_dtype
from codebook_tools.clustering.assignment import nearest
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric
from codebook_tools.data.dataset import Media
from codebook_tools.data.latents import EncodedLatents
from codebook_tools.data.modality import AS_IT_IS, Modality
from codebook_tools.data.registry import modality_of
from codebook_tools.errors import CodebookError
from codebook_tools.models.encoder_cache import Kept
from codebook_tools.models.network import Quantise
from codebook_tools.models.stored_codes import changed_codebook, codes_of_rows, owned_keys, rounded, rows_of_codes
from codebook_tools.runtime.devices import sent


@dataclass(eq=False)
class Book:
    """A codebook of a running model. found: where it lies in the file, and how large it is there. vectors: (size, dim)
    float32, the effective codes, which the network never looks up itself; on the model's device. rows: (size, stored
    dim) float32, of which the model makes them, None where they are written as they are. read: (found.size, dim), the
    file's codes, where only the model's quantizer can tell them."""

    found: FoundCodebook
    vectors: Tensor
    metric: Metric = EUCLIDEAN
    rows: Tensor | None = None
    read: Tensor | None = None

    @property
    def key(self) -> str:
        return self.found.key

    @property
    def codebook(self) -> Codebook:
        return Codebook(self.vectors.detach(), self.metric)


@dataclass(frozen=True, eq=False)
class Pass:
    """One batch through a model. media: as decoded, images not clamped. latents: `(n, dim, *grid)` of each book, and
    codes: `(n, *grid)` int64, of each. Of a book that several stages share: `(n, dim, positions)`, stage by stage."""

    media: Tensor
    latents: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]


class _ReachedError(BaseException):
    """The walk got to the stage that was wanted: the rest of the network need not run."""


@dataclass(eq=False)
class Model:
    """A network with `encode` and `decode` in float32, and what must be known to work on it and write it back.

    keys: file key by network name. books: its codebooks, in the order in which latents meet them. chosen: indices of
    those that are operated on. route: the book that each quantizer stage uses, by index: stages may share one.
    build: the network for a checkpoint and a number of codes, with fresh weights, in torch's default dtype on the CPU.
    power_of_two: whether its config takes no other size of them. input_range: that [0, 1] is mapped to for the network.
    carried: file keys the network does not know. caveats: what to warn of. compiled: whether torch.compile makes encode
    and decode faster. kept: what was encoded.
    """

    family: str
    checkpoint: Checkpoint
    network: Any  # a nn.Module and a Network
    keys: Mapping[str, str]
    books: tuple[Book, ...]
    chosen: tuple[int, ...]
    route: tuple[int, ...]
    build: Callable[[Checkpoint, int], nn.Module]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    power_of_two: bool = False
    input_range: tuple[float, float] = AS_IT_IS
    carried: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    compiled: bool = False
    kept: Kept = field(default_factory=Kept, init=False, repr=False)
    _programs: dict[str, Callable[[object], object]] = field(default_factory=dict, init=False, repr=False)

    @property
    def modality(self) -> type[Modality]:
        """What kind of data the network takes."""
        return modality_of(self.network)

    # What flows through it

    @contextmanager
    def in_range(self, bounds: tuple[float, float]) -> Iterator[None]:
        """The model with another input range; afterwards with its own."""
        own, self.input_range = self.input_range, bounds
        try:
            yield
        finally:
            self.input_range = own

    def run(self, media: Tensor, quantise: Quantise) -> Tensor:
        """media through encoder, `quantise` at every stage, and decoder; not clamped.

        media: images (n, channels, height, width) in [0, 1], or waveforms (n, channels, samples) in [-1, 1], on any
        device. quantise: gets float32 latents and gives back what the decoder is to see of them.
        """
        low, high = self.input_range
        with self.autocast():
            shown = self._call("decode", self._walk(self._encoded(media), quantise))
        if not isinstance(shown, Tensor):
            raise CodebookError(f"the network's decode returns a {type(shown).__name__}; expected a tensor")
        return (shown.float() - low) / (high - low)

    def pass_through(self, media: Tensor, *, wait: bool = True) -> Pass:
        """media through the model as it is, each latent replaced by its nearest code. wait: as of `assign`."""
        latents: list[list[Tensor]] = [[] for _ in self.books]
        codes: list[list[Tensor]] = [[] for _ in self.books]

        def look(stage: int, found: Tensor) -> Tensor:
            latents[stage].append(found)
            codes[stage].append(self.assign(found, stage, wait=wait))
            return self.embed(codes[stage][-1], stage)

        shown = self.run(media, look)
        return Pass(shown, tuple(map(of_stages, latents)), tuple(map(of_stages, codes)))

    def encode(self, media: Tensor, stage: int = 0, *, keep: bool = True) -> Tensor:
        """media -> the latents that meet the book `stage`, `(n, dim, *grid)` float32; those before it quantise.

        keep: what the encoder makes of media, for those who ask for that again.
        """
        reached, stages = list[Tensor](), self.route.count(stage)

        def look(now: int, found: Tensor) -> Tensor:
            if now == stage:
                reached.append(found)
                if len(reached) == stages:
                    raise _ReachedError
            return self.embed(self.assign(found.detach(), now), now)

        with self.autocast(), suppress(_ReachedError):
            self._walk(self._encoded(media, keep), look)
        assert reached, f"the walk has no stage {stage}"
        return of_stages(reached)

    def latents(self, images: Media, batch: int, stage: int = 0) -> EncodedLatents:
        """The latents of many images that meet the book `stage`, as a stream."""
        several = len(self.books) > 1  # then other books look at the same batches; one codebook sees its data once

        def encode(pixels: Tensor) -> Tensor:
            with torch.no_grad():
                return self.encode(pixels, stage, keep=several).movedim(1, -1).flatten(1, -2)

        return EncodedLatents(images, encode, batch)

    def assign(self, latents: Tensor, stage: int = 0, *, wait: bool = True) -> Tensor:
        """latents `(n, dim, *grid)` -> the index of each one's nearest code, `(n, *grid)` int64. wait: whether the host
        may wait for the device; see `assignment.nearest`."""
        rows = latents.movedim(1, -1)
        codes = nearest(rows.reshape(-1, rows.shape[-1]), self.books[stage].codebook, wait=wait)
        return codes.reshape(rows.shape[:-1])

    def embed(self, codes: Tensor, stage: int = 0) -> Tensor:
        """codes `(n, *grid)` int64 -> what the decoder gets of them, `(n, dim, *grid)` float32."""
        return self.books[stage].codebook.emitted[codes].movedim(-1, 1).contiguous()

    def embed_trained(self, codes: Tensor, stage: int = 0) -> Tensor:
        """As `embed`, with gradients to the codebook where it takes some."""
        book = self.books[stage]
        return book.metric.emit(book.vectors)[codes].movedim(-1, 1)

    def encode_media(self, media: Tensor) -> object:
        """What the network's `encode` makes of media, as `walk` and its own quantizer take it."""
        return self._encoded(media, keep=False)

    def walk(self, encoded: object, quantise: Quantise) -> object:
        """That through `quantise` at every stage, and to what `decode` takes. quantise: gets the index of the book."""
        return self._walk(encoded, quantise)

    def _encoded(self, media: Tensor, keep: bool = True) -> object:
        """What the encoder makes of media; without gradients it need not be made twice."""
        low, high = self.input_range

        def encode() -> object:
            return self._call("encode", sent(media, self.device) * (high - low) + low)

        if torch.is_grad_enabled() or not keep:
            return encode()
        return self.kept.encoded(self.network, media, (low, high), encode)

    def _walk(self, encoded: object, quantise: Quantise) -> object:
        def checked(quantizer_stage: int, latents: object) -> Tensor:
            stage = self.route[quantizer_stage]
            # Nearest codes are decided in float32, whatever the network computes in: bf16 gets one in ten wrong.
            with torch.autocast(self.device.type, enabled=False):
                return quantise(stage, _checked(latents, self.books[stage].vectors.shape[1]).float())

        if not walks(self.network):
            return checked(0, encoded)
        with _told("walk", encoded):
            return self.network.walk(encoded, checked)

    def _call(self, method: str, argument: object) -> object:
        with _told(method, argument, self.compiled):
            return self._program(method)(argument)

    def _program(self, method: str) -> Callable[[object], object]:
        run: Callable[[object], object] = getattr(self.network, method)
        if self.compiled and method not in self._programs:
            self._programs[method] = torch.compile(run)
        return self._programs.get(method, run)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    # The codebooks in it

    def install(self, codebook: Codebook, stage: int = 0) -> None:
        """Put a codebook of any size into the running model, rounded as its file will store it.

        Rows that are emitted at unit length are stored so, for some libraries look them up as they stand.
        """
        book = self.books[stage]
        vectors = book.metric.emit(codebook.vectors)
        rows = rows_of_codes(self.checkpoint, book.found, vectors, old=book.read)
        if rows is None:
            held = rounded(self.checkpoint, book.found, vectors)
        elif book.read is not None:  # each is one of the file's, or none could be written
            held = vectors
        else:
            held = codes_of_rows(self.checkpoint, book.found, rows)
        installed = replace(book, vectors=held.clone().to(self.device), rows=rows)
        self.books = (*self.books[:stage], installed, *self.books[stage + 1 :])

    def copy(self, network: nn.Module) -> Model:
        """The same model around another network, with codebooks of its own."""
        return replace(self, network=network, books=tuple(replace(b, vectors=b.vectors.clone()) for b in self.books))

    def with_fresh_network(self, seed: int) -> Model:
        """The same model around a network that was never trained, its weights drawn by seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.build(self.checkpoint, self.books[0].found.size)
        return self.copy(network.float().to(self.device).eval().requires_grad_(False))

    # The file it becomes

    def changed(self, counts: Mapping[int, Tensor], index_maps: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Every tensor in which the model differs from its file, by file key, in the stored dtypes and shapes.

        counts: assignments per code, (size,), for the companions, by index of each book that changed; index_maps: what
        became of its old codes.
        """
        entries = self.checkpoint.entries
        tensors = dict[str, Tensor]()
        for name, tensor in self._own_state():
            key, running = self.keys[name], tensor.detach().cpu()
            # In the running dtype: a float64 file does not become another by being loaded.
            stored = self.checkpoint.tensor(key).to(running.dtype)
            if not torch.equal(running, stored.reshape(running.shape)):
                tensors[key] = running.to(torch_dtype(entries[key].dtype)).reshape(entries[key].shape).contiguous()
        for stage, hits in counts.items():
            book = self.books[stage]
            codes, index_map = book.codebook.vectors.cpu(), index_maps[stage].cpu()
            tensors |= changed_codebook(self.checkpoint, book.found, codes, hits.cpu(), index_map, book.rows)
        return tensors

    def round_to_stored(self) -> None:
        """Round all that may have been trained as its file will store it, so that what is measured is what can be
        loaded again."""
        with torch.no_grad():
            for name, tensor in self._own_state():
                tensor.copy_(tensor.to(torch_dtype(self.checkpoint.entries[self.keys[name]].dtype)))
        for stage in self.chosen:
            self.install(self.books[stage].codebook, stage)

    def _own_state(self) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors by name, without what belongs to a codebook: that is not looked up there."""
        owned = self._owned()
        yield from ((n, tensor) for n, tensor in self.network.state_dict().items() if self.keys[n] not in owned)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters by name, each once, without what belongs to a codebook."""
        owned = self._owned()
        yield from ((n, parameter) for n, parameter in self.network.named_parameters() if self.keys[n] not in owned)

    def _owned(self) -> set[str]:
        return {key for book in self.books for key in owned_keys(self.checkpoint, book.found)}


def of_stages(tensors: Sequence[Tensor]) -> Tensor:
    """What one book has of the stages that use it: of one, (n, ..., *grid) as it is; of several, their positions in a
    row, (n, ..., positions)."""
    if len(tensors) == 1:
        return tensors[0]
    grid_from = 2 if tensors[0].is_floating_point() else 1  # latents have an axis of dimensions, codes have none
    return torch.cat([tensor.flatten(grid_from) for tensor in tensors], -1)


def walks(network: object) -> bool:
    """Whether it has the two members of a network of several codebooks."""
    return hasattr(network, "walk") and hasattr(network, "codebooks")


@contextmanager
def _told(method: str, argument: object, compiled: bool = False) -> Iterator[None]:
    """Whatever a network raises, with what it was asked for; or what torch raises that cannot compile it."""
    try:
        yield
    except CodebookError:
        raise
    except Exception as error:
        given = tuple(argument.shape) if isinstance(argument, Tensor) else type(argument).__name__
        if compiled:
            told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
            raise CodebookError(
                f"the network's {method} cannot be compiled for {given}: {type(error).__name__}: {told}; "
                "leave out --compile"
            ) from error
        raise CodebookError(f"the network's {method} fails on {given}: {type(error).__name__}: {error}") from error


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
