"""Devices and dtypes by name, and their defaults."""

import os
import re
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from llama.accel import kernels
from llama.accel.features import cpu_computes_bfloat16
from llama.distributed import groups

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# Oldest driver by the major version of CUDA that torch is built for (NVIDIA's table of minor
# version compatibility).
_OLDEST_DRIVER = {12: 525, 13: 580}


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device for ``build``; default CUDA where available, else MPS, else the CPU.

    Raises:
        ValueError: the device isn't available, or isn't this rank's.
    """
    no_nccl = groups.n_processes() > 1 and not dist.is_nccl_available()
    if device is None:
        if torch.cuda.is_available() and no_nccl:
            warnings.warn(
                "this build of torch has no NCCL, which CUDA devices need to communicate: the "
                f"{groups.n_processes()} processes run on the CPU",
                stacklevel=3,
            )
            device = "cpu"
        elif torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available() and groups.n_processes() == 1:
            device = "mps"
            if fault := _mps_fault():
                warnings.warn(f"{fault}: the model runs on the CPU", stacklevel=3)
                device = "cpu"
        else:
            device = "cpu"
            # CUDA_VISIBLE_DEVICES="" and "-1" hide the devices
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
            if not hidden and (fault := _driver_fault()):
                warnings.warn(f"the model runs on the CPU: {fault}", stacklevel=3)
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected 'cuda', 'mps' or 'cpu'") from error
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(resolved.type, False):
        usable = " or ".join(repr(name) for name, there in available.items() if there)
        why = ""
        if resolved.type == "cuda":
            fault = _driver_fault() or f"torch {torch.__version__} finds no CUDA driver or device"
            why = f" ({fault})"
            if torch.version.cuda is None:
                why = (
                    f" (torch {torch.__version__} is built without CUDA: install another build, "
                    "see https://pytorch.org/get-started)"
                )
        raise ValueError(f"device is {str(device)!r}, but this machine has {usable}{why}")
    if resolved.type == "mps" and (fault := _mps_fault()):
        raise ValueError(f"device is 'mps', but {fault}; or give device='cpu'")
    if resolved.type != "cuda":
        return resolved
    if fault := _architecture_fault(resolved):
        raise ValueError(f"device is {str(device)!r}, but {fault}, or give device='cpu'")
    if no_nccl:
        raise ValueError(
            f"device is {str(device)!r}, but this build of torch has no NCCL, which the "
            f"{groups.n_processes()} processes need to communicate: give device='cpu'"
        )
    return _cuda_device(resolved)


def _driver_fault() -> str | None:
    """Why torch finds no device although the machine has an NVIDIA driver; None without one."""
    if torch.version.cuda is None or not _NVIDIA_DRIVER.is_file():
        return None
    line = _NVIDIA_DRIVER.read_text(errors="replace").partition("\n")[0]
    found = re.search(r"\s(\d+)(\.\d+)+\s", f"{line} ")
    driver = "of an unknown version" if found is None else found[0].strip()
    oldest = _OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]))
    fault = (
        f"torch {torch.__version__} finds no CUDA device, but this machine has the NVIDIA driver "
        f"{driver}"
    )
    if found is None or oldest is None or int(found[1]) >= oldest:
        return (
            f"{fault}; see whether nvidia-smi lists a device and CUDA_VISIBLE_DEVICES allows it. A "
            "container needs access to the devices (docker run --gpus all)"
        )
    if int(found[1]) >= _OLDEST_DRIVER[12]:
        remedy = (
            "update the driver, or install a build of torch for CUDA 12: pip install torch "
            "--index-url https://download.pytorch.org/whl/cu126 (cu128 for Blackwell)"
        )
    else:
        remedy = "update the driver"
    return (
        f"{fault}, and this build for CUDA {torch.version.cuda} needs {oldest} or newer: {remedy}"
    )


def _architecture_fault(device: torch.device) -> str | None:
    """Why this build of torch can't run on a device that it finds: it lacks kernels for it."""
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", a) for a in torch.cuda.get_arch_list()]
    built = [(m[1], int(m[2]), int(m[3])) for m in found if m is not None]  # none on ROCm
    major, minor = torch.cuda.get_device_capability(device) if built else (0, 0)
    # binaries run on the same major version, PTX ("compute") on any later version
    if not built or any(
        (a, b) <= (major, minor) and (kind == "compute" or a == major) for kind, a, b in built
    ):
        return None
    return (
        f"torch {torch.__version__} has no kernels for its compute capability {major}.{minor} (but "
        f"{', '.join(torch.cuda.get_arch_list())}): install another build of torch, such as "
        "--index-url https://download.pytorch.org/whl/cu126 for older devices"
    )


def _mps_fault() -> str | None:
    """Which wrong results this version of torch gives on MPS, if any are known."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version >= (2, 12):
        return None
    wrong = "batches of more than one row (pytorch#181133)"
    if version < (2, 11):
        wrong += " and more than 1023 tokens in half precision (pytorch#174861)"
    return (
        f"torch {torch.__version__} computes wrong attention on MPS for {wrong}: install torch "
        "2.12 or newer"
    )


def _cuda_device(device: torch.device) -> torch.device:
    """This process's CUDA device: under torchrun, LOCAL_RANK's."""
    n_devices = torch.cuda.device_count()
    if device.index is not None and device.index >= n_devices:
        raise ValueError(f"device is {str(device)!r}, but this machine has {n_devices} of them")
    if not dist.is_torchelastic_launched():
        return device
    local_rank = int(os.environ["LOCAL_RANK"])
    if device.index not in (None, local_rank):
        raise ValueError(
            f"device is {str(device)!r}, but under torchrun this rank's is cuda:{local_rank}: "
            "give device='cuda'"
        )
    if local_rank >= n_devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        raise ValueError(
            f"torchrun started {groups.n_local_processes()} processes on this machine, which has "
            f"{n_devices} CUDA devices{limited}: give --nproc_per_node {n_devices}, or device='cpu'"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype with this name, for weights.

    Raises:
        ValueError: it isn't a supported dtype.
    """
    choices = {
        str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)
    }
    parsed = choices.get(str(name).removeprefix("torch."))
    if parsed is None:
        raise ValueError(f"dtype is {name!r}, expected one of {', '.join(choices)}")
    return parsed


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 if the device or the C kernels support it, else the device's fast dtype."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # it looks at the current one
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if device.type == "mps":
        return torch.bfloat16 if torch.backends.mps.is_macos_or_newer(14, 0) else torch.float32
    has_bfloat16 = kernels.instruction_set() is not None or cpu_computes_bfloat16()
    return torch.bfloat16 if has_bfloat16 else torch.float32
