"""Processes of one job on CPUs share what they compile. Python runs this at the start of a process that has this folder on its
PYTHONPATH.

JAX names a compiled program by the devices it is for, too. A CPU's description is another one in each process, so that process 0
would fill the cache for itself alone, and the others would compile everything anew at every start.
"""

import jax
from jax._src import cache_key

cache_key._hash_accelerator_config = cache_key._hash_devices
jax.config.update("jax_share_binary_between_hosts", True)  # process 0 compiles, the others wait for it
jax.config.update("jax_share_binary_between_hosts_timeout_ms", 300_000)
