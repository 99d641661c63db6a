"""One world with two running sidecars, and a client for every lane to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from lookup_world import SIDECARS, World, write_world
from rdma_devices import DEVICES, RANKER_PATH, SIDECAR_SETTINGS
from sidecar_process import ready

from sidepool.client import EmbeddingClient
from sidepool.client.lanes import Lane
from sidepool.wire.plan import Plan


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world"), settings=SIDECAR_SETTINGS if DEVICES else None)


@pytest.fixture(scope="session")
def served_plan(world: World) -> Iterator[Plan]:
    """The world's plan with both sidecars running."""
    with ready(world.config(SIDECARS[0])) as (_, left), ready(world.config(SIDECARS[1])) as (_, right):
        yield world.at(left["grpc"], right["grpc"])


@pytest.fixture(scope="session", params=["local", "shm", "tcp", "grpc", "rdma"])
def lane(request: pytest.FixtureRequest) -> Lane:
    name: Lane = request.param
    if name == "rdma" and not DEVICES:
        pytest.skip("no RDMA device on this machine; make test-rdma runs this in a guest that has some")
    return name


@pytest.fixture(scope="session")
def client(lane: Lane, world: World, served_plan: Plan) -> Iterator[EmbeddingClient]:
    shards = world.directory if lane == "local" else None
    with EmbeddingClient.connect(served_plan, lane=lane, shards_dir=shards, name="contract tests", rdma=RANKER_PATH) as connected:
        yield connected
