"""What a teacher said, on disk: its K most probable tokens at every position, written once and trained from often.

``docs/cache.md`` has the files' format.
"""

from fastkd import _extras

if _missing := _extras.missing("numpy", "safetensors"):
    raise ImportError(f"fastkd.cache {_missing}")

from fastkd.cache.dataset import CachedDataset as CachedDataset
from fastkd.cache.dataset import pad as pad
from fastkd.cache.format import DamagedFileError as DamagedFileError
from fastkd.cache.reader import Cache as Cache
from fastkd.cache.writer import Writer as Writer
