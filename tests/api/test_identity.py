"""API keys, the open mode, trusted gateways; and that no key ever shows."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.datastructures import Headers

from fairserve.api.identity import Client, Identities
from fairserve.config import ApiConfig, ApiKey, FairServeArgs
from fairserve.errors import ConfigError, InvalidRequest, Unauthenticated
from tests.api.conftest import MODEL, ServiceMaker, app_of, http_of
from tests.api.scripted import ScriptedBackend

ALICE = {"client": "alice", "key": "sk-alice-secret", "weight": 3.0, "max_waiting": 9}
GATEWAY = {"client": "gateway", "key": "sk-gateway-secret"}
GOOD: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


def headers(token: str | None = None, *more: tuple[str, str]) -> Headers:
    raw = [] if token is None else [(b"authorization", f"Bearer {token}".encode())]
    return Headers(raw=raw + [(name.encode(), value.encode()) for name, value in more])


def identities(*keys: dict[str, Any], environ: dict[str, str] | None = None, **config: Any) -> Identities:
    return Identities.from_config(ApiConfig(keys=keys, **config), environ or {})


def sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- keyed


def test_a_key_names_a_client_with_its_weight_and_limit() -> None:
    assert identities(ALICE).identify(headers("sk-alice-secret")) == Client("alice", 3.0, 9)


def test_several_keys_may_name_one_client_and_a_hash_is_as_good_as_a_key() -> None:
    known = identities(
        {"client": "alice", "key": "sk-alice-first"}, {"client": "alice", "key_sha256": sha256("sk-alice-second")}
    )
    assert known.identify(headers("sk-alice-first")) == known.identify(headers("sk-alice-second")) == Client("alice")


@pytest.mark.parametrize(
    "sent",
    [
        headers(),
        headers("wrong-key"),
        headers("sk-alice-secre"),
        headers("sk-alice-secret2"),
        headers("alice"),
        headers("schlüssel"),
        headers(sha256("sk-alice-secret")),
        Headers({"authorization": "sk-alice-secret"}),
        Headers({"authorization": "Basic sk-alice-secret"}),
        Headers({"authorization": "Bearer "}),
        Headers({"authorization": ""}),
        headers("wrong-key", ("authorization", "Bearer sk-alice-secret")),
        headers("sk-alice-secret", ("authorization", "Bearer wrong-key")),
    ],
    ids=str,
)
def test_no_key_or_a_wrong_key_is_refused(sent: Headers) -> None:
    with pytest.raises(Unauthenticated):
        identities(ALICE).identify(sent)


def test_a_key_with_letters_beyond_ascii_works() -> None:
    assert identities({"client": "alice", "key": "schlüssel"}).identify(headers("schlüssel")) == Client("alice")


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}"])
async def test_a_missing_and_a_wrong_key_are_401_everywhere(
    make_service: ServiceMaker, backend: ScriptedBackend, path: str
) -> None:
    app = app_of(make_service(keys=[ALICE]))
    for token in ({}, {"authorization": "Bearer wrong-key"}):
        async with http_of(app, **token) as http:
            broken_json = await http.post(CHAT, content=b"{", headers={"content-type": "application/json"})
            for answer in (await http.get(path), await http.post(CHAT, json=GOOD), broken_json):
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.json()["error"]["code"] == "invalid_api_key"
    assert backend.requests == []


async def test_the_engine_is_told_client_weight_and_limit(make_service: ServiceMaker, backend: ScriptedBackend) -> None:
    async with http_of(app_of(make_service(keys=[ALICE])), authorization="Bearer sk-alice-secret") as http:
        assert (await http.post(CHAT, json=GOOD)).status_code == 200
    (request,) = backend.requests
    assert (request.client, request.weight, request.max_waiting) == ("alice", 3.0, 9)


# --------------------------------------------------------------------------------------------- where keys come from


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("keys.json", json.dumps([ALICE])),
        ("keys.yaml", "- client: alice\n  key: sk-alice-secret\n  weight: 3\n  max_waiting: 9\n"),
    ],
)
def test_keys_are_read_from_json_and_yaml_files(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert identities(keys_file=str(path)).identify(headers("sk-alice-secret")) == Client("alice", 3.0, 9)


def test_keys_are_read_from_the_environment_and_add_to_the_others() -> None:
    known = identities(ALICE, environ={"FAIRSERVE_API_KEYS": json.dumps([{"client": "bob", "key": "sk-bob-secret"}])})
    assert known.identify(headers("sk-bob-secret")).name == "bob"
    assert known.identify(headers("sk-alice-secret")).name == "alice"


SECRET = "sk-very-secret"


@pytest.mark.parametrize(
    "text",
    [
        f'[{{"client": "alice", "key": "{SECRET}"',
        f"- client: alice\n  key: [{SECRET}",
        f'{{"{SECRET}": "alice"}}',
        f'[{{"{SECRET}": "alice"}}]',
        f'["{SECRET}"]',
        f'[{{"client": "alice", "key": "{SECRET}", "weight": -1}}]',
        f'[{{"client": "alice", "key": ["{SECRET}"]}}]',
        f'[{{"client": "not a name", "key": "{SECRET}"}}]',
        f'[{{"client": "alice", "key_sha256": "{SECRET}"}}]',
        f'[{{"client": "alice", "key": "{SECRET}", "key_sha256": "{sha256(SECRET)}"}}]',
        f'[{{"client": "alice", "key": "{SECRET}"}}, {{"client": "bob", "key": "{SECRET}"}}]',
        f'"{SECRET}"',
    ],
)
@pytest.mark.parametrize("source", ["file", "environment"])
def test_a_wrong_key_list_is_a_config_error_that_names_its_source_and_no_secret(
    tmp_path: Path, text: str, source: str
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    environ = {"FAIRSERVE_API_KEYS": text} if source == "environment" else {}
    config = {"keys_file": str(path)} if source == "file" else {}
    with pytest.raises(ConfigError) as caught:
        identities(environ=environ, **config)
    shown = "".join(_chain(caught.value))
    assert SECRET not in shown
    assert "keys" in shown.lower() or "API key" in shown


def _chain(error: BaseException | None) -> list[str]:
    """What a traceback would show."""
    if error is None:
        return []
    return [repr(error), *_chain(error.__cause__), *([] if error.__suppress_context__ else _chain(error.__context__))]


def test_a_missing_keys_file_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"/no/such/file.*cannot be read"):
        identities(keys_file="/no/such/file")


@pytest.mark.parametrize("disagreement", [{"weight": 2.0}, {"max_waiting": 5}, {"budgets": {"day": {"hard": 5}}}])
def test_keys_of_one_client_must_agree(disagreement: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"'alice'.*disagree"):
        identities({"client": "alice", "key": "sk-first"}, {"client": "alice", "key": "sk-second"} | disagreement)


def test_the_same_key_twice_is_refused_even_as_a_hash() -> None:
    with pytest.raises(ConfigError, match=r"given twice, for clients 'alice' and 'bob'"):
        identities(ALICE, {"client": "bob", "key_sha256": sha256("sk-alice-secret")})


# --------------------------------------------------------------------------------------------------------- paths

ANN = {"client": "acme/research/ann", "key": "sk-ann-secret"}


@pytest.mark.parametrize("name", ["ann", "acme/ann", "acme/research/ann", "/".join(["x" * 64] * 3), "a.b:c@d/e_f-g/1"])
def test_a_client_may_be_a_path_of_up_to_three_segments(name: str) -> None:
    assert identities({"client": name, "key": "sk-a-secret"}).identify(headers("sk-a-secret")).name == name


@pytest.mark.parametrize(
    "name", ["", "/", "/ann", "ann/", "acme//ann", "a/b/c/d", "a/" + "x" * 65, "a/b c", "a\\b", "ann\n"]
)
def test_what_is_no_path_is_no_client(name: str) -> None:
    with pytest.raises(ValidationError, match="client"):
        ApiKey(client=name, key="sk-a-secret")


@pytest.mark.parametrize("above", ["acme", "acme/research"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_client_above_another_one_is_a_config_error_that_names_both(above: str, order: int) -> None:
    keys = [ANN, {"client": above, "key": "sk-above-secret"}][::order]
    with pytest.raises(ConfigError, match=rf"'{above}' stands above client 'acme/research/ann'"):
        identities(*keys)


def test_siblings_and_names_that_only_begin_alike_live_side_by_side() -> None:
    names = ["acme/research/ann", "acme/research/bob", "acme/ops", "acm", "acme2", "acme/research2", "research/ann"]
    known = identities(*({"client": name, "key": f"sk-{name}-secret"} for name in names))
    assert [known.identify(headers(f"sk-{name}-secret")).name for name in names] == names


def test_a_gateway_names_clients_by_path() -> None:
    known = gatewayed(ANN, GATEWAY)
    for name in ("acme/research/ann", "acme/research/bob", "other/zoe"):
        assert known.identify(headers("sk-gateway-secret", ("x-client-id", name))).name == name


@pytest.mark.parametrize(
    ("name", "above", "below"),
    [
        ("acme", "acme", "acme/research/ann"),
        ("acme/research", "acme/research", "acme/research/ann"),
        ("gateway/ann", "gateway", "gateway/ann"),
        ("gateway/team/ann", "gateway", "gateway/team/ann"),
    ],
)
def test_a_gateway_may_not_name_a_client_above_or_below_one_with_a_key(name: str, above: str, below: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"X-Client-Id: client '{above}' stands above client '{below}'"):
        gatewayed(ANN, GATEWAY).identify(headers("sk-gateway-secret", ("x-client-id", name)))


# ---------------------------------------------------------------------------------------------------------- open


def test_without_keys_the_bearer_token_names_the_client_unchecked() -> None:
    known = identities()
    assert known.is_open
    assert known.identify(headers("alice")) == Client("alice")
    assert known.identify(headers()) == Client("anonymous")
    assert known.identify(Headers({"authorization": "Basic x"})) == Client("anonymous")


@pytest.mark.parametrize("token", ["two words", "x" * 65, "a/b", "schlüssel", '"\x7f', "a\tb"])
def test_a_token_that_is_no_name_becomes_a_short_hash(token: str) -> None:
    assert identities().identify(headers(token)) == Client(f"key-{sha256(token)[:8]}")


def test_running_open_is_said_loudly_and_running_keyed_is_not(caplog: pytest.LogCaptureFixture) -> None:
    identities(ALICE)
    assert not caplog.records
    identities(environ={"FAIRSERVE_API_KEYS": " "})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "OPEN" in record.getMessage()


# ------------------------------------------------------------------------------------------------------ gateways


def gatewayed(*keys: dict[str, Any]) -> Identities:
    return identities(*(keys or (ALICE, GATEWAY)), trusted_client_header="X-Client-Id", trusted_gateways=("gateway",))


def test_a_trusted_gateway_names_a_known_client_or_a_new_one_or_none() -> None:
    known = gatewayed()
    alice = Client("alice", 3.0, 9, is_gateway=True)
    assert known.identify(headers("sk-gateway-secret", ("x-client-id", "alice"))) == alice
    assert known.identify(headers("sk-gateway-secret", ("x-client-id", "carol"))) == Client("carol", is_gateway=True)
    assert known.identify(headers("sk-gateway-secret")) == Client("gateway", is_gateway=True)


def test_the_header_of_anybody_else_is_ignored() -> None:
    assert gatewayed().identify(headers("sk-alice-secret", ("x-client-id", "bob"))).name == "alice"
    no_gateway = identities(ALICE, GATEWAY)
    assert no_gateway.identify(headers("sk-gateway-secret", ("x-client-id", "bob"))).name == "gateway"


@pytest.mark.parametrize("half", [{"trusted_gateways": ("gateway",)}, {"trusted_client_header": "X-Client-Id"}])
def test_a_header_without_gateways_or_the_reverse_is_refused_because_it_would_do_nothing(half: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="only together"):
        identities(ALICE, GATEWAY, **half)


@pytest.mark.parametrize("token", ["sk-proj-0123456789", "fs-0123456789", "x" * 40])
def test_in_open_mode_what_looks_like_a_secret_is_no_name(token: str) -> None:
    name = identities().identify(headers(token)).name
    assert name.startswith("key-")
    assert token not in name


def test_in_open_mode_the_header_is_ignored_even_from_a_caller_with_the_gateways_name() -> None:
    known = identities(trusted_client_header="X-Client-Id", trusted_gateways=("gateway",))
    assert known.identify(headers("gateway", ("x-client-id", "bob"))).name == "gateway"
    assert known.identify(headers(None, ("x-client-id", "bob"))).name == "anonymous"


def test_the_header_alone_is_no_key() -> None:
    with pytest.raises(Unauthenticated):
        gatewayed().identify(headers(None, ("x-client-id", "alice")))
    with pytest.raises(Unauthenticated):
        gatewayed().identify(headers("wrong-key", ("x-client-id", "alice")))


@pytest.mark.parametrize(
    "names",
    [
        [""],
        ["a b"],
        ["x" * 65],
        ["alice, bob"],
        ["alice", "bob"],
        ["alice", "alice"],
        ["/a"],
        ["a/"],
        ["a//b"],
        ["a/b/c/d"],
    ],
    ids=str,
)
def test_a_header_that_names_no_single_client_is_refused(names: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="X-Client-Id"):
        gatewayed().identify(headers("sk-gateway-secret", *[("x-client-id", name) for name in names]))


def test_a_gateway_without_a_key_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="gateway"):
        gatewayed(ALICE)


async def test_a_gateways_client_reaches_the_engine(make_service: ServiceMaker, backend: ScriptedBackend) -> None:
    service = make_service(keys=[ALICE, GATEWAY], trusted_client_header="X-Client-Id", trusted_gateways=["gateway"])
    async with http_of(app_of(service), authorization="Bearer sk-gateway-secret") as http:
        await http.post(CHAT, json=GOOD, headers={"x-client-id": "alice"})
    assert (backend.requests[0].client, backend.requests[0].weight) == ("alice", 3.0)


# ------------------------------------------------------------------------------------------------------- secrecy


async def test_keys_never_show_in_logs_answers_or_reprs(
    make_service: ServiceMaker, backend: ScriptedBackend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpcore").setLevel(logging.INFO)
    service = make_service(keys=[ALICE])
    seen = []
    for token in ("sk-alice-secret", "sk-wrong-secret"):
        async with http_of(app_of(service), authorization=f"Bearer {token}") as http:
            for script in (lambda _: [ZeroDivisionError()], lambda _: ["x"]):
                backend.script = script
                answer = await http.post(CHAT, json=GOOD)
                seen += [answer.text, str(answer.headers)]
    identity = service._identities
    seen += [caplog.text, repr(ApiConfig(keys=[ALICE])), repr(vars(service)), repr(vars(identity))]
    assert "ZeroDivisionError" in caplog.text
    assert not [one for one in seen if "secret" in one.replace("secrets", "")]


def test_a_configuration_error_shows_no_key() -> None:
    with pytest.raises(ValidationError) as caught:
        FairServeArgs.model_validate({"api": {"keys": [{"client": "alice", "key": "sk-1234", "weight": 0}]}})
    assert "sk-1234" not in str(caught.value)
    assert "sk-1234" not in repr(ApiKey.model_construct(client="alice", key="sk-1234"))
