"""Detection of codebooks in a state dict by names, shapes and dtypes, without reading a tensor. A tensor scores points
for its name, its owning module and the tensors beside it; no family has a rule of its own."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

from codebook_tools.checkpoints.forms import Effective
from codebook_tools.checkpoints.tensors import Shape, Shapes

_re = partial(re.compile, flags=re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class FoundCodebook:
    """A codebook and where it is stored.

    Attributes:
        key: Of the tensor.
        size: Number of codes K, without a padding row (RQ-VAE).
        dim: Numbers of a stored row.
        axis: Of the tensor, along which the codes lie.
        heads: Length of the axis of a 3-D tensor that is neither codes nor dim (the first, but in fairseq's (K, h, D)
            the second); 1 for a matrix.
        dtype: As safetensors names it.
        search: How the nearest code is searched: "euclidean" unless names speak against it, "cosine", "logits", or
            "unknown" where names are vague. (IBQ's logits do not show in its names.)
        companions: Sorted keys of tensors of the owning module with an axis of length `size`, and EMA shadows of these
            and of the codebook.
        confidence: "high", or "low" where the user must confirm it with --codebook-key.
        also: The same codebook under other keys, where several quantizer stages share it.
        form: How rows become codes, where the model itself was asked; None: names and shapes decide.
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
    also: tuple["FoundCodebook", ...] = ()
    form: Effective | None = None

    @property
    def places(self) -> tuple["FoundCodebook", ...]:
        """This codebook and its other places in the file, this one first."""
        return (self, *self.also)

    def resized(self, size: int) -> "FoundCodebook":
        """The same places with another number of codes."""
        return replace(self, size=size, also=tuple(replace(place, size=size) for place in self.also))


@dataclass(frozen=True)
class Detection:
    """The codebooks of a state dict.

    Attributes:
        codebooks: In natural order of their keys: layers.2 before layers.10.
        elsewhere: Key and shape of other tensors whose size may follow K, in natural order: they have a dimension of K,
            or of n K for n codebooks, or up to 4 more.
        reason: Why there is no codebook; None where there is one.
    """

    codebooks: tuple[FoundCodebook, ...]
    elsewhere: tuple[tuple[str, Shape], ...]
    reason: str | None


LEAVES = (  # the first that matches the whole leaf counts
    (_re(r"(.*_)?(avg|average|ema|mean|moving|running|sum)(_.*)?"), 0),  # a codebook only where nothing better is
    (_re(r"(\w+_)?code_?(book|vector|word)s?(_(t|b|top|bottom))?"), 5),
    (_re(r"(vector_?)?quanti[sz]\w*|r?vq(_?layers?)?"), 4),
    (_re(r"embed_codes?|(code(book)?|vq|quant\w*)_?emb(ed(ding)?)?s?"), 3),
    (_re(r"emb(ed(ding)?)?s?(_(vq\w*|t|b|top|bottom))?|(centroid|cent(er|re)|code|vector)s|dict(ionary)?|[cek]"), 2),
    (_re(r"\w*(emb|lookup)\w*"), -1),
)
OWNERS = ((_re(r"(?!.*emb).*(quant(?!il|it|um)|vq(?!a(?![a-z]))|code_?book|\bpq\b)"), 3), (_re(r".*bottleneck"), 1))
WORTH = {"counts": 3, "logits": 3, "recoding": 5, "between": 2, "grid": -9}
BARE, LISTED, SURE = 1, 4, 5  # points of a vague name directly in a quantizer; to be listed; for high confidence
AGAINST = _re(
    r"(?<![^_])(activation|after|amax|att(n|ention)|basis|before|bias|bits|cl(as)?s|cond(ition)?|conv|disc(riminator)?"
    r"|fake|fc|heads?|implicit|init(i?t?ed|ialized)?|input|label|latents|levels|linear|ln|logits?|lora|loss|lpips|mask"
    r"|mlp|norm|patch|pos(ition(al)?)?|post|pre|proj(ect(ion|or)?)?s?|quer(y|ies)|scale|text|time(step)?|to"
    r"|weight)(?![^_])"
)
COUNTS = _re(r"cluster|count|usage|used|hits?(_|$)|elem|freq|prob|num|(^|[._])n(_|$)")
SUMS = _re(r"sum|avg|average|total|emb")  # a row for each code, whatever else the name says
GRID = _re(r"\.\w*(levels|basis|mask|bits_to_indices|power)\w*")  # its product is the codebook, which is then computed
MODEL = _re(r".*vq_?(vae|gan|model|net)")  # names a model, not a quantizer, if the module has other layers
CONTAINER = _re(r"\d+|layers?|level\w*|stages?|blocks?|rq|bottleneck\w*")
CODER = _re(r"(?:\w*_|\w*(?=..coder))?(en|de)c(?:oder)?s?(?:_[tb])?")
INDEX = _re(r"\d+|(?<=[._])(?:t|b|top|bottom)(?=\.|$)")
LAYER = _re(r"(?!.*(emb\w*|code_?books?)[.\d]*\.\w+$).*\.(weight(_v)?|kernel|w|original1)$")
RECODE = r"code\w*_(proj|transform|to_codes)|embed\w*_proj"
# Layers into and out of the quantizer have D channels; if one has K channels too, that is chance.
CHANNELS = _re(rf"(pre|post|before|after)_\w*(quant|vq)|[._](in|out)(put)?_?proj|project|conv|resi|norm|{RECODE}")
LOGITS = _re(r"\.(weight_)?proj(\.\d+)*\.|logit")
PRIOR = _re(r"(head|logits?|out(put)?|generator|classifier)\w*\.weight$")
NO_VQ = _re(r"self_attn|rnn|lstm|\bgru|fc_mu|to_mu|log_?var|fc_var")  # beside it, a vague name is no codebook
EMA = _re(r"(?<![^._])(ema|shadow|averaged)(?![^._])")  # the tensor with more such marks is a copy of its namesake
WRAPPER = _re(r"(?<![^.])_*(model|module|params|net|generator|online_model|orig_mod|vq_?vae|vq_?gan)?_*(?![^.])")
SEARCHES = (  # "unknown": the metric is an option of the library, or latents are not compared with stored rows
    (_re(rf"_codebook\.embed:3d|_hit|prob|embedding\.initt?ed|{RECODE}"), "unknown"),
    (_re(r"codebook_used|\n\.in_proj.*\n\.out_proj"), "cosine"),  # kept by, or projected for, l2 lookup
)
_SPECIAL = 4  # most tokens of a vocabulary beside the codes: padding, mask, begin, end
VOCABULARY = "its embeddings are the vocabulary of a language model, or of a prior over tokens"
NO_CODEBOOK = (
    (_re(r"absmax|quant_map|qweight|qzeros|weight_quantizer"), "its weights are stored in fewer bits: not as vectors"),
    (_re(r"[bf]sq|lfq|\b_?(\w+_)?(v?quanti[sz]e[rd]?s?|r?vq)\."), "its quantizer stores no codes, as in FSQ, LFQ, BSQ"),
    (_re(r"fc_mu|to_mu|log_?var|fc_var|quant_conv"), "a KL autoencoder: its latents are continuous"),
    (_re(r"tok(en)?s?_emb|embed_tok|word_emb|wte|lm_head|codebooks?_(head|emb)|logit"), VOCABULARY),
    (_re(r"label|class_emb|cls_emb|y_emb"), "it embeds class labels, and no codes"),
    (_re(r"patch|pos(ition)?_emb"), "a transformer over patches, without a quantizer"),
    (_re(r"(^|(?<!\.bias)\n)([^\n]*[._])?emb(ed(ding)?)?s?(\.\d+)?\.weight(\n|$)"), VOCABULARY),
    (_re(r"\A(?=.*enc(oder)?s?[._]).*dec(oder)?s?[._]"), "an encoder and a decoder with no quantizer between them"),
    (_re(r""), "no matrix in it is named or placed like a codebook"),
)


class _Names:
    """The tensors of a file by name, and the channels (in either order) of its layers."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes, self.text = shapes, "\n".join(shapes)
        layers = ((name, shape) for name, shape in shapes.items() if len(shape) > 1 and LAYER.match(name))
        self.channels = {name: shape[-2:] if name.endswith("kernel") else shape[:2] for name, shape in layers}
        alike = dict[tuple[str, Shape], list[tuple[int, str]]]()
        for name, shape in shapes.items():
            plain, marks = EMA.subn("", name.lower())
            alike.setdefault((re.sub(r"[._]", "", WRAPPER.sub("", plain)), shape), []).append((marks, name))
        groups = ((*min(group), group) for group in alike.values())
        self.copies = {name: first for least, first, group in groups for marks, name in group if marks > least}

    def under(self, module: str) -> list[str]:
        """Names of all tensors in a module."""
        return [name for name in self.shapes if not module or name.startswith(f"{module}.")]

    def owner(self, owner: str) -> tuple[int, list[str]]:
        """Points for the modules above a leaf, and the parts of the path after the one that scored them."""
        points, since = 0, list[str]()
        for path in accumulate(owner.split("."), "{}.{}".format):
            part = path.rpartition(".")[2]
            model = MODEL.match(part) and any(name in self.channels for name in self.under(path))
            here = 0 if model or AGAINST.search(part) else next((n for pattern, n in OWNERS if pattern.match(part)), 0)
            # The modules above an encoder or decoder name the model.
            points, since = (0, []) if CODER.fullmatch(part) else (max(points, here), [] if here else [*since, part])
        return points, since

    def orient(self, shape: Shape, counts: set[int], weight: bool) -> tuple[int, int, bool]:
        """Axis of the codes, their number, and whether that is certain: by counts, else channels, else convention."""
        fits = [(axis, n - pad, True) for pad in (0, 1) for axis, n in enumerate(shape) if 1 < n - pad in counts]
        rows, columns = (any(n in channels for channels in self.channels.values()) for n in shape[:2])
        stack, tall = len(shape) == 3, shape[0] >= shape[1]
        turned = not stack and rows and not columns and not tall  # the rows, not the columns, are as long as a layer
        axis = 1 if turned or (stack and shape[0] <= shape[1]) else 0
        sure = stack or turned or weight or tall or (columns and not rows)
        return fits[0] if len(fits) == 1 else (axis, shape[axis], sure)

    def judge(self, name: str) -> tuple[int, FoundCodebook, dict[str, str]] | None:
        """Points, codebook, and names of the tensors that belong to it; None where the tensor cannot be one."""
        shape, (module, _, last) = self.shapes[name], name.rpartition(".")
        weight = last in ("weight", "w") or name.endswith("embedding.embedding")  # torch, Sonnet; Flax
        module = module if weight else name
        owner, _, leaf = re.sub(r"(\.\d+)+$", "", module).rpartition(".")
        leaf = re.sub(r"^_+|[_\d]+$", "", leaf).lower()
        points = next((points for pattern, points in LEAVES if pattern.fullmatch(leaf)), -2)
        layer = weight and (len(shape) == 3 or points < -1 or f"{module}.bias" in self.shapes)  # or a convolution
        if layer or len(shape) not in (2, 3) or max(shape) < 2:
            return None
        rank, since = self.owner(owner)
        named = rank > 0 and all(map(CONTAINER.fullmatch, since))
        points = BARE if points < 0 and named and min(shape[-2:]) > 1 else points
        if points < -1 or AGAINST.search("_".join([*since, leaf])) or (points < 2 and COUNTS.search(leaf)):
            return None
        scope, indices = dict[str, str](), INDEX.findall(name[len(owner) :])
        for other in {*self.under(owner), *self.under(module)} - {name}:
            inside = other[len(owner) :]
            near = named or "." not in inside.strip(".") or other.startswith(f"{module}.")
            alike = all(mine == theirs for mine, theirs in zip(indices, INDEX.findall(inside), strict=False))
            if near and alike and not any(map(CODER.fullmatch, inside.split("."))):
                scope[other] = inside
        lengths = (
            self.shapes[other]
            for other, inside in scope.items()
            if COUNTS.search(inside) and not (len(self.shapes[other]) == 2 and SUMS.search(inside))
        )
        counts = {length[-1] for length in lengths if len(length) in (1, 2) and length != shape}
        axis, size, sure = self.orient(shape, counts, weight)
        head, dim = [1, *(n for i, n in enumerate(shape) if i != axis)][-2:]
        place = re.sub(rf"(^|\.)(({CONTAINER.pattern})(\.|$))+$", "", owner)
        beside = (CODER.fullmatch(other[len(place) :].strip(".").split(".")[0]) for other in self.under(place))
        between = size >= 16 and len({coder[1].lower() for coder in beside if coder}) == 2
        outputs = [other for other, channels in self.channels.items() if size in channels]
        emitted = not rank and len(outputs) == 1 and len(self.shapes[outputs[0]]) > 2  # by a convolution, as in a dVAE
        prior = any(PRIOR.search(o) and len(self.shapes[o]) == 2 for o in outputs)
        recoding = [other for other in self.under(owner) if other in self.channels and re.search(RECODE, other)]
        evidence = {
            "counts": size in counts,
            "logits": any(LOGITS.search(scope.get(other, "")) for other in outputs),
            "recoding": any("code" in other and self.channels[other][1] == dim for other in recoding),
            "between": between and not prior and not any(map(NO_VQ.search, self.under(place))),
            "grid": any(GRID.fullmatch(inside) and self.shapes[other] == (dim,) for other, inside in scope.items()),
        }
        points += rank + sum(WORTH[what] for what, holds in evidence.items() if holds)
        level = "high" if sure and points >= SURE and size > 1 else "low"  # a single row may be the basis of a lattice
        about = "\n".join([f"{name}:{len(shape)}d", *sorted(scope.values()), *recoding])
        search = next((metric for pattern, metric in SEARCHES if pattern.search(about)), "euclidean")
        search = "logits" if emitted or evidence["logits"] else search if level == "high" else "unknown"
        own = {other for other, inside in scope.items() if size in self.shapes[other] and not CHANNELS.search(inside)}
        own |= {copy for copy, original in self.copies.items() if original == name or original in own}
        return points, FoundCodebook(name, size, dim, axis, head, "F32", search, tuple(own), level), scope


def find_codebooks(shapes: Shapes, dtypes: Mapping[str, str] | None = None) -> Detection:
    """Find the codebooks of a state dict, or the reason why it has none.

    Args:
        shapes: Of all tensors, by key.
        dtypes: Of all tensors, by key, as safetensors names them; None: all are "F32".
    """
    natural = partial(re.sub, r"\d+", lambda digits: digits[0].zfill(9))  # layers.2 before layers.10
    keys = {key.removesuffix(":0").replace("/", "."): key for key in sorted(shapes, key=natural)}
    names = _Names({name: tuple(shapes[key]) for name, key in keys.items()})
    dtypes = dtypes or dict.fromkeys(shapes, "F32")
    rated, unfit = list[tuple[int, FoundCodebook, dict[str, str]]](), list[str]()
    for name, key in keys.items():
        rating = None if name in names.copies else names.judge(name)
        if rating and rating[0] >= LISTED:
            holds_codes = re.match(r"B?F\d", dtypes[key]) and all(names.shapes[name])
            rated.append(rating) if holds_codes else unfit.append(f"{key} is {dtypes[key]} {[*names.shapes[name]]}")
    books = [b for points, b, _ in rated if not any(b.key in scope and more > points for more, _, scope in rated)]
    own = {b.key: {keys[name] for name in b.companions} - {keys[other.key] for other in books} for b in books}
    claimed = {keys[b.key] for b in books}.union(*own.values())
    sizes = {n * b.size + i for b in books for n in (1, len(books)) for i in range(_SPECIAL + 1)}
    others = [(key, names.shapes[name]) for name, key in keys.items() if key not in claimed]
    elsewhere = tuple(other for other in others if sizes & set(other[1]))
    books = [replace(b, key=keys[b.key], dtype=dtypes[keys[b.key]], companions=(*sorted(own[b.key]),)) for b in books]
    why = None if books else _why_not(names.text, unfit)
    return Detection((*books,), elsewhere, why)


def _why_not(text: str, unfit: list[str]) -> str:
    """The reason for no codebook; text: all names, a line each. unfit: codebooks by name that are no rows of floats."""
    if unfit:
        return f"{unfit[0]}, where a codebook is rows of floats"
    why = next(reason for pattern, reason in NO_CODEBOOK if pattern.search(text))
    return f"{why}; if a tensor is one after all, name it to the other commands by --codebook-key"
