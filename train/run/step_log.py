"""Logs every step a few steps late, so that the host never holds the devices up."""

import collections
import statistics
import time

import jax

from train.run.metrics import Metrics

# Steps whose metrics are not yet read. The host dispatches ahead, so that the devices never wait for it.
IN_FLIGHT = 2


class StepLog:
    """Writes a line of metrics for every step, with the training speed.

    Attributes:
      steps: how many steps were added.
      rates: tokens a second of each step during which only training happened.
      bad_in_a_row: bad steps in a row, as of the newest step whose metrics were read.
      last_bad: a description of the newest bad step; empty if there was none.
    """

    def __init__(self, metrics: Metrics, tokens_per_step: int) -> None:
        self._metrics = metrics
        self._tokens_per_step = tokens_per_step
        self._pending: collections.deque[tuple[int, dict[str, jax.Array], float]] = collections.deque()
        self._last: float | None = None
        self._started = time.perf_counter()
        self.steps = 0
        self.rates: list[float] = []
        self.bad_in_a_row = 0
        self.last_bad = ""

    def add(self, step: int, scalars: dict[str, jax.Array], data_wait: float) -> None:
        """Adds a dispatched step, and writes the lines of earlier steps.

        Args:
          step: the update, from 0.
          scalars: its metrics, which may not be computed yet.
          data_wait: seconds that the host waited for the batch.
        """
        self._pending.append((step, scalars, data_wait))
        self.steps += 1
        while len(self._pending) > IN_FLIGHT:
            self._write_oldest()

    def drain(self) -> None:
        """Waits for all dispatched steps and writes their lines.

        Neither they nor the time until the next step count for a rate: they may be done before they are read.
        """
        while self._pending:
            self._last = None
            self._write_oldest()
        self._last = None

    def note(self, step: int, values: dict[str, float | str]) -> None:
        """Writes a line for an evaluation or a restart."""
        self._metrics.write(step, values)

    def median_rate(self) -> float:
        """Returns tokens a second of the median undisturbed step, or of the whole time if there is none."""
        if self.rates:
            return statistics.median(self.rates)
        return self.steps * self._tokens_per_step / max(time.perf_counter() - self._started, 1e-9)

    def _write_oldest(self) -> None:
        step, scalars, data_wait = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(scalars).items()}
        now = time.perf_counter()
        if self._last is not None:
            self.rates.append(self._tokens_per_step / (now - self._last))
            values["tokens_per_second"] = self.rates[-1]
        self._last = now
        values |= {"data_wait": data_wait, "tokens": (step + 1) * self._tokens_per_step}
        self._metrics.write(step, values)
        self.bad_in_a_row = int(values["bad_in_a_row"])
        if self.bad_in_a_row:
            found = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            self.last_bad = f"update {step}: {found}; {values['skipped_steps']:.0f} skipped so far"
