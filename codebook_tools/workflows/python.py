"""The commands as Python calls: on a file, or on a module that lives in memory."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from codebook_tools.checkpoints.hub import located
from codebook_tools.checkpoints.tensors import InMemory
from codebook_tools.codebook import Strategy
from codebook_tools.data.user_data import Data, PathLike, Values
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.figures import Measurement
from codebook_tools.evaluation.quoted.registry import parse_metrics
from codebook_tools.models.proof import Proof, prove
from codebook_tools.models.verification import Verification
from codebook_tools.models.wrapped import Wrapped
from codebook_tools.remapping.remap import Remapped
from codebook_tools.remapping.remap import remap as run_remap
from codebook_tools.remapping.request import RemapRequest
from codebook_tools.runtime.progress import Show, Watch
from codebook_tools.strategies import STRATEGIES
from codebook_tools.strategies.comparison_entries import ENTRIES
from codebook_tools.training.recipe import FineTune
from codebook_tools.workflows import decode as decoding
from codebook_tools.workflows import encode as encoding
from codebook_tools.workflows import sweep as sweeps
from codebook_tools.workflows.compare import compare as run_compare
from codebook_tools.workflows.comparison_rows import Comparison
from codebook_tools.workflows.diagnose import Diagnosis
from codebook_tools.workflows.diagnose import diagnose as run_diagnosis
from codebook_tools.workflows.inspect_checkpoint import Inspection, inspect_checkpoint
from codebook_tools.workflows.operate import Run, measure_model, operate_in_memory
from codebook_tools.workflows.python_model import Model
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result, check_request_output
from codebook_tools.workflows.verify import verify_checkpoint


class _Warns(Protocol):
    @property
    def warnings(self) -> Sequence[str]: ...


_Result = TypeVar("_Result", bound=_Warns)


class CodebookWarning(UserWarning):
    """What the command line would print as a warning."""


@dataclass(eq=False)
class Operation:
    """A surgery and its fine-tuning, done and measured. In a wrapped module it is installed; `save` writes a file.

    Attributes:
        run: The run behind it, with model, data and trace.
        proof: How the module with the new codes was compared with ours; None for a file, whose proof is made by `save`.
    """

    run: Run
    proof: Proof | None = None

    @property
    def before(self) -> Measurement:
        """Figures on the test data before anything changed."""
        assert self.run.before is not None
        return self.run.before

    @property
    def surgery(self) -> Measurement | None:
        """Figures on the test data after the surgery; None without one."""
        return self.run.done.surgery

    @property
    def finetuned(self) -> Measurement | None:
        """Figures on the test data after fine-tuning; None without it."""
        return self.run.done.finetuned

    @property
    def kept(self) -> str:
        """The state with the lowest validation error: "before", "surgery" or "finetuned"."""
        return self.run.kept

    @property
    def index_maps(self) -> dict[str, Tensor]:
        """The new code of each old one by key of the codebook, (old size,) int64; REMOVED where it is gone."""
        ending = "/index_map"
        return {name.removesuffix(ending): of for name, of in self.run.maps.items() if name.endswith(ending)}

    def save(self, path: PathLike, *, force: bool = False) -> Result:
        """Write the kept state as a checkpoint, its index map beside it, and read both back.

        Args:
            path: A .safetensors file, or a directory where the original has a config.
            force: Whether to replace what is there.

        Returns:
            The result, as `codebook NAME --json` prints it, with the paths and the proof.

        Raises:
            CodebookError: The file cannot be written, would replace something, or the model that loads it disagrees.
        """
        opened = self.run.opened
        opened.request = replace(opened.request, output=Path(path), force=force)
        output = check_request_output(opened.request, self.run.command, opened.size)
        return _warned(self.run.write(output))


def measure(
    model: Model, data: Data | Values | None = None, *, seed: int = 0, progress: Show | None = None
) -> Measurement:
    """Usage, perplexity, distortion and reconstruction error on the test data.

    Args:
        model: As `load` or `wrap` returned it.
        data: Data, or what Data takes as `train`; None for the bundled sample.
        seed: Of splits, samples and the reference k-means of coverage.
        progress: Called with the phase, how many are done, of how many, and figures.

    Returns:
        The figures; errors are per value, on data in [0, 1].

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
    refers to the old Parameter must be made anew; see also `install`.

    Args:
        model: As `load` or `wrap` returned it.
        data: Data, or what Data takes as `train`; None for the bundled sample, which trains the bundled demo alone.
        strategy: Such as `ct.strategies.Refit(k=128)`; None to fine-tune the codebooks as they are.
        finetune: None for no fine-tuning, as FineTune(steps=0).
        seed: Of calibration and fine-tuning; the strategy has its own.
        progress: Called with the phase, how many are done, of how many, and figures.

    Returns:
        The operation, with the figures of each phase.

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
    wrapped.put(changed, [book.stored for book in model.books])
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
        model: As `load` or `wrap` returned it.
        data: Data, or what Data takes as `train`.
        output: A folder for the rows; a row that is there already, of the same settings, is not run again.
        k: Number of codes that each strategy leaves.
        strategies: Rows by name; empty for those of `codebook compare`.
        finetune: Of every row; None for FineTune().
        seeds: Runs of each row.
        seed: Of the first run; the others follow it. Data and splits are those of `seed` in all.
        progress: Called with the phase, how many are done, of how many, and figures.

    Returns:
        The rows, and their means and spreads over seeds.

    Raises:
        CodebookError: No row can be run; one that cannot says so in `error`.
    """
    request = _request(model, data, seed)
    names = strategies or [name for name, entry in ENTRIES.items() if not (entry.fresh and request.wrapped)]
    return _warned(
        run_compare(request, k, names, finetune or FineTune(), seeds=seeds, folder=Path(output), watch=Watch(progress))
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
    """Error, distortion and bits over the number of codes, and a number that suffices.

    Args:
        model: As `load` or `wrap` returned it.
        data: Data, or what Data takes as `train`.
        sizes: Numbers of codes to try.
        output: A folder for the rows; a row that is there already, of the same settings, is not measured again.
        prices: Of a bit, in variances of the latents: for each an entropy-constrained Re-Fit of the largest size.
        seed: Of splits, samples and k-means.
        progress: Called with the phase, how many are done, of how many, and figures.

    Returns:
        The points, and the suggested number of codes.

    Raises:
        CodebookError: Re-Fit is possible at none of the sizes, or the folder cannot be written.
    """
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
        model: As `load` or `wrap` returned it.
        data: Data, or what Data takes as `train`; None for the bundled sample.
        against: The original, before the surgery or the training.
        trace: The JSON of that surgery or training, with its history.
        seed: Of splits, samples and k-means.
        progress: Called with the phase, how many are done, of how many, and figures.

    Returns:
        A check for each cause, with a verdict and the command that repairs it.

    Raises:
        CodebookError: A file cannot be opened, or the two models do not take the same data.
    """
    paths = (None if path is None else located(path) for path in (against, trace))
    return _warned(run_diagnosis(_request(model, data, seed), Watch(progress), *paths))


