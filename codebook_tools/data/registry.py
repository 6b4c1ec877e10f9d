"""The modalities there are, and which of them a network takes."""

from __future__ import annotations

from codebook_tools.data.audio import Waveforms
from codebook_tools.data.images import Images
from codebook_tools.data.modality import Modality

MODALITIES: tuple[type[Modality], ...] = (Waveforms, Images)
"""In the order in which a network is asked for what it says of its data; Images takes all that say nothing."""


def modality_of(network: object) -> type[Modality]:
    """The first modality that accepts a network."""
    return next(modality for modality in MODALITIES if modality.accepts(network))
