"""Launchers: what they would do, and do with stand-ins for a cloud's tools."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
SCRIPTS = ("local", "tpu", "slurm", "gke")
ODD = ["--gin_file=a b.gin", "--gin.X={'a': \"b$HOME\"}", "--gin.Y=*;\\", "--gin.Z='é'"]
TPU = ["--name=mine", "--zone=z", "--project=p", "--accelerator_type=v5litepod-16"]
SLURM = ["--name=mine", "--time=1:00:00", "--environment=/shared/my env"]
GKE = ["--name=mine", "--image=registry/image:1", "--accelerator=nvidia-l4"]


def launch(script, *arguments, **environment):
  return subprocess.run(
    [str(LAUNCH / f"{script}.sh"), *arguments],
    capture_output=True,
    text=True,
    timeout=60,
    env={**os.environ, **environment},
  )


def printed(script, *arguments):
  done = launch(script, *arguments)
  assert done.returncode == 0, done.stderr
  return done.stdout


def commands(text):
  """Lines that a shell would read, as their arguments."""
  lines = [line for line in text.splitlines() if not line.startswith("#")]
  # Bash writes $'…' for what has line breaks: let it read them itself.
  found = []
  for line in lines:
    words = subprocess.run(
      ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True
    )
    found.append(words.stdout.decode().rstrip("\0").split("\0"))
  return found


def test_shellcheck():
  """The extra dev has it, beside the interpreter."""
  beside = pathlib.Path(sys.executable).parent
  program = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
  assert program, "pip install -e '.[dev]'"
  scripts = [f"launch/{name}.sh" for name in (*SCRIPTS, "common")]
  done = subprocess.run(
    [program, "-x", *scripts], cwd=LAUNCH.parent, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_flag(script):
  text = printed(script, "--help")
  source = (LAUNCH / f"{script}.sh").read_text()
  declared = source[source.index("\nflags ") :].split("\nparse")[0]
  names = [word.partition("=")[0] for word in declared.split() if "=" in word]
  for name in (name for name in names if name.isupper()):
    assert f"--{name.lower()}=" in text


@pytest.mark.parametrize(
  ("script", "arguments", "message"),
  [
    ("local", ["--", "x"], "--processes is needed"),
    ("local", ["--processes=two", "--", "x"], "--processes=two: a positive number"),
    ("local", ["--processes=2"], "give the arguments of `embgemma train` after --"),
    ("tpu", ["create", "--name=m"], "--zone is needed"),
    ("tpu", ["create", "--name=m", "--zone=z"], "--accelerator_type is needed"),
    ("tpu", ["create", *TPU[:3], "--accelerator_type=v99-8"], "--runtime_version, too"),
    ("tpu", ["create", *TPU, "--spot=yes"], "--spot=yes: true or false"),
    ("tpu", ["launch", *TPU], "no command launch"),
    ("tpu", ["create", *TPU, "--sport=true"], "no flag --sport"),
    ("slurm", [*SLURM[:2], "--", "x"], "--environment is needed"),
    ("slurm", [*SLURM, "--nodes=0", "--", "x"], "--nodes=0: a positive number"),
    ("slurm", [*SLURM, "-N", "2"], "-N: flags are --name=value"),
    ("gke", ["apply", *GKE[:2], "--", "x"], "--accelerator is needed"),
    ("gke", ["apply", "--name=My_run"], "lower-case letters"),
    ("gke", ["apply", *GKE, "--", "two\nlines"], "put it into a gin file"),
  ],
)
def test_what_is_refused(script, arguments, message):
  done = launch(script, *arguments, "--dry_run") if "--" not in arguments else None
  if done is None:
    place = arguments.index("--")
    done = launch(script, *arguments[:place], "--dry_run", *arguments[place:])
  assert done.returncode == 2
  assert f"{script}.sh: error: " in done.stderr
  assert message in done.stderr


def test_local_processes():
  found = commands(printed("local", "--processes=2", "--dry_run", "--", *ODD))
  assert [words[:2] for words in found] == [["embgemma", "train"]] * 2
  for index, words in enumerate(found):
    assert words[2:6] == ODD
    assert words[6:] == [
      "--coordinator_address=localhost:9911",
      "--process_count=2",
      f"--process_index={index}",
    ]


def program(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/usr/bin/env bash\n{text}\n")
  path.chmod(0o755)
  return path


def appears(path, seconds=20):
  """Whether a file comes up in time."""
  until = time.monotonic() + seconds
  while not path.exists() and time.monotonic() < until:
    time.sleep(0.05)
  return path.exists()


def test_one_local_process_that_fails_ends_all(tmp_path):
  text = f"""if [[ $* == *--process_index=1* ]]; then
  until [[ -e {tmp_path}/started ]]; do sleep 0.05; done
  exit 7
