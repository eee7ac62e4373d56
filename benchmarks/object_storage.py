"""Compares the speed of stores on object storage with that of bare client libraries; prints a table.

    pip install -c constraints.txt -e '.[dev,s3]'
    python -m benchmarks.object_storage                 # a store of 1 GB; two minutes on two cores

The server is moto's, in a process of its own on this machine, so that it takes cores from all contenders alike. Every
number is the median over rounds, in each of which every contender runs once. Contenders move the same bytes, those of
the store's shards, as objects of the same sizes, and equally many at a time. This project also encodes images to shards
and decodes shards to images: zstd, checksums and the digest of everything.
"""

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, contextmanager
from pathlib import Path
from urllib.request import Request, urlopen

import click
import numpy as np
import obstore
from obstore.store import S3Store

from pipeline.data import store
from pipeline.runtime.bucket import STORES_VARIABLE
from pipeline.runtime.memory import keep_freed_memory

_PATH = Path("data/perturbed/cifar10/noise.zarr")
# Shape of a trial: 10,000 images of 32x32 pixels in colour, 30.7 MB.
_SHAPE = (10_000, 32, 32, 3)
Contender = tuple[Callable[[list[bytes]], object], Callable[[int], object]]


@contextmanager
def _server(folder: Path) -> Iterator[str]:
    file = folder / "address"
    with subprocess.Popen([sys.executable, "-m", "tests.s3_server", str(file)], stderr=subprocess.DEVNULL) as process:
        while not (file.exists() and file.read_text()):
            time.sleep(0.1)
        url = file.read_text()
        urlopen(Request(f"{url}/bucket", method="PUT")).close()
        yield url
        process.terminate()


def _this_project(images: np.ndarray) -> Contender:
    def write(shards: list[bytes]) -> None:
        with store.replacing_store(_PATH, {"dataset": "cifar10"}) as root:
            array = store.create_images(root, "images", images.shape, {})
            digest = hashlib.sha256()

            def fill(region: tuple[slice, ...]) -> np.ndarray:
                array[region] = images[region]
                return images[region]

            with ThreadPoolExecutor(2) as pool:
                for part in pool.map(fill, store.shard_regions(array)):
                    digest.update(part.data)
            store.finish(array, digest.hexdigest())

    def read(n: int) -> None:
        store.read(store.get_array(store.open_store(_PATH, ""), "images", ""), "")

    return write, read


def _side_by_side(put: Callable[[str, bytes], object], get: Callable[[str], object]) -> Contender:
    def write(shards: list[bytes]) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(put, (f"shard-{number}" for number in range(len(shards))), shards))

    def read(n: int) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(get, (f"shard-{number}" for number in range(n))))

    return write, read


def _contenders(images: np.ndarray, url: str) -> dict[str, Contender]:
    import boto3
    import s3fs

    bare = S3Store("bucket", prefix="obstore", client_options={"allow_http": True})
    boto = boto3.client("s3", endpoint_url=url)
    files = s3fs.S3FileSystem(endpoint_url=url)
    return {
        "this project": _this_project(images),
        "obstore": _side_by_side(
            lambda name, content: obstore.put(bare, name, content, use_multipart=False),
            lambda name: obstore.get(bare, name).bytes(),
        ),
        "boto3": _side_by_side(
            lambda name, content: boto.put_object(Bucket="bucket", Key=f"boto3/{name}", Body=content),
            lambda name: boto.get_object(Bucket="bucket", Key=f"boto3/{name}")["Body"].read(),
        ),
        "s3fs": _side_by_side(
            lambda name, content: files.pipe_file(f"bucket/s3fs/{name}", content),
            lambda name: files.cat_file(f"bucket/s3fs/{name}"),
        ),
    }


@click.command()
@click.option("--gigabytes", default=1.0, show_default=True, help="Size of the store.")
@click.option("--rounds", default=3, show_default=True)
def main(gigabytes: float, rounds: int) -> None:
    """Write and read a store of noise, which does not compress."""
    keep_freed_memory()  # as stages do
    n_trials = max(1, round(gigabytes * 1e9 / np.prod(_SHAPE)))
    images = np.random.default_rng(1).integers(0, 256, (n_trials, *_SHAPE), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as url:
        os.environ |= {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "name",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        with chdir(folder):
            os.environ.pop(STORES_VARIABLE, None)
            _this_project(images)[0]([])  # to a folder first: all others move its shards
            shards = [path.read_bytes() for path in sorted(_PATH.rglob("c.*"))]
            os.environ[STORES_VARIABLE] = "s3://bucket/study"
            seconds: dict[tuple[str, str], list[float]] = {}
            for _ in range(rounds):
                for name, (write, read) in _contenders(images, url).items():
                    began = time.perf_counter()
                    write(shards)
                    written = time.perf_counter()
                    read(len(shards))
                    seconds.setdefault((name, "write"), []).append(written - began)
                    seconds.setdefault((name, "read"), []).append(time.perf_counter() - written)
    speeds = {key: images.nbytes / 1e6 / statistics.median(found) for key, found in seconds.items()}
    click.echo(
        f"{n_trials} trials, {images.nbytes / 1e9:.2f} GB, {len(shards)} shards; MB/s, and as a ratio to obstore"
    )
    for (name, way), speed in speeds.items():
        click.echo(f"{way:6} {name:13} {speed:7.0f} {speed / speeds['obstore', way]:6.2f}")


if __name__ == "__main__":
    main()
