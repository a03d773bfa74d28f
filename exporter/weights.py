"""Publishing weights, not graphs: a template graph an architecture, and one file of weights a version.

The template refers to `model.weights` by name and offset. So a publish writes that file in the template's layout and links
the graph beside it; nothing is traced. The file is memory-mapped by ONNX Runtime: never write to one that is being served.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from exporter.tracing import OPSET, WEIGHTS_FILE, GraphPlan, WeightPlace
from onerec.errors import Failure, UserError

GRAPH_FILE = "model.onnx"
TEMPLATE_GRAPH = "template.onnx"
TEMPLATE_FILE = "template.json"
FORMAT = 2


class Template(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `template.json` says of the graph beside it."""

    format: int = FORMAT
    key: str
    settings: dict[str, Any]
    opset: int = OPSET
    inputs: list[str]
    outputs: list[str]
    weights: list[WeightPlace]
    versions: dict[str, str]

    @property
    def weight_bytes(self) -> int:
        """Size of the weights file."""
        return self.weights[-1].offset + self.weights[-1].bytes


def template_key(plan: GraphPlan) -> str:
    """Name of a template: hash of all that decides the graph: its settings, the traced code, its makers' versions."""
    code = [hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in plan.code]
    made_of = [FORMAT, plan.settings, code, _versions()]
    return hashlib.sha256(msgspec.json.encode(made_of, order="sorted")).hexdigest()[:16]


def ensure_template(plan: GraphPlan, folder: Path) -> Path:
    """The template of a plan in the cache `folder`, made if it is not there: `folder/<key>`."""
    place = folder / template_key(plan)
    if not (place / TEMPLATE_FILE).exists():
        export_template(plan, place)
    return place


def export_template(plan: GraphPlan, out_dir: Path) -> Template:
    """Trace the graph of a plan into `out_dir`; whole or not at all."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    graph = plan.build()
    template = Template(
        key=template_key(plan),
        settings=plan.settings,
        inputs=plan.inputs,
        outputs=plan.outputs,
        weights=plan.places(),
        versions=_versions(),
    )
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}-", dir=out_dir.parent))
    try:
        (staging / TEMPLATE_GRAPH).write_bytes(graph.SerializeToString())
        (staging / TEMPLATE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(template), indent=1))
        staging.chmod(0o755)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        staging.rename(out_dir)
    except OSError as error:
        raise Failure(f"cannot write the graph template to {out_dir}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return template


def load_template(template_dir: Path) -> Template:
    """Read `template.json`; raises Failure where it is missing, broken or of another format."""
    path = template_dir / TEMPLATE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Template)
    except (OSError, msgspec.MsgspecError) as error:
        raise Failure(f"no graph template can be read from {path}: {error}; delete the folder to have it made again") from error


def write_weights(state_dict: Mapping[str, Tensor], template_dir: Path, out_dir: Path) -> Template:
    """Write `out_dir/model.weights` from `state_dict` and link `out_dir/model.onnx` to the template's graph.

    Values are stored as fp32. Raises UserError, before anything is written, where a weight is missing, unknown or of
    another shape than the template's; Failure where the disk refuses.
    """
    template = load_template(template_dir)
    _check(state_dict, template)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        _write(state_dict, template, out_dir / WEIGHTS_FILE)
        _link(template_dir / TEMPLATE_GRAPH, out_dir / GRAPH_FILE)
    except OSError as error:
        raise Failure(f"cannot write the weights to {out_dir}: {error}; free some space or mend the permissions") from error
    return template


def _check(state_dict: Mapping[str, Tensor], template: Template) -> None:
    known = {place.name: tuple(place.shape) for place in template.weights}
    faults = [f"{name} is missing" for name in known.keys() - state_dict.keys()]
    faults += [f"{name} is unknown" for name in state_dict.keys() - known.keys()]
    faults += [
        f"{name} is {list(tensor.shape)}, not {list(known[name])}"
        for name, tensor in state_dict.items()
        if name in known and tuple(tensor.shape) != known[name]
    ]
    if faults:
        shown = "; ".join(sorted(faults)[:5]) + (f"; and {len(faults) - 5} more" if len(faults) > 5 else "")
        raise UserError(
            f"the weights do not fit the graph template {template.key}: {shown}. "
            "Make the template from the checkpoint's own configuration."
        )


def _write(state_dict: Mapping[str, Tensor], template: Template, path: Path) -> None:
    path.unlink(missing_ok=True)  # a new file: one that is mapped somewhere must keep its bytes
    with path.open("wb") as file:
        file.truncate(template.weight_bytes)
        for place in template.weights:
            file.seek(place.offset)
            file.write(state_dict[place.name].detach().to("cpu", torch.float32).contiguous().numpy().data)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "onnx", "onnxscript")}
