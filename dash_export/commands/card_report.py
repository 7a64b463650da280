"""What `doctor --card` prints, and the two files that it leaves."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import REPORT
from dash_export.commands.progress import progress_bar
from dash_export.commands.reports import save_report, sole_writer
from dash_export.measure.html import render_page


def report_card(ctx: click.Context, folder: Path, target: str | None, machine: dict[str, Any], as_json: bool) -> None:
    """Check the card, print each step as it ends, and write the report. Exits with 1 where something is wrong."""
    from dash_export.building.card_check import STEPS, CardCheck, card_target, check_card

    bundle = Bundle.open(folder)
    check = CardCheck(bundle, card_target(bundle, target), machine)
    files = [Path(f"{bundle.root.resolve().stem}-{check.target}-card.{kind}") for kind in ("json", "html")]
    steps: list[dict[str, Any]] = []
    with sole_writer(ctx, *files):
        with progress_bar("card") as check.progress:
            for number, outcome in enumerate(check_card(check), 1):
                steps.append(asdict(outcome))
                said = f"WRONG     {outcome.wrong}" if outcome.wrong else f"found     {outcome.found}"
                told = f"{number}/{len(STEPS)} {outcome.name}\n    expected  {outcome.expected}\n    {said}"
                click.echo(told, err=as_json)
        found = {
            "made_by": REPORT, "model": bundle.manifest.model.name, "target": check.target, "steps": steps,
            "warnings": [*dict.fromkeys(check.warnings)], "facts": check.facts, "machine": machine,
        }  # fmt: skip
        content = json.dumps(found)
        written = [save_report(files[0], content), save_report(files[1], render_page("card.html.jinja", found=found))]
    if as_json:
        click.echo(content)
    click.echo(f"Written to {written[0]} and {written[1]}: send us both, with a problem or as figures.", err=as_json)
    if steps[-1]["wrong"]:
        ctx.exit(1)
