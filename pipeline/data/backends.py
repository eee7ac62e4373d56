"""Backends that zarr reads and writes stores through: a folder or object storage, both within bounds."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from pipeline.runtime.bucket import Bucket
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import check_file, read_file, remove

# Room for twice 65,535 class names of 50 letters each.
MAX_METADATA_BYTES = 2**23


class Folder(LocalStore):
    """A folder from which zarr reads only regular files of bounded size."""

    def __init__(self, root: Path | str, *, read_only: bool = True, max_bytes: int = MAX_METADATA_BYTES) -> None:
        super().__init__(root, read_only=read_only)
        self.max_bytes = max_bytes

    @property
    def location(self) -> str:
        """The folder's path."""
        return str(self.root)

    def bounded(self, max_bytes: int) -> "Folder":
        """Return the same folder for reading, with another bound."""
        return Folder(self.root, max_bytes=max_bytes)

    def names(self) -> set[str]:
        """Return the names of all files in the folder and its subfolders."""
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir()}

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return those of these files that are missing; an empty one, as a power cut leaves it, counts as missing.

        Raises:
            PipelineError: One is not a regular file, or is too large.
        """
        return [name for name in names if not self._has(name)]

    def _has(self, name: str) -> bool:
        self.check(name)
        path = self.root / name
        return path.exists() and path.stat().st_size > 0

    def read(self, name: str) -> bytes:
        """Return the content of a file; raises as `files.read_file`."""
        return read_file(self.root / name, self.max_bytes)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it."""
        remove(self.root / name)

    def check(self, key: str) -> None:
        """Refuse what is not a regular file, or is too large; zarr itself notices missing files.

        Raises:
            PipelineError: As `files.check_file`.
        """
        with suppress(FileNotFoundError):
            check_file(self.root / key, self.max_bytes)

    # All the ways in which zarr reads; each raises what `check` raises.

    async def get(self, key: str, *arguments: Any, **named: Any) -> Buffer | None:
        """Like `LocalStore.get`."""
        self.check(key)
        return await super().get(key, *arguments, **named)

    def get_sync(self, key: str, *arguments: Any, **named: Any) -> Buffer | None:
        """Like `LocalStore.get_sync`."""
        self.check(key)
        return super().get_sync(key, *arguments, **named)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Like `LocalStore.get_partial_values`."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]


class Objects(Store):
    """A folder in object storage from which zarr reads only objects of bounded size.

    zarr has a class for obstore too, but calls it experimental; it reads objects of any size, and gives up when a
    response is cut off.
    """

    supports_writes = supports_deletes = supports_listing = True

    def __init__(
        self,
        bucket: Bucket,
        *,
        read_only: bool = True,
        max_bytes: int = MAX_METADATA_BYTES,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Open the folder.

        Args:
            bucket: The folder in object storage.
            read_only: Whether to refuse writing.
            max_bytes: The largest size that an object can have.
            metadata: Name of each `zarr.json` → its SHA-256, from the manifest of the store; None without one.

        Raises:
            PipelineError: As `Bucket.check`.
        """
        super().__init__(read_only=read_only)
        bucket.check()
        self.bucket, self.max_bytes, self.metadata = bucket, max_bytes, metadata

    @property
    def location(self) -> str:
        """The folder's URL."""
        return self.bucket.url

    def bounded(self, max_bytes: int) -> "Objects":
        """Like `Folder.bounded`."""
        return Objects(self.bucket, max_bytes=max_bytes, metadata=self.metadata)

    def names(self) -> set[str]:
        """Like `Folder.names`."""
        return set(self.bucket.sizes())

    def missing(self, names: Iterable[str]) -> list[str]:
        """Like `Folder.missing`; sends one request per subfolder."""
        wanted = list(names)
        sizes: dict[str, int] = {}
        for folder in {PurePosixPath(name).parent for name in wanted}:
            sizes |= {f"{folder}/{name}": n_bytes for name, n_bytes in (self.bucket / folder).sizes().items()}
        for name in wanted:
            self.bucket.check_size(name, sizes.get(name, 0), self.max_bytes)
        return [name for name in wanted if not sizes.get(name)]

    def read(self, name: str) -> bytes:
        """Like `Folder.read`."""
        return bytes(self.bucket.read(name, self.max_bytes))

    def remove(self, name: str) -> None:
        """Like `Folder.remove`."""
        self.bucket.remove([name, *(f"{name}/{found}" for found in (self.bucket / name).sizes())])

    # The methods that zarr calls. Requests wait in threads, as those of zarr's own LocalStore do.

    def __eq__(self, value: object) -> bool:
        return isinstance(value, Objects) and (value.bucket, value.read_only) == (self.bucket, self.read_only)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Like `Store.get`.

        Raises:
            PipelineError: The object is too large or not what the manifest names; object storage does not answer.
        """
        part: Any = None
        if isinstance(byte_range, RangeByteRequest):
            part = {"range": (byte_range.start, byte_range.end)}
        elif isinstance(byte_range, OffsetByteRequest):
            part = {"range": {"offset": byte_range.offset}}
        elif isinstance(byte_range, SuffixByteRequest):
            part = {"range": {"suffix": byte_range.suffix}}
        try:
            content = await asyncio.to_thread(self.bucket.read, key, self.max_bytes, part)
        except FileNotFoundError:
            return None
        is_named = self.metadata is not None and key.endswith("zarr.json")
        if is_named and hashlib.sha256(content).hexdigest() != self.metadata.get(key):  # type: ignore[union-attr]
            raise PipelineError(f"{self.location}/{key}: not what its manifest names")
        return prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Like `Store.get_partial_values`."""
        return list(await asyncio.gather(*(self.get(key, prototype, byte_range) for key, byte_range in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Like `Store.exists`."""
        return await asyncio.to_thread(self.bucket.has, key)

    async def set(self, key: str, value: Buffer) -> None:
        """Like `Store.set`, in one request: an object appears whole or not at all."""
        self._check_writable()
        await asyncio.to_thread(self.bucket.write, key, value.as_buffer_like())

    async def delete(self, key: str) -> None:
        """Like `Store.delete`."""
        self._check_writable()
        await asyncio.to_thread(self.bucket.remove, [key])

    async def list(self) -> AsyncIterator[str]:
        """Like `Store.list`."""
        for name in await asyncio.to_thread(self.names):
            yield name

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Like `Store.list_prefix`."""
        async for name in self.list():
            if name.startswith(prefix):
                yield name

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Like `Store.list_dir`."""
        folder = self.bucket / prefix if prefix else self.bucket
        for name in {name.partition("/")[0] for name in await asyncio.to_thread(folder.sizes)}:
            yield name


Backend = Folder | Objects
