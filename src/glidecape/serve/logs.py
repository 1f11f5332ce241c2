"""The server's log: one JSON object a line on standard error. It imports no PyTorch, because a front has no model."""

from __future__ import annotations

import json
import logging
import sys
import time

LOG = logging.getLogger("glidecape.serve")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, text, and the facts of the event."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
        }
        line |= {"event": record.getMessage()} | getattr(record, "facts", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_json() -> None:
    """Write this server's events and uvicorn's warnings to standard error, as `JsonLines`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for log, level in ((LOG, logging.INFO), (logging.getLogger("uvicorn"), logging.WARNING)):
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
