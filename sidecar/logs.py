"""Structured logs: one JSON object per line on stderr."""

from __future__ import annotations

import datetime
import json
import logging
import sys

_LOGGER = logging.getLogger("sidepool.sidecar")


class _JsonLines(logging.Formatter):
    """`{"ts", "level", "logger", "event", …fields}`; a traceback, where there is one, under "traceback"."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "ts": datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(level: str) -> None:
    """Send everything this process logs, libraries included, to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logging.basicConfig(handlers=[handler], force=True)
    set_level(level)


def set_level(level: str) -> None:
    """Log from `level` (debug, info, warning, error) upwards."""
    logging.getLogger().setLevel(level.upper())


def log(level: int, event: str, **fields: object) -> None:
    """Log `event` with machine-readable fields."""
    _LOGGER.log(level, event, extra={"fields": fields})


def info(event: str, **fields: object) -> None:
    """`log` at level info."""
    log(logging.INFO, event, **fields)


def error(event: str, **fields: object) -> None:
    """`log` at level error."""
    log(logging.ERROR, event, **fields)
