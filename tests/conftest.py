"""Shape annotations are checked while the tests run, and only then. What one test has compiled, others need not."""

import atexit
import gc
import os
import shutil
import tempfile

from processes import QUICK

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", QUICK)
# Many tests compile the same programs. pytest's workers and the processes that tests start inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="sana_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tracing makes many objects and few cycles: Python's own intervals cost a file that traces much a tenth of its time.
gc.set_threshold(100_000, 20, 50)

from jaxtyping import install_import_hook

install_import_hook("sana_jax", "beartype.beartype")
