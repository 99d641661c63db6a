from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TableHeld(_message.Message):
    __slots__ = ("name", "rows", "dim", "row_format", "bytes", "rows_ahead", "first_row", "first_column")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ROW_FORMAT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ROWS_AHEAD_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    FIRST_COLUMN_FIELD_NUMBER: _ClassVar[int]
    name: str
    rows: int
    dim: int
    row_format: str
    bytes: int
    rows_ahead: int
    first_row: int
    first_column: int
    def __init__(self, name: _Optional[str] = ..., rows: _Optional[int] = ..., dim: _Optional[int] = ..., row_format: _Optional[str] = ..., bytes: _Optional[int] = ..., rows_ahead: _Optional[int] = ..., first_row: _Optional[int] = ..., first_column: _Optional[int] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("name", "plan_epoch", "plan_fingerprint", "tables", "lanes", "version", "wire_version", "simd", "engines", "huge_bytes", "state", "slots", "request_bytes", "response_bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PLAN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLAN_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    LANES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SIMD_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    HUGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    plan_epoch: int
    plan_fingerprint: str
    tables: _containers.RepeatedCompositeFieldContainer[TableHeld]
    lanes: _containers.RepeatedScalarFieldContainer[str]
    version: str
    wire_version: int
    simd: str
    engines: int
    huge_bytes: int
    state: str
    slots: int
    request_bytes: int
    response_bytes: int
    def __init__(self, name: _Optional[str] = ..., plan_epoch: _Optional[int] = ..., plan_fingerprint: _Optional[str] = ..., tables: _Optional[_Iterable[_Union[TableHeld, _Mapping]]] = ..., lanes: _Optional[_Iterable[str]] = ..., version: _Optional[str] = ..., wire_version: _Optional[int] = ..., simd: _Optional[str] = ..., engines: _Optional[int] = ..., huge_bytes: _Optional[int] = ..., state: _Optional[str] = ..., slots: _Optional[int] = ..., request_bytes: _Optional[int] = ..., response_bytes: _Optional[int] = ...) -> None: ...

class ConnectRequest(_message.Message):
    __slots__ = ("lane", "plan_epoch", "plan_fingerprint", "wire_version", "client", "slots", "rdma")
    LANE_FIELD_NUMBER: _ClassVar[int]
    PLAN_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PLAN_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    RDMA_FIELD_NUMBER: _ClassVar[int]
    lane: str
    plan_epoch: int
    plan_fingerprint: str
    wire_version: int
    client: str
    slots: int
    rdma: bytes
    def __init__(self, lane: _Optional[str] = ..., plan_epoch: _Optional[int] = ..., plan_fingerprint: _Optional[str] = ..., wire_version: _Optional[int] = ..., client: _Optional[str] = ..., slots: _Optional[int] = ..., rdma: _Optional[bytes] = ...) -> None: ...

class ConnectReply(_message.Message):
    __slots__ = ("token", "address", "slots", "request_bytes", "response_bytes", "rdma")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RDMA_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    address: str
    slots: int
    request_bytes: int
    response_bytes: int
    rdma: bytes
    def __init__(self, token: _Optional[bytes] = ..., address: _Optional[str] = ..., slots: _Optional[int] = ..., request_bytes: _Optional[int] = ..., response_bytes: _Optional[int] = ..., rdma: _Optional[bytes] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsReply(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("timeout_s",)
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    timeout_s: float
    def __init__(self, timeout_s: _Optional[float] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("drained",)
    DRAINED_FIELD_NUMBER: _ClassVar[int]
    drained: bool
    def __init__(self, drained: _Optional[bool] = ...) -> None: ...

class MigrateRequest(_message.Message):
    __slots__ = ("lane", "engine")
    LANE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    lane: int
    engine: int
    def __init__(self, lane: _Optional[int] = ..., engine: _Optional[int] = ...) -> None: ...

class MigrateReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LookupFrame(_message.Message):
    __slots__ = ("frame",)
    FRAME_FIELD_NUMBER: _ClassVar[int]
    frame: bytes
    def __init__(self, frame: _Optional[bytes] = ...) -> None: ...

class LookupFrames(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: bytes
    def __init__(self, frames: _Optional[bytes] = ...) -> None: ...
