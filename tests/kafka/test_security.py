"""SASL and TLS against a real broker: every client gets in with the right proof, nobody else does, and no secret is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from patience import PATIENCE

from onerec.config import load_config
from onerec.errors import OneRecError, UserError
from streaming.kafka import settings, topics
from streaming.kafka.broker import Broker
from streaming.kafka.settings import KafkaConfig

PASSWORD = "correct horse, battery; staple"
KEY_PASSWORD = "key to the key 4711"
SECRETS = (PASSWORD, KEY_PASSWORD)


class Secure(NamedTuple):
    """A broker with SASL over TLS, and one listener that asks for a client's certificate."""

    broker: Broker
    folder: Path

    @property
    def sasl(self) -> dict[str, Any]:
        """Settings with which alice gets in."""
        return {
            "bootstrap": self.broker.addresses["SECURE"], "partitions": 2, "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512", "sasl_username": "alice", "sasl_password": PASSWORD,
            "ssl_ca": f"{self.folder}/ca.pem",
        }

    @property
    def mutual(self) -> dict[str, Any]:
        """Settings with which the holder of the certificate gets in; its key is encrypted."""
        return {
            "bootstrap": self.broker.addresses["MUTUAL"], "partitions": 2, "security_protocol": "SSL",
            "ssl_ca": f"{self.folder}/ca.pem", "ssl_certificate": f"{self.folder}/worker.pem",
            "ssl_key": f"{self.folder}/worker.key", "ssl_key_password": KEY_PASSWORD,
        }


def openssl(folder: Path, *arguments: str) -> None:
    try:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl on the PATH, which makes the certificates; install it")


def authority(folder: Path, name: str) -> None:
    openssl(
        folder, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem",
    )


def certificate(folder: Path, name: str, *, password: str = "", issuer: str = "ca") -> None:
    """name.key and name.pem for 127.0.0.1."""
    sealed = ["-passout", f"pass:{password}"] if password else ["-nodes"]
    openssl(
        folder, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *sealed, "-subj", f"/CN={name}",
        "-keyout", f"{name}.key", "-out", f"{name}.csr",
    )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    openssl(
        folder, "x509", "-req", "-in", f"{name}.csr", "-CA", f"{issuer}.pem", "-CAkey", f"{issuer}.key", "-CAcreateserial",
        "-days", "2", "-extfile", "names", "-out", f"{name}.pem",
    )


@pytest.fixture(scope="module")
def secure(kafka_tools: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secure]:
    folder = tmp_path_factory.mktemp("secure")
    for name in ("ca", "stranger"):
        authority(folder, name)
    certificate(folder, "broker")
    certificate(folder, "worker", password=KEY_PASSWORD)
    certificate(folder, "intruder", issuer="stranger")
    (folder / "keystore.pem").write_text((folder / "broker.key").read_text() + (folder / "broker.pem").read_text())
    properties = {
        "ssl.keystore.type": "PEM", "ssl.keystore.location": f"{folder}/keystore.pem",
        "ssl.truststore.type": "PEM", "ssl.truststore.location": f"{folder}/ca.pem",
        "listener.name.mutual.ssl.client.auth": "required",
        "listener.name.secure.sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
        "listener.name.secure.scram-sha-512.sasl.jaas.config":
            "org.apache.kafka.common.security.scram.ScramLoginModule required;",
        "listener.name.secure.plain.sasl.jaas.config":
            f'org.apache.kafka.common.security.plain.PlainLoginModule required user_alice="{PASSWORD}";',
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS;User:alice;User:CN=worker",
    }
    with Broker(folder / "kafka", listeners={"SECURE": "SASL_SSL", "MUTUAL": "SSL"}, properties=properties) as broker:
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        found = admin.alter_user_scram_credentials([
            UserScramCredentialUpsertion(user, ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), PASSWORD.encode())
            for user in ("alice", "bob")
        ])
        for future in found.values():
            future.result(90)
        yield Secure(broker, folder)


def await_access(config: KafkaConfig) -> None:
    """The broker takes a moment to learn of a new user."""
    deadline = time.monotonic() + PATIENCE * 30
    while True:
        try:
            topics.admin(config)
            return
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def round_trip(config: KafkaConfig) -> bytes:
    """A committed transaction, read back through a group's consumer whose offset is committed."""
    await_access(config)
    assert not [state for state in topics.create(config) if state.faults]
    topics.require(config, ["watch"])
    assert set(topics.topic_ids(config, ["watch"])) == {"watch"}
    producer = Producer(settings.producer(config, transactional_id=config.named("t")))
    producer.init_transactions(90)
    producer.begin_transaction()
    producer.produce(config.named("watch"), b"value", partition=0)
    producer.commit_transaction(90)
    consumer = Consumer(settings.consumer(config, group_id=config.named("g")))
    consumer.assign([TopicPartition(config.named("watch"), 0, 0)])
    (message,) = consumer.consume(1, 30)
    assert message.error() is None
    consumer.commit(message, asynchronous=False)
    consumer.close()
    return message.value()


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["SCRAM-SHA-512", "PLAIN"])
def test_the_right_password_opens_every_client(secure: Secure, mechanism: str) -> None:
    config = KafkaConfig(**{**secure.sasl, "sasl_mechanism": mechanism, "prefix": f"{mechanism}-"})
    assert round_trip(config) == b"value"


