"""A secret that goes through every door shows nowhere: not in answers, logs, metrics, files, reprs or tracebacks."""

from __future__ import annotations

import contextlib
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fairserve import cli
from fairserve.api.identity import Identities
from fairserve.app import with_hashed_keys
from fairserve.client_doors import HttpDoor
from fairserve.cluster.changes import KeyWanted
from fairserve.cluster.counter_query import typed
from fairserve.config import ApiConfig, FairServeArgs
from fairserve.settings import read_settings
from fairserve.views import NewKey
from tests.api.batches.conftest import files_below
from tests.api.served import Served
from tests.api.test_admin import READS

CANARY = "canary-7f3a91"
CLIENT_KEY = f"{CANARY}-of-ann-0123456789abcdef"
ADMIN_KEY = f"{CANARY}-of-ops-0123456789abcdef"
STRANGER = f"{CANARY}-of-nobody-0123456789abcdef"
CHAT = "/v1/chat/completions"
GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def headers_with(secret: str) -> list[list[tuple[str, bytes]]]:
    """Ways to send a secret: the right one first, then wrong ones."""
    raw = secret.encode()
    return [
        [("authorization", b"Bearer " + raw)],
        [("authorization", raw)],
        [("authorization", b"Basic " + raw)],
        [("authorization", b"Bearer  " + raw + b" ")],
        [("authorization", b"Bearer " + raw + b" " + raw)],
        [("authorization", b"Bearer " + raw), ("authorization", b"Bearer " + raw)],
        [("authorization", b"Bearer \xff\xfe" + raw)],
        [("x-api-key", raw)],
        [("api-key", raw)],
        [("cookie", b"key=" + raw)],
        [("x-client-id", raw)],
        [("proxy-authorization", b"Bearer " + raw)],
    ]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What everybody but the HTTP client has logged."""
    caplog.set_level(logging.DEBUG)
    for name in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(name).setLevel(logging.INFO if name == "asyncio" else logging.WARNING)
    return lambda: caplog.text


def no_canary(*texts: object) -> None:
    for text in texts:
        assert CANARY not in str(text), str(text)[:2000]


async def test_a_secret_in_any_header_shows_in_no_answer_log_metric_event_or_file(
    tmp_path: Path, log: Callable[[], str]
) -> None:
    served = Served(
        tmp_path / "store.sqlite",
        keys=[{"client": "ann", "key": CLIENT_KEY}],
        admin_keys=[{"name": "ops", "key": ADMIN_KEY}],
    )
    seen: list[str] = []

    async def ask(method: str, path: str, **more: Any) -> httpx.Response:
        answer = await http.request(method, path, **more)
        seen.append(f"{answer.status_code} {answer.headers} {answer.text}")
        return answer

    transport = httpx.ASGITransport(served.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://fairserve") as http:
        for secret in (CLIENT_KEY, ADMIN_KEY, STRANGER):
            for headers in headers_with(secret):
                await ask("POST", CHAT, json=GOOD, headers=headers)
                await ask("POST", CHAT, json=GOOD | {"stream": True}, headers=headers)
                for content in (b"{", b'{"model": 5}', b"[]", b"\xff"):
                    typed_headers = [*headers, ("content-type", b"application/json")]
                    await ask("POST", CHAT, content=content, headers=typed_headers)
                    await ask("PATCH", "/admin/v1/clients/bob", content=content, headers=typed_headers)
                for method, path in (
                    ("GET", "/v1/models"),
                    ("GET", "/v1/files"),
                    ("GET", "/v1/batches/nothing"),
                    ("GET", "/nothing"),
                    ("DELETE", "/v1/models"),
                    ("GET", "/dashboard"),
                    ("GET", "/health"),
                    ("GET", "/admin/v1/keys"),
                    ("GET", "/admin/v1/overview?top=-1"),
                    ("OPTIONS", "/admin/v1/keys"),
                ):
                    await ask(method, path, headers=headers)
        admin = {"authorization": f"Bearer {ADMIN_KEY}"}
        for body in (
            {"client": "bob", "key": STRANGER},
            {"client": "bob", "key_sha256": STRANGER},
            {"client": "bob", "weight": STRANGER},
            {"client": [STRANGER]},
            {"client": f"{STRANGER} is no name"},
            {"client": "bob", "applications": [STRANGER + "/"]},
            STRANGER,
            [STRANGER],
        ):
            assert 400 <= (await ask("POST", "/admin/v1/keys", json=body, headers=admin)).status_code < 500
        for body in ({"weight": STRANGER}, {"is_paused": STRANGER}, [STRANGER]):
            assert (await ask("PATCH", "/admin/v1/clients/bob", json=body, headers=admin)).status_code == 400
        for path in ("fairness.quantum", "fairness.policy", "fairness.group_weights", "dispatch.lookahead"):
            change = {path: {"acme": STRANGER} if path.endswith("weights") else STRANGER}
            assert (await ask("PATCH", "/admin/v1/settings", json=change, headers=admin)).status_code == 400
        made = (await http.post("/admin/v1/keys", json={"client": "bob"}, headers=admin)).json()
        served.backend.script = lambda _: [RuntimeError("the engine failed")]
        failed = await ask("POST", CHAT, json=GOOD, headers={"authorization": f"Bearer {CLIENT_KEY}"})
        assert failed.status_code == 500 and "the engine failed" in log()
        for path, _ in READS:
            assert (await ask("GET", f"/admin/v1{path}", headers=admin)).status_code in (200, 404)
    await served.actor.main.tick()
    await served.actor.main.upkeep.keep(served.actor.main.upkeep.store)  # type: ignore[arg-type]
    served.actor.end()

    assert any("200 " in one for one in seen) and any("401 " in one for one in seen)
    metrics = [served.metrics.gauges, served.metrics.counters, served.metrics.histograms]
    assert metrics[1], "something was measured"
    actor = [await served.actor.events(0, 1000), await served.actor.audit(), await served.actor.keys()]
    actor += [await served.actor.key_directory(-1), await served.actor.status(), served.actor.dispatcher.dump()]
    objects = [vars(one) for one in (served.service, served.admin, served.service._identities, served.admin.admins)]
    files = [path.read_bytes().decode("latin-1") for path in files_below(tmp_path)]
    assert any("bob" in one for one in files), "the live key is kept"
    everything = [*seen, log(), *map(repr, [*metrics, *actor, *objects]), *files]
    no_canary(*everything)
    assert not [one for one in everything if made["secret"] in one], "the one answer that tells it apart"


def shown(error: BaseException) -> str:
    """What a traceback would print of it."""
    return "".join(traceback.format_exception_only(error)) + repr(error) + "".join(_behind(error))


def _behind(error: BaseException) -> Iterator[str]:
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if behind is not None:
        yield shown(behind)


WRONG_FILES = [
    f"api: {{keys: [{{client: ann, key: {STRANGER}, weight: 0}}]}}",
    f"api: {{keys: [{{client: ann, key: [{STRANGER}]}}]}}",
    f"api: {{keys: [{{client: ann, key: {STRANGER}, kye: 1}}]}}",
    f"api: {{keys: [{{{STRANGER}: ann}}]}}",
    f"api: {{admin_keys: [{{{STRANGER}: ann}}]}}",
    f"api: {{keys: {{ann: {STRANGER}}}}}",
    f"api: {{keys: {STRANGER}}}",
    f"api: {{keys: [{STRANGER}]}}",
    f"api: {{keys: [{{client: ann, key: {STRANGER}, key_sha256: {STRANGER}}}]}}",
    f"api: {{admin_keys: [{{name: '{STRANGER} x', key: {STRANGER}}}]}}",
    f"api:\n  keys:\n  - client: ann\n    key: {STRANGER}\n   weight: 3",
    f"api: {{keys: [{{client: ann, key: *{STRANGER}}}]}}",
    f"api: {{keys: [{{client: ann, key: !{STRANGER} x}}]}}",
    f"api: {{keys: [{{client: ann, key: @{STRANGER}",
    f'api: {{keys: [{{client: ann, key: "{STRANGER}\\q"}}]}}',
    f"api: {{keys: [{{client: ann, key: {STRANGER}}}]}}\nmodle: x",
]


@pytest.mark.parametrize("text", WRONG_FILES, ids=range(len(WRONG_FILES)))
def test_a_wrong_settings_file_is_refused_without_its_secrets(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(Exception) as raised:
        read_settings(path)
    no_canary(shown(raised.value))
    for words in (["config", str(path)], ["serve", "--config", str(path)]):
        assert cli.main(words) == 2
    no_canary(*capsys.readouterr())


@pytest.mark.parametrize(
    "word",
    [
        STRANGER,
        f"--admin-kye={STRANGER}",
        f"api.keys.0.key={STRANGER}",
        f"api.keys={STRANGER}",
        f"api.keys=[{{{STRANGER}: ann}}]",
        f'api.keys=[{{"client": "ann", "key": "{STRANGER}", "weight": -1}}]',
        f"num_replicas.x={STRANGER}",
        f"api.admin_keys=[{STRANGER}]",
        f"={STRANGER}",
    ],
)
def test_a_wrong_word_of_the_command_line_is_refused_without_its_secret(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code: object = None
    with contextlib.suppress(SystemExit):  # argparse's own way out
        code = cli.main(["serve", "num_replicas=1", word])
    assert code in (2, None)
    out, err = capsys.readouterr()
    assert err.startswith("fairserve: ")
    no_canary(out, err)


def test_a_secret_behind_a_misspelt_option_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["clients", "list", "--admin-kye", STRANGER], ["clients", "list", STRANGER]):
        with pytest.raises(SystemExit):
            cli.main(words)
    out, err = capsys.readouterr()
    assert "--admin-kye" in err
    no_canary(out, err)


@pytest.mark.parametrize("key", [STRANGER, f"{STRANGER}\n", f"{STRANGER}\r\nx: y", f"{STRANGER}é", f"{STRANGER}\x00"])
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", f"http://{STRANGER}:{STRANGER}@127.0.0.1:1"])
def test_a_command_whose_service_is_not_there_does_not_show_its_key(
    key: str, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIRSERVE_ADMIN_KEY", "unused") if "\0" in key else monkeypatch.setenv(
        "FAIRSERVE_ADMIN_KEY", key
    )
    more = ["--admin-key", key] if "\0" in key else []
    for words in (["clients", "list"], ["keys", "create", "bob"]):
        assert cli.main([*words, "--url", url, *more]) in (1, 2)
    no_canary(*capsys.readouterr())


def test_an_answer_of_another_kind_of_service_is_refused_without_its_secret() -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(201, json={"secret": STRANGER, "key": {"id": STRANGER}})

    door = HttpDoor("http://fairserve", ADMIN_KEY, 1.0, httpx.MockTransport(answer))
    with pytest.raises(Exception) as raised:
        door.create_key(KeyWanted(client="bob"))
    no_canary(shown(raised.value), repr(door), repr(vars(door)))


def test_a_new_key_is_not_printed_by_whoever_looks_at_it() -> None:
    view = {"id": "abcd", "client": "bob", "weight": 1.0, "source": "live", "created_s": 1.0}
    made = typed(NewKey, {"secret": STRANGER, "key": view})
    assert made.secret == STRANGER
    no_canary(repr(made), str(made))


def test_the_settings_as_python_prints_them_and_as_serve_keeps_them_hold_no_secret() -> None:
    api = {"keys": [{"client": "ann", "key": CLIENT_KEY}], "admin_keys": [{"name": "ops", "key": ADMIN_KEY}]}
    args = FairServeArgs.model_validate({"api": api})
    hashed = with_hashed_keys(args)
    no_canary(repr(args), str(args), repr(args.api), hashed.model_dump_json())
    no_canary(cli.welcome(args, "http://127.0.0.1:8000", None))


def test_the_environment_is_refused_without_its_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    for text in (STRANGER, json.dumps([{STRANGER: "ann"}]), json.dumps([{"client": "ann", "key": STRANGER, "x": 1}])):
        with pytest.raises(Exception) as raised:
            Identities.from_config(ApiConfig(), {"FAIRSERVE_API_KEYS": text})
        no_canary(shown(raised.value))


@pytest.mark.parametrize("token", ["0123456789abcdef0123456789abcdef", "sk-proj-12", "fs-12", "A" * 25])
def test_in_open_mode_another_services_key_is_no_name(token: str) -> None:
    from starlette.datastructures import Headers

    assert token not in Identities().identify(Headers({"authorization": f"Bearer {token}"})).name
