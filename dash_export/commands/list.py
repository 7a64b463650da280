"""`dash-export list`: the targets and policies that come with this package, and the bundles that the cache holds."""

import json

import click

from dash_export.bundle import hub
from dash_export.bundle.layout import cache_folder
from dash_export.bundle.policy_file import card_path, policy_path
from dash_export.bundle.recipe import load_recipe, recipe_names
from dash_export.commands.tables import print_table, size
from dash_export.core.advice import shipped_policies


@click.command("list")
@click.option(
    "--remove", "removed", multiple=True, metavar="ORG/NAME", help="Remove this bundle from the cache; repeatable."
)
def command(removed: tuple[str, ...]) -> None:
    """List the targets and policies that come with this package, and the bundles of the hub that the cache holds.

    `run` and `serve` fetch a bundle into the cache when they are given ORG/NAME; one that was removed is fetched again.
    """
    sizes = hub.cached()
    for name in removed:
        hub.remove_cached(name)
        click.echo(f"{name}: removed from the cache, {size(sizes[name])} are free again.")
    if removed:
        return
    columns = ("target", "backend", "layers", "qkv", "head", "embedding", "what it is")
    recipes = {name: load_recipe(name) for name in recipe_names()}
    print_table(
        "Targets (`build --target TARGET`; the path of a .toml file of your own is one, too)", columns, (),
        (
            (name, own.backend, *(getattr(own.weights, part) for part in columns[2:6]), own.description)
            for name, own in recipes.items()
        ),
    )  # fmt: skip
    cards = {name: json.loads(card_path(policy_path(name)).read_text(encoding="utf-8")) for name in shipped_policies()}
    print_table(
        "Policies that come with this package (`build MODEL --policy NAME`)",
        ("name", "trained for", "units", "drafter"), (),
        ((name, card["model"], card["units"], "yes" if card.get("drafter") else "no") for name, card in cards.items()),
    )  # fmt: skip
    where = f"Bundles of the hub in {cache_folder() / 'hub'}"
    if sizes:
        print_table(where, ("name",), ("size",), ((name, size(taken)) for name, taken in sizes.items()))
        click.echo(f"{size(sum(sizes.values()))} in all. To free it: dash-export list --remove ORG/NAME")
    else:
        click.echo(f"{where}: none.")
