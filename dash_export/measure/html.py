"""Reports as one HTML file: a template of this folder, no script, nothing fetched. A device has no more than jinja2."""

from pathlib import Path

import jinja2

from dash_export.bundle.layout import REPORT


def render_page(template: str, **facts: object) -> str:
    """Return a template, which extends `page.html.jinja`, filled in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["mb"] = lambda count: f"{count / 1e6:.1f}"
    return environment.get_template(template).render(made_by=REPORT, **facts)
