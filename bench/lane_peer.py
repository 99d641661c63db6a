"""The other process of `sidepool bench lane`: a sidecar's engine, and a bare grpcio server that returns as many bytes."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from sidepool import _native
from sidepool.sidecar.config import SidecarConfig

FEATURES, ROWS, DIM = 26, 20_000, 64
GRPC_OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


def serve(unix: str, tokens: dict[str, str], response_bytes: list[int]) -> None:
    """Serve until standard input closes; prints one JSON line with the ports."""
    defaults = SidecarConfig(name="peer", plan="-", shards="-")
    tables = _native.TableSet(1, FEATURES, FEATURES)
    rows = np.random.default_rng(0).standard_normal((ROWS, DIM), dtype=np.float32)
    for i in range(FEATURES):
        tables.add_table_array(i, rows, "error", 0)
        tables.add_feature(i, i, "sum", False)
    tables.seal()
    server = _native.SidecarServer(engines=defaults.engines, spin_us=defaults.spin_us, max_lanes=8, max_frame_bytes=64 << 20)
    server.publish(tables)
    server.listen_unix(unix)
    port = server.listen_tcp("127.0.0.1", 0)
    for lane, token in tokens.items():
        sizes = (defaults.slots, defaults.request_slot_bytes, defaults.response_slot_bytes)
        server.expect(bytes.fromhex(token), lane, *sizes, 60.0)
    echo = grpc.server(ThreadPoolExecutor(2), options=GRPC_OPTIONS)
    echo.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("peer", _replies(response_bytes)),))
    grpc_port = echo.add_insecure_port("127.0.0.1:0")
    echo.start()
    print(json.dumps({"tcp": port, "grpc": grpc_port}), flush=True)
    sys.stdin.read()
    echo.stop(None)
    server.close()


def _replies(response_bytes: list[int]) -> dict[str, Any]:
    """One unary method per response size, returning bytes made beforehand: nothing but the call is measured."""

    def reply(size: int) -> Any:
        body = bytes(size)
        return grpc.unary_unary_rpc_method_handler(lambda request, context: body)

    return {f"bytes{size}": reply(size) for size in response_bytes}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    serve(arguments["unix"], arguments["tokens"], arguments["response_bytes"])
