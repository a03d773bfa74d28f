"""Entry of Triton's Python backend: tensors in, `Service` asked, tensors out; the rules are in the modules beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# The version's own copy of the modules goes before any installed one: a version answers as it was published.
sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))
# Bytecode beside the modules would change time stamps, and Triton would load the version anew at the next publish.
sys.dont_write_bytecode = True

import triton_python_backend_utils as pb_utils  # noqa: E402

ABOUT = frozenset({"model_version", "watermark", "history_watermark"})
"""Outputs that tell of the version and its host; who names only such outputs gets them without a search."""


class TritonPythonModel:
    """One instance of one version."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle this file lies in; raises on a damaged one, so that Triton refuses the version."""
        parameters = {
            key: value["string_value"] for key, value in json.loads(args["model_config"]).get("parameters", {}).items()
        }
        packages = os.environ.get("ONEREC_SITE_PACKAGES") or parameters.get("site_packages", "")
        if os.path.isdir(packages) and packages not in sys.path:
            sys.path.append(packages)

        from serving_config.recommend.engine import Engine
        from serving_config.recommend.histories import Histories
        from serving_config.recommend.service import Service

        on_gpu = args["model_instance_kind"] == "GPU"
        engine = Engine(
            Path(__file__).resolve().parent,
            threads=int(parameters.get("threads") or 2),
            device=int(args["model_instance_device_id"]) if on_gpu else None,
        )
        state = os.environ.get("ONEREC_STATE") or parameters.get("state", "")
        self._service = Service(engine, Histories(Path(state) if state else None))
        # Two versions run side by side; the label tells their figures apart.
        version = {"version": args["model_version"]}
        families = {
            "unknown_items": ("onerec_unknown_history_items_total", "Item ids of histories that the version lacks"),
            "unknown_users": ("onerec_unknown_users_total", "Requests for users without a stored history"),
            "refused": ("onerec_refused_requests_total", "Requests that were answered with an error"),
        }
        self._families = {
            key: pb_utils.MetricFamily(name=name, description=text, kind=pb_utils.MetricFamily.COUNTER)
            for key, (name, text) in families.items()
        }
        self._counters = {key: family.Metric(labels=version) for key, family in self._families.items()}
        self._watermark_family = pb_utils.MetricFamily(
            name="onerec_bundle_watermark_ms",
            description="Event time that the version has learnt up to",
            kind=pb_utils.MetricFamily.GAUGE,
        )
        self._watermark = self._watermark_family.Metric(labels=version)
        if engine.manifest.watermark is not None:
            self._watermark.set(engine.manifest.watermark)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer all requests of a dynamic batch in one run of the graph; an error concerns its request alone."""
        from serving_config.recommend.service import Answer, Request

        named = [frozenset(request.requested_output_names()) for request in requests]
        asked = [
            Request(**{tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, sessions=not outputs <= ABOUT)
            for request, outputs in zip(requests, named, strict=True)
        ]
        answers, counts = self._service.answer(asked)
        for key, value in counts.items():
            if value:
                self._counters[key].increment(value)
        responses = []
        for answer, outputs in zip(answers, named, strict=True):
            if isinstance(answer, Answer):
                tensors = [pb_utils.Tensor(name, value) for name, value in vars(answer).items() if name in outputs]
                responses.append(pb_utils.InferenceResponse(tensors))
            else:
                code = pb_utils.TritonError.INVALID_ARG if answer.client_fault else pb_utils.TritonError.INTERNAL
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError(str(answer), code)))
        return responses

    def finalize(self) -> None:
        """Close the reader of the state."""
        self._service.close()
