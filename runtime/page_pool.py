"""Pages of the KV cache that sequences share: counted references, and found again by their contents.

A full page is named by a digest of all tokens up to its end, so a page is
found only by a prompt that begins with exactly the same tokens (SHA-256: two
prompts that collide cannot be made). Pages that nobody holds keep their
contents until they are needed, the longest unused going first.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from qcompiler.kernels.errors import InvalidInputError, QCompilerError


class PageAccountError(QCompilerError):
    """Pages are held that nobody owns, or owned that nobody holds."""


def page_key(before: bytes, tokens: Seq[int]) -> bytes:
    """Name of a full page: a digest of its tokens and of the page before (empty for the first)."""
    return hashlib.sha256(before + array("q", tokens).tobytes()).digest()


class PagePool:
    """Hands out pages by number.

    Args:
        pages: Numbers of the pages that it may hand out.
        page_size: Tokens per page.
    """

    def __init__(self, pages: Iterable[int], page_size: int):
        self.page_size = page_size
        self._all = frozenset(pages)
        self._free = sorted(self._all, reverse=True)  # nothing of use in them
        self._holders: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # nobody holds them, contents named
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def total(self) -> int:
        """Pages in the pool."""
        return len(self._all)

    @property
    def available(self) -> int:
        """Pages that can be handed out now, with those that keep contents."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody holds but whose contents can be found."""
        return len(self._cached)

    @property
    def held(self) -> int:
        """Pages that a sequence holds."""
        return len(self._holders)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages to write to, or None if there are not as many."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            taken.append(page)
        return taken

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The pages that hold what the keys name, up to the first that is not there; now held once more."""
        found = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            self._cached.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1
            found.append(page)
        return found

    def publish(self, page: int, key: bytes) -> None:
        """Let a full page be found; one that holds the same already stays the one that is found."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, pages: Iterable[int]) -> None:
        """Let these pages be found no more."""
        for page in pages:
            self._forget(page)

    def release(self, pages: Seq[int]) -> None:
        """Hold a sequence's pages once less; of those with contents its last is reused first.

        Raises:
            InvalidInputError: nobody holds one of them.
        """
        for page in reversed(pages):
            holders = self._holders.get(page)
            if holders is None:
                raise InvalidInputError(f"page {page} was released but is not held")
            if holders > 1:
                self._holders[page] = holders - 1
                continue
            del self._holders[page]
            if page in self._key_of:
                self._cached[page] = None
            else:
                self._free.append(page)

    def check(self, owners: Iterable[Seq[int]]) -> None:
        """Compare the accounts with the page lists of all owners.

        Raises:
            PageAccountError: a page is leaked, lost, or free while somebody uses it.
        """
        counts: dict[int, int] = {}
        for pages in owners:
            for page in pages:
                counts[page] = counts.get(page, 0) + 1
        if counts != self._holders:
            wrong = sorted(p for p in counts | self._holders if counts.get(p) != self._holders.get(p))
            raise PageAccountError(f"pages {wrong[:8]} are held by other numbers of sequences than own them")
        states = [*self._free, *self._cached, *self._holders]
        if len(states) != self.total or set(states) != self._all:
            raise PageAccountError(f"{len(states)} pages are accounted for, {self.total} exist")
        if any(self._key_of.get(page) != key for key, page in self._page_of.items()):
            raise PageAccountError("a name leads to a page that holds something else")
        if len(self._key_of) != len(self._page_of) or any(p in self._key_of for p in self._free):
            raise PageAccountError("a free page still has a name")

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]
            if page in self._cached:
                del self._cached[page]
                self._free.append(page)
