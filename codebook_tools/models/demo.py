"""The bundled checkpoint: a collapsed VQ-VAE of 512 codes."""

from __future__ import annotations

from pathlib import Path

DEMO = Path(__file__).with_name("demo.safetensors")
