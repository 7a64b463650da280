"""`dash-export completion`: the script that makes a shell complete commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL.

    \b
    bash:  echo 'eval "$(dash-export completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(dash-export completion zsh)"' >> ~/.zshrc
    fish:  dash-export completion fish > ~/.config/fish/completions/dash-export.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "dash-export", "_DASH_EXPORT_COMPLETE").source())
