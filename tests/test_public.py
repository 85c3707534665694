"""What `plait` offers, and which module may know which: a new name or a backwards import must be wanted."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import plait
import plait.methods

PACKAGE = Path(plait.__file__).parent

PUBLIC = ["CheckpointError", "MachineError", "Merged", "PlaitError", "Plan", "Recipe", "RecipeError", "State", "fit",
          "from_pretrained", "load_recipe", "make_plan", "merge"]  # fmt: skip
METHODS = ["Block", "MergeMethod", "PerModel", "Range", "adamerging", "adamerging_pp", "all_methods",
    "anchor_schedule", "average", "awd", "awd_adamerging",
           "breadcrumbs", "breadcrumbs_ties", "concrete_adamerging",
           "concrete_task_arithmetic", "consensus", "dare_linear", "dare_ties", "della", "della_linear",
           "e_wemoe", "emr", "fisher", "get_method", "iso_c", "iso_cts", "karcher", "knots", "linear",
           "merge_method", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "regmean",
           "regmean_pp", "sce", "self_positioning", "slerp", "smile",
           "surgery", "tall_mask", "task_arithmetic", "ties", "tsv_adamerging", "tsv_m",
           "twin", "wemoe", "wudi"]  # fmt: skip

# From left to right: a module imports from what stands before it only.
ORDER = [
    "lazy", "errors", "places", "threads", "units", "digests", "atomic", "dtypes", "yamlfile", "recipe",
    "kernels.job", "kernels.native", "kernels.memory", "kernels.stages", "kernels.rows", "kernels.sift",
    "kernels.product",
    "kernels.loops", "kernels.build", "kernels.fused",
    "methods.stream", "methods.draws", "kernels.worker", "kernels.selection", "kernels.once", "kernels",
    "methods.block", "methods.sums", "methods.contract", "methods.memory",
    "methods.select", "methods.transforms", "methods.survey", "methods.combines", "methods.matrices",
    "methods.finishes",
    "methods.geodesic", "methods.granules", "methods.awd_descent", "methods.awd_adam", "methods.awd", "methods.others",
    "methods.spectral", "methods.wudi", "methods.knots", "methods.learned", "methods.fitted",
    "methods.presets", "methods.routed", "methods", "methods.compose", "settings",
    "sources.base", "sources.files", "sources.folder", "sources.adapter_config", "sources.adapter_keys", "sources.hub",
    "sources.safetensors", "sources.torchfile", "sources.adapter", "sources.remapped", "sources",
    "shards", "follow", "writer", "statefacts", "state", "tokens", "names", "layers", "renames", "experts",
    "vocabulary", "layout", "decide", "plan", "nonfinite", "stages", "ahead", "surveyed", "engine", "engine_ray",
    "suites.definition", "suites.places", "suites.data",
    "models.families", "models.quiet", "models.configs",
    "routing.packing", "routing.stores", "routing.mixing", "routing.layers", "routing.routers", "routing.layout",
    "routing.skeleton", "routing.model", "routing.files", "routing.auto", "routing.experts", "routing.build", "routing",
    "models.heads", "models.net", "models.answers", "models.zero_shot", "models.outfit", "models",
    "learn.data", "learn.vectors", "learn.objectives", "learn.bench", "learn.routers", "learn.guard", "learn.loop",
    "learn.coefficients", "learn.concrete", "learn.statistics", "learn.regmean", "learn.surgery", "learn.learners",
    "learn.fit", "learn",
    "sidefiles", "headfiles", "card", "record", "run", "verify", "leftovers",
    "inspect", "progress", "show_merge", "show_check", "show", "show_state", "show_upkeep", "templates",
    "suites.bases", "suites.train", "suites.train_lora", "suites.language", "suites.builtin", "suites.build", "suites",
    "evaluate.results", "evaluate.cache", "evaluate.clock", "evaluate.metrics", "evaluate.corrupt", "evaluate.subjects",
    "evaluate.routed",
    "evaluate.unseen", "evaluate.measure", "evaluate.robust", "evaluate.contenders",
    "evaluate.compare", "evaluate.sweep", "evaluate.tables",
    "report.text", "report.boards", "report.figures", "report.marks", "report.inspected", "report.fitted",
    "report.granules", "report.scores", "report.vectors", "report.learned", "report.sweeps", "report.table",
    "report.corrupted", "report.routed", "report.cards", "report.provenance", "report.page", "report",
    "evaluate.show", "evaluate",
    "stopping", "cli_measure", "cli_upkeep", "cli", "__main__",
]  # fmt: skip
CALLED_BACK = {("methods.contract", "methods.memory")}
"""A method that is called on tensors imports, in that moment, what runs it in memory."""


def test_public_names() -> None:
    assert sorted(plait.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(plait, name).__module__.startswith("plait.")
    assert sorted(plait.methods.__all__) == METHODS
    assert not [name for name in METHODS if not hasattr(plait.methods, name)]
    with pytest.raises(AttributeError, match="has no attribute 'mrege'"):
        _ = plait.mrege  # pyright: ignore[reportAttributeAccessIssue]


def test_every_method_is_public_under_its_name() -> None:
    for name, method in plait.methods.all_methods().items():
        assert getattr(plait.methods, name) is method
        assert name in METHODS


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(text: str, modules: set[str]) -> set[str]:
    """Modules of plait that a source text imports, wherever in it: at the top, in functions, for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "plait imports by absolute names"
            assert node.module is not None
            for alias in node.names:  # `from plait.methods import combines` is a module, `import Block` is not
                inner = f"{node.module}.{alias.name}".removeprefix("plait.")
                found.add(f"plait.{inner}" if inner in modules else node.module)
    return {name.removeprefix("plait.") for name in found if name.startswith("plait.")}


def backwards(sources: dict[str, str]) -> list[str]:
    rank = {name: place for place, name in enumerate(ORDER)}
    return [
        f"{name} imports {other}"
        for name, text in sources.items()
        for other in sorted(imports_of(text, set(ORDER)))
        if (name, other) not in CALLED_BACK and rank[other] >= rank[name]
    ]


def test_imports_go_to_the_left_only() -> None:
    sources = {module_name(path): path.read_text() for path in PACKAGE.rglob("*.py")}
    facade = sources.pop("")
    assert set(sources) == set(ORDER), "a new module needs its place in ORDER"
    assert len(ORDER) == len(set(ORDER))
    assert backwards(sources) == []
    wanted = {"errors", "plan", "recipe", "routing.auto", "routing.files", "run", "state"}
    assert imports_of(facade, set(ORDER)) == wanted


def test_a_backwards_import_is_seen() -> None:
    assert backwards({"names": "from plait import errors, plan"}) == ["names imports plan"]
    assert backwards({"writer": "def f():\n    from plait.run import merge"}) == ["writer imports run"]
    inner = backwards({"methods.select": "from plait.methods import presets"})
    assert inner == ["methods.select imports methods.presets"]
    assert backwards({"recipe": "import plait.settings"}) == ["recipe imports settings"]


def test_importing_plait_loads_nothing_heavy() -> None:
    code = "import sys, plait; print(sorted({'torch', 'numpy', 'pydantic', 'transformers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
