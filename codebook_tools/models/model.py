"""A model: its network, its codebooks, and the file that both came from."""

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
from codebook_tools.clustering.kept_groups import KeptGroups
from codebook_tools.codebook import EUCLIDEAN, Codebook, Metric
from codebook_tools.data.dataset import Media
from codebook_tools.data.images import Images
from codebook_tools.data.latents import EncodedLatents
from codebook_tools.data.modality import AS_IT_IS, Modality
from codebook_tools.errors import CodebookError
from codebook_tools.models.encoder_cache import Kept
from codebook_tools.models.network import Quantize, Search, axis_of, explained, walks
from codebook_tools.models.stored_codes import changed_codebook, codes_of_rows, owned_keys, rounded, rows_of_codes
from codebook_tools.runtime.devices import sent


@dataclass(eq=False)
class Book:
    """A codebook of a model.

    Attributes:
        stored: How the file has it: key, axis, size, companions.
        vectors: (size, dim) float32, the effective codes, on the model's device; not looked up in the network.
        metric: By which codes are searched and emitted.
        rows: (size, stored dim) float32, of which the model makes the codes; None where codes are stored as they are.
        read: (stored.size, dim), the file's codes, where only the model's quantizer can tell them.
        groups: The groups of the codes, which only make their search faster.
    """

    stored: FoundCodebook
    vectors: Tensor
    metric: Metric = EUCLIDEAN
    rows: Tensor | None = None
    read: Tensor | None = None
    groups: KeptGroups = field(default_factory=KeptGroups, init=False, repr=False)

    @property
    def key(self) -> str:
        """The file key of the codebook's tensor."""
        return self.stored.key

    @property
    def codebook(self) -> Codebook:
        """Vectors and metric, without gradients."""
        return Codebook(self.vectors.detach(), self.metric)


@dataclass(frozen=True, eq=False)
class Pass:
    """One batch after a pass through a model.

    Attributes:
        media: As decoded, images not clamped.
        latents: (n, dim, *grid) of each book; (n, dim, positions), stage by stage, of one that several stages share.
        codes: (n, *grid) int64 of each book; (n, positions) of a shared one.
        stages: (n, *grid) int64, the codes of each quantizer stage, in order.
    """

    media: Tensor
    latents: tuple[Tensor, ...]
    codes: tuple[Tensor, ...]
    stages: tuple[Tensor, ...] = ()


class _ReachedError(BaseException):
    """The walk has reached the wanted stage: the rest of the network need not run."""


