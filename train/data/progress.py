"""The progress bars of the data commands: counts so far, tokens a second, time left."""

from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class TokensPerSecond(ProgressColumn):
    """Tokens since the bar appeared, over the seconds since then."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time or task.elapsed
        rate = task.fields["tokens"] / seconds if seconds else 0
        return Text(f"{rate / 1e6:.2f}M tokens/s", style="progress.data.speed")


def token_bar() -> Progress:
    """A bar whose tasks carry the fields `documents` and `tokens`."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
        TokensPerSecond(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )


def plain_bar() -> Progress:
    """A bar for work counted in one unit; a spinner where the total is not known."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
