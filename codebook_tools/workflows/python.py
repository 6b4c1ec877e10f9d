"""The commands as Python calls: on a file, or on a module that lives in memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from codebook_tools.checkpoints.tensors import InMemory
from codebook_tools.codebook import Strategy
from codebook_tools.data.given import Data, PathLike, Values
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.models.proof import Proof, prove
from codebook_tools.models.user_network import NetworkMaker
from codebook_tools.models.verification import Verification
from codebook_tools.models.wrapped import Function, Wrapped
from codebook_tools.remapping.remap import Remapped
from codebook_tools.remapping.remap import remap as run_remap
from codebook_tools.remapping.request import RemapRequest
from codebook_tools.runtime.progress import Show, Watch
from codebook_tools.strategies import STRATEGIES
from codebook_tools.training.recipe import FineTune
from codebook_tools.workflows import compare as comparisons
from codebook_tools.workflows import sweep as sweeps
from codebook_tools.workflows.comparison_rows import Comparison
from codebook_tools.workflows.diagnose import Diagnosis
from codebook_tools.workflows.diagnose import diagnose as run_diagnosis
from codebook_tools.workflows.inspect_checkpoint import Inspection, inspect_checkpoint
from codebook_tools.workflows.operate import Run, measure_model, operate_in_memory
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result, check_request_output
from codebook_tools.workflows.verify import verify_checkpoint


class _Warns(Protocol):
    @property
    def warnings(self) -> Sequence[str]: ...


_Result = TypeVar("_Result", bound=_Warns)


class CodebookWarning(UserWarning):
    """What a command would print as a warning."""


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint, or a module in memory, that can be operated on. Made by `load` and `wrap`.

    Attributes:
        request: What a command needs to know of it.
    """

    request: Request

    def __repr__(self) -> str:
        return f"Model({str(self.request.source)!r})"


def load(
    path: PathLike,
    *,
    network: NetworkMaker | None = None,
    family: str | None = None,
    codebooks: Sequence[str] = (),
    metric: str | None = None,
    input_range: tuple[float, float] | None = None,
    companions: Sequence[str] = (),
    as_stored: Sequence[str] = (),
    device: str = "auto",
    precision: str = "fp32",
    compiled: bool = False,
) -> Model:
    """A checkpoint: a .safetensors file, a directory of diffusers or transformers, an index of shards, or a .pt file.

    Args:
        path: Of it.
        network: For a layout that is not known: "FILE.py:FUNCTION", or a function that, called with codebook_size=K,
            returns a module with `encode` and `decode`.
        family: Name of a known layout, where recognition is to be overruled.
        codebooks: Keys of those to operate on; all where there are none.
        metric: A name of `ct.METRICS`, such as "cosine": how codes are searched, for a network of yours.
        input_range: Of the values that the network takes, such as (-1, 1); None for the best of three.
        companions: "KEY=ROLE", what a tensor beside a codebook holds.
        as_stored: Keys of tensors beside a codebook that do not change the codes.
        device: "auto", "cpu", "cuda:1" ...
        precision: "fp32" or "bf16", of the network.
        compiled: Whether `torch.compile` makes encode and decode faster.

    Raises:
        CodebookError: There is no such file, or it is no checkpoint.
    """
    request = Request(
        model=Path(path),
        network=network,
        family=family,
        codebook_key=_names(codebooks),
        metric=metric,
        input_range=input_range,
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
    input_range: tuple[float, float] = (0.0, 1.0),
    companions: Sequence[str] = (),
    as_stored: Sequence[str] = (),
    device: str | None = None,
) -> Model:
    """A module that lives in memory, such as in a training script. `operate` changes it in place.

    Args:
        module: Any module with `encode(media) -> latents (n, dim, *grid)` and `decode(quantized) -> media`.
        codebooks: Names of the codebooks in its `state_dict()`; those that names and shapes tell where there are none.
        encode: (module, media) -> latents, where the module has no such method.
        decode: (module, quantized) -> media, likewise.
        quantize: (module, latents) -> (quantized, codes int64), the module's own quantizer: it is held against ours.
        metric: A name of `ct.METRICS`, such as "cosine": how the module searches its codes.
        input_range: Of the values that the module takes; data are in [0, 1] and are scaled to it.
        companions: "KEY=ROLE", what a tensor beside a codebook holds.
        as_stored: Names of tensors beside a codebook that do not change the codes.
        device: That work is done on; None for the module's own.

    Raises:
        CodebookError: It has no `encode` or `decode`, or no such codebook.
    """
    wrapped = Wrapped(module, encode, decode, quantize)
    if device is None:
        device = str(next((tensor.device for tensor in module.state_dict().values()), "cpu"))
    request = Request(
        wrapped=wrapped,
        codebook_key=_names(codebooks),
        metric=metric,
        input_range=input_range,
        companion=_names(companions),
        as_stored=_names(as_stored),
        device=device,
    )
    checkpoint = request.checkpoint
    if missing := [key for key in request.codebook_key if key not in checkpoint.entries]:
        near = [key for key, shape in checkpoint.shapes.items() if len(shape) == 2][:8]
        raise CodebookError(f"{wrapped.name} has no tensor {missing[0]}; its matrices are {', '.join(near) or 'none'}")
    return Model(request)


