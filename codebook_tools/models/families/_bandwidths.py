"""Configs without a number of quantizers: the library derives it from bandwidths and codebook size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from codebook_tools.checkpoints.config import Config
from codebook_tools.errors import CodebookError
from codebook_tools.models.families._transformers import CONFIG_KEY

_KEY = "target_bandwidths"
_DEFAULT_SIZE = 1024  # the library's, for a config that does not say
_MARGIN = 1e-6  # kbit/s: the library rounds down


def bandwidths(config: Config, size: int, default: Sequence[float]) -> Mapping[str, object]:
    """The config's entry `target_bandwidths` with which another codebook size keeps the number of quantizers.

    The library counts the quantizers by the last bandwidth, in whole bits per code, and those in use by log2(size).

    Args:
        config: Of the original.
        size: The new number of codes.
        default: Bandwidths (kbit/s) of a config without that entry.

    Returns:
        The entry, in kbit/s; empty where the size stays.

    Raises:
        CodebookError: `size` is 1, whose codes have no bits, or the config's entries are no numbers.
    """
    old, rates = config.get(CONFIG_KEY, _DEFAULT_SIZE), config.get(_KEY, default)
    if type(old) is not int or old < 2 or not _numbers(rates):
        raise CodebookError(f"{CONFIG_KEY}={old!r} and {_KEY}={rates!r} are no config of the model; restore it")
    if size < 2:
        raise CodebookError(f"K={size}: its codes have no bits, by which the library counts quantizers; use 2 or more")
    if size == old:
        return {}
    *lower, last = rates
    scaled = [rate * math.log2(size) / math.log2(old) for rate in lower] + [last * _bits(size) / _bits(old)]
    return {_KEY: [round(rate + _MARGIN, 9) for rate in scaled]}


def _numbers(rates: object) -> TypeGuard[Sequence[float]]:
    return isinstance(rates, Sequence) and len(rates) > 0 and all(type(rate) in (int, float) for rate in rates)


def _bits(size: int) -> int:
    return math.ceil(math.log2(size))
