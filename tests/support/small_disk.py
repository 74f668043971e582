"""A small disk, for tests of what happens when a disk is full or read-only."""

import contextlib
import subprocess
from pathlib import Path


class SmallDisk:
    """A mounted disk of a few megabytes.

    Attributes:
      path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self) -> None:
        """Fills it up to the last page."""
        with contextlib.suppress(OSError), (self.path / "filler").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass

    def free(self) -> None:
        """Undoes `fill`."""
        (self.path / "filler").unlink()

    def read_only(self, on: bool) -> None:
        """Forbids writing, or allows it again."""
        how = f"remount,{'ro' if on else 'rw'}"
        subprocess.run(["mount", "-o", how, str(self.path)], check=True)
