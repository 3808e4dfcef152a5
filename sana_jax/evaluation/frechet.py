"""Frechet distance between two sets of pictures, on features."""

import numpy as np
from jaxtyping import Float


def frechet_distance(a: Float[np.ndarray, "N D"], b: Float[np.ndarray, "M D"]) -> float:
    r"""Distance of the normal distributions fitted to two sets of features:

    $$d^2 = \lVert \mu_a - \mu_b \rVert^2 + \mathrm{tr}(\Sigma_a + \Sigma_b - 2 (\Sigma_a \Sigma_b)^{1/2}) ,$$

    the value that FID reports (Heusel et al. 2017), not its root. With N pictures the covariances have rank N - 1 at most
    and the distance is biased upwards, by an amount that depends on N; so the sets must be of one size, and the number only
    means something beside that of real pictures at the same N.

    With X and Y the centred features over $\sqrt{N-1}$, $\Sigma_a = X^T X$ and $\Sigma_b = Y^T Y$, the trace of
    $(\Sigma_a \Sigma_b)^{1/2}$ is the sum of the singular values of $X Y^T$, an [N, N] matrix; no matrix root is needed.

    Raises:
      ValueError: the sets differ in size, or have fewer than two pictures.
    """
    if a.shape != b.shape or len(a) < 2:
        raise ValueError(f"the sets have shapes {a.shape} and {b.shape}; they must be equal, of two or more pictures.")
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    x, y = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
    overlap = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(((mean_a - mean_b) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * overlap)
