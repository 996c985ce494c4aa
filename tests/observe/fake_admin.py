"""The admin API of a service that does not exist, by the shapes of :mod:`fairserve.views`: scenes to look at.

A :class:`Scene` holds clients whose service grows with the time that is handed in; the application answers from it what
``/admin/v1`` would. ``requests`` lists what was asked, ``changes`` what was patched.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from fairserve import views

BOUND = 9_216.0


@dataclass(frozen=True, slots=True)
class Client:
    """What one client does: ``rate`` service/s, ``waiting`` requests, ``lead`` around which its counter stands."""

    name: str
    rate: float
    waiting: int = 0
    running: int = 0
    weight: float = 1.0
    wait_s: float = 0.0
    lead: float = 0.0
    is_paused: bool = False
    rate_before: float | None = None
    """Service/s before the flood; None: the same."""
    budgets: tuple[views.BudgetView, ...] = ()


@dataclass
class Scene:
    """A service at a moment; fields may be changed while a browser looks at it."""

    clients: list[Client]
    now_s: Callable[[], float]
    started_s: float
    is_fair: bool = True
    gap: float = 1_310.0
    jain: float = 0.9987
    events: list[tuple[float, str, str, int]] = field(default_factory=list)
    """Age in seconds, kind, text, count; newest first."""
    flood_s: float = 0.0
    """When the flood began: nobody waits before."""
    is_away: bool = False
    """The counter actor does not answer."""
    key: str | None = None
    """Asked for by every read; None: everybody may read."""
    num_replicas: int = 3
    models: tuple[str, ...] = ("tiny",)
    requests: list[str] = field(default_factory=list)
    changes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def view(self, client: Client) -> views.ClientView:
        now_s = self.now_s()
        service = self.service(client, now_s)
        return views.ClientView(
            name=client.name,
            weight=client.weight,
            is_paused=client.is_paused,
            counter=service / client.weight,
            lead=self.lead(client, now_s),
            waiting=self.waiting(client, now_s),
            running=client.running,
            oldest_wait_s=1.7 * client.wait_s if client.waiting else 0.0,
            mean_wait_s=client.wait_s,
            service=service,
            service_per_s=(service - self.service(client, now_s - 10)) / 10,
            num_input=int(service / 3),
            num_cached=int(service / 20),
            num_output=int(service / 3),
            num_refused=12 if client.waiting > 100 else 0,
            last_active_s=now_s if client.rate else None,
            budgets=client.budgets,
        )

    def service(self, client: Client, at_s: float) -> float:
        passed = max(0.0, at_s - self.started_s)
        before = client.rate if client.rate_before is None else client.rate_before
        flood = max(0.0, at_s - self.flood_s)
        phase = sum(map(ord, client.name)) % 60
        swing = 0.7 * math.sin(passed / 23 + phase) + 0.4 * math.sin(passed / 7.3 + 2 * phase)
        return max(0.0, before * (passed - flood) + client.rate * flood + swing * (client.rate if flood else before))

    def waiting(self, client: Client, at_s: float) -> int:
        flood = max(0.0, at_s - self.flood_s)
        return round(client.waiting * (1 - math.exp(-flood / 40)) * (1 + 0.16 * noise(client.name, at_s)))

    def lead(self, client: Client, at_s: float) -> float:
        is_on = client.rate and (at_s > self.flood_s or client.rate_before != 0)
        return client.lead * (1 + 0.7 * noise(client.name, at_s)) if is_on else 0.0

    def overview(self, top: int, search: str | None) -> views.Overview:
        now_s = self.now_s()
        everybody = [self.view(client) for client in self.clients]
        wanted = sorted(
            (view for view in everybody if not search or search in view.name),
            key=lambda view: (-view.service_per_s, -view.waiting, view.name),
        )
        backlogged = [view for view in everybody if view.waiting and not view.is_paused]
        service_per_s = sum(view.service_per_s for view in everybody)
        return views.Overview(
            time_s=now_s,
            built_in_s=0.0011,
            epoch=7,
            started_s=self.started_s,
            policy="vtc",
            prediction="moving_mean",
            model="smollm2-135m-instruct",
            is_overloaded=False,
            verdict=self.verdict([view.name for view in backlogged]),
            waiting=sum(view.waiting for view in everybody),
            running=sum(view.running for view in everybody),
            routers=tuple(views.RouterView(name=f"router-{i}", requests=6 + i, call_age_s=0.2) for i in range(2)),
            replicas=self.replicas(service_per_s),
            tokens_per_s=service_per_s / 1.6,
            service_per_s=service_per_s,
            num_clients=len(everybody),
            num_granted=int((now_s - self.started_s) * 4.1),
            num_refused=sum(view.num_refused for view in everybody),
            num_throttled=4,
            num_lifts=31,
            num_preempted=6,
            num_lapsed=0,
            clients=tuple(wanted[:top]),
            others=summed(wanted[top:]),
            events=tuple(
                views.EventView.model_validate(
                    {"seq": len(self.events) - i, "time_s": now_s - age, "kind": kind, "text": text, "count": count}
                )
                for i, (age, kind, text, count) in enumerate(self.events)
            ),
        )

    def verdict(self, backlogged: list[str]) -> views.Verdict:
        within = "within" if self.is_fair else "beyond"
        text = (
            f"{'fair' if self.is_fair else 'not fair'}: the counters of waiting clients differ by at most "
            f"{self.gap:,.0f}, {within} the bound of {BOUND:,.0f}"
        )
        if len(backlogged) < 2:
            text = "fair: fewer than two clients wait, so nobody is held back by another"
        is_pair = len(backlogged) > 1
        return views.Verdict(
            is_fair=self.is_fair,
            text=text,
            gap=self.gap if is_pair else 0.0,
            gap_pair=(backlogged[0], backlogged[-1]) if is_pair else None,
            worst_gap=max(self.gap, 2_870.0),
            bound=BOUND,
            jain=self.jain,
            num_backlogged=len(backlogged),
        )

    def replicas(self, service_per_s: float) -> tuple[views.ReplicaView, ...]:
        now_s, capacity, rows = self.now_s(), 8192, []
        for i in range(self.num_replicas):
            is_stale = i == 2
            busy = 0.55 + 0.35 * math.sin(now_s / 11 + i) if service_per_s else 0.0
            rows.append(
                views.ReplicaView(
                    name=f"fairserve#Model#q7x2m9k{i}",
                    state="stale" if is_stale else "live",
                    report_age_s=6.4 if is_stale else 0.05 + 0.04 * i,
                    running=0 if is_stale else round(8 * busy),
                    waiting=0 if is_stale else i,
                    max_slots=8,
                    free_kv_tokens=capacity if is_stale else int(capacity * (1 - busy)),
                    kv_capacity_tokens=capacity,
                    granted_unconfirmed=i % 2,
                    tokens_per_s=0.0 if is_stale else service_per_s / 3.2,
                )
            )
        return tuple(rows)

    def page(self, offset: int, limit: int, order: str, search: str | None) -> views.ClientPage:
        found = [self.view(client) for client in self.clients if not search or search in client.name]
        found.sort(key=lambda view: view.name)
        if order != "name":
            found.sort(key=lambda view: -getattr(view, order))
        return views.ClientPage(total=len(found), offset=offset, clients=tuple(found[offset : offset + limit]))

    def history(self, names: list[str], since_s: float, resolution_s: int) -> views.History:
        now_s = self.now_s()
        begin = math.ceil(max(since_s, self.started_s) / resolution_s)
        times = tuple(float(i * resolution_s) for i in range(begin, int(now_s / resolution_s) + 1))
        series = {
            client.name: views.Series(
                service=tuple(self.service(client, at) for at in times),
                waiting=tuple(self.waiting(client, at) for at in times),
                lead=tuple(self.lead(client, at) for at in times),
            )
            for client in self.clients
            if client.name in names
        }
        return views.History.model_validate({"resolution_s": resolution_s, "times_s": times, "clients": series})

    def change(self, name: str, change: dict[str, Any]) -> views.ClientView | None:
        for i, client in enumerate(self.clients):
            if client.name == name:
                weight = change.get("weight", client.weight)
                new = replace(client, weight=1.0 if weight is None else weight)
                self.clients[i] = replace(new, is_paused=change.get("is_paused", client.is_paused))
                self.changes.append((name, change))
                return self.view(self.clients[i])
        return None


def budget(of: str, window: str, used: int, *, ends_s: float, **more: Any) -> views.BudgetView:
    return views.BudgetView.model_validate(
        {"of": of, "window": window, "used": used, "promised": 120, "resets_s": ends_s, **more}
    )


def noise(name: str, at_s: float) -> float:
    """Between -1 and 1, smooth over some seconds and the same for the same moment."""
    phase = sum(map(ord, name)) % 60
    return 0.6 * math.sin(at_s / 5.1 + phase) * math.sin(at_s / 31 + phase) + 0.4 * math.sin(at_s / 2.3 + 3 * phase)


def summed(rest: list[views.ClientView]) -> views.ClientView | None:
    if not rest:
        return None
    totals = {name: sum(getattr(view, name) for view in rest) for name in ("service", "service_per_s", "waiting")}
    return rest[0].model_copy(update={**totals, "name": "other"})


def scene(kind: str, now_s: Callable[[], float], *, uptime_s: float = 5400.0) -> Scene:
    """One of: quiet, flood, unfair, crowd, hostile, empty."""
    began = now_s() - uptime_s
    restart = [
        (41.0, "lifted", "modest came back and was raised to the level", 1),
        (63.0, "throttled", "greedy began an interaction too many", 14),
        (95.0, "preempted", "a request of greedy gave way to one of modest", 3),
        (430.0, "started", "the counter actor began: counters of 6 clients restored, 0.4 s old", 1),
        (431.0, "joined", "fairserve#Model#q7x2m9k1 sent its first report", 1),
        (434.0, "lost", "fairserve#Model#q7x2m9k2 has not reported for 10 s", 1),
        (520.0, "changed", "ops set the weight of acme/research/ann from 1 to 2", 1),
    ]
    ends = {"ends_s": now_s() + 3 * 3_600}
    acme = budget("acme", "month", 41_000_000, hard=50_000_000, is_group=True, **ends)
    spent = budget("greedy", "day", 1_000_400, soft=800_000, hard=1_000_000, **ends)
    soft = budget("acme/research/ann", "day", 850_000, soft=800_000, hard=1_000_000, **ends)
    flood = [
        Client("greedy", 402, waiting=236, running=5, wait_s=48, lead=900, rate_before=0, budgets=(spent,)),
        Client("modest", 398, waiting=9, running=5, wait_s=2.1, lead=420, rate_before=440),
        Client("acme/research/ann", 801, 21, 9, weight=2, wait_s=3.4, lead=640, rate_before=830, budgets=(acme, soft)),
        Client("acme/sales/eve", 396, waiting=7, running=4, wait_s=1.7, lead=220, rate_before=530, budgets=(acme,)),
        Client("zoe", 61, running=1, wait_s=0.1, lead=80),
        Client("batch-jobs", 0),
    ]
    match kind:
        case "quiet":
            clients = [Client("modest", 96, running=2, wait_s=0.04, lead=90), Client("zoe", 41, running=1, wait_s=0.02)]
            return Scene([*clients, Client("greedy", 0)], now_s, began, events=restart[:1], num_replicas=2, gap=0.0)
        case "flood":
            return Scene(flood, now_s, began, events=restart, flood_s=now_s() - 250)
        case "unfair":
            greedy = replace(flood[0], rate=1310, lead=14_000)
            rest = [replace(client, rate=client.rate * 0.35, wait_s=client.wait_s * 6) for client in flood[1:]]
            return Scene(
                [greedy, *rest],
                now_s,
                began,
                is_fair=False,
                gap=14_480.0,
                jain=0.412,
                events=restart,
                flood_s=now_s() - 250,
            )
        case "crowd":
            many = [
                Client(
                    f"client-{i:04d}", 1.4 + 0.6 * math.sin(i), waiting=i % 3, running=i % 2, wait_s=1 + i % 5, lead=300
                )
                for i in range(999)
            ]
            return Scene([Client("greedy", 22, waiting=4_000, running=8, wait_s=190, lead=900), *many], now_s, began)
        case "hostile":
            names = [
                "<img src=x onerror=document.title='owned'>",
                '<a href="javascript:alert(1)">click</a><b>%{y}</b>',
                "\u202egnp.exe\u0000 \n evil",
                "<b>bold</b>",
                "a" * 300,
            ]
            clients = [Client(name, 100, waiting=5 + i, running=1, wait_s=1.0) for i, name in enumerate(names)]
            events = [(5.0, "refused", "<script>document.title='owned'</script> was refused", 2)]
            return Scene(clients, now_s, began, events=events)
        case "empty":
            return Scene([], now_s, now_s() - 3, num_replicas=0, gap=0.0)
    raise ValueError(f"no scene {kind!r}")


def answer_from(app: FastAPI, current: Callable[[], Scene]) -> None:
    """Add the admin API to ``app``; each request is answered from the scene that ``current`` returns."""

    def refusal(status: int, code: str, message: str) -> JSONResponse:
        return JSONResponse({"error": {"message": message, "type": "x", "param": None, "code": code}}, status)

    @app.middleware("http")
    async def door(request: Request, call_next: Any) -> Response:
        if not request.url.path.startswith("/admin/"):
            return await call_next(request)  # type: ignore[no-any-return]
        scene = current()
        scene.requests.append(f"{request.method} {request.url.path}?{request.url.query}")
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if scene.key and given != scene.key:
            return refusal(401 if not given else 403, "admin_key_required", "send an admin key in 'Authorization'")
        if scene.is_away:
            return refusal(503, "counter_unreachable", "the counter actor did not answer within 1 s")
        return await call_next(request)  # type: ignore[no-any-return]

    @app.get("/admin/v1/models")
    async def models() -> list[views.ModelView]:
        return [views.ModelView(name=name, slot="", price=1.0) for name in current().models]

    @app.get("/admin/v1/overview")
    async def overview(top: int = 50, search: str | None = None) -> views.Overview:
        return current().overview(top, search)

    @app.get("/admin/v1/clients")
    async def clients(
        offset: int = 0, limit: int = 100, order: str = "service", search: str | None = None
    ) -> views.ClientPage:
        return current().page(offset, limit, order, search)

    @app.get("/admin/v1/history")
    async def history(client: list[str] = Query(), since: float = 0, resolution: int = 1) -> views.History:  # noqa: B008
        return current().history(client, since, resolution)

    @app.api_route("/admin/v1/clients/{name:path}", methods=["GET", "PATCH"])
    async def client(request: Request, name: str) -> Response:
        if request.method == "PATCH":
            change = views.ClientChange.model_validate(await request.json()).model_dump(exclude_unset=True)
            view = current().change(name, change)
        else:
            view = next((current().view(one) for one in current().clients if one.name == name), None)
        if view is None:
            return refusal(404, "client_not_found", f"no client {name!r} is known")
        return JSONResponse(view.model_dump())
