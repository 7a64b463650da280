"""A model repository for Triton Inference Server: a folder per bundle, with triton_model.py and its configuration."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from dash_export.errors import OutputError
from dash_export.files.artifacts import sync, write_atomic
from dash_export.serve.scheduler import Scheduler

_CONFIG = """\
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "sampling_parameters" data_type: TYPE_STRING dims: [ 1 ] optional: true }}
]
output [
  {{ name: "text_output" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "statistics" data_type: TYPE_STRING dims: [ 1 ] }}
]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
{parameters}"""


def write_repository(folder: Path, served: Mapping[str, Scheduler]) -> list[Path]:
    """Write `folder`/NAME/config.pbtxt and `folder`/NAME/1/model.py for every bundle, each model whole or not at all.
    Return the models' folders. Raises OutputError where a model of that name already exists.
    """
    code, made = Path(__file__).with_name("triton_model.py").read_bytes(), list[Path]()
    for model in (folder / name for name in served):
        if os.path.lexists(model):
            raise OutputError(f"{model} is there already: remove it, or choose another folder.")
    for name, scheduler in served.items():
        runtime, model = scheduler.runtime, folder / name
        given = {
            "bundle": str(runtime.bundle.root.absolute()),
            "target": runtime.build.target,
            "rows": str(scheduler.size),
            "waiting": str(scheduler.most_waiting),
        }
        parameters = "".join(
            f'parameters {{ key: "{key}" value: {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}\n'
            for key, value in given.items()
        )
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=".writing-") as unfinished:
            work = Path(unfinished) / name
            (work / "1").mkdir(parents=True)
            write_atomic(work / "1" / "model.py", code)
            write_atomic(work / "config.pbtxt", _CONFIG.format(parameters=parameters))
            work.rename(model)
        sync(folder)
        made.append(model)
    return made
