"""Wirings from seeds: what kinds there are, how often each is drawn, under which names, and the numbers of a module."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.nn.functional import normalize, unfold
from wired_modules import PATCH, Wired, build, tensor_at
from wiring import Average, Step, Wiring

SIDE = 16
"""Of the images, in pixels: 16 latents each."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

PREFIXES = ("", "", "", "model.", "module.", "net.vq.", "state.generator.", "autoencoder.", "_orig_mod.")
SINGLE = (
    "quantizer", "vq", "quant", "codebook", "bottleneck.vq", "vector_quantizer", "_vq_vae", "quantizer._codebook",
    "vq.layers.0", "tokenizer.vq", "rvq.levels.0", "quantize", "vq_layer", "latent.quantizer",
)  # fmt: skip
SEVERAL = (
    "rvq.levels", "quantizer.layers", "vq.quantizers", "residual_vq.layers", "quantizers", "bottleneck.vq",
    "rq.codebooks", "vqs", "quantize.layers", "rvq.stages",
)  # fmt: skip
LEAVES = {
    "embedding": (
        "embedding.weight", "codebook.weight", "_embedding.weight", "embed.weight", "codes.weight", "emb.weight",
    ),
    "rows": ("codebook", "embed", "embedding", "embeddings", "codes", "codewords", "_codebook", "e"),
    "columns": ("embed", "embedding", "codebook", "embeddings", "_w"),
    "batched": ("embed", "codebook", "embeddings"),
}  # fmt: skip
ENCODERS = (("encoder", "decoder"), ("enc", "dec"), ("_encoder", "_decoder"), ("down", "up"), ("analysis", "synthesis"))

SPELLINGS = (
    ("_ema_cluster_size", "_ema_w"), ("ema_cluster_size", "ema_w"), ("cluster_size", "embed_avg"),
    ("cluster_size_ema", "embed_ema"), ("N", "z_avg"), ("N_i_ts", "m_i_ts"), ("ema_count", "ema_sum"),
    ("ema_count", "ema_weight"), ("ema_cluster_size", "ema_dw"), ("cluster_size", "cluster_sum"),
    ("code_count", "code_sum"), ("running_size", "running_sum"), ("k_elem", "k_sum"), ("cluster_usage", "embed_sum"),
    ("ema_cluster_size", "ema_embed"), ("ema_cluster_size.hidden", "ema_dw.hidden"), ("usage", "embedding_sum"),
    ("ema_num", "ema_vec"), ("hits", "totals"), ("running_count", "running_codes"), ("_cluster_size", "_embed_avg"),
    ("ema_cluster_size", "embedding_avg"), ("code_usage", "code_avg"), ("ema_counts", "ema_sums"),
)  # fmt: skip
"""Names of running counts and sums in public code, those of well-known code first."""

_FAMOUS = 15
"""Of these so many tell what they are without their numbers, which may then be stale."""

INVENTED = (("q7", "x_bar"), ("tally", "heap"), ("aa", "bb"), ("mass", "moment"), ("zeta0", "zeta1"), ("u", "v"))
"""Names that say nothing: the numbers alone tell what these are."""

LAYERS = ("embedding_proj", "proj", "project_codes", "mix", "transform", "w_out", "linear", "fc", "codebook_transform")
MATRICES = ("basis", "transform", "mat", "rotation", "proj_w", "W", "mixing")
SCALES = ("scale", "gain", "gamma", "code_scale", "alpha", "s", "stretch")
SHIFTS = ("shift", "offset", "beta", "code_bias", "mu", "origin", "b")
UNKNOWN = {
    "matrix": ("lens", "warp", "turn", "omega", "kernel9"),
    "scale": ("lens", "psi", "stretching", "zoom"),
    "shift": ("lens", "drift", "psi2", "slide"),
    "counts": ("zeta", "kappa", "aux7", "omega3", "lattice"),
    "rows": ("zeta", "kappa", "aux7", "omega3", "lattice"),
}
"""Names of what nobody can know, by what it is."""

STRATEGIES = ("refit", "prune", "quantize", "restart", "grow")


