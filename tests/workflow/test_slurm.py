"""The tiny workflow on a real SLURM, with what happens on clusters: lost and cancelled jobs, time limits, a killed run.

One story is run, which takes minutes (`make slurm`). The tests below it look at what SLURM and the workflow recorded.
"""

import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml

from cell2text.files import read_json
from project_files import bodies_of_rules
from real_slurm import ACCOUNT, Slurm, missing
from tiny_run import ROOT, new_folder

GPU_RULES = ("finetune", "score_candidates", "baseline_shuffled")
# What a user keeps in a profile for the site
PROFILE = f"""
default-resources:
  slurm_account: {ACCOUNT}
  slurm_partition: cpu
set-resources:
""" + "".join(f"  {rule}: {{slurm_partition: gpu}}\n" for rule in GPU_RULES)
RECORD = ROOT / "logs/slurm_test.tsv"


class Run:
    """A run of the tiny workflow on SLURM, in the background."""

    def __init__(self, slurm, folder, *arguments):
        self.slurm, self.log = slurm, folder / f"run-{time.monotonic_ns()}.log"
        options = ["--snakefile", ROOT / "Snakefile", "--directory", folder, "--configfile", folder / "tiny.yaml"]
        options += ["--workflow-profile", ROOT / "profiles/slurm", "--profile", folder / "site"]
        options += ["--slurm-init-seconds-before-status-checks", "5", "--latency-wait", "5"]
        # jobs run side by side on the few cores of the machine
        options += ["--set-threads", *(f"{rule}=1" for rule in GPU_RULES), *arguments]
        command, environment = [sys.executable, "-m", "snakemake", *options], slurm.environment
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self):
        """Kill Snakemake, if it runs; not its jobs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ends(self, seconds=120):
        """Wait until the run ends, and return its messages."""
        self.process.wait(seconds)
        return self.log.read_text()

    def wait_for(self, condition, what, seconds=300):
        """Wait until a condition returns something true, and return it."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{what}: not within {seconds} s, or the run ended:\n{self.log.read_text()[-5000:]}")
            time.sleep(0.1)
        return found

    def running(self, rule):
        """Wait until a job of a rule is running, and return its id."""

        def look():
            listed = self.slurm.command("squeue", "-h", "-t", "running", "-o", "%i %k").splitlines()
            return next((line.split()[0] for line in listed if re.search(f"rule_{rule}(_wildcards|$)", line)), None)

        return self.wait_for(look, f"a job of {rule}")


@pytest.fixture(scope="module")
def story(tmp_path_factory, tiny_model):
    """Run the tiny workflow to its end, through mishaps.

    Returns the folder, the ids of some jobs, all jobs of the run on one node, and the messages of Snakemake.
    """
    if reason := missing():
        pytest.skip(reason)
    folder = new_folder(tmp_path_factory.mktemp("slurm") / "work", tiny_model)
    (folder / "site").mkdir()
    (folder / "site/profile.yaml").write_text(PROFILE)
    ids, logs, runs = {}, {}, []
    with Slurm(tmp_path_factory.mktemp("daemons")) as slurm:
        try:
            _live_through(slurm, folder, ids, logs, runs)
        finally:
            for run in runs:
                run.kill()
            jobs = pd.DataFrame(slurm.jobs())
            RECORD.parent.mkdir(exist_ok=True)
            jobs.to_csv(RECORD, sep="\t", index=False)
            print(f"\n{jobs.to_string(index=False)}\n(in {RECORD.relative_to(ROOT)})")
    return folder, ids, jobs[jobs["JobID"] != ids["on two nodes"]], logs


def _live_through(slurm, folder, ids, logs, runs):
    def start(*arguments):
        runs.append(Run(slurm, folder, *arguments))
        return runs[-1]

    together = ("--groups", "embed_genes=embed_genes")
    run = start(*together)
    ids["cancelled"] = run.running("filter_cells")
    slurm.command("scancel", ids["cancelled"])

    ids["lost"] = run.running("rank_genes")
    slurm.lose_node("first")
    run.wait_for(lambda: "down" in slurm.state_of("first"), "the loss of the node")
    slurm.start_node("first")

    ids["orphan"] = run.running("fit_encoder")
    run.kill()
    logs["killed"] = run.log.read_text()
    logs["locked"] = start().ends()
    logs["unlocked"] = start("--unlock").ends()
    slurm.command("scancel", "--name", re.search(r"SLURM run ID: (\S+)", logs["killed"])[1])

    run = start(*together)
    ids["timeout"] = run.running("finetune")
    checkpoint = folder / "results/tiny/finetuned.checkpoints/last.safetensors"
    run.wait_for(checkpoint.exists, "a checkpoint")
    # until SLURM continues and terminates it at the time limit
    slurm.signal_script(ids["timeout"], "finetune.py", signal.SIGSTOP)
    slurm.command("scontrol", "update", f"JobId={ids['timeout']}", "TimeLimit=1")
    logs["resumed"] = run.ends(900)
    logs["fine-tuning"] = (folder / "logs/tiny/finetune.log").read_text()

    slurm.start_node("second")
    (folder / "nodes.yaml").write_text("finetune: {nodes: 2}")
    run = start("--configfile", folder / "tiny.yaml", folder / "nodes.yaml", "--until", "finetune")
    ids["on two nodes"] = run.running("finetune")
    logs["on two nodes"] = run.ends(300)


