"""detectron2's Mask R-CNN baselines: their published results, configs and weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..checkpoint.download import local_copy
from ..config import ConfigError
from ..lazy_config import model_zoo
from ..messages import nearest_name

MODEL_ZOO = "https://github.com/facebookresearch/detectron2/blob/main/MODEL_ZOO.md"
ZOO_WEIGHTS = "zoo"
"""Value of --weights that downloads the zoo's weights."""
WEIGHT_SUFFIXES = (".pkl", ".pth", ".safetensors")
ZOO_FOLDERS = {
    "coco": ("COCO-InstanceSegmentation/", ""),
    "lvis": ("LVISv0.5-InstanceSegmentation/", "v0.5_"),
    "cityscapes": ("Cityscapes/", ""),
    "detectron1_comparisons": ("Detectron1-Comparisons/", ""),
    "misc": ("Misc/", ""),
    "lazy": ("COCO-InstanceSegmentation/", ""),
    "new_baselines": ("new_baselines/", ""),
}
"""For each folder of our configs, the zoo's folder and the prefix that our file names add."""


@dataclass(frozen=True)
class ZooModel:
    """A Mask R-CNN baseline with the results that detectron2's authors published.

    Attributes:
        config: name in the zoo, without ``.yaml`` or ``.py``.
        model_id: id of the training run, which is part of the weights' URL.
        train_seconds: seconds per iteration of 16 images on 8 V100 GPUs; None if not published.
        inference_seconds: seconds per image on a V100, one image at a time.
        train_gigabytes: memory per GPU in training; None if not published.
        box_ap: AP of boxes on the validation set, in percent; None if not published.
        mask_ap: AP of masks on the validation set, in percent.
        source: where the results are published.
    """

    config: str
    model_id: int
    train_seconds: float | None
    inference_seconds: float
    train_gigabytes: float | None
    box_ap: float | None
    mask_ap: float
    source: str = MODEL_ZOO


_COCO, _LVIS = "COCO-InstanceSegmentation/mask_rcnn_", "LVISv0.5-InstanceSegmentation/mask_rcnn_"
_NEW = "new_baselines/mask_rcnn_"
ZOO_MODELS = (
    ZooModel(_COCO + "R_50_C4_1x", 137259246, 0.584, 0.110, 5.2, 36.8, 32.2),
    ZooModel(_COCO + "R_50_DC5_1x", 137260150, 0.471, 0.076, 6.5, 38.3, 34.2),
    ZooModel(_COCO + "R_50_FPN_1x", 137260431, 0.261, 0.043, 3.4, 38.6, 35.2),
    ZooModel(_COCO + "R_50_C4_3x", 137849525, 0.575, 0.111, 5.2, 39.8, 34.4),
    ZooModel(_COCO + "R_50_DC5_3x", 137849551, 0.470, 0.076, 6.5, 40.0, 35.9),
    ZooModel(_COCO + "R_50_FPN_3x", 137849600, 0.261, 0.043, 3.4, 41.0, 37.2),
    ZooModel(_COCO + "R_101_C4_3x", 138363239, 0.652, 0.145, 6.3, 42.6, 36.7),
    ZooModel(_COCO + "R_101_DC5_3x", 138363294, 0.545, 0.092, 7.6, 41.9, 37.3),
    ZooModel(_COCO + "R_101_FPN_3x", 138205316, 0.340, 0.056, 4.6, 42.9, 38.6),
    ZooModel(_COCO + "X_101_32x8d_FPN_3x", 139653917, 0.690, 0.103, 7.2, 44.3, 39.5),
    ZooModel(_LVIS + "R_50_FPN_1x", 144219072, 0.292, 0.107, 7.1, 23.6, 24.4),
    ZooModel(_LVIS + "R_101_FPN_1x", 144219035, 0.371, 0.114, 7.8, 25.6, 25.9),
    ZooModel(_LVIS + "X_101_32x8d_FPN_1x", 144219108, 0.712, 0.151, 10.2, 26.7, 27.1),
    ZooModel("Cityscapes/mask_rcnn_R_50_FPN", 142423278, 0.240, 0.078, 4.4, None, 36.5),
    ZooModel(
        "Detectron1-Comparisons/mask_rcnn_R_50_FPN_noaug_1x",
        137781281,
        0.273,
        0.043,
        3.4,
        37.8,
        34.9,
    ),
    ZooModel(_NEW + "R_50_FPN_100ep_LSJ", 42047764, None, 0.069, None, 44.6, 40.3),
    ZooModel(_NEW + "R_50_FPN_200ep_LSJ", 42047638, None, 0.069, None, 46.3, 41.7),
    ZooModel(_NEW + "R_50_FPN_400ep_LSJ", 42019571, None, 0.069, None, 47.4, 42.5),
    ZooModel(_NEW + "R_101_FPN_100ep_LSJ", 42025812, None, 0.073, None, 46.4, 41.6),
    ZooModel(_NEW + "R_101_FPN_200ep_LSJ", 42131867, None, 0.073, None, 48.0, 43.1),
    ZooModel(_NEW + "R_101_FPN_400ep_LSJ", 42073830, None, 0.073, None, 48.9, 43.7),
    ZooModel(_NEW + "regnetx_4gf_dds_FPN_100ep_LSJ", 42047771, None, 0.071, None, 46.0, 41.3),
    ZooModel(_NEW + "regnetx_4gf_dds_FPN_200ep_LSJ", 42132721, None, 0.071, None, 48.1, 43.1),
    ZooModel(_NEW + "regnetx_4gf_dds_FPN_400ep_LSJ", 42025447, None, 0.071, None, 48.6, 43.5),
    ZooModel(_NEW + "regnety_4gf_dds_FPN_100ep_LSJ", 42047784, None, 0.073, None, 46.1, 41.6),
    ZooModel(_NEW + "regnety_4gf_dds_FPN_200ep_LSJ", 42047642, None, 0.072, None, 47.8, 43.0),
    ZooModel(_NEW + "regnety_4gf_dds_FPN_400ep_LSJ", 42045954, None, 0.072, None, 48.2, 43.3),
)


