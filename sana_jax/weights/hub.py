"""Model folders on the Hugging Face hub."""

# Of a repository, what is read here: no pickles, no second copies.
FILES = ("*.json", "*.safetensors", "tokenizer/*")


def download(hub_id: str) -> str:
    """The local folder of OWNER/NAME, from the hub or the user's cache of it.

    Raises:
      FileNotFoundError: the hub has or gives no such repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(hub_id, allow_patterns=FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"no folder {hub_id} here, and the hub gave nothing by that name: {reason}") from error
