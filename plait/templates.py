"""Recipes to start from: what `plait init` prints."""

from __future__ import annotations

from plait.methods.contract import MergeMethod, Parameter, get_method

_SUGGESTED = {
    ("task_arithmetic", "weight"): 0.3,
    ("ties", "density"): 0.2,
    ("dare_linear", "density"): 0.5,
    ("dare_linear", "weight"): 0.3,
    ("dare_ties", "density"): 0.5,
    ("dare_ties", "weight"): 0.3,
    ("breadcrumbs", "density"): 0.9,
    ("breadcrumbs", "weight"): 0.3,
    ("breadcrumbs_ties", "density"): 0.9,
    ("breadcrumbs_ties", "weight"): 0.3,
    ("della", "density"): 0.5,
    ("della_linear", "density"): 0.5,
    ("della_linear", "weight"): 0.3,
    ("sce", "select_topk"): 0.1,
    ("consensus", "weight"): 0.3,
    ("slerp", "t"): 0.5,
    ("nearswap", "t"): 0.001,
}
"""Values that papers use, where the default would merge without any effect or too strongly."""


def recipe_template(name: str) -> str:
    """A commented recipe for one method."""
    method = get_method(name)
    lines = [f"# {method.summary}", f"# {method.paper}", f"merge_method: {name}"]
    if method.base != "unused":
        lines.append("base_model: ./base            # folder, file, or hub id (owner/name@revision)")
    lines.append("models:")
    count = method.experts[1] or 2
    for k in range(count):
        folder = f"./expert-{'abc'[k]}"
        lines.append(f"  - model: {folder}          # full checkpoint, or a LoRA adapter of the base")
        lines.append(f"    name: {'abc'[k]}                  # optional; keys random draws and names heads/")
    lines += _parameters(method)
    if method.dynamic is not None:
        lines.append(f"shared: {method.dynamic.shared}".ljust(30) + "# merges what is not routed, by parameters:")
        lines.append("route:                        # what is routed, and how it is stored")
        for parameter in method.dynamic.parameters.values():
            given = f"  {parameter.name}: {_value(name, parameter)}" if parameter.default is not None else ""
            lines.append((given or f"  # {parameter.name}:").ljust(30) + f"# {parameter.describe()}")
    if method.learned is not None:
        lines.append("data:                         # inputs to learn from; or the name of a suite")
        lines += [
            f"  {'abc'[k]}: ./inputs-{'abc'[k]}".ljust(30) + "# images, or CSV, JSON lines, Parquet"
            for k in range(count)
        ]
        lines.append("fit:                          # how it is learned")
        for parameter in method.learned.parameters.values():
            lines.append(f"  {parameter.name}: {_value(name, parameter)}".ljust(30) + f"# {parameter.describe()}")
    lines += [
        "dtype: float32                # type of what is written where out_dtype is not given",
        "out_dtype: base               # base, float32, bfloat16, float16; the arithmetic is always float32",
        "seed: 0",
        "# keep: {base: [lm_head], per_task: [classifier]}   # not merged: the base's, or each task's own in heads/",
    ]
    return "\n".join(lines) + "\n"


def _parameters(method: MergeMethod) -> list[str]:
    if not method.parameters:
        return []
    lines = [
        "parameters:                   # a value, a gradient over depth [a, b, c], or [{filter: mlp, value: a}, …]"
    ]
    for parameter in method.parameters.values():
        lines.append(f"  {parameter.name}: {_value(method.name, parameter)}".ljust(30) + f"# {parameter.describe()}")
    return lines


def _value(method: str, parameter: Parameter) -> str:
    value = _SUGGESTED.get((method, parameter.name), parameter.default)
    if value is None:
        return "a" if parameter.name == "anchor" else "0.5"
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
