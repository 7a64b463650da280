"""Run `dash-export` as `python -m dash_export`, importing nothing from the current folder, which -m puts first."""

import contextlib
import os
import sys

with contextlib.suppress(FileNotFoundError):  # the current folder may be gone
    if sys.path[0] == os.getcwd() and __file__ != f"{sys.path[0]}/dash_export/__main__.py":  # noqa: PTH109  nothing imported
        del sys.path[0]

from dash_export.cli import main

main()
