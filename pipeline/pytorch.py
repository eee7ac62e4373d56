"""Perturbations and stores for other training loops in PyTorch: a transform and a data set.

from pipeline.pytorch import Perturb, StoreDataset
damaged = Perturb("noise", level=(0.01, 0.2), generator=np.random.default_rng(0))
images = StoreDataset("data/clean/photos.zarr", "train", transform=damaged)
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from torchvision import tv_tensors
from torchvision.transforms import v2

from pipeline.data import store
from pipeline.data.arrays import Images
from pipeline.data.seeding import level_name
from pipeline.perturbations import PERTURBATIONS
from pipeline.runtime import layout
from pipeline.runtime.errors import PipelineError


def _made_by(path: Path) -> str:
    """Return the command that makes a store at its usual path, for error messages."""
    is_clean = path.parent.name == layout.clean_store("any").parent.name
    stage = ["prepare"] if is_clean else ["perturb", path.parent.name]
    return " ".join(["python -m pipeline", *stage, path.stem])


class Perturb(v2.Transform):  # type: ignore[misc]
    """Damages images as one of `PERTURBATIONS` does; a transform for torchvision's v2 API.

    Accepts what such transforms accept: PIL images (grey or RGB), `tv_tensors.Image`, or tensors, uint8 (..., C, H, W);
    other parts of the same sample, such as labels, boxes and masks, are passed through. The images of a call share one
    level, but each has its own random draws. Videos are damaged frame by frame.

    In a `DataLoader` each worker draws from a stream of its own, derived from the generator and from the seed that
    PyTorch gives the worker, so that `torch.manual_seed` decides all draws.
    """

    _transformed_types = (Image.Image, tv_tensors.Image, tv_tensors.Video, v2.functional.is_pure_tensor)

    def __init__(
        self, name: str, level: float | tuple[float, float], generator: np.random.Generator, **options: str | bool
    ) -> None:
        """Set what damage to apply.

        Args:
            name: Name of the perturbation, such as `noise`.
            level: Its physical value; or the lowest and the highest, between which every call draws one uniformly.
            generator: Source of all draws.
            options: Options of the kernel.

        Raises:
            ValueError: An unknown name or option, or a level out of range for images of any size.
            TypeError: The generator is not an `np.random.Generator`.
        """
        super().__init__()
        if name not in PERTURBATIONS:
            raise ValueError(f"name: unknown {name!r}; choose from {', '.join(PERTURBATIONS)}")
        self.name, self.options = name, options
        self.low, self.high = level if isinstance(level, tuple) else (level, level)
        if not self.low <= self.high:
            raise ValueError(f"level: {level!r}; give the lower one first")
        self.generator = generator
        self._of_worker: tuple[int, np.random.Generator] | None = None
        limit, smaller = (PERTURBATIONS[name].max_level(side, side) for side in (2**16, 64))
        for one in (self.low, self.high):  # the kernel checks them; those for larger images it checks at every call
            checked = one if one > limit else min(one, smaller)
            self._damage(np.zeros((1, 64, 64, 3), np.uint8), checked, np.random.default_rng(0))
        if not isinstance(generator, np.random.Generator):
            raise TypeError(f"generator: of type {type(generator).__name__}; give a `numpy.random.default_rng(seed)`")
        self._entropy = [int(word) for word in np.random.default_rng(generator.integers(2**63)).integers(2**32, size=4)]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Return the level of one call."""
        if self.low == self.high:
            return {"level": self.low}
        if PERTURBATIONS[self.name].unit == "n_pixels":
            return {"level": int(self._rng().integers(int(self.low), int(self.high), endpoint=True))}
        return {"level": float(self._rng().uniform(self.low, self.high))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Return a damaged image, of the same type."""
        level, rng = params["level"], self._rng()
        if isinstance(inpt, Image.Image):
            if inpt.mode not in ("L", "RGB"):
                raise ValueError(f"an image of mode {inpt.mode}; convert it to L or RGB")
            return Image.fromarray(self._damage(np.asarray(inpt), level, rng))
        if inpt.dtype != torch.uint8:
            raise TypeError(f"a tensor of {inpt.dtype}; damage comes before v2.ToDtype: give uint8, 0-255")
        channels, height, width = inpt.shape[-3:]
        batch = inpt.detach().cpu().reshape(-1, channels, height, width).permute(0, 2, 3, 1).contiguous().numpy()
        damaged = torch.from_numpy(self._damage(batch, level, rng)).permute(0, 3, 1, 2).reshape(inpt.shape)
        return tv_tensors.wrap(damaged.contiguous().to(inpt.device), like=inpt)

    def extra_repr(self) -> str:
        """Return the arguments of the transform as text."""
        level = self.low if self.low == self.high else (self.low, self.high)
        return ", ".join(
            [repr(self.name), f"level={level}", *(f"{key}={value!r}" for key, value in self.options.items())]
        )

    def _damage(self, images: Images, level: float, rng: np.random.Generator) -> Images:
        perturbation = PERTURBATIONS[self.name]
        given = int(level) if perturbation.unit == "n_pixels" and float(level).is_integer() else level
        damaged: Images = perturbation.kernel(images, given, rng, **self.options)
        return damaged

    def _rng(self) -> np.random.Generator:
        worker = get_worker_info()
        if worker is None:
            return self.generator
        if self._of_worker is None or self._of_worker[0] != worker.seed:
            self._of_worker = worker.seed, np.random.default_rng([*self._entropy, worker.seed])
        return self._of_worker[1]


class StoreDataset(Dataset[tuple[Any, Any]]):
    """Images of a clean or perturbed store with their labels.

    An item is (`tv_tensors.Image` uint8 (C, H, W), class number), each passed through its transform. All images of the
    split are read when the first one is requested, and kept in memory: once per worker process of a `DataLoader` if
    workers are spawned, once for all of them if they are forked later. From object storage they are read at once.

    Attributes:
        classes: Names of the class numbers.
    """

    def __init__(
        self,
        path: str | Path,
        split: str,
        level: float | None = None,
        trial: int = 0,
        transform: Callable[[Tensor], Any] | None = None,
        target_transform: Callable[[int], Any] | None = None,
    ) -> None:
        """Open a split.

        Args:
            path: `data/clean/NAME.zarr` or `data/perturbed/NAME/PERTURBATION.zarr`; labels of a perturbed store are
                read from the clean one, which must be in its usual place beside it.
            split: `train` or `test`.
            level: Level in a perturbed store; None for a clean one.
            trial: 0-based repetition, for the test images of a perturbed store.
            transform: Applied to an image.
            target_transform: Applied to a class number.

        Raises:
            PipelineError: The store is missing or damaged, or has no such split, level or trial.
        """
        self.path, self.split, self.level, self.trial = Path(path), split, level, trial
        self.transform, self.target_transform = transform, target_transform
        self._images: Images | None = None
        made_by = _made_by(self.path)
        opened = store.open_store(self.path, made_by)
        attributes: Mapping[str, Any] = opened.attrs.asdict()
        self._clean = self.path
        if "perturbation" in attributes:
            if level is None:
                raise PipelineError(f"{self.path}: a perturbed store; say which level")
            root = self.path.absolute().parents[2]  # a link may lead to another place
            self._clean = root / layout.clean_store(str(attributes["dataset"])).relative_to("data")
        elif level is not None:
            raise PipelineError(f"{self.path}: a clean store has no levels")
        if self._name not in opened:
            has = [
                f"{group}/{split}"
                for group in sorted(opened)
                for split in ("train", "test")
                if f"{group}/{split}" in opened
            ]
            raise PipelineError(f"{self.path}: has no {self._name}, but {', '.join(has or sorted(opened))}")
        array = store.get_array(opened, self._name, made_by)
        shape = array.shape
        if len(shape) == 5 and not 0 <= trial < shape[0]:
            raise PipelineError(f"{self.path}/{self._name}: has trials 0 to {shape[0] - 1}, not {trial}")
        prepared_by = _made_by(self._clean)
        clean = store.open_store(self._clean, prepared_by)
        images, labels = (store.get_array(clean, f"{split}/{kind}", prepared_by) for kind in ("images", "labels"))
        if level is not None and array.attrs["source_sha256"] != images.attrs["sha256"]:
            raise PipelineError(f"{self.path}: made from other images than {self._clean} has now; run `{made_by}`")
        self.classes: tuple[str, ...] = tuple(clean.attrs["classes"])  # type: ignore[arg-type]
        self._labels = store.read(labels, prepared_by)[: shape[-4]]
        if self.path.is_file():  # in object storage, which forked workers cannot reach
            self._read()

    @property
    def _name(self) -> str:
        return f"{self.split}/images" if self.level is None else f"{level_name(self.level)}/{self.split}"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        image: Any = tv_tensors.Image(torch.from_numpy(self._read()[index].transpose(2, 0, 1).copy()))
        label: Any = int(self._labels[index])
        return (
            image if self.transform is None else self.transform(image),
            label if self.target_transform is None else self.target_transform(label),
        )

    def _read(self) -> Images:
        if self._images is None:
            made_by = _made_by(self.path)
            array = store.get_array(store.open_store(self.path, made_by), self._name, made_by)
            has_trials = array.ndim == 5
            self._images = store.read_part(array, self.trial, made_by) if has_trials else store.read(array, made_by)
        return self._images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}  # each process reads them itself