def wiring_of(seed: int) -> Wiring:
    """The wiring that a seed stands for."""
    chance = random.Random(seed)
    unknown = chance.choice(list(UNKNOWN)) if chance.random() < 0.05 else ""
    detached = chance.random() < (0.2 if unknown else 0.12)
    groups = _groups(chance, detached, bool(unknown))
    dim, size = chance.randint(4, 8), chance.randint(16, 48)
    above = not unknown and chance.random() < 0.3
    steps = _steps(chance, unknown, detached, above)
    kinds = [step.kind for step in steps]
    cosine = kinds[-1:] == ["unit"] or ("unit" not in kinds and not unknown and chance.random() < 0.14)
    average = _average(chance, kinds, unknown)
    padded = bool(average and average.state == "consistent" and average.counts in PADDED and chance.random() < 0.55)
    layout, storage = _storage(chance, padded)
    if average and padded:
        average = Average(**{**vars(average), "shape": "k", "turned": False})
    transformed = bool({"project", "scale", "shift"} & set(kinds)) and not unknown
    quantizes = not unknown and not detached and (transformed or chance.random() < 0.5)
    metric = {(1, 1): "cosine-unit", (1, 0): "cosine", (0, 0): "euclidean"}.get((cosine, kinds[-1:] == ["unit"]))
    if chance.random() < 0.5 and (quantizes or not cosine):
        metric = None
    if len(kinds) > 1 and "unit" in kinds and kinds[-1] != "unit":
        metric = None
    strategy = chance.choice(STRATEGIES)
    return Wiring(
        seed=seed,
        dim=dim,
        size=size,
        groups=groups,
        paths=_paths(chance, groups, quantizes),
        leaf=chance.choice(LEAVES["embedding" if storage == "embedding" else layout]),
        storage=storage,
        layout=layout,
        padded=padded,
        steps=steps,
        cosine=cosine,
        average=average,
        unknown=unknown,
        companion=chance.choice(UNKNOWN[unknown]) if unknown in ("counts", "rows") else "",
        dtype=chance.choice(("float32", "float32", "float16", "bfloat16")),
        prefix=chance.choice(PREFIXES),
        encoder=(coder := chance.choice(ENCODERS))[0],
        decoder=coder[1],
        bounded=chance.random() < 0.4,
        walks=len(groups) > 1 or chance.random() < 0.2,
        quantizes=quantizes,
        straight=chance.random() < 0.5,
        detached=detached,
        metric=metric,
        strategy=strategy,
        options=_options(chance, strategy, size),
        steps_of_training=0 if detached or chance.random() < 0.5 else 5,
    )


PADDED = ("_ema_cluster_size", "ema_cluster_size", "cluster_size", "cluster_size_ema", "_cluster_size", "cluster_usage")
"""Names of counts that tell how many of the stored rows are codes."""


def _groups(chance: random.Random, detached: bool, unknown: bool) -> tuple[int, ...]:
    stages = 1 if unknown else chance.choices((1, 2, 3, 4), (8, 5, 4, 3))[0]
    if detached:  # of one codebook; where it has several stages, they share it
        return (0,) * (1 if chance.random() < 0.6 else stages)
    if stages == 1 or chance.random() < 0.62:
        return tuple(range(stages))
    if stages == 2 or chance.random() < 0.6:
        return (0,) * stages
    pair = sorted(chance.sample(range(stages), 2))  # the two stages that share
    numbers = dict[int, int]()
    return tuple(numbers.setdefault(pair[0] if stage in pair else stage, len(numbers)) for stage in range(stages))


def _paths(chance: random.Random, groups: tuple[int, ...], quantizes: bool) -> tuple[str, ...]:
    names = [name for name in (SINGLE if len(groups) == 1 else SEVERAL) if not quantizes or "quantize" not in
             name.split(".")]  # fmt: skip
    outer = chance.choice(names)
    if len(groups) == 1:
        return (outer,)
    inner = chance.choice(("", "", "._codebook"))
    several = chance.random() < 0.7  # a shared codebook stands in the file once for every stage; else once
    return tuple(f"{outer}.{stage if several else group}{inner}" for stage, group in enumerate(groups))


def _steps(chance: random.Random, unknown: str, detached: bool, above: bool) -> tuple[Step, ...]:
    if unknown in ("matrix", "scale", "shift"):
        name = chance.choice(UNKNOWN[unknown])
        kind = "project" if unknown == "matrix" else unknown
        return (Step(kind, name, layer=unknown == "matrix" and chance.random() < 0.5),)
    if unknown:
        return ()
    if detached:
        return (Step("unit"),) if chance.random() < 0.25 else ()
    kinds = chance.choices(
        [(), ("project",), ("scale",), ("shift",), ("project", "scale"), ("project", "shift"), ("scale", "shift"),
         ("unit",), ("unit", "scale"), ("project", "unit")],
        [40, 13, 9, 8, 2, 2, 5, 12, 2, 2],
    )[0]  # fmt: skip
    steps, taken = list[Step](), set[str]()
    for kind in kinds:
        layer = kind == "project" and chance.random() < 0.6
        pool = {"project": LAYERS if layer else MATRICES, "scale": SCALES, "shift": SHIFTS, "unit": ("",)}[kind]
        name = chance.choice([name for name in pool if name not in taken])
        taken.add(name)
        scalar = kind == "scale" and ("unit" in kinds or chance.random() < 0.4)
        steps.append(Step(kind, name, above and kind != "unit", layer, layer and chance.random() < 0.5, scalar))
    return tuple(steps)


