"""NVIDIA Polygraphy's `polygraphy run`, taught to run bundles: `--dash` compares and times engines and whole steps.

`plugin` is what Polygraphy loads; `runners` run a bundle, `inputs` feed it.
"""
