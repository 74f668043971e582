"""Positional arguments that several commands have."""

from typing import Annotated

import tyro

Config = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FOLDER")]
Out = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
Runs = Annotated[
    tyro.conf.Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
]
Study = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
