"""Manifests: small files in the workspace that stand for stores in object storage, and that DVC tracks."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.data.backends import MAX_METADATA_BYTES, Objects
from pipeline.runtime.bucket import Bucket, side_by_side
from pipeline.runtime.errors import PipelineError
from pipeline.runtime.files import read_file, remove, write_text

SCHEMA_VERSION = 1
# Name of the metadata file of a group or array; the root's, at the top of the store, is written last.
_METADATA = "zarr.json"


class _Manifest(BaseModel):
    """The content of a manifest.

    Attributes:
        schema_version: Version of this format.
        url: URL of the store; the last part is a digest of its metadata, so that it always names the same content.
        arrays: Path of each array in the store → SHA-256 of its decoded bytes in C order.
        metadata: Name of each `zarr.json` in it → its SHA-256.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_version: int
    url: str
    arrays: Mapping[str, str]
    metadata: Mapping[str, str]


def publish(path: Path, written: Objects, names: Collection[str], folder: Bucket) -> None:
    """Copy a finished store in object storage to its final place, and then write the manifest that names it.

    Object storage cannot rename. Its server copies the files to a place that their content determines, so that the same
    store has the same manifest on all machines, and a store that a manifest names is never overwritten by another one.

    Args:
        path: The manifest; a local store at this path is removed.
        written: The finished store, wherever it lies.
        names: All of its files.
        folder: The folder that its final place is in.

    Raises:
        PipelineError: A file is missing.
    """
    described = sorted(name for name in names if PurePosixPath(name).name == _METADATA)
    try:
        metadata = dict(zip(described, side_by_side(written.read, described), strict=True))
        digest = hashlib.sha256()
        for name, content in metadata.items():
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
        published = folder / digest.hexdigest()[:32]
        written.bucket.copy_to(published, [name for name in names if name != _METADATA])
        written.bucket.copy_to(published, [_METADATA])
    except FileNotFoundError:
        raise PipelineError(f"{written.location}: something has removed parts of it meanwhile; run again") from None
    published.remove(published.sizes().keys() - set(names))
    digests = {name: json.loads(content).get("attributes", {}).get("sha256") for name, content in metadata.items()}
    manifest = _Manifest(
        schema_version=SCHEMA_VERSION,
        url=published.url,
        arrays={str(PurePosixPath(name).parent): found for name, found in digests.items() if found is not None},
        metadata={name: hashlib.sha256(content).hexdigest() for name, content in metadata.items()},
    )
    if path.is_dir():
        remove(path)
    write_text(path, manifest.model_dump_json(indent=2) + "\n")


def open_objects(path: Path, made_by: str) -> Objects:
    """Open the folder in object storage that a manifest names, for reading.

    Args:
        path: The manifest.
        made_by: Command that makes it, for error messages.

    Raises:
        PipelineError: The manifest is damaged, or of another version; obstore is not installed.
    """
    try:
        manifest = _Manifest.model_validate_json(read_file(path, MAX_METADATA_BYTES))
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise PipelineError(f"{path}: no manifest of a store ({problem}); make it again with `{made_by}`") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise PipelineError(
            f"{path}: schema version {manifest.schema_version}, expected {SCHEMA_VERSION}; run `{made_by}`"
        )
    try:
        return Objects(Bucket(manifest.url), metadata=manifest.metadata)
    except PipelineError as error:
        raise PipelineError(f"{path}: {error}") from None
