"""The scripts in slurm/ on a real Slurm: submitted as a person submits them, preempted, stopped, cut off from
power."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from tests.campaign import CAMPAIGN
from tests.launcher.runs import REPOSITORY, small_project
from tests.launcher.test_train import tensors_of

SLURM = REPOSITORY / "slurm"
CLUSTER = Path(__file__).with_name("cluster.sh")
NAMESPACES = "unshare --uts --mount --pid --fork --kill-child --mount-proc true"
RANK_PER_NODE = "--ntasks-per-node=1"


def why_not() -> str:
    """What this machine lacks for a cluster; "" if nothing."""
    missing = [
        name
        for name in ("slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "unshare")
        if not shutil.which(name)
    ]
    if missing:
        return f"{', '.join(missing)} missing; apt-get install slurmctld slurmd slurm-client"
    if os.geteuid() != 0:
        return "only root can start slurmd"
    if subprocess.run(NAMESPACES.split(), capture_output=True, check=False).returncode != 0:
        return "this machine does not let root make namespaces, one for each node"
    return ""


REASON = why_not()
pytestmark = [pytest.mark.timeout(600), pytest.mark.skipif(bool(REASON), reason=REASON)]


class Cluster:
    """A Slurm of some nodes, and `project` as the folder in which jobs are submitted."""

    def __init__(self, folder: Path, project: Path, **environment: str) -> None:
        self.project = project
        self.conf = folder / "slurm.conf"
        has_gpu_driver = shutil.which("nvidia-smi") or shutil.which("rocm-smi")
        self.environment = {
            # where there is no GPU driver, slurm/env.sh finds that out by itself
            **{
                name: value
                for name, value in os.environ.items()
                if name != "DS_ACCELERATOR" or has_gpu_driver
            },
            "CLUSTER_DIR": str(folder),
            "VENV": sys.prefix,
            "PYTHONPATH": str(project),
            **environment,
        }

    def call(self, *command: str) -> str:
        """`cluster.sh COMMAND`: its output; raises when it fails."""
        result = subprocess.run(
            ["bash", str(CLUSTER), *command],
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, f"{command}: {result.stdout}"
        return result.stdout

    def submit(self, *arguments: str) -> str:
        """`sbatch ARGUMENTS`: the job's number."""
        return self.call("exec", "sbatch", "--parsable", *arguments).strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(
            re.findall(r"(\w+)=(\S*)", self.call("exec", "scontrol", "--oneliner", "show", "job", number))
        )

    def log(self, number: str) -> str:
        path = self.project / f"slurm-agff-train-{number}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, number: str, condition: Callable[[], bool], *, within_s: float) -> None:
        """Until the condition holds; the job's state and log are the message when it does not in time."""
        deadline = time.monotonic() + within_s
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {within_s} s: {self.job(number)}\n{self.log(number)}")
            time.sleep(0.2)

    def wait_state(self, number: str, *states: str, within_s: float) -> str:
        """Until the job is in one of the states; which one."""
        self.wait(number, lambda: self.job(number)["JobState"] in states, within_s=within_s)
        return self.job(number)["JobState"]

    def wait_end(self, number: str, *, within_s: float) -> dict[str, str]:
        """Until the job has ended for good."""
        self.wait_state(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", within_s=within_s)
        return self.job(number)

    def preempt(self) -> None:
        """A job of higher priority takes every node for a moment."""
        whole = ("--partition=high", "--exclusive", "--nodes=8", "--output=/dev/null")
        self.submit(*whole, "--wrap=sleep 1")

    def processes(self, **environment: str) -> list[psutil.Process]:
        """Every process of this cluster whose environment also holds these values."""
        found = []
        for process in psutil.process_iter():
            try:
                variables = process.environ()
            except psutil.Error:
                continue
            if variables.get("SLURM_CONF") == str(self.conf) and environment.items() <= variables.items():
                found.append(process)
        return found


@contextmanager
def running_cluster(
    folder: Path, project: Path, *, num_nodes: int = 8, **environment: str
) -> Iterator[Cluster]:
    """Nodes, and nothing of them afterwards."""
    cluster = Cluster(folder, project, **environment)
    try:
        cluster.call("up", str(num_nodes))
        yield cluster
    finally:
        cluster.call("down")
        assert cluster.processes() == []
        assert not folder.exists()


# ------------------------------------------------------------------ the scripts, with a stand-in for the
# training


STAND_IN = """
import os, signal, sys, time
from pathlib import Path

asked = []
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(getattr(signal, name), lambda number, frame: asked.append(number))
rank, restarts = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
print(f"rank {rank} of {os.environ['SLURM_NTASKS']} on {os.uname().nodename}, accelerator "
      f"{os.environ.get('DS_ACCELERATOR')}, {sys.argv[1:]}", flush=True)
Path(f"started-{restarts}-{rank}").touch()
if "--stubborn" in sys.argv and rank != "0":
    time.sleep(600)
while not Path("finish").exists():
    told = Path(f"exit-{rank}")
    if told.exists() or ("--ignore" not in sys.argv and asked):
        for name in ("SIGUSR1", "SIGTERM"):  # srun ends the last ranks when the first one has left
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        sys.exit(int(told.read_text()) if told.exists() else 75)
    if Path(f"die-{rank}").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A project whose training waits for the file `finish`, and stops on request as the real one does."""
    project = tmp_path / "project"
    shutil.copytree(SLURM, project / "slurm")
    (project / "launcher").mkdir()
    (project / "launcher/train.py").write_text(STAND_IN)
    return project


@pytest.fixture
def cluster(tmp_path: Path, stand_in: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "cluster", stand_in) as running:
        yield running


def start(cluster: Cluster, *arguments: str, ranks: int = 2, options: Sequence[str] = ()) -> str:
    """A job of two nodes whose ranks all run."""
    size = ("--nodes=2", f"--ntasks-per-node={ranks // 2}")
    number = cluster.submit(*size, *options, "slurm/train_8node.sh", *arguments)
    wait_started(cluster, number, ranks=ranks)
    return number


def wait_started(cluster: Cluster, number: str, *, restarts: int = 0, ranks: int = 2) -> None:
    names = [cluster.project / f"started-{restarts}-{rank}" for rank in range(ranks)]
    cluster.wait(number, lambda: all(name.exists() for name in names), within_s=90)


def finish(cluster: Cluster, number: str) -> dict[str, str]:
    (cluster.project / "finish").touch()
    return cluster.wait_end(number, within_s=60)


def test_slurm_accepts_every_script(cluster: Cluster) -> None:
    for script in ("train_1node.sh", "train_8node.sh", "convert.sh", "evaluate.sh"):
        assert "to start at" in cluster.call("exec", "sbatch", "--test-only", f"slurm/{script}")


def test_the_number_of_ranks_and_the_arguments_come_from_the_command_line(cluster: Cluster) -> None:
    number = start(cluster, "--num_steps", "4", ranks=6, options=["--export=VENV"])
    assert finish(cluster, number)["JobState"] == "COMPLETED"
    said = "--num_steps', '4'"
    accelerator = cluster.environment.get("DS_ACCELERATOR", "cpu")
    for rank in range(6):
        assert (
            f"rank {rank} of 6 on node{1 + rank // 3}, accelerator {accelerator}, ['{said}]"
            in cluster.log(number)
        )


def test_the_scripts_as_they_are_start_one_rank_per_gpu(cluster: Cluster) -> None:
    (cluster.project / "finish").touch()
    for script, num_ranks in (("train_1node.sh", 8), ("train_8node.sh", 64)):
        number = cluster.submit(f"slurm/{script}")
        assert cluster.wait_end(number, within_s=120)["JobState"] == "COMPLETED"
        assert cluster.log(number).count(f" of {num_ranks} on node") == num_ranks


def test_a_signal_to_the_batch_shell_reaches_the_ranks_and_requeues_the_job(cluster: Cluster) -> None:
    number = start(cluster)
    cluster.call("exec", "scancel", "--batch", "--signal=USR1", number)
    wait_started(cluster, number, restarts=1)
    job = finish(cluster, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert cluster.log(number).count("back into the queue") == 1


@pytest.mark.parametrize(
    ("warned", "times"), [("ranks", 1), pytest.param("batch shell", 2, marks=pytest.mark.slow)]
)
def test_a_preempted_job_comes_back(tmp_path: Path, stand_in: Path, warned: str, times: int) -> None:
    """Slurm warns the ranks, or with preempt_send_user_signal the batch shell as --signal says."""
    flavour = {"CLUSTER_PREEMPT_SIGNAL": "1"} if warned == "batch shell" else {}
    with running_cluster(tmp_path / "cluster", stand_in, **flavour) as cluster:
        number = start(cluster)
        for restarts in range(1, times + 1):
            cluster.preempt()
            wait_started(cluster, number, restarts=restarts)
        job = finish(cluster, number)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(times))
        assert ("asked to stop" in cluster.log(number)) == (warned == "batch shell")


@pytest.mark.slow
def test_a_job_continues_after_its_time_limit(cluster: Cluster) -> None:
    number = start(cluster, options=["--time=1", "--signal=B:USR1@20"])
    wait_started(cluster, number, restarts=1)
    job = finish(cluster, number)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1")
    assert cluster.log(number).count("asked to stop") == 1


def test_a_job_goes_back_into_the_queue_a_bounded_number_of_times(cluster: Cluster) -> None:
    cluster.environment["MAX_RESTARTS"] = "0"
    number = start(cluster)
    cluster.call("exec", "scancel", "--batch", "--signal=USR1", number)
    assert cluster.wait_end(number, within_s=60)["ExitCode"] == "75:0"
    assert "MAX_RESTARTS=0 is reached; the same command continues" in cluster.log(number)


FAILS_AT_FIRST = """#!/bin/sh
case "$*" in
  *hostnames*) ;;
  *) echo "$*" >> "$0.calls"; [ $(wc -l < "$0.calls") -gt 2 ] || { echo "Socket timed out" >&2; exit 1; } ;;
esac
exec REAL "$@"
"""


def test_a_controller_that_does_not_answer_is_asked_again(cluster: Cluster, tmp_path: Path) -> None:
    real = shutil.which("scontrol") or ""
    scontrol = tmp_path / "bin/scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(FAILS_AT_FIRST.replace("REAL", real))
    scontrol.chmod(0o755)
    cluster.environment["RETRY_AFTER_S"] = "1"
    cluster.environment["PATH"] = f"{scontrol.parent}:{cluster.environment['PATH']}"
    cluster.environment["VENV"] = str(tmp_path)  # env.sh puts its bin first; python is the one of PATH
    number = start(cluster)
    cluster.call("exec", "scancel", "--batch", "--signal=USR1", number)
    wait_started(cluster, number, restarts=1)
    assert finish(cluster, number)["JobState"] == "COMPLETED"
    calls = Path(f"{scontrol}.calls").read_text().splitlines()
    assert [call.split()[0] for call in calls[:4]] == ["--oneliner", "--oneliner", "--oneliner", "requeue"]


def test_a_cancelled_job_does_not_come_back(cluster: Cluster) -> None:
    number = start(cluster)
    cluster.call("exec", "scancel", number)
    job = cluster.wait_end(number, within_s=60)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "back into the queue" not in cluster.log(number)


def test_an_error_is_passed_on_and_not_requeued(cluster: Cluster) -> None:
    number = start(cluster)
    for rank in range(2):
        (cluster.project / f"exit-{rank}").write_text("2")
    job = cluster.wait_end(number, within_s=60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0")


def test_a_dead_rank_ends_all_others(cluster: Cluster) -> None:
    number = start(cluster, "--stubborn", ranks=4)
    (cluster.project / "die-0").touch()
    job = cluster.wait_end(number, within_s=60)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0")
    assert cluster.processes(SLURM_JOB_ID=number) == []


def test_a_failing_request_is_not_requeued(cluster: Cluster) -> None:
    number = start(cluster, "--ignore")
    cluster.call("exec", "scancel", "--batch", "--signal=USR1", number)
    cluster.wait(number, lambda: "asked to stop" in cluster.log(number), within_s=20)
    for rank in range(2):
        (cluster.project / f"exit-{rank}").write_text("1")
    job = cluster.wait_end(number, within_s=60)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "0")


# ------------------------------------------------------------------ the training itself


NUM_STEPS = 20


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = small_project(tmp_path_factory.mktemp("slurm") / "project")
    shutil.copytree(SLURM, project / "slurm")
    return project


@pytest.fixture
def trained_on(tmp_path: Path, project: Path) -> Iterator[Cluster]:
    with running_cluster(tmp_path / "cluster", project) as running:
        yield running


def test_a_chain_of_jobs_trains_on_two_nodes_then_finds_everything_done_and_is_converted_and_scored(
    trained_on: Cluster,
) -> None:
    size = ("--nodes=2", RANK_PER_NODE)
    output = trained_on.call(
        "exec", "bash", "slurm/chain.sh", "2", *size, "slurm/train_8node.sh", "--run_dir", "runs/chain"
    )
    first, second = re.findall(r"job \d of 2: (\d+)", output)
    assert trained_on.job(second)["Dependency"].startswith(f"afterany:{first}")
    assert trained_on.wait_end(first, within_s=200)["JobState"] == "COMPLETED", trained_on.log(first)
    assert "4/4" in trained_on.log(first)
    saved = trained_on.project / "runs/chain/checkpoints/step-000004"
    assert len(list(saved.glob("*optim_states.pt"))) == 2, "one rank per node"
    assert trained_on.wait_end(second, within_s=100)["JobState"] == "COMPLETED", trained_on.log(second)
    assert "all 4 steps are done" in trained_on.log(second)
    third = trained_on.submit("slurm/convert.sh", "runs/chain", "releases/chain")
    assert trained_on.wait_end(third, within_s=100)["JobState"] == "COMPLETED"
    assert (trained_on.project / "releases/chain/agff_config.json").exists()
    sets = ("--mmeb_eval", ".cache/quickstart/data/mmeb_eval", "--max_queries", "4")
    fourth = trained_on.submit(*size, "slurm/evaluate.sh", "releases/chain", *sets)
    assert trained_on.wait_end(fourth, within_s=100)["JobState"] == "COMPLETED"
    scores = json.loads((trained_on.project / "releases/chain/scores.json").read_text())
    assert {entry["num_queries"] for entry in scores["mmeb"]["sets"]} == {4}


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-??????")), default=0)


def steps_in(log: str) -> int:
    """The step that the progress bar showed last."""
    return int((re.findall(rf" (\d+)/{NUM_STEPS} \[", log) or ["0"])[-1])


def train(cluster: Cluster, run_dir: str, *, save_every: int) -> str:
    """Submit the recipe of eight nodes: the job's number."""
    options = ("--num_steps", str(NUM_STEPS), "--save_every", str(save_every), "--run_dir", run_dir)
    return cluster.submit(RANK_PER_NODE, "slurm/train_8node.sh", *options)


def assert_same_result(run: Path, unbroken: Path) -> None:
    found, expected = (tensors_of(path / f"checkpoints/step-{NUM_STEPS:06d}") for path in (run, unbroken))
    assert found.keys() == expected.keys()
    tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert sum(value.numel() for value in tensors.values()) > 3 * 100_000, "weights and both moments of Adam"
    assert [name for name, value in tensors.items() if not torch.equal(value, found[name])] == []


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, project: Path) -> Path:
    """The run folder of eight nodes that nothing disturbed."""
    with running_cluster(tmp_path_factory.mktemp("unbroken") / "cluster", project) as cluster:
        number = train(cluster, "runs/unbroken", save_every=NUM_STEPS)
        assert cluster.wait_end(number, within_s=300)["JobState"] == "COMPLETED", cluster.log(number)
    return project / "runs/unbroken"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_preempted_three_times_equals_an_unbroken_one(trained_on: Cluster, unbroken: Path) -> None:
    with CAMPAIGN.against("Slurm: preempted, 8 nodes, ZeRO-3") as fault:
        run = trained_on.project / "runs/preempted"
        number = train(trained_on, "runs/preempted", save_every=NUM_STEPS)
        stopped_at = 0
        for restarts in ("1", "2", "3"):
            trained_on.wait(
                number, lambda step=stopped_at: steps_in(trained_on.log(number)) > step, within_s=200
            )
            trained_on.preempt()
            fault()
            trained_on.wait(
                number, lambda restarts=restarts: trained_on.job(number)["Restarts"] == restarts, within_s=100
            )
            assert newest_step(run) > stopped_at, (
                "every turn comes further, and leaves a checkpoint of its own"
            )
            stopped_at = newest_step(run)
        job = trained_on.wait_end(number, within_s=300)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "3"), trained_on.log(number)
        assert_same_result(run, unbroken)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_asked_to_stop_continues_and_equals_an_unbroken_one(
    trained_on: Cluster, unbroken: Path
) -> None:
    with CAMPAIGN.against("Slurm: asked to stop, 8 nodes, ZeRO-3") as fault:
        run = trained_on.project / "runs/asked"
        number = train(trained_on, "runs/asked", save_every=NUM_STEPS)
        trained_on.wait(number, lambda: steps_in(trained_on.log(number)) >= 5, within_s=200)
        trained_on.call("exec", "scancel", "--batch", "--signal=USR1", number)
        fault()
        trained_on.wait_state(number, "PENDING", within_s=100)
        assert 5 <= newest_step(run) < NUM_STEPS
        job = trained_on.wait_end(number, within_s=300)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), trained_on.log(number)
        assert_same_result(run, unbroken)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_loses_a_node_in_mid_step_continues_and_equals_an_unbroken_one(
    tmp_path: Path, project: Path, unbroken: Path
) -> None:
    """A ninth node takes its place. Were it the lost one, Slurm's late words to end the first turn might end
    the second."""
    with (
        CAMPAIGN.against("Slurm: a node loses its power, 8 nodes, ZeRO-3") as fault,
        running_cluster(tmp_path / "cluster", project, num_nodes=9) as cluster,
    ):
        number = train(cluster, "runs/power_cut", save_every=4)
        cluster.wait(number, lambda: steps_in(cluster.log(number)) >= 5, within_s=200)
        assert cluster.job(number)["NodeList"] == "node[1-8]"
        first_turn = cluster.processes(SLURM_JOB_ID=number)
        cluster.call("kill-node", "3")
        fault()
        assert psutil.wait_procs(first_turn, timeout=180)[1] == [], "the job ends everywhere"
        cluster.wait(number, lambda: cluster.job(number)["Restarts"] == "1", within_s=180)
        job = cluster.wait_end(number, within_s=400)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), cluster.log(number)
        assert job["NodeList"] == "node[1-2,4-9]"
        assert_same_result(project / "runs/power_cut", unbroken)


