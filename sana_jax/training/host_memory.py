"""Memory of the host, which a training step on a CPU takes anew and gives back every time."""

import ctypes
import pathlib

import jax

# Parameters of mallopt(3).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
# Below /dev by the drivers of GPUs (NVIDIA's, AMD's) and TPUs.
ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*")


def keep_freed(devices: str = "/dev") -> bool:
    """On a machine with no accelerator, has malloc keep what is freed; says whether. Call before JAX starts its threads.

    XLA allocates a program's temporaries anew in every call. glibc maps and unmaps gigabytes for that, and every page of them
    is a fault: measured on a virtual machine, a fifth of the processor's time of a step of 100 million parameters. With one
    arena that maps nothing apart and is never trimmed the next step finds the pages of the last. The process then holds the
    most memory that it ever had in use.

    Args:
      devices: the folder of the machine's device files.
    """
    if jax.config.jax_platforms not in (None, "", "cpu"):
        return False
    if not jax.config.jax_platforms and any(any(pathlib.Path(devices).glob(name)) for name in ACCELERATORS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; others have none
    if mallopt is None:
        return False
    # Threads' own arenas map what is large even where mmap is off, so there is one.
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1), mallopt(ARENA_MAX, 1)])