fi
trap 'touch {tmp_path}/stopped; exit 143' TERM
touch {tmp_path}/started
sleep 30 > /dev/null 2>&1 & wait"""
  stub = program(tmp_path / "stub", text)
  began = time.monotonic()
  done = launch("local", "--processes=2", "--", "x", EMBGEMMA=str(stub))
  assert done.returncode == 7
  assert (tmp_path / "stopped").exists()
  assert time.monotonic() - began < 20
  fine = launch("local", "--processes=3", "--", "x", EMBGEMMA="true")
  assert fine.returncode == 0


def test_a_slice_is_asked_for():
  (create,) = commands(printed("tpu", "create", *TPU, "--spot=true", "--dry_run"))
  assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
  assert create[5] == "mine"
  assert set(create[6:]) == {
    "--node-id=mine",
    "--zone=z",
    "--project=p",
    "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite",
    "--spot",
  }


@pytest.fixture
def cloud(tmp_path):
  """A directory of programs in place of gcloud and a worker's, and the worker's home.

  `states` holds what the slice's state is, one line a look; commands over ssh run here.
  """
  home, programs = tmp_path / "home", tmp_path / "programs"
  home.mkdir()
  program(
    programs / "gcloud",
    f"""echo "$4 ${{*:5}}" | head -n 1 >> {tmp_path}/calls
