"""One file of latents serves a whole model: it meets the first codebook, and walks on to the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from audio_codecs import CASES, load, save, waveforms
from conftest import Run, assert_refused
from image_models import two_levels, write
from proven_networks import made, write_images, write_network, write_own
from safetensors.torch import load_file
from torch import Tensor, nn

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.data.latent_files import open_latents, split_latents

RANGE = ("--input-range", "0,1")


def succeeded(outcome: Any) -> Any:
    assert outcome.exit_code == 0, outcome.stderr
    return outcome.json


# --- what the network makes of its own latents is what it makes of the images that they are of
WALKING = ("library residual", "tied", "library shared", "library grouped", "library heads", "library projected")
ALONE = ("library cosine", "library images", "library sim", "projected", "warped", "averaged")


def write_latents(folder: Path, name: str) -> dict[str, tuple[object, ...]]:
    """The network `name`, and what to type for images and for the latents that it makes of them."""
    model, network = write_network(folder, name, 24)
    paths, rows = write_images(folder), []
    for path in paths:
        with torch.no_grad():
            latents = made(name, 24).encode(torch.from_numpy(np.load(path)).float()[:, None] / 255)  # type: ignore[operator]
        rows.append(path.with_suffix(".latents.npy"))
        np.save(rows[-1], latents.movedim(1, -1).flatten(0, -2).numpy())
    ours = {"--data": paths, "--latents": rows}
    return {kind: (model, "--network", network, kind, one, "--test-data", two) for kind, (one, two) in ours.items()}


@pytest.mark.parametrize(
    "name", [WALKING[0], *(pytest.param(name, marks=pytest.mark.slow) for name in (*WALKING[1:], *ALONE))]
)
def test_latents_of_the_encoder_do_what_the_images_do(name: str, tmp_path: Path, codebook: Run) -> None:
    asked, written, figures = write_latents(tmp_path, name), list[dict[str, Tensor]](), list[Any]()
    for kind, words in asked.items():
        out = tmp_path / f"{kind}.safetensors"
        more = RANGE if kind == "--data" else ()
        result = succeeded(codebook("prune", *words, *more, "-o", out, "--json"))
        assert result["proof"]["by"] == ("module" if name == "tied" else "quantizer"), result["proof"]
        assert result["proof"]["agree"] + result["proof"]["near_ties"] == result["proof"]["of"]
        written.append(load_file(out))
        figures.append([result["stages"][stage] for stage in ("before", "surgery")])
    assert codebook("verify", out, "--against", words[0]).exit_code == 0
    by_images, by_latents = written
    assert by_images.keys() == by_latents.keys()
    different = [key for key in by_images if not torch.allclose(by_images[key], by_latents[key], atol=1e-6)]
    assert different == []
    for theirs, ours in zip(*figures, strict=True):
        assert [ours[key] for key in ("images", "mse", "psnr", "ssim", "sharpness")] == [None] * 5
        for one, other in zip(theirs["codebooks"], ours["codebooks"], strict=True):
            assert one.pop("key") == other.pop("key")
            assert one | {"coverage": 0} == pytest.approx(other | {"coverage": 0}, rel=1e-3)


# --- codecs of transformers
@pytest.mark.slow
@pytest.mark.parametrize("name", ["encodec", "dac", "mimi"])
def test_the_librarys_quantizer_has_our_codes_and_our_distortion(name: str, tmp_path: Path, codebook: Run) -> None:
    import transformers

    case, model, rows = CASES[name], tmp_path / "model", tmp_path / "z.npy"
    save(case, model)
    cls: Any = getattr(transformers, f"{case.name}Model")
    original = cls.from_pretrained(model).eval()
    network, _ = load(case, read_checkpoint(model))
    with torch.no_grad():
        latents = network.encode(waveforms(network, 1000)).latents
    np.save(rows, latents.movedim(1, -1).flatten(0, 1).numpy())
    result = succeeded(codebook("refit", model, "--latents", rows, "--k", 32, "--json"))
    out, proof = Path(result["outputs"]["model"]), result["proof"]
    assert proof["by"] == "quantizer" and proof["agree"] + proof["near_ties"] == proof["of"] > 0
    assert codebook("verify", out, "--against", model).exit_code == 0
    assert codebook("verify", out, "--against", model, "--latents", rows, "--quiet").exit_code == 0
    keys = [use["key"] for use in result["stages"]["surgery"]["codebooks"]]
    maps = load_file(result["outputs"]["index_map"])
    assert maps.keys() == {f"{key}/{kind}" for key in keys for kind in ("index_map", "nearest")}
    loaded = cls.from_pretrained(out).eval()
    _, test = split_latents(open_latents([rows], latents.shape[1]))
    held_out = torch.cat(list(test)).T[None]
    for network, stage in ((original, "before"), (loaded, "surgery")):
        stages = library_stages(name, network, held_out)
        assert len(stages) == len(keys) == case.quantisers
        for (codes, distortion), use in zip(stages, result["stages"][stage]["codebooks"], strict=True):
            shares = torch.bincount(codes.flatten()).double() / codes.numel()
            entropy = -(shares[shares > 0] * shares[shares > 0].log()).sum()
            assert (use["latents"], use["used"]) == (codes.numel(), int((shares > 0).sum()))
            assert use["perplexity"] == pytest.approx(float(entropy.exp()), rel=1e-6)
            assert use["distortion"] == pytest.approx(distortion, rel=1e-4)
    before, after = (result["stages"][stage]["codebooks"] for stage in ("before", "surgery"))
    assert after[0]["distortion"] < before[0]["distortion"]


def library_stages(name: str, model: Any, latents: Tensor) -> list[tuple[Tensor, float]]:
    """Of each stage, the library's codes for latents (1, dim, positions), and the squared distance to what it takes."""
    with torch.no_grad():
        if name == "dac":
            _, codes, projected, *_ = model.quantizer(latents)
            parts = projected.chunk(codes.shape[1], 1)
            books = [layer.codebook.weight for layer in model.quantizer.quantizers]
            pairs = [(part, codes[:, i], books[i]) for i, part in enumerate(parts)]
        elif name == "encodec":
            codes, pairs, left = model.quantizer.encode(latents), [], latents
            for layer, chosen in zip(model.quantizer.layers, codes, strict=True):
                pairs.append((left, chosen, layer.codebook.embed))
                left = left - layer.decode(chosen)
        else:
            codes, pairs = model.quantizer.encode(latents, model.config.num_quantizers), []
            stacks = ("semantic_residual_vector_quantizer", "acoustic_residual_vector_quantizer")
            for stack in (getattr(model.quantizer, name) for name in stacks):
                left = stack.input_proj(latents)
                for layer in stack.layers:
                    chosen = codes[len(pairs)]
                    pairs.append((left, chosen, layer.codebook.embed))
                    left = left - layer.decode(chosen)
    return [
        (chosen, float((rows.movedim(1, -1) - codes.detach()[chosen]).double().square().sum(-1).mean()))
        for rows, chosen, codes in pairs
    ]


