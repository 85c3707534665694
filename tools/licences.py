"""`make licences`: name, version and licence of all that Plait depends on, and a failure for one that binds users.

Read from what is installed: the dependencies of `plait` with the extra `eval`, and theirs. What only builds suites or
runs the tests is not handed to users and is left out.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from typing import Any

PERMISSIVE = re.compile(
    r"\b(apache|mit|bsd|isc|psf|python software|mpl|mozilla|unlicense|zlib|hpnd|cnri|0bsd|public domain)\b|apache-2",
    re.I,
)
"""Free to use, change and pass on with notice; the MPL binds changes to its own files only."""
BINDING = re.compile(r"\b(A?GPL|GNU (Affero )?General|SSPL|BUSL|proprietary|non-?commercial)\b", re.I)


def closure(extra: str) -> list[str]:
    """Names of all packages that are needed here, sorted."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    todo = [("plait", extra)]
    while todo:
        name, wanted = todo.pop()
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
        for text in needed:
            requirement = Requirement(text)
            other = re.sub(r"[-_.]+", "-", requirement.name).lower()
            if other not in found and (not requirement.marker or requirement.marker.evaluate({"extra": wanted})):
                todo.append((other, ""))
                found.add(other)
    return sorted(found - {"plait"})


def licence(name: str) -> str:
    """What a package says of its licence."""
    facts: Any = metadata.metadata(name)
    said = facts.get("License-Expression")
    classifiers = [c.rpartition(" :: ")[2] for c in facts.get_all("Classifier", []) if c.startswith("License ::")]
    text = said or ", ".join(classifiers) or (facts.get("License") or "").strip().splitlines()[:1]
    return text if isinstance(text, str) else (text[0][:60] if text else "says nothing")


def main() -> None:
    """Print the table; exit code 1 when a licence binds users or is not known."""
    wrong = 0
    for name in closure("eval"):
        try:
            version, said = metadata.version(name), licence(name)
        except metadata.PackageNotFoundError:
            continue
        fine = bool(PERMISSIVE.search(said)) and not BINDING.search(said)
        wrong += not fine
        print(f"{name:28} {version:14} {said}{'' if fine else '   <-- look at this one'}")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
