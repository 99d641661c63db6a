"""Files of numbers: timestamps to replay, sizes to send."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sidepool.wire.errors import ConfigError


def read_numbers(path: Path, least: float) -> NDArray[np.float64]:
    """Numbers separated by white space, at least one, all of them from `least` on; raises `ConfigError`."""
    allowed = f"numbers from {least:g} on, separated by white space"
    try:
        numbers = np.array(path.read_text(encoding="ascii").split(), np.float64)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path}: {e}; allowed: {allowed}") from e
    wrong = numbers[~(np.isfinite(numbers) & (numbers >= least))]
    if not numbers.size or wrong.size:
        raise ConfigError(f"{path}: found {wrong[0] if wrong.size else 'nothing'}; allowed: {allowed}")
    return numbers
