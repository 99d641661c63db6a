"""`coordination` of a configuration: where several machines agree on the plan, and see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

import grpc
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sidepool.wire.config import Frozen
from sidepool.wire.errors import ConfigError
from sidepool.wire.etcd import Etcd
from sidepool.wire.etcd_plan import EtcdPlanSource

Endpoint = Annotated[str, Field(pattern=r"^(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}$")]


class EtcdTls(Frozen):
    """TLS towards etcd; PEM files, relative to the configuration file."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    ca: str
    """Authorities that sign etcd's certificates."""
    cert: str | None = None
    """Own certificate chain, where etcd asks for one."""
    key: str | None = None
    """The private key of `cert`."""

    @model_validator(mode="after")
    def _check_pair(self) -> Self:
        if (self.cert is None) != (self.key is None):
            raise PydanticCustomError("pair", "cert and key, or neither")
        return self

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; raises `ConfigError` naming the one that cannot be read."""

        def read(field: str, file: str | None) -> bytes | None:
            try:
                return None if file is None else Path(file).read_bytes()
            except OSError as e:
                raise ConfigError(f"coordination.tls.{field}: found {file!r}: cannot be read: {e}") from e

        return grpc.ssl_channel_credentials(read("ca", self.ca), read("key", self.key), read("cert", self.cert))


class Coordination(Frozen):
    """An etcd cluster, and this deployment's place in it."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    etcd: Annotated[tuple[Endpoint, ...], Field(min_length=1, max_length=16)]
    """Endpoints, `host:port`; any that answers will do."""
    prefix: Annotated[str, Field(pattern=r"^/[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*$", max_length=512)]
    """Where this deployment's keys lie: `PREFIX/plan`, `PREFIX/sidecars/NAME`. Another deployment has another one."""
    tls: EtcdTls | None = None
    """null: plain text, fit for loopback and for meshes that encrypt themselves."""
    lease_s: Annotated[int, Field(ge=2, le=3600)] = 10
    """How long after its last sign of life a sidecar is listed; it gives one three times as often. Ten seconds pass an election."""

    def relative_to(self, base: Path) -> Coordination:
        """The same with absolute paths."""
        if self.tls is None:
            return self
        files = {field: str(base / file) for field, file in self.tls.model_dump().items() if file is not None}
        return self.model_copy(update={"tls": self.tls.model_copy(update=files)})

    def connect(self) -> Etcd:
        """A client of the cluster; nothing is asked yet. Raises `ConfigError` for files that cannot be read."""
        return Etcd(self.etcd, self.tls.credentials() if self.tls is not None else None)

    def plan_source(self, fallback: Path | str | None = None) -> EtcdPlanSource:
        """The plan in etcd; `fallback`: the file that holds where etcd has none, or cannot be reached at start."""
        return EtcdPlanSource(self.connect(), self.prefix, None if fallback is None else Path(fallback))
