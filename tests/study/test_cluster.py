"""Studies on Ray: what returns from the nodes, and a cluster that loses a node."""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster as ClusterOfNodes

from peft_edge.config import RunConfig
from peft_edge.hub import load_pretrained
from peft_edge.hub.card import shareable
from peft_edge.records import FAILED, SUCCESS, add_record, read_archive
from peft_edge.study import cluster, read_grid, run_grid
from peft_edge.study.cluster import Cluster
from tests.study.support import FakeJob, done_in, fake_job, record_of, reproducible, small_grid

ROOT = Path(__file__).parents[2]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder for temporary files of a cluster node. In these tests, this process is the node."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "node"))
    return tmp_path / "node"


def run_on_node(job: FakeJob, source: bytes | None = None, artifacts: str | None = None) -> None:
    """Run a job as a task on a node does. Then read the result as the machine that started the study does."""
    place, log, files = cluster._run_on_node(job, "study", source, artifacts)
    job.folder.parent.mkdir(exist_ok=True)
    job.append_to_log(log)
    cluster._unpack(files, job.folder.parent, place=place)


def test_run_without_a_shared_file_system_has_the_record_and_the_adapter_of_a_local_run(
    tmp_path: Path, node: Path
) -> None:
    (job,) = read_grid(small_grid(tmp_path, seeds="[0]"), tmp_path / "study")
    source = cluster._train_source(job, "study")
    assert not [path for path in node.rglob("*") if path.is_file()]
    run_on_node(job, source)
    cluster._keep_source(job, source)
    assert not (node / "study" / job.name).exists()
    shutil.rmtree(node)

    alone = job.moved_to(tmp_path / "alone")
    alone.run()
    assert reproducible(job.record.model_dump()) == reproducible(alone.record.model_dump())
    config = job.record.run_info.train_config
    assert (config["output_dir"], config["cache_dir"]) == (job.config.output_dir, job.config.cache_dir)
    assert files_in(job.folder) == files_in(alone.folder)
    assert "adapting" in job.log.read_text()
    # The base model of the adapter is in the output folder, although it was trained on the node.
    images = torch.randn(2, 3, 16, 16)
    ours, expected = (load_pretrained(run.folder / "adapter") for run in (job, alone))
    assert torch.equal(ours(images), expected(images))
    # A later study finds this source model by its name.
    assert (cluster._source_name(job).parent / cluster._source_name(job).read_text()).is_dir()


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_failed_run_returns_its_record_and_continues_on_its_node(tmp_path: Path, node: Path) -> None:
    job = fake_job(tmp_path / "study" / "a", "error")
    run_on_node(job)
    assert job.status == FAILED
    assert job.record.run_info.error_msg.endswith("RuntimeError: a fails\n")
    assert str(node) not in job.record.to_json().replace("Traceback", "")
    assert job.log.read_text().startswith("this is a\nTraceback")
    assert not job.folder.exists()

    again = fake_job(tmp_path / "study" / "a")
    run_on_node(again)
    assert again.status == SUCCESS
    assert done_in(node / "study") == ["a", "a"]


def test_artifacts_go_to_their_address_and_the_record_returns(tmp_path: Path, node: Path) -> None:
    job = fake_job(tmp_path / "study" / "a")
    update = node / "study" / "a" / "adapter"
    update.mkdir(parents=True)
    (update / "weights").write_text("1")
    for _ in range(2):  # the second time as after a lost result
        run_on_node(job, artifacts=f"file://{tmp_path}/bucket/runs")
        update.mkdir(parents=True)
        (update / "weights").write_text("2")
    assert files_in(tmp_path / "bucket") == ["runs/a/adapter/weights"]
    assert (tmp_path / "bucket/runs/a/adapter/weights").read_text() == "2"
    assert files_in(job.folder) == ["record.json"]
    assert job.status == SUCCESS


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "expected", "error"),
    [
        ({"address": "127.0.0.1:{closed_port}"}, OSError, "no Ray cluster answers at .*refused.*: start one with"),
        ({"address": "auto"}, OSError, "no Ray cluster answers at .*refused.*: start one with"),
        ({"address": "10.0.0.1"}, ValueError, "expected auto, local or HOST:PORT .*, found '10.0.0.1'"),
        ({"address": "localhost:123456"}, OSError, "no Ray cluster answers at .*:123456 "),
        ({"artifacts": "nonsense://bucket"}, ValueError, "Protocol not known: nonsense"),
        ({"artifacts": "file://{folder}/file/runs"}, OSError, "cannot write to file://.*/file/runs: "),
    ],
)
def test_wrong_addresses_are_named_before_ray_starts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    closed_port: int,
    options: dict[str, str],
    expected: type[Exception],
    error: str,
) -> None:
    (tmp_path / "file").touch()
    # A cluster that has ended leaves its address behind.
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    options = {key: value.format(closed_port=closed_port, folder=tmp_path) for key, value in options.items()}
    with pytest.raises(expected, match=error):
        run_grid([fake_job(tmp_path / "a")], results=tmp_path, cluster=Cluster(**options))
    assert not ray.is_initialized()
    assert not (tmp_path / "a.failed").exists()


def test_missing_ray_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'ray is not installed: pip install "peft-edge\[cluster\]"'):
        run_grid([fake_job(tmp_path / "a")], results=tmp_path, cluster=Cluster())


@pytest.fixture
def two_nodes() -> Iterator[ClusterOfNodes]:
    nodes = ClusterOfNodes(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
    nodes.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    ray.init(nodes.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.slow
def test_study_survives_the_loss_of_a_node(
    tmp_path: Path, two_nodes: ClusterOfNodes, caplog: pytest.LogCaptureFixture
) -> None:
    output_dir = tmp_path / "study"
    jobs = [fake_job(output_dir / str(number), seconds=0.3) for number in range(12)]
    jobs.append(fake_job(output_dir / "killed", "killed"))
    other = RunConfig(output_dir=str(output_dir / "11"), method="head", trackers=[])
    add_record(jobs[11].folder, "record", record_of(other))

    def lose_a_node() -> None:
        while len(list((output_dir / "results").glob("*.json"))) < 3:
            time.sleep(0.05)
        two_nodes.remove_node(two_nodes.list_all_nodes()[-1], allow_graceful=False)

    loss = threading.Thread(target=lose_a_node)
    loss.start()
    run_grid(jobs, results=output_dir / "results", cluster=Cluster())
    loss.join()

    assert len(two_nodes.list_all_nodes()) == 1
    assert [job.status for job in jobs] == [SUCCESS] * 11 + [FAILED] * 2
    assert "11 is not empty and holds no run" in jobs[11].record.run_info.error_msg
    assert "its task failed on the cluster" in jobs[12].record.run_info.error_msg
    records = read_archive(output_dir / "results").runs
    assert records == {f"lora--{job.name}.json": shareable(job.record) for job in jobs}
    # All jobs have the same source model, which one task has trained.
    logs = [job.log.read_text().splitlines() for job in jobs[:11]]
    assert len({lines[0] for lines in logs}) == 1
    assert logs[0][0].startswith("source ")
    # Runs that no node can hold would wait for a new node.
    Cluster(memory=2**30)._warn_if_no_node_fits(jobs)
    assert not caplog.messages
    Cluster(num_cpus=0.5, num_gpus=1, memory=2**50)._warn_if_no_node_fits(jobs)
    (warning,) = caplog.messages
    assert warning.startswith("a run needs 0.5 CPU, 1 GPU and 1048576.0 GiB. It waits until such a node joins")
    assert "because the nodes have 1 CPU, 0 GPU and " in warning
