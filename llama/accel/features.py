"""Instruction sets of the processor."""

import os
import platform
from pathlib import Path

# Values of ONEDNN_MAX_CPU_ISA (dnnl::cpu_isa in oneDNN's reference) that exclude AMX.
_WITHOUT_BFLOAT16 = {
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
}
_WITHOUT_AMX = {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}


def cpu_features() -> set[str]:
    """CPU features by Linux's names, without those disabled for oneDNN."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return {"asimd", "asimddp", "asimdhp"}  # of every Apple processor with macOS
    if platform.system() != "Linux":
        return set()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    # "flags : ..." on x86, "Features : ..." on ARM
    flags = (line for line in lines if line.lower().startswith(("flags", "features")))
    features = {name for line in flags for name in line.partition(":")[2].split()}
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if limit in _WITHOUT_BFLOAT16 | _WITHOUT_AMX:  # oneDNN ignores other values
        features = {feature for feature in features if not feature.startswith("amx")}
    if limit in _WITHOUT_BFLOAT16:
        features.discard("avx512_bf16")
    return features


def cpu_computes_bfloat16() -> bool:
    """Whether the processor has bfloat16 matrix instructions."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_features())
