"""The one typed place that `config.pbtxt` of the model `recommend` is written from."""

from __future__ import annotations

import json
from typing import Literal

import msgspec

MODEL_NAME = "recommend"

SERVED_VERSIONS = 2
"""The newest versions are loaded; a request that names none goes to the newest, the one before is kept warm."""

STATE_PARAMETER = "state"
SITE_PACKAGES_PARAMETER = "site_packages"
THREADS_PARAMETER = "threads"


class Tensor(msgspec.Struct, frozen=True, kw_only=True):
    """One input or output; `dims` without the batch dimension, -1 = any size."""

    name: str
    data_type: Literal["TYPE_STRING", "TYPE_INT32", "TYPE_INT64", "TYPE_FP32"]
    dims: tuple[int, ...]
    optional: bool = False
    ragged: bool = False


INPUTS = (
    Tensor(name="user_id", data_type="TYPE_STRING", dims=(1,), optional=True),
    Tensor(name="history", data_type="TYPE_STRING", dims=(-1,), optional=True, ragged=True),
    Tensor(name="count", data_type="TYPE_INT32", dims=(1,), optional=True),
    Tensor(name="select", data_type="TYPE_STRING", dims=(1,), optional=True),
)
"""What a request may carry. `user_id` may be left out where `history` is given; one of them must be there."""

OUTPUTS = (
    Tensor(name="items", data_type="TYPE_STRING", dims=(-1, -1)),
    Tensor(name="scores", data_type="TYPE_FP32", dims=(-1,)),
    Tensor(name="rewards", data_type="TYPE_FP32", dims=(-1, 4)),
    Tensor(name="model_version", data_type="TYPE_INT64", dims=(1,)),
    Tensor(name="watermark", data_type="TYPE_INT64", dims=(1,)),
    Tensor(name="history_watermark", data_type="TYPE_INT64", dims=(1,)),
)
"""What an answer holds (docs/serving.md, "The model `recommend`")."""


class RecommendConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything of `config.pbtxt` that is not the contract itself.

    `state` and `site_packages` are folders on the serving host ("" = none); the environment variables `ONEREC_STATE`
    and `ONEREC_SITE_PACKAGES` of the server win over them, so that one repository serves on several hosts.
    """

    state: str = ""
    site_packages: str = ""
    threads: int = 2
    max_batch: int = 8
    queue_delay_us: int = 2_000
    max_queue_size: int = 1_024

    def parameters(self) -> dict[str, str]:
        """Model parameters, as the Python backend hands them to the model."""
        return {
            STATE_PARAMETER: self.state,
            SITE_PACKAGES_PARAMETER: self.site_packages,
            THREADS_PARAMETER: str(self.threads),
        }


def _text(value: str) -> str:
    """A quoted protobuf text string; JSON's escapes are a subset of protobuf's once the text is ASCII."""
    if value.isascii():
        return json.dumps(value)
    return '"' + "".join(f"\\{byte:03o}" for byte in value.encode()) + '"'


def _tensor(kind: str, tensor: Tensor) -> str:
    lines = [f"  name: {_text(tensor.name)}", f"  data_type: {tensor.data_type}", f"  dims: {list(tensor.dims)}"]
    if tensor.optional:
        lines.append("  optional: true")
    if tensor.ragged:
        lines.append("  allow_ragged_batch: true")
    return kind + " {\n" + "\n".join(lines) + "\n}"


def config_text(config: RecommendConfig) -> str:
    """`config.pbtxt` of the model `recommend`: Python backend, one instance, dynamic batches of ragged requests.

    Equal configurations give equal bytes, so that a publish rewrites the file only when something changed: Triton
    loads all versions anew when it did.
    """
    blocks = [
        f"name: {_text(MODEL_NAME)}",
        'backend: "python"',
        f"max_batch_size: {config.max_batch}",
        *(_tensor("input", tensor) for tensor in INPUTS),
        *(_tensor("output", tensor) for tensor in OUTPUTS),
        "instance_group { count: 1 kind: KIND_AUTO }",
        f"version_policy {{ latest {{ num_versions: {SERVED_VERSIONS} }} }}",
        "dynamic_batching {\n"
        f"  max_queue_delay_microseconds: {config.queue_delay_us}\n"
        f"  default_queue_policy {{ max_queue_size: {config.max_queue_size} }}\n"
        "}",
        *(
            f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}"
            for key, value in config.parameters().items()
        ),
    ]
    return "\n".join(blocks) + "\n"
