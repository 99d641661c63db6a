"""The plan in a real etcd: read, watched, replaced by one alone, through crashes, silence, compaction and wrong content."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from certificates import Authority
from etcd_server import PREFIX, EtcdServer, etcd_server
from small_plan import plan_of

from sidepool import __main__ as entry
from sidepool.wire.coordination import EtcdTls
from sidepool.wire.errors import PlanError, TransportError
from sidepool.wire.etcd import Etcd
from sidepool.wire.etcd_plan import EtcdPlanSource
from sidepool.wire.plan import Plan, save_plan

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path_factory.mktemp("etcd")) as running:
        yield running


@pytest.fixture
def source(server: EtcdServer) -> Iterator[EtcdPlanSource]:
    """Of an etcd without any key."""
    server.ctl("del", "--prefix", PREFIX)
    with closing(server.settings().plan_source()) as found:
        yield found


def until(source: EtcdPlanSource, known: Plan) -> Plan:
    """The plan that comes after `known`, whatever is out of reach meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if (plan := source.wait(known, 1.0)) is not None:
                return plan
        except TransportError:
            time.sleep(0.01)
    raise AssertionError("no other plan came")


def wait_in_vain(source: EtcdPlanSource, known: Plan) -> None:
    """As whoever follows a source does: wait, and wait again."""
    for _ in range(int(PATIENCE_S)):
        assert source.wait(known, 1.0) is None


def test_whoever_waits_gets_the_next_plan_and_no_plan_twice(server: EtcdServer, source: EtcdPlanSource) -> None:
    assert source.publish(plan_of(1)) is None
    first = source.read()
    assert first == plan_of(1)
    assert source.wait(first, 0.1) is None
    with closing(server.settings().plan_source()) as writer:
        replaced = threading.Timer(0.05, lambda: writer.replace(first, plan_of(2)))
        replaced.start()
        second = source.wait(first, PATIENCE_S)
        replaced.join()
    assert second == plan_of(2)
    assert source.wait(first, 0.0) == second  # whoever could not take it yet asks again
    assert source.wait(second, 0.1) is None


