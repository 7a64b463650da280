"""`dash-export sign`: sign a bundle, so that others can check whose it is."""

from pathlib import Path
from shlex import quote

import click

from dash_export.bundle import signing
from dash_export.bundle.bundle import Bundle


@click.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--key", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False), metavar="PEM",
              help="Your private key, of an elliptic curve, without a password.")  # fmt: skip
def command(bundle: Path, key: Path) -> None:
    """Sign BUNDLE and its builds as they are; sign again after a build.

    Give others your public key. With it as --trusted-key of `run` or `serve`, or as DASH_EXPORT_TRUSTED_KEY, only
    bundles that you have signed are run.
    """
    signature = signing.sign(Bundle.open(bundle), key)
    click.echo(f"{signature}: signed. Check: dash-export run {quote(str(bundle))} --trusted-key PUBLIC")
