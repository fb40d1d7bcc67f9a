"""Token buckets, which bound how often a key may call."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class _Bucket:
    tokens: float
    filled: float


class TokenBuckets:
    """A bucket of tokens per key; every call takes one.

    Args:
        per_minute: Tokens that a bucket gains per minute, and most tokens in it.
        now: Clock in seconds.
    """

    def __init__(self, per_minute: float, now: Callable[[], float] = time.monotonic) -> None:
        self._per_second, self._capacity = per_minute / 60, max(1.0, per_minute)
        self._now = now
        self._buckets: dict[str, _Bucket] = {}

    def take(self, key: str) -> float:
        """Take a token of a key.

        Returns:
            0, or the seconds until there will be one, if there is none.
        """
        now = self._now()
        bucket = self._buckets.setdefault(key, _Bucket(self._capacity, now))
        gained = (now - bucket.filled) * self._per_second
        bucket.tokens, bucket.filled = min(self._capacity, bucket.tokens + gained), now
        if bucket.tokens < 1:
            return (1 - bucket.tokens) / self._per_second
        bucket.tokens -= 1
        return 0.0