def _average(chance: random.Random, kinds: list[str], unknown: str) -> Average | None:
    if chance.random() >= 0.62 or "project" in kinds or unknown in ("matrix", "scale", "shift"):
        return None
    known = chance.random() < 0.8
    state = chance.choices(("consistent", "zero", "stale"), (86, 7, 7))[0] if known else "consistent"
    counts, sums = chance.choice(INVENTED if not known else SPELLINGS if state == "consistent" else SPELLINGS[:_FAMOUS])
    return Average(
        counts,
        sums,
        shape=chance.choice(("k", "k", "k", "1k", "k1")),
        turned=chance.random() < 0.2,
        smoothed=chance.random() < 0.5,
        decay=chance.choice((0.99, 0.9)),
        trainable=chance.random() < 0.2,
        state=state,
    )


def _storage(chance: random.Random, padded: bool) -> tuple[str, str]:
    """Layout and storage of the codebook."""
    layout = "rows" if padded else chance.choices(("rows", "columns", "batched"), (72, 16, 12))[0]
    kinds = ("embedding", "embedding", "parameter", "buffer") if layout == "rows" else ("parameter", "buffer")
    return layout, chance.choice(kinds)


def _options(chance: random.Random, strategy: str, size: int) -> dict[str, object]:
    fewer = chance.randint(size // 3, size)
    if strategy == "refit":
        return {"k": fewer}
    if strategy == "prune":
        return {"keep": fewer} if chance.random() < 0.5 else {"threshold": 0}
    if strategy == "quantize":
        return {"k": fewer, "method": chance.choice(("kmeans", "pnn"))}
    if strategy == "restart":
        return {"method": chance.choice(("error", "random", "split", "nearest"))}
    return {"k": size + chance.randint(1, 8)}


def kinds_of(wiring: Wiring) -> list[str]:
    """The kinds of wiring that a module is counted among."""
    steps = {step.kind for step in wiring.steps}
    names = {"project": "projected", "scale": "scaled", "shift": "shifted", "unit": "normalized"}
    stages = len(wiring.groups)
    return [
        f"{stages} stage{'s' if stages > 1 else ''}",
        *(["shared"] if wiring.books < stages else []),
        *(name for kind, name in names.items() if kind in steps),
        *(["transposed"] if wiring.layout == "columns" else []),
        *(["batched"] if wiring.layout == "batched" else []),
        *(["padded"] if wiring.padded else []),
        ("cosine" if wiring.cosine and "unit" not in steps else "euclidean" if "unit" not in steps else "unit lookup"),
        "EMA" if wiring.average else "plain",
        *(["EMA by numbers alone"] if wiring.average and (wiring.average.counts, wiring.average.sums) in INVENTED
          else []),
        wiring.dtype,
        wiring.strategy,
        f"{wiring.steps_of_training} steps",
        *(["file only"] if wiring.detached else []),
        "with quantize" if wiring.quantizes else "without quantize",
    ]  # fmt: skip


# The numbers of a module


def pictures(seed: int, count: int) -> Tensor:
    """(count, 16, 16) uint8, patches around a dozen prototypes: latents that gather in clusters."""
    drawn = torch.Generator().manual_seed(0)
    prototypes = 0.15 + 0.7 * torch.rand(12, PATCH, PATCH, generator=drawn)
    drawn.manual_seed(seed)
    across = SIDE // PATCH
    chosen = prototypes[torch.randint(12, (count, across, across), generator=drawn)]
    patches = chosen + 0.06 * torch.randn(chosen.shape, generator=drawn)
    whole = patches.transpose(2, 3).reshape(count, SIDE, SIDE)
    return (255 * whole.clamp(0, 1)).round().byte()


@torch.no_grad()
def state_of(wiring: Wiring, images: Tensor) -> dict[str, Tensor]:
    """The file of a wiring, by key, as a training that collapsed leaves it.

    Args:
        wiring: Of the module.
        images: (n, 1, 16, 16) in [0, 1], what it was trained on.
    """
    drawn = torch.Generator().manual_seed(wiring.seed)
    with torch.random.fork_rng():
        torch.manual_seed(wiring.seed)
        module = build(wiring, wiring.size)
    _set_coders(module, images, drawn)
    _set_steps(module, drawn)
    latents = module.encode(images)
    rest, shared = latents.movedim(1, -1).flatten(0, -2), set[int]()
    hits = torch.zeros(wiring.books, wiring.size)
    for group in wiring.groups:
        if group not in shared:
            _set_codes(module, group, rest, drawn)
        shared.add(group)
        codes, vectors = module.assign(rest, group)
        hits[group] += torch.bincount(codes, minlength=wiring.size)
        rest = rest - vectors
    dtype = DTYPES[wiring.dtype]
    for group in range(wiring.books):
        if wiring.average is not None:
            _set_average(module, group, hits[group], dtype, drawn)
        if wiring.companion:
            companion = module.tensor(group, wiring.companion)
            companion.copy_(torch.randn(companion.shape, generator=drawn))
    return {wiring.prefix + name: tensor.to(dtype).clone() for name, tensor in module.state_dict().items()}


def _set_coders(module: Wired, images: Tensor, drawn: torch.Generator) -> None:
    """An encoder of random orthogonal filters about the mean patch, and a decoder that undoes it."""
    wiring = module.wiring
    patches = unfold(images, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    filters = torch.linalg.qr(torch.randn(PATCH**2, wiring.dim, generator=drawn))[0].T
    gain = 0.7 / float(((patches - mean) @ filters.T).std())
    encoder, decoder = (module.get_submodule(name) for name in (wiring.encoder, wiring.decoder))
    tensor_at(encoder, "weight").copy_((gain * filters).reshape(wiring.dim, 1, PATCH, PATCH))
    tensor_at(encoder, "bias").copy_(-gain * filters @ mean)
    tensor_at(decoder, "weight").copy_((filters / gain).reshape(wiring.dim, 1, PATCH, PATCH))
    tensor_at(decoder, "bias").fill_(float(mean.mean()))


def _set_steps(module: Wired, drawn: torch.Generator) -> None:
    """Well-conditioned projections, scales and shifts, none of them near the identity."""
    wiring = module.wiring
    names = {wiring.step_path(step, stage): step for step in wiring.steps for stage in range(len(wiring.groups))}
    for name, step in names.items():
        if step.kind == "project":
            turn = torch.linalg.qr(torch.randn(wiring.dim, wiring.dim, generator=drawn))[0]
            stretch = 0.6 + torch.rand(wiring.dim, generator=drawn)
            tensor_at(module, f"{name}.weight" if step.layer else name).copy_(turn * stretch)
            if step.bias:
                bias = tensor_at(module, f"{name}.bias")
                bias.copy_(0.3 * torch.randn(bias.shape, generator=drawn))
        elif step.kind == "scale":
            held = tensor_at(module, name)
            held.copy_(torch.empty(held.shape).uniform_(0.4, 0.8, generator=drawn))
            held.copy_(torch.where(torch.rand(held.shape, generator=drawn) < 0.5, held, 1 / held))
        elif step.kind == "shift":
            held = tensor_at(module, name)
            held.copy_(0.5 * torch.randn(held.shape, generator=drawn))


def _set_codes(module: Wired, group: int, latents: Tensor, drawn: torch.Generator) -> None:
    """A collapsed codebook: some codes among the latents (n, dim), the others where none is."""
    wiring = module.wiring
    living = int(wiring.size * (0.3 + 0.4 * float(torch.rand((), generator=drawn))))
    codes = latents[torch.randperm(len(latents), generator=drawn)[: wiring.size]].clone()
    if wiring.groups.count(group) > 1:
        codes[1:living:2] *= 0.3  # for the stages that follow
    away = torch.randn(wiring.size - living, wiring.dim, generator=drawn)
    codes[living:] = 15 * float(latents.norm(dim=1).mean()) * normalize(away, dim=-1)
    if wiring.cosine:  # what is far is not dead there, but what lies close to another code is nearly so
        near = torch.randint(living, (wiring.size - living,), generator=drawn)
        codes[living:] = codes[near] + 0.02 * codes[near].norm(dim=1, keepdim=True) * away
    codes = codes[torch.randperm(wiring.size, generator=drawn)]
    rows = module.rows_of(codes, group)
    if wiring.unit_codes and wiring.average is None:  # stored at any length
        rows = rows * (0.5 + 1.5 * torch.rand(wiring.size, 1, generator=drawn))
    module.rows(group).copy_(rows)


def _set_average(module: Wired, group: int, hits: Tensor, dtype: torch.dtype, drawn: torch.Generator) -> None:
    """Counts about as high as hits (K,), and sums that go with them."""
    wiring, average = module.wiring, module.wiring.average
    assert average is not None
    rows, counts, sums = module.rows(group), module.counts(group), module.sums(group)
    rows.copy_(rows.to(dtype))
    if average.state == "zero":
        sums.copy_(rows)
        return
    noise = 0.8 + 0.4 * torch.rand(hits.shape, generator=drawn)
    dead = 0.2 * torch.rand(hits.shape, generator=drawn)
    counts.copy_(torch.where(hits > 0, (hits * noise).clamp(min=1.5), dead).to(dtype))
    means = rows * (0.75 + 0.2 * torch.rand(len(rows), 1, generator=drawn)) if wiring.unit_codes else rows
    if average.state == "stale":
        means = means.roll(1, 0) + torch.randn(rows.shape, generator=drawn)
    sums.copy_(means * module.divisors(counts)[:, None])
