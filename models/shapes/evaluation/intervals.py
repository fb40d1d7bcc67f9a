"""Confidence intervals of shares."""

import math

_Z = 1.959963984540054  # of the normal distribution, for 95 %


def wilson_interval(right: float, of: float) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share, between 0 and 1.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Args:
        right: How many were right.
        of: How many were asked for, above 0.
    """
    share = right / of
    spread = _Z * math.sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2))
    middle, norm = share + _Z**2 / (2 * of), 1 + _Z**2 / of
    return max((middle - spread) / norm, 0.0), min((middle + spread) / norm, 1.0)


def share_text(right: float, of: float) -> str:
    """Return e.g. "92.5 % (88.0 to 95.4)" of 185 of 200."""
    low, high = wilson_interval(right, of)
    return f"{right / of:.1%} ({100 * low:.1f} to {100 * high:.1f})".replace("%", " %")
