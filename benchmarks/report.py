"""The Markdown table of a run: its configuration, the aims on a GPU, and every figure."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Aim:
    """A lower bound of a figure.

    Attributes:
        figure: fields that identify its record.
        key: "of_limit", a share of the measured limit, or "median".
        h100: it is meant for 8B on an H100 (or H200), and isn't judged elsewhere.
    """

    name: str
    figure: Record
    key: str
    at_least: float
    h100: bool = False


_ONE_ROW = {"figure": "decode", "batch": 1, "context": 128}
AIMS = (
    Aim("decoding one row, of the read bandwidth", _ONE_ROW, "of_limit", 0.8),
    Aim("decoding one row", _ONE_ROW, "median", 170, h100=True),
    Aim("decoding 128 rows", {"figure": "decode", "batch": 128}, "median", 15000, h100=True),
    Aim("prompt of 8192 tokens", {"figure": "prefill", "length": 8192}, "median", 35000, h100=True),
    Aim("loading weights, of the pinned copy rate", {"figure": "weights"}, "of_limit", 0.7),
)


def markdown(records: Sequence[Record]) -> str:
    """The report of a run. The first record is its configuration."""
    configuration, *figures = records
    lines = [f"# {configuration['shape']} in {configuration['dtype']} on {configuration['device']}"]
    if configuration["device"] != "cpu":
        lines += ["", *_aims(configuration, figures)]
    lines += ["", *_figures(figures), ""]
    for key, value in configuration.items():
        if key not in ("figure", "shape", "dtype", "device") and value is not None:
            shown = f"{value:.4g}" if isinstance(value, float) else json.dumps(value).strip('"')
            lines.append(f"- {key}: {shown}")
    return "\n".join(lines) + "\n"


def _aims(configuration: Record, figures: Sequence[Record]) -> Iterator[str]:
    yield "| aim | at least | measured | reached |"
    yield "|---|---|---|---|"
    is_h100 = any(name in configuration["device"] for name in ("H100", "H200"))
    is_h100 = is_h100 and (configuration["shape"], configuration["dtype"]) == ("8B", "bfloat16")
    for aim in AIMS:
        at_least = (
            _of_limit(aim.at_least) if aim.key == "of_limit" else f"{aim.at_least:g} tokens/s"
        )
        value = next((r[aim.key] for r in figures if _matches(r, aim)), None)
        measured, reached = "not measured", ""
        if value is not None:
            measured = _of_limit(value) if aim.key == "of_limit" else f"{value:.4g} tokens/s"
            reached = "yes" if value >= aim.at_least else "no"
        if aim.h100 and not is_h100:
            reached = "for 8B on an H100"
        yield f"| {aim.name} | {at_least} | {measured} | {reached} |"


def _matches(record: Record, aim: Aim) -> bool:
    return aim.key in record and all(record.get(key) == x for key, x in aim.figure.items())


def _figures(figures: Sequence[Record]) -> Iterator[str]:
    yield "| figure | median | low - high | limit | of the limit |"
    yield "|---|---|---|---|---|"
    for record in figures:
        where = [f"{key} {record[key]}" for key in ("batch", "context", "length") if key in record]
        name = ", ".join([record["figure"], *where])
        if "median" not in record:  # failed, or skipped
            yield f"| {name} | {record['note'].splitlines()[0].replace('|', '/')} | | | |"
            continue
        limit = f"{record['limit']:.4g}" if "limit" in record else ""
        share = _of_limit(record["of_limit"]) if "of_limit" in record else ""
        yield (
            f"| {name} | {record['median']:.3g} {record['unit']} "
            f"| {record['low']:.3g} - {record['high']:.3g} | {limit} | {share} |"
        )


def _of_limit(share: float) -> str:
    return f"{100 * share:.0f} %"
