"""How errors are counted."""

import numpy as np


def relative_error(ours, theirs) -> float:
    """Largest difference over the range of the true values."""
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    return float(np.abs(ours - theirs).max() / np.ptp(theirs))


def picture_error(ours, theirs) -> int:
    """Largest difference of two lists of 8-bit pictures, of 255; the true ones must show something."""
    ours, theirs = (np.stack([np.asarray(picture, np.int16) for picture in batch]) for batch in (ours, theirs))
    assert theirs.std() > 5, "a grey surface is no test"
    return int(np.abs(ours - theirs).max())


def rounding_ratio(ours, theirs, exact) -> float:
    """Root mean square error of our rounded computation over that of theirs, against theirs without rounding."""

    def rms(x):
        return np.sqrt(np.mean(np.square(np.asarray(x, np.float32) - exact)))

    assert rms(ours) > 0, "a computation that is not rounded is no test"
    return float(rms(ours) / rms(theirs))
