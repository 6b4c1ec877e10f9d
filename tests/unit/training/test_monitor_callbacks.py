"""The monitor in the training loops of Lightning, transformers and accelerate: the real libraries, on the CPU."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from places import ROOT, SUPPORT, TESTS
from processes import ran
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from training_loops import K, Net, images, made

import codebook_tools as ct

pytestmark = pytest.mark.slow

FIGURES = {f"codebook/{name}" for name in ("used", "dead", "usage", "perplexity", "effective_dimension", "revived")}


def collapsing() -> Net:
    net = made("straight")
    with torch.no_grad():
        net.quantizer.embedding.weight[1:] += 50  # type: ignore[union-attr, index]
    return net


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.epochs = collapsing(), list[dict[str, float]]()

        def training_step(self, batch: Any, index: int) -> Tensor:
            reconstruction, (_, loss, _) = self.net(batch[0])
            total: Tensor = (reconstruction - batch[0]).square().mean() + loss
            return total

        def on_train_epoch_start(self) -> None:
            self.epochs.append({key: float(value) for key, value in self.trainer.callback_metrics.items()})

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-3)

    callback = ct.lightning_monitor(revive_every=4)
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(images(256)), 32))
    first, last = module.epochs[1], {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert {*first} == {*last} == FIGURES
    assert first["codebook/revived"] > K / 2 and last["codebook/used"] > K / 2 and callback.monitor.steps == 24
    assert all(not one._forward_hooks for one in module.modules())


class Images(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 256

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": IMAGES[index]}


IMAGES = images(256)


class Trained(nn.Module):
    """As transformers' Trainer wants it: returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = collapsing()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        reconstruction, (_, loss, _) = self.net(pixels)
        return {"loss": (reconstruction - pixels).square().mean() + loss}


def test_transformers(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=3, per_device_train_batch_size=32, use_cpu=True, save_strategy="no",
        logging_strategy="no", report_to="none", disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    model = Trained()
    trainer = Trainer(model, arguments, train_dataset=Images())
    callback = ct.transformers_monitor(trainer, revive_every=2)
    trainer.train()
    epochs = [entry for entry in trainer.state.log_history if "codebook/used" in entry]
    assert len(epochs) == 3 and all({*entry} >= FIGURES for entry in epochs)
    assert epochs[0]["codebook/revived"] > K / 2 and epochs[-1]["codebook/used"] > K / 2
    assert callback.monitor.steps == trainer.state.global_step == 12
    assert all(not one._forward_hooks for one in model.modules())


LOOP = """
import json, sys
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset
from training_loops import images
from test_monitor_callbacks import collapsing
import codebook_tools as ct

accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=sys.argv[1])
accelerator.init_trackers("run")
torch.manual_seed(accelerator.process_index)
model, revive = collapsing(), int(sys.argv[2])
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
loader = DataLoader(TensorDataset(images(256)), 16)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
settings = {"optimizer": optimizer, "revive_every": 8, "refit_at": 40} if revive else {}
monitor = ct.CodebookMonitor(model, **settings)
codes, epochs = [], []
inner = accelerator.unwrap_model(model)
inner.quantizer.register_forward_hook(lambda module, args, output: codes.append(output[2]))
for epoch in range(6):
    for (batch,) in loader:
        reconstruction, (_, loss, _) = model(batch)
        accelerator.backward((reconstruction - batch).square().mean() + loss)
        optimizer.step()
        optimizer.zero_grad()
    epochs.append(monitor.epoch())
    monitor.log(accelerator)
    own = torch.bincount(torch.cat(codes), minlength=24)
    codes.clear()
    total = accelerator.reduce(own)
    assert epochs[-1]["used"] == int((total > 0).sum()), (epochs[-1], total)
weights = [float(tensor.double().sum()) for tensor in inner.state_dict().values()]
moments = [float(state["exp_avg"].double().sum()) for state in optimizer.state.values()]
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump([accelerator.num_processes, weights, moments, epochs], file)
accelerator.end_training()
"""


@pytest.mark.parametrize("revive", [0, 1])
def test_accelerate_in_two_processes(tmp_path: Path, revive: int) -> None:
    pytest.importorskip("accelerate")
    script = tmp_path / "loop.py"
    script.write_text(LOOP)
    launch(script, tmp_path, revive)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1] and results[0][0] == 2, "alike on all ranks"
    epochs = results[0][3]
    if revive:
        assert epochs[0]["revived"] > K / 2 and epochs[-1]["used"] > K / 2
    else:
        assert epochs[-1]["used"] < K / 2
    assert list(tmp_path.rglob("events.out.tfevents*")), "the Accelerator's tracker has them"


def launch(*arguments: object) -> None:
    """In two processes; accelerate starts several on a CPU only as it starts them for GPUs."""
    folders = map(str, (SUPPORT, TESTS, Path(__file__).parent, ROOT))
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    done = ran(*command, "--main_process_port", 0, *arguments, env=environment)
    assert done.exit_code == 0, done.stderr


def test_accelerate_starts_a_command_as_torchrun_does(tiny: Path, tmp_path: Path, codebook: Run) -> None:
    pytest.importorskip("accelerate")
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    words = ("refit", tiny, "--k", 6, "--steps", 0, "--limit", 20)
    assert codebook(*words, "-o", one).exit_code == 0
    launch("-m", "codebook_tools", *words, "-o", two)
    state, other = load_file(one), load_file(two)
    assert state.keys() == other.keys() and all(torch.allclose(state[key], other[key], atol=1e-5) for key in state)


def test_the_blocks_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning")
    from torch.utils.tensorboard import SummaryWriter
    from transformers import Trainer, TrainingArguments

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch)["loss"]
        return loss

    monkeypatch.chdir(tmp_path)
    model = Trained()
    names: dict[str, Any] = {
        "model": model, "optimizer": torch.optim.Adam(model.parameters(), 1e-3), "batches": IMAGES.split(32),
        "loss_of": loss_of, "writer": SummaryWriter(tmp_path),
        "trainer": Trainer(Trained(), TrainingArguments(str(tmp_path), report_to="none"), train_dataset=Images()),
    }  # fmt: skip
    page = (ROOT / "docs" / "training-loop.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
    for block in blocks:
        exec(compile(block.replace("revive_every=50", "revive_every=6"), "training-loop.md", "exec"), names)
    assert len(blocks) == 2 and names["monitor"].scalars()["codebook/used"] > K / 2
    assert type(names["callback"]).__name__ == "LightningMonitor"
    assert "TransformersMonitor" in {type(one).__name__ for one in names["trainer"].callback_handler.callbacks}


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ct.CodebookError, match=r"lightning_monitor needs lightning.*codebook-tools\[lightning\]"):
        ct.lightning_monitor()
