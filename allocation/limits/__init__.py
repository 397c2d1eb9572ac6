"""Ready-made limits: counts, shares, devices, bytes read per token."""

from bitknap.allocation.limits.devices import device_bytes
from bitknap.allocation.limits.ready_made import (
    bits_per_layer,
    bytes_per_token,
    count_at_least,
    count_at_most,
    custom,
    share_at_most,
)

__all__ = [
    "bits_per_layer",
    "bytes_per_token",
    "count_at_least",
    "count_at_most",
    "custom",
    "device_bytes",
    "share_at_most",
]