@dataclass(frozen=True)
class ModelConfig:
    """A config file and its name in the zoo (None if the zoo has no counterpart)."""

    file: str
    zoo_name: str | None
    is_zoo_file: bool

    @property
    def is_lazy(self) -> bool:
        """Whether the file is a LazyConfig, that is, Python code."""
        return self.file.endswith(".py")

    @property
    def published(self) -> ZooModel | None:
        return next((x for x in ZOO_MODELS if x.config == self.zoo_name), None)


def find_config(config: str) -> ModelConfig:
    """Finds a config file, given by its path or by its name in the model zoo.

    Args:
        config: a path, or a name such as ``COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml``
            or ``new_baselines/mask_rcnn_R_50_FPN_400ep_LSJ.py``, with or without the extension.

    Raises:
        ConfigError: if there is no such file or name. The message suggests the most similar name.
    """
    if Path(config).is_file():
        return ModelConfig(config, _zoo_name(Path(config)), is_zoo_file=False)
    name = config.removesuffix(".yaml").removesuffix(".py")
    endings = [config.removeprefix(name)] if config != name else [".yaml", ".py"]
    file = next(filter(None, (_zoo_file(name + ending) for ending in endings)), None)
    if file is None:
        nearest = nearest_name(name, [x.config for x in ZOO_MODELS])
        ending = Path(find_config(nearest).file).suffix if nearest else ""
        raise ConfigError(
            f"--config {config} is neither a file nor a config of detectron2's model zoo"
            + (f"; did you mean {nearest}{ending}?" if nearest else "")
        )
    return ModelConfig(file, name, is_zoo_file=True)


def _zoo_file(name: str) -> str | None:
    try:
        file: str = model_zoo.get_config_file(name)
    except RuntimeError:
        return None
    return file


def _zoo_name(file: Path) -> str | None:
    """Returns the name of the zoo's config that corresponds to one of our files."""
    folder, prefix = ZOO_FOLDERS.get(file.parent.name, ("", ""))
    name = folder + file.stem.removeprefix(prefix)
    is_counterpart = folder and file.stem.startswith(prefix) and _zoo_file(name + file.suffix)
    return name if is_counterpart else None


def find_weights(weights: str, config: ModelConfig) -> Path:
    """Finds the weights of a config; downloads them if ``weights`` is ``zoo``.

    Args:
        weights: a file, ``zoo`` to download, or a folder. The files in a folder must be named as in
            the zoo (``model_final_f10217.pkl``, optionally in subfolders as in the URL) or by model
            id (``137849600`` with ``.pkl``, ``.pth`` or ``.safetensors``).
        config: the model's config.

    Returns:
        A local file; downloads are stored in $FVCORE_CACHE or, if unset, ~/.torch/iopath_cache.

    Raises:
        ConfigError: if the weights do not exist or cannot be downloaded.
    """
    if weights == ZOO_WEIGHTS:
        return download_weights(config)
    if not weights:
        raise ConfigError("--weights is empty; give a file, or zoo to download the zoo's weights")
    path = Path(weights)
    if path.is_dir():
        return _weights_in_folder(path, config)
    if not path.is_file():
        raise ConfigError(
            f"--weights {weights} does not exist; give a file, or zoo to download the zoo's weights"
        )
    return path


def download_weights(config: ModelConfig) -> Path:
    """Downloads the zoo's weights unless they are in the cache."""
    return Path(local_copy(_weights_url(config), "name it with --weights PATH"))


def _weights_url(config: ModelConfig) -> str:
    try:
        url: str = model_zoo.get_checkpoint_url(f"{config.zoo_name}.yaml")
    except RuntimeError as error:
        raise ConfigError(
            f"the zoo has no weights for {config.zoo_name or config.file}; give --weights PATH"
        ) from error
    return url


def _weights_in_folder(folder: Path, config: ModelConfig) -> Path:
    url = PurePosixPath(_weights_url(config))
    name, model_id = url.name, url.parent.name
    by_zoo = [Path(name), Path(model_id, name), Path(str(config.zoo_name), model_id, name)]
    candidates = [*by_zoo, *(Path(model_id + suffix) for suffix in WEIGHT_SUFFIXES)]
    for candidate in candidates:
        if (folder / candidate).is_file():
            return folder / candidate
    listed = ", ".join(str(candidate) for candidate in candidates)
    raise ConfigError(
        f"--weights {folder} has no weights of {config.zoo_name}: expected one of {listed}"
    )
