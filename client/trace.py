"""W3C trace context (https://www.w3.org/TR/trace-context/), as frames carry it."""

from __future__ import annotations

import re

# Version 00 only, lower-case hex, ids not all zero: what the specification calls valid.
_TRACEPARENT = re.compile(r"(00)-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")


def parse_traceparent(text: str | None) -> bytes:
    """The 26 raw bytes of a traceparent (version 1, trace id 16, span id 8, flags 1), or nothing.

    A malformed one is ignored, as the specification asks: tracing must never fail a request.
    """
    found = _TRACEPARENT.fullmatch(text) if text else None
    return bytes.fromhex("".join(found.groups())) if found else b""