# --- the commands that need no decoder
@pytest.mark.slow
def test_tables_and_pages_are_without_reconstructions(
    tmp_path: Path, codebook: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = write_latents(tmp_path, "library residual")["--latents"]
    for command in (("sweep", "--k", "4,8"), ("compare", "--k", 8, "--strategies", "untouched,refit,random")):
        done = succeeded(codebook(*command, *words, "--json"))
        rows = done["points" if command[0] == "sweep" else "rows"]
        measured = [stage for row in rows for stage in row["stages"].values() if stage]
        assert len(measured) > 3 and all(stage["mse"] is None and len(stage["codebooks"]) == 2 for stage in measured)
        page = Path(f"{command[0]}.html")
        table = codebook(*command, *words, "--report", page)
        assert table.exit_code == 0 and "distortion" in table.stdout and "mse" not in table.stdout, table
        assert "mse" not in Path(done["outputs"]["table"]).read_text() and ">mse<" not in page.read_text()
    mapped = succeeded(codebook("map", *words, "--method", "pca", "--json"))
    assert (mapped["size"], mapped["outputs"]["report"]) == (24, "model.map.html")
    assert "<script" not in Path("model.map.html").read_text().partition("<table")[0]


def test_rows_of_other_latents_under_the_same_name_are_not_taken(tmp_path: Path, codebook: Run) -> None:
    words = write_latents(tmp_path, "library residual")["--latents"]
    asked = ("compare", "--k", 8, "--strategies", "untouched", *words, "-o", tmp_path / "rows", "--json")
    rows = tmp_path / "rows" / "rows.json"
    before = succeeded(codebook(*asked))["rows"], rows.read_bytes()
    assert (succeeded(codebook(*asked))["rows"], rows.read_bytes()) == before
    latents = Path(str(words[4]))
    np.save(latents, np.load(latents) * 2)
    assert succeeded(codebook(*asked))["rows"][0]["made_with"] != before[0][0]["made_with"]
    assert_refused(codebook(*asked, "--steps", 5), "5 steps of fine-tuning need images")
    assert_refused(codebook("codes", words[0], "--latents", latents), "give --data")


def test_checks_that_need_a_network_say_why_they_are_not_done(tmp_path: Path, codebook: Run) -> None:
    words = write_latents(tmp_path, "library residual")["--latents"]
    checks = {one["name"]: one for one in codebook("diagnose", *words, "--against", words[0], "--json").json["checks"]}
    for name in ("wrong-layout", "wrong-input-range", "encoder-drift", "learning-rate"):
        assert checks[name]["verdict"] == "not-checked" and "give --data" in checks[name]["evidence"], name
    assert checks["dead-codes"]["verdict"] == "found"
    finetune, prune = checks["dead-codes"]["fix"].split(";")
    assert "--data DATA" in finetune and f"--latents {words[4]}" in prune and "--data" not in prune


# --- what does not fit
class Mixing(nn.Module):
    """Two residual stages, between which neighbors mix."""

    codebooks = ("stages.0.weight", "stages.1.weight")

    def __init__(self, size: int, kernel: int = 3) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 6, 4, 4), nn.ConvTranspose2d(6, 1, 4, 4)
        self.between = nn.Conv2d(6, 6, kernel, padding=kernel // 2)
        self.stages = nn.ModuleList(nn.Embedding(size, 6) for _ in range(2))

    def encode(self, media: Tensor) -> Any:
        return self.encoder(media)

    def decode(self, quantized: Tensor) -> Any:
        return self.decoder(quantized)

    def walk(self, latents: Tensor, quantise: Any) -> Any:
        first = quantise(0, latents)
        return first + quantise(1, self.between(latents - first))


class Several(Mixing):
    """Its encoder returns more than latents."""

    def __init__(self, size: int) -> None:
        super().__init__(size, 1)

    def encode(self, media: Tensor) -> Any:
        return SimpleNamespace(latents=self.encoder(media))

    def walk(self, encoded: Any, quantise: Any) -> Any:
        return super().walk(encoded.latents, quantise)


class Entered(Several):
    """It says how latents enter."""

    def from_latents(self, latents: Tensor) -> Any:
        return SimpleNamespace(latents=latents)


MADE: dict[str, Any] = {"mixing": Mixing, "several": Several, "entered": Entered}


def test_a_walk_that_rows_cannot_enter_is_refused(tmp_path: Path, codebook: Run) -> None:
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32))
    folder = str(Path(__file__).parent)
    for name, message in (("mixing", "several positions at once"), ("several", "from_latents"), ("entered", "")):
        torch.manual_seed(0)
        names = f"sys.path.insert(0, {folder!r})\nfrom test_latents_of_stages import MADE; NAME = {name!r}"
        model, network = write_own(MADE[name](16), names, tmp_path, name)
        done = codebook("refit", model, "--latents", tmp_path / "z.npy", "--k", 8, "--network", network)
        if message:
            assert_refused(done, message)
            assert "--codebook-key" in done.stderr
        else:
            assert done.exit_code == 0, done.stderr


