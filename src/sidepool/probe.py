"""`sidepool probe`: one tiny inference through Triton, as a liveness probe.

Triton calls a Python model ready after its process has ended, too; whether it answers shows only in an answer. Standard library
alone, so that a probe costs a tenth of a second.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from sidepool.wire.errors import ConfigError, TransportError

# What a ranker begins its errors with: it is alive, whatever is the matter with its sidecars or with a request of zeros. A ranker
# that reports defects (INTERNAL) is restarted.
_ANSWERED = re.compile(r"\[(?!INTERNAL\])[A-Z]+\] ")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `sidepool probe`."""
    parser.add_argument("--triton", required=True, metavar="HOST:PORT", help="Triton's HTTP port")
    parser.add_argument("--model", required=True, metavar="NAME", help="a model of sidepool's in it")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="for the answer (default: 5)")


def run(args: argparse.Namespace) -> int:
    """Exit status 0 where the model's process answers, with scores or a reason of its own; raises `TransportError` where not."""
    if not 0 < args.timeout < math.inf:
        raise ConfigError(f"timeout: found {args.timeout}; allowed: seconds above 0")
    print(probe(args.triton, args.model, args.timeout))
    return 0


def probe(triton: str, model: str, timeout_s: float) -> str:
    """Ask `model` for the score of one sample of zeros; returns what it said. Raises `TransportError` where it does not answer."""
    base = f"http://{triton}/v2/models/{urllib.parse.quote(model)}"
    status, config = _ask(f"{base}/config", None, timeout_s)
    if status != 200:
        raise TransportError(f"Triton at {triton}, model {model!r}: status {status}: {_reason(config)}")
    inputs = [_zeros(tensor, config) for tensor in config["input"]]
    status, answer = _ask(f"{base}/infer", {"inputs": inputs}, timeout_s)
    if status == 200:
        return f"{model}: scores"
    reason = _reason(answer)
    if not _ANSWERED.search(reason):
        raise TransportError(f"Triton at {triton}, model {model!r}: status {status}: {reason}")
    return f"{model}: {reason}"


def _ask(url: str, content: Any, timeout_s: float) -> tuple[int, Any]:
    data = None if content is None else json.dumps(content).encode()
    try:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data), timeout=timeout_s) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as e:
            with e:
                return e.code, json.load(e)
    except (OSError, ValueError) as e:
        raise TransportError(f"{url}: {e}") from e


def _reason(answer: Any) -> str:
    return str(answer.get("error", answer)) if isinstance(answer, dict) else str(answer)


def _zeros(tensor: Any, config: Any) -> Any:
    """An input of one sample; with jagged features, of one id per feature."""
    sizes = [int(size) for size in tensor["dims"]]
    if tensor["name"].endswith((".values", ".weights")):
        lengths = next(t for t in config["input"] if t["name"].endswith(".lengths"))
        sizes = [int(lengths["dims"][0])]
    shape = [1, *(size if size > 0 else 1 for size in sizes)]
    value = 1 if tensor["name"].endswith(".lengths") else 0
    datatype = tensor["data_type"].removeprefix("TYPE_")
    return {"name": tensor["name"], "shape": shape, "datatype": datatype, "data": [value] * math.prod(shape)}
