"""Where token files are kept."""

from toolkit.config import Config
from toolkit.config.base import check_positive
from toolkit.config.paths import LocalPath, PathOrURL


class StoreConfig(Config, kw_only=True):
    """Where token files are kept for good, and where copies of them lie for training."""

    permanent_root: PathOrURL | None = None
    """The source of truth, `<permanent_root>/<dataset_name>/<dataset_config>/`: a folder (NFS, a
    mounted drive) or a URL (`s3://`, `gs://`, `gdrive://`, anything fsspec knows). What is there
    is copied to this machine; what is built here is copied there. null: local folders are all
    there is."""
    tokenized_cache_dir: LocalPath | None = None
    """Local folder of the copies that training reads; default: `dataset.root`."""
    hf_cache_dir: LocalPath | None = None
    """Local folder of raw texts from the Hugging Face hub; default: its own."""
    max_cache_gb: float | None = None
    """Most gigabytes (1e9 bytes) of each of the two folders; what was used longest ago goes first.
    null: no limit. Token files go only if a verified permanent copy exists and no live process uses
    them."""

    def __post_init__(self) -> None:
        check_positive(self, "max_cache_gb")
