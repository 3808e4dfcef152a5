"""Shape annotations are checked while the tests run, and only then."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation of small programs that run once: without LLVM's optimisations it is almost halved.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from jaxtyping import install_import_hook

install_import_hook("sana_jax", "beartype.beartype")
