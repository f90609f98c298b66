"""Varlen self-attention within the segments of a pack. `varlen` is the contract."""

from siglip2_packed.ops.attention.backends import ATTN_IMPLEMENTATIONS, why_missing
from siglip2_packed.ops.attention.varlen import VarlenAttention, buckets_unmet, for_bucket, for_pack, serves_buckets
from siglip2_packed.ops.runtime.check import Refused

__all__ = [
    "ATTN_IMPLEMENTATIONS",
    "Refused",
    "VarlenAttention",
    "buckets_unmet",
    "for_bucket",
    "for_pack",
    "serves_buckets",
    "why_missing",
]
