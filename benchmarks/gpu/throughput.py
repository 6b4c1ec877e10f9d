"""A VQGAN of the size that diffusers ships, with random weights: images a second through `refit --steps 0`.

    python benchmarks/gpu/throughput.py --out FILE.json [--device cuda] [--quick]

Against the bare model's encoder on the same images in memory, in fp32 and bf16, with the peak of device memory.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from part import forget_peak, options, peak, timed, write

from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.operate import measure_model, operate
from codebook_tools.workflows.request import Request


def make(folder: Path, quick: bool) -> None:
    """A VQModel as taming-transformers' VQGANs of stride 8 are, and smooth random images for it."""
    from diffusers import VQModel

    torch.manual_seed(0)
    widths = (16, 16) if quick else (128, 256, 256, 512)
    model = VQModel(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1 if quick else 2,
        latent_channels=4,
        norm_num_groups=8 if quick else 32,
        num_vq_embeddings=64 if quick else 16_384,
    )
    model.save_pretrained(folder / "vqgan", safe_serialization=True)
    side, count = (32, 24) if quick else (256, 512)
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    np.save(folder / "images.npy", (images.movedim(1, -1) * 255).byte().numpy())


def bare(folder: Path, device: str, bf16: bool, batch: int) -> float:
    """Images a second through the encoder alone."""
    from diffusers import VQModel

    model = VQModel.from_pretrained(folder / "vqgan").to(device).eval()
    pixels = torch.from_numpy(np.load(folder / "images.npy")).movedim(-1, 1)

    def encode() -> None:
        context = torch.autocast(device.partition(":")[0], torch.bfloat16) if bf16 else nullcontext()
        with torch.no_grad(), context:
            for part in torch.split(pixels, batch):
                model.encode(part.to(device).float() / 127.5 - 1)

    encode()
    return len(pixels) / timed(device, encode)[0]


def ours(folder: Path, device: str, precision: str, batch: int, k: int) -> dict[str, Any]:
    """Images a second of a Re-Fit without training, from opening the file to the result, and of a measurement."""
    request = Request(
        folder / "vqgan",
        (str(folder / "images.npy"),),
        input_range=(-1.0, 1.0),
        device=device,
        precision=precision,
        batch_size=batch,
        output=folder / f"out-{precision}",
        force=True,
    )
    count = len(np.load(folder / "images.npy", mmap_mode="r"))
    forget_peak(device)
    since = time.perf_counter()
    done = operate("refit", request, Refit(k), FineTune(steps=0), Watch())
    refit = time.perf_counter() - since
    since = time.perf_counter()
    measure_model(replace(request, output=None), Watch())
    return {
        "refit": {"images_per_second": count / refit, "seconds": {**done.seconds}},
        "measure": {"images_per_second": count / (time.perf_counter() - since)},
        "peak_bytes": peak(device),
    }


def main() -> None:
    given = options(__doc__ or "")
    batch, k = (8, 16) if given.quick else (16, 4096)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, given.quick)
        for precision in ("fp32", "bf16"):
            forget_peak(given.device)
            rate = bare(folder, given.device, precision == "bf16", batch)
            found[precision] = {"bare_encoder": {"images_per_second": rate, "peak_bytes": peak(given.device)}}
            found[precision] |= ours(folder, given.device, precision, batch, k)
            write(given, found)
            print(precision, found[precision], flush=True)


if __name__ == "__main__":
    main()