def test_of_many_that_replace_a_plan_at_once_one_does(server: EtcdServer, source: EtcdPlanSource) -> None:
    source.publish(plan_of(1))
    outcomes: dict[int, object] = {}

    def replace(number: int) -> None:
        with closing(server.settings().plan_source()) as own:
            try:
                own.replace(plan_of(1), plan_of(2, sidecar=f"s{number}"))
                outcomes[number] = "done"
            except PlanError as e:
                outcomes[number] = e

    threads = [threading.Thread(target=replace, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, outcome in outcomes.items() if outcome == "done"]
    assert len(winners) == 1
    assert source.read() == plan_of(2, sidecar=f"s{winners[0]}")
    source.replace(plan_of(1), source.read())  # again: nothing to do
    with pytest.raises(PlanError, match=r"/shop/plan in etcd: epoch: found 2, another plan; allowed: 1"):
        source.replace(plan_of(1), plan_of(3))


def test_wrong_content_is_told_once_and_waited_out(server: EtcdServer, source: EtcdPlanSource) -> None:
    source.publish(plan_of(1))
    server.ctl("put", f"{PREFIX}/plan", given=b"version: 1")
    with pytest.raises(PlanError, match="10 bytes that are no plan"):
        source.wait(plan_of(1), PATIENCE_S)
    assert source.wait(plan_of(1), 0.1) is None
    server.ctl("del", f"{PREFIX}/plan")
    assert source.wait(plan_of(1), 0.1) is None  # gone is no change either
    source.publish(plan_of(2))
    assert source.wait(plan_of(1), PATIENCE_S) == plan_of(2)


def test_without_a_plan_in_etcd_that_of_the_file_holds(server: EtcdServer, source: EtcdPlanSource, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="/shop/plan in etcd: missing; publish one"):
        source.read()
    file = tmp_path / "plan.yaml"
    save_plan(plan_of(1), file)
    with closing(server.settings().plan_source(file)) as own:
        assert own.read() == plan_of(1)
        with pytest.raises(PlanError, match="found 1, another plan; allowed: 7"):
            own.replace(plan_of(7), plan_of(8))
        own.replace(plan_of(1), plan_of(2))
        assert own.read() == plan_of(2) == source.read()


def test_a_watch_outlives_a_crash_a_silence_and_compaction(server: EtcdServer, source: EtcdPlanSource, tmp_path: Path) -> None:
    source.publish(plan_of(1))
    file = tmp_path / "plan.yaml"
    save_plan(plan_of(1), file)
    assert source.wait(plan_of(1), 0.1) is None
    server.kill()
    with pytest.raises(TransportError, match="etcd at 127"):
        source.wait(plan_of(1), 3.0)
    with closing(server.settings().plan_source(file)) as started_without:
        assert started_without.read() == plan_of(1)
    server.start()
    source.replace(plan_of(1), plan_of(2))
    assert until(source, plan_of(1)) == plan_of(2)

    with server.frozen():
        with pytest.raises(TransportError, match="etcd at 127"), closing(server.settings().plan_source()) as other:
            other.read()
        with pytest.raises(TransportError, match="etcd at 127"):  # though nothing has closed the watch's connection
            wait_in_vain(source, plan_of(2))
    source.replace(plan_of(2), plan_of(3))
    assert until(source, plan_of(2)) == plan_of(3)

    with closing(Etcd(server.settings().etcd)) as etcd:
        revision = etcd.read(f"{PREFIX}/plan").revision
        server.ctl("compact", str(revision))
        assert list(etcd.changes(f"{PREFIX}/plan", 1, lambda call: None)) == [], "compacted: read again"
        source.replace(plan_of(3), plan_of(4))
        assert next(etcd.changes(f"{PREFIX}/plan", revision, lambda call: None)) > revision
    assert until(source, plan_of(3)) == plan_of(4)


def test_closing_ends_waiting(source: EtcdPlanSource) -> None:
    source.publish(plan_of(1))
    closing_soon = threading.Timer(0.1, source.close)
    closing_soon.start()
    assert source.wait(plan_of(1), PATIENCE_S) is None
    closing_soon.join()
    with pytest.raises(TransportError, match="this client is closed"):
        source.read()


def test_another_endpoint_answers_where_the_first_does_not(server: EtcdServer, source: EtcdPlanSource) -> None:
    source.publish(plan_of(1))
    several = server.settings().model_copy(update={"etcd": ("127.0.0.1:1", server.endpoint)})
    with closing(several.plan_source()) as own:
        assert own.read() == plan_of(1)
        own.replace(plan_of(1), plan_of(2))
        assert own.wait(plan_of(1), PATIENCE_S) == plan_of(2)


def test_etcd_is_spoken_to_under_mutual_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    own, client = authority.sign("etcd"), authority.sign("sidecar")
    files = {"ca": authority.cert, "cert": own.cert, "key": own.key}
    with etcd_server(tmp_path / "etcd", files) as server:
        tls = EtcdTls(ca=str(authority.cert), cert=str(client.cert), key=str(client.key))
        with closing(server.settings(tls).plan_source()) as source:
            source.publish(plan_of(1))
            assert source.read() == plan_of(1)
        for stranger in (None, EtcdTls(ca=str(authority.cert))):
            with closing(server.settings(stranger).plan_source()) as source, pytest.raises(TransportError):
                source.read()


def test_the_command_publishes_and_shows(
    server: EtcdServer, source: EtcdPlanSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reach = ["--etcd", server.endpoint, "--prefix", PREFIX]
    for epoch in (1, 2):
        save_plan(plan_of(epoch), tmp_path / f"{epoch}.yaml")
    assert entry.main(["etcd", "show", *reach]) == 0
    assert "plan: /shop/plan in etcd: missing" in capsys.readouterr().out
    for file, said in (("1", "epoch 1\n"), ("2", "epoch 2 in the place of 1\n"), ("2", "epoch 2 is there already\n")):
        assert entry.main(["etcd", "publish", str(tmp_path / f"{file}.yaml"), *reach]) == 0
        assert capsys.readouterr().out == f"/shop/plan: {said}"
    assert entry.main(["etcd", "show", *reach]) == 0
    assert "plan: m, epoch 2" in (shown := capsys.readouterr().out)
    assert "sidecar s: is not there" in shown
    assert entry.main(["etcd", "publish", *reach]) == 2
    assert "publish: found no plan" in capsys.readouterr().err
    assert entry.main(["etcd", "show", "--etcd", "nowhere", "--prefix", PREFIX]) == 2
    assert "etcd.0: found 'nowhere'" in capsys.readouterr().err
