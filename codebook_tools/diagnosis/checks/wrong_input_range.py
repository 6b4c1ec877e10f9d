"""The codes were made of images in another range than the network was trained on."""

from __future__ import annotations

from codebook_tools.diagnosis.alternatives import range_text
from codebook_tools.diagnosis.evidence import Evidence
from codebook_tools.diagnosis.explained_by import explained_by
from codebook_tools.diagnosis.finding import Finding, not_checked, of_each_book


def wrong_input_range(evidence: Evidence) -> Finding:
    """Found where the codes fit the latents of images in another range than the network's own, and not in that."""
    own = evidence.ranges.get(evidence.input_range)
    if own is None:
        return not_checked(evidence.unseen or "images alone are mapped to a range")
    others = {bounds: left for bounds, left in evidence.ranges.items() if bounds != evidence.input_range}
    bounds, least = min(others.items(), key=lambda pair: pair[1])
    summary = (
        f"without quantization the network leaves {own:.2g} of the variance of images in "
        f"{range_text(evidence.input_range)}, {least:.2g} in {range_text(bounds)}"
    )
    otherwise = Finding("ok", own / max(least, 1e-30), 1.0, summary)
    return of_each_book(lambda book: explained_by(book, "range", otherwise))(evidence)
