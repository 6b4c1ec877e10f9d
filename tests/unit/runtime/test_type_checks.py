"""Untrusted settings against the types of what they set."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import pytest

from codebook_tools.errors import CodebookError
from codebook_tools.runtime.type_checks import check_kinds, fits, kinds_of

Color = StrEnum("Color", {"RED": "red"})


@pytest.mark.parametrize(("kind", "does", "does_not"), [
    (int, [0, -3, 10**30], [True, 1.0, "1", None, [1]]), (float, [0, 1.5, 10**30], [True, "1", None, 10**400]),
    (bool, [True, False], [0, "true", None]), (str, ["", "text"], [3, None, ["text"]]),
    (int | None, [3, None], [3.5, False, "none"]), (Literal["a", "b"], ["a"], ["c", 1, ["a"], None]),
    (Literal[1, 2], [1], [True, 1.0, 3]), (Color, ["red"], ["blue", "RED", 3, ["red"]]),
    (Path, ["a/b"], [3, None, ["a"]]), (list[str], [[], ["a"]], ["a", [[]], ["a", 3], None]),
    (tuple[int, ...], [[1], "what neither YAML nor JSON has fits: its own class judges it"], []),
])  # fmt: skip
def test_a_value_fits_its_own_type_alone(kind: Any, does: list[object], does_not: list[object]) -> None:
    assert [fits(value, kind) for value in [*does, *does_not]] == [True] * len(does) + [False] * len(does_not)


def test_what_does_not_fit_is_refused_in_a_short_line() -> None:
    with pytest.raises(CodebookError, match=r"^refit: k is \[0, 1, 2, 3, 4, 5, \.\.\.\]; expected a number or text$"):
        check_kinds("refit", {"other": 1, "k": list(range(1000))}, {"k": float | str | None})
    with pytest.raises(CodebookError, match=r"^prune: names is 3; expected a list, each text$"):
        check_kinds("prune", {"names": 3}, {"names": list[str]})


def test_hints_that_cannot_be_read_ask_for_nothing() -> None:
    def make(k: NoSuchType) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert kinds_of(make) == {} and kinds_of(3) == {}
