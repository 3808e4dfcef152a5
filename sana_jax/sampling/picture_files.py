"""PNG files of drawn pictures: their names, what they say about themselves, and a grid that shows them all."""

import collections
import concurrent.futures
import hashlib
import io
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sana_jax import atomic

GAP = 4  # pixels between the pictures of a grid
LARGEST_GRID = 64 * (1024 + GAP) ** 2  # pixels; beyond 89 million Pillow warns of a decompression bomb
LONGEST_SIDE = 32  # pictures of a grid's row or column, beyond which it is made square
LONGEST_TEXT = 10**6  # characters of all prompts in a grid; Pillow opens no file that has 64 MB of text


def numbered(out: pathlib.Path, count: int) -> list[pathlib.Path]:
    """The files of `count` pictures: `out` for one, else numbered ones beside it, whose names sort in this order."""
    if count == 1:
        return [out]
    digits = max(3, len(str(count - 1)))
    return [out.with_name(f"{out.stem}_{index:0{digits}d}{out.suffix}") for index in range(count)]


def save(picture: Image.Image, file: pathlib.Path, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Writes a picture, with `identity` as texts and `settings` as one more text, of JSON."""
    text = PngInfo()
    for key, value in identity.items():
        text.add_text(key, str(value))
    text.add_text("settings", json.dumps(settings))
    content = io.BytesIO()
    picture.save(content, "png", pnginfo=text)
    atomic.write_file(file, [content.getbuffer()])


def already_drawn(
    files: Sequence[pathlib.Path], identities: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> set[int]:
    """Places in the list of the files that are there and say what `save` would write into them.

    Raises:
      ValueError: one says something else.
    """
    drawn = set()
    for place, (file, identity) in enumerate(zip(files, identities, strict=True)):
        if not file.exists():
            continue
        there, wanted = _description(file, identity), {key: str(value) for key, value in identity.items()} | settings
        if not there:
            raise ValueError(f"{file} is there and was not drawn by sample.py; move it away or give another --out.")
        for key in wanted | there:
            if there.get(key) != wanted.get(key):
                raise ValueError(
                    f"{file} is there and was drawn with {key}={there.get(key)!r}, not {wanted.get(key)!r}; give the "
                    "flags it was drawn with, give another --out, or leave out --resume to replace it."
                )
        drawn.add(place)
    return drawn


def file_digest(file: str | pathlib.Path) -> str:
    """Of a file's bytes: a setting beside its name, under which another one may come to lie."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:16]


def read(file: pathlib.Path) -> Image.Image:
    """The picture of a file.

    Raises:
      ValueError: it is damaged.
    """
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is damaged ({error}); delete it, and --resume draws it again.") from None


def _description(file: pathlib.Path, keys: Iterable[str]) -> dict[str, Any]:
    """The texts under `keys` and the settings that `save` wrote; empty for other files. The pixels are not read."""
    try:
        with Image.open(file) as picture:
            return {key: picture.info[key] for key in keys} | json.loads(picture.info["settings"])
    except (OSError, KeyError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {}


class Writer:
    """A thread that saves pictures in the order in which they are given, while the next are drawn.

    What goes wrong is raised by a later `save`, or where the `with` block ends; that waits for all.
    """

    def __init__(self, waiting: int, written: Callable[[pathlib.Path], None]):
        """At most `waiting` pictures are behind; the caller's thread calls `written` with each new file."""
        self._waiting, self._written = waiting, written
        self._behind: collections.deque[concurrent.futures.Future[pathlib.Path]] = collections.deque()
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_):
        try:
            while self._behind:
                self._finish_first()
        finally:
            self._thread.shutdown(cancel_futures=True)

    def save(self, picture: Image.Image, file: pathlib.Path, *texts: Mapping[str, Any]) -> None:
        """As the function `save`, later."""
        while len(self._behind) >= self._waiting:
            self._finish_first()
        self._behind.append(self._thread.submit(_save_and_name, picture, file, *texts))

    def _finish_first(self) -> None:
        # Under no name: an error has this frame in its traceback, and the two would keep each other alive.
        self._written(self._behind.popleft().result())


def _save_and_name(picture: Image.Image, file: pathlib.Path, *texts: Mapping[str, Any]) -> pathlib.Path:
    save(picture, file, *texts)
    return file


def grid_columns(count: int, num_images: int) -> int:
    """Pictures in a row of a grid: those of one prompt; of several in a long list, so that it is nearly square.

    Square is also a grid of one prompt, of one picture for each, or of very many for each.
    """
    square = math.ceil(math.sqrt(count))
    if num_images in (1, count) or num_images > LONGEST_SIDE:
        return square
    prompts_in_a_row = 1 if count // num_images <= LONGEST_SIDE else round(square / num_images)
    return max(1, prompts_in_a_row) * num_images


class Grid:
    """Pictures in reading order on white, reduced by the smallest whole factor that leaves LARGEST_GRID pixels at most.

    Attributes:
      image: the grid, a PIL image.
      reduction: the factor; 1 where the pictures are shown as they are.
    """

    def __init__(self, count: int, num_images: int, size: tuple[int, int]):
        """A white grid for `count` pictures of `size` (width, height), `num_images` of each prompt."""
        columns = grid_columns(count, num_images)
        rows = math.ceil(count / columns)

        def cell(reduction: int) -> list[int]:
            return [math.ceil(side / reduction) + GAP for side in size]

        factors = range(1, max(size) + 1)
        fitting = (factor for factor in factors if columns * rows * math.prod(cell(factor)) <= LARGEST_GRID)
        self.reduction = next(fitting, factors[-1])
        self._columns, self._cell = columns, cell(self.reduction)
        self.image = Image.new("RGB", (columns * self._cell[0] - GAP, rows * self._cell[1] - GAP), "white")

    def put(self, index: int, picture: Image.Image) -> None:
        """Shows a picture in the place of this number."""
        row, column = divmod(index, self._columns)
        self.image.paste(picture.reduce(self.reduction), (column * self._cell[0], row * self._cell[1]))
