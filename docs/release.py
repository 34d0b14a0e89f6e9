"""Prepare a copy of the project for a package index, whose pages know nothing of the repository.

Links of the README that lead to files become absolute: they lead to the tag of this version. `[project.urls]`
gets the repository's address.

    python docs/release.py COPY https://HOST/OWNER/hf-mlprune
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
ADDRESS = re.compile(r"https://[^/\s@?#]+/[^/\s@?#]+/[^/\s@?#]+")
#: Name of a link beside the description -> file; the repository itself, if there is none.
PAGES = {
    "Repository": "",
    "Documentation": "docs/index.md",
    "Changelog": "CHANGELOG.md",
    "Paper": "https://arxiv.org/abs/2105.14636v1",
}


def check_address(repository: str) -> str:
    """The address without a slash or `.git` at its end.

    Raises:
        ValueError: it is none of a repository.
    """
    found = repository.strip().removesuffix("/").removesuffix(".git")
    if not ADDRESS.fullmatch(found):
        raise ValueError(
            "REPOSITORY: expected the repository's address, as in https://HOST/OWNER/NAME, "
            f"got {repository!r}; give it as in `make dist REPOSITORY=https://HOST/OWNER/NAME`"
        )
    return found


def absolute_links(text: str, root: Path, repository: str, tag: str) -> str:
    """Markdown whose links to files of the project are absolute.

    Args:
        text: of a file in the project's root.
        root: the project's.
        repository: its address.
        tag: of the version.

    Raises:
        ValueError: a link leads to no file.
    """

    def absolute(found: re.Match[str]) -> str:
        target = found["target"]
        if target.startswith(("http://", "https://", "#", "mailto:")):
            return found[0]
        path, hash_mark, section = target.partition("#")
        if not (root / path).is_file():
            raise ValueError(f"expected links to files of the project, got {target!r}")
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}[{found['text']}]({repository}/{kind}/{tag}/{path}{hash_mark}{section})"

    return LINK.sub(absolute, text)


def prepare(root: Path, repository: str) -> None:
    """Rewrite README.md and pyproject.toml of a copy of the project."""
    repository = check_address(repository)
    version = re.search(r'^__version__ = "(.+)"$', (root / "src/hf_mlprune/__init__.py").read_text(), re.M)
    assert version is not None
    tag = f"v{version[1]}"
    readme, settings = root / "README.md", root / "pyproject.toml"
    text = absolute_links(readme.read_text(encoding="utf-8"), root, repository, tag)
    urls = {
        name: page
        if page.startswith("https://")
        else f"{repository}/blob/{tag}/{page}"
        if page
        else repository
        for name, page in PAGES.items()
    }
    lines = "\n".join(f'{name} = "{url}"' for name, url in urls.items())
    whole = settings.read_text(encoding="utf-8").replace(
        "[project.scripts]", f"[project.urls]\n{lines}\n\n[project.scripts]", 1
    )
    assert tomllib.loads(whole)["project"]["urls"] == urls
    readme.write_text(text, encoding="utf-8")
    settings.write_text(whole, encoding="utf-8")


if __name__ == "__main__":
    try:
        prepare(Path(sys.argv[1]), sys.argv[2])
    except ValueError as error:
        sys.exit(str(error))
