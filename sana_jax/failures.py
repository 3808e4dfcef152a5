"""What went wrong, where a user can do something about it and JAX says it in its own words. Does not import JAX."""


def too_little_memory(error: RuntimeError) -> str | None:
    """One line where JAX says that a device's memory did not suffice; None for its other errors."""
    reason = str(error).partition("\n")[0]
    if "RESOURCE_EXHAUSTED" not in reason and "Out of memory" not in reason:
        return None
    return f"the device has too little memory for this ({reason[:200]})"
