"""`dash-export push`: publish a bundle on the Hugging Face hub."""

from pathlib import Path

import click

from dash_export.bundle import hub
from dash_export.bundle.bundle import Bundle


@click.command("push")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("name", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Where the repository is new: only for you.")
@click.option("--base-model", metavar="ORG/NAME", help="The hub's model that it was made of, for a new card.")
@click.option("--license", "license_id", metavar="ID", help="The model's licence, for a new card, like apache-2.0.")
def command(bundle: Path, name: str, private: bool, base_model: str | None, license_id: str | None) -> None:
    """Publish BUNDLE with its builds; `run` and `serve` take ORG/NAME from there. A repository without a card gets one.

    Log in first: hf auth login.
    """
    opened = Bundle.open(bundle)
    address = hub.push(opened, name, private=private, base_model=base_model, license_id=license_id)
    click.echo(f"{address}\nNext: dash-export run {name}")
