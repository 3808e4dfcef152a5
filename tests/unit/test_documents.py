"""What the documents name is there: files, headings, scripts, configs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = sorted(path.relative_to(ROOT) for path in (ROOT / "README.md", *ROOT.glob("[a-z]*/README.md")))


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(path: pathlib.Path) -> set[str]:
    return {anchor(line.lstrip("#")) for line in path.read_text().splitlines() if line.startswith("#")}


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings_that_are_there(document):
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / document).parent / name if name else ROOT / document
        if not target.exists() or (heading and heading not in anchors(target)):
            missing.append(link)
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_commands_call_scripts_and_configs_that_are_there(document):
    text = (ROOT / document).read_text()
    named = re.findall(r"(?:python |--config=)((?:[\w/]+/)?\w+\.py)\b", text)
    named += [
        f"{module.replace('.', '/')}" for module in re.findall(r"python -m ((?:sana_jax|benchmarks)[\w.]*)", text)
    ]
    missing = [name for name in named if not (ROOT / name).exists() and not (ROOT / f"{name}.py").exists()]
    assert named
    assert [name for name in missing if name != "portable/draw.py"] == []  # that one the command before it writes
