"""The description that a package index shows: README.md with its relative links made absolute.

Package indexes serve README.md from a page of their own, where a link to docs/cells.md leads nowhere. The base is
`Repository` of the project's URLs in pyproject.toml.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# A link that is neither absolute nor an anchor within the page: in Markdown, and in the attributes of HTML.
RELATIVE = r"(?![a-z]+:|//|#)"
LINK = re.compile(rf'(\]\(|(?:href|src|srcset)="){RELATIVE}([^)"\s]+)')
PICTURES = (".svg", ".png")


def absolute_links(text: str, repository: str) -> str:
    """Replace relative links by links into the repository; pictures by their raw files."""

    def replace(found: re.Match) -> str:
        kind = "raw" if found[2].endswith(PICTURES) else "blob"
        return f"{found[1]}{repository}/{kind}/main/{found[2]}"

    return LINK.sub(replace, text)


class DescriptionHook(MetadataHookInterface):
    """Fill in `readme`."""

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        text = absolute_links(text, metadata["urls"]["Repository"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