@pytest.mark.slow
def test_the_run_ends_with_its_report(story):
    folder, _, _, logs = story
    assert "(100%) done" in logs["resumed"], logs["resumed"][-5000:]
    assert (folder / "results/tiny/report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_account_partitions_and_gpus_are_those_of_the_users_profile(story):
    _, _, jobs, _ = story
    assert set(jobs["Account"]) == {ACCOUNT}
    on_gpu = jobs["Comment"].str.contains(f"^rule_(?:{'|'.join(GPU_RULES)})(?:_wildcards|$)")
    assert on_gpu.sum() >= 1 + 4 + 1
    assert set(jobs.loc[on_gpu, "Partition"]) == {"gpu"} and set(jobs.loc[~on_gpu, "Partition"]) == {"cpu"}
    assert jobs["ReqTRES"].str.contains("gres/gpu=1(?:,|$)").equals(on_gpu)
    assert jobs["ReqTRES"].str.contains("gres/gpu=").equals(on_gpu)


@pytest.mark.slow
def test_a_cancelled_job_is_submitted_again_with_more_memory(story):
    _, ids, jobs, _ = story
    (cancelled,) = jobs.loc[jobs["JobID"] == ids["cancelled"]].to_dict("records")
    assert cancelled["State"].startswith("CANCELLED") and "mem=4000M" in cancelled["ReqTRES"]
    again = jobs[(jobs["Comment"] == cancelled["Comment"]) & (jobs["State"] == "COMPLETED")]
    assert len(again) == 1 and again["ReqTRES"].str.contains("mem=8000M").all()


@pytest.mark.slow
def test_the_job_of_a_lost_node_is_requeued(story):
    _, ids, jobs, _ = story
    states = list(jobs.loc[jobs["JobID"] == ids["lost"], "State"])
    assert states == ["NODE_FAIL", "COMPLETED"]
    assert (jobs["Comment"].str.startswith("rule_rank_genes") & (jobs["State"] == "COMPLETED")).sum() == 1


@pytest.mark.slow
def test_a_killed_run_is_unlocked_and_resumes(story):
    _, ids, jobs, logs = story
    assert "Directory cannot be locked" in logs["locked"] and "Unlocked working directory" in logs["unlocked"]
    assert set(jobs.loc[jobs["JobID"] == ids["orphan"], "State"].str.split().str[0]) == {"CANCELLED"}
    done = jobs.loc[jobs["State"] == "COMPLETED", "Comment"]
    assert done.is_unique  # what was finished before the kill was not run again
    assert "rule_fit_encoder" in set(done)


@pytest.mark.slow
def test_fine_tuning_resumes_from_its_checkpoint_after_the_time_limit(story):
    _, ids, jobs, logs = story
    tuned = jobs[jobs["Comment"] == "rule_finetune"]
    assert list(tuned["State"]) == ["TIMEOUT", "COMPLETED"] and tuned["JobID"].iloc[0] == ids["timeout"]
    assert re.search(r"resuming from step [1-9]", logs["fine-tuning"])


@pytest.mark.slow
def test_fine_tuning_runs_on_two_nodes(story):
    folder, ids, _, logs = story
    assert re.search(r"Finished jobid: \d+ \(Rule: finetune\)", logs["on two nodes"]), logs["on two nodes"][-5000:]
    jobs = pd.read_csv(RECORD, sep="\t", dtype=str)
    (job,) = jobs[jobs["JobID"] == ids["on two nodes"]].to_dict("records")
    assert job["State"] == "COMPLETED" and "node=2" in job["ReqTRES"] and "gres/gpu=2" in job["ReqTRES"]
    assert read_json(folder / "results/tiny/finetuned/cell2text.json")["processes"] == 2


@pytest.mark.slow
def test_jobs_of_a_group_share_a_submission(story):
    folder, _, jobs, _ = story
    shared = jobs[jobs["Comment"].str.contains("embed_genes")]
    assert list(shared["State"]) == ["COMPLETED"] and shared["ReqTRES"].str.contains("cpu=4,mem=8000M").all()
    assert len(list((folder / "results/tiny/embeddings/pbmc68k").iterdir())) == 2


@pytest.mark.slow
def test_a_thousand_shards_are_about_a_hundred_submissions(tmp_path, tiny_model):
    folder = new_folder(tmp_path / "work", tiny_model)
    (folder / "many.yaml").write_text((folder / "tiny.yaml").read_text().replace("shards: 2", "shards: 1000"))
    options = ["--snakefile", ROOT / "Snakefile", "--directory", folder, "--configfile", folder / "many.yaml"]
    options += ["--workflow-profile", ROOT / "profiles/slurm", "--dry-run"]
    run = subprocess.run([sys.executable, "-m", "snakemake", *options], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    planned = run.stdout + run.stderr
    assert re.search(r"^embed_genes +1000$", planned, re.MULTILINE)
    groups, alone = re.findall(r"Group job embed_genes", planned), re.findall(r"^Job \d+: ", planned, re.MULTILINE)
    local = 2  # fetch_language_model and compare
    assert len(groups) + len(alone) - local == 105


def test_every_rule_declares_its_memory_and_time():
    rules = bodies_of_rules()
    assert len(rules) > 30 and all("    script:\n" in text for text in rules.values())
    assert [name for name, text in rules.items() if "mem_mb=" not in text or "runtime=" not in text] == []


def test_the_profile_leaves_the_keys_of_the_site_to_the_user():
    profile = yaml.safe_load((ROOT / "profiles/slurm/profile.yaml").read_text())
    assert not {"default-resources", "set-resources", "set-threads", "slurm-array-jobs"} & set(profile)


def test_the_documented_profile_names_every_rule_with_a_gpu():
    page = (ROOT / "docs/cluster.md").read_text()
    (block,) = re.findall(r"```yaml\n(# ~/.config/snakemake/site/profile.yaml\n.*?)```", page, re.DOTALL)
    named = yaml.safe_load(block)["set-resources"]
    assert set(named) == {name for name, text in bodies_of_rules().items() if re.search(r"\bgpu=", text)}
    assert all(resources == {"slurm_partition": "gpu"} for resources in named.values())
