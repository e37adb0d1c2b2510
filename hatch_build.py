"""What the package index shows: addresses of the project, and README with links that lead somewhere from there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

FENCED = re.compile(r"(^```.*?^```)", flags=re.DOTALL | re.MULTILINE)
RELATIVE_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?![a-z]+:)([^)\s]+)\)")


class ProjectPage(MetadataHookInterface):
    """Sets what pyproject.toml calls dynamic, from the address of the repository given there."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Adds ``urls`` and ``readme`` to the metadata."""
        repository: str = self.config["repository"]
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        tag = f"v{metadata['version']}"
        metadata["urls"] = {
            "Repository": repository,
            "Documentation": f"{repository}/tree/{tag}/docs",
            "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
            "Issues": f"{repository}/issues",
        }
        metadata["readme"] = {"content-type": "text/markdown", "text": with_absolute_links(readme, repository, tag)}


def with_absolute_links(markdown: str, repository: str, tag: str) -> str:
    """Relative links and images of README lead to the files of a GitHub repository, as they are at a tag."""

    def link(found: re.Match[str]) -> str:
        image, opening, target = found.groups()
        path = f"README.md{target}" if target.startswith("#") else target
        return f"{image}{opening}{repository}/{'raw' if image else 'blob'}/{tag}/{path})"

    parts = FENCED.split(markdown)  # every second one is code
    return "".join(part if index % 2 else RELATIVE_LINK.sub(link, part) for index, part in enumerate(parts))