@pytest.mark.skipif(
    not list(Path("/usr/lib").glob("*/pmix2/lib/libpmix.so")), reason="apt-get install libpmix-dev"
)
def test_srun_spreads_prepare_over_nodes_and_writes_the_same_bytes(
    trained_on: Cluster, tmp_path: Path
) -> None:
    shards, mmeb = (trained_on.project / ".cache/quickstart" / name for name in ("shards", "data/mmeb"))
    prepare = ("python", "launcher/prepare.py", "--mmeb", str(mmeb), "--out", str(tmp_path / "out"))
    output = trained_on.call("exec", "srun", "--nodes=2", "--ntasks=3", "--mpi=pmix", *prepare)
    assert output.count("Shapes_t2i  ") == 1, "one task speaks"
    found, expected = (
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (tmp_path / "out", shards)
    )
    assert found == expected


def test_doctor_speaks_once_for_each_node_of_a_job(cluster: Cluster) -> None:
    asked = ("srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=8", "bash", "-c")
    doctor = f"{sys.executable} {REPOSITORY}/launcher/doctor.py --skip-ranks"
    # what it finds on the machine of this test may vary
    output = cluster.call("exec", *asked, f"{doctor}; test $? -le 1")
    assert len(re.findall(r"^doctor on ", output, flags=re.MULTILINE)) == 2
    assert len(re.findall(r"^\w+ +job ", output, flags=re.MULTILINE)) >= 2
