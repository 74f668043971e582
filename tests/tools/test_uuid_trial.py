"""The trial of the memory task: which GPUs it takes."""

import pytest
from uuid_trial import first_gpus


@pytest.mark.parametrize(
    ("visible", "count", "taken"),
    [
        (None, 2, ["0", "1"]),
        ("3", 1, ["3"]),
        ("2,3,5", 2, ["2", "3"]),
        ("2", 4, ["2"]),
        ("GPU-8a2f,GPU-91c0", 4, ["GPU-8a2f", "GPU-91c0"]),
        ("", 4, [""]),
        ("2,3", 0, [""]),
        (None, 0, [""]),
    ],
)
def test_a_trial_takes_the_gpus_that_are_visible(visible, count, taken, monkeypatch):
    """Trials side by side, each with a GPU of its own, would share the first one otherwise."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert first_gpus(count) == taken
