"""The plug-in of `polygraphy run` (entry point group `polygraphy.run.plugins`): options, and the code they stand for.

Polygraphy loads this module at every `polygraphy run`, so the code that runs a bundle is imported only with `--dash`.
"""

import argparse
import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import DataLoaderArgs, ModelArgs, RunnerSelectArgs
from polygraphy.tools.args.base import BaseArgs, BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import MANIFEST
from dash_export.core.units import parse_layers
from dash_export.errors import PolicyError
from dash_export.polygraphy import polygraphy_errors

RUNNERS = "dash_export.polygraphy.runners"
DEFAULT_CONTEXT = 64


def arg_groups() -> list[BaseArgs]:
    """Return the groups of options, as Polygraphy asks for them."""
    return [DashRunnerArgs()]


def _layers(text: str) -> tuple[int, ...]:
    try:
        return parse_layers(text)
    except PolicyError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_SETTING: dict[str, tuple[Any, str]] = {
    "policy": (str, "who decides, as in `dash-export run --policy`. Default: what the other options ask for, or dense"),
    "skip": (_layers, "skip these layers, whole units, like 8-10"),
    "trade_off": (float, "skip a unit where damage < trade-off * cost"),
    "budget": (float, "mean decode time wanted, as a fraction of dense"),
    "skipped": (float, "mean number of layers skipped per token"),
    "max_kl": (float, "mean KL from dense allowed, nats per token"),
    "max_layers": (int, "no token runs more layers than this"),
}


class DashRunnerArgs(BaseRunnerArgs):  # type: ignore[misc]
    """
    dash-export Inference: running engines and whole decode steps of a dash-export bundle.

    The model is the bundle; or a portable graph or an engine in it: that engine is then run.

    Depends on:

        - ModelArgs
        - RunnerSelectArgs
        - DataLoaderArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        return "dash-export", "dash"

    def get_extra_help_text_impl(self) -> str:
        return "The model is a bundle (whole decode steps, or a --dash-segment), or a portable graph or engine in one."

    def add_parser_args_impl(self) -> None:
        def add(name: str, **options: Any) -> None:
            self.group.add_argument(f"--dash-{name}", **options)

        add("target", help="The build to run, like cpu or cpu-fp32. Default: cpu, or the only one that is built.")
        segment = (
            "Run one engine of the build, like layers_05-07, bypass_05-07 or layers_00-04, with the inputs and outputs "
            "of its portable graph; --onnxrt then runs that graph."
        )
        add("segment", metavar="ENGINE", help=segment)
        tokens = "New tokens: one step of an engine, or as many whole steps, timed together. Default: 1."
        add("tokens", type=int, default=1, metavar="N", help=tokens)
        context = f"Tokens before them, in the KV cache. Default: {DEFAULT_CONTEXT}."
        add("context", type=int, default=DEFAULT_CONTEXT, metavar="N", help=context)
        for name, (kind, words) in _SETTING.items():
            add(name.replace("_", "-"), type=kind, help=f"Whole steps: {words}.")

    def parse_impl(self, args: argparse.Namespace) -> None:
        """Set `kind`, `place` and `options`: the runner's class, its positional and its keyword arguments."""
        runners = set(self.arg_groups[RunnerSelectArgs].runners.keys())
        if "dash" not in runners:
            return
        others = runners - {"dash"}
        self.options = {name: value for name in _SETTING if (value := getattr(args, f"dash_{name}")) is not None}
        root, build, graph = _bundle_of(self.arg_groups[ModelArgs].path)
        if build is not None and args.dash_target not in (None, build):
            G_LOGGER.critical(f"This engine is of the build {build}: leave out --dash-target {args.dash_target}.")
        with polygraphy_errors():
            target = Bundle.open(root).resolve_target(build or args.dash_target)
        engine, steps = args.dash_segment or graph, [args.dash_tokens, args.dash_context]
        if engine is not None:
            self.kind, self.place = "DashEngineRunner", [str(root), target, engine]
            for name in self.options:
                option = f"--dash-{name.replace('_', '-')}"
                G_LOGGER.critical(f"{option} is for whole steps: leave out --dash-segment, and give the bundle.")
            if others:
                with polygraphy_errors():
                    self._give_portable_graph(Bundle.open(root), target, engine, keep=bool(args.gen_script))
            self._give_inputs("engine_feeds", [*self.place, *steps])
        else:
            self.kind, self.place = "DashStepRunner", [str(root), target, args.dash_tokens]
            if others:
                G_LOGGER.critical(
                    f"A whole step is no one graph that --{min(others)} could run: name an engine with --dash-segment, "
                    "or save one run with --save-outputs and compare another with --load-outputs."
                )
            self._give_inputs("token_feeds", [str(root), *steps])

    def _give_portable_graph(self, bundle: Bundle, target: str, engine: str, keep: bool) -> None:
        """Let the other runners run the engine's portable graph. The graph of a merged segment is written to a
        temporary folder first, which stays if a generated script (`keep`) needs it later.
        """
        from dash_export.building.engine_graphs import portable_file
        from dash_export.polygraphy.runners import find_engine

        segment = find_engine(bundle, bundle.load_build(target), engine)
        folder = tempfile.mkdtemp(prefix="dash-polygraphy-")
        if not keep:
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
        model = self.arg_groups[ModelArgs]
        model.path = str(portable_file(bundle, segment, engine, Path(folder)))
        model.model_type = ModelArgs.ModelType("onnx")

    def _give_inputs(self, kind: str, arguments: list[Any]) -> None:
        """Replace random inputs by a real text, and the states that it has there; what the user has chosen stays."""
        loader = self.arg_groups[DataLoaderArgs]
        if not loader.is_using_random_data():
            return
        if loader.val_range is not None or self.arg_groups[ModelArgs].input_shapes:
            G_LOGGER.warning("--val-range and --input-shapes have no effect on --dash: its inputs are a real text's.")

        def add_to_script(script: Any, *_: Any, **__: Any) -> Any:
            script.add_import(imports=[kind], frm=RUNNERS)
            return script.set_data_loader(make_invocable(kind, *arguments, loader.iterations or 1))

        loader.add_to_script_impl, loader.is_using_random_data = add_to_script, lambda: False

    def add_to_script_impl(self, script: Any) -> None:
        script.add_import(imports=[self.kind], frm=RUNNERS)
        script.add_runner(make_invocable(self.kind, *self.place, **self.options))


def _bundle_of(model: str | None) -> tuple[Path, str | None, str | None]:
    """Return the bundle; of an engine's file in it the target and name; of a portable graph its name."""
    if model is None:
        G_LOGGER.critical("--dash needs a bundle: polygraphy run my.dash --dash")
    path = Path(str(model))
    if path.suffix == ".onnx" and (path.parent.parent / MANIFEST).is_file():
        return path.parent.parent, None, path.stem
    if path.is_file() and len(path.parts) > 3 and (path.parents[2] / MANIFEST).is_file():
        return path.parents[2], path.parent.name, path.stem
    return path, None, None
