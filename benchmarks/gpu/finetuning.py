"""Fine-tuning on the device: steps a second against a bare loop of the same network, and 5,000 steps to the end.

    python benchmarks/gpu/finetuning.py --out FILE.json [--device cuda] [--quick] [--shared FOLDER]

Blocks in turn, in one process, from the same state: fp32 and bf16, with and without torch.compile, at K = 512 and
16,384. Then `refit --k 512 --steps 5000` of the CIFAR-10 checkpoint, with its figures; of the demo without --shared.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from part import forget_peak, options, peak, spread, write

sys.path.insert(0, str(Path(__file__).parents[1]))
from finetune import bare, ours

from codebook_tools.codebook import Codebook
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.training.losses.reconstruction import scales_of
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import Opened, open_request


def request_of(shared: Path | None, device: str, **more: Any) -> Request:
    if shared is None:
        return Request(device=device, **more)
    cifar = shared / "checkpoints" / "cifar10-vqvae-k512.safetensors"
    data, test = (str(shared / "data" / f"cifar10-{split}.tar") for split in ("train", "test"))
    return Request(cifar, (data,), (test,), device=device, **more)


def rates(opened: Opened, k: int, compiled: bool, steps: int, runs: int) -> dict[str, Any]:
    """Steps a second, ours and bare, in turn."""
    model = opened.model
    train = opened.calibration.subset(opened.splits.train)
    _, images = train.load(train.items)
    scales = scales_of(model, train)
    with torch.no_grad():
        rows = model.encode(images[:256].to(model.device), keep=False).movedim(1, -1).flatten(0, -2).cpu()
    torch.manual_seed(0)
    noise = 1e-3 * rows.std() * torch.randn(k, rows.shape[1])
    model.install(Codebook(rows[torch.randint(len(rows), (k,))] + noise))
    model.compiled = compiled
    recipe = FineTune(steps=steps, batch_size=min(64, len(train)), lr=1e-3, optimizer="adam")

    def loops() -> dict[str, float]:
        fresh = model.copy(copy.deepcopy(model.network))
        # The bare loop decides its nearest codes in float32, too: only its network runs in bfloat16.
        context = torch.autocast(model.device.type, torch.bfloat16) if model.bf16 else nullcontext()
        found = {"ours": ours(fresh, train, recipe)}
        with context:
            found["bare"] = bare(model.copy(copy.deepcopy(model.network)), images, scales, recipe)
        return found

    loops()
    forget_peak(str(model.device))
    measured = [loops() for _ in range(runs)]
    return {
        "steps_per_second": {name: spread([one[name] for one in measured]) for name in ("ours", "bare")},
        "ours_to_bare": spread([one["ours"] / one["bare"] for one in measured]),
        "peak_bytes": peak(str(model.device)),
    }


def whole(given: Any, steps: int) -> dict[str, Any]:
    """A Re-Fit to 512 codes and its fine-tuning: figures and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        request = request_of(given.shared, given.device, output=Path(folder) / "out.safetensors", seed=0)
        request = replace(request, limit=200) if given.quick else request
        since = time.perf_counter()
        done = operate("refit", request, Refit(64 if given.quick else 512), FineTune(steps=steps), Watch()).to_json()
        return {
            "steps": steps,
            "stages": done["stages"],
            "kept": done["kept"],
            "seconds": done["seconds"],
            "wall_seconds": time.perf_counter() - since,
        }


def main() -> None:
    given = options(__doc__ or "")
    found: dict[str, Any] = {"rates": {}}
    steps, runs = (6, 1) if given.quick else (100, 3)
    sizes = (512, 1024) if given.quick else (512, 16_384)
    cases = [(k, precision, False) for k in sizes for precision in ("fp32", "bf16")]
    # Compilation takes its time: last, and on the device alone.
    cases += [] if given.quick else [(k, precision, True) for k in sizes for precision in ("fp32", "bf16")]
    for i, (k, precision, compiled) in enumerate(cases):
        if i == 4:
            found["whole"] = whole(given, 5000)
            write(given, found)
        limit = 150 if given.quick else 4000
        opened = open_request(request_of(given.shared, given.device, precision=precision, limit=limit), Watch())
        name = f"K={k:,}, {precision}{', compiled' if compiled else ''}"
        try:
            found["rates"][name] = rates(opened, k, compiled, steps, runs)
        except Exception as error:
            found["rates"][name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        write(given, found)
        print(name, found["rates"][name], flush=True)
    if given.quick:
        found["whole"] = whole(given, 6)
        write(given, found)


if __name__ == "__main__":
    main()