@dataclass(eq=False)
class Operation:
    """A surgery and its fine-tuning, done and measured. Of a wrapped module it is installed; `save` writes a file.

    Attributes:
        before: Figures on the test data before anything changed.
        surgery: After the surgery; None without one.
        finetuned: After fine-tuning; None without it.
        kept: "before", "surgery" or "finetuned": the state with the lowest validation error.
        index_maps: (old size,) int64 by name of the codebook: the new code of each old one, REMOVED where it is gone.
        proof: How the figures were held against the module that has the new codes; None where that is done by `save`.
    """

    run: Run
    proof: Proof | None = None

    @property
    def before(self) -> Measurement:
        assert self.run.before is not None
        return self.run.before

    @property
    def surgery(self) -> Measurement | None:
        return self.run.done.surgery

    @property
    def finetuned(self) -> Measurement | None:
        return self.run.done.finetuned

    @property
    def kept(self) -> str:
        return self.run.kept

    @property
    def index_maps(self) -> dict[str, Tensor]:
        ending = "/index_map"
        return {name.removesuffix(ending): of for name, of in self.run.maps.items() if name.endswith(ending)}

    def save(self, path: PathLike, *, force: bool = False) -> Result:
        """Write the kept state as a checkpoint, its index map beside it, and read both back.

        Args:
            path: A .safetensors file, or a directory where the original has a config.
            force: Replace what is there.

        Raises:
            CodebookError: It cannot be written, would replace something, or the model that loads it disagrees.
        """
        opened = self.run.opened
        opened.request = replace(opened.request, output=Path(path), force=force)
        output = check_request_output(opened.request, self.run.command, opened.size)
        return _warned(self.run.write(output))


def measure(
    model: Model, data: Data | Values | None = None, *, seed: int = 0, progress: Show | None = None
) -> Measurement:
    """Usage, perplexity, distortion and reconstruction error on the test data.

    Raises:
        CodebookError: Model or data cannot be read, or do not fit each other.
    """
    result = _warned(measure_model(_request(model, data, seed), Watch(progress)))
    assert result.before is not None
    return result.before


def operate(
    model: Model,
    data: Data | Values | None,
    strategy: Strategy | None,
    finetune: FineTune | None = None,
    *,
    seed: int = 0,
    progress: Show | None = None,
) -> Operation:
    """Operate on the codebooks of a model and fine-tune it, each measured. Nothing is written until `save`.

    A wrapped module is changed in place: its codebook becomes a new Parameter or buffer where its size differs, EMA
    state and attributes such as `num_embeddings` follow. Where this raises, the module is as it was. An optimizer that
    holds the old Parameter is to be made anew; see also `install`.

    Args:
        model: As `load` or `wrap` gave it.
        data: Data, or what Data takes as `train`.
        strategy: Such as `ct.strategies.Refit(k=128)`; None to fine-tune the codebooks as they are.
        finetune: None for no fine-tuning, as FineTune(steps=0).
        seed: Of calibration and fine-tuning.
        progress: Called with what is being done, how many are done, of how many, and figures.

    Raises:
        CodebookError: Something does not fit or cannot be done; its message is one line.
    """
    command = _command_of(strategy)
    request = _request(model, data, seed)
    run = operate_in_memory(command, request, strategy, finetune or FineTune(steps=0), Watch(progress))
    proof = _install(run, request.wrapped) if request.wrapped else None
    for text in run.opened.warnings:
        warnings.warn(text, CodebookWarning, stacklevel=2)
    run.opened.warnings.clear()
    return Operation(run, proof)


