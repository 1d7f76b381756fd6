"""Keeps the catalog near the masks while a long job works, so that deployers need not wait for its end."""

import logging
import threading

from persona_pruner.errors import UserError
from persona_pruner.masks.catalog import PART_ROWS, update_catalog
from persona_pruner.storage.base import Storage

logger = logging.getLogger(__name__)
EVERY = PART_ROWS
"""New masks between two updates: each lists all masks, and reads the new ones into about one full part."""


class CatalogUpdates:
    """Told how many masks there are; updates in a thread of its own, one at a time, and never fails the job."""

    def __init__(self, storage: Storage, connections: int) -> None:
        self._storage, self._connections = storage, connections
        self._updated_at = 0
        self._thread: threading.Thread | None = None

    def masked(self, count: int) -> None:
        """So many masks were committed by this job so far."""
        working = self._thread is not None and self._thread.is_alive()
        if count - self._updated_at < EVERY or working:
            return
        self._updated_at = count
        self._thread = threading.Thread(target=self._update, name="catalog", daemon=True)
        self._thread.start()

    def _update(self) -> None:
        try:
            update_catalog(self._storage, self._connections)
        except UserError as error:
            logger.warning("the catalog was not updated, the next update makes up for it: %s", error)

    def close(self) -> None:
        """Wait for an update under way: the job's last one follows."""
        if self._thread is not None:
            self._thread.join()
