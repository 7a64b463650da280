"""The manifest and build.json: read strictly, or refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_export import DashRuntime
from dash_export.bundle.bundle import Bundle, to_json
from dash_export.bundle.layout import BUILD, MANIFEST, safe_path
from dash_export.errors import BundleError, DashError
from dash_export.files.outputs import MARK
from dash_export.files.typed_json import typed
from tests.forged import edit

BUILD_JSON = f"engines/cpu-fp32/{BUILD}"


@pytest.fixture
def bundle(own_bundle: Path) -> Path:
    return own_bundle


def test_records_come_back(tiny_root: Path) -> None:
    opened = Bundle.open(tiny_root)
    assert opened.targets() == ["cpu-fp32", "portable"]
    assert opened.build_command("cpu-int8").endswith("--target cpu-int8")
    for record in (opened.manifest, opened.load_build("cpu-fp32")):
        assert typed(type(record), json.loads(to_json(record)), "a record") == record


def laid_out(folder: Path) -> None:
    """What somebody may take for a bundle."""
    for name, text in {
        "file.txt": "text", "model/config.json": "{}", "app/config.json": "{}", "app/manifest.json": "{}",
        "app/model.safetensors": "", "half.dash/onnx/x": "", "killed/config.json": "{}", f"killed/{MARK}": "export",
        "several/a.dash/manifest.json": "{}", "several/a.dash/onnx/layer_00.onnx": "", "folder/x": "",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


NO_BUNDLES = {
    "a.b.gguf": r"is a model.*\. Make .* build \S*a\.b\.gguf --target cpu -o a\.b\.dash$",
    "org/x": r"is a model, or a bundle on the hub.*\. Make .* build org/x --target cpu -o x\.dash$",
    "model": r"is a model\. Make .* build \S*model --target cpu -o model\.dash$",
    "app": "app is a model",
    "nothing.dash": r"There is no bundle at .* dash-export build MODEL -o \S*nothing\.dash$",
    "no model.dash": r"dash-export build MODEL -o '.*no model\.dash'$",
    "half.dash": r"not a finished bundle.* export MODEL -o .*half\.dash$",
    "killed": "is not a finished bundle",
    "folder": r"folder is a folder that is no bundle\. Make one of a model: .* build MODEL -o NAME\.dash$",
    "file.txt": r"file\.txt is a file that is no bundle\. Make one of a model: .* build MODEL -o NAME\.dash$",
    "several": r"several is no bundle\. In it are a\.dash: give one of them\.$",
}


@pytest.mark.parametrize("name", NO_BUNDLES)
def test_what_is_no_bundle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And which command makes it one. Nobody is told to write a bundle over a file or a folder of his own."""
    laid_out(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=NO_BUNDLES[name]):
        Bundle.open(name)


