"""Submits the runs of a study to Slurm, as one array of jobs."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mora_jax.errors import InputError
from train.config.study import Study, StudyRun
from train.jobs.study import outcomes as folders
from train.jobs.study.queue import command
from train.storage.files import write_result

SCRIPT = "study.sbatch"
# Starts of one job; each ends with a checkpoint before the time limit.
_REQUEUES = 100
_LONGEST = 300

# Slurm's copy of the script runs in the folder of the submission.
_TEMPLATE = """\
#!/bin/bash
# Written by `mora study {file} --submit slurm`: one task for each run that has not ended.
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --ntasks=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}
case $SLURM_ARRAY_TASK_ID in
{cases}
esac
status=$?
# 75: stopped with a checkpoint, as before the time limit; 76: lost. The same task resumes.
if [[ $status -eq 75 || $status -eq 76 ]] && (( ${{SLURM_RESTART_COUNT:-0}} < {requeues} )); then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit $status
"""


def submit(study: Study, runs: Sequence[StudyRun], options: str) -> str:
    """Writes the script of the array into the study's folder and submits it.

    Args:
      study: the study.
      runs: its runs that have not ended.
      options: of sbatch, as in a shell; they override those of the script.

    Returns:
      What sbatch printed, such as "Submitted batch job 123".

    Raises:
      InputError: if there is no sbatch, or it refuses.
    """
    if not shutil.which("sbatch"):
        raise InputError("--submit slurm: there is no sbatch here; run this where Slurm's jobs are submitted")
    path = Path(study.run_dir) / SCRIPT
    folders.log_file(study, runs[0]).parent.mkdir(parents=True, exist_ok=True)
    write_result(path, script(study, runs))
    try:
        words = ["sbatch", *shlex.split(options), str(path)]
    except ValueError as error:
        raise InputError(f"--sbatch {options}: {error}") from error
    ended = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode:
        why = " ".join(ended.stderr.split()) or f"status {ended.returncode}"
        raise InputError(f"sbatch refuses {path}: {why[:_LONGEST]}")
    return ended.stdout.strip()


def script(study: Study, runs: Sequence[StudyRun]) -> str:
    """Returns the script of the array. Every run writes its own log, as under `mora study`."""
    cases = [f"  {i}) {_line(study, run)} ;;" for i, run in enumerate(runs)]
    output = Path(study.run_dir).absolute() / "logs" / "slurm-%A_%a.out"
    return _TEMPLATE.format(
        file=study.file,
        name=f"mora-{Path(study.file).stem}",
        last=len(runs) - 1,
        output=output,
        cases="\n".join(cases),
        requeues=_REQUEUES,
    )


def _line(study: Study, run: StudyRun) -> str:
    words = ["srun", "--ntasks=1", sys.executable, "-m", "train.cli", *command(run)]
    path = os.environ.get("PYTHONPATH")
    if path:
        words = ["env", f"PYTHONPATH={path}", *words]
    log = folders.log_file(study, run).absolute()
    return f"{shlex.join(words)} >>{shlex.quote(str(log))} 2>&1"
