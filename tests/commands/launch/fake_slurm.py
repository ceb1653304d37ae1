"""A Slurm of one machine: `sbatch`, `srun`, `squeue`, `sacct`, `scancel` and `scontrol`, by the
name it is called. Nodes are processes; state lies in the folder FAKE_SLURM.

Files there: `refuse` (why sbatch refuses), `hold` (jobs stay pending), `no_requeue` (scontrol
refuses), `no_accounts` (sacct has none). `jobs/ID/usr1` is what Slurm
does before a preemption or the time limit: SIGUSR1 to the batch script alone.
"""

import os
import re
import signal
import subprocess
import sys
import time

PLACE = os.environ["FAKE_SLURM"]


def path(job, name=""):
    return os.path.join(PLACE, "jobs", job, name)


def read(job, name, default=""):
    try:
        with open(path(job, name)) as file:
            return file.read()
    except FileNotFoundError:
        return default


def write(job, name, text):
    with open(path(job, name) + ".new", "w") as file:
        file.write(str(text))
    os.rename(path(job, name) + ".new", path(job, name))


def fail(text):
    sys.stderr.write(text + "\n")
    sys.exit(1)


def sbatch(words):
    assert words[0] == "--parsable", words
    try:
        with open(os.path.join(PLACE, "refuse")) as file:
            fail(f"sbatch: error: Batch job submission failed: {file.read()}")
    except FileNotFoundError:
        pass
    with open(words[1]) as file:
        script = file.read()
    given = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    os.makedirs(os.path.join(PLACE, "jobs"), exist_ok=True)
    number = len([name for name in os.listdir(os.path.join(PLACE, "jobs")) if name.isdigit()]) + 100
    jobs = [str(number)]
    os.makedirs(path(str(number)))
    if "array" in given:
        first, last = map(int, given["array"].split("-"))
        jobs = [f"{number}_{task}" for task in range(first, last + 1)]
    for job in jobs:
        os.makedirs(path(job), exist_ok=True)
        write(job, "script", script)
        write(job, "command", words[1])
        write(job, "state", "PENDING")
        subprocess.Popen(
            [sys.executable, "-S", "-E", __file__, job, given.get("nodes", "1"), given["output"]],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"FAKE_SLURM_AS": "daemon"},
        )  # fmt: skip
    print(number)


def daemon(words):
    """One job from here on, as often as it is queued."""
    job, nodes, output = words
    number, _, task = job.partition("_")
    output = output.strip('"').replace("%j", job).replace("%A", number).replace("%a", task)
    environ = {n: v for n, v in os.environ.items() if n != "FAKE_SLURM_AS"}
    environ |= {"SLURM_JOB_ID": job, "SLURM_NNODES": nodes, "SLURM_JOB_NODELIST": "node[0-9]"}
    if task:
        environ["SLURM_ARRAY_TASK_ID"] = task
    for restart in range(10):
        while os.path.exists(os.path.join(PLACE, "hold")) and not os.path.exists(
            path(job, "cancel")
        ):
            time.sleep(0.02)
        if os.path.exists(path(job, "cancel")):
            write(job, "state", "CANCELLED by 0")
            return
        again = {"SLURM_RESTART_COUNT": str(restart)} if restart else {}
        with open(output.replace("%%", "%"), "ab") as log:
            batch = subprocess.Popen(
                ["bash", path(job, "script")], env=environ | again,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        write(job, "state", "RUNNING")
        while batch.poll() is None:
            if os.path.exists(path(job, "usr1")):
                os.unlink(path(job, "usr1"))
                batch.send_signal(signal.SIGUSR1)
            for name, sent in (("cancel", signal.SIGTERM), ("usr2", signal.SIGUSR2)):
                if os.path.exists(path(job, name)):
                    os.rename(path(job, name), path(job, name + ".seen"))
                    for pid in read(job, "steps").split():
                        os.killpg(int(pid), sent)
            time.sleep(0.02)
        write(job, "code", batch.returncode)
        write(job, "restarts", restart + 1)
        if not os.path.exists(path(job, "requeue")):
            cancelled = os.path.exists(path(job, "cancel.seen"))
            state = "FAILED" if batch.returncode else "COMPLETED"
            write(job, "state", "CANCELLED by 0" if cancelled else state)
            return
        os.unlink(path(job, "requeue"))
        write(job, "state", "PENDING")


def srun(words):
    assert "--ntasks-per-node=1" in words, words
    command = words[next(i for i, word in enumerate(words) if not word.startswith("-")) :]
    job, nodes = os.environ["SLURM_JOB_ID"], os.environ["SLURM_NNODES"]
    tasks = []

    def forward(sent, _frame):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, sent)

    for sent in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        signal.signal(sent, forward)
    for node in range(int(nodes)):
        own = {"SLURM_PROCID": str(node), "SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}
        own |= {"SLURM_STEP_NUM_TASKS": nodes, "SLURM_STEP_TASKS_PER_NODE": f"1(x{nodes})"}
        tasks.append(subprocess.Popen(command, env=os.environ | own, start_new_session=True))
    write(job, "steps", " ".join(str(task.pid) for task in tasks))
    codes = [task.wait() for task in tasks]
    sys.exit(max(128 - code if code < 0 else code for code in codes))


def option(words, name):
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))


def squeue(words):
    if not any(word.startswith("--jobs=") for word in words):
        assert words[1:] == ["--noheader", "--format=%F|%o"], words
        for job in os.listdir(os.path.join(PLACE, "jobs")):
            if read(job, "state") in ("PENDING", "RUNNING"):
                print(f"{job.partition('_')[0]}|{read(job, 'command')}")
        return
    job = option(words, "jobs")
    state = read(job, "state")
    if state not in ("PENDING", "RUNNING"):
        fail("slurm_load_jobs error: Invalid job id specified")
    print(f"{state}|{'node[0-9]' if state == 'RUNNING' else '(Priority)'}")


def sacct(words):
    if os.path.exists(os.path.join(PLACE, "no_accounts")):
        fail("Slurm accounting storage is disabled")
    job = option(words, "jobs")
    print(f"{read(job, 'state')}|{read(job, 'code', '0')}:0|00:01:00")


def scancel(words):
    job = words[-1]
    if not os.path.isdir(path(job)):
        fail(f"scancel: error: Invalid job id {job}")
    write(job, "usr2" if "--signal=USR2" in words else "cancel", "")


def scontrol(words):
    if words[0] == "requeue":
        if os.path.exists(os.path.join(PLACE, "no_requeue")):
            fail("scontrol: error: Requested operation is presently disabled")
        write(words[1], "requeue", "")
        return
    assert words[:2] == ["show", "hostnames"], words
    print("\n".join(["localhost"] * int(os.environ["SLURM_NNODES"])))


name = os.environ.pop("FAKE_SLURM_AS", None) or os.path.basename(sys.argv[0])
globals()[name](sys.argv[1:])
