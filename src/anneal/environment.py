"""What a run was made with: interpreter, packages, machine, and the code with its uncommitted changes, as text files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import locale
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_DEVICE_ORDER",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "DNNL_MAX_CPU_ISA",
    "LANG",
    "LANGUAGE",
    "LD_PRELOAD",
    "NUMEXPR_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "PYTHONUTF8",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_CPUS_PER_TASK",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TZ",
    "VECLIB_MAXIMUM_THREADS",
    "WORLD_SIZE",
)
"""Environment variables that are recorded; all others may hold secrets."""

PREFIXES = ("GOMP_", "KMP_", "LC_", "MKL_", "NCCL_", "OMP_")
"""Variables of these families are recorded too."""

FLAGS = (
    "amx_bf16",
    "amx_int8",
    "amx_tile",
    "asimd",
    "avx",
    "avx2",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "avx512bw",
    "avx512dq",
    "avx512f",
    "avx512vl",
    "avx_vnni",
    "bf16",
    "f16c",
    "fma",
    "i8mm",
    "sse4_2",
    "sve",
    "sve2",
)
"""Instruction sets by which libraries choose their kernels, and with them the last bits of sums."""

MAX_DIFF = 1 << 20
"""Bytes of the uncommitted changes that are recorded."""

MAX_FILES = 1000
"""Changed and untracked files that are named, each."""

MAX_HASHED = 1 << 25
"""Bytes of a file up to which its hash is taken; of larger ones the size is recorded."""


def capture(root: Path, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what the process runs on, without importing torch; takes about 0.1 s and never raises for what is missing.

    Parameters
    ----------
    root
        Root of the working tree whose code runs.
    variables
        Environment of the process that is recorded, of which `relevant` picks; None for this process's own.

    Returns
    -------
    dict
        File name to content: ``environment.json``, ``packages.txt``, in a git repository ``git.json`` and, where tracked
        files differ from the commit, ``git.diff``. Keys are sorted, and nothing in it is a time.
    """
    version, lock = _torch(), root / "dvc.lock"
    machine = {
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
            "build": " ".join(platform.python_build()),
            "compiler": platform.python_compiler(),
        },
        "platform": {
            "system": platform.system(),
            "distribution": _distribution(),
            "kernel": f"{platform.release()} {platform.version()}",
            "machine": platform.machine(),
            "libc": _libc(),
        },
        "cpu": {"cores": _usable_cores(), "logical_cores": os.cpu_count(), **_cpu()},
        "memory_bytes": _memory(),
        "gpu": _gpus(),
        "locale": {
            "ctype": locale.setlocale(locale.LC_CTYPE),
            "encoding": locale.getpreferredencoding(False),
            "file_system": sys.getfilesystemencoding(),
        },
        "time_zone": _time_zone(),
        "variables": relevant(os.environ if variables is None else variables),
        "torch": version,
        "dvc_lock": _hash(lock) if lock.is_file() else None,
    }
    return {"environment.json": _json(machine), "packages.txt": _packages(), **_git_files(root)}


