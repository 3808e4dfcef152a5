"""Files and folders that are there whole or not at all, whenever the process that writes them is killed."""

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Iterator

UNFINISHED = ".unfinished"


def write_file(file: pathlib.Path, content: bytes | Iterable) -> None:
    """Under its name, the file is the old one or the whole new one, never a part of it.

    Args:
      file: where to; its folder exists.
      content: all bytes, or pieces of them in order.
    """
    part = _part(file)
    try:
        with part.open("wb") as stream:
            for piece in [content] if isinstance(content, bytes) else content:
                stream.write(piece)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def prepare_file(file: pathlib.Path) -> None:
    """Makes the missing folders of a file, and tries whether `write_file` can write it there.

    Raises:
      OSError: it cannot, or the file is a folder. Nothing is left behind.
    """
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(file))
    made = []
    try:
        for folder in reversed(file.parents):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.append(folder)
        part = _part(file)
        part.touch()
        part.unlink()
    except OSError:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another process may have put something there
                folder.rmdir()
        raise


def _part(file: pathlib.Path) -> pathlib.Path:
    # Unlike a process id, the random name is not met again on another host that shares the file system.
    return file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives an empty folder to write to, which takes the place of `path` when the block ends without an error.

    One writer at a time: what a killed one left unfinished is removed.
    """
    unfinished, replaced = path.with_name(f".{path.name}.unfinished"), path.with_name(f".{path.name}.replaced")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        shutil.rmtree(replaced, ignore_errors=True)
        if path.exists():
            path.rename(replaced)  # a folder that holds files cannot be renamed over
        unfinished.rename(path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def new_entries(folder: pathlib.Path, last: str) -> Iterator[pathlib.Path]:
    """Gives an empty folder to write to, whose files and folders go into `folder` when the block ends without an error.

    They take the places of those with their names, and others stay. `last` is taken away before the first is exchanged, and
    is the last that comes, so that whoever asks for it first never sees a mixture. Unlike `new_folder` it works in a folder
    that cannot be renamed: a mount point, or the one that a process stands in. One writer at a time.
    """
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        new = sorted((item.name for item in unfinished.iterdir()), key=lambda name: name == last)
        (folder / last).unlink(missing_ok=True)
        for name in new:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            os.replace(unfinished / name, folder / name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def link_folder(source: pathlib.Path, target: pathlib.Path) -> None:
    """Makes `target` a folder of the same files, which take no further space; copies where there are no hard links.

    Nobody may write into files of either; to put new ones in their place is harmless.
    """
    shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links, as a mounted bucket
        shutil.copy2(source, target)