def test_latents_that_do_not_fit_are_one_line_and_nothing_is_written(tmp_path: Path, codebook: Run) -> None:
    words = write_latents(tmp_path, "library projected")["--latents"]
    model, network = words[0], words[2]
    rows = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    wrong = rows.copy()
    wrong[299, 5] = np.nan
    held_out = tmp_path / "empty.npy"
    np.save(held_out, rows[:0])
    bad: dict[str, tuple[Any, str]] = {
        "nan": (wrong, "latent nan.npy#299 is not finite"),
        "width": (rows[:, :5], "do not enter the network"),
        "object": (rows.astype(object), "cannot read"),
        "integers": (rows.astype(np.int32), "of floats"),
        "flat": (rows.reshape(-1), "of floats"),
        "none": (rows[:0], "empty; give more"),
        "one": (rows[:1], "empty; give more"),
    }
    before = None
    for name, (array, message) in bad.items():
        np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
        before = before or sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".npy")
        for command in (("refit", "--k", 8), ("sweep", "--k", 8, "-o", tmp_path / "swept"), ("diagnose",)):
            done = codebook(*command, model, "--network", network, "--latents", tmp_path / f"{name}.npy")
            assert_refused(done, message)
    fine = ("--latents", words[4], "--test-data", held_out)
    assert_refused(codebook("measure", model, "--network", network, *fine), "not one latent in empty.npy")
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".npy")
    assert [name for name in left if name not in (before or [])] in ([], ["swept"])


