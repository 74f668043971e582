"""Which runs train, wait or are stopped, as a pure function of outcomes."""

from studies import LORA, finished, study

from train.jobs.study.outcomes import Outcome
from train.jobs.study.verdicts import best_rate, verdicts


def four(**changes):
    return study(
        variants={"LoRA": LORA}, axes={"optimizer.learning_rate": ["1e-3", "2e-3", "3e-3", "4e-3"]}, **changes
    )


def at(loss, step=50):
    return Outcome("unfinished", step, evaluations={step: loss})


def kinds(made, *found):
    names = [run.name for run in made.runs]
    outcomes = dict(zip(names, found, strict=False)) | {name: Outcome() for name in names[len(found) :]}
    result = verdicts(made, outcomes)
    return [(result[name].kind, result[name].step) for name in names]


def test_without_halving_every_run_trains_to_its_end():
    done = [finished(3.0), Outcome("diverged"), Outcome("failed"), at(1.0)]
    assert kinds(four(), *done) == [("ended", 100)] * 3 + [("train", 100)]


def test_runs_wait_at_the_comparison_for_the_others():
    made = four(halving={"at": [0.5]})
    assert kinds(made, at(3.0), at(2.0), Outcome("diverged")) == [
        ("wait", 50),
        ("wait", 50),
        ("ended", 50),
        ("train", 50),
    ]


def test_the_best_share_continues_and_a_diverged_run_is_the_worst():
    made = four(halving={"at": [0.5]})
    found = kinds(made, at(3.0), at(2.0), Outcome("diverged"), at(4.0))
    assert found == [("train", 100), ("train", 100), ("ended", 50), ("stopped", 50)]


def test_of_equal_runs_the_first_continues_and_shares_are_rounded_up():
    made = four(halving={"at": [0.5], "keep": 0.3})
    assert [kind for kind, _ in kinds(made, *[at(3.0)] * 4)] == ["train", "train", "stopped", "stopped"]


def test_a_second_comparison_is_among_those_that_are_left():
    made = four(halving={"at": [0.5, 0.8]})
    both = [Outcome("unfinished", 80, evaluations={50: x, 80: y}) for x, y in ((1.0, 4.0), (2.0, 3.0))]
    assert kinds(made, *both, at(5.0), at(6.0)) == [
        ("stopped", 80),
        ("train", 100),
        ("stopped", 50),
        ("stopped", 50),
    ]


def test_further_seeds_train_at_the_best_rate_once_all_rates_have_ended():
    made = four(seeds_at_best=[1])
    ended = [finished(3.0), finished(2.0), Outcome("diverged"), finished(4.0)]
    assert [kind for kind, _ in kinds(made, *ended)][4:] == ["unused", "train", "unused", "unused"]
    assert {kind for kind, _ in kinds(made, *ended[:3])[4:]} == {"unused"}
    assert {kind for kind, _ in kinds(made, *ended[:3], Outcome("failed"))[4:]} == {"unused"}


def test_further_seeds_do_not_change_which_rate_is_best():
    made = four(seeds_at_best=[1])
    found = {run.name: Outcome() if run.at_best else finished(run.rate) for run in made.runs}
    found["LoRA_lr1e-3_seed1"] = finished(9.0)
    assert best_rate([*made.runs], found) == 1e-3


def test_a_rate_at_which_a_seed_diverged_is_best_only_alone():
    made = study(variants={"LoRA": LORA}, axes={"optimizer.learning_rate": [1e-3, 2e-3], "seed": [0, 1]})
    losses = [finished(1.0), Outcome("diverged"), finished(3.0), finished(3.0)]
    found = dict(zip([run.name for run in made.runs], losses, strict=True))
    assert best_rate([*made.runs], found) == 2e-3
    assert best_rate([*made.runs[:2]], found) == 1e-3
    assert best_rate([*made.runs[1:2]], found) is None
