"""Which tensors of a state dict are codebooks, told from names, shapes and dtypes: no tensor is opened.

A tensor earns points for its name, its owner and what lies beside it; no family has a rule of its own.
Source: the survey of about 70 public layouts in the project's design notes.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

Shape = tuple[int, ...]
LISTED, SURE = 4, 5  # points from which a tensor is listed, and from which it needs no --codebook-key


@dataclass(frozen=True)
class FoundCodebook:
    """`size` codes of `dim` numbers, along `axis` of the tensor `key`; a padding row (RQ-VAE) does not count.

    heads: the axis of a 3-D tensor that is neither codes nor dim (the first, save in fairseq's (K, h, D)), else 1.
    dtype: as safetensors names it; "F32" where no dtypes were given.
    search: "euclidean" unless something speaks against it (IBQ and TiTok look the same: let the user say), "unknown" where
        such names come with several metrics, a learned projection makes the codes, or confidence is "low".
    companions: sorted keys of the owning module's tensors with an axis of length size, and EMA shadows of all these.
    """

    key: str
    size: int
    dim: int
    axis: int
    heads: int
    dtype: str
    search: str
    companions: tuple[str, ...]
    confidence: str


@dataclass(frozen=True)
class Detection:
    """Codebooks, and (key, shape) of other tensors with a dimension of K, K+1 or K+2, both in natural order."""

    codebooks: tuple[FoundCodebook, ...]
    elsewhere: tuple[tuple[str, Shape], ...]
    reason: str | None


def _re(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


LEAVES = (  # the first that matches the whole leaf counts
    (_re(r"(\w+_)?code_?(book|vector|word)s?(_(t|b|top|bottom|weights?))?"), 5),
    (_re(r"(vector_?)?quanti[sz]\w*|r?vq(_?layers?)?"), 4),
    (_re(r"embed_codes?|(code(book)?|vq|quant\w*)_?emb(ed(ding)?)?s?"), 3),
    (_re(r"emb(ed(ding)?)?s?(_(vq\w*|t|b|top|bottom))?|centroids?|cent(er|re)s"), 2),
    (_re(r"dict(ionary)?|entries|vectors|codes|lookup|prototypes?|atoms|[cek]"), 1),
    (_re(r"\w*emb\w*"), 0),
)
WORTH = {"counts": 3, "logits": 3, "recoding": 4, "between": 2, "grid": -9, "running": -1}
BARE = 1  # a parameter or buffer straight in a quantiser, whatever its name: k, vars, e_i_ts
OWNERS = ((_re(r"quant(?!il|it|um)|vq(?!a(?![a-z]))|code_?book|(^|_)pq(_|$)"), 3), (_re(r"bottleneck"), 1))
RUNNING = set("avg average ema sum mean running moving".split())  # a codebook only where nothing better is beside it
AGAINST = set(
    "conv proj projection projector linear fc mlp attn attention norm ln head heads pos position positional patch time label"
    " class cls cond condition speaker text discriminator disc loss lpips implicit mask basis levels scale scales amax absmax"
    " zeros latents query queries rotation init inited initted initialized bias relative lora logit logits temperature table"
    " timestep pre post before after to bits zero point min max alpha beta gamma delta step factor".split()
)
COUNTS = _re(r"cluster|count|usage|used|hits?(_|$)|elem|freq|prob|num|(^|[._])n(_|$)")
GRID = _re(r"\.\w*(levels|basis|mask|bits_to_indices|power)\w*")
MODEL = _re(r"vq_?(vae|gan|model|net)")  # names a model, not a quantiser, where the module holds other layers
CONTAINER = _re(r"\d+|layers?|level\w*|stages?|blocks?|rq|bottleneck\w*")
CODER = _re(r"(?:\w*_|\w*(?=..coder))?(en|de)c(?:oder)?s?(?:_[tb])?")
INDEX = _re(r"\d+|(?<=[._])(?:t|b|top|bottom)(?=\.|$)")
LAYER = _re(r"(?!.*(emb\w*|code_?books?)[.\d]*\.\w+$).*\.(weight(_v)?|kernel|w|original1)$")
RECODE = _re(r"code\w*_(proj|transform|to_codes)|embed\w*_proj")
# Layers into and out of the quantiser have D channels; where one has K as well, that is chance.
CHANNELS = _re(
    rf"(pre|post|before|after)_\w*(quant|vq)|(^|[._])(in|input|out|output)_?proj|project|conv|resi|norm|{RECODE.pattern}"
)
LOGITS = _re(r"\.(weight_)?proj(\.\d+)*\.|logit")
HEAD = _re(r"(head|logits?|out(put)?|generator|classifier)\w*\.weight$")
NO_VQ = _re(r"self_attn|rnn|lstm|\bgru|fc_mu|to_mu|log_?var|fc_var")  # beside it, an unnamed embedding is no codebook
EMA, WRAPPER = _re(r"(^|_)(ema|shadow|averaged)(?=_|$)"), _re(r"_*(model|module|params|net|generator|online_model|orig_mod)?_*")
SEARCHES = (
    (RECODE, "unknown"),  # latents are not compared with the rows as stored
    (_re(r"_codebook\.embed:3d|_hit|prob|embedding\.initt?ed"), "unknown"),  # the metric is a switch of the library
    (_re(r"codebook_used|\.in_proj.*\.out_proj"), "cosine"),  # kept by, or made low-dimensional for, l2 lookup
    (_re(r""), "euclidean"),
)
TELL = "; if one of its tensors is a codebook after all, name it with --codebook-key"
VOCABULARY = "its embeddings are the vocabulary of a language model, or of a prior over tokens" + TELL
NO_CODEBOOK = (
    (r"\A\Z", "the file holds no tensors"),
    (r"absmax|quant_map|qweight|qzeros|fake_quant|weight_quantizer", "its weights are stored in fewer bits: that is no vector quantisation"),
    (
        r"(?m)fsq|lfq|bsq|_levels|implicit_codebook|bits_to_indices|(^|\.)_?(\w+_)?(v?quanti[sz]e[rd]?s?|r?vq)\.",
        "its quantiser computes its codes, as FSQ, LFQ and BSQ do, and stores no codebook",
    ),
    (r"fc_mu|to_mu|log_?var|fc_var|quant_conv", "a KL autoencoder: its latents are continuous, it has no codebook"),
    (r"embed_tokens|tok(en)?_emb|word_emb|wte|lm_head|vocab|text_emb|codebooks?_(head|emb)|to_logit|logit_w", VOCABULARY),
    (r"self_attn|rnn|lstm", VOCABULARY),
    (r"label|class_emb|cls_emb|y_emb", "its only embedding is that of a class label" + TELL),
    (r"patch|pos(ition)?_emb", "a transformer over patches, without a quantiser" + TELL),
    (r"(?m)(?<!\.bias\n)^([^\n]*[._])?emb(ed(ding)?)?s?\.weight$", VOCABULARY),
    (r"\A(?=.*enc(oder)?s?[._]).*dec(oder)?s?[._]", "an encoder and a decoder with no quantiser between them" + TELL),
    (r"", "no matrix in it is named or placed like a codebook" + TELL),
)


class _Names:
    """The tensors by name, sorted, so that a module is one slice: a large language model has 40,000 of them."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes, self.order, self.text = shapes, sorted(shapes), "\n".join(shapes)
        layers = ((name, shape) for name, shape in shapes.items() if len(shape) > 1 and LAYER.match(name))
        self.channels = {name: shape[-2:] if name.endswith("kernel") else shape[:2] for name, shape in layers}

    def under(self, module: str) -> list[str]:
        bounds = (bisect_left(self.order, module + mark) for mark in "./")  # "/" is the character after "."
        return self.order[slice(*bounds)] if module else self.order

    def owner(self, owner: str, leaf: str) -> tuple[int, bool, set[str]]:
        """Points for the modules above a leaf, whether the nearest is a quantiser, and the words from there on."""
        rank, since = 0, [leaf]
        for path in accumulate(owner.lower().split("."), "{}.{}".format):
            part = path.rpartition(".")[2]
            model = MODEL.search(part) and any(name in self.channels for name in self.under(owner[: len(path)]))
            silent = model or "emb" in part or AGAINST & set(part.split("_"))
            here = 0 if silent else next((points for pattern, points in OWNERS if pattern.search(part)), 0)
            # What stands before an encoder or decoder names the model, not the quantiser.
            rank, since = (0, [leaf]) if CODER.fullmatch(part) else (max(rank, here), [leaf] if here else [*since, part])
        return rank, rank > 0 and all(map(CONTAINER.fullmatch, since[1:])), {w for part in since for w in part.split("_")}

    def between(self, owner: str) -> bool:
        """Whether an encoder and a decoder stand beside a module."""
        place = re.sub(rf"(^|\.)(({CONTAINER.pattern})(\.|$))+$", "", owner)
        beside = (CODER.fullmatch(name[len(place) :].strip(".").split(".")[0]) for name in self.under(place))
        return len({coder[1].lower() for coder in beside if coder}) == 2

    def orient(self, shape: Shape, counts: set[int], weight: bool) -> tuple[int, int, bool]:
        """Axis of the codes, how many, and whether that is sure: by counts, else by channels, else by convention."""
        for padding in (0, 1):
            fits = [(axis, n - padding, True) for axis, n in enumerate(shape) if n - padding in counts]
            if len(fits) == 1:
                return fits[0]
        if len(shape) == 3:
            return (0, shape[0], True) if shape[0] > shape[1] else (1, shape[1], True)
        rows, columns = (any(n in channels for channels in self.channels.values()) for n in shape)
        if rows and not columns and shape[1] > shape[0]:  # the rows, not the columns, are as long as a layer is wide
            return 1, shape[1], True
        return 0, shape[0], weight or shape[0] >= shape[1] or columns and not rows

    def judge(self, name: str) -> tuple[int, FoundCodebook, set[str]] | None:
        """Points, codebook, and the other names that belong to it; None where the tensor cannot be one."""
        shape, (module, _, last) = self.shapes[name], name.rpartition(".")
        weight = last in ("weight", "w") or name.endswith("embedding.embedding")
        module = module if weight else name
        owner, _, leaf = re.sub(r"(\.\d+)+$", "", module).rpartition(".")
        leaf = re.sub(r"^_+|[_\d]+$", "", leaf).lower()
        points = next((points for pattern, points in LEAVES if pattern.fullmatch(leaf)), -1)
        # Of three axes only a bare parameter can be a codebook: a weight of three is a convolution.
        if len(shape) not in ((2,) if weight else (2, 3)) or max(shape) < 2 or weight and points < 0:
            return None
        rank, named, words = self.owner(owner, leaf)
        points = max(points, BARE) if named and not weight and min(shape[-2:]) > 1 else points
        layer = weight and f"{module}.bias" in self.shapes
        if points < 0 or words & AGAINST or points < 2 and COUNTS.search(leaf) or layer:
            return None
        numbers, scope = INDEX.findall(name[len(owner) :]), {}
        for other in {*self.under(owner), *self.under(module)} - {name}:
            inside = other[len(owner) :]
            near = named or "." not in inside.strip(".") or other.startswith(f"{module}.")
            same = all(a == b for a, b in zip(numbers, INDEX.findall(inside), strict=False))
            if near and same and not any(map(CODER.fullmatch, inside.split("."))):
                scope[other] = inside
        counted = (self.shapes[other] for other, inside in scope.items() if COUNTS.search(inside))
        counts = {s[-1] for s in counted if len(s) in (1, 2) and s != shape} - {0, 1}
        axis, size, sure = self.orient(shape, counts, weight)
        *heads, dim = (n for i, n in enumerate(shape) if i != axis)

        outputs = [other for other, channels in self.channels.items() if size in channels]
        pointwise = [o for o in outputs if any((coder := CODER.fullmatch(part)) and coder[1] == "en" for part in o.split(".")) and set(self.shapes[o][2:]) <= {1}]
        logits = any(LOGITS.search(scope.get(o, "")) for o in outputs) or not named and len(outputs) == 1 and pointwise == outputs
        recoding = [o for o in self.channels if o.startswith(owner) and RECODE.search(o)]
        prior = NO_VQ.search(self.text) or any(HEAD.search(o) and len(self.shapes[o]) == 2 for o in outputs)
        evidence = {
            "counts": size in counts,
            "logits": logits,
            "recoding": any("code" in o and self.channels[o][1] == dim for o in recoding),
            "between": size >= 16 and not prior and self.between(owner),
            "grid": any(GRID.fullmatch(inside) and self.shapes[other] == (dim,) for other, inside in scope.items()),
            "running": bool(RUNNING & set(leaf.split("_"))),
        }
        points += rank + sum(WORTH[what] for what, holds in evidence.items() if holds)
        sure = sure and points >= SURE
        about = "\n".join([f"{name}:{len(shape)}d", *sorted(scope.values()), *recoding])
        search = next(search for pattern, search in SEARCHES if pattern.search(about)) if sure else "unknown"
        own = tuple(o for o, inside in scope.items() if size in self.shapes[o] and not CHANNELS.search(inside))
        search, confidence = "logits" if logits else search, "high" if sure else "low"
        return points, FoundCodebook(name, size, dim, axis, *heads or (1,), "F32", search, own, confidence), set(scope)


def _letters(name: str) -> tuple[str, int]:
    """A name as an averaged copy of the model would write it, and how many marks of such a copy it bears."""
    parts = [(part, EMA.sub("", part)) for part in name.lower().split(".")]
    letters = "".join(plain for _, plain in parts if not WRAPPER.fullmatch(plain))
    return letters.replace("_", ""), sum(part != plain for part, plain in parts)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def find_codebooks(shapes: Mapping[str, Shape], dtypes: Mapping[str, str] | None = None) -> Detection:
    """The codebooks of a state dict, given as key -> shape and key -> dtype; where there is none, why."""
    keys = {key.removesuffix(":0").replace("/", "."): key for key in sorted(shapes, key=_natural)}
    names = _Names({name: tuple(shapes[key]) for name, key in keys.items()})
    kinds = {name: (dtypes or {}).get(key, "F32") for name, key in keys.items()}
    letters = {name: _letters(name) for name in keys}

    def copies(name: str, other: str) -> bool:
        (mine, marks), (theirs, fewer) = letters[name], letters[other]
        return marks > fewer and names.shapes[name] == names.shapes[other] and (mine.endswith(theirs) or theirs.endswith(mine))

    rated = [found for name in keys if re.match(r"B?F\d", kinds[name]) and (found := names.judge(name))]
    rated = [found for found in rated if found[0] >= LISTED]
    beaten = {
        book.key
        for points, book, _ in rated
        if any(book.key in scope and more > points or copies(book.key, rival.key) for more, rival, scope in rated)
    }
    books = [book for _, book, _ in rated if book.key not in beaten]
    own = [{book.key, *book.companions} - {other.key for other in books if other is not book} for book in books]
    for name in keys.keys() - set().union(*own) if books else ():
        twins = [(-abs(len(letters[other][0]) - len(letters[name][0])), i) for i, group in enumerate(own) for other in group if copies(name, other)]
        if twins:
            own[max(twins)[1]].add(name)
    claimed, sizes = set().union(*own), {book.size + more for book in books for more in (0, 1, 2)}
    elsewhere = ((keys[name], shape) for name, shape in names.shapes.items() if name not in claimed and sizes & set(shape))
    found = (
        replace(book, key=keys[book.key], dtype=kinds[book.key], companions=tuple(sorted(keys[name] for name in group - {book.key})))
        for book, group in zip(books, own, strict=True)
    )
    reason = None if books else next(reason for pattern, reason in NO_CODEBOOK if re.search(pattern, names.text, re.I | re.S))
    return Detection(tuple(found), tuple(elsewhere), reason)
