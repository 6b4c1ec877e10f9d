"""Whether a model shows less than the original did: a larger error, less sharpness, less structure."""

from __future__ import annotations

from codebook_tools.evaluation.figures import Measurement

LEAST = 0.9
"""Of the sharpness that the original had, up to that of the images, for more is noise. A fine-tuning of the demo on the
squared or the absolute error left 0.94 of it or more; after a training with a discriminator, 0.4."""

ROSE = 5e-4
"""Of the original's error: less is not seen in a per cent with one digit."""

LOST = 0.01
"""Of the SSIM, which a fine-tuning that goes well raises."""


def worse_warnings(before: Measurement, kept: Measurement | None) -> list[str]:
    """What to warn of where the kept state's error on the test data is above the original's."""
    if kept is None or kept.mse is None or before.mse is None or kept.mse <= (1 + ROSE) * before.mse:
        return []
    times = kept.mse / before.mse if before.mse else float("inf")
    by = f"{times:.1f} times" if times >= 2 else f"{times - 1:+.1%}"
    return [f"the error on the test data rose from {before.mse:.6f} to {kept.mse:.6f} ({by})"]


def blur_warnings(before: Measurement, after: Measurement) -> list[str]:
    """What to warn of where the fine-tuned model has less than LEAST times the original's sharpness, or LOST more of
    the SSIM."""
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
