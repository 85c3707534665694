"""README.md of a merged model: what it is, what went in, how to use it, whom to cite."""

from __future__ import annotations

import html
import re
from typing import Any

import yaml

from plait.errors import printable
from plait.plan import Plan

_CITATIONS = {
    "arXiv:2203.05482": "Wortsman et al., Model soups, ICML 2022",
    "arXiv:2212.04089": "Ilharco et al., Editing models with task arithmetic, ICLR 2023",
    "arXiv:2306.01708": "Yadav et al., TIES-Merging, NeurIPS 2023",
    "arXiv:2311.03099": "Yu et al., Language models are Super Mario (DARE), ICML 2024",
    "arXiv:2312.06795": "Davari and Belilovsky, Model Breadcrumbs, ECCV 2024",
    "arXiv:2406.11617": "Deep et al., DELLA-Merging, 2024",
    "arXiv:2408.07990": "Wan et al., FuseChat (SCE), 2024",
    "arXiv:2403.19522": "Jang et al., Model Stock, ECCV 2024",
    "arXiv:2405.07813": "Wang et al., Localizing task information (TALL masks, Consensus), ICML 2024",
    "arXiv:2402.00433": "Tang et al., Merging Multi-Task Models via Weight-Ensembling Mixture of Experts, ICML 2024",
    "arXiv:2410.21804": "Shen et al., Efficient and Effective Weight-Ensembling Mixture of Experts, 2024",
    "arXiv:2406.15479": "Lu et al., Twin-Merging, NeurIPS 2024",
    "arXiv:2405.17461": "Huang et al., EMR-Merging, NeurIPS 2024",
    "arXiv:2408.10174": "Tang et al., SMILE, 2024",
    "arXiv:2409.15813": "Layer-wise model merging for unsupervised domain adaptation in segmentation, 2024",
}


def model_card(plan: Plan, record: dict[str, Any]) -> str:
    """Markdown with the front matter that model hubs read. No dates and no machine: same merge, same bytes."""
    front = {"tags": ["merge", "plait", plan.method.name.replace(" → ", "-")], "library_name": "transformers"}
    if plan.base is not None:
        front["base_model"] = plan.base.label
    names = ", ".join(model.name for model in plan.models)
    lines = ["---", yaml.safe_dump(front, sort_keys=True).rstrip(), "---", "", f"# {plan.method.name} of {names}", ""]
    lines += [f"Merged with Plait {record['plait']} by `{plan.method.name}`: {plan.method.summary}", ""]
    lines += ["| model | role | fingerprint |", "|---|---|---|"]
    for model in plan.opened():
        role = "base" if plan.base is not None and model.source is plan.base.source else f"expert `{model.name}`"
        lines.append(f"| {_cell(model.label)} | {role} | `{record['inputs'][model.label]['fingerprint'][:16]}` |")
    copied = len(record["tensors"]["copied"])
    lines += ["", f"{record['tensors']['merged']} tensors merged, {copied} copied."]
    if plan.heads:
        lines += [
            "",
            "Tensors that belong to one task (heads) are not merged; they are in `heads/`: "
            + ", ".join(f"`{task}.safetensors`" for task in sorted(plan.heads))
            + ".",
        ]
    if plan.method.dynamic is not None:
        lines += [
            "", "## Use", "", "The experts stay apart in this model and are mixed for every input; it needs Plait:", "",
            "```python", "import plait", 'model = plait.from_pretrained("FOLDER")', "```",
        ]  # fmt: skip
    recipe = yaml.safe_dump(record["recipe"], sort_keys=False).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe)), default=0))  # none in the recipe may close it
    lines += ["", "## Recipe", "", f"{fence}yaml", recipe, fence, ""]
    citation = _CITATIONS.get(plan.method.paper)
    lines += ["## Citation", "", f"{plan.method.name}: {f'{citation}, ' if citation else ''}{plan.method.paper}.", ""]
    lines += ["`plait.json` holds the fingerprints of the inputs and the SHA-256 of the weights.", ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A path as text of a table: it may be a stranger's, and Markdown passes HTML on."""
    return html.escape(printable(text), quote=False).replace("|", "\\|").replace("\n", " ")
