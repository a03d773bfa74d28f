"""config.pbtxt is what Triton's own protobuf reads, and says what docs/serving.md promises an application."""

import socket
from pathlib import Path

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2 as pb

from exporter.server import Ports, choose_ports
from exporter.triton_config import SERVED_VERSIONS, RecommendConfig, config_text
from onerec.errors import UserError


def parse(config: RecommendConfig) -> pb.ModelConfig:
    return text_format.Parse(config_text(config), pb.ModelConfig())


def test_the_tensors_are_those_of_the_contract() -> None:
    model = parse(RecommendConfig())
    assert (model.name, model.backend) == ("recommend", "python")
    inputs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in model.input}
    assert inputs == {
        "user_id": (pb.TYPE_STRING, [1]),
        "history": (pb.TYPE_STRING, [-1]),
        "count": (pb.TYPE_INT32, [1]),
        "select": (pb.TYPE_STRING, [1]),
    }
    assert {tensor.name for tensor in model.input if tensor.optional} >= {"history", "count", "select"}
    outputs = {tensor.name: (tensor.data_type, list(tensor.dims)) for tensor in model.output}
    assert outputs == {
        "items": (pb.TYPE_STRING, [-1, -1]),
        "scores": (pb.TYPE_FP32, [-1]),
        "rewards": (pb.TYPE_FP32, [-1, 4]),
        "model_version": (pb.TYPE_INT64, [1]),
        "watermark": (pb.TYPE_INT64, [1]),
        "history_watermark": (pb.TYPE_INT64, [1]),
    }


def test_histories_of_different_lengths_share_a_batch() -> None:
    model = parse(RecommendConfig(max_batch=16, queue_delay_us=500, max_queue_size=7))
    assert [tensor.allow_ragged_batch for tensor in model.input if tensor.name == "history"] == [True]
    assert model.max_batch_size == 16
    assert model.dynamic_batching.max_queue_delay_microseconds == 500
    assert model.dynamic_batching.default_queue_policy.max_queue_size == 7


def test_the_version_before_stays_warm() -> None:
    assert parse(RecommendConfig()).version_policy.latest.num_versions == SERVED_VERSIONS == 2


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40), st.integers(1, 64))
def test_any_folder_name_and_number_come_back_as_they_were(folder: str, threads: int) -> None:
    found = parse(RecommendConfig(state=folder, site_packages=folder + "x", threads=threads)).parameters
    assert found["state"].string_value == folder
    assert found["site_packages"].string_value == folder + "x"
    assert found["threads"].string_value == str(threads)


def test_equal_configurations_give_equal_bytes() -> None:
    assert config_text(RecommendConfig(state=str(Path("/s")))) == config_text(RecommendConfig(state="/s"))


def test_one_port_for_two_purposes_is_refused_before_anything_starts() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(UserError, match="--http-port and --metrics-port are both"):
        choose_ports(Ports(http=port, grpc=0, metrics=port))
    chosen = choose_ports(Ports(http=0, grpc=0, metrics=0))
    assert len({chosen.http, chosen.grpc, chosen.metrics}) == 3
