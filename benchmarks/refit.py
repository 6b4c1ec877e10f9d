"""What a refit costs beyond one pass of the encoder: `encode` + `strategy` seconds of `codebook refit --steps 0`
against a bare loop of the encoder over the same images, decoded beforehand.

    python benchmarks/refit.py [--model FILE] [--data PATH] [--k 128] [--runs 3] [--device cpu] [--output FILE.json]

Without --model and --data: the bundled demo. Both take turns in one process; then once more with an untrained network
of ten times as many weights in the same layout. Writes benchmarks/results/refit.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import machine
from safetensors.torch import save_file

from codebook_tools.checkpoints.read import Checkpoint
from codebook_tools.models.networks.zalando import make
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.session import open_request

RESULTS = Path(__file__).parent / "results" / "refit.json"


def bare_loop(request: Request) -> Callable[[], float]:
    """A run of the encoder over the calibration images of a request; its seconds."""
    opened = open_request(request, Watch())
    model, (low, high) = opened.model, opened.model.input_range
    batches = [images * (high - low) + low for _, images in opened.calibration.batches(request.batch_size)]
    batches = [batch.to(model.device) for batch in batches]

    def run() -> float:
        since = time.perf_counter()
        with torch.no_grad(), model.autocast():
            for batch in batches:
                model.network.encode(batch)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - since

    return run


def refit_seconds(request: Request, k: int) -> dict[str, float]:
    done = operate("refit", request, Refit(k=k), FineTune(steps=0), Watch())
    return {phase: done.seconds[phase] for phase in ("encode", "strategy")}


def spread(seconds: list[float]) -> dict[str, object]:
    return {"median": statistics.median(seconds), "all": [round(one, 3) for one in seconds]}


def widened(checkpoint: Checkpoint, path: Path) -> Path:
    """An untrained network in the checkpoint's layout, of ten times its weights, with its codebook; at `path`."""
    shapes, key = checkpoint.shapes, "_vq_vae._embedding.weight"
    hidden, residual = (
        shapes[f"_encoder.{name}.weight"][0] for name in ("_conv_3", "_residual_stack._layers.0._block.1")
    )
    size, dim = shapes[key]
    torch.manual_seed(0)
    network = make(size, shapes["_encoder._conv_1.weight"][1], int(hidden * WIDER), int(residual * WIDER), dim=dim)
    save_file(network.state_dict() | {key: checkpoint.tensor(key)}, path)
    return path


WIDER = 10**0.5


def compared(request: Request, k: int, runs: int) -> dict[str, Any]:
    """Seconds of both, which take turns, and their ratio."""
    bare = bare_loop(request)
    bare()  # the first run of a process pays for what is loaded and chosen then
    loops, refits = list[float](), list[dict[str, float]]()
    for _ in range(runs):  # in turn, so that a busy moment of the machine meets both alike
        loops.append(bare())
        refits.append(refit_seconds(request, k))
    whole = [sum(phases.values()) for phases in refits]
    return {
        "bare encoder loop": spread(loops),
        "refit": spread(whole),
        **{phase: spread([phases[phase] for phases in refits]) for phase in ("encode", "strategy")},
        "ratio": statistics.median(whole) / statistics.median(loops),
        "ratios": [round(ours / theirs, 3) for ours, theirs in zip(whole, loops, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        request = Request(
            model=given.model,
            data=tuple(given.data),
            batch_size=given.batch_size,
            device=given.device,
            precision=given.precision,
            output=Path(folder) / "refitted.safetensors",
            force=True,
        )
        larger = widened(request.checkpoint, Path(folder) / "larger.safetensors")
        results: dict[str, Any] = {
            "command": f"python benchmarks/refit.py {' '.join(Path(text).name for text in sys.argv[1:])}".strip(),
            "machine": machine(given.device),
            "model": given.model.name if given.model else "the bundled demo",
            **compared(request, given.k, given.runs),
            "ten times as large": compared(replace(request, model=larger, sample=True), given.k, given.runs),
        }
    given.output.write_text(json.dumps(results, indent=2) + "\n")
    for name, case in ((results["model"], results), ("ten times as large", results["ten times as large"])):
        seconds = {part: case[part]["median"] for part in ("bare encoder loop", "encode", "strategy", "refit")}
        print(f"{name}: {', '.join(f'{part} {of:.2f} s' for part, of in seconds.items())}")
        print(f"  refit / bare encoder loop {case['ratio']:.2f}")


if __name__ == "__main__":
    main()
