"""PDF files as the job needs them. Blocking, and busy: for threads."""

from __future__ import annotations

import threading

from pypdf import PdfReader
from pypdf.errors import PyPdfError

from jobqueue import InvalidInput


class PageUnreadable(Exception):
    """The file is damaged where the page is: another attempt would read the same bytes."""


class Pdf:
    """A PDF file, held in memory: `Pdf(path).text(1)`.

    Raises InvalidInput if there is no such file, or it is not a PDF that can be read.
    """

    def __init__(self, path: str) -> None:
        # A reader is not made for several threads at a time.
        self._lock = threading.Lock()
        try:
            self._reader = PdfReader(path)
            if self._reader.is_encrypted and not self._reader.decrypt(""):
                raise InvalidInput(f"{path} needs a password; save a copy without one and send that")
            self.page_count = len(self._reader.pages)
        except OSError as error:
            raise InvalidInput(f"{path} cannot be opened: {error.strerror}") from error
        except PyPdfError as error:
            raise InvalidInput(f"{path} is not a PDF that can be read: {error}") from error

    def text(self, number: int) -> str:
        """Return the text of a page, by its number from 1; "" for a page that is only a picture. Raises PageUnreadable."""
        with self._lock:
            try:
                return self._reader.pages[number - 1].extract_text()
            # A damaged page raises whatever the parser stumbles over.
            except Exception as error:
                raise PageUnreadable(f"page {number} cannot be read: {error}") from error