def inspect(path: PathLike) -> Inspection:
    """Which codebooks a checkpoint holds, and what depends on them. Reads its header, codebooks and counts.

    Raises:
        CodebookError: The file is missing or unsound.
    """
    return inspect_checkpoint(located(path))


def verify(path: PathLike, against: PathLike, maps: Sequence[PathLike] = ()) -> Verification:
    """Check a checkpoint that this package wrote, and its index map, against the original.

    Args:
        path: Of the checkpoint that was written; a surgery's, or a prior that `remap` wrote.
        against: The original.
        maps: Index maps; empty for the one beside the checkpoint.

    Returns:
        The differences, none where the checkpoint is what it says.

    Raises:
        CodebookError: A file is missing or unsound, or the checkpoint was not written by this package.
    """
    return verify_checkpoint(located(path), located(against), [Path(one) for one in maps])


def encode(
    model: Model,
    data: Data | Values | None,
    output: PathLike,
    *,
    beam: int = 1,
    force: bool = False,
    progress: Show | None = None,
) -> encoding.Encoding:
    """Write the tokens of all data, in order of name.

    Args:
        model: As `load` or `wrap` returned it.
        data: Data, or what Data takes as `train`; None for the bundled sample.
        output: A .npy, .safetensors, .parquet or .jsonl file.
        beam: Partial sums of each latent that a joint search over residual levels keeps; 1 for no such search.
        force: Whether to replace the output.
        progress: Called with the phase, how many are done, of how many, and figures.

    Returns:
        Layout, counts and paths.

    Raises:
        CodebookError: Model or data cannot be read, or the output cannot hold the tokens.
    """
    request = replace(_request(model, data, 0), force=force)
    return _warned(encoding.encode(request, Path(output), Watch(progress), beam=beam))


def decode(
    tokens: PathLike, model: Model, output: PathLike, *, data: Data | Values | None = None, progress: Show | None = None
) -> decoding.Decoding:
    """Turn tokens back into media, in a new folder.

    Args:
        tokens: A file that `encode` wrote, or one of the same layout.
        model: As `load` or `wrap` returned it.
        output: The folder.
        data: Data like those that were encoded, where the tokens do not tell the shape of an item.
        progress: Called with the phase, how many are done, of how many, and figures.

    Raises:
        CodebookError: The tokens are none of this model, or the folder exists or cannot be written.
    """
    return _warned(decoding.decode(_request(model, data, 0), Path(tokens), Path(output), Watch(progress)))


def remap(sources: PathLike | Sequence[PathLike], maps: PathLike | Sequence[PathLike], **options: Any) -> Remapped:
    """Rewrite stored tokens, or a prior's tables, by index maps.

    Args:
        sources: Token files and priors.
        maps: Index maps, in the order of the surgeries.
        **options: Fields of RemapRequest, such as on_removed="nearest".

    Returns:
        What was written, and how many tokens changed.

    Raises:
        CodebookError: A file is missing or unsound, an option is out of range, or a token has no new code.
    """
    return _warned(run_remap(RemapRequest(_paths(sources), _paths(maps), **options)))


def _request(model: Model, data: Data | Values | None, seed: int) -> Request:
    if not isinstance(model, Model):
        raise CodebookError(f"expected a model of ct.load or ct.wrap, not a {type(model).__name__}")
    of = data if isinstance(data, Data) else Data(data)
    train, test = of.paths
    asked = {**of.options, "metrics": parse_metrics(of.metrics), "seed": seed}
    return replace(model.request, data=train, test_data=test, typed=True, **asked)  # typed: no training on the sample


def _warned(result: _Result) -> _Result:
    for text in result.warnings:
        warnings.warn(text, CodebookWarning, stacklevel=3)
    return result


def _paths(paths: PathLike | Sequence[PathLike]) -> tuple[Path, ...]:
    return (Path(paths),) if isinstance(paths, str | Path) else tuple(map(Path, paths))
