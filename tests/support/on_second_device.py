"""What test_second_device.py asks of the second device, in a process of its own.

    python tests/support/on_second_device.py [--no-float64] < jobs.json

A job is a list of words: which of JOBS, and what it is given. What it found goes out as JSON, a line each.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import second_device
import torch
from second_device import NAME, OPERATORS, READS, UPLOADS, counts
from typer.testing import CliRunner

from codebook_tools.clustering.assignment import nearest
from codebook_tools.clustering.kmeans import kmeans
from codebook_tools.clustering.metric import METRICS
from codebook_tools.codebook import EUCLIDEAN, Codebook
from codebook_tools.models.model import Model
from codebook_tools.runtime.progress import Watch
from codebook_tools.training import finetune
from codebook_tools.training.history import History


def command(*words: str) -> dict[str, Any]:
    """A command line: its exit code and outputs, and the operators that ran on the device."""
    from codebook_cli.app import app

    before = counts[OPERATORS]
    found = CliRunner().invoke(app, words)
    ran = counts[OPERATORS] - before
    return {"exit_code": found.exit_code, "stdout": found.stdout, "stderr": found.stderr, OPERATORS: ran}


def command_that_mixes(*words: str) -> dict[str, Any]:
    """As `command`, with a fault in the library: the decoder gets codes that were left on the CPU."""
    embed = Model.embed
    with patch.object(Model, "embed", lambda self, codes, stage=0: embed(self, codes, stage).cpu()):
        return command(*words)


def waits_of_steps(*words: str) -> dict[str, Any]:
    """A command line with a fine-tuning: also what the host waited for in its steps, looks at validation data left out;
    of them there are two, at both ends."""
    within = Counter[str]()

    def counted(work: Callable[..., Any], sign: int) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            before = counts.copy()
            try:
                return work(*given)
            finally:
                for name in (READS, UPLOADS):
                    within[name] += sign * (counts[name] - before[name])

        return run

    with (
        patch.object(finetune, "evaluation_steps", lambda steps: {0, steps}),
        patch.object(finetune, "_train", counted(finetune._train, 1)),
        patch.object(History, "evaluate", counted(History.evaluate, -1)),
    ):
        return {**command(*words), **within}


def monitored(name: str) -> dict[str, Any]:
    """A training there and here with a monitor: the reads and uploads that counting adds to a step, and figures."""
    import training_loops

    import codebook_tools as ct

    figures, waits = dict[str, Any](), list[Counter[str]]()
    for device in ("cpu", NAME):
        net = training_loops.made(name).to(device)
        optimizer = torch.optim.Adam(net.parameters(), 0.0)
        monitor = ct.CodebookMonitor(net)
        for acts in (False, True):
            for step in range(6):
                before = counts.copy()
                net.train()(training_loops.images(48, step).to(device))[0].mean().backward()
                if not acts and step == 5 and device == NAME:
                    waits.append(counts - before)
                optimizer.step()
            figures[f"{device} {acts}"] = monitor.epoch()
            monitor.close()
            if not acts:
                before = counts.copy()
                net(training_loops.images(48, 5).to(device))[0].mean().backward()
                waits.append(counts - before)
                with torch.no_grad():
                    for parameter in net.quantizer.parameters():
                        parameter[::2] += 20
                monitor = ct.CodebookMonitor(net, optimizer=optimizer, revive_every=3, refit_at=5)
    with_monitor, without = waits[-2:]
    return figures | {name: with_monitor[name] - without[name] for name in (READS, UPLOADS)}


def mixtures() -> dict[str, str | None]:
    """What operators that mix devices raise, by name; None where they do not."""
    here, there = torch.ones(3, 4), torch.ones(3, 4).to(NAME)
    tried: dict[str, Callable[[], object]] = {
        "sum": lambda: here + there,
        "product": lambda: there @ here.T,
        "into the other": lambda: here.add_(there),
        "into a number": lambda: torch.zeros(()).add_(there.sum()),
        "layer": lambda: torch.nn.functional.linear(there, here),
        "concatenation": lambda: torch.cat([here, there]),
        "indices": lambda: here[torch.zeros(1, dtype=torch.int64).to(NAME)],
        "values": lambda: there.index_put_((torch.tensor([0]),), here[:1]),
        "numpy": lambda: there.numpy(),
        "a number of the CPU": lambda: there * torch.tensor(2.0),
        "indices of the CPU": lambda: there[torch.tensor([0])],
        "copies": lambda: there.cpu() + here + there.to("cpu"),
    }
    return {name: _raised(work) for name, work in tried.items()}


def waits() -> dict[str, list[int]]:
    """Reads and uploads of operators, by name."""
    values = torch.arange(6.0).to(NAME)
    tried: dict[str, Callable[[], object]] = {
        "item": lambda: values[0].item(),
        "bool": lambda: bool(values[0] > 1),
        "cpu": lambda: values.cpu(),
        "tolist": lambda: values.tolist(),
        "copy": lambda: torch.empty(6).copy_(values),
        "nonzero": lambda: values.nonzero(),
        "mask": lambda: values[values > 1],
        "upload": lambda: torch.ones(6).to(NAME),
        "upload without waiting": lambda: torch.ones(6).to(NAME, non_blocking=True),
        "arithmetic": lambda: (values * 2 + 1).topk(2).values.sum(),
    }
    return {name: [_counted(work, kind) for kind in (READS, UPLOADS)] for name, work in tried.items()}


def _counted(work: Callable[[], object], kind: str) -> int:
    before = counts[kind]
    work()
    return counts[kind] - before


def same_codes() -> dict[str, list[int]]:
    """How many latents get another code than on the CPU, where there are near-ties, and the reads: waiting for the
    device, then not. By the metric."""
    random = torch.Generator().manual_seed(0)
    latents, vectors = torch.randn(500, 4, generator=random), torch.randn(64, 4, generator=random)
    vectors[1], vectors[40] = vectors[0], vectors[0]
    latents[:100] = (vectors[10] + vectors[20]) / 2
    found = {}
    for metric in METRICS.values():
        codebook = Codebook(vectors, metric)
        there, expected = Codebook(vectors.to(NAME), metric), nearest(latents, codebook)
        found[metric.name] = []
        for wait in (True, False):
            before = counts[READS]
            codes = nearest(latents.to(NAME), there, wait=wait)
            read = counts[READS] - before
            found[metric.name] += [int((codes.cpu() != expected).sum()), read]
    return found


def many_clusters() -> dict[str, float]:
    """The mean error of k-means there and here, among neighbors, with cells that start empty."""
    random = torch.Generator().manual_seed(0)
    points = torch.randn(9000, 20, generator=random)
    start = torch.cat([points[:290], points[:10] + 100])
    ends = dict[str, float]()
    for device in ("cpu", NAME):
        for name, init in (("kmeans++", "kmeans++"), ("start", start.to(device))):
            result = kmeans(points.to(device), 300, init=init, watch=Watch())  # type: ignore[arg-type]
            assert result.centroids.device.type == device
            ends[f"{device} {name}"] = result.inertia / len(points)
    return ends


def largest() -> dict[str, int]:
    """Bytes of the largest tensor that a search among 262,144 codes makes, waiting and not."""
    codebook = Codebook(torch.randn(262_144, 2).to(NAME), EUCLIDEAN)
    latents = torch.randn(300, 2).to(NAME)
    found = {}
    for wait in (True, False):
        second_device.settings.largest = 0
        nearest(latents, codebook, wait=wait)
        found[str(wait)] = second_device.settings.largest
    return found


def _raised(work: Callable[[], object]) -> str | None:
    try:
        work()
    except (RuntimeError, TypeError) as error:
        return str(error)
    return None


JOBS: dict[str, Callable[..., Any]] = {
    job.__name__: job
    for job in (
        *(command, command_that_mixes, waits_of_steps, monitored, mixtures, waits, same_codes, many_clusters, largest),
    )
}


def main(options: Sequence[str]) -> None:
    second_device.register(float64="--no-float64" not in options)
    for name, *words in json.load(sys.stdin):
        print(json.dumps(JOBS[name](*words)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
