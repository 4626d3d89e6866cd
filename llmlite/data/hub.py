"""Data sets on the Hub, or saved by `datasets.Dataset.save_to_disk`.

`datasets` downloads and caches; what is here turns its failures into one message, quickly: without a network `load_dataset` retries for
more than twenty seconds, so the Hub is asked once, with a short timeout, before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llmlite.errors import DataError, first_line

__all__ = ["check_hub", "hub_splits", "saved_splits"]

_TIMEOUT_SECONDS = 10.0


def check_hub(name: str, revision: str | None = None) -> None:
    """Raise DataError unless the data set is in the cache or the Hub says that we may read it."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if _cached(name):
        return
    caches = f"{constants.HF_HUB_CACHE} and {_datasets_cache()}"
    try:
        HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
    except GatedRepoError:
        raise DataError(f"{name}: this data set is gated. Accept its terms on its page on the Hub, and log in with `hf auth login`.") from None
    except RevisionNotFoundError:
        raise DataError(f"{name}: no revision '{revision}' of this data set on the Hub.") from None
    except RepositoryNotFoundError:
        raise DataError(
            f"{name}: neither a file or folder here ({Path.cwd()}) nor a data set on the Hub that you may read. Check the spelling; log in if it is private."
        ) from None
    except HfHubHTTPError as error:
        raise DataError(f"{name}: the Hub refused ({first_line(error)}), and the data set is not in the cache ({caches}).") from None
    except Exception as error:  # no network, offline mode, a proxy: httpx and huggingface_hub have many names for it
        raise DataError(
            f"{name}: no file or folder of that name in {Path.cwd()}, so it was taken for a data set on the Hub; the Hub cannot be reached "
            f"({type(error).__name__}), and it is not in the cache ({caches}). Give a local file, or `builtin:python-docs`, which needs no network."
        ) from None


def hub_splits(name: str, config_name: str | None, revision: str | None) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The splits of a data set on the Hub, downloaded and cached by `datasets`.

    Raises:
        DataError: unreachable, absent, gated, or several configurations and none named.
    """
    import datasets

    check_hub(name, revision)
    try:
        return dict(datasets.load_dataset(name, config_name, revision=revision).items())
    except Exception as error:  # ValueError, DatasetGenerationError, ConnectionError, ...: all mean that it cannot be read
        raise DataError(f"{name}: `datasets` cannot load it: {type(error).__name__}: {str(error).strip()[:600]}") from error


def saved_splits(folder: Path) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The splits of a folder written by `save_to_disk`; a single data set counts as train."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise DataError(f"{folder} looks saved by `datasets`, but cannot be read: {type(error).__name__}: {str(error).strip()[:300]}") from error
    return dict(loaded.items()) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}


def _cached(name: str) -> bool:
    from huggingface_hub import constants

    in_hub = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots"
    return in_hub.is_dir() or (Path(_datasets_cache()) / name.lower().replace("/", "___")).is_dir()


def _datasets_cache() -> str:
    import datasets

    return str(datasets.config.HF_DATASETS_CACHE)