@dataclass(eq=False)
class Model:
    """A network with `encode` and `decode` in float32, its codebooks, and what is needed to write them back.

    Attributes:
        family: A name of FAMILIES, or CUSTOM.
        checkpoint: The file.
        network: An nn.Module that is a Network; may be Walking and Quantizing.
        keys: File key by the network's name of a tensor.
        books: The codebooks, in the order in which latents meet them.
        chosen: Indices of the books that are operated on.
        route: The index of the book that each quantizer stage uses: stages may share one.
        build: (checkpoint, number of codes) -> the network with fresh weights, in torch's default dtype on the CPU.
        device: Where the network runs.
        bf16: Whether encoder and decoder run under bfloat16 autocast.
        power_of_two: Whether the config takes no other number of codes.
        input_range: What [0, 1] is mapped to for the network.
        carried: File keys that the network does not have.
        caveats: What to warn of.
        compiled: Whether encode and decode run through torch.compile.
        modality: The kind of data that the network takes.
        latent_axis: The axis of latents that holds the dimensions of a code; None for the second, or else the only one
            of that length.
        kept: The cache of encoded batches.
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
    modality: type[Modality] = Images
    latent_axis: int | None = None
    kept: Kept = field(default_factory=Kept, init=False, repr=False)
    _programs: dict[str, Callable[[object], object]] = field(default_factory=dict, init=False, repr=False)

    # What flows through it

    @contextmanager
    def in_range(self, bounds: tuple[float, float]) -> Iterator[None]:
        """Use another input range within the context."""
        own, self.input_range = self.input_range, bounds
        try:
            yield
        finally:
            self.input_range = own

    def run(self, media: Tensor, quantize: Quantize) -> Tensor:
        """Run media through encoder, `quantize` at every stage, and decoder.

        Args:
            media: Images (n, channels, height, width) in [0, 1], waveforms (n, channels, samples) in [-1, 1], or arrays
                (n, ...), on any device.
            quantize: (index of the book, float32 latents (n, dim, *grid)) -> what the decoder gets, of the same shape.

        Returns:
            Media of the same shape, float32, not clamped.

        Raises:
            CodebookError: The network fails, or returns something else than expected.
        """
        with self.autocast():
            encoded = self._encoded(media)
        return self.decode_walked(encoded, quantize)

    def decode_walked(self, encoded: object, quantize: Quantize) -> Tensor:
        """What `encode_media` returned, through `quantize` at every stage and the decoder; as `run` otherwise."""
        low, high = self.input_range
        with self.autocast():
            decoded = self._call("decode", self._walk(encoded, quantize))
        if not isinstance(decoded, Tensor):
            raise CodebookError(f"the network's decode returns a {type(decoded).__name__}; expected a tensor")
        return decoded.float() if (low, high) == AS_IT_IS else (decoded.float() - low) / (high - low)

    def pass_through(self, media: Tensor, *, wait: bool = True) -> Pass:
        """Run media through the model, each latent replaced by its nearest code.

        Args:
            media: As for `run`.
            wait: As for `assign`.
        """
        met: list[list[Tensor]] = [[] for _ in self.books]
        codes: list[list[Tensor]] = [[] for _ in self.books]
        stages = list[Tensor]()

        def look(stage: int, latents: Tensor) -> Tensor:
            met[stage].append(latents)
            stages.append(self.assign(latents, stage, wait=wait))
            codes[stage].append(stages[-1])
            return self.embed(stages[-1], stage)

        decoded = self.run(media, look)
        return Pass(decoded, tuple(map(of_stages, met)), tuple(map(of_stages, codes)), tuple(stages))

    def encode(self, media: Tensor, stage: int = 0, *, keep: bool = True) -> Tensor:
        """Encode media; books before `stage` quantize.

        Args:
            media: As for `run`.
            stage: The index of a book.
            keep: Whether to cache what the encoder returns.

        Returns:
            (n, dim, *grid) float32, the latents that meet that book; (n, dim, positions) where several stages share it.
        """
        reached, stages = list[Tensor](), self.route.count(stage)

        def look(now: int, latents: Tensor) -> Tensor:
            if now == stage:
                reached.append(latents)
                if len(reached) == stages:
                    raise _ReachedError
            return self.embed(self.assign(latents.detach(), now), now)

        with self.autocast(), suppress(_ReachedError):
            self._walk(self._encoded(media, keep), look)
        assert reached, f"the walk has no stage {stage}"
        return of_stages(reached)

    def latents(self, images: Media, batch: int, stage: int = 0) -> EncodedLatents:
        """The latents of a dataset that meet the book `stage`, as a stream, encoded `batch` items at a time."""
        several = len(self.books) > 1  # then other books look at the same batches; one codebook sees its data once

        def encode(pixels: Tensor) -> Tensor:
            with torch.no_grad():
                rows = self.encode(pixels, stage, keep=several).movedim(1, -1)
                return rows.reshape(len(rows), -1, rows.shape[-1])

        return EncodedLatents(images, encode, batch)

    def assign(self, latents: Tensor, stage: int = 0, *, wait: bool = True) -> Tensor:
        """The index of each latent's nearest code.

        Args:
            latents: (n, dim, *grid).
            stage: The index of the book.
            wait: Whether the host may wait for the device; see `assignment.nearest`.

        Returns:
            (n, *grid) int64.
        """
        rows = latents.movedim(1, -1)
        book = self.books[stage]
        codes = nearest(rows.reshape(-1, rows.shape[-1]), book.codebook, wait=wait, kept=book.groups)
        return codes.reshape(rows.shape[:-1])

    def embed(self, codes: Tensor, stage: int = 0) -> Tensor:
        """codes (n, *grid) int64 -> the vectors that they emit, (n, dim, *grid) float32."""
        return self.books[stage].codebook.emitted[codes].movedim(-1, 1).contiguous()

    def embed_trained(self, codes: Tensor, stage: int = 0) -> Tensor:
        """As `embed`, with gradients to the codebook where it requires them."""
        book = self.books[stage]
        return book.metric.emit(book.vectors)[codes].movedim(-1, 1)

    def encode_media(self, media: Tensor) -> object:
        """What the network's `encode` returns, as `walk` and its own quantizer take it."""
        return self._encoded(media, keep=False)

    def walk(self, encoded: object, quantize: Quantize, search: Search | None = None) -> object:
        """What `encode` returned -> what `decode` takes. quantize: as for `run`. search: None for the greedy one."""
        return self._walk(encoded, quantize, search)

    def in_own_range(self, media: Tensor) -> Tensor:
        """Media on the model's device, mapped to its input range; as they are where that is [0, 1]."""
        low, high = self.input_range
        own = sent(media, self.device)
        return own if (low, high) == AS_IT_IS else own * (high - low) + low

    def _encoded(self, media: Tensor, keep: bool = True) -> object:
        """What the network's `encode` returns; without gradients it is cached."""

        def encode() -> object:
            return self._call("encode", self.in_own_range(media))

        if torch.is_grad_enabled() or not keep:
            return encode()
        return self.kept.encoded(self.network, media, self.input_range, encode)

    def _walk(self, encoded: object, quantize: Quantize, search: Search | None = None) -> object:
        def checked(quantizer_stage: int, latents: object) -> Tensor:
            stage = self.route[quantizer_stage]
            axis = self.axis_of(latents, stage)
            assert isinstance(latents, Tensor)
            # Nearest codes are decided in float32, whatever the network computes in: bf16 gets one in ten wrong.
            with torch.autocast(self.device.type, enabled=False):
                return quantize(stage, latents.movedim(axis, 1).float()).movedim(1, axis)

        if not walks(self.network):
            return checked(0, encoded)
        with explained("walk", encoded):
            return self.network.walk(encoded, checked, *(() if search is None else (search,)))

    def axis_of(self, latents: object, stage: int = 0) -> int:
        """The axis of what meets a stage's quantizer that holds the dimensions of a code. Raises CodebookError."""
        return axis_of(latents, self.books[stage].vectors.shape[1], self.latent_axis)

    def _call(self, method: str, argument: object) -> object:
        with explained(method, argument, self.compiled):
            return self._program(method)(argument)

    def _program(self, method: str) -> Callable[[object], object]:
        run: Callable[[object], object] = getattr(self.network, method)
        if self.compiled and method not in self._programs:
            self._programs[method] = torch.compile(run)
        return self._programs.get(method, run)

    def autocast(self) -> AbstractContextManager[object]:
        """bfloat16 autocast where `bf16` says so."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    # The codebooks in it

    def install(self, codebook: Codebook, stage: int = 0) -> None:
        """Replace a codebook by one of any size, rounded as the file will store it.

        Rows that are emitted at unit length are stored so, for some libraries look them up as they are.

        Raises:
            CodebookError: The file's layout or dtype cannot hold these codes.
        """
        book = self.books[stage]
        vectors = book.metric.emit(codebook.vectors)
        rows = rows_of_codes(self.checkpoint, book.stored, vectors, old=book.read)
        if rows is None:
            vectors = rounded(self.checkpoint, book.stored, vectors)
        elif book.read is None:  # else each is one of the file's codes, or it could not be written
            vectors = codes_of_rows(self.checkpoint, book.stored, rows)
        installed = replace(book, vectors=vectors.clone().to(self.device), rows=rows)
        self.books = (*self.books[:stage], installed, *self.books[stage + 1 :])

    def copy(self, network: nn.Module) -> Model:
        """The model with another network and copies of its codebooks."""
        return replace(self, network=network, books=tuple(replace(b, vectors=b.vectors.clone()) for b in self.books))

    def with_fresh_network(self, seed: int) -> Model:
        """The model with an untrained network, its weights drawn by `seed`, and copies of its codebooks."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = self.build(self.checkpoint, self.books[0].stored.size)
        return self.copy(network.float().to(self.device).eval().requires_grad_(False))

    # The file it becomes

    def changed(self, counts: Mapping[int, Tensor], index_maps: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Every tensor in which the model differs from its file, by file key, in the stored dtypes and shapes.

        Args:
            counts: Assignments per code, (size,), for the companions, by index of each book that changed.
            index_maps: (stored.size,) int64, the new index of each old code, negative for none, by the same indices.
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
            tensors |= changed_codebook(self.checkpoint, book.stored, codes, hits.cpu(), index_map, book.rows)
        return tensors

    def round_to_stored(self) -> None:
        """Round all that may have been trained to the stored dtypes, so that what is measured is what is written."""
        with torch.no_grad():
            for name, tensor in self._own_state():
                tensor.copy_(tensor.to(torch_dtype(self.checkpoint.entries[self.keys[name]].dtype)))
        for stage in self.chosen:
            self.install(self.books[stage].codebook, stage)

    def _own_state(self) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors by name, without those of codebooks."""
        owned = self._owned()
        yield from ((n, tensor) for n, tensor in self.network.state_dict().items() if self.keys[n] not in owned)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The network's parameters by name, each once, without those of codebooks."""
        owned = self._owned()
        yield from ((n, parameter) for n, parameter in self.network.named_parameters() if self.keys[n] not in owned)

    def _owned(self) -> set[str]:
        return {key for book in self.books for key in owned_keys(self.checkpoint, book.stored)}


def of_stages(tensors: Sequence[Tensor]) -> Tensor:
    """Join latents (n, dim, *grid), or codes (n, *grid), of all stages that use one book.

    One stage keeps its grid; of several, the positions are concatenated: (n, dim, positions), or (n, positions).
    """
    if len(tensors) == 1:
        return tensors[0]
    kept = 2 if tensors[0].is_floating_point() else 1  # latents have an axis of dimensions, codes have none
    return torch.cat([tensor.reshape(*tensor.shape[:kept], -1) for tensor in tensors], -1)
