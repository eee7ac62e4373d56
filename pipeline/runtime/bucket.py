"""Access to object storage (S3), which holds stores and the model cache if PIPELINE_STORES names a bucket."""

import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import PurePath
from textwrap import shorten
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from pipeline.runtime.errors import PipelineError, UnreachableError

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ClientConfig, RetryConfig, S3Store

Item = TypeVar("Item")
Result = TypeVar("Result")

# Environment variable with the URL of the bucket and prefix that stores and the model cache are written to.
STORES_VARIABLE = "PIPELINE_STORES"
_EXAMPLE = "s3://bucket/prefix"
# Environment variables with the URL of an S3 server other than Amazon's; the first that is set counts. Amazon's own
# tools read them too.
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION")
_BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
# Timeouts in seconds: for a failing request with all its retries; for one answered slowly or not at all.
_PATIENCE, _REQUEST = 60, 120
# Larger objects are uploaded in parts, since S3 takes no more than 5 GB at once; they too appear whole or not at all.
_PART_BYTES = 2**30
# Seconds before each retry of a request whose response was cut off.
_PAUSES = (0.1, 0.4, 1.6)
# The largest number of concurrent requests; not tied to the number of cores, since requests wait for the network.
_N_REQUESTS = 16
_requests = ThreadPoolExecutor(_N_REQUESTS, "object storage")
_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = _open_client.cache_info().currsize > 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@dataclass(frozen=True)
class Bucket:
    """A folder in object storage.

    A request is retried for one to two minutes if the server is busy (503), reports an internal error or does not
    answer, and a few times within that if its response is cut off.

    Attributes:
        url: Such as `s3://bucket/prefix`.
    """

    url: str

    def __truediv__(self, name: str | PurePath) -> "Bucket":
        return Bucket(f"{self.url}/{PurePath(name).as_posix()}")

    def check(self) -> None:
        """Check that requests to this folder are possible; sends none.

        Raises:
            PipelineError: The URL is not an S3 URL, or obstore is not installed.
        """
        self._client()

    def _client(self) -> "S3Store":
        """Return the client of the whole bucket, which is cached: creating one takes a quarter of a second."""
        name, *prefix = self.url.removeprefix("s3://").split("/")
        is_named = self.url.startswith("s3://") and _BUCKET_NAME.fullmatch(name)
        if not is_named or not all(part.isprintable() and part not in ("", ".", "..") for part in prefix):
            shown = repr(self.url) if "@" not in self.url else "a URL with a password"
            raise PipelineError(f"{shown}: not the URL of a bucket; {STORES_VARIABLE} has the form {_EXAMPLE}")
        if _is_forked:  # a forked process lacks the threads that obstore waits in
            raise PipelineError(
                f"{self.url}: not to be reached from a process that was forked; begin it by spawn (DataLoader: "
                "multiprocessing_context='spawn')"
            )
        return _open_client(name, _find_endpoint())

    def _key(self, name: str = "") -> str:
        return "/".join([*self.url.split("/")[3:], name])

    def sizes(self) -> dict[str, int]:
        """Return the objects in the folder and its subfolders: name → size in bytes.

        Raises:
            UnreachableError: Object storage fails or refuses; all methods that send requests raise this.
        """
        import obstore

        prefix = self._key()

        def ask() -> dict[str, int]:
            listed = obstore.list(self._client(), prefix or None, chunk_size=1000)
            return {found["path"][len(prefix) :]: found["size"] for batch in listed for found in batch}

        return self._ask("list", ask)

    def read(self, name: str, max_bytes: int, part: "GetOptions | None" = None) -> memoryview:
        """Return the content of an object.

        Args:
            name: Its name in the folder.
            max_bytes: The largest size that the whole object may have.
            part: The part to read, as obstore's options; None: all of it.

        Raises:
            FileNotFoundError: There is no such object.
            PipelineError: The object is larger than `max_bytes`.
        """
        import obstore

        def ask() -> memoryview:
            found = obstore.get(self._client(), self._key(name), options=part)
            self.check_size(name, found.meta["size"], max_bytes)
            return memoryview(found.bytes())

        try:
            return self._ask("read", ask)
        except FileNotFoundError as error:
            raise (self._failed("read", error) if "NoSuchBucket" in str(error) else error) from None

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        import obstore

        try:
            self._ask("read", lambda: obstore.head(self._client(), self._key(name)))
        except FileNotFoundError:
            return False
        return True

    def check_size(self, name: str, n_bytes: int, max_bytes: int) -> None:
        """Refuse an object that is too large to be one of ours.

        Raises:
            PipelineError: `n_bytes` is more than `max_bytes`.
        """
        if n_bytes > max_bytes:
            raise PipelineError(f"{self.url}/{name}: {n_bytes:,} bytes, more than the {max_bytes:,} that it can have")

    def write(self, name: str, content: bytes | bytearray | memoryview) -> None:
        """Write an object, whole or not at all."""
        import obstore

        try:
            is_cut = len(content) > _PART_BYTES
            self._ask("write", lambda: obstore.put(self._client(), self._key(name), content, use_multipart=is_cut))
        except FileNotFoundError as error:  # the bucket
            raise self._failed("write", error) from None

    def copy_to(self, other: "Bucket", names: Iterable[str]) -> None:
        """Copy objects to another folder of the bucket, on the server's side.

        Raises:
            FileNotFoundError: One of the objects does not exist.
        """
        import obstore

        def copy(name: str) -> None:
            self._ask("copy", lambda: obstore.copy(self._client(), self._key(name), other._key(name)))

        side_by_side(copy, names)

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; names of objects that do not exist are ignored."""
        import obstore

        if keys := [self._key(name) for name in names]:
            self._ask("delete", lambda: obstore.delete(self._client(), keys))

    def _ask(
        self, verb: str, ask: Callable[[], Result], pauses: Sequence[float] = _PAUSES, began: float | None = None
    ) -> Result:
        """Send a request and return its result; errors of obstore become ours, which name the folder and a remedy.

        obstore itself retries unanswered requests, but not all of those whose response is cut off.

        Args:
            verb: What the request does, for the error message: a user may have the right to write but not to delete.
            ask: Sends the request.
            pauses: Seconds to wait before each of the remaining attempts.
            began: When the first attempt began, in seconds of the monotonic clock; None: this is the first.
        """
        from obstore.exceptions import BaseError, GenericError

        if threading.current_thread() is threading.main_thread():  # it would not see signals while obstore waits
            return _requests.submit(self._ask, verb, ask).result()
        began = time.monotonic() if began is None else began  # of all attempts: each has retries of its own
        try:
            return ask()
        except BaseError as error:
            was_repeated = time.monotonic() - began > _PATIENCE
            if was_repeated or not pauses or not isinstance(error, GenericError):
                raise self._failed(verb, error) from None
        time.sleep(pauses[0])
        return self._ask(verb, ask, pauses[1:], began)

    def _failed(self, verb: str, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"{self.url}: object storage fails or refuses to {verb} ({_reason(error)}); look at {STORES_VARIABLE}, "
            f"{_ENDPOINT_VARIABLES[-1]}, AWS_REGION and your credentials, and run again: finished work is kept"
        )


def find_bucket() -> Bucket | None:
    """Return the bucket that PIPELINE_STORES names, or None if it is not set.

    Raises:
        PipelineError: The value is not the URL of a bucket, or obstore is not installed.
    """
    url = os.environ.get(STORES_VARIABLE)
    if not url:
        return None
    bucket = Bucket(url.rstrip("/"))
    bucket.check()  # before any work is done in vain
    return bucket


def side_by_side(ask: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Send requests concurrently and return their results in the order of `items`; the first error ends all."""
    futures = [_requests.submit(ask, item) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()


def _find_endpoint() -> str:
    """Return the server's URL; empty for Amazon's."""
    for name in (*_CREDENTIALS, *_ENDPOINT_VARIABLES):
        if not os.environ.get(name, "").isprintable():
            raise PipelineError(f"{name}: has a line break or another character that none can have; set it again")
    for name in _ENDPOINT_VARIABLES:
        if endpoint := os.environ.get(name):
            parts = urlsplit(endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname or " " in endpoint:
                raise PipelineError(f"{name}: not the URL of a server; it has the form https://host:port")
            return endpoint
    return ""


@lru_cache(maxsize=8)
def _open_client(name: str, endpoint: str) -> "S3Store":
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError:
        raise PipelineError(f"s3://{name}: needs obstore: `pip install -c constraints.txt -e '.[s3]'`") from None
    options: ClientConfig = {
        # A private server, or one for tests, may have no certificate: an http:// URL says so.
        "allow_http": urlsplit(endpoint).scheme == "http",
        "timeout": timedelta(seconds=_REQUEST),
    }
    retries: RetryConfig = {"max_retries": 20, "retry_timeout": timedelta(seconds=_PATIENCE)}
    try:
        return S3Store(name, client_options=options, retry_config=retries)
    except (BaseError, ValueError) as error:
        raise PipelineError(f"s3://{name}: cannot be asked ({_reason(error)}); look at your credentials") from None


def _reason(error: Exception) -> str:
    """Return obstore's message without the long URL; of the Rust form of the error, only the cause."""
    text = str(error)
    line = text.partition("\n")[0].partition(": <?xml")[0]
    # The server's own error code; or what the system says of the connection; or what is wrong with the certificate.
    causes = (r"<Code>(\w+)</Code>", r'(?:message|error): "([^"]+)"', r"error: (Invalid\w+)")
    cause = next((found[-1] for found in (re.findall(pattern, text) for pattern in causes) if found), None)
    reason = shorten(line.rpartition(" - ")[2].removeprefix("Server returned non-2xx status code: "), 200)
    return f"{reason}, {cause}" if cause else reason