def test_a_link_inside_is_told(bundle: Path, tmp_path: Path) -> None:
    (bundle / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (bundle / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(BundleError, match=r"leaves the bundle\. It is a link: copy the bundle whole"):
        Bundle.open(bundle)


def test_targets_that_are_not_built(bundle: Path) -> None:
    with pytest.raises(BundleError, match=r"'cpu' does not exist \(built: cpu-fp32, portable\).*dash-export build"):
        DashRuntime.load(bundle, "cpu")
    (bundle / BUILD_JSON).unlink()
    with pytest.raises(BundleError, match="'cpu-fp32' is unfinished"):
        DashRuntime.load(bundle, "cpu-fp32")
    for target in ("../engines/cpu-fp32", "/etc", "..", "", "cpu-fp32/"):
        with pytest.raises(DashError, match=r"does not exist.*--target cpu$|leaves the bundle"):
            DashRuntime.load(bundle, target)


def test_a_build_to_be_made(bundle: Path) -> None:
    """Is the one that was asked for; where nobody asked, the one that was begun. The command can be pasted."""
    (bundle / "engines" / "trt").mkdir()
    moved = bundle.rename(bundle.with_name("my model.dash"))
    with pytest.raises(BundleError, match=r"dash-export build '.*/my model\.dash' --target rtx$"):
        DashRuntime.load(moved, "rtx")
    with pytest.raises(BundleError, match=r"unfinished: trt\)\. Run: .* --target trt$"):
        DashRuntime.load(moved, "cpu")


@pytest.mark.parametrize("name", ["tokenizer.json", "engines/cpu-fp32/layer_04.onnx", "engines/cpu-fp32/layer_04.data"])
@pytest.mark.parametrize("how", ["changed", "longer", "gone"])
def test_changed_file(name: str, how: str, bundle: Path) -> None:
    path = bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "changed" else data + b"x")
    if how == "gone":
        path.unlink()
    with pytest.raises(BundleError, match=f"{name} is (not the file that was written|missing)"):
        DashRuntime.load(bundle, "cpu-fp32")


PATHS = ["../secret", "/etc/passwd", "onnx/../../secret", "a\\..\\b", "", "nul\0", "."]
SLOW = ["onnx/" + "a/" * 2000 + "N", "onnx/a/b/c", "onnx/" + "a" * 300]
"""Names that take long to look up, of which a manifest may list a hundred thousand."""


def test_a_linked_bundle_is_fine(bundle: Path, tmp_path: Path) -> None:
    """The bundle itself may be reached through a link; only what is inside may not lead out."""
    (tmp_path / "current").symlink_to(bundle)
    assert DashRuntime.load(tmp_path / "current", "cpu-fp32").generate([1, 2], 2).tokens.size == 2


@given(st.one_of(st.text(max_size=20), st.sampled_from([*PATHS, *SLOW])))
def test_safe_path_stays_inside(name: str) -> None:
    root = Path("/nowhere/bundle")
    try:
        path = safe_path(root, name)
    except BundleError:
        return
    assert name not in (*PATHS, *SLOW)
    assert path.resolve().is_relative_to(root)


@pytest.mark.parametrize("name", [MANIFEST, BUILD_JSON])
def test_one_digit_of_a_record(name: str, bundle: Path) -> None:
    """A cost, a norm's epsilon: whatever a run believes is hashed."""
    text = (bundle / name).read_text()
    digits = [place for place, letter in enumerate(text) if letter in "12345678"]
    for place in digits[:: max(1, len(digits) // 20)]:
        (bundle / name).write_text(f"{text[:place]}{int(text[place]) + 1}{text[place + 1 :]}")
        with pytest.raises(BundleError):
            Bundle.open(bundle).load_build("cpu-fp32")
    (bundle / name).write_text(text)
    Bundle.open(bundle).load_build("cpu-fp32")


@pytest.mark.parametrize("contents", [b"", b"[" * 100_000, b"\xff\0\xfe", b"[]", b"{}"])
def test_a_manifest_that_is_none(contents: bytes, bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(contents)
    with pytest.raises(BundleError, match=r"cannot be read \(.*The bundle is damaged|must be an object|missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", [MANIFEST, BUILD_JSON])
def test_a_record_that_is_no_small_file(name: str, bundle: Path) -> None:
    """A FIFO would hang its reader."""
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    with pytest.raises(BundleError, match=r"not a regular file|is unfinished"):
        Bundle.open(bundle).load_build("cpu-fp32")


def test_what_no_record_lists(bundle: Path) -> None:
    """It was put there afterwards."""
    edit(bundle / MANIFEST, lambda data: data.update(files=[r for r in data["files"] if "template" not in r["name"]]))
    with pytest.raises(BundleError, match=r"chat_template\.jinja was put there afterwards"):
        DashRuntime.load(bundle, "cpu-fp32")
    (bundle / "chat_template.jinja").unlink()
    assert DashRuntime.load(bundle, "cpu-fp32").text.template is None
    edit(bundle / BUILD_JSON, lambda data: data.update(files=[r for r in data["files"] if "_04.data" not in r["name"]]))
    with pytest.raises(BundleError, match=r"layer_04\.data was put there afterwards"):
        DashRuntime.load(bundle, "cpu-fp32")
    (bundle / "onnx" / "more.data").touch()
    with pytest.raises(BundleError, match=r"more\.data was put there afterwards"):
        DashRuntime.load(bundle, "portable")


@pytest.mark.parametrize(
    ("name", "how"), [("tokenizer.json", "replaced"), ("engines/cpu-fp32/layer_04.data", "written to")]
)
def test_a_file_that_changes_meanwhile(name: str, how: str, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = Bundle.verify

    def and_change(self: Bundle, records: Any, **options: Any) -> Any:
        seal = verify(self, records, **options)
        path = bundle / name
        if how == "replaced":
            shutil.copy2(path, bundle.parent / "other")
            (bundle.parent / "other").replace(path)
        else:
            path.write_bytes(path.read_bytes())
        return seal

    monkeypatch.setattr(Bundle, "verify", and_change)
    with pytest.raises(BundleError, match=f"{name} was replaced while it was read"):
        DashRuntime.load(bundle, "cpu-fp32")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ["mixed_02-03.onnx", "layers_02-03.data"])
def test_an_engine_that_is_loaded_late_is_of_the_same_build(name: str, verify: bool, bundle: Path) -> None:
    """Of another it would make a mixture: no error, and wrong answers."""
    runtime = DashRuntime.load(bundle, "cpu-fp32", verify=verify)
    path = bundle / "engines/cpu-fp32" / name
    shutil.copy2(path, bundle.parent / "other")
    (bundle.parent / "other").replace(path)
    with pytest.raises(BundleError, match=rf"{name} was replaced while it was read.* load it again"):
        runtime.session(trade_off=1.0).score([1, 2, 3, 4])
    path.unlink()
    with pytest.raises(BundleError, match=f"{name} was replaced"):
        runtime.generate_batch([[1, 2, 3], [4, 5]], 3)


def units(*listed: tuple[int, int]) -> Callable[[Any], object]:
    new = [{"first": first, "last": last} for first, last in listed]
    return lambda data: data["policy"].update(units=new, static_order=[])


def without(name: str) -> Callable[[Any], object]:
    return lambda data: data.update(files=[record for record in data["files"] if record["name"] != name])


def listed(path: str) -> Callable[[Any], object]:
    return lambda data: data["files"].append(data["files"][0] | {"name": path})


def emptied(data: Any) -> None:
    for record in data["files"]:
        record["bytes"] = 0


LATE, ORDER = "The decision reads the input of layer", "in rising order"
FORGED_MANIFESTS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a newer schema": (lambda data: data.update(schema=99, more={"new": 1}), r"newer .*\(schema 99.*pip install -U"),
    "an earlier schema": (lambda data: data.update(schema=1), r"earlier .*\(schema 1.*dash-export build MODEL -o"),
    **{f"a file at {path!r}": (listed(path), "leaves the bundle") for path in ("../secret", "/etc/passwd")},
    "a table that is not listed": (without("onnx/embed.data"), "onnx/embed.data is not among the files"),
    "targets of nothing": (lambda data: data["builds"].update({f"t{i}": [] for i in range(3000)}), "files and tools"),
    "a long list": (lambda data: data["model"]["traits"].update(unrotated=[7] * 70_000), "70000 items; at most"),
    "a graph that is not listed": (without("onnx/layer_03.onnx"), "is not among the files"),
    "empty files": (emptied, "is not among the files"),
    "a number too large": (lambda data: data["model"].update(rms_norm_eps=10**400), "too large a number"),
    "a size too large": (lambda data: data["files"][0].update(bytes=1 << 60), "bytes = 1152.* is outside 0 to"),
    "a name for the terminal": (lambda data: data["model"].update(name="\x1b]0;x\x07"), "model.name is not printable"),
    "a key for the terminal": (lambda data: data.update({"\x1b[2J": 1}), r"unknown '\\x1b"),
    "a graph for the terminal": (lambda data: data["graphs"].update({"\x1b[2J": 1}), "a key of .*graphs is not"),
    **{f"read {read}": (lambda data, read=read: data["policy"].update(read=read), LATE) for read in (2, 5, -1, 99)},
    "a layer in two units": (units((2, 3), (3, 4)), ORDER),
    "a unit backwards": (units((3, 2)), ORDER),
    "a unit beyond the model": (units((4, 9)), ORDER),
    "the first layer in a unit": (units((0, 1)), LATE),
    "a graph too many": (lambda data: data["graphs"].update(more="onnx/embed.onnx"), "'more', which nobody needs"),
    "a unit without a bypass": (units((5, 5)), "there is no graph bypass_05-05"),
    **{
        f"static order {order}": (lambda data, order=order: data["policy"].update(static_order=order), "static order")
        for order in ([1, 1], [2], [-1])
    },
}


POINT = {"trade_off": 0.0, "layers": 6.0, "time": 1.0, "kl": 0.0}
DEEP: dict[str, Any] = {}
for _ in range(60):
    DEEP = {"more": DEEP}
DIALS: list[Any] = [{"token": [POINT]}, [POINT | {"kl": float("nan")}], [POINT, POINT | {"time": -1}], [[]], [{"a": 1}]]
FORGED_BUILDS: dict[str, tuple[Callable[[Any], object], str]] = {
    "a newer schema": (lambda data: data.update(schema=99), "newer"),
    "a file outside": (listed("../secret"), "leaves the bundle"),
    "another recipe": (lambda data: data["recipe"]["runtime"].update(dispatch="device"), "needs a GPU backend"),
    "a strange recipe": (lambda data: data["recipe"].update(speed=1), r"recipe: unknown 'speed'"),
    **{f"dial {dial}": (lambda data, dial=dial: data.update(dial=dial), "dial") for dial in DIALS},
    "a pass too few": (
        lambda data: data["cost"].update(passes={"rows": [1, 2], "contexts": [256], "times": [[1.0]]}),
        "not one for each number of rows",
    ),
    "a pass in no time": (
        lambda data: data["cost"].update(passes={"rows": [1], "contexts": [256], "times": [[0.0]]}),
        "not one for each number of rows",
    ),
    "a drafter that nobody asks": (
        lambda data: data["engines"].update(drafter=data["engines"]["embed"]),
        "nobody asks the engine drafter",
    ),
    "a cost too few": (lambda data: data["cost"]["cost"].pop(), "does not list the units"),
    "an exit too few": (lambda data: data["cost"].update(exits=[0.01]), "does not list the exits"),
    "a cost that is no number": (lambda data: data["cost"].update(cost=[0.1, float("nan")]), "cost"),
    "a cost beyond all": (lambda data: data["cost"].update(cost=[0.1, 1e308]), "is outside 0 to 1"),
    "no time": (lambda data: data["cost"].update(dense_us=0.0), "a dense token takes no time"),
    "details in details": (lambda data: data.update(details=DEEP), "details.* is nested too deep"),
    "a load below 0": (lambda data: data["cost"].update(others=-1.0), "others = -1.0 is outside"),
    "no bypass": (lambda data: data["engines"].pop("bypass_04-04"), "no engine bypass_04-04"),
    "costs above 1": (lambda data: data["cost"].update(cost=[0.6, 0.6]), "more than a whole token"),
    "an engine too many": (lambda data: data["engines"].update(more=data["engines"]["layer_05"]), "'more', which"),
    "a verification": (lambda data: data.update(verification="x"), "verification"),
    "a long dial": (lambda data: data.update(dial=[POINT] * 2000), "2000 points of the dial"),
    "no segment": (lambda data: data["engines"].pop("layers_02-03"), "no engine layers_02-03"),
    "one mixed engine": (lambda data: data["engines"].pop("mixed_04-04"), "of some units only"),
    "a layer that always runs": (lambda data: data["segments"][2].update(gated=False), "are not the model's layers"),
    "a layer twice": (lambda data: data["segments"][3].update(first=3), "are not the model's layers"),
    "far away": (lambda data: data["segments"][4].update(last=1 << 40), "are not the model's layers"),
    "no head": (lambda data: data["segments"][4].update(head=False), "are not the model's layers"),
    "another target": (lambda data: data.update(target="portable"), "of the target 'portable'"),
}


@pytest.mark.parametrize(
    ("record", "name"),
    [*((MANIFEST, name) for name in FORGED_MANIFESTS), *((BUILD_JSON, name) for name in FORGED_BUILDS)],
)
def test_a_forged_record(record: str, name: str, bundle: Path) -> None:
    change, said = (FORGED_MANIFESTS if record == MANIFEST else FORGED_BUILDS)[name]
    edit(bundle / record, change)
    with pytest.raises(BundleError, match=said) as caught:
        Bundle.open(bundle).load_build("cpu-fp32")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("path", [".", "..", "../engines/.."])
def test_a_bundle_has_a_name(path: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made beside it takes it: a model for Triton, a server's."""
    monkeypatch.chdir(tiny_root if path == "." else tiny_root / "onnx")
    assert Bundle.open(path).root.resolve() == tiny_root.resolve()
    assert Bundle.open(path).root.name == tiny_root.name
