"""Whether a fine-tuning left a model blurrier than it was."""

from __future__ import annotations

from codebook_tools.measure import Measurement

LEAST = 0.9  # of the sharpness that the original had
LOST = 0.01  # of SSIM


def blur_warnings(before: Measurement, after: Measurement) -> list[str]:
    """What to warn of where the fine-tuned model has less than LEAST times the original's sharpness, or LOST more of
    the SSIM."""
    falls = list[str]()
    if before.sharpness and after.sharpness is not None and after.sharpness < LEAST * before.sharpness:
        falls.append(f"sharpness fell from {before.sharpness:.1%} to {after.sharpness:.1%}")
    if before.ssim is not None and after.ssim is not None and after.ssim < before.ssim - LOST:
        falls.append(f"SSIM fell from {before.ssim:.4f} to {after.ssim:.4f}")
    if not falls:
        return []
    way_out = "--loss l1 with --perceptual, or with --distill 1, keeps it sharper"
    return [f"the fine-tuned model is blurrier than the original: {' and '.join(falls)}; {way_out}"]
