"""The options that say how a session decides, for every command that runs a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar, cast

import click

from dash_export.commands.common import LayerList
from dash_export.decision import POLICY_KINDS, Setting

_Command = TypeVar("_Command", bound=Callable[..., Any])


def setting_options(command: _Command) -> _Command:
    """Adds the options; they arrive as one argument `setting`."""

    @wraps(command)
    def packed(*args: Any, **given: Any) -> Any:
        names = [item.name for item in fields(Setting)]
        return command(*args, setting=Setting(**{name: given.pop(name) for name in names}), **given)

    options = (
        click.option(
            "--policy",
            type=click.Choice(POLICY_KINDS),
            help="Who decides; by default what the next options imply.",
        ),
        click.option(
            "--skip",
            type=LayerList(),
            metavar="LAYERS",
            help="static: skip these layers for every token, whole units of them, like 8-10,15-18.",
        ),
        click.option(
            "--trade-off",
            type=float,
            help="token: skip a unit where damage < trade-off * cost (0 is dense).",
        ),
        click.option("--budget", type=float, help="Mean decode time wanted, as a fraction of dense, like 0.85."),
        click.option("--skipped", type=float, help="Mean number of layers skipped per token, like 4.5."),
        click.option("--max-kl", type=float, help="token: mean KL from dense allowed, nats per token, like 0.1."),
        click.option(
            "--max-layers",
            type=int,
            help="No token runs more layers than this; token: may stand beside another.",
        ),
        click.option("--hold", is_flag=True, help="token: hold the running mean time at the --budget on any text."),
    )
    for option in reversed(options):
        packed = option(packed)
    return cast(_Command, packed)
