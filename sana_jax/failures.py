"""What went wrong, where a user can do something about it and JAX says it in its own words. Does not import JAX."""


def too_little_memory(error: RuntimeError) -> str:
    """One line where JAX says that a device's memory did not suffice.

    Raises:
      RuntimeError: `error` itself, where it says something else.
    """
    reason = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" not in reason and "Out of memory" not in reason:
        raise error
    return f"the device has too little memory for this ({reason[:200]})"
