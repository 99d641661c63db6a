"""Which files a change of plans replaces, in what order, and what it says when it lacks something."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from small_plan import plan_of

from sidepool.__main__ import main
from sidepool.partition.apply import apply
from sidepool.partition.apply_command import find_places
from sidepool.wire.control_channel import ClientTls
from sidepool.wire.control_pb2 import MoveReply, PrepareRequest
from sidepool.wire.control_pb2_grpc import SidecarServicer, add_SidecarServicer_to_server
from sidepool.wire.errors import ConfigError, PlanError
from sidepool.wire.plan import SidecarAddress, load_plan, save_plan


def write(directory: Path, *copies: str) -> list[Path]:
    """`plan.yaml` of epoch 1, and copies of it in the model repository."""
    paths = [directory / "plan.yaml", *(directory / "model_repository" / copy / "plan.yaml" for copy in copies)]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plan(plan_of(1), path)
    return paths


def epochs(paths: list[Path]) -> list[int]:
    return [load_plan(path).epoch for path in paths]


def test_copies_of_the_plan_change_with_it_and_other_models_plans_do_not(tmp_path: Path) -> None:
    root, first, second, other = write(tmp_path, "m/1", "m/2", "n/1")
    save_plan(plan_of(7, model="n"), other)
    places = find_places([tmp_path], plan_of(2))
    assert [getattr(source, "path", None) for source in places.sources] == [first, second, root]  # what counts comes last
    save_plan(plan_of(2), first)  # an earlier try came this far
    again = find_places([tmp_path], plan_of(2))
    assert again.read().epoch == 1
    again.replace(plan_of(1), plan_of(2))
    assert epochs([root, first, second, other]) == [2, 2, 2, 7]


def test_what_one_place_refuses_no_place_keeps(tmp_path: Path) -> None:
    root, first, second = write(tmp_path, "m/1", "m/2")
    places = find_places([tmp_path], plan_of(2))
    save_plan(plan_of(9), second)  # somebody else changed it
    with pytest.raises(PlanError, match="epoch: found 9, another plan; allowed: 1"):
        places.replace(plan_of(1), plan_of(2))
    assert epochs([root, first, second]) == [1, 1, 9]


def test_several_deployments_end_with_the_first(tmp_path: Path) -> None:
    paths = [write(tmp_path / name)[0] for name in ("a", "b", "c")]
    places = find_places([tmp_path / "a", paths[1], tmp_path / "c"], None)
    assert [getattr(source, "path", None) for source in places.sources] == [paths[1], paths[2], paths[0]]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["deploy"], "allowed: one plan, --inventory FILE"),
        (["apply", "next.yaml"], "apply: found neither --deployment nor --etcd"),
        (["apply", "--deployment", "deploy"], "apply: found []; allowed: one plan"),
        (["rollback", "next.yaml", "--deployment", "deploy"], "rollback: found ['next.yaml']; allowed: no plan"),
        (["apply", "next.yaml", "--deployment", "deploy", "--bytes-per-s", "-1"], "bytes-per-s: found -1.0"),
        (["apply", "next.yaml", "--deployment", "deploy", "--bytes-per-s", "1e-9"], "allowed: 1000000 to 100000000000, or 0"),
        (["apply", "none.yaml", "--deployment", "none"], "none.yaml: cannot be read"),
    ],
)
def test_the_command_says_what_it_lacks(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    assert complaint in capsys.readouterr().err


class Impostor(SidecarServicer):
    """A sidecar at the address of another one."""

    def Prepare(self, request: PrepareRequest, context: grpc.ServicerContext) -> MoveReply:
        return MoveReply(name="other", phase="fetching")

    Drop = Prepare


def test_a_plan_whose_addresses_are_mixed_up_is_not_applied(tmp_path: Path) -> None:
    save_plan(plan_of(1), tmp_path / "plan.yaml")
    server = grpc.server(ThreadPoolExecutor(1))
    add_SidecarServicer_to_server(Impostor(), server)  # type: ignore[no-untyped-call]
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    new = plan_of(2).model_copy(update={"sidecars": (SidecarAddress(name="s", address=address),)})
    try:
        with pytest.raises(PlanError, match=f"sidecar 's': address: found 'other' at {address}; allowed: 's'"):
            apply(find_places([tmp_path], new), new, ClientTls())
    finally:
        server.stop(None).wait()
    assert epochs([tmp_path / "plan.yaml"]) == [1]


@pytest.mark.parametrize("files", [{"cert"}, {"key"}, {"cert", "key"}, {"ca", "cert"}, {"ca", "key"}])
def test_half_a_certificate_is_refused(files: set[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="alone; allowed: ca, or ca, cert and key, or none of them"):
        ClientTls(**dict.fromkeys(files, tmp_path)).channel("127.0.0.1:1")
