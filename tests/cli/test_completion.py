"""Completion in a shell."""

from __future__ import annotations

import subprocess
import sys

import pytest
from codebook_cli.completion import devices, families, rows

from codebook_tools.models.registry import FAMILIES


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("pru", ["prune"]),
        ("prune,ran", ["prune,random"]),
        ("prune,pru", []),
        ("refit+t", ["refit+textbook"]),
        ("nothing", []),
    ],
)
def test_the_last_row_of_several_is_completed(typed: str, offered: list[str]) -> None:
    assert rows(typed) == offered


def test_all_families_are_known_and_no_key_waits_for_torch() -> None:
    assert families("") == [*FAMILIES] and families("zal") == ["zalando"]
    assert devices("") == ["auto", "cpu", "cuda", "xpu", "mps"] and devices("c") == ["cpu", "cuda"]
    looked = "from codebook_cli.completion import families, rows; families('z'), rows('p')"
    code = f"{looked}; import sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
