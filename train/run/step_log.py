"""Follows a run from the host without holding the devices up: metrics are read a few steps late."""

import collections
import statistics
import time

import jax

from train.run.metrics import Metrics

# Steps whose metrics are not yet read: the host dispatches ahead, so that the devices never wait for it.
IN_FLIGHT = 2


class Watch:
    """Writes a line of metrics for every step, with the tokens trained on a second.

    Attributes:
      rates: tokens a second of each step in whose time nothing but training happened.
      bad_in_a_row: of the newest step whose metrics were read.
      last_bad: what is known of the newest bad step, in words; empty if there was none.
    """

    def __init__(self, metrics: Metrics, tokens_per_step: int) -> None:
        self._metrics = metrics
        self._tokens_per_step = tokens_per_step
        self._pending: collections.deque[tuple[int, dict[str, jax.Array], float]] = collections.deque()
        self._last: float | None = None
        self._started = time.perf_counter()
        self._tokens = 0
        self.rates: list[float] = []
        self.bad_in_a_row = 0
        self.last_bad = ""

    def follow(self, step: int, scalars: dict[str, jax.Array], data_wait: float) -> None:
        """Takes a dispatched step's metrics, and writes those of the steps before that are done.

        Args:
          step: the update, from 0.
          scalars: its metrics, perhaps not yet computed.
          data_wait: seconds the host waited for the step's batch.
        """
        self._pending.append((step, scalars, data_wait))
        self._tokens += self._tokens_per_step
        while len(self._pending) > IN_FLIGHT:
            self._write_oldest()

    def drain(self) -> None:
        """Waits for all steps that were dispatched.

        Neither they nor the time until the next one count for a rate: they may be done before they are read.
        """
        while self._pending:
            self._last = None
            self._write_oldest()
        self._last = None

    def note(self, step: int, values: dict[str, float | str]) -> None:
        """Writes a line of its own: an evaluation or a restart."""
        self._metrics.write(step, values)

    def median_rate(self) -> float:
        """Tokens a second of the median undisturbed step; of all steps and what lay between, if none was."""
        if self.rates:
            return statistics.median(self.rates)
        return self._tokens / max(time.perf_counter() - self._started, 1e-9)

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
        self._look(step, values)

    def _look(self, step: int, values: dict[str, float]) -> None:
        self.bad_in_a_row = int(values["bad_in_a_row"])
        if self.bad_in_a_row:
            found = f"loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            self.last_bad = f"update {step}: {found}; {values['skipped_steps']:.0f} skipped so far"
