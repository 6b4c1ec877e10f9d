"""From a file to a model that runs: which family it is, its network, its weights, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from codebook_tools.checkpoints.config import Config
from codebook_tools.checkpoints.detect import Detection, FoundCodebook, find_codebooks
from codebook_tools.checkpoints.reading import Checkpoint
from codebook_tools.codebook import Emit, Lookup
from codebook_tools.errors import CodebookError
from codebook_tools.models import diffusers_vqmodel, zalando
from codebook_tools.models.companions import flags
from codebook_tools.models.custom import make_network
from codebook_tools.models.model import Model

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """How to recognise a layout and make its network.

    prefix: what stands before its own key names, None where tensors or config are another layout's. make: a network
    with fresh weights, from the shapes without that prefix and, where the family has one, from the config. file_key:
    the file's key, without prefix, of what the network calls a name. config_key: the config's entry that is K, None
    for a family that knows no config. caveat: what to warn of, by the config.
    """

    prefix: Callable[[Checkpoint], str | None]
    make: Callable[[Shapes, Checkpoint], nn.Module]
    file_key: Callable[[str, Shapes], str]
    lookup: Lookup = Lookup.EUCLIDEAN
    emit: Emit = Emit.RAW
    config_key: str | None = None
    caveat: Callable[[Config], str | None] = lambda config: None


FAMILIES = {
    "zalando": Family(
        prefix=lambda checkpoint: zalando.prefix_of(checkpoint.shapes),
        make=lambda shapes, _: zalando.ZalandoVQVAE(shapes),
        file_key=zalando.file_key,
    ),
    "diffusers-vqmodel": Family(
        prefix=diffusers_vqmodel.prefix_of,
        make=diffusers_vqmodel.make,
        file_key=diffusers_vqmodel.file_key,
        config_key=diffusers_vqmodel.CONFIG_KEY,
        caveat=diffusers_vqmodel.caveat,
    ),
}
CUSTOM = "custom"

METRICS = {
    "euclidean": (Lookup.EUCLIDEAN, Emit.RAW),
    "cosine": (Lookup.COSINE, Emit.RAW),
    "cosine-unit": (Lookup.COSINE, Emit.UNIT),
    "dot": (Lookup.DOT, Emit.RAW),
}


def family_of(checkpoint: Checkpoint) -> str | None:
    """The first family that recognises tensors and config."""
    return next((name for name, family in FAMILIES.items() if family.prefix(checkpoint) is not None), None)


def config_key_of(checkpoint: Checkpoint) -> str | None:
    """The entry that is K, of the config that the checkpoint goes with; None where there is none that we know of."""
    name = family_of(checkpoint)
    return FAMILIES[name].config_key if name and checkpoint.config_path else None


def choose_codebook(checkpoint: Checkpoint, key: str | None) -> FoundCodebook:
    """The one codebook to work on. Raises CodebookError, with the candidates, where that is not plain."""
    detection = find_codebooks(checkpoint.shapes, checkpoint.dtypes)
    keys = [found.key for found in detection.codebooks]
    if key is not None:
        return _named(checkpoint, detection, key)
    if not keys:
        raise CodebookError(f"{checkpoint.path} has no codebook: {detection.reason}")
    if len(keys) > 1:
        raise CodebookError(
            f"{checkpoint.path} has {len(keys)} codebooks: {', '.join(keys)}; choose with --codebook-key"
        )
    found = detection.codebooks[0]
    if found.confidence == "low":
        raise CodebookError(f"{found.key} is only perhaps a codebook; if it is, say so with --codebook-key {found.key}")
    return _operable(found)


def _operable(found: FoundCodebook) -> FoundCodebook:
    if found.heads > 1 or found.search == "logits":
        kind = "chosen by logits" if found.search == "logits" else f"of {found.heads} heads"
        raise CodebookError(f"{found.key} is a codebook {kind}: it can be inspected, not operated on")
    return found


def lookup_of(family: str | None, metric: str | None) -> tuple[Lookup, Emit]:
    """How codes are found and emitted: as told, else as the family does, else by Euclidean distance."""
    if metric is None and family in FAMILIES:
        return FAMILIES[family].lookup, FAMILIES[family].emit
    return METRICS[metric or "euclidean"]


def _named(checkpoint: Checkpoint, detection: Detection, key: str) -> FoundCodebook:
    for found in detection.codebooks:
        if found.key == key:
            return _operable(found)
    entry = checkpoint.entries.get(key)
    candidates = ", ".join(found.key for found in detection.codebooks) or "none"
    if entry is None:
        raise CodebookError(f"--codebook-key {key}: no such tensor in {checkpoint.path}; the candidates: {candidates}")
    if len(entry.shape) != 2 or entry.dtype not in ("F64", "F32", "F16", "BF16"):
        raise CodebookError(
            f"--codebook-key {key}: {entry.dtype} {entry.shape} is no matrix of codes; the candidates: {candidates}"
        )
    return FoundCodebook(key, entry.shape[0], entry.shape[1], 0, 1, entry.dtype, "unknown", (), "high")


def load_model(
    checkpoint: Checkpoint,
    *,
    network: str | None = None,
    family: str | None = None,
    codebook_key: str | None = None,
    metric: str | None = None,
    device: torch.device | None = None,
    bf16: bool = False,
) -> Model:
    """The model of a file, in float32 and evaluation mode. Raises CodebookError where file and network do not fit.

    network: "FILE.py:FUNCTION", the user's own. family: a name of FAMILIES, where recognition is to be overruled.
    """
    if family is not None and family not in (*FAMILIES, CUSTOM):
        raise CodebookError(f"no family {family!r}; there are {', '.join((*FAMILIES, CUSTOM))}")
    found = choose_codebook(checkpoint, codebook_key)
    shapes = checkpoint.shapes
    caveat = None
    if network is not None:
        name, remake = CUSTOM, partial(make_network, network, found.size)
        module = remake()
        keys = {name: name for name in module.state_dict()}
    else:
        known = family if family != CUSTOM else None
        name = known or family_of(checkpoint) or ""
        if not name:
            described = f" and {checkpoint.config_path.name}" if checkpoint.config_path else ""
            raise CodebookError(
                f"no network is known for the layout of {checkpoint.path}{described} (codebook {found.key}, "
                f"{found.size}x{found.dim}); "
                "give yours with --network FILE.py:FUNCTION"
            )
        record = FAMILIES[name]
        prefix = record.prefix(checkpoint)
        if prefix is None:
            raise CodebookError(f"{checkpoint.path} does not have the layout of family {name}")
        inner = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        remake = partial(record.make, inner, checkpoint)
        module = remake()
        keys = {name: prefix + record.file_key(name, inner) for name in module.state_dict()}
        if record.config_key is not None and checkpoint.config is not None:
            caveat = record.caveat(checkpoint.config)
    if found.key not in keys.values():
        raise CodebookError(f"the network has no {found.key}: its codebook must have the file's name for it")
    _load_weights(module, keys, checkpoint)
    target = device or torch.device("cpu")
    module.to(target).eval().requires_grad_(False)
    known_keys = {*keys.values(), *found.companions, *flags(found.key, shapes)}
    lookup, emit = lookup_of(name, metric)
    return Model(
        name,
        checkpoint,
        module,
        keys,
        found,
        remake,
        lookup,
        emit,
        target,
        bf16,
        carried=tuple(key for key in shapes if key not in known_keys),
        caveats=(caveat,) if caveat else (),
    )


def _load_weights(network: nn.Module, keys: Mapping[str, str], checkpoint: Checkpoint) -> None:
    wanted = {keys[name]: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    missing = [key for key in wanted if key not in checkpoint.entries]
    if missing:
        unknown = [key for key in checkpoint.entries if key not in wanted]
        also = f"; the file has, unknown to it, {_few(unknown)}" if unknown else ""
        raise CodebookError(f"the network wants {_few(missing)}, which {checkpoint.path} lacks{also}")
    unlike = [
        f"{key} is {checkpoint.entries[key].shape} in the file, {shape} in the network"
        for key, shape in wanted.items()
        if checkpoint.entries[key].shape != shape
    ]
    if unlike:
        raise CodebookError(f"shapes differ: {_few(unlike)}")
    stored = checkpoint.tensors()
    for key in wanted:  # what the network does not know is carried over, whatever it holds
        if stored[key].is_floating_point() and not bool(torch.isfinite(stored[key].float()).all()):
            raise CodebookError(f"{key} in {checkpoint.path} is not finite: {_first_bad(stored[key])}")
    network.float()
    network.load_state_dict({name: stored[key] for name, key in keys.items()})
    _tie(network, {name: stored[key] for name, key in keys.items()})


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _first_bad(tensor: Tensor) -> str:
    index = tuple(int(i) for i in (~torch.isfinite(tensor.float())).nonzero()[0])
    return f"{float(tensor[index])} at {list(index)}"


def _tie(network: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """One layer used many times stands under many keys: make modules whose tensors have the same bytes one again.

    Only where some tensor of the module is not constant: fresh biases and norms are alike without being one.
    """
    first: dict[object, nn.Module] = {}
    for prefix, module in network.named_modules():
        own = {leaf: stored[f"{prefix}.{leaf}".lstrip(".")] for leaf, _ in module.named_parameters(recurse=False)}
        if not any(tensor.numel() > 1 and bool((tensor != tensor.flatten()[0]).any()) for tensor in own.values()):
            continue
        signature = (
            type(module),
            tuple((leaf, tuple(t.shape), t.float().numpy().tobytes()) for leaf, t in own.items()),
        )
        twin = first.setdefault(signature, module)
        for leaf in own:
            setattr(module, leaf, getattr(twin, leaf))
