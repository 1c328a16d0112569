"""Download a checkpoint into the cache, so that machines with a GPU never wait for a download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from profiler.errors import ModelError, first_line

# These exclude the copies in other formats that many repositories contain (original/, metal/, *.pt, *.gguf).
PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]
IGNORED = ["original/*", "metal/*", "*/*"]


def fetch_checkpoint(checkpoint: str, revision: str | None, *, say: Callable[[str], None]) -> str | None:
    """Download a hub repository into $HF_HOME and return its commit. For a local folder, check that it exists and return None.

    Raises `ModelError` if the folder or repository does not exist, or if the repository requires a token.
    """
    if Path(checkpoint).is_absolute():
        if not (Path(checkpoint) / "config.json").is_file():
            name = Path(checkpoint).name.rpartition("-")[0].replace("--", "/")
            raise ModelError(
                f"no checkpoint {checkpoint} on the cache Volume: create it first with "
                f"modal run modal_jobs/quantize.py --model {name}"
            )
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    say(f"fetching {checkpoint} into the cache")
    try:
        folder = snapshot_download(checkpoint, revision=revision, allow_patterns=PATTERNS, ignore_patterns=IGNORED)
    except GatedRepoError as error:
        raise ModelError(
            f"{checkpoint} needs an account that accepted its terms: accept them on huggingface.co, put the token into a Modal "
            "secret (modal secret create huggingface-secret HF_TOKEN=hf_...) and add --hf-secret huggingface-secret"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{checkpoint} is not on the hub, or needs a token (--hf-secret)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"cannot fetch {checkpoint}: {first_line(error)}") from error
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    say(f"{checkpoint}: {size / 1e9:.1f} GB in the cache")
    return Path(folder).name
