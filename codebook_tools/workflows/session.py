"""From a request to a model on its device, and its data by split."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial

from codebook_tools.data.arrays import Arrays, first_items
from codebook_tools.data.channels import MIX
from codebook_tools.data.dataset import Media
from codebook_tools.data.groups import grouped, read_groups
from codebook_tools.data.hub import stated
from codebook_tools.data.images import SAMPLE
from codebook_tools.data.items import InMemory, Item, find_items
from codebook_tools.data.modality import AS_IT_IS, Modality
from codebook_tools.data.splits import Splits, limited, split
from codebook_tools.errors import CodebookError
from codebook_tools.evaluation.choose_modality import choose_latent_axis, choose_modality
from codebook_tools.evaluation.measure import find_input_range, range_errors
from codebook_tools.evaluation.quoted.figure import open_figures, weights_by_name
from codebook_tools.models.evidence import uninitialized, untrained
from codebook_tools.models.load import load_model
from codebook_tools.models.model import Model
from codebook_tools.models.registry import CUSTOM
from codebook_tools.models.settling import settle
from codebook_tools.models.sizes import size_warning
from codebook_tools.models.twins import twin_warning
from codebook_tools.models.user_network import name_of
from codebook_tools.runtime import distributed
from codebook_tools.runtime.devices import RUN_AHEAD, device_of
from codebook_tools.runtime.progress import Watch
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.target import Opened as Opened

UNSEEN = "no --data: the calibration data are two photographs that the model may never have seen"
"""What is said of a user's model that is looked at with the bundled sample."""


def open_request(request: Request, watch: Watch, *, measuring: bool = False, whole: bool = False) -> Opened:
    """Read model and data, and find channels, stride and input range.

    Args:
        request: The model and its data.
        watch: Progress and seconds by phase.
        measuring: Whether the test split alone is needed, so that explicit test data are enough.
        whole: Whether no test or validation split is taken from the data: all are calibration data.

    Returns:
        Model and data; with several processes, each passes over its part of both splits.

    Raises:
        CodebookError: Something cannot be read, or does not fit.
    """
    with watch.phase("load"):
        checkpoint, model = request.checkpoint, open_network(request)
        model.modality, of_modality = choose_modality(
            model,
            request.data or request.test_data,
            request.modality,
            of_images=request.size is not None or request.input_range is not None or request.crop == "none",
        )
        model.latent_axis = request.latent_axis
        model.input_range = model.modality.input_ranges[0]
        modality = model.modality.of(model.network, request.size, request.crop)
        quoted = open_figures(request.metrics or {}, modality, model.device, request.seed)
        splits = _splits(request, modality, watch, measuring, whole)
        items = splits.calibration or splits.test
        modality = modality.probed(items, model.encode, request.skip_bad)
        if isinstance(modality, Arrays):
            model.latent_axis = choose_latent_axis(model, first_items(items, modality, request.skip_bad)[1])
        model.compiled = request.compiled
        runs_ahead = model.device.type in RUN_AHEAD
        workers = (_helpful_workers() if runs_ahead else 0) if request.workers is None else request.workers
        calibration, test = (
            Media(
                items,
                modality,
                request.skip_bad,
                watch,
                distributed.part(),
                workers=workers,
                pinned=runs_ahead,
                mixing=request.channels or (None if paths else MIX),  # the sample is in whatever channels are asked for
            )
            for items, paths in (
                (splits.calibration, request.data),
                (splits.test, request.test_data or request.data),
            )
        )
    opened = Opened(
        request=request,
        model=model,
        splits=splits,
        calibration=calibration,
        test=test,
        quoted=quoted,
        warnings=[*model.caveats, *checkpoint.warnings, *of_modality],
    )
    if model.carried:
        few = ", ".join(model.carried[:3]) + (", ..." if len(model.carried) > 3 else "")
        opened.warnings.append(f"{len(model.carried)} tensors unknown to the network are carried over unchanged: {few}")
    if splits.calibration and not (request.data or request.knows_sample):
        opened.warnings.append(UNSEEN)
    if modality.pictures and request.size is not None:
        opened.warnings += size_warning(checkpoint, model.family, request.size)
    with watch.phase("measure"):
        _choose_input_range(request, opened)
        asks = model.family == CUSTOM
        more, opened.agreed = settle(model, opened.few if asks else [], request.metric)
    opened.warnings += uninitialized(checkpoint, opened.codebooks)
    opened.warnings += [twin_warning(book.places, "") for book in opened.codebooks if book.also]
    opened.warnings += more
    opened.settings |= {
        "data": [stated(str(one)) for one in request.data] or ([SAMPLE] if splits.calibration else []),
        "test_data": [stated(str(one)) for one in request.test_data],
        "group": str(request.group) if request.group else None,
        "modality": model.modality.name,
        "latent_axis": request.latent_axis,
        "images": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        **{name: getattr(request, name) for name in ("limit", "crop", "channels", "skip_bad")},
        "size": list(request.size) if isinstance(request.size, tuple) else request.size,
        "network": name_of(request.network) if request.network else None,
        "input_range": None if model.modality is Arrays else list(model.input_range),
        "device": str(model.device),
        "precision": request.precision,
        **({"metrics": weights_by_name(quoted)} if quoted else {}),
    }
    return opened


