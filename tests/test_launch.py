"""The launch scripts: what they would run, written out; what they do run, against stand-ins for the clusters' tools."""

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parent.parent / "scripts"
JOB = ["--", "train", "--gin_file=xl.gin", "--gin.MODEL_DIR=/mnt/runs/xl", "--gin.NOTE=it's $HOME"]
LINE = "t5x_like train --gin_file=xl.gin --gin.MODEL_DIR=/mnt/runs/xl '--gin.NOTE=it'\"'\"'s $HOME'"
TPU = ["--name=xl", "--zone=us-east5-a", "--accelerator_type=v5p-128", "--runtime_version=v2-alpha-tpuv5"]
XPK = ["--workload=xl", "--cluster=pods", "--docker_image=me/t5x_like:1"]
SLURM = ["--nodes=4", "--gpus_per_node=8", "--time=24:00:00"]

Scripts = dict[str, ModuleType]
Fake = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def scripts() -> Iterator[Scripts]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        names = ("launching", "launch_tpu_vm", "launch_xpk", "launch_slurm", "launch_ray", "cache_tasks")
        yield {name.removeprefix("launch_"): importlib.import_module(name) for name in names}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a program on PATH, before all others; it writes down its arguments, one call a line, then does `body`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def add(name: str, body: str = "") -> Path:
        calls = tmp_path / f"{name}.calls"
        calls.touch()
        program = folder / name
        program.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> {calls}; echo >> {calls}\n{body}\n')
        program.chmod(0o755)
        return calls

    return add