def _command_of(strategy: Strategy | None) -> str:
    """What the command line calls it; of a strategy that is not registered, the name of its class."""
    known = (name for name, kind in STRATEGIES.items() if kind is type(strategy))
    return "finetune" if strategy is None else next(known, type(strategy).__name__.lower())


def _install(run: Run, wrapped: Wrapped) -> Proof:
    """Prove the kept state through a copy of the module, then put it into the module itself."""
    model, changed = run.opened.model, run.changed()
    entries = model.checkpoint.entries | {key: InMemory(key, tensor) for key, tensor in changed.items()}
    proof = prove(model, replace(model.checkpoint, entries=entries), run.opened.media())
    wrapped.put(changed, [book.found for book in model.books])
    return proof


def compare(
    model: Model,
    data: Data | Values | None,
    output: PathLike,
    k: int,
    *,
    strategies: Sequence[str] = (),
    finetune: FineTune | None = None,
    seeds: int = 1,
    seed: int = 0,
    progress: Show | None = None,
) -> Comparison:
    """Every strategy and the controls on one model, with the same data, batches and steps.

    Args:
        output: A folder for the rows; those found there are not run again.
        k: Codes that each leaves.
        strategies: Rows by name; those that `codebook compare` has where there are none.
        seeds: Runs of each row.
    """
    request = _request(model, data, seed)
    names = strategies or [name for name, entry in comparisons.ENTRIES.items() if not (entry.fresh and request.wrapped)]
    return _warned(
        comparisons.compare(
            request,
            k,
            names,
            finetune or FineTune(),
            seeds=seeds,
            folder=Path(output),
            watch=Watch(progress),
        )
    )


def sweep(
    model: Model,
    data: Data | Values | None,
    sizes: Sequence[int],
    output: PathLike,
    *,
    prices: Sequence[float] = (),
    seed: int = 0,
    progress: Show | None = None,
) -> sweeps.Sweep:
    """Error, distortion and bits over the number of codes, and one that suffices; rows go to the folder output."""
    return _warned(sweeps.sweep(_request(model, data, seed), sizes, prices, Path(output), Watch(progress)))


def diagnose(
    model: Model,
    data: Data | Values | None = None,
    *,
    against: PathLike | None = None,
    trace: PathLike | None = None,
    seed: int = 0,
    progress: Show | None = None,
) -> Diagnosis:
    """Why a codebook collapsed: cause by cause, with the number that says so.

    Args:
        against: The original, before the surgery or the training.
        trace: The JSON of that surgery or training.
    """
    paths = (None if path is None else Path(path) for path in (against, trace))
    return _warned(run_diagnosis(_request(model, data, seed), Watch(progress), *paths))


def inspect(path: PathLike) -> Inspection:
    """Which codebooks a checkpoint holds, and what depends on them. Reads its header, codebooks and counts."""
    return inspect_checkpoint(Path(path))


def verify(path: PathLike, against: PathLike, maps: Sequence[PathLike] = ()) -> Verification:
    """Check a checkpoint that this package wrote, and its index map, against the original."""
    return verify_checkpoint(Path(path), Path(against), [Path(one) for one in maps])


def remap(sources: PathLike | Sequence[PathLike], maps: PathLike | Sequence[PathLike], **options: Any) -> Remapped:
    """Rewrite stored tokens, or a prior's tables, by index maps. options: fields of RemapRequest."""
    return _warned(run_remap(RemapRequest(_paths(sources), _paths(maps), **options)))


def _request(model: Model, data: Data | Values | None, seed: int) -> Request:
    if not isinstance(model, Model):
        raise CodebookError(f"expected a model of ct.load or ct.wrap, not a {type(model).__name__}")
    of = data if isinstance(data, Data) else Data(data)
    train, test = of.paths
    return replace(
        model.request,
        data=train,
        test_data=test,
        **{name: getattr(of, name) for name in ("limit", "size", "channels", "skip_bad", "batch_size", "workers")},
        seed=seed,
        typed=True,  # the bundled sample is never trained on
    )


def _warned(result: _Result) -> _Result:
    for text in result.warnings:
        warnings.warn(text, CodebookWarning, stacklevel=3)
    return result


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _paths(paths: PathLike | Sequence[PathLike]) -> tuple[Path, ...]:
    return (Path(paths),) if isinstance(paths, str | Path) else tuple(map(Path, paths))
