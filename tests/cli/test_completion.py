"""Completion in a shell."""

from __future__ import annotations

import sys

from codebook_cli.completion import devices, families, rows
from processes import ran

from codebook_tools.models.registry import FAMILIES


def test_the_last_row_of_several_is_completed() -> None:
    assert (rows("pru"), rows("prune,ran"), rows("refit+t")) == (["prune"], ["prune,random"], ["refit+textbook"])
    assert rows("prune,pru") == rows("nothing") == []


def test_all_families_are_known_and_no_key_waits_for_torch() -> None:
    assert families("") == [*FAMILIES] and families("zal") == ["zalando"]
    assert devices("") == ["auto", "cpu", "cuda", "xpu", "mps"] and devices("c") == ["cpu", "cuda"]
    looked = "from codebook_cli.completion import families, rows; families('z'), rows('p')"
    code = f"{looked}; import sys; assert 'torch' not in sys.modules"
    assert ran(sys.executable, "-c", code).exit_code == 0