case "$3 $4" in
'queued-resources list') head -n 1 {tmp_path}/states; sed -i 1d {tmp_path}/states ;;
'tpu-vm scp') cp "$5" {home}/embgemma.tar.gz ;;
'tpu-vm ssh')
  for each; do [[ $each != --command=* ]] || command=${{each#--command=}}; done
  cd {home} && HOME={home} bash -c "$command" ;;
'queued-resources delete') rm -rf {home} && mkdir {home} ;;
esac""",
  )
  program(programs / "sudo", "exit 0")
  program(programs / "gcsfuse", f'echo "$@" > {tmp_path}/mounted')
  program(programs / "mountpoint", "exit 1")
  program(
    programs / "python3.11",
    f"""mkdir -p .venv/bin
printf '#!/usr/bin/env bash\\nexit 0\\n' > .venv/bin/pip
cp {tmp_path}/embgemma .venv/bin/embgemma
chmod +x .venv/bin/*""",
  )
  return tmp_path


def supervised(cloud, states, train):
  (cloud / "states").write_text("".join(f"{state}\n" for state in states))
  program(cloud / "embgemma", train)
  path = f"{cloud / 'programs'}:{os.environ['PATH']}"
  flags = [*TPU, "--bucket=my bucket", "--interval=1", "--", *ODD]
  done = launch("tpu", "supervise", *flags, PATH=path)
  calls = [line.split()[0:2] for line in (cloud / "calls").read_text().splitlines()]
  return done, [name for name, *_ in calls if name not in ("list", "ssh")]


def test_a_run_is_supervised_through_a_preemption(cloud):
  """The slice goes away while the run is on; another one finishes it."""
  states = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDED", ""]
  train = f"""printf '%s\\n' "$@" > {cloud}/arguments
if [[ ! -e {cloud}/second ]]; then touch {cloud}/second; sleep 60; fi"""
  done, calls = supervised(cloud, [*states, *["ACTIVE"] * 20], train)
  assert done.returncode == 0, done.stderr
  assert calls == ["create", "scp", "delete", "create", "scp"]
  arguments = (cloud / "arguments").read_text().splitlines()
  assert arguments == ["train", "--multiprocess", *ODD]
  assert (cloud / "mounted").read_text() == "--implicit-dirs my bucket bucket\n"
  assert (cloud / "home/embgemma/pyproject.toml").exists()


def test_a_run_that_fails_is_said_so(cloud):
  done, calls = supervised(cloud, ["ACTIVE"] * 20, "exit 3")
  assert done.returncode == 2
  assert "the run ended with: 3; see" in done.stderr
  assert calls == ["scp"]


def test_a_run_is_stopped_with_all_its_processes(cloud):
  train = f"""trap 'touch {cloud}/stopped; exit 143' TERM
touch {cloud}/started
sleep 60 & wait"""
  (cloud / "states").write_text("")
  program(cloud / "embgemma", train)
  path = f"{cloud / 'programs'}:{os.environ['PATH']}"
  for command in (["install", *TPU], ["run", *TPU, "--", "x"]):
    done = launch("tpu", *command, PATH=path)
    assert done.returncode == 0, done.stderr
  assert appears(cloud / "started")
  assert launch("tpu", "stop", *TPU, PATH=path).returncode == 0
  assert appears(cloud / "stopped")
  ended = cloud / "home/embgemma/run/exit"
  assert not ended.exists() or ended.read_text() == "143\n"


def test_a_batch_script(tmp_path):
  flags = [*SLURM, "--nodes=2", "--gpus_per_node=4", "--partition=gpu", "--dry_run"]
  text = printed("slurm", *flags, "--", *ODD)
  settings = [line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")]
  for wanted in ("--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue"):
    assert wanted in settings
  assert "--partition=gpu" in settings
  assert not any(line.startswith("--account") for line in settings)
  # The batch script runs: its srun starts the command, a SIGTERM's exit is requeued.
  for code, requeued in ((0, False), (143, True), (1, False)):
    srun = f'shift\nprintf "%s\\n" "$@" > {tmp_path}/srun\nexit {code}'
    program(tmp_path / "bin/srun", srun)
    program(tmp_path / "bin/scontrol", f'echo "$@" > {tmp_path}/scontrol')
    (tmp_path / "scontrol").unlink(missing_ok=True)
    done = subprocess.run(
      ["bash", "-c", text],
      env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "5"},
    )
    assert done.returncode == code
    assert (tmp_path / "scontrol").exists() == requeued
  words = (tmp_path / "srun").read_text().splitlines()
  assert words == ["/shared/my env/bin/embgemma", "train", "--multiprocess", *ODD]


def test_a_job_of_kubernetes():
  flags = [*GKE, "--nodes=3", "--gpus_per_node=2", "--bucket=b", "--dry_run"]
  text = printed("gke", "apply", *flags, "--", *ODD)
  service, job = yaml.safe_load_all(text)
  assert service["spec"]["clusterIP"] == "None"
  assert service["spec"]["selector"] == {"job-name": "mine"}
  spec = job["spec"]
  assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == (
    "Indexed",
    3,
    3,
  )
  pod = spec["template"]["spec"]
  assert pod["subdomain"] == service["metadata"]["name"] == "mine"
  (container,) = pod["containers"]
  assert container["args"] == [
    "train",
    *ODD,
    "--coordinator_address=mine-0.mine:9911",
    "--process_count=3",
    "--process_index=$(JOB_COMPLETION_INDEX)",
  ]
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
  mounts = {mount["name"] for mount in container["volumeMounts"]}
  assert mounts == {volume["name"] for volume in pod["volumes"]} == {"shm", "bucket"}
  without = printed("gke", "apply", *GKE, "--dry_run", "--", "x")
  _, job = yaml.safe_load_all(without)
  assert [v["name"] for v in job["spec"]["template"]["spec"]["volumes"]] == ["shm"]


def test_kubectl_is_told():
  (logs,) = commands(printed("gke", "logs", "--name=mine", "--dry_run"))
  assert shlex.join(logs[:2]) == "kubectl logs"
  (delete,) = commands(printed("gke", "delete", "--name=mine", "--dry_run"))
  assert delete[-2:] == ["job/mine", "service/mine"]