@pytest.mark.slow
def test_a_certificate_opens_every_client(secure: Secure) -> None:
    assert round_trip(KafkaConfig(**secure.mutual, prefix="mutual-")) == b"value"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["environment", "files"])
def test_settings_come_from_the_environment_and_from_files(
    secure: Secure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    (tmp_path / "password").write_text(PASSWORD + "\n")
    table = secure.sasl
    if where == "environment":
        for name in ("security_protocol", "sasl_mechanism", "sasl_username", "sasl_password", "ssl_ca"):
            monkeypatch.setenv(f"ONEREC_KAFKA_{name.upper()}", table[name])
        config = load_config(None, ["kafka.partitions=2"], table["bootstrap"])
    else:
        lines = [f'{name} = "{table[name]}"' for name in ("security_protocol", "sasl_mechanism", "sasl_username", "ssl_ca")]
        lines += ["[kafka]", f'sasl_password_file = "{tmp_path}/password"', "partitions = 2"][1:]
        (tmp_path / "onerec.toml").write_text("\n".join(["[kafka]", *lines]))
        config = load_config(tmp_path / "onerec.toml", None, table["bootstrap"])
    await_access(config.kafka)
    assert PASSWORD not in repr(config) + str(config) + f"{config.kafka!r}"


def refused(config: KafkaConfig, seconds: float = 3.0) -> str:
    """How `require` refuses."""
    with pytest.raises(UserError) as caught:
        topics.require(config, ["watch"], seconds)
    text = str(caught.value)
    assert not any(secret in text for secret in SECRETS)
    return text


FAULTS: list[tuple[str, Callable[[Secure], dict[str, Any]], str]] = [
    ("wrong password", lambda s: {**s.sasl, "sasl_password": "wrong-one"}, "refuses the credentials"),
    ("unknown user", lambda s: {**s.sasl, "sasl_username": "nobody"}, "refuses the credentials"),
    ("other mechanism", lambda s: {**s.sasl, "sasl_mechanism": "SCRAM-SHA-256"}, "refuses the credentials"),
    ("foreign authority", lambda s: {**s.sasl, "ssl_ca": f"{s.folder}/stranger.pem"}, "TLS failed.*kafka.ssl_ca"),
    ("other host name", lambda s: {**s.sasl, "bootstrap": s.broker.addresses["SECURE"].replace("127.0.0.1", "localhost")},
     "TLS failed.*whose names hold the host"),
    ("no certificate", lambda s: {**s.mutual, "ssl_certificate": "", "ssl_key": ""}, "TLS failed.*kafka.ssl_certificate"),
    ("foreign certificate",
     lambda s: {**s.mutual, "ssl_certificate": f"{s.folder}/intruder.pem", "ssl_key": f"{s.folder}/intruder.key"},
     "TLS failed.*kafka.ssl_certificate"),
    ("wrong key password", lambda s: {**s.mutual, "ssl_key_password": "wrong-one"},
     "correct kafka.ssl_key with kafka.ssl_key_password_file"),
    ("TLS to a plain listener", lambda s: {**s.sasl, "bootstrap": s.broker.bootstrap}, "kafka.security_protocol"),
    ("plain to a TLS listener", lambda s: {"bootstrap": s.broker.addresses["SECURE"]}, "kafka.security_protocol"),
    ("TLS without a password", lambda s: {**s.sasl, "security_protocol": "SSL"}, "kafka.security_protocol"),
    ("unknown mechanism", lambda s: {**s.sasl, "sasl_mechanism": "MAGIC"}, "correct kafka.sasl_mechanism"),
    ("no such authority", lambda s: {**s.sasl, "ssl_ca": f"{s.folder}/none.pem"}, "kafka.ssl_ca .* cannot be read"),
    ("nothing set", lambda s: {**s.sasl, "sasl_username": "", "sasl_password": ""}, "ONEREC_KAFKA_SASL_PASSWORD"),
    ("no such password file", lambda s: {**s.sasl, "sasl_password_file": f"{s.folder}/none"}, "kafka.sasl_password_file"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "said"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_wrong_proof_is_refused_with_the_remedy(
    secure: Secure, settings: Callable[[Secure], dict[str, Any]], said: str
) -> None:
    text = refused(KafkaConfig(**settings(secure)))
    assert re.search(said, text), text


@pytest.mark.slow
def test_a_user_without_rights_is_told_so(secure: Secure) -> None:
    bob = KafkaConfig(**{**secure.sasl, "sasl_username": "bob", "prefix": "bob-"})
    await_access(bob)
    assert "watch: this user may not see it; grant it" in refused(bob)
    with pytest.raises(OneRecError, match="the cluster refuses it.*grant"):
        topics.create(bob)


def environment(table: dict[str, Any]) -> dict[str, str]:
    """The settings of a cluster as a deployment gives them."""
    secure = {name: value for name, value in table.items() if name not in ("bootstrap", "partitions")}
    return {**os.environ, **{f"ONEREC_KAFKA_{name.upper()}": value for name, value in secure.items()}}


def commands(table: dict[str, Any], prefix: str, folder: Path, engine: str) -> dict[str, list[str]]:
    """Everything that talks to Kafka, in the order of the data."""
    log = folder / "log.jsonl"
    log.write_bytes(b"\n".join(
        orjson.dumps({
            "type": "watch", "user_id": f"u{user}", "item_id": f"i{number}", "ts": 1_700_000_000_000 + number * 60_000,
            "watch_ms": 30_000, "duration_ms": 30_000,
        })
        for number in range(10) for user in range(8)
    ))
    where = ["--bootstrap", table["bootstrap"], "--set", f"kafka.prefix={prefix}", "--set", "kafka.partitions=2", "--json"]
    named = {
        "topics": ["topics", "--create"],
        "produce": ["produce", str(log), "--end"],
        "ingest": ["ingest", "--until-end"],
        "stream": ["stream", "--until-end", "--engine", engine, "--state", f"{folder}/worker"],
        "feed": ["feed", "--until-end", "--state", f"{folder}/feed"],
        "histories-replica": ["histories-replica", "--until-end", "--state", f"{folder}/replica"],
        "dead-letters": ["dead-letters"],
    }
    return {name: [sys.executable, "-m", "onerec.cli", *words, *where] for name, words in named.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("proof", "engine"), [("sasl", "faust"), ("mutual", "faust")])
def test_every_command_works_on_a_secure_cluster_and_shows_no_secret(
    secure: Secure, tmp_path: Path, proof: str, engine: str
) -> None:
    table = getattr(secure, proof)
    for name, command in commands(table, f"{proof}-{engine}-", tmp_path, engine).items():
        done = subprocess.run(command, env=environment(table), capture_output=True, text=True, timeout=720)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert not any(secret in done.stdout + done.stderr for secret in SECRETS), name
        if name == "feed":
            assert orjson.loads(done.stdout)["run"]["sessions"] == 8
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or not any(secret.encode() in path.read_bytes() for secret in SECRETS), path


@pytest.mark.slow
def test_every_command_leaves_at_once_when_the_password_is_wrong(secure: Secure, tmp_path: Path) -> None:
    table = {**secure.sasl, "sasl_password": "wrong-one-4711"}
    started = {
        name: subprocess.Popen(command, env=environment(table), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, command in commands(table, "wrong-", tmp_path, "faust").items()
    }
    for name, process in started.items():
        text, said = process.communicate(timeout=360)
        assert (process.returncode, text) == (2, ""), f"{name}: {said}"
        assert "refuses the credentials" in said and "kafka.sasl_password_file" in said, f"{name}: {said}"
        assert "wrong-one-4711" not in said, name
        assert len(said.splitlines()) == 1, f"{name}: {said}"


def set_password(secure: Secure, password: str) -> None:
    change = UserScramCredentialUpsertion("alice", ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096), password.encode())
    admin = AdminClient({"bootstrap.servers": secure.broker.bootstrap})
    for future in admin.alter_user_scram_credentials([change]).values():
        future.result(90)


@pytest.mark.slow
def test_workers_leave_when_their_password_is_changed_under_them(secure: Secure, tmp_path: Path) -> None:
    workers = []
    try:
        for engine in ("group", "faust"):
            (folder := tmp_path / engine).mkdir()
            prepared = commands(secure.sasl, f"changed-{engine}-", folder, engine)
            subprocess.run(prepared["topics"], env=environment(secure.sasl), check=True, capture_output=True)
            words = [word for word in prepared["stream"] if word not in ("--until-end", "--json")]
            workers.append(subprocess.Popen(words, env=environment(secure.sasl), stderr=(folder / "said").open("wb")))
        for engine in ("group", "faust"):
            deadline = time.monotonic() + PATIENCE * 60
            while b"partitions 0-1" not in (tmp_path / engine / "said").read_bytes():
                assert time.monotonic() < deadline, (tmp_path / engine / "said").read_text()
                time.sleep(0.2)
        set_password(secure, "another one")
        secure.broker.stop()
        secure.broker.start()
        for engine, worker in zip(("group", "faust"), workers, strict=True):
            assert worker.wait(450) == 2, engine
            assert "refuses the credentials" in (tmp_path / engine / "said").read_text()
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
        set_password(secure, PASSWORD)
