"""Warnings about a fine-tuned model that is worse than the original: larger error, less sharpness, less structure."""

from __future__ import annotations

from codebook_tools.evaluation.figures import Measurement

LEAST = 0.9
"""Smallest share of the original's sharpness without a warning; of the original's no more than the images' counts, as
more is noise. Fine-tuning the demo on the squared or the absolute error kept at least 0.94 of it, and after a training
with a discriminator 0.4."""

ROSE = 5e-4
"""Smallest relative rise of the error with a warning: less would be printed as +0.0%."""

LOST = 0.01
"""Largest loss of SSIM without a warning; a good fine-tuning raises SSIM."""


def worse_warnings(before: Measurement, kept: Measurement | None) -> list[str]:
    """A warning where the kept state has a larger error on the test data than the original, else none."""
    if kept is None or kept.mse is None or before.mse is None or kept.mse <= (1 + ROSE) * before.mse:
        return []
    times = kept.mse / before.mse if before.mse else float("inf")
    by = f"{times:.1f} times" if times >= 2 else f"{times - 1:+.1%}"
    return [f"the error on the test data rose from {before.mse:.6f} to {kept.mse:.6f} ({by})"]


def blur_warnings(before: Measurement, after: Measurement) -> list[str]:
    """Warnings where the fine-tuned model has lost sharpness or SSIM; see LEAST and LOST."""
    warnings = list[str]()
    if before.sharpness and after.sharpness is not None and after.sharpness < LEAST * min(1.0, before.sharpness):
        warnings.append(
            f"the fine-tuned model is blurrier than the original: sharpness fell from {before.sharpness:.1%} to "
            f"{after.sharpness:.1%}; --loss l1 with --perceptual, or with --distill 1, keeps it sharper"
        )
    if before.ssim is not None and after.ssim is not None and after.ssim < before.ssim - LOST:
        warnings.append(
            f"the fine-tuned model is less true than the original: SSIM fell from {before.ssim:.4f} to "
            f"{after.ssim:.4f}; --distill 1 keeps it nearer, and so does --perceptual"
        )
    return warnings
