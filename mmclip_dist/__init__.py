"""Pretrain medical vision-language models at cluster scale, and use what was trained.

Embed images and texts with a checkpoint:

    from mmclip_dist import MMCLIPModel

    model = MMCLIPModel.from_pretrained("runs/train")                        # a run, or one of its checkpoints
    images = model.encode_image(["chest.png", "other.jpg"])                 # [2, E]
    similarity = images @ model.encode_text(["There is effusion."]).T       # [2, 1]

`load_model`, `crop_image` and the others are the parts that it is made of.

Each name is imported when it is first used: `import mmclip_dist` and `mmclip --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmclip_dist.checkpoint.folder import Meta as Meta
    from mmclip_dist.checkpoint.folder import resolve_checkpoint as resolve_checkpoint
    from mmclip_dist.checkpoint.model_files import load_model as load_model
    from mmclip_dist.config import Config as Config
    from mmclip_dist.config import Source as Source
    from mmclip_dist.config import load_config as load_config
    from mmclip_dist.data.batch import collate as collate
    from mmclip_dist.data.example import ExampleMaker as ExampleMaker
    from mmclip_dist.data.join import JoinedSet as JoinedSet
    from mmclip_dist.data.prompts import load_prompts as load_prompts
    from mmclip_dist.data.prompts import tokenize_prompts as tokenize_prompts
    from mmclip_dist.data.tokenizer import load_tokenizer as load_tokenizer
    from mmclip_dist.data.transforms import WHOLE as WHOLE
    from mmclip_dist.data.transforms import crop_image as crop_image
    from mmclip_dist.evaluate.zeroshot import ZeroShot as ZeroShot
    from mmclip_dist.evaluate.zeroshot import class_directions as class_directions
    from mmclip_dist.evaluate.zeroshot import zero_shot as zero_shot
    from mmclip_dist.inference import Findings as Findings
    from mmclip_dist.inference import MMCLIPModel as MMCLIPModel
    from mmclip_dist.model.build import build_model as build_model
    from mmclip_dist.model.mmclip import MMCLIP as MMCLIP

__version__ = "0.1.0"

_HOMES = {
    "Config": "config", "Source": "config", "load_config": "config",
    "Meta": "checkpoint.folder", "resolve_checkpoint": "checkpoint.folder", "load_model": "checkpoint.model_files",
    "MMCLIP": "model.mmclip", "build_model": "model.build",
    "load_tokenizer": "data.tokenizer", "load_prompts": "data.prompts", "tokenize_prompts": "data.prompts",
    "WHOLE": "data.transforms", "crop_image": "data.transforms",
    "JoinedSet": "data.join", "ExampleMaker": "data.example", "collate": "data.batch",
    "Findings": "inference", "MMCLIPModel": "inference",
    "ZeroShot": "evaluate.zeroshot", "class_directions": "evaluate.zeroshot", "zero_shot": "evaluate.zeroshot",
}  # fmt: skip

__all__ = [
    "MMCLIP", "WHOLE", "Config", "ExampleMaker", "Findings", "JoinedSet", "MMCLIPModel", "Meta", "Source", "ZeroShot",
    "__version__", "build_model", "class_directions", "collate", "crop_image", "load_config", "load_model", "load_prompts",
    "load_tokenizer", "resolve_checkpoint", "tokenize_prompts", "zero_shot",
]  # fmt: skip

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
        return value


def __dir__() -> list[str]:
    return __all__
