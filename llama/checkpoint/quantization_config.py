"""Which layers of a Hugging Face folder are quantized, and how: config.json's quantization_config.

Two formats are read: compressed-tensors' ``pack-quantized`` and AWQ's ``gemm``. Files aren't
trusted: a field that isn't known and would have to be left out is refused.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llama.files import MOST_STEPS, listed, n_steps
from llama.quantize import GROUP, Bits

_SUPPORTED = (
    "expected the quant_method 'compressed-tensors' with the format 'pack-quantized' in 4 or 8 "
    "bits, or 'awq' with the version 'gemm' in 4: download the unquantized model, and give "
    "quantize='int4' or 'int8'"
)
_LARGEST_GROUP = 2**24
# Fields that don't change how the tensors are read. Others that aren't read must be empty.
_IGNORED = {
    "compressed-tensors": "quant_method quantization_status global_compression_ratio version "
    "run_compressed dequantize use_optimized_inference",
    "a group": "",
    "weights": "observer observer_kwargs scale_dtype zp_dtype",
    "awq": "quant_method modules_to_not_convert do_fuse fuse_max_seq_len modules_to_fuse "
    "exllama_config checkpoint_format pack_dtype meta sym",
}


class Scheme(NamedTuple):
    """How a layer is quantized.

    Attributes:
        group: number of neighbours in a row that share a scale; None for whole rows.
        symmetric: the integer that stands for 0 is the same everywhere; it isn't stored.
    """

    bits: Bits
    group: int | None
    symmetric: bool

    def __str__(self) -> str:
        groups = "with a scale per row" if self.group is None else f"in groups of {self.group}"
        return f"int{self.bits} {groups}"


@dataclasses.dataclass(frozen=True)
class Quantization:
    """The content of a quantization_config.

    Attributes:
        schemes: by names of layers, regular expressions for them after "re:", or "Linear".
        ignore: layers that aren't quantized, in the same form.
    """

    method: Literal["compressed-tensors", "awq"]
    schemes: Mapping[str, Scheme]
    ignore: tuple[str, ...]

    def scheme(self, layer: str) -> Scheme | None:
        """The scheme of a linear layer, by its name in the file.

        As in compressed-tensors, a name counts before a regular expression, and that before
        "Linear".
        """
        if any(_matches(layer, target) for target in self.ignore):
            return None
        for target in sorted(self.schemes, key=lambda t: (t == "Linear", t.startswith("re:"), t)):
            if _matches(layer, target):
                return self.schemes[target]
        return None

    @property
    def bits(self) -> Bits:
        """The bits of most weights: the output layer may have more."""
        return min(scheme.bits for scheme in self.schemes.values())

    def __str__(self) -> str:
        return f"{' and '.join(sorted(set(map(str, self.schemes.values()))))} ({self.method})"


def _matches(layer: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target in ("Linear", layer)


def parse_quantization(found: Any, path: Path, n_layers: int) -> Quantization | None:
    """The quantization_config in the config.json at ``path``; None if there is none.

    Raises:
        ValueError: a format or an option that isn't supported; the message names the field.
    """
    if found is None or found == {}:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method == "compressed-tensors":
        return _Parser(path, n_layers).compressed_tensors(found)
    if method == "awq":
        return _Parser(path, n_layers).awq(found)
    raise ValueError(
        f"{str(path)!r} has a quantization_config of the quant_method {method!r:.60}, which is not "
        f"supported: {_SUPPORTED}"
    )


def quantization_config(bits: Mapping[str, Bits]) -> dict[str, Any]:
    """The quantization_config of a folder with these bits of its linear layers, by native key.

    An output layer with other bits is a group of its own.
    """

    def group(targets: list[str], n: Bits) -> dict[str, Any]:
        weights = {"num_bits": n, "type": "int", "symmetric": True, "strategy": "group"}
        return {"targets": targets, "weights": weights | {"group_size": GROUP, "dynamic": False}}

    groups = {"group_0": group(["Linear"], min(bits.values()))}
    if bits["output.weight"] != min(bits.values()):
        groups["group_1"] = group(["lm_head"], bits["output.weight"])
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


class _Parser(NamedTuple):
    path: Path
    n_layers: int

    def compressed_tensors(self, found: dict[str, Any]) -> Quantization:
        sparsity = found.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format") == "dense":
            found = found | {"sparsity_config": None}
        self._check(
            "compressed-tensors",
            found,
            {"format": ("pack-quantized", "mixed-precision")},  # a group has a format of its own
            {"config_groups", "ignore"},
        )
        groups = found.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise self._refusal("config_groups", groups, "an object of groups")
        schemes: dict[str, Scheme] = {}
        for group in groups.values():
            if not isinstance(group, dict):
                raise self._refusal("group in config_groups", group, "an object")
            with_default = {"format": found.get("format")} | {k: v for k, v in group.items() if v}
            self._check(
                "a group", with_default, {"format": ("pack-quantized",)}, {"targets", "weights"}
            )
            targets = self._targets("targets", group.get("targets"))
            schemes |= dict.fromkeys(targets, self._scheme(group.get("weights")))
        ignore = self._targets("ignore", found.get("ignore") or [])
        return Quantization("compressed-tensors", schemes, ignore)

    def _scheme(self, weights: Any) -> Scheme:
        if not isinstance(weights, dict):
            raise self._refusal("weights", weights, "an object with num_bits")
        allowed = {
            "num_bits": (4, 8),
            "type": ("int", "INT", None),
            "symmetric": (True, False, None),
            "strategy": ("group", "channel", None),
            "dynamic": (False, None),
            # "weight", also called "static", orders columns during calibration only
            "actorder": (None, False, "weight", "static"),
        }
        self._check("weights", weights, allowed, {"group_size"})
        size = weights.get("group_size")
        strategy = weights.get("strategy") or ("channel" if size == -1 else "group")
        group = None
        if strategy == "group":
            group = self._group_size(size)
        elif size not in (None, -1):
            raise self._refusal("group_size", size, "none with the strategy 'channel'")
        return Scheme(weights["num_bits"], group, weights.get("symmetric") is not False)

    def awq(self, found: dict[str, Any]) -> Quantization:
        version = found.get("version") or found.get("format") or "gemm"
        given = found | {"version": version.lower() if isinstance(version, str) else version}
        allowed = {
            "bits": (4,),
            "version": ("gemm",),
            "zero_point": (True,),
            "backend": (None, "auto", "autoawq"),
        }
        self._check("awq", given, allowed, {"group_size", "format"})
        size = found.get("group_size", 128)
        group = None if size == -1 else self._group_size(size)
        # layers that aren't quantized, modules_to_not_convert, are recognized by their tensors
        schemes = {"Linear": Scheme(4, group, symmetric=False)}
        return Quantization("awq", schemes, ignore=("lm_head",))

    def _group_size(self, size: Any) -> int:
        if type(size) is not int or not 0 < size < _LARGEST_GROUP or size % GROUP:
            raise self._refusal("group_size", size, f"a multiple of {GROUP}")
        return size

    def _targets(self, name: str, found: Any) -> tuple[str, ...]:
        if not isinstance(found, list) or not all(isinstance(target, str) for target in found):
            raise self._refusal(name, found, "a list of names of layers")
        patterns = [target.removeprefix("re:") for target in found]
        if sum(map(n_steps, patterns)) * (7 * self.n_layers + 1) > MOST_STEPS:
            raise self._refusal(name, found, "names of layers, or simple regular expressions")
        return tuple(found)

    def _check(
        self,
        kind: str,
        found: dict[str, Any],
        allowed: Mapping[str, tuple[Any, ...]],
        read: set[str],
    ) -> None:
        for name, values in allowed.items():
            value = found.get(name)
            if not any(type(value) is type(v) and value == v for v in values):
                raise self._refusal(name, value, " or ".join(map(repr, values)))
        for name in sorted(found.keys() - allowed.keys() - read - set(_IGNORED[kind].split())):
            if found[name]:
                raise self._refusal(name, found[name], "null")

    def _refusal(self, name: str, value: object, expected: str) -> ValueError:
        return ValueError(
            f"{str(self.path)!r} has, in quantization_config, {listed([name])} {value!r:.100}, "
            f"which is not supported: expected {expected}; {_SUPPORTED}"
        )
