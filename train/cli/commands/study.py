"""`mora study`."""

import dataclasses
from typing import Annotated, Literal

import tyro

from mora_jax.errors import InputError
from train.cli.commands.arguments import Study
from train.config.paths import spell_out
from train.console import exits

Settings = Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE [KEY=VALUE ...]", help_behavior_hint="(default: none)")
]


@dataclasses.dataclass(frozen=True)
class RunStudy:
    """Trains the runs of a study, a few at a time, and tabulates their perplexity. Run it again to continue.

    A study is a YAML file of a base config, variants and axes, such as configs/studies/tiny.yaml. The exit
    status is 0 once every run has finished, diverged or been stopped by halving, and 5 if one failed.

    Attributes:
      path: YAML file of the study.
      run_dir: folder for the study, with a folder for each run; empty for the file's run_dir.
      set: settings of all runs, as KEY=VALUE, such as data.directory=data/c4; they override the file's set.
      jobs: runs at a time on each GPU, or on a machine without GPUs.
      gpus_per_run: GPUs that each run takes.
      report: train nothing; write the table, JSON and pictures of what the folder holds, and print the table.
      submit: slurm submits the runs that have not ended as one array of jobs, and trains nothing here.
      sbatch: options for sbatch, in one word, such as --sbatch="--gres=gpu:1 --time=08:00:00".
    """

    path: Study
    run_dir: str = ""
    set: Settings = ()
    jobs: int = 1
    gpus_per_run: int = 1
    report: tyro.conf.FlagCreatePairsOff[bool] = False
    submit: Literal["", "slurm"] = ""
    sbatch: str = ""

    def __post_init__(self) -> None:
        spell_out(self, "", "path")
        spell_out(self, "--", optional=("run_dir",))
        for name, value in (("--jobs", self.jobs), ("--gpus-per-run", self.gpus_per_run)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")
        if self.report and self.submit:
            raise InputError("give either --report or --submit")
        if self.sbatch and not self.submit:
            raise InputError("--sbatch needs --submit slurm")


def run_study(command: RunStudy) -> None:
    """Runs `mora study`."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # the GPUs are for the runs, which are processes of their own

    from train.config.study import read_study
    from train.jobs.study import study as job
    from train.jobs.study.table import markdown

    study = read_study(command.path, command.run_dir, command.set)
    if command.submit:
        print(job.submit_study(study, command.sbatch))
        return
    unended = 0
    if command.report:
        results = job.report(study)
        job.write(results)
    else:
        results, unended = job.run_study(study, command.gpus_per_run, command.jobs)
    print(markdown(results), end="")
    if unended:
        raise SystemExit(exits.FAILED)