def relevant(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment variables that can change a result or its speed, and no others.

    >>> relevant({"OMP_NUM_THREADS": "2", "LC_ALL": "C", "AWS_SECRET_ACCESS_KEY": "x", "TZ": "UTC"})
    {'LC_ALL': 'C', 'OMP_NUM_THREADS': '2', 'TZ': 'UTC'}
    """
    return {key: variables[key] for key in sorted(variables) if key in VARIABLES or key.startswith(PREFIXES)}


def torch_build() -> str:
    """Return how torch was built and how it is set: ``key: value`` lines, then its own account of both.

    For stages that have imported torch anyway. A GPU is named once this process has used one.
    """
    import torch

    cudnn = torch.backends.cudnn
    rows: dict[str, Any] = {
        "version": torch.__version__,
        "git_version": torch.version.git_version,
        "cuda": torch.version.cuda,
        "hip": getattr(torch.version, "hip", None),
        "cudnn": cudnn.version() if cudnn.is_available() else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "deterministic_warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn_benchmark": cudnn.benchmark,
        "cudnn_deterministic": cudnn.deterministic,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.is_available(),
        "gpu_count": torch.cuda.device_count(),
    }
    if torch.cuda.is_initialized():  # asking before would take hundreds of MB of a GPU that the stage does not use
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            rows[f"gpu_{index}"] = (
                f"{card.name}, compute capability {card.major}.{card.minor}, {card.total_memory} bytes"
            )
    lines = [f"{key}: {rows[key]}" for key in sorted(rows)]
    return "\n".join([*lines, "", torch.__config__.show().strip(), "", torch.__config__.parallel_info().strip(), ""])


# ---- the machine ----------------------------------------------------------------------------------------------------


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(*command: str, seconds: float = 5.0) -> str:
    """Return what a command prints, or nothing where it fails or takes longer."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""


def _distribution() -> str | None:
    with suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME")
    return platform.mac_ver()[0] or None


def _libc() -> str | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.confstr("CS_GNU_LIBC_VERSION")
    return None


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cpu() -> dict[str, Any]:
    if platform.system() == "Darwin":
        cores = _output("sysctl", "-n", "hw.physicalcpu")
        flags = ["asimd"] if platform.machine() == "arm64" else []
        return {
            "model": _output("sysctl", "-n", "machdep.cpu.brand_string") or None,
            "physical_cores": int(cores) if cores.isdigit() else None,
            "flags": flags,
        }
    return cpu_in(_read("/proc/cpuinfo"))


def cpu_in(text: str) -> dict[str, Any]:
    r"""Return model, number of physical cores and those of `FLAGS` that a /proc/cpuinfo names.

    >>> core = "model name : X 9000\nphysical id : 0\ncore id : {}\nflags : fpu avx2 fma\n\n"
    >>> cpu_in(core.format(0) + core.format(0) + core.format(1))
    {'flags': ['avx2', 'fma'], 'model': 'X 9000', 'physical_cores': 2}
    """
    processors = [dict(re.findall(r"^([^\t:]+?)\s*:[ \t]*(.*)$", block, re.M)) for block in text.split("\n\n")]
    processors = [processor for processor in processors if processor]
    first = processors[0] if processors else {}
    model = first.get("model name")
    if model is None and "CPU part" in first:  # ARM gives numbers alone
        model = f"implementer {first.get('CPU implementer')}, part {first['CPU part']}"
    cores = {(each["physical id"], each["core id"]) for each in processors if {"physical id", "core id"} <= each.keys()}
    flags = set((first.get("flags") or first.get("Features") or "").split())
    return {"flags": [flag for flag in FLAGS if flag in flags], "model": model, "physical_cores": len(cores) or None}


def _gpus() -> dict[str, Any]:
    """Return names and driver of NVIDIA cards, from /proc or, where that has none, from nvidia-smi."""
    cards = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    found = gpus_in(_read("/proc/driver/nvidia/version"), [_read(card) for card in cards])
    if not found["names"] and shutil.which("nvidia-smi"):
        table = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        rows = [line.rsplit(", ", 1) for line in table.splitlines() if ", " in line]
        found = {"names": [row[0] for row in rows], "driver": rows[0][1] if rows else found["driver"]}
    return found


def gpus_in(version: str, cards: Sequence[str]) -> dict[str, Any]:
    r"""Return names and driver that files below /proc/driver/nvidia tell.

    >>> gpus_in("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19", ["Model: \t NVIDIA A100\nIRQ: 1"])
    {'names': ['NVIDIA A100'], 'driver': '535.104.05'}
    >>> gpus_in("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build", [])
    {'names': [], 'driver': '560.35.03'}
    """
    driver = re.search(r"Kernel Module(?: for \S+)?\s+(\S+)", version)
    models = [re.search(r"^Model:\s*(.+?)\s*$", card, re.M) for card in cards]
    return {"names": [model[1] for model in models if model], "driver": driver[1] if driver else None}


def _time_zone() -> str:
    """Return the zone's name, such as ``Europe/Berlin``, or else its abbreviations."""
    if zone := os.environ.get("TZ"):
        return zone
    with suppress(OSError):
        target = os.readlink("/etc/localtime")
        if "zoneinfo/" in target:
            return target.split("zoneinfo/", 1)[1]
    return "/".join(dict.fromkeys(time.tzname))


# ---- packages -------------------------------------------------------------------------------------------------------


def _torch() -> dict[str, str]:
    """Return version, git commit, CUDA and ROCm version of the installed torch, from its version.py as text."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    text = _read(Path(spec.origin).with_name("version.py"))
    found = re.findall(r"^(__version__|cuda|git_version|hip)\b[^=\n]*=\s*'([^'\n]*)'", text, re.M)
    return {key.strip("_"): value for key, value in found}


def _packages() -> str:
    """Return ``name==version`` of every installed distribution, a line each; a comment marks those from no index."""
    lines: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        head = (distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or "").split("\n\n", 1)[0]
        name, version = (re.search(rf"^{key}:\s*(\S+)", head, re.M) for key in ("Name", "Version"))
        if name and version:
            key = re.sub(r"[-_.]+", "-", name[1]).lower()
            line = f"{name[1]}=={version[1]}"
            # The first on the path wins, but for the trace that a build leaves in the source of an editable one.
            if lines.get(key, line) == line:
                lines[key] = line + _origin(distribution)
    return "".join(f"{lines[key]}\n" for key in sorted(lines))


def _origin(distribution: importlib.metadata.Distribution) -> str:
    try:
        source = json.loads(distribution.read_text("direct_url.json") or "{}")
    except ValueError:
        return ""
    if not source.get("url"):
        return ""
    commit = source.get("vcs_info", {}).get("commit_id")
    kind = "editable" if source.get("dir_info", {}).get("editable") else "from"
    return f"  # {kind} {redact(source['url'])}{f'@{commit}' if commit else ''}"


# ---- the code -------------------------------------------------------------------------------------------------------


def redact(text: str) -> str:
    """Return ``text`` without the passwords and tokens of the URIs in it.

    >>> redact("postgresql://me:secret@host/db"), redact("https://ghp_123@github.com/me/repo")
    ('postgresql://me:***@host/db', 'https://***@github.com/me/repo')
    """
    text = re.sub(
        r"(\w://[^:/@\s]*):[^\s\"']*@", r"\1:***@", text
    )  # even one with a / that should have been written %2F
    text = re.sub(r"(\bhttps?://)[^:/@\s]+@", r"\1***@", text)  # a token may stand where the user's name does
    return re.sub(r"(?i)([?&][\w-]*(?:password|passwd|pwd|token|secret|key|signature|sig)=)[^&\s\"']*", r"\1***", text)


def _git(root: Path, *arguments: str) -> str:
    # Without optional locks, a status that runs beside the user's commit never fails it.
    return _output("git", "-C", str(root), "--no-optional-locks", *arguments, seconds=10.0)


def _git_files(root: Path) -> dict[str, str]:
    """Return git.json and, where tracked files differ from the commit, git.diff; nothing outside a repository."""
    lines = _git(root, "rev-parse", "--show-toplevel", "HEAD", "--abbrev-ref", "HEAD").splitlines()
    if len(lines) != 3:
        return {}
    top, commit, branch = lines
    changed = _names(_git(root, "diff", "HEAD", "--name-only", "--no-renames", "--no-ext-diff", "-z"))
    untracked = _names(
        _git(root, "ls-files", "--others", "--exclude-standard", "--full-name", "-z", "--", "src", "stages")
    )
    values: dict[str, Any] = {
        "commit": commit,
        "branch": None if branch == "HEAD" else branch,
        "dirty": bool(changed),
        "remote": redact(_git(root, "config", "--get", "remote.origin.url")) or None,
        "changed": {name: _hash(Path(top) / name) for name in changed[:MAX_FILES]},
        "untracked": {name: _hash(Path(top) / name) for name in untracked[:MAX_FILES]},
    }
    for key, names in (("changed", changed), ("untracked", untracked)):
        if len(names) > MAX_FILES:
            values[f"{key}_unnamed"] = len(names) - MAX_FILES
    return {"git.json": _json(values), **({"git.diff": _git_diff(root)} if changed else {})}


def _names(text: str) -> list[str]:
    return sorted(filter(None, text.split("\0")))


def _git_diff(root: Path) -> str:
    """Return what tracked files differ by from the commit, as ``git apply`` takes it, cut after `MAX_DIFF` bytes."""
    command = ["git", "-C", str(root), "--no-optional-locks", "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff"]
    try:
        process = subprocess.Popen(
            [*command, "--no-textconv"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return ""
    timer = threading.Timer(10.0, process.kill)
    timer.start()
    with process:
        assert process.stdout is not None
        content = process.stdout.read(MAX_DIFF + 1)
        if cut := len(content) > MAX_DIFF:
            process.kill()
    timer.cancel()
    text = redact(content[:MAX_DIFF].decode(errors="replace"))
    return f"{text}\n# cut after {MAX_DIFF:,} bytes; git.json names every changed file with its hash\n" if cut else text


def _hash(path: Path) -> str:
    """Return a file's md5; in its place ``absent``, the size of a large one, or what else stands there."""
    try:
        if path.is_symlink():
            return f"link to {os.readlink(path)}"
        if not path.is_file():
            return "folder" if path.is_dir() else "absent"
        if path.stat().st_size > MAX_HASHED:
            return f"{path.stat().st_size} bytes"
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "md5").hexdigest()
    except OSError:
        return "unreadable"
