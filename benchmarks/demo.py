"""Repair the bundled, collapsed checkpoint, print the table, and draw a photograph through the three stages.

    make demo            (or: python benchmarks/demo.py [FIGURES.json])

Writes the photograph, the repaired checkpoint and a page of the run to build/demo/. With FIGURES.json, as for
benchmarks/results/demo.json, which the README quotes, the photograph goes to demo.png beside the README.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console

from codebook_tools.checkpoints.read import read_checkpoint
from codebook_tools.data.images import sample_photographs
from codebook_tools.evaluation.measure import reconstruct
from codebook_tools.models.demo import DEMO
from codebook_tools.models.load import load_model
from codebook_tools.report.html.pages import page_with_model, write_report
from codebook_tools.report.terminal.tables import result_table
from codebook_tools.runtime.progress import Watch
from codebook_tools.strategies import Refit
from codebook_tools.training.finetune import FineTune
from codebook_tools.workflows.operate import operate
from codebook_tools.workflows.request import Request
from codebook_tools.workflows.result import Result

ROOT = Path(__file__).parents[1]
K = 128
SIDE = 132  # of the square that is drawn, from the middle of the photograph
ENLARGED = 3


def refit(output: Path, watch: Watch) -> Result:
    request = Request(output=output, force=True, gallery=True)
    return operate("refit", request, Refit(K, watch=watch), FineTune(), watch)


def through(model_path: Path, photograph: torch.Tensor, input_range: tuple[float, float]) -> torch.Tensor:
    """photograph (1, 3, height, width) in [0, 1] -> what the model makes of it."""
    model = load_model(read_checkpoint(model_path))
    model.input_range = input_range
    return reconstruct(model, photograph).media


def draw(path: Path, pictures: list[tuple[str, torch.Tensor]]) -> None:
    """Pictures (1, 3, height, width) side by side, each under its caption."""
    font = ImageFont.load_default(18)
    side = SIDE * ENLARGED
    sheet = Image.new("RGB", (len(pictures) * (side + 8) - 8, side + 30), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (caption, picture) in enumerate(pictures):
        top, left = ((n - SIDE) // 2 for n in picture.shape[-2:])
        square = picture[0, :, top : top + SIDE, left : left + SIDE].permute(1, 2, 0).mul(255).round().byte()
        sheet.paste(
            Image.fromarray(square.numpy()).resize((side, side), Image.Resampling.NEAREST), (i * (side + 8), 30)
        )
        pen.text((i * (side + 8), 4), caption, "black", font)
    sheet.save(path, optimize=True)


def main() -> None:
    os.chdir(ROOT)
    folder = Path("build") / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    finetuned = folder / "demo.refit-k128.safetensors"
    print(f"codebook refit --k {K}: k-means, install, 1,000 steps of fine-tuning; about a minute", file=sys.stderr)
    result = refit(finetuned, Watch())
    Console(highlight=False).print(result_table(result))

    bounds = result.settings["input_range"]
    assert isinstance(bounds, list)
    photograph = sample_photographs()["flower"][:424].transpose(2, 0, 1).astype(np.float32) / 255
    original = torch.from_numpy(photograph[None])
    pictures = [("original", original)]
    for name, path, stage in (
        ("before", DEMO, result.before),
        ("after", finetuned, result.finetuned),
    ):
        assert stage is not None
        use = stage.codebooks[0]
        pictures.append(
            (f"{name}: {use.used} of {use.size} codes in use", through(path, original, (bounds[0], bounds[1])))
        )
    picture = Path("demo.png") if len(sys.argv) > 1 else folder / "demo.png"
    draw(picture, pictures)
    if len(sys.argv) > 1:
        figures: dict[str, Any] = {
            "command": "python benchmarks/demo.py",
            "torch": torch.__version__,
            "result": result.to_json(),
        }
        figures["result"] |= {"model": DEMO.name, "outputs": {}}
        Path(sys.argv[1]).write_text(json.dumps(figures, indent=2) + "\n")
    page = folder / "report.html"
    typed = f"codebook refit --k {K} --report {page}"
    request = Request(model=finetuned, input_range=(bounds[0], bounds[1]))
    write_report(result, page_with_model(result, typed, request, Watch()), page)
    print(f"the photograph: {picture}; the page of the run: {page}", file=sys.stderr)


if __name__ == "__main__":
    main()
