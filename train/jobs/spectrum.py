"""The singular values of what a run changed: which rank its method used (Fig. 5 of the paper)."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib import ticker
from matplotlib.figure import Figure

from mora_jax import hf, singular_values, trees
from mora_jax.errors import InputError
from mora_jax.spectrum import numerical_rank
from train.console.progress import progress
from train.jobs.plot import write_png
from train.run.folder import CONFIG, open_checkpoints, read_config
from train.run.meta import read_meta
from train.run.model import load_model
from train.step.spec import spec_of
from train.step.state import init_params, random_state
from train.storage.files import write_result

ABOVE = 0.1  # the paper counts the singular values above it


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The update of one kernel.

    Attributes:
      kernel: its path; kernels of all layers share one.
      layer: its layer, from 0.
      values_R: the singular values of the update, largest first.
    """

    kernel: str
    layer: int
    values_R: Float[np.ndarray, "R"]

    @property
    def above(self) -> int:
        """How many singular values are above `ABOVE`."""
        return int((self.values_R > ABOVE).sum())

    @property
    def rank(self) -> int:
        """The numerical rank: singular values above 1e-4 of the largest."""
        return int(numerical_rank(jnp.asarray(self.values_R)))


def spectra(path: str, before: str = "") -> list[Spectrum]:
    """Returns the spectrum of every layer's kernel that changed, adapters merged.

    After restarts it is that of the sum of all updates.

    Args:
      path: a run, of which the newest good checkpoint counts, or a Hugging Face folder or id.
      before: what it is compared with, likewise; empty for what the run started from.

    Raises:
      InputError: if a folder holds no model, `before` is missing for one that is no run, the models have
        other shapes, or nothing changed.
    """
    earlier = _loaded(before) if before else _start(path)
    later = _loaded(path)
    if {p: a.shape for p, a in earlier.items()} != {p: a.shape for p, a in later.items()}:
        raise InputError(f"{before or 'the start'} and {path} have other shapes: they are not of one model")
    names = [p for p, array in later.items() if array.ndim == 3 and p.endswith("kernel")]
    found = []
    with progress("decomposing", sum(len(later[name]) for name in names), "kernels") as advance:
        for name in names:
            for layer, (old, new) in enumerate(zip(earlier[name], later[name], strict=True)):
                values = singular_values({name: old}, {name: new})
                found += [Spectrum(name, layer, np.asarray(v_R)) for v_R in values.values()]
                advance(1)
    if not found:
        raise InputError(f"no kernel of {path} differs from {before or 'what it started from'}")
    return found


def write_spectra(found: Sequence[Spectrum], out: str, picture: str) -> None:
    """Writes the spectra as JSON, and a picture of them; an empty path writes nothing."""
    if out:
        rows = [{**dataclasses.asdict(s), "values_R": s.values_R.tolist()} for s in found]
        write_result(out, json.dumps([{**row, "rank": s.rank} for row, s in zip(rows, found, strict=True)]))
    if picture:
        write_png(_drawn(found), picture)


def by_kernel(found: Sequence[Spectrum]) -> Iterator[tuple[str, list[Spectrum]]]:
    """Yields each kernel's path and its spectra over the layers."""
    for kernel in dict.fromkeys(each.kernel for each in found):
        yield kernel, [each for each in found if each.kernel == kernel]


def _loaded(path: str) -> dict[str, Any]:
    return trees.flatten(load_model(str(hf.local_folder(path)))[0])


def _start(run_dir: str) -> dict[str, Any]:
    """Returns the parameters that a run started from: those of init_from, or random ones drawn anew."""
    if not (epath.Path(run_dir) / CONFIG).exists():
        raise InputError(f"{run_dir} is no run: --before names what it is compared with")
    config = read_config(run_dir)
    if config.init_from:
        return _loaded(config.init_from)
    spec = spec_of(config)
    with open_checkpoints(config) as saved:
        step = (saved.steps() or [0])[-1]
        if step and read_meta(saved, step).get("random") != random_state(spec, step):
            raise InputError(
                f"{run_dir} was started with other random numbers than this version of jax draws; use that "
                "version, or name an export of the start with --before"
            )
    return trees.flatten(jax.jit(init_params, static_argnums=0)(spec))


def _drawn(found: Sequence[Spectrum]) -> Figure:
    """Returns the picture: for each kernel the number of singular values above `ABOVE`, over the layers."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for kernel, spectra_L in by_kernel(found):
        layers, counts = [each.layer for each in spectra_L], [each.above for each in spectra_L]
        axes.plot(layers, counts, "o-", markersize=3, label=Path(kernel).parent.name)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.set_xlabel("layer")
    axes.set_ylabel(f"singular values of the update above {ABOVE}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, ncols=2)
    return figure
