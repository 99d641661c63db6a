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

class FetchRequest(_message.Message):
    __slots__ = ("plan_fingerprint", "table", "first_row", "rows", "first_column", "columns", "bytes_per_s", "program_file")
    PLAN_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    FIRST_COLUMN_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    PROGRAM_FILE_FIELD_NUMBER: _ClassVar[int]
    plan_fingerprint: str
    table: str
    first_row: int
    rows: int
    first_column: int
    columns: int
    bytes_per_s: float
    program_file: bool
    def __init__(self, plan_fingerprint: _Optional[str] = ..., table: _Optional[str] = ..., first_row: _Optional[int] = ..., rows: _Optional[int] = ..., first_column: _Optional[int] = ..., columns: _Optional[int] = ..., bytes_per_s: _Optional[float] = ..., program_file: _Optional[bool] = ...) -> None: ...

class FetchChunk(_message.Message):
    __slots__ = ("first_row", "rows", "crc32c", "shard_crc32c", "last")
    FIRST_ROW_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    SHARD_CRC32C_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    first_row: int
    rows: bytes
    crc32c: int
    shard_crc32c: int
    last: bool
    def __init__(self, first_row: _Optional[int] = ..., rows: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., shard_crc32c: _Optional[int] = ..., last: _Optional[bool] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("plan", "present", "bytes_per_s")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    plan: bytes
    present: bytes
    bytes_per_s: float
    def __init__(self, plan: _Optional[bytes] = ..., present: _Optional[bytes] = ..., bytes_per_s: _Optional[float] = ...) -> None: ...

class ProgressRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("plan_fingerprint", "at_once")
    PLAN_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    AT_ONCE_FIELD_NUMBER: _ClassVar[int]
    plan_fingerprint: str
    at_once: bool
    def __init__(self, plan_fingerprint: _Optional[str] = ..., at_once: _Optional[bool] = ...) -> None: ...

class PlanHeld(_message.Message):
    __slots__ = ("epoch", "fingerprint", "leaves_in_s")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LEAVES_IN_S_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    fingerprint: str
    leaves_in_s: float
    def __init__(self, epoch: _Optional[int] = ..., fingerprint: _Optional[str] = ..., leaves_in_s: _Optional[float] = ...) -> None: ...

class MoveReply(_message.Message):
    __slots__ = ("name", "phase", "epoch", "fingerprint", "done_bytes", "total_bytes", "code", "reason", "plans", "previous")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    name: str
    phase: str
    epoch: int
    fingerprint: str
    done_bytes: int
    total_bytes: int
    code: str
    reason: str
    plans: _containers.RepeatedCompositeFieldContainer[PlanHeld]
    previous: bytes
    def __init__(self, name: _Optional[str] = ..., phase: _Optional[str] = ..., epoch: _Optional[int] = ..., fingerprint: _Optional[str] = ..., done_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., plans: _Optional[_Iterable[_Union[PlanHeld, _Mapping]]] = ..., previous: _Optional[bytes] = ...) -> None: ...

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