def dry_run(module: ModuleType, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    assert module.main(["--dry_run", *arguments, *JOB]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_tpu_vm_says_what_it_would_run(scripts: Scripts, capsys: pytest.CaptureFixture) -> None:
    extra = ["--num_slices=2", "--spot", "--setup=pip install 't5x_like[tpu]'", "--folder=my code", "--delete"]
    command = shlex.quote(f"--command=cd 'my code' && {LINE}")
    stop = shlex.quote(
        "--command=pkill -TERM -x t5x_like; timeout 120 sh -c 'while pgrep -x t5x_like >/dev/null; do sleep 1; done' "
        "|| pkill -KILL -x t5x_like; true"
    )
    assert (
        dry_run(scripts["tpu_vm"], capsys, *TPU, *extra)
        == rf"""# where there is no queued resource xl
gcloud compute tpus queued-resources create xl \
    --zone=us-east5-a \
    --accelerator-type=v5p-128 \
    --runtime-version=v2-alpha-tpuv5 \
    --node-count=2 \
    --node-prefix=xl \
    --spot

# every 30 s, until it says ACTIVE
gcloud compute tpus queued-resources describe xl \
    --zone=us-east5-a \
    '--format=value(state.state)'

# on hosts that were there before: end what is left of an earlier start
gcloud compute tpus queued-resources ssh xl \
    --zone=us-east5-a \
    --node=all \
    --worker=all \
    --batch-size=all \
    {stop}

# on every host
gcloud compute tpus queued-resources ssh xl \
    --zone=us-east5-a \
    --node=all \
    --worker=all \
    --batch-size=all \
    '--command=pip install '"'"'t5x_like[tpu]'"'"''
gcloud compute tpus queued-resources ssh xl \
    --zone=us-east5-a \
    --node=all \
    --worker=all \
    --batch-size=all \
    {command}

# if that fails, all of this again (at most 20 times, after 30, 60, 120 ... seconds);
# first, where the state is one of SUSPENDING, SUSPENDED, FAILED, DELETING
gcloud compute tpus queued-resources delete xl \
    --zone=us-east5-a \
    --force \
    --quiet

# in the end
gcloud compute tpus queued-resources delete xl \
    --zone=us-east5-a \
    --force \
    --quiet
"""
    )


def test_xpk_says_what_it_would_run(
    scripts: Scripts, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    command = shlex.quote(f"--command={scripts['xpk'].IN_THE_POD.format(command=LINE)}")
    extra = ["--tpu_type=v5p-128", "--storage=runs", "--env=WANDB_API_KEY", "--wait", "--max_restarts=3"]
    assert (
        dry_run(scripts["xpk"], capsys, *XPK, *extra)
        == rf"""# NAMES is a file with these lines: WANDB_API_KEY
xpk workload create \
    --workload=xl \
    --cluster=pods \
    {command} \
    --tpu-type=v5p-128 \
    --docker-image=me/t5x_like:1 \
    --max-restarts=3 \
    --termination-grace-period-seconds=120 \
    --storage=runs \
    --restart-on-exit-codes=1 \
    --env-file=NAMES
xpk workload list \
    --cluster=pods \
    --wait-for-job-completion=xl
"""
    )


SBATCH = r"""sbatch <<'END_OF_SCRIPT'
#!/bin/bash
#SBATCH --job-name=t5x_like
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --time=24:00:00
#SBATCH --partition=gpu
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#SBATCH --requeue
#SBATCH --mem=0

asked=
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1  # to the tasks, not to this script
source /shared/venv/bin/activate
srun --label --wait=120 --cpus-per-task=6 \
    LINE &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends `wait`, not the tasks
wait "$step"
code=$?

restarts=${SLURM_RESTART_COUNT:-0}
if scontrol show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; then asked=yes; fi
if [ -n "$asked" ] && [ "$code" -eq 0 ]; then code=143; fi  # saved, and not done
case "$code" in 0|2|130) exit "$code" ;; esac
if [ "$restarts" -ge 20 ]; then
  echo "launch: exit code $code, and no restart is left; the same command goes on from the last checkpoint"
  exit "$code"
fi
if [ -z "$asked" ]; then
  pause=$(( restarts < 6 ? 10 << restarts : 300 ))
  sleep $(( pause < 300 ? pause : 300 ))
fi
echo "launch: exit code $code; restart $(( restarts + 1 )) of 20"
scontrol requeue "$SLURM_JOB_ID"
END_OF_SCRIPT
"""


def test_slurm_says_what_it_would_run(scripts: Scripts, capsys: pytest.CaptureFixture) -> None:
    extra = ["--cpus_per_task=6", "--partition=gpu", "--setup=source /shared/venv/bin/activate", "--sbatch=--mem=0"]
    assert dry_run(scripts["slurm"], capsys, *SLURM, *extra) == SBATCH.replace("LINE", LINE)


def test_cpu_nodes_get_one_task_each(scripts: Scripts, capsys: pytest.CaptureFixture) -> None:
    out = dry_run(scripts["slurm"], capsys, "--nodes=2", "--time=60")
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --time=60\n" in out
    assert "gpu" not in out


def test_ray_says_what_it_would_run(
    scripts: Scripts, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    extra = ["--hosts=2", "--gpus_per_host=8", "--resource=TPU=4", "--env=WANDB_API_KEY"]
    assert (
        dry_run(scripts["ray"], capsys, *extra)
        == f"""# Ray reserves, STRICT_SPREAD: 2 x {{'CPU': 1.0, 'GPU': 8.0, 'TPU': 4.0}}
# process 0, with WANDB_API_KEY of this shell
env JAX_COORDINATOR_ADDRESS=HOST_0:FREE_PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 {LINE}
# process 1, with WANDB_API_KEY of this shell
env JAX_COORDINATOR_ADDRESS=HOST_0:FREE_PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 {LINE}
# if one fails, all of them again (at most 20 times, after 10, 20, 40 ... seconds)
"""
    )


def test_the_page_shows_what_is_printed(scripts: Scripts, capsys: pytest.CaptureFixture) -> None:
    page = (SCRIPTS.parent / "docs" / "launch.md").read_text()
    shown = re.findall(r"```console\n\$ scripts/launch_(\w+)\.py ((?:[^\n]*\\\n)*[^\n]*)\n((?s:.*?))```", page)
    assert [name for name, _, _ in shown] == ["tpu_vm", "xpk", "slurm", "ray"]
    for name, arguments, output in shown:
        assert scripts[name].main(shlex.split(arguments.replace("\\\n", ""))) == 0
        assert capsys.readouterr().out == output


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("tpu_vm", [*TPU], "what to run is missing: end with -- VERB"),
        ("tpu_vm", [*TPU[1:], *JOB], "the following arguments are required: --name"),
        ("tpu_vm", [*TPU, "--num_slices=0", *JOB], "argument --num_slices: 0 is not at least 1"),
        ("tpu_vm", [*TPU, "--spot", "--reserved", *JOB], "--reserved: not allowed with argument --spot"),
        ("tpu_vm", [*TPU, "--max_restarts=-1", *JOB], "--max_restarts=-1: give 0 or more"),
        ("tpu_vm", [*TPU, "--", "train", "--gin.MODEL_DIR=runs/xl"], "--gin.MODEL_DIR=runs/xl: every machine"),
        ("tpu_vm", [*TPU, "--", "train", "--gin.MODEL_DIR=gs://me/xl"], "(a bucket has to be mounted)"),
        ("tpu_vm", [*TPU, *JOB], "'gcloud' is not on PATH: install it from https://cloud.google.com/sdk"),
        ("xpk", [*XPK, *JOB], "one of the arguments --tpu_type --device_type is required"),
        ("xpk", [*XPK, "--tpu_type=v5p-8", "--num_nodes=2", *JOB], "--num_nodes is for --device_type"),
        ("xpk", [*XPK, "--device_type=h100-80gb-8", "--num_slices=2", *JOB], "--num_slices is for --tpu_type"),
        ("xpk", [*XPK, "--tpu_type=v5p-8", "--env=KEY=secret", *JOB], "--env=KEY=...: give the name alone"),
        ("xpk", [*XPK, "--tpu_type=v5p-8", "--env=NOT_SET", *JOB], "--env=NOT_SET: this shell has no such variable"),
        ("xpk", [*XPK, "--tpu_type=v5p-8", *JOB], "'xpk' is not on PATH: pip install xpk"),
        ("slurm", ["--nodes=2", "--time=soon", *JOB], "--time=soon: write hours:minutes:seconds"),
        ("slurm", [*SLURM, "--sbatch=mem=0", *JOB], "--sbatch=mem=0: give one option of sbatch"),
        ("slurm", [*SLURM, "--tasks_per_node=1", *JOB], "--tasks_per_node is for CPU nodes"),
        ("slurm", [*SLURM, "--grace=70000", *JOB], "--grace=70000: SLURM takes at most 65535 seconds"),
        ("slurm", [*SLURM, *JOB], "'sbatch' is not on PATH: run this on a login node"),
        ("ray", ["--hosts=2", "--resource=TPU", *JOB], "--resource=TPU: write NAME=NUMBER"),
        ("ray", ["--hosts=2", "--env=NOT_SET", *JOB], "--env=NOT_SET: this shell has no such variable"),
        ("ray", ["--hosts=2", *JOB], "cannot import ray: pip install it"),
        ("cache_tasks", ["--tasks", "x", "--output_cache_dir=y"], "the extra `cache` is missing"),
    ],
)
def test_a_mistake_is_named_with_its_fix(
    scripts: Scripts,
    name: str,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for missing in ("ray", "apache_beam"):
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit) as ended:
        scripts[name].main(arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert message in err
    assert "secret" not in out + err


GCLOUD = r"""
here={folder}
case "$4" in
  describe) [ -s $here/state ] && cat $here/state || {{ echo "NOT_FOUND: no such thing" >&2; exit 1; }} ;;
  create) echo ACTIVE > $here/state ;;
  delete) rm $here/state ;;
  ssh)
    case "$*" in
      *--command=*train*)
        n=$(cat $here/starts 2>/dev/null || echo 0); echo $((n + 1)) > $here/starts
        case $n in
          0) echo SUSPENDED > $here/state; exit 255 ;;  # taken away at once
          1) echo SUSPENDING > $here/state ;;           # taken away, but the command could save and ended well
          2) exit 1 ;;                                  # crashed; the machines are still there
        esac ;;
    esac ;;
esac
"""


def test_tpus_that_are_taken_away_are_asked_for_again(
    scripts: Scripts, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(scripts["launching"].time, "sleep", pauses.append)
    calls = fake("gcloud", GCLOUD.format(folder=tmp_path))
    assert scripts["tpu_vm"].main([*TPU, "--spot", "--setup=install", "--delete", *JOB]) == 0
    done = [shlex.split(line) for line in calls.read_text().splitlines()]
    told = [
        next((word.removeprefix("--command=").split()[0] for word in words if "--command" in word), words[3])
        for words in done
        if words[3] != "describe"
    ]
    again = ["delete", "create", "install", "t5x_like"]
    assert told == ["create", "install", "t5x_like", *again, *again, "pkill", "install", "t5x_like", "delete"]
    assert f"--command={LINE}" in [word for words in done for word in words]
    assert pauses == [30, 30, 30, 60, 30, 120]  # until ACTIVE, and 30, 60, 120 between the starts
    assert "xl is SUSPENDED" in capsys.readouterr().err


def test_what_gcloud_says_ends_the_first_start(scripts: Scripts, fake: Fake, capsys: pytest.CaptureFixture) -> None:
    fake("gcloud", 'echo "PERMISSION_DENIED: the API is off" >&2; exit 1')
    with pytest.raises(SystemExit) as ended:
        scripts["tpu_vm"].main([*TPU, *JOB])
    assert ended.value.code == 2
    assert "PERMISSION_DENIED: the API is off" in capsys.readouterr().err


def test_restarts_end(scripts: Scripts, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pauses: list[float] = []
    launching = scripts["launching"]
    monkeypatch.setattr(launching.time, "sleep", pauses.append)
    codes = iter([1, 255, 137, 143, 1, 1, 99])
    assert launching.until_final(lambda: next(codes), launching.Restarts(6, 20)) == 99
    assert pauses == [20, 40, 80, 160, 300, 300]
    assert "exit code 99, and no restart is left" in capsys.readouterr().err
    for final in (0, 2, 130):
        assert launching.until_final(lambda code=final: code, launching.Restarts(6, 20)) == final
    assert len(pauses) == 6


def run_script(text: str, restarts: int, **variables: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), **variables}
    return subprocess.Popen(["bash", "-c", text], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def batch_script(scripts: Scripts, fake: Fake) -> str:
    """The script as SLURM gets it, through a stand-in for sbatch that keeps it."""
    calls = fake("sbatch", 'cat > "$(dirname "$0")/../script"')
    assert scripts["slurm"].main([*SLURM, "--max_restarts=2", "--setup=export READY=yes", *JOB]) == 0
    text = (calls.parent / "script").read_text()
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return text


def test_a_slurm_job_that_crashes_is_queued_again_twice(batch_script: str, fake: Fake) -> None:
    tasks = fake("srun", '[ "$READY" = yes ] && exit "$CODE"')
    pauses, queue = fake("sleep"), fake("scontrol", 'echo "   PreemptEligibleTime=2026-01-01 PreemptTime=None"')
    for restarts, code in enumerate(["1", "137", "9"]):
        with run_script(batch_script, restarts, CODE=code) as process:
            out, _ = process.communicate()
    assert process.returncode == 9
    assert out.splitlines()[-1].startswith("launch: exit code 9, and no restart is left")
    expected = shlex.join(["--label", "--wait=120"]) + " " + LINE
    assert [shlex.split(line) for line in tasks.read_text().splitlines()] == [shlex.split(expected)] * 3
    assert pauses.read_text().split() == ["10", "20"]
    assert [line for line in queue.read_text().splitlines() if "requeue" in line] == ["requeue 7 "] * 2


@pytest.mark.parametrize("code", ["0", "2"])
def test_a_slurm_job_that_is_over_stays_so(batch_script: str, fake: Fake, code: str) -> None:
    fake("srun", 'exit "$CODE"')
    queue = fake("scontrol")
    with run_script(batch_script, 0, CODE=code) as process:
        assert process.wait() == int(code)
    assert "requeue" not in queue.read_text()


@pytest.mark.parametrize("warned", ["before the time limit", "by the scheduler"])
def test_a_slurm_job_that_was_asked_to_save_is_queued_again_at_once(
    batch_script: str, fake: Fake, tmp_path: Path, warned: str
) -> None:
    """The tasks save and end well: only the signal, or what the scheduler says, tells that from the end of the run."""
    limit = warned == "before the time limit"
    fake("srun", f"trap 'exit 0' TERM; echo $$ > {tmp_path}/pid; {'while :; do read -t 0.1 <> <(:); done' * limit}")
    fake("scancel", f'[ "$*" = "--signal=TERM 7" ] && kill -TERM $(cat {tmp_path}/pid)')
    queue = fake("scontrol", f'[ $1 = show ] && echo " PreemptTime={"None" if limit else "2026-01-01T00:00:00"}"')
    pauses = fake("sleep")
    with run_script(batch_script, 0) as process:
        if limit:
            wait_for(tmp_path / "pid")
            process.send_signal(signal.SIGUSR1)
        out, _ = process.communicate()
    assert out.splitlines() == ["launch: exit code 143; restart 1 of 2"]
    assert queue.read_text().splitlines()[-1] == "requeue 7 "
    assert pauses.read_text() == ""


@pytest.mark.parametrize(("how", "code"), [("asked", 143), ("ends", 0), ("crashes", 7)])
def test_a_pod_says_whether_the_run_is_over(scripts: Scripts, tmp_path: Path, how: str, code: int) -> None:
    """As xpk 1.16 wraps what it is given (its `workload create --dry-run` shows it)."""
    job = tmp_path / "job"
    body = {"asked": "while :; do read -t 0.1 <> <(:); done", "ends": "exit 0", "crashes": "exit 7"}[how]
    job.write_text(f"#!/bin/bash\ntrap 'exit 0' TERM; echo $$ > {tmp_path}/pid; {body}\n")
    job.chmod(0o755)
    command = scripts["xpk"].IN_THE_POD.format(command=str(job))
    pod = f"_sigterm() (kill -SIGTERM $!;); trap _sigterm SIGTERM; ({command}) & PID=$!; "
    pod += "while kill -0 $PID 2>/dev/null; do sleep 0.1; done; wait $PID; exit $?"
    with subprocess.Popen(["bash", "-c", pod]) as process:
        if how == "asked":
            wait_for(tmp_path / "pid")
            process.send_signal(signal.SIGTERM)
        assert process.wait() == code


def wait_for(path: Path) -> None:
    for _ in range(500):
        if path.exists() and path.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def test_xpk_is_called_with_names_of_variables_alone(
    scripts: Scripts, fake: Fake, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a secret")
    calls = fake("xpk", 'for word; do case "$word" in --env-file=*) cat "${word#*=}" ;; esac; done; exit ${CODE:-0}')
    assert scripts["xpk"].main([*XPK, "--tpu_type=v5p-8", "--env=WANDB_API_KEY", "--wait", *JOB]) == 0
    create, wait = (shlex.split(line) for line in calls.read_text().splitlines())
    assert create[:2] == ["workload", "create"]
    assert wait == ["workload", "list", "--cluster=pods", "--wait-for-job-completion=xl"]
    out = capfd.readouterr().out
    assert out.splitlines().count("WANDB_API_KEY") == 1
    assert "secret" not in out
    monkeypatch.setenv("CODE", "3")
    assert scripts["xpk"].main([*XPK, "--tpu_type=v5p-8", "--wait", *JOB]) == 3


def test_a_host_of_ray_runs_and_stops_a_process(scripts: Scripts, tmp_path: Path) -> None:
    host = scripts["ray"].Host()
    settings = scripts["ray"].variables("10.0.0.1:99", 4, 3)
    check = '[ "$JAX_COORDINATOR_ADDRESS $JAX_NUM_PROCESSES $JAX_PROCESS_ID" = "10.0.0.1:99 4 3" ]'
    assert host.run(["bash", "-c", check], settings) == 0
    assert host.run(["bash", "-c", "kill -9 $$"], settings) == 137
    for command, code in (("trap 'exit 5' TERM", 5), ("trap '' TERM", 137)):
        text = f"{command}; echo x > {tmp_path}/{code}; while :; do read -t 0.1 <> <(:); done"
        with ThreadPoolExecutor(1) as thread:
            ended = thread.submit(host.run, ["bash", "-c", text], {})
            wait_for(tmp_path / str(code))
            host.stop(1)
            assert ended.result() == code


@pytest.mark.parametrize("name", ["tpu_vm", "xpk", "slurm", "ray", "cache_tasks"])
def test_help_says_what_is_needed(scripts: Scripts, name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        scripts[name].main(["--help"])
    assert ended.value.code == 0
    assert "\nNeeds" in capsys.readouterr().out
