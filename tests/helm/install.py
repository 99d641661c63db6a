"""Install a chart with Helm's own library, in a process of its own: `install.py LIBRARY KUBECONFIG CHART`, values (JSON) on stdin.

Exit status 0 when Helm has created everything; else 1 and Helm's message on stderr.
"""

from __future__ import annotations

import ctypes
import json
import sys

OPTIONS = {"wait": False, "disable_openapi_validation": True, "server_side_apply": "false"}


def main(library: str, kubeconfig: str, chart: str) -> None:
    helm = ctypes.CDLL(library)
    helm.helm_sdkpy_last_error.restype = ctypes.c_char_p

    def check(status: int) -> None:
        if status != 0:
            sys.exit((helm.helm_sdkpy_last_error() or b"no reason given").decode())

    handle, result = ctypes.c_ulonglong(), ctypes.c_char_p()
    check(helm.helm_sdkpy_config_create(b"shop", kubeconfig.encode(), None, b"{}", ctypes.byref(handle)))
    values, options = sys.stdin.read().encode(), json.dumps(OPTIONS).encode()
    check(helm.helm_sdkpy_install(handle, b"ranking", chart.encode(), values, b"", options, ctypes.byref(result)))


main(*sys.argv[1:])
