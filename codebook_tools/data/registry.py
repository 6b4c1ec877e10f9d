"""All modalities, and the choice of one for a network."""

from __future__ import annotations

from codebook_tools.data.arrays import Arrays
from codebook_tools.data.audio import Waveforms
from codebook_tools.data.images import Images
from codebook_tools.data.modality import Modality

MODALITIES: tuple[type[Modality], ...] = (Arrays, Waveforms, Images)
"""In order of precedence; Images accepts any network."""


def modality_of(network: object) -> type[Modality]:
    """The first modality that accepts a network."""
    return next(modality for modality in MODALITIES if modality.accepts(network))


BY_NAME = {modality.name: modality for modality in MODALITIES}
"""By name, as in --modality."""
