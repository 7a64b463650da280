"""`python -m dash_export` is `dash-export`."""

from dash_export.cli import main

main()