def test_one_key_says_that_latents_are_of_that_codebook(tmp_path: Path, codebook: Run) -> None:
    """So do as many dimensions as the codes of the only codebook have, behind a projection."""
    model, network = write_network(tmp_path, "library residual", 24)
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32))
    key = "vq.layers.1._codebook.embed"
    out = tmp_path / "out.safetensors"
    words = ("--latents", tmp_path / "z.npy", "--codebook-key", key, "--k", 24, "--metric", "euclidean", "--seed", 1)
    result = succeeded(codebook("refit", model, "--network", network, *words, "-o", out, "--json"))
    assert [use["key"] for use in result["stages"]["surgery"]["codebooks"]] == [key]
    old, new = load_file(model), load_file(out)
    first = key.replace("1", "0")
    assert torch.equal(old[first], new[first]) and not torch.equal(old[key], new[key])
    model, network = write_network(tmp_path, "library projected", 24)
    np.save(tmp_path / "four.npy", np.random.default_rng(0).normal(size=(300, 4)).astype(np.float32))
    words = ("--latents", tmp_path / "four.npy", "--k", 8, "--network", network)
    (use,) = succeeded(codebook("refit", model, *words, "--json"))["stages"]["surgery"]["codebooks"]
    assert (use["dim"], use["size"]) == (4, 8)


def test_levels_that_no_rows_lead_through_need_a_key(tmp_path: Path, codebook: Run) -> None:
    model = write(two_levels(sizes=(16, 16)), tmp_path / "levels.safetensors")
    dim = load_file(model)["quantize_t.embed"].shape[0]
    np.save(tmp_path / "z.npy", np.random.default_rng(0).normal(size=(300, dim)).astype(np.float32))
    refused = codebook("refit", model, "--latents", tmp_path / "z.npy", "--k", 8)
    assert_refused(refused, "with --codebook-key, of quantize_t.embed, quantize_b.embed")