def open_network(request: Request) -> Model:
    """The model of a request on its device, without data.

    Raises:
        CodebookError: It cannot be read, has no known layout, or does not fit its network.
    """
    checkpoint = request.checkpoint
    model = load_model(
        checkpoint,
        network=request.wrapped or request.network,
        family=request.family,
        codebook_keys=request.codebook_key,
        metric=request.metric,
        device=device_of(request.device),
        bf16=request.precision == "bf16",
    )
    if request.wrapped:
        model.build = partial(request.wrapped.built, [book.stored for book in model.books], checkpoint)
    return model


def _helpful_workers() -> int:
    """The share of the cores of each process that torchrun started here, and no more than keep a GPU busy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _splits(request: Request, modality: Modality, watch: Watch, measuring: bool, whole: bool) -> Splits:
    """The items that the user names, or the sample, by what they may influence."""

    def listed(paths: Sequence[str | InMemory]) -> Sequence[Item]:
        return find_items(paths, modality, watch, request.limit)

    test = limited(listed(request.test_data), request.limit, request.seed) if request.test_data else None
    if measuring and test and not request.data:
        return Splits([], [], test)
    data = listed(request.data) if request.data else modality.sample()
    if request.group is not None:
        data = grouped(data, read_groups(request.group))
    few = limited(data, request.limit, request.seed)
    if whole:
        return Splits(few, [], [])
    return split(few, test, many=modality.many, has_more=len(few) < len(data))


def _choose_input_range(request: Request, opened: Opened) -> None:
    """Take the range of the request, or the one in which a few calibration items are reconstructed best."""
    model = opened.model
    if len(model.modality.input_ranges) == 1:
        if request.input_range is not None and model.modality is Arrays:
            raise CodebookError("--input-range is of images; arrays go to the network as they are")
        return
    typed = request.input_range or (AS_IT_IS if request.wrapped else None)
    if typed is not None:
        low, high = typed
        if not low < high:
            raise CodebookError(f"--input-range {low},{high}: the first number must be the smaller one")
        model.input_range = low, high
        opened.warnings += _better_range(opened)
        return
    errors = find_input_range(model, opened.calibration if len(opened.calibration) else opened.test)
    best, second, *_ = sorted(errors, key=lambda bounds: errors[bounds])
    model.input_range = best
    if errors[second] <= 1.1 * errors[best]:
        opened.warnings.append(
            f"input range {_shown(best)} was chosen (mse {errors[best]:.4g}), but {_shown(second)} is close "
            f"({errors[second]:.4g}); set --input-range to decide"
        )


def open_shown(request: Request, watch: Watch) -> Opened:
    """A model whose latents are shown by parts of the data. Raises CodebookError where it cannot be opened."""
    opened = open_request(request, watch)
    opened.warnings += untrained(opened.model.checkpoint, opened.codebooks)
    return opened


def _better_range(opened: Opened) -> list[str]:
    """A warning where a few images come back much better in another range than the one that was typed."""
    model, media = opened.model, opened.calibration if len(opened.calibration) else opened.test
    few = media.subset(limited(media.items, _COMPARED, seed=0))  # neighbors in name are often alike
    _, pixels = few.load(few.items)
    if not len(pixels):
        return []
    own = model.input_range
    errors = range_errors(model, pixels, [own, *model.modality.input_ranges])
    best = min(errors, key=lambda bounds: errors[bounds], default=own)
    if own not in errors or errors[own] <= _MUCH_WORSE * errors[best]:
        return []
    return [
        f"--input-range {own[0]:g},{own[1]:g}: images come back with mse {errors[own]:.4g} in it, and with "
        f"{errors[best]:.4g} in {_shown(best)}; is it --input-range={best[0]:g},{best[1]:g}?"
    ]


_COMPARED = 8  # images: ranges that fit differ by more than chance among so few
_MUCH_WORSE = 5  # times: a range that fits no image, and not merely less


def _shown(bounds: tuple[float, float]) -> str:
    return f"[{bounds[0]:g}, {bounds[1]:g}]"
