"""The templates of examples/cluster: each read by its own tool or schema; their commands by ldmkit's options."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from ldmkit.cli import app

CLUSTER = Path(__file__).parent.parent / "examples/cluster"
SBATCH = sorted(CLUSTER.glob("*.sbatch"))
KUBERNETES = list(yaml.safe_load_all((CLUSTER / "kubernetes-job.yaml").read_text()))
SKYPILOT: dict[str, Any] = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
OPTIONS = {  # of sbatch (Slurm 25.05), with the form of their values
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"(\d+-)?\d\d:\d\d:\d\d",
    "signal": r"(B:)?(TERM|USR1|INT)@\d+",
    "requeue": None,
    "open-mode": "append|truncate",
    "output": r"\S+",
    "array": r"\d+-\d+",
}
TASK = {  # top-level fields of a SkyPilot task, 0.14
    *("name", "workdir", "num_nodes", "resources", "file_mounts", "volumes", "envs", "secrets"),
    *("setup", "run", "config", "service"),
}
RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}


def directives(text: str) -> list[str]:
    """The #SBATCH lines that sbatch would read: those before the first command."""
    head = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        head.append(line)
    return [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")]


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_slurm_files_are_bash_with_options_of_sbatch(path):
    text = path.read_text()
    subprocess.run(["bash", "-n", path], check=True, capture_output=True)
    assert text.startswith("#!/bin/bash\n")
    found = directives(text)
    assert found
    assert len(found) == text.count("\n#SBATCH")
    for directive in found:
        name, _, value = directive.removeprefix("--").partition("=")
        form = OPTIONS[name]
        assert not value if form is None else re.fullmatch(form, value), directive


@pytest.mark.parametrize("code", [0, 3, 75])
def test_a_slurm_job_is_queued_again_when_it_was_stopped_and_only_then(tmp_path, code):
    """srun and scontrol played by scripts that note how they were called."""
    srun = 'shift; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; done; exit ' + str(code)
    programs = {
        "srun": f"export SLURM_LOCALID=0; {srun}",
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol.log; echo node-a',
        "ldmkit": f'echo "$RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $@" >> {tmp_path}/ldmkit.log',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "node-[a-b]"}
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sbatch", "train-ae", "my photos/"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", **job},
        check=False,
    )
    assert done.returncode == code
    ranks = [f"{rank}/2 node-a:20077 train-ae my photos/" for rank in (0, 1)]
    assert (tmp_path / "ldmkit.log").read_text().splitlines() == ranks
    asked = (tmp_path / "scontrol.log").read_text().splitlines()
    assert asked == ["show hostnames node-[a-b]"] + ["requeue 77"] * (code == 75)


@pytest.mark.parametrize(
    "document", KUBERNETES, ids=lambda one: one["metadata"]["name"] + one["kind"]
)
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_kubernetes_documents_fit_its_schemas(document, version):
    kubernetes_validate.validate(document, version, strict=True)


def test_the_schema_would_notice():
    job = yaml.safe_load(yaml.safe_dump(KUBERNETES[1]))
    job["spec"]["completion"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_kubernetes_jobs_agree_with_themselves():
    jobs = [one for one in KUBERNETES if one["kind"] == "Job"]
    services = {one["metadata"]["name"]: one for one in KUBERNETES if one["kind"] == "Service"}
    assert [job["metadata"]["labels"]["stage"] for job in jobs] == [
        *("train-ae", "encode", "train-diffusion"),
    ]
    for job in jobs:
        spec, pod = job["spec"], job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        (line,) = container["args"]
        if "torchrun" not in line:
            assert line.endswith(f'--jobs "$((JOB_COMPLETION_INDEX + 1))/{spec["completions"]}"')
            continue
        name = job["metadata"]["name"]
        assert services[pod["subdomain"]]["spec"]["selector"] == {"job-name": name}
        assert f"--nnodes={spec['completions']} " in line
        assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']} " in line
        assert f"--master-addr={name}-0.{pod['subdomain']} " in line
        grace = int(re.findall(r"--shutdown-timeout=(\d+)", line)[0])
        assert grace < pod["terminationGracePeriodSeconds"]


def test_the_skypilot_file_has_fields_of_its_specification(tmp_path):
    assert SKYPILOT.keys() <= TASK
    assert SKYPILOT["resources"].keys() <= {"accelerators", "use_spot", "job_recovery"}
    assert SKYPILOT["resources"]["job_recovery"].keys() <= RECOVERY
    assert all(isinstance(count, int) for count in SKYPILOT["resources"]["accelerators"].values())
    assert all(path.startswith("/") for path in SKYPILOT["volumes"])
    assert all(isinstance(value, str) for value in SKYPILOT["envs"].values())
    for name in ("setup", "run"):
        script = tmp_path / name
        script.write_text(SKYPILOT[name])
        subprocess.run(["bash", "-n", script], check=True, capture_output=True)


def commands() -> list[list[str]]:
    """All commands of ldmkit in the templates and in the lines that say how to use them."""
    jobs = [one["spec"]["template"]["spec"] for one in KUBERNETES if one["kind"] == "Job"]
    texts = [job["containers"][0]["args"][0] for job in jobs]
    texts += [SKYPILOT["run"], *(path.read_text() for path in SBATCH)]
    found = [
        re.search(r"(?<!-)\b(train-ae|encode|train-diffusion|decode) .*--out \S+", line.rstrip(")"))
        for text in texts
        for line in text.splitlines()
    ]
    return [shlex.split(match[0]) for match in found if match]


def test_the_commands_are_found():
    assert len(commands()) == 3 + 3 + 5


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[:2]))
def test_every_option_in_the_templates_is_one_of_the_command(words):
    name, *rest = words
    command = get_command(app).commands[name]  # pyright: ignore[reportAttributeAccessIssue]
    known = {option for parameter in command.params for option in parameter.opts}
    options = {word for word in rest if word.startswith("--")}
    assert options
    assert options <= known
